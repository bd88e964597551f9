"""From settings to what the engine can be told. With it comes torch, which a supervisor of workers does not need."""

from dataclasses import replace

from app.settings import Settings
from service.eviction import Budget
from service.options import EngineOptions


def engine_options(settings: Settings) -> EngineOptions:
    """What of `settings` concerns the engine, in its units: bytes, seconds, pixels."""
    options = EngineOptions(
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
        max_batch_size=settings.max_batch_size,
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
    return replace(options, instances=settings.instances) if settings.instances else options
