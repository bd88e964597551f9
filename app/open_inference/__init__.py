"""The Open Inference Protocol v2 (KServe's and Triton's): messages, tensors, and the routes under `/v2`."""
