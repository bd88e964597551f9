"""From a model's outputs to classes, features and class activation maps: pure functions of what the engine returns."""
