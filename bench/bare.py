"""What the cores can do at all: decode and inference in a loop, one thread per core, no HTTP, no queue."""

import threading
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from service.images import decode
from service.loader import load
from service.options import EngineOptions, make_backends
from service.store import Store
from service.tuning import Limits


def bare_loop(store: Path, model: str, pictures: Sequence[bytes], seconds: float) -> float:
    """Images per second of `model` over `pictures`."""
    options = EngineOptions(model_store=store, default_model=model)
    executable = load(Store(store).find(model), make_backends(options), Limits(options.cores))
    geometry = executable.card.preprocessing.geometry
    counts = [0] * options.instances
    end = perf_counter() + seconds

    def work(instance: int) -> None:
        while perf_counter() < end:
            picture = pictures[counts[instance] % len(pictures)]
            executable.run(instance, [decode(picture, geometry, max_pixels=options.max_image_pixels).pixels])
            counts[instance] += 1

    threads = [threading.Thread(target=work, args=(instance,)) for instance in range(options.instances)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds
