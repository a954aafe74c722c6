"""What was promised, reserved and spent: an append-only SQLite file, integer micro-USD. The only truth about money.

A reservation is checked against the cap and written in one transaction, so two processes cannot reserve the same
dollar. Nothing is ever updated or deleted (triggers refuse it); state is what the entries add up to.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator import spend
from orchestrator.errors import BudgetExceeded, UsageError
from orchestrator.spend import ApiLine
from orchestrator.states import TRANSITIONS, Event, State, after

SCHEMA = 1
LOST = "lost"  # entry of a run whose ledger has gaps: micros is the most that the missing ones may have promised
API_RESERVE = "api_reserve"  # entry of a stage without a machine: micros are set apart for its API
API_SETTLE = "api_settle"  # micros were spent since the one before; nothing of it is open any more
ELSEWHERE = "elsewhere"  # entry of another client that contradicts this ledger: kept whole in its data

_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS run (
    id TEXT PRIMARY KEY, created_at TEXT NOT NULL, name TEXT NOT NULL, bucket TEXT NOT NULL,
    data TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS entry (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL REFERENCES run(id), stage TEXT, machine TEXT,
    kind TEXT NOT NULL, micros INTEGER NOT NULL DEFAULT 0, at TEXT NOT NULL, data TEXT NOT NULL) STRICT;
CREATE INDEX IF NOT EXISTS entry_run ON entry(run, seq);
CREATE INDEX IF NOT EXISTS entry_machine ON entry(machine);
CREATE UNIQUE INDEX IF NOT EXISTS one_reserve ON entry(machine) WHERE kind = 'reserve';
CREATE UNIQUE INDEX IF NOT EXISTS one_gone ON entry(machine) WHERE kind IN ('gone', 'dropped');
CREATE TRIGGER IF NOT EXISTS entry_keeps BEFORE UPDATE ON entry
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS entry_stays BEFORE DELETE ON entry
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS run_keeps BEFORE UPDATE ON run BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS run_stays BEFORE DELETE ON run BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""

_EVENTS = frozenset(str(event) for event in Event)
_NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb", "smb3", "smbfs", "lustre", "fuse.sshfs", "afs", "beegfs", "9p"}


@dataclass(frozen=True)
class Entry:
    """One line of the ledger. `kind`: reserve, a states.Event, or a run-level word (see Run)."""

    seq: int
    run: str
    stage: str | None
    machine: str | None
    kind: str
    micros: int
    at: datetime
    data: Mapping[str, Any]


@dataclass(frozen=True)
class MachineRow:
    """A machine as its entries tell it. `reserved_micros` is open until it is settled."""

    name: str
    run: str
    stage: str  # the first that it was ordered for
    state: State
    reserved_micros: int
    settled_micros: int
    order: Mapping[str, Any]  # data of the reserve entry: offer, lifetime, attempt ...
    facts: Mapping[str, Any]  # latest value of every key in later entries' data
    reasons: tuple[str, ...]
    reserved_at: datetime
    absent_seen: bool
    job_rc: int | None

    @property
    def open_micros(self) -> int:
        return 0 if self.state is State.GONE else self.reserved_micros

    @property
    def then(self) -> Sequence[Sequence[Any]]:
        """The stages after the first, as ordered: (stage, attempt, seconds that those before must leave to it)."""
        then: Sequence[Sequence[Any]] = self.order.get("then", ())
        return then

    @property
    def stages(self) -> tuple[str, ...]:
        """Every stage that it was ordered for, in turn."""
        return self.stage, *(str(one[0]) for one in self.then)

    @property
    def chain(self) -> tuple[tuple[str, int], ...]:
        """(stage, attempt) of the same."""
        first = int(self.order.get("attempt", 1))
        return tuple(zip(self.stages, (first, *(int(one[1]) for one in self.then)), strict=True))

    @property
    def serves(self) -> str:
        """The stage it works for, or worked for when it ended."""
        serves = self.facts.get("serves")
        return serves if serves in self.stages else self.stage

    @property
    def attempt(self) -> int:
        """At the stage that it serves."""
        return dict(self.chain)[self.serves]

    @property
    def next_stage(self) -> str | None:
        """What it goes on with once the stage that it serves is done."""
        return next(iter(self.stages[self.stages.index(self.serves) + 1 :]), None)


@dataclass(frozen=True)
class Run:
    """A run as its entries tell it."""

    id: str
    name: str
    created_at: datetime
    bucket: str
    data: Mapping[str, Any]  # plan, recipe text, versions, owner ...
    cap_micros: int
    deadline_s: float | None  # counted from `deadline_from`, a clock mark
    deadline_from: Mapping[str, Any]
    machines: tuple[MachineRow, ...]
    done: Mapping[str, Mapping[str, Any]]  # stage -> its result
    ends: tuple[Entry, ...]  # 'ended' entries, oldest first
    entries: tuple[Entry, ...] = field(repr=False, default=())
    lost_micros: int = 0  # counted as spent: what missing entries may have reserved, what unknown machines cost
    apis: Mapping[str, ApiLine] = field(default_factory=dict)  # by stage

    @property
    def spent_micros(self) -> int:
        return sum(m.settled_micros for m in self.machines) + self.lost_micros + self.api_spent_micros

    @property
    def open_micros(self) -> int:
        return sum(m.open_micros for m in self.machines) + self.api_open_micros

    @property
    def api_open_micros(self) -> int:
        return sum(line.open_micros for line in self.apis.values())

    @property
    def api_spent_micros(self) -> int:
        return sum(line.settled_micros for line in self.apis.values())

    @property
    def live(self) -> tuple[MachineRow, ...]:
        """Machines that may bill: everything that was sent and is not seen gone."""
        return tuple(m for m in self.machines if m.state not in (State.GONE, State.INTENT))


@dataclass(frozen=True)
class Month:
    """Money of all runs in one calendar month, UTC. Machines and APIs count in the month in which they are settled."""

    name: str  # 2026-01
    spent_micros: int
    open_micros: int  # reserved and not settled yet, whenever it was reserved
    api_micros: int = 0  # of what was spent

    def left_micros(self, cap_micros: int) -> int:
        return max(0, cap_micros - self.spent_micros - self.open_micros)


@dataclass(frozen=True)
class _Known:
    """What was read of a run already: entries never change, so only newer ones are read again."""

    head: tuple[str, str, str, str, str]
    run: Run


class Ledger:
    """Open it with a path; `say` gets one sentence when the file system forces a slower journal."""

    def __init__(self, path: Path, *, say: Callable[[str], None] = lambda text: None) -> None:
        self.path = path
        self._known: dict[str, _Known] = {}
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            # Never opened by hand where it is there: closing any descriptor of a file drops all locks that this process
            # has on it (POSIX), those of another Ledger on it too, and the next client to leave deletes its WAL.
            with suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            os.chmod(path, 0o600)
            self._db = sqlite3.connect(path, timeout=30, isolation_level=None)
            self._db.execute(f"PRAGMA journal_mode={self._journal(say)}")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
            if self._db.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("quick_check failed")
            self._open_tables()
        except (sqlite3.DatabaseError, OSError) as error:
            raise UsageError(f"the ledger {path} cannot be used: {error}", hint=_ledger_hint(path, error)) from error

    @classmethod
    def in_memory(cls) -> Ledger:
        """A ledger that lives as long as this object, for drills and tests."""
        ledger = cls.__new__(cls)
        ledger.path, ledger._known = Path(":memory:"), {}
        ledger._db = sqlite3.connect(":memory:", isolation_level=None)
        ledger._open_tables()
        return ledger

    def close(self) -> None:
        self._db.close()

    def create_run(
        self,
        run: str,
        *,
        name: str,
        bucket: str,
        cap_micros: int,
        deadline_s: float | None,
        mark: Mapping[str, Any],
        at: datetime,
        data: Mapping[str, Any],
    ) -> None:
        with self._write():
            self._db.execute(
                "INSERT INTO run(id, created_at, name, bucket, data) VALUES (?, ?, ?, ?, ?)",
                (run, _iso(at), name, bucket, _dump(data)),
            )
            self._append(run, None, None, "cap", cap_micros, at, {"deadline_s": deadline_s, "mark": mark})

    def set_cap(
        self, run: str, cap_micros: int, deadline_s: float | None, mark: Mapping[str, Any], at: datetime
    ) -> None:
        """A new cap and deadline for what is left; the deadline counts from `mark`."""
        with self._write():
            self._append(run, None, None, "cap", cap_micros, at, {"deadline_s": deadline_s, "mark": mark})

    def note(
        self,
        run: str,
        kind: str,
        at: datetime,
        *,
        stage: str | None = None,
        machine: str | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """A fact that moves no machine and no money: job_sent, launched, stage_done, ended, warning ..."""
        with self._write():
            self._append(run, stage, machine, kind, 0, at, data or {})

    def reserve(
        self,
        run: str,
        stage: str,
        machine: str,
        micros: int,
        at: datetime,
        *,
        later_floor: int,
        order: Mapping[str, Any],
        month_cap_micros: int | None = None,
    ) -> None:
        """Reserves before a create, checked and written in one transaction. Raises BudgetExceeded.

        `month_cap_micros` caps all runs of this ledger together, in the calendar month (UTC) of `at`.
        """
        with self._write():
            self._check_room(run, f"stage {stage}", micros, at, later_floor, month_cap_micros)
            self._append(run, stage, machine, "reserve", micros, at, order)

    def reserve_api(
        self, run: str, stage: str, micros: int, at: datetime, *, later_floor: int, month_cap_micros: int | None = None
    ) -> None:
        """Sets money apart for a stage's API, as `reserve` does for a machine. Raises BudgetExceeded."""
        with self._write():
            self._check_room(run, f"the API of stage {stage}", micros, at, later_floor, month_cap_micros)
            self._append(run, stage, None, API_RESERVE, micros, at, {"cap_micros": self._fold(run).cap_micros})

    def settle_api(self, run: str, stage: str, total_micros: int, at: datetime) -> None:
        """What the API has cost the stage, all attempts together; the rest of what was set apart is free again.

        Never below what was settled before, and never cut to what was set apart: what was used is counted.
        """
        with self._write():
            before = self._fold(run).apis[stage].settled_micros
            micros = max(0, total_micros - before)
            self._append(run, stage, None, API_SETTLE, micros, at, {"total_micros": total_micros})

    def _check_room(
        self, run: str, who: str, micros: int, at: datetime, later_floor: int, month_cap_micros: int | None
    ) -> None:
        now = self._fold(run)
        if month_cap_micros is not None and micros > (rest := self.month(at).left_micros(month_cap_micros)):
            raise BudgetExceeded(
                f"{who} would reserve {micros} micro-USD; {rest} are left of this month's budget",
                hint="raise it with `kdcloud budget --month AMOUNT`, or wait for the next month",
            )
        available = spend.available_micros(
            cap=now.cap_micros, spent=now.spent_micros, open_=now.open_micros, later_floor=later_floor
        )
        if micros < 0 or micros > available:
            raise BudgetExceeded(
                f"{who} would reserve {micros} micro-USD; {available} are left under the cap",
                hint="raise --budget, or make the stage smaller",
            )

    def charge(self, machine: MachineRow, micros: int, at: datetime, *, why: str) -> None:
        """Adds what a machine cost after it was settled: it was held for gone and was not."""
        with self._write():
            self._append(machine.run, machine.stage, machine.name, "late", micros, at, {"late_why": why})

    def move(
        self, machine: str, event: Event, at: datetime, *, micros: int = 0, data: Mapping[str, Any] | None = None
    ) -> None:
        """Moves a machine along TRANSITIONS; GONE settles `micros`. Raises ValueError off the table."""
        with self._write():
            row = self._db.execute(
                "SELECT run, stage FROM entry WHERE machine=? AND kind='reserve'", (machine,)
            ).fetchone()
            if row is None:
                raise ValueError(f"no reservation for {machine}")
            state = next(m.state for m in self._fold(row[0]).machines if m.name == machine)
            after(state, event)
            self._append(row[0], row[1], machine, str(event), micros, at, data or {})

    def take_in(self, run: str, *, name: str, bucket: str, created_at: datetime, data: Mapping[str, Any]) -> None:
        """The head of a run that another computer began; its entries follow with `absorb`. Known already: nothing."""
        with self._write():
            self._db.execute(
                "INSERT OR IGNORE INTO run(id, created_at, name, bucket, data) VALUES (?, ?, ?, ?, ?)",
                (run, _iso(created_at), name, bucket, _dump(data)),
            )

    def absorb(self, run: str, entries: Sequence[Entry], *, seen: int) -> tuple[list[int], list[Entry]] | None:
        """Appends what another client wrote of the run, in one transaction. Returns the new seqs, and what contradicts.

        `seen`: how many entries the run had when these were found to be new; None when it has others by now. An entry
        that this ledger's own contradict (a machine ended by both) is kept as ELSEWHERE: none is forgotten.
        """
        seqs: list[int] = []
        contradicting: list[Entry] = []
        with self._write():
            now = self._fold(run)
            if len(now.entries) != seen:
                return None
            states = {row.name: row.state for row in now.machines}
            for entry in entries:
                state = self._next_state(entry, states)
                if state is None:
                    contradicting.append(entry)
                    entry = _elsewhere(entry, entry.machine if entry.machine in states else None)
                elif entry.machine is not None:
                    states[entry.machine] = state
                self._append(run, entry.stage, entry.machine, entry.kind, entry.micros, entry.at, entry.data)
                seqs.append(self._db.execute("SELECT last_insert_rowid()").fetchone()[0])
        return seqs, contradicting

    def run(self, run: str) -> Run:
        """Raises UsageError naming the nearest run."""
        try:
            return self._fold(run)
        except KeyError:
            raise UsageError(f"no run {run!r} in {self.path}", hint=self._nearest(run)) from None

    def runs(self) -> list[str]:
        """Run ids, newest first."""
        return [row[0] for row in self._db.execute("SELECT id FROM run ORDER BY created_at DESC, rowid DESC")]

    def told(self, kind: str, limit: int) -> list[Mapping[str, Any]]:
        """The data of the newest entries of a kind, of all runs, newest first."""
        rows = self._db.execute("SELECT data FROM entry WHERE kind=? ORDER BY seq DESC LIMIT ?", (kind, limit))
        return [json.loads(row[0]) for row in rows]

    def machine_known(self, machine: str) -> bool:
        return self._db.execute("SELECT 1 FROM entry WHERE machine=? LIMIT 1", (machine,)).fetchone() is not None

    def month(self, at: datetime) -> Month:
        """What all runs together spent in the calendar month (UTC) of `at`, and hold open now."""
        name = f"{at.astimezone(UTC):%Y-%m}"
        billed = sorted({*_EVENTS, "late", API_SETTLE})
        marks = ",".join("?" * len(billed))
        spent = self._db.execute(
            f"SELECT COALESCE(SUM(micros), 0) FROM entry WHERE substr(at, 1, 7) = ? AND kind IN ({marks})",
            (name, *billed),
        ).fetchone()[0]
        open_ = self._db.execute(
            "SELECT COALESCE(SUM(micros), 0) FROM entry AS held WHERE kind = 'reserve' AND NOT EXISTS "
            "(SELECT 1 FROM entry WHERE machine = held.machine AND kind IN ('gone', 'dropped'))"
        ).fetchone()[0]
        api, api_open = self._db.execute(
            "SELECT COALESCE(SUM(CASE WHEN kind = ? AND substr(at, 1, 7) = ? THEN micros END), 0), "
            "COALESCE(SUM(CASE WHEN kind = ? AND NOT EXISTS (SELECT 1 FROM entry WHERE run = held.run "
            "AND stage = held.stage AND kind = ? AND seq > held.seq) THEN micros END), 0) "
            "FROM entry AS held WHERE kind IN (?, ?)",
            (API_SETTLE, name, API_RESERVE, API_SETTLE, API_SETTLE, API_RESERVE),
        ).fetchone()
        return Month(name, int(spent), int(open_ + api_open), int(api))

    def find(self, text: str) -> str:
        """The run id for what a person typed: the id, its last six characters, or a unique beginning."""
        ids = self.runs()
        hits = (
            [r for r in ids if r == text]
            or [r for r in ids if r.endswith(f"-{text}")]
            or [r for r in ids if r.startswith(text)]
        )
        if len(hits) == 1:
            return hits[0]
        if hits:
            raise UsageError(f"{text!r} may be {', '.join(hits)}", hint="give more of the name")
        raise UsageError(f"no run {text!r} in {self.path}", hint=self._nearest(text))

    # -- inside ------------------------------------------------------------------------------------------------------

    def _fold(self, run: str) -> Run:
        known = self._known.get(run)
        head = known.head if known else self._head(run)
        rows = self._db.execute(
            "SELECT seq, run, stage, machine, kind, micros, at, data FROM entry WHERE run=? AND seq>? ORDER BY seq",
            (run, known.run.entries[-1].seq if known and known.run.entries else 0),
        )
        fresh = tuple(_entry(*row) for row in rows)
        if known and not fresh:
            return known.run
        made = _grown(known.run if known else _unwritten(head), fresh)
        self._known[run] = _Known(head, made)
        return made

    def _head(self, run: str) -> tuple[str, str, str, str, str]:
        head = self._db.execute("SELECT id, created_at, name, bucket, data FROM run WHERE id=?", (run,)).fetchone()
        if head is None:
            raise KeyError(run)
        id_, created_at, name, bucket, data = head
        return id_, created_at, name, bucket, data

    def _next_state(self, entry: Entry, states: Mapping[str, State]) -> State | None:
        """The state an entry leads to (GONE for one without a machine); None when the ledger cannot take it."""
        if entry.machine is None:
            return State.GONE
        state = states.get(entry.machine)
        if entry.kind == "reserve":
            return State.INTENT if state is None and not self.machine_known(entry.machine) else None
        if state is None or entry.kind not in _EVENTS:
            return state
        return TRANSITIONS.get((state, Event(entry.kind)))

    def _append(
        self,
        run: str,
        stage: str | None,
        machine: str | None,
        kind: str,
        micros: int,
        at: datetime,
        data: Mapping[str, Any],
    ) -> None:
        self._db.execute(
            "INSERT INTO entry(run, stage, machine, kind, micros, at, data) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (run, stage, machine, kind, micros, _iso(at), _dump(data)),
        )

    @contextmanager
    def _write(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk may have ended it already
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.OperationalError as error:
            raise UsageError(
                f"the ledger {self.path} cannot be written: {error}", hint=_ledger_hint(self.path, error)
            ) from error

    def _open_tables(self) -> None:
        version = self._db.execute("SELECT 1 FROM sqlite_master WHERE name='meta'").fetchone()
        if version is None:
            with self._write():
                for statement in _statements(_TABLES):
                    self._db.execute(statement)
                self._db.execute("INSERT OR IGNORE INTO meta VALUES ('schema', ?)", (str(SCHEMA),))
        found = self._db.execute("SELECT value FROM meta WHERE key='schema'").fetchone()
        if found is None or int(found[0]) != SCHEMA:
            raise UsageError(
                f"the ledger {self.path} has schema {found and found[0]}, this kdcloud reads {SCHEMA}",
                hint="use the kdcloud version that wrote it, or set KDCLOUD_HOME to a new folder",
            )

    def _journal(self, say: Callable[[str], None]) -> str:
        if on_network(self.path):
            say(f"{self.path} lies on a network file system: the ledger uses journal_mode=DELETE (slower, safe)")
            return "DELETE"
        return "WAL"

    def _nearest(self, text: str) -> str:
        import difflib

        ids = self.runs()
        near = difflib.get_close_matches(text, ids, n=3, cutoff=0.4) or ids[:3]
        return f"known runs: {', '.join(near)}" if near else "nothing has run yet: kdcloud run quickstart"


def _entry(
    seq: int, run: str, stage: str | None, machine: str | None, kind: str, micros: int, at: str, data: str
) -> Entry:
    return Entry(seq, run, stage, machine, kind, micros, datetime.fromisoformat(at), json.loads(data))


def _unwritten(head: tuple[str, str, str, str, str]) -> Run:
    id_, created_at, name, bucket, data = head
    at = datetime.fromisoformat(created_at)
    return Run(id_, name, at, bucket, json.loads(data), 0, None, {}, (), {}, ())


def _grown(run: Run, fresh: Sequence[Entry]) -> Run:
    """The run with newer entries added: the work is in them and in the machines, not in what was read before."""
    rows = {row.name: row for row in run.machines}
    changes: dict[str, Any] = {}
    done, ends, lost, apis = dict(run.done), list(run.ends), run.lost_micros, dict(run.apis)
    for entry in fresh:
        if entry.machine is not None:
            rows[entry.machine] = _moved(rows.get(entry.machine), entry)
        elif entry.kind == "cap":
            changes = {
                "cap_micros": entry.micros,
                "deadline_s": entry.data["deadline_s"],
                "deadline_from": entry.data["mark"],
            }
        elif entry.kind == "stage_done" and entry.stage is not None:
            done[entry.stage] = entry.data
        elif entry.kind == "ended":
            ends.append(entry)
        elif entry.kind in (API_RESERVE, API_SETTLE) and entry.stage is not None:
            apis[entry.stage] = _booked(apis.get(entry.stage, ApiLine()), entry)
        elif entry.kind in (LOST, ELSEWHERE):  # also of a machine whose reservation is not known here
            lost += entry.micros
    return replace(
        run, machines=tuple(rows.values()), done=done, ends=tuple(ends), entries=(*run.entries, *fresh),
        lost_micros=lost, apis=apis, **changes,
    )  # fmt: skip


def _booked(line: ApiLine, entry: Entry) -> ApiLine:
    """The line after one more entry of its own."""
    if entry.kind == API_SETTLE:
        return replace(line, settled_micros=line.settled_micros + entry.micros, open_micros=0)
    open_ = line.open_micros + entry.micros
    limit = max(line.limit_micros, line.settled_micros + open_)
    return replace(line, open_micros=open_, limit_micros=limit, cap_micros=entry.data["cap_micros"])


def _moved(row: MachineRow | None, entry: Entry) -> MachineRow:
    """The machine after one more entry of its own."""
    if entry.kind == "reserve":
        assert entry.machine is not None and entry.stage is not None
        return MachineRow(
            entry.machine, entry.run, entry.stage, State.INTENT, entry.micros, 0, entry.data, {}, (), entry.at, False,
            None,
        )  # fmt: skip
    assert row is not None, f"{entry.machine} was never reserved"
    if entry.kind == ELSEWHERE:
        return _dearer(row, entry)
    facts = {**row.facts, **entry.data, f"{entry.kind}_at": entry.at.isoformat()}
    if entry.kind not in _EVENTS:  # only one that charges a machine which came up late carries money
        return replace(row, facts=facts, settled_micros=row.settled_micros + entry.micros)
    event = Event(entry.kind)
    return replace(
        row,
        facts=facts,
        state=after(row.state, event),
        settled_micros=row.settled_micros + entry.micros,
        absent_seen=event is Event.ABSENT if event in (Event.ABSENT, Event.PRESENT) else row.absent_seen,
        job_rc=entry.data.get("rc") if event is Event.JOB_ENDED else row.job_rc,
        reasons=(*row.reasons, entry.data["why"]) if entry.data.get("why") else row.reasons,
    )


def _dearer(row: MachineRow, entry: Entry) -> MachineRow:
    """Where two clients tell of different money for one machine, the larger figure counts."""
    if entry.data["kind"] == "reserve":
        return replace(row, reserved_micros=max(row.reserved_micros, entry.micros))
    if row.state is State.GONE:
        return replace(row, settled_micros=max(row.settled_micros, entry.micros))
    return row


def file_system(path: Path) -> str:
    """Type of the file system `path` lies on ('ext4', 'nfs4', ...), '' when it cannot be told."""
    best = ("", "")
    resolved = str(path.resolve())
    for mountpoint, fstype in _mounts():
        mount = mountpoint.rstrip("/") + "/"
        if resolved.startswith(mount) and len(mount) > len(best[0]):
            best = (mount, fstype)
    return best[1]


def _mounts() -> list[tuple[str, str]]:
    """(where, type) of what is mounted. Linux tells it in a file: psutil, which reads the same, is slow to load."""
    try:
        return mounts_in(Path("/proc/self/mounts").read_text(errors="surrogateescape"))
    except OSError:
        import psutil

        return [(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)]


def mounts_in(text: str) -> list[tuple[str, str]]:
    """Of the kernel's table, in which a blank of a name is written \\040."""
    rows = [row for line in text.splitlines() if len(row := line.split(" ")) > 2]
    return [(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), row[1]), row[2]) for row in rows]


