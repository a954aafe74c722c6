"""Prices on file."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from benchmarks import planner as bench
from orchestrator import price_cache
from orchestrator.config import Config
from orchestrator.errors import UsageError
from orchestrator.market import worth_a_look
from orchestrator.offers import GCP_PLACEHOLDER_MICROS, offers_source
from orchestrator.plan import Plan
from orchestrator.planner import make_plan
from orchestrator.provision import Need, Offer
from orchestrator.testing import fake_offer

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
AWS = fake_offer(1_006_000, infra="aws", region="us-east-1", instance="g5.xlarge", gpu="A10G", minimum_s=60)
SPOT = replace(AWS, spot=True, price_micros_per_hour=450_700, ceiling_micros_per_hour=1_006_000)
UNKNOWN = replace(AWS, region="eu-north-1", price_micros_per_hour=None)
LAB = fake_offer(90_000, infra="slurm/lab", instance="1x A100", gpu="A100")


def test_offers_come_back_as_they_were(tmp_path: Path) -> None:
    price_cache.save(tmp_path, {"aws": [AWS, SPOT, UNKNOWN], "slurm/lab": [LAB]}, NOW)
    cache = price_cache.load(tmp_path)
    assert cache is not None and cache.asked_at == NOW
    assert cache.infras["aws"].offers("aws", Need()) == [AWS, SPOT, UNKNOWN]
    assert cache.infras["slurm/lab"].offers("slurm/lab", Need()) == [LAB]


def test_a_need_leaves_what_serves_it(tmp_path: Path) -> None:
    asked = price_cache.save(tmp_path, {"aws": [AWS, SPOT, replace(AWS, gpu="L4")]}, NOW).infras["aws"]
    assert asked.offers("aws", Need(gpus=("A10G",), spot=False)) == [AWS]
    assert asked.offers("aws", Need(spot=True)) == [SPOT]
    assert len(asked.offers("aws", Need())) == 3


def test_an_infra_that_was_not_asked_keeps_its_age(tmp_path: Path) -> None:
    price_cache.save(tmp_path, {"aws": [AWS], "slurm/lab": [LAB]}, NOW)
    price_cache.save(tmp_path, {"aws": [SPOT]}, NOW + timedelta(days=2))
    cache = price_cache.load(tmp_path)
    assert cache is not None
    assert cache.infras["aws"].asked_at == NOW + timedelta(days=2)
    assert cache.infras["aws"].offers("aws", Need()) == [SPOT]
    assert cache.asked_at == cache.infras["slurm/lab"].asked_at == NOW


def test_an_infra_is_found_by_its_name_and_its_places_by_theirs(tmp_path: Path) -> None:
    cache = price_cache.save(tmp_path, {"slurm/lab": [LAB], "slurm/big": [LAB], "aws": [AWS]}, NOW)
    assert set(cache.of("slurm")) == {"slurm/lab", "slurm/big"}
    assert set(cache.of("slurm/lab")) == {"slurm/lab"}
    assert cache.of("aw") == {}


def test_nothing_on_file_is_nothing_and_not_an_error(tmp_path: Path) -> None:
    assert price_cache.load(tmp_path / "none") is None
    (tmp_path / price_cache.FILE).write_text('{"schema": 99, "infras": {}}')
    assert price_cache.load(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1}', '{"schema": 1, "infras": {"aws": {"asked_at": "soon"}}}'])
def test_a_broken_file_says_which_and_what_to_do(tmp_path: Path, text: str) -> None:
    (tmp_path / price_cache.FILE).write_text(text)
    with pytest.raises(UsageError) as caught:
        price_cache.load(tmp_path)
    assert price_cache.FILE in caught.value.message and "--refresh" in caught.value.hint


def test_fifty_thousand_offers_are_read_in_a_moment(tmp_path: Path) -> None:
    """0.15 s for all of them on two old cores; what a recipe's cards leave comes sooner."""
    many = [replace(AWS, region=f"r{i}", gpu=f"G{i % 50}", price_micros_per_hour=i + 1) for i in range(50_000)]
    price_cache.save(tmp_path, {"aws": many}, NOW)
    began = time.perf_counter()
    cache = price_cache.load(tmp_path)
    assert cache is not None
    found: list[Offer] = cache.infras["aws"].offers("aws", Need(gpus=("G1", "G2", "G3")))
    took = time.perf_counter() - began
    assert len(found) == 3000
    assert took < 1.0


def test_of_many_offers_a_plan_reads_those_that_it_may_take_and_makes_the_same_of_them(tmp_path: Path) -> None:
    market = bench.offers(12_000)
    dear = replace(market[0], infra="gcp", price_micros_per_hour=GCP_PLACEHOLDER_MICROS)
    answers: dict[str, list[Offer]] = {}
    for offer in [*market, dear]:
        answers.setdefault(offer.infra, []).append(offer)
    price_cache.save(tmp_path, answers, NOW)
    asked, config = bench.recipe(4), Config(owner="abc123", bucket="s3://bucket/kd")

    def planned(cache: price_cache.PriceCache | None) -> Plan:
        source = offers_source(asked, None, config, cache)
        return make_plan(asked, config=config, offers_for=source, now=NOW)

    few = price_cache.few(tmp_path, worth_a_look)
    assert few is not None and sum(len(one.offers("x", Need())) for one in few.infras.values()) < 6000
    assert planned(few) == planned(price_cache.load(tmp_path))
    assert (tmp_path / price_cache.FEW_FILE).stat().st_mode & 0o077 == 0


def test_the_few_are_read_from_their_own_file_until_prices_are_written_anew(tmp_path: Path) -> None:
    def never(offers: Iterable[Offer]) -> list[Offer]:
        raise AssertionError("they are on file")

    assert price_cache.few(tmp_path, never) is None
    price_cache.save(tmp_path, {"aws": [AWS, UNKNOWN], "slurm/lab": [LAB]}, NOW)
    made = price_cache.few(tmp_path, worth_a_look)
    assert made is not None and made == price_cache.few(tmp_path, never) and list(made.infras) == ["aws", "slurm/lab"]
    price_cache.save(tmp_path, {"aws": [SPOT]}, NOW)
    renewed = price_cache.few(tmp_path, worth_a_look)
    assert renewed is not None and renewed.infras["aws"].offers("aws", Need()) == [SPOT]
    (tmp_path / price_cache.FEW_FILE).write_text("{")
    assert price_cache.few(tmp_path, worth_a_look) == renewed
