"""The seam, and whole runs, on a real SkyPilot over a real Slurm: skipped where tests/slurm/up.sh has not been.

`make test-slurm` brings the cluster up, runs this file as the account that rents, and takes the cluster down.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from orchestrator.names import parse_machine_name
from orchestrator.provision import JobState, Need, Offer, ProvisionError, Status
from orchestrator.provision_sky import CAN_KEEP_KEYS, NO_AUTODOWN, is_named
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
from tests.whole_runs import Home, make_home

UP = os.environ.get("KDSLURM_UP")
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(UP is None, reason="needs the cluster of tests/slurm/up.sh: make test-slurm"),
]
LAB = Need(infra=("slurm/lab",), gpus=("RTX3090",))


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sky-home")


@pytest.fixture(scope="session")
def provider(home: Path):
    from orchestrator.provision_sky import SkyProvisioner

    return SkyProvisioner(home)


@pytest.fixture(scope="session")
def offer(provider) -> Offer:
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
        assert provider.observe(name).state is Status.ABSENT


# -- whole runs ------------------------------------------------------------------------------------------------------

PROVIDER = "orchestrator.provision_sky:from_env"
REHEARSAL = """
name: slurm
budget: 0.50 USD
infra: [slurm/lab]
gpus: [RTX3090]
stages:
  - {name: first, kind: rehearse, steps: 20, seconds_per_step: 0.2, checkpoint_every_steps: 4}
"""
ENDLESS = REHEARSAL.replace("steps: 20", "steps: 5000")
SHORT = "deadline: 6min\n"  # of which the latencies of Slurm take five: a minute of life


def squeue(*words: str) -> list[str]:
    """What Slurm lists for this account, asked past everything that is tested."""
    done = subprocess.run(["squeue", "--me", "--noheader", *words], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def allocations(home: Home) -> list[str]:
    """Names of this home's machines that Slurm lists."""
    mine = {path.stem for path in (home.folder / "home" / "sky").glob("kd-*.json")}
    return [name for name in squeue("--format=%j") if any(is_named(name.strip(), one) for one in mine)]


def wait_for(happens: Callable[[], object], limit_s: float, what: str) -> float:
    began = time.monotonic()
    while not happens():
        assert time.monotonic() - began < limit_s, what
        time.sleep(0.5)
    return time.monotonic() - began


def is_over(home: Home) -> dict:
    report = home.json("report")
    assert report["live"] == [] and report["reserved_micros"] == 0
    assert report["spend_micros"] <= report["cap_micros"]
    assert allocations(home) == []
    return report


def progress(home: Home, stage: str = "first") -> list[Path]:
    return list((home.folder / "home").glob(f"bucket/*/{stage}/checkpoints/*/COMMIT"))


@pytest.fixture
def fill(tmp_path: Path):
    """Occupies nodes as somebody else would: plain Slurm jobs, ended with the test."""
    made: list[str] = []

    def occupy(name: str, *options: str) -> str:
        script = tmp_path / f"{name}.sh"
        script.write_text("#!/bin/sh\nexec sleep 1200\n")
        command = [
            "sbatch",
            "--parsable",
            "--mem=100",
            f"--job-name={name}",
            "--output=/dev/null",
            *options,
            str(script),
        ]
        made.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        wait_for(lambda: squeue(f"--jobs={made[-1]}", "--states=running"), 30, f"{name} does not run")
        return made[-1]

    yield occupy
    for number in made:
        subprocess.run(["scancel", number], check=False)


@pytest.fixture(scope="module")
def abandoned(tmp_path_factory: pytest.TempPathFactory):
    """Two runs whose client is killed for good: one while its machine was being made, one while it worked."""

    def leave(folder: Path, reached: Callable[[Home], object]) -> tuple[Home, float]:
        home = make_home(folder, ENDLESS + SHORT, provider=PROVIDER)
        began = time.monotonic()
        client = home.start("run", "recipe.yaml", "--yes")
        wait_for(lambda: reached(home) or client.poll() is not None, 120, "the client did not get there")
        assert client.poll() is None, (folder / "client.log").read_text()
        client.kill()
        client.wait()
        return home, began

    working = leave(tmp_path_factory.mktemp("working"), progress)
    creating = leave(tmp_path_factory.mktemp("creating"), lambda home: allocations(home))
    return {"working": working, "creating": creating}


