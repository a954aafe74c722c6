"""Whole runs of the real command line in a home of their own, and what must hold when they are over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
BEFORE_A_RUN = {"code", "lease.json", ".kd~lock"}


@dataclass
class Home:
    """One KDCLOUD_HOME with a recipe beside it."""

    folder: Path
    recipe: Path
    provider: str | None = None  # for KDCLOUD_PROVIDER

    @property
    def env(self) -> dict[str, str]:
        own = {"KDCLOUD_HOME": str(self.folder / "home"), "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
        return {**os.environ, **own, **({"KDCLOUD_PROVIDER": self.provider} if self.provider else {})}

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "orchestrator.cli", *words]

    def start(self, *words: str) -> subprocess.Popen[str]:
        """A client of its own, its talk in client.log."""
        with open(self.folder / "client.log", "a") as log:
            return subprocess.Popen(
                self.command(*words),
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
            )

    def call(self, *words: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def json(self, *words: str) -> Any:
        done = self.call(*words, "--json")
        assert done.stdout, done.stderr
        return json.loads(done.stdout)

    @property
    def bucket(self) -> Path:
        """The folder of the only run; a client killed before its run stood in the ledger leaves code and lease."""
        folders = [f for f in (self.folder / "home" / "bucket").iterdir() if f.is_dir()]
        begun = [f for f in folders if not {path.name for path in f.iterdir()} <= BEFORE_A_RUN]
        (found,) = begun or folders
        return found

    def processes(self) -> list[psutil.Process]:
        """Everything alive that was started for this home, clients included."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = process.environ().get("KDCLOUD_HOME") == str(self.folder / "home")
                if mine and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def machine_processes(self) -> list[psutil.Process]:
        """Supervisors, stages and what they started; no clients."""
        return [p for p in self.processes() if "orchestrator.cli" not in " ".join(_cmdline(p))]

    def wait_for_quiet(self, limit_s: float) -> float:
        """Seconds until no process of this home was left. Fails after the limit."""
        began = time.monotonic()
        while self.processes():
            assert time.monotonic() - began < limit_s, [_cmdline(p) for p in self.processes()]
            time.sleep(0.2)
        return time.monotonic() - began

    def hashes(self) -> dict[str, str]:
        """sha256 of every committed result file, by stage and name."""
        found = {}
        for commit in sorted(self.bucket.glob("*/COMMIT")):
            for name, entry in json.loads(commit.read_text())["files"].items():
                found[f"{commit.parent.name}/{name}"] = entry["sha256"]
        return found

    def check_over(self) -> dict[str, Any]:
        """Nothing runs, nothing is reserved, nothing was paid beyond the cap. Returns the report."""
        report = self.json("report")
        assert report["live"] == []
        assert report["reserved_micros"] == 0
        assert report["spend_micros"] <= report["cap_micros"]
        assert self.processes() == []
        machines = self.folder / "home" / "machines"
        assert not machines.exists() or not list(machines.iterdir())
        return report


def make_home(folder: Path, recipe: str, *, provider: str | None = None) -> Home:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(recipe)
    return Home(folder, path, provider)


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
