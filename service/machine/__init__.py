"""What this machine offers and this process takes of it: cores, GPUs, memory, worker processes."""
