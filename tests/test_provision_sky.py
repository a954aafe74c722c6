"""What SkyPilot is asked for and what its answers mean, with a SkyPilot and a Slurm that are told what to say."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import stat
import subprocess
import sys
import types
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from orchestrator import provision_sky
from orchestrator.names import machine_name
from orchestrator.provision import JobState, Need, NoCapacity, NotYetGone, Offer, Order, ProvisionError, Status
from orchestrator.provision_sky import (
    CAN_KEEP_KEYS,
    NO_AUTODOWN,
    SLURM_LATENCIES,
    Note,
    Record,
    SkyApi,
    SkyProvisioner,
    SlurmJob,
    SlurmQueue,
    Trace,
    decide,
    elapsed_s,
    is_named,
    job_task,
    launch_task,
    micros,
    no_upload,
    printed,
    shared_connection,
    time_to_live,
    timer_minutes,
    translated,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
OFFER = Offer(
    infra="slurm/lab", region="main", instance="1x RTX3090", gpu="RTX3090", gpus=1, vram_gib=24.0, spot=False,
    price_micros_per_hour=250_000, as_of=NOW, latencies=SLURM_LATENCIES,
)  # fmt: skip
NAME = machine_name("owner1", "abc123", "train", NOW + timedelta(hours=1))
ORDER = Order(NAME, "run-abc123", "train", OFFER, NOW + timedelta(hours=1), 3300.0)
UP = Record(NAME, "UP", NOW, 300_000, "slurm", "lab", "main", "4CPU--16GB", "RTX3090", 1, False, 57, None)


class StubApi:
    """A SkyPilot that does as the test says and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.requests: dict[str, tuple[str, str]] = {}
        self.rows: list[Record] = []
        self.table: list[tuple[int, str, str]] = []
        self.text = ""
        self.keys: list[str] = []
        self.catalogue: list[Any] = []

    def count(self, what: str) -> int:
        return sum(words[0] == what for words in self.asked)

    def _request_of(self, *words: Any) -> str:
        self.asked.append(words)
        request = f"{words[0]}-{self.count(words[0])}"
        self.requests[request] = ("RUNNING", "")
        return request

    def launch(self, task: dict[str, Any], name: str, timer_minutes: int) -> str:
        return self._request_of("launch", task, name, timer_minutes)

    def exec(self, task: dict[str, Any], name: str) -> str:
        return self._request_of("exec", task, name)

    def down(self, name: str) -> str:
        request = self._request_of("down", name)
        self.rows = [row for row in self.rows if row.name != name]
        self.requests[request] = ("SUCCEEDED", "")
        return request

    def cancel(self, request: str) -> None:
        self.asked.append(("cancel", request))
        self.requests[request] = ("CANCELLED", "")

    def request(self, request: str) -> tuple[str, str]:
        return self.requests.get(request, ("LOST", ""))

    def find(self, kind: str, name: str) -> str | None:
        return next((r for r in self.requests if r.startswith(kind)), None)

    def records(self, names: list[str] | None, *, force: bool) -> list[Record]:
        self.asked.append(("records", names, force))
        return [row for row in self.rows if names is None or row.name in names]

    def queue(self, name: str) -> list[tuple[int, str, str]]:
        return self.table

    def log(self, name: str, number: int) -> str:
        return self.text

    def instances(self, name: str, provider: dict[str, Any]) -> int:
        return 0

    def keys_that_travel(self) -> list[str]:
        return self.keys

    def enabled(self) -> list[str]:
        return ["slurm", "hyperbolic"]

    def accelerators(self, cloud: str, where: str) -> list[Any]:
        return self.catalogue

    def catalogue_date(self, cloud: str) -> datetime:
        return NOW


class StubSlurm:
    def __init__(self) -> None:
        self.listed: list[SlurmJob] = []
        self.cancelled: list[str] = []

    def clusters(self) -> list[str]:
        return ["lab", "hall"]

    def knows(self, clusters: list[str]) -> bool:
        return bool(clusters)

    def jobs(self, clusters: list[str], name: str = "") -> list[SlurmJob]:
        return list(self.listed) if clusters else []

    def cancel(self, job: SlurmJob) -> None:
        self.cancelled.append(job.name)
        self.listed.remove(job)


