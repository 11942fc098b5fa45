"""Float graphs of a package → the same graphs in fewer bits, each layer in the precision it bears.

    observed = observe(files, exercise)
    quantisation = Quantisation(files, "int8", observed)
    plan = quantisation.default()  # or measured: SensitivityStudy(quantisation, …).plan()
    save_graph(quantisation.graph("decoder", plan["decoder"]), path)

Graphs are rewritten without reading their weights: those are read, rounded and written one after
the other when the result is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from meiqa.engine.runtime.base import GraphSession
from meiqa.export import int4, int8
from meiqa.export.calibration import Observed, observing
from meiqa.export.half import stored_in_half
from meiqa.export.layers import Layer, layers_of
from meiqa.export.smoothing import fold, foldables, smoothing_scales

Files = Mapping[str, Path]
Assignment = dict[str, str]
"""Precision by the name of a layer's weight: "int4", "int8" or "fp16"."""
LEFT_IN_FLOAT = "fp16"


def observe(
    files: Files, exercise: Callable[[Mapping[str, GraphSession]], None]
) -> dict[str, dict[str, Observed]]:
    """Run float graphs and note, by graph and activation, what their layers read.

    Args:
        files: float graphs by name; a copy with more outputs is written beside each for the time.
        exercise: asks everything of the sessions that the engine will.
    """
    with ExitStack() as stack:
        sessions = {
            name: stack.enter_context(observing(file, int8.values_to_observe(ir.load(file))))
            for name, file in files.items()
        }
        exercise(sessions)
        return {name: session.observed() for name, session in sessions.items()}


class Quantisation:
    """The float graphs of a package and what is known about them.

    Args:
        files: float graphs by name.
        precision: "int8" or "int4"; only the decoder has layers in 4 bits.
        observed: what calibration saw, by graph and activation; empty without pictures, and then
            nothing can be stored as int8.
    """

    def __init__(
        self, files: Files, precision: str, observed: Mapping[str, Mapping[str, Observed]]
    ) -> None:
        self.files, self.precision = files, precision
        self._observed: dict[str, Mapping[str, Observed]] = dict(observed)
        self._scales: dict[str, dict[str, NDArray[np.float32]]] = {}
        for name in files:
            seen = observed.get(name, {})
            smooth = self.ladder(name)[:1] == ["int8"]
            scales = smoothing_scales(self._load(name), seen) if smooth else {}
            self._scales[name] = scales
            divided = {value: seen[value].divided(scale) for value, scale in scales.items()}
            self._observed[name] = {**seen, **divided}

    def _load(self, name: str) -> ir.Model:
        return ir.load(self.files[name])

    def ladder(self, name: str) -> list[str]:
        """Precisions that a graph's layers may have below float, the smallest first."""
        rungs = ["int4"] if self.precision == "int4" and name == "decoder" else []
        return [*rungs, "int8"] if self._observed.get(name) else rungs

    def layers(self, name: str) -> list[Layer]:
        """The layers of a float graph."""
        return layers_of(self._load(name))

    def positions(self, name: str, layer: Layer) -> int:
        """Tokens or pixels for which a layer was seen at work."""
        value = int8.result_of(layer) if layer.is_convolution else layer.input
        return self._observed[name][str(value.name)].seen

    def default(self) -> dict[str, Assignment]:
        """Every layer in the smallest precision, but the one that sees pixels and the logits'."""
        plan = {}
        for name in self.files:
            layers = self.layers(name)
            kept = [layers[0]] if name == "vision" else [la for la in layers if la.makes("logits")]
            small = [*self.ladder(name), LEFT_IN_FLOAT][0]
            plan[name] = {layer.name: small for layer in layers}
            plan[name] |= {layer.name: LEFT_IN_FLOAT for layer in kept}
        return plan

    def graph(self, name: str, assignment: Assignment) -> ir.Model:
        """A graph with each layer in its precision, "fp32" for those not named; to be saved."""
        model = self._load(name)
        seen = self._observed[name]
        for foldable in list(foldables(model)):
            if str(foldable.value.name) in self._scales[name]:
                fold(foldable, self._scales[name][str(foldable.value.name)])
        ranges = {value: int8.whole_range(of_value) for value, of_value in seen.items()}

        def stored_as(precision: str) -> Callable[[Layer], bool]:
            return lambda layer: assignment.get(layer.name) == precision

        int8.quantised(model, ranges, stored_as("int8"))
        int4.quantised(model, seen, stored_as("int4"))
        stored_in_half(model, stored_as("fp16"))
        return model
