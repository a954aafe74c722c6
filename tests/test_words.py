"""Who waits for a run hears of it in time, once, without a secret, and never holds anything up."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from orchestrator import notify, words
from orchestrator.cli import kdcloud
from orchestrator.config import Home, load_config
from orchestrator.errors import TeardownUnconfirmed, UsageError
from orchestrator.lease import Lease
from orchestrator.ledger import Ledger, Run
from orchestrator.notify import Sender, Teller, addresses
from orchestrator.plan import Plan
from orchestrator.session import Session
from orchestrator.testing import START, Faults, VirtualClock, fake_offer
from tasks.contract import install_hint
from tests.plans import make_plan
from tests.test_runner import World

SECRET = "hunter2"


class Webhook:
    """A server that hears what is posted; with `hangs` it takes a connection and never answers."""

    def __init__(self, status: int = 200) -> None:
        self.heard: list[dict[str, Any]] = []
        heard = self.heard

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"json://me:{SECRET}@127.0.0.1:{self.server.server_port}/{SECRET}?verify=no"

    @property
    def titles(self) -> list[str]:
        return [one["title"].removeprefix("kdcloud: ") for one in self.heard]


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    made = Webhook()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes a connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"json://me:{SECRET}@127.0.0.1:{server.getsockname()[1]}/?rto=60"


@pytest.fixture
def closed() -> str:
    """The address of a server that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"json://me:{SECRET}@127.0.0.1:{port}/{SECRET}"


def a_run(plan: Plan, ledger: Ledger) -> str:
    mark = {"wall": START.isoformat(), "boot_id": "b", "boot_s": 0.0}
    ledger.create_run(
        "q-abc123",
        name="q",
        bucket="file:/x",
        cap_micros=plan.cap_micros,
        deadline_s=None,
        mark=mark,
        at=START,
        data={},
    )
    return "q-abc123"


def keys(plan: Plan, run: Run, spending: int, before: set[str]) -> list[tuple[str, ...]]:
    return [word.keys for word in words.due(run, plan, spending_micros=spending, before=before)]


@pytest.mark.parametrize(
    ("spending", "shares"),
    [
        (499_999, []),
        (500_000, [50]),
        (799_999, [50]),
        (800_000, [50, 80]),
        (950_000, [50, 80, 95]),
        (1_000_000, [50, 80, 95]),
    ],
)
def test_a_share_of_the_cap_is_told_when_it_is_passed_and_only_the_highest(spending: int, shares: list[int]) -> None:
    plan, ledger = make_plan({"train": 60.0}), Ledger.in_memory()
    run = ledger.run(a_run(plan, ledger))
    found = words.due(run, plan, spending_micros=spending, before=())
    assert [word.keys for word in found] == ([tuple(f"cap-{share}-1000000" for share in shares)] if shares else [])
    assert all(f"{shares[-1]} % of its cap" in word.title and "¥7.10 ($1.00)" in word.text for word in found)
    assert [word.urgent for word in found] == ([shares[-1] == 95] if shares else [])
    assert keys(plan, run, spending, {key for word in found for key in word.keys}) == []


def test_a_share_that_was_told_is_told_again_only_of_a_cap_that_was_raised() -> None:
    plan, ledger = make_plan({"train": 60.0}), Ledger.in_memory()
    name, said, clock = a_run(plan, ledger), [], VirtualClock()

    def client(*spending: int) -> None:
        """One process; the next one knows only what the ledger knows."""
        teller = Teller(ledger, name, plan, clock, lambda *what: said.append(what[2]), ())
        for micros in spending:
            teller.look(micros)

    client(400_000, 500_000, 510_000)
    client(520_000, 960_000, 970_000)
    client(980_000)
    assert [text.partition(";")[0] for text in said] == [
        "q-abc123 has used 50 % of its cap", "q-abc123 has used 95 % of its cap",
    ]  # fmt: skip
    ledger.set_cap(name, 1_900_000, None, {"wall": START.isoformat(), "boot_id": "b", "boot_s": 0.0}, START)
    client(990_000)
    assert len(said) == 3 and "50 %" in said[2] and "¥13.49" in said[2]


def test_what_it_will_cost_counts_what_is_left_of_the_stage_at_work_and_the_stages_after_it(tmp_path: Path) -> None:
    plan, ledger = make_plan({"label": 3600.0, "train": 7200.0}, cap_micros=5_000_000), Ledger.in_memory()
    run = ledger.run(a_run(plan, ledger))
    # 0.5 USD/h: 1 h + 2 h = 1.5 USD; nothing runs, so nothing of what was spent was spent on them
    assert words.expected_micros(run, plan, 100_000) == 100_000 + 500_000 + 1_000_000


