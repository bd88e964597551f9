"""Measurements: stores to measure with, load, and what came of it."""

import os

# Before anything here imports openvino: it keeps that from reporting over the network.
import service.backends  # noqa: F401

os.environ.pop("PVT_CACHE_MB", None)  # equal images are to be computed each time, whatever this shell serves with
