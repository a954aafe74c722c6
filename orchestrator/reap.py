"""Looks for forgotten machines wherever this computer can look, and ends them when told to (reaper.py decides)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

from orchestrator.clock import Clock, age_s
from orchestrator.errors import KdcloudError
from orchestrator.guarded import CALL_LIMIT_S, Guarded
from orchestrator.ledger import Ledger, MachineRow, Run
from orchestrator.mirror import ordered_for
from orchestrator.names import MachineName, parse_machine_name
from orchestrator.provision import Latencies, Observation, Partly, Provisioner, ProvisionError, Status
from orchestrator.reaper import Action, Finding, Heard, Known, judge
from orchestrator.runner import machine_age_s
from orchestrator.session import is_driven, state_of
from tasks.bucket import Bucket, BucketError, open_bucket
from tasks.contract import COMMIT_FILE

END_LIMIT_S = 120.0
END_PAUSES_S = (0.5, 0.5, 1.0, 2.0, 5.0)  # between two attempts; the last one from then on
AT_ONCE = 32
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Reaped:
    """What was found and what became of it. `left`: asked to end and still there."""

    findings: tuple[Finding, ...]
    ended: tuple[str, ...]
    left: tuple[str, ...]
    unanswered: tuple[str, ...]  # providers that did not answer: what they hold is not known
    where: Mapping[str, tuple[str, ...]]  # machine -> providers that list it
    runs: Mapping[str, str]  # machine -> its run, of those that a run here knows
    asked: tuple[str, ...] = ()  # providers: where nothing was rented from here, and nothing was named, nobody is asked

    @property
    def saved_micros_per_hour(self) -> int:
        """What the machines in `ended` cost an hour, as far as their prices are known (see `unpriced`)."""
        return sum(f.price_micros_per_hour or 0 for f in self.findings if f.name in self.ended)

    @property
    def unpriced(self) -> tuple[str, ...]:
        """Machines in `ended` whose price nobody knows."""
        return tuple(f.name for f in self.findings if f.name in self.ended and f.price_micros_per_hour is None)


def reap(
    *,
    ledger: Ledger | None,
    providers: Mapping[str, Provisioner],
    owner: str,
    clock: Clock,
    do_end: bool,
    orphans: bool = False,
    older_than: timedelta | None = None,
    say: Callable[[str], None] = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
    buckets: Sequence[str] = (),
    bucket_of: Callable[[str], Bucket] = open_bucket,
    call_limit_s: float | None = CALL_LIMIT_S,
) -> Reaped:
    """Lists every machine of ours everywhere; with `do_end` ends what is forgotten and waits until it is gone.

    `ledger` None: it cannot be read; then nothing doubtful is ended. `buckets`: urls of buckets where runs of other
    computers may be. `call_limit_s` None: no threads and no time limits, for what lives in memory.
    """
    work = _Work(call_limit_s is not None)
    guarded = {
        name: Guarded(provider, lambda: clock.mark().wall, limit_s=call_limit_s) for name, provider in providers.items()
    }
    seen, where, unanswered = _everything(guarded, work)
    shelf = _Shelf(bucket_of)
    known = known_machines(ledger, set(seen), clock, shelf, work) if ledger is not None else {}
    now = clock.mark().wall
    strange = [name for name in seen if name not in known]
    findings = judge(
        list(seen.values()), known, owner=owner, now=now, orphans=orphans and ledger is not None, older_than=older_than,
        heard=heard_of(strange, owner, [*buckets, *_roots(ledger)], shelf, clock, work) if strange else {},
    )  # fmt: skip
    doomed = {f.name: [guarded[place] for place in where[f.name]] for f in findings if f.action is Action.END}
    for finding in findings:
        if do_end and finding.name in doomed:
            say(f"ending {finding.name}: {finding.why}")
    left = _end_all(doomed, clock, work, stop) if do_end else set()
    return Reaped(
        findings=tuple(findings),
        ended=tuple(name for name in doomed if do_end and name not in left),
        left=tuple(name for name in doomed if name in left),
        unanswered=unanswered,
        where=where,
        runs={name: one.row.run for name, one in known.items()},
        asked=tuple(providers),
    )


def known_machines(ledger: Ledger, names: set[str], clock: Clock, shelf: _Shelf, work: _Work) -> dict[str, Known]:
    """What the ledger and the leases say of these machines."""
    mine: list[tuple[Run, list[MachineRow]]] = []
    run6s = {parsed.run6 for name in names if (parsed := parse_machine_name(name))}
    for run_id in ledger.runs():
        if run_id[-6:] in run6s:
            run = ledger.run(run_id)
            mine.append((run, [row for row in run.machines if row.name in names]))
    driven = work.all(lambda pair: shelf.driven(pair[0].bucket, pair[0].id, clock) if pair[1] else None, mine)
    return {
        row.name: Known(row, state_of(run) != "running", drives, is_through(row, run), outlived(row, clock))
        for (run, rows), drives in zip(mine, driven, strict=True)
        for row in rows
    }


def is_through(row: MachineRow, run: Run) -> bool:
    """Whether every stage that a machine was ordered for is done."""
    return set(row.stages) <= set(run.done)


def outlived(row: MachineRow, clock: Clock) -> bool:
    """Whether the machine is older than its lifetime and every delay that its reservation pays for."""
    if "sent" not in row.facts:
        return False
    latencies = Latencies(**row.order["offer"]["latencies"])
    lifetime = float(row.facts.get("lifetime_s", row.order["lifetime_s"]))
    return machine_age_s(row, clock) > lifetime + latencies.total_s


def heard_of(
    names: Sequence[str], owner: str, roots: Sequence[str], shelf: _Shelf, clock: Clock, work: _Work
) -> dict[str, Heard]:
    """What the buckets at `roots` say of this owner's machines that no run here knows; silence is left out."""
    parsed = {name: parse_machine_name(name) for name in names}
    ours = {name: parts for name, parts in parsed.items() if parts is not None and parts.owner == owner}
    if not ours:
        return {}
    run6s = {parts.run6 for parts in ours.values()}
    places = {
        run[-6:]: (root, run)
        for root, runs in zip(roots, work.all(lambda root: shelf.runs(root, run6s), list(roots)), strict=True)
        for run in runs
    }
    found = [(name, parts, *places[parts.run6]) for name, parts in ours.items() if parts.run6 in places]
    told = work.all(lambda one: shelf.hear(one[2], one[3], one[0], one[1], clock), found)
    return {one[0]: heard for one, heard in zip(found, told, strict=True) if heard is not None}


