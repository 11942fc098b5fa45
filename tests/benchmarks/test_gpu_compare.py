"""Without a CUDA device the GPU's benchmark says so and measures nothing."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import compare
from meiqa.errors import DeviceUnavailable


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_it_refuses_to_start_without_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--layers", "1"]) == 2
    printed = capsys.readouterr()
    assert "needs a CUDA device" in printed.err
    assert printed.out == ""


def test_a_runtime_for_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(DeviceUnavailable, match="can't use CUDA"):
        compare.cuda_runtime()
