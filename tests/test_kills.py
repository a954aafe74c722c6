"""Killed with SIGKILL at any moment and resumed, a run ends in the same place; never resumed, nothing stays alive.

Seventeen runs of a stage that needs no torch, three of real training, through the same command line and runner.
"""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import subprocess
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.whole_runs import Home, make_home

pytestmark = [pytest.mark.kill, pytest.mark.slow]

REHEARSAL = """
name: kill
budget: 1 CNY
infra: local
local: {price: 0.10 USD/h}
stages:
  - {name: first, kind: rehearse, steps: 15, seconds_per_step: 0.1, checkpoint_every_steps: 4}
  - {name: second, kind: rehearse, steps: 15, seconds_per_step: 0.1, checkpoint_every_steps: 4}
"""
TRAINING = """
name: kill
budget: 1 CNY
infra: local
local: {price: 0.10 USD/h}
data: {prompts: "builtin:addition/train", held_out: "builtin:addition/held_out", verify: exact}
stages:
  - name: pretrain
    kind: pretrain
    model: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1,
            num_attention_heads: 2, num_key_value_heads: 1}
    corpus: "builtin:addition/corpus?slips=0.3"
    examples: 1000
    steps: 200
    batch_size: 16
    learning_rate: 0.004
    checkpoint_every: 1s
    threads: 1
  - {name: label, kind: label, teacher: pretrain, samples: 60, max_new_tokens: 16, keep: all, max_cut_share: 1.0,
     temperature: 1.0, soft_labels: {top_k: 8}, shard_size: 20, threads: 1}
  - name: train
    kind: train
    student: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1,
              num_attention_heads: 2, num_key_value_heads: 1}
    labels: label
    method: full
    loss: {alpha: 0.9, temperature: 2.0}
    steps: 300
    batch_size: 16
    learning_rate: 0.004
    checkpoint_every: 1s
    threads: 1
"""
SEEDS = range(17)
TRAINING_SEEDS = range(3)
AT_ONCE = 5


def run_once(folder: Path, recipe: str) -> Home:
    home = make_home(folder, recipe)
    done = home.call("run", "recipe.yaml", "--yes")
    assert done.returncode == 0, done.stderr
    return home


def kill_and_resume(folder: Path, recipe: str, seed: int, *, until_s: float, kills: int) -> Home:
    """Kills the client at random moments, by the seed also what runs on its machine, and resumes each time."""
    random_ = random.Random(seed)
    home = make_home(folder, recipe)
    words = ["run", "recipe.yaml", "--yes"]
    for _ in range(kills):
        client = home.start(*words)
        with suppress(subprocess.TimeoutExpired):
            client.wait(timeout=random_.uniform(0.3, until_s))
        client.send_signal(signal.SIGKILL)
        client.wait()
        if seed % 3 == 1:
            _kill(random_.sample(found, k=min(1, len(found))) if (found := home.machine_processes()) else [])
        if seed % 3 == 2:
            _kill(home.machine_processes())
        if _started(home):
            words = ["run", "--resume", "last", "--yes"]
        time.sleep(random_.choice([0.0, 0.0, 1.0]))
    done = home.call(*words)
    assert done.returncode == 0, done.stderr + (folder / "client.log").read_text()
    return home


