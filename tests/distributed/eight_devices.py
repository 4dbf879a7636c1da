"""What eight simulated devices compute, as JSON: `python -m tests.distributed.eight_devices FOLDER`.

A process of its own, since the number of devices is fixed when JAX starts; one for all tests, since starting and
compiling take most of the time.
"""

import dataclasses
import functools
import io
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import cib_jax as cib
from cib_jax.augment import features
from cib_jax.commands.index import train_index_encoder
from cib_jax.data import inputs
from cib_jax.distributed import sharding
from cib_jax.training import input_pipeline, loop
from cib_jax.training.checkpoint import Checkpoints
from cib_jax.training.input_pipeline import BatchOrder
from cib_jax.training.loop import Hooks, Schedule
from cib_jax.training.train_step import Method, Progress, adam
from tests.commands import indexing

GENERATOR = np.random.default_rng(0)
KEY = jax.random.key(0)
LOGITS = jnp.asarray(GENERATOR.normal(size=(2, 16, 8)), jnp.float32)
COORDINATES = jnp.asarray(GENERATOR.normal(size=(16, 5)), jnp.float32)
IMAGES = GENERATOR.integers(0, 256, (48, 8, 8, 3), np.uint8)
FEATURES = GENERATOR.normal(size=(48, 12)).astype(np.float32)
STORED = GENERATOR.normal(size=(48, 3, 12)).astype(np.float32)
BANK = jnp.asarray(GENERATOR.normal(size=(4, 48, 256)), jnp.float16)


def own_loss(key, logits1, logits2, *, temperature):
    """Returns a loss that needs the whole batch, and knows of no devices."""
    return cib.nt_xent(logits1, logits2, temperature=temperature) + jnp.var(logits1) * jax.random.uniform(key), {}


def loss_and_gradients(objective, devices):
    """Returns the loss of a batch on several devices, and its gradient of both logits."""
    axis = "data" if devices > 1 else None

    def compute(key, logits1, logits2, coordinates):
        def loss(logits1, logits2):
            known = coordinates if objective == "diffusion" else None
            named = own_loss if objective == "own" else objective
            return cib.cib_loss(key, logits1, logits2, objective=named, beta=0.1, coordinates=known, axis=axis)[0]

        value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(logits1, logits2)
        return sharding.sum_over_devices(value, axis), gradients

    if devices > 1:
        specs = (P(), P("data"), P("data"), P("data"))
        compute = jax.shard_map(
            compute,
            mesh=sharding.make_mesh(devices, 16),
            in_specs=specs,
            out_specs=(P(), P("data")),
            check_vma=False,
        )
    value, gradients = jax.jit(compute)(KEY, *LOGITS, COORDINATES)
    return [float(value), *(np.asarray(gradient).ravel().tolist() for gradient in gradients)]


def leaves(params):
    """Returns all numbers of a tree, array by array."""
    return [np.asarray(leaf).ravel().tolist() for leaf in jax.tree.leaves(params)]


def fitted(devices, data, augment):
    """Returns the losses and parameters of `cib.fit` on features."""
    losses = []
    hasher = cib.fit(
        data,
        backbone="none",
        augment=augment,
        bits=8,
        hidden=16,
        epochs=2,
        batch_size=16,
        head_dropout=0.25,
        devices=devices,
        on_epoch=lambda report: losses.append(report.terms),
    )
    return {"losses": losses, "params": leaves(hasher.params)}


def looped(feed, params, optimizer):
    """Returns the losses and parameters of two epochs."""
    losses = []
    hooks = Hooks(on_epoch=lambda state, report: losses.append(report.terms))
    state = cib.create_train_state(params, optimizer)
    end, _ = loop.run(state, Progress(), feed, key=KEY, schedule=Schedule(2, 16), hooks=hooks)
    return {"losses": losses, "params": leaves(end.params)}


def from_bank(encoder, params, devices):
    """Trains on a view bank."""
    optimizer = optax.adam(1e-3)
    mesh = sharding.make_mesh(devices, 16)
    feed = input_pipeline.from_bank(BANK, Method(encoder, optimizer, head_dropout=0.25), BatchOrder(0, 16, mesh=mesh))
    return looped(feed, {"head": params["head"]}, optimizer)