class World:
    def __init__(self, home: Path) -> None:
        self.home, self.api, self.slurm = home, StubApi(), StubSlurm()

    def client(self, **options: Any) -> SkyProvisioner:
        """A client that knows nothing but what lies in its home."""
        return SkyProvisioner(self.home, api=self.api, slurm=self.slurm, **options)  # type: ignore[arg-type]

    def comes_up(self, *work: Trace) -> None:
        self.api.requests["launch-1"] = ("SUCCEEDED", "")
        self.api.rows = [UP]
        self.slurm.listed = [SlurmJob("7", f"{NAME}-93c70de0", "RUNNING", NOW, "lab", work)]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# -- launching


def test_a_launch_asks_for_exactly_the_offer_bare_and_with_the_providers_own_time_limit():
    task = launch_task(ORDER)
    assert task["resources"] == {"infra": "slurm/lab/main", "accelerators": "RTX3090:1"}
    assert task["num_nodes"] == 1
    assert not {"run", "setup", "workdir", "file_mounts"} & set(task)
    # (3300 + 300 s of latencies - 90 s by which Slurm is late) / 60 s = 58.5, never rounded up
    assert task["config"] == {"slurm": {"sbatch_options": {"time": "58"}}}


def test_a_cloud_is_asked_for_the_instance_its_region_and_spot_with_the_run_in_its_labels():
    offer = replace(OFFER, infra="aws", region="us-east-1", instance="g5.xlarge", gpu="A10G", spot=True)
    task = launch_task(replace(ORDER, offer=offer))
    assert task["resources"]["infra"] == "aws/us-east-1"
    assert task["resources"]["instance_type"] == "g5.xlarge"
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["labels"]["kdcloud-name"] == NAME
    assert "config" not in task


@pytest.mark.parametrize("lifetime_s", [10.0, 61.0, 3300.0, 86400.0])
def test_a_provider_ends_the_machine_after_its_last_upload_and_within_what_is_reserved(lifetime_s):
    order = replace(ORDER, lifetime_s=lifetime_s)
    limit_s = 60 * int(time_to_live("slurm", order)["slurm"]["sbatch_options"]["time"])
    latencies = SLURM_LATENCIES
    assert limit_s >= lifetime_s + latencies.tick_s + latencies.flush_s
    assert limit_s + provision_sky.SLURM_LATE_S <= lifetime_s + latencies.total_s
    assert 60 * timer_minutes(order) >= lifetime_s + latencies.tick_s + latencies.flush_s
    pod = time_to_live("kubernetes", order)["kubernetes"]["pod_config"]["spec"]
    assert pod == {"activeDeadlineSeconds": int(lifetime_s + latencies.total_s)}


def test_a_launch_returns_at_once_and_the_same_order_is_sent_once_whoever_sends_it(world):
    world.client().launch(ORDER)
    world.client().launch(ORDER)
    assert world.api.count("launch") == 1
    assert world.client().observe(NAME).state is Status.CREATING
    assert [seen.name for seen in world.client().ours()] == [NAME]


def test_a_client_killed_while_it_asked_finds_its_request_again(world, monkeypatch):
    api_launch = world.api.launch

    def asks_and_dies(*words: Any) -> str:
        api_launch(*words)
        raise KeyboardInterrupt

    monkeypatch.setattr(world.api, "launch", asks_and_dies)
    with pytest.raises(KeyboardInterrupt):
        world.client().launch(ORDER)
    monkeypatch.setattr(world.api, "launch", api_launch)
    world.client().launch(ORDER)
    assert world.api.count("launch") == 1
    assert world.client().observe(NAME).state is Status.CREATING


def test_an_infra_that_cannot_end_its_machines_is_refused_and_not_offered(world):
    for infra in sorted(NO_AUTODOWN):
        with pytest.raises(ProvisionError, match="cannot end themselves"):
            world.client().launch(replace(ORDER, offer=replace(OFFER, infra=infra)))
    with pytest.raises(ProvisionError, match="cannot end themselves"):
        world.client().offers(Need(infra=("hyperbolic",)))
    assert world.api.asked == []


def test_a_machine_of_unknown_price_is_never_launched(world):
    for price in (None, 0):
        with pytest.raises(ProvisionError, match="price"):
            world.client().launch(replace(ORDER, offer=replace(OFFER, price_micros_per_hour=price)))
    assert world.api.asked == []


def test_nothing_is_launched_while_keys_of_an_account_would_travel_unless_the_recipe_says_so(world):
    world.api.keys = ["~/.runpod/config.toml"]
    with pytest.raises(ProvisionError, match=r"~/\.runpod/config\.toml"):
        world.client().launch(ORDER)
    assert world.api.count("launch") == 0
    world.client(allow_account_key=True).launch(ORDER)
    assert world.api.count("launch") == 1


