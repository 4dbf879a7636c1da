"""Parity with the published code: loss, gradient, bottleneck, 50 steps of training, codes, views and MAP.

The other side is the reader's own copy of https://github.com/zexuanqiu/CIBHash, which is imported and not rewritten:

    git clone https://github.com/zexuanqiu/CIBHash DIR && python -m benchmarks.parity --published DIR

Its network and its data set are replaced by features, so that nothing is downloaded. The command prints one row for
each comparison, and exits with 1 if one of them does not hold.
"""

import argparse
import importlib
import pathlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image

import cib_jax as cib
from benchmarks import measuring
from cib_jax.augment import augment
from cib_jax.augment.features import standard

BITS, FEATURES, IMAGES, BATCH, STEPS = 32, 4096, 640, 64, 50  # 16 bits would train for 80 epochs, whatever is asked
VIEW_SIZE = 224  # pixels, fixed in the published code


class Row(NamedTuple):
    """One comparison: what was compared, the largest difference, and how large it may be."""

    what: str
    difference: float
    allowed: float
    unit: str = ""

    @property
    def holds(self) -> bool:
        """Whether the difference is as small as it must be."""
        return self.difference <= self.allowed


class Published(NamedTuple):
    """Parts of the published code."""

    model: Any  # class of the method, with features in place of VGG-16
    evaluation: Any  # module of the metric
    transform: Callable[[PIL.Image.Image], Any]  # one random view of an image


def import_published(directory: pathlib.Path) -> Published:
    """Imports the reader's copy; its network is replaced by the identity, its data set by batches of features."""
    if not (directory / "model" / "CIBHash.py").is_file():
        print(f"--published must be a clone of github.com/zexuanqiu/CIBHash, got {directory}", file=sys.stderr)
        sys.exit(2)
    sys.path.insert(0, str(directory))
    sys.modules.setdefault("seaborn", types.ModuleType("seaborn"))  # imported there, and never used
    method = importlib.import_module("model.CIBHash")
    evaluation, data = (importlib.import_module(f"utils.{name}") for name in ("evaluation", "data"))

    class OnFeatures(method.CIBHash):  # type: ignore[misc, name-defined]
        """The published method, whose images are features already."""

        def load_data(self) -> None:
            self.losses: list[tuple[float, ...]] = []

        def define_parameters(self) -> None:
            nn = importlib.import_module("torch.nn")
            self.vgg = types.SimpleNamespace(features=nn.Identity(), classifier=nn.Identity())
            self.encoder = nn.Sequential(nn.Linear(FEATURES, 1024), nn.ReLU(), nn.Linear(1024, BITS))
            self.criterion = method.NtXentLoss(self.hparams.batch_size, self.hparams.temperature)
            self.initial = head_params(self)

        def forward(self, *views: Any) -> Any:
            terms = super().forward(*views)
            self.losses.append(tuple(float(terms[name].detach()) for name in ("loss", "contra_loss", "kl_loss")))
            return terms

    class NoData(data.Data):  # type: ignore[misc, name-defined]
        """The published views, without the images."""

        def load_datasets(self) -> None:
            pass

    return Published(OnFeatures, evaluation, NoData("none").train_transforms)


def head_params(model: Any) -> dict[str, Any]:
    """Returns a copy of the published head's weights, as parameters of ours."""
    hidden, _, out = model.encoder
    pairs = {"hidden": hidden, "out": out}
    kernels = {name: np.array(layer.weight.detach().numpy().T) for name, layer in pairs.items()}
    biases = {name: np.array(layer.bias.detach().numpy()) for name, layer in pairs.items()}
    return {"head": {name: {"kernel": kernels[name], "bias": biases[name]} for name in pairs}}


def make_model(published: Published) -> Any:
    """Returns the published model with its published settings."""
    settings = {"dataset": "none", "encode_length": BITS, "batch_size": BATCH, "epochs": 1, "lr": 1e-3, "seed": 8888}
    settings |= {"temperature": 0.3, "weight": 0.001, "cuda": False, "num_runs": 1, "num_workers": 0}
    settings |= {"validate_frequency": 20, "num_bad_epochs": 6, "model_path": "none"}
    return published.model(argparse.Namespace(**settings))


