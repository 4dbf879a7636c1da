"""Whether two photos show one picture: perceptual hashes, alignment of the two, and comparison of their pixels."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import Bool, Float32, Float64, UInt8

from cib_jax.errors import SearchError
from cib_jax.files import import_optional, install_command

Image = UInt8[np.ndarray, "_ _ 3"]
Map = Float64[np.ndarray, "2 3"]
"""Affine map of pixel coordinates (x, y, 1)."""
Mask = Bool[np.ndarray, "_ _"]

ORIENTATIONS = 8
"""Ways to turn a picture by quarters and to mirror it; number 0 leaves it as it is."""

# Longer sides in pixels at which pictures are compared: layout and colors at the first, details, and letters of a page.
_COARSE, _FINE, _FINEST = 96, 384, 480
_FEATURES, _FEATURE_SIDE = 300, 240  # local features of a picture, and its longer side when they are computed
_LEAST_FEATURES = 8
_FEW_CORNERS, _PAGE = 0.1, 0.92  # corners of pictures with little to see, share of the color of a page
_LEAST_OVERLAP = 0.5  # share of either picture that the other must show


def _cv2() -> Any:
    cv2 = import_optional("cv2", SearchError(f"OpenCV is not installed; {install_command('search')}"))
    cv2.setNumThreads(1)  # photos are compared in threads of our own
    return cv2


# Perceptual hashes


def perceptual_hashes(image: Image) -> UInt8[np.ndarray, "orientations 8"]:
    """Returns the DCT hash of a picture in each of its `ORIENTATIONS`, 64 bits each, packed.

    A bit tells whether one of the lowest 8 × 8 frequencies of 32 × 32 gray levels is above their median. Copies that
    were resized, compressed or made brighter differ in few bits. Turning a picture exchanges the axes of frequencies
    and changes the signs of odd ones, so that one transform serves all orientations.

    References:
      Zauner, Implementation and benchmarking of perceptual image hash functions, 2010, section 3.2.1.
    """
    from scipy import fft

    gray = PIL.Image.fromarray(image).convert("L").resize((32, 32), PIL.Image.Resampling.LANCZOS)
    low = fft.dctn(np.asarray(gray, np.float64))[:8, :8]
    sign = np.where(np.arange(8) % 2, -1.0, 1.0)
    hashes = []
    for number in range(ORIENTATIONS):
        turned = low.T if number & 4 else low
        turned = turned * (sign[:, None] if number & 1 else 1.0) * (sign if number & 2 else 1.0)
        hashes.append(np.packbits(turned > np.median(turned)))
    return np.stack(hashes)


def orient(image: Image, number: int) -> Image:
    """Returns a picture in the orientation that `perceptual_hashes` has under a number."""
    image = image.swapaxes(0, 1) if number & 4 else image
    return image[:: -1 if number & 1 else 1, :: -1 if number & 2 else 1]


# Comparison


class Picture:
    """A picture that is compared with others: its perceptual hashes, its features and, where these agree, its pixels.

    Args:
      read: Function that returns the pixels, which take more memory than the features and are not kept.
      hashes: Perceptual hashes of the pixels.
    """

    def __init__(self, read: Callable[[], Image], hashes: UInt8[np.ndarray, "orientations 8"]):
        self._read, self.hashes = read, hashes

    @property
    def image(self) -> Image:
        """The pixels."""
        return self._read()

    @functools.cached_property
    def features(self) -> tuple[Float32[np.ndarray, "points 2"], Float32[np.ndarray, "points 128"]]:
        """Positions and descriptors of local features (Lowe, Distinctive image features, IJCV 2004)."""
        cv2 = _cv2()
        gray = cv2.cvtColor(self.image, cv2.COLOR_RGB2GRAY)
        scale = min(1.0, _FEATURE_SIDE / max(gray.shape))
        gray = cv2.resize(gray, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        points, found = cv2.SIFT_create(nfeatures=_FEATURES, contrastThreshold=0.02).detectAndCompute(gray, None)
        if not points:  # then OpenCV gives no descriptors, or before 5.1 none at all: None
            return np.zeros((0, 2), np.float32), np.zeros((0, 128), np.float32)
        # Square roots of unit sums: their products compare histograms by Hellinger's kernel (Arandjelović, CVPR 2012).
        found = np.sqrt(found / np.maximum(found.sum(axis=1, keepdims=True), 1e-6))
        return np.array([point.pt for point in points], np.float32) / scale, found


def is_copy(one: Picture, other: Picture) -> bool:
    """Returns whether two pictures are copies of one, changed in size, compression, light, margins or orientation."""
    distances = np.bitwise_count(one.hashes ^ other.hashes[0]).sum(axis=1)
    # Hashes of pictures without features, such as a clear sky, are those of their noise.
    bare = min(len(one.features[0]), len(other.features[0])) < _LEAST_FEATURES
    for number in {0, *np.argsort(distances, kind="stable")[:2].tolist()}:
        if distances[number] <= 16 or (bare and number == 0):
            turned = orient(one.image, number)
            if agree(turned, other.image, _stretch(turned, other.image)):
                return True
    aligned = align(one, other)
    return aligned is not None and agree(one.image, other.image, aligned)


def align(one: Picture, other: Picture) -> Map | None:
    """Returns the map from pixels of one picture to those of another, if enough of their local features agree on it.

    It scales, turns and moves. Features match if each is nearest to the other and clearly nearer than the second.
    """
    (points, features), (targets, others) = one.features, other.features
    if min(len(points), len(targets)) < _LEAST_FEATURES:
        return None
    similarity = features @ others.T
    nearest = similarity.argmax(axis=1)
    rows = np.arange(len(points))
    best = similarity[rows, nearest]
    mutual = similarity.argmax(axis=0)[nearest] == rows
    similarity[rows, nearest] = -1
    # Squared distances of unit vectors are 2 − 2 × similarity.
    matched = mutual & (1 - best < 0.64 * (1 - similarity.max(axis=1)))
    if matched.sum() < _LEAST_FEATURES:
        return None
    cv2 = _cv2()
    cv2.setRNGSeed(0)
    found, inliers = cv2.estimateAffinePartial2D(
        points[matched], targets[nearest[matched]], method=cv2.RANSAC, ransacReprojThreshold=4, maxIters=500
    )
    return found if found is not None and inliers.sum() >= _LEAST_FEATURES else None


def is_framed(one: Picture, other: Picture) -> bool:
    """Returns whether one picture is the other with a border, or with a bar such as that of a caption, added to it.

    What was added has one color in more than half of its area, which is not that of the picture along its edge: else
    the other picture may be a crop of the first one.
    """
    mapped = align(other, one)
    if mapped is None:
        return False
    _, image, inside = _resample(other.image, one.image, mapped, _FINE)
    added = _shrink(~inside, 9)  # without the edge, where the alignment is uncertain
    if added.mean() < 0.02 or _flat(image[added]) < 0.5:
        return False
    near_added = _cv2().dilate(added.astype(np.uint8), np.ones((25, 25), np.uint8)).astype(bool)
    edge = image[near_added & _shrink(inside, 9)]
    return bool((np.abs(edge - np.median(image[added], axis=0)).max(axis=1) > 24).mean() > 0.5)


class Layout(NamedTuple):
    """How far two aligned pictures agree where they overlap, seen from afar."""

    coarse: float
    """Correlation of layout and shapes, weighted by contrast."""
    disagreement: float
    """Share of contrast in places that do not correlate."""
    colors: float
    """Difference of colors, in levels of 255, after the best change of brightness, contrast and saturation."""
    residue: float
    """That difference as a share of the colors' standard deviation."""
    shift: float
    """The same without any such change, or after changing all colors to gray."""
    corners: float
    """Share of the area with contrast in two directions: small for skies and horizons."""
    flat: float
    """Share of the area that has one color, in the picture where it is smaller: large for short notes on white."""

    @property
    def little_to_see(self) -> bool:
        """Whether other pictures may share most of what is seen."""
        return self.corners < _FEW_CORNERS or self.flat > _PAGE


