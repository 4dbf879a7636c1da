"""The view bank of a frozen backbone: features of a few augmented views per image, computed once."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float16, Int, PRNGKeyArray, UInt8

from cib_jax.devices import encoding, parallel, processes, spread
from cib_jax.devices.spread import Axis
from cib_jax.encoder import Encoder, Params
from cib_jax.errors import Refusal

STORED = np.float16
"""Half of float32's bytes; its rounding, 1 part in 2,048, is far below what another draw of a view changes."""
BYTES = np.dtype(STORED).itemsize


class BankError(Refusal):
    """Features do not fit a bank; the message says what to do."""


def build(
    key: PRNGKeyArray,
    encoder: Encoder,
    frozen: Params,
    batches: Callable[[int, int], Iterable[UInt8[np.ndarray, "batch height width 3"]]],
    *,
    count: int,
    batch_size: int,
    views: int,
    family: str = "photo",
    on_images: Callable[[int], None] = lambda images: None,
    read: Callable[[int], Float16[np.ndarray, "images features"] | None] = lambda view: None,
    write: Callable[[int, Float16[np.ndarray, "images features"]], None] = lambda view, features: None,
    over: Mesh | None = None,
) -> Float16[Array, "views images features"]:
    """Returns features of `views` views of every image, drawn from the same family as in training.

    Args:
      key: a random key; view k of image i depends on it, k and i alone, not on the batch size.
      encoder: whose backbone is frozen.
      frozen: the backbone's parameters.
      batches: gives the images from one to before another, in order, at each call.
      count: how many images there are.
      batch_size: how many of them a batch holds.
      views: how many per image.
      family: of the augmentation.
      on_images: told the number of views done after each batch, of those that this process computes.
      read: gives a view's features where they were kept earlier, else None.
      write: is given each view's features that were computed now, as soon as they are there.
      over: this process's devices that compute a batch each at the same time; None: one.

    Of several processes, each computes its share of the batches; every one gets all features.

    Raises:
      BankError: a feature is not finite or beyond float16's range, ±65,504.
    """
    axis, mine = parallel.axis_of(over), processes.share_of_batches(count, batch_size)
    size = min(batch_size, count)
    compute = jax.jit(parallel.by_rows(functools.partial(_features, encoder=encoder, family=family, axis=axis), over))
    frozen = parallel.everywhere(frozen, over)

    def of_view(view: int) -> Callable[[np.ndarray, int], Array]:
        drawn_by = jax.random.fold_in(key, view)
        return lambda images, first: compute(frozen, images, first, drawn_by)

    bank = np.empty((views, count, encoder.backbone.features), STORED)
    for view, rows in enumerate(bank):
        kept = read(view)
        if processes.all_of(kept is not None):
            rows[:] = kept
            on_images(mine.stop - mine.start)
            continue
        start, part = mine.start, batches(mine.start, mine.stop)
        for features in encoding.map_batches(of_view(view), part, on_images, size=size, first=start, over=over):
            rows[start : start + len(features)] = features
            start += len(features)
        if processes.several():
            rows[:] = np.concatenate(processes.gather(rows[mine]))
        if not np.isfinite(rows).all():
            raise BankError(
                f"config.train.views: features of {encoder.backbone.name} are not finite or beyond ±65,504, the range "
                "of the bank's float16; set it to 0 for fresh views at every step, or check the backbone's weights"
            )
        write(view, rows)
    return jnp.asarray(bank)


def _features(
    frozen: Params,
    images: UInt8[Array, "batch height width 3"],
    first: Int[Array, ""],
    key: PRNGKeyArray,
    *,
    encoder: Encoder,
    family: str,
    axis: Axis,
) -> Float16[Array, "batch features"]:
    rows = images.shape[0]
    numbers = first + spread.first_row(rows, axis) + jnp.arange(rows)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)
    return encoder.features({}, frozen, encoder.view_each(keys, images, family=family)).astype(STORED)


def draw_pairs(
    key: PRNGKeyArray,
    bank: Float[Array, "views images features"],
    indices: Int[Array | np.ndarray, " batch"],
    axis: Axis = None,
) -> tuple[Float[Array, "batch features"], Float[Array, "batch features"]]:
    """Returns features, in float32, of two different views, drawn evenly, of each image named in `indices`.

    With an `axis` (see `spread`), `indices` are this device's.
    """
    views = bank.shape[0]
    key1, key2 = jax.random.split(key)
    first = spread.draw(lambda shape: jax.random.randint(key1, shape, 0, views), indices.shape, axis)
    second = (first + spread.draw(lambda shape: jax.random.randint(key2, shape, 1, views), indices.shape, axis)) % views
    return bank[first, indices].astype(jnp.float32), bank[second, indices].astype(jnp.float32)