def test_a_run_ends_well_and_its_machine_leaves_the_queue_soon_after_the_result(tmp_path):
    home = make_home(tmp_path, REHEARSAL)
    client = home.start("run", "recipe.yaml", "--yes")
    results = "bucket/*/first/COMMIT"
    wait_for(lambda: client.poll() is not None or list((tmp_path / "home").glob(results)), 180, "no result")
    seconds = wait_for(lambda: not allocations(home), 60, "the machine stays")
    assert client.wait(timeout=60) == 0, (tmp_path / "client.log").read_text()
    assert is_over(home)["state"] == "done"
    print(f"COMMIT to absence: {seconds:.1f} s")
    assert seconds <= 30


def test_a_job_cancelled_underneath_is_made_again_and_goes_on_from_its_last_commit(tmp_path):
    home = make_home(tmp_path, REHEARSAL.replace("steps: 20", "steps: 150"), provider=PROVIDER)
    client = home.start("run", "recipe.yaml", "--yes")
    wait_for(lambda: len(progress(home)) >= 2, 120, "no checkpoint")
    (name,) = allocations(home)
    subprocess.run(["scancel", f"--name={name}"], check=True)
    assert client.wait(timeout=300) == 0, (tmp_path / "client.log").read_text()
    report = is_over(home)
    assert report["state"] == "done"
    log = (home.bucket / "first" / "log.txt").read_text()
    print(log)
    assert "attempt 2" in log
    steps = [json.loads(line)["step"] for line in (home.bucket / "first" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_no_capacity_on_the_cheaper_machine_is_answered_with_the_next_under_the_same_cap(tmp_path, fill):
    for node in ("rtx-0", "rtx-1"):
        fill(f"busy-{node}", f"--nodelist={node}", "--exclusive")
    home = make_home(tmp_path, REHEARSAL.replace("[RTX3090]", "[RTX3090, A10G]"), provider=PROVIDER)
    done = home.call("run", "recipe.yaml", "--yes", timeout_s=400)
    assert done.returncode == 0, done.stderr
    report = is_over(home)
    assert report["state"] == "done"
    assert report["stages"][0]["offer"]["gpu"] == "A10G"


def test_machines_of_somebody_else_are_left_alone_by_a_run_a_down_and_a_reap(tmp_path, fill):
    stranger = fill("training-of-somebody", "--nodelist=a100-0")
    lookalike = fill("kd-someones-own-cluster", "--nodelist=a100-0")
    home = make_home(tmp_path, ENDLESS, provider=PROVIDER)
    client = home.start("run", "recipe.yaml", "--yes")
    wait_for(lambda: progress(home), 120, "no checkpoint")
    assert home.call("down", "last").returncode == 0
    client.wait(timeout=120)
    is_over(home)
    home.call("reap", "--yes")
    assert squeue(f"--jobs={stranger},{lookalike}", "--format=%T") == ["RUNNING", "RUNNING"]


@pytest.mark.parametrize("when", ["working", "creating"])
def test_a_client_killed_and_never_resumed_leaves_no_machine_past_the_deadline_in_its_name(abandoned, when):
    home, began = abandoned[when]
    (note,) = (home.folder / "home" / "sky").glob("kd-*.json")
    named = parse_machine_name(note.stem)
    assert named is not None
    left_s = (named.deadline_at - datetime.now(UTC)).total_seconds()
    states: set[str] = set()

    def gone() -> bool:
        for line in squeue("--states=all", "--format=%T|%j"):
            if is_named(line.partition("|")[2].strip(), note.stem):
                states.add(line.partition("|")[0])
        return not allocations(home)

    wait_for(gone, max(1.0, left_s + 30), "the machine outlives its deadline")
    time.sleep(2)
    gone()
    print(f"killed while {when}: gone {time.monotonic() - began:.0f} s after the start; Slurm saw {sorted(states)}")
    assert datetime.now(UTC) <= named.deadline_at + timedelta(seconds=30)
    assert home.call("down", "last").returncode == 0
    is_over(home)


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


def test_a_key_that_skypilot_would_not_keep_at_home_stops_the_launch(rig, plant):
    plant({".runpod/config.toml": f"api_key = '{PLANTED}'\n"})
    with pytest.raises(ProvisionError, match="runpod"):
        rig.provider.launch(rig.order())
    assert rig.provider.ours() == []


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
