"""What this process holds in memory."""

import psutil


def resident_bytes() -> int:
    """Resident memory of the process."""
    resident: int = psutil.Process().memory_info().rss
    return resident
