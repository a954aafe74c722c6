"""The ledger of a run, in its bucket: another computer can rebuild it, and two clients cannot both hold the pen.

`<run>/ledger/run.json` is the head, `<run>/ledger/NNNN.json` one entry each, numbered from 1 and written only if that
number is free. Every intent is there before the provider is called, so that whatever a dead client has made stands in
the bucket. Before a launch the lease is confirmed after the entries were put: a client that takes the run over reads
the entries after it took the lease, so either it sees the intent, or the launch does not happen.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from orchestrator.clock import Clock, Mark, age_s
from orchestrator.errors import UsageError
from orchestrator.lease import LEASE_S, Lease, NoLease
from orchestrator.ledger import ELSEWHERE, LOST, Entry, Ledger, Run
from orchestrator.money import usd
from tasks.bucket import Bucket, BucketError, NotFound, PreconditionFailed, put_if

FOLDER = "ledger"
HEAD = f"{FOLDER}/run.json"
SCHEMA = 1
FOLLOW_S = 3.0  # how often a watcher looks for news
REST_S = 10.0  # after a failure, before the store is asked again
READERS = 16  # at a time, from a store far away


@dataclass(frozen=True)
class Written:
    """One entry as the bucket has it. `fence`: of the client that wrote it."""

    number: int
    fence: int
    entry: Entry


@dataclass(frozen=True)
class Pages:
    """All entries in the bucket, by number, and the numbers that are missing or cannot be read."""

    written: tuple[Written, ...] = ()
    missing: tuple[int, ...] = ()

    @property
    def next(self) -> int:
        return max([w.number for w in self.written] + list(self.missing), default=0) + 1


class Mirror:
    """Keeps the bucket up with the ledger, for the client that holds the lease. `trouble` says why it could not."""

    def __init__(self, ledger: Ledger, bucket: Bucket, run_id: str, lease: Lease, clock: Clock) -> None:
        self._ledger, self._bucket, self._run_id = ledger, bucket, run_id
        self._lease, self._clock = lease, clock
        self.trouble = ""
        self._failed: Mark | None = None
        self._numbers: deque[int] | None = None  # free ones, the last goes on without end; None: not looked yet
        self._headed = False
        self._fences: dict[int, int] = {}  # of entries that fill a gap: no newer than what follows them
        self._handled = 0  # entries of the run, from its first, that are in the bucket
        self._there: set[int] = set()  # seqs of later ones that are there too, since they came from there

    def flush(self, *, must: bool = False) -> bool:
        """Puts what is not in the bucket yet. True: all is there, and nothing of another client was found.

        With `must` also confirms the lease: call it before whatever makes a machine, and make none on False. Without,
        a store that did not answer is left alone for a while. Raises NotOwner when another client owns the run now.
        """
        if isinstance(self._lease, NoLease):
            return False
        run = self._ledger.run(self._run_id)
        if not must and (self._handled == len(run.entries) or self._resting()):
            return self._handled == len(run.entries)
        try:
            self._lease.renew_if_due()  # one who slept too long writes nothing
            alone = self._open(run) if self._numbers is None else True
            alone = self._put_rest() and alone
            if not self._headed:  # after the first entries: where no head is, nothing was ever made
                put_head(self._bucket, run)
                self._headed = True
            if must:
                self._confirm()
        except BucketError as error:
            self.trouble, self._failed = error.message, self._clock.mark()
            return False
        self._failed, self.trouble = None, "" if alone else "another client wrote to the ledger of this run"
        return alone

    def _confirm(self) -> None:
        """Returns while the lease that was renewed is still young: one who slept meanwhile asks again."""
        since, now = None, None
        while since is None or now is None or age_s(since, now) >= LEASE_S / 2:
            since = self._clock.mark()
            self._lease.confirm()
            now = self._clock.mark()

    def _resting(self) -> bool:
        return self._failed is not None and age_s(self._failed, self._clock.mark()) < REST_S

    def _open(self, run: Run) -> bool:
        """Looks what is there already. False when that was news."""
        pages = read_pages(self._bucket, run.id)
        taken = take(self._ledger, run.id, pages.written)
        self._there = set(taken.seqs)
        self._numbers = deque([*pages.missing, pages.next])
        for gap in pages.missing:
            after = [w.fence for w in pages.written if w.number > gap]
            self._fences[gap] = min([self._lease.fence, *after])
        return not taken.news

    def _put_rest(self) -> bool:
        """Puts entry after entry. False when a number was taken by somebody else's, which is in the ledger then."""
        alone = True
        entries = self._ledger.run(self._run_id).entries
        while self._handled < len(entries):
            entry = entries[self._handled]
            if entry.seq not in self._there and not self._put(entry):
                alone = False
                entries = self._ledger.run(self._run_id).entries
                continue
            self._there.discard(entry.seq)
            self._handled += 1
        return alone

    def _put(self, entry: Entry) -> bool:
        """Whether the entry is at the next free number now; else the one that is there was taken into the ledger."""
        assert self._numbers is not None
        number = self._numbers[0]
        key, data = key_of(number), _dump(entry, number, self._fences.get(number, self._lease.fence))
        mine = True
        try:
            put_if(self._bucket, key, data)
        except PreconditionFailed:
            self._lease.confirm()
            there = parse_entry(self._bucket.get(key)[0], number, entry.run)
            if there is not None:  # else unreadable: that number is lost
                mine = identity(there.entry) == identity(entry)  # an answer that never arrived, or another client's
                if not mine:
                    self._there.update(take(self._ledger, entry.run, [there]).seqs)
            else:
                mine = False
        self._numbers.popleft()
        if not self._numbers:
            self._numbers.append(number + 1)
        return mine


