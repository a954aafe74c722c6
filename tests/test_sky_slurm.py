"""The seam, and whole runs, on a real SkyPilot over a real Slurm: skipped where tests/slurm/up.sh has not been.

`make test-slurm` brings the cluster up, runs this file as the account that rents, and takes the cluster down. Several
scenarios run at a time; those that wait longest stand first.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from orchestrator.names import machine_name, new_id, parse_machine_name
from orchestrator.provision import JobState, Need, Observation, Offer, ProvisionError, Status
from orchestrator.provision_sky import CAN_KEEP_KEYS, NO_AUTODOWN, SkyProvisioner
from tests.slurm.scenes import (
    ENDLESS,
    JOINED,
    PROVIDER,
    REHEARSAL,
    SHORT,
    SLURM,
    SUPERVISOR,
    TIMER,
    absences,
    allocations,
    ended_by,
    is_over,
    job_of,
    machines,
    one_by_one,
    progress,
    reach,
    squeue,
    start_killed,
    states,
    steps_done,
    utc_now,
    wait_for,
)
from tests.slurm.table import ABSENT_AFTER_S, NOTE
from tests.test_provision_contract import (  # noqa: F401 - the same sentences, with the rig below
    Rig,
    test_a_job_that_ends_well_is_done_with_0,
    test_a_job_that_fails_is_done_with_its_status,
    test_a_machine_with_a_running_job_is_ended_and_then_absent,
    test_a_name_nobody_ordered_is_absent_and_ending_it_is_success,
    test_an_order_becomes_a_running_machine_that_is_listed_as_ours,
    test_names_say_by_when_the_machine_must_be_gone_and_are_short_enough,
    test_offers_say_what_where_and_for_how_much,
    test_the_same_job_twice_runs_once,
    test_the_same_order_twice_makes_one_machine,
)
from tests.whole_runs import ROOT, make_home

UP = os.environ.get("KDSLURM_UP")
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(UP is None, reason="needs the cluster of tests/slurm/up.sh: make test-slurm"),
]
LAB = Need(infra=("slurm/lab",), gpus=("RTX3090",))


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sky-home")


class BesideOthers(SkyProvisioner):
    """Sees only the machines of this process: other scenarios go on beside it."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self._home = home

    def ours(self) -> list[Observation]:
        return [seen for seen in super().ours() if (self._home / "sky" / f"{seen.name}.json").exists()]

    def logs(self, name: str, job_id: str) -> Iterator[str]:
        """SkyPilot hands on what was printed a moment after the job is known to be over."""
        for _ in range(20):
            lines = list(super().logs(name, job_id))
            if lines:
                break
            time.sleep(0.5)
        return iter(lines)


@pytest.fixture(scope="session")
def provider(home: Path) -> SkyProvisioner:
    return BesideOthers(home)


@pytest.fixture(scope="session")
def offer(provider: SkyProvisioner) -> Offer:
    (found,) = provider.offers(LAB)
    return found


@pytest.fixture
def rig(provider, offer) -> Iterator[Rig]:
    made = Rig(
        provider,
        offer,
        time.sleep,
        ["python", "-c", "print('it works')"],
        ["python", "-c", "raise SystemExit(3)"],
        ["python", "-c", "import time; print('still here', flush=True); time.sleep(600)"],
    )
    yield made
    for name in made.names:
        made.end(name)
        assert made.provider.observe(name).state is Status.ABSENT


@pytest.fixture
def note(record_property):
    """Writes a line below the scenario in the table."""
    return lambda text: record_property(NOTE, text)


@pytest.fixture
def fill(tmp_path: Path):
    """Occupies nodes as somebody else would: plain Slurm jobs, ended with the test."""
    made: list[str] = []

    def occupy(name: str, *options: str) -> str:
        script = tmp_path / f"{name}.sh"
        script.write_text("#!/bin/sh\nexec sleep 1200\n")
        command = ["sbatch", "--parsable", "--mem=100", f"--job-name={name}", "--output=/dev/null"]
        done = subprocess.run([*command, *options, str(script)], capture_output=True, text=True, check=True)
        made.append(done.stdout.strip())
        wait_for(lambda: squeue(f"--jobs={made[-1]}", "--states=running"), 60, f"{name} does not run")
        return made[-1]

    yield occupy
    for number in made:
        subprocess.run(["scancel", number], check=False)


