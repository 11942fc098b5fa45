"""Remembered photos: what is known of one, how it is stored, and an immutable version of many.

Keys are stored as unit vectors in float16, visual tokens in int8 with a scale per token. A version
holds the cases of one origin as they were when it was written: a segment with their vectors and a
database with their records. Its rows are in the order of the cases' ids, so that a smaller row is a
smaller id. Every case is checked against its digest when it is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from meiqa.errors import StoreCorrupted, UsageError
from meiqa.memory import database
from meiqa.memory.database import AMONG, REBUILD, Identity, Widths
from meiqa.memory.segment import Array, Segment
from meiqa.types import Origin

FloatArray: TypeAlias = NDArray[np.float32]
Floats: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]
Rows: TypeAlias = NDArray[np.intp]

ORIGINS: tuple[Origin, ...] = ("anchor", "contrast")
DIGEST_BYTES = 8
REGRESSION = "regression"
VECTOR_DTYPES = ("<f2", "|i1", "<f4")
"""Of keys, levels of tokens and scales in a database."""

FEWEST_PHOTOS = 50
MOST_PHOTOS = 4096
"""More photographs tell little more, and a fit takes time that grows with their number."""

_LEVELS = 127
_SMALLEST_PEAK = np.float32(1e-30)
_PENALTIES = tuple(float(penalty) for penalty in np.logspace(-2, 5, 29))
_MOST_STRETCH = 2.0  # what features that tell nothing hardly set apart is not blown up
_LEAST_ERROR = 0.1  # of the deviation: nobody is known better by a luckier guess
_MOST_DOUBT = 0.9  # of its logarithm: between .4 and 2.5 times the usual


@dataclass(frozen=True, eq=False)
class Case:
    """A photo with a known score, as the memory gives it back.

    Attributes:
        id: Unique within its origin; ties in retrieval are broken by it.
        origin: "anchor" (a human score, read-only) or "contrast" (learned online).
        image_digest: Digest of the pixels, hexadecimal.
        score: 1.00–5.00, higher is better.
        std: Standard deviation of the score, in the same unit.
        summary: What was written about the photo's quality; may be empty.
        key: float32 (D_key,). Stored as a unit vector in float16: its length is not kept.
        tokens: float32 (T, D) visual tokens. Stored in int8 with one scale per token.
        grid: Rows and columns of visual tokens, T in all.
        device: Which device it was learned or added on; empty for this one.
    """

    id: str
    origin: Origin
    image_digest: str
    score: float
    std: float
    summary: str
    key: FloatArray
    tokens: FloatArray
    grid: tuple[int, int]
    device: str = ""


def check_case(case: Case, origin: Origin, widths: Widths) -> None:
    """Refuse with UsageError a case that could not be stored, or not be found again."""
    name = f"case {case.id!r}"
    if case.origin != origin:
        raise UsageError(f"{name} has the wrong origin", seen=case.origin, allowed=origin)
    if not case.id or not case.image_digest:
        raise UsageError("a case needs an id and an image digest", seen=case.id or "an empty id")
    if not 1.0 <= case.score <= 5.0:
        hint = "map the label to the 1-5 scale first"
        what = f"{name} has a score off the scale"
        raise UsageError(what, seen=case.score, allowed="1.0 to 5.0", hint=hint)
    if not (math.isfinite(case.std) and case.std >= 0.0):
        raise UsageError(f"{name} has no valid std", seen=case.std, allowed="a finite number >= 0")
    cells = len(case.tokens)
    for what, array, shape in (
        ("key", case.key, (widths.key,)),
        ("tokens", case.tokens, (cells, widths.token)),
    ):
        if array.shape != shape:
            what = f"{name} has {what} of the wrong shape"
            raise UsageError(what, seen=array.shape, allowed=shape)
        if not np.isfinite(array).all():
            raise UsageError(f"{name} has {what} that are not finite")
    if min(case.grid) < 1 or cells not in (0, case.grid[0] * case.grid[1]):
        what = f"{name} has a grid that does not fit its tokens"
        raise UsageError(what, seen=case.grid, allowed=f"{cells} cells in all")


def quantise_tokens(tokens: FloatArray) -> tuple[NDArray[np.int8], FloatArray]:
    """Round tokens to 255 levels each, symmetric around zero.

    A token with largest magnitude m comes back with every element within m / 254 (half a level)
    plus float32 rounding, a relative 2e-7 of m. A token with m below 1e-30 comes back as zeros.

    Tokens (T, D) are finite, with magnitudes below 1e38. Gives levels (T, D) and scales (T,).

    >>> quantise_tokens(np.float32([[1.0, -0.5, 0.0]]))[0].tolist()
    [[127, -64, 0]]
    """
    peaks = np.abs(tokens).max(axis=1, initial=0.0)
    scales = np.where(peaks < _SMALLEST_PEAK, 0.0, peaks / np.float32(_LEVELS)).astype(np.float32)
    divisors = np.where(scales == 0.0, np.float32(np.inf), scales)
    levels = np.rint(tokens / divisors[:, None])
    return np.clip(levels, -_LEVELS, _LEVELS).astype(np.int8), scales


def dequantise_tokens(levels: NDArray[np.int8], scales: FloatArray) -> FloatArray:
    """Give stored tokens back as float32 (T, D); the error bound is `quantise_tokens`'s."""
    tokens: FloatArray = levels * scales[:, None]
    return tokens


