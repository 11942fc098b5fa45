"""The review page in a real browser, by keyboard alone; see test_page.py for what is needed."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from socket import create_server
from typing import Any

import pytest
from PIL import Image, ImageFilter
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

from meiqa.decisions import Decisions
from meiqa.errors import OutputUnwritable
from meiqa.serve import review
from meiqa.serve.review import Pictures, Review, run
from meiqa.types import CulledPhoto, Culling
from meiqa.wayout import STARS, Verdict
from tests.engine.samples import picture
from tests.serve.test_page import FLAGS, chromium, photograph

Open = Callable[..., Page]
BURST = CulledPhoto(
    1, "", 4.5, 0.2, 4.4, 1.0, kind="burst", too_close=True, reason="sharper where it matters"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Give a browser; skipped where there is none."""
    with sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        except Error as error:
            pytest.skip(f"no browser can be started: {error.message.splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def shoot(tmp_path_factory: pytest.TempPathFactory) -> Culling:
    """Give three bursts of two shots, the second one blurred, and two single photos between."""
    folder = tmp_path_factory.mktemp("shoot")
    groups: list[tuple[CulledPhoto, ...]] = []
    for number in range(3):
        sharp = Image.fromarray(picture(number, (900, 1200)))
        names = [str(folder / f"{number}-{shot}.jpg") for shot in range(2)]
        sharp.save(names[0], quality=95)
        sharp.filter(ImageFilter.GaussianBlur(4)).save(names[1], quality=95)
        second = replace(BURST, place=2, path=names[1], score=3.0, reason=None)
        groups.append((replace(BURST, path=names[0]), second))
    singles = []
    for number in range(2):
        path = folder / f"single-{number}.jpg"
        Image.fromarray(picture(9 + number, (1000, 700))).save(path)
        singles.append((CulledPhoto(1, str(path), 3.0, 0.2, 3.0, 1.0),))
    return Culling((groups[0], *singles, *groups[1:]))


class Served:
    """A review that is served until it is finished, again and again over one file."""

    def __init__(self, shoot: Culling, file: Path) -> None:
        self.verdicts: list[Verdict] = []
        self.error: OutputUnwritable | None = None
        self.may_finish = threading.Event()
        self.may_finish.set()
        self._shoot, self._file = shoot, file
        self._thread: threading.Thread | None = None

    def start(self) -> str:
        """Serve, and give the address."""
        opened = create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._run, args=[opened])
        self._thread.start()
        return f"http://127.0.0.1:{opened.getsockname()[1]}/token/"

    def end(self) -> None:
        if self._thread is not None:
            self._review.on_end()
            self._thread.join()
            self._thread = None

    def _run(self, opened: Any) -> None:
        with Decisions(self._file) as decisions, opened:
            will = {"will": "write ratings into XMP sidecars", "dry_run": False}
            self._review = Review(self._shoot, decisions, STARS, self._finish, will)
            pictures = Pictures([each.path for each in self._review.photos])
            with suppress(OutputUnwritable):
                run(self._review, pictures, "token", opened)

    def _finish(self, verdicts: list[Verdict]) -> list[str]:
        self.may_finish.wait()
        if self.error is not None:
            raise self.error
        self.verdicts = verdicts
        return ["8 of 8 actions done"]


@pytest.fixture
def served(shoot: Culling, tmp_path: Path) -> Iterator[Served]:
    served = Served(shoot, tmp_path / "d.jsonl")
    yield served
    served.end()


