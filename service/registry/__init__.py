"""The models that are in memory or on their way: names, leases, loads, evictions, reloads."""
