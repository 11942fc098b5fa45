"""The review of a cull over HTTP: who is let in, what is decided, and what becomes of it."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from meiqa.decisions import Decisions
from meiqa.engine.images import load_pixels
from meiqa.errors import OutputUnwritable
from meiqa.serve.review import SIDES, Pictures, Review, create_app
from meiqa.types import CulledPhoto, Culling, Failure
from meiqa.wayout import STARS, Verdict

Make = Callable[..., TestClient]


@dataclass
class Finished:
    """What was to be done with photos."""

    verdicts: list[Verdict] = field(default_factory=list)
    times: int = 0
    error: Exception | None = None

    def __call__(self, verdicts: list[Verdict]) -> list[str]:
        self.times += 1
        if self.error is not None:
            raise self.error
        self.verdicts = verdicts
        return ["done"]


def culling(folder: Path, photos: int = 5) -> Culling:
    """A burst of two, a single photo, and a burst of the rest, of which only names are there."""
    names = [str(folder / f"{n}.jpg") for n in range(photos)]

    def shots(names: list[str]) -> tuple[CulledPhoto, ...]:
        kind: Any = "burst" if len(names) > 1 else None
        return tuple(
            CulledPhoto(n, name, 4.5 - n / photos, 0.2, 4.0, 0.9, kind=kind, too_close=n == 2)
            for n, name in enumerate(names, 1)
        )

    failure = Failure(names[0], OutputUnwritable("not judged"))
    return Culling((shots(names[:2]), shots(names[2:3]), shots(names[3:])), (failure,))


@pytest.fixture
def finished() -> Finished:
    return Finished()


@pytest.fixture
def client_of(tmp_path: Path, finished: Finished) -> Iterator[Make]:
    """Give a function that starts a review, each time anew over the same file."""
    opened: list[Decisions] = []

    def make(photos: int = 5) -> TestClient:
        for before in opened:
            before.__exit__()
        opened[:] = [Decisions(tmp_path / "d.jsonl")]
        will = {"will": "move the rejects to bin", "dry_run": False}
        review = Review(culling(tmp_path, photos), opened[0], STARS, finished, will)
        pictures = Pictures([each.path for each in review.photos])
        app = create_app(review, pictures, "token")
        return TestClient(app, base_url="http://localhost/token/")

    yield make
    for each in opened:
        each.__exit__()


def ratings(client: TestClient) -> list[int | None]:
    groups = client.get("state").json()["groups"]
    return [photo["rating"] for group in groups for photo in group["photos"]]


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("http://localhost/", {}),
        ("http://localhost/state", {}),
        ("http://localhost/other/state", {}),
        ("http://localhost/token2/state", {}),
        ("http://localhost/%C3%A9/review.js", {}),
        ("state", {"Host": "rebound.example"}),
        ("state", {"Origin": "http://other.example"}),
        ("", {"Origin": "null"}),
    ],
)
def test_others_are_not_let_in(client_of: Make, path: str, headers: dict[str, str]) -> None:
    answer = client_of().get(path, headers=headers)
    assert answer.status_code == 403
    assert "groups" not in answer.text
    assert client_of().post(path, headers=headers, content=b"{}").status_code == 403


@pytest.mark.parametrize("path", ["*", ""])
def test_what_is_no_path_of_ours_is_refused(client_of: Make, path: str) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    headers = [(b"host", b"localhost")]
    scope = {"type": "http", "method": "OPTIONS", "path": path, "headers": headers}
    asyncio.run(client_of().app(scope, receive, send))
    assert sent[0]["status"] == 403


def test_another_hosts_name_gets_no_advice_about_keys(client_of: Make) -> None:
    answer = client_of().get("state", headers={"Host": "rebound.example"})
    assert "answers to its own machine only" in answer.text
    assert "key" not in answer.text


def test_the_page_runs_only_its_own_script(client_of: Make) -> None:
    client = client_of()
    for name in ("", "review.js", "review.css", "page.css", "icon.svg"):
        answer = client.get(name)
        assert answer.status_code == 200
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert answer.headers["referrer-policy"] == "no-referrer"
        text = answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
    page = client.get("").text
    assert "style=" not in page
    assert " onclick" not in page
    for outside in ("..%2fd.jsonl", "%2e%2e/d.jsonl", "%2e%2e%2freview.py", "review.py"):
        assert client.get(outside).status_code == 404


def test_the_engines_picks_are_proposed(client_of: Make) -> None:
    state = client_of().get("state").json()
    first, second = state["groups"][0]["photos"]
    assert first == {
        **{"number": 0, "name": "0.jpg", "score": 4.3, "std": 0.2, "stars": 5, "proposed": 5},
        **{"rating": None, "close": False},
    }
    assert (second["proposed"], second["stars"], second["close"]) == (-1, 4, True)
    assert [group["kind"] for group in state["groups"]] == ["burst", None, "burst"]
    assert state["failures"] == 1
    assert state["will"] == "move the rejects to bin"


def test_decisions_outlive_the_service(client_of: Make, finished: Finished, tmp_path: Path) -> None:
    client = client_of()
    assert client.post("ratings", json={"1": 3, "0": -1}).json() == {"0": -1, "1": 3}
    assert client.post("ratings", json={"2": 0}).json() == {"2": 0}
    client = client_of()
    assert ratings(client) == [-1, 3, 0, None, None]
    assert client.post("undo").json() == {"2": None}
    assert client.post("ratings", json={"1": 5}).json() == {"1": 5}
    assert client.post("undo").json() == {"1": 3}
    assert client_of().post("finish").json() == {"lines": ["done"], "failed": False}
    said = {Path(each.path).stem: (each.rating, each.label) for each in finished.verdicts}
    assert said == {
        **{"0": (-1, "Red"), "1": (3, "Green"), "2": (5, "Green")},  # 2: as proposed
        **{"3": (5, "Green"), "4": (-1, "Red")},
    }


def test_what_is_not_on_the_page_is_not_undone(client_of: Make) -> None:
    client = client_of()
    client.post("ratings", json={"0": 1})
    client.post("ratings", json={"4": 2})
    client = client_of(4)
    assert client.post("undo").json() == {"0": None}
    assert client.post("undo").json() == {}
    assert ratings(client_of()) == [None, None, None, None, 2]


@pytest.mark.parametrize(
    "body",
    [
        *('{"9": 1}', '{"-1": 1}', '{"0": 6}', '{"0": -2}', '{"0": true}', '{"0": 1.0}'),
        *('{"0": "1"}', '{"a.jpg": 1}', '{"0": null}', "{}", "[]", ""),
    ],
)
def test_what_is_no_decision_is_refused(client_of: Make, body: str) -> None:
    client = client_of()
    assert client.post("ratings", content=body).status_code == 422
    assert ratings(client) == [None] * 5


def test_photos_are_shown_small_and_pixel_by_pixel(client_of: Make, tmp_path: Path) -> None:
    across, down = np.meshgrid(np.linspace(0, 255, 1500), np.linspace(0, 255, 600))
    slopes = np.stack([across, down, 0 * down], axis=-1).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    Image.fromarray(slopes).save(tmp_path / "0.jpg", exif=exif, quality=95)
    Image.fromarray(slopes[:40, :30]).save(tmp_path / "1.jpg", "PNG")
    client = client_of()
    assert client.get("photos/0/size").json() == {
        **{"width": 600, "height": 1500, "panes": 9, "most": 36 << 20}
    }
    for side in SIDES:
        answer = client.get(f"photos/0/{side}.jpg")
        assert "immutable" in answer.headers["cache-control"]
        with Image.open(io.BytesIO(answer.content)) as small:
            assert small.size == (round(side * 0.4), side)
    with Image.open(io.BytesIO(client.get("photos/0/100-200-300-400.jpg").content)) as part:
        assert part.size == (300, 400)
        upright = np.rot90(slopes, -1)[200:600, 100:400].astype(float)
        assert float(np.abs(np.asarray(part, float) - upright).max()) < 8
    with Image.open(io.BytesIO(client.get("photos/1/480.jpg").content)) as small:
        assert small.size == (30, 40)
    for missing in ("photos/5/size", "photos/5/480.jpg", "photos/0/481.jpg", "photos/-1/size"):
        assert client.get(missing).status_code == 404
    assert client.get("photos/2/480.jpg").status_code == 422
    assert client.get("photos/0/600-0-10-10.jpg").status_code == 422


def test_a_large_screen_is_filled_and_few_large_photos_are_held(
    client_of: Make, tmp_path: Path
) -> None:
    Image.new("L", (8000, 5000)).save(tmp_path / "0.jpg")
    client = client_of()
    size = client.get("photos/0/size").json()
    assert size["panes"] == 6
    assert size["most"] >= 8192 * 4608  # 1.6 times a 5K screen's sides
    assert client.get("photos/0/100-100-7680-4320.jpg").status_code == 200
    assert client.get("photos/0/0-0-8000-5000.jpg").status_code == 422


def test_small_pictures_have_the_photos_colours_and_limits(client_of: Make, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x8769] = {0xA005: {1: "R03"}}  # a camera's Adobe RGB
    Image.new("RGB", (4000, 3000), (40, 200, 60)).save(tmp_path / "0.jpg", exif=exif, quality=95)
    Image.new("L", (10_100, 10_000)).save(tmp_path / "1.jpg")
    client = client_of()
    with Image.open(io.BytesIO(client.get("photos/0/480.jpg").content)) as small:
        colour = np.asarray(small)[100, 100].astype(int)
    whole = load_pixels(tmp_path / "0.jpg").array[100, 100].astype(int)
    assert abs(whole - (40, 200, 60)).max() > 20
    assert abs(whole - colour).max() < 5
    assert client.get("photos/1/480.jpg").status_code == 413


def test_it_is_finished_once(client_of: Make, finished: Finished) -> None:
    client = client_of()
    assert client.post("finish").json() == {"lines": ["done"], "failed": False}
    assert client.post("finish").json() == {"lines": ["done"], "failed": False}
    assert finished.times == 1
    for path, body in (("ratings", {"0": 1}), ("undo", {})):
        refused = client.post(path, json=body)
        assert refused.status_code == 422
        assert "this review is finished" in refused.text
    assert ratings(client) == [None] * 5


def test_what_fails_while_finishing_is_told(client_of: Make, finished: Finished) -> None:
    finished.error = OutputUnwritable("the disk is full", hint="make room")
    answer = client_of().post("finish").json()
    assert answer == {"lines": ["error: the disk is full; make room"], "failed": True}


def test_a_thousand_photos_are_a_small_page(client_of: Make) -> None:
    client = client_of(1000)
    assert sum(len(client.get(name).content) for name in ("", "review.js", "review.css")) < 40_000
    state = client.get("state")
    assert len(state.content) < 160_000
    assert client.post("ratings", json={str(n): 0 for n in range(1000)}).status_code == 200
    assert ratings(client) == [0] * 1000
