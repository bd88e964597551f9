"""What a capture of a CUDA graph needs around it, as torch 2.13's source has it (decision 49)."""

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from service.backends.compiling import Function


def answers_while(capture: AbstractContextManager[None], function: Function, pixels: Tensor) -> tuple[Tensor, ...]:
    """What `function` gives while it is captured. What it raises is raised, not what ending such a capture raises."""
    failure: Exception | None = None
    answers: tuple[Tensor, ...] = ()
    try:
        with capture:
            try:
                answers = tuple(function(pixels))
            except Exception as error:  # noqa: BLE001  raised below
                failure = error
    except RuntimeError:
        if failure is None:
            raise
    if failure:
        raise failure
    return answers


@contextmanager
def no_garbage() -> Iterator[None]:
    """Collect first and not again: freeing another graph, or a kernel that lost, would break a capture under way."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def own_workspace() -> Iterator[None]:
    """Let a captured graph have cuBLAS's workspace in its own memory pool.

    A graph keeps the address of the one it was captured with, and the one of the stream is freed with any other graph
    that was captured there; torch's own `_inductor/cudagraph_trees.py` does the same.
    """
    torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001  there is no public way
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001  there is no public way
