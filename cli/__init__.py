"""The command line, `pvt-serve`."""

URL_VARIABLE, KEY_VARIABLE = "PVT_URL", "PVT_KEY"
"""What commands read of the environment beside the settings: the address of a service, and a key for it."""