def unit_rows(rows: FloatArray) -> FloatArray:
    """Scale each row of (N, D) to length 1; rows of zeros stay zeros."""
    wide = rows.astype(np.float64)
    peaks = np.abs(wide).max(axis=1, initial=0.0, keepdims=True)
    wide /= np.where(peaks > 0.0, peaks, 1.0)  # so that the squares cannot underflow
    lengths = np.sqrt((wide * wide).sum(axis=1, keepdims=True))
    return (wide / np.where(lengths > 0.0, lengths, 1.0)).astype(np.float32)


def encode_key(key: FloatArray) -> NDArray[np.float16]:
    """Give a key (D_key,) as a float16 unit vector; cosine similarity moves by less than 1e-3."""
    stored: NDArray[np.float16] = unit_rows(key[None])[0].astype(np.float16)
    return stored


def decode_keys(stored: NDArray[np.float16]) -> FloatArray:
    """Give stored keys (N, D_key) as read-only float32 unit rows."""
    keys = unit_rows(stored.astype(np.float32))
    keys.setflags(write=False)
    return keys


def exact_cosines(keys: FloatArray, query: FloatArray) -> Floats:
    """Give the cosines of unit keys (n, D) with a unit query (D,), summed alike for each row."""
    cosines: Floats = (keys.astype(np.float64) * query).sum(axis=1)
    return cosines


@dataclass(frozen=True, slots=True)
class Record:
    """One case without its vectors; `created` is in seconds since 1970, UTC."""

    COLUMNS: ClassVar = (
        "id, image_digest, summary, score, std, origin, package_digest, provenance, created, device"
    )

    id: str
    image_digest: str
    summary: str
    score: float
    std: float
    origin: Origin
    package_digest: str
    provenance: str
    created: float
    device: str = ""

    @property
    def values(self) -> tuple[Any, ...]:
        """As a row of a database."""
        return tuple(getattr(self, name) for name in self.__slots__)

    @classmethod
    def of(cls, path: Path, row: Sequence[Any]) -> Self:
        """Read what `values` gave from a database; StoreCorrupted if it cannot be that."""
        kinds = str, str, str, float, float, str, str, str, float, str
        if any(type(value) is not kind for value, kind in zip(row, kinds, strict=True)):
            raise database.corrupted(path, f"case {row[0]!r} has a value of the wrong type")
        return cls(*row)


