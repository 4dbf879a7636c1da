"""What a user holds after training: images in, packed codes out."""

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Shaped, UInt8

from cib_jax import errors
from cib_jax.config import build
from cib_jax.config.schema import validate
from cib_jax.data import inputs
from cib_jax.data.dataset import resize
from cib_jax.data.inputs import Photos
from cib_jax.distributed import sharding
from cib_jax.inference import export, serialization
from cib_jax.inference.serialization import read_config, read_standard, restore_best, validate_fingerprint
from cib_jax.models import finetune
from cib_jax.models.encoder import Encoder, Params, logits_of_features, packed_of_features, plain_features

# hashing.hasher: What a user holds after training: images in, packed codes out.


Items = (
    UInt8[np.ndarray, "n height width 3"]
    | Sequence[UInt8[np.ndarray, "height width 3"]]
    | Float[np.ndarray, "n *views features"]
)
"""What there is to encode: images of one size, images of several, or features."""

SETTINGS = ("batch_size", "stored_size", "devices")
"""Of a hasher, beside its encoder and parameters."""


@dataclasses.dataclass(frozen=True)
class Hasher:
    """A trained encoder with its parameters; corrections of frozen kernels are taken into them, once, here.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> hasher = cib.Hasher.load("RUN")  # the folder of a run, or of `save`
      >>> images = np.zeros((5, 20, 30, 3), np.uint8)
      >>> codes, logits = hasher.encode(images), hasher.logits(images)
      >>> codes.shape, logits.shape
      ((5, 2), (5, 16))
    """

    encoder: Encoder
    params: Params
    frozen: Params
    batch_size: int = 100
    """Images that a device encodes at once."""
    stored_size: int = 0
    """Side to which images are resized on the host first, as they were for training; 0: they are not."""
    devices: int = 0
    """Of this machine that encode a batch each at the same time; 0: all."""

    def __post_init__(self) -> None:
        # So all that encodes, saves or exports knows nothing of how a backbone was trained, and gives the same bits.
        params, frozen = finetune.settled(self.params, self.frozen, self.encoder.lora_scale)
        object.__setattr__(self, "params", params)
        object.__setattr__(self, "frozen", frozen)

    @classmethod
    def load(
        cls, workdir: pathlib.Path | str, *, backbone_weights: str = "", checkpoint_dir: str | None = None
    ) -> "Hasher":
        """Returns the hasher of a run: of its best checkpoint where it was validated, of its last one elsewhere.

        Or the one that `save` wrote, which holds all its weights.

        Args:
          workdir: the run's folder, or that of `save`.
          backbone_weights: where the frozen backbone's weights lie now; "" takes the place that the run had them from.
          checkpoint_dir: where its checkpoints lie now, as `train.checkpoint_dir`; None: where the run wrote them.

        Raises:
          CheckpointError: `workdir` is no run's folder, or its checkpoint is missing or unusable.
          WeightsError: the frozen backbone's weights are missing, or not those that the run was trained with.
          SavedError: what `save` wrote is damaged, of another version, or told where weights lie that it holds itself.
        """
        workdir = pathlib.Path(workdir)
        if serialization.is_saved(workdir):
            if backbone_weights or checkpoint_dir is not None:
                raise errors.SavedHasherError(f"{workdir}: a saved hasher holds all its weights; give its folder alone")
            encoder, params, frozen, settings = serialization.read(workdir)
            return cls(encoder, params, frozen, **settings)
        config = read_config(workdir)
        if backbone_weights:
            config.backbone_weights = backbone_weights
        if checkpoint_dir is not None:
            config.train.checkpoint_dir = checkpoint_dir
            validate(config)
        encoder, params, frozen, fingerprint = build.encoder(
            config, trained=True, standard=read_standard(workdir, config)
        )
        params, _, extra = restore_best(workdir, params, config)
        validate_fingerprint(fingerprint, extra, workdir)
        return cls(encoder, params, frozen, config.encode_batch, config.data.stored_size, config.devices)

    def save(self, folder: pathlib.Path | str) -> None:
        """Writes the hasher to a folder, from which `load` returns it with the same codes, bit for bit.

        With all its weights, also those of a frozen backbone. Atomic; a hasher that was saved there before is replaced.

        Raises:
          SavedError: the folder is a run's, or cannot be written to.
        """
        settings = {name: getattr(self, name) for name in SETTINGS}
        serialization.write(pathlib.Path(folder), self.encoder, self.params, self.frozen, settings)

    def export(self, path: pathlib.Path | str) -> None:
        """Writes the encoder as one file that `cib_jax.exported.load` runs by JAX and NumPy alone.

        It holds programs for CPUs, CUDA and TPUs, and all weights, and gives the codes of `encode` on one device, bit
        for bit, of images that have the side `stored_size`, or the network's where that is 0. Atomic.

        Raises:
          ExportedError: the file cannot be written.
        """
        sizes = sorted({_size(count, self.batch_size) for count in range(1, self.batch_size + 1)})
        export.write(pathlib.Path(path), self.encoder, self.params, self.frozen, side=self.side, batch_sizes=sizes)

    @property
    def side(self) -> int:
        """Side of the squares to which photos are decoded: as for training, else as `encode` does it."""
        return self.stored_size or self.encoder.image_size

    def encode(self, images: Items) -> UInt8[np.ndarray, "n bytes"]:
        """Returns the packed codes of RGB images, or of features if it was trained on such, `bits` / 8 bytes each.

        Images of one size are resized on the device; a sequence of images of several sizes is resized on the host,
        whose rounding to whole gray levels can turn a bit or two. Features may be a memory map larger than memory; of
        stored views, the first is encoded.

        Raises:
          ValueError: the images are not uint8 with three channels, or the features are other ones than in training; the
            message names shape and type.
        """
        if not len(images):
            return np.zeros((0, self.encoder.bits // 8), np.uint8)
        return self._of_all(self._checked(images), packed_of_features)

    def logits(self, images: Items) -> Float32[np.ndarray, "n bits"]:
        """Returns the logits whose signs are the bits of `encode`, which see, for `Index.rerank`.

        The two are programs of their own: a logit within rounding of 0 may be on the other side.
        """
        if not len(images):
            return np.zeros((0, self.encoder.bits), np.float32)
        return self._of_all(self._checked(images), logits_of_features)

    def _checked(self, images: Items) -> Shaped[np.ndarray, "n ..."]:
        """Returns images, or features, as one array, resized on the host where they are of several sizes."""
        if self.encoder.backbone.takes == "features":
            features: Any = images if hasattr(images, "dtype") else np.asarray(images)
            _check_features(features, self.encoder.backbone.features)
            return features
        if hasattr(images, "dtype"):
            _check_images(np.asarray(images), 4)
        else:
            for image in images:
                _check_images(np.asarray(image), 3)
        side = self.stored_size
        if len({np.shape(image) for image in images}) > 1:
            side = side or self.encoder.image_size
        return np.stack([resize(np.asarray(image), side) for image in images]) if side else np.asarray(images)

    def _of_all(self, whole: Shaped[np.ndarray, "n ..."], of_features: Callable[..., Array]) -> np.ndarray:
        size = _size(len(whole), self.batch_size)
        batches = (whole[start : start + size] for start in range(0, len(whole), size))
        over = self._mesh if len(whole) > size else None
        return self._of_batches(batches, size=size, over=over, of_features=of_features)

    def encode_batches(
        self,
        batches: Iterable[UInt8[np.ndarray, "batch height width 3"]],
        on_images: Callable[[int], None] = lambda images: None,
        *,
        size: int = 0,
    ) -> UInt8[np.ndarray, "n bytes"]:
        """Returns the packed codes of all images of `batches`, none larger than `size` (0: than the first)."""
        first = next(batches := iter(batches), None)
        if first is None:
            return np.zeros((0, self.encoder.bits // 8), np.uint8)
        batches = itertools.chain([first], batches)
        return self._of_batches(batches, on_images, size=size, over=self._mesh, of_features=packed_of_features)

    def logits_of_batches(
        self,
        batches: Iterable[UInt8[np.ndarray, "batch height width 3"]],
        on_images: Callable[[int], None] = lambda images: None,
        *,
        size: int,
    ) -> Float32[np.ndarray, "n bits"]:
        """Returns the logits of all images of `batches`, of which there is one, none larger than `size`."""
        return self._of_batches(batches, on_images, size=size, over=self._mesh, of_features=logits_of_features)

    def _of_batches(
        self,
        batches: Iterable[UInt8[np.ndarray, "batch height width 3"]],
        on_images: Callable[[int], None] = lambda images: None,
        *,
        size: int,
        over: Mesh | None,
        of_features: Callable[..., Array],
    ) -> np.ndarray:
        params, frozen = self._on_mesh if over else (self.params, self.frozen)

        def compute(images: np.ndarray, first: int) -> Array:
            features = plain_features(self.encoder, params, frozen, images, over)
            return of_features(self.encoder, params, features, over)

        rows = sharding.map_batches(compute, batches, on_images, size=size, over=over)
        return np.concatenate([np.asarray(row) for row in rows])

    @functools.cached_property
    def _mesh(self) -> Mesh | None:
        return sharding.local_mesh(self.devices)

    @functools.cached_property
    def _on_mesh(self) -> tuple[Params, Params]:
        # Once, not at every call: a deep network has half a gigabyte.
        return sharding.replicate((self.params, self.frozen), self._mesh)


def _size(count: int, most: int) -> int:
    """Returns the batch size for `count` images: one of a few, not any, since each is compiled once."""
    return min(most, 1 << (count - 1).bit_length())


def _check_features(features: Any, wanted: int) -> None:
    floating = np.issubdtype(features.dtype, np.floating) or features.dtype == jnp.bfloat16
    if not floating or features.ndim not in (2, 3) or features.shape[-1] != wanted:
        raise ValueError(
            f"images: wanted features [n, {wanted}] in floating point, as in training, got {features.dtype} "
            f"{list(features.shape)}; compute them by the model that gave the features it was trained on"
        )


def _check_images(images: np.ndarray, dimensions: int) -> None:
    if images.dtype != np.uint8 or images.ndim != dimensions or images.shape[-1] != 3 or 0 in images.shape:
        wanted = "[n, height, width, 3]" if dimensions == 4 else "[height, width, 3]"
        raise ValueError(
            f"images: wanted uint8 {wanted} in RGB, got {images.dtype} {list(images.shape)}; convert them first, "
            "for example with numpy.asarray(PIL.Image.open(path).convert('RGB'))"
        )


# hashing.photo_codes: From photos on disk to packed codes, for a loop of one's own: a folder, some files, or one.


class PhotoCodes(NamedTuple):
    """Codes of photos, and which these are."""

    paths: list[str]
    codes: UInt8[np.ndarray, "photos bytes"]
    unreadable: list[tuple[str, str]]
    """Paths of the others, and why they cannot be read."""


def encode_photos(hasher: Hasher, photos: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> PhotoCodes:
    """Returns the packed codes of photos, decoded on all cores while others are encoded.

    hasher = cib_jax.Hasher.load("runs/photos")
    paths, codes, unreadable = cib_jax.encode_photos(hasher, "PHOTOS")

    Args:
      hasher: trained on images.
      photos: a folder, which is looked through with all folders in it, in the order of paths; a photo; or several.

    Raises:
      ValueError: the hasher was trained on features.
      DataError: there is no such file, the folder holds no photos, or they cannot be reached any more.

    Examples:
      >>> import os
      >>> import cib_jax as cib
      >>> hasher = cib.Hasher.load("RUN")
      >>> paths, codes, unreadable = cib.encode_photos(hasher, "PHOTOS")
      >>> [os.path.basename(path) for path in paths], codes.shape, len(unreadable)
      (['blue.png', 'green.png', 'red.png'], (3, 2), 0)
    """
    if hasher.encoder.backbone.takes != "images":
        raise ValueError("hasher: it was trained on features; pass those to its encode")
    with inputs.blame_field("photos"):
        return _encoded(hasher, _found(photos, hasher.side))


def _encoded(hasher: Hasher, found: Photos) -> PhotoCodes:
    paths: list[str] = []
    unreadable: list[tuple[str, str]] = []

    def batches() -> Iterator[UInt8[np.ndarray, "batch side side 3"]]:
        batch = []
        for number, read in found.read([range(len(found.names))]):
            path = os.path.join(found.root, found.names[number])
            if read.content is None:
                unreadable.append((path, read.reason))
                continue
            paths.append(path)
            batch.append(read.content)
            if len(batch) == hasher.batch_size:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)

    codes = hasher.encode_batches(batches(), size=hasher.batch_size)
    return PhotoCodes(paths, codes, unreadable)


def _found(photos: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], side: int) -> Photos:
    if not isinstance(photos, str | os.PathLike):
        paths = [os.path.abspath(path) for path in photos]
        return Photos("the list", paths, os.sep, side)
    place = os.path.abspath(os.path.expanduser(photos))
    if os.path.isfile(place) and not place.lower().endswith(inputs.LISTS):
        return Photos(place, [os.path.basename(place)], os.path.dirname(place), side)
    found = inputs.load_inputs(place, takes="images", size=side)
    assert isinstance(found, Photos)
    return found
