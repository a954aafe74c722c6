"""`kdcloud offers`: where prices are from, how old they are, and what is not known."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from orchestrator import offers_cli, price_cache
from orchestrator.cli import kdcloud
from orchestrator.config import Home
from orchestrator.offers import TABLE
from orchestrator.offers_cli import Shown, age, cheapest, look
from orchestrator.provision import Need, Offer, ProvisionError
from orchestrator.testing import fake_offer

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
NORTH = fake_offer(1_200_000, infra="aws", region="eu-north-1", instance="g5.xlarge", gpu="A10G", as_of=NOW)
EAST = replace(NORTH, region="us-east-1", price_micros_per_hour=1_006_000)
EIGHT = replace(NORTH, infra="lambda", instance="8x", gpu="H100", gpus=8, price_micros_per_hour=31_920_000)
NEVER = replace(NORTH, instance="g9", price_micros_per_hour=None)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("KDCLOUD_HOME", str(tmp_path))
    monkeypatch.delenv("KDCLOUD_PROVIDER", raising=False)
    return Home(tmp_path)


def run(*words: str) -> Result:
    return CliRunner().invoke(kdcloud, ["offers", *words], catch_exceptions=False)


def keep(home: Home, *offers: Offer, asked_at: datetime = NOW) -> None:
    answers: dict[str, list[Offer]] = {}
    for offer in offers:
        answers.setdefault(offer.infra, []).append(offer)
    price_cache.save(home.offers_cache, answers, asked_at)


def test_without_anything_on_file_the_dated_table_is_shown_and_says_so(home: Home) -> None:
    told = run("--gpu", "A10G").stdout
    assert "from the table in this version of kdcloud" in told and "--refresh" in told
    document = json.loads(run("--json").stdout)
    assert document["source"] == "table" and document["schema"] == 1
    assert len(document["offers"]) == len(TABLE) + sum(row.spot_usd is not None for row in TABLE)
    assert document["read_at"] == min(row.as_of for row in TABLE).isoformat()


def test_what_is_on_file_is_shown_with_its_true_age(home: Home) -> None:
    keep(home, NORTH, EAST, EIGHT, asked_at=datetime.now(UTC) - timedelta(days=3))
    document = json.loads(run("--json").stdout)
    assert document["source"] == "file" and document["age_s"] == pytest.approx(3 * 86400, abs=60)
    assert [one["price_micros_per_hour"] for one in document["offers"]] == [1_006_000, 1_200_000, 31_920_000]
    assert document["rate"]["as_of"] == "2026-01-15"
    assert "asked 3.0 d ago" in " ".join(run().stdout.split())


def test_the_cheapest_region_stands_for_a_machine_and_unknown_prices_come_last() -> None:
    """31.92 for eight cards is 3.99 a card."""
    assert cheapest([EIGHT, NEVER, NORTH, EAST]) == [EAST, EIGHT, NEVER]


def test_an_unknown_price_is_not_found_and_null(home: Home) -> None:
    keep(home, NEVER)
    assert "not found" in run().stdout
    assert json.loads(run("--json").stdout)["offers"][0]["price_micros_per_hour"] is None


def test_only_what_is_asked_for_is_shown(home: Home) -> None:
    keep(home, NORTH, replace(EAST, spot=True), EIGHT)

    def found(*words: str) -> list[tuple[str, bool]]:
        return [(one["gpu"], one["spot"]) for one in json.loads(run("--json", *words).stdout)["offers"]]

    assert found("--gpu", "H100") == [("H100", False)]
    assert found("--spot") == [("A10G", True)]
    assert found("--on-demand", "--infra", "aws") == [("A10G", False)]


def test_an_infra_that_was_never_asked_is_named(home: Home) -> None:
    keep(home, NORTH)
    done = CliRunner().invoke(kdcloud, ["offers", "--infra", "gcp"])
    assert done.exit_code != 0 and "no prices of gcp" in str(done.exception)


class Market:
    """Stands in for what asks SkyPilot."""

    def __init__(self, *offers: Offer) -> None:
        self.known = offers

    def __call__(self, home: Home, infra: tuple[str, ...] = ()) -> tuple[dict[str, list[Offer]], tuple[str, ...]]:
        return {"aws": [one for one in self.known if one.infra == "aws"]}, ("lambda gave no prices: it sleeps",)


def test_refreshing_keeps_what_was_told_and_says_who_did_not(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(home, NORTH, EIGHT, asked_at=NOW - timedelta(days=9))
    monkeypatch.setattr(offers_cli, "ask", Market(EAST))
    shown = look(home, Need(), refresh=True, now=NOW)
    assert shown.source == "file" and shown.failures == ("lambda gave no prices: it sleeps",)
    assert set(shown.offers) == {EAST, EIGHT}
    assert shown.read_at == NOW - timedelta(days=9)  # the oldest of the answers shown
    assert look(home, Need(infra=("aws",)), refresh=False, now=NOW).read_at == NOW


def test_without_skypilot_it_says_so_and_shows_what_it_has(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: object) -> list[str]:
        raise ProvisionError("SkyPilot is not installed", hint="install it")

    monkeypatch.setattr("orchestrator.provision_sky.SkyApi.enabled", missing)
    done = run("--refresh")
    assert done.exit_code == 0
    assert "no prices were asked: SkyPilot is not installed" in done.stderr
    assert "from the table" in done.stdout


def test_every_enabled_infra_is_asked_by_itself(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """One without an answer leaves the others; a price of 0 is unknown; a cloud that ends no machine is not asked."""

    def offers(self: object, need: Need) -> list[Offer]:
        if need.infra == ("lambda",):
            raise ProvisionError("it sleeps")
        return [replace(NORTH, infra=need.infra[0], price_micros_per_hour=0), replace(EAST, infra=need.infra[0])]

    monkeypatch.setattr("orchestrator.provision_sky.SkyApi.enabled", lambda self: ["aws", "lambda", "gcp", "verda"])
    monkeypatch.setattr("orchestrator.provision_sky.SkyProvisioner.offers", offers)
    answers, failures = offers_cli.ask(home)
    assert set(answers) == {"aws", "gcp"} and failures == ("lambda gave no prices: it sleeps",)
    assert [one.price_micros_per_hour for one in answers["aws"]] == [None, 1_006_000]


def test_another_provider_is_asked_where_one_is_set(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLOUD_PROVIDER", "tests.providers:dear")
    document = json.loads(run("--refresh", "--json").stdout)
    assert document["source"] == "asked"
    assert [one["infra"] for one in document["offers"]] == ["local"]


def test_an_age_is_told_in_one_sentence() -> None:
    old = NOW - timedelta(hours=30)
    assert age(Shown("asked", NOW, (replace(NORTH, as_of=old),)), NOW).startswith("asked just now; the oldest")
    assert "30 h" in age(Shown("file", old, (NORTH,)), NOW)
    assert age(Shown("table", None, ()), NOW) == "no such machine is on offer"
