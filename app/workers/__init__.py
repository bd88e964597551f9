"""Several worker processes on one socket: `docs/decisions/workers.md`."""
