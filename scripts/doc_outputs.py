"""Writes into the documents what commands print and what plans say, between marks that name the command.

    python scripts/doc_outputs.py                 # renews every block, in about a minute
    python scripts/doc_outputs.py --check         # fails when a document is not what the commands print

A block is `<!-- output: kdcloud plan quickstart -->` to `<!-- end -->`; with `<!-- output from "what if": ... -->` it
begins at the first line that begins so. `<!-- table: NAME -->` is one of the tables made here. Each command runs with a
KDCLOUD_HOME of its own, so prices are those of the dated table and nothing is calibrated.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # of this checkout, wherever it is called from

from orchestrator.gpus import GPUS, gpu_named  # noqa: E402
from orchestrator.offers import TABLE  # noqa: E402

COLUMNS = 106
BLOCK = re.compile(
    r"(?P<mark><!-- (?:output(?: from \"(?P<start>[^\"]+)\")?: (?P<command>kdcloud [^\n]+)"
    r"|table: (?P<table>gpus|fits)) -->\n)"
    r".*?(?P<end><!-- end -->)",
    re.S,
)
STUDENTS = ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-7B")
METHODS = ("lora", "qlora", "full")
CARDS = ("L4", "RTX3090", "A100", "A100-80GB")  # by memory: 22 to 79 GiB
ROW = """\
name: fits
budget: 100000 USD
gpus: [{gpus}]
data: {{prompts: {prompts}, verify: math}}
stages:
  - {{name: label, kind: label, teacher: Qwen/Qwen2.5-7B, samples: 2000, max_new_tokens: 3072}}
  - {{name: train, kind: train, student: {student}, labels: label, method: {method}, learning_rate: 2.0e-5}}
"""


def renewed(text: str) -> str:
    """The document with every block made anew."""
    return BLOCK.sub(lambda found: found["mark"] + _block(found) + found["end"], text)


def _block(found: re.Match[str]) -> str:
    if found["table"]:
        return "\n".join(TABLES[found["table"]]()) + "\n"
    lines = [line.rstrip() for line in said(shlex.split(found["command"])[1:]).splitlines()]
    if found["start"]:
        begins = next((n for n, line in enumerate(lines) if line.startswith(found["start"])), None)
        if begins is None:
            raise ValueError(f"{found['command']} prints no line that begins with {found['start']!r}")
        lines = lines[begins:]
    return "```text\n" + "\n".join(lines).strip("\n") + "\n```\n"


def said(words: list[str]) -> str:
    """What `kdcloud WORDS` prints on stdout: a plan over its cap (3), and nothing where no machine fits (4)."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "KDCLOUD_HOME": f"{folder}/home", "PYTHONPATH": str(ROOT), "COLUMNS": str(COLUMNS)}
        argv = [sys.executable, "-c", "from orchestrator.cli import main; main()", *words]
        done = subprocess.run(argv, env=env, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3, 4):
        raise ValueError(f"kdcloud {shlex.join(words)} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def gpus() -> Iterator[str]:
    """Every card that plans know, by memory, and what it costs an hour in the dated table of prices."""
    prices: dict[str, list[float]] = {}
    for row in TABLE:
        card = gpu_named(row.gpu, row.instance)
        if row.usd is not None and card is not None:
            prices.setdefault(card.name, []).append(float(row.usd) / row.gpus)
    yield "| card | memory, GiB | products, TFLOP/s | memory, GB/s | bf16 | USD an hour and card |"
    yield "|---|---:|---:|---:|---|---|"
    for card in sorted(GPUS.values(), key=lambda card: (card.vram_gib.value, card.reached_tflops.value)):
        known = sorted(prices.get(card.name, []))
        price = f"{known[0]:.2f}" + (f" to {known[-1]:.2f}" if known[-1] > known[0] else "") if known else "not found"
        figures = f"{card.vram_gib.value:.1f} | {card.reached_tflops.value:.0f} | {card.reached_gb_s.value:.0f}"
        yield f"| {card.name} | {figures} | {'yes' if card.bf16 else 'no'} | {price} |"


def fits() -> Iterator[str]:
    """What training takes on the smallest card that holds it: GiB of a GPU at the high end, and how."""
    yield f"| student | method | {' | '.join(CARDS)} |"
    yield f"|---|---|{'---|' * len(CARDS)}"
    for student in STUDENTS:
        for method in METHODS:
            cells = [_cell(student, method, card) for card in CARDS]
            yield f"| {student.rpartition('/')[2]} | {method} | {' | '.join(cells)} |"


def _cell(student: str, method: str, card: str) -> str:
    row = _explained(student, method).get(card)
    if row is None:
        return "no"
    again = ", checkpointing" if row["settings"]["checkpointing"] else ""
    return f"{row['vram_gib']['high']:.0f} GiB, {row['settings']['micro_batch']} at once{again}"


_EXPLAINED: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}


def _explained(student: str, method: str) -> dict[str, dict[str, Any]]:
    """What `kdcloud plan --explain train --json` says of the cards that fit, by their names."""
    if (student, method) not in _EXPLAINED:
        with tempfile.TemporaryDirectory() as folder:
            recipe = Path(folder) / "recipe.yaml"
            wanted, prompts = ", ".join(f'"{card}:1"' for card in CARDS), ROOT / "recipes" / "data" / "algebra.jsonl"
            recipe.write_text(ROW.format(gpus=wanted, prompts=prompts, student=student, method=method))
            text = said(["plan", str(recipe), "--explain", "train", "--json"])
        rows = json.loads(text)["explain"]["train"] if text else []  # nothing at all where no card fits
        _EXPLAINED[student, method] = {row["gpu"]: row for row in reversed(rows) if row["vram_gib"] is not None}
    return _EXPLAINED[student, method]


TABLES: dict[str, Callable[[], Iterator[str]]] = {"gpus": gpus, "fits": fits}


def documents() -> list[Path]:
    """Those that may hold blocks."""
    return [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    """Renews the documents, or says which are not up to date."""
    old = []
    for file in documents():
        text = file.read_text(encoding="utf-8")
        if (new := renewed(text)) != text:
            old.append(str(file.relative_to(ROOT)))
            if "--check" not in sys.argv[1:]:
                file.write_text(new, encoding="utf-8")
    if old and "--check" in sys.argv[1:]:
        sys.exit(f"not what the commands print: {', '.join(old)}: run python scripts/doc_outputs.py")
    print("\n".join(f"renewed {name}" for name in old) or "all as the commands print it")


if __name__ == "__main__":
    main()
