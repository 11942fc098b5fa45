"""Roots of Debian, unpacked without running anything in them: to build against, and to run in.

A root of another architecture is run by QEMU. Linux hands the emulator's programs to it within a
namespace of one's own (6.7 or newer, or where binfmt_misc knows the emulator already), so the
machine stays as it is. There is no network inside, and no /sys: it tells of this machine's
processor, by which ONNX Runtime in a root of another architecture fails.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_LIBRARIES = ("lib", "lib64", "usr/lib")
_REGISTERED = "/proc/sys/fs/binfmt_misc/qemu-{}"
_EMULATOR = "/usr/lib/binfmt.d/qemu-{}.conf"
_EMULATED = {"QEMU_CPU": "cortex-a76"}
"""The processor of a Raspberry Pi 5; a Jetson Orin's is much like it."""
_ENTER = """set -e
if [ {machine} != "$(uname -m)" ] && [ ! -e {registered} ]; then
  mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
  [ -e {registered} ] || cat {emulator} > /proc/sys/fs/binfmt_misc/register
fi
for each in proc dev; do mkdir -p {root}/$each; mount --rbind /$each {root}/$each; done
exec chroot {root} /usr/bin/env -i {words}
"""


@dataclass(frozen=True)
class Architecture:
    """A kind of processor: as Linux, and as Debian calls it."""

    machine: str
    debian: str

    @property
    def triple(self) -> str:
        return f"{self.machine}-linux-gnu"


X86_64 = Architecture("x86_64", "amd64")
AARCH64 = Architecture("aarch64", "arm64")


@dataclass(frozen=True)
class Root:
    """A folder that holds a release of Debian."""

    path: Path
    architecture: Architecture

    def run(self, command: Sequence[str | Path], variables: Mapping[str, str] = {}) -> str:
        """Run a command inside, without network; give what it prints.

        Raises:
            CalledProcessError: it failed; its `stderr` says why.
        """
        machine = self.architecture.machine
        given = [f"{name}={value}" for name, value in (_EMULATED | dict(variables)).items()]
        entered = _ENTER.format(
            machine=machine,
            registered=_REGISTERED.format(machine),
            emulator=_EMULATOR.format(machine),
            root=shlex.quote(str(self.path)),
            words=shlex.join(["PATH=/usr/bin:/bin", "HOME=/root", *given, *map(str, command)]),
        )
        apart = ("--user", "--map-root-user", "--mount", "--net", "--fork")
        words = ("unshare", *apart, "sh", "-c", entered)
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def unpacked(path: Path, architecture: Architecture, release: str, *packages: str) -> Root:
    """Unpack packages of a release with all that they need, unless the folder is there already.

    Links become relative, so that they lead to the same place from outside.

    Raises:
        CalledProcessError: mmdebstrap failed, as it does without network; its `stderr` says why.
    """
    if not path.is_dir():
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.mkdir(parents=True)
        wanted = f"--architectures={architecture.debian}", f"--include={','.join(packages)}"
        source = f"deb {mirror()} {release} main"
        words = ("mmdebstrap", "--quiet", "--variant=extract", *wanted, release, unfinished, source)
        subprocess.run(words, check=True, capture_output=True, text=True)
        _link_by_relative_paths(unfinished)
        unfinished.rename(path)
    return Root(path, architecture)


def mirror() -> str:
    """Give the address that this machine fetches Debian's packages from.

    Raises:
        CalledProcessError: apt does not say.
        ValueError: it fetches none.
    """
    wanted = ("indextargets", "--format", "$(REPO_URI)", "Created-By: Packages")
    told = subprocess.run(("apt-get", *wanted), check=True, capture_output=True, text=True).stdout
    addresses = [each for each in told.split() if "security" not in each]
    if not addresses:
        raise ValueError("apt has no source of packages: see `man sources.list`")
    return addresses[0]


def _link_by_relative_paths(root: Path) -> None:
    for name in ("bin", "sbin", "lib", "lib64"):  # newer releases have these below usr alone
        if (root / "usr" / name).exists() and not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
    for link in _links(root):
        target = os.readlink(link)
        if os.path.isabs(target):
            link.unlink()
            link.symlink_to(os.path.relpath(root / target[1:], link.parent))


def _links(root: Path) -> Iterator[Path]:
    for folder in _LIBRARIES:
        if not (root / folder).is_symlink():
            yield from [each for each in (root / folder).rglob("*") if each.is_symlink()]