def test_keys_stay_at_home_and_the_users_own_settings_stay_in_force():
    config = yaml.safe_load(no_upload("aws: {vpc_name: mine}\njobs: {bucket: b}\n"))
    assert config["aws"] == {"vpc_name": "mine", "remote_identity": "NO_UPLOAD"}
    assert config["jobs"] == {"bucket": "b"}
    assert {cloud for cloud in CAN_KEEP_KEYS if config[cloud]["remote_identity"] != "NO_UPLOAD"} == set()
    assert (
        yaml.safe_load(no_upload("aws: {remote_identity: LOCAL_CREDENTIALS}"))["aws"]["remote_identity"] == "NO_UPLOAD"
    )


def test_notes_are_for_their_owner_only_and_hold_no_secret(world):
    world.client().launch(ORDER)
    world.comes_up()
    world.client().run(NAME, "train-1", ["python", "-c", "pass"], {"TOKEN": "s3cret"})
    (note,) = (world.home / "sky").glob("kd-*.json")
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    assert "s3cret" not in note.read_text()


# -- observing


ASKED = Note(NAME, order={"offer": {"infra": "slurm/lab"}}, asked_at="t", request="r")


@pytest.mark.parametrize(
    ("note", "request_status", "record", "exists", "state"),
    [
        (Note(NAME), None, None, False, Status.ABSENT),
        (ASKED, "PENDING", None, False, Status.CREATING),
        (ASKED, "RUNNING", replace(UP, status="INIT"), True, Status.CREATING),
        (ASKED, "SUCCEEDED", UP, True, Status.RUNNING),
        (ASKED, "LOST", UP, True, Status.RUNNING),  # the server was restarted
        (ASKED, "SUCCEEDED", UP, False, Status.ABSENT),  # the record is a cache: its provider has lost it
        (ASKED, "LOST", replace(UP, status="INIT"), True, Status.FAILED),  # nobody goes on making it
        (ASKED, "SUCCEEDED", replace(UP, status="STOPPED"), True, Status.FAILED),
        (replace(ASKED, trouble="no capacity"), "FAILED", None, False, Status.FAILED),
        (ASKED, "CANCELLED", None, False, Status.ABSENT),
        (ASKED, "CANCELLED", None, True, Status.CREATING),  # it may still come up: to be ended
        (replace(ASKED, ending=True), "RUNNING", None, False, Status.STOPPING),
        (replace(ASKED, ending=True), "SUCCEEDED", UP, True, Status.STOPPING),
        (replace(ASKED, ending=True), "CANCELLED", None, False, Status.ABSENT),
        (replace(ASKED, ending=True, trouble="no capacity"), "FAILED", None, False, Status.ABSENT),
    ],
)
def test_what_a_machine_is(note, request_status, record, exists, state):
    assert decide(note, request_status, record, exists) is state


def test_a_machine_is_priced_anew_from_what_was_launched(world):
    world.client().launch(ORDER)
    world.comes_up()
    seen = world.client().observe(NAME)
    assert seen.state is Status.RUNNING
    assert seen.landed_offer is not None
    assert (seen.landed_offer.infra, seen.landed_offer.region) == ("slurm/lab", "main")
    assert seen.landed_offer.price_micros_per_hour == 300_000  # ordered at 250,000


@pytest.mark.parametrize(
    ("armed", "state"), [(57, Status.RUNNING), (1, Status.RUNNING), (58, Status.FAILED), (None, Status.FAILED)]
)
def test_a_machine_whose_timer_is_not_armed_as_ordered_is_never_worked_on_and_is_ended(world, armed, state):
    # ordered: 3300 s of life, 5 + 60 + 45 s until its last upload is over: 57 min
    world.client().launch(ORDER)
    assert world.api.asked[-1] == ("launch", launch_task(ORDER), NAME, 57)
    world.comes_up()
    world.api.rows = [replace(UP, timer_minutes=armed)]
    assert world.client().observe(NAME).state is state
    if state is Status.FAILED:
        world.api.rows = [UP]  # an arming that comes late does not make it good again
        assert world.client().observe(NAME).state is Status.FAILED
        with pytest.raises(NotYetGone):
            world.client().terminate(NAME)
        assert world.api.count("down") == 1


