"""Arrays as the protocols write them: tensors, lists of pixels, binary forms."""
