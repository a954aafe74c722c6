"""Does a run go on without its terminal, and does whoever starts it hear when it cannot?"""

from __future__ import annotations

import os
import stat

import pytest

from tests.whole_runs import Home, make_home

pytestmark = pytest.mark.slow

REHEARSAL = """
name: alone
budget: 1 CNY
infra: local
local: {price: 0.10 USD/h}
stages:
  - {name: first, kind: rehearse, steps: 100, seconds_per_step: 0.1}
"""


def clients(home: Home) -> list[int]:
    return [p.pid for p in home.processes() if "orchestrator.cli" in " ".join(p.cmdline())]


def test_a_detached_run_outlives_who_started_it_and_attach_ends_as_the_run_does(tmp_path):
    home = make_home(tmp_path, REHEARSAL)
    done = home.call("run", "recipe.yaml", "--yes", "--detach")
    assert done.returncode == 0, done.stderr
    (client,) = clients(home)
    assert os.getsid(client) == client  # no terminal's end can reach it
    run_id = done.stdout.strip()
    assert run_id == home.json("status")["runs"][0]["run"]
    for words in (f"kdcloud attach {run_id}", f"kdcloud logs {run_id}", f"kdcloud down {run_id}"):
        assert words in done.stderr
    attached = home.call("attach", run_id)
    assert attached.returncode == 0, attached.stderr
    assert home.check_over()["state"] == "done"
    log = home.folder / "home" / "runs" / run_id / "client.log"
    assert "first" in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_a_detached_client_that_cannot_start_says_why_with_its_exit_code(tmp_path):
    home = make_home(tmp_path, REHEARSAL.replace("steps: 100", "steps: 4000"))
    refused = home.call("run", "recipe.yaml", "--yes", "--detach", "--budget", "0.000001 CNY")
    assert refused.returncode == 3
    assert home.json("status")["runs"] == []
    assert home.call("run", "recipe.yaml", "--yes", "--detach").returncode == 0
    second = home.call("run", "--resume", "last", "--detach")
    assert second.returncode == 7
    assert "another client" in second.stderr and second.stdout == ""
    assert home.call("down", "last").returncode == 0
    home.wait_for_quiet(30)
    assert home.check_over()["state"] == "stopped"
