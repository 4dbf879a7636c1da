"""Writes compatibility/: what version 0.1.0 left on a user's disk, and what it answered, for tests of later versions.

`python -m tests.golden.make_compatibility`, run once, at commit c596f95, before the package was redesigned. It calls
the package's internal modules as they were then and cannot be run with later code: the files it wrote are the point.

`artifacts.tar.xz` holds, all made by version 0.1.0:

- `experiments/`: a user's own config files, with every import and field spelling that they could have.
- `digits/`: the folder of a finished run on images; `digits_stopped/`: one that SIGTERM stopped within an epoch.
- `lora/`: a finished run that learned low-rank corrections of a pretrained network.
- `features/`: a finished run on features with validation, so that its best checkpoint is not its last, and
  `features_config_older.json`, its config.json as it was before the later
  fields were added; `features.npz`, its data.
- `taught/`: a finished run with a teacher (`objective=diffusion`), on the same features; `taught_stopped/`: one that
  SIGTERM stopped after its teacher had ended.
- `hashers/`: what `Hasher.save` wrote; `exports/`: what `Hasher.export` wrote.
- `photos/`: generated photos, one of them no photo; `codes/`: their corpus, by --mode=encode; `index/`: their index, by
  --mode=index; `query.png`.

`answers.npz` holds inputs with the codes and logits that version 0.1.0 gave for them, `answers.json` the paths of the
corpus and the answers of the index.

Weights and moments of the runs on digits are pruned and rounded to two significant bits, saved again by the package's
own `Checkpoints`, and measured again by its `evaluate`: so they compress to a few percent. Photos and rows whose logits
come near 0 are left out, or marked, since another CPU may round them to the other side.
"""

import contextlib
import importlib.util
import io
import json
import os
import pathlib
import shutil
import signal
import tarfile

import jax
import numpy as np
import PIL.Image
import rich.console
from cib_jax.config.field_values import ADDED, AROUND
from cib_jax.data.images import gather
from cib_jax.hashing.restoring import read_config, read_standard
from cib_jax.jobs.encode import encode
from cib_jax.jobs.evaluate import evaluate
from cib_jax.jobs.index import index
from cib_jax.jobs.train import train
from cib_jax.training.state import create_train_state

import cib_jax as cib
from cib_jax.config import from_config
from cib_jax.data import photos
from cib_jax.jobs import preemption, setting
from cib_jax.training.checkpoint import Checkpoints
from configs import features as features_config
from configs import index as index_config

HERE = pathlib.Path(__file__).parent / "compatibility"
PLACE = pathlib.Path("/tmp/cib_jax_compatibility")
"""Folder of the artifacts while they are made; index and corpus record its path."""
QUIET = rich.console.Console(quiet=True)
SURE = 1e-3
"""A bit whose logit is nearer to 0 may be another one on another CPU."""
WHEN = 1_700_000_000
"""Time of the photos' last change."""

FINISHED = '''"""An experiment of a user's own."""

from cib_jax.configs import digits


def get_config():
    c = digits.get_config()
    c.bits = 16
    c.hidden = 32
    c.image_size = 8
    c.binary = "deterministic"
    c.beta = 0.0
    c.k = 100
    c.batch_size = 32
    c.epochs = 8
    c.data.train_per_class = 50
    c.train.checkpoint_every = 8
    c.encode_batch = 100
    c.cache.dir = "none"
    c.log.writers = ""
    c.report.write = False
    return c
'''

STOPPED = '''"""An experiment of a user's own that sets fields of every group, in the spelling of version 0.1.0."""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    c = default.get_config()
    c.seed = 1
    c.bits = 16
    c.k = 100
    c.backbone = "convnet"
    c.frozen = False
    c.image_size = 8
    c.hidden = 32
    c.objective = "cibhash"
    c.binary = "stochastic"
    c.augment = "digits"
    c.temperature = 0.5
    c.sharpness = 6.0
    c.teacher.neighbours = 5
    c.teacher.dimensions = 8
    c.batch_size = 16
    c.micro_batch = 0
    c.epochs = 3
    c.learning_rate = 1e-3
    c.fine_tune.blocks = 0
    c.fine_tune.lora_alpha = 8.0
    c.data.name = "digits"
    c.data.labelled = True
    c.data.protocol = "own"
    c.data.queries = 297
    c.data.train_per_class = 10
    c.data.validation = "none"
    c.data.max_megapixels = 178
    c.train.checkpoint_every = 100
    c.cache.dir = "none"
    c.log.writers = ""
    c.report.write = False
    c.compare.methods = "itq, cibhash temperature=0.5"
    c.tune.score = "neighbour_agreement"
    return c
'''

