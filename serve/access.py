"""Who may ask for what, and for how much: keys with scopes, kept as hashes, and limits.

A key file has one line for each key, made by `meiqa api-key`::

    # name        scopes               SHA-256 of the key
    phone-app     score                sha256:9f86d081884c7d65…
    curator       score,memory:write   sha256:60303ae22b998861…

Empty lines and those that begin with # are passed over. A key is 32 random bytes, so one SHA-256
hides it as well as any slower hash would.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import os
import re
import secrets
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, cast, get_args
from urllib.parse import SplitResult, urlsplit

from meiqa.errors import AccessDenied, KeyRequired, UsageError

Scope = Literal["score", "memory:write"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HOST = re.compile(r"([a-z0-9-]+\.)*[a-z0-9-]+(:[0-9]{1,5})?|\[[0-9a-f:.]+\](:[0-9]{1,5})?")
_HASH = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Key:
    """One who may use the service; `digest` is "sha256:" and the key's hash in hexadecimal."""

    name: str
    scopes: frozenset[Scope]
    digest: str


@dataclass(frozen=True)
class Keys:
    """Everybody who may use the service."""

    keys: tuple[Key, ...]

    @classmethod
    def read(cls, path: str | Path) -> Keys:
        """Read a key file.

        Raises:
            UsageError: it cannot be read, a line makes no sense, or it holds no key.
        """
        try:
            lines = Path(path).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise UsageError(f"the key file {path} cannot be read: {reason}") from None
        numbered = enumerate((line.strip() for line in lines), 1)
        keys = tuple(
            _key(line, f"{path}, line {number}")
            for number, line in numbered
            if line and not line.startswith("#")
        )
        if not keys:
            raise UsageError(
                f"the key file {path} holds no key",
                hint=f"meiqa api-key NAME --file {path} makes one",
            )
        if len({key.name for key in keys}) < len(keys):
            raise UsageError(f"{path} names a key twice", hint="remove one of the lines")
        return cls(keys)

    def allow(self, scope: Scope) -> bool:
        """Tell whether anybody has a scope."""
        return any(scope in key.scopes for key in self.keys)


