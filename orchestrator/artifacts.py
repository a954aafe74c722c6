"""What did a run leave in its bucket, how does it come here, and what of it may go? `kdcloud artifacts`.

`judge` and `doomed` decide from a listing; `look`, `fetch` and `prune` do. A ledger's entries are never deleted.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.clock import Clock
from orchestrator.config import Config
from orchestrator.errors import UsageError
from orchestrator.lease import LEASE_KEY, Lease
from orchestrator.ledger import Ledger, Run
from orchestrator.mirror import FOLDER as LEDGER_FOLDER
from orchestrator.money import both
from orchestrator.session import is_driven, plan_of, state_of
from orchestrator.states import State
from tasks.bucket import Bucket, BucketError, Corrupt, Manifest, Stat, fetch_folder, open_bucket, read_commit
from tasks.contract import COMMIT_FILE, ENDED_FILE, LOG_FILE, METRICS_FILE, PROGRESS_FILE, TASK_FILE

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
CHECKPOINTS = "checkpoints"
RECORDS = (TASK_FILE, PROGRESS_FILE, ENDED_FILE, METRICS_FILE, LOG_FILE)
# S3 Standard, first 50 TB, us-east-1: 0.023 USD a GB (10^9 bytes) and month by the list at aws.amazon.com/s3/pricing.
# Other storage classes, regions and stores differ: shown as "about", and only for S3 itself.
S3_MICROS_PER_GB_MONTH = 23_000
PLAIN_EVERY_S = 5.0


class Kept(StrEnum):
    """What stands behind one file of a stage."""

    COMMITTED = "committed"  # in a COMMIT manifest, and as large as it says
    PARTIAL = "partial"  # of an upload that was not finished, or not yet
    DAMAGED = "damaged"  # another size than was committed
    MISSING = "missing"  # committed, and gone
    RECORD = "record"  # log, metrics, events, orders: written as the stage goes on


@dataclass(frozen=True)
class Artifact:
    """One file. `folder`: the committed folder it belongs to, as a key; the stage itself for its result."""

    stage: str
    file: str  # below the stage
    size: int
    kept: Kept
    folder: str | None = None
    sha256: str | None = None

    @property
    def key(self) -> str:
        return f"{self.stage}/{self.file}"


def look(bucket: Bucket, stages: Sequence[str]) -> list[Artifact]:
    """Every file of these stages, in order. Raises BucketError."""
    found = []
    for stage in stages:
        stats = list(bucket.list(f"{stage}/"))
        folders = [stat.key.removesuffix(f"/{COMMIT_FILE}") for stat in stats if stat.key.endswith(f"/{COMMIT_FILE}")]
        manifests = {}
        for folder in folders:
            try:
                manifest = read_commit(bucket, folder)
            except Corrupt:  # nothing in it can be trusted: its files show as partial
                continue
            if manifest is not None:
                manifests[folder] = manifest
        found += judge(stage, stats, manifests)
    return found


def judge(stage: str, stats: Sequence[Stat], manifests: Mapping[str, Manifest]) -> list[Artifact]:
    """The files of a stage with what stands behind each; a file in two manifests belongs to the outer one."""
    sizes = {stat.key: stat.size for stat in stats if not stat.key.endswith(f"/{COMMIT_FILE}")}
    found: dict[str, Artifact] = {}
    for folder in sorted(manifests, key=len):
        for name, entry in manifests[folder].files.items():
            key = f"{folder}/{name}"
            if key in found or key.endswith(f"/{COMMIT_FILE}"):
                continue
            size = sizes.get(key)
            kept = Kept.MISSING if size is None else Kept.COMMITTED if size == entry.size else Kept.DAMAGED
            found[key] = Artifact(stage, key[len(stage) + 1 :], entry.size, kept, folder, entry.sha256)
    for key, size in sizes.items():
        if key not in found:
            file = key[len(stage) + 1 :]
            record = file in RECORDS or file.startswith("events/")
            found[key] = Artifact(stage, file, size, Kept.RECORD if record else Kept.PARTIAL)
    return [found[key] for key in sorted(found)]


def wanted(artifacts: Sequence[Artifact]) -> dict[str, int]:
    """Committed folders to fetch and their bytes: the result of a stage that is done, else all that it committed."""
    sizes: dict[str, int] = {}
    done = {a.stage for a in artifacts if a.folder == a.stage}
    for one in artifacts:
        if one.folder is not None and (one.folder == one.stage or one.stage not in done):
            sizes[one.folder] = sizes.get(one.folder, 0) + one.size
    return sizes


def fetch(
    bucket: Bucket, artifacts: Sequence[Artifact], dest: Path, *, moved: Callable[[int], None] = lambda size: None
) -> int:
    """Brings what is `wanted` to `dest`/<stage>/..., each file checked against its SHA-256. Returns the files there.

    What is there already is not fetched again. Raises Corrupt for bytes or names that cannot be trusted.
    """
    folders = wanted(artifacts)
    if not folders:
        raise UsageError(
            "nothing of this is committed yet", hint="look at `kdcloud artifacts`; a stage commits when it ends"
        )
    count = 0
    for folder in folders:
        target = dest / folder
        if not target.resolve().is_relative_to(dest.resolve()):
            raise Corrupt(f"{target} leads out of {dest}", hint="remove the link, or name another folder")
        fetch_folder(bucket, folder, target, moved=moved)
        count += sum(1 for a in artifacts if a.folder == folder)
    return count


def stage_names(run: Run) -> list[str]:
    return [stage.name for stage in plan_of(run).stages]


def chosen_stages(run: Run, stage: str | None) -> list[str]:
    """All stages, or the one named. Raises UsageError."""
    names = stage_names(run)
    if stage is not None and stage not in names:
        raise UsageError(f"run {run.id} has no stage {stage!r}", hint=f"its stages: {', '.join(names)}")
    return [stage] if stage else names


def artifacts_to_json(run: Run, artifacts: Sequence[Artifact]) -> dict[str, Any]:
    """The document of `kdcloud artifacts --json`."""
    return {
        "schema": SCHEMA,
        "run": run.id,
        "bucket": run.bucket,
        "bytes": sum(a.size for a in artifacts if a.kept is not Kept.MISSING),
        "artifacts": [
            {
                "stage": a.stage,
                "file": a.file,
                "key": a.key,
                "bytes": a.size,
                "state": str(a.kept),
                "committed": a.kept is Kept.COMMITTED,
                "sha256": a.sha256,
            }
            for a in artifacts
        ],
    }


def render_artifacts(run: Run, artifacts: Sequence[Artifact], console: Console) -> None:
    """A table for a terminal; names come from the bucket and are shown as plain text."""
    from rich.table import Table
    from rich.text import Text

    colours = {Kept.COMMITTED: "green", Kept.RECORD: "dim"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (("stage", "left"), ("file", "left"), ("size", "right"), ("", "left")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    last = None
    for one in artifacts:
        stage = one.stage if one.stage != last else ""
        last = one.stage
        state = Text(str(one.kept), colours.get(one.kept, "yellow"))
        table.add_row(Text(stage), Text(_printable(one.file)), Text(human_bytes(one.size)), state)
    console.print(table if artifacts else Text("nothing yet"))
    total = sum(a.size for a in artifacts if a.kept is not Kept.MISSING)
    if artifacts:
        console.print(Text("committed: whole and checked by size and hash; record: what a stage told meanwhile", "dim"))
    console.print(Text(f"{human_bytes(total)} in {run.bucket}"), soft_wrap=True)


def human_bytes(size: int) -> str:
    """`812 B`, `3.4 MB`, `12 GB`: powers of ten, as stores bill them."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 9.95 else f"{value:.1f} {unit}"


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


