"""optimum's TasksManager finds the families and can feed their graphs."""

from __future__ import annotations

import pytest
import torch
from optimum.exporters.tasks import TasksManager
from transformers import AutoModelForImageTextToText, PreTrainedModel

from meiqa.export.decoder import SharedPrefixDecoder
from meiqa.export.families import FAMILIES
from meiqa.export.tasks import EXPORTER, TASK
from tests.export.tiny_qwen import make_qwen2_5_vl, make_qwen3_vl


@pytest.mark.parametrize("model_type", sorted(f.model_type for f in FAMILIES.values()))
def test_a_family_is_registered(model_type: str) -> None:
    assert model_type in TasksManager.get_supported_model_type_for_task(TASK, EXPORTER)
    tasks = TasksManager.get_supported_tasks_for_model_type(
        model_type, EXPORTER, library_name="transformers"
    )
    assert list(tasks) == [TASK]


@pytest.mark.parametrize(
    "model", [make_qwen2_5_vl(), make_qwen3_vl()], ids=lambda m: m.config.model_type
)
def test_optimum_resolves_and_feeds_a_family(model: PreTrainedModel) -> None:
    config = model.config
    assert TasksManager.get_model_class_for_task(TASK, model_type=config.model_type) is (
        AutoModelForImageTextToText
    )
    constructor = TasksManager.get_exporter_config_constructor(
        EXPORTER, model_type=config.model_type, task=TASK, library_name="transformers"
    )
    exporter = constructor(config)
    assert exporter.outputs["logits"] == {0: "prefixes", 1: "rows", 2: "wanted"}
    feeds = exporter.generate_dummy_inputs(steps=4, rows=2)
    assert feeds.keys() == exporter.inputs.keys()
    decoder = SharedPrefixDecoder(FAMILIES[type(model).__name__].decoder(config.to_dict()))
    with torch.no_grad():
        logits, _, _ = decoder(*feeds.values())
    assert logits.shape == (2, 2, 4, config.text_config.vocab_size)