def agree(one: Image, other: Image, mapped: Map) -> bool:
    """Returns whether two aligned pictures are one, by thresholds that photos and drawings of all kinds have set."""
    found = compare_layouts(one, other, mapped)
    if found is None or (not found.little_to_see and (found.coarse < 0.78 or found.colors > 20)):
        return False
    fine = compare_details(one, other, mapped)
    if found.little_to_see:
        # Not even a few letters may differ, unless all colors of a picture that is no page are equal to the level.
        if found.shift > (8 if fine > 0 else 3):
            return False
        blurred = found.flat < 0.5 and found.coarse >= 0.99 and found.shift <= 1
        return blurred or changed_details(one, other, mapped, stars=found.coarse == 0 and fine == 0) <= 0.015
    if fine == 0:  # blurred shapes alone
        return found.coarse >= 0.95 and found.residue <= 0.05
    if found.coarse >= 0.88 and found.disagreement <= 0.07:
        return fine >= 0.8
    # Letters, a stamp or clipped highlights: beside them, all details agree, or nearly all colors to the level.
    return fine >= 0.92 or (fine >= 0.8 and found.residue <= 0.05)


def compare_layouts(one: Image, other: Image, mapped: Map) -> Layout | None:
    """Returns how far two aligned pictures agree from afar, or None if they hardly overlap."""
    cv2 = _cv2()
    areas = one.shape[0] * one.shape[1] * _zoom(mapped) ** 2, other.shape[0] * other.shape[1]
    left, right, inside = _resample(one, other, mapped, _COARSE)
    overlap = float(inside.mean()) * areas[1] / min(areas)
    inside = _without_margin(inside)
    seen = _shrink(inside, 9)
    if overlap < _LEAST_OVERLAP or seen.sum() < 100:
        return None
    grays = [cv2.GaussianBlur(_gray(each), (0, 0), 1.0) for each in (left, right)]
    first, second, correlation = _local(grays[0], grays[1], 9, 4.0)
    weight = np.clip(np.sqrt(np.maximum(first, second)) - 2, 0, 20) * seen
    total = max(float(weight.sum()), 1e-6)
    coarse = float((weight * np.maximum(correlation, 0)).sum()) / total
    disagreement = float((weight * (correlation < 0.5)).sum()) / total
    corners = float((_least_contrast(grays[1]) > 1)[seen].mean())
    flat = min(_flat(each[inside]) for each in (left, right))
    return Layout(coarse, disagreement, *_color_differences(left, right, inside), corners, flat)


