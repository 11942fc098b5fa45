"""What a family of checkpoints tells the exporter, and how its config.json is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from optimum.utils.normalized_config import NormalizedConfig, NormalizedTextConfig
from torch import Tensor, nn

from meiqa.errors import PackageCorrupted
from meiqa.export.decoder import DecoderConfig

Config = Mapping[str, Any]
"""A config.json. Whoever reads one raises PackageCorrupted where a field is missing, unreadable,
does not fit the others or asks for what the graphs can't do."""

VISUAL, TEXT = "visual.", "language_model."
Tilings = tuple[tuple[int, int], ...]
Weight = Callable[[str, Mapping[str, Tensor]], Tensor]
"""Gives the value of a parameter, by its name in our module, out of stored tensors by theirs."""


@dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Attributes:
        architecture, model_type: what config.json calls it.
        tower: makes the vision tower.
        decoder: reads the shape of the decoder.
        grid: reads pixels a patch and patches a cell, each along one side.
        prompt: name of the prompt family that suits it best.
        tower_weight: value of one parameter of the tower, out of the stored tensors by their names
            below "visual."; as stored by default.
        decoder_weight: the same of the decoder, by their names below "language_model.".
        renamed: how names of stored tensors begin, and how they do below "visual." or
            "language_model."; the first that fits counts.
        unread: what these names begin with of tensors that the engine has no use for.
        tiles: reads the side of tiles in pixels, and the rows and columns of them that a photo may
            be cut into, where the tower sees a photo so.
    """

    architecture: str
    model_type: str
    tower: Callable[[Config], nn.Module]
    decoder: Callable[[Config], DecoderConfig]
    grid: Callable[[Config], tuple[int, int]]
    prompt: str = "visualquality-r1"
    tower_weight: Weight = lambda name, stored: stored[name]
    decoder_weight: Weight = lambda name, stored: stored[name]
    renamed: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    tiles: Callable[[Config], tuple[int, Tilings]] = lambda config: (0, ())

    def canonical(self, name: str) -> str:
        """Name a stored tensor below "visual." or "language_model.".

        Layouts differ between releases: "model.layers.0…" and "model.language_model.layers.0…" are
        one.
        """
        name = name.removeprefix("model.")
        for stored, ours in self.renamed.items():
            if name.startswith(stored):
                return f"{ours}{name.removeprefix(stored)}"
        return name if name.startswith((VISUAL, TEXT)) else f"{TEXT}{name}"


@dataclass(frozen=True)
class Section:
    """A section of config.json, whose fields are asked for by optimum's normalised names.

    Attributes:
        path: what stands before a field's name in a message, such as "vision_config.".
        values: the fields.
        names: optimum's class that maps normalised names to the section's own.
    """

    path: str
    values: Config
    names: Callable[..., NormalizedConfig]

    def written(self, name: str) -> str:
        """Give a field's full name as config.json has it."""
        normalised = self.names(SimpleNamespace())
        known = {**vars(type(normalised)), **vars(normalised)}
        return f"{self.path}{known.get(name.upper(), name)}"

    def below(self, name: str) -> Section:
        values = self.value(name)
        if not isinstance(values, Mapping):
            raise self.refuse(name, "an object")
        return replace(self, path=f"{self.written(name)}.", values=values)

    def value(self, name: str) -> Any:
        try:
            return getattr(self.names(SimpleNamespace(**self.values)), name)
        except AttributeError:
            raise PackageCorrupted(f"config.json lacks {self.written(name)}") from None

    def refuse(self, name: str, allowed: str) -> PackageCorrupted:
        field, seen = self.written(name), self.value(name)
        return PackageCorrupted(f"config.json has an unusable {field}", seen=seen, allowed=allowed)

    def whole(self, name: str) -> int:
        value = self.value(name)
        if type(value) is not int or value <= 0:
            raise self.refuse(name, "a positive integer")
        return value

    def wholes(self, name: str) -> tuple[int, ...]:
        """Read a list of integers that are not negative."""
        values = self.value(name)
        if not isinstance(values, list) or any(type(one) is not int or one < 0 for one in values):
            raise self.refuse(name, "a list of integers")
        return tuple(values)

    def number(self, name: str) -> float:
        value = self.value(name)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.refuse(name, "a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        """Read a truth value; absent means false."""
        value = self.values.get(name, False)
        if type(value) is not bool:
            raise self.refuse(name, "true or false")
        return value

    def indexes(self, name: str, below: int) -> tuple[int, ...]:
        """Read ascending indexes of layers of which there are `below`."""
        values = self.wholes(name)
        if any(one >= below for one in values) or sorted({*values}) != [*values]:
            raise self.refuse(name, f"ascending integers below {below}")
        return values

    def only(self, name: str, allowed: object) -> None:
        """Refuse any value but the one that the graphs are made for; absent means that one."""
        if self.values.get(name, allowed) not in (allowed, None):
            raise self.refuse(name, str(allowed))


def text_section(config: Config) -> Section:
    """Find the decoder's fields: until 4.51 transformers wrote them at the top level."""
    top = Section("", config, NormalizedTextConfig)
    return top.below("text_config") if "text_config" in config else top


def read_decoder(config: Config, **differences: Any) -> DecoderConfig:
    """Read the shape of the decoder, with the fields in which a family differs from Qwen2.5-VL."""
    top, text = Section("", config, NormalizedTextConfig), text_section(config)
    rotary = rotary_section(text)
    text.only("hidden_act", "silu")
    text.only("use_sliding_window", False)
    rotary.only("rope_type", "default")
    channels = differences.pop("mrope_section", None) or rotary.wholes("mrope_section")
    if len(channels) != 3:
        raise rotary.refuse("mrope_section", "three integers")
    shape = DecoderConfig(
        vocab_size=text.whole("vocab_size"),
        hidden_size=text.whole("hidden_size"),
        intermediate_size=text.whole("intermediate_size"),
        num_hidden_layers=text.whole("num_layers"),
        num_attention_heads=text.whole("num_attention_heads"),
        num_key_value_heads=text.whole("num_key_value_heads"),
        mrope_section=(channels[0], channels[1], channels[2]),
        rope_theta=rotary.number("rope_theta"),
        rms_norm_eps=text.number("rms_norm_eps"),
        tie_word_embeddings=top.flag("tie_word_embeddings") or text.flag("tie_word_embeddings"),
        **differences,
    )
    if "head_dim" not in text.values and shape.hidden_size % shape.num_attention_heads:
        raise text.refuse("num_attention_heads", f"a divisor of {shape.hidden_size}")
    if shape.num_attention_heads % shape.num_key_value_heads:
        raise text.refuse("num_key_value_heads", f"a divisor of {shape.num_attention_heads}")
    if sum(channels) * 2 != shape.turned:
        raise rotary.refuse("mrope_section", f"a sum of {shape.turned / 2:g}")
    return shape


def rotary_section(text: Section) -> Section:
    """Find the rotary fields with `rope_theta` and `rope_type`, as each version wrote them."""
    rotary = text.below("rope_parameters" if text.values.get("rope_parameters") else "rope_scaling")
    kind = rotary.values.get("rope_type") or rotary.values.get("type")
    values = {"rope_theta": text.values.get("rope_theta"), **rotary.values}
    # "mrope" is the old name of what every version does here: plain frequencies on three axes.
    return replace(rotary, values={**values, "rope_type": None if kind == "mrope" else kind})
