"""The ledger in the bucket: rebuilt on another computer, never ahead of what was done, written by one client only.

Money is read from the fake provider's own invoice.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.bounded import Bounded
from orchestrator.clock import SystemClock
from orchestrator.errors import NotOwner, UsageError
from orchestrator.lease import LEASE_S, RENEW_S, Lease
from orchestrator.ledger import LOST, Ledger
from orchestrator.mirror import FOLLOW_S, HEAD, Follower, Mirror, adopt, catch_up, compare, identity, key_of, read_pages
from orchestrator.runner import BUCKET_PATIENCE_S, Runner, mark_to_dict
from orchestrator.shares import visits
from orchestrator.testing import START, FakeBucket, Faults, VirtualClock, fake_offer
from tasks.bucket import BucketError, Probe, Unsupported
from tests.plans import make_plan
from tests.test_bucket import s3, s3_endpoint  # noqa: F401
from tests.test_runner import WORK, Killed, World
from tests.whole_runs import make_home

RUN = "test-abc123"


class Elsewhere(World):
    """A world whose client can lose its home: the next one knows the bucket's address and nothing else."""

    homes = 0

    def lose_home(self) -> tuple[str, ...]:
        """A new home, rebuilt from the bucket. What a person is told."""
        self.path.unlink(missing_ok=True)
        self.homes += 1
        self.path = self.folder / f"home-{self.homes}" / "ledger.sqlite"
        ledger = Ledger(self.path)
        run_id, notes = adopt(ledger, self.bucket)
        assert run_id == RUN
        ledger.close()
        return notes

    def client_elsewhere(self, **how):
        self.clock.sleep(LEASE_S + 1)
        ledger = Ledger(self.path)
        ledger.note(RUN, "resumed", self.clock.mark().wall)
        ledger.close()
        return self.client(**how)

    def runner(self, path: Path, lease: Lease) -> Runner:
        return Runner(
            ledger=Ledger(path),
            provider=self.provider,
            bucket=self.bucket,
            clock=self.clock,
            plan=self.plan,
            run_id=RUN,
            owner="owner1",
            lease=lease,
            code_folder=self.folder / "code",
            call_limit_s=None,
        )


def kinds(bucket) -> list[str]:
    return [w.entry.kind for w in read_pages(bucket, RUN).written]


def test_every_entry_of_a_run_is_in_the_bucket_in_order_and_with_its_fencing_number(tmp_path):
    world = Elsewhere(tmp_path)
    assert world.client().state == "done"
    pages = read_pages(world.bucket, RUN)
    assert [identity(w.entry) for w in pages.written] == [identity(e) for e in world.run.entries]
    assert {w.fence for w in pages.written} == {1} and pages.missing == ()
    assert [e.kind for e in world.run.entries].count("reserve") == len(WORK)


def test_a_rebuilt_ledger_tells_the_same_as_the_lost_one(tmp_path):
    world = Elsewhere(tmp_path, faults=lambda order, count: Faults(lost_after_s=200.0 if count == 0 else None))
    world.client(turns=60)
    before = world.run
    assert world.lose_home() == ()
    after = world.run
    assert [identity(e) for e in after.entries] == [identity(e) for e in before.entries][: len(after.entries)]
    assert len(before.entries) - len(after.entries) <= 1
    same = ("id", "name", "created_at", "data", "cap_micros", "deadline_s", "done")
    assert [getattr(after, name) for name in same] == [getattr(before, name) for name in same]


def test_a_turn_without_news_asks_the_bucket_nothing(tmp_path):
    world = Elsewhere(tmp_path)
    world.client(turns=20)
    ledger, lease = Ledger(world.path), None
    world.clock.sleep(LEASE_S + 1)
    lease = Lease.acquire(world.bucket, "owner1", world.clock)
    mirror = Mirror(ledger, world.bucket, RUN, lease, world.clock)
    assert mirror.flush()
    world.clock.sleep(RENEW_S)  # a lease would be renewed, too
    world.bucket._store = {}  # whatever is asked now fails
    assert mirror.flush()


