"""The embedded model and memory, through the public face, on scikit-image's photographs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import meiqa
from meiqa import Assessment, Budget, Engine, cli
from meiqa.cli.score import demo_photos
from meiqa.engine.images import fitted, load_pixels
from meiqa.engine.measures import measure_attributes, measured_sentence
from meiqa.engine.package import EnginePackage

ASSETS = Path(meiqa.__file__).parent / "assets"
LARGEST_ASSETS_BYTES = 40 << 20
K = 32


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A contrast memory of this module's own."""
    return tmp_path_factory.mktemp("shipped")


@pytest.fixture(scope="module")
def engine(memory: Path) -> Iterator[Engine]:
    """The engine as a user opens it."""
    with Engine.open(memory=memory) as opened:
        yield opened


@pytest.fixture(scope="module")
def assessed(engine: Engine) -> dict[str, Assessment]:
    """Every photo of the demo, nothing learnt."""
    photos = demo_photos()
    results = engine.score_many([photo for _, photo in photos], k=K, learn=False)
    found = {}
    for (name, _), result in zip(photos, results, strict=True):
        assert isinstance(result, Assessment)
        found[name] = result
    return found


def test_assets_are_small_and_whole() -> None:
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LARGEST_ASSETS_BYTES
    assert EnginePackage.open(ASSETS / "package", verify=True).manifest.precision == "int8"


def test_there_are_a_thousand_anchors(engine: Engine) -> None:
    assert engine.memory.snapshot().count_anchors >= 1_000


def test_descriptions_tell_what_was_measured_and_leave_the_verdict_to_the_score(
    engine: Engine, assessed: dict[str, Assessment]
) -> None:
    photos = dict(demo_photos())
    for name, assessment in assessed.items():
        pixels = fitted(load_pixels(photos[name]).array, engine.model.image)
        assert assessment.summary is not None
        assert assessment.summary.endswith(measured_sentence(measure_attributes(pixels)))
        assert "Overall" not in assessment.summary
        assert not assessment.left_out


def test_degraded_photos_score_below_clean_ones(assessed: dict[str, Assessment]) -> None:
    clean = {name.split(",")[0]: a.score for name, a in assessed.items() if "clean" in name}
    pairs = [
        (clean[name.split(",")[0]], a.score) for name, a in assessed.items() if "clean" not in name
    ]
    assert np.mean([before > after for before, after in pairs]) >= 0.8


def test_comparisons_move_scores_and_are_listed(assessed: dict[str, Assessment]) -> None:
    moved = [a for a in assessed.values() if abs(a.score - a.initial_score) > 0.05]
    assert moved
    for assessment in moved:
        assert len(assessment.neighbours) == K
        assert all(
            0 <= n.preference <= 1 for n in assessment.neighbours if n.preference is not None
        )
        assert assessment.summary
        assert all(note.startswith("small: ") for note in assessment.degraded)


def test_a_score_is_the_same_alone_in_a_batch_reversed_and_on_one_thread(
    assessed: dict[str, Assessment], tmp_path: Path
) -> None:
    names = list(assessed)[:7]
    photos = dict(demo_photos())
    together = {name: assessed[name].score for name in names}
    for threads, order in ((1, names), (2, names[::-1])):
        memory = tmp_path / str(threads)
        memory.mkdir()
        with Engine.open(memory=memory, threads=threads) as engine:
            alone = engine.score(photos[names[3]], k=K, learn=False).score
            batch = engine.score_many([photos[name] for name in order], k=K, learn=False)
            scores = {name: r.score for name, r in zip(order, batch, strict=True)}  # type: ignore[union-attr]
        assert alone == pytest.approx(together[names[3]], abs=1e-3)
        assert scores == pytest.approx(together, abs=1e-3)


def test_a_thin_memory_scores_alike_in_little_room(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learning, thin = tmp_path / "learning", tmp_path / "thin"
    assert cli.main(["memory", "create", str(learning)]) == 0
    assert cli.main(["memory", "thin", str(learning), "--keep", "100", "--out", str(thin)]) == 0
    assert "100 anchors" in capsys.readouterr().err
    assert sum(file.stat().st_size for file in thin.iterdir()) < 400_000
    _, photo = demo_photos()[0]
    with Engine.open(memory=thin, learn=False) as small:
        assert small.score(photo).score == engine.score(photo, k=0, learn=False).score
        compared = small.score(photo, k=8)
    assert not compared.neighbours
    assert "not compared with 8 neighbours: no tokens are kept of them" in compared.degraded


def test_a_reflection_is_remembered_and_met_again(engine: Engine) -> None:
    for _, photo in demo_photos():
        if engine.score(photo, k=K).reflection is not None:
            break
    else:
        pytest.fail("no photo of the demo was reflected on")
    # The same scene from nearer is another photo, and no duplicate; it looks like the one learnt.
    width, height = photo.size
    twin = photo.crop((width // 8, height // 8, width, height))
    origins = {neighbour.origin for neighbour in engine.score(twin, k=K, learn=False).neighbours}
    assert "contrast" in origins


def test_a_budget_that_nothing_fits_gives_up_all_and_says_so(engine: Engine) -> None:
    _, photo = demo_photos()[0]
    engine.score(photo, budget=Budget(ms=1000), k=K, learn=False)
    hurried = engine.score(photo, budget=Budget(ms=1), k=K, learn=False)
    assert hurried.degraded == ("no summary", "initial score only")
    assert hurried.summary is None
    assert not hurried.neighbours


def test_json_has_the_names_that_tools_parse(
    memory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, photo = demo_photos()[0]
    photo.save(tmp_path / "photo.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut short")
    command = ["score", str(tmp_path), "--no-learn", "--memory", str(memory), "--format", "json"]
    command += ["--k", str(K)]
    assert cli.main(command) == 1
    printed = capsys.readouterr()
    broken, good = json.loads(printed.out)
    assert broken["path"].endswith("broken.jpg")
    assert "error" in broken
    assert {
        "path",
        "score",
        "std",
        "ci95",
        "initial_score",
        "word",
        "percentile",
        "summary",
    } <= set(good)
    assert {"neighbours", "degraded", "timings_ms", "counters"} <= set(good)
    assert set(good["neighbours"][0]) == {"id", "origin", "score", "preference", "device"}
    assert "Traceback" not in printed.err


def test_a_changed_package_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "package"
    shutil.copytree(ASSETS / "package", package)
    with (package / "decoder.onnx").open("r+b") as graph:
        graph.seek(1000)
        graph.write(b"\0\0\0\0")
    picture = tmp_path / "photo.png"
    Image.new("RGB", (64, 64)).save(picture)
    assert cli.main(["score", str(picture), "--package", str(package)]) == 2
    printed = capsys.readouterr()
    assert "decoder.onnx is not the file that the manifest names" in printed.err
    assert "Traceback" not in printed.err
