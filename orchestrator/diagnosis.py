"""What went wrong with this run? Reads ledger and bucket, and shows what `findings` makes of it: `kdcloud doctor RUN`.

Reads only, and nothing large: of a run that goes on or failed, what is there by now.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import yaml

from orchestrator.findings import TITLES, Answers, Change, Curve, Finding, Seen, Severity, StageSeen, findings
from orchestrator.ledger import Ledger, MachineRow, Run
from orchestrator.plain import json_text
from orchestrator.plan import Plan, StagePlan
from orchestrator.shares import visits
from orchestrator.smoke import NOTE
from tasks.bucket import Bucket, BucketError, open_bucket
from tasks.contract import ENDED_FILE, METRICS_FILE

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
MOST_METRICS = 64 << 20  # bytes of one stage's metrics.jsonl
MOST_ANSWERS = 16 << 20  # bytes of answers, where a stage has no result that counts them
OF_A_SMOKE_RUN = ("out_of_memory", "memory_tight", "stage_failed")
COMPARED = ("hard", "hard_2x", "search")  # arms that are there to be compared with, not to be good


def diagnose_command(ledger: Ledger, run_id: str | None, as_json: bool) -> None:
    """Prints what is wrong with a run; None or `last` is the newest. Raises UsageError."""
    from orchestrator.session import newest, plan_of

    run = ledger.run(newest(ledger, run_id))
    document = diagnosed(run, plan_of(run))
    if as_json:
        print(json_text(document, indent=1))
        return
    from rich.console import Console

    render(document, Console(highlight=False))


def diagnosed(run: Run, plan: Plan) -> dict[str, Any]:
    """What is wrong with the run, worst first, and what was looked at: the document of `--json`."""
    seen, looked, missing = read(run, plan)
    found = findings(seen)
    if run.data.get("smoke"):  # ten samples teach nothing, and are not meant to
        found = [one for one in found if one.id in OF_A_SMOKE_RUN]
        looked = [*looked, NOTE]
    return to_json(run, seen, found, looked, missing)


# --- reading ---------------------------------------------------------------------------------------------------------


def read(run: Run, plan: Plan) -> tuple[Seen, list[str], list[str]]:
    """The run as the rules need it; what was looked at, and what could not be read, in words."""
    from orchestrator.session import state_of

    missing: list[str] = []
    try:
        bucket: Bucket | None = open_bucket(run.bucket)
    except (BucketError, ImportError) as error:
        bucket = None
        missing.append(f"metrics and last words: the bucket cannot be opened ({error})")
    stages = tuple(_stage(run, stage, bucket, missing) for stage in plan.stages)
    ends = run.ends[-1] if run.ends else None
    data = ends.data if ends is not None else {}
    state = state_of(run)
    failed = ends.stage if ends is not None and state != "running" else None
    seen = Seen(state, str(data.get("message", "")), str(data.get("hint", "")), failed, stages)
    return seen, [text for stage in stages for text in _looked(stage)], missing


def _stage(run: Run, stage: StagePlan, bucket: Bucket | None, missing: list[str]) -> StageSeen:
    visited = [one for row in run.machines for one in visits(row) if one.stage == stage.name]
    rows = [replace(one.row, facts=one.facts) for one in visited]
    done = run.done.get(stage.name)
    result = dict(done["result"]) if done else {}
    trains = stage.kind in ("train", "pretrain")
    return StageSeen(
        name=stage.name,
        kind=stage.kind,
        settings=stage.settings,
        done=done is not None,
        attempts=len(rows),
        result=result,
        ended=_ended(rows, stage.name, bucket, missing),
        curves=tuple(curves_of(_rows(_get(bucket, f"{stage.name}/{METRICS_FILE}", MOST_METRICS, missing))))
        if trains and rows
        else (),
        answers=_answers(stage.name, result, bucket, missing) if stage.kind == "label" and rows else None,
        local=stage.offer.infra == "local",
    )


def _ended(rows: Sequence[MachineRow], stage: str, bucket: Bucket | None, missing: list[str]) -> Mapping[str, Any]:
    """Last words of the newest machine that left any: in the ledger, or still in the bucket alone."""
    told = [row.facts["ended"] for row in rows if isinstance(row.facts.get("ended"), dict)]
    if told:
        return dict(told[-1])
    found = _rows(_get(bucket, f"{stage}/{ENDED_FILE}", MOST_METRICS, missing).replace(b"\n", b" ")) if rows else []
    return found[-1] if found else {}


def curves_of(rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """A curve for every model that is trained to be good; steps that were repeated count as they were last."""
    by_name: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        step, total = row.get("step"), next((key for key in row if key.endswith("loss/total")), None)
        if isinstance(step, int) and total is not None and not total.startswith(COMPARED):
            by_name.setdefault(total.removesuffix("loss/total"), {})[step] = row
    return [_curve(prefix, by_step) for prefix, by_step in by_name.items()]


def _curve(prefix: str, by_step: Mapping[int, Mapping[str, Any]]) -> Curve:
    steps = sorted(by_step)
    last = by_step[steps[-1]]
    losses = [_number(by_step[step].get(f"{prefix}loss/total")) for step in steps]
    cuts = [_number(by_step[step].get(f"{prefix}micro_batch")) for step in steps]
    return Curve(
        name=prefix.rstrip("/"),
        losses=tuple(loss for loss in losses if loss is not None),
        last_step=steps[-1],
        waiting_data=_number(last.get(f"{prefix}waiting/data")),
        waiting_save=_number(last.get(f"{prefix}waiting/save")),
        micro_batch=min((int(cut) for cut in cuts if cut is not None), default=None),
    )


def _number(value: Any) -> float | None:
    """A finite number; a bucket may hold anything."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def _answers(stage: str, result: Mapping[str, Any], bucket: Bucket | None, missing: list[str]) -> Answers | None:
    """From the result of the stage; while there is none, from the answers that it has written."""
    if result:
        count = int(result.get("generated", 0))
        share = _number(result.get("loop_share"))
        dropped = {str(why): int(n) for why, n in (result.get("dropped") or {}).items()}
        return Answers(count, int(result.get("kept", 0)), dropped, None if share is None else round(share * count))
    rows = list(_written(stage, bucket, missing))
    if not rows:
        return None
    good = [bool(row.get("kept", row.get("ok"))) for row in rows]
    dropped = Counter(str(row.get("reason")) for row, kept in zip(rows, good, strict=True) if not kept)
    return Answers(len(rows), sum(good), dropped, sum(bool(row.get("loops")) for row in rows))


