"""How does a run look that went wrong? Breaks the quickstart in each known way, keeps what `kdcloud doctor RUN` reads.

    python scripts/break_quickstart.py                  # all of them, about a minute each on two cores
    python scripts/break_quickstart.py loss-flat sound

Every case is a real run of the command line in a home of its own: the quickstart, made shorter, with one fault. What
stays of it is one file in tests/fixtures/broken: the ledger, metrics, logs and last words from the bucket; no weights.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "tests" / "fixtures" / "broken"
MOST_BYTES = 100_000
METRICS = "/metrics.jsonl"
READ = re.compile(
    r"(ledger/.*\.json|[a-z0-9-]+/(metrics\.jsonl|log\.txt|ended\.json|(checkpoints/step-\d+/)?generated-\d+\.jsonl))$"
)
ROWS_KEPT = 50  # of a curve, about
ANSWERS_KEPT = 60  # of a shard: they are many and alike
MEMORY_BYTES = 4 << 30

# A disk that answers slowly: each look at the soft labels takes a moment. Runs when a Python of the machine starts.
SLOW_DISK = """
import sys, threading, time

def slow():
    while not hasattr(sys.modules.get("tasks.train"), "validation_loss"):
        time.sleep(0.05)
    from tasks.labels import Labels
    read = Labels.soft_rows
    Labels.soft_rows = lambda *args: (time.sleep(0.1), read(*args))[1]

if "tasks.stage" in sys.orig_argv:
    threading.Thread(target=slow, daemon=True).start()
"""
# This machine, with a folder of its own before the run's code.
MACHINE = """
import os
from pathlib import Path
from orchestrator.provision_local import LocalProvisioner

class Planted(LocalProvisioner):
    def run(self, name, job_id, argv, env):
        paths = os.pathsep.join([str(Path(__file__).parent), env["PYTHONPATH"]])
        super().run(name, job_id, argv, {**env, "PYTHONPATH": paths})

def machine():
    return Planted(price_micros_per_hour=100_000)
