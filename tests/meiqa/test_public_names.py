"""What other people's code may rely on."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib.metadata import version

import pytest

import meiqa
from meiqa import errors, types


def test_public_names_are_pinned() -> None:
    assert meiqa.__all__ == [
        "AccessDenied",
        "Answer",
        "AnswerNotFinite",
        "AnswerUnreadable",
        "Assessment",
        "Budget",
        "CulledPhoto",
        "Culling",
        "DecodeError",
        "Detail",
        "DeviceUnavailable",
        "Distortion",
        "Embedding",
        "Engine",
        "Failure",
        "ImageError",
        "ImageTooLarge",
        "ImageTooSmall",
        "JpegQuality",
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
        "PhotoUnreachable",
        "Question",
        "RankedPhoto",
        "Ranking",
        "Reference",
        "SchemaUnsupported",
        "ServiceError",
        "ServiceUnreachable",
        "ShotComparison",
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
        "scorer",
    ]


@pytest.mark.parametrize("name", meiqa.__all__)
def test_every_name_resolves(name: str) -> None:
    assert getattr(meiqa, name) is not None
    assert name in dir(meiqa)


def test_every_error_is_public() -> None:
    tree = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.MeiqaError)
    }
    assert tree <= set(meiqa.__all__)
    assert all(name in (errors.__doc__ or "") for name in tree)


def test_names_are_the_same_objects_everywhere() -> None:
    assert meiqa.Budget is types.Budget
    assert meiqa.DecodeError is errors.DecodeError


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Score'"):
        _ = meiqa.Score


def test_version_is_the_installed_one() -> None:
    assert meiqa.__version__ == version("meiqa")


@pytest.mark.parametrize(
    "statement",
    [
        "import meiqa",
        "import meiqa.cli; meiqa.cli.main(['-h'])",
        "import meiqa.types, meiqa.errors",
    ],
)
def test_import_and_help_load_nothing_heavy(statement: str) -> None:
    heavy = ["numpy", "numba", "onnxruntime", "PIL", "scipy", "tokenizers", "meiqa.cli.options"]
    check = f"import sys\n{statement}\nsys.exit(' '.join(set({heavy}) & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_result_of_a_public_method_is_public() -> None:
    results = {
        name
        for name, value in vars(types).items()
        if inspect.isclass(value) and issubclass(value, types.Result) and value is not types.Result
    }
    assert results <= set(meiqa.__all__)
