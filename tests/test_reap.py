"""Looking everywhere and ending what is forgotten: over several providers, ledgers, buckets, and all that fails."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from orchestrator.clock import SystemClock
from orchestrator.config import Home as KdHome
from orchestrator.config import load_config
from orchestrator.lease import Lease
from orchestrator.ledger import Ledger
from orchestrator.mirror import Mirror
from orchestrator.names import machine_name
from orchestrator.provision import Job, JobState, NotYetGone, Observation, Order, Partly, ProvisionError, Status
from orchestrator.provision_local import LocalProvisioner, local_offer
from orchestrator.reap import END_LIMIT_S, Reaped, is_through, reap
from orchestrator.reap_watch import News, document, watch
from orchestrator.reaper import Action
from orchestrator.runner import mark_to_dict, offer_to_dict
from orchestrator.states import Event
from orchestrator.testing import START, FakeBucket, FakeProvisioner, Faults, VirtualClock, fake_offer
from tests.whole_runs import Home, make_home

OWNER = "owner1"
HOUR = timedelta(hours=1)


class World:
    """A fake provider, a store of buckets and a ledger, all on one virtual clock."""

    def __init__(self, ledger: Ledger | None = None, faults: Faults | None = None) -> None:
        self.clock = VirtualClock()
        self.bucket = FakeBucket(self.clock)
        self.provider = FakeProvisioner(
            self.clock, self.bucket, {}, faults=lambda order, count: faults or Faults(create_s=0)
        )
        self.ledger = ledger or Ledger.in_memory()

    def machine(self, run: str, deadline: timedelta, *, owner: str = OWNER, stage: str = "train") -> str:
        """One that exists and that no ledger knows."""
        at = self.clock.mark().wall + deadline
        name = machine_name(owner, run, stage, at)
        self.provider.launch(Order(name, run, stage, fake_offer(), at, 3600.0))
        return name

    def known(self, run: str, deadline: timedelta, *, lifetime_s: float = 3600.0) -> str:
        """One that the ledger has as sent, of a run that goes on."""
        name = self.machine(run, deadline)
        open_run(self.ledger, self.clock, run)
        order = {"offer": offer_to_dict(fake_offer()), "lifetime_s": lifetime_s}
        now = self.clock.mark()
        self.ledger.reserve(run, "train", name, 1000, now.wall, later_floor=0, order=order)
        self.ledger.move(name, Event.SENT, now.wall, data={"sent": mark_to_dict(now)})
        return name

    def reap(self, **changes: object) -> Reaped:
        what = {
            "ledger": self.ledger, "providers": {"fake": self.provider}, "owner": OWNER, "clock": self.clock,
            "do_end": True, "bucket_of": lambda url: self.bucket, "call_limit_s": None, **changes,
        }  # fmt: skip
        return reap(**what)  # type: ignore[arg-type]


def open_run(ledger: Ledger, clock: VirtualClock | SystemClock, run: str, bucket: str = "fake:") -> None:
    mark = clock.mark()
    ledger.create_run(
        run, name="r", bucket=f"{bucket}/{run}", cap_micros=10**9, deadline_s=None, mark=mark_to_dict(mark),
        at=mark.wall, data={},
    )  # fmt: skip


def action_of(result: Reaped, name: str) -> Action:
    return next(f.action for f in result.findings if f.name == name)


def test_the_overdue_is_ended_and_a_healthy_run_left_alone():
    world = World()
    old, new = world.machine("r-abc123", -HOUR), world.machine("r-abc123", HOUR)
    assert world.reap(do_end=False).ended == ()
    assert len(world.provider.live()) == 2
    result = world.reap()
    assert result.ended == (old,)
    assert result.saved_micros_per_hour == 500_000
    assert world.provider.live() == [new]
    assert world.reap(orphans=True).ended == (new,)
    assert world.provider.live() == []


def test_time_is_that_of_the_clock_given_however_its_wall_was_set():
    world = World()
    name = world.machine("r-abc123", HOUR)
    assert world.reap().ended == ()
    world.clock.step(2 * 3600)
    assert world.reap().ended == (name,)


def test_a_machine_that_outlived_its_reservation_is_ended_although_its_client_lives_and_its_clock_is_wrong():
    world = World()
    name = world.known("r-abc123", HOUR, lifetime_s=600.0)
    lease = Lease.acquire(world.bucket.at("r-abc123"), OWNER, world.clock)
    world.clock.step(-7200)
    for _ in range(600):
        world.clock.sleep(1.0)
        lease.renew_if_due()
    assert action_of(world.reap(), name) is Action.KEEP
    for _ in range(400):
        world.clock.sleep(1.0)
        lease.renew_if_due()
    assert world.reap().ended == (name,)


def test_a_known_machine_is_kept_while_its_bucket_is_silent_and_until_its_deadline():
    world = World()
    name = world.known("r-abc123", HOUR, lifetime_s=10**6)

    def silent(url: str) -> FakeBucket:
        raise OSError("no route to host")

    assert world.reap(bucket_of=silent, orphans=True).findings[0].why == (
        "its bucket does not answer, and its deadline has not passed"
    )
    world.clock.sleep(3600 + 121)
    assert world.reap(bucket_of=silent).ended == (name,)


@pytest.mark.parametrize(
    ("lease", "committed", "action"),
    [
        ("living", True, Action.KEEP),
        ("living", False, Action.KEEP),
        ("expired", True, Action.END),
        ("expired", False, Action.ASK),
        ("released", True, Action.END),
        ("released", False, Action.ASK),
    ],
)
def test_a_run_of_another_computer_is_judged_by_its_bucket(lease, committed, action):
    world = World()
    name = world.machine("other-run-abc123", HOUR)
    run = world.bucket.at("other-run-abc123")
    held = Lease.acquire(run, "another", world.clock)
    run.put("train/task.json", b"{}")
    if committed:
        run.put("train/COMMIT", b"{}")
    if lease == "released":
        held.release()
    world.clock.sleep(30 if lease == "expired" else 1)
    if lease == "living":
        held._put(released=False)
    assert action_of(world.reap(buckets=["fake:"], do_end=False), name) is action
    assert action_of(world.reap(buckets=["fake:"], do_end=False, orphans=True), name) is (
        Action.END if action is Action.ASK else action
    )
    assert action_of(world.reap(buckets=["fake:"], do_end=False, owner="other1"), name) is Action.FOREIGN


def test_a_stage_whose_name_was_cut_counts_as_done_only_when_all_it_may_be_are():
    world = World()
    name = world.machine("other-run-abc123", HOUR, stage="train-a-student-with-a-long-name")
    run = world.bucket.at("other-run-abc123")
    Lease.acquire(run, "another", world.clock).release()
    for stage in ("train-a-student-with-a-long-name", "train-a-student-once-more", "evaluate"):
        run.put(f"{stage}/task.json", b"{}")
    run.put("train-a-student-with-a-long-name/COMMIT", b"{}")
    assert action_of(world.reap(buckets=["fake:"], do_end=False), name) is Action.ASK
    run.put("train-a-student-once-more/COMMIT", b"{}")
    assert action_of(world.reap(buckets=["fake:"], do_end=False), name) is Action.END


def test_a_machine_with_several_stages_is_done_when_the_last_one_is():
    world = World()
    name = world.machine("other-run-abc123", HOUR, stage="label")
    run = world.bucket.at("other-run-abc123")
    lease = Lease.acquire(run, "another", world.clock)
    made = Ledger.in_memory()
    open_run(made, world.clock, "other-run-abc123")
    order = {"offer": offer_to_dict(fake_offer()), "lifetime_s": 9.0, "attempt": 1, "then": [["train", 2, 60.0]]}
    made.reserve("other-run-abc123", "label", name, 1000, START, later_floor=0, order=order)
    assert Mirror(made, run, "other-run-abc123", lease, world.clock).flush()
    lease.release()
    for stage in ("label", "train"):
        run.put(f"{stage}/task.json", b"{}")
    run.put("label/COMMIT", b"{}")
    assert action_of(world.reap(buckets=["fake:"], do_end=False), name) is Action.ASK
    (row,) = made.run("other-run-abc123").machines
    assert not is_through(row, replace(made.run("other-run-abc123"), done={"label": {}}))
    run.put("train/COMMIT", b"{}")
    assert action_of(world.reap(buckets=["fake:"], do_end=False), name) is Action.END
    assert is_through(row, replace(made.run("other-run-abc123"), done={"label": {}, "train": {}}))


def test_where_runs_of_this_computer_are_those_of_another_are_looked_for():
    world = World()
    world.known("mine-aaa111", HOUR)
    name = world.machine("other-abc123", HOUR)
    Lease.acquire(world.bucket.at("other-abc123"), "another", world.clock).release()
    world.bucket.at("other-abc123").put("train/COMMIT", b"{}")
    assert action_of(world.reap(do_end=False), name) is Action.END


def test_without_a_ledger_nothing_doubtful_is_ended_even_if_asked_for():
    world = World()
    old, new = world.machine("r-abc123", -HOUR), world.machine("r-abc123", HOUR)
    result = world.reap(ledger=None, orphans=True)
    assert result.ended == (old,)
    assert world.provider.live() == [new]


def test_a_machine_that_two_providers_list_is_one_finding_and_ended_with_both():
    class Cloud(FakeProvisioner):
        def ours(self) -> list[Observation]:
            return [replace(seen, landed_offer=None) for seen in super().ours()]

    world = World()
    name = world.machine("r-abc123", -HOUR)
    cloud = Cloud(world.clock, world.bucket, {})
    cloud.launch(Order(name, "r-abc123", "train", fake_offer(), START, 1.0))
    result = world.reap(providers={"cloud": cloud, "fake": world.provider})
    assert [f.name for f in result.findings] == [name]
    assert result.findings[0].price_micros_per_hour == 500_000  # whoever knows it
    assert result.where == {name: ("cloud", "fake")}
    assert cloud.live() == world.provider.live() == []
    assert result.saved_micros_per_hour == 500_000


def test_a_provider_that_refuses_is_asked_until_the_limit_and_the_machine_is_said_to_be_left():
    world = World(faults=Faults(create_s=0, refuses_teardown=True))
    name = world.machine("r-abc123", -HOUR)
    result = world.reap()
    assert (result.ended, result.left, result.saved_micros_per_hour) == ((), (name,), 0)
    assert END_LIMIT_S <= world.clock.elapsed_s < END_LIMIT_S + 10
    assert len([call for call in world.provider.calls if call[0] == "terminate"]) > 10


def test_a_stop_leaves_a_teardown_after_the_attempt_at_hand():
    world = World(faults=Faults(create_s=0, refuses_teardown=True))
    world.machine("r-abc123", -HOUR)
    assert len(world.reap(stop=lambda: True).left) == 1
    assert world.clock.elapsed_s == 0


def test_a_price_that_nobody_knows_is_not_counted_as_nothing():
    world = World()
    world.provider.faults = lambda order, count: Faults(create_s=0, landed=fake_offer(None))
    name = world.machine("r-abc123", -HOUR)
    result = world.reap()
    assert result.unpriced == (name,)
    assert document(result, START)["ended_without_price"] == [name]


class Broken(FakeProvisioner):
    def ours(self) -> list[Observation]:
        raise RuntimeError("its API changed")


class Half(FakeProvisioner):
    def ours(self) -> list[Observation]:
        raise Partly("eu-north-1: not allowed", found=super().ours())


def test_a_provider_that_breaks_or_answers_by_half_does_not_hide_what_others_list():
    world = World()
    name = world.machine("r-abc123", -HOUR)
    half = Half(world.clock, world.bucket, {}, faults=lambda order, count: Faults(create_s=0))
    other = machine_name(OWNER, "r-def456", "train", START - HOUR)
    half.launch(Order(other, "r-def456", "train", fake_offer(), START, 1.0))
    result = world.reap(
        providers={"broken": Broken(world.clock, world.bucket, {}), "half": half, "fake": world.provider}
    )
    assert set(result.ended) == {name, other}
    assert len(result.unanswered) == 2
    assert "its API changed" in result.unanswered[0]
    assert result.unanswered[1] == "half: eu-north-1: not allowed"


def test_a_provider_that_hangs_is_given_up_and_the_others_are_asked_meanwhile():
    released = threading.Event()

    class Hung(FakeProvisioner):
        def ours(self) -> list[Observation]:
            released.wait(30)
            return []

    world = World()
    name = world.machine("r-abc123", -HOUR)
    began = time.monotonic()
    hung = Hung(world.clock, world.bucket, {})
    result = world.reap(providers={"a": hung, "b": hung, "c": world.provider}, call_limit_s=1.0)
    took = time.monotonic() - began
    released.set()
    assert result.ended == (name,)
    assert len(result.unanswered) == 2
    assert took < 1.9  # both hung ones at the same time: one after the other takes two seconds


class Many:
    """A cloud with many machines; each call takes a moment, as a network does."""

    def __init__(self, names: list[str], moment_s: float = 0.02) -> None:
        self.left, self.moment_s = set(names), moment_s

    def ours(self) -> list[Observation]:
        time.sleep(self.moment_s)
        return [self._seen(name, Status.RUNNING) for name in sorted(self.left)]

    def observe(self, name: str) -> Observation:
        time.sleep(self.moment_s)
        return self._seen(name, Status.RUNNING if name in self.left else Status.ABSENT)

    def terminate(self, name: str) -> None:
        time.sleep(self.moment_s)
        self.left.discard(name)

    def _seen(self, name: str, state: Status) -> Observation:
        return Observation(name, state, fake_offer(), START, Job(), START)


def test_a_thousand_machines_of_a_thousand_runs_take_at_most_five_seconds(tmp_path: Path):
    """Half of them forgotten; a ledger on disk, a lease in a bucket on disk for each, 20 ms for each call."""
    from tasks.bucket import open_bucket

    clock, ledger = SystemClock(), Ledger(tmp_path / "ledger.sqlite")
    ledger._db.execute("PRAGMA synchronous=OFF")  # making them is not what is measured
    root, now, names = f"file:{tmp_path}/bucket", clock.mark().wall, []
    for number in range(1000):
        run = f"r-{number:06d}"
        names.append(machine_name(OWNER, run, "train", now + (HOUR if number % 2 else -HOUR)))
        open_run(ledger, clock, run, root)
        order = {"offer": offer_to_dict(fake_offer()), "lifetime_s": 10**6}
        ledger.reserve(run, "train", names[-1], 1000, now, later_floor=0, order=order)
        ledger.move(names[-1], Event.SENT, now, data={"sent": mark_to_dict(clock.mark())})
        if number % 10 == 1:
            Lease.acquire(open_bucket(root).at(run), OWNER, clock)
    ledger.close()
    cloud = Many(names)
    began = time.monotonic()
    result = reap(
        ledger=Ledger(tmp_path / "ledger.sqlite"), providers={"many": cloud}, owner=OWNER, clock=clock, do_end=True
    )
    took = time.monotonic() - began
    print(f"reaped {len(result.ended)} of {len(result.findings)} machines in {took:.2f} s")
    assert set(result.ended) == set(names[::2])
    assert cloud.left == set(names[1::2])
    assert took <= 5.0


# -- again and again ---------------------------------------------------------------------------------------------------


def test_a_watch_survives_every_error_and_ends_when_told():
    world = World()
    name = world.machine("r-abc123", HOUR)
    troubles = iter([ProvisionError("no route"), ValueError("a bug"), OSError("disk full"), None, None])
    rounds: list[Reaped] = []

    def one_look() -> Reaped:
        trouble = next(troubles)
        if trouble is not None:
            raise trouble
        return world.reap(orphans=True)

    last = watch(one_look, every_s=60, wait=lambda s: len(rounds) == 5, on_round=rounds.append)
    assert [len(r.unanswered) for r in rounds] == [1, 1, 1, 0, 0]
    assert "a bug" in rounds[1].unanswered[0]
    assert rounds[3].ended == (name,)
    assert last is rounds[4]


def test_a_watch_says_a_thing_once_and_again_when_it_has_come_back():
    world = World()
    world.machine("r-abc123", HOUR)
    news = News()
    here = world.reap(do_end=False)
    away = replace(here, findings=())
    silent = replace(away, unanswered=("fake: timeout",))
    assert len(news.of(here)) == 1
    assert news.of(here) == []
    assert news.of(silent) == ["no answer from fake: timeout"]
    assert news.of(silent) == []
    assert news.of(here) == []  # it was only not seen
    assert news.of(away) == []
    assert len(news.of(here)) == 1


def watching(home: Home, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        home.command("reap", *words), env=home.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_service_writes_a_line_of_json_a_look_and_ends_cleanly_when_told(tmp_path: Path, number: int):
    process = watching(make_home(tmp_path, ""), "--yes", "--watch", "0.3s", "--json")
    assert process.stdout is not None
    lines = [json.loads(process.stdout.readline()) for _ in range(3)]
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert all(line["schema"] == 1 and line["machines"] == [] and line["unanswered"] == [] for line in lines)
    assert all(json.loads(line) for line in out.splitlines())


def test_the_service_goes_on_with_a_broken_ledger_and_says_so_every_look(tmp_path: Path):
    home = make_home(tmp_path, "")
    Path(home.env["KDCLOUD_HOME"]).mkdir(parents=True, exist_ok=True)
    (Path(home.env["KDCLOUD_HOME"]) / "ledger.sqlite").write_bytes(b"this is no database" * 100)
    once = home.call("reap", "--json")
    assert once.returncode == 6, once.stderr
    (said,) = json.loads(once.stdout)["unanswered"]
    assert said.startswith("the ledger: ")
    process = watching(home, "--watch", "0.2s", "--json")
    assert process.stdout is not None
    lines = [json.loads(process.stdout.readline()) for _ in range(2)]
    process.terminate()
    process.communicate(timeout=20)
    assert all(line["unanswered"] for line in lines)
    assert process.returncode == 0  # it was told to stop; what was wrong stands in every line


def test_the_command_line_ends_a_real_orphan_and_leaves_what_is_somebody_elses(tmp_path: Path):
    """Two machines of this computer that no ledger knows, one past its deadline, and one of another owner."""
    home = make_home(tmp_path, "")
    root = Path(home.env["KDCLOUD_HOME"])
    owner = load_config(KdHome(root)).owner
    provider = LocalProvisioner(root, price_micros_per_hour=100_000)
    now = SystemClock().mark().wall
    names = {
        "old": machine_name(owner, "r-abc123", "train", now - HOUR),
        "new": machine_name(owner, "r-abc123", "train", now + HOUR),
        "theirs": machine_name("zzzzzz", "r-abc123", "train", now - HOUR),
    }
    for name in names.values():
        provider.launch(Order(name, "r-abc123", "train", local_offer(100_000), now, 3600.0))
        provider.run(name, "train-1", ["sleep", "60"], {})
    try:
        dry = home.call("reap")
        assert dry.returncode == 0
        assert "1 forgotten; `kdcloud reap --yes` ends them" in dry.stdout
        done = home.json("reap", "--yes")
        assert done["ended"] == [names["old"]]
        assert done["saved_micros_per_hour"] == 100_000
        assert {row["name"]: row["action"] for row in done["machines"]} == {
            names["old"]: "end",
            names["new"]: "ask",
            names["theirs"]: "foreign",
        }
        assert all(row["providers"] == ["local"] and row["run"] is None for row in done["machines"])
        assert provider.observe(names["new"]).job.state is JobState.RUNNING
        assert home.json("reap", "--yes", "--orphans")["ended"] == [names["new"]]
        assert provider.observe(names["theirs"]).job.state is JobState.RUNNING
    finally:
        for name in names.values():
            for _ in range(20):
                try:
                    provider.terminate(name)
                    break
                except NotYetGone:
                    time.sleep(0.2)


def test_where_nothing_was_rented_reap_does_not_speak_for_clouds_that_it_did_not_ask(tmp_path: Path):
    done = make_home(tmp_path, "").call("reap")
    assert done.returncode == 0 and "no cloud was asked" in done.stdout and "anywhere" not in done.stdout


def test_a_place_that_reap_does_not_know_is_refused(tmp_path: Path):
    done = make_home(tmp_path, "").call("reap", "--infra", "asw")
    assert done.returncode == 2
    assert "asw" in done.stderr and "  -> " in done.stderr