def check_same(home: Home, unbroken: dict[str, str], stages: int) -> None:
    report = home.check_over()
    assert report["state"] == "done"
    assert home.hashes() == unbroken
    with sqlite3.connect(home.folder / "home" / "ledger.sqlite") as ledger:
        noted = ledger.execute("SELECT stage FROM entry WHERE kind='stage_done'").fetchall()
        open_ = ledger.execute(
            "SELECT machine FROM entry WHERE kind='reserve' EXCEPT"
            " SELECT machine FROM entry WHERE kind IN ('gone', 'dropped')"
        ).fetchall()
    assert len(noted) == len(set(noted)) == stages
    assert open_ == []


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, str]:
    home = run_once(tmp_path_factory.mktemp("unbroken"), REHEARSAL)
    home.check_over()
    return home.hashes()


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> dict[int, Future[Home]]:
    """All runs at once, a few at a time: they mostly sleep."""
    pool = ThreadPoolExecutor(AT_ONCE)
    return {
        seed: pool.submit(
            kill_and_resume, tmp_path_factory.mktemp(f"kill{seed}"), REHEARSAL, seed, until_s=7.0, kills=1 + seed % 3
        )
        for seed in SEEDS
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_and_resumed_a_run_ends_in_the_same_place(killed, unbroken, seed):
    assert len(unbroken) == 4
    check_same(killed[seed].result(), unbroken, stages=2)


@pytest.fixture(scope="module")
def unbroken_training(tmp_path_factory) -> Home:
    home = run_once(tmp_path_factory.mktemp("unbroken-training"), TRAINING)
    home.check_over()
    return home


@pytest.mark.parametrize("seed", TRAINING_SEEDS)
def test_real_training_killed_and_resumed_ends_with_the_same_weights_and_labels(unbroken_training, tmp_path, seed):
    expected = weights(unbroken_training)
    assert len(expected) >= 3
    home = kill_and_resume(tmp_path, TRAINING, seed, until_s=24.0, kills=2)
    assert home.check_over()["state"] == "done"
    assert weights(home) == expected


def weights(home: Home) -> dict[str, str]:
    """Hashes of everything that was computed: models and labels."""
    return {name: sha for name, sha in home.hashes().items() if name.endswith(".safetensors")}


def test_a_client_that_is_killed_and_never_resumed_leaves_no_process_and_a_checkpoint(tmp_path):
    home = make_home(tmp_path, REHEARSAL.replace("steps: 15", "steps: 3000"))
    client = home.start("run", "recipe.yaml", "--yes")
    _wait_for(lambda: list((tmp_path / "home").glob("bucket/*/first/checkpoints/*/COMMIT")), 60)
    client.kill()
    client.wait()
    assert home.machine_processes()
    home.wait_for_quiet(45)
    (status,) = home.json("status")["runs"]
    assert status["state"] == "interrupted"
    ended = json.loads((home.bucket / "first" / "ended.json").read_text())
    assert ended["reason"] == "client_gone"
    before = ended["last_checkpoint"]
    assert before
    assert home.call("down", "last").returncode == 0
    report = home.check_over()
    assert report["state"] == "stopped"


def test_ctrl_c_saves_tears_down_and_says_how_to_go_on(tmp_path):
    home = make_home(tmp_path, REHEARSAL.replace("steps: 15", "steps: 3000"))
    client = home.start("run", "recipe.yaml", "--yes")
    _wait_for(lambda: list((tmp_path / "home").glob("bucket/*/first/progress.json")), 60)
    client.send_signal(signal.SIGINT)
    assert client.wait(timeout=60) == 130
    report = home.check_over()
    assert report["state"] == "stopped"
    assert "--resume" in (tmp_path / "client.log").read_text()


def test_a_second_client_on_the_same_run_gets_7_and_disturbs_nothing(tmp_path):
    home = make_home(tmp_path, REHEARSAL)
    client = home.start("run", "recipe.yaml", "--yes")
    _wait_for(lambda: list((tmp_path / "home").glob("bucket/*/first/progress.json")), 60)
    second = home.call("run", "--resume", "last")
    assert second.returncode == 7
    assert "another client" in second.stderr
    assert client.wait(timeout=120) == 0
    assert home.check_over()["state"] == "done"


def test_down_from_a_second_terminal_ends_a_living_run(tmp_path):
    home = make_home(tmp_path, REHEARSAL.replace("steps: 15", "steps: 3000"))
    client = home.start("run", "recipe.yaml", "--yes")
    _wait_for(lambda: list((tmp_path / "home").glob("bucket/*/first/progress.json")), 60)
    assert home.call("down", "last").returncode == 0
    assert client.wait(timeout=60) == 130
    assert home.check_over()["state"] == "stopped"


def test_a_cap_that_runs_out_in_the_middle_exits_3_with_a_checkpoint_and_no_process_and_goes_on_with_more(tmp_path):
    """What lands costs three times what was ordered: the money for a minute's work lasts for some twenty seconds."""
    recipe = REHEARSAL.replace("steps: 15", "steps: 600").split("  - {name: second")[0]
    home = make_home(tmp_path, recipe, provider="tests.providers:dear")
    capped = home.call("run", "recipe.yaml", "--yes", "--budget", "0.0040USD")
    assert capped.returncode == 3, capped.stderr
    report = home.check_over()
    assert report["state"] == "cap"
    assert 0.3 * report["cap_micros"] < report["spend_micros"] <= report["cap_micros"]
    saved = json.loads((home.bucket / "first" / "ended.json").read_text())["last_checkpoint"]
    assert (home.bucket / "first" / "checkpoints" / saved.split("/")[-1] / "COMMIT").exists()
    assert home.call("run", "--resume", "last", "--budget", "0.05USD").returncode == 0
    assert home.check_over()["state"] == "done"
    assert json.loads((home.bucket / "first" / "result.json").read_text())["steps"] == 600
    assert "resumed at step" in home.call("logs", "last", "--stage", "first").stdout


def test_a_plan_that_does_not_fit_exits_3_and_starts_nothing(tmp_path):
    home = make_home(tmp_path, REHEARSAL)
    plan = home.json("plan", "recipe.yaml")
    need = plan["needed_micros"]
    refused = home.call("run", "recipe.yaml", "--yes", "--budget", f"{(need - 1) / 1e6:.6f}USD")
    assert refused.returncode == 3
    assert "nothing was started" in refused.stderr
    assert not (tmp_path / "home" / "bucket").exists()
    assert home.json("status")["runs"] == []


def _started(home: Home) -> bool:
    try:
        with sqlite3.connect(home.folder / "home" / "ledger.sqlite") as ledger:
            return bool(ledger.execute("SELECT count(*) FROM run").fetchone()[0])
    except sqlite3.OperationalError:
        return False


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _wait_for(seen, limit_s: float) -> None:
    began = time.monotonic()
    while not seen():
        assert time.monotonic() - began < limit_s
        time.sleep(0.1)
