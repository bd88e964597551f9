"""`python -m tests.app.faulty`: the service as `python -m app`, whose batches may meet a native library's bug.

Each looks at the file that FAULT_FILE names. `stick` in it: it calls a native function that never returns, and releases
Python's lock, as OpenVINO, torch and the image libraries do. `hold`: it takes until the file is gone.
"""

import asyncio
import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any

from app import __main__ as application
from app.starting import Starting


def never_return() -> None:
    ctypes.CDLL(None).sem_wait(ctypes.create_string_buffer(64))  # <semaphore.h>: nobody ever posts it


def put_fault() -> None:
    from service.backends import cpu  # noqa: PLC0415  it imports torch, which the supervisor does not need

    file, run = Path(os.environ["FAULT_FILE"]), cpu._TorchGraph.run

    def faulty(self: Any, *args: Any) -> Any:
        while file.exists():
            if file.read_text() == "stick":
                never_return()
            time.sleep(0.01)
        return run(self, *args)

    cpu._TorchGraph.run = faulty  # type: ignore[method-assign, assignment]


def start_faulty_workers() -> None:
    start = asyncio.create_subprocess_exec

    async def start_faulty(*command: Any, **options: Any) -> Any:
        return await start(*["tests.app.faulty" if each == "app" else each for each in command], **options)

    asyncio.create_subprocess_exec = start_faulty


if __name__ == "__main__":
    if "--as-worker" in sys.argv or os.environ.get("PVT_WORKERS", "1") == "1":
        put_fault()
    else:
        start_faulty_workers()
    sys.exit(application.main(Starting()))