def test_a_machine_of_slurm_that_was_up_costs_no_more_questions_to_skypilot(world):
    world.client().launch(ORDER)
    world.comes_up()
    world.client().run(NAME, "train-1", ["python", "-c", "pass"], {})
    world.comes_up(Trace("train-1", None, 1.0))
    first = world.client().observe(NAME)
    before = len(world.api.asked)
    again = world.client().observe(NAME)
    assert len(world.api.asked) == before
    assert (again.landed_offer, again.job) == (replace(first.landed_offer, as_of=again.landed_offer.as_of), first.job)
    assert again.job.state is JobState.RUNNING


def test_a_machine_that_slurm_does_not_list_is_absent_whatever_skypilot_remembers(world):
    world.client().launch(ORDER)
    world.comes_up()
    world.slurm.listed = []
    assert world.client().observe(NAME).state is Status.ABSENT
    assert ("records", [NAME], True) in world.api.asked  # and SkyPilot is made to look as well


def test_a_failed_launch_says_so_until_it_is_ended_and_is_absent_then(world):
    world.client().launch(ORDER)
    world.api.requests["launch-1"] = ("FAILED", "no nodes in time")
    assert world.client().observe(NAME).state is Status.FAILED
    world.client().terminate(NAME)
    assert world.client().observe(NAME).state is Status.ABSENT
    with pytest.raises(ProvisionError, match="ended before"):
        world.client().launch(ORDER)


# -- jobs


def test_a_job_is_sent_once_though_it_is_asked_for_until_it_is_seen(world):
    world.client().launch(ORDER)
    world.comes_up()
    for _ in range(3):
        world.client().run(NAME, "train-1", ["python", "-c", "pass"], {})
    assert world.api.count("exec") == 1
    assert world.client().observe(NAME).job.state is JobState.QUEUED


def test_a_job_whose_sending_failed_is_sent_again(world):
    world.client().launch(ORDER)
    world.comes_up()
    world.client().run(NAME, "train-1", ["python", "-c", "pass"], {})
    world.api.requests["exec-1"] = ("FAILED", "the server was restarted")
    assert world.client().observe(NAME).job.state is JobState.NONE
    world.client().run(NAME, "train-1", ["python", "-c", "pass"], {})
    assert world.api.count("exec") == 2


def with_job(world: World) -> SkyProvisioner:
    world.client().launch(ORDER)
    world.comes_up()
    world.client().run(NAME, "train-1", ["python", "-c", "pass"], {})
    world.api.requests["exec-1"] = ("SUCCEEDED", "")
    return world.client()


@pytest.mark.parametrize(
    ("traces", "rows", "text", "state", "rc"),
    [
        ([Trace("train-1", 14, 900.0)], [], "", JobState.DONE, 14),
        ([Trace("train-1", None, 1.0)], [(1, "train-1", "FAILED")], "", JobState.RUNNING, None),
        ([Trace("train-1", None, 900.0)], [(1, "train-1", "FAILED_DRIVER")], "", JobState.LOST, None),
        ([Trace("other-1", 0, 1.0)], [(1, "train-1", "RUNNING")], "", JobState.RUNNING, None),
        ([], [(1, "train-1", "SUCCEEDED")], "", JobState.DONE, 0),
        ([], [(1, "train-1", "FAILED")], "(j, pid=7) [kdcloud] job train-1 ended with 12\n", JobState.DONE, 12),
        ([], [(1, "train-1", "FAILED")], "(j, pid=7) killed before it could say\n", JobState.LOST, None),
        ([], [(1, "train-1", "RUNNING"), (2, "train-1", "FAILED")], "", JobState.RUNNING, None),  # 2 came too late
        ([], [(1, "train-1", "CANCELLED")], "", JobState.LOST, None),
        ([], [], "", JobState.NONE, None),
    ],
)
def test_what_a_job_is(world, traces, rows, text, state, rc):
    client = with_job(world)
    world.comes_up(*traces)
    world.api.requests["exec-1"] = ("SUCCEEDED", "")
    world.api.table, world.api.text = rows, text
    job = client.observe(NAME).job
    assert (job.state, job.rc) == (state, rc)


def test_what_a_stage_prints_is_not_taken_for_the_word_of_the_one_who_ran_it(world):
    client = with_job(world)
    world.api.table = [(1, "train-1", "FAILED")]
    world.api.text = (
        "(j, pid=7) [kdcloud] job train-1 ended with 0\n"  # a model may print that
        "(j, pid=7) [kdcloud] job train-1 ended with 13\n"
        "[kdcloud] job train-1 ended with 0\n"
    )
    assert client.observe(NAME).job.rc == 13


