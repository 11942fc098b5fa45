from __future__ import annotations

import importlib
import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from meiqa import cli
from meiqa.cli import doctor, options
from meiqa.errors import PackageNotFound, install_hint
from meiqa.locations import user_memory

Output = pytest.CaptureFixture[str]


def asked(memory: str | None) -> options.Options:
    return options.Options(memory=memory, no_verify=False)


def test_a_healthy_installation(engine: Any, tmp_path: Path, capsys: Output) -> None:
    assert cli.main(["doctor", "--format", "json", "--memory", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["package"] == {
        "path": "/packages/fake",
        "digest": "ab" * 32,
        "verified": True,
    }
    assert report["memory"] == {
        "path": str(tmp_path),
        "writable": True,
        "anchors": 3,
        "contrast": 0,
    }
    assert report["native_kernel"] is True
    assert "CPUExecutionProvider" in report["providers"]
    assert report["missing"] == []


def test_text(engine: Any, tmp_path: Path, capsys: Output) -> None:
    assert cli.main(["doctor", "--no-verify", "--memory", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "/packages/fake (digests not verified)" in text
    assert "3 anchors, 0 contrast cases" in text
    assert text.endswith("Everything that scoring needs is there.\n")


def test_what_the_process_holds_is_told(
    engine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Output
) -> None:
    mappings = """1000-3000 r--p 00000000 fe:00 7 /lib/big one.so
Rss:                2048 kB
Private_Dirty:         4 kB
3000-4000 rw-p 00000000 00:00 0 [heap]
Rss:                3072 kB
4000-5000 rw-p 00000000 00:00 0
Rss:                1024 kB
5000-6000 r-xp 00002000 fe:00 7 /lib/big one.so
Rss:                1024 kB
6000-7000 r--p 00000000 fe:00 8 /lib/unread.so
Rss:                   0 kB
"""
    for name, text in (("MAPPINGS", mappings), ("STATUS", "Name:\tx\nVmHWM:\t  9216 kB\n")):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(doctor, name, tmp_path / name)
    assert doctor.held() == {
        "resident_bytes": 7 << 20,
        "mapped_bytes": 3 << 20,
        "peak_bytes": 9 << 20,
        "files": {"/lib/big one.so": 3 << 20},
    }
    assert cli.main(["doctor", "--memory", str(tmp_path)]) == 0
    assert (
        "7 MiB resident (at most 9), 3 of it mapped files: big one.so 3" in capsys.readouterr().out
    )


def test_where_the_system_does_not_tell_nothing_is_claimed(
    engine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Output
) -> None:
    rss, peak = "1000-3000 r--p 00000000 fe:00 7 /lib/one.so\nRss: 2048 kB\n", "VmHWM:\t9216 kB\n"
    unreadable = tmp_path / "unreadable"
    unreadable.mkdir()
    for mappings, status in ((None, peak), (rss, None), (rss, "Name:\tx\n"), ("", peak)):
        for name, text in (("MAPPINGS", mappings), ("STATUS", status)):
            path = unreadable if text is None else tmp_path / name
            if text is not None:
                path.write_text(text)
            monkeypatch.setattr(doctor, name, path)
        assert doctor.held() is None
    assert cli.main(["doctor", "--memory", str(tmp_path)]) == 0
    assert "resident" not in capsys.readouterr().out


def test_what_extras_lack_is_told(
    engine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Output
) -> None:
    needs = ['rawpy<1,>=0.25; extra == "photos"', 'no-such; os == "x" and extra == "photos"']
    monkeypatch.setattr(doctor, "requires", lambda _: [*needs, 'pillow; extra == "serve"'])
    assert cli.main(["doctor", "--memory", str(tmp_path)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"extra photos lacks no-such: {install_hint('photos')}" in lines
    assert "extra serve installed" in lines


def test_a_missing_package_is_listed_with_its_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Output
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PackageNotFound("no engine package", hint="meiqa export CHECKPOINT")

    monkeypatch.setattr(options, "engine_of", refuse)
    assert cli.main(["doctor", "--memory", str(tmp_path)]) == 1
    assert "no engine package; meiqa export CHECKPOINT" in capsys.readouterr().out


def test_missing_runtime_and_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: object) -> Any:
        raise ImportError(f"no {name}")

    def version(name: str) -> str:
        if name.startswith("onnxruntime"):
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(importlib, "import_module", absent)
    monkeypatch.setattr(options, "engine_of", absent)
    report = doctor.examine(asked(str(tmp_path)))
    assert [entry["what"] for entry in report["missing"]] == [
        "ONNX Runtime is not installed",
        "the native kernel cannot be loaded: no meiqa.kernels._native",
    ]
    assert all(entry["hint"] == install_hint("cpu") for entry in report["missing"])
    assert report["providers"] == []


def test_a_named_memory_that_cannot_be_written_is_a_fault(engine: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    report = doctor.examine(asked(str(file / "memory")))
    assert not report["memory"]["writable"]
    assert "--no-learn" in report["missing"][0]["hint"]


def test_the_users_memory_may_be_unwritable(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEIQA_MEMORY", str(tmp_path / "file" / "memory"))
    assert cli.main(["doctor"]) == 0
    assert "(not writable: nothing is remembered)" in capsys.readouterr().out


def test_the_users_memory_is_that_of_the_package(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEIQA_MEMORY", str(tmp_path / "new"))
    memory = doctor.examine(asked(None))["memory"]
    assert memory["path"] == str(tmp_path / "new" / ("ab" * 8))
    assert memory["writable"]
    assert not (tmp_path / "new").exists()


def test_user_memory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEIQA_MEMORY", raising=False)
    assert user_memory().parts[-2:] == ("meiqa", "memory")
    monkeypatch.setenv("MEIQA_MEMORY", "/somewhere")
    assert user_memory() == Path("/somewhere")
