"""The camera page in a real browser, its camera filming a scene that grows dark and blurred.

Debian's Chromium (`apt-get install chromium`) or Playwright's (`playwright install chromium`) is
driven by Playwright. MEIQA_SCREENSHOTS=DIR keeps pictures of what was seen.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Error,
    Page,
    Playwright,
    WebSocket,
    expect,
    sync_playwright,
)

from benchmarks.camera import SOUND, Watched, changes_in
from meiqa.engine.engine import Engine
from meiqa.engine.files import IMAGE_SUFFIXES
from meiqa.serve.access import Keys, Settings
from meiqa.serve.app import create_app
from meiqa.serve.camera import BEST_S, FrameStats, frame_stats
from meiqa.serve.guidance import Change
from meiqa.types import RememberedCase
from tests.serve.fakes import FakeEngine, StageCosts, grey, perceived, scene_of

FRAMES = 100
FLAGS = [
    *("--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
    "--disable-gpu",
]
Open = Callable[..., Page]


def chromium() -> str | None:
    """Find a browser: Debian's, or None for Playwright's own."""
    return shutil.which("chromium") or shutil.which("google-chrome")


def film(path: Path) -> Path:
    """Write a scene that is bright and sharp, then dark and blurred, and so on."""
    squares = np.kron((np.indices((12, 16)) % 2).max(0), np.ones((20, 20)))  # a quarter is dark
    squares = np.roll(squares, 5, (0, 1))  # off the lattice of JPEG
    sharp = Image.fromarray((80 + 122 * squares).astype(np.uint8)).convert("RGB")
    dark = sharp.filter(ImageFilter.GaussianBlur(4)).point(lambda value: value * 0.1)
    with path.open("wb") as stream:
        for image in (sharp, dark):
            file = io.BytesIO()
            image.save(file, "JPEG", quality=95)
            stream.write(file.getvalue() * FRAMES)
    return path


@contextmanager
def filming(playwright: Playwright, scene: Path) -> Iterator[Browser]:
    """Give a browser whose camera films a scene; skipped where there is none."""
    flags = [*FLAGS, f"--use-file-for-fake-video-capture={scene}"]
    try:
        opened = playwright.chromium.launch(executable_path=chromium(), args=flags)
    except Error as error:
        pytest.skip(f"no browser can be started: {error.message.splitlines()[0]}")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    """Start what drives browsers."""
    with sync_playwright() as started:
        yield started


@pytest.fixture(scope="module")
def browser(playwright: Playwright, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Give a browser whose camera films a scene that grows dark and blurred."""
    scene = film(tmp_path_factory.mktemp("scene") / "scene.mjpeg")
    with filming(playwright, scene) as opened:
        yield opened


@contextmanager
def served(engine: Engine, settings: Settings) -> Iterator[str]:
    """Serve on a free port, and give the address."""
    opened = socket.create_server(("127.0.0.1", 0))
    app = create_app([engine], settings)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
    thread.start()
    try:
        host, port = opened.getsockname()
        yield f"http://{host}:{port}/"
    finally:
        server.should_exit = True
        thread.join()
        opened.close()


@pytest.fixture
def greys() -> FakeEngine:
    """Give an engine that judges brightness."""
    return FakeEngine()


@pytest.fixture
def address(greys: FakeEngine) -> Iterator[str]:
    """Give the address of a service without keys."""
    with served(greys, Settings(budget_ms=30_000)) as found:
        yield found


