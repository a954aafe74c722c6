"""How long does planning take, and does it grow with the offers? Made-up offers of every known card; no GPU is needed.

    python -m benchmarks.planner [--stages 20] [--profile]

Offers differ in machine, region and price; half have one GPU, the others 2, 4 or 8; five infras, spot and on demand.
Stages are labellings, trainings, evaluations and exports of several sizes, so that none is like another. Each time is
CPU time of one plan, the shortest of three, nothing known from before.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from datetime import UTC, datetime
from pathlib import Path

from orchestrator import duration
from orchestrator.config import Config
from orchestrator.gpus import GPUS
from orchestrator.offers import CLOUD_LATENCIES, MINIMUM_S
from orchestrator.planner import Planner
from orchestrator.provision import Need, Offer
from orchestrator.recipe import Recipe, parse_recipe

NOW = datetime(2026, 6, 1, tzinfo=UTC)
INFRAS = ("runpod", "aws", "lambda", "vast", "gcp")
STUDENTS = ("0.5B", "1.5B", "3B")
TEACHERS = ("1.5B", "7B", "14B", "32B")
DATA = Path(__file__).resolve().parent.parent / "recipes" / "data"
GPUS_A_MACHINE = (1, 1, 1, 2, 4, 8)
COUNTS = (1000, 3000, 10_000, 25_000, 50_000)


def offers(count: int, seed: int = 0) -> list[Offer]:
    """So many offers: the price of a card is its bandwidth's, within a factor of two."""
    draw, cards = random.Random(seed), list(GPUS.values())
    found = []
    for index in range(count):
        card, infra, spot = cards[index % len(cards)], INFRAS[index % len(INFRAS)], index % 3 == 0
        gpus = GPUS_A_MACHINE[index // 7 % len(GPUS_A_MACHINE)]
        micros = round(gpus * card.bandwidth_gb_s.value * 1000 * draw.uniform(0.7, 1.4))
        found.append(
            Offer(
                infra, f"region-{index % 37}", f"{infra}-{card.name}-{gpus}-{index % 211}", card.name, gpus,
                card.vram_gib.value, spot, round(micros * 0.4) if spot else micros, NOW,
                minimum_s=MINIMUM_S.get(infra, 0), ceiling_micros_per_hour=micros if spot else None,
                latencies=CLOUD_LATENCIES,
            )
        )  # fmt: skip
    return found


def recipe(stages: int) -> Recipe:
    """A recipe of so many stages, each four of which label, train, evaluate and export."""
    lines = [
        "name: planned\nbudget: 5000 USD\nspot: true\nbucket: s3://bucket/kd",
        f'data: {{prompts: "{DATA}/algebra.jsonl", held_out: "{DATA}/algebra-test.jsonl", verify: math}}',
        "stages:",
    ]
    kinds = itertools.islice(itertools.product(range((stages + 3) // 4), range(4)), stages)
    for group, kind in kinds:
        teacher = f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{TEACHERS[group % len(TEACHERS)]}"
        student = f"Qwen/Qwen2.5-{STUDENTS[group % len(STUDENTS)]}"
        lines.append(
            [
                f"label{group}, kind: label, teacher: {teacher}, samples: {1000 + 37 * group}",
                f"train{group}, kind: train, student: {student}, labels: label{group}, epochs: {1 + group}",
                f"eval{group}, kind: evaluate, student: train{group}, teacher: label{group}",
                f"export{group}, kind: export, student: train{group}",
            ][kind]
        )
    lines[3:] = [f"  - {{name: {line}}}" for line in lines[3:]]
    return parse_recipe("\n".join(lines) + "\n", DATA / "recipe.yaml")


def seconds(stages: int, count: int, *, hurry: float | None = None, times: int = 3) -> float:
    """Shortest time of one plan. `hurry`: a deadline of so much of the time that the cheapest plan takes."""
    made, market, best = recipe(stages), offers(count), float("inf")
    for _ in range(times):
        deadline_s = None if hurry is None else hurry * _planner(made, market).plan().hours.expected * 3600
        planner = _planner(made, market, deadline_s)
        for known in (duration._steps_s, duration._micro_parts, duration._serving_s, duration._score_s):
            known.cache_clear()  # as in a process that has planned nothing yet
        started = time.process_time()
        planner.plan()
        best = min(best, time.process_time() - started)
    return best


def _planner(made: Recipe, market: list[Offer], deadline_s: float | None = None) -> Planner:
    def offers_for(need: Need) -> list[Offer]:
        return market

    config = Config(owner="abc123", bucket="s3://bucket/kd")
    return Planner(made, config=config, offers_for=offers_for, now=NOW, deadline_s=deadline_s)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--stages", type=int, default=20)
    asked.add_argument("--profile", action="store_true")
    given = asked.parse_args()
    if given.profile:
        import cProfile

        planner = _planner(recipe(given.stages), offers(COUNTS[-1]))
        cProfile.runctx("planner.plan()", {"planner": planner}, {}, sort="cumtime")
        return
    print(f"{given.stages} stages    offers  seconds  with a deadline  front")
    for count in COUNTS:
        plain, hurried = (seconds(given.stages, count, hurry=hurry) for hurry in (None, 0.8))
        planner = _planner(recipe(given.stages), offers(count))
        planner.plan()
        started = time.process_time()
        front = planner.frontier()
        took = time.process_time() - started
        print(f"{'':14}{count:>8} {plain:>8.2f} {hurried:>16.2f}  {took:.2f} s, {len(front)} plans")


if __name__ == "__main__":
    main()
