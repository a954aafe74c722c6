"""What does a report page show of a run? Gathered from ledger and bucket as plain values; offline for a local bucket.

Whatever cannot be read becomes a sentence in `missing`, never an error: a run that failed or still runs has a page too.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from statistics import fmean
from typing import Any

import yaml

from orchestrator.ledger import API_SETTLE, Run
from orchestrator.money import budget_for
from orchestrator.plan import Plan, StagePlan
from orchestrator.shares import Visit, visits
from tasks.bucket import Bucket, BucketError, open_bucket
from tasks.contract import LOG_FILE, METRICS_FILE

POINTS = 200  # of one curve: more cannot be told apart on a page
MOST_METRICS = 64 << 20  # bytes of one stage's metrics.jsonl that are read
MOST_ANSWERS = 64 << 20  # bytes of generated-*.jsonl that are read for lengths, a stage
MACHINES_SHOWN = 40
LOG_LINES = 30
LENGTH_BINS = 16
SAMPLES_SHOWN = 24
ROLES = {"": "student", "soft": "student", "hard": "student_hard", "hard_2x": "student_hard_2x"}


def gather(run: Run, plan: Plan, report: Mapping[str, Any], *, now: datetime) -> dict[str, Any]:
    """The document of a page. `report` is that of `kdcloud report --json`, taken over as it is."""
    missing: list[str] = []
    bucket = _bucket(run, missing)
    labels = [_labels(run, stage, bucket, missing) for stage in plan.stages if stage.kind == "label"]
    return {
        "report": report,
        "version": run.data.get("version"),
        "rate": plan.rate,
        "made_at": now.isoformat(timespec="seconds"),
        "took_s": _since(now if report["state"] == "running" or not run.ends else run.ends[-1].at, run.created_at),
        "plan": {
            "cost_micros": asdict(plan.cost_micros),
            "needed_micros": plan.needed_micros,
            "overhead": [{"what": item.what, "cost_micros": asdict(item.cost_micros)} for item in plan.overhead],
            "stages": {s.name: {"cost_micros": asdict(s.cost_micros), "hours": asdict(s.hours)} for s in plan.stages},
        },
        "timeline": timeline(run, now),
        "curves": [c for s in plan.stages if s.kind in ("train", "pretrain") if (c := _curves(s, bucket, missing))],
        "labels": [found for found in labels if found],
        "samples": _samples(run),
        "settings": [_settings(stage) for stage in plan.stages],
        "recipe_text": run.data.get("recipe_text") or "",
        "command": command(run, plan),
        "log": _log(report, bucket, missing),
        "missing": missing,
    }


def timeline(run: Run, now: datetime) -> dict[str, Any]:
    """Machines as rows and the money as a line, in seconds since the run began.

    A machine's cost is drawn as even over its life, since it is settled once, when it is gone.
    """
    began = run.created_at
    sent = [row for row in run.machines if "sent_at" in row.facts]
    rows = [_stretch(visit, began, now) for row in sent for visit in visits(row)]
    settled = [(row["start_s"], row["end_s"], row["cost_micros"]) for row in rows if row["cost_micros"]]
    apis = [(_since(e.at, began), _since(e.at, began), e.micros) for e in run.entries if e.kind == API_SETTLE]
    lines = settled + apis
    times = sorted({0.0, *(t for start, end, _ in lines for t in (start, end))})
    money = [[t, sum(_paid(line, t) for line in lines)] for t in times]
    return {"machines": rows[-MACHINES_SHOWN:], "left_out": max(0, len(rows) - MACHINES_SHOWN), "money": money}


def _paid(line: tuple[float, float, int], t: float) -> float:
    start, end, micros = line
    return micros * min(1.0, max(0.0, (t - start) / (end - start))) if end > start else micros * (t >= start)


def _stretch(visit: Visit, began: datetime, now: datetime) -> dict[str, Any]:
    """One stage on one machine, in seconds of the run: a machine with several has one stretch after another."""
    row, is_first = visit.row, visit.stage == visit.row.stage

    def when(event: str) -> float | None:
        text = row.facts.get(f"{event}_at")
        return None if text is None else _since(datetime.fromisoformat(text), began)

    def at(age_s: float) -> float:
        return (when("sent") or 0.0) + age_s

    offer = row.facts.get("landed") or row.order.get("offer") or {}
    start, end, gone = at(visit.from_s), when("gone"), "gone_at" in row.facts
    if not visit.is_last:
        end = at(visit.facts["until_s"])
    return {
        "stage": visit.stage,
        "attempt": visit.attempt,
        "where": " ".join(str(offer[key]) for key in ("infra", "region", "gpu") if offer.get(key)),
        "spot": bool(offer.get("spot")),
        "start_s": start,
        "work_s": when("job") if is_first else start,
        "worked_s": when("job_ended") if visit.is_last else end,
        "end_s": end if end is not None else _since(now, began),
        "gone": gone,
        "cost_micros": visit.micros if gone else None,
        "why": row.reasons[-1] if visit.is_last and row.reasons else "",
    }


def _since(at: datetime, began: datetime) -> float:
    return max(0.0, (at - began).total_seconds())


def _bucket(run: Run, missing: list[str]) -> Bucket | None:
    try:
        return open_bucket(run.bucket)
    except (BucketError, ImportError) as error:
        missing.append(f"curves and lengths: the bucket cannot be opened ({error})")
        return None


def _read(bucket: Bucket | None, key: str, most: int, missing: list[str]) -> bytes | None:
    """The object, or None with a word in `missing` where it is too large or does not come; None alone if not there."""
    if bucket is None:
        return None
    try:
        stat = bucket.head(key)
        if stat is None:
            return None
        if stat.size > most:
            missing.append(f"{key}: {stat.size:,} bytes are more than a page reads")
            return None
        return bucket.get(key)[0]
    except (BucketError, OSError) as error:
        missing.append(f"{key}: {error}")
        return None


def _rows(data: bytes) -> list[dict[str, Any]]:
    """Lines of JSON; the last one may be half written, and whatever is no object is left out."""
    rows = []
    for line in data.decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


# --- curves ----------------------------------------------------------------------------------------------------------


def _curves(stage: StagePlan, bucket: Bucket | None, missing: list[str]) -> dict[str, Any] | None:
    data = _read(bucket, f"{stage.name}/{METRICS_FILE}", MOST_METRICS, missing)
    arms = [] if data is None else arms_of(_rows(data))
    if stage.kind == "pretrain":  # no student: a model of its own
        arms = [{**arm, "name": "model", "role": "model"} for arm in arms]
    return {"stage": stage.name, "kind": stage.kind, "arms": arms} if arms else None


def arms_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A curve for every model of a stage that was trained to its end or is being trained; searches are left out.

    Steps that were repeated after a resume count as they were last.
    """
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        step, total = row.get("step"), next((key for key in row if key.endswith("loss/total")), None)
        if isinstance(step, int) and total is not None and not total.startswith("search-"):
            found.setdefault(total.removesuffix("loss/total"), {})[step] = row
    return [_arm(prefix, by_step) for prefix, by_step in found.items()]


