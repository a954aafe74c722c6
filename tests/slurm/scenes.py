"""What the scenarios share: recipes, looks at Slurm past everything that is tested, and what must hold at the end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from orchestrator.ledger import Ledger
from orchestrator.provision_sky import is_named
from tests.slurm.table import EVERY_S, samples
from tests.whole_runs import Home

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
JOINED = REHEARSAL + "  - {name: second, kind: rehearse, steps: 40, seconds_per_step: 0.2, checkpoint_every_steps: 4}\n"
SHORT = "deadline: 10min\n"  # of which the latencies of Slurm take five: five minutes of life
SUPERVISOR, SLURM, TIMER = "the supervisor on the node", "Slurm's own time limit", "SkyPilot's timer"


def squeue(*words: str) -> list[str]:
    """What Slurm lists for this account."""
    done = subprocess.run(["squeue", "--me", "--noheader", *words], capture_output=True, text=True, check=True)
    return [line.strip() for line in done.stdout.splitlines()]


def machines(home: Home) -> list[str]:
    """Every machine this home has asked for, in order of its deadline."""
    return sorted(path.stem for path in (home.folder / "home" / "sky").glob("kd-*.json"))


def states(home: Home) -> list[str]:
    """Of every machine in the ledger of the newest run."""
    ledger = Ledger(home.folder / "home" / "ledger.sqlite")
    try:
        return [str(row.state) for row in ledger.run(ledger.runs()[0]).machines]
    finally:
        ledger.close()


def allocations(home: Home) -> list[str]:
    """Names of this home's machines that Slurm lists."""
    mine = machines(home)
    return [name for name in squeue("--format=%j") if any(is_named(name, one) for one in mine)]


def wait_for(happens: Callable[[], object], limit_s: float, what: str) -> float:
    began = time.monotonic()
    while not happens():
        assert time.monotonic() - began < limit_s, what
        time.sleep(0.5)
    return time.monotonic() - began


def progress(home: Home, stage: str = "first") -> list[Path]:
    """Committed checkpoints."""
    return list((home.folder / "home").glob(f"bucket/*/{stage}/checkpoints/*/COMMIT"))


def steps_done(home: Home, stage: str = "first") -> float:
    try:
        (file,) = (home.folder / "home").glob(f"bucket/*/{stage}/progress.json")
        return float(json.loads(file.read_text())["done"])
    except (ValueError, KeyError):
        return 0.0


def reach(home: Home, client: subprocess.Popen[str], happens: Callable[[], object], limit_s: float = 300) -> float:
    """Seconds until it happens while the client lives; fails with the client's own words."""

    def over() -> bool:
        if bool(happens()):
            return True
        assert client.poll() is None, (home.folder / "client.log").read_text()
        return False

    return wait_for(over, limit_s, "the client does not get there")


def is_over(home: Home) -> dict:
    report = home.json("report")
    assert report["live"] == [] and report["reserved_micros"] == 0
    assert report["spend_micros"] <= report["cap_micros"]
    assert allocations(home) == []
    return report


def one_by_one(home: Home, stage: str = "first") -> bool:
    """Whether every step counts once, however often the stage was broken off."""
    rows = (home.bucket / stage / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in rows]
    return bool(steps) and steps == sorted(set(steps))


def absences(home: Home) -> list[float]:
    """For each result that was its machine's last, seconds from its COMMIT until the machine had left squeue."""
    time.sleep(4 * EVERY_S)  # somebody looked since
    lines = [line.split() for line in samples().read_text().splitlines()]
    looks = [(float(words[0]), words[1:]) for words in lines if words]
    found, ended_with = [], _ended_with(home)
    for commit in home.bucket.glob("*/COMMIT"):
        names = [name for name in machines(home) if ended_with.get(name) == commit.parent.name]
        listed = [at for at, jobs in looks if any(is_named(job, name) for job in jobs for name in names)]
        after = [at for at, _ in looks if listed and at > listed[-1]]
        if listed and after:
            found.append(round(after[0] - commit.stat().st_mtime, 1))
    return found


def _ended_with(home: Home) -> dict[str, str]:
    """The last stage that each machine served."""
    ledger = Ledger(home.folder / "home" / "ledger.sqlite")
    try:
        return {row.name: row.serves for run in ledger.runs() for row in ledger.run(run).machines}
    finally:
        ledger.close()


def start_killed(home: Home, kind: str, *words: str) -> None:
    """A client that kills itself right after its ledger holds an entry of this kind."""
    with (home.folder / "client.log").open("a") as log:
        done = subprocess.run(
            [sys.executable, "-m", "tests.slurm.killed", kind, *words],
            cwd=home.folder, env=home.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=240, check=False,
        )  # fmt: skip
    assert done.returncode == -9, (home.folder / "client.log").read_text()


def job_of(name: str) -> dict[str, str]:
    """What Slurm knows of a machine, also half a minute after its end; empty when it knows nothing."""
    for line in squeue("--states=all", "--format=%i|%j"):
        number, _, listed = line.partition("|")
        if is_named(listed, name):
            done = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True, check=False)
            return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
    return {}


def ended_by(home: Home, job: dict[str, str]) -> str:
    """Which layer ended a machine whose client was dead, from what Slurm and the bucket say. Raises AssertionError.

    The supervisor ends the stage and has Slurm end the machine a minute later; Slurm's limit says TIMEOUT; SkyPilot's
    timer cancels the job from within.
    """
    words = next(iter((home.folder / "home").glob("bucket/*/*/ended.json")), None)
    if words is not None:
        reason = json.loads(words.read_text())["reason"]
        assert job["JobState"] in ("TIMEOUT", "COMPLETED", "CANCELLED", "FAILED"), job
        return f"{SUPERVISOR} ({reason}), by way of Slurm's clock"
    return SLURM if job["JobState"] == "TIMEOUT" else TIMER


def utc_now() -> datetime:
    return datetime.now(UTC)