def compare_details(one: Image, other: Image, mapped: Map) -> float:
    """Returns the correlation of details in places where both pictures have some; 0 if there are none."""
    left, right, inside = _resample(one, other, mapped, min(_finest(other, mapped), _FINE))
    seen = _shrink(_without_margin(inside), 15)
    first, second, correlation = _local(_details(left, 1.0, 4.0), _details(right, 1.0, 4.0), 15, 1.0)
    weight = np.clip(np.sqrt(np.minimum(first, second)) - 2, 0, 15) * seen
    return float((weight * np.maximum(correlation, 0)).sum()) / max(float(weight.sum()), 1e-6)


def changed_details(one: Image, other: Image, mapped: Map, *, stars: bool) -> float:
    """Returns the share of places with the finest details in either picture where the two differ.

    If no place has details and `stars`, 50 times the share of pixels of other colors.
    """
    left, right, inside = _resample(one, other, mapped, _finest(other, mapped))
    first, second, correlation = _local(_details(left, 0.5, 1.5), _details(right, 0.5, 1.5), 9, 1.0)
    larger = np.maximum(first, second)
    detailed = (larger > 16) & _shrink(_without_margin(inside), 9)
    if detailed.any():
        same = correlation * np.sqrt(np.minimum(first, second) / np.maximum(larger, 1e-6))
        return float((same < 0.5)[detailed].mean())
    different = np.abs(left.astype(np.int32) - right).max(axis=2) > 16
    return 50 * float(different[inside].mean()) if stars else 0.0


def _zoom(mapped: Map) -> float:
    return float(np.sqrt(abs(np.linalg.det(mapped[:, :2]))))


def _finest(other: Image, mapped: Map) -> int:
    """Returns the longer side at which details are compared: no finer than the pixels that both pictures have."""
    return int(np.clip(max(other.shape) / max(_zoom(mapped), 1), _COARSE, _FINEST))


def _flat(pixels: UInt8[np.ndarray, "pixels 3"]) -> float:
    """Returns the share of pixels near to the median color, which is the most frequent one if it is that of half."""
    return float((np.abs(pixels - np.median(pixels, axis=0)).max(axis=1) <= 6).mean())


def _stretch(one: Image, other: Image) -> Map:
    """Returns the map of one picture's frame onto another's."""
    across, down = other.shape[1] / one.shape[1], other.shape[0] / one.shape[0]
    return np.array([[across, 0, (across - 1) / 2], [0, down, (down - 1) / 2]])


