"""Run Ray on two nodes in network namespaces of this machine, and cut one off in the middle.

    python -m benchmarks.bulk_nodes [--photos 600] [--output FILE]     # as root

Both nodes have a core each and write to the same folder. When a third of the photos is scored, the
link of the second node goes down for good, while its workers go on: what they have begun, they
write. The run has to end with one row for each photo, and the scores of `meiqa score`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.bulk_kills import make_photos, rows_of, scores_alone
from benchmarks.processes import ENVIRONMENT, module_command

HEAD, OTHER = "meiqa-head", "meiqa-other"
HEAD_IP, OTHER_IP = "10.77.3.1", "10.77.3.2"
PORT = 6379
LONGEST_S = 900.0
KEYED = {**ENVIRONMENT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "6d" * 32}
"""Of all that stands in the cluster."""


def ip(*words: str) -> None:
    """Run `ip`."""
    subprocess.run(("ip", *words), check=True)


@contextmanager
def namespaces() -> Iterator[None]:
    """Make two namespaces with a link between them, and end whatever runs in them."""
    for name in (HEAD, OTHER):
        ip("netns", "add", name)
    try:
        ip("link", "add", HEAD, "netns", HEAD, "type", "veth", "peer", OTHER, "netns", OTHER)
        for name, address in ((HEAD, HEAD_IP), (OTHER, OTHER_IP)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in (HEAD, OTHER):
            inside = subprocess.run(("ip", "netns", "pids", name), capture_output=True, text=True)
            for process in map(int, inside.stdout.split()):
                os.kill(process, signal.SIGKILL)
            ip("netns", "del", name)


def start_node(name: str, place: str, *options: str) -> None:
    """Start a node of one core in a namespace."""
    ray = Path(sys.executable).with_name("ray")
    common = ("--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats")
    command = ("ip", "netns", "exec", name, str(ray), "start", *common, *options)
    folder = ("--temp-dir", f"{place}/{name[-5:]}") if "--head" in options else ()
    with open(f"{place}/{name}.log", "w+") as log:
        if subprocess.run((*command, *folder), stdout=log, stderr=log, env=KEYED).returncode:
            log.seek(0)
            raise RuntimeError(f"Ray did not start on {name}: {log.read()}")


def wait_until(what: Callable[[], bool], run: subprocess.Popen[str]) -> None:
    """Wait for something while a run goes on."""
    ends = time.monotonic() + LONGEST_S
    while not what():
        if run.poll() is not None or time.monotonic() > ends:
            raise RuntimeError(f"the run ended early, or takes too long: {run.communicate()[0]}")
        time.sleep(0.1)


def measured(photos: int) -> dict[str, Any]:
    """Do it, and give the counts."""
    with tempfile.TemporaryDirectory(prefix="mq-", dir="/tmp") as place, namespaces():
        folder, out = Path(place, "photos"), Path(place, "out")
        make_photos(folder, photos, photos // 100)
        start_node(HEAD, place, "--head", f"--node-ip-address={HEAD_IP}", f"--port={PORT}")
        start_node(OTHER, place, f"--address={HEAD_IP}:{PORT}", f"--node-ip-address={OTHER_IP}")
        address = f"{HEAD_IP}:{PORT}"
        command = module_command("meiqa", "bulk", folder, "--out", out, "--address", address)
        began = time.monotonic()
        with subprocess.Popen(
            ("ip", "netns", "exec", HEAD, *command),
            env=KEYED,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as run:
            done = out / "_meiqa"
            parts = -(-photos // 16)
            wait_until(lambda: 3 * len(list(done.glob("done-*"))) >= parts, run)
            ip("-n", OTHER, "link", "set", OTHER, "down")
            cut_s = time.monotonic() - began
            said, _ = run.communicate(timeout=LONGEST_S)
        took_s = time.monotonic() - began
        rows, alone = rows_of(out), scores_alone(folder, [])
    ids = Counter(row["id"] for row in rows)
    scored = {row["path"]: row["score"] for row in rows if row["error"] is None}
    off = [abs(score - scored.get(path, float("nan"))) for path, score in alone.items()]
    return {
        "photos": photos,
        "exit_code": run.returncode,
        "cut_off_after_s": round(cut_s, 1),
        "seconds": round(took_s, 1),
        "rows": len(rows),
        "distinct_ids": len(ids),
        "error_rows": sum(row["error"] is not None for row in rows),
        "scores_compared": len(off),
        "largest_difference": max(off),
        "said": said.splitlines()[-1].partition(": ")[2].partition(": ")[2],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bulk_nodes", description=__doc__)
    parser.add_argument("--photos", type=int, default=600)
    parser.add_argument("--output", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    text = json.dumps(measured(options.photos), indent=2) + "\n"
    print(text, end="")
    if options.output is not None:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
