"""A memory as a replica of a hub: what it learns is pushed, what others learned is pulled.

A sync pushes first, then pulls, and each part is acknowledged in the transaction that does it. So a
kill at any moment leaves what was not acknowledged to the next sync, and what is told twice changes
nothing (docs/hub.md).
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import psycopg

from meiqa.errors import MeiqaError, StoreMismatch, UsageError
from meiqa.memory.bank import ContrastPolicy, MemoryBank, Pulled
from meiqa.memory.cases import ORIGINS, Entry
from meiqa.memory.hub import Hub, Refused, Told, address, connected, rank_of
from meiqa.memory.pacing import Pace
from meiqa.memory.retrieval import View
from meiqa.memory.wal import Image, Waiting
from meiqa.types import Origin

LOG = logging.getLogger(__name__)

_AT_ONCE = 64
_NAMED = 8
_PATIENCE_S = 30.0  # with a sync that is under way when its process ends


@dataclass
class Synced:
    """What a sync did.

    Attributes:
        pushed: Cases and removals that the hub took.
        pulled, removed: Cases of others stored, and removed here since others did.
        refused: What the hub refused of ours, and what we refused of the hub's, with the reasons.
        kept: How many cases of an origin wait, since this role may not write them.
    """

    pushed: int = 0
    pulled: int = 0
    removed: int = 0
    refused: list[Refused] = field(default_factory=list)
    kept: dict[Origin, int] = field(default_factory=dict)

    def __str__(self) -> str:
        told = f"{self.pushed} pushed, {self.pulled} pulled, {self.removed} removed"
        told += f", {len(self.refused)} refused" if self.refused else ""
        return ", ".join([told, *map(self._of_kept, self.kept)])

    @property
    def complaints(self) -> list[str]:
        """What somebody should see to; that a role may not write anchors is as most are meant."""
        refused = [f"refused {each.name}: {each.reason}" for each in self.refused]
        return refused + [self._of_kept(origin) for origin in self.kept if origin != "anchor"]

    def _of_kept(self, origin: Origin) -> str:
        return f"{self.kept[origin]} {origin} cases kept: this role may not write them"


class Replica:
    """A memory that is shared through a hub.

    Args:
        bank: Opened to be changed; everything it learns is shared from the first sync on.
        url: Of the hub.
        device: What this device is called there.
        gently: Work in small steps and rest between them, so that scoring goes on meanwhile, until
            `hurry` is called.
    """

    def __init__(self, bank: MemoryBank, url: str, device: str, *, gently: bool = False) -> None:
        address(url)
        if bank.holds_pictures:
            what = "a remote model's memory holds pictures, which are not shared"
            raise UsageError(what, seen=bank.path)
        if not (device.isprintable() and 0 < len(device) <= 64):
            allowed = "1 to 64 printable characters"
            raise UsageError("a device needs a name", seen=repr(device), allowed=allowed)
        self._bank, self._url, self._device, self._gently = bank, url, device, gently
        self._pace = Pace(gently=gently)

    def hurry(self) -> None:
        """Rest no more, in a sync that goes on and in those that follow."""
        self._gently = False
        self._pace.hurry()

    def sync(self, *, anew: bool = False) -> Synced:
        """Push, then pull; `anew` from the beginning, with a hub that was set back or is another.

        Raises:
            ServiceUnreachable: the hub can't be reached; nothing is lost.
            StoreMismatch: the hub was set back, as by a restored copy.
            MeiqaError: see `connected` and `MemoryBank.follow`.
        """
        done = Synced()
        # One for each sync: a removal that waits for its compaction hurries this one alone.
        self._pace = Pace(gently=self._gently)
        with connected(self._url) as hub:
            pulled = self._bank.follow(hub.id, anew=anew)
            if pulled > hub.reached:
                what, hint = "the hub was set back to an earlier state", "tell it all again: --anew"
                raise StoreMismatch(what, seen=f"{hub.reached} of {pulled}", hint=hint)
            self._push(hub, done)
            self._pull(hub, pulled, done)
        return done

    def _push(self, hub: Hub, done: Synced) -> None:
        waiting = self._bank.outbox()
        for origin in ORIGINS:
            left = [each for each in waiting if each.origin == origin]
            # The first goes alone: if it is refused, the others need not be sent.
            starts = [0, *range(1, len(left), _AT_ONCE)] if left else []
            for start in self._pace.through(starts):
                batch = self._with_entries(left[start : start + (_AT_ONCE if start else 1)])
                try:
                    self._push_batch(hub, batch, done)
                except psycopg.errors.InsufficientPrivilege:
                    done.kept[origin] = len(left) - start
                    break
                except (psycopg.DataError, psycopg.IntegrityError):
                    for one in batch:
                        self._push_alone(hub, one, done)

    def _push_alone(self, hub: Hub, one: tuple[Waiting, Entry | None], done: Synced) -> None:
        try:
            self._push_batch(hub, [one], done)
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            name = f"{one[0].origin} {one[0].image[:16]}"
            done.refused.append(Refused(name, error.diag.message_primary or type(error).__name__))

    def _push_batch(
        self, hub: Hub, batch: Sequence[tuple[Waiting, Entry | None]], done: Synced
    ) -> None:
        numbers = hub.push(batch, self._device, self._bank.identity)
        took = [
            (each, seq) for (each, _), seq in zip(batch, numbers, strict=True) if seq is not None
        ]
        # The rest is taken out by the pull, which tells what the hub has in its place.
        removals = [(each, seq) for each, seq in took if each.removal is not None]
        self._bank.told([each for each, _ in took], removals)
        done.pushed += len(took)

    def _with_entries(self, waiting: Sequence[Waiting]) -> list[tuple[Waiting, Entry | None]]:
        """Find the cases that are told of; what was evicted, or has no tokens, is told no more."""
        views, found = self._bank.snapshot().views, []
        evicted = []
        for each in waiting:
            view = views[each.origin]
            entry = next(iter(view.entries_in(view.rows_of_image(each.image)[:1])), None)
            if each.removal is None and (entry is None or not len(entry.features.scales)):
                evicted.append(each)
            else:
                found.append((each, entry if each.removal is None else None))
        self._bank.told(evicted)
        return found

    def _pull(self, hub: Hub, since: int, done: Synced) -> None:
        bank, waiting = self._bank, self._bank.outbox()
        with hub.reading():
            named = [(each.origin, each.image) for each in waiting]
            news = hub.news(since, named, bank.identity)
            if not news:
                return
            views = bank.snapshot().views
            decided = decide(self._pace.through(news), views, waiting, since)
            fetched: dict[Image, Entry] = {}
            absorbed: set[Image] = set()
            for origin in ORIGINS:
                wanted = [each for each in decided.wanted if each.origin == origin]
                if origin == "contrast":
                    wanted = _worthiest(wanted, bank.policy)
                held = views[origin].record_of_image
                new = [each for each in wanted if held(each.image) is None]
                if len(new) > bank.policy.compact_after and bank.writes(origin):
                    bank.absorb(origin, self._entries(hub, origin, new, done), self._pace)
                    absorbed.update(each.name for each in new)
                    # What is held stays until the row that takes its place has been read.
                    wanted = [each for each in wanted if each.name not in absorbed]
                entries = self._entries(hub, origin, wanted, done)
                fetched |= {(origin, each.record.image_digest): each for each in entries}
        absorbed.difference_update(named)
        left = [each for each in news if each.name not in absorbed]
        upto = max([since, *(each.seq for each in news)])

        def change(views: Mapping[Origin, View], waiting: Sequence[Waiting]) -> Pulled:
            # Anew, since photos may have been learned or removed meanwhile.
            now = decide(left, views, waiting, since)
            stored = [fetched[each.name] for each in now.wanted if each.name in fetched]
            return Pulled(stored, [each.name for each in now.removed], now.told, upto)

        done.removed += len(bank.pull(change).removed)

    def _entries(
        self, hub: Hub, origin: Origin, wanted: Sequence[Told], done: Synced
    ) -> Iterator[Entry]:
        """Read cases by id, which is how their images' digests begin; name those refused."""
        images, last = [each.image for each in wanted], ""
        read = hub.entries(origin, images, self._bank.identity) if images else ()
        for each in self._pace.through(read):
            if isinstance(each, Entry) and each.record.id == last:
                each = Refused(f"{origin} {last}", "another image's digest begins like its own")
            if isinstance(each, Refused):
                done.refused.append(each)
                continue
            last = each.record.id
            done.pulled += 1
            yield each