def _written(stage: str, bucket: Bucket | None, missing: list[str]) -> Iterator[dict[str, Any]]:
    """Answers of whole shards, and of the newest checkpoint for one that is not."""
    if bucket is None:
        return
    try:
        keys = [stat.key for stat in bucket.list(f"{stage}/") if stat.key.rpartition("/")[2].startswith("generated-")]
    except (BucketError, OSError) as error:
        missing.append(f"answers of {stage}: {error}")
        return
    newest: dict[str, str] = {}  # shard -> its key: a whole one before a checkpoint, a later checkpoint before another
    for key in sorted(keys, key=lambda key: (key.count("/") == 1, len(key), key)):
        newest[key.rpartition("/")[2]] = key
    left = MOST_ANSWERS
    for key in sorted(newest.values(), key=lambda key: key.rpartition("/")[2]):
        data = _get(bucket, key, left, missing)
        left -= len(data)
        yield from _rows(data)


def _get(bucket: Bucket | None, key: str, most: int, missing: list[str]) -> bytes:
    """The object; nothing, with a word in `missing`, where it is too large or does not come."""
    if bucket is None:
        return b""
    try:
        stat = bucket.head(key)
        if stat is None:
            return b""
        if stat.size > most:
            missing.append(f"{key}: {stat.size:,} bytes are more than is read")
            return b""
        return bucket.get(key)[0]
    except (BucketError, OSError) as error:
        missing.append(f"{key}: {error}")
        return b""