def _arm(prefix: str, by_step: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    kind, _, seed = prefix.rstrip("/").rpartition("-")
    steps = sorted(by_step)
    names = {"total": "loss/total", "kl": "loss/kl", "ce": "loss/ce", "learning_rate": "learning_rate"}
    lines = {short: [by_step[step].get(prefix + name) for step in steps] for short, name in names.items()}
    width = -(-len(steps) // POINTS)
    return {
        "name": prefix.rstrip("/") or "student",
        "role": ROLES.get(kind, kind),
        "seed": int(seed) if seed.isdecimal() else 0,
        "logged": len(steps),
        "a_point": width,  # this many rows of metrics.jsonl are one point
        "steps": [fmean(steps[at : at + width]) for at in range(0, len(steps), width)],
        **{
            short: [_mean(values[at : at + width]) for at in range(0, len(steps), width)]
            for short, values in lines.items()
        },
        "last_step": steps[-1],
        "last": {short: values[-1] for short, values in lines.items()},
    }


def _mean(values: Sequence[Any]) -> float | None:
    known = [value for value in values if isinstance(value, (int, float))]
    return fmean(known) if known else None


# --- labels ----------------------------------------------------------------------------------------------------------


def _labels(run: Run, stage: StagePlan, bucket: Bucket | None, missing: list[str]) -> dict[str, Any] | None:
    """Result of a label stage and how long its answers are; None while there is neither."""
    done = run.done.get(stage.name)
    result = dict(done["result"]) if done else None
    lengths = _lengths(stage.name, bucket, missing)
    if result is None and lengths is None:
        return None
    samples = result.pop("samples", None) if result else None
    return {
        "stage": stage.name,
        "result": result,
        "limit": getattr(stage.settings, "max_new_tokens", None),
        "top_k": getattr(stage.settings, "top_k", None),
        "lengths": lengths,
        "samples": samples or [],
    }


def _lengths(stage: str, bucket: Bucket | None, missing: list[str]) -> dict[str, Any] | None:
    """Tokens of the answers that were kept and dropped: means, and a histogram over common edges."""
    if bucket is None:
        return None
    kept: list[int] = []
    dropped: list[int] = []
    left, shards, read = MOST_ANSWERS, 0, 0
    try:
        stats = [s for s in bucket.list(f"{stage}/") if s.key.startswith(f"{stage}/generated-")]
    except (BucketError, OSError) as error:
        missing.append(f"lengths of answers: {error}")
        return None
    for stat in sorted(stats, key=lambda stat: stat.key):
        shards += 1
        if stat.size > left:
            continue
        left -= stat.size
        data = _read(bucket, stat.key, MOST_ANSWERS, missing)
        read += data is not None
        for row in _rows(data or b""):
            if isinstance(row.get("completion_ids"), list):
                (kept if row.get("kept", row.get("ok")) else dropped).append(len(row["completion_ids"]))
    if not kept and not dropped:
        return None
    if read < shards:
        missing.append(f"lengths of answers of {stage}: from {read} of {shards} shards")
    return {"kept": _spread(kept), "dropped": _spread(dropped), **_histogram(kept, dropped)}


def _spread(lengths: Sequence[int]) -> dict[str, Any] | None:
    if not lengths:
        return None
    ordered = sorted(lengths)
    return {
        "n": len(ordered),
        "mean": fmean(ordered),
        "median": ordered[len(ordered) // 2],
        "longest": ordered[-1],
    }


def _histogram(kept: Sequence[int], dropped: Sequence[int]) -> dict[str, list[int]]:
    """Counts between whole edges: [edge i, edge i + 1)."""
    low, high = min((*kept, *dropped)), max((*kept, *dropped))
    width = max(1, -(-(high - low + 1) // LENGTH_BINS))
    edges = list(range(low, high + width + 1, width))
    counts = [Counter((length - low) // width for length in lengths) for lengths in (kept, dropped)]
    bars = [[count[at] for at in range(len(edges) - 1)] for count in counts]
    return {"edges": edges, "kept_counts": bars[0], "dropped_counts": bars[1]}


# --- answers, settings, log ------------------------------------------------------------------------------------------


def _samples(run: Run) -> list[dict[str, Any]]:
    """Problems of the evaluation with everybody's answers, each with what became of the student's."""
    rows = [
        row for done in run.done.values() if "quality" in done["result"] for row in done["result"].get("samples", ())
    ]
    return [{**row, "change": change_of(row.get("right") or {})} for row in rows[:SAMPLES_SHOWN]]


def change_of(right: Mapping[str, bool]) -> str:
    """gained, lost, right or wrong: the student after against the student before."""
    before, after = right.get("student_before"), right.get("student")
    if after is None:
        return "unknown"
    if before is None or before == after:
        return "right" if after else "wrong"
    return "gained" if after else "lost"


def _settings(stage: StagePlan) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "kind": stage.kind,
        "rows": [{"name": name, "value": value, "chosen": name.partition(".")[0] in stage.chosen}
                 for name, value in flat(asdict(stage.settings))],
        "notes": list(stage.notes),
    }  # fmt: skip


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as `lora.r`, in order."""
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        rows += flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else [(prefix + name, value)]
    return rows


def command(run: Run, plan: Plan) -> str:
    """What makes the same run again from the recipe on the page, saved under its name."""
    words = ["kdcloud", "run", f"{run.name}.yaml", "--budget", budget_for(run.cap_micros, plan.rate, plan.currency)]
    try:
        recipe = yaml.safe_load(run.data.get("recipe_text") or "")
    except yaml.YAMLError:
        recipe = None
    given = recipe if isinstance(recipe, dict) else {}
    named = given.get("infra") or []
    if len(plan.infra) == 1 and plan.infra[0] not in ([named] if isinstance(named, str) else named):
        words += ["--infra", plan.infra[0]]
    if run.deadline_s is not None and "deadline" not in given:
        words += ["--deadline", f"{run.deadline_s:g}s"]
    return shlex.join(words)


def _log(report: Mapping[str, Any], bucket: Bucket | None, missing: list[str]) -> dict[str, Any] | None:
    """The last lines of the stage where a run ended that is not done."""
    if report["state"] in ("done", "running") or bucket is None:
        return None
    for stage in reversed(report["stages"]):
        if stage["attempts"]:
            data = _read(bucket, f"{stage['name']}/{LOG_FILE}", MOST_METRICS, missing)
            lines = (data or b"").decode(errors="replace").splitlines()[-LOG_LINES:]
            return {"stage": stage["name"], "lines": lines} if lines else None
    return None
