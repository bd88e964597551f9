"""Models into the store: from the catalogue, from files, on demand, checked on the way."""