class _Shelf:
    """Buckets by url, each store opened once: opening an S3 client takes longer than asking it."""

    def __init__(self, bucket_of: Callable[[str], Bucket]) -> None:
        self._bucket_of = bucket_of
        self._open: dict[str, Bucket] = {}

    def driven(self, url: str, run: str, clock: Clock) -> bool | None:
        """Whether a living client holds the run's lease; None when its bucket cannot tell."""
        try:
            return is_driven(self._run(url, run), clock)
        except (BucketError, KdcloudError, OSError):
            return None

    def runs(self, root: str, run6s: set[str]) -> list[str]:
        """Ids of the runs in a bucket that end in one of these; none when it does not answer."""
        found: set[str] = set()
        try:
            for stat in self._at(root).list(""):
                run = stat.key.partition("/")[0]
                if run[-6:] in run6s:
                    found.add(run)
                if len(found) == len(run6s):
                    break
        except (BucketError, OSError):
            return []
        return sorted(found)

    def hear(self, root: str, run: str, machine: str, name: MachineName, clock: Clock) -> Heard | None:
        """A machine name holds only the beginning of its first stage's name: all that it may mean must be done, and
        whatever else the machine was ordered for."""
        try:
            bucket = self._at(root).at(run)
            driven = is_driven(bucket, clock)
            keys = [stat.key.split("/") for stat in bucket.list("") if "/" in stat.key]
            stages = {parts[0] for parts in keys if parts[0].startswith(name.stage)}
            done = {parts[0] for parts in keys if parts[1:] == [COMMIT_FILE]}
            if stages and stages <= done:
                stages |= ordered_for(bucket, run, machine)
        except (BucketError, KdcloudError, OSError):
            return None
        return Heard(driven=driven, stage_done=bool(stages) and stages <= done)

    def _run(self, url: str, run: str) -> Bucket:
        root, slash, last = url.rpartition("/")
        return self._at(root).at(run) if slash and root and last == run else self._at(url)

    def _at(self, url: str) -> Bucket:
        if url not in self._open:
            self._open[url] = self._bucket_of(url)
        return self._open[url]


