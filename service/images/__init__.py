"""Bytes to the model's input: limits, orientation, colours, one resampling call."""
