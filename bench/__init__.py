"""Measurements: stores to measure with, load, and what came of it."""

# Before anything here imports openvino: it keeps that from reporting over the network.
import service.backends  # noqa: F401
