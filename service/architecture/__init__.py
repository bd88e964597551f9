"""PVT-v2, its variants, and checkpoint dialects as one state dict."""
