"""The families of checkpoints that can be exported, by architecture."""

from __future__ import annotations

from meiqa.export.families import conv_hybrid, llava_onevision, qwen2_5_vl, qwen3_5, qwen3_vl

FAMILIES = {
    family.architecture: family
    for family in (
        conv_hybrid.FAMILY,
        llava_onevision.FAMILY,
        qwen2_5_vl.FAMILY,
        qwen3_5.FAMILY,
        qwen3_vl.FAMILY,
    )
}