@contextmanager
def bytes_bar(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Shows how much has come: a bar on a terminal, else a line every few seconds. Talk, so: stderr."""
    if sys.stderr.isatty() and os.environ.get("TERM") not in (None, "dumb"):
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda size: progress.advance(task, size)
        return
    done, last = 0, time.monotonic()

    def moved(size: int) -> None:
        nonlocal done, last
        done += size
        if time.monotonic() - last >= PLAIN_EVERY_S:
            last = time.monotonic()
            print(f"{what}: {human_bytes(done)} of {human_bytes(total)}", file=sys.stderr, flush=True)

    yield moved


# -- what may go -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Doomed:
    """Objects of a run that may be deleted; `kept_why` says why none may, "" otherwise."""

    run: str
    keys: tuple[str, ...] = ()
    size: int = 0
    ended_at: datetime | None = None
    kept_why: str = ""
    micros_per_month: int | None = None  # None: not known


class What(StrEnum):
    """How much of a run goes. Each holds the one before."""

    CHECKPOINTS = "checkpoints"  # and partial uploads
    LABELS = "labels"
    EVERYTHING = "everything"  # results, code and data too: all but the ledger


def kept_why(run: Run, *, now: datetime, older_than: timedelta, named: bool, driven: bool) -> str:
    """Why nothing of this run may be deleted; "" when it may. Pure."""
    if driven:
        return "a living client drives it"
    if any(m.state is not State.GONE for m in run.machines):
        return "one of its machines may still be there"
    if state_of(run) != "done" and not named:
        return f"it is not done ({state_of(run)}) and could go on; name it to delete what it has"
    if now - run.entries[-1].at < older_than:
        return f"it ended less than {older_than.total_seconds() / 86_400:g} d ago (--older-than)"
    return ""


def doomed(stats: Sequence[Stat], artifacts: Sequence[Artifact], kinds: Mapping[str, str], what: What) -> list[Stat]:
    """The objects that go. `kinds`: stage -> kind. Ledger and lease stay whatever is asked; pure."""
    partial = {a.key for a in artifacts if a.kept is Kept.PARTIAL}
    return [stat for stat in stats if _goes(stat.key, partial, kinds, what)]


def _goes(key: str, partial: set[str], kinds: Mapping[str, str], what: What) -> bool:
    top, _, rest = key.partition("/")
    if top == LEDGER_FOLDER or key == LEASE_KEY:
        return False
    if what is What.EVERYTHING:
        return True
    if rest.startswith(f"{CHECKPOINTS}/") or key in partial:
        return True
    return what is What.LABELS and kinds.get(top) == "label" and rest not in RECORDS


def prunable(ledger: Ledger, run_id: str, *, clock: Clock, older_than: timedelta, named: bool, what: What) -> Doomed:
    """What of a run may go now, with its size and what a month of it costs. Deletes nothing. Raises BucketError."""
    run = ledger.run(run_id)
    bucket = open_bucket(run.bucket)
    why = kept_why(run, now=clock.mark().wall, older_than=older_than, named=named, driven=is_driven(bucket, clock))
    if why:
        return Doomed(run_id, ended_at=run.entries[-1].at, kept_why=why)
    stages = plan_of(run).stages
    stats = list(bucket.list())
    going = doomed(stats, look(bucket, [s.name for s in stages]), {s.name: s.kind for s in stages}, what)
    size = sum(stat.size for stat in going)
    return Doomed(
        run_id, tuple(stat.key for stat in going), size, run.entries[-1].at,
        micros_per_month=month_micros(run.bucket, size),
    )  # fmt: skip


def month_micros(url: str, size: int) -> int | None:
    """About what a month of these bytes costs, micro-USD: 0 in a folder of one's own, None where it is not known."""
    if url.startswith("file:"):
        return 0
    other = [name for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3") if os.environ.get(name)]
    return None if other or not url.startswith("s3:") else size * S3_MICROS_PER_GB_MONTH // 10**9


def prune(ledger: Ledger, one: Doomed, *, clock: Clock, what: What) -> None:
    """Deletes it, holding the run's lease meanwhile. Raises NotOwner when somebody took the run up, BucketError.

    COMMIT files go first, so that half a folder never counts; broken off, the same command goes on.
    """
    run = ledger.run(one.run)
    bucket = open_bucket(run.bucket)
    lease = Lease.acquire(bucket, str(run.data["owner"]), clock)
    try:
        if any(m.state is not State.GONE for m in ledger.run(one.run).machines):
            raise UsageError(f"a machine of {one.run} may still be there", hint=f"end it with `kdcloud down {one.run}`")
        for key in sorted(one.keys, key=lambda key: not key.endswith(f"/{COMMIT_FILE}")):
            lease.renew_if_due()
            bucket.delete(key)
    finally:
        lease.release()
    ledger.note(
        one.run, "pruned", clock.mark().wall, data={"what": str(what), "bytes": one.size, "objects": len(one.keys)}
    )


def prunable_runs(
    ledger: Ledger, runs: Sequence[str], *, clock: Clock, older_than: timedelta, named: bool, what: What
) -> list[Doomed]:
    """One for every run; a bucket that does not answer is a reason to keep."""
    found = []
    for run_id in runs:
        try:
            found.append(prunable(ledger, run_id, clock=clock, older_than=older_than, named=named, what=what))
        except (BucketError, UsageError) as error:
            found.append(Doomed(run_id, kept_why=error.message))
    return found


def prunable_to_json(found: Sequence[Doomed], what: What, *, deleted: bool) -> dict[str, Any]:
    """The document of `kdcloud artifacts --prune --json`."""
    costs = [one.micros_per_month for one in found if one.keys]
    return {
        "schema": SCHEMA,
        "what": str(what),
        "deleted": deleted,
        "bytes": sum(one.size for one in found),
        "micros_per_month": None if None in costs else sum(cost or 0 for cost in costs),
        "runs": [
            {
                "run": one.run,
                "bytes": one.size,
                "objects": len(one.keys),
                "ended_at": one.ended_at and one.ended_at.isoformat(),
                "kept_why": one.kept_why,
                "micros_per_month": one.micros_per_month,
            }
            for one in found
        ],
    }


def render_prunable(found: Sequence[Doomed], what: What, config: Config, console: Console, *, deleted: bool) -> None:
    """What goes and why the rest stays, one line a run."""
    from rich.text import Text

    for one in found:
        if one.kept_why:
            text = f"keep    {one.run}  {one.kept_why}"
        elif not one.keys:
            text = f"keep    {one.run}  it has no {what} left"
        else:
            text = f"{'deleted' if deleted else 'delete '} {one.run}  {human_bytes(one.size)}, {len(one.keys)} objects"
        console.print(Text(text), soft_wrap=True)
    going = [one for one in found if one.keys]
    if not going:
        console.print(Text("nothing to delete"))
        return
    total, costs = sum(one.size for one in going), [one.micros_per_month for one in going]
    if None in costs:
        cost = "what a month of it costs: not found"
    elif not any(costs):
        cost = "it lies on your own disk"
    else:
        cost = f"a month of it costs about {both(sum(c or 0 for c in costs), config.rate, config.currency)}"
    console.print(Text(f"{human_bytes(total)} {'deleted' if deleted else 'can go'}; {cost}"), soft_wrap=True)
    if not deleted:
        console.print(Text("add --yes to delete it; the ledger stays in any case"), soft_wrap=True)
