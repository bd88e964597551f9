import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.settings import Settings, UnknownSettingError
from service.cores import usable_cores


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVT_PRELOAD", "pvt_v2_b0.digits, pvt_v2_b2,")

    assert Settings.from_environment().preload == ("pvt_v2_b0.digits", "pvt_v2_b2")


def test_an_unknown_setting_is_refused_with_the_nearest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVT_MODELSTORE", "/srv")

    with pytest.raises(UnknownSettingError, match="PVT_MODELSTORE is no setting; the nearest one is PVT_MODEL_STORE"):
        Settings.from_environment()


@pytest.mark.parametrize(
    ("name", "value"),
    [("PVT_PORT", "70000"), ("PVT_QUEUE_SIZE", "0"), ("PVT_BACKEND", "tensorrt"), ("PVT_MAX_BODY_MB", "-1")],
)
def test_a_value_out_of_bounds_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(ValidationError):
        Settings.from_environment()


def test_settings_can_not_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1


def test_units_are_converted_for_the_engine() -> None:
    options = Settings(timeout_ms=1500, max_batch_delay_ms=20, max_image_megapixels=2.5).engine_options()

    assert (options.timeout_seconds, options.max_batch_delay_seconds) == (1.5, 0.02)
    assert options.max_image_pixels == 2_500_000


def test_instances_default_to_the_usable_cores() -> None:
    assert Settings().engine_options().instances == usable_cores()
    assert Settings(instances=3).engine_options().instances == 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PVT_PROT", "1", "pvt-serve: PVT_PROT is no setting; the nearest one is PVT_PORT"),
        ("PVT_PORT", "many", "pvt-serve: PVT_PORT=many: Input should be a valid integer"),
    ],
)
def test_the_process_says_what_is_wrong_and_exits_with_2(name: str, value: str, message: str) -> None:
    root = Path(__file__).parent.parent.parent

    done = subprocess.run(
        [sys.executable, "-m", "app"], cwd=root, env={name: value}, capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert done.stderr.startswith(message)


def test_the_readme_lists_every_setting_with_its_default(readme: str) -> None:
    for name, field in Settings.model_fields.items():
        default = ",".join(field.default) if isinstance(field.default, tuple) else str(field.default)
        assert f"| `PVT_{name.upper()}` | {f'`{default}`' if default else ''} |" in readme, name
