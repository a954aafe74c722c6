"""Does a teacher behind an API cost no more than it was given, whatever the server does, and are its labels its own?"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from ml_support import context, run_stage

from tasks import api_teacher, label, models
from tasks.api_teacher import Client, Purse, Spent
from tasks.contract import (
    API_SPENT_FILE,
    ApiTeacher,
    Architecture,
    DataSource,
    LabelSettings,
    ModelSource,
    Task,
    TaskError,
    Watch,
)
from tasks.labels import read_labels
from tasks.losses import distillation_loss
from tasks.stage import Stopped
from tests.whole_runs import make_home

KEY = "sk-very-secret"
Reply = tuple[int, dict[str, str], bytes] | str  # status, headers, body; or hang, drop, drip


def chat(content: str, **more: Any) -> Reply:
    """A whole answer; 10 tokens of prompt and 5 of answer unless told otherwise."""
    choice = {"message": {"content": content}, "finish_reason": "stop", **more.pop("choice", {})}
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    return 200, {}, json.dumps({"choices": [choice], "usage": usage, **more}).encode()


class Server:
    """Answers on this machine as it is told: `reply(body, call)`; keeps what it was asked."""

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any], int], Reply] = lambda body, call: chat("four")
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at: list[float] = []
        self.busy = self.most_busy = 0
        self.end = threading.Event()
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    call = len(server.asked)
                    server.asked.append(body)
                    server.headers.append(dict(self.headers))
                    server.at.append(time.monotonic())
                    server.busy += 1
                    server.most_busy = max(server.most_busy, server.busy)
                reply = server.reply(body, call)
                with lock:  # before the client can know: it may ask again at once
                    server.busy -= 1
                with suppress(OSError):  # the client may have gone
                    self.say(reply)

            def say(self, reply: Reply) -> None:
                if reply == "hang":
                    server.end.wait(20)
                if reply == "drip":
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    while not server.end.wait(0.05):
                        self.wfile.write(b" ")
                if isinstance(reply, str):
                    self.close_connection = True
                    return
                status, headers, body = reply
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.end.set()
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("TEST_API_KEY", f"{KEY}\n")
    monkeypatch.setattr(api_teacher.random, "uniform", lambda low, high: 0.01)  # back-offs of 10, 20, 40 ms
    made = Server()
    yield made
    made.close()


def api(server: Server, **changes: Any) -> ApiTeacher:
    values = {"base_url": server.url, "model": "big", "key_env": "TEST_API_KEY", "timeout_s": 5.0}
    prices = {"input_micros": 1_000_000, "output_micros": 2_000_000, "max_cost_micros": 1_000_000}  # 1 and 2 a token
    return ApiTeacher(**{**values, **prices, **changes})


def client(server: Server, purse: Purse | None = None, *, top: int = 0, **changes: Any) -> tuple[Client, Purse]:
    settings = api(server, **changes)
    purse = purse or Purse(settings.max_cost_micros, Spent(), lambda spent: None, step_micros=0)
    return Client(settings, purse, max_new_tokens=100, temperature=0.6, top_p=0.9, top=top), purse


def answers(made: Client, *prompts: str) -> list[str]:
    found = dict(made.answers(prompts, lambda: False))
    return [found[at].content for at in range(len(prompts))]


def test_a_question_is_asked_as_the_api_wants_it_and_what_it_counts_is_paid(server: Server) -> None:
    made, purse = client(server, top=64)
    assert answers(made, "2+2") == ["four"]
    assert server.asked == [
        {
            "model": "big", "messages": [{"role": "user", "content": "2+2"}], "max_tokens": 100, "temperature": 0.6,
            "top_p": 0.9, "logprobs": True, "top_logprobs": 20,
        }
    ]  # fmt: skip
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert purse.spent == Spent(micros=10 * 1 + 5 * 2, granted=459, calls=1, input_tokens=10, output_tokens=5)


@pytest.mark.parametrize(
    ("bad", "billed"),
    [
        ((429, {"Retry-After": "0"}, b"slow down"), False),
        ((503, {}, b""), False),
        ((500, {}, b"oops"), True),
        ((504, {}, b""), True),
        ("drop", True),
        ("hang", True),
        ("drip", True),
        ((200, {}, b"<html>"), True),
        ((200, {}, b'{"choices": []}'), True),
        ((200, {}, b'{"choices": [{"message": {"content": 7}}]}'), True),
    ],
)
def test_an_attempt_that_fails_is_tried_again_and_counts_as_paid_unless_it_was_refused(
    server: Server, bad: Reply, billed: bool
) -> None:
    server.reply = lambda body, call: bad if call < 2 else chat("four")
    made, purse = client(server, timeout_s=1.0)
    started = time.monotonic()
    assert answers(made, "2+2") == ["four"] and time.monotonic() - started < 10
    worst = (3 + 256) * 1 + 100 * 2
    assert (purse.spent.micros, purse.spent.calls) == (20 + 2 * worst * billed, 3)


def test_a_server_that_is_not_there_costs_nothing(server: Server) -> None:
    server.close()
    made, purse = client(server, attempts=2)
    with pytest.raises(TaskError, match="no answer in 2 attempts; the last: no connection"):
        answers(made, "2+2")
    assert purse.spent.micros == 0


def test_the_server_says_for_how_long_to_wait_in_seconds_or_as_a_date(server: Server) -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)
    assert api_teacher._retry_after_s("1.5") == 1.5
    assert 0.5 < (api_teacher._retry_after_s(soon) or 0) < 3.5
    assert [api_teacher._retry_after_s(text) for text in (None, "soon", "inf")] == [None] * 3

    def reply(body: dict[str, Any], call: int) -> Reply:
        time.sleep(0.2 * call)
        return (429, {"Retry-After": "1"}, b"") if call == 0 else chat("four")

    server.reply = reply
    made, _ = client(server, max_parallel=2)
    answers(made, "1", "2", "3")
    assert len(server.at) == 4 and min(server.at[2:]) - server.at[0] >= 0.9  # it means the third question as well


def test_requests_keep_to_the_rate_and_to_the_number_at_once(server: Server) -> None:
    made, _ = client(server, requests_per_minute=60 / 0.1, max_parallel=8)
    answers(made, *"12345")
    assert server.at[4] - server.at[0] >= 0.25  # 0.4, but for what the first one was late on its way

    def slow(body: dict[str, Any], call: int) -> Reply:
        time.sleep(0.05)
        return chat(body["messages"][0]["content"])

    server.reply = slow
    server.most_busy = 0
    made, _ = client(server, max_parallel=3)
    assert answers(made, *"123456789") == list("123456789")
    assert server.most_busy == 3


@pytest.mark.parametrize(
    ("status", "hint"), [(400, "top_k: 0"), (401, "check the key in TEST_API_KEY"), (402, "pay in"), (404, "base_url"),
                         (302, "api")]
)  # fmt: skip
def test_a_refusal_is_told_once_and_never_with_the_key(server: Server, status: int, hint: str) -> None:
    said = json.dumps({"error": {"message": f"no\x1b[31m with {KEY}"}}).encode()
    server.reply = lambda body, call: (status, {"Location": "http://127.0.0.1:9/"}, said)
    made, purse = client(server)
    with pytest.raises(TaskError, match=f"status {status}") as raised:
        answers(made, "2+2")
    assert hint in raised.value.hint and len(server.asked) == 1
    assert KEY not in str(raised.value) and "\x1b" not in raised.value.message
    assert ("no" in raised.value.message.partition(str(status))[2]) is (status != 401)
    assert purse.spent.micros == 0


def test_money_is_set_apart_before_a_request_and_the_one_that_could_pass_the_limit_is_not_sent(server: Server) -> None:
    """Worst case of a request: (1 + 256) * 1 + 100 * 2 = 457; each then costs 20."""
    made, purse = client(server, max_cost_micros=457 + 2 * 20, max_parallel=1)
    found = []
    with pytest.raises(TaskError, match="could pass the 497 that were set apart"):
        for at, _ in made.answers(list("12345"), lambda: False):
            found.append(at)
    assert found == [0, 1, 2] and len(server.asked) == 3  # 2 * 20 + 457 is the limit, 3 * 20 + 457 is over it
    assert purse.spent.micros == 60


def test_parallel_requests_never_hold_more_than_the_limit_together(server: Server) -> None:
    server.reply = lambda body, call: (time.sleep(0.1), chat("four"))[1]
    made, _ = client(server, max_cost_micros=3 * 457 + 10, max_parallel=8)
    with pytest.raises(TaskError, match="could pass"):
        list(made.answers(list("12345678"), lambda: False))
    assert server.most_busy == 3 and len(server.asked) == 3


def test_an_api_that_counts_more_than_it_may_is_left_at_once(server: Server) -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 5000}
    server.reply = lambda body, call: chat("four", usage=usage)
    made, purse = client(server, max_parallel=1)
    with pytest.raises(TaskError, match="counted 10 tokens of prompt and 5000 of answer"):
        answers(made, "1", "2")
    assert len(server.asked) == 1 and purse.spent.micros == 10 + 2 * 5000


def test_without_counts_an_answer_costs_the_worst_case(server: Server) -> None:
    server.reply = lambda body, call: chat("four", usage=None)
    made, purse = client(server)
    answers(made, "1")
    assert purse.spent.micros == 457


def test_what_could_not_be_written_down_is_not_spent() -> None:
    def fail(spent: Spent) -> None:
        raise OSError("the bucket is away")

    purse = Purse(1000, Spent(), fail, step_micros=300)
    for _ in range(2):  # the second one must not find granted what the first could not write
        with pytest.raises(OSError, match="away"):
            purse.take(100)


def test_what_a_killed_attempt_was_granted_counts_as_spent() -> None:
    saved: list[Spent] = []
    purse = Purse(1000, Spent(), lambda spent: saved.append(Spent(**spent.__dict__)), step_micros=300)
    purse.take(100)
    purse.settle(100, 20)
    purse.take(100)
    assert [spent.granted for spent in saved] == [400]  # written down once, before the first request
    after_kill = Purse(1000, saved[-1], lambda spent: None, step_micros=300)
    assert after_kill.spent.micros == 400
    purse.settle(100, 20)
    purse.close()
    assert Purse(1000, saved[-1], lambda spent: None, step_micros=300).spent.micros == 40
    with pytest.raises(TaskError, match="could pass the 1000"):
        after_kill.take(601)


def test_a_stop_waits_for_what_is_on_its_way_only(server: Server) -> None:
    server.reply = lambda body, call: (time.sleep(1.0), chat("four"))[1]
    made, _ = client(server, max_parallel=2)
    found, started = [], time.monotonic()
    with pytest.raises(Stopped):
        for at, _ in made.answers(list("123456"), lambda: len(server.asked) == 2):
            found.append(at)
    assert sorted(found) == [0, 1] and time.monotonic() - started < 5


@pytest.mark.parametrize(
    "url", ["http://api.example.com/v1", "https://me:pass@api.example.com", "ftp://x", "api.example.com", ""]
)
def test_an_address_that_would_show_the_key_is_refused(url: str) -> None:
    with pytest.raises(TaskError, match="cannot be used"):
        api_teacher.check_url(url)
    api_teacher.check_url("https://api.example.com/v1")


@pytest.mark.parametrize("value", [None, "", "two\nlines", "späce"])
def test_a_key_that_is_missing_or_cannot_be_sent_is_said_without_it(
    server: Server, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv("TEST_API_KEY")
    else:
        monkeypatch.setenv("TEST_API_KEY", value)
    with pytest.raises(TaskError, match="TEST_API_KEY holds no key") as raised:
        client(server)
    assert not value or value not in str(raised.value) + raised.value.hint
    client(server, key_env=None)


# --- a whole label stage ---------------------------------------------------------------------------------------------

TINY = Architecture(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run in which `pretrain` left a tokenizer."""
    tokenizer = models.tiny_tokenizer()
    folder = tmp_path / "pretrain" / "done" / models.MODEL_FOLDER
    models.save(folder, models.from_architecture(TINY, tokenizer, seed=0), tokenizer)
    return tmp_path


