"""A box on a real Slurm through a real SkyPilot: skipped where tests/slurm/up.sh has not been."""

from __future__ import annotations

import json
import os
import signal
import time
import zipfile
from urllib.parse import urlsplit

import pytest

from tests.boxes import LOOPBACK, arguments, holders_of, listeners, open_box, status_of
from tests.slurm.scenes import REHEARSAL, absences, allocations, is_over, machines
from tests.slurm.table import ABSENT_AFTER_S, NOTE
from tests.whole_runs import Home, make_home

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        "KDSLURM_UP" not in os.environ, reason="needs the cluster of tests/slurm/up.sh: make test-slurm"
    ),
]


def test_a_box_answers_over_ssh_to_its_token_alone_and_an_open_notebook_does_not_keep_it(tmp_path, record_property):
    home = make_home(tmp_path, REHEARSAL)
    box = open_box(home, "recipe.yaml", "--yes", "--idle", "60s", "--deadline", "20min")
    assert len(allocations(home)) == 1
    assert (box.get("/api/status", box.token), box.get("/api/status"), box.get("/api/status", "x")) == (200, 403, 403)
    assert status_of(box.tensorboard) == 200
    assert status_of("http://" + urlsplit(box.tensorboard).netloc + "/") == 404
    assert listeners(int(urlsplit(box.jupyter).port or 0)) == {LOOPBACK}
    assert not [line for line in arguments() if box.token in line]
    assert holders_of(box.token, home) == []
    assert box.call("POST", "/api/kernels", {"name": "python3"})["id"]  # and nobody runs anything in it
    began = time.monotonic()
    assert box.client.wait(timeout=300) == 0, (tmp_path / "client.log").read_text()
    idle_s = time.monotonic() - began
    report = is_over(home)
    assert report["state"] == "done" and report["spend_micros"] > 0
    assert ended(home) == "nothing worked on it for 1 min"
    record_property(ABSENT_AFTER_S, absences(home))
    record_property(NOTE, f"addresses after {box.seconds:.0f} s; gone {idle_s:.0f} s after a kernel was started")


def test_ctrl_c_closes_a_rented_box_with_its_files_saved(tmp_path, record_property):
    home = make_home(tmp_path, REHEARSAL)
    box = open_box(home, "recipe.yaml", "--yes", "--deadline", "20min")
    box.write("work/mine.txt", "made by hand")
    began = time.monotonic()
    box.client.send_signal(signal.SIGINT)
    assert box.client.wait(timeout=240) == 0, (tmp_path / "client.log").read_text()
    closed_s = time.monotonic() - began
    report = is_over(home)
    assert report["state"] == "done" and report["spend_micros"] > 0 and len(machines(home)) == 1
    assert ended(home) == "its client closed it"
    with zipfile.ZipFile(home.bucket / "first" / "work.zip") as archive:
        assert {"mine.txt", "start.ipynb"} <= set(archive.namelist())
    record_property(ABSENT_AFTER_S, absences(home))
    record_property(NOTE, f"addresses after {box.seconds:.0f} s; gone {closed_s:.0f} s after Ctrl-C")


def ended(home: Home) -> str:
    return str(json.loads((home.bucket / "first" / "result.json").read_text())["ended"])