def loss_rows(published: Published) -> Iterator[Row]:
    """Compares loss terms and the gradient by the logits, for logits near 0 and for large ones."""
    import torch

    model = make_model(published)
    model.define_parameters()
    model.encoder = torch.nn.Identity()
    for scale in (0.3, 3.0):
        generator = np.random.default_rng(0)
        logits = [generator.normal(scale=scale, size=(BATCH, BITS)).astype(np.float32) for _ in range(2)]
        theirs = [torch.from_numpy(values.copy()).requires_grad_() for values in logits]
        terms = model(*theirs, torch.device("cpu"))
        terms["loss"].backward()

        def loss(logits1: jax.Array, logits2: jax.Array) -> Any:
            return cib.cib_loss(jax.random.key(0), logits1, logits2, temperature=0.3, beta=0.001, stochastic=False)

        (_, ours), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*map(jnp.asarray, logits))
        size = f"logits of deviation {scale:g}"
        for name, term in (("loss", "loss"), ("contrast", "contra_loss"), ("kl", "kl_loss")):
            value = float(terms[term].detach())
            yield Row(f"{name}, {size}", abs(float(ours[name]) - value) / abs(value), 1e-5, "relative")
        for number, (gradient, their) in enumerate(zip(gradients, theirs, strict=True), 1):
            expected = their.grad.numpy()
            error = np.abs(np.asarray(gradient) - expected).max() / np.abs(expected).max()
            yield Row(f"gradient by the logits of view {number}, {size}", float(error), 1e-5, "of the largest")


