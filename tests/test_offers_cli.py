"""`kdcloud offers`: where prices are from, how old they are, and what is not known."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from orchestrator import offers_cli, price_cache
from orchestrator.cli import kdcloud
from orchestrator.config import Home, load_config
from orchestrator.errors import UsageError
from orchestrator.money import human_age
from orchestrator.offers import TABLE
from orchestrator.offers_cli import Shown, age, cheapest, look, render
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
    assert "from the table in this version of kdcloud" in " ".join(told.split()) and "--refresh" in told
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
    assert "asked 3 d ago" in " ".join(run().stdout.split())


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


def test_when_nobody_could_be_asked_that_is_an_error_and_what_was_known_is_shown(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(self: object) -> list[str]:
        raise ProvisionError("SkyPilot is not installed", hint="install it")

    monkeypatch.setattr("orchestrator.provision_sky.SkyApi.enabled", missing)
    for before, words in ((False, "from the table"), (True, "asked")):
        if before:
            keep(home, NORTH)
        done = CliRunner().invoke(kdcloud, ["offers", "--refresh"])
        assert isinstance(done.exception, UsageError) and done.exception.exit_code == 2
        assert "no prices were asked: SkyPilot is not installed (install it)" in done.exception.message
        assert done.exception.hint.endswith(
            "what was asked before" if before else "the table in this version of kdcloud"
        )
        assert words in done.stdout and "g5.xlarge" in done.stdout


def test_where_no_infra_is_enabled_nobody_was_asked(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.provision_sky.SkyApi.enabled", lambda self: [])
    done = CliRunner().invoke(kdcloud, ["offers", "--refresh"])
    assert isinstance(done.exception, UsageError) and "sky check" in done.exception.message


def test_an_unknown_card_is_refused_with_those_that_are_known(home: Home) -> None:
    keep(home, NORTH, replace(NORTH, gpu="MI300X"))
    done = CliRunner().invoke(kdcloud, ["offers", "--gpu", "RTX9090"])
    assert isinstance(done.exception, UsageError) and "RTX9090" in done.exception.message
    for card in ("did you mean RTX4090", "A100-80GB", "MI300X"):
        assert card in done.exception.hint
    assert "a10g" not in run("--gpu", "mi300x").stdout and "MI300X" in run("--gpu", "mi300x").stdout
    assert "A10G" in run("--gpu", "nvidia a10g").stdout


@pytest.mark.parametrize("width", [80, 120])
def test_a_machine_keeps_its_name_in_one_piece(home: Home, width: int) -> None:
    """The longest of the table is gpu_8x_a100_80gb_sxm4; the table takes no line that is longer than the terminal."""
    console = Console(width=width, record=True, file=io.StringIO())
    shown = look(home, Need(), refresh=False, now=NOW)
    render(shown, load_config(home), NOW, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert [row.instance for row in TABLE if f" {row.instance} " not in text] == []
    assert ("us-east-1" in text) == (width == 120)


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
    assert age(Shown("table", None, ()), NOW).startswith("no such machine is on offer; ")
    years = NOW - timedelta(days=1062)
    table = Shown("table", years, (replace(NORTH, as_of=years), replace(NORTH, as_of=NOW - timedelta(days=360))))
    assert "kdcloud, 12 months to 2.9 years old: nobody was asked" in age(table, NOW)


@pytest.mark.parametrize(
    ("days", "told"),
    [(0.5, "12 h"), (12, "12 d"), (59.4, "59 d"), (180, "6 months"), (365, "12 months"), (1062.8, "2.9 years")],
)
def test_an_age_is_in_units_that_people_count_in(days: float, told: str) -> None:
    assert human_age(days * 86_400) == told
