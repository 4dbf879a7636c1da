"""A trained encoder in use: images, features or photos on disk in, packed codes out."""

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int8, Shaped, UInt8

from cib_jax.codes import byte_count, first_bits
from cib_jax.config import build
from cib_jax.config.schema import validate
from cib_jax.console import library_bar
from cib_jax.data import feature_files, inputs
from cib_jax.data.dataset import resize
from cib_jax.data.inputs import Photos
from cib_jax.distributed import sharding
from cib_jax.errors import ConfigError, SavedHasherError, UserError, whole_number
from cib_jax.files import count
from cib_jax.inference import export, serialization
from cib_jax.inference.serialization import read_config, read_standard, restore_best, validate_fingerprint
from cib_jax.models import finetune
from cib_jax.models.encoder import (
    Encoder,
    Params,
    cut_encoder,
    logits_of_features,
    packed_of_features,
    plain_features,
    quantize,
)

Items = (
    UInt8[np.ndarray, "n height width 3"]
    | Sequence[UInt8[np.ndarray, "_ _ 3"]]
    | Float[np.ndarray, "n *views features"]
)
"""Items to encode: images of one size, images of several sizes, or features."""
Batches = Iterable[Shaped[np.ndarray, "_ ..."]]
Stage = Callable[..., Array]  # the program that follows the backbone: `packed_of_features` or `logits_of_features`
SETTINGS = ("batch_size", "stored_size", "devices")  # fields that are saved with the encoder and its parameters


