import pytest

from service.backends.cuda import choose, visible
from service.errors import BackendUnavailable

TWO = ("cuda:0", "cuda:1")


@pytest.mark.parametrize(
    ("setting", "present", "chosen"),
    [
        ("auto", (), ()),
        ("auto", TWO, TWO),
        ("cpu", TWO, ()),
        ("cuda", TWO, TWO),
        ("cuda:1", TWO, ("cuda:1",)),
        ("cuda:1,cuda:0,cuda:1", TWO, ("cuda:1", "cuda:0")),
    ],
)
def test_the_setting_chooses_among_the_gpus_that_are_there(
    setting: str, present: tuple[str, ...], chosen: tuple[str, ...]
) -> None:
    assert choose(setting, present) == chosen


@pytest.mark.parametrize(
    ("setting", "present", "reason"),
    [
        ("cuda", (), r"PVT_DEVICE=cuda: torch \S+ sees none, not cuda:0; set PVT_DEVICE=cpu"),
        ("cuda:2", TWO, "PVT_DEVICE=cuda:2: .* sees cuda:0, cuda:1, not cuda:2"),
        ("cuda:0,cuda:3", TWO, "not cuda:3;"),
    ],
)
def test_a_missing_gpu_is_refused_with_what_to_do(setting: str, present: tuple[str, ...], reason: str) -> None:
    with pytest.raises(BackendUnavailable, match=reason):
        choose(setting, present)


def test_a_torch_without_cuda_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert visible() == ()


def test_every_gpu_that_torch_sees_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert visible() == TWO
