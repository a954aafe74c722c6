"""One contract for everything behind the seam: the fake and this machine obey the same sentences.

A provider that is added gets a `Rig` here and must pass all of them.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from orchestrator.names import machine_name, new_id
from orchestrator.provision import MAX_NAME, JobState, Need, NotYetGone, Observation, Offer, Order, Provisioner, Status
from orchestrator.provision_local import LocalProvisioner, local_offer
from orchestrator.testing import FakeBucket, FakeProvisioner, VirtualClock, fake_offer


@dataclass
class Rig:
    """A provider, an offer it can serve, jobs that end well, badly or never, and a way to let time pass."""

    provider: Provisioner
    offer: Offer
    wait: Callable[[float], None]
    ends_well: list[str]
    ends_with_3: list[str]
    never_ends: list[str]
    names: list[str] = field(default_factory=list)

    def order(self, stage: str = "train") -> Order:
        deadline = self.offer.as_of + timedelta(hours=1)
        name = machine_name("owner1", new_id(), stage, deadline)
        self.names.append(name)
        return Order(name=name, run="r", stage=stage, offer=self.offer, deadline_at=deadline, lifetime_s=3600.0)

    def until(self, name: str, wanted: Callable[[Observation], bool], limit_s: float = 120.0) -> Observation:
        for _ in range(int(limit_s / 0.25)):
            seen = self.provider.observe(name)
            if wanted(seen):
                return seen
            self.wait(0.25)
        raise AssertionError(f"{name} never got there: {seen}")

    def up(self) -> str:
        order = self.order()
        self.provider.launch(order)
        self.until(order.name, lambda seen: seen.state is Status.RUNNING)
        return order.name

    def end(self, name: str) -> None:
        for _ in range(400):
            try:
                self.provider.terminate(name)
                return
            except NotYetGone:
                self.wait(0.25)
        raise AssertionError(f"{name} is never gone")


def fake_rig(tmp_path: Path) -> Rig:
    clock = VirtualClock()
    bucket = FakeBucket(clock)
    argv = [
        "python",
        "-m",
        "tasks.supervisor",
        "--bucket",
        "fake:",
        "--attempt",
        "1",
        "--remaining-s",
        "3000",
        "--stage",
    ]
    provider = FakeProvisioner(clock, bucket, {"well": 5.0, "never": 1e9, "three": 5.0}, offered=(fake_offer(),))
    run = provider.run

    def with_status(name: str, job_id: str, argv: list[str], env: dict[str, str]) -> None:
        run(name, job_id, argv, env)
        machine = provider._machines[name]
        if machine.stage == "three":
            machine.faults = replace(machine.faults, rc=3)

    provider.run = with_status  # type: ignore[method-assign]
    return Rig(provider, fake_offer(), clock.sleep, [*argv, "well"], [*argv, "three"], [*argv, "never"])


def local_rig(tmp_path: Path) -> Rig:
    return Rig(
        LocalProvisioner(tmp_path, price_micros_per_hour=100_000),
        local_offer(100_000),
        time.sleep,
        ["python", "-c", "print('it works')"],
        ["python", "-c", "raise SystemExit(3)"],
        ["python", "-c", "import time; print('still here', flush=True); time.sleep(600)"],
    )


@pytest.fixture(params=[fake_rig, local_rig], ids=["fake", "local"])
def rig(request, tmp_path) -> Iterator[Rig]:
    made = request.param(tmp_path)
    yield made
    for name in made.names:
        made.end(name)
        assert made.provider.observe(name).state is Status.ABSENT


def test_offers_say_what_where_and_for_how_much(rig):
    offers = rig.provider.offers(Need())
    assert offers
    for offer in offers:
        assert offer.infra
        assert offer.price_micros_per_hour is None or offer.price_micros_per_hour >= 0
        assert offer.as_of.tzinfo is not None


def test_a_name_nobody_ordered_is_absent_and_ending_it_is_success(rig):
    assert rig.provider.observe("kd-owner1-nobody-train-abc123").state is Status.ABSENT
    rig.provider.terminate("kd-owner1-nobody-train-abc123")


def test_an_order_becomes_a_running_machine_that_is_listed_as_ours(rig):
    name = rig.up()
    seen = rig.provider.observe(name)
    assert seen.landed_offer is not None
    assert seen.landed_offer.price_micros_per_hour == rig.offer.price_micros_per_hour
    assert seen.created_at is not None
    assert seen.job.state is JobState.NONE
    assert [o.name for o in rig.provider.ours()] == [name]


def test_the_same_order_twice_makes_one_machine(rig):
    order = rig.order()
    rig.provider.launch(order)
    rig.provider.launch(order)
    assert len(rig.provider.ours()) == 1


def test_a_job_that_ends_well_is_done_with_0(rig):
    name = rig.up()
    rig.provider.run(name, "j1", rig.ends_well, {})
    seen = rig.until(name, lambda seen: seen.job.state is JobState.DONE)
    assert (seen.job.id, seen.job.rc) == ("j1", 0)
    assert list(rig.provider.logs(name, "j1"))


def test_a_job_that_fails_is_done_with_its_status(rig):
    name = rig.up()
    rig.provider.run(name, "j1", rig.ends_with_3, {})
    assert rig.until(name, lambda seen: seen.job.state is JobState.DONE).job.rc == 3


def test_the_same_job_twice_runs_once(rig):
    name = rig.up()
    for _ in range(3):
        rig.provider.run(name, "j1", rig.never_ends, {})
    assert rig.until(name, lambda seen: seen.job.state is JobState.RUNNING).job.id == "j1"
    if isinstance(rig.provider, LocalProvisioner):
        rig.wait(0.5)
        assert sum("still here" in line for line in rig.provider.logs(name, "j1")) == 1


def test_a_machine_with_a_running_job_is_ended_and_then_absent(rig):
    name = rig.up()
    rig.provider.run(name, "j1", rig.never_ends, {})
    rig.until(name, lambda seen: seen.job.state is JobState.RUNNING)
    rig.end(name)
    assert rig.provider.observe(name).state is Status.ABSENT
    assert rig.provider.ours() == []
    rig.provider.terminate(name)  # already gone is success


def test_names_say_by_when_the_machine_must_be_gone_and_are_short_enough(rig):
    order = rig.order(stage="evaluate-all")
    assert len(order.name) <= MAX_NAME
    from orchestrator.names import parse_machine_name

    parsed = parse_machine_name(order.name)
    assert parsed is not None
    assert abs((parsed.deadline_at - order.deadline_at).total_seconds()) < 1


# -- what only this machine can show -----------------------------------------------------------------------------------


def marked(name: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("KDCLOUD_MACHINE") == name and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def test_local_a_job_killed_from_outside_is_lost_not_running_for_ever(tmp_path):
    rig = local_rig(tmp_path)
    name = rig.up()
    rig.provider.run(name, "j1", rig.never_ends, {})
    for _ in range(400):
        if "still here" in list(rig.provider.logs(name, "j1")):
            break
        time.sleep(0.05)
    for process in marked(name):
        process.kill()
    seen = rig.until(name, lambda seen: seen.job.state is JobState.LOST)
    assert seen.ended_at is not None
    rig.end(name)


def test_local_no_process_of_a_machine_survives_its_end_whatever_session_it_moved_to(tmp_path):
    rig = local_rig(tmp_path)
    name = rig.up()
    runaway = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)"
    script = f"import subprocess, sys, time; {runaway}; time.sleep(600)"
    rig.provider.run(name, "j1", ["python", "-c", script], {})
    for _ in range(200):
        if len(marked(name)) >= 3:
            break
        time.sleep(0.05)
    assert len(marked(name)) >= 3  # shim, job and its runaway child
    rig.end(name)
    assert marked(name) == []


def test_local_arguments_reach_the_job_unparsed(tmp_path):
    rig = local_rig(tmp_path)
    name = rig.up()
    nasty = "a'b\"c $(touch hacked) `id`; rm -rf x\n* ~ \\"
    rig.provider.run(name, "j1", ["python", "-c", "import sys; print(ascii(sys.argv[1]))", nasty], {})
    rig.until(name, lambda seen: seen.job.state is JobState.DONE)
    assert list(rig.provider.logs(name, "j1")) == [ascii(nasty)]
    assert not list(tmp_path.rglob("hacked"))
    rig.end(name)


def test_local_a_machine_costs_until_its_job_ended_not_until_somebody_looked(tmp_path):
    rig = local_rig(tmp_path)
    name = rig.up()
    rig.provider.run(name, "j1", rig.ends_well, {})
    first = rig.until(name, lambda seen: seen.job.state is JobState.DONE).ended_at
    time.sleep(0.3)
    assert rig.provider.observe(name).ended_at == first
    rig.end(name)


def test_local_what_a_killed_client_left_of_a_machine_that_is_gone_is_cleared(tmp_path):
    provider = local_rig(tmp_path).provider
    (tmp_path / "machines" / ".kd-owner1-abc123-train-abcdef.gone" / "work").mkdir(parents=True)
    assert provider.ours() == []
    assert list((tmp_path / "machines").iterdir()) == []


def test_local_machines_of_somebody_else_are_not_ours(tmp_path):
    rig = local_rig(tmp_path)
    rig.up()
    (tmp_path / "machines" / "notes").mkdir()
    assert [o.name for o in rig.provider.ours()] == rig.names
    rig.end(rig.names[0])


def test_local_a_maker_killed_before_the_job_began_leaves_no_job_that_seems_to_run(tmp_path, monkeypatch):
    rig = local_rig(tmp_path)
    name = rig.up()
    pid = os.fork()
    if pid == 0:  # dies after it took the job's lock and before it started anything
        import subprocess

        monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
        rig.provider.run(name, "j1", rig.ends_well, {})
        os._exit(1)
    os.waitpid(pid, 0)
    seen = rig.provider.observe(name)
    assert seen.job.state in (JobState.NONE, JobState.LOST)
    rig.end(name)
