"""Write docs/api.md: every public name with its signature and docstring.

python scripts/api_docs.py
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import meiqa

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
HEAD = """# API reference

Made of the docstrings by `python scripts/api_docs.py`. A tutorial: [python.md](python.md).
"""


def page() -> str:
    """Give the text of the page."""
    public = {*vars(meiqa)["__all__"]} - {"__version__"}
    names = sorted(public, key=str.lower)
    return "\n".join([HEAD, *(entry(name, getattr(meiqa, name)) for name in names)])


def entry(name: str, thing: object) -> str:
    """Describe one public name, with its public methods if it is a class."""
    parts = [f"## {name}\n", described(name, thing)]
    if inspect.isclass(thing) and not issubclass(thing, Exception):
        for method, function in vars(thing).items():
            function = getattr(function, "__func__", function)
            if not method.startswith("_") and inspect.isfunction(function):
                parts += [f"### {name}.{method}\n", described(method, function)]
    return "\n".join(parts)


def described(name: str, thing: object) -> str:
    """Give a signature and a docstring as text."""
    doc = inspect.getdoc(thing) or ""
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return f"{doc}\n"
    signature = str(inspect.signature(thing))  # type: ignore[arg-type]
    # A default that is a function shows where it lies, which is elsewhere each time.
    signature = re.sub(r"<function \S+ at 0x[0-9a-f]+>", "...", signature)
    return f"```\n{name}{signature}\n\n{doc}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