@pytest.fixture
def page_of(browser: Browser) -> Iterator[Open]:
    """Give a function that opens pages; what they complain about fails the test."""
    complaints: list[str] = []
    contexts = []

    def opened(address: str, *, refusal: str | None = None, **options: object) -> Page:
        def note(line: ConsoleMessage) -> None:
            if line.type == "error" and (refusal is None or refusal not in line.text):
                complaints.append(line.text)

        context = browser.new_context(permissions=["camera"], **options)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", note)
        page.goto(address)
        if refusal is None:
            expect(page.locator("#service")).to_contain_text("32 remembered photos")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def remembering(cases: dict[str, tuple[str, bytes | None]]) -> FakeEngine:
    """Give an engine that remembers photos: by their ids, what is seen in them, and thumbnails."""
    engine = FakeEngine()

    def entry(id: str) -> SimpleNamespace | None:
        if id not in cases:
            return None
        summary, thumbnail = cases[id]
        record = RememberedCase(id, "anchor", 4.0, 0.2, summary, "somebody", 0.0)
        return SimpleNamespace(record=record, thumbnail=thumbnail)

    counts = engine.memory.snapshot()
    counts.views = {"anchor": SimpleNamespace(entry=entry)}  # type: ignore[misc]
    return engine


def photograph(page: Page, name: str) -> None:
    """Keep a picture of the page, if somebody wants to look at it."""
    folder = os.environ.get("MEIQA_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def shown_score(page: Page) -> float:
    return float(page.locator("#score").inner_text())


def test_the_score_falls_and_the_right_instruction_comes(page_of: Open, address: str) -> None:
    page = page_of(address)
    page.get_by_role("button", name="Use the camera").click()
    instruction = page.locator("#instruction")
    expect(instruction).to_have_attribute("data-code", "take-it", timeout=20_000)
    bright = shown_score(page)
    photograph(page, "bright")
    expect(instruction).to_have_attribute("data-code", "more-light", timeout=20_000)
    expect(page.locator("#word")).to_have_text("bad")
    expect(page.locator("#distortions")).to_contain_text("darkening")
    assert bright > 3.4 > 1.8 > shown_score(page)
    expect(page.locator("#trend-text")).to_contain_text("The best of the last 5 s was")
    assert page.locator("#change").inner_text() == page.locator("#trend-text").inner_text()
    expect(page.locator("#neighbours li")).to_have_count(5)
    expect(page.locator("#legend")).to_contain_text("in all")
    expect(page.locator("#announce")).to_contain_text("Score")
    photograph(page, "dark")
    assert float(page.locator("#best-score").inner_text()) == pytest.approx(bright, abs=0.1)
    with page.expect_download() as saving:
        page.get_by_role("button", name="Save").click()
    with Image.open(saving.value.path()) as best:
        assert best.size == (320, 240)
        assert float(np.asarray(best).mean()) > 150
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Use the camera")).to_be_focused()


def test_a_still_picture_is_described(page_of: Open, address: str) -> None:
    page = page_of(address)
    page.get_by_role("button", name="Use the camera").click()
    expect(page.locator("#depth")).to_have_text("in full", timeout=20_000)
    expect(page.locator("#summary")).to_have_text("An even picture.")
    expect(page.locator("#more-neighbours")).to_contain_text("27 more")


def test_a_look_without_time_for_words_does_not_stand_and_is_tried_again(page_of: Open) -> None:
    hurried = FakeEngine(StageCosts(text_ms=1e9, short_text_ms=1e9))
    with served(hurried, Settings(budget_ms=30_000)) as address:
        page = page_of(address)
        page.get_by_role("button", name="Use the camera").click()
        summary = page.locator("#summary")
        expect(summary).to_contain_text("no time to describe it yet", timeout=20_000)
        expect(page.locator("#depth")).to_have_text("quick look")
        hurried.costs = StageCosts()
        expect(page.locator("#depth")).to_have_text("in full", timeout=20_000)
        expect(summary).to_have_text("An even picture.")


def test_the_card_tells_of_one_look(page_of: Open) -> None:
    engine = FakeEngine(
        StageCosts(text_ms=10.0, neighbour_ms=100.0)
    )  # a quick look leaves out some
    with served(engine, Settings(budget_ms=30_000)) as address:
        page = page_of(address)
        page.get_by_role("button", name="Use the camera").click()
        expect(page.locator("#depth")).to_have_text("in full", timeout=20_000)
        for _ in range(3):  # quick looks follow
            answers = page.locator("body").get_attribute("data-answers")
            expect(page.locator("body")).not_to_have_attribute("data-answers", answers or "")
        expect(page.locator("#depth")).to_have_text("in full")
        expect(page.locator("#more-neighbours")).to_contain_text("27 more")
        expect(page.locator("#left-out")).to_have_text("")
        assert {"4 of 8 neighbours", "no summary"} & {
            note for found in engine.given for note in found.degraded
        }  # quick looks had something to say of themselves


def test_neighbours_are_shown_by_picture_or_words(page_of: Open) -> None:
    engine = remembering(
        {"anchor 5.00": ("A lake at dawn.", grey(90)), "anchor 4.87": ("Fog.", None)}
    )
    with served(engine, Settings(budget_ms=30_000)) as address:
        page = page_of(address)
        page.get_by_role("button", name="Photos", exact=True).click()
        photo = {"name": "dark.jpg", "mimeType": "image/jpeg", "buffer": grey(3)}
        page.locator("#files").set_input_files([photo])  # type: ignore[list-item]
        rows = page.locator("#neighbours li, #other-neighbours li")
        expect(rows).to_have_count(32)
        page.locator("#more-neighbours summary").click()
        pictured = page.locator("li", has=page.locator("img"))
        expect(pictured).to_have_count(1)
        expect(pictured).to_contain_text("A lake at dawn.")
        expect(pictured.locator("img")).to_have_js_property("naturalWidth", 64)
        expect(page.locator("li", has_text="Fog.")).to_have_count(1)
        expect(rows.first).to_contain_text("Bad photo")
        for text in rows.all_inner_texts():
            assert "anchor" not in text
        photograph(page, "neighbours")


def test_every_photo_that_is_chosen_counts(page_of: Open, address: str) -> None:
    page = page_of(address, refusal="422")
    page.get_by_role("button", name="Photos", exact=True).click()
    names = ("IMG_0001.HEIC", "IMG_0002.heif", "DSC_0003.NEF", "plain.jpg", "notes.txt")
    files = [{"name": name, "mimeType": "", "buffer": grey(99)} for name in names]
    page.locator("#files").set_input_files(files)  # type: ignore[arg-type]
    expect(page.locator("#rows tr")).to_have_count(4)
    expect(page.locator("#progress-text")).to_have_text("4 of 4 judged")
    expect(page.locator("#notice")).to_have_text("1 file is no photo and is left out.")


def test_the_page_knows_every_suffix_of_a_photo() -> None:
    text = (Path(__file__).parents[2] / "serve" / "page" / "page.js").read_text()
    found = re.search(r'SUFFIXES = "([a-z0-9 ]+)"', text)
    assert found is not None
    assert {f".{name}" for name in found[1].split()} == IMAGE_SUFFIXES


def test_on_a_phone_a_photo_that_failed_says_why(page_of: Open, address: str) -> None:
    page = page_of(address, refusal="422", viewport={"width": 390, "height": 844})
    page.get_by_role("button", name="Photos", exact=True).click()
    broken = {"name": "broken.jpg", "mimeType": "image/jpeg", "buffer": b"not a photo"}
    sound = {"name": "sound.jpg", "mimeType": "image/jpeg", "buffer": grey(120)}
    page.locator("#files").set_input_files([broken, sound])  # type: ignore[list-item]
    expect(page.locator("#progress-text")).to_have_text("1 of 2 judged, 1 failed")
    expect(page.locator("#rows tr").first.get_by_text("not an image")).to_be_visible()
    photograph(page, "failed-phone")
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_a_folder_of_photos_gets_a_table(page_of: Open, address: str) -> None:
    page = page_of(address, refusal="422", viewport={"width": 1100, "height": 800})
    page.get_by_role("button", name="Photos", exact=True).click()
    files = [
        {"name": f"grey-{level}.jpg", "mimeType": "image/jpeg", "buffer": grey(level)}
        for level in (60, 200, 130)
    ]
    broken = {"name": "broken.jpg", "mimeType": "image/jpeg", "buffer": b"not a photo"}
    note = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"words"}
    page.locator("#files").set_input_files([*files, broken, note])  # type: ignore[list-item]
    expect(page.locator("#progress-text")).to_have_text("3 of 4 judged, 1 failed")
    expect(page.locator("#rows tr")).to_have_count(4)
    page.get_by_label("Best first").check()
    names = page.locator("#rows button")
    expect(names).to_have_text(["grey-200.jpg", "grey-130.jpg", "grey-60.jpg", "broken.jpg"])
    expect(page.locator("#rows")).to_contain_text("not an image")
    page.get_by_role("button", name="grey-60.jpg").click()
    expect(page.locator("#word")).to_have_text("poor" if shown_score(page) >= 1.8 else "bad")
    expect(page.locator("#photo")).to_have_js_property("naturalWidth", 64)
    with page.expect_download() as saving:
        page.get_by_role("button", name="Save as CSV").click()
    lines = saving.value.path().read_text().splitlines()
    assert lines[0].startswith("path,score,std")
    assert len(lines) == 5
    photograph(page, "photos")


