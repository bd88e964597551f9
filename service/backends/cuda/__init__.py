"""What only GPUs need: the backend, the card, and `torch.compile` in a process of its own."""
