"""The versions that words are looked for in are made as they are called."""

from __future__ import annotations

import numpy as np

from benchmarks.words import MADE_BY, SAID, SIGMAS, STRONG, versions
from meiqa.engine.measures import describe_attributes, measure_attributes
from tests.engine.samples import smooth_photo


def test_every_word_has_versions_that_it_is_said_of() -> None:
    photo = np.ascontiguousarray(np.asarray(smooth_photo().resize((160, 128))))
    made = dict(versions(photo, np.random.default_rng(0)))
    assert next(iter(made)) == "untouched"
    assert made["untouched"] is photo
    assert MADE_BY.keys() == SAID.keys()
    for names in MADE_BY.values():
        for name in names:
            for level in SIGMAS if name.endswith(" noise") else STRONG:
                assert (made[f"{name} {level}"] != photo).any()
    for word, version in (("noise", "white noise 20"), ("dark", "underexposure 5")):
        words = describe_attributes(measure_attributes(made[version]))
        assert SAID[word](words)
        assert not SAID[word](describe_attributes(measure_attributes(photo)))
