"""Every error that meiqa raises on purpose, in one tree.

MeiqaError
├── ImageError: AnswerNotFinite, AnswerUnreadable, DecodeError (PhotoUnreachable),
│               ImageTooLarge, ImageTooSmall
├── PackageError: PackageNotFound, PackageCorrupted, PackageUnwritable, SchemaUnsupported
├── StoreError: StoreNotFound, StoreCorrupted, StoreLocked, StoreUnwritable, StoreMismatch
├── ServiceError: AccessDenied (KeyRequired), Overloaded, UploadTooLarge, ServiceUnreachable
├── DeviceUnavailable
├── OutputUnwritable
└── UsageError
"""

# The names say what happened; a suffix would say "error" twice.
# ruff: noqa: N818

from __future__ import annotations

import os

TENSORRT_EXTRA = "tensorrt" if os.uname().machine == "aarch64" else "rtx"
"""What `--device tensorrt` needs; on aarch64 TensorRT itself is JetPack's, not pip's."""


def install_hint(extra: str) -> str:
    """Give the command that installs an extra of this very installation.

    A wheel from an index is named; one that was installed from a folder or a file, such as a
    checkout, is no index's to serve and is named by its place.

    >>> install_hint("index").startswith("pip install ")
    True
    """
    # What few errors need would be a tenth of what `meiqa --help` imports.
    import json
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import unquote, urlsplit

    try:
        record = json.loads(distribution("meiqa").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:  # a source tree on the path, not an installation
        record = {}
    url = record.get("url")
    if url is None:
        return f"pip install 'meiqa[{extra}]'"
    if "dir_info" in record:
        editable = "-e " if record["dir_info"].get("editable") else ""
        return f"pip install {editable}'{unquote(urlsplit(url).path)}[{extra}]'"
    return f"pip install 'meiqa[{extra}] @ {url}'"


def one_line(text: str) -> str:
    """Escape what would break a line or a terminal: newlines, controls, lone surrogates."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode()
        for char in text
    )


class MeiqaError(Exception):
    """What happened, the value seen, what is allowed and what to do, as one line.

    Args:
        what: What happened, naming the file or the option concerned.
        seen: The value that caused it.
        allowed: What would have been accepted.
        hint: What to do next, if possible as a command.

    >>> str(MeiqaError("unknown device", seen="tpu", allowed="cpu, cuda", hint="use --device cpu"))
    'unknown device; got tpu; allowed: cpu, cuda; use --device cpu'
    """

    retryable = False
    """Whether the same call can succeed later without anything being changed."""

    def __init__(
        self,
        what: str,
        *,
        seen: object | None = None,
        allowed: object | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.seen = seen
        self.allowed = allowed
        self.hint = hint

    def __str__(self) -> str:
        parts = [self.what]
        if self.seen is not None:
            parts.append(f"got {self.seen}")
        if self.allowed is not None:
            parts.append(f"allowed: {self.allowed}")
        if self.hint is not None:
            parts.append(self.hint)
        return one_line("; ".join(parts))


class ImageError(MeiqaError):
    """The image cannot be judged."""


class AnswerNotFinite(ImageError):
    """What the model computes about the image is not a number, or infinite."""


class AnswerUnreadable(ImageError):
    """What the model answers about the image is none of what it was asked for."""


class DecodeError(ImageError):
    """The source is missing, unreadable, truncated, empty or not an image."""


class PhotoUnreachable(DecodeError):
    """The storage of the source did not answer, or let nobody in; the photo may be a good one."""

    retryable = True


class ImageTooLarge(ImageError):
    """The image's header announces more pixels than the limit."""


class ImageTooSmall(ImageError):
    """The image has too few pixels to be judged."""


class PackageError(MeiqaError):
    """The engine package cannot be used."""


class PackageNotFound(PackageError):
    """There is no engine package at the path."""


class PackageCorrupted(PackageError):
    """A file of the engine package is missing or has the wrong digest."""


class PackageUnwritable(PackageError):
    """The place of the package is read-only, forbidden or full."""


class SchemaUnsupported(PackageError):
    """The manifest has a schema version that this meiqa does not read."""


class StoreError(MeiqaError):
    """The memory cannot be used."""


class StoreNotFound(StoreError):
    """There is no memory at the path."""


class StoreCorrupted(StoreError):
    """A segment or a record of the memory cannot be trusted."""


class StoreLocked(StoreError):
    """Another process is writing to the memory."""

    retryable = True


class StoreUnwritable(StoreError):
    """The place of the memory is read-only, forbidden or full."""


class StoreMismatch(StoreError):
    """The memory was built with another engine package."""


class DeviceUnavailable(MeiqaError):
    """The device asked for is not there."""


class ServiceError(MeiqaError):
    """The service did not do what it was asked to.

    Attributes:
        retry_after_s: when the service expects to have time, None where it does not say.
    """

    retry_after_s: float | None = None


class AccessDenied(ServiceError):
    """The key lacks the scope, or the caller may not ask at all."""


class KeyRequired(AccessDenied):
    """There is no key, or nobody has it."""


class Overloaded(ServiceError):
    """An answer would come too late, so none is begun."""

    retryable = True


class UploadTooLarge(ServiceError):
    """The request has more bytes, or more photos, than the service takes."""


class ServiceUnreachable(ServiceError):
    """No answer came: no connection, a broken one, or a timeout."""

    retryable = True


class OutputUnwritable(MeiqaError):
    """The place of a file of results is read-only, forbidden or full."""


class UsageError(MeiqaError):
    """An option, an argument or a label table makes no sense."""
