"""Words for what can be measured in a picture."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from meiqa.engine.measures import (
    FLATTEST_OF_NOISE,
    HUES,
    LEAD,
    colour_cast,
    describe_attributes,
    lattice_ratio,
    measure_attributes,
    measured_sentence,
    noise_deviation,
)
from tests.engine.samples import smooth_photo

PHOTO = np.asarray(smooth_photo().resize((256, 192)), np.float32)
PHOTO = (PHOTO - PHOTO.min()) / np.ptp(PHOTO) * 230 + 10


def words_of(pixels: NDArray[np.float32]) -> dict[str, str]:
    return describe_attributes(measure_attributes(np.clip(pixels, 0, 255).astype(np.uint8)))


def noisy(sigma: float) -> NDArray[np.float32]:
    return PHOTO + np.random.default_rng(0).normal(0, sigma, PHOTO.shape).astype(np.float32)


def test_noise_is_named_by_its_strength() -> None:
    assert [words_of(noisy(sigma))["noise"] for sigma in (0, 2, 7, 20)] == [
        *("no noise", "little noise", "some noise", "strong noise")
    ]


def test_noise_is_measured_as_its_deviation() -> None:
    flat = np.full((300, 400, 3), 128, np.float32)
    flat += np.random.default_rng(0).normal(0, 8, (300, 400, 1)).astype(np.float32)
    measured = measure_attributes(flat.round().clip(0, 255).astype(np.uint8))
    assert measured["noise"] == pytest.approx(8, rel=0.1)


def test_light_is_named_and_what_is_lost_in_it() -> None:
    assert words_of(PHOTO)["exposure"] == "well exposed"
    assert not words_of(PHOTO).keys() & {"clipped", "blocked", "cast"}
    dark, bright = words_of(PHOTO * 0.1 - 6), words_of(PHOTO * 6 + 30)
    assert (dark["exposure"], dark["blocked"]) == ("very dark", "blocked shadows")
    assert (bright["exposure"], bright["clipped"]) == ("very bright", "clipped highlights")


def test_a_dark_picture_with_lights_is_no_bright_one() -> None:
    sunset = PHOTO * 0.15
    sunset[:20] = 255
    words = words_of(sunset)
    assert (words["exposure"], words["clipped"]) == ("well exposed", "clipped highlights")


def test_contrast_is_flat_where_tones_are_drawn_together() -> None:
    assert words_of(PHOTO)["contrast"] != "flat contrast"
    assert words_of(120 + 0.3 * (PHOTO - 120))["contrast"] == "flat contrast"


@pytest.mark.parametrize("sixth", range(6))
def test_a_cast_is_named_by_its_colour(sixth: int) -> None:
    grey = PHOTO.mean(2, keepdims=True)
    angles = np.radians(60 * sixth - np.array([0, 120, 240]))
    assert words_of(grey * 0.6 * (1 + 0.4 * np.cos(angles)))["cast"] == f"a {HUES[sixth]} cast"


def test_a_colour_beside_greys_is_no_cast() -> None:
    sky = np.repeat(PHOTO.mean(2, keepdims=True), 3, 2)
    sky[:120] = 60, 120, 220
    assert "cast" not in words_of(sky)


def test_blocks_are_seen_on_their_lattice_alone() -> None:
    blocks = np.kron(np.random.default_rng(0).uniform(0, 255, (12, 16)), np.ones((8, 8)))
    assert lattice_ratio(blocks.astype(np.float32)) > 10
    assert lattice_ratio(blocks[3:, 3:].astype(np.float32)) < 1


def test_the_sentence_tells_every_word() -> None:
    casting = measure_attributes(np.clip(PHOTO * (2.2, 0.8, 0.4), 0, 255).astype(np.uint8))
    for attributes in (casting, measure_attributes(PHOTO.astype(np.uint8))):
        sentence = measured_sentence(attributes)
        assert sentence.startswith(f"{LEAD} ")
        assert sentence.endswith(".")
        assert all(word in sentence for word in describe_attributes(attributes).values())


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 40), (2, 50), (3, 3), (16, 16), (7, 97), (97, 31), (130, 64)]
)
@pytest.mark.parametrize("tone", [0, 128, 255])
def test_plain_pictures_of_any_size(shape: tuple[int, int], tone: int) -> None:
    attributes = measure_attributes(np.full((*shape, 3), tone, np.uint8))
    assert all(map(np.isfinite, attributes.values()))
    assert (attributes["noise"], attributes["contrast"]) == (0, 0)
    assert describe_attributes(attributes)["noise"] == "no noise"


def test_strips_do_not_change_what_is_measured() -> None:
    """The picture as a whole says the same as its strips, by the plain formulas."""
    luma = noisy(8).mean(2)
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(luma, (3, 3))
    answer = np.einsum("hwij,ij->hw", windows, mask)
    rows, columns = (extent // 16 for extent in answer.shape)
    blocks = answer[: rows * 16, : columns * 16].reshape(rows, 16, columns, 16)
    # Strips begin at whole blocks, so only the last, incomplete one differs.
    flattest = np.sqrt(np.quantile((blocks**2).mean((1, 3)), 0.02)) / 6
    expected = flattest / FLATTEST_OF_NOISE
    assert noise_deviation(luma) == pytest.approx(expected, rel=0.05)


def test_greys_have_no_cast() -> None:
    grey = np.repeat(np.linspace(0, 255, 500, dtype=np.float32)[None], 3, 0)
    assert colour_cast(grey)[0] < 0.03