def _rows(data: bytes) -> list[dict[str, Any]]:
    """Objects of lines of JSON; the last one may be half written."""
    found = []
    for line in data.decode(errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def _looked(stage: StageSeen) -> Iterator[str]:
    for curve in stage.curves:
        yield f"{stage.name}: {len(curve.losses)} points of its loss{f' ({curve.name})' if curve.name else ''}"
    if stage.answers is not None:
        yield f"{stage.name}: {stage.answers.count} answers"
    if stage.result.get("quality"):
        yield f"{stage.name}: accuracy, cut and repeating answers"
    if stage.kind == "train":
        yield f"{stage.name}: alpha and T"
    if stage.ended and not stage.done:
        yield f"{stage.name}: its last words"


# --- the lines of the recipe -----------------------------------------------------------------------------------------


def located(recipe_text: str, change: Change) -> dict[str, Any]:
    """The change as JSON: where the recipe says it now, or the stage to which it is to be added."""
    line, now = _place(recipe_text, change)
    value = _yaml(change.value)
    *outer, last = change.key.split(".")
    inner = f"{last}: {value}"
    text = inner if now is not None else "".join(f"{name}: {{" for name in outer) + inner + "}" * len(outer)
    return {
        "stage": change.stage,
        "key": change.key,
        "value": change.value,
        "now": now,
        "line": line,
        "text": text,
    }


def _yaml(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.10f}".rstrip("0") if 1e-10 <= abs(value) < 1e-4 else repr(value)  # 2e-05 is a text in YAML 1.1
    return str(yaml.safe_dump(value)).split("\n")[0]


def _place(recipe_text: str, change: Change) -> tuple[int | None, str | None]:
    """(line from 1, value) of the key; (line of its stage, None) where it is not there; nothing in a broken recipe."""
    try:
        node = yaml.compose(recipe_text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return None, None
    if change.stage is not None:
        stages = _value(node, "stages")
        rows = stages.value if isinstance(stages, yaml.SequenceNode) else []
        node = next((row for row in rows if getattr(_value(row, "name"), "value", None) == change.stage), None)
    if node is None:
        return None, None
    line = node.start_mark.line + 1
    for name in change.key.split("."):
        key = _key(node, name)
        if key is None:
            return line, None
        line, node = key.start_mark.line + 1, _value(node, name)
    return line, str(node.value) if isinstance(node, yaml.ScalarNode) else None


def _key(node: Any, name: str) -> Any:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((key for key, _ in pairs if key.value == name), None)


def _value(node: Any, name: str) -> Any:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for key, value in pairs if key.value == name), None)


# --- telling ---------------------------------------------------------------------------------------------------------


def to_json(
    run: Run, seen: Seen, found: Sequence[Finding], looked: Sequence[str], missing: Sequence[str]
) -> dict[str, Any]:
    """The document of `kdcloud doctor RUN --json`."""
    text = str(run.data.get("recipe_text") or "")
    return {
        "schema": SCHEMA,
        "run": run.id,
        "recipe": run.name,
        "state": seen.state,
        "findings": [
            {
                "id": one.id,
                "severity": str(one.severity),
                "stage": one.stage,
                "title": TITLES[one.id],
                "what": one.what,
                "evidence": dict(one.evidence),
                "change": [located(text, change) for change in one.change],
                "advice": one.advice,
            }
            for one in found
        ],
        "looked_at": list(looked),
        "not_read": list(missing),
    }


MARKS = {Severity.FAULT: ("✗", "red"), Severity.WARNING: ("!", "yellow"), Severity.NOTE: ("·", "dim")}


def render(document: Mapping[str, Any], console: Console) -> None:
    """For a terminal. Words of machines and recipes are shown as plain text."""
    from rich.padding import Padding
    from rich.text import Text

    def line(text: str, style: str = "", indent: int = 0) -> None:
        console.print(Padding(Text(_printable(text), style), (0, 0, 0, indent), expand=False))

    found = document["findings"]
    bad = [one for one in found if one["severity"] != Severity.NOTE]
    console.print(Text.assemble(("run ", "bold"), (_printable(document["run"]), "bold"), f"  {document['state']}"))
    for one in found:
        mark, colour = MARKS[Severity(one["severity"])]
        console.print()
        where = "" if one["stage"] == "-" else f"  stage {one['stage']}"
        console.print(Text.assemble((f"{mark} ", colour), (one["title"], f"bold {colour}"), where))
        line(one["what"], indent=2)
        known = {name: value for name, value in one["evidence"].items() if value is not None}
        line(", ".join(f"{name.replace('_', ' ')} {_said(value)}" for name, value in known.items()), "dim", 2)
        for change in one["change"]:
            line(_change_said(change), "bold", 4)
        if one["advice"]:
            line(one["advice"], indent=2)
    console.print()
    if not bad:
        console.print(Text("nothing wrong found" + (", only what is noted above" if found else ""), "green"))
    line("looked at: " + ("; ".join(document["looked_at"]) or "nothing yet"), "dim")
    for text in document["not_read"]:
        line(f"could not be read: {text}", "yellow")


def _change_said(change: Mapping[str, Any]) -> str:
    where = f"line {change['line']}" if change["line"] else "the recipe"
    stage = f" ({change['stage']})" if change["stage"] else ""
    if change["now"] is None:
        return f"{where}{stage}: add  {change['text']}"
    return f"{where}{stage}: {change['now']} becomes  {change['text']}"


def _said(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)
