"""What did the suite show? A pytest plugin: every scenario with its time and what it noted, then the figures of all.

While the tests run it writes down every half second what Slurm lists, since what is absent leaves no mark elsewhere.
"""

from __future__ import annotations

import math
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

EVERY_S = 0.5
NOTE = "note"  # user properties of a test: a line for people,
ABSENT_AFTER_S = "absent_after_s"  # and, for each stage, seconds from its COMMIT until its machine had left squeue
LEAST_READINGS = 10
LIMIT_S = 30.0  # at the 95th percentile


def samples() -> Path:
    return Path(os.environ["KDSLURM_UP"]) / "tmp" / "squeue.log"


def pytest_sessionstart(session: pytest.Session) -> None:
    if "KDSLURM_UP" in os.environ and not hasattr(session.config, "workerinput"):
        samples().unlink(missing_ok=True)
        threading.Thread(target=sample, daemon=True).start()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--again", action="store_true", help="a few scenarios: how soon machines leave is looked at apart")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The sentences of the contract, which are short, fill the gaps at the end."""
    items.sort(key=lambda item: getattr(item, "function", item).__module__ == "tests.test_provision_contract")


def sample() -> None:
    with samples().open("a") as file:
        while True:
            asked_at = time.time()
            done = subprocess.run(["squeue", "-h", "-o", "%j"], capture_output=True, text=True, check=False)
            if done.returncode == 0:  # no answer is no absence
                file.write(f"{asked_at:.2f} {' '.join(done.stdout.split())}\n")
                file.flush()
            time.sleep(EVERY_S)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A failure is shown at once: the suite goes on for minutes."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n--- {report.nodeid}\n{report.longreprtext[-3000:]}", flush=True)


def percentile_95(values: list[float]) -> float:
    """The smallest value that at least 95 % of `values` do not exceed."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("scenarios")
    readings: list[float] = []
    for report in _reports(terminalreporter):
        seconds = sum(r.duration for r in _reports(terminalreporter, all_of=report.nodeid))
        name = report.nodeid.partition("::")[2].removeprefix("test_").replace("_", " ")
        terminalreporter.line(f"{seconds:7.1f} s  {report.outcome:<7} {name}")
        for key, value in report.user_properties:
            if key == NOTE:
                terminalreporter.line(f"{'':20} {value}")
            elif key == ABSENT_AFTER_S:
                readings.extend(value)
    if readings:
        spread = f"median {sorted(readings)[len(readings) // 2]:.1f} s, largest {max(readings):.1f} s"
        terminalreporter.line(
            f"COMMIT of a result until its machine has left squeue: 95th percentile of {len(readings)} "
            f"{percentile_95(readings):.1f} s; {spread}"
        )


def _reports(terminalreporter: Any, all_of: str = "") -> list[Any]:
    """Of each test the report that says how it went; or all reports of one test."""
    found = [r for name in ("passed", "failed", "error", "skipped") for r in terminalreporter.stats.get(name, [])]
    if all_of:
        both = [r for rows in terminalreporter.stats.values() for r in rows if getattr(r, "nodeid", "") == all_of]
        return [r for r in both if hasattr(r, "when")]
    return found


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The suite fails when machines leave too late, or when too few were looked at to say so."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):
        return
    if session.config.option.keyword or session.config.option.again:
        return
    reports = [r for rows in reporter.stats.values() for r in rows if getattr(r, "when", "") == "call"]
    noted = [value for r in reports for key, value in r.user_properties if key == ABSENT_AFTER_S]
    readings = [seconds for values in noted for seconds in values]
    if reports and (len(readings) < LEAST_READINGS or percentile_95(readings) > LIMIT_S):
        reporter.line(f"{len(readings)} machines left squeue, {LEAST_READINGS} are needed within {LIMIT_S:.0f} s")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