@dataclasses.dataclass(frozen=True)
class Hasher:
    """A trained encoder with its parameters.

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
    """Number of images that a device encodes at once."""
    stored_size: int = 0
    """Side in pixels to which images are resized on the host first, as they were for training; 0 does not resize."""
    devices: int = 0
    """Number of this machine's devices that encode one batch each at the same time; 0 uses all."""

    def __repr__(self) -> str:
        return repr(self.encoder).replace("Encoder", type(self).__name__, 1)

    def __post_init__(self) -> None:
        # LoRA factors and retrained blocks are merged into the backbone once, here, whoever constructs the hasher.
        # Encoding, saving and exporting then need not know how the backbone was trained, and give the same bits.
        merged = finetune.merge_params(self.params, self.frozen, self.encoder.lora_scale)
        for name, params in zip(("params", "frozen"), merged, strict=True):
            object.__setattr__(self, name, params)

    @classmethod
    def load(
        cls, workdir: pathlib.Path | str, *, backbone_weights: str = "", checkpoint_dir: str | None = None
    ) -> "Hasher":
        """Returns the hasher of a run or of `save`.

        A run's hasher has the parameters of the best checkpoint if the run was validated, of the last one otherwise.

        Args:
          workdir: Folder of a run or of `save`.
          backbone_weights: Present location of the frozen backbone's weights; "" takes the one in the run's config.
          checkpoint_dir: Present location of the run's checkpoints; None takes the one in the run's config.

        Raises:
          CheckpointError: `workdir` is not the folder of a run, or its checkpoint is missing or unusable.
          WeightsError: The frozen backbone's weights are missing, or not those of the run.
          SavedHasherError: The saved hasher is damaged or of another version, or a location was given for it.
        """
        workdir = pathlib.Path(workdir)
        if (workdir / serialization.FILE).exists():
            if backbone_weights or checkpoint_dir is not None:
                raise SavedHasherError(
                    f"backbone_weights and checkpoint_dir must not be given for {workdir}, a saved hasher, which holds "
                    "all its weights",
                    field="backbone_weights" if backbone_weights else "checkpoint_dir",
                )
            encoder, params, frozen, settings = serialization.read(workdir)
            return cls(encoder, params, frozen, **settings)
        config = read_config(workdir)
        if backbone_weights:
            config.backbone_weights = backbone_weights
        if checkpoint_dir is not None:
            config.train.checkpoint_dir = checkpoint_dir
            validate(config, trained=True)
        encoder, params, frozen, fingerprint = build.encoder(
            config, trained=True, standard=read_standard(workdir, config)
        )
        params, _, extra = restore_best(workdir, params, config)
        validate_fingerprint(fingerprint, extra, workdir)
        return cls(encoder, params, frozen, config.encode_batch, config.data.stored_size, config.devices)

    def save(self, folder: pathlib.Path | str) -> None:
        """Writes the hasher to a folder, from which `load` returns it with the same codes, bit for bit.

        The folder holds all weights, also those of a frozen backbone. A hasher saved there before is replaced, in one
        step.

        Raises:
          SavedHasherError: The folder is that of a run, or cannot be written.
        """
        settings = {name: getattr(self, name) for name in SETTINGS}
        serialization.write(pathlib.Path(folder), self.encoder, self.params, self.frozen, settings)

    def export(self, path: pathlib.Path | str) -> None:
        """Writes the encoder as one file, for `cib_jax.exported.load`.

        That needs no more than JAX, NumPy and flatbuffers. The file holds all weights and programs for CPUs, CUDA and
        TPUs. They give the codes of `encode` on one device, bit for bit, for images of side `stored_size`, or of the
        network's input size if that is 0. The file is written in one step.

        Raises:
          ExportedError: The file cannot be written.
        """
        sizes = sorted({_batch_size(count, self.batch_size) for count in range(1, self.batch_size + 1)})
        export.write(pathlib.Path(path), self.encoder, self.params, self.frozen, side=self.side, batch_sizes=sizes)

    @property
    def side(self) -> int:
        """Side in pixels of the squares to which photos are decoded."""
        return self.stored_size or self.encoder.image_size

    def cut(self, bits: int) -> "Hasher":
        """Returns the hasher of the first `bits` bits of the codes, to be saved, exported or given to an index.

        Short codes are about as good as those of a hasher trained for them if this one was trained with `nested`, for
        16, 32, 64, … bits.

        Raises:
          ConfigError: The codes do not have so many bits.
        """
        self._validate_bits(bits)
        encoder, params = cut_encoder(self.encoder, self.params, bits)
        return dataclasses.replace(self, encoder=encoder, params=params)

    def _validate_bits(self, bits: int) -> None:
        whole_number("bits", bits, 1, ConfigError)
        if bits > self.encoder.bits:
            raise ConfigError(f"bits must be at most {self.encoder.bits}, those of a code, got {bits}", field="bits")

    def encode(self, images: Items, *, bits: int | None = None, progress: bool = True) -> UInt8[np.ndarray, "n bytes"]:
        """Returns packed codes of ⌈`bits` / 8⌉ bytes each.

        Images of one size are resized on the device; a sequence of images of several sizes is resized on the host,
        where rounding to whole gray levels can change a bit or two.

        Args:
          images: RGB images, or features if the hasher was trained on features. Features may be a memory map larger
            than memory; if several views are stored, the first is encoded.
          bits: Number of first bits that are returned, as of a hasher trained with `nested`; None returns all.
          progress: Whether several batches show a progress bar in terminals and notebooks.

        Raises:
          ValueError: The images are not uint8 with three channels, or the features not those of training; or the codes
            do not have so many bits.
        """
        if bits is not None:
            self._validate_bits(bits)
        codes = self._apply_to_items(packed_of_features, images, progress)
        return codes if bits is None else first_bits(codes, bits)

    def logits(self, images: Items, *, progress: bool = True) -> Float32[np.ndarray, "n bits"]:
        """Returns the logits whose signs are the bits of `encode`, for `Index.rerank`.

        Takes `images` and `progress` as `encode` does. Codes and logits are computed by two programs: a logit within
        rounding of 0 may have the other sign.
        """
        return self._apply_to_items(logits_of_features, images, progress)

    def features(self, images: Items, *, progress: bool = True) -> Int8[np.ndarray, "n features"]:
        """Returns the backbone's features as whole numbers from −127 to 127, for ranking by their cosine.

        Takes `images` and `progress` as `encode` does.
        """
        return self._apply_to_items(_quantized, images, progress)

    def logits_and_features(
        self, images: Items, *, progress: bool = True
    ) -> tuple[Float32[np.ndarray, "n bits"], Float32[np.ndarray, "n features"]]:
        """Returns the logits and the backbone's features, which are the inputs of the hash head.

        Takes `images` and `progress` as `encode` does.
        """
        both = self._apply_to_items(_logits_and_features, images, progress)
        return both[:, : self.encoder.bits], both[:, self.encoder.bits :]

    def _apply_to_items(self, stage: Stage, images: Items, progress: bool) -> np.ndarray:
        if not len(images):
            return self._empty(stage)
        items = self._validated(images)
        size = _batch_size(len(items), self.batch_size)
        batches = (_finite(items[start : start + size], start) for start in range(0, len(items), size))
        several = len(items) > size
        unit = "items" if self.encoder.backbone.takes == "features" else "images"
        with library_bar("Encoding", len(items), progress and several, unit) as advance:
            return self._apply(stage, batches, advance, size, self._mesh if several else None)

    def _validated(self, images: Items) -> Shaped[np.ndarray, "n ..."]:
        """Returns images or features as one array; images of several sizes are resized."""
        if self.encoder.backbone.takes == "features":
            features = as_array(images)
            count = self.encoder.backbone.features
            if (
                not jnp.issubdtype(features.dtype, jnp.floating)
                or features.ndim not in (2, 3)
                or features.shape[-1] != count
            ):
                raise UserError(
                    f"images must be floating-point features [n, {count}] for this hasher, got {features.dtype} "
                    f"{list(features.shape)}; compute them with the model that computed the features of training",
                    field="images",
                )
            return features
        if hasattr(images, "dtype"):
            _validate_images(np.asarray(images), 4)
        else:
            for image in images:
                _validate_images(np.asarray(image), 3)
        side = self.stored_size
        if len({np.shape(image) for image in images}) > 1:
            side = side or self.encoder.image_size
        return np.stack([resize(np.asarray(image), side) for image in images]) if side else np.asarray(images)

    def encode_batches(
        self, batches: Batches, on_images: Callable[[int], None] = lambda images: None, *, size: int = 0
    ) -> UInt8[np.ndarray, "n bytes"]:
        """Returns the packed codes of all images of `batches`.

        Args:
          batches: Batches of at most `size` images.
          on_images: Function that is called with the number of images of each encoded batch.
          size: Batch size for which the programs are compiled; 0 takes that of the first batch.
        """
        return self._apply(packed_of_features, batches, on_images, size, self._mesh)

    def encode_with_features(
        self, batches: Batches, on_images: Callable[[int], None] = lambda images: None, *, size: int = 0
    ) -> tuple[UInt8[np.ndarray, "n bytes"], Int8[np.ndarray, "n features"]]:
        """Returns what `encode` and `features` return of all images of `batches`.

        Takes the arguments of `encode_batches`, and gives the same codes.
        """
        both = self._apply(_packed_and_features, batches, on_images, size, self._mesh)
        width = byte_count(self.encoder.bits)
        return np.ascontiguousarray(both[:, :width]), np.ascontiguousarray(both[:, width:]).view(np.int8)

    def logits_of_batches(
        self, batches: Batches, on_images: Callable[[int], None] = lambda images: None, *, size: int
    ) -> Float32[np.ndarray, "n bits"]:
        """Returns the logits of all images of `batches`; takes the arguments of `encode_batches`."""
        return self._apply(logits_of_features, batches, on_images, size, self._mesh)

    def _apply(
        self, stage: Stage, batches: Batches, on_images: Callable[[int], None], size: int, over: Mesh | None
    ) -> np.ndarray:
        params, frozen = self._replicated if over else (self.params, self.frozen)

        def compute(images: np.ndarray, first: int) -> Array:
            features = plain_features(self.encoder, params, frozen, images, over)
            return stage(self.encoder, params, features, over)

        rows = sharding.map_batches(compute, batches, on_images, size=size, over=over)
        return np.concatenate([self._empty(stage), *(np.asarray(row) for row in rows)])

    def _empty(self, stage: Stage) -> np.ndarray:
        bits = self.encoder.bits
        if stage is logits_of_features:
            return np.zeros((0, bits), np.float32)
        if stage is _logits_and_features:
            return np.zeros((0, bits + self.encoder.backbone.features), np.float32)
        if stage is _quantized:
            return np.zeros((0, self.encoder.backbone.features), np.int8)
        features = self.encoder.backbone.features if stage is _packed_and_features else 0
        return np.zeros((0, byte_count(bits) + features), np.uint8)

    @functools.cached_property
    def _mesh(self) -> Mesh | None:
        return sharding.local_mesh(self.devices)

    @functools.cached_property
    def _replicated(self) -> tuple[Params, Params]:
        # Copied once, not at every call: the weights of a deep network take half a gigabyte.
        return sharding.replicate((self.params, self.frozen), self._mesh)