def settings(server: Server, **changes: Any) -> LabelSettings:
    api_changes = changes.pop("api", {})
    made = LabelSettings(
        teacher=ModelSource(stage="pretrain"), prompts=DataSource("builtin:addition/train"), verify="exact",
        samples=12, max_new_tokens=100, top_k=3, label_temperature=2.0, batch_size=4, shard_size=8, max_cut_share=1.0,
        api=api(server, **{"max_parallel": 2, **api_changes}),
    )  # fmt: skip
    return replace(made, **changes)


def right(body: dict[str, Any], call: int, **choice: Any) -> Reply:
    a, b = body["messages"][0]["content"].split("+")
    return chat(str(int(a) + int(b)), choice=choice)


def told(text: str, *others: tuple[str, float]) -> dict[str, Any]:
    """One token as an API gives it: first with probability 0.5, then `others`."""
    top = [{"token": text, "bytes": list(text.encode()), "logprob": math.log(0.5)}]
    top += [{"token": t, "bytes": None, "logprob": p} for t, p in others]
    return {**top[0], "top_logprobs": top}


def soft(body: dict[str, Any], call: int) -> Reply:
    a, b = body["messages"][0]["content"].split("+")
    rows = [told(c, ("x", math.log(0.25)), ("</think>", math.log(0.125))) for c in str(int(a) + int(b))]
    return right(body, call, logprobs={"content": rows})


