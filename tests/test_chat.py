"""Talking to a model in a box: a small server that asks for its key, and Open WebUI before it, by a stand-in here."""

from __future__ import annotations

import json
import os
import re
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.handover import code_wheel
from orchestrator.locks import requirements
from tasks import bootstrap, chat
from tasks.box_servers import Box, answers, people_env
from tasks.chat import model_place, vllm_argv, webui_env
from tasks.chat_server import question_of, serve
from tasks.contract import ModelSource, TaskError
from tests.test_box import context


def echo(messages: list[dict[str, str]], *, max_tokens: int, temperature: float, top_p: float) -> Iterator[str]:
    yield "you said "
    yield f"{messages[-1]['content']} ({max_tokens}, {temperature:g}, {top_p:g})"


@pytest.fixture
def server() -> Iterator[str]:
    with serve(echo, port=0, key="the-key", name="student") as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        assert one.server_address[0] == "127.0.0.1"
        yield f"http://127.0.0.1:{one.server_address[1]}"
        one.shutdown()


def ask(url: str, body: Any = None, key: str = "the-key") -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


QUESTION = {"model": "student", "messages": [{"role": "user", "content": "2+2"}], "max_tokens": 5, "temperature": 0}


def test_it_answers_at_once_or_piece_by_piece_as_openais_does(server: str) -> None:
    status, text = ask(f"{server}/v1/chat/completions", QUESTION)
    assert status == 200
    assert json.loads(text)["choices"][0]["message"] == {"role": "assistant", "content": "you said 2+2 (5, 0, 1)"}
    status, text = ask(f"{server}/v1/chat/completions", {**QUESTION, "stream": True})
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "you said 2+2 (5, 0, 1)"
    assert choices[-1]["finish_reason"] == "stop"
    assert json.loads(ask(f"{server}/v1/models")[1])["data"][0]["id"] == "student"


def test_whoever_does_not_know_the_key_learns_and_costs_nothing(server: str) -> None:
    for key in ("", "the-kex", "the-key-and-more"):
        assert ask(f"{server}/v1/models", key=key)[0] == 401
        assert ask(f"{server}/v1/chat/completions", QUESTION, key=key)[0] == 401


@pytest.mark.parametrize(
    "body", [{}, {"messages": []}, {"messages": [{"role": "user"}]}, {**QUESTION, "max_tokens": "x"}]
)
def test_what_is_no_question_is_refused(server: str, body: Any) -> None:
    assert ask(f"{server}/v1/chat/completions", body)[0] == 400
    assert ask(f"{server}/v1/other", body)[0] == 404


def test_a_message_in_parts_is_its_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}, {"type": "text", "text": "b"}]
    assert question_of({"messages": [{"role": "user", "content": parts}]}).how["messages"][0]["content"] == "ab"


def test_a_student_of_this_project_answers(tmp_path: Path) -> None:
    from tasks import models
    from tasks.chat_server import Student
    from tasks.contract import Architecture

    tokenizer = models.tiny_tokenizer()
    model = models.from_architecture(Architecture(hidden_size=16, intermediate_size=32), tokenizer, seed=0)
    models.save(tmp_path / "model", model, tokenizer)
    student = Student(str(tmp_path / "model"), trust_remote_code=False)
    asked = question_of(QUESTION).how
    first, again = ("".join(student(**asked)) for _ in range(2))
    assert first == again  # greedy
    assert isinstance("".join(student(**{**asked, "temperature": 1.0})), str)


def test_vllm_is_told_no_secret_in_its_arguments_and_leaves_memory_to_notebooks() -> None:
    argv = vllm_argv("/m", 40001, trust_remote_code=False)
    assert argv[1:3] == ["serve", "/m"] and argv[argv.index("--host") + 1] == "127.0.0.1"
    assert float(argv[argv.index("--gpu-memory-utilization") + 1]) < 0.5
    assert "--api-key" not in argv and "--trust-remote-code" not in argv
    assert "--trust-remote-code" in vllm_argv("/m", 40001, trust_remote_code=True)


def test_open_webui_has_one_account_and_asks_nobody_outside(tmp_path: Path) -> None:
    env = webui_env(tmp_path, 40001, "key", "pass")
    assert (env["WEBUI_ADMIN_PASSWORD"], env["ENABLE_SIGNUP"], env["OFFLINE_MODE"]) == ("pass", "False", "True")
    assert env["OPENAI_API_BASE_URL"] == "http://127.0.0.1:40001/v1" and env["OPENAI_API_KEY"] == "key"
    assert webui_env(tmp_path, 1, "k", "p")["WEBUI_SECRET_KEY"] != env["WEBUI_SECRET_KEY"]