@pytest.mark.parametrize("seed", range(15))
def test_homes_that_are_lost_at_any_turn_change_neither_the_end_nor_the_money(tmp_path, seed):
    random_ = random.Random(seed)
    world = Elsewhere(tmp_path)
    world.client(turns=random_.randint(2, 40))
    while world.run.ends == ():
        assert world.lose_home() == ()
        outcome = world.client_elsewhere(turns=random_.randint(3, 60))
        assert outcome is None or outcome.state == "done"
    assert list(world.run.done) == list(WORK)
    assert [e.stage for e in world.run.entries if e.kind == "stage_done"] == list(WORK)  # no stage twice
    world.check_money()


@pytest.mark.parametrize("statement", [*range(3, 25), *range(26, 100, 5)])
def test_whatever_was_made_stands_in_the_bucket_wherever_the_client_dies(tmp_path, monkeypatch, statement):
    """Dies before or after the n-th call that leaves the process; then its home is lost, too."""
    world = Elsewhere(tmp_path)
    count = 0

    def dying(original):
        def call(*args, **kwargs):
            nonlocal count
            for before in (True, False):
                count += 1
                if count == statement:
                    raise Killed
                if before:
                    result = original(*args, **kwargs)
            return result

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_append", dying(Ledger._append))
        patch.setattr(world.bucket, "put", dying(world.bucket.put))
        for name in ("launch", "run", "terminate"):
            patch.setattr(world.provider, name, dying(getattr(world.provider, name)))
        assert world.client() is None
    known = {w.entry.machine for w in read_pages(world.bucket, RUN).written if w.entry.kind == "sent"}
    assert set(world.provider.live()) <= known
    if world.bucket.head(HEAD) is None:  # it died before it could have made anything
        assert world.provider.calls == []
        return
    assert world.lose_home() == ()
    assert world.client_elsewhere().state == "done"
    assert [e.stage for e in world.run.entries if e.kind == "stage_done"] == list(WORK)
    world.check_money()


@pytest.mark.parametrize("statement", range(3, 50))
def test_an_old_client_that_wakes_after_its_lease_expired_writes_no_entry_and_launches_nothing(
    tmp_path, monkeypatch, statement
):
    """It sleeps in its n-th call of ledger or bucket, before or after the effect, while another computer goes on."""
    world = Elsewhere(tmp_path)
    old_path, count, after_it, launches = world.path, 0, [], []
    launch = world.provider.launch

    def sleeping(original):
        def call(*args, **kwargs):
            nonlocal count
            for before in (True, False):
                count += 1
                if count == statement:
                    patch.undo()
                    another()
                if before:
                    result = original(*args, **kwargs)
            return result

        return call

    def another():
        """Takes the run over and brings it to its end, then the old one wakes."""
        if world.bucket.head(HEAD) is None:
            raise Killed
        world.path = tmp_path / "second" / "ledger.sqlite"
        ledger = Ledger(world.path)
        adopt(ledger, world.bucket)
        ledger.close()
        assert world.client_elsewhere().state == "done"
        after_it.append(sorted(s.key for s in world.bucket.list("ledger/")))
        world.provider.launch = lambda order: launches.append(order.name) or launch(order)

    lease = Lease.acquire(world.bucket, "owner1", world.clock)
    runner = world.runner(old_path, lease)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_append", sleeping(Ledger._append))
        patch.setattr(world.bucket, "put", sleeping(world.bucket.put))
        with pytest.raises((NotOwner, Killed)):
            runner.run(turn_s=5.0)
    if not after_it:
        assert world.provider.calls == []
        return
    late = {s.key for s in world.bucket.list("ledger/")} - set(after_it[0])
    assert late <= {key_of(len(after_it[0]))}, "more than the one write that was under way"
    assert launches == []
    world.check_money()