def test_answers_become_hard_labels_of_the_tokenizer_beside_it_without_any_model(
    root: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load", None)
    server.reply = right
    result = run_stage(root, "label", "label", settings(server))
    assert result is not None and (result["generated"], result["kept"]) == (12, 12)
    assert result["thoughts"] == 12  # between the marks of the template, though they are empty
    assert result["api"] == {
        "calls": 12, "input_tokens": 120, "output_tokens": 60, "cost_micros": 240, "limit_micros": 1_000_000, "soft": 0,
    }  # fmt: skip
    labels = read_labels(root / "label" / "done")
    assert labels.header.top_k == 1 and labels.header.teacher == "api:big"  # so that no training refuses them
    assert all((labels.sample(i).topk_ids == -1).all() for i in range(len(labels)))
    assert result["mass_inside_mean"] is None and "hard" in result["note"]
    tokenizer = models.tiny_tokenizer()
    assert labels.header.ordinary_sha256 == models.vocabulary_hashes(tokenizer).ordinary
    for i in range(len(labels)):
        sample = labels.sample(i)
        a, b = tokenizer.decode(sample.prompt_ids).split("<|user|>")[1].split("<|assistant|>")[0].split("+")
        assert tokenizer.decode(sample.completion_ids) == f"\n</think>\n\n{int(a) + int(b)}<|end|>"
    everything = b"".join(path.read_bytes() for path in root.rglob("*") if path.is_file())
    assert len(everything) > 1000 and KEY.encode() not in everything


def test_log_probabilities_become_soft_labels_where_every_token_has_one_id(root: Path, server: Server) -> None:
    server.reply = lambda body, call: soft(body, call) if call % 2 else right(body, call)
    result = run_stage(root, "label", "label", settings(server, api={"max_parallel": 1}))
    assert result is not None and result["api"]["soft"] == 6
    labels = read_labels(root / "label" / "done")
    assert (labels.header.top_k, labels.header.temperature) == (3, 1.0)
    assert result["mass_inside_mean"] == pytest.approx(0.875, rel=1e-6)  # of the places that have any
    tokenizer = models.tiny_tokenizer()
    x, end_of_thought = (tokenizer.convert_tokens_to_ids(token) for token in ("x", "</think>"))
    found = [labels.sample(i) for i in range(12) if (labels.sample(i).topk_ids >= 0).any()]
    assert len(found) == 6
    for one in found:
        at = one.completion_ids.tolist().index(end_of_thought) + 3  # two line ends follow the thinking
        assert (one.topk_ids[:at] == -1).all() and (one.topk_ids[-1] == -1).all()  # thinking and end were not told
        assert one.topk_ids[at].tolist() == [one.completion_ids[at].item(), x, end_of_thought]
        assert one.topk_logprobs[at].float().exp().tolist() == pytest.approx([0.5, 0.25, 0.125], rel=1e-3)
        assert one.log_tail_mass[at].exp().item() == pytest.approx(0.125, rel=1e-5)
        assert one.log_tail_mass[0] == 0.0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_places_without_soft_labels_add_nothing_to_the_divergence(temperature: float) -> None:
    row = {"key": "a", "prompt_ids": [1], "completion_ids": [2, 3], "top": [[], [(3, math.log(0.5)), (4, -2.0)]]}
    sample = label._told(row, 2)
    hidden = torch.randn(2, 8, requires_grad=True)
    loss = distillation_loss(
        hidden, torch.randn(9, 8), sample.completion_ids, sample.topk_ids, sample.topk_logprobs, alpha=1.0,
        temperature=temperature, token_count=1, log_tail_mass=sample.log_tail_mass,
        log_mass_at_t=sample.log_mass_at_t if temperature == 1.0 else None,
    )  # fmt: skip
    loss.backward()
    assert loss.item() > 0 and hidden.grad is not None
    assert hidden.grad[0].abs().max() < 1e-6 < hidden.grad[1].abs().max()


@pytest.mark.parametrize("other", ["<|im_end|>", "ab", "1"])
def test_a_candidate_without_an_id_of_its_own_makes_the_answer_hard(root: Path, server: Server, other: str) -> None:
    """A special token nobody here knows, two bytes that are no token, and a token that is there already."""

    def reply(body: dict[str, Any], call: int) -> Reply:
        rows = [told("1", (other, -1.0)), told("2")]
        return chat("12", choice={"logprobs": {"content": rows}})

    server.reply = reply
    result = run_stage(root, "label", "label", settings(server, keep="all"))
    assert result is not None and (result["kept"], result["api"]["soft"]) == (12, 0)


def test_tokens_that_are_not_the_whole_answer_are_no_labels() -> None:
    rows = {"content": [told("1"), told("2")]}
    assert api_teacher._tokens(rows, "12") is not None
    assert api_teacher._tokens(rows, "123") is api_teacher._tokens(None, "") is None
    assert api_teacher._tokens({"content": [{**told("1"), "top_logprobs": []}]}, "1") is None


def test_thinking_told_apart_is_put_where_the_template_has_it_and_special_tokens_stay_text(
    root: Path, server: Server
) -> None:
    message = {"content": "so <|end|> 4", "reasoning_content": "2 and 2"}
    server.reply = lambda body, call: chat("", choice={"message": message})
    run_stage(root, "label", "label", settings(server, verify="none"))
    labels = read_labels(root / "label" / "done")
    tokenizer = models.tiny_tokenizer()
    ids = labels.sample(0).completion_ids.tolist()
    assert tokenizer.decode(ids) == "2 and 2\n</think>\n\nso <|end|> 4<|end|>"
    assert ids.count(tokenizer.eos_token_id) == 1


def test_finish_reasons_are_kept_and_cut_answers_are_no_labels(root: Path, server: Server) -> None:
    server.reply = lambda body, call: right(body, call, finish_reason=("stop", "length", "content_filter")[call % 3])
    result = run_stage(root, "label", "label", settings(server))
    assert result is not None and result["kept"] == 4 and result["dropped"] == {"cut": 4, "content_filter": 4}


def test_a_stage_that_was_refused_keeps_its_answers_and_a_resumed_one_asks_only_for_the_rest(
    root: Path, server: Server
) -> None:
    server.reply = lambda body, call: (400, {}, b"{}") if call == 6 else right(body, call)
    given = settings(server, api={"max_parallel": 1})
    with pytest.raises(TaskError, match="status 400"):
        run_stage(root, "label", "label", given)
    assert len(server.asked) == 7
    server.reply = right
    result = run_stage(root, "label", "label", given, attempt=2)
    assert result is not None and result["generated"] == 12
    assert len(server.asked) == 12 + 1  # all six answers were kept
    questions = [body["messages"][0]["content"] for body in server.asked]
    assert len(set(questions)) == 12
    assert result["api"]["cost_micros"] == 12 * 20 and result["api"]["calls"] == 13


def test_a_killed_stage_counts_what_it_may_have_spent_and_stops_before_the_limit(
    root: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.reply = right
    given = settings(server, api={"max_parallel": 1, "max_cost_micros": 2500})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Purse, "close", lambda self: None)  # as a kill would have it

        def die(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(label, "_judged", die)
        with pytest.raises(KeyboardInterrupt):
            run_stage(root, "label", "label", given)
    granted = json.loads((root / "label" / "stored" / API_SPENT_FILE).read_text())["granted"]
    assert granted == 461 + 4 * 200  # the first request's worst case, and a batch of answers
    server.asked.clear()
    result = run_stage(root, "label", "label", given, attempt=2)
    assert result is not None and result["api"]["cost_micros"] == granted + 12 * 20


def test_waiting_for_an_answer_is_no_stall(root: Path, server: Server) -> None:
    """Each attempt has a limit of its own, and answers of a reasoning model take minutes."""
    server.reply = lambda body, call: (time.sleep(1.0), right(body, call))[1]
    given = settings(server, samples=1)
    ctx = context(root, "label", "label", given)
    label.run(ctx, given)
    places = [done for phase, done in ctx.phases if phase == "generate"]
    assert len(set(places)) >= 4 and all(b >= a - 1e-6 for a, b in pairwise(places))


def test_the_settings_travel_as_data_and_hold_no_key(server: Server) -> None:
    task = Task("r", "label", "label", 1, 1, "file:x", settings(server), Watch())
    text = task.to_json()
    assert KEY not in text and "TEST_API_KEY" in text
    assert Task.from_json(text) == task


def test_a_vocabulary_that_is_not_byte_level_spells_nothing() -> None:
    tokenizer = models.tiny_tokenizer()
    spelled = models.byte_vocabulary(tokenizer)
    assert len(spelled) == 256 + len(tokenizer.added_tokens_decoder)
    for text in ("a", "\n", "é"[:1]):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert [spelled[bytes([byte])] for byte in text.encode()] == ids

    class Pieces:
        added_tokens_decoder = MappingProxyType({})

        def get_vocab(self) -> dict[str, int]:
            return {"▁the": 0, "a": 1}

    assert models.byte_vocabulary(Pieces()) == {}  # type: ignore[arg-type]


# --- a whole run -----------------------------------------------------------------------------------------------------

RECIPE = """\
name: api
budget: 10 USD
infra: local
local: {price: 0.10 USD/h}
data: {prompts: "builtin:addition/train", held_out: "builtin:addition/held_out", verify: exact}
stages:
  - {name: base, kind: pretrain, model: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
     num_attention_heads: 2}, corpus: "builtin:addition/corpus", examples: 200, steps: 5, batch_size: 16,
     learning_rate: 1e-2, threads: 1}
  - {name: label, kind: label, teacher: base, samples: 40, batch_size: 4, max_new_tokens: 16, threads: 1,
     soft_labels: {top_k: 3}, api: {base_url: "URL", model: big, key_env: TEST_API_KEY, input_price: 1 USD,
     output_price: 2 USD, max_parallel: 2}}
  - {name: train, kind: train, student: base, labels: label, method: full, steps: 3, threads: 1}
"""


@pytest.mark.slow
def test_a_run_with_an_api_teacher_is_resumed_after_a_kill_stays_in_its_budget_and_tells_no_key(
    tmp_path: Path, server: Server
) -> None:
    def reply(body: dict[str, Any], call: int) -> Reply:
        if call == 30:
            for process in home.machine_processes():  # supervisor and stage at once, as a lost machine would have it
                process.kill()
        return soft(body, call)

    server.reply = reply
    home = make_home(tmp_path, RECIPE.replace("URL", server.url))
    made = home.json("plan", str(home.recipe))
    (overhead,) = made["overhead"]
    worst = 40 * ((16 + 256) * 1 + 16 * 2)
    assert set(overhead["cost_micros"].values()) == {worst}
    done = home.call("run", str(home.recipe), "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(server.asked) <= 40 + 4 + 2 * 2  # a batch, and what was on its way, is asked again at most
    report = home.check_over()
    assert report["labels"]["api"]["soft"] == 40 and report["labels"]["kept"] == 40
    machines = sum(stage["actual"]["cost_micros"] for stage in report["stages"])
    api = report["labels"]["api"]["cost_micros"]
    assert 40 * 20 <= api <= worst and report["api_micros"] == api
    assert report["spend_micros"] == machines + api <= report["cap_micros"]
    month = home.json("budget")
    assert (month["api_micros"], month["spent_micros"], month["open_micros"]) == (api, machines + api, 0)
    texts = [done.stdout, done.stderr, *(home.call(*w).stdout for w in (("report",), ("status", "--json"), ("logs",)))]
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20 and not any(KEY.encode() in text for text in [*files, *(text.encode() for text in texts)])