def from_images(encoder, params, frozen, devices, *, stream=False):
    """Trains on images, on the device or streamed."""
    # Not Adam, which turns the rounding of a gradient near 0 into whole steps.
    optimizer = optax.sgd(0.1)
    mesh = sharding.make_mesh(devices, 16)
    method, order = Method(encoder, optimizer, augment="digits"), BatchOrder(0, 16, mesh=mesh)
    if stream:
        return looped(input_pipeline.from_stream(IMAGES, frozen, method, order), params, optimizer)
    return looped(input_pipeline.from_device(jnp.asarray(IMAGES), frozen, method, order), params, optimizer)


def one_step(fine_tune, devices, micro_batch):
    """Returns the terms of one step and the optimizer's moments, of a whole backbone or a part of it."""
    weights = cib.create_encoder(KEY, backbone="convnet", bits=8, image_size=8)[1]["backbone"]
    encoder, params, frozen = cib.create_encoder(
        KEY, backbone="convnet", bits=8, image_size=8, hidden=16, backbone_params=weights, fine_tune=fine_tune
    )
    optimizer = adam(1e-3, 1e-2)
    method = Method(encoder, optimizer, augment="digits", micro_batch=micro_batch)
    mesh = sharding.make_mesh(devices, 16)
    feed = input_pipeline.from_device(jnp.asarray(IMAGES[:16]), frozen, method, BatchOrder(0, 16, mesh=mesh))
    (batch,) = feed.epoch_chunks(0, 0)
    after, terms = feed.steps(cib.create_train_state(params, optimizer), batch, 0, KEY)
    return {name: float(value[0]) for name, value in terms.items()}, leaves(after.opt_state)


