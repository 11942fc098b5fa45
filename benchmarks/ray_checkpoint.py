"""Show how Ray Data's own checkpoint loses rows that were written, which is why bulk does without.

    python -m benchmarks.ray_checkpoint

A worker dies after it committed the checkpoint of its rows and before it could say so. Ray lets
another write them again, under the same name, and with a new pending checkpoint. Now the driver and
this worker die, too. The next run finds the pending checkpoint, and deletes the rows that are named
like it; the committed one, which is named so as well, says that they are done. Every death is a
SIGKILL at a place that is reached by chance in any run; here it is chosen.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import DataContext
from ray.data.checkpoint import CheckpointConfig
from ray.data.checkpoint.checkpoint_writer import BatchBasedCheckpointWriter

from benchmarks.processes import ENVIRONMENT, module_command
from meiqa.ray import connected

ROWS = 40


def run_job(place: Path) -> None:
    """Copy rows with a checkpoint; workers die as the docstring above says, the first two times."""
    driver = os.getpid()

    def copy(batch: dict[str, Any]) -> dict[str, Any]:
        writers: Any = BatchBasedCheckpointWriter
        commit = writers.commit_checkpoint

        def deadly(writer: object, pending: object) -> None:
            died = len(list(place.glob("died-*")))
            (place / f"died-{died}").touch()
            if died == 1:
                os.kill(driver, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            commit(writer, pending)
            if died == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        writers.commit_checkpoint = deadly
        return batch

    with connected("local"):
        context = DataContext.get_current()
        context.checkpoint_config = CheckpointConfig(
            "id", str(place / "checkpoint"), delete_checkpoint_on_success=False
        )
        rows = ray.data.read_parquet(str(place / "in"), override_num_blocks=1)
        rows.map_batches(copy).write_parquet(str(place / "out"))


def measured() -> dict[str, int]:
    """Run the job until it is through, and count its rows."""
    with tempfile.TemporaryDirectory(prefix="meiqa-checkpoint-") as name:
        place, runs = Path(name), 1
        (place / "in").mkdir()
        pq.write_table(
            pa.table({"id": [f"{n:03}" for n in range(ROWS)]}), place / "in/rows.parquet"
        )
        command = module_command("benchmarks.ray_checkpoint", "--job", place)
        while subprocess.run(command, env=ENVIRONMENT, capture_output=True).returncode and runs < 9:
            runs += 1
        written = pq.read_table(place / "out").num_rows if list(place.glob("out/*")) else 0
        committed = pq.read_table(place / "checkpoint").num_rows
    return {"rows": ROWS, "runs": runs, "written": written, "said_to_be_done": committed}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ray_checkpoint", description=__doc__
    )
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        run_job(options.job)
    else:
        print(json.dumps(measured()))


if __name__ == "__main__":
    main()