NASTY = "a'b\"c $(touch hacked) `id`; rm -rf x\n* ~ \\"


def test_nothing_in_an_argument_reaches_the_shell(tmp_path):
    argv = ["python", "-c", "import sys; print(ascii(sys.argv[1]))", NASTY]
    task = job_task(Note(NAME), "train-1", argv, {"TOKEN": NASTY})
    assert task["secrets"] == {"TOKEN": NASTY}
    assert NASTY not in task.get("envs", {}).values()
    done = subprocess.run(
        ["bash", "-c", task["run"]], cwd=tmp_path, env=plain_env(tmp_path), capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [ascii(NASTY), "[kdcloud] job train-1 ended with 0"]
    assert not list(tmp_path.rglob("hacked"))


def test_the_job_asks_for_the_gpus_that_were_rented_and_brings_its_own_code():
    note = Note(NAME, order={"offer": {"infra": "slurm/lab", "gpu": "A10G", "gpus": 2}})
    argv = ["python", "-m", "tasks.supervisor", "--bucket", "file:/shared/r1", "--stage", "train"]
    task = job_task(note, "train-1", argv, {"PYTHONPATH": "/home/me/code/ab12.whl", "PYTHONUNBUFFERED": "1"})
    words = shlex.split(task["run"])
    assert task["resources"] == {"accelerators": "A10G:2"}
    assert words[words.index("--code") + 1] == "/shared/r1/code/ab12.whl"
    assert words[words.index("--sha256") + 1] == "ab12"
    assert words[words.index("--end") + 1] == "slurm"
    assert "--gpu" in words[: words.index("--")]
    assert words[words.index("--") + 1 :] == argv
    assert "/home/me" not in task["run"]


# -- ending


def test_a_launch_in_progress_is_cancelled_and_what_it_left_at_the_provider_is_ended(world):
    world.client().launch(ORDER)
    world.slurm.listed = [SlurmJob("7", f"{NAME}-93c70de0", "PENDING", None, "lab")]
    with pytest.raises(NotYetGone):
        world.client().terminate(NAME)
    assert ("cancel", "launch-1") in world.api.asked
    assert world.slurm.cancelled == [f"{NAME}-93c70de0"]
    world.client().terminate(NAME)
    assert world.client().observe(NAME).state is Status.ABSENT


def test_the_end_is_not_taken_for_granted_while_the_provider_lists_the_machine(world):
    world.client().launch(ORDER)
    world.comes_up()
    world.slurm.listed = [replace(world.slurm.listed[0], state="COMPLETING")]
    for _ in range(3):
        with pytest.raises(NotYetGone):
            world.client().terminate(NAME)
    assert world.client().observe(NAME).state is Status.STOPPING
    world.slurm.listed = []
    world.client().terminate(NAME)
    world.client().terminate(NAME)
    assert world.client().observe(NAME).state is Status.ABSENT


def test_a_machine_whose_work_is_over_is_ended_by_slurm_at_once_and_one_that_works_may_save_first(world, monkeypatch):
    world.client().launch(ORDER)
    world.comes_up(Trace("train-1", None, 1.0))

    def slow(name: str) -> str:
        world.api.requests["down-1"] = ("RUNNING", "")
        return "down-1"

    monkeypatch.setattr(world.api, "down", slow)
    monkeypatch.setattr(provision_sky, "DOWN_WAIT_S", 0.0)
    with pytest.raises(NotYetGone):
        world.client().terminate(NAME)
    assert world.slurm.cancelled == []
    world.comes_up(Trace("train-1", 0, 1.0))
    with pytest.raises(NotYetGone):
        world.client().terminate(NAME)
    assert world.slurm.cancelled == [f"{NAME}-93c70de0"]
    assert world.client().observe(NAME).state is Status.ABSENT


def test_a_machine_of_a_cloud_that_no_note_tells_of_is_not_taken_for_gone_because_slurm_does_not_list_it(world):
    world.api.rows = [replace(UP, infra="runpod", region="US")]
    (seen,) = world.client().ours()
    assert seen.state is Status.RUNNING
    assert world.client().observe(NAME).state is Status.RUNNING


def test_when_skypilot_cannot_end_it_the_provider_is_asked_and_the_row_stays_open(world, monkeypatch):
    world.client().launch(ORDER)
    world.comes_up()

    def fails(name: str) -> str:
        world.api.requests["down-1"] = ("FAILED", "403")
        return "down-1"

    monkeypatch.setattr(world.api, "down", fails)
    with pytest.raises(ProvisionError, match="403"):
        world.client().terminate(NAME)
    assert world.slurm.cancelled == [f"{NAME}-93c70de0"]


def test_jobs_of_somebody_else_are_neither_listed_nor_ended(world):
    theirs = [
        SlurmJob("1", "training", "RUNNING", NOW, "lab"),
        SlurmJob("2", f"{NAME}-copy", "RUNNING", NOW, "lab"),
        SlurmJob("3", f"my-{NAME}", "RUNNING", NOW, "lab"),
    ]
    world.slurm.listed = list(theirs)
    world.client().launch(ORDER)
    world.client().terminate(NAME)
    assert world.slurm.cancelled == []
    assert {seen.name for seen in world.client().ours()} == {f"{NAME}-copy"}  # ours by its prefix, and left alone


@pytest.mark.parametrize(
    ("listed", "mine"),
    [(NAME, True), (f"{NAME}-93c70de0", True), (f"{NAME}-93c70de", False), (f"{NAME}x", False), (f"x{NAME}", False)],
)
def test_a_name_is_ours_with_the_mark_of_the_user_or_without(listed, mine):
    assert is_named(listed, NAME) is mine


# -- offers


def row(**changes: Any) -> SimpleNamespace:
    base = {
        "instance_type": None, "accelerator_name": "A10G", "accelerator_count": 1, "device_memory": 0.0,
        "price": 1.0, "spot_price": 1.0, "region": "main*",
    }  # fmt: skip
    return SimpleNamespace(**{**base, **changes})


def test_slurms_offers_say_cluster_partition_and_memory_and_have_no_spot(world):
    world.api.catalogue = [row(), row(accelerator_count=2, price=2.0), row(accelerator_name="H100", price=9.0)]
    (found,) = world.client().offers(Need(infra=("slurm/lab",), gpus=("A10G",)))
    assert (found.infra, found.region, found.instance, found.gpus) == ("slurm/lab", "main", "1x A10G", 1)
    assert found.price_micros_per_hour == 1_000_000
    assert found.vram_gib == pytest.approx(24, rel=0.1)
    assert {offer.infra for offer in world.client().offers(Need())} == {"slurm/lab", "slurm/hall"}


@pytest.mark.parametrize(
    ("usd", "expected"),
    [(1.0, 1_000_000), (0.1, 100_000), (0.1234567, 123_457), (0, None), (-1.0, None), (None, None), ("1", None),
     (float("nan"), None), (float("inf"), None)],
)  # fmt: skip
def test_a_price_is_whole_micros_rounded_up_and_what_is_no_price_is_unknown(usd, expected):
    assert micros(usd) == expected


def test_a_spot_price_makes_an_offer_of_its_own(world):
    world.api.catalogue = [row(instance_type="g5.xlarge", region="us-east-1", spot_price=0.4)]
    found = world.client().offers(Need(infra=("aws",)))
    assert [(offer.spot, offer.price_micros_per_hour) for offer in found] == [(False, 1_000_000), (True, 400_000)]
    world.api.catalogue = [row(instance_type="g5.xlarge", region="us-east-1", spot_price=float("nan"))]
    assert [offer.spot for offer in world.client().offers(Need(infra=("aws",)))] == [False]


# -- the edges


def test_what_slurm_prints_is_read_and_only_its_own_job_is_ended(tmp_path, monkeypatch):
    (tmp_path / ".slurm").mkdir()
    (tmp_path / ".slurm" / "config").write_text("Host lab\n  HostName 10.0.0.1\nHost *\n  User me\n")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    commands: list[list[str]] = []
    answer = f"7|RUNNING|1-00:00:10|{NAME}-93c70de0\n8|PENDING|0:00|other\n-- work --\ntrain-1||3\nlabel-1|14|900\n"

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=0, stdout=answer, stderr="")

    slurm = SlurmQueue(tmp_path / "sky", run=run)
    assert slurm.clusters() == ["lab"]
    mine, other = slurm.jobs(["lab", "unknown"], NAME)
    assert mine.work == (Trace("train-1", None, 3.0), Trace("label-1", 14, 900.0))
    assert mine.began_at is not None and datetime.now(UTC) - mine.began_at >= timedelta(days=1, seconds=10)
    assert (other.state, other.began_at, other.work) == ("PENDING", None, ())
    slurm.cancel(mine)
    assert commands[-1][-1] == f"scancel --name {NAME}-93c70de0 7"