def test_an_old_client_that_wakes_with_a_job_to_start_leaves_the_new_ones_task_alone(tmp_path):
    world = Elsewhere(tmp_path)
    old_path, observe, after_it, running = world.path, world.provider.observe, [], []

    def stale(name):
        seen = observe(name)
        running.extend([name] if str(seen.state) == "running" else [])
        if len(running) == 2:  # up already, and its job is not sent
            world.provider.observe = observe
            world.lose_home()
            assert world.client_elsewhere().state == "done"
            after_it.append((dict(world.bucket._store), list(world.provider.calls)))
        return seen

    runner = world.runner(old_path, Lease.acquire(world.bucket, "owner1", world.clock))
    world.provider.observe = stale
    with pytest.raises(NotOwner):
        runner.run(turn_s=5.0)
    assert after_it == [(world.bucket._store, world.provider.calls)]


@pytest.mark.parametrize("must", [True, False])
def test_a_client_that_slept_through_its_lease_writes_nothing_even_where_the_new_one_has_not_written_yet(
    tmp_path, must
):
    world = Elsewhere(tmp_path)
    world.client(turns=4)
    world.clock.sleep(LEASE_S + 1)
    old = Lease.acquire(world.bucket, "owner1", world.clock)
    ledger = Ledger(world.path)
    mirror = Mirror(ledger, world.bucket, RUN, old, world.clock)
    assert mirror.flush(must=must)
    world.clock.sleep(LEASE_S + 1)
    Lease.acquire(world.bucket, "owner1", world.clock)
    ledger.note(RUN, "warning", START)
    before = dict(world.bucket._store)
    with pytest.raises(NotOwner):
        mirror.flush(must=must)
    assert world.bucket._store == before


def test_a_client_that_finds_its_number_taken_counts_what_is_there_and_starts_nothing(tmp_path):
    """The one write that an old client had under way when it fell asleep."""
    world = Elsewhere(tmp_path)
    world.client(turns=4)
    old = Ledger(world.path).run(RUN)
    world.lose_home()
    world.clock.sleep(LEASE_S + 1)
    lease = Lease.acquire(world.bucket, "owner1", world.clock)
    ledger = Ledger(world.path)
    mirror = Mirror(ledger, world.bucket, RUN, lease, world.clock)
    assert mirror.flush(must=True)
    reserve = next(e for e in old.entries if e.kind == "reserve")
    late = {
        "schema": 1, "run": RUN, "n": read_pages(world.bucket, RUN).next, "fence": 1, "stage": "train",
        "machine": "kd-owner1-abc123-train-zzzzzz", "kind": "reserve", "micros": 1234, "at": START.isoformat(),
        "data": dict(reserve.data),
    }  # fmt: skip
    world.bucket.put(key_of(late["n"]), json.dumps(late).encode())
    ledger.note(RUN, "resumed", START)
    open_before = ledger.run(RUN).open_micros
    assert not mirror.flush(must=True)
    assert "another client" in mirror.trouble
    assert ledger.run(RUN).open_micros == open_before + 1234
    assert mirror.flush(must=True)  # known now, and our own entry is behind it
    assert kinds(world.bucket)[-2:] == ["reserve", "resumed"]


def test_a_run_that_wandered_to_another_computer_and_back_ends_as_if_it_had_not(tmp_path):
    world = Elsewhere(tmp_path)
    first = world.path
    world.client(turns=25)
    Ledger(first).note(RUN, "warning", world.clock.mark().wall)  # one entry that the bucket never got
    kept = first.read_bytes()
    world.lose_home()
    world.client_elsewhere(turns=40)
    first.write_bytes(kept)
    world.path = first
    ledger = Ledger(first)
    assert catch_up(ledger, world.bucket, RUN) == ()
    ledger.close()
    assert world.client_elsewhere().state == "done"
    assert [e.stage for e in world.run.entries if e.kind == "stage_done"] == list(WORK)
    world.check_money()
    there = read_pages(world.bucket, RUN)
    known, news = compare(world.run.entries, there.written)
    assert news == [] and len(known) == len(world.run.entries) == len(there.written)


