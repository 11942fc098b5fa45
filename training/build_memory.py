"""Build the anchor memory that travels with the default package.

    python -m meiqa.training.build_memory --package meiqa/assets/package --data DATA --out MEMORY

The anchors are the human-scored photographs that no stage of training has seen. What is kept of
each: visual tokens, the description, its key and the score; no pixels.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from meiqa.engine.images import load_pixels
from meiqa.engine.package import EnginePackage
from meiqa.engine.pipeline import fitted_to
from meiqa.engine.runtime.onnx import open_sessions
from meiqa.engine.vlm import LocalVlm, Prefix
from meiqa.errors import PackageCorrupted
from meiqa.export.commands import run_command
from meiqa.memory import AnchorWriter, Case
from meiqa.training.data import anchor_names, human_scored

ANCHOR_STD = 0.2
"""Standard error of a mean of 30 opinions that differ by about one point, on the 1-5 scale."""


def read_photograph(vlm: LocalVlm, path: Path) -> tuple[str, Prefix]:
    """Pixel digest and prefix of one photograph."""
    pixels = load_pixels(path)
    fitted = fitted_to(pixels, vlm.image)
    return pixels.digest, vlm.read([vlm.encode(fitted)])[0]


def anchor_case(vlm: LocalVlm, path: Path, score: float) -> Case:
    """See, read and describe one photograph."""
    digest, prefix = read_photograph(vlm, path)
    description = vlm.describe(prefix, vlm.prompts.family.summary_tokens)
    if description.key is None:
        raise PackageCorrupted("the model writes nothing about an anchor", seen=path.name)
    return Case(
        id=path.stem,
        origin="anchor",
        image_digest=digest,
        score=score,
        std=ANCHOR_STD,
        summary=description.text,
        key=description.key,
        tokens=prefix.tokens.values,
        grid=prefix.tokens.grid,
    )


def build_memory(package: EnginePackage, data: Path, out: Path) -> int:
    """Write the memory; returns the number of anchors."""
    vlm = LocalVlm(package, *open_sessions(package, "cpu", None))
    names = anchor_names(data)
    rows = [row for row in human_scored(data) if row["file"] in names]
    widths = package.manifest.decoder
    began = time.perf_counter()
    with AnchorWriter(out, package.digest, widths.hidden_size, widths.embed_width) as writer:
        for index, row in enumerate(rows, start=1):
            path = data / "biq2021" / "images" / row["file"]
            case = anchor_case(vlm, path, 1.0 + 4.0 * float(row["mos"]))
            writer.add(case, provenance="BIQ2021 mean opinion score")
            if index % 100 == 0:
                rate = index / (time.perf_counter() - began)
                print(f"{index} of {len(rows)} anchors, {rate:.1f} a second", flush=True)
        writer.finish()
    return len(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m meiqa.training.build_memory")
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with biq2021/")
    parser.add_argument("--out", type=Path, required=True, help="must not exist")
    arguments = parser.parse_args()
    count = build_memory(EnginePackage.open(arguments.package), arguments.data, arguments.out)
    print(f"{arguments.out}: {count} anchors")


if __name__ == "__main__":
    run_command(main)
