"""`kdcloud doctor`: every planted fault is named with its cure, what is well is not, and no secret is ever shown."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import doctor, doctor_look, sky_ask
from orchestrator.access import CHAINED_S, FEDERATION_S, INSTANCE_PROFILE, Way
from orchestrator.cli import kdcloud
from orchestrator.config import Config, Home
from orchestrator.doctor import AwsFacts, BucketFacts, Check, Left, State, Wants
from orchestrator.doctor_look import Look
from orchestrator.errors import NothingFits, UsageError
from orchestrator.ledger import Ledger, Month
from orchestrator.money import Rate, parse_amount
from orchestrator.plan import Plan
from orchestrator.quota import Quota
from orchestrator.sky_ask import SkyAnswer
from orchestrator.states import Event
from orchestrator.testing import START, fake_offer
from tasks.bucket import Bucket, Unsupported, open_bucket
from tests.plans import make_plan

ROOT = Path(__file__).parents[1]
OK, WARN, BAD, SKIPPED = State.OK, State.WARN, State.BAD, State.SKIPPED
ANYBODY = Wants()
HERE = Wants(named=True, trains_here=True, bucket="file:/b")
ON_AWS = Wants(named=True, rented=("aws",), bucket="s3://b/kd")
ON_MANY = Wants(named=True, rented=("aws", "runpod"), bucket="s3://b/kd")
NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
WELL = BucketFacts("file:/b", conditional=True)
CONFIG = Config("abc123", rate=Rate(Decimal("7.1"), date(2026, 5, 1)))


@pytest.fixture(autouse=True)
def nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of the test's own, and no provider but SkyPilot, which is not there."""
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.delenv("KDCLOUD_PROVIDER", raising=False)
    monkeypatch.setattr(sky_ask, "sky_version", lambda: None)
    return tmp_path / "user"


def only(checks: Sequence[Check], id_: str) -> Check:
    (found,) = [check for check in checks if check.id == id_]
    return found


# -- judgement