def test_looks_at_a_login_node_share_a_connection_in_a_folder_of_ones_own(tmp_path):
    own = tmp_path / "own"
    options = shared_connection(own)
    assert options["ControlPath"] == f"{own}/%C" and options["ControlMaster"] == "auto"
    assert own.stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(own)
    (tmp_path / "file").touch()
    assert [shared_connection(tmp_path / name) for name in ("open", "link", "file")] == [{}, {}, {}]
    assert len(shared_connection()["ControlPath"]) - len("%C") + 40 + len(".0123456789abcdef") < 104  # ssh's own suffix


def test_a_cluster_that_does_not_answer_is_an_error_and_never_an_empty_queue(tmp_path, monkeypatch):
    (tmp_path / ".slurm").mkdir()
    (tmp_path / ".slurm" / "config").write_text("Host lab\n")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    failed = SimpleNamespace(returncode=255, stdout="", stderr="ssh: connection refused")
    with pytest.raises(ProvisionError, match="connection refused"):
        SlurmQueue(tmp_path, run=lambda *args, **kwargs: failed).jobs(["lab"])


@pytest.mark.parametrize(("text", "seconds"), [("0:07", 7), ("1:00:00", 3600), ("2-03:00:00", 183_600), ("INVALID", 0)])
def test_slurms_clock_is_read(text, seconds):
    assert elapsed_s(text) == seconds


