"""Is what the suite with a real SkyPilot says of itself right? Its arithmetic, without a cluster."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.ledger import Ledger
from orchestrator.testing import START
from tests.slurm import scenes
from tests.slurm.table import percentile_95
from tests.whole_runs import make_home


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0], 3.0),
        (list(map(float, range(10, 0, -1))), 10.0),  # of 10 the largest: 0.95 x 10 = 9.5, rounded up
        (list(map(float, range(1, 21))), 19.0),  # of 20 the last but one
    ],
)
def test_the_95th_percentile_is_a_reading_that_was_made(values, expected):
    assert percentile_95(values) == expected


def test_a_machine_is_absent_from_the_first_look_that_does_not_list_it_any_more(tmp_path: Path, monkeypatch):
    home = make_home(tmp_path, "")
    for stage, at in (("first", 900.0), ("second", 1000.0)):  # the machine went on with the second
        commit = tmp_path / "home" / "bucket" / "run" / stage / "COMMIT"
        commit.parent.mkdir(parents=True)
        commit.write_text("{}")
        os.utime(commit, (at, at))
    (tmp_path / "home" / "sky").mkdir()
    (tmp_path / "home" / "sky" / "kd-a-b-first-1.json").write_text("{}")
    ledger = Ledger(tmp_path / "home" / "ledger.sqlite")
    ledger.create_run("r", name="r", bucket="", cap_micros=1, deadline_s=None, mark={}, at=START, data={})
    order = {"attempt": 1, "then": [["second", 1, 1.0]]}
    ledger.reserve("r", "first", "kd-a-b-first-1", 1, START, later_floor=0, order=order)
    ledger.note("r", "next", START, machine="kd-a-b-first-1", data={"serves": "second"})
    ledger.close()
    looks = tmp_path / "squeue.log"
    looks.write_text("999.0 kd-a-b-first-1-93c70de0 other\n1004.5 kd-a-b-first-1-93c70de0\n1005.0 other\n")
    monkeypatch.setattr(scenes, "samples", lambda: looks)
    monkeypatch.setattr(scenes, "EVERY_S", 0.0)
    assert scenes.absences(home) == [5.0]
    looks.write_text("999.0 kd-a-b-first-1-93c70de0\n")  # nobody has looked since: no reading
    assert scenes.absences(home) == []