def test_a_machine_that_two_clients_ended_counts_at_the_dearer_figure(tmp_path):
    world = Elsewhere(tmp_path)
    world.client(turns=12)
    name = world.run.machines[0].name
    world.lose_home()
    world.client_elsewhere(turns=60)
    mine = Ledger(world.path)
    settled = {m.name: m.settled_micros for m in mine.run(RUN).machines}[name]
    assert settled > 0
    theirs = [e for e in mine.run(RUN).entries if e.machine == name and e.kind == "gone"]
    for micros in (settled - 1, settled + 5):
        seen = len(mine.run(RUN).entries)
        _, contradicting = mine.absorb(RUN, [replace(theirs[0], micros=micros)], seen=seen)
        assert mine.absorb(RUN, theirs, seen=seen) is None  # somebody wrote meanwhile: look again
        assert [e.kind for e in contradicting] == ["gone"]
    assert {m.name: m.settled_micros for m in mine.run(RUN).machines}[name] == settled + 5


def test_a_watcher_elsewhere_sees_entries_as_they_come_and_none_twice(tmp_path):
    world = Elsewhere(tmp_path)
    world.client(turns=6)
    ledger = Ledger(tmp_path / "watcher" / "ledger.sqlite")
    adopt(ledger, world.bucket)
    watcher = Follower(ledger, world.bucket, RUN, world.clock)
    watcher.look()
    world.clock.sleep(LEASE_S)
    Ledger(world.path).note(RUN, "resumed", world.clock.mark().wall)
    counts = []
    lease = Lease.acquire(world.bucket, "owner1", world.clock)
    runner = world.runner(world.path, lease)
    runner.run(turn_s=5.0, on_turn=lambda snapshot: (watcher.look(), counts.append(len(ledger.run(RUN).entries))))
    world.clock.sleep(FOLLOW_S)
    watcher.look()
    assert len(set(counts)) > 10
    assert [identity(e) for e in ledger.run(RUN).entries] == [identity(e) for e in world.run.entries]


def test_a_cap_that_was_raised_elsewhere_counts_and_is_said(tmp_path):
    world = Elsewhere(tmp_path)
    first = world.path
    world.client(turns=8)
    kept = first.read_bytes()
    world.lose_home()
    Ledger(world.path).set_cap(RUN, 2_000_000, None, mark_to_dict(world.clock.mark()), world.clock.mark().wall)
    world.client_elsewhere(turns=8)
    first.write_bytes(kept)
    (note,) = catch_up(Ledger(first), world.bucket, RUN)
    assert "raised elsewhere" in note and "$2.00" in note
    assert Ledger(first).run(RUN).cap_micros == 2_000_000


def test_what_a_machine_cost_whose_reservation_is_missing_counts_as_spent(tmp_path):
    world = Elsewhere(tmp_path)
    world.client(turns=90)
    pages = read_pages(world.bucket, RUN)
    gone = next(w for w in pages.written if w.entry.kind == "gone")
    reserve = next(w for w in pages.written if w.entry.machine == gone.entry.machine)
    world.bucket.delete(key_of(reserve.number))
    world.lose_home()
    assert gone.entry.machine not in [m.name for m in world.run.machines]
    (gap,) = [e for e in world.run.entries if e.kind == LOST]
    assert world.run.lost_micros - gap.micros == gone.entry.micros > 0


# -- gaps and hostile entries ------------------------------------------------------------------------------------------


def test_with_any_entry_missing_all_that_was_left_counts_as_spent_and_a_person_is_told(tmp_path):
    world = Elsewhere(tmp_path)
    world.client(turns=90)
    world.provider.launch = None  # nothing may be launched from here on
    whole = dict(world.bucket._store)
    numbers = [w.number for w in read_pages(world.bucket, RUN).written]
    assert len(numbers) > 8
    for number in numbers[1:-1]:
        world.bucket._store.clear()
        world.bucket._store.update(whole)
        world.bucket.delete(key_of(number))
        (note,) = [text for text in world.lose_home() if "missing" in text]
        assert f" {number} " in note and "--budget" in note
        run = world.run
        assert run.spent_micros + run.open_micros >= run.cap_micros and run.lost_micros > 0
        again = catch_up(Ledger(world.path), world.bucket, RUN)
        assert not [text for text in again if "missing" in text] and world.run.lost_micros == run.lost_micros


