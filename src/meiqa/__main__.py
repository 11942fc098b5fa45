"""Run the command line as `python -m meiqa`."""

from __future__ import annotations

import sys

from meiqa.cli import main

sys.exit(main())
