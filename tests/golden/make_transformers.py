"""Writes transformers.npz: what the vision transformers of PyTorch's `transformers` make of known weights and images.

Run by hand where torch and transformers are installed: `python tests/golden/make_transformers.py`. The tests read the
file and need neither. Weights go through a file in the published names, as `transformers` itself writes and reads it.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import safetensors
import safetensors.numpy
import torch
import transformers

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from tests.golden import transformer_inputs  # noqa: E402

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
SHALLOW = BASE | {"num_hidden_layers": transformer_inputs.SHALLOW}
DINOV2 = {"image_size": 518, "patch_size": 14}


def clip(patch: int, size: dict[str, int]) -> transformers.CLIPModel:
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=size | {"patch_size": patch}))


def dinov2(size: dict[str, int]) -> transformers.Dinov2Model:
    return transformers.Dinov2Model(transformers.Dinov2Config(**size, **DINOV2))


def registers(size: dict[str, int]) -> transformers.Dinov2WithRegistersModel:
    return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**size, **DINOV2))


def siglip(size: dict[str, int]) -> transformers.SiglipModel:
    return transformers.SiglipModel(transformers.SiglipConfig(vision_config=size | {"patch_size": 16}))


# Of each network: what its published file holds, and what reads the image's part of that file.
NETWORKS = {
    "dinov2_small": (lambda: dinov2(SMALL), transformers.Dinov2Model),
    "dinov2_base": (lambda: dinov2(BASE), transformers.Dinov2Model),
    "dinov2_small_registers": (lambda: registers(SMALL), transformers.Dinov2WithRegistersModel),
    "dinov2_base_registers": (lambda: registers(BASE), transformers.Dinov2WithRegistersModel),
    "clip_vit_b32": (lambda: clip(32, BASE), transformers.CLIPVisionModelWithProjection),
    "clip_vit_b16": (lambda: clip(16, BASE), transformers.CLIPVisionModelWithProjection),
    "siglip_base": (lambda: siglip(BASE), transformers.SiglipVisionModel),
    "clip_vit_b32_shallow": (lambda: clip(32, SHALLOW), transformers.CLIPVisionModelWithProjection),
    "siglip_base_shallow": (lambda: siglip(SHALLOW), transformers.SiglipVisionModel),
}


def features(name: str, model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        if name.startswith("dinov2"):
            return model(pixels).pooler_output.numpy()
        output = model(pixels, interpolate_pos_encoding=True)
        return (output.pooler_output if name.startswith("siglip") else output.image_embeds).numpy()


def network(name: str) -> dict[str, np.ndarray]:
    build, reader = NETWORKS[name]
    with tempfile.TemporaryDirectory() as folder:
        build().save_pretrained(folder)
        path = pathlib.Path(folder) / "model.safetensors"
        with safetensors.safe_open(path, framework="np") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no dict
        tensors = {key: transformer_inputs.tensor(key, shape) for key, shape in shapes.items()}
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
        model, loaded = reader.from_pretrained(folder, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["mismatched_keys"], loaded
    model.eval()
    values = {f"{name}_tensors": np.array(json.dumps(shapes))}
    for size in transformer_inputs.SIZES[name]:
        values[f"{name}_{size[0]}_{size[1]}"] = features(name, model, transformer_inputs.images(*size))
        found = values[f"{name}_{size[0]}_{size[1]}"]
        print(name, size, found.shape, "deviation", found.std(), "between images", (found[0] - found[1]).std())
    return values


def interpolated() -> dict[str, np.ndarray]:
    grid = torch.from_numpy(transformer_inputs.grid()).permute(2, 0, 1)[None]
    return {
        f"grid_{rows}_{columns}_{antialias}": torch.nn.functional.interpolate(
            grid, (rows, columns), mode="bicubic", align_corners=False, antialias=antialias
        )[0]
        .permute(1, 2, 0)
        .numpy()
        for rows, columns in transformer_inputs.GRIDS
        for antialias in (False, True)
    }


if __name__ == "__main__":
    made = interpolated()
    for name in NETWORKS:
        made |= network(name)
    np.savez_compressed(HERE / "transformers.npz", **made)
