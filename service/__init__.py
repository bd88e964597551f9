"""The engine: bytes and tensors in, results out; never HTTP."""
