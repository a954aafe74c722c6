"""Which infras has SkyPilot enabled? Asked by a process of its own: loading it takes seconds, and it may hang."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

MARK = "kdcloud: "  # before the one line of the answer: SkyPilot prints what it likes
WANTED = "0.14."
OWN_PORT = 46580
HEALTH_S = 2.0


@dataclass(frozen=True)
class SkyAnswer:
    """`enabled` None: it did not say, and `trouble` says why. `late`: no answer in time."""

    enabled: tuple[str, ...] | None
    trouble: str = ""
    hint: str = ""
    late: bool = False


def sky_version() -> str | None:
    """The version that is installed, without loading it; None where there is none."""
    try:
        return version("skypilot")
    except PackageNotFoundError:
        return None


def enabled(home: Path, limit_s: float) -> SkyAnswer:
    """What SkyPilot's API server says; one that does not run is not started. Given up after `limit_s`."""
    if not server_runs(server_url()):
        return SkyAnswer(None, "its API server does not run", "sky api start")
    command = [sys.executable, "-m", "orchestrator.sky_ask", str(home)]
    root = str(Path(__file__).resolve().parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        _end(process)
        hint = "ask again, or see for yourself: sky check"
        return SkyAnswer(None, f"did not answer within {limit_s:.0f} s", hint, late=True)
    return read_answer(said)


def server_url(env: Mapping[str, str] | None = None, config: Path | None = None) -> str:
    """Where SkyPilot's API server is: its variable, its configuration, else this computer (sky/server/common.py)."""
    import yaml

    env = os.environ if env is None else env
    named = env.get("SKYPILOT_API_SERVER_ENDPOINT")
    if named:
        return named

    try:
        raw = yaml.safe_load((config or Path.home() / ".sky" / "config.yaml").read_text(encoding="utf-8"))
        return str(raw["api_server"]["endpoint"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return f"http://127.0.0.1:{env.get('SKYPILOT_API_SERVER_LOCAL_PORT') or OWN_PORT}"


def server_runs(url: str) -> bool:
    """Whether anything answers there, a refusal included; nothing is started."""
    try:
        parts = urlsplit(url)
        bare = urlunsplit(
            parts._replace(netloc=parts.netloc.rpartition("@")[2], path=f"{parts.path.rstrip('/')}/api/health")
        )
        with urllib.request.urlopen(bare, timeout=HEALTH_S):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError, http.client.HTTPException):
        return False


def read_answer(said: str) -> SkyAnswer:
    lines = [line.removeprefix(MARK) for line in said.splitlines() if line.startswith(MARK)]
    if not lines:
        return SkyAnswer(None, "ended without an answer", "sky check")
    raw = json.loads(lines[-1])
    names = raw.get("enabled")
    return SkyAnswer(None if names is None else tuple(map(str, names)), raw.get("trouble", ""), raw.get("hint", ""))


def _end(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def main(home: str) -> None:
    """Prints the answer as one marked line of JSON."""
    from orchestrator.provision import ProvisionError
    from orchestrator.provision_sky import SkyApi

    try:
        answer = {"enabled": SkyApi(Path(home) / "sky").enabled()}
    except ProvisionError as error:
        print(MARK + json.dumps({"trouble": error.message, "hint": error.hint}))
        return
    print(MARK + json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1])
