"""From settings to what the engine can be told. With it comes torch, which a supervisor of workers does not need."""

from app.settings import Settings
from service.machine.cores import usable_cores
from service.machine.devices import choose, visible
from service.options import Budget, EngineOptions, default_instances

# Images per batch where no setting says so; the batch plan stops earlier, as soon as more do not pay.
MAX_BATCH_SIZE = {"cpu": 8, "gpu": 256}


def engine_options(settings: Settings) -> EngineOptions:
    """What of `settings` concerns the engine, in its units: bytes, seconds, pixels.

    Raises:
        BackendUnavailable: a GPU is asked for that is not there.
    """
    devices = () if settings.backend == "openvino" else choose(settings.device, visible())
    cores = usable_cores()
    return EngineOptions(
        model_store=settings.store_folder,
        remote_store=settings.remote_store,
        default_model=settings.default_model,
        pull=settings.pull == "on_demand",
        mirror=settings.mirror or None,
        preload=settings.preload,
        pinned=settings.pinned,
        budget=Budget(
            bytes=int(settings.memory_budget_mb * 1e6) or None, min_residency_seconds=settings.min_residency_seconds
        ),
        cold=settings.cold,
        reload_seconds=settings.reload_seconds,
        backend=settings.backend,
        cache=settings.cache_folder,
        precision=None if settings.precision == "auto" else settings.precision,
        devices=devices,
        compile=settings.compile,
        cores=cores,
        instances=settings.instances or default_instances(devices, cores),
        max_batch_size=settings.max_batch_size or MAX_BATCH_SIZE["gpu" if devices else "cpu"],
        max_batch_delay_seconds=settings.max_batch_delay_ms / 1000,
        queue_size=settings.queue_size,
        timeout_seconds=settings.timeout_ms / 1000,
        max_image_pixels=int(settings.max_image_megapixels * 1e6),
        scaled_jpeg=settings.scaled_jpeg,
        max_images=settings.max_images,
        max_input_side=settings.max_input_side,
        sizes_per_model=settings.sizes_per_model,
        max_map_bytes=int(settings.max_maps_mb * 1e6),
        stall_seconds=settings.stall_seconds,
    )
