"""Does everything around the work hold? Counted steps with checkpoints and no model, for little money."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from tasks.contract import RehearseSettings, TaskError
from tasks.stage import Context, Stopped

SLICE_S = 0.1  # a stop is seen at least this often
STATE_FILE = "state.json"
PAYLOAD_FILE = "payload.bin"


def run(ctx: Context, settings: RehearseSettings) -> dict[str, Any]:
    """`steps` and `digest`, a hash chained over every step in order: it tells a repeated or a skipped step.

    Both are the same however often the stage was broken off and resumed.
    """
    if settings.steps < 1 or settings.checkpoint_every_steps < 1:
        raise TaskError("a rehearsal needs at least one step and a checkpoint every one step or more")
    step, digest = _resume(ctx)
    ctx.progress("rehearse", step, settings.steps)
    while step < settings.steps:
        if ctx.stopping or not _work(ctx, settings.seconds_per_step):
            _save(ctx, step, digest, settings.payload_bytes)
            raise Stopped
        step += 1
        digest = hashlib.sha256(f"{digest} {step}".encode()).hexdigest()
        ctx.metric(step, rehearse__step=step)
        ctx.progress("rehearse", step, settings.steps)
        if step % settings.checkpoint_every_steps == 0 and step < settings.steps:
            _save(ctx, step, digest, settings.payload_bytes)
    (ctx.out / PAYLOAD_FILE).write_bytes(payload(digest, settings.payload_bytes))
    return {"steps": step, "digest": digest}


def payload(digest: str, size: int) -> bytes:
    """`size` bytes that follow from the digest."""
    return hashlib.shake_256(digest.encode()).digest(size)


def _resume(ctx: Context) -> tuple[int, str]:
    found = ctx.latest_checkpoint()
    if found is None:
        return 0, ""
    step, folder = found
    state = json.loads((folder / STATE_FILE).read_text())
    if state["step"] != step:
        raise TaskError(f"checkpoint step-{step} holds step {state['step']}", hint="delete it in the bucket and resume")
    print(f"resumed at step {step}")
    return step, str(state["digest"])


def _work(ctx: Context, seconds: float) -> bool:
    """Sleeps; False when a stop came first, so that half a step never counts."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, SLICE_S))
        if ctx.stopping:
            return False
    return True


def _save(ctx: Context, step: int, digest: str, payload_bytes: int) -> None:
    if step == 0:
        return

    def write(folder: Path) -> None:
        (folder / STATE_FILE).write_text(json.dumps({"step": step, "digest": digest}))
        (folder / PAYLOAD_FILE).write_bytes(payload(digest, payload_bytes))

    ctx.checkpoint(step, write)
