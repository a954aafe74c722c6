"""What does a box start to talk to a model? A server of the model on loopback, and Open WebUI before it.

Open WebUI is large and wants versions of its own: it gets an environment apart, made when it is first asked for. The
model is served by vLLM where there is one and a GPU for it, else by tasks.chat_server. Both ask for a key made here.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from tasks import bootstrap
from tasks.box_servers import HOST, TOKEN_BYTES, Box, Server, answers, free_port, start, write_private
from tasks.contract import ModelSource, TaskError
from tasks.stage import Context

ENVIRONMENT = "chat"  # of the locked ones
NEWEST = (3, 12)  # that Open WebUI is for
INSTALL_LIMIT_S = 1800.0
SLOW_START_S = 900.0  # weights are loaded, and Open WebUI first writes its tables
NOT_FOR_WEBUI = ("PYTHONPATH", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # it has versions of its own, and fetches nothing
CALLED = "student"  # the model's name in the browser
USER = "box@localhost.local"
VLLM_SHARE = "0.4"  # of the GPU's memory: notebooks need some as well


def servers(ctx: Context, source: ModelSource, box: Box, env: Mapping[str, str]) -> dict[str, Server]:
    """The model's server and Open WebUI. Raises TaskError when they cannot be had."""
    place = model_place(ctx, source, box.root / "chat-model")
    program = webui(ctx)
    key, port = secrets.token_urlsafe(TOKEN_BYTES), free_port()
    return {"model": model_server(place, source, port, key, box, env), "chat": chat(program, port, key, box, env)}


def model_place(ctx: Context, source: ModelSource, merged: Path) -> str:
    """A folder, or the name on the hub, of a whole model: an adapter is merged into its base first."""
    if source.path is not None:
        return source.path
    assert source.stage is not None
    folder = ctx.input(source.stage)
    for name in ("hf", "model"):
        if (folder / name / "config.json").is_file() and not (folder / name / "student.json").exists():
            return str(folder / name)
    from tasks import models

    ctx.progress("merge", declared=True)
    loaded = models.load_stage(folder, ctx, dtype=models.working_dtype(models.pick_device()))
    models.save(merged, loaded.model, loaded.tokenizer)
    return str(merged)


def webui(ctx: Context) -> str:
    """Open WebUI's program; made with uv when it is not there yet."""
    found = shutil.which("open-webui")
    if found:
        return found
    ctx.progress("make Open WebUI", declared=True)
    own, until_s = Path(os.environ.get("KDCLOUD_HOME") or Path.home() / ".kdcloud"), time.monotonic() + INSTALL_LIMIT_S
    text = lock()

    def install(folder: Path, uv: str) -> None:
        (folder / "lock.txt").write_text(text)
        bootstrap.call([uv, "pip", *wanted(text, folder), "--quiet", "--python", bootstrap.python_of(folder)], until_s)

    try:
        python, _ = bootstrap.made_once(own, ENVIRONMENT, text, install, until_s, newest=NEWEST)
    except ValueError as error:
        raise TaskError(f"Open WebUI cannot be had: {error}", hint="leave --chat out, or see log.txt") from error
    return str(Path(python).parent / "open-webui")


def lock() -> str:
    """The locked environment that came with this code. Raises TaskError."""
    text = bootstrap.locks_in(Path(__file__).parents[1]).get(ENVIRONMENT)
    if text is None:
        raise TaskError("Open WebUI cannot be had: its lock is not with this code", hint="leave --chat out")
    return text


def wanted(text: str, folder: Path) -> list[str]:
    """What uv is to install: the lock by its hashes, which are of Linux on x86-64; elsewhere the same version."""
    if (sys.platform, platform.machine()) == ("linux", "x86_64"):
        return ["sync", str(folder / "lock.txt"), "--require-hashes", "--no-build"]
    return ["install", *re.findall(r"^open-webui==[0-9.]+", text, re.MULTILINE)]


def model_server(place: str, source: ModelSource, port: int, key: str, box: Box, env: Mapping[str, str]) -> Server:
    if find_spec("vllm") is not None and has_cuda():
        argv = vllm_argv(place, port, trust_remote_code=source.trust_remote_code)
        process = start(argv, box, "model", {**env, "VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1"})
    else:
        orders = box.root / "model.json"
        told = {"place": place, "port": port, "key": key, "name": CALLED, "trust_remote_code": source.trust_remote_code}
        write_private(orders, json.dumps(told))
        process = start([sys.executable, "-m", "tasks.chat_server", str(orders)], box, "model", env)
    ready = lambda: answers(port, "/v1/models", f"Bearer {key}")  # noqa: E731
    return Server("the model's server", process, ready, counts=True, limit_s=SLOW_START_S)


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def vllm_argv(place: str, port: int, *, trust_remote_code: bool) -> list[str]:
    """Its key is in the environment: arguments can be seen by everybody on the machine."""
    program = str(Path(sys.executable).parent / "vllm")
    words = ["serve", place, "--host", HOST, "--port", str(port), "--served-model-name", CALLED]
    more = ["--trust-remote-code"] if trust_remote_code else []
    return [program, *words, "--gpu-memory-utilization", VLLM_SHARE, *more]


def chat(program: str, model_port: int, key: str, box: Box, env: Mapping[str, str]) -> Server:
    """Open WebUI with one account, whose password is made here; nobody else can make one."""
    port, password = free_port(), secrets.token_urlsafe(TOKEN_BYTES)
    own = webui_env(box.root / "open-webui", model_port, key, password)
    (box.root / "open-webui").mkdir(exist_ok=True)
    kept = {name: value for name, value in env.items() if name not in NOT_FOR_WEBUI}
    process = start([program, "serve", "--host", HOST, "--port", str(port)], box, "chat", {**kept, **own})
    door = {"port": port, "path": "/", "login": [USER, password]}
    return Server("Open WebUI", process, lambda: answers(port, "/health"), door, limit_s=SLOW_START_S)


def webui_env(folder: Path, model_port: int, key: str, password: str) -> dict[str, str]:
    """It asks nobody outside for anything."""
    return {
        "DATA_DIR": str(folder),
        "WEBUI_SECRET_KEY": secrets.token_urlsafe(TOKEN_BYTES),
        "WEBUI_ADMIN_EMAIL": USER,
        "WEBUI_ADMIN_PASSWORD": password,
        "WEBUI_ADMIN_NAME": "box",
        "ENABLE_SIGNUP": "False",
        "ENABLE_OLLAMA_API": "False",
        "ENABLE_OPENAI_API": "True",
        "OPENAI_API_BASE_URL": f"http://{HOST}:{model_port}/v1",
        "OPENAI_API_KEY": key,
        "DEFAULT_MODELS": CALLED,
        "OFFLINE_MODE": "True",
        "USE_SLIM_DOCKER": "True",  # it loads no model of its own: the lock has neither torch nor what needs it
        "HF_HUB_OFFLINE": "1",
        "ENABLE_VERSION_UPDATE_CHECK": "False",
        "ENABLE_TITLE_GENERATION": "False",  # each would be a question to the student
        "ENABLE_TAGS_GENERATION": "False",
        "ENABLE_FOLLOW_UP_GENERATION": "False",
        "ANONYMIZED_TELEMETRY": "False",
        "DO_NOT_TRACK": "true",
        "SCARF_NO_ANALYTICS": "true",
    }