@pytest.fixture
def page_of(browser: Browser) -> Iterator[Open]:
    """Give a function that opens pages; what they complain about fails the test."""
    complaints: list[str] = []
    contexts = []

    def opened(address: str, *, photos: int = 8, **options: Any) -> Page:
        context = browser.new_context(reduced_motion="reduce", **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        expect(page.locator(".shot")).to_have_count(photos)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def current(page: Page) -> str:
    return page.locator(".shot[aria-current=true] .name").inner_text()


def test_the_keyboard_does_it_all(served: Served, page_of: Open) -> None:
    page = page_of(served.start())
    status, cards = page.locator("#status"), page.locator(".shot")
    expect(status).to_have_text("0 of 8 photos decided, 5 kept")
    expect(cards.first).to_be_focused()
    expect(page.locator(".group").first).to_contain_text("sharper where it matters")
    expect(cards.nth(1)).to_contain_text("too close to call")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("b")
    expect(status).to_have_text("2 of 8 photos decided, 5 kept")
    expect(cards.first.locator(".verdict")).to_have_text("reject")
    expect(cards.nth(1)).to_have_attribute("aria-label", "0-1.jpg, score 3.00, keep, 3 stars")
    page.keyboard.press("j")
    assert current(page) == "single-0.jpg"
    page.keyboard.press("x")
    expect(page.locator("#announce")).to_have_text("single-0.jpg: reject")
    page.keyboard.press("l")
    page.keyboard.press("0")
    expect(page.locator("#announce")).to_have_text("single-1.jpg: keep, no stars")
    page.keyboard.press("j")
    page.keyboard.press("a")
    expect(status).to_have_text("6 of 8 photos decided, 4 kept")
    assert current(page) == "2-0.jpg"
    page.keyboard.press("p")
    page.keyboard.press("Control+z")
    expect(page.locator("#announce")).to_have_text("Undone: 1 photo")
    page.keyboard.press("u")
    expect(status).to_have_text("4 of 8 photos decided, 4 kept")
    assert current(page) == "1-0.jpg"
    page.keyboard.press("?")
    expect(page.locator("#keys")).to_be_visible()
    page.keyboard.press("x")  # means nothing there
    page.keyboard.press("Escape")
    page.locator("#finish").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#end-text")).to_contain_text("4 photos kept, 4 rejects")
    page.locator("#end-do").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#end-lines")).to_have_text("8 of 8 actions done")
    assert [each.rating for each in served.verdicts] == [-1, 3, -1, 0, 5, -1, 5, -1]


def test_the_same_spot_of_all_shots_is_seen_pixel_by_pixel(served: Served, page_of: Open) -> None:
    page = page_of(served.start(), viewport={"width": 1000, "height": 600})
    page.locator(".picture").first.click(position={"x": 40, "y": 40})
    panes = page.locator(".pane")
    expect(panes).to_have_count(2)

    def shown(before: str = "") -> str:
        """Give where the part that is shown lies; both shots show the same spot."""
        for image in (panes.first.locator("img").last, panes.last.locator("img").last):
            expect(image).to_have_attribute("src", re.compile(r"-"))
            expect(image).not_to_have_attribute("style", before)
        places = page.evaluate(
            "() => [...document.querySelectorAll('.pane img:nth-of-type(2)')].map((part) => {"
            " const [left, top] = part.src.replace(/.*\\//, '').split('-').map(Number);"
            " const moved = new DOMMatrix(getComputedStyle(part).transform);"
            " const scale = part.naturalWidth / part.getBoundingClientRect().width;"
            " return [left - moved.e, top - moved.f, scale] })"
        )
        assert places[0] == pytest.approx(places[1], abs=0.1)
        assert places[0][2] == 1.0  # a pixel of the photo is one of the screen
        return str(panes.first.locator("img").last.get_attribute("style"))

    left = shown()
    page.keyboard.press("Shift+ArrowRight")
    right = shown(left)
    page.mouse.move(200, 300)
    page.mouse.move(260, 340)
    shown(right)
    page.keyboard.press("l")
    page.keyboard.press("4")
    expect(panes.last).to_contain_text("keep, 4 stars")
    photograph(page, "review-zoom")
    page.keyboard.press("z")
    expect(panes).to_have_count(0)
    assert current(page) == "0-1.jpg"


def test_no_more_is_asked_for_than_the_service_gives(
    served: Served, page_of: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(review, "_CROP_PIXELS", 270_000)
    page = page_of(served.start(), viewport={"width": 1000, "height": 600})
    page.keyboard.press("z")
    for pane in page.locator(".pane").all():
        seen = pane.evaluate("(pane) => 1.6 ** 2 * pane.clientWidth * pane.clientHeight")
        assert seen > 270_000
        expect(pane.locator("img").last).to_have_attribute("src", re.compile(r"-"))


def test_only_panes_that_fit_into_memory_are_opened(
    served: Served, page_of: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(review, "_PIXEL_BYTES", 1200 * 900 * 3)
    page = page_of(served.start())
    page.keyboard.press("z")
    expect(page.locator(".pane")).to_have_count(1)
    expect(page.locator("#zoom-title")).to_have_text("1 of 2 shots at 100 %")
    expect(page.locator(".pane img").last).to_have_attribute("src", re.compile(r"photos/0/\d+-"))
    page.keyboard.press("l")
    expect(page.locator(".pane img").last).to_have_attribute("src", re.compile(r"photos/1/\d+-"))


def test_a_part_that_failed_is_asked_for_again(served: Served, page_of: Open) -> None:
    page = page_of(served.start(), viewport={"width": 1000, "height": 600})
    parts = re.compile(r"/\d+-\d+-\d+-\d+\.jpg")
    page.route(parts, lambda route: route.abort())
    page.keyboard.press("z")
    pane = page.locator(".pane").first
    expect(pane).to_contain_text("this part can't be shown")
    page.unroute(parts)
    page.keyboard.press("ArrowRight")
    expect(pane.locator("img").last).to_have_attribute("src", parts)
    expect(pane).not_to_contain_text("can't be shown")


def test_finishing_is_not_left_and_its_failure_is_named(served: Served, page_of: Open) -> None:
    served.error = OutputUnwritable("the disk is full")
    page = page_of(served.start())
    page.locator("#finish").click()
    served.may_finish.clear()
    page.locator("#end-do").click()
    page.keyboard.press("Escape")
    expect(page.locator("#end")).to_be_visible()
    served.may_finish.set()
    expect(page.locator("#end-title")).to_have_text("Not finished")
    expect(page.locator("#end-lines")).to_have_text("error: the disk is full")


def test_of_a_thousand_photos_only_those_nearby_are_loaded(
    shoot: Culling, tmp_path: Path, page_of: Open
) -> None:
    original = Path(shoot.groups[0][0].path)
    groups = []
    for number in range(500):
        paths = [tmp_path / f"{number}-{shot}.jpg" for shot in range(2)]
        for path in paths:
            path.symlink_to(original)
        groups.append(tuple(replace(BURST, place=n, path=str(p)) for n, p in enumerate(paths, 1)))
    served = Served(Culling(tuple(groups)), tmp_path / "d.jsonl")
    try:
        page = page_of(served.start(), photos=1000)
        images = page.locator(".shot img")
        expect(images.first).not_to_have_js_property("naturalWidth", 0)
        images.nth(500).scroll_into_view_if_needed()
        expect(images.nth(500)).not_to_have_js_property("naturalWidth", 0)
        page.wait_for_load_state("networkidle")
        asked = "performance.getEntriesByType('resource').filter((e) => /jpg$/.test(e.name)).length"
        assert page.evaluate(asked) <= 80
        page.locator(".shot").first.focus()
        page.keyboard.press("x")
        expect(page.locator("#status")).to_have_text("1 of 1,000 photos decided, 499 kept")
    finally:
        served.end()


def test_a_second_start_shows_what_was_decided(served: Served, page_of: Open) -> None:
    page = page_of(served.start())
    page.keyboard.press("2")
    expect(page.locator("#status")).to_contain_text("1 of 8 photos decided")
    served.end()
    page.keyboard.press("x")
    expect(page.locator("#notice")).to_contain_text("start the same command again")
    expect(page.locator(".shot .verdict").first).to_have_text("keep")
    page = page_of(served.start())
    expect(page.locator("#status")).to_contain_text("1 of 8 photos decided")
    assert current(page) == "0-1.jpg"  # the first that is not decided


@pytest.mark.parametrize("width", [390, 820, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out(served: Served, page_of: Open, width: int, scheme: str) -> None:
    page = page_of(served.start(), viewport={"width": width, "height": 860}, color_scheme=scheme)
    page.keyboard.press("x")
    expect(page.locator("#status")).to_contain_text("1 of 8 photos decided")
    photograph(page, f"review-{width}-{scheme}")
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    outside = page.evaluate(
        "() => [...document.querySelectorAll('.shot')].flatMap((card) => ["
        " ...card.querySelectorAll('button')].filter((button) =>"
        " button.getBoundingClientRect().right > card.getBoundingClientRect().right))"
        ".map((button) => button.textContent)"
    )
    assert outside == []
    page.keyboard.press("z")
    expect(page.locator(".pane")).to_have_count(2)
    for box in page.locator(".pane").all():
        place = box.bounding_box()
        assert place is not None
        assert place["x"] >= 0
        assert place["x"] + place["width"] <= width
        assert place["y"] + place["height"] <= 860