def put_head(bucket: Bucket, run: Run) -> None:
    """What the run is: name, plan, recipe, owner. Written once, never changed."""
    if bucket.head(HEAD) is not None:
        return
    head = {
        "schema": SCHEMA,
        "id": run.id,
        "name": run.name,
        "created_at": run.created_at.isoformat(),
        "bucket": run.bucket,
        "data": dict(run.data),
    }
    try:
        put_if(bucket, HEAD, json.dumps(head, sort_keys=True).encode())
    except PreconditionFailed:
        return  # another client of the same run was quicker


def adopt(ledger: Ledger, bucket: Bucket) -> tuple[str, tuple[str, ...]]:
    """Takes the run that lives at `bucket` into the ledger, or brings it up to date. (run id, what a person must know).

    Reads only. Raises UsageError when no run, or one that cannot be read, is there.
    """
    try:
        raw, _ = bucket.get(HEAD)
    except NotFound:
        raise _no_run(bucket) from None
    head = _parse_head(raw, bucket.url)
    ledger.take_in(head["id"], name=head["name"], bucket=bucket.url, created_at=head["created_at"], data=head["data"])
    return head["id"], catch_up(ledger, bucket, head["id"])


def catch_up(ledger: Ledger, bucket: Bucket, run_id: str) -> tuple[str, ...]:
    """Takes what other clients wrote of the run into the ledger; returns what a person must know, in sentences.

    Where entries are missing, all that was left under the cap counts as spent: they may have promised that much.
    """
    cap_before = ledger.run(run_id).cap_micros
    pages = read_pages(bucket, run_id)
    taken = take(ledger, run_id, pages.written)
    late = _late(taken.news)
    notes = [f"{_numbers(late)}: written by a client that had lost the run; counted all the same"] if late else []
    notes += [
        f"{e.machine or 'the run'}: {e.kind} contradicts what is known here; the dearer of the two counts"
        for e in taken.contradicting
    ]
    cap_now = ledger.run(run_id).cap_micros
    if cap_before and cap_now > cap_before:  # 0: nothing of the run was known here
        notes.append(f"its cap was raised elsewhere, from {usd(cap_before)} to {usd(cap_now)}: not you? give --budget")
    unsent = len(ledger.run(run_id).entries) - len(
        taken.seqs
    )  # of this ledger's own: they fill the gaps when they are put
    if len(pages.missing) > unsent:
        notes += _count_lost(ledger, bucket, run_id, pages)
    return tuple(notes)


@dataclass(frozen=True)
class Taken:
    """What came of entries in the bucket. `seqs`: those of all of them in this ledger, the new ones included."""

    seqs: frozenset[int]
    news: tuple[Written, ...]
    contradicting: tuple[Entry, ...]


def take(ledger: Ledger, run_id: str, written: Sequence[Written]) -> Taken:
    """Brings entries of the bucket that the ledger has not into it, once, whoever else does so at the same time."""
    while True:
        run = ledger.run(run_id)
        known, news = compare(run.entries, written)
        done = ledger.absorb(run_id, [w.entry for w in news], seen=len(run.entries)) if news else ([], [])
        if done is not None:
            return Taken(frozenset(known | set(done[0])), tuple(news), tuple(done[1]))


