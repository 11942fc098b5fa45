"""Embeddings and quality priors are what scoring found, and say what they can be compared with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from meiqa import UsageError
from meiqa.engine.engine import Engine
from meiqa.engine.images import load_pixels
from meiqa.engine.package import EnginePackage
from meiqa.memory import token_features
from tests.engine.samples import picture

PHOTO = picture(3, (240, 320))


def test_an_embedding_is_given_when_asked_for_and_is_tied_to_the_package(
    package: EnginePackage, anchors: Path
) -> None:
    with Engine.open(package, anchors, learn=False) as engine:
        found, without = engine.score(PHOTO, embedding=True), engine.score(PHOTO)
        (among,) = engine.score_many([PHOTO], embedding=True)
        prefix, _ = engine.scorer.prefill(load_pixels(PHOTO))
    assert found.embedding is not None
    assert found.embedding.digest == package.digest
    assert among.to_dict()["embedding"] == found.to_dict()["embedding"]
    assert without.embedding is None
    assert without.score == found.score
    assert found.embedding.values == tuple(token_features(prefix.tokens.values).tolist())


def test_a_prior_has_what_score_and_patterns_say(patterned: EnginePackage, anchors: Path) -> None:
    with Engine.open(patterned, anchors, learn=False) as engine:
        prior, found = engine.quality_prior(PHOTO), engine.score(PHOTO, embedding=True)
        seen = engine.patterns(PHOTO)
        beside = engine.quality_prior(PHOTO, reference=PHOTO)
    np.testing.assert_allclose(prior.score, [found.score, found.std], rtol=1e-6)
    assert prior.distortions.sum() == pytest.approx(1, abs=1e-6)
    named = {each.kind: each.probability for each in found.distortions}
    assert named == {
        kind: pytest.approx(float(share))
        for kind, share in zip(prior.kinds, prior.distortions, strict=True)
        if kind in named
    }
    np.testing.assert_array_equal(prior.map, seen.map)
    assert found.embedding is not None
    np.testing.assert_allclose(prior.embedding, found.embedding.values, rtol=1e-6)
    assert prior.digest == patterned.digest
    assert all(
        each.dtype == np.float32
        for each in (prior.score, prior.distortions, prior.strength, prior.map, prior.embedding)
    )
    assert beside.distortions[0] == 1
    assert not beside.map.any()


def test_without_patterns_there_is_no_prior(package: EnginePackage, anchors: Path) -> None:
    with (
        Engine.open(package, anchors, learn=False) as engine,
        pytest.raises(UsageError, match="patterns"),
    ):
        engine.quality_prior(PHOTO)
