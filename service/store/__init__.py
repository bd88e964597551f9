"""Model stores, in a folder or by URL: cards, versions, aliases, bytes."""
