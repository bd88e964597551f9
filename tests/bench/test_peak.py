import subprocess
import sys

import pytest

from tests.conftest import ROOT

WATCHED = """
import sys

class Telemetry:
    def find_spec(self, name, *_):
        if name == "openvino_telemetry":
            raise SystemExit("telemetry is looked for")

sys.meta_path.insert(0, Telemetry())
"""


@pytest.mark.parametrize("module", ["bench.peak", "bench.ours", "bench.engines"])
def test_nothing_is_reported_over_the_network_by_what_imports_openvino(module: str) -> None:
    code = f"{WATCHED}\nimport {module}, openvino"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
