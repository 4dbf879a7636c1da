"""Writes augment.npz: what torchvision and SciPy make of small images, for the tests of augment, color and
geometry.

Run by hand where torch, torchvision and SciPy are installed: `python tests/golden/make_augment.py`. The
images are noise and smooth ramps, so that both single pixels and long gradients are told apart. Everything is
computed on float tensors in [0, 1].
"""

import itertools
import math
import pathlib

import numpy as np
import torch
from scipy import ndimage
from torchvision.transforms import RandomResizedCrop, functional

OUT = pathlib.Path(__file__).with_name("augment.npz")
CROPS = np.array(
    [[0, 0, 12, 16], [2, 3, 7, 5], [5, 9, 1, 1], [0, 15, 12, 1], [11, 0, 1, 16], [1, 2, 10, 13]], np.int32
)  # top, left, height, width within 12 × 16
SIZES = (2, 5, 9, 24)  # shrinks, shrinks one way and grows the other, grows
FACTORS = (0.0, 0.6, 1.0, 1.4, 2.5)
SHIFTS = (-0.5, -0.1, 0.0, 0.07, 0.5)
SIGMAS = (0.1, 0.7, 2.0)
# clockwise degrees, shear degrees, scale, shift right and down in fractions of the side
AFFINES = np.array(
    [
        [0, 0, 1, 0, 0],
        [15, 0, 1, 0, 0],
        [0, 10, 1, 0, 0],
        [0, 0, 0.85, 0, 0],
        [0, 0, 1, 0.1, -0.05],
        [-12, 7, 1.15, -0.08, 0.1],
        [33, -20, 0.6, 0.2, 0.15],
    ],
    np.float32,
)
SHAPES = ((32, 32), (24, 40), (6, 7), (20, 1), (1, 20), (1, 1), (5, 2))  # height, width
DRAWS = 4000


def test_images() -> np.ndarray:
    """Six float images [12, 16, 3]: noise, ramps, black, white, a gray, and saturated primaries with ties."""
    rng = np.random.default_rng(0)
    y, x = np.meshgrid(np.linspace(0, 1, 12), np.linspace(0, 1, 16), indexing="ij")
    ramps = np.stack([x, y, 1 - x * y], -1)
    primaries = np.array(list(itertools.product((0, 0.5, 1), repeat=3)))
    primaries = primaries[rng.integers(0, len(primaries), (12, 16))]
    gray = np.repeat(rng.random((12, 16, 1)), 3, -1)
    noise = rng.random((12, 16, 3))
    flat = np.ones((12, 16, 3))
    return np.stack([noise, ramps, primaries, gray, 0 * flat, flat]).astype(np.float32)


def planes(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).movedim(-1, -3)


def pixels(tensor: torch.Tensor) -> np.ndarray:
    return tensor.movedim(-3, -1).contiguous().numpy()


def jitter(image: torch.Tensor, order: tuple[int, ...], factors: tuple[float, ...]) -> torch.Tensor:
    """torchvision's four functions, one after the other; 0 brightness, 1 contrast, 2 saturation, 3 hue."""
    steps = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    for step in order:
        image = steps[step](image, factors[step])
    return image


def scipy_warp(image: np.ndarray, affine: np.ndarray, size: int) -> np.ndarray:
    """The whole map, stretch and all, as one matrix in float64; rows and columns in SciPy's order."""
    angle, shear = math.radians(affine[0]), math.radians(affine[1])
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    lean = np.array([[1, -math.tan(shear)], [0, 1]])
    inverse = np.linalg.inv(turn @ lean * affine[2])
    height, width = image.shape[:2]
    stretch = np.diag([width / size, height / size])
    matrix = stretch @ inverse  # from a view's (x, y) to the image's, about both centers
    center_in, center_out = np.array([(width - 1) / 2, (height - 1) / 2]), np.full(2, (size - 1) / 2)
    offset = center_in - matrix @ (center_out + affine[3:].astype(float) * size)
    rows_first = np.array([[0, 1], [1, 0]])
    matrix, offset = rows_first @ matrix @ rows_first, rows_first @ offset
    warped = [
        ndimage.affine_transform(
            image[..., c].astype(float), matrix, offset, (size, size), order=1, mode="grid-constant"
        )
        for c in range(3)
    ]
    return np.stack(warped, -1)


def main() -> None:
    images = test_images()
    tensor = planes(images)
    out: dict[str, np.ndarray] = {"images": images, "crops": CROPS, "affines": AFFINES}
    for name, values in (("sizes", SIZES), ("factors", FACTORS), ("shifts", SHIFTS), ("sigmas", SIGMAS)):
        out[name] = np.array(values)
    for size in SIZES:
        crops = [functional.resized_crop(tensor[i], *CROPS[i].tolist(), [size, size], antialias=True) for i in range(6)]
        out[f"crop_{size}"] = pixels(torch.stack(crops))
        out[f"crop_flipped_{size}"] = pixels(functional.hflip(torch.stack(crops)))
        out[f"resize_{size}"] = pixels(functional.resize(tensor, [size, size], antialias=True))
    for name, function, values in (
        ("brightness", functional.adjust_brightness, FACTORS),
        ("contrast", functional.adjust_contrast, FACTORS),
        ("saturation", functional.adjust_saturation, FACTORS),
        ("hue", functional.adjust_hue, SHIFTS),
    ):
        out[name] = np.stack([pixels(torch.stack([function(x, v) for x in tensor[:3]])) for v in values])
    out["grayscale"] = pixels(functional.rgb_to_grayscale(tensor, num_output_channels=3))
    out["blur"] = np.stack([pixels(functional.gaussian_blur(tensor[:2], [3, 3], [s, s])) for s in SIGMAS])

    orders = list(itertools.permutations(range(4)))
    rng = np.random.default_rng(1)
    strength = rng.uniform([0.6, 0.6, 0.6, -0.1], [1.4, 1.4, 1.4, 0.1], (24, 4)).astype(np.float32)
    small = np.ascontiguousarray(images[:3, :6, :8])
    chains = [pixels(jitter(planes(small[i % 3]), orders[i], tuple(strength[i].tolist()))) for i in range(len(orders))]
    out["jitter_images"], out["jitter_orders"] = small, np.array(orders, np.int32)
    out["jitter_factors"], out["jitter"] = strength, np.stack(chains)

    square = np.ascontiguousarray(images[:, :, 2:14])
    out["affine_torchvision"] = np.stack(
        [
            pixels(
                functional.affine(
                    planes(square[0]),
                    angle=float(a[0]),
                    shear=[float(a[1]), 0.0],
                    scale=float(a[2]),
                    translate=[float(a[3]) * 12, float(a[4]) * 12],
                    interpolation=functional.InterpolationMode.BILINEAR,
                )
            )
            for a in AFFINES
        ]
    )
    out["affine_scipy"] = np.stack([scipy_warp(images[0], a, 20) for a in AFFINES]).astype(np.float32)

    torch.manual_seed(0)
    for height, width in SHAPES:
        blank = torch.zeros(3, height, width)
        crops = [RandomResizedCrop.get_params(blank, (0.5, 1.0), (3 / 4, 4 / 3)) for _ in range(DRAWS)]
        out[f"drawn_crops_{height}x{width}"] = np.array(crops, np.int8)
    np.savez_compressed(OUT, **out)
    print(OUT, OUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
