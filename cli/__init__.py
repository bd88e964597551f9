"""The command line, `pvt-serve`. Each module adds its commands by `register(app)`."""