# -- clients that never come back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["working", "creating"])
def test_a_client_killed_and_never_resumed_leaves_no_machine_past_the_deadline_in_its_name(tmp_path, note, when):
    home = make_home(tmp_path, ENDLESS + SHORT)
    began = time.monotonic()
    client = home.start("run", "recipe.yaml", "--yes")
    reach(home, client, lambda: progress(home) if when == "working" else allocations(home))
    client.kill()
    client.wait()
    (name,) = machines(home)
    named = parse_machine_name(name)
    assert named is not None
    limit_s = (named.deadline_at - utc_now()).total_seconds() + 30
    wait_for(lambda: not allocations(home), limit_s, "the machine outlives its deadline")
    early_s = (named.deadline_at - utc_now()).total_seconds()
    layer = ended_by(home, job_of(name))
    note(f"gone {time.monotonic() - began:.0f} s after the start, {early_s:.0f} s before its deadline, by {layer}")
    assert layer.startswith(SUPERVISOR) if when == "working" else layer in (SLURM, TIMER)
    assert early_s >= 0
    assert home.call("down", "last").returncode == 0
    is_over(home)


def test_a_machine_whose_stage_is_done_and_whose_client_is_dead_does_not_stay_idle(tmp_path, note):
    home = make_home(tmp_path, REHEARSAL)
    start_killed(home, "job", "run", "recipe.yaml", "--yes")
    wait_for(lambda: list((tmp_path / "home").glob("bucket/*/first/COMMIT")), 120, "no result")
    (name,) = machines(home)
    # 60 s until the end its own bootstrap asks for; Slurm looks once a minute and gives 5 s to save
    seconds = wait_for(lambda: not allocations(home), 150, "the machine stays idle")
    note(f"gone {seconds:.0f} s after the result, by {ended_by(home, job_of(name))}")
    assert home.call("run", "--resume", "last", timeout_s=120).returncode == 0
    assert is_over(home)["state"] == "done"
    assert machines(home) == [name]  # the result counts, whoever saw it


def test_two_stages_share_a_machine_that_goes_on_and_ends_without_its_client(tmp_path, note):
    home = make_home(tmp_path, JOINED)
    planned = home.json("plan", "recipe.yaml")["stages"]
    assert [stage["joins"] for stage in planned] == [False, True]
    start_killed(home, "job", "run", "recipe.yaml", "--yes")
    results = {stage: f"bucket/*/{stage}/COMMIT" for stage in ("first", "second")}
    between = wait_for(lambda: list((tmp_path / "home").glob(results["first"])), 120, "no result of the first stage")
    (name,) = machines(home)
    assert len(allocations(home)) == 1  # not ended between the two
    wait_for(lambda: list((tmp_path / "home").glob(results["second"])), 120, "no result of the second stage")
    seconds = wait_for(lambda: not allocations(home), 150, "the machine stays idle")
    note(f"first result after {between:.0f} s; gone {seconds:.0f} s after the last, by {ended_by(home, job_of(name))}")
    assert home.call("run", "--resume", "last", timeout_s=120).returncode == 0
    report = is_over(home)
    assert report["state"] == "done" and machines(home) == [name]
    costs = [stage["actual"]["cost_micros"] for stage in report["stages"]]
    assert all(costs) and sum(costs) == report["spend_micros"]
    for stage, steps in (("first", 20), ("second", 40)):
        result = json.loads((home.bucket / stage / "result.json").read_text())
        assert (result["steps"], result["digest"]) == (steps, digest_after(steps))
        assert one_by_one(home, stage) and f"of stage {stage}" in (home.bucket / stage / "log.txt").read_text()


# -- whole runs --------------------------------------------------------------------------------------------------------

SMALLER = {  # the recipe of the README with less of everything; its accuracies still differ from arm to arm
    "steps: 1200": "steps: 700",
    "samples: 400": "samples: 150",
    "steps: 750": "steps: 200",
    "seeds: 3, learning_rates: [0.003, 0.006], search_steps: 120": "seeds: 1",
}
OTHER_GPUS = {
    "infra: local\n": "infra: [slurm/lab]\ngpus: [RTX3090]\n",
    "kind: label\n": "kind: label\n    gpus: [RTX3090, A10G]\n",
    "kind: train\n": "kind: train\n    gpus: [A100, A10G]\n",
}


def changed(recipe: str, words: dict[str, str]) -> str:
    for before, after in words.items():
        assert before in recipe, before
        recipe = recipe.replace(before, after)
    return recipe