@dataclass(frozen=True, eq=False, slots=True)
class Features:
    """The vectors of one case as stored: unit key (D_key,), levels (T, D) and scales (T,), grid."""

    key: NDArray[np.float16]
    levels: NDArray[np.int8]
    scales: FloatArray
    grid: tuple[int, int]

    @property
    def tokens(self) -> FloatArray:
        """Visual tokens (T, D)."""
        return dequantise_tokens(self.levels, self.scales)

    @property
    def blobs(self) -> tuple[bytes, bytes, bytes]:
        """Key, levels and scales as they lie in a database."""
        key, scales = self.key.astype(VECTOR_DTYPES[0]), self.scales.astype(VECTOR_DTYPES[2])
        return key.tobytes(), self.levels.tobytes(), scales.tobytes()


@dataclass(frozen=True, eq=False, slots=True)
class Entry:
    """A stored case: its record and its vectors, and a JPEG if one is kept and was asked for."""

    record: Record
    features: Features
    thumbnail: bytes | None = None

    @property
    def case(self) -> Case:
        """The case, given back."""
        record, features = self.record, self.features
        told = record.id, record.origin, record.image_digest, record.score, record.std
        key = decode_keys(features.key[None])[0]
        seen = key, features.tokens, features.grid
        return Case(*told, record.summary, *seen, device=record.device)

    @property
    def digest(self) -> bytes:
        """Over all but the thumbnail and the moment of storing; 32 bytes."""
        blobs, device = self.features.blobs, self.record.device
        # Before there were devices, none was in it.
        described = [*self.record.values[:-2], *([device] if device else []), *VECTOR_DTYPES]
        sizes = [*self.features.grid, *map(len, blobs)]
        digest = hashlib.sha256(json.dumps([*described, *sizes]).encode())
        for blob in blobs:
            digest.update(blob)
        return digest.digest()


def encode_case(
    case: Case,
    package_digest: str,
    provenance: str,
    created: float,
    thumbnail: bytes | None = None,
) -> Entry:
    """Give a case as it is stored."""
    told = case.id, case.image_digest, case.summary, float(case.score), float(case.std)
    record = Record(*told, case.origin, package_digest, provenance, created, case.device)
    grid = int(case.grid[0]), int(case.grid[1])
    features = Features(encode_key(case.key), *quantise_tokens(case.tokens), grid)
    return Entry(record, features, thumbnail)


def image_hash(image_digest: str) -> int:
    """Shorten an image digest to a signed 64-bit integer."""
    return int.from_bytes(hashlib.sha256(image_digest.encode()).digest()[:8], "little", signed=True)