class Decided(NamedTuple):
    """What news mean for a memory: what to store and to remove, and what the hub knows already."""

    wanted: list[Told]
    removed: list[Told]
    told: list[Waiting]


def decide(
    news: Iterable[Told],
    views: Mapping[Origin, View],
    waiting: Sequence[Waiting],
    since: int,
) -> Decided:
    """Compare news, from after `since`, with what is stored and what waits to be told.

    The rules are the hub's own (`meiqa.memory.hub`): a removal beats whatever was learned without
    knowing of it; of two cases the one of higher rank stays.
    """
    decided, pending = Decided([], [], []), {(each.origin, each.image): each for each in waiting}
    for each in news:
        own, held = pending.get(each.name), views[each.origin].record_of_image(each.image)
        if own is not None and own.removal not in (None, each.removal):
            continue  # the hub is still to be told of a removal
        if each.removed and own is not None and own.removal is None and own.base >= each.removed_at:
            continue  # learned again, knowing of the removal
        if each.removed:
            if held is not None:
                decided.removed.append(each)
        elif held is None or each.removed_at > since:
            if each.seq > since:
                decided.wanted.append(each)
        elif rank_of(held) > each.rank:
            continue  # the hub is still to be told of a later one
        elif rank_of(held) < each.rank:
            decided.wanted.append(each)
        if own is not None:
            decided.told.append(own)
    return decided


def _worthiest(wanted: list[Told], policy: ContrastPolicy) -> list[Told]:
    """Leave out what would be evicted at once."""
    if len(wanted) <= policy.capacity:
        return wanted
    now = time.time()

    def worth(told: Told) -> float:
        return policy.worth(0, now - told.created, told.std or 0.0)

    return heapq.nlargest(policy.capacity, wanted, key=worth)


@contextmanager
def syncing(bank: MemoryBank, url: str, device: str, every_s: float) -> Iterator[None]:
    """Sync a memory every so often while this lasts; what goes wrong is logged, and tried again."""
    replica, ended = Replica(bank, url, device, gently=True), threading.Event()

    def work() -> None:
        said = ""
        while not ended.is_set():
            try:
                complaints = replica.sync().complaints[:_NAMED]
                told = f"not all is synced: {'; '.join(complaints)}" if complaints else ""
            except MeiqaError as error:
                told = f"the memory is not synced: {error}"
            except Exception as error:  # or this thread would end without a word
                LOG.exception("the memory is not synced")
                told = repr(error)
            if told not in ("", said):
                LOG.warning(told)
            said = told
            ended.wait(every_s)

    thread = threading.Thread(target=work, name="hub", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        replica.hurry()
        thread.join(_PATIENCE_S)
