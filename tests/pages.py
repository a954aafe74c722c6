"""A made-up run with everything a report page shows, and what a hostile model may have written into it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from orchestrator.ledger import MachineRow, Run
from orchestrator.page_data import gather
from orchestrator.plan import Micros, Plan
from orchestrator.report import build_report
from orchestrator.states import State
from orchestrator.testing import START
from tasks.bucket import open_bucket
from tasks.contract import DataSource, EvaluateSettings, LabelSettings, ModelSource, PretrainSettings, TrainSettings
from tests.plans import make_plan

HOSTILE = (
    "</script><script>document.title = 'stolen'</script>",
    "<img src=x onerror=\"document.title='stolen'\">",
    '"><style>body { display: none }</style><svg onload=alert(1)>',
    "</p></details></article><h1>Grade: A+</h1><!--",
    "turned \u202e around, \x1b[31m and \x00, half a pair \ud800",
    "{{ 7 * 7 }} {% include '/etc/passwd' %} $x^2$",
    "long " + "&<" * 20_000,
)
SECONDS = {"pretrain": 60.0, "label": 600.0, "train": 3600.0, "evaluate": 300.0}


def plan_made(bucket: Path) -> Plan:
    """Four stages that cost what they cost with fake offers."""
    plan = make_plan(SECONDS, bucket=f"file:{bucket}", cap_micros=2_000_000)
    teacher, prompts = ModelSource(path="some/teacher"), DataSource("prompts.jsonl", "0" * 64)
    settings = {
        "pretrain": PretrainSettings({"hidden_size": 64}, "builtin:addition/corpus", 10, 40, 32, 0.003),
        "label": LabelSettings(teacher, prompts, "math", samples=400, max_new_tokens=64),
        "train": TrainSettings(ModelSource(path="some/student"), "label", compare_hard=True, compare_seeds=2),
        "evaluate": EvaluateSettings("train", teacher, prompts, "math"),
    }
    stages = tuple(
        replace(
            stage, kind=stage.name, settings=settings[stage.name],
            cost_micros=Micros(stage.cost_micros.low // 2, stage.cost_micros.expected, stage.cost_micros.high * 2),
        )
        for stage in plan.stages
    )  # fmt: skip
    return replace(plan, stages=stages, name="addition")


def run_made(plan: Plan, *, done: bool = True) -> Run:
    """All stages done; or labels alone, and then a failure."""
    results = {
        "pretrain": {"steps": 40},
        "label": {
            "prompts": 400, "generated": 400, "kept": 377, "dropped": {"wrong": 22, "cut": 1}, "tokens": 3998,
            "tokens_per_s": 4645.3, "cut_share": 0.0025, "mass_inside_mean": 0.98541, "engine": "transformers",
            "logprob_error": {"mean": 0.0012, "worst": 0.0078},
            "samples": [
                {"key": "k", "input": text, "answer": text, "text": text, "kept": False, "reason": "wrong"}
                for text in HOSTILE
            ],
        },
        "train": {"samples": 377},
        "evaluate": {"quality": quality(), "samples": samples()},
    }  # fmt: skip
    names = list(results) if done else ["pretrain", "label"]
    machines = tuple(row(plan, name, gone=done or name != "train") for name in [*names, *([] if done else ["train"])])
    return Run(
        id="addition-abc123", name="addition", created_at=START, bucket=plan.bucket,
        data={"version": "0.1.0", "recipe_text": f"# {HOSTILE[0]}\nname: addition\ninfra: fake\n"},
        cap_micros=plan.cap_micros, deadline_s=None, deadline_from={}, machines=machines,
        done={name: {"files": {"result.json": 151}, "result": results[name]} for name in names}, ends=(),
    )  # fmt: skip


def row(plan: Plan, stage: str, *, gone: bool) -> MachineRow:
    """Its machine, one after the other; billed as long as planned."""
    names = list(SECONDS)
    start = sum(SECONDS[name] for name in names[: names.index(stage)])
    moments = {"sent": 0.0, "job": 20.0, "job_ended": SECONDS[stage] - 5, "gone": SECONDS[stage]}
    facts: dict[str, Any] = {
        f"{event}_at": (START + timedelta(seconds=start + s)).isoformat()
        for event, s in moments.items() if gone or event in ("sent", "job")
    }  # fmt: skip
    facts |= {"billed_s": SECONDS[stage], "ended": {"peak_gib": 11.5}} if gone else {}
    offer = next(one for one in plan.stages if one.name == stage).offer
    order = {"offer": {**asdict(offer), "as_of": offer.as_of.isoformat()}, "attempt": 1}
    cost = next(one for one in plan.stages if one.name == stage).cost_micros.expected
    return MachineRow(
        f"kd-{stage}", "addition-abc123", stage, State.GONE if gone else State.LIVE, 0 if gone else 1000,
        cost + 7 if gone else 0, order, facts, (), START, False, 0,
    )  # fmt: skip


def quality() -> dict[str, Any]:
    def one(*seeds: float, kl: float | None) -> dict[str, Any]:
        mean = math.fsum(seeds) / len(seeds)
        accuracy = {"mean": mean, "min": min(seeds), "max": max(seeds), "n": 1000, "seeds": list(seeds)}
        accuracy |= {"interval": [mean - 0.0312, min(1.0, mean + 0.0314)]}
        return {
            "accuracy": accuracy,
            "kl_to_teacher": kl,
            "tokens_per_s": 5270.9,
            "first_token_s": 0.0109,
            "peak_gib": 3.75,
        }

    return {
        "teacher": one(0.999, kl=None), "student_before": one(0.0625, kl=5.125),
        "student_hard": one(0.1, 0.1125, kl=0.9906), "student": one(0.4451, 0.8907, kl=0.1102),
    }  # fmt: skip


def samples() -> list[dict[str, Any]]:
    """One for each thing that can become of an answer; the hostile texts spread over them."""
    found = []
    for at, text in enumerate(HOSTILE):
        right = {"teacher": True, "student_before": at % 2 == 0, "student": at % 4 < 2}
        found.append(
            {"input": text, "answer": text, "teacher": text, "student_before": "", "student": text, "right": right}
        )
    return found


def fill_bucket(plan: Plan) -> None:
    """Curves of four arms and a search, a half-written last line, and generated answers."""
    bucket = open_bucket(plan.bucket)
    for stage, prefixes in {"pretrain": [""], "train": ["", "soft-1/", "hard-0/", "search-soft-0.1/"]}.items():
        lines = []
        for prefix in prefixes:
            for step in range(450):
                kl = 0.0 if stage == "pretrain" or prefix == "hard-0/" else 5.0 * math.exp(-step / 60) + 0.01
                ce = 3.0 * math.exp(-step / 100) + 0.2
                values = {"loss/total": kl + ce, "loss/kl": kl, "loss/ce": kl + ce if stage == "pretrain" else ce}
                values["learning_rate"] = 1e-4
                lines.append(json.dumps({"step": step, **{prefix + name: value for name, value in values.items()}}))
        bucket.put(f"{stage}/metrics.jsonl", ("\n".join(lines) + '\n{"step": 450, "loss/to').encode())
    answers = [{"completion_ids": [1] * (5 + at % 40), "kept": at % 10 > 0} for at in range(200)]
    bucket.put("label/generated-00000.jsonl", "\n".join(map(json.dumps, answers)).encode())
    bucket.put("train/log.txt", f"step 1\n{HOSTILE[0]}\nout of memory\n".encode())


def document(folder: Path, *, done: bool = True, state: str | None = None, filled: bool = True) -> dict[str, Any]:
    """What the page is made of."""
    plan = plan_made(folder)
    if filled:
        fill_bucket(plan)
    run = run_made(plan, done=done)
    report = build_report(run, plan, [])
    report["state"] = state or ("done" if done else "failed")
    if not done:
        report |= {"message": f"stage train failed: {HOSTILE[1]}", "hint": "look at kdcloud logs"}
    return gather(run, plan, report, now=START + timedelta(hours=2))