def token_features(tokens: FloatArray) -> FloatArray:
    """Give mean and deviation (2 D,) of visual tokens (T, D).

    >>> token_features(np.float32([[0, 2], [2, 2]])).tolist()
    [1.0, 2.0, 1.0, 0.0]
    """
    wide = tokens.astype(np.float64)
    return np.concatenate([wide.mean(axis=0), wide.std(axis=0)]).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Regression:
    """A linear map from what visual tokens alone tell of a photo to its score.

    It shows how the features that the vision tower makes of photographs go with what people think
    of them. It is fitted when a version of anchors is written, so each memory has its own.

    Attributes:
        weights: (F,), of the `token_features` of a photo.
        offset: What features of zeros score.
        std: Deviation of the score of a photo from people's, as seen on photographs left out.
        doubt_weights: (F,), of how far photographs like it are misjudged; zeros where nothing is
            known of that.
        doubt_offset, doubt_level: What features of zeros give, and the factor of it all.
    """

    weights: Floats
    offset: float
    std: float
    doubt_weights: Floats
    doubt_offset: float = 0.0
    doubt_level: float = 1.0

    @classmethod
    def fit(cls, features: FloatArray, scores: Floats) -> tuple[Self, Floats]:
        """Fit features (N, F) to scores (N,), N of `FEWEST_PHOTOS` or more, by ridge regression.

        A penalty pulls scores to the middle; they are then spread as wide around their mean as
        people's are, but at most twice as wide as they were. The doubt is a second regression, of
        the logarithm of the errors of photographs left out, set so that errors by doubt have the
        deviation `std`.

        Returns:
            The regression, and the score (N,) that it would give each photo without having seen it.
        """
        ridge = _Ridge(features.astype(np.float64))
        mean = float(scores.mean())
        narrow, weights, _ = ridge.fit(scores)
        stretch = min(_MOST_STRETCH, float(scores.std() / max(narrow.std(), 1e-9)))
        weights = weights * stretch
        left_out: Floats = mean + stretch * (narrow - mean)
        errors = np.abs(left_out - scores)
        std = float(np.sqrt(np.mean(errors**2)))
        logs, doubt_weights, doubt_offset = ridge.fit(np.log(errors + _LEAST_ERROR * std + 1e-9))
        centre = float(logs.mean())
        doubts = np.exp(np.clip(logs - centre, -_MOST_DOUBT, _MOST_DOUBT))
        level = float(np.sqrt(np.mean((errors / doubts) ** 2))) / std if std > 0.0 else 1.0
        offset = mean - float(ridge.centre @ weights)
        return cls(weights, offset, std, doubt_weights, doubt_offset - centre, level), left_out

    def score(self, features: FloatArray) -> float:
        """Score a photo by its features (F,), kept on 1-5."""
        return min(5.0, max(1.0, self.offset + float(features @ self.weights)))

    def doubt(self, features: FloatArray) -> float:
        """Tell by which factor a photo of such features (F,) is misjudged more than the usual."""
        log = self.doubt_offset + float(features @ self.doubt_weights)
        return self.doubt_level * math.exp(min(_MOST_DOUBT, max(-_MOST_DOUBT, log)))

    @property
    def array(self) -> Floats:
        """As it is stored (2, F + 2): weights, offset, deviation; the same of the doubt."""
        own = [*self.weights, self.offset, self.std]
        return np.array([own, [*self.doubt_weights, self.doubt_offset, self.doubt_level]])

    @classmethod
    def of_array(cls, stored: Floats) -> Self:
        """Read what `array` gave, or an earlier version's first row alone."""
        own = stored[0] if stored.ndim == 2 else stored
        doubt = stored[1] if stored.ndim == 2 else np.array([*np.zeros(len(own) - 2), 0.0, 1.0])
        return cls(
            np.array(own[:-2]),
            float(own[-2]),
            float(own[-1]),
            np.array(doubt[:-2]),
            float(doubt[-2]),
            float(doubt[-1]),
        )


class _Ridge:
    """Ridge regressions on the same features (N, F), standardised."""

    def __init__(self, features: Floats) -> None:
        self.centre, spread = features.mean(axis=0), features.std(axis=0)
        self._scale = np.where(spread > 0.0, spread, 1.0)
        self._left, self._singular, self._right = np.linalg.svd(
            (features - self.centre) / self._scale, full_matrices=False
        )

    def fit(self, values: Floats) -> tuple[Floats, Floats, float]:
        """Fit values (N,); give those of each left out (N,), the weights (F,) and the offset.

        The penalty is the one with the smallest error of those left out (in closed form, from the
        leverages).
        """
        mean = float(values.mean())
        seen = self._left.T @ (values - mean)

        def left_out_with(penalty: float) -> Floats:
            shrunk = self._singular**2 / (self._singular**2 + penalty)
            residuals = values - mean - self._left @ (shrunk * seen)
            leverage = 1.0 / len(values) + np.sum(self._left**2 * shrunk, axis=1)
            left_out: Floats = values - residuals / np.maximum(1.0 - leverage, 1e-9)
            return left_out

        penalty = min(_PENALTIES, key=lambda each: np.mean((left_out_with(each) - values) ** 2))
        slopes = self._singular / (self._singular**2 + penalty) * seen
        weights: Floats = self._right.T @ slopes / self._scale
        return left_out_with(penalty), weights, mean - float(self.centre @ weights)