def _logits_and_features(
    encoder: Encoder, params: Params, features: Float[Array, "batch features"], over: Mesh | None
) -> Float[Array, "batch logits_and_features"]:
    return jnp.concatenate([logits_of_features(encoder, params, features, over), features], axis=1)


def _quantized(
    encoder: Encoder, params: Params, features: Float[Array, "batch features"], over: Mesh | None
) -> Int8[Array, "batch features"]:
    return quantize(features)


def _packed_and_features(
    encoder: Encoder, params: Params, features: Float[Array, "batch features"], over: Mesh | None
) -> UInt8[Array, "batch bytes_and_features"]:
    # The program of the codes is that of `encode`, so that they are the same to the last bit.
    codes = packed_of_features(encoder, params, features, over)
    return jnp.concatenate([codes, jax.lax.bitcast_convert_type(quantize(features), jnp.uint8)], axis=1)


def initial_params(hasher: Hasher, params: Params, frozen: Params) -> Params:
    """Returns the trained parameters of a hasher in place of `params`; `frozen` are those that stay.

    Raises:
      ConfigError: The shapes differ, or the weights of the frozen backbone.
    """
    if jax.tree.map(jnp.shape, hasher.params) != jax.tree.map(jnp.shape, params):
        mine, theirs = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, hasher.params))
        raise ConfigError(
            f"init_from must have trained parameters of the same shapes, {mine:,} numbers, got {theirs:,}; use its "
            "bits, hidden, backbone, image_size, frozen and data of as many features",
            field="init_from",
        )
    if not all(map(np.array_equal, *map(jax.tree.leaves, (frozen, hasher.frozen)))):
        raise ConfigError("init_from must have the same frozen backbone; use its backbone_weights", field="init_from")
    return hasher.params