def test_a_refused_camera_says_what_to_do(page_of: Open, address: str) -> None:
    page = page_of(address)
    page.evaluate(
        "() => { navigator.mediaDevices.getUserMedia ="
        " () => Promise.reject(new DOMException('', 'NotAllowedError')) }"
    )
    page.get_by_role("button", name="Use the camera").click()
    expect(page.locator("#empty-title")).to_have_text("The camera is blocked")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()
    photograph(page, "blocked")


def test_a_key_is_asked_for(page_of: Open, greys: FakeEngine, keys: tuple[Keys, str, str]) -> None:
    known, reader, _ = keys
    with served(greys, Settings(budget_ms=30_000, keys=known)) as address:
        page = page_of(address, refusal="401")  # which the browser notes in its console
        expect(page.get_by_label("This service asks for a key")).to_be_focused()
        photograph(page, "key")
        page.get_by_label("This service asks for a key").fill(reader)
        page.get_by_role("button", name="Use it").click()
        expect(page.locator("#service")).to_contain_text("32 remembered photos")
        page.get_by_role("button", name="Use the camera").click()
        expect(page.locator("#instruction")).to_be_visible(timeout=20_000)


def test_a_service_that_goes_is_waited_for(page_of: Open, greys: FakeEngine) -> None:
    with served(greys, Settings(budget_ms=30_000)) as address:
        page = page_of(address)
        page.get_by_role("button", name="Use the camera").click()
        expect(page.locator("#instruction")).to_be_visible(timeout=20_000)
        page.evaluate("WebSocket.prototype.send = function () { this.close(); }")
        expect(page.locator("#notice")).to_contain_text("Trying again")


