"""Write tests/data/tiny anew: the random model, its packages and a memory of 24 anchors.

python -m tests.export.make_tiny            # needs PyTorch; after the exporter has changed
python -m tests.export.make_tiny --memory   # the memory alone, without PyTorch
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from meiqa.engine.package import EnginePackage
from tests.engine.samples import build_anchors

TINY = Path(__file__).parents[1] / "data" / "tiny"


def main() -> None:
    """Replace the committed files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", action="store_true", help="write the memory alone")
    if not parser.parse_args().memory:
        from tests.export import tiny

        shutil.rmtree(TINY, ignore_errors=True)
        TINY.mkdir(parents=True)
        tiny.write_models(TINY)
    shutil.rmtree(TINY / "anchors", ignore_errors=True)
    build_anchors(TINY / "anchors", EnginePackage.open(TINY / "fp32"))


if __name__ == "__main__":
    main()