class _Work:
    """Does the same thing with many items: side by side, or in the order given where threads are not wanted."""

    def __init__(self, threads: bool) -> None:
        self._threads = threads

    def all(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        if not self._threads or len(items) < 2:
            return [function(item) for item in items]
        with ThreadPoolExecutor(min(AT_ONCE, len(items))) as pool:
            return list(pool.map(function, items))


def _roots(ledger: Ledger | None) -> Iterator[str]:
    """Buckets where runs of this computer are: those of another one are there most likely."""
    if ledger is None:
        return
    found: dict[str, None] = {}
    for run in ledger.runs():
        root, slash, last = ledger.run(run).bucket.rpartition("/")
        if slash and last == run:
            found[root] = None
    yield from found


def _everything(
    providers: Mapping[str, Guarded], work: _Work
) -> tuple[dict[str, Observation], dict[str, tuple[str, ...]], tuple[str, ...]]:
    """(every machine once, the providers that list it, who did not answer and why)"""
    where: dict[str, tuple[str, ...]] = {}
    seen: dict[str, Observation] = {}
    answers = work.all(_listed, list(providers.items()))
    for place, (found, _) in zip(providers, answers, strict=True):
        for one in found:
            where[one.name] = (*where.get(one.name, ()), place)
            seen[one.name] = _together(seen.get(one.name), one)
    return seen, where, tuple(trouble for _, trouble in answers if trouble)


def _listed(item: tuple[str, Guarded]) -> tuple[list[Observation], str]:
    """(machines, what went wrong or nothing)"""
    name, provider = item
    try:
        return provider.ours(), ""
    except Partly as error:
        return list(error.found), f"{name}: {error.message}"
    except ProvisionError as error:
        return [], f"{name}: {error.message}{f' ({error.hint})' if error.hint else ''}"


def _together(before: Observation | None, one: Observation) -> Observation:
    """Two providers may list one machine (SkyPilot, and the cloud itself): whoever knows more is heard."""
    if before is None or before.state is Status.ABSENT:
        return one
    priced = before.landed_offer is not None and before.landed_offer.price_micros_per_hour is not None
    return replace(
        before,
        landed_offer=before.landed_offer if priced else one.landed_offer or before.landed_offer,
        created_at=before.created_at or one.created_at,
    )


def _end_all(doomed: Mapping[str, Sequence[Guarded]], clock: Clock, work: _Work, stop: Callable[[], bool]) -> set[str]:
    """Asks until every provider that listed it says it is gone, or the limit is reached. Returns what is left."""
    since = clock.mark()
    left = list(doomed)
    for turn in range(10_000):
        gone = work.all(lambda name: _end_everywhere(doomed[name], name), left)
        left = [name for name, is_gone in zip(left, gone, strict=True) if not is_gone]
        if not left or stop() or age_s(since, clock.mark()) >= END_LIMIT_S:
            break
        clock.sleep(END_PAUSES_S[min(turn, len(END_PAUSES_S) - 1)])
    return set(left)


def _end_everywhere(providers: Sequence[Guarded], name: str) -> bool:
    """Every provider is asked, whatever the others answer."""
    gone = [_end(provider, name) for provider in providers]
    return all(gone)


def _end(provider: Guarded, name: str) -> bool:
    try:
        provider.terminate(name)
    except ProvisionError:  # said to be tried again; what is left is reported
        return False
    return provider.observe(name).state is Status.ABSENT
