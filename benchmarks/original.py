"""The other side: the steps of the paper's published code (https://github.com/zexuanqiu/CIBHash), rewritten in PyTorch.

It does the same work with the same libraries (torch, torchvision, PIL, OpenCV, NumPy) on the CPU: PIL images and
OpenCV's blur for the views, cosine similarities of all pairs by broadcasting, a logarithm of p + 1e-8 for the
bottleneck, a check of the running loss at every step, one `argsort` per query for MAP.
"""

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import PIL.Image
import torch
from torch import nn
from torchvision import transforms

cv2.setNumThreads(1)


def two_view_transform(
    image_size: int, mean: Sequence[float] = (0.5, 0.5, 0.5), deviation: Sequence[float] = (0.5, 0.5, 0.5)
) -> Callable[[PIL.Image.Image], torch.Tensor]:
    """Returns the transform of one view: a PIL image in, a normalized tensor [3, image_size, image_size] out."""
    jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size, scale=(0.5, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([jitter], p=0.7),
            transforms.RandomGrayscale(p=0.2),
            _maybe_blurred,
            transforms.ToTensor(),
            transforms.Normalize(mean, deviation),
        ]
    )


def _maybe_blurred(image: PIL.Image.Image) -> np.ndarray:
    pixels = np.array(image)
    if np.random.random_sample() < 0.5:
        pixels = cv2.GaussianBlur(pixels, (3, 3), np.random.uniform(0.1, 2.0))
    return pixels


class Head(nn.Module):
    """The hash head on precomputed features, with the deterministic binary layer."""

    def __init__(self, features: int, bits: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, 1024), nn.ReLU(), nn.Linear(1024, bits))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the probabilities of the bits and the codes."""
        probabilities = torch.sigmoid(self.layers(features))
        return probabilities, _Sign.apply(probabilities - 0.5)


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return torch.sign(values)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def loss(
    probabilities: tuple[torch.Tensor, torch.Tensor],
    codes: tuple[torch.Tensor, torch.Tensor],
    temperature: float = 0.3,
    beta: float = 0.001,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the loss, the contrast and the bottleneck."""
    contrast = _nt_xent(*codes, temperature)
    first, second = probabilities
    kl = (_kl(first, second.detach()) + _kl(second, first.detach())) / 2
    return contrast + beta * kl, contrast, kl


def _nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    batch = len(first)
    both = torch.cat((first, second))
    similarity = nn.functional.cosine_similarity(both[:, None], both[None], dim=2) / temperature
    positive = torch.cat((torch.diag(similarity, batch), torch.diag(similarity, -batch)))[:, None]
    # The published code fills its mask of negatives row by row, at every step.
    negatives = torch.ones((2 * batch, 2 * batch), dtype=torch.bool)
    negatives.fill_diagonal_(False)
    for row in range(batch):
        negatives[row, batch + row] = negatives[batch + row, row] = False
    logits = torch.cat((positive, similarity[negatives].view(2 * batch, -1)), dim=1)
    targets = torch.zeros(2 * batch, dtype=torch.long)
    return nn.functional.cross_entropy(logits, targets, reduction="sum") / (2 * batch)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    on = p * (torch.log(p + 1e-8) - torch.log(q + 1e-8))
    off = (1 - p) * (torch.log(1 - p + 1e-8) - torch.log(1 - q + 1e-8))
    return (on + off).sum(dim=1).mean()


def train_head(bank: np.ndarray, *, bits: int, epochs: int, batch_size: int = 64, seed: int = 0) -> Head:
    """Returns a head trained on a bank of features [views, images, features], two different views at each step.

    The loop, the optimizer and the check of the loss at every step are those of the published code, except that
    features of views are read from the bank instead of computed.
    """
    torch.manual_seed(seed)
    features_of_views = torch.from_numpy(bank)
    views, count, features = features_of_views.shape
    head = Head(features, bits)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    for _ in range(epochs):
        total = torch.zeros(())
        order = torch.randperm(count)
        for start in range(0, count - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            chosen = torch.randint(views, rows.shape)
            other = (chosen + torch.randint(1, views, rows.shape)) % views
            optimizer.zero_grad()
            (p1, b1), (p2, b2) = head(features_of_views[chosen, rows]), head(features_of_views[other, rows])
            value, _, _ = loss((p1, p2), (b1, b2))
            total += value.detach()
            if math.isnan(total):
                raise ArithmeticError("the loss of the PyTorch side became NaN")
            value.backward()
            optimizer.step()
    return head


def mean_average_precision(
    query_codes: np.ndarray,
    database_codes: np.ndarray,
    query_labels: np.ndarray,
    database_labels: np.ndarray,
    k: int,
    *,
    kind: str | None = None,
) -> float:
    """Returns MAP@k of float32 ±1 codes and float64 0/1 labels, query by query, as the published code computes it.

    Its `argsort` breaks ties arbitrarily; `kind="stable"` breaks them by database order, for comparison.
    """
    total = 0.0
    for code, label in zip(query_codes, query_labels, strict=True):
        relevant = (np.dot(label, database_labels.T) > 0).astype(np.float32)
        distances = 0.5 * (database_codes.shape[1] - np.dot(code, database_codes.T))
        first = relevant[np.argsort(distances, kind=kind)][:k]
        found = int(first.sum())
        if found:
            total += float(np.mean(np.arange(1, found + 1) / (np.flatnonzero(first) + 1)))
    return total / len(query_codes)
