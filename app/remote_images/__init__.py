"""Images by URL: which addresses may be connected to (SSRF protection), and fetching within limits."""