def test_the_quickstart_ends_with_the_same_accuracies_as_on_this_machine_and_labels_and_trains_on_other_gpus(
    tmp_path, note, record_property
):
    recipe = (ROOT / "recipes" / "quickstart.yaml").read_text()
    if "KDSLURM_WHOLE" not in os.environ:
        recipe = changed(recipe, SMALLER)
    rented, here = make_home(tmp_path / "rented", changed(recipe, OTHER_GPUS)), make_home(tmp_path / "here", recipe)
    on_slurm = rented.start("run", "recipe.yaml", "--yes", "--budget", "1 USD")
    on_local = here.start("run", "recipe.yaml", "--yes")
    assert on_local.wait(timeout=1500) == 0, (tmp_path / "here" / "client.log").read_text()
    assert on_slurm.wait(timeout=1500) == 0, (tmp_path / "rented" / "client.log").read_text()
    report = is_over(rented)
    assert report["state"] == "done"
    record_property(ABSENT_AFTER_S, absences(rented))
    gpus = {stage["name"]: stage["offer"]["gpu"] for stage in report["stages"]}
    assert gpus["label"] == "RTX3090" and gpus["train"] == "A10G"  # the cheapest of those each may use
    found, expected = (accuracies(home.json("report")["quality"]) for home in (rented, here))
    note(f"labels on {gpus['label']}, trains on {gpus['train']}; accuracies {found}")
    assert len(expected) >= 3 and any(row["mean"] > 0 for row in expected.values())
    assert found == expected


def accuracies(quality: dict) -> dict[str, dict]:
    return {arm: row["accuracy"] for arm, row in quality.items() if row is not None}


def test_a_cap_reached_in_the_middle_ends_with_3_keeps_the_checkpoint_and_goes_on_with_more_money(
    tmp_path, note, record_property
):
    # Ordered at 0.25 USD/h: 0.06 USD are 864 s, 300 of them for latencies. What lands costs twice as much: 432 s, so
    # that 132 s are left for launch and work, and the 150 s of work cannot all be done.
    recipe = REHEARSAL.replace("0.50 USD", "0.06 USD").replace("steps: 20, seconds_per_step: 0.2", STEPS_300)
    home = make_home(tmp_path, recipe, provider="tests.slurm.dear:from_env")
    first = home.call("run", "recipe.yaml", "--yes", timeout_s=400)
    assert first.returncode == 3, first.stderr
    report = is_over(home)
    assert report["state"] == "cap"
    kept = max(int(path.parent.name.removeprefix("step-")) for path in progress(home))
    again = home.call("run", "--resume", "last", "--budget", "0.50 USD", timeout_s=400)
    assert again.returncode == 0, again.stderr
    report = is_over(home)
    assert report["state"] == "done"
    assert f"resumed at step {kept}" in (home.bucket / "first" / "log.txt").read_text()
    assert one_by_one(home)
    record_property(ABSENT_AFTER_S, absences(home))
    note(f"cap reached with {kept} of 300 steps kept; the rest with more money")


STEPS_300 = "steps: 300, seconds_per_step: 0.5"


def test_a_stage_that_stalls_is_ended_and_tried_once_more(tmp_path, note):
    stuck = REHEARSAL.replace("steps: 20, seconds_per_step: 0.2", "steps: 2, seconds_per_step: 3600")
    home = make_home(tmp_path, stuck.replace("0.50 USD", "5 USD") + "idle: 30s\n")
    began = time.monotonic()
    done = home.call("run", "recipe.yaml", "--yes", timeout_s=500)
    assert done.returncode == 5, done.stderr
    assert is_over(home)["state"] == "failed"
    ended = json.loads((home.bucket / "first" / "ended.json").read_text())
    assert ended["reason"] == "stalled"
    assert len(machines(home)) == 2
    note(f"2 machines of a stage that hangs were ended within {time.monotonic() - began:.0f} s, by {SUPERVISOR}")


def digest_after(steps: int) -> str:
    """What an unbroken rehearsal ends with."""
    digest = ""
    for step in range(1, steps + 1):
        digest = hashlib.sha256(f"{digest} {step}".encode()).hexdigest()
    return digest


# The entry of the ledger after which the client dies, and the state it leaves its machine in.
KILLS = [
    ("reserve", "INTENT"),
    ("sent", "CREATING"),
    ("launched", "CREATING"),
    ("up", "LIVE"),
    ("job", "LIVE"),
    ("job_ended", "DRAINING"),
    ("stop", "TEARDOWN_PENDING"),
    ("absent", "TEARDOWN_PENDING"),
]


