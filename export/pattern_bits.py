"""The graph of patterns in 8 bits, for packages whose other graphs are."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from PIL import Image, ImageEnhance, ImageFilter

from meiqa.engine.local import LocalVlm
from meiqa.engine.manifest import Graph
from meiqa.engine.runtime.onnx import OnnxSession

Feeds = dict[str, NDArray[np.float32]]
Pictures = Sequence[NDArray[np.uint8]]

MOST_PICTURES = 64
"""Pictures that ranges are observed on; as many others are judged by both graphs."""
LARGEST_MOVE = 0.03
"""Points by which 8 bits may move a score on average."""
BLUR_PIXELS, JPEG_QUALITY, NOISE, DARKENED, PALED = 6.0, 5, 60.0, 0.25, 0.1


class Observed(CalibrationDataReader):  # type: ignore[misc]
    """Calls for ONNX Runtime's calibration."""

    def __init__(self, calls: Iterator[Feeds]) -> None:
        self._calls = calls

    def get_next(self) -> Feeds | None:
        """The next call, None at the end."""
        return next(self._calls, None)


def calls_with(vlm: LocalVlm, pictures: Pictures) -> Iterator[Feeds]:
    """Each picture alone, and much worse versions of it beside it, so that ranges are wide."""
    for picture in pictures:
        reference = vlm.encode(picture).values
        yield {"tokens": reference, "reference": reference}
        for worse in worsened(picture):
            yield {"tokens": vlm.encode(worse).values, "reference": reference}


def worsened(picture: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """A picture out of focus, compressed too much, noisy, dark, and pale."""
    image = Image.fromarray(picture)
    yield np.asarray(image.filter(ImageFilter.GaussianBlur(BLUR_PIXELS)))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY)
    yield np.asarray(Image.open(stream).convert("RGB"))
    noise = np.random.default_rng(picture.size).normal(0, NOISE, picture.shape)
    yield np.clip(picture + noise, 0, 255).astype(np.uint8)
    yield np.asarray(ImageEnhance.Brightness(image).enhance(DARKENED))
    yield np.asarray(ImageEnhance.Color(image).enhance(PALED))


def rounded(path: Path, graph: Graph, vlm: LocalVlm, pictures: Pictures) -> dict[str, object]:
    """Round a graph of patterns to 8 bits in place, unless that would move its scores.

    Weights are signed, with a scale for each output; activations unsigned, with a range each. The
    gate, which has the only MatMul nodes, stays in floats: its 8 bits cost the hybrid score .005 of
    its rank correlation, those of the rest .0002.

    Args:
        path: of the graph in floats.
        graph: its interface.
        vlm: sees the pictures.
        pictures: uint8 RGB on the tower's grid; of every two one is for ranges, one for judging.

    Returns:
        JSON-ready: `move` (mean difference of both scores from those in floats), `bits` (8 or 32).
    """
    made = path.with_suffix(".int8")
    try:
        quantize_static(
            path,
            made,
            Observed(calls_with(vlm, pictures[:MOST_PICTURES:2])),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
            op_types_to_quantize=["Gemm"],
        )
        judged = pictures[1:MOST_PICTURES:2] or pictures
        move = mean_move(path, made, graph, calls_with(vlm, judged))
        taken = move <= LARGEST_MOVE
        if taken:
            made.replace(path)
        return {"move": move, "bits": 8 if taken else 32}
    finally:
        made.unlink(missing_ok=True)


def mean_move(floats: Path, ints: Path, graph: Graph, calls: Iterator[Feeds]) -> float:
    """Mean difference of the scores that two graphs give."""
    sessions = [
        OnnxSession(path.parent, replace(graph, file=path.name), "cpu", None)
        for path in (floats, ints)
    ]
    moves = []
    for feeds in calls:
        one, other = (session.run(feeds)["scores"] for session in sessions)
        moves.append(np.abs(one - other)[:2])  # the third is the gate's weight
    return float(np.mean(moves))
