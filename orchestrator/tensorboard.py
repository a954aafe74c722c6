"""Shows the curves of a run in TensorBoard while they grow: brings the events from the bucket into a folder, serves it.

A bucket replaces a file that has grown, and TensorBoard goes on reading the one it opened: so also a folder is copied,
and what is new is appended.
"""

from __future__ import annotations

import importlib.util
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.clock import SystemClock
from orchestrator.config import Home
from orchestrator.errors import UsageError
from orchestrator.ledger import Ledger
from orchestrator.mirror import Follower
from orchestrator.session import plan_of
from orchestrator.signals import heard_by
from orchestrator.watching import outcome_of
from tasks.bucket import Bucket, BucketError, Stat, open_bucket
from tasks.contract import install_hint

EVENTS = "events"  # folder of a stage in the bucket
LOOK_S = 5.0
START_LIMIT_S = 90.0
USUAL_PORT = 6006
HOST = "127.0.0.1"


def check_installed() -> None:
    """Raises UsageError."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError(
            "TensorBoard is not installed here",
            hint=install_hint("", "tensorboard"),
        )


def show(run_id: str, *, ledger: Ledger, home: Home, port: int | None, say: Callable[[str], None]) -> None:
    """Serves the run's curves until Ctrl-C. Raises UsageError, BucketError."""
    run = ledger.run(run_id)
    bucket, clock = open_bucket(run.bucket), SystemClock()
    news = Follower(ledger, bucket, run_id, clock)

    def ended() -> bool:
        news.look()
        return outcome_of(ledger.run(run_id)) is not None

    stages = [stage.name for stage in plan_of(run).stages]
    try:
        with heard_by(lambda: sys.exit(143), [signal.SIGTERM]):  # so that the server ends as well
            status = serve(bucket, stages, home.runs / run_id / "tensorboard", port=port, say=say, ended=ended)
    except KeyboardInterrupt:
        say("\nTensorBoard has ended")
        return
    raise UsageError(f"TensorBoard ended by itself, with status {status}", hint="start it again")


class Copy:
    """A run's events in a folder of its own, by stage; `look` brings what is new."""

    def __init__(self, bucket: Bucket, stages: Sequence[str], folder: Path) -> None:
        self._bucket, self._stages, self._folder = bucket, stages, folder
        self._seen: dict[str, str] = {}  # ETag by key

    def look(self) -> int:
        """How many files have changed. Raises BucketError."""
        changed = 0
        for stage in self._stages:
            for stat in self._bucket.list(f"{stage}/{EVENTS}/"):
                if self._seen.get(stat.key) != stat.etag:
                    self._take(stage, stat)
                    changed += 1
        return changed

    def _take(self, stage: str, stat: Stat) -> None:
        data, now = self._bucket.get(stat.key)
        path = self._folder / stage / Path(stat.key).name
        path.parent.mkdir(parents=True, exist_ok=True)
        append(path, data)
        self._seen[stat.key] = now.etag


def append(path: Path, data: bytes) -> None:
    """Makes the file hold `data`: adds what is missing, and begins anew only where it holds something else."""
    before = path.read_bytes() if path.exists() else b""
    if data.startswith(before):
        with path.open("ab") as file:
            file.write(data[len(before) :])
    elif not before.startswith(data):
        path.write_bytes(data)


def free_port(wanted: int | None) -> int:
    """A port of this machine on which nobody listens: the wanted one, else the usual one, else any.

    Raises UsageError when the wanted one is taken.
    """
    for port in (wanted,) if wanted else (USUAL_PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise UsageError(f"port {wanted} is taken or not allowed", hint="leave --port out: a free one is taken")


def serve(
    bucket: Bucket, stages: Sequence[str], folder: Path, *, port: int | None, say: Callable[[str], None],
    ended: Callable[[], bool], argv: Callable[[Path, int], list[str]] | None = None,
) -> int:  # fmt: skip
    """Serves until Ctrl-C, or until the server ends; returns its exit status. Raises UsageError, BucketError.

    `ended`: whether the run has ended; then the bucket is not asked any more, and the curves stay.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    copy, chosen = Copy(bucket, stages, folder), free_port(port)
    if copy.look() == 0:
        say("there are no events yet: they appear when a stage that trains has begun")
    log = folder.with_suffix(".log")
    with log.open("wb") as out:
        server = subprocess.Popen(
            (argv or server_argv)(folder, chosen), stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )  # in this session: it ends with its terminal, too
    try:
        _wait_until_up(server, chosen, log)
        say(f"TensorBoard: http://{HOST}:{chosen}/    Ctrl-C ends it; the run goes on as it does")
        return _copy_on(copy, server, say, ended)
    finally:
        _end(server)
        shutil.rmtree(folder, ignore_errors=True)


def server_argv(folder: Path, port: int) -> list[str]:
    words = ["--logdir", str(folder), "--host", HOST, "--port", str(port), "--reload_interval", "5"]
    return [sys.executable, "-m", "tensorboard.main", *words, "--reload_multifile", "true"]


def _copy_on(copy: Copy, server: subprocess.Popen[bytes], say: Callable[[str], None], ended: Callable[[], bool]) -> int:
    trouble, over = "", False
    while server.poll() is None:
        time.sleep(LOOK_S)
        if over:
            continue
        over = ended()  # asked first: what was uploaded last is still brought
        try:
            copy.look()
            trouble = ""
        except BucketError as error:
            if error.message != trouble:
                say(f"! {error.message}")
            trouble, over = error.message, False
        if over:
            say("the run has ended; its curves stay until Ctrl-C")
    return server.returncode


def _wait_until_up(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + START_LIMIT_S
    while time.monotonic() < until and server.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex((HOST, port)) == 0:
                return
        time.sleep(0.2)
    last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
    raise UsageError(
        f"TensorBoard did not start{': ' + last[0] if last else ''}",
        hint=f"what it said is in {log}; try another --port",
    )


def _end(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(timeout=5)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
