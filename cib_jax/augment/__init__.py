"""Augmentation on the device: uint8 images or features to normalized views."""
