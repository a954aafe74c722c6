"""Boxes on this machine, whole: a real JupyterLab answers, what a run left is there, and ends save what was made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.boxes import LOOPBACK, OpenBox, arguments, holders_of, listeners, open_box, status_of
from tests.whole_runs import ROOT, Home, make_home

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("jupyterlab") is None or find_spec("tensorboard") is None,
        reason="needs JupyterLab and TensorBoard: make install-dev",
    ),
]
REHEARSAL = """
name: try
budget: 0.50 USD
infra: local
local: {price: 0.10 USD/h}
stages:
  - {name: first, kind: rehearse, steps: 20, seconds_per_step: 0.1}
"""
SMALLER = {  # the quickstart, far too short to learn anything
    "steps: 1200": "steps: 30",
    "samples: 400": "samples: 12\n    keep: all\n    max_cut_share: 1.0",
    "steps: 750": "steps: 3",
    "compare: {hard_labels: true, seeds: 3, learning_rates: [0.003, 0.006], search_steps: 120, at_once: 2}\n": "",
    "  - {name: evaluate": "  # - {name: evaluate",
    "  - {name: export": "  # - {name: export",
}


def end(box: OpenBox) -> None:
    if box.client.poll() is None:
        box.client.kill()
        box.client.wait()


def result_of(home: Home, stage: str) -> tuple[Path, dict]:
    made = (home.folder / "home" / "bucket").glob(f"dev-*/{stage}/result.json")
    found = sorted(made, key=lambda path: path.stat().st_mtime)
    return found[-1].parent, json.loads(found[-1].read_text())


def progress_of(home: Home, stage: str) -> dict:
    (file,) = (home.folder / "home").glob(f"machines/*/work/{stage}/progress.json")
    return json.loads(file.read_text())


def test_jupyterlab_answers_to_its_token_alone_and_ctrl_c_saves_what_was_made_for_the_next_box(tmp_path: Path) -> None:
    home = make_home(tmp_path, REHEARSAL)
    box = open_box(home, "recipe.yaml", "--yes")
    try:
        assert (box.get("/api/status", box.token), box.get("/api/status"), box.get("/api/status", "x")) == (
            200,
            403,
            403,
        )
        assert (status_of(box.tensorboard), status_of("http://" + urlsplit(box.tensorboard).netloc + "/")) == (200, 404)
        for address in (box.jupyter, box.tensorboard):
            assert listeners(int(urlsplit(address).port or 0)) == {LOOPBACK}
        assert not [line for line in arguments() if box.token in line]
        assert holders_of(box.token, home) == []
        assert "rehearse.run" in str(box.call("GET", "/api/contents/work/start.ipynb"))
        box.write("work/mine.txt", "made by hand")
        box.client.send_signal(signal.SIGINT)
        assert box.client.wait(timeout=60) == 0
    finally:
        end(box)
    report = home.check_over()
    assert report["state"] == "done" and report["spend_micros"] > 0
    folder, result = result_of(home, "first")
    assert result["ended"] == "it was told to end"
    with zipfile.ZipFile(folder / "work.zip") as archive:
        assert {"mine.txt", "start.ipynb"} <= set(archive.namelist())
    assert holders_of(box.token, home) == []

    again = open_box(home, "recipe.yaml", "--yes")
    try:
        assert again.read("work/mine.txt") == "made by hand"
        assert again.get("/api/status", box.token) == 403
        assert home.call("down", "last").returncode == 0
        assert again.client.wait(timeout=60) in (0, 130)
    finally:
        end(again)
    home.check_over()

    refused = home.call("run", "--resume", "last")
    assert refused.returncode == 2 and "kdcloud dev --resume" in refused.stderr
    closed = home.call("dev", "--resume", "last")
    assert closed.returncode == 2 and "was closed" in closed.stderr


def test_a_kernel_that_computes_keeps_the_box_and_one_that_waits_does_not(tmp_path: Path) -> None:
    home = make_home(tmp_path, REHEARSAL)
    box = open_box(home, "recipe.yaml", "--yes", "--idle", "40s")
    try:
        terminal = box.call("POST", "/api/terminals")["name"]
        assert terminal
        kernel = box.call("POST", "/api/kernels", {"name": "python3"})["id"]
        time.sleep(12)  # it starts, which is work
        busy = _below(home, "ipykernel_launcher")
        burn = subprocess.Popen([sys.executable, "-c", "while True: pass"])  # beside the box: nobody's work here
        try:
            began, signs = time.monotonic(), progress_of(home, "first")["done"]
            assert box.client.wait(timeout=120) == 0, (tmp_path / "client.log").read_text()
            assert 20 < time.monotonic() - began < 90 and signs > 0 and busy and kernel
        finally:
            burn.kill()
            burn.wait()
    finally:
        end(box)
    _, result = result_of(home, "first")
    assert result["ended"] == "nothing worked on it for 1 min"
    assert "nothing has computed on it" in (tmp_path / "client.log").read_text()
    home.check_over()


def _below(home: Home, word: str) -> list[int]:
    return [p.pid for p in home.machine_processes() if any(word in part for part in p.cmdline())]


def test_the_inputs_of_an_earlier_run_are_there_and_the_first_notebook_runs_as_it_is(tmp_path: Path) -> None:
    recipe = (ROOT / "recipes" / "quickstart.yaml").read_text()
    for before, after in SMALLER.items():
        assert before in recipe, before
        recipe = recipe.replace(before, after)
    home = make_home(tmp_path, recipe)
    done = home.call("run", "recipe.yaml", "--yes")
    assert done.returncode == 0, done.stderr
    box = open_box(home, "recipe.yaml", "--stage", "train", "--yes")
    try:
        assert "brings label of run quickstart-" in (tmp_path / "client.log").read_text()
        cells = box.call("GET", "/api/contents/work/start.ipynb")["content"]["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        (work,) = (tmp_path / "home").glob("machines/*/work/train")
        shown = work / "box" / "home"
        env = {**os.environ, "PYTHONPATH": str(shown / "code"), "KDCLOUD_BOX": str(work)}
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=shown / "work", env=env, capture_output=True, text=True, timeout=300
        )
        assert ran.returncode == 0, ran.stderr
        assert " labelled answers; the first:" in ran.stdout and "loss of one step:" in ran.stdout
        assert list((shown / "scratch").glob("train-*/events/*"))  # TensorBoard shows it
    finally:
        box.client.send_signal(signal.SIGINT)
        assert box.client.wait(timeout=60) == 0
    assert home.check_over()["state"] == "done"