TAUGHT = '''"""An experiment of a user's own on features, with a teacher."""

from configs import features


def get_config():
    c = features.get_config()
    c.bits = 16
    c.hidden = 32
    c.objective = "diffusion"
    c.batch_size = 32
    c.epochs = 3
    c.teacher.bits = 16
    c.teacher.neighbours = 5
    c.teacher.dimensions = 8
    c.teacher.steps = 5
    c.data.dir = "features.npz"
    c.data.queries = 60
    c.data.train_images = 120
    c.cache.dir = "none"
    c.log.writers = ""
    c.report.write = False
    return c
'''

LORA = '''"""An experiment of a user's own that learns low-rank corrections of a pretrained network."""

from configs import digits


def get_config():
    c = digits.get_config()
    c.bits = 16
    c.hidden = 8
    c.backbone = "efficientnet_lite0"
    c.image_size = 32
    c.binary = "deterministic"
    c.k = 100
    c.batch_size = 16
    c.epochs = 1
    c.fine_tune.blocks = 1
    c.fine_tune.learning_rate = 1e-2
    c.fine_tune.lora_rank = 1
    c.data.queries = 1697
    c.data.train_per_class = 5
    c.cache.dir = "none"
    c.log.writers = ""
    c.report.write = False
    return c
'''