@pytest.mark.parametrize(
    ("check", "state", "says"),
    [
        (doctor.python((3, 10, 9)), BAD, "too old"),
        (doctor.python((3, 11, 0)), OK, "3.11.0"),
        (doctor.python((3, 13, 4)), OK, "3.13.4"),
        (doctor.python((3, 14, 0)), WARN, "locked versions"),
        (doctor.extra("local", (), HERE), OK, "stages on this machine"),
        (doctor.extra("local", ("torch",), HERE), BAD, "torch"),
        (doctor.extra("local", ("torch",), ON_AWS), SKIPPED, "torch"),
        (doctor.extra("local", ("torch",), ANYBODY), WARN, "torch"),
        (doctor.extra("s3", ("boto3",), ON_AWS), BAD, "boto3"),
        (doctor.extra("s3", ("boto3",), HERE), SKIPPED, "boto3"),
        (doctor.extra("s3", ("boto3",), ANYBODY), SKIPPED, "boto3"),
        (doctor.extra("s3", ("boto3",), Wants(bucket="s3://b")), WARN, "boto3"),
        (doctor.extra("page", ("jinja2",), HERE), WARN, "jinja2"),
        (doctor.home("/h", "", network=False, open_to_others=False), OK, "/h"),
        (doctor.home("/h", "no room", network=False, open_to_others=False), BAD, "no room"),
        (doctor.home("/h", "", network=True, open_to_others=False), WARN, "network file system"),
        (doctor.home("/h", "", network=False, open_to_others=True), WARN, "can read"),
        (doctor.disk("disk", "/h", 5 * doctor.GIB), OK, "5.0 GiB"),
        (doctor.disk("disk", "/h", 5 * doctor.GIB - 1), WARN, "little"),
        (doctor.disk("temp", "/t", doctor.GIB - 1), BAD, "/t"),
        (doctor.clock(None, ""), SKIPPED, "no server"),
        (doctor.clock(0.0, "s3://b"), OK, "within 1 s of s3://b"),
        (doctor.clock(20.0, "s3://b"), OK, "s3://b"),
        (doctor.clock(-20.5, "s3://b"), WARN, "ahead of s3://b"),
        (doctor.clock(121.0, "s3://b"), BAD, "behind s3://b"),
        (doctor.skypilot(None, ANYBODY), WARN, "nothing can be rented"),
        (doctor.skypilot(None, HERE), SKIPPED, "not installed"),
        (doctor.skypilot(None, ON_AWS), BAD, "nothing can be rented"),
        (doctor.skypilot("0.13.1", ON_AWS), BAD, "knows 0.14"),
        (doctor.skypilot("0.14.2", ON_AWS), OK, "0.14.2"),
        (doctor.sky_infra(None, ON_AWS), SKIPPED, "no SkyPilot"),
        (doctor.sky_infra(SkyAnswer(None, "does not run", "sky api start"), ON_AWS), BAD, "does not run"),
        (doctor.sky_infra(SkyAnswer(None, "does not run", "sky api start"), ANYBODY), WARN, "does not run"),
        (doctor.sky_infra(SkyAnswer(None, "no answer", "", late=True), ON_AWS), WARN, "no answer"),
        (doctor.sky_infra(SkyAnswer(()), ANYBODY), WARN, "no infra"),
        (doctor.sky_infra(SkyAnswer(("aws", "slurm")), ON_AWS), OK, "aws, slurm"),
        (doctor.sky_infra(SkyAnswer(("slurm",)), ON_AWS), BAD, "names aws"),
        (doctor.sky_infra(SkyAnswer(("aws",)), ON_MANY), WARN, "names runpod"),
        (doctor.key_file("runpod", ON_MANY, there=False, open_to_others=False), WARN, ".runpod"),
        (
            doctor.key_file("vast", Wants(True, rented=("vast",)), there=False, open_to_others=False),
            BAD,
            "vast_api_key",
        ),
        (doctor.key_file("vast", ANYBODY, there=True, open_to_others=True), WARN, "can read"),
        (doctor.key_file("vast", ANYBODY, there=True, open_to_others=False), OK, "is there"),
        (doctor.api_key("X_API_KEY", there=False), BAD, "not set"),
        (doctor.api_key("X_API_KEY", there=True), OK, "is set"),
        (doctor.bucket_keys(Way("federation", FEDERATION_S), ON_AWS), OK, "36 h"),
        (doctor.bucket_keys(Way("account_key", CHAINED_S, "a session"), ON_AWS), BAD, "a session"),
        (doctor.bucket_keys(Way("account_key", CHAINED_S, "a session"), ANYBODY), WARN, "a session"),
        (doctor.bucket_keys(Way("account_key", 1, "x"), replace(ON_AWS, allow_account_key=True)), OK, "allows it"),
        (doctor.prices(None, START, NOW, ANYBODY), WARN, "2026-01"),
        (doctor.prices(None, START, NOW, HERE), SKIPPED, "rents nothing"),
        (doctor.prices(NOW - timedelta(days=7), NOW - timedelta(days=7), NOW, ON_AWS), OK, "7.0 d ago"),
        (doctor.prices(NOW - timedelta(days=8), None, NOW, ON_AWS), WARN, "8.0 d ago"),
        (doctor.prices(NOW, NOW - timedelta(days=30), NOW, ON_AWS), WARN, "2026-05-02"),  # an old catalogue
        (doctor.rate(CONFIG, date(2026, 7, 30), "/c"), OK, "2026-05-01"),
        (doctor.rate(CONFIG, date(2026, 7, 31), "/c"), WARN, "91 days"),
        (doctor.month(CONFIG, None, rents=False), SKIPPED, "no monthly cap"),
        (doctor.month(CONFIG, None, rents=True), WARN, "no monthly cap"),
        (doctor.month(replace(CONFIG, monthly_cap=parse_amount("$2")), None, rents=True), OK, "($2.00) left"),
        (
            doctor.month(replace(CONFIG, monthly_cap=parse_amount("$2")), Month("2026-06", 2_000_000, 0), rents=True),
            WARN,
            "($0.00) left",
        ),
        (doctor.reaper((), rents=False), SKIPPED, "none is set up"),
        (doctor.reaper((), rents=True), WARN, "none is set up"),
        (doctor.reaper(("cron",), rents=True), OK, "cron"),
        (doctor.hub("h", "", token=False, wants=HERE), OK, "not set"),
        (doctor.hub("h", "timed out", token=True, wants=replace(HERE, hub_models=("a/b",))), WARN, "timed out"),
        (doctor.hub("h", "timed out", token=True, wants=HERE), SKIPPED, "fetches nothing"),
    ],
)
def test_what_was_found_is_judged(check: Check, state: State, says: str) -> None:
    assert check.state is state, check
    assert says in check.found
    assert bool(check.cure) == (state in (WARN, BAD)), check