def _batch_size(count: int, largest: int) -> int:
    """Returns the batch size for `count` images: a power of two or `largest`, since each size is compiled once."""
    return min(largest, 1 << (count - 1).bit_length())


def as_array(images: Any) -> Any:
    """Returns images or features of any library as an array of NumPy or JAX; raises `UserError` if none can be made."""
    if isinstance(images, jax.Array):
        return images
    try:
        array = np.asarray(images)
    except (TypeError, ValueError, RuntimeError) as error:  # such as a tensor on a GPU, or of PyTorch's bfloat16
        raise UserError(
            f"images must be an array that NumPy can read ({error}); convert them first, for example with "
            "tensor.detach().cpu().float().numpy()",
            field="images",
        ) from error
    # JAX takes neither big-endian nor extended numbers.
    odd = array.dtype.kind == "f" and (not array.dtype.isnative or array.dtype.itemsize > 8)
    return feature_files.as_float32(array) if odd else array


def _finite(rows: Shaped[np.ndarray, "n ..."], first: int) -> Shaped[np.ndarray, "n ..."]:
    """Returns rows of images or features; raises `UserError` if one, numbered from `first`, is NaN or infinite."""
    if rows.dtype != np.uint8:
        bad = ~np.isfinite(feature_files.as_float32(rows)).all(axis=tuple(range(1, rows.ndim)))
        if bad.any():
            row, what = first + int(np.argmax(bad)), "a NaN, an infinity, or a number beyond the range of float32"
            raise UserError(f"images must be finite, but row {row} has {what}; remove it", field="images")
    return rows


