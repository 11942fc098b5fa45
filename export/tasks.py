"""The families in optimum's terms: tools that ask its TasksManager find the exporter "meiqa".

>>> TasksManager.get_supported_model_type_for_task(TASK, EXPORTER)
['meiqa_conv_hybrid', 'qwen2_5_vl', 'qwen3_vl']
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from optimum.exporters.base import ExporterConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils.input_generators import DummyInputGenerator
from optimum.utils.normalized_config import NormalizedConfig
from torch import Tensor

from meiqa.engine.manifest import Shape
from meiqa.export.checkpoint import decoder_shape_of
from meiqa.export.families import FAMILIES
from meiqa.export.families.base import Family
from meiqa.export.graphs import EXAMPLE_SIZES, INDEX_INPUTS, Interface, decoder_interface

EXPORTER, TASK = "meiqa", "image-text-to-text"


class DecoderInputs(DummyInputGenerator):  # type: ignore[misc]
    """Random inputs of the decoder graph; keyword arguments name the sizes of dynamic axes."""

    def __init__(self, task: str, config: NormalizedConfig, **sizes: int) -> None:
        self._interface: Interface = config.config.interface
        self._sizes = {**EXAMPLE_SIZES, **sizes}

    def supports_input(self, input_name: str) -> bool:
        """Whether the graph has such an input."""
        return input_name in self._interface.inputs

    def generate(
        self,
        input_name: str,
        framework: str = "pt",
        int_dtype: str = "int64",
        float_dtype: str = "fp32",
    ) -> Tensor:
        """One input; lengths and positions are 0 or 1, which every size allows."""
        shape = [self._sizes.get(str(axis), axis) for axis in self._interface.inputs[input_name]]
        if input_name in INDEX_INPUTS:
            made = self.random_int_tensor(shape, max_value=1, framework=framework, dtype=int_dtype)
        else:
            made = self.random_float_tensor(shape, framework=framework, dtype=float_dtype)
        return cast(Tensor, made)


def exporter_config(family: Family) -> type[ExporterConfig]:
    """optimum's description of a family's decoder graph."""

    class DecoderExporterConfig(ExporterConfig):  # type: ignore[misc]
        """Inputs, outputs and dummy inputs of the decoder graph."""

        NORMALIZED_CONFIG_CLASS = NormalizedConfig
        DUMMY_INPUT_GENERATOR_CLASSES = (DecoderInputs,)

        def __init__(self, config: Any, task: str, **options: Any) -> None:
            config.interface = decoder_interface(decoder_shape_of(family.decoder(config.to_dict())))
            super().__init__(config, task, **options)

        @property
        def inputs(self) -> dict[str, dict[int, str]]:
            """Dynamic axes of each input."""
            return dynamic_axes(self._config.interface.inputs)

        @property
        def outputs(self) -> dict[str, dict[int, str]]:
            """Dynamic axes of each output."""
            return dynamic_axes(self._config.interface.outputs)

    return DecoderExporterConfig


def dynamic_axes(ports: Mapping[str, Shape]) -> dict[str, dict[int, str]]:
    """The named axes of each input or output by their places."""
    return {
        name: {place: axis for place, axis in enumerate(shape) if isinstance(axis, str)}
        for name, shape in ports.items()
    }


def register_families() -> None:
    """Make the families known to optimum."""
    register = TasksManager.create_register(EXPORTER)
    for family in sorted(FAMILIES.values(), key=lambda family: family.model_type):
        register(family.model_type, TASK)(exporter_config(family))


register_families()
