"""Figures laid out for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Column", "table_text"]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: of the rows.
        heading: above the column.
        form: how numbers are written, as ".3f"; none for words, which stand to the left.
    """

    key: str
    heading: str
    form: str = ""

    def cell(self, row: Mapping[str, Any]) -> str:
        """Write a row's value; what is missing or not a number stays blank."""
        value = row.get(self.key)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        return format(value, self.form)

    def column(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Write heading and cells, all of one width."""
        cells = [self.heading, *(self.cell(row) for row in rows)]
        width = max(len(cell) for cell in cells)
        return [cell.rjust(width) if self.form else cell.ljust(width) for cell in cells]


def table_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """Lay out rows under their headings.

    >>> print(table_text([{"name": "a", "srcc": 0.5}], [Column("name", "name"),
    ...                                                 Column("srcc", "SRCC", ".3f")]))
    name   SRCC
    a     0.500
    """
    written = [column.column(rows) for column in columns]
    return "\n".join("  ".join(line).rstrip() for line in zip(*written, strict=True))