def test_a_client_killed_in_every_state_and_resumed_ends_where_an_unbroken_one_does(tmp_path, note):
    home = make_home(tmp_path, REHEARSAL)
    words = ["run", "recipe.yaml", "--yes"]
    for kind, state in KILLS:
        start_killed(home, kind, *words)
        *before, last = states(home)
        assert (last, set(before) <= {"GONE"}) == (state, True), kind
        words = ["run", "--resume", "last"]
    done = home.call(*words)
    assert done.returncode == 0, done.stderr
    assert is_over(home)["state"] == "done"
    result = json.loads((home.bucket / "first" / "result.json").read_text())
    assert (result["steps"], result["digest"]) == (20, digest_after(20))
    assert len(machines(home)) == 1
    note(f"{len(KILLS)} kills, 1 machine: {', '.join(kind for kind, _ in KILLS)}")


def test_a_job_cancelled_underneath_is_made_again_and_goes_on_from_its_last_commit(tmp_path, record_property):
    home = make_home(tmp_path, REHEARSAL.replace("steps: 20", "steps: 150"))
    client = home.start("run", "recipe.yaml", "--yes")
    reach(home, client, lambda: len(progress(home)) >= 2)
    (name,) = allocations(home)
    subprocess.run(["scancel", f"--name={name}"], check=True)
    assert client.wait(timeout=400) == 0, (tmp_path / "client.log").read_text()
    assert is_over(home)["state"] == "done"
    record_property(ABSENT_AFTER_S, absences(home))
    log = (home.bucket / "first" / "log.txt").read_text()
    assert "attempt 2" in log and "resumed at step" in log
    assert one_by_one(home)


def test_no_capacity_on_the_cheaper_machine_is_answered_with_the_next_under_the_same_cap(
    tmp_path, fill, record_property
):
    fill("busy", "--nodelist=l4-0", "--exclusive")
    home = make_home(tmp_path, REHEARSAL.replace("[RTX3090]", "[L4, RTX3090]"))
    done = home.call("run", "recipe.yaml", "--yes", timeout_s=400)
    assert done.returncode == 0, done.stderr
    report = is_over(home)
    assert report["state"] == "done"
    assert report["stages"][0]["offer"]["gpu"] == "RTX3090"
    assert len(machines(home)) == 2
    record_property(ABSENT_AFTER_S, absences(home))


def test_a_detached_run_goes_on_alone_is_watched_by_attach_and_owned_by_one_client(tmp_path, record_property):
    home = make_home(tmp_path, REHEARSAL.replace("steps: 20", "steps: 60"))
    done = home.call("run", "recipe.yaml", "--yes", "--detach")
    assert done.returncode == 0, done.stderr
    run_id = done.stdout.strip()
    watcher = home.start("attach", run_id)
    wait_for(lambda: allocations(home), 120, "no machine")
    second = home.call("run", "--resume", run_id)
    assert second.returncode == 7 and "another client" in second.stderr
    assert watcher.wait(timeout=300) == 0, (tmp_path / "client.log").read_text()
    assert is_over(home)["state"] == "done"
    assert len(machines(home)) == 1
    record_property(ABSENT_AFTER_S, absences(home))


# -- the reaper --------------------------------------------------------------------------------------------------------


def test_reap_with_an_empty_ledger_touches_no_healthy_run_ends_the_orphan_and_never_what_is_somebody_elses(
    tmp_path, fill, note
):
    healthy = make_home(tmp_path / "healthy", ENDLESS, provider=PROVIDER)
    client = healthy.start("run", "recipe.yaml", "--yes")
    reach(healthy, client, lambda: progress(healthy))
    (mine,) = machines(healthy)
    owner = parse_machine_name(mine).owner
    past = utc_now() - timedelta(minutes=10)
    orphan = machine_name(owner, new_id(), "train", past)
    theirs = machine_name("qqqqqq" if owner != "qqqqqq" else "zzzzzz", new_id(), "train", past)
    jobs = {name: fill(name, "--nodelist=a100-0") for name in (orphan, theirs, "training-of-somebody")}
    empty = make_home(tmp_path / "empty", ENDLESS, provider=PROVIDER)
    (tmp_path / "empty" / "home").mkdir()
    (tmp_path / "empty" / "home" / "config.yaml").write_text(f"owner: {owner}\n")
    looked = empty.json("reap")
    actions = {row["name"]: row["action"] for row in looked["machines"]}
    assert (actions[mine], actions[orphan], actions[theirs]) == ("ask", "end", "foreign")
    assert looked["ended"] == [] and squeue(f"--jobs={jobs[orphan]}", "--format=%T") == ["RUNNING"]
    done = empty.json("reap", "--yes")
    assert done["ended"] == [orphan]
    assert squeue(f"--jobs={jobs[orphan]}") == []
    assert squeue(f"--jobs={jobs[theirs]},{jobs['training-of-somebody']}", "--format=%T") == ["RUNNING", "RUNNING"]
    reached = steps_done(healthy)
    wait_for(lambda: steps_done(healthy) > reached, 60, "the healthy run does not go on")
    assert client.poll() is None
    assert healthy.call("down", "last").returncode == 0
    assert client.wait(timeout=120) == 130
    is_over(healthy)
    assert squeue(f"--jobs={jobs[theirs]},{jobs['training-of-somebody']}", "--format=%T") == ["RUNNING", "RUNNING"]
    note(f"{len(looked['machines'])} machines were listed, 1 was ended")


