"""The command line, `pvt-serve`."""