def session(world: World, folder: Path) -> Session:
    ledger = Ledger(world.path)
    lease = Lease.acquire(world.bucket, "owner1", world.clock)
    home = Home(folder / "home")
    return Session("test-abc123", world.plan, ledger, world.provider, world.bucket, lease, world.clock, home, "owner1")


def go(one: Session, said: list[str]) -> str:
    state = one.go(say=lambda kind, stage, text: said.append(text), stop=lambda: False, on_turn=lambda snapshot: None)
    one.ledger.close()
    return state.state


def test_a_run_to_its_cap_is_told_at_50_and_80_percent_and_at_its_end(
    tmp_path: Path, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(notify.ENV, webhook.url)
    plan = make_plan({"train": 600.0}, cap_micros=300_000)
    world, said = World(tmp_path, plan, work_s={"train": 50_000.0}), []
    assert go(session(world, tmp_path), said) == "cap"
    assert webhook.titles == [
        "test-abc123 has used 50 % of its cap", "test-abc123 has used 80 % of its cap",
        "test-abc123 ended: its cap leaves no more",
    ]  # fmt: skip
    last = webhook.heard[-1]["message"]
    assert "kdcloud report test-abc123" in last and "--budget" in last and "of ¥2.13 ($0.30)" in last
    assert sum("% of its cap" in text for text in said) == 2  # the terminal too


def test_a_spot_machine_that_is_taken_back_is_told_once_with_where_it_goes_on(
    tmp_path: Path, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(notify.ENV, webhook.url)
    plan = make_plan({"train": 600.0}, offers=(replace(fake_offer(), spot=True),))
    lost = lambda order, count: Faults(lost_after_s=300.0 if count == 0 else None)  # noqa: E731
    world = World(tmp_path, plan, work_s={"train": 600.0}, faults=lost)
    assert go(session(world, tmp_path), []) == "done"
    assert webhook.titles == ["test-abc123: a spot machine was taken back", "test-abc123 is done"]
    assert "it goes on elsewhere from train/checkpoints/step-" in webhook.heard[0]["message"]


def test_a_teardown_that_is_not_confirmed_is_told_with_the_machine_and_what_it_may_cost(
    tmp_path: Path, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(notify.ENV, webhook.url)
    stays = lambda order, count: Faults(refuses_teardown=True, ends_itself=False)  # noqa: E731
    world = World(tmp_path, make_plan({"train": 60.0}), work_s={"train": 60.0}, faults=stays)
    assert go(session(world, tmp_path), []) == "unconfirmed"
    assert webhook.titles[-1] == "test-abc123 MAY STILL COST MONEY: a teardown is not confirmed"
    (machine,) = world.run.live
    text = webhook.heard[-1]["message"]
    assert machine.name in text and "in the worst case ¥" in text and "kdcloud down test-abc123" in text
    assert webhook.heard[-1]["type"] == "warning"


def test_a_teardown_left_over_by_a_bug_is_told_too(
    tmp_path: Path, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(notify.ENV, webhook.url)
    world = World(tmp_path, make_plan({"train": 60.0}), work_s={"train": 60.0})
    one = session(world, tmp_path)

    def breaks(*args: object, **more: object) -> None:
        raise TeardownUnconfirmed("kdcloud hit a bug", hint="repeat `kdcloud down test-abc123`")

    monkeypatch.setattr("orchestrator.runner.Runner.run", breaks)
    with pytest.raises(TeardownUnconfirmed):
        go(one, [])
    assert [title.partition(" ")[2] for title in webhook.titles] == [words.TITLES["unconfirmed"]]
    assert "kdcloud hit a bug" in webhook.heard[0]["message"]


def test_an_address_that_fails_is_one_warning_and_no_secret_appears_anywhere(
    tmp_path: Path, closed: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    refused = Webhook(status=500)
    monkeypatch.setenv(notify.ENV, f"{closed} {refused.url} nonsense://{SECRET} {SECRET}")
    world, said = World(tmp_path, make_plan({"train": 600.0}, cap_micros=300_000), work_s={"train": 50_000.0}), []
    assert go(session(world, tmp_path), said) == "cap"
    refused.server.shutdown()
    refused.server.server_close()
    warnings = [text for text in said if "not told everywhere" in text]
    assert len(warnings) == 1 and " of 4)" in warnings[0]  # whichever failed first
    shown = "".join([*said, *capfd.readouterr(), caplog.text])
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    stored += b"".join(world.bucket.get(stat.key)[0] for stat in world.bucket.list())
    assert b"told" in stored and SECRET not in shown and SECRET.encode() not in stored


def test_an_address_that_hangs_holds_up_neither_the_end_nor_another_address(silent: str, webhook: Webhook) -> None:
    said: list[str] = []
    sender = Sender([silent, webhook.url], said.append)
    began = time.monotonic()
    sender.send(notify.trial())
    assert time.monotonic() - began < 0.2
    while not webhook.heard and time.monotonic() - began < 20:
        threading.Event().wait(0.02)
    assert webhook.titles == ["this is a test"]
    closing = time.monotonic()
    sender.close(limit_s=0.3)
    assert 0.25 < time.monotonic() - closing < 1.0
    assert said == [
        "words are not told everywhere: json (1 of 2) did not answer in time; `kdcloud notify --test` tries it"
    ]


def test_without_apprise_it_says_what_to_install(webhook: Webhook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "find_spec", lambda name: None)
    said: list[str] = []
    sender = Sender([webhook.url], said.append)
    sender.send(notify.trial())
    sender.close()
    assert len(said) == 1 and install_hint("notify") in said[0] and not webhook.heard


def test_nothing_is_started_where_nobody_is_to_be_told() -> None:
    before = threading.active_count()
    sender = Sender([], lambda text: None)
    sender.send(notify.trial())
    sender.close()
    assert threading.active_count() == before


def test_what_a_machine_said_stays_in_one_line_and_short() -> None:
    plan, ledger = make_plan({"train": 60.0}), Ledger.in_memory()
    run = ledger.run(a_run(plan, ledger))
    said = "boom\x1b[31m\nkdcloud: all is well" + "x" * 5000
    word = words.ended(run, plan, state="failed", message=said, hint="", worst_micros={})
    assert "\x1b" not in word.text and "\nkdcloud: all" not in word.text and len(word.text) < 800


@pytest.mark.parametrize("text", ["notify: json://h/x", "notify: [json://h/x]", "notify:\n  - json://h/x"])
def test_addresses_stand_in_the_configuration_and_the_environment_counts_instead(tmp_path: Path, text: str) -> None:
    home = Home(tmp_path)
    home.config.write_text(f"{text}\nowner: abc123\n")
    config = load_config(home)
    assert config.notify == ("json://h/x",) and "json://h/x" not in repr(config)
    assert addresses(config.notify, {}) == ("json://h/x",)
    assert addresses(config.notify, {notify.ENV: " a://b  c://d,e "}) == ("a://b", "c://d,e")
    assert addresses(config.notify, {notify.ENV: ""}) == ()


@pytest.mark.parametrize("text", [f"notify: {SECRET}", f"notify: [json://h, {SECRET}]", f"notify: {{a: {SECRET}}}"])
def test_an_address_that_is_none_is_refused_without_being_repeated(tmp_path: Path, text: str) -> None:
    home = Home(tmp_path)
    home.config.write_text(f"owner: abc123\n{text}\n")
    with pytest.raises(UsageError) as caught:
        load_config(home)
    assert "config.yaml:2: notify: must be addresses" in str(caught.value) and SECRET not in str(caught.value)


def test_the_command_says_who_is_told_by_kind_alone_and_tries_it(
    webhook: Webhook, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(notify.ENV, raising=False)
    looked = CliRunner().invoke(kdcloud, ["notify"])
    assert looked.exit_code == 0 and "nobody is told yet" in looked.output and "config.yaml" in looked.output
    nobody = CliRunner().invoke(kdcloud, ["notify", "--test"])
    assert isinstance(nobody.exception, UsageError) and "config.yaml" in nobody.exception.hint
    monkeypatch.setenv(notify.ENV, webhook.url)
    assert CliRunner().invoke(kdcloud, ["notify"]).output == "json (1 of 1)\n" and not webhook.heard
    done = CliRunner().invoke(kdcloud, ["notify", "--test"])
    assert (done.exit_code, done.output, webhook.titles) == (0, "json (1 of 1) took it\n", ["this is a test"])
    monkeypatch.setenv(notify.ENV, f"{webhook.url} {closed}")
    failed = CliRunner().invoke(kdcloud, ["notify", "--test"])
    assert isinstance(failed.exception, UsageError) and failed.exception.message == "1 of 2 did not take it"
    assert failed.output == "json (1 of 2) took it\njson (2 of 2) did not take it\n"
