"""Whether the words of a description that are measured are right.

    python -m benchmarks.words --data DATA [--part development] [--format json]

Pristine photographs, at the size at which the model sees them, untouched and damaged in a known way
at the two strongest levels: how often each word is said of those that were made so, and of the
untouched. Bars: 90 % of those made so, 5 % of the untouched. `held-out` are the photographs that no
bound was chosen on; the bounds were chosen on those of `development`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.images import fitted, resized
from meiqa.engine.measures import describe_attributes, measure_attributes
from meiqa.engine.package import EnginePackage
from meiqa.evaluation.measuring import Column, quantiles_ms, run_on, table_text
from meiqa.locations import embedded_assets
from training.data import pristine_names, read_pixels
from training.distortions import KINDS, TONES, distort

Bytes = NDArray[np.uint8]
PARTS = {"held-out": True, "development": False}
STRONG = (4, 5)
SIGMAS = (10, 20)
"""Deviations of white noise, in grey levels."""
SAID: dict[str, Callable[[Mapping[str, str]], bool]] = {
    "noise": lambda words: words["noise"] in ("some noise", "strong noise"),
    "dark": lambda words: words["exposure"] in ("dark", "very dark"),
    "bright": lambda words: words["exposure"] in ("bright", "very bright"),
    "clipped": lambda words: "clipped" in words,
    "bright or clipped": lambda words: SAID["bright"](words) or SAID["clipped"](words),
    "flat": lambda words: words["contrast"] == "flat contrast",
    "cast": lambda words: "cast" in words,
    "soft": lambda words: words["sharpness"] in ("soft", "very soft"),
    "blocking": lambda words: words["blocking"] != "no blocking",
}
MADE_BY = {
    "noise": ("white noise", "grey noise"),
    "dark": ("underexposure",),
    "bright": ("overexposure",),
    "clipped": ("overexposure",),
    "bright or clipped": ("overexposure",),
    "flat": ("flat contrast", "haze"),
    "cast": ("colour cast",),
    "soft": ("gaussian blur",),
    "blocking": ("JPEG compression",),
}
"""What makes a photograph so."""
LEAST, MOST = 0.9, 0.05
TRIES = 5
"""Times that measuring is timed on a photograph, of which the least counts."""


def versions(pixels: Bytes, rng: np.random.Generator) -> Iterator[tuple[str, Bytes]]:
    """Give a photograph as it is, and what is made of it, by name and strength."""
    yield "untouched", pixels
    for sigma in SIGMAS:
        for name, channels in (("white noise", 3), ("grey noise", 1)):
            noise = rng.normal(0, sigma, (*pixels.shape[:2], channels))
            yield f"{name} {sigma}", np.rint(np.clip(pixels + noise, 0, 255)).astype(np.uint8)
    made = {name for names in MADE_BY.values() for name in names}
    for kind in (*KINDS, *TONES):
        for level in STRONG if kind.name in made - {"white noise"} else ():
            yield f"{kind.name} {level}", distort(pixels, kind.number, level, rng)


def bench_words(data: Path, part: str = "held-out") -> dict[str, Any]:
    """Describe every version of every photograph.

    Returns:
        for each word the share of the untouched, of all made so, and of each version of which it is
        said; `held`, the words that keep both bars; the untouched of which it is said by name;
        milliseconds of the processor's time for measuring one photograph of 512 x 512.
    """
    image = EnginePackage.open(embedded_assets() / "package").manifest.image
    said: dict[str, dict[str, list[str]]] = {word: {} for word in SAID}
    times_ms, names = [], pristine_names(data, held_out=PARTS[part])
    for number, name in enumerate(names):
        photograph = read_pixels(data / "pristine" / "images" / name)
        pixels = np.ascontiguousarray(fitted(photograph, image))
        for version, made in versions(pixels, np.random.default_rng(number)):
            words = describe_attributes(measure_attributes(made))
            for word, is_said in SAID.items():
                of_version = said[word].setdefault(version, [])
                of_version += [name] * is_said(words)
        times_ms.append(min(_measuring_ms(resized(pixels, 512, 512)) for _ in range(TRIES)))
    found = {word: _judged(word, of_versions, len(names)) for word, of_versions in said.items()}
    return {
        "part": part,
        "photographs": len(names),
        "words": found,
        "measuring": quantiles_ms(times_ms),
        **run_on("numpy", "pillow"),
    }


def _measuring_ms(pixels: Bytes) -> float:
    began = time.thread_time()
    measure_attributes(pixels)
    return 1e3 * (time.thread_time() - began)


def _judged(word: str, said: Mapping[str, list[str]], count: int) -> dict[str, Any]:
    shares = {version: len(names) / count for version, names in said.items()}
    made = {v: share for v, share in shares.items() if v.rpartition(" ")[0] in MADE_BY[word]}
    of_made, untouched = float(np.mean([*made.values()])), shares["untouched"]
    return {
        "made_so": round(of_made, 4),
        "untouched": round(untouched, 4),
        "holds": of_made >= LEAST and untouched <= MOST,
        "versions": {version: round(share, 4) for version, share in made.items()},
        "untouched_names": said["untouched"],
    }


def words_text(found: Mapping[str, Any]) -> str:
    """Lay the shares out."""
    rows = [
        {
            "word": word,
            **each,
            "bars": "held" if each["holds"] else "missed",
            "versions": ", ".join(f"{v}: {share:.2f}" for v, share in each["versions"].items()),
        }
        for word, each in found["words"].items()
    ]
    columns = [
        Column("word", "said"),
        Column("made_so", "made so", ".3f"),
        Column("untouched", "untouched", ".3f"),
        Column("bars", "bars"),
        Column("versions", "versions"),
    ]
    measuring = found["measuring"]
    return (
        f"{found['photographs']} photographs ({found['part']})\n{table_text(rows, columns)}\n"
        f"measuring 512 x 512: {measuring['p50_ms']:.2f} ms of the processor's time"
    )


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.words", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with pristine/")
    parser.add_argument("--part", choices=[*PARTS], default="held-out")
    parser.add_argument("--format", choices=["text", "json"], default="text")
    options = parser.parse_args(argv)
    found = bench_words(options.data, options.part)
    print(json.dumps(found, indent=2) if options.format == "json" else words_text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
