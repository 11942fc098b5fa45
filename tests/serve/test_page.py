"""The camera page in a real browser, its camera filming a scene that grows dark and blurred.

Debian's Chromium (`apt-get install chromium`) or Playwright's (`playwright install chromium`) is
driven by Playwright. MEIQA_SCREENSHOTS=DIR keeps pictures of what was seen.
"""

from __future__ import annotations

import io
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image, ImageFilter
from playwright.sync_api import Browser, ConsoleMessage, Error, Page, expect, sync_playwright

from meiqa.serve.access import Keys, Settings
from meiqa.serve.app import create_app
from tests.serve.fakes import FakeEngine, grey

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


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Give a browser with a camera; skipped where there is none."""
    scene = film(tmp_path_factory.mktemp("scene") / "scene.mjpeg")
    flags = [*FLAGS, f"--use-file-for-fake-video-capture={scene}"]
    with sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=chromium(), args=flags)
        except Error as error:
            pytest.skip(f"no browser can be started: {error.message.splitlines()[0]}")
        yield opened
        opened.close()


@contextmanager
def served(engine: FakeEngine, settings: Settings) -> Iterator[str]:
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
    expect(page.locator("#trend-text")).to_contain_text("worse by")
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
