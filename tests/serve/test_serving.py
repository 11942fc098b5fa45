"""`meiqa serve` as a process: it starts, answers, and ends in order."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from meiqa.cli import main
from meiqa.client import Client, Retries
from meiqa.engine.engine import Engine
from meiqa.errors import ServiceUnreachable, install_hint
from meiqa.serve.app import engines_sharing
from tests.serve.conftest import Started, jpeg


def test_it_finishes_what_it_accepted_when_it_is_told_to_end(started: Started) -> None:
    process, url = started("--budget-ms", "60000", "--log-format", "json")
    photos = [jpeg(seed) for seed in range(12)]
    with (
        Client(url, retries=Retries(most=0), timeout_s=60) as client,
        ThreadPoolExecutor(12) as pool,
    ):
        answers = [pool.submit(client.score, photo, k=24) for photo in photos]
        for _ in range(20):
            if client_waits(url) >= 3:
                break
        process.send_signal(signal.SIGTERM)
        wait(answers)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "everything that was accepted is answered" in log
    scored = [answer for answer in answers if answer.exception() is None]
    others = [answer.exception() for answer in answers if answer.exception() is not None]
    assert len(scored) >= 3
    assert log.count('"path": "/v1/score", "status": 200') == len(scored)
    assert all(isinstance(error, ServiceUnreachable) for error in others)  # came too late


def test_engines_side_by_side_give_the_same_answers() -> None:
    def first(threads: int | None) -> Engine:
        return Engine.open(threads=threads, learn=False)

    with engines_sharing(first, 2, "cpu", 1) as engines:
        one, two = (engine.score(jpeg(1), learn=False) for engine in engines)
    assert one.distortions == two.distortions != ()
    assert one.score == pytest.approx(two.score, abs=1e-3)


def client_waits(url: str) -> float:
    import httpx

    counted = re.search(r"^meiqa_waiting (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    assert counted is not None
    return float(counted[1])


def test_it_says_that_it_is_for_this_machine_only(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert "this machine only" in capsys.readouterr().err
    assert main(["serve", "--api-key-file", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_key_is_shown_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "keys"
    assert main(["api-key", "phone", "--file", str(file), "--scopes", "score,memory:write"]) == 0
    token = capsys.readouterr().out.strip()
    assert token.startswith("meiqa_")
    assert token not in file.read_text()
    assert main(["api-key", "bad name!", "--file", str(file)]) == 2


def test_without_the_extra_it_names_it() -> None:
    probe = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from meiqa.cli import main; sys.exit(main(['serve']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", probe],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ},
    )
    assert run.returncode == 2
    assert install_hint("serve") in run.stderr
    assert run.stderr.count("\n") == 1