def test_gaps_that_this_computer_can_fill_cost_nothing(tmp_path):
    world = Elsewhere(tmp_path)
    world.client(turns=90)
    for number in (2, 5):
        world.bucket.delete(key_of(number))
    ledger = Ledger(world.path)
    assert catch_up(ledger, world.bucket, RUN) == ()
    ledger.close()
    assert world.client_elsewhere().state == "done"
    assert read_pages(world.bucket, RUN).missing == ()
    assert not [e for e in world.run.entries if e.kind == LOST]
    assert world.lose_home() == ()
    world.check_money()


def test_an_entry_of_a_client_that_had_lost_the_run_is_counted_and_named(tmp_path):
    world = Elsewhere(tmp_path)
    world.client(turns=10)
    world.clock.sleep(LEASE_S + 1)
    Ledger(world.path).note(RUN, "resumed", START)
    world.client(turns=10)
    number = read_pages(world.bucket, RUN).next - 1
    last = json.loads(world.bucket.get(key_of(number))[0])
    assert last["fence"] == 2
    world.bucket.put(key_of(number + 1), json.dumps({**last, "n": number + 1, "fence": 1, "kind": "late"}).encode())
    assert any("had lost the run" in text for text in world.lose_home())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("schema", "run", "n", "fence", "stage", "machine", "kind", "micros", "at", "data")
KINDS = ("cap", "reserve", "gone", "up", "ended", "lost")


@settings(max_examples=150)
@given(field=st.sampled_from(FIELDS), value=JSON, kind=st.sampled_from(KINDS))
def test_whatever_a_machine_writes_among_the_entries_the_ledger_can_be_read(field, value, kind):
    clock = VirtualClock()
    bucket, ledger = FakeBucket(clock).at(RUN), Ledger.in_memory()
    mark = {"wall": START.isoformat(), "boot_id": "b", "boot_s": 0.0}
    made = Ledger.in_memory()
    made.create_run(
        RUN, name="t", bucket="fake:", cap_micros=100, deadline_s=None, mark=mark, at=START, data={"owner": "owner1"}
    )
    mirror = Mirror(made, bucket, RUN, Lease.acquire(bucket, "o", clock), clock)
    assert mirror.flush()
    entry = {
        "schema": 1, "run": RUN, "n": 2, "fence": 1, "stage": "s", "machine": "kd-1", "kind": kind, "micros": 5,
        "at": START.isoformat(), "data": {"offer": {}, "attempt": 1, "lifetime_s": 1.0},
    }  # fmt: skip
    bucket.put(key_of(2), json.dumps({**entry, field: value}).encode())
    adopt(ledger, bucket)
    run = ledger.run(RUN)
    assert run.spent_micros + run.open_micros >= 0 and run.cap_micros >= 0