def own_step(step, state, batch, mesh=None, check_vma=None):
    """Returns the program of a step in a loop of one's own, by `jax.shard_map` or `jax.jit`, and its arguments.

    Without a mesh, one device has the whole batch; without `check_vma`, the compiler divides the step by the sharding
    of its arguments.
    """
    specs, program = (P(), P(), P("d")), step
    arguments = (state, KEY, batch)
    if mesh is not None:
        arguments = tuple(
            jax.device_put(part, NamedSharding(mesh, spec)) for part, spec in zip(arguments, specs, strict=True)
        )
    if check_vma is not None:
        program = functools.partial(step, axis="d")
        program = jax.shard_map(program, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    return jax.jit(program), arguments


def taken(program, arguments):
    """Returns the norm of the gradient and the loss of a step."""
    _, terms = program(*arguments)
    return [float(terms["gradient_norm"]), float(terms["loss"])]


def own_loops():
    """Returns what steps in loops of one's own come to, by the kind of their arguments; first on one device.

    Those on images take long to compile: they are only traced, which checks how each array varies over the devices.
    """
    optimizer = optax.sgd(0.1)
    auto, explicit = Mesh(jax.devices(), ("d",)), jax.make_mesh((8,), ("d",))
    assert explicit.axis_types == (AxisType.Explicit,)
    found = {}
    items = {"backbone": "none", "hidden": 16, "standard": features.standard([FEATURES])}
    pixels = {"backbone": "convnet", "image_size": 8, "hidden": 16}
    for name, made, batch, options in (
        ("features", items, (FEATURES[:16],), {"augment": "noise", "objective": "diffusion"}),
        ("images", pixels, (IMAGES[:8],), {"augment": "digits"}),  # one for each device
        ("two views", items, (FEATURES[:8], FEATURES[8:16]), {}),  # one for each device
    ):
        encoder, params, frozen = cib.create_encoder(KEY, bits=8, **made)
        method = options | {"encoder": encoder, "optimizer": optimizer}
        known = {"coordinates": COORDINATES} if options.get("objective") == "diffusion" else {}

        def step(state, key, batch, axis=None, frozen=frozen, method=method):
            data, known = batch
            if len(data) == 2:
                return cib.train_step_on_features(state, *data, key, axis=axis, **method)
            return cib.train_step(state, frozen, *data, key, axis=axis, **known, **method)

        ways = [(None, None), (auto, True), (explicit, None)]
        if name == "two views":  # the shortest to compile
            ways += [(auto, False), (explicit, True), (explicit, False), (auto, None)]
        state = cib.create_train_state(params, optimizer)
        steps = [own_step(step, state, (batch, known), *way) for way in (ways[:2] if name == "images" else ways)]
        if name == "images":
            found[name] = [program.trace(*arguments).out_info[1]["loss"].shape for program, arguments in steps]
        else:
            found[name] = [taken(*one) for one in steps]
    return found


def functions_on_an_explicit_mesh():
    """Returns how far each pure function's result for divided rows is from that for whole ones."""
    rows = NamedSharding(jax.make_mesh((8,), ("d",)), P("d"))
    logits = LOGITS * 3
    functions = {
        "nt_xent": cib.nt_xent,
        "gradient of nt_xent": jax.grad(cib.nt_xent),
        "cib_loss": lambda a, b: cib.cib_loss(KEY, a, b)[0],
        "bernoulli_kl": cib.bernoulli_kl,
        "sample_codes": lambda a, b: cib.sample_codes(KEY, a),
        "binarize": lambda a, b: cib.binarize(a),
        "pack_bits": lambda a, b: cib.unpack_bits(cib.pack_bits(a)),
    }
    pairs = {
        name: [jax.jit(function)(*arrays) for arrays in (tuple(logits), jax.device_put(tuple(logits), rows))]
        for name, function in functions.items()
    }
    resize = jax.jit(functools.partial(cib.resize_and_normalize, image_size=12))
    pairs["resize"] = [resize(images) for images in (IMAGES[:8], jax.device_put(IMAGES[:8], rows))]
    return {name: float(np.abs(np.subtract(*map(np.asarray, pair))).max()) for name, pair in pairs.items()}


def learned_for_an_index(folder):
    """Returns the shape of codes of an encoder trained on 22 photos, of which four devices share 20."""
    indexing.fill(folder / "photos", 22)
    config = indexing.config(
        backbone="convnet",
        image_size=8,
        hidden=16,
        epochs=1,
        bits=16,
        frozen=False,
        train__views=0,
        data__stored_size=20,
        data__train_images=0,
        batch_size=64,
        devices=4,
    )
    found = inputs.load_inputs(str(folder / "photos"), takes="images", size=1)
    hasher = train_index_encoder(found, config, rich.console.Console(file=io.StringIO()), {})
    return list(hasher.encode(np.zeros((3, 20, 20, 3), np.uint8)).shape)


def main(folder):
    """Writes everything that the tests look at."""
    found = {"devices": jax.local_device_count()}
    for objective in ("naive_cl", "cl_hash", "cibhash", "diffusion", "own"):
        found[objective] = {devices: loss_and_gradients(objective, devices) for devices in (1, 8)}
    found["features"] = {devices: fitted(devices, FEATURES, "noise") for devices in (1, 4)}
    found["stored views"] = {devices: fitted(devices, STORED, "stored") for devices in (1, 2)}
    encoder, params, frozen = cib.create_encoder(KEY, backbone="convnet", bits=8, image_size=8, hidden=16)
    found["bank"] = {devices: from_bank(encoder, params, devices) for devices in (1, 8)}
    # On one device, streamed images make the steps of resident ones: tests/training/test_input_pipeline.py.
    found["images"] = {
        1: from_images(encoder, params, frozen, 1),
        8: from_images(encoder, params, frozen, 8, stream=True),
    }
    fine_tune = cib.FineTune(blocks=1, checkpointing=True)
    found["last block"] = [one_step(fine_tune, 1, 0), one_step(fine_tune, 4, 2)]
    state = sharding.replicate(cib.create_train_state(params, optax.adam(1e-3)), sharding.make_mesh(8, 16))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(state, Progress(step=7), {})
    found["own loops"] = own_loops()
    found["explicit"] = functions_on_an_explicit_mesh()
    hasher = cib.Hasher(encoder, params, frozen, batch_size=3)
    found["codes"] = {n: dataclasses.replace(hasher, devices=n).encode(IMAGES).tolist() for n in (1, 8)}
    codes = GENERATOR.integers(0, 256, (2, 300, 2), np.uint8)
    labels = GENERATOR.integers(0, 4, (2, 300))
    found["searched"] = [codes.tolist(), labels.tolist()]
    found["map"] = cib.mean_average_precision(*codes, *labels, k=50)  # its blocks go round all devices
    found["index"] = learned_for_an_index(folder)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