def experiment(name: str):
    """Returns the config of a file in experiments/."""
    spec = importlib.util.spec_from_file_location(name, f"experiments/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def features():
    """Returns the config of a run on features.npz, validated after each epoch."""
    made = experiment("taught")
    made.objective = "cibhash"
    made.teacher = features_config.get_config().teacher
    made.epochs = 5
    made.learning_rate = 0.1
    made.data.validation = "query_half"
    made.train.validate_every = 1
    return made


@contextlib.contextmanager
def terminated(asked: int):
    """Sends SIGTERM when a loop asks for the `asked`-th time whether to stop."""
    noted, count = preemption.noted, [0]

    @contextlib.contextmanager
    def counted():
        with noted() as stop:

            def stopped():
                count[0] += 1
                if count[0] == asked:
                    os.kill(os.getpid(), signal.SIGTERM)
                return stop()

            yield stopped

    preemption.noted = counted
    try:
        yield
        raise AssertionError("it was not stopped")
    except preemption.Preempted as stopped:
        print(stopped.message)
    finally:
        preemption.noted = noted


def rounded(leaf, largest, bits: int = 2):
    """Returns an array with `bits` significant bits, 0 where `largest` is false."""
    part, exponent = np.frexp(np.asarray(leaf))
    return np.where(largest, np.ldexp(np.round(part * 2**bits) / 2**bits, exponent), 0).astype(leaf.dtype)


def compressible(workdir: pathlib.Path) -> None:
    """Prunes and rounds the newest checkpoint of a run, and removes the others."""
    config = read_config(workdir)
    _, initial, _, _ = from_config.encoder(config)
    template = create_train_state(initial, from_config.optimiser(config))
    with Checkpoints((workdir / "checkpoints").absolute(), read_only=True) as checkpoints:
        state, now, extra = checkpoints.restore(template)
    kept = jax.tree.map(
        lambda leaf: np.abs(leaf) >= np.quantile(np.abs(leaf), 0.75 if leaf.size > 1000 else 0), state.params
    )

    def like(tree):  # the moments of what is pruned are 0 too
        return jax.tree.map(rounded, tree, kept)

    if now.finished:  # nothing reads them any more
        moments = jax.tree.map(np.zeros_like, state.opt_state)
    else:
        adam, *rest = state.opt_state
        moments = (adam._replace(mu=like(adam.mu), nu=like(adam.nu)), *rest)
    state = type(state)(state.step, like(state.params), moments)
    shutil.rmtree(workdir / "checkpoints")
    with Checkpoints((workdir / "checkpoints").absolute()) as checkpoints:
        checkpoints.save(jax.tree.map(jax.numpy.asarray, state), now, extra)


def sure(workdir: str) -> dict[str, np.ndarray]:
    """Returns which bits of a run's codes any CPU gives, packed as the codes are."""
    config, folder = read_config(pathlib.Path(workdir)), pathlib.Path(workdir)
    run = setting.prepare(config, folder, QUIET, trained=True, standard=read_standard(folder, config))
    hasher, found = cib.Hasher.load(workdir), {}
    for side, items in (("query", run.splits.query), ("database", run.splits.database)):
        logits = hasher.logits(gather(items.images, np.arange(len(items))))
        found[f"{workdir}_{side}_sure"] = np.packbits(np.abs(logits) > SURE, axis=1)
    return found


def waves(number: int) -> PIL.Image.Image:
    """Returns a photo-like image: a few coloured waves."""
    generator = np.random.default_rng(number)
    x, y = np.meshgrid(np.linspace(0, 1, 32 + number % 5), np.linspace(0, 1, 24 + number % 7))
    waves = [a * x + b * y + c for a, b, c in generator.uniform(0.5, 3, (3, 3))]
    return PIL.Image.fromarray(np.round(127 + 120 * np.sin(2 * np.pi * np.stack(waves, axis=-1))).astype(np.uint8))


def clear(hasher: cib.Hasher, inputs: np.ndarray, count: int) -> np.ndarray:
    """Returns the numbers of `count` inputs with many different codes and no logit near 0."""
    margins = np.abs(hasher.logits(inputs)).min(axis=1)
    codes, order = hasher.encode(inputs), np.argsort(-margins)[: np.sum(margins > 20 * SURE)]
    _, first = np.unique(codes[order], axis=0, return_index=True)
    kept = order[[*np.sort(first), *np.setdiff1d(np.arange(len(order)), first)][:count]]
    print(f"least |logit| {margins[kept].min():.4f}, {len(np.unique(codes[kept], axis=0))} codes of {count} inputs")
    return np.sort(kept)


def clear_photos(hasher: cib.Hasher, count: int) -> list[bytes]:
    """Returns some photos, as PNG files."""
    made = []
    for number in range(400):
        file = io.BytesIO()
        waves(number).save(file, "PNG")
        made.append(file.getvalue())
    kept = clear(hasher, np.stack([photos.decode(content, hasher.side) for content in made]), count)
    return [made[number] for number in kept]


def write_photos(contents: list[bytes]) -> None:
    names = ["a/one.png", "a/two.png", "b/three.png", "b/four ü.png", "b/copy of three.png", "five.png", "six.png"]
    for name, content in zip(names, [*contents[:4], contents[2], *contents[4:6]], strict=True):
        path = pathlib.Path("photos", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    pathlib.Path("photos/a/broken.jpg").write_bytes(b"no picture")
    pathlib.Path("query.png").write_bytes(contents[6])
    for path in pathlib.Path("photos").rglob("*.*"):
        os.utime(path, (WHEN, WHEN))


def clear_rows(hasher: cib.Hasher, rows: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Returns some rows, their codes and logits."""
    some = rows[clear(hasher, rows, count)]
    return {"inputs": some, "codes": hasher.encode(some), "logits": hasher.logits(some)}


def write_features() -> np.ndarray:
    generator = np.random.default_rng(0)
    labels = np.arange(300) % 6
    rows = generator.normal(size=(6, 12))[labels] * 2 + generator.normal(size=(300, 12)) + np.linspace(-3, 3, 12)
    rows = rows.astype(np.float32)
    np.savez_compressed("features.npz", features=rows, labels=labels, ids=np.array([f"row {at}" for at in range(300)]))
    return rows


def make() -> tuple[dict[str, np.ndarray], dict]:
    """Makes everything in the working directory; returns the answers."""
    pathlib.Path("experiments").mkdir()
    for name, text in {"finished": FINISHED, "stopped": STOPPED, "taught": TAUGHT, "lora": LORA}.items():
        pathlib.Path(f"experiments/{name}.py").write_text(text)
    arrays: dict[str, np.ndarray] = {}

    train(experiment("finished"), "digits", console=QUIET)
    compressible(pathlib.Path("digits"))
    print("digits: MAP", evaluate("digits", console=QUIET)["map"])
    with terminated(8):
        train(experiment("stopped"), "digits_stopped", console=QUIET)
    compressible(pathlib.Path("digits_stopped"))

    train(experiment("lora"), "lora", console=QUIET)
    compressible(pathlib.Path("lora"))
    print("lora: MAP", evaluate("lora", console=QUIET)["map"])

    rows = write_features()
    print("features: MAP", train(features(), "features", console=QUIET)["map"])
    assert sorted(os.listdir("features/checkpoints")) == ["12", "15", "3"]  # the last two and the best
    older = read_config(pathlib.Path("features")).to_dict()
    for name in ADDED.keys() | AROUND:
        group, _, field = name.rpartition(".")
        (older[group] if group else older).pop(field)
    older = {name: value for name, value in older.items() if value != {}}
    pathlib.Path("features_config_older.json").write_text(json.dumps(older, indent=2) + "\n")
    print("taught: MAP", train(experiment("taught"), "taught", console=QUIET)["map"])
    with terminated(5):  # three epochs of the teacher, a program each, then the second of the run
        train(experiment("taught"), "taught_stopped", console=QUIET)
    assert pathlib.Path("taught_stopped/teacher/coordinates.npy").exists()
    for workdir in ("digits", "features", "taught"):
        arrays |= sure(workdir)

    from sklearn.datasets import load_digits

    images = np.repeat((load_digits().images * 255 / 16).astype(np.uint8)[..., None], 3, axis=-1)
    for name, workdir, inputs in (
        ("convnet", "digits", images),
        ("features", "features", rows),
        ("lora", "lora", images),
    ):
        hasher = cib.Hasher.load(workdir)
        arrays |= {f"{name}_{part}": array for part, array in clear_rows(hasher, inputs[:300], 20).items()}
        if name == "lora":
            continue  # with the whole network, they would be large
        # A batch of one size alone, so that the export has few programs.
        hasher = cib.Hasher(hasher.encoder, hasher.params, hasher.frozen, batch_size=1)
        hasher.save(f"hashers/{name}")
        pathlib.Path("exports").mkdir(exist_ok=True)
        hasher.export(f"exports/{name}.zip")

    hasher = cib.Hasher.load("digits")
    write_photos(clear_photos(hasher, 7))
    done = encode("digits", PLACE / "photos", "codes", part=3, console=QUIET)
    assert (done.files, done.unreadable, done.missing) == (8, 1, 0)
    index("index", PLACE / "photos", workdir="digits", config=index_config.get_config(), console=QUIET)
    paths, codes = cib.read_corpus("codes")
    arrays["corpus_codes"] = codes
    collection = cib.Collection.open("index")
    _, query, _ = cib.encode_photos(collection.hasher, "query.png")
    logits = collection.hasher.logits(photos.decode("query.png", collection.side)[None])
    nearest = collection.nearest(query, 5)
    ordered = collection.reranked(logits, nearest)
    arrays |= {"query_codes": query, "query_logits": logits, "index_codes": collection.codes}

    def about(hits):
        found = zip(hits, collection.photos([hit.number for hit in hits]), strict=True)
        return [{"path": photo.path, "id": photo.id, "distance": hit.distance} for hit, photo in found]

    everything = collection.photos(range(len(collection)))
    fields = ("path", "id", "size", "width", "height")
    answers = {
        "corpus_paths": paths,
        "index": [{field: getattr(photo, field) for field in fields} for photo in everything],
        "nearest": about(nearest[0]),
        "within_4": about(collection.within(query, 4)[0]),
        "reranked": about(ordered[0]),
        "groups_0": [[everything[number].path for number in group] for group in collection.groups(0)],
    }
    return arrays, answers


def tidied(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Returns a file of the archive without what is this machine's."""
    if entry.name.endswith((".lock", "__pycache__")):
        return None
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mtime = WHEN
    return entry


def main() -> None:
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir()
    os.chdir(PLACE)
    arrays, answers = make()
    HERE.mkdir(exist_ok=True)
    with tarfile.open(HERE / "artifacts.tar.xz", "w:xz", preset=9) as archive:
        for path in sorted(PLACE.iterdir()):
            archive.add(path, path.name, filter=tidied)
    np.savez_compressed(HERE / "answers.npz", **arrays)
    (HERE / "answers.json").write_text(json.dumps(answers, indent=1, ensure_ascii=False) + "\n")
    # The index is taken to have moved only where its first place is gone.
    shutil.rmtree(PLACE)


if __name__ == "__main__":
    main()
