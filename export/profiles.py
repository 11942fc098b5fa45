"""Which shapes TensorRT engines accept: those that a package's photos and prompts lead to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt

from meiqa.engine.images import MAX_ASPECT
from meiqa.engine.manifest import PATTERNS, Graph, Profile
from meiqa.engine.package import EnginePackage
from meiqa.engine.vlm import ANSWER_TOKENS, RATING_TOKENS, ROWS_PER_CALL
from meiqa.engine.writing import PAST_STEP, PROPOSED_TOKENS
from meiqa.errors import PackageCorrupted, UsageError

USUAL_SIDE = 512
"""Side in pixels of the photo that kernels are chosen for."""
SMALL_BOX = 256
"""Cells that any profile of the vision graph may hold, however few a photo has."""
ROOM_FOR_WRITING = 1.5
"""A summary that is read back may fall into more tokens than it was written in."""

Range = tuple[int, int, int]
Ranges = Mapping[str, Range]


@dataclass(frozen=True)
class Limits:
    """Largest calls that engines accept; None is what the package itself needs.

    Attributes:
        batch: comparisons in one call.
        suffix: tokens that follow a prefix in one call.
        prefix: tokens of a prompt's opening with its picture.
        past: tokens that were written after a prefix, the question included.
    """

    batch: int | None = None
    suffix: int | None = None
    prefix: int | None = None
    past: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise UsageError(
                    f"no engine holds so few: --max-{name}", seen=value, allowed="1 up"
                )


def vision_profiles(package: EnginePackage) -> list[Profile]:
    """Profiles that together accept every grid that the package's photos are fitted to."""
    image = package.manifest.image
    most = image.max_pixels // image.cell_pixels**2
    usual = max(1, USUAL_SIDE // image.cell_pixels)
    profiles = []
    for height, width in grid_boxes(most):
        rows = min(usual, isqrt(most), height)
        columns = min(max(usual, most // height), most // rows, width)
        if width < height:
            columns = min(usual, isqrt(most), width)
            rows = min(max(usual, most // width), most // columns, height)
        ranges = {"h": (1, rows, height), "w": (1, columns, width)}
        profiles.append(profile_of(package.manifest.graphs["vision"], ranges))
    return profiles


def pattern_profiles(package: EnginePackage) -> list[Profile]:
    """One profile: patterns don't see the grid, only how many cells there are."""
    image = package.manifest.image
    most = image.max_pixels // image.cell_pixels**2
    usual = min(most, max(1, USUAL_SIDE // image.cell_pixels) ** 2)
    return [profile_of(package.manifest.every_graph[PATTERNS], {"cells": (1, usual, most)})]


def grid_boxes(most: int) -> list[tuple[int, int]]:
    """Greatest (rows, columns) of the profiles that cover all grids of at most `most` cells.

    One box for all would have to be as wide as the widest photo and as high as the highest, and
    TensorRT reserves memory for all of it. So a square one is followed by pairs of ever longer
    ones, none of which holds much more than `most` cells.
    """
    longest = longest_side(most)
    room = max(2 * most, SMALL_BOX)
    side = min(longest, isqrt(room))
    boxes = [(side, side)]
    while side < longest:
        short = most // (side + 1)
        side = min(longest, room // short)
        boxes += [(short, side), (side, short)]
    return boxes


def longest_side(most: int) -> int:
    """Most columns of a fitted photo: as elongated as the limit, then rounded to whole cells."""
    shrunk = min(most, isqrt(int(MAX_ASPECT) * most))
    rounded = (min(most // rows, int(MAX_ASPECT * (rows + 0.5))) for rows in range(1, most + 1))
    return max(shrunk, *rounded)


def decoder_profiles(package: EnginePackage, limits: Limits) -> list[Profile]:
    """Profiles of the three calls that the engine makes.

    * many prefixes with a row each: reading photos, comparing pairs;
    * one prefix with many rows: comparing a photo with its neighbours, grading;
    * one row with a past: writing, and checking what drafts propose.
    """
    usual, needed = call_lengths(package)
    batch = limits.batch or ROWS_PER_CALL
    suffix, prefix = limits.suffix or needed.suffix, limits.prefix or needed.prefix
    past = limits.past or needed.past

    def up_to(most: int, likely: int) -> Range:
        return 1, min(likely, most), most

    one = up_to(1, 1)
    after_prefix = {
        "steps": up_to(suffix, usual.suffix),
        "prefix_steps": up_to(prefix, usual.prefix),
    }
    many = up_to(batch, batch)
    # Reading has no prefix but the prefix itself for its steps.
    read = {**after_prefix, "steps": up_to(max(suffix, prefix), usual.suffix)}
    calls: list[Ranges] = [
        {**read, "prefixes": many, "rows": one, "past_steps": one},
        {**after_prefix, "prefixes": one, "rows": many, "past_steps": one},
        {
            **after_prefix,
            "steps": up_to(suffix, 1),
            "prefixes": one,
            "rows": one,
            "past_steps": up_to(past, usual.past),
            "wanted": up_to(min(suffix, PROPOSED_TOKENS + 1), 1),
        },
    ]
    graph = package.manifest.graphs["decoder"]
    return [profile_of(graph, {"wanted": one, **call}) for call in calls]


@dataclass(frozen=True)
class CallLengths:
    """Tokens of the segments of a decoder call."""

    suffix: int
    prefix: int
    past: int


def call_lengths(package: EnginePackage) -> tuple[CallLengths, CallLengths]:
    """Usual and greatest lengths of this package's calls, with its prompts and photos."""
    image, prompts = package.manifest.image, package.prompts
    most = image.max_pixels // image.cell_pixels**2
    usual = min(most, max(1, USUAL_SIDE // image.cell_pixels) ** 2)
    around = len(prompts.opening) + len(prompts.closing)
    asked = len(prompts.second_opening) + len(prompts.closing) + len(prompts.compare)
    limit = prompts.family.summary_tokens
    summary = int(limit * ROOM_FOR_WRITING)
    reflect = len(prompts.reflect("", 1.0, 1.0)) + summary
    longest_question = max(len(prompts.score), len(prompts.levels), reflect)
    # What `LocalVlm` writes behind a description, and the steps in which it makes room.
    described = len(prompts.score) + limit + ANSWER_TOKENS + RATING_TOKENS
    return (
        CallLengths(asked + usual, around + usual, len(prompts.score) + limit // 2),
        CallLengths(
            max(asked + most, longest_question + PROPOSED_TOKENS),
            around + most,
            max(described, reflect + summary) + 2 * PAST_STEP,
        ),
    )


def profile_of(graph: Graph, ranges: Ranges) -> Profile:
    """Least, usual and greatest shape of every input, from the ranges of its named axes.

    Raises:
        PackageCorrupted: a dynamic axis has no range.
    """

    def shape(axes: Sequence[int | str], end: int) -> tuple[int, ...]:
        return tuple(axis if isinstance(axis, int) else ranges[axis][end] for axis in axes)

    dynamic = {axis for axes in graph.inputs.values() for axis in axes if isinstance(axis, str)}
    if unknown := dynamic - ranges.keys():
        raise PackageCorrupted(
            f"{graph.file} has dynamic axes that no profile is known for",
            seen=", ".join(sorted(unknown)),
            allowed=", ".join(ranges),
            hint="export the package again with this version",
        )
    return {
        name: (shape(axes, 0), shape(axes, 1), shape(axes, 2))
        for name, axes in graph.inputs.items()
    }
