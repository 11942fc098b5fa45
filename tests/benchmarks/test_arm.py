"""How `benchmarks.arm` reads a listing and an emulator's log."""

from __future__ import annotations

from pathlib import Path

from benchmarks.arm import inner_loop, instructions_in

LISTING = [
    (0x100, "ldr q0, [x0]"),
    (0x104, "sdot v1.4s, v2.16b, v0.4b[0]"),
    (0x108, "cbz x3, 120 <f>"),
    (0x10C, "b.ne 100 <f>"),
    (0x110, "ldr q0, [x0, #32]"),
    (0x114, "sdot v1.4s, v2.16b, v0.4b[0]"),
    (0x118, "sdot v3.4s, v2.16b, v0.4b[1]"),
    (0x11C, "b.cc 110 <f>"),
    (0x120, "ret"),
]
LOG = """\
IN: f
0x00000110:  3dc00000  ldr      q0, [x0]
0x00000114:  .byte      0x01, 0xe0, 0x82, 0x4f

Trace 0: 0x7f0ac9600100 [0000000000001001/0000000000000110/00000001/00000200] f
Trace 0: 0x7f0ac9600100 [0000000000001001/0000000000000110/00000001/00000200] f
IN: f
0x00000120:  d65f03c0  ret

Trace 0: 0x7f0ac9600200 [0000000000001001/0000000000000120/00000001/00000200] f
"""


def test_the_loop_with_most_products_and_no_branch_inside() -> None:
    assert inner_loop(LISTING, "sdot") == [text for _, text in LISTING[4:7]]


def test_instructions_are_those_of_each_block_as_often_as_it_ran(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(LOG)
    assert instructions_in(tmp_path / "log") == 5
