"""The ledger keeps what was reserved and spent, refuses what does not fit, and forgets nothing."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import ledger as ledger_module
from orchestrator.errors import BudgetExceeded, UsageError
from orchestrator.ledger import Ledger
from orchestrator.states import Event, State
from orchestrator.testing import START

MARK = {"wall": START.isoformat(), "boot_id": "b", "boot_s": 0.0}


def make_run(ledger: Ledger, run: str = "q-abc123", cap: int = 1000) -> str:
    ledger.create_run(run, name="q", bucket="file:/x", cap_micros=cap, deadline_s=None, mark=MARK, at=START, data={})
    return run


def reserve(ledger: Ledger, run: str, machine: str, micros: int, later: int = 0) -> None:
    ledger.reserve(run, "label", machine, micros, START, later_floor=later, order={"offer_index": 0, "bound": "cap"})


def end(ledger: Ledger, machine: str, micros: int) -> None:
    for event in (Event.SENT, Event.UP, Event.STOP, Event.ABSENT):
        ledger.move(machine, event, START)
    ledger.move(machine, Event.GONE, START, micros=micros)


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(tmp_path / "home" / "ledger.sqlite")
    yield made
    made.close()


def test_a_reservation_that_would_pass_the_cap_is_refused_and_leaves_no_trace(ledger):
    run = make_run(ledger)
    reserve(ledger, run, "kd-1", 600, later=100)
    with pytest.raises(BudgetExceeded):
        reserve(ledger, run, "kd-2", 301, later=100)
    assert [m.name for m in ledger.run(run).machines] == ["kd-1"]
    reserve(ledger, run, "kd-3", 300, later=100)


def test_settling_gives_the_rest_of_a_reservation_back(ledger):
    run = make_run(ledger)
    reserve(ledger, run, "kd-1", 1000)
    end(ledger, "kd-1", 250)
    known = ledger.run(run)
    assert (known.spent_micros, known.open_micros) == (250, 0)
    reserve(ledger, run, "kd-2", 750)


def test_a_machine_whose_teardown_is_not_confirmed_keeps_its_reservation(ledger):
    run = make_run(ledger)
    reserve(ledger, run, "kd-1", 900)
    for event in (Event.SENT, Event.UP, Event.STOP, Event.ABSENT):
        ledger.move("kd-1", event, START)
    known = ledger.run(run)
    assert known.machines[0].state is State.TEARDOWN_PENDING
    assert known.open_micros == 900 and [m.name for m in known.live] == ["kd-1"]


def test_a_move_off_the_table_is_refused_and_not_written(ledger):
    run = make_run(ledger)
    reserve(ledger, run, "kd-1", 10)
    before = len(ledger.run(run).entries)
    with pytest.raises(ValueError):
        ledger.move("kd-1", Event.GONE, START)
    assert len(ledger.run(run).entries) == before


def test_one_name_is_reserved_once(ledger):
    run = make_run(ledger)
    reserve(ledger, run, "kd-1", 10)
    with pytest.raises(sqlite3.IntegrityError):
        reserve(ledger, run, "kd-1", 10)


@pytest.mark.parametrize(
    "statement", ["DELETE FROM entry", "UPDATE entry SET micros=0", "DELETE FROM run", "UPDATE run SET name='x'"]
)
def test_nothing_is_ever_changed_or_deleted(ledger, statement):
    make_run(ledger)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        ledger._db.execute(statement)


def test_two_processes_cannot_reserve_the_same_dollar(tmp_path):
    path = tmp_path / "ledger.sqlite"
    run = make_run(Ledger(path), cap=1000)
    won, lost = [], []

    def client(number: int) -> None:
        mine = Ledger(path)
        try:
            reserve(mine, run, f"kd-{number}", 300)
            won.append(number)
        except BudgetExceeded:
            lost.append(number)
        mine.close()

    threads = [threading.Thread(target=client, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 3 and len(lost) == 5
    assert Ledger(path).run(run).open_micros == 900


def test_only_its_owner_may_read_the_ledger(ledger):
    assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600


def test_a_corrupt_ledger_is_one_clear_sentence_with_what_to_do(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"this is not a database, it is a shopping list " * 50)
    with pytest.raises(UsageError, match="cannot be used") as caught:
        Ledger(path)
    assert "move" in caught.value.hint
    assert path.read_bytes().startswith(b"this is not")


def test_a_ledger_of_another_schema_names_what_to_do(tmp_path):
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value='99'")
    with pytest.raises(UsageError, match="schema 99"):
        Ledger(path)


def test_runs_are_found_by_end_beginning_or_whole_name_and_a_wrong_one_names_the_nearest(ledger):
    make_run(ledger, "alpha-aaaaaa")
    make_run(ledger, "alpine-bbbbbb")
    assert ledger.find("bbbbbb") == "alpine-bbbbbb"
    assert ledger.find("alph") == "alpha-aaaaaa"
    with pytest.raises(UsageError, match="may be"):
        ledger.find("alp")
    with pytest.raises(UsageError) as caught:
        ledger.find("alpha-aaaaab")
    assert "alpha-aaaaaa" in caught.value.hint


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(0, 600), st.floats(0, 1)), max_size=12))
def test_spent_plus_open_never_passes_the_cap_while_machines_settle_within_their_reservation(tmp_path_factory, steps):
    made = Ledger(tmp_path_factory.mktemp("ledger") / "ledger.sqlite")
    run = make_run(made)
    for number, (micros, share) in enumerate(steps):
        try:
            reserve(made, run, f"kd-{number}", micros)
        except BudgetExceeded:
            continue
        if share > 0.3:
            end(made, f"kd-{number}", int(micros * share))
        known = made.run(run)
        assert known.spent_micros + known.open_micros <= known.cap_micros
    made.close()


def unwritable(made: Ledger, how: str):
    """The ledger as it is on a full disk, in a folder that became read-only, or while another process writes."""
    if how == "full":
        made._db.execute(f"PRAGMA max_page_count={made._db.execute('PRAGMA page_count').fetchone()[0]}")
    elif how == "readonly":
        made._db.execute("PRAGMA query_only=1")
    else:
        made._db.execute("PRAGMA busy_timeout=50")
        other = sqlite3.connect(made.path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        return other
    return None


@pytest.mark.parametrize(
    ("how", "says"), [("full", "free some space"), ("readonly", "rights"), ("locked", "try again")]
)
def test_a_ledger_that_cannot_be_written_is_one_clear_sentence_and_loses_nothing(ledger, how, says):
    run = make_run(ledger)
    reserve(ledger, run, "kd-1", 100)
    other = unwritable(ledger, how)
    long = {"why": "x" * 200_000}  # more than the pages that are there
    for write in (
        lambda: ledger.move("kd-1", Event.SENT, START, data=long),
        lambda: ledger.note(run, "warning", START, data=long),
        lambda: ledger.reserve(run, "s", "kd-2", 1, START, later_floor=0, order=long),
    ):
        with pytest.raises(UsageError, match="cannot be written") as caught:
            write()
        assert says in caught.value.hint
    assert [m.state for m in ledger.run(run).machines] == [State.INTENT]
    if other is not None:
        other.execute("ROLLBACK")
        ledger.move("kd-1", Event.SENT, START)
        assert [m.state for m in ledger.run(run).machines] == [State.CREATING]


def test_every_entry_is_folded_once_however_often_the_run_is_read(monkeypatch):
    made, folded = Ledger.in_memory(), []
    moved = ledger_module._moved
    monkeypatch.setattr(ledger_module, "_moved", lambda row, entry: folded.append(entry.seq) or moved(row, entry))
    run = make_run(made, cap=10**9)
    for number in range(30):
        reserve(made, run, f"kd-{number}", 10)
        made.run(run)
        end(made, f"kd-{number}", 5)
        made.run(run)
    assert len(folded) == len(set(folded)) == 30 * 6  # a reservation and five moves each


@pytest.mark.parametrize("open_here", [1, 2])
def test_what_is_written_here_is_seen_by_others_however_many_ledgers_this_process_opened(
    tmp_path: Path, open_here: int
) -> None:
    """Another process that opens the file and leaves may not take the write-ahead log away from us."""
    path = tmp_path / "ledger.sqlite"
    mine = [Ledger(path) for _ in range(open_here)]
    look = (
        "import sys; from pathlib import Path; from orchestrator.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1])); print(len(ledger.runs())); ledger.close()"
    )
    for count in (1, 2):
        make_run(mine[0], f"q-abc12{count}")
        seen = subprocess.run([sys.executable, "-c", look, str(path)], capture_output=True, text=True, check=True)
        assert seen.stdout.strip() == str(count)
    for one in mine:
        one.close()


def test_the_file_system_is_that_of_the_longest_mount_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = f"{tmp_path}/my\\040home"
    table = f"x {here}/scratch xfs rw\nserver:/home {here} nfs4 rw 0 0\n/dev/a / ext4 rw 0 0\n\n"
    mounts = ledger_module.mounts_in(table)
    assert mounts == [(f"{tmp_path}/my home/scratch", "xfs"), (f"{tmp_path}/my home", "nfs4"), ("/", "ext4")]
    monkeypatch.setattr(ledger_module, "_mounts", lambda: mounts)
    there = [tmp_path, tmp_path / "my home" / "x", tmp_path / "my home" / "scratch" / "x", tmp_path / "my home2"]
    assert [ledger_module.file_system(path) for path in there] == ["ext4", "nfs4", "xfs", "ext4"]
    assert [ledger_module.on_network(path) for path in there] == [False, True, False, False]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's table")
def test_the_kernels_table_says_what_psutil_says(tmp_path: Path) -> None:
    import psutil

    theirs = [(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)]
    assert ledger_module._mounts() and {*theirs} <= {*ledger_module._mounts()}
