"""The color operations of the views in NumPy and float64, written from their definitions, for one image [h, w, 3]."""

import colorsys

import numpy as np
from scipy import ndimage

LUMA = np.array([0.2989, 0.587, 0.114])


def blend(image, anchor, factor):
    return np.clip(factor * image + (1 - factor) * anchor, 0, 1)


def adjust_brightness(image, factor):
    return blend(image, 0.0, factor)


def adjust_contrast(image, factor):
    return blend(image, np.mean(image @ LUMA), factor)


def adjust_saturation(image, factor):
    return blend(image, to_grayscale(image), factor)


def adjust_hue(image, shift):
    hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in image.reshape(-1, 3).tolist()]
    return np.reshape([colorsys.hsv_to_rgb((h + shift) % 1, s, v) for h, s, v in hsv], image.shape)


ADJUST = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
"""The operations by their number in `ColorJitter.order`."""


def to_grayscale(image):
    return np.repeat((image @ LUMA)[..., None], 3, -1)


def gaussian_blur(image, sigma):
    weights = np.exp(-0.5 * (np.arange(-1, 2) / sigma) ** 2)
    for axis in (0, 1):
        image = ndimage.correlate1d(image, weights / weights.sum(), axis, mode="mirror")
    return image