def test_a_log_is_what_the_job_printed():
    text = "\x1b[2m├── waiting\x1b[0m\n\x1b[36m(j1, pid=22)\x1b[0m hi\n(head, rank=0, pid=3) there\nsrun: error: x\n"
    assert list(printed(text)) == ["hi", "there"]


def test_whatever_skypilot_raises_is_an_error_of_the_provider_and_no_capacity_is_told_apart():
    class ResourcesUnavailableError(Exception):
        pass

    with pytest.raises(NoCapacity, match="no nodes"), translated("launch it"):
        raise ResourcesUnavailableError("\x1b[33mno nodes\x1b[0m\nmore")
    with pytest.raises(ProvisionError, match="could not launch it: assert"), translated("launch it"):
        raise AssertionError("assert")


@pytest.fixture
def sky(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A module `sky` that answers with what the test put there."""
    told = SimpleNamespace(status=[], api_status=[], error=None, asked=[])

    def ask(*words: Any, **named: Any) -> str:
        told.asked.append((words, named))
        return "request-1"

    def get(request: str) -> Any:
        if told.error is not None:
            raise told.error
        return told.status

    module, client, exceptions = types.ModuleType("sky"), types.ModuleType("sky.client"), types.ModuleType("exceptions")
    exceptions.ClusterDoesNotExist = type("ClusterDoesNotExist", (ValueError,), {})  # type: ignore[attr-defined]
    exceptions.ClusterNotUpError = type("ClusterNotUpError", (Exception,), {})  # type: ignore[attr-defined]
    client.sdk = SimpleNamespace(  # type: ignore[attr-defined]
        status=ask, queue=ask, down=ask, get=get, api_status=lambda *args, **kwargs: told.api_status
    )
    module.StatusRefreshMode = SimpleNamespace(FORCE="force", NONE="none")  # type: ignore[attr-defined]
    module.exceptions = exceptions  # type: ignore[attr-defined]
    for name, made in {"sky": module, "sky.client": client, "sky.exceptions": exceptions}.items():
        monkeypatch.setitem(sys.modules, name, made)
    told.exceptions = exceptions
    return told


def test_a_forced_look_is_asked_for_as_such(sky, tmp_path):
    SkyApi(tmp_path).records(["kd-a"], force=True)
    assert sky.asked == [((["kd-a"],), {"refresh": "force"})]


def test_a_machine_that_is_gone_has_no_jobs_and_other_trouble_is_told(sky, tmp_path):
    sky.error = sky.exceptions.ClusterDoesNotExist("x")
    assert SkyApi(tmp_path).queue("kd-a") == []
    sky.error = RuntimeError("the tunnel broke")
    with pytest.raises(ProvisionError, match="the tunnel broke"):
        SkyApi(tmp_path).queue("kd-a")


def test_a_failed_request_says_why_and_an_unknown_one_is_lost(sky, tmp_path):
    assert SkyApi(tmp_path).request("r") == ("LOST", "")
    sky.api_status = [SimpleNamespace(status="FAILED")]
    sky.error = RuntimeError("no nodes")
    assert SkyApi(tmp_path).request("r") == ("FAILED", "no nodes")


# -- the bootstrap, as a process of its own


def plain_env(home: Path, **more: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(home), **more}


def bootstrap(home: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", provision_sky.bootstrap_text(), *words]
    return subprocess.run(command, env=plain_env(home, **env), capture_output=True, text=True, timeout=60)


def test_a_job_starts_once_on_a_machine_however_often_it_is_sent(tmp_path):
    words = ("--job", "train-1", "--", "python", "-c", "print('here'); raise SystemExit(3)")
    first, second = bootstrap(tmp_path, *words), bootstrap(tmp_path, *words)
    assert (first.returncode, first.stdout) == (3, "here\n[kdcloud] job train-1 ended with 3\n")
    assert second.returncode == 75
    assert "here" not in second.stdout
    assert (tmp_path / ".kdcloud" / "jobs" / "train-1" / "rc").read_text() == "3"


def test_code_that_is_not_the_runs_own_is_never_run(tmp_path):
    wheel = tmp_path / "code.whl"
    wheel.write_bytes(b"changed")
    sha256 = hashlib.sha256(b"as it was").hexdigest()
    script = "open('ran', 'w')"
    done = bootstrap(
        tmp_path, "--job", "j", "--code", str(wheel), "--sha256", sha256, "--", "python", "-c", script
    )  # fmt: skip
    assert done.returncode == 66
    assert "not what the run was started with" in done.stdout
    assert not list(tmp_path.rglob("ran"))


def test_time_spent_before_the_supervisor_is_taken_off_its_time(tmp_path):
    script = "import sys; print(sys.argv[-1])"
    done = bootstrap(tmp_path, "--job", "j", "--", "python", "-c", script, "--remaining-s", "100.000")
    left_s = float(done.stdout.splitlines()[0])
    assert 0 < left_s < 100


def test_a_machine_whose_job_is_over_is_given_a_nearer_end_by_its_provider(tmp_path):
    tool = tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" > {shlex.quote(str(tmp_path / "told"))}\n')
    tool.chmod(0o755)
    path = f"{tool.parent}:{os.environ['PATH']}"
    bootstrap(tmp_path, "--job", "j", "--end", "slurm", "--", "python", "-c", "", PATH=path, SLURM_JOB_ID="7")
    assert (tmp_path / "told").read_text() == "update JobId=7 EndTime=now+60\n"


def test_the_bootstrap_needs_the_standard_library_only():
    import ast

    tree = ast.parse(provision_sky.bootstrap_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names and {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


def test_a_note_that_was_written_can_be_read(world):
    world.client().launch(ORDER)
    (path,) = (world.home / "sky").glob("kd-*.json")
    assert json.loads(path.read_text())["order"]["name"] == NAME


def test_code_is_fetched_by_a_link_that_the_job_does_not_see(tmp_path):
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    wheel = b"PK code"

    class Store(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(wheel)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Store)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/code?X-Amz-Signature=hush"
        words = ("--job", "j", "--sha256", hashlib.sha256(wheel).hexdigest(), "--", "python", "-c")
        done = bootstrap(tmp_path, *words, "import os; print(sorted(os.environ.items()))", KDCLOUD_CODE_URL=url)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0 and "PYTHONPATH" in done.stdout
    assert "hush" not in done.stdout + done.stderr


def test_the_narrow_identity_of_a_cloud_holds_for_a_launch_there_only(tmp_path):
    """In the words of the real SkyPilot: for a launch elsewhere the keys of that cloud stay at home as before."""
    pytest.importorskip("sky", reason="needs SkyPilot: pip install 'kdcloud[sky]'")
    script = (
        "from pathlib import Path; import sys\n"
        "from orchestrator.access import identity_of; from orchestrator.provision_sky import SkyApi\n"
        "SkyApi(Path(sys.argv[1]))._sky(); from sky import skypilot_config as config\n"
        "for infra in ('aws/us-east-1', 'runpod'):\n"
        "    with config.override_skypilot_config(identity_of(infra)): print(config.to_dict()['aws'])\n"
        "print(config.to_dict()['aws'])\n"
    )
    env = {**plain_env(tmp_path), "KDCLOUD_AWS_INSTANCE_PROFILE": "kd-node", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=env, capture_output=True, text=True)
    kept = "{'remote_identity': 'NO_UPLOAD'}"
    assert done.stdout.splitlines() == ["{'remote_identity': 'kd-node'}", kept, kept], done.stderr