@pytest.mark.parametrize(
    ("facts", "wants", "state", "says"),
    [
        (None, ON_AWS, SKIPPED, "boto3"),
        (AwsFacts(found=False), ANYBODY, SKIPPED, "no AWS credentials"),
        (AwsFacts(found=False), ON_AWS, BAD, "no AWS credentials"),
        (AwsFacts(found=False), replace(ON_MANY, bucket="file:/b"), WARN, "no AWS credentials"),
        (AwsFacts(found=True, arn="arn:x"), ON_AWS, OK, "arn:x"),
        (AwsFacts(found=True, arn="arn:x", session=True), ON_AWS, OK, "some time"),
        (AwsFacts(found=True, arn="arn:x", expires_at=NOW + timedelta(hours=2)), ON_AWS, OK, "2.0 h more"),
        (AwsFacts(found=True, arn="arn:x", expires_at=NOW + timedelta(minutes=59)), ON_AWS, WARN, "59 min more"),
        (AwsFacts(found=True, expires_at=NOW), ON_AWS, BAD, "ended"),
        (AwsFacts(found=True, expires_at=NOW - timedelta(hours=3)), ANYBODY, WARN, "ended 3.0 h ago"),
        (AwsFacts(found=True, trouble="refused", cure="mend"), ON_AWS, BAD, "refused"),
        (AwsFacts(found=True, trouble="refused", cure="mend"), ANYBODY, WARN, "refused"),
        (AwsFacts(found=True, elsewhere="minio.lan"), ON_AWS, OK, "minio.lan"),
    ],
)
def test_credentials_are_judged_by_their_end_and_by_who_needs_them(
    facts: AwsFacts | None, wants: Wants, state: State, says: str
) -> None:
    check = doctor.aws(facts, wants, NOW)
    assert check.state is state and says in check.found
    assert bool(check.cure) == (state in (WARN, BAD))


@pytest.mark.parametrize(
    ("facts", "wants", "states"),
    [
        (WELL, HERE, [OK, OK]),
        (replace(WELL, conditional=False), HERE, [OK, WARN]),
        (replace(WELL, trouble="no", cure="mend", step="read"), HERE, [BAD, SKIPPED]),
        (WELL, replace(ON_AWS, bucket="file:/b"), [BAD, OK]),  # a cloud reaches no folder
        (WELL, Wants(named=True, rented=("slurm",), bucket="file:/b"), [OK, OK]),
        (replace(WELL, url="s3://b"), ON_AWS, [OK, OK]),
    ],
)
def test_a_bucket_is_judged_by_what_it_did_and_who_reaches_it(
    facts: BucketFacts, wants: Wants, states: list[State]
) -> None:
    assert [check.state for check in doctor.bucket(facts, wants)] == states


@pytest.mark.parametrize(
    ("left", "state", "cure"),
    [
        ([], OK, ""),
        ([Left("r-1", ("kd-1",), True)], OK, ""),
        ([Left("r-1", ("kd-1",), False)], BAD, "kdcloud down r-1"),
        ([Left("r-1", ("kd-1",), None)], BAD, "kdcloud down r-1"),
    ],
)
def test_a_machine_that_nobody_drives_is_bad(left: list[Left], state: State, cure: str) -> None:
    (check,) = doctor.machines(left, 3)
    assert (check.state, check.cure) == (state, cure)


def plan_on(infra: str) -> Plan:
    return make_plan({"only": 60.0}, offers=(fake_offer(infra=infra),))


@pytest.mark.parametrize(
    ("infra", "allowed", "env", "state"),
    [
        ("runpod", False, {}, BAD),
        ("runpod", True, {}, OK),
        ("aws", False, {}, BAD),
        ("aws", False, {INSTANCE_PROFILE: "narrow"}, OK),
        ("slurm", False, {}, OK),
        ("nebius", True, {}, BAD),  # nothing there ends itself
    ],
)
def test_rights_over_the_account_are_bad_unless_the_recipe_allows_them(
    infra: str, allowed: bool, env: dict[str, str], state: State
) -> None:
    check = doctor.rights(plan_on(infra), allowed=allowed, env=env)
    assert check.state is state and bool(check.cure) == (state is BAD)


def test_a_plan_over_its_cap_is_bad_and_a_plan_in_time_is_not() -> None:
    plan = plan_on("runpod")
    assert doctor.planned(replace(plan, cap_micros=plan.needed_micros)).state is OK
    over = doctor.planned(replace(plan, cap_micros=plan.needed_micros - 1, recipe="my own.yaml"))
    assert over.state is BAD and over.cure == "kdcloud plan 'my own.yaml'"
    assert doctor.planned(replace(plan, deadline_s=1.0)).state is WARN