def training_rows(published: Published) -> Iterator[Row]:
    """Compares 50 steps of the published training session with ours: every loss, the weights, and the codes.

    In double precision: in single precision, a logit within rounding of 0 makes a bit that differs, and from there on
    the two trainings drift apart, as two runs of one side on different machines do.
    """
    import torch

    torch.set_default_dtype(torch.float64)
    jax.config.update("jax_enable_x64", True)
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(10, FEATURES))
    images = centers[generator.integers(10, size=IMAGES)] + 0.5 * generator.normal(size=(IMAGES, FEATURES))
    views = np.maximum(images + 0.3 * generator.normal(size=(2, IMAGES, FEATURES)), 0)
    order = np.concatenate([generator.permutation(IMAGES) for _ in range(STEPS * BATCH // IMAGES)])
    batches = [views[:, rows] for rows in order.reshape(STEPS, BATCH)]

    model = make_model(published)
    loader = [(torch.from_numpy(first), torch.from_numpy(second), None) for first, second in batches]
    model.data = types.SimpleNamespace(get_loaders=lambda *args, **kwargs: (loader, None, None, None), topK=1000)
    model.run_training_session(1, types.SimpleNamespace(log=lambda *args: None))

    made: dict[str, Any] = {"backbone": "none", "bits": BITS, "standard": standard([views[0]])}
    encoder, _, _ = cib.create_encoder(jax.random.key(0), **made)
    optimizer = optax.adam(1e-3)
    state = cib.create_train_state(model.initial, optimizer)

    @jax.jit
    def step(state: Any, first: jax.Array, second: jax.Array) -> Any:
        key = jax.random.key(0)  # nothing is drawn
        return cib.train_step_on_features(
            state, first, second, key, encoder=encoder, optimizer=optimizer, stochastic=False
        )

    losses = []
    for first, second in batches:
        state, terms = step(state, first, second)
        losses.append([float(terms[name]) for name in ("loss", "contrast", "kl")])
    errors = np.abs(np.subtract(losses, model.losses)).max(axis=0)
    for name, error in zip(("loss", "contrast", "kl"), errors, strict=True):
        yield Row(f"{name} of each of {STEPS} steps", float(error), 1e-5, "nats")
    theirs = head_params(model)["head"]
    moved = jax.tree.map(lambda now, before: np.abs(now - before).max(), theirs, model.initial["head"])
    apart = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).mean(), dict(state.params["head"]), theirs)
    share = max(jax.tree.leaves(jax.tree.map(lambda a, b: float(a / b), apart, moved)))
    yield Row(f"weights after {STEPS} steps", share, 1e-5, "mean, of the largest change")
    model.eval()
    with torch.no_grad():
        codes = model.encode_discrete(torch.from_numpy(views[0])).numpy()
    ours = np.asarray(encoder.head(state.params, jnp.asarray(views[0]))) > 0
    yield Row(f"bits of {IMAGES} codes after training", float((ours != (codes > 0)).mean()), 0, "that differ")
    torch.set_default_dtype(torch.float32)
    jax.config.update("jax_enable_x64", False)


def metric_rows(published: Published) -> Iterator[Row]:
    """Compares MAP@k of random codes whose labels follow the codes, with ties in the order of the database."""
    generator = np.random.default_rng(0)
    labels = [generator.integers(10, size=count) for count in (200, 5000)]
    prototypes = generator.random((10, BITS)) < 0.5
    bits = [prototypes[of] ^ (generator.random((len(of), BITS)) < 0.3) for of in labels]
    queries, database = (np.where(of, 1.0, -1.0) for of in bits)
    # The published ranking breaks ties arbitrarily. One more column sets them apart by place, far less than a bit does.
    place = np.linspace(0, -1e-3, len(database))[:, None]
    theirs = np.hstack([queries, np.ones((len(queries), 1))]), np.hstack([database, place])
    hot = [np.eye(10)[of] for of in labels]
    packed = [cib.pack_bits(np.where(of, 1.0, -1.0)) for of in bits]
    for k in (1, 1000, 5000):
        expected = published.evaluation.calculate_top_map(*theirs, *hot, k)
        measured = cib.mean_average_precision(*packed, *labels, k=k)
        yield Row(f"MAP@{k} of 200 queries on 5,000 codes", abs(float(measured) - float(expected)), 1e-6)


def view_rows(published: Published, count: int) -> Iterator[Row]:
    """Compares the distributions of six statistics of many views of one photo."""
    import sklearn.datasets
    import torch

    torch.manual_seed(0)
    photo = PIL.Image.fromarray(sklearn.datasets.load_sample_image("china.jpg"))
    photo = photo.crop((100, 0, 527, 427)).resize((256, 256), PIL.Image.Resampling.BICUBIC)
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    theirs = np.stack([statistics(published.transform(photo).numpy().transpose(1, 2, 0)) for _ in range(count)])

    @jax.jit
    def draw(key: jax.Array, images: jax.Array) -> jax.Array:
        keys = augment.image_keys(key, len(images))
        return augment.view_each(keys, images, image_size=VIEW_SIZE, mean=mean, deviation=deviation)

    images = np.repeat(np.asarray(photo)[None], 100, axis=0)
    ours = []
    for number in range(-(-count // len(images))):
        ours += [statistics(view) for view in np.asarray(draw(jax.random.key(number), images))]
    # Two samples of one distribution are farther apart than this in one case of ten thousand (Kolmogorov and Smirnov).
    allowed = 2.23 * (2 / count) ** 0.5
    for name, a, b in zip(STATISTICS, np.stack(ours[:count]).T, theirs.T, strict=True):
        points = np.sort(np.concatenate([a, b]))
        below = [np.searchsorted(np.sort(sample), points, side="right") / count for sample in (a, b)]
        yield Row(f"{name} of {count:,} views", float(np.abs(below[0] - below[1]).max()), allowed, "of all views")


STATISTICS = ("brightness", "contrast", "redness", "colorfulness", "sharpness", "left minus right")


def statistics(view: np.ndarray) -> np.ndarray:
    """Returns six numbers of a normalized view [height, width, 3], in the order of `STATISTICS`."""
    pixels = view * np.float32((0.229, 0.224, 0.225)) + np.float32((0.485, 0.456, 0.406))
    gray, half = pixels.mean(axis=2), pixels.shape[1] // 2
    colorful = (pixels.max(axis=2) - pixels.min(axis=2)).mean()
    # Eighths of a level of 8 bits are rounded away: where a view is gray, the sides differ by rounding alone.
    values = [gray.mean(), gray.std(), (pixels[..., 0] - gray).mean(), colorful]
    values += [np.abs(np.diff(gray, axis=1)).mean(), gray[:, :half].mean() - gray[:, half:].mean()]
    return np.round(np.array(values, np.float64), 3)


def main() -> None:
    """Reads the flags, prints the table and exits with 1 if a comparison does not hold."""
    parser = measuring.parser("Parity with the published code.", "torch", "torchvision", "cv2")
    parser.add_argument("--published", type=pathlib.Path, required=True, help="clone of github.com/zexuanqiu/CIBHash")
    parser.add_argument("--views", type=int, default=5000, help="views of one photo")
    flags = parser.parse_args()
    published = import_published(flags.published)
    rows = [*loss_rows(published), *training_rows(published), *metric_rows(published)]
    rows += view_rows(published, flags.views)
    print(f"{measuring.machine('jax', 'torch', 'torchvision')}\n")
    cells = [
        [row.what, f"{row.difference:.2g}", f"{row.allowed:.2g}", row.unit, "yes" if row.holds else "NO"]
        for row in rows
    ]
    measuring.print_table(["compared", "largest difference", "allowed", "unit", "holds"], cells)
    sys.exit(not all(row.holds for row in rows))


if __name__ == "__main__":
    main()