class Sample:
    """Every n-th of the photos shown to it, n such that at most `MOST_PHOTOS` are kept."""

    def __init__(self) -> None:
        self._kept: list[tuple[str, FloatArray, float]] = []
        self._step = 1
        self._shown = 0

    def show(self, name: str, tokens: FloatArray, score: float) -> None:
        """Show visual tokens (T, D) of a photo with its score; one without tokens tells nothing."""
        if not len(tokens):
            return
        if self._shown % self._step == 0:
            self._kept.append((name, token_features(tokens), score))
        self._shown += 1
        if len(self._kept) > MOST_PHOTOS:
            self._kept = self._kept[::2]
            self._step *= 2

    def fitted(self) -> tuple[Regression, dict[str, float]] | None:
        """Fit what was kept, with the score of each left out, by name; None if it tells none."""
        scores = np.array([score for _, _, score in self._kept])
        if len(scores) < FEWEST_PHOTOS or np.ptp(scores) == 0.0:
            return None
        regression, left_out = Regression.fit(np.array([each for _, each, _ in self._kept]), scores)
        names = (name for name, _, _ in self._kept)
        return regression, dict(zip(names, left_out.tolist(), strict=True))


def regression_sha256(arrays: Mapping[str, Array]) -> str | None:
    """Give the digest of the regression among some arrays; None where there is none."""
    stored = arrays.get(REGRESSION)
    return None if stored is None else hashlib.sha256(stored.tobytes()).hexdigest()


class KeyIndex(Protocol):
    """Finds the nearest of many keys without comparing all; see `meiqa.memory.index`."""

    def search(
        self, query: FloatArray, count: int, eligible: Mask | None, effort: int | None = None
    ) -> NDArray[np.int64]:
        """Give the rows of the `count` nearest of the eligible keys."""