"""


@dataclass(frozen=True)
class Case:
    """One fault: how the recipe changes, and what the machine is like."""

    change: Callable[[dict[str, Any]], None]
    memory_bytes: int | None = None  # of address space that each process may take
    planted: str = ""  # a sitecustomize.py of the machine


def small() -> dict[str, Any]:
    """The quickstart without its comparison and export, and with a shorter training."""
    recipe: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    recipe["stages"] = [stage for stage in recipe["stages"] if stage["kind"] != "export"]
    del recipe["compare"]
    of(recipe, "train").update(steps=400)
    of(recipe, "evaluate").update(limit=300)
    return recipe


def of(recipe: dict[str, Any], stage: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in recipe["stages"] if each["name"] == stage)
    return found


def nothing(recipe: dict[str, Any]) -> None:
    """Sound."""


def out_of_memory(recipe: dict[str, Any]) -> None:
    """A wide student, and a batch that is many times what the machine holds."""
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    of(recipe, "train")["student"].update(wide)
    of(recipe, "train").update(batch_size=512, micro_batch=512, steps=2)
    of(recipe, "pretrain").update(steps=900)


def loss_flat(recipe: dict[str, Any]) -> None:
    of(recipe, "train").update(learning_rate=1e-9)


def rate_far(recipe: dict[str, Any]) -> None:
    of(recipe, "train").update(learning_rate=1.0)


def loss_swings(recipe: dict[str, Any]) -> None:
    of(recipe, "train").update(learning_rate=10.0)


def temperature_far(recipe: dict[str, Any]) -> None:
    of(recipe, "train")["loss"].update(temperature=40.0)


def alpha_far(recipe: dict[str, Any]) -> None:
    of(recipe, "train")["loss"].update(alpha=0.02)


def answers_cut(recipe: dict[str, Any]) -> None:
    of(recipe, "label").update(max_new_tokens=6)


def answers_repeat(recipe: dict[str, Any]) -> None:
    """A teacher that learned next to nothing, asked for its likeliest answer."""
    of(recipe, "pretrain").update(steps=1)
    of(recipe, "label").update(temperature=0.0, max_new_tokens=64, verify="none", max_cut_share=1.0)


def labels_dropped(recipe: dict[str, Any]) -> None:
    of(recipe, "pretrain").update(steps=350)


def student_worse(recipe: dict[str, Any]) -> None:
    """A student that can add learns from one that cannot, and nobody checks what that one says."""
    poor = {**deepcopy(of(recipe, "pretrain")), "name": "poor", "steps": 250, "seed": 1}
    recipe["stages"].insert(1, poor)
    of(recipe, "label").update(teacher="poor", verify="none")
    of(recipe, "train").update(student="pretrain", learning_rate=0.001, steps=300)
    del of(recipe, "train")["weight_decay"]


def waiting_for_data(recipe: dict[str, Any]) -> None:
    of(recipe, "train").update(steps=80)


def waiting_for_saves(recipe: dict[str, Any]) -> None:
    of(recipe, "train").update(checkpoint_every_steps=1, steps=200)


CASES = {
    "sound": Case(nothing),
    "out-of-memory": Case(out_of_memory, memory_bytes=MEMORY_BYTES),
    "loss-flat": Case(loss_flat),
    "rate-far": Case(rate_far),
    "loss-swings": Case(loss_swings),
    "temperature-far": Case(temperature_far),
    "alpha-far": Case(alpha_far),
    "answers-cut": Case(answers_cut),
    "answers-repeat": Case(answers_repeat),
    "labels-dropped": Case(labels_dropped),
    "student-worse": Case(student_worse),
    "waiting-data": Case(waiting_for_data, planted=SLOW_DISK),
    "waiting-saves": Case(waiting_for_saves),
}


def main() -> None:
    """Makes the cases named, or all."""
    for name in sys.argv[1:] or CASES:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="kd-broken-") as folder:
            kept = keep(name, run(CASES[name], Path(folder)), Path(folder))
        print(f"{name}: {time.monotonic() - began:.0f} s, {kept.stat().st_size:,} bytes in {kept.relative_to(ROOT)}")


def run(case: Case, folder: Path) -> Path:
    """The bucket folder of the run, which may fail: that is what it is for."""
    recipe = small()
    case.change(recipe)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    paths, env = [str(ROOT)], {**os.environ, "KDCLOUD_HOME": str(folder / "home")}
    if case.planted:
        (folder / "planted").mkdir()
        (folder / "planted" / "sitecustomize.py").write_text(case.planted)
        (folder / "planted" / "slow_machine.py").write_text(MACHINE)
        paths, env["KDCLOUD_PROVIDER"] = [str(folder / "planted"), *paths], "slow_machine:machine"
    env["PYTHONPATH"] = os.pathsep.join(paths)

    def limit() -> None:
        if case.memory_bytes is not None:
            resource.setrlimit(resource.RLIMIT_AS, (case.memory_bytes, case.memory_bytes))

    argv = [sys.executable, "-m", "orchestrator.cli", "run", "recipe.yaml", "--yes"]
    done = subprocess.run(argv, cwd=folder, env=env, preexec_fn=limit, capture_output=True, text=True, timeout=550)
    found = list((folder / "home" / "bucket").glob("*/ledger"))
    if len(found) != 1:
        raise SystemExit(f"no run came of it:\n{done.stderr}")
    return found[0].parent


def keep(name: str, bucket: Path, folder: Path) -> Path:
    """Writes what a diagnosis reads of the run into one file: key in the bucket -> text."""
    done = {path.parent.name for path in bucket.glob("*/COMMIT")}
    files = {}
    for path in sorted(bucket.rglob("*")):
        key = path.relative_to(bucket).as_posix()
        answers = "/generated-" in key
        if path.is_file() and READ.match(key) and not (answers and key.partition("/")[0] in done):
            files[key] = plain(shortened(key, path.read_text(encoding="utf-8")), folder)
    text = json.dumps(files, indent=0, ensure_ascii=False, sort_keys=True)
    if len(text.encode()) > MOST_BYTES:
        sizes = sorted(((len(text), key) for key, text in files.items()), reverse=True)
        raise SystemExit(f"{name}: {len(text):,} bytes; the largest are {sizes[:6]}")
    KEPT.mkdir(parents=True, exist_ok=True)
    kept = KEPT / f"{name}.json"
    kept.write_text(text + "\n", encoding="utf-8")
    return kept


def shortened(key: str, text: str) -> str:
    lines = text.splitlines()
    if "/generated-" in key:
        lines = lines[:ANSWERS_KEPT]
    elif key.endswith(METRICS):
        every = max(1, round(len(lines) / ROWS_KEPT))
        lines = [rounded(line) for line in lines[::-every][::-1]]  # with the last one
    else:
        return text
    return "".join(f"{line}\n" for line in lines)


def rounded(line: str) -> str:
    row = json.loads(line)
    return json.dumps({name: float(f"{each:.5g}") if isinstance(each, float) else each for name, each in row.items()})


def plain(text: str, folder: Path) -> str:
    """Without the places of the computer that made it."""
    for place, name in ((folder, "/kd"), (ROOT, "/kdcloud"), (Path(sys.prefix), "/python")):
        text = text.replace(str(place), name)
    return text


if __name__ == "__main__":
    main()
