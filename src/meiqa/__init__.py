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

# ONNX Runtime reports to its maker from the moment it is loaded, unless it finds this.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

if TYPE_CHECKING:
    from meiqa.engine.pipeline import Engine
    from meiqa.errors import (
        AccessDenied,
        AnswerNotFinite,
        AnswerUnreadable,
        DecodeError,
        DeviceUnavailable,
        ImageError,
        ImageTooLarge,
        ImageTooSmall,
        KeyRequired,
        MeiqaError,
        OutputUnwritable,
        Overloaded,
        PackageCorrupted,
        PackageError,
        PackageNotFound,
        PackageUnwritable,
        SchemaUnsupported,
        ServiceError,
        ServiceUnreachable,
        StoreCorrupted,
        StoreError,
        StoreLocked,
        StoreMismatch,
        StoreNotFound,
        StoreUnwritable,
        UploadTooLarge,
        UsageError,
    )
    from meiqa.types import (
        Assessment,
        Budget,
        Failure,
        Neighbour,
        PairComparison,
        quality_word,
    )

    __version__: str

__all__ = [
    "AccessDenied",
    "AnswerNotFinite",
    "AnswerUnreadable",
    "Assessment",
    "Budget",
    "DecodeError",
    "DeviceUnavailable",
    "Engine",
    "Failure",
    "ImageError",
    "ImageTooLarge",
    "ImageTooSmall",
    "KeyRequired",
    "MeiqaError",
    "Neighbour",
    "OutputUnwritable",
    "Overloaded",
    "PackageCorrupted",
    "PackageError",
    "PackageNotFound",
    "PackageUnwritable",
    "PairComparison",
    "SchemaUnsupported",
    "ServiceError",
    "ServiceUnreachable",
    "StoreCorrupted",
    "StoreError",
    "StoreLocked",
    "StoreMismatch",
    "StoreNotFound",
    "StoreUnwritable",
    "UploadTooLarge",
    "UsageError",
    "__version__",
    "quality_word",
]

_TYPES = {"Assessment", "Budget", "Failure", "Neighbour", "PairComparison", "quality_word"}


def _module_of(name: str) -> str:
    if name == "Engine":
        return "meiqa.engine.pipeline"
    return "meiqa.types" if name in _TYPES else "meiqa.errors"


def _installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("meiqa")
    except PackageNotFoundError:  # a source tree on the path, not an installation
        return "0+uninstalled"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'meiqa' has no attribute {name!r}")
    if name == "__version__":
        value: Any = _installed_version()
    else:
        value = getattr(importlib.import_module(_module_of(name)), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
