import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.main import engine_options
from app.settings import Settings, SettingsInvalid
from app.workers import Worker, WorkerGroup
from service.errors import BackendUnavailable
from service.machine import usable_cores
from tests.conftest import ROOT


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVT_PRELOAD", "pvt_v2_b0.digits, pvt_v2_b2,")

    assert Settings.from_environment().preload == ("pvt_v2_b0.digits", "pvt_v2_b2")


def test_an_unknown_setting_is_refused_with_the_nearest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVT_MODELSTORE", "/srv")

    with pytest.raises(SettingsInvalid, match="PVT_MODELSTORE is not a setting; the nearest one is PVT_MODEL_STORE"):
        Settings.from_environment()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PVT_HOST", ""),
        ("PVT_PORT", "70000"),
        ("PVT_QUEUE_SIZE", "0"),
        ("PVT_BACKEND", "tensorrt"),
        ("PVT_DEVICE", "gpu"),
        ("PVT_DEVICE", "cuda:"),
        ("PVT_PRECISION", "int8"),
        ("PVT_MAX_BODY_MB", "-1"),
    ],
)
def test_a_value_out_of_bounds_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(SettingsInvalid):
        Settings.from_environment()


@pytest.mark.parametrize(("name", "value"), [("PVT_WORKERS", "2"), ("PVT_PORT", "9001")])
def test_a_management_port_is_another_one_and_for_one_process(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("PVT_MANAGEMENT_PORT", "9001")
    monkeypatch.setenv(name, value)

    with pytest.raises(SettingsInvalid, match=name):
        Settings.from_environment()


@pytest.mark.parametrize("name", ["PVT_PORT", "PVT_MANAGEMENT_PORT"])
def test_a_grpc_port_is_another_one(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("PVT_GRPC_PORT", "9001")
    monkeypatch.setenv(name, "9001")

    with pytest.raises(SettingsInvalid, match=r"^PVT_GRPC_PORT is the port of HTTP or of management"):
        Settings.from_environment()


@pytest.mark.parametrize("missing", ["grpc", "grpc_health", "grpc_reflection"])
def test_a_grpc_port_needs_its_extra(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setenv("PVT_GRPC_PORT", "8001")
    assert Settings.from_environment().grpc_port == 8001
    monkeypatch.setitem(sys.modules, missing, None)

    with pytest.raises(SettingsInvalid, match=r"^PVT_GRPC_PORT needs the extra grpc: pip install 'pvt-serve\[grpc\]'"):
        Settings.from_environment()


def test_the_memory_budget_is_in_bytes_for_the_engine_and_shared_out_among_workers(tmp_path: Path) -> None:
    options = engine_options(Settings(memory_budget_mb=300))

    assert options.budget.bytes == 300_000_000
    assert engine_options(Settings()).budget.bytes is None
    share = Worker(WorkerGroup(tmp_path, 3), 0, 0).share_of(options)
    assert share.budget.bytes == 100_000_000


def test_settings_can_not_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1


def test_units_are_converted_for_the_engine() -> None:
    options = engine_options(Settings(timeout_ms=1500, max_batch_delay_ms=20, max_image_megapixels=2.5))

    assert (options.timeout_seconds, options.max_batch_delay_seconds) == (1.5, 0.02)
    assert options.max_image_pixels == 2_500_000


def test_instances_default_to_the_usable_cores() -> None:
    assert engine_options(Settings()).instances == usable_cores()
    assert engine_options(Settings(instances=3)).instances == 3


# As the page on services of Kubernetes's documentation lists them for redis-primary.
@pytest.mark.parametrize("service", ["PVT", "PVT_SERVE", "PVT_MANAGEMENT", "PVT_GRPC"])
def test_what_kubernetes_sets_for_a_service_of_that_name_is_no_setting(
    monkeypatch: pytest.MonkeyPatch, service: str
) -> None:
    for name, value in {
        "SERVICE_HOST": "10.0.0.11",
        "SERVICE_PORT": "8001",
        "SERVICE_PORT_HTTP": "8001",
        "PORT": "tcp://10.0.0.11:8001",
        "PORT_8001_TCP": "tcp://10.0.0.11:8001",
        "PORT_8001_TCP_PROTO": "tcp",
        "PORT_8001_TCP_PORT": "8001",
        "PORT_8001_TCP_ADDR": "10.0.0.11",
    }.items():
        monkeypatch.setenv(f"{service}_{name}", value)

    assert Settings.from_environment() == Settings(port=8000, management_port=0, grpc_port=0)


@pytest.mark.parametrize("value", ["9001", "tcp://", "http://10.0.0.11:8001"])
def test_a_misspelled_port_is_no_service_of_kubernetes(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PVT_MANGEMENT_PORT", value)

    with pytest.raises(SettingsInvalid, match=r"PVT_MANGEMENT_PORT is not a setting; .* PVT_MANAGEMENT_PORT"):
        Settings.from_environment()


def test_a_platforms_port_wins_over_a_service_of_kubernetes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVT_PORT", "tcp://10.0.0.11:8001")
    monkeypatch.setenv("AIP_HTTP_PORT", "8080")

    assert Settings.from_environment().port == 8080


def test_a_list_with_nothing_in_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVT_PRELOAD", ",")

    with pytest.raises(SettingsInvalid, match="nothing in it"):
        Settings.from_environment()


@pytest.mark.parametrize("name", ["PVT_API_KEYS", "PVT_MANAGEMENT_KEYS"])
@pytest.mark.parametrize("value", ["", " ", ",", "secret,", ",secret", "secret,,secret2", "secret, ,x", "\t", "\u200b"])
def test_a_blank_key_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(SettingsInvalid, match=rf"^{name}: .*is blank; leave the variable out") as refused:
        Settings.from_environment()
    assert "secret" not in str(refused.value)


def test_keys_that_a_client_sends_alike_are_the_same_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVT_API_KEYS", "é")
    monkeypatch.setenv("PVT_MANAGEMENT_KEYS", "Ã©")

    with pytest.raises(SettingsInvalid, match="one of these is in PVT_API_KEYS too"):
        Settings.from_environment()


@pytest.mark.parametrize("value", ["here", "10.0.0.1/8", "10.0.0.0/33", "*", "127.0.0.1,Unix"])
def test_a_proxy_that_is_no_network_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PVT_TRUSTED_PROXIES", value)

    with pytest.raises(SettingsInvalid, match=r"PVT_TRUSTED_PROXIES.*name addresses, networks"):
        Settings.from_environment()


def test_a_key_for_predictions_is_none_for_management(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVT_API_KEYS", "one,two")
    monkeypatch.setenv("PVT_MANAGEMENT_KEYS", "three,two")

    with pytest.raises(SettingsInvalid, match="one of these is in PVT_API_KEYS too"):
        Settings.from_environment()


def test_keys_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVT_API_KEYS", "hush,hush2")

    settings = Settings.from_environment()

    assert len(settings.api_keys) == 2
    assert "hush" not in repr(settings)


def test_a_port_that_is_taken_is_said_and_exits_with_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environment = {"PVT_PORT": str(taken.getsockname()[1])}
        done = subprocess.run(
            [sys.executable, "-m", "app"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )

    assert done.returncode == 2
    assert "as PVT_HOST and PVT_PORT say: Address already in use" in done.stderr


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PVT_PROT", "1", "pvt-serve: PVT_PROT is not a setting; the nearest one is PVT_PORT"),
        ("PVT_PORT", "many", "pvt-serve: PVT_PORT=many: Input should be a valid integer"),
    ],
)
def test_the_process_says_what_is_wrong_and_exits_with_2(name: str, value: str, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "app"], cwd=ROOT, env={name: value}, capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert done.stderr.startswith(message)


@pytest.mark.parametrize(
    ("value", "folder"), [("", None), ("/plans", Path("/plans")), ("~/plans", Path("/root/plans"))]
)
def test_the_plan_cache_is_where_the_setting_says(
    monkeypatch: pytest.MonkeyPatch, value: str, folder: Path | None
) -> None:
    monkeypatch.setenv("HOME", "/root")
    monkeypatch.setenv("PVT_CACHE_DIR", value)

    assert engine_options(Settings()).cache == folder


def test_a_user_without_a_home_has_no_plan_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)

    assert engine_options(Settings(cache_dir=Path("~/plans"))).cache is None


def test_weights_are_not_pulled_on_demand_into_a_store_by_url() -> None:
    with pytest.raises(ValidationError, match="PVT_PULL=on_demand puts weights into a folder"):
        Settings(model_store="memory://store", pull="on_demand")


def test_openvino_on_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVT_DEVICE", "cuda")
    monkeypatch.setenv("PVT_BACKEND", "openvino")

    with pytest.raises(SettingsInvalid, match="PVT_BACKEND=openvino runs on the CPU, and PVT_DEVICE=cuda asks for"):
        Settings.from_environment()


def test_a_gpu_gets_larger_batches_and_two_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.main.visible", lambda: ("cuda:0", "cuda:1"))

    auto, cpu, openvino = map(engine_options, (Settings(), Settings(device="cpu"), Settings(backend="openvino")))
    chosen = engine_options(Settings(device="cuda:1", instances=3, max_batch_size=32))

    assert (auto.devices, auto.instances, auto.max_batch_size) == (("cuda:0", "cuda:1"), 4, 256)
    assert (cpu.devices, cpu.instances, cpu.max_batch_size) == ((), usable_cores(), 8)
    assert openvino.devices == ()
    assert (chosen.devices, chosen.instances, chosen.max_batch_size) == (("cuda:1",), 3, 32)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.main.visible", lambda: ())

    assert engine_options(Settings()).devices == ()
    with pytest.raises(BackendUnavailable, match=r"PVT_DEVICE=cuda:1: .*set PVT_DEVICE=cpu"):
        engine_options(Settings(device="cuda:1"))


def test_each_worker_has_at_least_one_batch_at_a_time_for_each_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.main.visible", lambda: ("cuda:0", "cuda:1"))
    options = engine_options(Settings())

    assert [Worker(WorkerGroup(tmp_path, 4), i, 0).share_of(options).instances for i in range(4)] == [2, 2, 2, 2]


def test_a_store_that_is_named_is_used_for_reading_and_writing_though_another_is_near(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "model_store").mkdir()
    monkeypatch.chdir(tmp_path)
    near = Settings.from_environment()
    monkeypatch.setenv("PVT_MODEL_STORE", "elsewhere")
    named = Settings.from_environment()

    assert (near.store_folder, near.writable_store()) == (Path("model_store"), (Path("model_store"), False))
    assert (named.store_folder, named.writable_store()) == (Path("elsewhere"), (Path("elsewhere"), False))
