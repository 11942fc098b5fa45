"""Nothing leaves the machine unasked: the runtime's own telemetry is off on every way in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WAYS_IN = {
    "library": "import meiqa; meiqa.Engine; import onnxruntime",
    "command": "import sys; from meiqa.cli import main; sys.argv = ['meiqa', '--version']; main()\n"
    "import onnxruntime",
    "export": "import meiqa.export; import onnxruntime",
    "kernels": "import meiqa.kernels; import onnxruntime",
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_the_runtime_leaves_nothing_in_a_fresh_home_and_opens_no_socket(
    way: str, tmp_path: Path
) -> None:
    watch = (
        "import socket\n"
        "def refused(*_, **__): raise AssertionError('a socket was opened')\n"
        "socket.socket.connect = socket.getaddrinfo = refused\n"
    )
    session = (
        "\nimport onnxruntime as ort\n"
        "from meiqa.locations import embedded_assets\n"
        "ort.InferenceSession(embedded_assets() / 'package' / 'vision.onnx')\n"
    )
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in {"ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "XDG_DATA_HOME"}
    }
    subprocess.run(
        [sys.executable, "-c", watch + WAYS_IN[way] + session],
        env={**environment, "HOME": str(tmp_path)},
        check=True,
        timeout=120,
        capture_output=True,
    )
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == []
