"""Scoring on Ray: bulk runs, datasets of one's own, and the HTTP API on a cluster.

    serve run meiqa.ray:app                      # docs/scale.md
    meiqa.ray.score(ray.data.read_parquet(...))  # docs/bulk.md

Ray reports the use of it to its makers unless it is told not to; here it is.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is loaded, and later

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.exceptions import RayError

from meiqa.batches import BatchScorer, ScoreOptions, opened_engine, scorer
from meiqa.engine.scoring import ScoreRequest
from meiqa.errors import MeiqaError, ServiceError, UsageError, one_line
from meiqa.types import Assessment, Budget, Failure

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

    from meiqa.engine.engine import Engine
    from meiqa.engine.images import ImageSource

OBJECT_STORE_BYTES = 128 << 20
"""Of a Ray that is started here: what goes through it are numbers of parts and their reports."""
_SESSIONS = "meiqa-ray-"
_PHOTOS_AT_ONCE = 16
_MOST_LOST = 1000
"""Workers that may die one after the other while they begin, before a run is given up."""


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to Ray, or start one of our own ("local"), whose files are removed afterwards.

    Raises:
        UsageError: there is no Ray at that address.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of what Ray writes to our stderr
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    own = None
    if address == "local":
        own = _session_folder()
        quiet |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        quiet["_temp_dir"] = str(own)
        # Who has this key may use it. Ray would keep one in the home directory.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        with _unheard():
            ray.init(address, **quiet)
        # Ray's own handler, which it has just set, ends the process within its account of it.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"ray\.")  # that all cores are taken
            yield
    except (ConnectionError, RuntimeError, ValueError) as error:
        if ray.is_initialized():
            raise
        hint = "start one: ray start --head, or use this machine alone: local"
        raise UsageError(f"no Ray at {address}", seen=one_line(str(error)), hint=hint) from error
    finally:
        ray.shutdown()
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)


def mapped(
    work: Callable[[Any], Any],
    items: Iterable[Any],
    workers: tuple[int, int] | None = None,
    *,
    ordered: bool = True,
) -> Iterator[Any]:
    """Do something for each item with a pool of actors, of one core each; give what comes of it.

    An item whose actor dies is done again by another.

    Args:
        work: is pickled; what it opens, it opens when it is first called.
        workers: the fewest and the most; by default as many as the cluster has cores.
        ordered: in the order of the items, or as they come.

    Raises:
        MeiqaError: `work` raised it.
        ServiceError: Ray itself fails.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = ordered
    context.max_consecutive_actor_init_deaths = _MOST_LOST
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    given = [{"item": item} for item in items]
    done = ray.data.from_items(given, override_num_blocks=len(given)).map_batches(
        _Actor,
        batch_size=1,
        fn_constructor_args=(work,),
        compute=_pool(workers or (_cores(), _cores())),
        num_cpus=1,
    )
    try:
        for row in done.iter_rows():
            found = row["found"]
            if isinstance(found, MeiqaError):
                raise found
            yield found
    except RayError as error:
        cause = one_line(str(error).strip().splitlines()[-1])
        hint = "what is done is kept: run it again, a bulk run with --resume"
        raise ServiceError("Ray gave up", seen=cause, hint=hint) from error


class ClusterEngine:
    """Scores many photos as `Engine.score_many` does, on Ray.

    Args:
        open_engine: is pickled, and opens the engine of an actor.
    """

    def __init__(self, open_engine: Callable[[], Engine]) -> None:
        self._open = open_engine

    def score_many(
        self,
        images: Iterable[ImageSource],
        *,
        budget: Budget | None = None,
        k: int | None = None,
        learn: bool = False,
        detail: bool = True,
    ) -> Iterator[Assessment | Failure]:
        """Assess photos, which every node reaches by their paths; see `Engine.score_many`."""
        request = ScoreRequest(b"", budget, k, learn, detail)
        return mapped(_ScoreOne(self._open, request), images)


class _ScoreOne:
    def __init__(self, open_engine: Callable[[], Engine], request: ScoreRequest) -> None:
        self._open, self._request = open_engine, request

    @cached_property
    def _engine(self) -> Engine:
        return self._open()

    def __call__(self, image: ImageSource) -> Assessment | Failure:
        (result,) = self._engine.score_many([replace(self._request, image=image)])
        return result


def score(
    dataset: Dataset,
    column: str = "bytes",
    *,
    workers: tuple[int, int] | None = None,
    **options: Any,
) -> Dataset:
    """Score the photos of a dataset; each row gets what `meiqa.scorer` gives.

    Args:
        column: which one holds paths or encoded photos.
        workers: the fewest and the most actors, of one core each; by default one core is left to
            what reads and writes.
        options: of `meiqa.scorer`.
    """
    cores = _cores()
    return dataset.map_batches(
        _BatchActor,
        batch_size=_PHOTOS_AT_ONCE,
        batch_format="pyarrow",
        fn_constructor_args=(scorer(column, **options),),
        compute=_pool(workers or (1, max(1, cores - 1))),
        num_cpus=1 if cores > 1 else 0.5,  # or nothing could be read beside
    )


def app(args: Mapping[str, str]) -> Application:
    """Build the HTTP API for Ray Serve: `serve run meiqa.ray:app max_replicas=16`.

    Each replica is one engine of one core, with a scheduler of its own that keeps the deadlines of
    what it accepts and refuses the rest (503, Retry-After). Nothing is learned. `args` are:

    min_replicas, max_replicas: 1 and 8.
    waiting: requests a replica is meant to have on the way, above which there are to be more: 2.
    budget_ms: of a request that names none, 2000.
    api_key_file: who may ask, which is read where this runs; without it, whoever reaches the proxy.
    package, memory: see `meiqa.scorer`.

    Raises:
        pydantic.ValidationError: an argument is unknown, or of another kind.
    """
    from pydantic import BaseModel, PositiveFloat, PositiveInt
    from ray import serve

    from meiqa.serve.access import Keys, Settings

    class Arguments(BaseModel, extra="forbid"):
        min_replicas: PositiveInt = 1
        max_replicas: PositiveInt = 8
        waiting: PositiveFloat = 2
        budget_ms: PositiveFloat = 2000
        api_key_file: str | None = None
        package: str | None = None
        memory: str | None = None

    given = Arguments.model_validate(args)
    keys = None if given.api_key_file is None else Keys.read(given.api_key_file)
    settings = Settings(budget_ms=given.budget_ms, keys=keys)
    options = ScoreOptions(given.package, given.memory)

    def service() -> FastAPI:
        from meiqa.serve.app import create_app

        return create_app(opened_engine(options), settings)

    # What a replica accepts is its scheduler's to say, so Ray hands over more than that takes.
    deployment = serve.deployment(
        name="meiqa",
        autoscaling_config={
            "min_replicas": given.min_replicas,
            "max_replicas": given.max_replicas,
            "target_ongoing_requests": given.waiting,
        },
        max_ongoing_requests=2 * settings.max_requests,
        ray_actor_options={"num_cpus": 1},
    )
    return deployment(serve.ingress(service)()).bind()


@contextmanager
def _unheard() -> Iterator[None]:
    """Keep from the terminal what Ray's C++ says of itself; what goes wrong is raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class _Actor:
    """Does one thing for each item."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._work = work

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        try:
            return {"found": [self._work(batch["item"][0])]}
        except MeiqaError as error:  # as a value, without Ray's own account of it
            return {"found": [error]}


class _BatchActor:
    """Scores batches, with the one engine of its process."""

    def __init__(self, scorer: BatchScorer) -> None:
        self._scorer = scorer

    def __call__(self, batch: pa.Table) -> pa.Table:
        column = self._scorer.column
        # Values of other columns are left where they are.
        read = {name: () for name in batch.column_names}
        if column in read:
            read[column] = batch[column].to_pylist()
        found = self._scorer(read)
        for field in self._scorer.schema:
            batch = batch.append_column(field, pa.array(found[field.name], field.type))
        return batch


def _cores() -> int:
    return max(1, int(ray.cluster_resources()["CPU"]))  # type: ignore[no-untyped-call]


def _pool(workers: tuple[int, int]) -> ActorPoolStrategy:
    return ActorPoolStrategy(
        min_size=workers[0], max_size=workers[1], max_tasks_in_flight_per_actor=2
    )


def _session_folder() -> Path:
    """Make a folder for a Ray of our own, and remove those of processes that were killed.

    Its path is short: sockets lie below it, whose paths have at most 107 bytes.
    """
    base = Path(tempfile.gettempdir())
    base = base if len(str(base)) < 24 else Path("/tmp")
    for left in base.glob(f"{_SESSIONS}*"):
        owner = left.name.removeprefix(_SESSIONS).partition("-")[0]
        if owner.isdigit() and not _is_alive(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_SESSIONS}{os.getpid()}-", dir=base))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True
