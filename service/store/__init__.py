"""Where models lie, here or by URL: cards, versions, aliases, bytes."""
