"""How the training commands end: a known error is one line, not a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from meiqa.errors import MeiqaError, one_line

REFUSED, INTERRUPTED = 2, 130
"""Exit statuses."""


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command and exit: 0 when it returns, 2 on a known error, 130 on Ctrl-C."""
    try:
        main()
    except (MeiqaError, OSError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(REFUSED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit()