@dataclass(frozen=True)
class Settings:
    """Limits of the service; `Settings()` serves whoever reaches it on the loopback interface."""

    budget_ms: float = 2000.0  # for a photo, waiting included, where a request names none
    max_budget_ms: float = 60_000.0
    reserve_ms: float | None = None
    """Time kept for every photo that waits, so what its answer is worth under load; by default the
    least that the engine finds worth doing."""
    margin_ms: float = 20.0  # kept back of every budget for the way of the answer
    max_waiting: int = 128
    max_requests: int = 128  # at once, those that are being uploaded included
    max_upload_bytes: int = 32 << 20  # of one request
    max_held_bytes: int = 512 << 20  # of all uploads together
    max_photos: int = 64  # of one ranking
    upload_s: float = 30.0
    keys: Keys | None = None  # without, anybody may score and nobody may write
    origins: tuple[str, ...] = ()
    """Sites whose pages may ask, as `https://app.example`; see `require_origin`."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not (math.isfinite(value) and value > 0):
                raise UsageError(
                    f"{field.name} must be positive", seen=value, allowed="a number above 0"
                )
        if self.budget_ms > self.max_budget_ms:
            raise UsageError(
                "the usual budget is longer than the longest",
                seen=f"{self.budget_ms:g} ms",
                allowed=f"at most {self.max_budget_ms:g} ms",
            )


def authorise(keys: Keys | None, token: str | None, scope: Scope | None = None) -> Key | None:
    """Let a caller do something, and give whose token it has; None where there are no keys.

    All keys are compared, each in constant time.

    Raises:
        KeyRequired: there are keys, but no token, or nobody has it.
        AccessDenied: whoever has it lacks the scope, or without keys it is for writing.
    """
    if keys is None:
        if scope == "memory:write":
            raise AccessDenied(
                "without keys nobody writes to the memory over HTTP",
                hint="meiqa api-key NAME --scopes score,memory:write; meiqa serve --api-key-file",
            )
        return None
    if not token:
        raise KeyRequired("this service asks for a key", hint="Authorization: Bearer KEY")
    digest = _digest(token)
    found = [key for key in keys.keys if hmac.compare_digest(key.digest, digest)]
    if not found:
        raise KeyRequired("nobody has this key", hint="check the key; it is not shown here")
    if scope is not None and scope not in found[0].scopes:
        raise AccessDenied(
            "the key lacks the scope that this takes",
            seen=",".join(sorted(found[0].scopes)),
            allowed=scope,
        )
    return found[0]


def _key(line: str, where: str) -> Key:
    parts = line.split()
    if len(parts) != 3 or not _NAME.fullmatch(parts[0]) or not _HASH.fullmatch(parts[2]):
        # The line itself is not shown: somebody may have written a key into it.
        raise UsageError(
            f"{where}: not a key", allowed="NAME SCOPES sha256:HASH", hint="meiqa api-key makes one"
        )
    return Key(parts[0], _scopes(parts[1].split(","), where), parts[2])


def _scopes(names: Iterable[str], where: str) -> frozenset[Scope]:
    chosen = set(names)
    if not chosen or not chosen <= set(SCOPES):
        raise UsageError(
            f"{where}: unknown scope", seen=",".join(sorted(chosen)), allowed=", ".join(SCOPES)
        )
    return cast("frozenset[Scope]", frozenset(chosen))


def _digest(token: str) -> str:
    return "sha256:" + hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def add_key(path: str | Path, name: str, scopes: Iterable[str]) -> str:
    """Make a key, add its hash to a file, and give the key, which is kept nowhere.

    Raises:
        UsageError: name or scopes make no sense, the name is taken, or the file is not writable.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            "a key's name is short and plain", seen=name, allowed="letters, digits, . _ -, up to 64"
        )
    chosen = _scopes(scopes, name)
    file = Path(path)
    if file.exists() and file.stat().st_size and name in {key.name for key in Keys.read(file).keys}:
        raise UsageError(f"{file} has a key of this name", seen=name, hint="choose another")
    token = "meiqa_" + secrets.token_urlsafe(32)
    line = f"{name} {','.join(sorted(chosen))} {_digest(token)}\n"
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "rb+") as stream:
            before = stream.read()
            whole = b"" if not before or before.endswith(b"\n") else b"\n"
            stream.write(whole + line.encode())
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}") from None
    return token


def is_loopback(host: str) -> bool:
    """Tell whether a host's name or address is this machine's own.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_origin(origin: str) -> str:
    """Give an origin as browsers write it, or raise UsageError: scheme, host and port alone.

    >>> require_origin("https://app.example")
    'https://app.example'
    """
    parts = _parts(origin)
    plain = f"{parts.scheme}://{parts.netloc}"
    usual = {"http": ":80", "https": ":443"}.get(parts.scheme, "")
    if (
        parts.scheme not in ("http", "https")
        or plain != origin
        or not _HOST.fullmatch(parts.netloc)
        or (usual and parts.netloc.endswith(usual))
    ):
        raise UsageError(
            "not the origin of a site",
            seen=origin[:100],
            allowed="scheme, host and port as browsers send them, in small letters: "
            "https://app.example, http://localhost:5173",
            hint="without a path, * or the scheme's usual port",
        )
    return origin


def refuse_other_sites(
    host: str | None, origin: str | None, allowed: Collection[str] = (), remedy: str | None = None
) -> None:
    """Refuse what only another site's page would send to a service without keys.

    Args:
        host: the request's Host; a name that was made to point at this machine is not its own.
        origin: the request's Origin; pages of other sites are none of ours, unless they are
            allowed.
        remedy: what makes the service answer to other machines, too.

    Raises:
        AccessDenied: it does not come from this machine, or from a page of this service.
    """
    if not host or not is_loopback(_parts(f"//{host}").hostname or ""):
        raise AccessDenied(
            "this service answers to its own machine only",
            seen=f"Host: {host}",
            allowed="localhost, 127.0.0.1 or [::1]",
            hint=remedy,
        )
    if origin is not None and _parts(origin).netloc != host and origin not in allowed:
        raise AccessDenied(
            "this service answers to no other site's pages",
            seen=f"Origin: {origin}",
            allowed=", ".join(allowed) or None,
        )


def _parts(url: str) -> SplitResult:
    """Take a URL apart; one that makes no sense has no parts."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
