"""Measurements: stores to measure with, load, and what came of it."""
