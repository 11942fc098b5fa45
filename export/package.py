"""Checkpoint → verified engine package.

    python -m meiqa.export.package CHECKPOINT --images DIR --out PACKAGE --precision int8

Everything is written into a folder beside the target and moved into place at the end, so an
interrupted or refused export leaves nothing half-written.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from meiqa.engine.images import ImageSource, load_pixels
from meiqa.engine.package import (
    UNCALIBRATED,
    DecoderShape,
    EnginePackage,
    Graph,
    ImageProcessing,
    Manifest,
    file_digest,
    write_manifest,
)
from meiqa.engine.pipeline import fitted_to
from meiqa.engine.planning import FULL_SUMMARY_TOKENS
from meiqa.engine.prompts import MEIQA
from meiqa.engine.runtime.base import Array, GraphSession
from meiqa.engine.runtime.onnx import open_sessions
from meiqa.engine.scoring import expected_grade
from meiqa.engine.vlm import LocalVlm
from meiqa.errors import PackageCorrupted, UsageError
from meiqa.export.checkpoint import ARCHITECTURE, Checkpoint, load_checkpoint
from meiqa.export.commands import run_command
from meiqa.export.graphs import (
    DECODER_INPUTS,
    DECODER_OUTPUTS,
    VISION_INPUTS,
    VISION_OUTPUTS,
    export_decoder,
    export_vision,
)
from meiqa.export.parity import decoder_parity, vision_parity
from meiqa.export.quantise import (
    float_nodes_of_decoder,
    float_nodes_of_vision,
    quantise,
)

PRECISIONS = ("fp32", "int8")
PARITY_TOLERANCE = 1e-4
MIN_PIXELS, MAX_PIXELS = 128 * 128, 512 * 512
RIDGE = 1e-2
CALIBRATION_PICTURES = 40
KEY_PICTURES = 256
WRITING_EVERY = 16
LARGEST_INT8_MOVE = 0.05
"""Largest mean change of a grade, in score units, that quantisation may cause."""

Pictures = Sequence[NDArray[np.uint8]]


def export_package(
    checkpoint: Path, out: Path, precision: str, pictures: Sequence[ImageSource]
) -> EnginePackage:
    """Export a checkpoint.

    Args:
        checkpoint: folder in Hugging Face's layout.
        out: where the package goes; must not exist.
        precision: "fp32" or "int8".
        pictures: photographs to calibrate activations and the key projection on.

    Raises:
        UsageError: unknown precision, no pictures, or something is at `out`.
        PackageCorrupted: the graphs differ from PyTorch by more than the tolerance.
    """
    if precision not in PRECISIONS:
        raise UsageError("unknown precision", seen=precision, allowed=", ".join(PRECISIONS))
    if not pictures:
        raise UsageError("an export needs pictures to calibrate on", seen="none")
    if out.exists():
        raise UsageError(f"{out} is there already", hint="remove it or choose another name")
    loaded = load_checkpoint(checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        write_float_package(loaded, checkpoint, folder)
        image = image_processing(loaded)
        fitted = [fitted_to(load_pixels(picture), image) for picture in pictures]
        if precision == "int8":
            quantise_package(folder, fitted)
        add_key_projection(folder, fitted[:KEY_PICTURES])
        folder.chmod(0o755)
        folder.replace(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return EnginePackage.open(out)


def image_processing(checkpoint: Checkpoint) -> ImageProcessing:
    """How pixels become the tower's patches."""
    vision = checkpoint.model.visual.config
    return ImageProcessing(
        patch_size=vision.patch_size,
        merge_size=vision.merge_size,
        min_pixels=MIN_PIXELS,
        max_pixels=MAX_PIXELS,
        mean=checkpoint.pixel_mean,
        std=checkpoint.pixel_std,
    )


def write_float_package(checkpoint: Checkpoint, source: Path, folder: Path) -> None:
    """Write and verify the fp32 package, without key projection."""
    model = checkpoint.model
    export_vision(model.visual, folder / "vision.onnx")
    export_decoder(model.language_model, folder / "decoder.onnx")
    parity = {
        "vision": vision_parity(model.visual, folder / "vision.onnx"),
        "decoder": decoder_parity(model.language_model, folder / "decoder.onnx"),
    }
    if not all(difference <= PARITY_TOLERANCE for difference in parity.values()):
        raise PackageCorrupted(
            "the exported graphs differ from PyTorch",
            seen=", ".join(f"{name} {difference:.1e}" for name, difference in parity.items()),
            allowed=f"{PARITY_TOLERANCE:.0e}",
        )
    embedding = model.language_model.embed_tokens.weight.detach().numpy()
    np.save(folder / "embedding.npy", embedding.astype(np.float16))
    checkpoint.tokenizer.save(str(folder / "tokenizer.json"))
    width = model.language_model.config.hidden_size
    np.save(folder / "key_projection.npy", np.zeros((width + 1, width), np.float32))
    text = model.language_model.config
    manifest = Manifest(
        architecture=ARCHITECTURE,
        source={"name": source.name, "sha256": file_digest(source / "model.safetensors")},
        precision="fp32",
        graphs={
            "vision": Graph("vision.onnx", VISION_INPUTS, VISION_OUTPUTS),
            "decoder": Graph("decoder.onnx", DECODER_INPUTS, DECODER_OUTPUTS),
        },
        image=image_processing(checkpoint),
        decoder=DecoderShape(
            layers=text.num_hidden_layers,
            kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
        ),
        prompt=MEIQA,
        calibration=UNCALIBRATED,
        parity=parity,
        files={},
    )
    seal(folder, manifest)


