"""The project's own model, trained from scratch."""