def on_network(path: Path) -> bool:
    """Whether `path` lies on a network file system, where SQLite's WAL does not work."""
    return file_system(path) in _NETWORK_FILE_SYSTEMS


def _ledger_hint(path: Path, error: Exception) -> str:
    text = str(error).lower()
    if "locked" in text:
        return "another kdcloud is writing; try again in a moment"
    if "full" in text or getattr(error, "errno", None) == 28:
        return "the disk is full: free some space and run the command again"
    if isinstance(error, PermissionError) or "readonly" in text or "permission" in text:
        return "check the rights of the folder, or set KDCLOUD_HOME to one you can write"
    return (
        f"move {path} aside (keep it: it lists machines that may still bill) and check with `kdcloud down --all` "
        "that nothing is left running"
    )


def _elsewhere(entry: Entry, machine: str | None) -> Entry:
    whole = {
        "stage": entry.stage, "machine": entry.machine, "kind": entry.kind, "at": entry.at.isoformat(),
        "data": dict(entry.data),
    }  # fmt: skip
    return replace(entry, kind=ELSEWHERE, machine=machine, data=whole)


def _statements(script: str) -> list[str]:
    """Statements of a script whose triggers hold semicolons of their own: one that ends in `;` at a line's end."""
    found, current = [], ""
    for line in script.strip().splitlines():
        current += line + "\n"
        if sqlite3.complete_statement(current):
            found.append(current)
            current = ""
    return found


def _iso(at: datetime) -> str:
    """UTC, so that texts sort like times and begin with the month they belong to."""
    return at.astimezone(UTC).isoformat()


def _dump(data: Mapping[str, Any]) -> str:
    return json.dumps(data, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} does not belong into the ledger")