@settings(max_examples=150)
@given(then=JSON, serves=JSON, passed=JSON | st.dictionaries(st.sampled_from("ab"), JSON), until=JSON | st.floats())
def test_whatever_it_writes_of_the_stages_of_a_machine_they_can_be_told(then, serves, passed, until):
    bucket, ledger = FakeBucket(VirtualClock()).at(RUN), Ledger.in_memory()
    head = {"schema": 1, "id": RUN, "name": "t", "created_at": START.isoformat(), "data": {"owner": "owner1"}}
    bucket.put(HEAD, json.dumps(head).encode())
    order = {"offer": {}, "attempt": 1, "lifetime_s": 1.0, "then": [["b", 1, 1.0]]}
    entries = [
        ("reserve", order | ({"then": then} if then else {})),
        ("next", {"serves": serves, "passed": passed}),
        ("launched", {"passed": {"a": {"until_s": until}}}),
        *([("next", {"serves": "b"})] if serves is None else []),
        ("sent", {}), ("up", {}), ("stop", {}), ("gone", {"billed_s": 10.0}),
    ]  # fmt: skip
    for number, (kind, data) in enumerate(entries, 1):
        entry = {"schema": 1, "run": RUN, "n": number, "fence": 1, "stage": "a", "machine": "kd-1", "kind": kind}
        entry |= {"micros": 5, "at": START.isoformat(), "data": data}
        bucket.put(key_of(number), json.dumps(entry).encode())
    adopt(ledger, bucket)
    for row in ledger.run(RUN).machines:
        assert row.serves in row.stages and row.attempt == dict(row.chain)[row.serves]
        told = [one.micros for one in visits(row)]
        assert told[0] is None or sum(told) == row.settled_micros


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', '{"schema": 9, "id": "x"}'])
def test_a_head_that_cannot_be_read_is_one_sentence(text):
    bucket = FakeBucket(VirtualClock()).at(RUN)
    bucket.put(HEAD, text.encode())
    with pytest.raises(UsageError, match="read"):
        adopt(Ledger.in_memory(), bucket)


def test_a_run_id_in_the_bucket_cannot_be_a_path(tmp_path):
    world = Elsewhere(tmp_path)
    world.client(turns=5)
    head = json.loads(world.bucket.get(HEAD)[0])
    world.bucket.put(HEAD, json.dumps({**head, "id": "../../etc"}).encode())
    with pytest.raises(UsageError):
        adopt(Ledger.in_memory(), world.bucket)


def test_the_root_of_a_bucket_names_the_runs_in_it(tmp_path):
    world = Elsewhere(tmp_path)
    world.client(turns=5)
    root = FakeBucket(world.clock, store=world.bucket._store)
    with pytest.raises(UsageError, match=RUN):
        adopt(Ledger.in_memory(), root)
    with pytest.raises(UsageError, match="no run"):
        adopt(Ledger.in_memory(), root.at("nothing"))


# -- a store that is away or knows no conditions -----------------------------------------------------------------------


class Moody:
    """A store that fails, or has no conditional writes, when told to."""

    def __init__(self, inner, *, conditional: bool = True) -> None:
        self._inner, self.away, self._conditional = inner, False, conditional
        self.url = inner.url

    def __getattr__(self, name):
        def call(*args, **kwargs):
            if self.away:
                raise BucketError("the store is away", hint="wait")
            if not self._conditional and (kwargs.get("if_none_match") or kwargs.get("if_match")):
                raise Unsupported("no conditional writes")
            return getattr(self._inner, name)(*args, **kwargs)

        return call


def test_without_a_bucket_nothing_is_launched_and_the_run_says_so_in_time(tmp_path):
    world = Elsewhere(tmp_path)
    world.bucket = Moody(world.bucket)
    runner = world.runner(world.path, Lease.acquire(world.bucket, "owner1", world.clock))
    world.bucket.away = True
    began = world.clock.elapsed_s
    outcome = runner.run(turn_s=5.0)
    assert outcome.state == "failed" and "--resume" in outcome.hint
    assert world.provider.calls == []
    assert BUCKET_PATIENCE_S <= world.clock.elapsed_s - began <= BUCKET_PATIENCE_S + 30
    world.check_money()


@pytest.mark.parametrize("turns", range(1, 40, 3))
def test_a_bucket_that_goes_away_holds_up_no_teardown(tmp_path, turns):
    world = Elsewhere(tmp_path)
    world.bucket = Moody(world.bucket)
    runner = world.runner(world.path, Lease.acquire(world.bucket, "owner1", world.clock))
    count = 0

    def stop() -> bool:
        nonlocal count
        count += 1
        world.bucket.away = count >= turns
        return count >= turns

    runner.stop = stop
    alive: list[float] = []

    def on_turn(snapshot) -> None:
        if count >= turns and world.provider.live():
            alive.append(world.clock.elapsed_s)

    assert runner.run(turn_s=1.0, on_turn=on_turn).state == "stopped"
    assert not alive or alive[-1] - alive[0] < 10
    world.check_money()


