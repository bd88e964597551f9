import gc
from collections.abc import Sequence
from threading import Event

import numpy as np
import pytest
import torch
from torch import nn

from service.architecture.pvt_v2 import create
from service.backends.base import Batch, Layout, Precision, Served
from service.backends.cuda import CudaBackend
from service.backends.cuda_compiling import Function, Job, Placed, TorchCompiler
from service.errors import OutOfMemory
from tests.service.fake_device import FakeDevice

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
LAYOUT = Layout(2, 1)


@pytest.fixture(scope="module")
def served() -> Served:
    torch.manual_seed(0)
    return Served(create("pvt_v2_b0", num_classes=5), (0.4, 0.5, 0.6), (0.2, 0.2, 0.2)).eval()


def images(count: int, seed: int = 0) -> Batch:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def backend(devices: Sequence[FakeDevice], instances: int = 2, compiler: TorchCompiler | None = None) -> CudaBackend:
    return CudaBackend(devices, instances, compiler)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_graph_has_the_outputs_of_the_plain_module(served: Served, precision: Precision) -> None:
    graph = backend([FakeDevice(emulates=True)]).program(served, 32, 32).graph(2, LAYOUT, precision)
    batch = images(2)
    with torch.inference_mode():
        expected = served(torch.tensor(batch))

    given = graph.run(0, batch)

    assert graph.precision == precision
    for mine, true in zip(given, expected, strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, true.numpy(), atol=TOLERANCE[precision] * float(true.abs().max()))


def test_the_served_module_stays_as_it_is(served: Served) -> None:
    backend([FakeDevice(emulates=True)]).program(served, 32, 32).graph(1, LAYOUT, "float16")

    assert {parameter.dtype for parameter in served.parameters()} == {torch.float32}


def test_instances_take_turns_on_the_devices_and_have_a_slot_of_their_own(served: Served) -> None:
    devices = [FakeDevice("cuda:0"), FakeDevice("cuda:1")]
    graph = backend(devices, 5).program(served, 32, 32).graph(1, Layout(5, 1), "float32")

    for instance in range(5):
        graph.run(instance, images(1))

    first, second = (device.captured[-1] for device in devices)
    assert (first.ran, second.ran) == ([0, 1, 2], [0, 1])
    assert (len(first.buffers), len(second.buffers)) == (3, 2)


def test_fewer_instances_than_devices_leave_some_out(served: Served) -> None:
    devices = [FakeDevice("cuda:0"), FakeDevice("cuda:1")]
    one = backend(devices, 1)

    one.program(served, 32, 32).graph(1, Layout(1, 1), "float32").run(0, images(1))

    assert one.device == "cuda:0"
    assert devices[1].captured == []


def test_images_are_stacked_in_the_input_buffer_of_their_slot(served: Served) -> None:
    device = FakeDevice()
    graph = backend([device]).program(served, 32, 32).graph(3, LAYOUT, "float32")
    buffers = [buffer.copy() for buffer in device.captured[-1].buffers]

    outputs = graph.run(1, list(images(2)))

    first, second = device.captured[-1].buffers
    np.testing.assert_array_equal(first, buffers[0])
    np.testing.assert_array_equal(second, [*images(2), buffers[1][2]])
    np.testing.assert_array_equal(outputs[0][:2], graph.run(0, second)[0][:2])


def test_the_weights_are_on_a_device_once_and_channels_last(served: Served) -> None:
    device = FakeDevice()
    program = backend([device]).program(served, 32, 32)

    graphs = [program.graph(size, LAYOUT, "float32") for size in (1, 2)]

    assert len(graphs) == 2
    assert device.placed == [torch.float32]
    placed = device.captured[-1].function
    assert isinstance(placed, Placed)
    weights = placed.served.model.get_parameter("patch_embed1.proj.weight")
    assert weights.is_contiguous(memory_format=torch.channels_last)


def test_weights_leave_a_device_with_the_last_graph_that_reads_them(served: Served) -> None:
    device = FakeDevice()
    program = backend([device]).program(served, 32, 32)
    graph = program.graph(1, LAYOUT, "bfloat16")
    before = len(device.placed)
    device.captured.clear()

    del graph
    gc.collect()
    program.graph(1, LAYOUT, "bfloat16")

    assert len(device.placed) == before + 1


class AddsOne(TorchCompiler):
    """A compiler whose modules add one to every output."""

    def __init__(self) -> None:
        super().__init__(None)
        self.prepared: list[Job] = []
        self.compiled: list[nn.Module] = []

    def prepare(self, job: Job, stopped: Event) -> None:
        assert not stopped.is_set()
        self.prepared.append(job)

    def __call__(self, module: nn.Module) -> Function:
        self.compiled.append(module)
        return lambda pixels: [each + 1 for each in module(pixels)]


def test_an_optimized_graph_is_of_the_compiled_module(served: Served) -> None:
    compiler = AddsOne()
    program = backend([FakeDevice()], compiler=compiler).program(served, 32, 32)

    plain = program.graph(1, LAYOUT, "float32").run(0, images(1))
    assert program.optimized
    faster = program.optimized.graph(1, "float32").run(0, images(1))

    assert len(compiler.compiled) == 1
    np.testing.assert_allclose(faster[0], plain[0] + 1, atol=1e-5)


def test_without_a_compiler_nothing_is_optimized(served: Served) -> None:
    assert backend([FakeDevice()]).program(served, 32, 32).optimized is None


def test_an_optimized_graph_is_prepared_for_each_device(served: Served) -> None:
    compiler = AddsOne()
    program = backend([FakeDevice("cuda:0"), FakeDevice("cuda:1")], compiler=compiler).program(served, 32, 64)

    assert program.optimized
    program.optimized.prepare(4, "bfloat16", Event())

    assert compiler.prepared == [Job(served, torch.bfloat16, (4, 32, 64, 3), f"cuda:{i}") for i in range(2)]


def test_a_card_computes_one_batch_at_a_time_however_many_are_in_flight() -> None:
    two = backend([FakeDevice("cuda:0"), FakeDevice("cuda:1")], 4)

    assert two.layouts(16) == [Layout(2, 1)]


def test_sixteen_bits_are_tried_where_a_card_has_them() -> None:
    assert backend([FakeDevice()]).precisions == ("bfloat16", "float16", "float32")
    assert backend([FakeDevice(), FakeDevice(bfloat16=False)]).precisions == ("float16", "float32")


def test_memory_is_that_of_all_devices() -> None:
    assert backend([FakeDevice(memory=3), FakeDevice(memory=4)]).memory_bytes() == 7


def test_a_batch_that_does_not_fit_is_reported_as_that(served: Served) -> None:
    program = backend([FakeDevice(largest=8)]).program(served, 32, 32)

    with pytest.raises(OutOfMemory):
        program.graph(16, LAYOUT, "float32")


def test_nothing_is_kept_on_disk(served: Served) -> None:
    made = backend([FakeDevice()])

    assert made.restore is None
    assert made.program(served, 32, 32).graph(1, LAYOUT, "float32").export() is None
