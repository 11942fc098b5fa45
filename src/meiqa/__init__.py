"""Photo quality scores that are fine-grained, explained and on time.

>>> from meiqa import Budget, quality_word
>>> quality_word(4.4)
'excellent'

The public names are loaded on first use, so that `import meiqa` costs next to nothing.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from meiqa import errors

# ONNX Runtime reports to its maker from the moment it is loaded, unless it finds this.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

if TYPE_CHECKING:
    from meiqa.batches import scorer as scorer
    from meiqa.engine.asking import Question as Question
    from meiqa.engine.engine import Engine as Engine
    from meiqa.engine.estimates import quality_word as quality_word
    from meiqa.errors import *  # noqa: F403
    from meiqa.types import *  # noqa: F403

    __version__: str

_RESULTS = (
    "Answer Assessment Budget CulledPhoto Culling Detail Distortion Embedding Failure "
    "JpegQuality Neighbour PairComparison RankedPhoto Ranking Reference ShotComparison"
)
_MODULE_OF = {
    "Engine": "meiqa.engine.engine",
    "Question": "meiqa.engine.asking",
    "quality_word": "meiqa.engine.estimates",
    "scorer": "meiqa.batches",
    **{name: "meiqa.errors" for name, each in vars(errors).items() if isinstance(each, type)},
    **dict.fromkeys(_RESULTS.split(), "meiqa.types"),
}

if not TYPE_CHECKING:
    __all__ = sorted([*_MODULE_OF, "__version__"])


def _installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("meiqa")
    except PackageNotFoundError:  # a source tree on the path, not an installation
        return "0+uninstalled"


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            value: Any = _installed_version()
        elif name in _MODULE_OF:
            value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        else:
            raise AttributeError(f"module 'meiqa' has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
