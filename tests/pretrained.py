"""A small network that counts as pretrained, for tests of what is frozen where the network does not matter."""

import dataclasses
import pathlib

import jax
import numpy as np
import safetensors.numpy

import cib_jax as cib
from cib_jax.models import registry


def convnet(monkeypatch, folder: pathlib.Path, image_size: int, seed: int = 3) -> dict[str, object]:
    """Gives the ConvNet weights in a file and a way to read them; returns the fields of a config that freezes it."""
    network = cib.create_encoder(
        jax.random.key(seed), backbone="convnet", bits=8, image_size=image_size, pretrained=False, frozen=False
    )
    params = network[1]["backbone"]
    leaves, shape = jax.tree.flatten(params)
    path = folder / "convnet.safetensors"
    safetensors.numpy.save_file({str(at): np.asarray(leaf) for at, leaf in enumerate(leaves)}, path)

    def convert(tensors):
        return jax.tree.unflatten(shape, [tensors[str(at)] for at in range(len(leaves))])

    readable = dataclasses.replace(registry.get("convnet"), convert=convert)
    monkeypatch.setitem(registry.BACKBONES, "convnet", readable)
    return {"backbone": "convnet", "backbone_weights": str(path), "frozen": True, "image_size": image_size}