def test_of_a_service_that_is_gone_nothing_is_left_standing(
    page_of: Open, greys: FakeEngine
) -> None:
    with served(greys, Settings(budget_ms=30_000)) as address:
        page = page_of(address, refusal="ERR_CONNECTION")
        page.get_by_role("button", name="Use the camera").click()
        expect(page.locator("#instruction")).to_be_visible(timeout=20_000)
    expect(page.locator("#notice")).to_contain_text("Trying again", timeout=20_000)
    expect(page.locator("#instruction")).to_be_hidden()
    expect(page.locator("#found")).to_be_hidden()
    expect(page.locator("#meter")).to_be_empty()
    photograph(page, "gone")


def test_of_a_service_that_hangs_nothing_is_left_standing(page_of: Open, greys: FakeEngine) -> None:
    with served(greys, Settings(budget_ms=30_000)) as address:
        page = page_of(address)
        page.get_by_role("button", name="Use the camera").click()
        expect(page.locator("#instruction")).to_be_visible(timeout=20_000)
        greys.open.clear()
        expect(page.locator("#meter")).to_have_text("waiting for the service", timeout=10_000)
        expect(page.locator("#instruction")).to_be_hidden()
        expect(page.locator("#found")).to_be_hidden()
        greys.open.set()
        expect(page.locator("#instruction")).to_be_visible(timeout=10_000)
        expect(page.locator("#found")).to_be_visible()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("phone", {"viewport": {"width": 375, "height": 740}, "has_touch": True}),
        ("phone-dark", {"viewport": {"width": 375, "height": 740}, "color_scheme": "dark"}),
        ("wide-dark", {"viewport": {"width": 1280, "height": 860}, "color_scheme": "dark"}),
    ],
)
def test_nothing_sticks_out(
    page_of: Open, address: str, name: str, options: dict[str, object]
) -> None:
    page = page_of(address, reduced_motion="reduce", **options)
    photograph(page, f"{name}-empty")
    page.get_by_role("button", name="Use the camera").click()
    expect(page.locator("#instruction")).to_be_visible(timeout=20_000)
    expect(page.locator("#found")).to_be_visible()
    photograph(page, name)
    width = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert width <= 0