def test_a_whole_model_is_served_as_it_is_and_a_hub_id_by_its_name(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    assert model_place(ctx, ModelSource(path="Qwen/Qwen2.5-1.5B"), tmp_path / "x") == "Qwen/Qwen2.5-1.5B"
    for stage, name in (("export", "hf"), ("train", "model")):
        folder = tmp_path / "made" / stage
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
        from tasks.bucket import commit_folder

        commit_folder(ctx._bucket, folder, stage, fence=0)
        assert model_place(ctx, ModelSource(stage=stage), tmp_path / "x").endswith(f"/inputs/{stage}/{name}")


WEBUI = """
    #!{python}
    import http.server, json, os, pathlib, sys
    pathlib.Path(os.environ["DATA_DIR"], "seen.json").write_text(json.dumps([sys.argv[1:], dict(os.environ)]))
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def test_model_and_open_webui_are_started_with_a_key_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    program = tmp_path / "bin" / "open-webui"
    program.parent.mkdir()
    program.write_text(textwrap.dedent(WEBUI).strip().format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(chat, "has_cuda", lambda: False)
    ctx, box = context(tmp_path), Box.make(tmp_path / "box")
    env = people_env(os.environ, ctx.work, box) | {"PYTHONPATH": str(Path(chat.__file__).parents[1])}
    found = chat.servers(ctx, ModelSource(path="nobody/nothing"), box, env)
    try:
        assert set(found) == {"model", "chat"} and found["model"].door is None and found["model"].counts
        door = found["chat"].door
        assert door is not None and door["login"][0] == chat.USER and len(door["login"][1]) >= 40
        until = time.monotonic() + 30
        while not answers(door["port"], "/health") and time.monotonic() < until:
            time.sleep(0.1)
        argv, seen = json.loads((box.root / "open-webui" / "seen.json").read_text())
        assert argv[:3] == ["serve", "--host", "127.0.0.1"] and door["login"][1] not in argv
        assert seen["WEBUI_ADMIN_PASSWORD"] == door["login"][1] and "PYTHONPATH" not in seen
        orders = json.loads((box.root / "model.json").read_text())
        assert orders["key"] == seen["OPENAI_API_KEY"] and len(orders["key"]) >= 40
        assert seen["OPENAI_API_BASE_URL"] == f"http://127.0.0.1:{orders['port']}/v1"
    finally:
        for one in found.values():
            one.process.kill()
            one.process.wait()


def test_open_webui_that_cannot_be_made_says_what_to_leave_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    def made_once(*_: object, **__: object) -> tuple[str, bool]:
        raise ValueError("environment open-webui could not be made: no network")

    monkeypatch.setattr(chat, "lock", lambda: "open-webui==1.0\n")
    monkeypatch.setattr(chat.bootstrap, "made_once", made_once)
    with pytest.raises(TaskError) as caught:
        chat.webui(context(tmp_path))
    assert "no network" in caught.value.message and "--chat" in caught.value.hint


(PIN,) = re.findall(r"^open-webui==[0-9.]+", requirements("chat").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (("linux", "x86_64"), ["sync", "LOCK", "--require-hashes", "--no-build"]),
        (("darwin", "arm64"), ["install", PIN]),
    ],
)
def test_open_webui_is_made_from_the_lock_that_came_with_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: tuple[str, str], words: list[str]
) -> None:
    data, _ = code_wheel()
    (tmp_path / "code.whl").write_bytes(data)
    monkeypatch.setattr(chat, "__file__", str(tmp_path / "code.whl" / "tasks" / "chat.py"))
    monkeypatch.setattr(chat.sys, "platform", machine[0])
    monkeypatch.setattr(chat.platform, "machine", lambda: machine[1])
    monkeypatch.setenv("KDCLOUD_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    called: list[list[str]] = []
    monkeypatch.setattr(bootstrap, "find_uv", lambda own, until_s: "uv")

    def make_venv(uv: str, folder: Path, until_s: float, newest: tuple[int, int]) -> None:
        folder.mkdir()
        called.append([*map(str, newest)])

    monkeypatch.setattr(bootstrap, "make_venv", make_venv)
    monkeypatch.setattr(bootstrap, "call", lambda command, until_s: called.append(command))
    place = Path(chat.webui(context(tmp_path / "run"))).parent
    assert place.parts[-2].startswith("chat-") and called[0] == ["3", "12"]  # it is not for 3.13
    listed = place.parent / "lock.txt"
    assert listed.read_bytes() == requirements("chat").read_bytes()
    told = [str(listed) if word == "LOCK" else word for word in words]
    assert called[1] == ["uv", "pip", *told, "--quiet", "--python", bootstrap.python_of(place.parent)]


def test_code_without_its_lock_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "__file__", str(tmp_path / "tasks" / "chat.py"))
    with pytest.raises(TaskError, match="lock is not with this code"):
        chat.lock()