@dataclass(frozen=True, eq=False)
class Version:
    """The stored cases of one origin; safe to share between threads. Its files never change.

    Whatever of it is read is StoreCorrupted where it is not what was written.

    Attributes:
        origin: Of all its cases.
        number: 1 as built; each compaction adds one.
        identity: Package, widths and kind of key that the cases were encoded with.
        segment: The vectors, mapped.
        records_path: The database of records.
        index: Over the keys; None where they are few enough to compare all.
    """

    origin: Origin
    number: int
    identity: Identity
    segment: Segment
    records_path: Path
    index: KeyIndex | None
    _connection: sqlite3.Connection = field(repr=False)
    _mutex: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _located: dict[str, tuple[int, bool]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.segment.arrays["keys"])

    def entries(self, rows: Sequence[int], *, thumbnails: bool = False) -> list[Entry]:
        """Read the cases in rows; their records take one statement, however many they are."""
        jpegs: dict[int, bytes] = {}
        if thumbnails:
            with self._mutex:
                revisions = [row + 1 for row in rows]
                jpegs = database.read_thumbnails(self.records_path, self._connection, revisions)
        entries = [
            Entry(record, self.features(row), jpegs.get(row + 1))
            for row, record in zip(rows, self.records_in(rows), strict=True)
        ]
        digests = self.segment.arrays["digests"]
        for row, entry in zip(rows, entries, strict=True):
            if not self._whole[row] and entry.digest[:DIGEST_BYTES] != digests[row].tobytes():
                raise self._damaged(f"case {entry.record.id!r} was altered")
            self._whole[row] = True
        return entries

    @cached_property
    def _whole(self) -> Mask:
        """Rows that have been read and found whole, which they stay."""
        return np.zeros(len(self), np.bool_)

    def _damaged(self, what: str) -> StoreCorrupted:
        return StoreCorrupted(f"{self.segment.path} is damaged: {what}", hint=REBUILD)

    def features(self, row: int) -> Features:
        """View the vectors of a case, which only `entries` compares with their digest."""
        arrays = self.segment.arrays
        begin, end = arrays["offsets"][row : row + 2].tolist()
        if not 0 <= begin <= end <= len(arrays["scales"]):
            raise self._damaged("its offsets are out of order")
        rows, columns = arrays["grids"][row].tolist()
        levels, scales = arrays["levels"][begin:end], arrays["scales"][begin:end]
        return Features(arrays["keys"][row], levels, scales, (rows, columns))

    def records_in(self, rows: Sequence[int]) -> list[Record]:
        """Read the records of rows, in their order; StoreCorrupted if one is missing."""
        if not rows:
            return []
        found = dict(self.records(AMONG, (json.dumps([row + 1 for row in rows]),)))
        for row in rows:
            if row not in found:
                raise StoreCorrupted(f"{self.records_path} has no record {row + 1}", hint=REBUILD)
        return [found[row] for row in rows]

    def records(
        self, condition: str = "TRUE", values: Sequence[Any] = ()
    ) -> list[tuple[int, Record]]:
        """Read the records that fulfil an SQL condition, each with its row, by row."""
        query = f"SELECT revision, {Record.COLUMNS} FROM records WHERE {condition}"
        with self._mutex:
            try:
                found = self._connection.execute(f"{query} ORDER BY revision", values).fetchall()
            except sqlite3.Error as error:
                raise database.store_error(self.records_path, error) from error
        if any(not 1 <= revision <= len(self) for revision, *_ in found):
            raise StoreCorrupted(f"{self.records_path} has a record too many", hint=REBUILD)
        return [(revision - 1, Record.of(self.records_path, row)) for revision, *row in found]

    def locate(self, case_id: str) -> tuple[int, bool]:
        """Give how many ids are smaller, which is the row of this one, and whether it is there."""
        known = self._located.get(case_id)
        if known is None:
            query = "SELECT revision, id FROM records WHERE id >= ? ORDER BY id LIMIT 1"
            with self._mutex, database.sqlite_errors(self.records_path):
                found = self._connection.execute(query, (case_id,)).fetchone()
            known = (len(self), False) if found is None else (found[0] - 1, found[1] == case_id)
            self._located[case_id] = known
        return known

    def rows_of_image(self, image_digest: str) -> list[int]:
        """Give the rows of the cases that were made from an image."""
        hashes, in_order = self.segment.arrays["image_hashes"], self.segment.arrays["image_rows"]
        wanted = np.int64(image_hash(image_digest))
        first, last = (int(np.searchsorted(hashes, wanted, side)) for side in ("left", "right"))
        rows = [row for row in in_order[first:last].tolist() if 0 <= row < len(self)]
        records = zip(rows, self.records_in(rows), strict=True)
        return [row for row, record in records if record.image_digest == image_digest]

    def thumbnail_bytes(self) -> list[tuple[int, str, int]]:
        """Give the sizes of the thumbnails that are kept: row, id, bytes."""
        query = "SELECT revision, id, length(jpeg) FROM thumbnails JOIN records USING (revision)"
        with self._mutex, database.sqlite_errors(self.records_path):
            kept = database.keeps_thumbnails(self._connection)
            found = self._connection.execute(query).fetchall() if kept else []
        return [(revision - 1, case_id, size) for revision, case_id, size in found]

    def keys_of(self, rows: Rows) -> FloatArray:
        """Give the unit keys of rows (n, D_key)."""
        few = self.index is None
        return self.unit_keys[rows] if few else decode_keys(self.segment.arrays["keys"][rows])

    @cached_property
    def unit_keys(self) -> FloatArray:
        """All keys in memory (N, D_key), to be compared with one by one."""
        return decode_keys(self.segment.arrays["keys"])

    @cached_property
    def by_score(self) -> Rows:
        """Rows by score, ties by id (N,); StoreCorrupted if they are not rows."""
        rows = self.segment.arrays["by_score"].astype(np.intp)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise self._damaged("it has scores of no rows")
        return rows

    @cached_property
    def regression(self) -> Regression | None:
        """From visual tokens to scores; None where there were too few anchors to fit one."""
        arrays, attributes = self.segment.arrays, self.segment.attributes
        if regression_sha256(arrays) != attributes.get("regression_sha256"):
            raise StoreCorrupted(f"the regression in {self.segment.path} was altered", hint=REBUILD)
        return Regression.of_array(arrays[REGRESSION]) if REGRESSION in arrays else None