def test_the_keyboard_reaches_everything(page_of: Open, address: str) -> None:
    page = page_of(address)
    reached = []
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.textContent.trim()"))
    assert reached == [
        *("Skip to the score", "Camera", "Photos"),
        *("Use the camera", "Choose photos", "Choose a folder"),
    ]
    page.locator("#start").press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_focused(timeout=20_000)


def test_the_page_loads_nothing_from_elsewhere() -> None:
    folder = Path(__file__).parents[2] / "serve" / "page"
    assert {file.name for file in folder.iterdir()} == {
        *("index.html", "page.css", "page.js", "icon.svg"),
    }
    for file in folder.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
    html = (folder / "index.html").read_text()
    assert "<script type=" in html
    assert "style=" not in html
    assert "onclick=" not in html


def test_its_policy_is_strict_and_it_hides_no_route(greys: FakeEngine) -> None:
    app = create_app([greys], Settings())
    with TestClient(app, base_url="http://localhost") as client:
        answer = client.get("/")
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert client.get("/page.js").headers["x-content-type-options"] == "nosniff"
        assert client.get("/v1/score").status_code == 405
        assert client.get("/nothing").status_code == 404
        assert client.get("/../app.py").status_code == 404


PART_S = 3.3
"""How long each state of the video lasts: a hundred frames at thirty a second."""


