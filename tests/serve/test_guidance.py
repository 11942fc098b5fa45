"""One instruction at a time, the right one, and no flicker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from meiqa.serve.guidance import OTHERWISE, RULES, Adviser, Evidence, change_text
from meiqa.types import Detail, Distortion

MEASURED = {
    **{"sharpness": 7.0, "exposure": 150.0, "clipped": 0.0, "blocked": 0.0, "noise": 0.2},
    **{"contrast": 200.0, "colour": 40.0, "cast": 0.0, "hue": 0.0, "blocking": 1.0},
}
WELL = Evidence(score=3.0, motion=0.3, measured=MEASURED)
FINE = "The picture is sharp and well exposed, with no noise, good contrast, natural colours."


def measured(**changes: float) -> Evidence:
    return replace(WELL, measured={**MEASURED, **changes})


def shaken(pixels: float) -> Detail:
    return Detail(0.4, pixels, 1.0, (0, 0, 256, 256))


def advice(seen: Evidence) -> str:
    return Adviser().advise(seen, 0.0).code


def course(frames: Sequence[Evidence], every_s: float = 0.15) -> list[str]:
    """What is said at each frame."""
    adviser = Adviser()
    return [adviser.advise(seen, number * every_s).code for number, seen in enumerate(frames)]


@pytest.mark.parametrize(
    ("seen", "code"),
    [
        (replace(WELL, motion=9.0), "hold-still"),
        (replace(WELL, motion=None, words="Severe motion blur. " + FINE), "hold-still"),
        (replace(WELL, motion=3.0, distortions=(Distortion("jitter", 3.0, 0.9),)), "hold-still"),
        (replace(WELL, motion=3.0, detail=shaken(16.0)), "hold-still"),
        (replace(WELL, motion=None, detail=shaken(16.0)), "hold-still"),
        (replace(WELL, motion=None, detail=shaken(7.0)), OTHERWISE.code),
        (replace(WELL, detail=shaken(16.0)), OTHERWISE.code),  # the camera was still
        (replace(WELL, distortions=(Distortion("motion blur", 4.0, 0.9),)), "step-back"),
        (measured(exposure=60.0), "more-light"),
        (measured(exposure=10.0), "more-light"),
        (measured(noise=9.0), "more-light"),
        (replace(WELL, distortions=(Distortion("white noise", 4.0, 0.8),)), "more-light"),
        (measured(exposure=225.0), "less-light"),
        (measured(clipped=0.4), "less-light"),
        (measured(sharpness=2.0, contrast=90.0), "clean-lens"),
        (measured(sharpness=4.0, contrast=140.0), "clean-lens"),
        (measured(sharpness=2.0), "step-back"),
        (replace(WELL, words="Strong lens blur. The picture is fairly sharp."), "step-back"),
        (replace(WELL, distortions=(Distortion("gaussian blur", 4.0, 0.9),)), "step-back"),
        (measured(blocking=2.0), "sharper-stream"),
        (measured(contrast=90.0), "side-light"),
        (replace(WELL, score=4.1, words=FINE), "take-it"),
        (replace(WELL, score=2.4, words=FINE), OTHERWISE.code),
    ],
)
def test_evidence_leads_to_its_instruction(seen: Evidence, code: str) -> None:
    assert advice(seen) == code


@pytest.mark.parametrize(
    "seen",
    [
        replace(WELL, words="Barely visible motion blur. " + FINE),
        measured(sharpness=5.0, blocking=1.5, noise=4.0),
        replace(WELL, words="The picture is very dark, very soft, with strong noise."),
        replace(WELL, distortions=(Distortion("jitter", 5.0, 0.2),)),
        replace(WELL, distortions=(Distortion("gaussian blur", 0.4, 1.0),)),
        replace(WELL, words="An entirely different form of words."),
    ],
)
def test_weak_evidence_says_nothing_in_particular(seen: Evidence) -> None:
    assert advice(seen) == OTHERWISE.code


def test_what_spoils_the_rest_is_said_first() -> None:
    everything = measured(sharpness=2.0, exposure=30.0, noise=9.0, blocking=2.0)
    assert advice(replace(everything, motion=9.0)) == "hold-still"
    assert advice(everything) == "more-light"


def test_a_good_picture_that_moves_is_not_taken() -> None:
    assert advice(replace(WELL, score=4.5, motion=9.0)) == "hold-still"


def test_a_single_odd_frame_changes_nothing() -> None:
    odd = replace(WELL, score=4.2, motion=9.0)
    good = replace(WELL, score=4.2)
    said = course([*[good] * 20, odd, *[good] * 20])
    assert set(said) == {"take-it"}


def test_evidence_at_the_threshold_does_not_flicker() -> None:
    at_it = [replace(measured(exposure=69.0 + 6.0 * (i % 2)), score=4.2) for i in range(60)]
    said = course(at_it)
    assert sum(one != other for one, other in pairwise(said)) <= 1


def test_an_instruction_stays_long_enough_to_be_read() -> None:
    dark, bright = measured(exposure=20.0), measured(exposure=230.0)
    said = course([dark, *[bright] * 30], every_s=0.1)
    assert said[:15] == ["more-light"] * 15
    assert said[-1] == "less-light"


def test_it_is_taken_back_once_it_is_followed() -> None:
    dark = replace(measured(exposure=20.0), score=2.0)
    lit = replace(WELL, score=4.2)
    said = course([*[dark] * 10, *[lit] * 20])
    assert said[0] == "more-light"
    assert said[-1] == "take-it"


def test_instructions_are_distinct_and_short() -> None:
    instructions = [instruction for instruction, _ in RULES] + [OTHERWISE]
    assert len({each.code for each in instructions}) == len(instructions)
    assert all(len(each.text) <= 28 for each in instructions)
    assert [each.code for each in instructions if each.good] == ["take-it"]


def test_the_document_has_every_rule_in_order() -> None:
    text = (Path(__file__).parents[2] / "docs" / "camera.md").read_text()
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| **")]
    told = [instruction.text for instruction, _ in RULES] + [OTHERWISE.text]
    assert rows == [f"**{text}**" for text in told]


@pytest.mark.parametrize(
    ("told", "text"),
    [
        (("better", True, True, "sharper", None), "Hold it: the best of the last 5 s"),
        (("steady", True, True, None, None), "Hold it: the best of the last 5 s"),
        (("steady", True, False, None, None), "Steady"),
        (("better", False, True, "brighter", "sharper"), "Brighter than the last"),
        (("worse", False, False, "softer", "sharper"), "Softer than the last"),
        (("worse", True, True, None, None), "Worse than the last"),
        (("steady", False, False, None, "less noisy"), "The best of the last 5 s was less noisy"),
        (("steady", False, False, "darker", None), "The best of the last 5 s was better"),
    ],
)
def test_what_changed_is_told_in_few_words(told: tuple[Any, ...], text: str) -> None:
    assert change_text(*told) == text


def test_once_the_scene_has_changed_an_instruction_need_not_stay() -> None:
    adviser, dark = Adviser(), measured(exposure=10.0)
    assert adviser.advise(replace(WELL, score=4.5), 0.0).code == "take-it"
    assert adviser.advise(dark, 0.5).code == "take-it"
    adviser.release()
    assert adviser.advise(dark, 0.9).code == "more-light"
