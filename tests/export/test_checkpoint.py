"""Checkpoints: read back as written, refused in one clear line when they are something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from meiqa.errors import PackageCorrupted, PackageError, PackageNotFound
from meiqa.export.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    StoredWeights,
    digest_of,
    give_weights,
    local_folder,
    weightless,
)
from meiqa.export.families.conv_hybrid import FAMILY
from training.checkpoint import load_checkpoint, save_checkpoint


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
        Checkpoint.open(folder)
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


def test_a_model_read_back_can_be_trained_on(checkpoint: Path) -> None:
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


@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], [{}], [], None])
def test_another_architecture_is_refused(folder: Path, architectures: list[str] | None) -> None:
    rewrite_config(folder, lambda config: config.update(architectures=architectures))
    message = refusal(folder, PackageCorrupted)
    assert str((architectures or ["none"])[0]) in message
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
    assert "does not hold the weights of Meiqa" in refusal(folder, PackageCorrupted)


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


def sharded(folder: Path, count: int = 3) -> list[str]:
    """Split the weights into shards with an index; the shards' names."""
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(count)]
    places = {name: names[index % count] for index, name in enumerate(weights)}
    for shard in names:
        save_file({n: w for n, w in weights.items() if places[n] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return names


def test_shards_hold_what_one_file_holds(checkpoint: Path, folder: Path) -> None:
    sharded(folder)
    whole, parts = StoredWeights.open(checkpoint, FAMILY), StoredWeights.open(folder, FAMILY)
    assert set(whole) == set(parts)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, atol=0, rtol=0)
    Checkpoint.open(folder)
    assert digest_of(folder) != digest_of(checkpoint)


def test_a_lacking_shard_is_named(folder: Path) -> None:
    lost = sharded(folder)[1]
    (folder / lost).unlink()
    assert lost in refusal(folder, PackageNotFound)


@pytest.mark.parametrize("kept", [0, 7, 300, -1])
def test_a_truncated_shard_is_named(folder: Path, kept: int) -> None:
    cut = folder / sharded(folder)[2]
    cut.write_bytes(cut.read_bytes()[:kept])
    assert cut.name in refusal(folder, PackageCorrupted)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(folder: Path, text: str) -> None:
    sharded(folder)
    (folder / INDEX).write_text(text)
    assert INDEX in refusal(folder, PackageCorrupted)


def test_pickled_weights_are_not_looked_at(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    assert SINGLE in refusal(folder, PackageNotFound)


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("model.layers.0.mlp.up_proj.weight", "language_model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "language_model.norm.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("visual.merger.mlp.0.bias", "visual.merger.mlp.0.bias"),
        ("model.visual.merger.mlp.0.bias", "visual.merger.mlp.0.bias"),
    ],
)
def test_the_layouts_of_all_releases_are_one(stored: str, name: str, tmp_path: Path) -> None:
    save_file({stored: torch.zeros(2)}, tmp_path / SINGLE)
    assert list(StoredWeights.open(tmp_path, FAMILY)) == [name]


@pytest.mark.parametrize("held_bytes", [0, 1 << 30])
def test_weights_are_held_only_where_they_fit(held_bytes: int) -> None:
    with weightless():
        module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    assert all(parameter.is_meta for parameter in module.parameters())
    real = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    give_weights(module, lambda name: real.state_dict()[name], held_bytes)
    x = torch.randn(4, 3)
    with torch.no_grad():
        torch.testing.assert_close(module(x), real(x), atol=0, rtol=0)
    assert all(parameter.is_meta == (held_bytes == 0) for parameter in module.parameters())


def test_an_output_layer_that_is_stored_counts_although_it_is_said_to_be_tied(
    folder: Path,
) -> None:
    embedding = load_file(folder / SINGLE)["model.language_model.embed_tokens.weight"]
    assert json.loads((folder / "config.json").read_text())["text_config"]["tie_word_embeddings"]
    tied = Checkpoint.open(folder).decoder_weight("lm_head.weight")
    torch.testing.assert_close(tied, embedding.float(), atol=0, rtol=0)
    rewrite_weights(folder, lambda weights: weights.update({"lm_head.weight": embedding + 1}))
    own = Checkpoint.open(folder).decoder_weight("lm_head.weight")
    torch.testing.assert_close(own, (embedding + 1).float(), atol=0, rtol=0)


def test_processing_in_the_file_of_transformers_5(folder: Path, checkpoint: Path) -> None:
    processing = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    new = folder / "processor_config.json"
    new.write_text(json.dumps({"image_processor": processing}))
    assert Checkpoint.open(folder).image == Checkpoint.open(checkpoint).image
    new.write_text("{}")
    assert "image_processor" in refusal(folder, PackageCorrupted)


@pytest.mark.parametrize(
    "bounds",
    [{"min_pixels": "abc"}, {"max_pixels": 2.5}, {"max_pixels": 1000}, {"min_pixels": 10**9}],
    ids=str,
)
def test_bounds_of_the_area_that_make_no_sense(folder: Path, bounds: dict[str, object]) -> None:
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **bounds}))
    with pytest.raises(PackageCorrupted, match="area"):
        _ = Checkpoint.open(folder).image


def test_limits_of_the_tokenizer_are_lifted(folder: Path) -> None:
    tokenizer = Checkpoint.open(folder).tokenizer
    long = "Overall good quality. " * 50
    whole = tokenizer.encode(long).ids
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=2000)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert Checkpoint.open(folder).tokenizer.encode(long).ids == whole


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{"])
def test_a_tokenizer_that_is_no_text(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    assert "tokenizer.json" in refusal(folder, PackageCorrupted)


def test_a_hub_id_is_downloaded(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(checkpoint))
    assert local_folder("some/model") == checkpoint
    assert local_folder(str(checkpoint)) == checkpoint