def test_the_extras_it_looks_for_are_those_that_can_be_installed() -> None:
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name: len(modules) for name, modules in doctor.EXTRAS.items()} == {
        name: len(optional[name]) for name in doctor.EXTRAS
    }
    assert any(line.startswith(f"skypilot[slurm]=={sky_ask.WANTED}") for line in optional["sky"])


# -- all at once, each for so long only


def look(id_: str, run: Callable[[], list[Check]], **more: Any) -> Look:
    return Look(id_, doctor.BUCKET, run, **more)


def well(id_: str) -> list[Check]:
    return [Check(id_, doctor.BUCKET, OK, "well")]


def test_a_look_that_hangs_is_told_as_such_and_delays_no_other() -> None:
    never = threading.Event()
    began = time.monotonic()
    found = doctor_look.at_once(
        [
            look("one", lambda: [never.wait() or Check("one", "", OK, "")], limit_s=0.2),
            look("two", lambda: [never.wait() or Check("two", "", OK, "")], limit_s=0.2),
            look("three", lambda: well("three")),
        ],
        offline=False,
    )
    took = time.monotonic() - began
    never.set()
    assert took < 0.4  # both waited at the same time
    assert [(check.id, check.state) for check in found] == [("one", WARN), ("two", WARN), ("three", OK)]
    assert "no answer within" in found[0].found and found[0].cure


def test_a_look_that_breaks_hides_no_other() -> None:
    def breaks() -> list[Check]:
        raise KeyError("stage")

    found = doctor_look.at_once([look("one", breaks), look("two", lambda: well("two"))], offline=False)
    assert [check.state for check in found] == [WARN, OK] and "KeyError" in found[0].found


def test_offline_nothing_of_the_network_is_looked_at() -> None:
    asked: list[str] = []
    found = doctor_look.at_once(
        [look("far", lambda: asked.append("far") or well("far"), network=True), look("near", lambda: well("near"))],
        offline=True,
    )
    assert asked == [] and [(check.state, check.found) for check in found] == [(SKIPPED, "--offline"), (OK, "well")]


def test_everything_together_takes_no_more_than_fifteen_seconds() -> None:
    config = Config("abc123", bucket="s3://b")
    wants = replace(ON_AWS, hub_models=("a/b",))
    looks = list(
        doctor_look._looks(Home(Path("/h")), "", config, plan_on("aws"), wants, doctor_look.Told(), lambda quota: None)
    )
    assert len(looks) >= 9
    assert doctor_look.PLAN_LIMIT_S + max(one.limit_s for one in looks) < 15
    assert next(one.limit_s for one in looks if one.id == "sky-infra") > doctor_look.SKY_LIMIT_S


# -- planted faults


class Odd:
    """A good store but for what a test plants."""

    def __init__(self, inner: Bucket, **planted: Any) -> None:
        self._inner, self._planted = inner, planted

    def __getattr__(self, name: str) -> Any:
        return self._planted.get(name) or getattr(self._inner, name)


def refuse_conditions(inner: Bucket) -> Callable[..., str]:
    def put(key: str, data: bytes, *, if_none_match: bool = False, if_match: str | None = None) -> str:
        if if_none_match or if_match:
            raise Unsupported("knows no conditional writes")
        return inner.put(key, data)

    return put


