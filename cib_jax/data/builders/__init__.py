"""Preparing data sets where tensorflow-datasets alone cannot."""