def _validate_images(images: np.ndarray, dimensions: int) -> None:
    if images.dtype != np.uint8 or images.ndim != dimensions or images.shape[-1] != 3 or 0 in images.shape:
        shape = "[n, height, width, 3]" if dimensions == 4 else "[height, width, 3]"
        raise UserError(
            f"images must be uint8 {shape} in RGB, got {images.dtype} {list(images.shape)}; convert them first, for "
            "example with numpy.asarray(PIL.Image.open(path).convert('RGB'))",
            field="images",
        )


class PhotoCodes(NamedTuple):
    """Codes of photos, with their paths."""

    paths: list[str]
    codes: UInt8[np.ndarray, "photos bytes"]
    unreadable: list[tuple[str, str]]
    """Path of each photo that could not be read, and the reason."""

    def __repr__(self) -> str:
        photos, width = self.codes.shape
        codes = f"{count(photos, 'photo')} → codes of {count(width, 'byte')}"
        return f"PhotoCodes({codes}, {len(self.unreadable):,} unreadable)"


def encode_photos(
    hasher: Hasher, photos: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, progress: bool = True
) -> PhotoCodes:
    """Returns the packed codes of photos on disk, which are decoded on all cores while others are encoded.

    Args:
      hasher: Hasher that was trained on images.
      photos: A folder, which is searched with all its subfolders, in the order of paths; a photo; or several photos.
      progress: Whether to show a progress bar in terminals and notebooks.

    Raises:
      ValueError: The hasher was trained on features.
      DataError: There is no such file, the folder holds no photos, or they cannot be reached any more.

    Examples:
      >>> import os
      >>> import cib_jax as cib
      >>> hasher = cib.Hasher.load("RUN")
      >>> paths, codes, unreadable = cib.encode_photos(hasher, "PHOTOS")
      >>> [os.path.basename(path) for path in paths], codes.shape, len(unreadable)
      (['blue.png', 'green.png', 'red.png'], (3, 2), 0)
    """
    if hasher.encoder.backbone.takes != "images":
        raise UserError(
            "hasher must have been trained on images, got one trained on features; pass features to hasher.encode",
            field="hasher",
        )
    paths: list[str] = []
    unreadable: list[tuple[str, str]] = []

    def squares() -> Iterator[UInt8[np.ndarray, "side side 3"]]:
        for number, photo in found.read([range(len(found.names))]):
            path = os.path.join(found.root, found.names[number])
            if photo.content is None:
                unreadable.append((path, photo.reason))
                advance(1)
            else:
                paths.append(path)
                yield photo.content

    with inputs.blame_field("photos"):
        found, readable = _find_photos(photos, hasher.side), squares()
        batches = (np.stack(some) for some in iter(lambda: list(itertools.islice(readable, hasher.batch_size)), []))
        with library_bar("Encoding photos", len(found.names), show=progress) as advance:
            codes = hasher.encode_batches(batches, advance, size=hasher.batch_size)
    return PhotoCodes(paths, codes, unreadable)


def _find_photos(photos: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], side: int) -> Photos:
    if not isinstance(photos, str | os.PathLike):
        return Photos("the list", [os.path.abspath(path) for path in photos], os.sep, side)
    path = os.path.abspath(os.path.expanduser(photos))
    if os.path.isfile(path) and not path.lower().endswith(inputs.LISTS):
        return Photos(path, [os.path.basename(path)], os.path.dirname(path), side)
    found = inputs.load_inputs(path, takes="images", size=side)
    assert isinstance(found, Photos)
    return found
