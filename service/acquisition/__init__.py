"""Models into the store: pulled from public files or imported, checked, and published with their cards."""