def test_a_bucket_that_is_back_in_time_costs_only_the_wait(tmp_path):
    world = Elsewhere(tmp_path)
    world.bucket = Moody(world.bucket)
    runner = world.runner(world.path, Lease.acquire(world.bucket, "owner1", world.clock))
    world.bucket.away = True
    until = world.clock.elapsed_s + 120

    def stop() -> bool:
        world.bucket.away = world.clock.elapsed_s < until
        return False

    runner.stop = stop
    assert runner.run(turn_s=5.0).state == "done"
    assert len(world.run.machines) == len(WORK)
    world.check_money()


def test_a_store_without_conditional_writes_works_for_one_client(tmp_path):
    world = Elsewhere(tmp_path)
    world.bucket = Moody(world.bucket, conditional=False)
    assert world.client().state == "done"
    assert world.lose_home() == ()
    world.check_money()


def test_a_store_that_hangs_holds_nobody_up_and_what_arrives_late_does_no_harm(tmp_path):
    world, clock = Elsewhere(tmp_path), SystemClock()
    store = world.bucket
    put, bucket = store.put, Bounded(store, clock, limit_s=0.2)
    lease = Lease.acquire(bucket, "owner1", clock)
    mirror = Mirror(Ledger(world.path), bucket, RUN, lease, clock)
    store.put = lambda *args, **kwargs: time.sleep(1.0) or put(*args, **kwargs)
    began = time.monotonic()
    assert not mirror.flush(must=True)
    assert "did not answer" in mirror.trouble
    for _ in range(50):  # it is left alone for a while
        with pytest.raises(BucketError, match="did not answer"):
            bucket.at("train").get("task.json")
    assert time.monotonic() - began < 0.9
    store.put = put
    time.sleep(1.2)  # the write that was given up arrives after all
    bucket._sick.since = None
    assert mirror.flush(must=True)
    assert kinds(store) == ["cap"]


def test_an_s3_store_holds_the_ledger_and_keeps_two_clients_apart(s3, tmp_path):  # noqa: F811
    clock, bucket = SystemClock(), s3.at(RUN)
    mark = clock.mark()
    first, second = (Ledger(tmp_path / name / "ledger.sqlite") for name in ("one", "two"))
    first.create_run(
        RUN, name="t", bucket=bucket.url, cap_micros=1000, deadline_s=None, mark=mark_to_dict(mark), at=mark.wall,
        data={"owner": "owner1"},
    )  # fmt: skip
    lease = Lease.acquire(bucket, "owner1", clock)
    mirror = Mirror(first, bucket, RUN, lease, clock)
    for number in range(40):
        first.note(RUN, "warning", clock.mark().wall, data={"text": f"no {number}: 漢 <&>"})
    assert mirror.flush(must=True)
    assert adopt(second, bucket) == (RUN, ())
    assert [identity(e) for e in second.run(RUN).entries] == [identity(e) for e in first.run(RUN).entries]

    lease.release()
    newer = Lease.acquire(bucket, "owner1", clock)
    taken_over = Mirror(second, bucket, RUN, newer, clock)
    second.note(RUN, "resumed", clock.mark().wall)
    assert taken_over.flush(must=True)
    first.note(RUN, "warning", clock.mark().wall, data={"text": "from the one that was asleep"})
    with pytest.raises(NotOwner):
        mirror.flush()
    assert catch_up(first, bucket, RUN) == ()
    assert [e.kind for e in first.run(RUN).entries][-2:] == ["warning", "resumed"]
    assert read_pages(bucket, RUN).written[-1].fence == newer.fence == 2


# -- the command line --------------------------------------------------------------------------------------------------