def seal(folder: Path, manifest: Manifest) -> None:
    """Write the manifest with the digests of all files."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.suffix != ".tmp")
    files = {name: file_digest(folder / name) for name in names if name != "manifest.json"}
    write_manifest(folder, replace(manifest, files=files))


class RecordingSession:
    """A session that keeps what it is fed, but only one in `WRITING_EVERY` calls with one token.

    Such calls write text; they are many and alike, and all that is kept is held in memory.
    """

    def __init__(self, session: GraphSession) -> None:
        self._session = session
        self._written = 0
        self.feeds: list[dict[str, np.ndarray]] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
        """Execute and, in turn, keep the inputs."""
        writes = "embeds" in inputs and inputs["embeds"].shape[2] == 1
        if not writes or self._written % WRITING_EVERY == 0:
            self.feeds.append({name: np.array(value) for name, value in inputs.items()})
        self._written += writes
        return self._session.run(inputs)


def quantise_package(folder: Path, pictures: Pictures) -> None:
    """Replace both graphs by INT8 ones and refuse them if grades move too much.

    Calibrated on everything the engine asks of the first pictures; checked on others if there are
    any, so that the check sees what the calibration did not.
    """
    package = EnginePackage.open(folder)
    vision, decoder = (RecordingSession(s) for s in open_sessions(package, "cpu", None))
    float_vlm = LocalVlm(package, vision, decoder)
    exercise(float_vlm, pictures[:CALIBRATION_PICTURES])
    checked = pictures[CALIBRATION_PICTURES:][:CALIBRATION_PICTURES] or pictures
    wanted = grades(float_vlm, checked)
    for name, feeds, kept in (
        ("vision", vision.feeds, float_nodes_of_vision(folder / "vision.onnx")),
        ("decoder", decoder.feeds, float_nodes_of_decoder(folder / "decoder.onnx")),
    ):
        quantise(folder / f"{name}.onnx", folder / f"{name}.int8", feeds, kept)
        (folder / f"{name}.int8").replace(folder / f"{name}.onnx")
    seal(folder, replace(package.manifest, precision="int8"))
    quantised = EnginePackage.open(folder)
    made = grades(LocalVlm(quantised, *open_sessions(quantised, "cpu", None)), checked)
    moved = float(np.abs(made - wanted).mean())
    if not moved <= LARGEST_INT8_MOVE:
        raise PackageCorrupted(
            "quantisation moves the grades too much",
            seen=f"{moved:.3f} on average",
            allowed=f"{LARGEST_INT8_MOVE} on the 1-5 scale",
            hint="give more and more varied pictures, or export with --precision fp32",
        )
    parity = {**quantised.manifest.parity, "int8_grade": moved}
    write_manifest(folder, replace(quantised.manifest, parity=parity))


def grades(vlm: LocalVlm, pictures: Pictures) -> NDArray[np.float64]:
    """Expected grade (N,) of each picture."""
    prefixes = vlm.read([vlm.encode(picture) for picture in pictures])
    return np.array([expected_grade(vlm.grade(prefix)) for prefix in prefixes])


def exercise(vlm: LocalVlm, pictures: Pictures) -> None:
    """Ask everything that the engine asks: read, describe, grade, compare, reflect."""
    prefixes = vlm.read([vlm.encode(picture) for picture in pictures])
    for prefix, other in zip(prefixes, prefixes[1:] + prefixes[:1], strict=True):
        description = vlm.describe(prefix, FULL_SUMMARY_TOKENS)
        vlm.grade(prefix)
        vlm.prefer_first([prefix], [other.tokens])
        vlm.reflect(prefix, description.text, 3.5, 2.5)


def add_key_projection(folder: Path, pictures: Pictures) -> None:
    """Fit the linear map from visual tokens to a summary's key (ridge regression)."""
    package = EnginePackage.open(folder)
    vlm = LocalVlm(package, *open_sessions(package, "cpu", None))
    tokens = [vlm.encode(picture) for picture in pictures]
    keys = [vlm.describe(prefix, FULL_SUMMARY_TOKENS).key for prefix in vlm.read(tokens)]
    known = [
        (t, key / np.linalg.norm(key))
        for t, key in zip(tokens, keys, strict=True)
        if key is not None
    ]
    if not known:
        raise PackageCorrupted("the model describes none of the pictures", seen="empty texts")
    means = np.stack([np.append(t.values.mean(axis=0), 1.0) for t, _ in known]).astype(np.float64)
    unit = np.stack([key for _, key in known])
    gram = means.T @ means + RIDGE * len(means) * np.eye(means.shape[1])
    projection = np.linalg.solve(gram, means.T @ unit)
    np.save(folder / "key_projection.npy", projection.astype(np.float32))
    seal(folder, package.manifest)


def pictures_in(folder: Path, count: int) -> list[Path]:
    """Up to `count` photographs of a folder, spread by a hash of their names."""
    paths = sorted(folder.iterdir(), key=lambda p: hashlib.sha256(p.name.encode()).hexdigest())
    return paths[:count]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m meiqa.export.package")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--images", type=Path, required=True, help="photographs to calibrate on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=KEY_PICTURES, help="how many of them")
    parser.add_argument("--precision", choices=PRECISIONS, default="int8")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    pictures = pictures_in(arguments.images, arguments.pictures)
    package = export_package(arguments.checkpoint, arguments.out, arguments.precision, pictures)
    print(f"{package.path}: {package.manifest.precision}, parity {dict(package.manifest.parity)}")


if __name__ == "__main__":
    run_command(main)
