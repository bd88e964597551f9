"""What executes a model."""

import sys

# `import openvino` reports itself over the network unless its telemetry package can't be imported. So it can't.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # the documented way to block an import