def _resample(one: Image, other: Image, mapped: Map, side: int) -> tuple[Image, Image, Mask]:
    """Returns both pictures in the other's frame, its longer side `side` pixels, and where the first one has pixels."""
    cv2 = _cv2()
    height, width = other.shape[:2]
    scale = side / max(height, width)
    size = max(8, round(width * scale)), max(8, round(height * scale))
    right = cv2.resize(other, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    # Pixel (0, 0) has its center at (0.5, 0.5).
    to_frame = _scaling(size[0] / width, size[1] / height) @ np.vstack([mapped, [0, 0, 1]])
    zoom = np.sqrt(abs(np.linalg.det(to_frame[:2, :2])))
    if zoom < 1:  # averages, so that fine lines do not alias
        small = max(1, round(one.shape[1] * zoom)), max(1, round(one.shape[0] * zoom))
        to_frame = to_frame @ _scaling(one.shape[1] / small[0], one.shape[0] / small[1])
        one = cv2.resize(one, small, interpolation=cv2.INTER_AREA)
    left = cv2.warpAffine(one, to_frame[:2], size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    inside = cv2.warpAffine(np.ones(one.shape[:2], np.uint8), to_frame[:2], size, flags=cv2.INTER_NEAREST)
    return left, right, inside.astype(bool)


def _scaling(across: float, down: float) -> Float64[np.ndarray, "3 3"]:
    return np.array([[across, 0, (across - 1) / 2], [0, down, (down - 1) / 2], [0, 0, 1.0]])


def _without_margin(mask: Mask) -> Mask:
    """Returns the mask less 2% on each side, where a border is compared if an alignment is a little off."""
    window = np.ones([2 * round(0.02 * side) + 1 for side in mask.shape], np.uint8)
    cv2 = _cv2()
    return cv2.erode(mask.astype(np.uint8), window, borderType=cv2.BORDER_CONSTANT, borderValue=0).astype(bool)


def _shrink(mask: Mask, window: int) -> Mask:
    """Returns where a window around a pixel is inside the mask; beyond the frame counts as inside."""
    return _cv2().erode(mask.astype(np.uint8), np.ones((window, window), np.uint8)).astype(bool)


def _gray(image: Image) -> Float32[np.ndarray, "height width"]:
    return _cv2().cvtColor(image, _cv2().COLOR_RGB2GRAY).astype(np.float32)


def _details(image: Image, least: float, most: float) -> Float32[np.ndarray, "height width"]:
    """Returns the gray levels' structures between two sizes in pixels."""
    cv2 = _cv2()
    gray = _gray(image)
    return cv2.GaussianBlur(gray, (0, 0), least) - cv2.GaussianBlur(gray, (0, 0), most)


def _local(
    left: Float32[np.ndarray, "height width"], right: Float32[np.ndarray, "height width"], window: int, noise: float
) -> tuple[Float32[np.ndarray, "height width"], ...]:
    """Returns both variances and the correlation in a window around each pixel; `noise` is added to the variances."""

    def mean(values: np.ndarray) -> np.ndarray:
        return _cv2().blur(values, (window, window))

    means = mean(left), mean(right)
    first, second = (np.maximum(mean(x * x) - m * m, 0) for x, m in zip((left, right), means, strict=True))
    shared = mean(left * right) - means[0] * means[1]
    return first, second, shared / np.sqrt(first * second + noise)


def _least_contrast(gray: Float32[np.ndarray, "height width"]) -> Float32[np.ndarray, "height width"]:
    """Returns the smaller eigenvalue of the structure tensor: zero where levels change in one direction at most."""
    cv2 = _cv2()
    across, down = cv2.Sobel(gray, cv2.CV_32F, 1, 0) / 8, cv2.Sobel(gray, cv2.CV_32F, 0, 1) / 8
    xx, yy, xy = (cv2.blur(product, (9, 9)) for product in (across * across, down * down, across * down))
    return (xx + yy) / 2 - np.sqrt(((xx - yy) / 2) ** 2 + xy**2)


_LUMA = np.array([0.299, 0.587, 0.114])
Cells = Float64[np.ndarray, "cells 3"]


def _color_differences(left: Image, right: Image, inside: Mask) -> tuple[float, float, float]:
    """Returns `colors`, `residue` and `shift` of a `Layout`: root mean square differences of 12 × 12 cells.

    The first is what remains after the colors of either picture were changed as editors do: brightness, contrast, and
    saturation, down to gray; the worst fifth of the cells is left out. The last is that without a change, or after the
    change of one picture to gray.
    """
    cv2 = _cv2()
    whole = cv2.resize(inside.astype(np.float32), (12, 12), interpolation=cv2.INTER_AREA).ravel() > 0.99
    if whole.sum() < 9:
        return 255.0, 1.0, 255.0
    one, other = (
        cv2.resize(each, (12, 12), interpolation=cv2.INTER_AREA).reshape(-1, 3)[whole].astype(np.float64)
        for each in (left, right)
    )
    shifts = [one - other, (one @ _LUMA)[:, None] - other, one - (other @ _LUMA)[:, None]]
    edited = min(_edited_difference(one, other), _edited_difference(other, one))
    spread = max(1.0, float(np.sqrt(((other - other.mean(axis=0)) ** 2).mean())))
    return edited, edited / spread, min(float(np.sqrt((shift**2).mean())) for shift in shifts)


def _edited_difference(cells: Cells, wanted: Cells) -> float:
    """Returns what remains of the difference after the best change of brightness, contrast and saturation."""
    luma = cells @ _LUMA
    model = np.stack([(cells - luma[:, None]).ravel(), np.repeat(luma, 3), np.ones(3 * len(luma))], axis=1)
    kept = np.ones(len(luma), bool)
    for _ in range(4):
        rows = np.repeat(kept, 3)
        weights = np.linalg.lstsq(model[rows], wanted.ravel()[rows])[0]
        errors = (model @ weights - wanted.ravel()).reshape(-1, 3)
        kept = np.abs(errors).max(axis=1) <= np.quantile(np.abs(errors).max(axis=1), 0.8)
    return float(np.sqrt((errors[kept] ** 2).mean()))
