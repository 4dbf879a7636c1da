"""What a run left, read again: its config, the parameters it is judged by, what its features were standardised with."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath
from jax.sharding import SingleDeviceSharding

from cib_jax import __version__
from cib_jax.config import from_config
from cib_jax.config.checking import check, differences
from cib_jax.config.field_values import ADDED, FIELDS, MAY_CHANGE, MEASURING
from cib_jax.config.flat import flatten
from cib_jax.encoder import Params
from cib_jax.training import place
from cib_jax.training.checkpoint import CheckpointError, Checkpoints, Progress
from cib_jax.training.state import create_train_state
from cib_jax.views.feature_views import Standard


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """Returns the config that a run was started with.

    Raises:
      CheckpointError: there is no run in `workdir`.
    """
    path, flat = workdir / "config.json", {}
    try:
        config = ml_collections.ConfigDict(json.loads(path.read_text(encoding="utf-8")))
        flat = flatten(config)
        lacking = {name: value for name, value in ADDED.items() if name not in flat}
        config = ml_collections.ConfigDict(_with(config.to_dict(), lacking))
        check(config)
    except OSError as error:
        raise CheckpointError(
            f"{path}: there is no such file ({error.strerror}), so {workdir} is no run's folder; give the "
            "--workdir of a training run"
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        if flat.keys() == FIELDS.keys() or len(flat.keys() & FIELDS.keys()) < len(FIELDS) / 2:
            damaged = f"{path}: the file is damaged ({error}); restore it from a copy or train again"
            raise CheckpointError(damaged) from None
        raise CheckpointError(
            f"{path}: it does not fit this version of cib_jax, {__version__} ({error}); take the version that "
            "the run was made with, which its results.json names, or train again in another --workdir"
        ) from None
    return config


def _with(fields: dict[str, Any], lacking: dict[str, Any]) -> dict[str, Any]:
    for name, value in lacking.items():
        group, _, field = name.rpartition(".")
        (fields.setdefault(group, {}) if group else fields)[field] = value
    return fields


def restore_best(
    workdir: pathlib.Path, params: Params, config: ml_collections.ConfigDict
) -> tuple[Params, Progress, dict[str, Any]]:
    """Returns the parameters a run is judged by, how far it came, and what its checkpoint holds beside them.

    Raises:
      CheckpointError: there is no checkpoint, it is unusable, or it was made under another config.
      PlaceError: the place of its checkpoints cannot be reached.
    """
    directory = _checkpoints_of(workdir, config)
    # On one device of this process: it may have been trained on others, which are not there now.
    device = SingleDeviceSharding(jax.local_devices()[0])
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        jax.eval_shape(lambda: create_train_state(params, from_config.optimiser(config))),
    )
    with Checkpoints(directory, read_only=True) as checkpoints:
        theirs = flatten(ml_collections.ConfigDict(checkpoints.extra()["config"]))
        told = differences(flatten(config), theirs, MAY_CHANGE | MEASURING)
        if told:
            raise CheckpointError(
                f"{workdir / 'config.json'}: it is not the config of the checkpoints here ({'; '.join(told)}); put "
                "the original back"
            )
        state, progress, extra = checkpoints.restore(template)
        if progress.best_step and progress.best_step != progress.step:
            state, _, extra = checkpoints.restore(template, progress.best_step)
    return jax.tree.map(jnp.asarray, state.params), progress, extra


def read_standard(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> Standard | None:
    """Returns mean and deviation of the features that a run was trained on, None if it was trained on images.

    Raises:
      CheckpointError: there is no readable checkpoint.
    """
    if config.backbone != "none":
        return None
    with Checkpoints(_checkpoints_of(workdir, config), read_only=True) as checkpoints:
        return Standard.from_lists(checkpoints.extra()["standard"])


def _checkpoints_of(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> epath.Path:
    directory = place.of_run(config.train.checkpoint_dir, workdir)
    if not place.exists(directory):
        raise CheckpointError(f"{directory}: there is no checkpoint here; train first, with --mode=train")
    return directory


def check_fingerprint(fingerprint: str, extra: dict[str, Any], workdir: pathlib.Path) -> None:
    """Checks that the backbone's weights are those of the run.

    Raises:
      CheckpointError: they are others, so its codes would be meaningless.
    """
    if extra.get("backbone_fingerprint", "") != fingerprint:
        raise CheckpointError(
            f"{workdir}: the run was trained on backbone weights {extra.get('backbone_fingerprint')!r}, but those "
            f"found now are {fingerprint!r}; set config.backbone_weights to the file that the run used"
        )