RECIPE = """
name: wander
budget: 2 CNY
infra: local
local: {price: 0.10 USD/h}
bucket: file:bucket
stages:
  - {name: one, kind: rehearse, steps: 30, seconds_per_step: 0.1}
  - {name: two, kind: rehearse, steps: 5, seconds_per_step: 0.01}
"""


def test_a_run_goes_on_from_another_computer_by_its_address_alone(tmp_path):
    home = make_home(tmp_path, RECIPE)
    client = home.start("run", "recipe.yaml", "--yes")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "bucket").glob("*/one/progress.json")):
        assert time.monotonic() < deadline and client.poll() is None, (tmp_path / "client.log").read_text()
        time.sleep(0.1)
    (run,) = [f for f in (tmp_path / "bucket").iterdir() if (f / "lease.json").exists()]
    client.send_signal(signal.SIGKILL)
    client.wait()
    for process in home.machine_processes():  # the laptop is dead, and all that ran on it
        with suppress(psutil.NoSuchProcess):
            process.kill()
    shutil.rmtree(tmp_path / "home")

    assert run.name in home.call("adopt", f"file:{tmp_path}/bucket").stderr  # which one was it?
    taken = home.call("adopt", f"file:{run}")
    assert taken.returncode == 0 and taken.stdout.strip() == run.name, taken.stderr
    assert "1 machines may still bill" in taken.stderr
    done = home.call("run", "--resume", f"file:{run}")
    assert done.returncode == 0, done.stderr
    report = home.json("report", run.name)
    assert report["state"] == "done" and report["live"] == [] and report["spend_micros"] <= report["cap_micros"]
    assert home.call("adopt", "nothing").returncode == 2


def test_a_machine_is_ended_although_the_bucket_is_away(tmp_path):
    home = make_home(tmp_path, RECIPE.replace("steps: 30", "steps: 3000"))
    client = home.start("run", "recipe.yaml", "--yes")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "bucket").glob("*/one/progress.json")):
        assert time.monotonic() < deadline and client.poll() is None, (tmp_path / "client.log").read_text()
        time.sleep(0.1)
    client.send_signal(signal.SIGKILL)
    client.wait()
    assert home.machine_processes()
    (tmp_path / "bucket").rename(tmp_path / "away")
    (tmp_path / "bucket").write_text("a file where the bucket was")
    done = home.call("down", "last")
    assert done.returncode == 0 and "without it" in done.stderr, done.stderr
    assert home.machine_processes() == []
    status = home.json("status")
    assert status["runs"][0]["live"] == []
    (tmp_path / "bucket").unlink()
    (tmp_path / "away").rename(tmp_path / "bucket")
    again = home.call("down", "last")  # now the bucket hears of it, too
    assert again.returncode == 0, again.stderr
    (run,) = (tmp_path / "bucket").glob("wander-*")
    kinds_there = [json.loads(f.read_text())["kind"] for f in sorted(run.glob("ledger/0*.json"))]
    assert kinds_there.count("gone") == 1 and kinds_there[-1] == "ended"


def test_a_store_that_ignores_conditions_is_said_when_a_run_starts(tmp_path, monkeypatch):
    from orchestrator import session
    from orchestrator.config import Home, load_config

    monkeypatch.setenv("KDCLOUD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(session, "probe", lambda bucket: Probe(writable=True, conditional=False))
    home = Home.from_env()
    config = load_config(home)
    here = (fake_offer(0, infra="local", gpu=None),)
    plan = replace(make_plan({"one": 1.0}, offers=here), bucket=f"file:{tmp_path}/bucket")
    with session.opened_ledger(home) as ledger:
        made = session.start_run(
            plan, ledger=ledger, home=home, config=config, provider=session.LocalProvisioner(home.root), recipe_text=""
        )
        assert any("one computer only" in text for text in made.notes)
        monkeypatch.undo()
        assert session.start_run(
            plan, ledger=ledger, home=home, config=config, provider=session.LocalProvisioner(home.root), recipe_text=""
        ).notes == ()
