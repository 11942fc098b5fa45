"""Checkpoints: read back as written, refused in one clear line when they are something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from meiqa.errors import PackageCorrupted, PackageError, PackageNotFound
from meiqa.export.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """Give a copy that may be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def rewrite_config(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def refusal(folder: Path, kind: type[PackageError]) -> str:
    with pytest.raises(kind) as caught:
        load_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_round_trip_keeps_every_weight(checkpoint: Path, tmp_path: Path) -> None:
    first = load_checkpoint(checkpoint)
    save_checkpoint(first, tmp_path / "again")
    second = load_checkpoint(tmp_path / "again")
    assert first.model.visual.config == second.model.visual.config
    assert first.model.language_model.config == second.model.language_model.config
    assert (first.pixel_mean, first.pixel_std) == (second.pixel_mean, second.pixel_std)
    assert first.tokenizer.to_str() == second.tokenizer.to_str()
    for name, weight in first.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], weight, atol=0, rtol=0)


def test_a_loaded_model_is_ready_to_export(checkpoint: Path) -> None:
    model = load_checkpoint(checkpoint).model
    assert not model.training
    assert model.language_model.lm_head.weight is model.language_model.embed_tokens.weight


def test_weights_are_stored_in_half_precision_and_once(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    assert "model.language_model.lm_head.weight" not in weights
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float16}


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"]
)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert name in refusal(folder, PackageNotFound)


@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], [], None])
def test_another_architecture_is_refused(folder: Path, architectures: list[str] | None) -> None:
    rewrite_config(folder, lambda config: config.update(architectures=architectures))
    message = refusal(folder, PackageCorrupted)
    assert (architectures or ["none"])[0] in message
    assert "MeiqaConvHybrid" in message


def test_a_weight_too_many_is_named(folder: Path) -> None:
    rewrite_weights(folder, lambda weights: weights.update({"model.extra": torch.zeros(2)}))
    assert "extra" in refusal(folder, PackageCorrupted)


@pytest.mark.parametrize("name", ["norm.weight", "embed_tokens.weight"])
def test_a_lacking_weight_is_named(folder: Path, name: str) -> None:
    rewrite_weights(folder, lambda weights: weights.__delitem__(f"model.language_model.{name}"))
    assert name in refusal(folder, PackageCorrupted)


def test_foreign_weights_are_refused(folder: Path) -> None:
    save_file({"transformer.wte.weight": torch.zeros(4, 4)}, folder / "model.safetensors")
    assert "does not hold this architecture's weights" in refusal(folder, PackageCorrupted)


def test_a_weight_of_another_shape_is_refused(folder: Path) -> None:
    name = "model.language_model.norm.weight"
    rewrite_weights(folder, lambda weights: weights.update({name: torch.ones(65).half()}))
    assert "norm.weight" in refusal(folder, PackageCorrupted)


def test_weights_that_are_not_safetensors_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"pickled, perhaps")
    assert "model.safetensors" in refusal(folder, PackageCorrupted)


@pytest.mark.parametrize("text", ["{", "[1]", "{}"])
def test_a_config_that_is_not_one_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert str(folder) in refusal(folder, PackageCorrupted)


def test_config_keys_that_are_unknown_or_lacking_are_refused(folder: Path) -> None:
    rewrite_config(folder, lambda config: config["text_config"].update(experts=8))  # type: ignore[attr-defined]
    assert "experts" in refusal(folder, PackageCorrupted)
    rewrite_config(folder, lambda config: config.__delitem__("text_config"))
    assert "text_config" in refusal(folder, PackageCorrupted)


def test_a_tokenizer_that_is_not_one_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in refusal(folder, PackageCorrupted)
