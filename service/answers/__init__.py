"""From a model's outputs to classes, features, activation maps and tensors, and arrays as bytes."""