def changing(pixels: NDArray[np.uint8], path: Path) -> Path:
    """Write a scene that is sharp, then blurred, then dark as well, and bright again."""
    sharp = Image.fromarray(pixels)
    soft = sharp.filter(ImageFilter.GaussianBlur(3))
    parts = [(sharp, FRAMES // 2), (soft, FRAMES), (soft.point(lambda value: value * 0.25), FRAMES)]
    with path.open("wb") as stream:
        for image, count in [*parts, parts[0]]:
            file = io.BytesIO()
            image.save(file, "JPEG", quality=95)
            stream.write(file.getvalue() * count)
    return path


def state_of(frame: Image.Image, sharp: FrameStats) -> str:
    """Tell in which state of a scene a frame was taken."""
    seen = frame_stats(np.asarray(frame.convert("RGB").resize((640, 480))))
    if seen.light < sharp.light - 1.0:
        return "blurred and dark"
    return "blurred" if seen.crispness < sharp.crispness - 1.0 else SOUND


SENDING_BYTES = """
const send = WebSocket.prototype.send;
WebSocket.prototype.send = function (data) {
  if (data instanceof Blob) data.arrayBuffer().then((bytes) => send.call(this, bytes));
  else send.call(this, data);
};
"""
"""A browser shows whoever drives it what is sent, unless it is a blob."""


class Followed:
    """What a page sends and is told while it follows a scene."""

    def __init__(self, page: Page, sharp: FrameStats) -> None:
        self._page, self._sharp = page, sharp
        self._sent: list[bytes] = []
        self._told: list[dict[str, Any]] = []
        page.add_init_script(SENDING_BYTES)
        page.on("websocket", self._listen)

    def _listen(self, socket: WebSocket) -> None:
        def told(text: str | bytes) -> None:
            message = json.loads(text)
            if message["type"] == "answer":
                self._told.append({**message, "at_s": time.monotonic()})

        def sent(frame: str | bytes) -> None:
            if isinstance(frame, bytes):
                self._sent.append(frame)

        socket.on("framereceived", told)
        socket.on("framesent", sent)

    def state(self, jpeg: bytes | Path) -> str:
        with Image.open(io.BytesIO(jpeg) if isinstance(jpeg, bytes) else jpeg) as frame:
            return state_of(frame, self._sharp)

    def saved(self) -> str:
        """Save the best shot, and tell of which state it is."""
        with self._page.expect_download() as saving:
            self._page.locator("#save").click()
        return self.state(Path(saving.value.path()))

    def looks(self) -> list[Watched]:
        """Give what was told of each frame; the best of the last 5 s is by its level."""
        looks: list[Watched] = []
        for each in self._told:
            change = each["change"] and Change(**each["change"])
            now = Watched(0, self.state(self._sent[each["frame"]]), each["at_s"], 0.0, change, "")
            late = [e for e in [*looks, now] if e.change and now.at_s - e.at_s <= BEST_S]
            best = max(late, key=lambda e: e.change.level if e.change else 0.0, default=now)
            looks.append(replace(now, best_state=best.state))
        return looks


def follow(page: Page, address: str, sharp: FrameStats, cycles: int) -> None:
    """Follow a scene that changes; at least 95 % of its changes must be told right."""
    followed = Followed(page, sharp)
    page.goto(address)
    page.get_by_role("button", name="Use the camera").click()
    expect(page.locator("#best")).to_be_visible(timeout=20_000)
    saved = []
    for _ in range(round(cycles * 3 * PART_S / 1.5)):
        page.wait_for_timeout(1500)
        saved.append((time.monotonic(), followed.saved()))
    looks = followed.looks()
    found = changes_in(looks)[1:-1]  # the first may lack its beginning, and the last its end
    right = [each["trend"] and each["words"] for each in found]
    assert len(found) >= 3 * cycles - 3
    assert np.mean(right) >= 0.95, found
    sound_s = np.array([each.at_s for each in looks if each.state == SOUND])
    shots = [
        state == SOUND
        for at_s, state in saved
        if ((sound_s < at_s - 0.5) & (sound_s > at_s - BEST_S + 1.0)).any()
    ]
    assert len(shots) >= 2 * cycles
    assert np.mean(shots) >= 0.95, saved


def test_changes_of_a_scene_are_told_and_its_best_frame_is_kept(
    playwright: Playwright, tmp_path: Path
) -> None:
    pixels = scene_of(4, 2)
    engine = FakeEngine(rule=perceived)
    with (
        served(engine, Settings(budget_ms=30_000)) as address,
        filming(playwright, changing(pixels, tmp_path / "scene.mjpeg")) as browser,
    ):
        follow(browser.new_page(), address, frame_stats(pixels), cycles=3)


PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "pristine" / "images"


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="the photographs are not beside the checkout")
def test_changes_of_a_photographed_scene_are_told_by_the_default_model(
    playwright: Playwright, tmp_path: Path
) -> None:
    with Image.open(min(PHOTOGRAPHS.iterdir())) as photo:
        pixels = np.asarray(photo.convert("RGB").resize((640, 480)))
    with (
        Engine.open(learn=False) as engine,
        served(engine, Settings(budget_ms=30_000)) as address,
        filming(playwright, changing(pixels, tmp_path / "scene.mjpeg")) as browser,
    ):
        follow(browser.new_page(), address, frame_stats(pixels), cycles=3)
