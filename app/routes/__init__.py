"""The endpoints, one module per concern."""