@pytest.mark.parametrize(
    ("plant", "step", "says"),
    [
        (lambda inner: {"get": lambda key: (b"other", None)}, "read", "other bytes"),
        (lambda inner: {"list": lambda prefix: iter(())}, "list", "not listed"),
        (lambda inner: {"delete": lambda key: None}, "delete", "still there"),
    ],
)
def test_a_store_that_lies_is_caught_at_that_step(
    plant: Callable[[Bucket], dict[str, Any]], step: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = open_bucket(f"file:{tmp_path}/b")
    monkeypatch.setattr(doctor_look, "open_bucket", lambda url: Odd(inner, **plant(inner)))
    facts, off_s = doctor_look.try_bucket("file:b")
    assert facts.step == step and says in facts.trouble and facts.cure and off_s is None


def test_a_good_folder_is_tried_and_left_empty(tmp_path: Path) -> None:
    facts, off_s = doctor_look.try_bucket(f"file:{tmp_path}/b")
    assert not facts.trouble and facts.conditional is True and off_s is None
    assert list(open_bucket(f"file:{tmp_path}/b").list()) == []


def test_a_store_without_conditional_writes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = open_bucket(f"file:{tmp_path}/b")
    monkeypatch.setattr(doctor_look, "open_bucket", lambda url: Odd(inner, put=refuse_conditions(inner)))
    assert doctor_look.try_bucket("file:b")[0].conditional is False


@pytest.mark.parametrize(("off_s", "state"), [(0, OK), (-45, WARN), (600, BAD)])
def test_the_clock_is_held_against_the_stores(
    off_s: int, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = open_bucket(f"file:{tmp_path}/b")
    there = lambda: (datetime.now(UTC) + timedelta(seconds=off_s)).replace(microsecond=0)  # noqa: E731 - as a header
    monkeypatch.setattr(doctor_look, "open_bucket", lambda url: Odd(inner, url="s3://b", now=there))
    facts, found = doctor_look.try_bucket("s3://b")
    assert not facts.trouble and found is not None and abs(found - off_s) <= 2
    assert doctor.clock(found, "s3://b").state is state


def test_a_bucket_that_is_a_file_is_bad(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("not a folder")
    facts, _ = doctor_look.try_bucket(f"file:{tmp_path}/b/below")
    assert facts.step == "write" and facts.trouble and facts.cure


def test_a_home_that_cannot_be_made_is_bad_and_the_rest_is_still_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KDCLOUD_HOME", str(tmp_path / "file" / "home"))
    checks = examined(offline=True)
    assert only(checks, "home").state is BAD and only(checks, "python").state is OK
    assert not doctor.is_well(checks)


def test_a_folder_that_refuses_a_file_is_told(tmp_path: Path) -> None:
    assert doctor_look._unwritable(tmp_path) == ""
    assert "cannot be written" in doctor_look._unwritable(tmp_path / "nowhere")


def test_a_home_that_others_can_read_is_told(nothing_of_the_user: Path) -> None:
    nothing_of_the_user.chmod(0o755)
    assert "can read" in only(examined(offline=True), "home").found


def no_plan(recipe: str) -> tuple[Plan, bool]:
    raise AssertionError("no recipe was named")


def examined(recipe: str | None = None, plan_of: doctor_look.PlanOf = no_plan, *, offline: bool = False) -> list[Check]:
    return doctor_look.examine(recipe, plan_of, offline=offline, ask_quota=lambda quota: None)


def test_a_recipe_that_is_wrong_is_a_check_like_any_other() -> None:
    def wrong(recipe: str) -> tuple[Plan, bool]:
        raise UsageError("r.yaml:1: budget: is missing\nr.yaml:2: stages: is missing", hint="mend them")

    check = only(examined("r.yaml", wrong, offline=True), "recipe")
    assert (check.state, check.cure) == (BAD, "mend them") and "budget" in check.found and "stages" in check.found


def test_a_recipe_that_does_not_plan_still_has_its_bucket_and_infras_looked_at(tmp_path: Path) -> None:
    def none_fits(recipe: str) -> tuple[Plan, bool]:
        raise NothingFits("no machine fits", hint="a smaller teacher")

    (tmp_path / "b").write_text("not a folder")
    text = (ROOT / "recipes" / "rehearsal.yaml").read_text()
    (tmp_path / "r.yaml").write_text(text.replace("infra: local", "infra: [vast, slurm/lab]\nbucket: file:b/below"))
    checks = examined(str(tmp_path / "r.yaml"), none_fits, offline=True)
    assert {check.id for check in checks if check.state is BAD} >= {"recipe", "bucket", "sky"}
    assert only(checks, "key-vast").state is only(checks, "key-slurm").state is WARN


def test_a_recipe_for_a_cloud_names_all_that_it_lacks() -> None:
    plan = replace(plan_on("runpod"), bucket="file:/tmp/x")
    checks = examined("r.yaml", lambda recipe: (plan, False), offline=True)
    bad = {check.id for check in checks if check.state is BAD}
    assert {"rights", "sky", "key-runpod", "bucket"} <= bad
    assert all(check.cure for check in checks if check.state is BAD)


def test_a_quota_of_nothing_is_bad_and_a_large_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    offer = replace(fake_offer(infra="aws", gpu="A10G"), instance="g5.xlarge", region="us-east-1")
    plan = make_plan({"only": 60.0}, offers=(offer,))
    found = {vcpus: doctor_look._quota(plan, lambda quota, vcpus=vcpus: vcpus) for vcpus in (0.0, 4.0, None)}
    assert [check.state for check in found.values()] == [BAD, OK, WARN]
    assert "request-service-quota-increase" in found[0.0].cure
    two = make_plan({"only": 60.0}, offers=(offer, replace(offer, instance="g5.12xlarge")))
    left_out = doctor_look._quota(two, lambda quota: 4.0)
    assert left_out.state is WARN and "g5.12xlarge" in left_out.found


def test_without_a_recipe_the_quota_of_a_new_account_is_told_and_a_larger_one_is_well() -> None:
    quota = Quota("L-DB2E81BA", "eu-west-1", "on-demand G and VT instances in eu-west-1")
    found = [doctor.own_quota(quota, allowed) for allowed in (0.0, 8.0, None)]
    assert [check.state for check in found] == [WARN, OK, SKIPPED]
    assert "--quota-code L-DB2E81BA --region eu-west-1" in found[0].cure


def test_a_machine_that_may_bill_and_a_ledger_that_is_broken_are_bad(nothing_of_the_user: Path) -> None:
    bucket = f"file:{nothing_of_the_user}/bucket"
    ledger = Ledger(Home(nothing_of_the_user).ledger)
    mark = {"wall": START.isoformat(), "boot_id": "b", "boot_s": 0.0}
    ledger.create_run("q-abc123", name="q", bucket=bucket, cap_micros=9, deadline_s=None, mark=mark, at=START, data={})
    order = {"offer": {"infra": "aws"}, "offer_index": 0, "bound": "cap"}
    ledger.reserve("q-abc123", "label", "kd-1", 5, START, later_floor=0, order=order)
    assert only(examined(offline=True), "ledger").state is OK  # nothing was sent yet
    ledger.move("kd-1", Event.SENT, START)
    ledger.close()
    checks = examined(offline=True)
    assert only(checks, "ledger").cure == "kdcloud down q-abc123"
    assert only(checks, "month").state is WARN  # something was rented from here
    Home(nothing_of_the_user).ledger.write_bytes(b"no database" * 100)
    assert only(examined(offline=True), "ledger").state is BAD


def test_a_new_user_makes_no_ledger_and_nothing_is_bad(nothing_of_the_user: Path) -> None:
    checks = examined(offline=True)
    assert doctor.is_well(checks) and len(checks) >= 14
    assert not Home(nothing_of_the_user).ledger.exists()


def test_a_reaper_is_found_where_the_documents_put_it(
    nobody_else: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crontab = tmp_path / "bin" / "crontab"
    crontab.parent.mkdir()
    monkeypatch.setenv("PATH", str(crontab.parent))
    assert doctor_look.reapers(nobody_else) == []
    line = next(line for line in (ROOT / "docs" / "reaper.md").read_text().splitlines() if line.startswith("*/10"))
    crontab.write_text(f"#!/bin/sh\necho '# {line}'\n")
    crontab.chmod(0o755)
    assert doctor_look.reapers(nobody_else) == []
    crontab.write_text(f"#!/bin/sh\necho '{line}'\n")
    wants = nobody_else / ".config" / "systemd" / "user" / "timers.target.wants"
    wants.mkdir(parents=True)
    (wants / "kdcloud-reap.timer").write_text("")
    assert doctor_look.reapers(nobody_else) == ["kdcloud-reap.timer", "cron"]
    for unit in doctor_look.UNITS:
        assert unit in (ROOT / "docs" / "reaper.md").read_text()


# -- AWS (moto on loopback)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def keys(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Credentials in the environment, and a token service and a store that take them."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDPLANTED")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-aws-secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return endpoint


def test_who_the_credentials_are_is_asked(keys: str) -> None:
    secrets: set[str] = set()
    facts = doctor_look.aws_facts(secrets)
    assert facts is not None and facts.arn is not None and facts.arn.startswith("arn:aws:")
    assert secrets == {"planted-aws-secret"}


def test_credentials_that_have_ended_are_told_without_asking(
    keys: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:9")  # nobody there
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    file.write_text(
        "[default]\naws_access_key_id = AKIDPLANTED\naws_secret_access_key = planted\naws_session_token = planted\n"
        "x_security_token_expires = 2020-01-01T00:00:00Z\n"
    )
    facts = doctor_look.aws_facts(set())
    assert facts is not None and facts.expires_at == datetime(2020, 1, 1, tzinfo=UTC)
    assert doctor.aws(facts, ON_AWS, NOW).state is BAD


def test_refreshed_credentials_that_have_ended_are_told(keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "planted-token")
    monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", "2020-01-01T00:00:00Z")
    facts = doctor_look.aws_facts(set())
    assert facts is not None and doctor.aws(facts, ON_AWS, NOW).state is BAD


def test_a_token_service_that_is_away_is_told_and_no_credentials_are_no_trouble(
    keys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:9")
    facts = doctor_look.aws_facts(set())
    assert facts is not None and facts.trouble and facts.cure
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert doctor_look.aws_facts(set()) == AwsFacts(found=False)


def test_keys_of_another_store_are_not_shown_to_aws(keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_STS")
    monkeypatch.setattr("boto3.session.Session.client", lambda *_, **__: pytest.fail("somebody was asked"))
    facts = doctor_look.aws_facts(set())
    assert facts is not None and facts.elsewhere == "127.0.0.1"


def test_a_bucket_that_is_not_there_is_bad_with_the_command_that_makes_it(keys: str) -> None:
    facts, _ = doctor_look.try_bucket("s3://kd-not-there/kd")
    assert facts.step == "write" and "aws s3 mb s3://kd-not-there" in facts.cure


def test_a_good_store_is_tried_with_its_clock(keys: str) -> None:
    import boto3

    boto3.client("s3").create_bucket(Bucket="kd-doctor")
    facts, off_s = doctor_look.try_bucket("s3://kd-doctor/kd")
    assert not facts.trouble and facts.conditional is True and off_s == 0.0
    assert list(open_bucket("s3://kd-doctor").list()) == []


# -- SkyPilot, in a process of its own

FAKE_SKY = {
    "sky/__init__.py": "__version__ = '0.14.1'\n",
    "sky/sky_logging.py": "from contextlib import nullcontext as silent\n",
    "sky/client/__init__.py": "",
    "sky/client/sdk.py": "import time\ndef enabled_clouds():\n    return 'r'\ndef get(request):\n    {body}\n",
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An API server that is healthy, and refuses everybody."""

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    made = HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    monkeypatch.setenv("SKYPILOT_API_SERVER_ENDPOINT", f"http://user:planted@127.0.0.1:{made.server_port}/")
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


def fake_sky(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in FAKE_SKY.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.replace("{body}", body))
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.parametrize(
    ("body", "enabled", "says"),
    [
        ("print('hi'); import atexit; atexit.register(print, 'bye'); return ['AWS', 'Slurm']", ("aws", "slurm"), ""),
        ("raise RuntimeError('token refused')", None, "token refused"),
        ("import os; os._exit(3)", None, "without an answer"),
        ("time.sleep(60)", None, "within 2 s"),
    ],
)
def test_skypilot_is_asked_in_a_process_that_can_be_ended(
    body: str, enabled: tuple[str, ...] | None, says: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_sky(tmp_path / "site", body, monkeypatch)
    limit_s = 2.0 if "sleep" in body else 60.0
    began = time.monotonic()
    answer = sky_ask.enabled(tmp_path, limit_s)
    assert answer.enabled == enabled and says in answer.trouble
    assert answer.late == ("sleep" in body) and time.monotonic() - began < limit_s + 1


def test_a_server_that_does_not_run_is_told_and_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYPILOT_API_SERVER_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("something was started"))
    assert sky_ask.enabled(tmp_path, 5.0).hint == "sky api start"


def test_where_skypilots_server_is_comes_from_where_skypilot_looks(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    assert sky_ask.server_url({}, config) == "http://127.0.0.1:46580"
    assert sky_ask.server_url({"SKYPILOT_API_SERVER_LOCAL_PORT": "9"}, config) == "http://127.0.0.1:9"
    config.write_text("api_server: {endpoint: https://sky.lan}\n")
    assert sky_ask.server_url({}, config) == "https://sky.lan"
    assert sky_ask.server_url({"SKYPILOT_API_SERVER_ENDPOINT": "https://x"}, config) == "https://x"
    config.write_text("api_server: [")
    assert sky_ask.server_url({}, config) == "http://127.0.0.1:46580"


# -- what is shown


def test_the_document_lists_every_check_and_no_other() -> None:
    listed = set(re.findall(r"^\| `([a-z0-9-]+)", (ROOT / "docs" / "doctor.md").read_text(), re.M))
    sources = [(ROOT / "orchestrator" / f"{name}.py").read_text() for name in ("doctor", "doctor_look")]
    made = {id_ for text in sources for id_ in re.findall(r'\b(?:Check|Look|_disk)\(\s*"([a-z-]+)"', text)}
    assert listed == made | {"extra-local", "extra-page", "extra-s3", "key-", "api-"} and len(listed) >= 24


def test_no_secret_and_no_control_character_is_shown() -> None:
    said = Check("a", doctor.KEYS, BAD, "http://me:hunter22@host \x1b[2Jplanted-1 short", "use planted-12")
    (check,) = doctor.hidden([said], {"planted-1", "planted-12", "short"[:3]})
    assert check.found == "http://***@host  [2J*** short" and check.cure == "use ***"


def test_secrets_are_values_of_variables_that_are_named_like_them() -> None:
    env = {"HF_TOKEN": "t-1", "X_API_KEY": "k-1", "DB_PASSWORD": "p-1", "HOME": "/root", "AWS_TOKEN_FILE": "/x/token"}
    assert doctor.secrets_of(env) == {"t-1", "k-1", "p-1"}


PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws-secret",
    "AWS_ACCESS_KEY_ID": "AKIDPLANTED",
    "AWS_SESSION_TOKEN": "planted-session",
    "HF_TOKEN": "hf_planted",
    "DEEPSEEK_API_KEY": "sk-planted",
    "HF_ENDPOINT": "http://me:planted-password@127.0.0.1:9",
    "AWS_ENDPOINT_URL": "http://me:planted-password@127.0.0.1:9",
    "HTTPS_PROXY": "http://me:planted-password@127.0.0.1:9",
}


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_the_whole_command_shows_no_planted_secret_and_leaves_with_2(words: tuple[str, ...], tmp_path: Path) -> None:
    recipe = (
        (ROOT / "recipes" / "api-teacher.yaml")
        .read_text()
        .replace("# bucket: s3://my-bucket/kd", "bucket: s3://b1b/kd")
    )
    (tmp_path / "r.yaml").write_text(recipe.replace("data/", f"{ROOT}/recipes/data/"))
    env = {**os.environ, **PLANTED, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    env.pop("HF_HUB_OFFLINE")
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "doctor", "--recipe", "r.yaml", *words],
        cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    for secret in (*PLANTED.values(), "planted-password"):
        assert secret not in done.stdout + done.stderr
    assert "DEEPSEEK_API_KEY is set" in " ".join(done.stdout.split())
    if words:
        document = json.loads(done.stdout)
        assert set(document) == {"schema", "ok", "checks"} and document["schema"] == 1 and document["ok"] is False
        assert {tuple(row) for row in document["checks"]} == {("id", "group", "state", "found", "cure")}
        assert {"bucket", "aws", "hub", "sky"} <= {row["id"] for row in document["checks"]}
        assert {row["state"] for row in document["checks"]} <= set(State)


def test_a_narrow_terminal_gets_whole_lines_under_their_own_column() -> None:
    from rich.console import Console

    console = Console(width=60, record=True, color_system=None, file=io.StringIO())
    long = " ".join(["word"] * 30)
    doctor.render([Check("bucket-conditions", doctor.BUCKET, BAD, long, f"cure {long}")], console)
    lines = console.export_text().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 60
    assert all(line.startswith(" " * 26) for line in lines[2:-2])
    assert "1 bad" in lines[-1]


def test_markup_in_what_was_found_stays_text() -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    doctor.render([Check("a", doctor.BUCKET, BAD, "[bold]x[/bold] [link=http://e]y[/link]")], console)
    assert "[bold]x[/bold] [link=http://e]y[/link]" in console.export_text()


# -- a finished run


def test_a_run_is_handed_to_the_diagnosis(nothing_of_the_user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = {"wall": START.isoformat(), "boot_id": "b", "boot_s": 0.0}
    ledger = Ledger(Home(nothing_of_the_user).ledger)
    ledger.create_run(
        "q-abc123", name="q", bucket="file:/x", cap_micros=9, deadline_s=None, mark=mark, at=START, data={}
    )
    ledger.close()
    seen: list[tuple[str, bool]] = []
    stub = SimpleNamespace(diagnose_command=lambda ledger, run_id, as_json: seen.append((run_id, as_json)))
    monkeypatch.setitem(sys.modules, "orchestrator.diagnosis", stub)
    kdcloud.main(["doctor", "abc123", "--json"], standalone_mode=False)
    assert seen == [("q-abc123", True)]