class Follower:
    """For whoever watches: brings what the run's client, elsewhere, writes into this ledger as it comes."""

    def __init__(self, ledger: Ledger, bucket: Bucket, run_id: str, clock: Clock) -> None:
        self._ledger, self._bucket, self._run_id, self._clock = ledger, bucket, run_id, clock
        self._next = 1
        self._looked: Mark | None = None

    def look(self) -> None:
        """Asks the bucket at most every few seconds; a store that does not answer is asked again later."""
        now = self._clock.mark()
        if self._looked is not None and age_s(self._looked, now) < FOLLOW_S:
            return
        self._looked = now
        with suppress(BucketError):
            pages = read_pages(self._bucket, self._run_id, start=self._next)
            take(self._ledger, self._run_id, pages.written)
            self._next = max(self._next, pages.next)


def _count_lost(ledger: Ledger, bucket: Bucket, run_id: str, pages: Pages) -> list[str]:
    run, missing = ledger.run(run_id), pages.missing
    counted = {number for e in run.entries if e.kind == LOST for number in e.data["missing"]}
    if set(missing) <= counted:
        return []
    # Machines reserved after the gap were checked against whatever it hid; the older ones may have ended in it.
    after = {w.entry.machine for w in pages.written if w.entry.kind == "reserve" and w.number > missing[-1]}
    checked = sum(m.open_micros for m in run.machines if m.name in after)
    micros = max(0, run.cap_micros - run.spent_micros - checked)
    lost = Entry(0, run_id, None, None, LOST, micros, bucket.now(), {"missing": list(missing)})
    if ledger.absorb(run_id, [lost], seen=len(run.entries)) is None:
        return _count_lost(ledger, bucket, run_id, pages)
    return [
        f"{_numbers(missing)} missing or unreadable in {bucket.url}/{FOLDER}: a machine may have been made that nobody "
        "knows, so all that was left under the cap counts as spent; look with `kdcloud reap --orphans`, and give a "
        "larger --budget to go on"
    ]


def _late(news: Sequence[Written]) -> list[int]:
    """Numbers of entries whose fencing number is below one before them."""
    found, highest = [], 0
    for one in news:
        if one.fence < highest:
            found.append(one.number)
        highest = max(highest, one.fence)
    return found


def _numbers(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:8])
    return f"ledger {'entry' if len(numbers) == 1 else 'entries'} {shown}{' ...' if len(numbers) > 8 else ''}"


def runs_in(bucket: Bucket) -> list[str]:
    """Ids of the runs below a bucket's root that can be taken in. Lists the whole store."""
    return sorted(stat.key.split("/")[0] for stat in bucket.list() if stat.key.count("/") == 2
                  and stat.key.endswith(f"/{HEAD}"))  # fmt: skip


def read_pages(bucket: Bucket, run_id: str, *, start: int = 1) -> Pages:
    """Every entry of the run in the bucket from number `start` on. Raises BucketError."""
    numbers = sorted(n for stat in bucket.list(f"{FOLDER}/") if (n := _number_of(stat.key)) is not None and n >= start)
    if not numbers:
        return Pages()

    def read(number: int) -> Written | None:
        try:
            return parse_entry(bucket.get(key_of(number))[0], number, run_id)
        except NotFound:
            return None

    if bucket.url.startswith("s3:"):
        with ThreadPoolExecutor(READERS) as pool:
            found = list(pool.map(read, numbers))
    else:
        found = [read(number) for number in numbers]
    written = tuple(one for one in found if one is not None)
    there = {one.number for one in written}
    return Pages(written, tuple(n for n in range(start, numbers[-1] + 1) if n not in there))


def ordered_for(bucket: Bucket, run_id: str, machine: str) -> set[str]:
    """The stages after its first that a machine was ordered for, as the run's ledger in the bucket tells."""
    entries = [w.entry for w in read_pages(bucket, run_id).written if w.entry.machine == machine]
    return {one[0] for entry in entries if entry.kind == "reserve" for one in entry.data.get("then", ())}


def compare(local: Sequence[Entry], written: Sequence[Written]) -> tuple[set[int], list[Written]]:
    """(seqs of the local entries that are written, what is written and not known here). Equal entries are counted."""
    seqs: dict[tuple[Any, ...], deque[int]] = {}
    for entry in local:
        seqs.setdefault(identity(entry), deque()).append(entry.seq)
    known, news = set(), []
    for one in written:
        same = seqs.get(identity(one.entry))
        if same:
            known.add(same.popleft())
        else:
            news.append(one)
    return known, news


def identity(entry: Entry) -> tuple[Any, ...]:
    """What makes an entry the same one on every computer."""
    if entry.kind == ELSEWHERE:
        whole = entry.data
        return _identity(whole["stage"], whole["machine"], whole["kind"], entry.micros, whole["at"], whole["data"])
    return _identity(entry.stage, entry.machine, entry.kind, entry.micros, entry.at.isoformat(), entry.data)