# -- one short run, and keys -------------------------------------------------------------------------------------------


def test_a_run_ends_well_and_ctrl_c_ends_another_with_everything_torn_down(tmp_path, note, record_property):
    home = make_home(tmp_path / "well", REHEARSAL)
    client = home.start("run", "recipe.yaml", "--yes")
    note(f"first step {reach(home, client, lambda: steps_done(home)):.1f} s after the start, beside other scenarios")
    assert client.wait(timeout=120) == 0, (home.folder / "client.log").read_text()
    assert is_over(home)["state"] == "done"
    record_property(ABSENT_AFTER_S, absences(home))
    home = make_home(tmp_path / "stopped", ENDLESS)
    client = home.start("run", "recipe.yaml", "--yes")
    reach(home, client, lambda: progress(home))
    client.send_signal(signal.SIGINT)
    assert client.wait(timeout=120) == 130
    assert is_over(home)["state"] == "stopped"


PLANTED = "planted-for-a-test-3f81"
KEYS = {  # of two clouds, where their own tools keep them
    ".aws/credentials": f"[default]\naws_access_key_id = AKIA{PLANTED}\naws_secret_access_key = {PLANTED}\n",
    ".azure/msal_token_cache.json": json.dumps({"secret": PLANTED}),
    ".config/vastai/vast_api_key": PLANTED,
}


@pytest.fixture
def plant():
    """Writes files into the client's home, and takes them away again."""
    made: list[Path] = []

    def put(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = Path.home() / name
            assert not path.exists()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            made.append(path)

    yield put
    for path in made:
        path.unlink()


def test_no_key_of_a_cloud_reaches_a_machine_neither_as_a_file_nor_in_its_environment(rig, plant):
    plant(KEYS)
    name = rig.up()
    look = "import os, pathlib; print('ENV', dict(os.environ)); h = pathlib.Path.home(); print('HOME', h)\n"
    look += "for p in h.rglob('*'):\n    if p.is_file() and not p.is_symlink() and p.stat().st_size < 1 << 20:\n"
    look += f"        print('FILE', p.relative_to(h), {PLANTED[::-1]!r}[::-1].encode() in p.read_bytes())"
    rig.provider.run(name, "look", ["python", "-c", look], {})
    rig.until(name, lambda seen: seen.job.state is JobState.DONE)
    lines = list(rig.provider.logs(name, "look"))
    files = [line for line in lines if line.startswith("FILE")]
    assert len(files) >= 5 and any(line.startswith("ENV") for line in lines)
    assert [line for line in files if line.endswith("True")] == []
    assert not any(PLANTED in line for line in lines)
    assert not [line for line in files if ".aws" in line or ".azure" in line]


def test_a_key_that_skypilot_would_not_keep_at_home_stops_the_launch(rig, tmp_path, monkeypatch):
    (tmp_path / ".runpod").mkdir()
    (tmp_path / ".runpod" / "config.toml").write_text(f"api_key = '{PLANTED}'\n")
    order = rig.order()
    monkeypatch.setenv("HOME", str(tmp_path))  # one of its own: other launches go on meanwhile
    with pytest.raises(ProvisionError, match="runpod"):
        rig.provider.launch(order)
    monkeypatch.undo()
    assert order.name not in [seen.name for seen in rig.provider.ours()]


def test_what_is_written_down_of_skypilot_is_what_it_says_itself():
    from sky import clouds
    from sky.utils import registry, schemas

    sections = schemas.get_config_schema()["properties"]
    keeps = {name for name, section in sections.items() if "remote_identity" in (section.get("properties") or {})}
    assert keeps == set(CAN_KEEP_KEYS)
    autodown = clouds.CloudImplementationFeatures.AUTODOWN
    known = registry.CLOUD_REGISTRY.items()
    assert len(known) > 15
    cannot = {name for name, cloud in known if autodown in getattr(cloud, "_CLOUD_UNSUPPORTED_FEATURES", {})}
    assert cannot == NO_AUTODOWN
