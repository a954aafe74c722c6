"""Does everything around the work hold? Counted steps with checkpoints and no model, for little money.

Where several processes do it together each step needs the word of all: it tries the way between GPUs and nodes, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from tasks.contract import RehearseSettings, TaskError
from tasks.peers import Peers, size_of
from tasks.stage import Context, Stopped

SLICE_S = 0.1  # a stop is seen at least this often
STATE_FILE = "state.json"
PAYLOAD_FILE = "payload.bin"


def run(ctx: Context, settings: RehearseSettings) -> dict[str, Any]:
    """`steps` and `digest`, a hash chained over every step in order: it tells a repeated or a skipped step.

    Both are the same however often the stage was broken off and resumed. `processes`: how many took part, if several.
    """
    if settings.steps < 1 or settings.checkpoint_every_steps < 1:
        raise TaskError("a rehearsal needs at least one step and a checkpoint every one step or more")
    processes = size_of(os.environ)
    peers = Peers() if processes > 1 else None
    try:
        step, digest = _steps(ctx, settings, peers)
        limited = {"limited": {"planned": settings.steps, "done": step}} if step < settings.steps else {}
    finally:
        if peers is not None:
            peers.all_go_on(False)
            peers.leave()
    (ctx.out / PAYLOAD_FILE).write_bytes(payload(digest, settings.payload_bytes))
    return {"steps": step, "digest": digest, **({"processes": processes} if peers else {}), **limited}


def follow(_ctx: Context, _settings: RehearseSettings) -> None:
    """What the other processes do: a step whenever the first does one."""
    peers = Peers()
    while peers.all_go_on(True):
        pass
    peers.leave()


def _steps(ctx: Context, settings: RehearseSettings, peers: Peers | None) -> tuple[int, str]:
    step, digest = _resume(ctx)
    ctx.progress("rehearse", step, settings.steps)
    while step < (total := _total(ctx, settings)):
        if ctx.stopping or not _work(ctx, settings.seconds_per_step):
            _save(ctx, step, digest, settings.payload_bytes)
            raise Stopped
        if peers is not None:
            peers.all_go_on(True)
        step += 1
        digest = hashlib.sha256(f"{digest} {step}".encode()).hexdigest()
        ctx.metric(step, rehearse__step=step)
        ctx.progress("rehearse", step, total)
        if step % settings.checkpoint_every_steps == 0 and step < settings.steps:
            _save(ctx, step, digest, settings.payload_bytes)
    return step, digest


def _total(ctx: Context, settings: RehearseSettings) -> int:
    return settings.steps if ctx.limit is None else min(settings.steps, int(ctx.limit))


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