def _identity(stage: Any, machine: Any, kind: Any, micros: int, at: str, data: Mapping[str, Any]) -> tuple[Any, ...]:
    return stage, machine, kind, micros, at, json.dumps(data, sort_keys=True)


def key_of(number: int) -> str:
    return f"{FOLDER}/{number:04d}.json"


def _number_of(key: str) -> int | None:
    match = re.fullmatch(rf"{FOLDER}/([0-9]{{4,9}})\.json", key)
    number = int(match[1]) if match else 0
    return number if number and key == key_of(number) else None


def _dump(entry: Entry, number: int, fence: int) -> bytes:
    return json.dumps({
        "schema": SCHEMA, "run": entry.run, "n": number, "fence": fence, "stage": entry.stage,
        "machine": entry.machine, "kind": entry.kind, "micros": entry.micros, "at": entry.at.isoformat(),
        "data": dict(entry.data),
    }, sort_keys=True).encode()  # fmt: skip


def parse_entry(raw: bytes, number: int, run_id: str) -> Written | None:
    """The entry, or None when these bytes are none of that run and number: a machine may have written there."""
    try:
        made = json.loads(raw)
        at = datetime.fromisoformat(made["at"])
        entry = Entry(0, made["run"], made["stage"], made["machine"], made["kind"], made["micros"], at, made["data"])
        fits = (
            made["schema"] == SCHEMA
            and made["run"] == run_id
            and made["n"] == number
            and type(made["fence"]) is int
            and type(entry.micros) is int
            and 0 <= entry.micros < 2**63  # what SQLite holds
            and isinstance(entry.kind, str)
            and isinstance(entry.stage, str | None)
            and isinstance(entry.machine, str | None)
            and isinstance(entry.data, dict)
            and at.tzinfo is not None
            and _has_what_it_needs(entry)
        )
    except (ValueError, KeyError, TypeError):
        return None
    return Written(number, made["fence"], entry) if fits else None


def _has_what_it_needs(entry: Entry) -> bool:
    """Keys without which the ledger could not be read any more."""
    match entry.kind:
        case "cap":
            return {"deadline_s", "mark"} <= set(entry.data) and entry.machine is None
        case "reserve":
            whole = {"offer", "attempt", "lifetime_s"} <= set(entry.data) and bool(entry.machine and entry.stage)
            return whole and _are_links(entry.data.get("then", []))
        case "lost":
            return isinstance(entry.data.get("missing"), list) and entry.machine is None
        case "elsewhere":
            return False  # only ever local
        case _:
            return _are_passed(entry.data.get("passed", {}))


def _are_links(then: Any) -> bool:
    return isinstance(then, list) and all(
        isinstance(one, list)
        and len(one) == 3
        and isinstance(one[0], str)
        and type(one[1]) is int
        and isinstance(one[2], int | float)
        for one in then
    )


def _are_passed(passed: Any) -> bool:
    return isinstance(passed, dict) and all(
        isinstance(one, dict) and isinstance(one.get("until_s"), int | float) and 0 <= one["until_s"] < 1e9
        for one in passed.values()
    )


def _parse_head(raw: bytes, url: str) -> dict[str, Any]:
    hint = "another version of kdcloud wrote it, or somebody changed the bucket"
    try:
        head = json.loads(raw)
        made: dict[str, Any] = {
            "id": head["id"],
            "name": head["name"],
            "created_at": datetime.fromisoformat(head["created_at"]),
            "data": head["data"],
        }
        fits = (
            head["schema"] == SCHEMA
            and re.fullmatch(r"[a-z0-9-]{1,40}", made["id"]) is not None
            and isinstance(made["name"], str)
            and isinstance(made["data"], dict)
            and re.fullmatch(r"[a-z0-9]{6}", made["data"]["owner"]) is not None
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{url}/{HEAD} cannot be read: {error!r}", hint=hint) from error
    if not fits:
        raise UsageError(f"{url}/{HEAD} is no run that this kdcloud can read", hint=hint)
    return made


def _no_run(bucket: Bucket) -> UsageError:
    found = runs_in(bucket)
    if not found:
        return UsageError(
            f"{bucket.url} holds no run", hint="name the folder of a run, as `kdcloud report` on the first computer did"
        )
    shown = ", ".join(found[-5:])
    return UsageError(f"{bucket.url} holds {len(found)} runs: {shown}", hint=f"name one: {bucket.url}/{found[-1]}")
