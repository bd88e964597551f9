"""A typed client of pvt-serve, on httpx and numpy alone."""
