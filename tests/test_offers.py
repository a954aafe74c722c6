"""Which machines can be had, and at what price."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from orchestrator.catalog import GPUS
from orchestrator.config import Config
from orchestrator.errors import UsageError
from orchestrator.offers import TABLE, known_price, offers_for, offers_source
from orchestrator.price_cache import save
from orchestrator.provision import Need, Offer
from orchestrator.testing import fake_offer
from tests.recipes import RENTED, SMALL, recipe

CONFIG = Config(owner="abc123", bucket="file:/b")
LOCAL = recipe(SMALL)
CLOUD = recipe(RENTED)


class Fixed:
    """A provider that knows a list of offers and counts how often it is asked."""

    def __init__(self, *offers: Offer) -> None:
        self.known, self.asked = list(offers), 0

    def offers(self, need: Need) -> list[Offer]:
        self.asked += 1
        return self.known


def test_the_table_is_of_known_cards_and_says_when_and_where_it_was_read() -> None:
    assert len(TABLE) == 22
    for row in TABLE:
        assert row.gpu in GPUS and row.source and row.as_of.tzinfo is not None
        assert row.as_of < datetime(2026, 11, 1, tzinfo=UTC)


def test_a_price_is_of_the_whole_instance_and_exact() -> None:
    found = offers_for(Need(infra=("lambda",), gpus=("H100",)), CLOUD, None, CONFIG)
    assert {(offer.gpus, offer.price_micros_per_hour) for offer in found} == {
        (1, 3_290_000),
        (1, 4_290_000),
        (8, 31_920_000),
    }


def test_a_need_is_answered_with_what_fits_it() -> None:
    found = offers_for(Need(infra=("aws", "runpod"), gpus=("A10G", "RTX3090")), CLOUD, None, CONFIG)
    assert {offer.infra for offer in found} == {"aws", "runpod"}
    assert {offer.gpu for offer in found} == {"A10G", "RTX3090"}
    spot = offers_for(Need(infra=("aws",), gpus=("A10G",), spot=True), CLOUD, None, CONFIG)
    assert [(offer.spot, offer.price_micros_per_hour) for offer in spot] == [(True, 450_700)]
    assert not any(offer.spot for offer in offers_for(Need(infra=("aws",), spot=False), CLOUD, None, CONFIG))
    assert {offer.infra for offer in offers_for(Need(), CLOUD, None, CONFIG)} == {row.infra for row in TABLE}


def test_this_machine_costs_what_the_recipe_says() -> None:
    (offer,) = offers_for(Need(infra=("local",)), LOCAL, None, CONFIG)
    assert (offer.infra, offer.gpu, offer.price_micros_per_hour) == ("local", None, 100_000)
    free = recipe(SMALL.replace("local: {price: 0.10 USD/h}\n", ""))
    assert offers_for(Need(infra=("local",)), free, None, CONFIG)[0].price_micros_per_hour == 0


def test_this_machine_is_no_offer_where_a_gpu_is_asked_for() -> None:
    assert offers_for(Need(infra=("local",), gpus=("A100",)), LOCAL, None, CONFIG) == []


def test_an_unknown_infra_names_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        offers_for(Need(infra=("rnupod",)), CLOUD, None, CONFIG)
    assert "did you mean runpod?" in caught.value.hint


@pytest.mark.parametrize("price", [None, 0, -1, float("nan"), 5.0, True])
def test_a_price_that_is_none_is_unknown_and_never_free(price: Any) -> None:
    offer = replace(fake_offer(), price_micros_per_hour=price)
    assert not known_price(offer)
    (got,) = offers_for(Need(), CLOUD, Fixed(offer), CONFIG)  # type: ignore[arg-type]
    assert got.price_micros_per_hour is None


def test_gcps_placeholder_is_no_price() -> None:
    """SkyPilot's catalogue of GCP holds 700 USD where it knows none; elsewhere that may be one."""
    for infra, price in (("gcp", None), ("aws", 700_000_000)):
        (got,) = offers_for(Need(), CLOUD, Fixed(fake_offer(700_000_000, infra=infra)), CONFIG)  # type: ignore[arg-type]
        assert got.price_micros_per_hour == price


def test_what_is_on_file_comes_before_the_table(tmp_path: Path) -> None:
    """Without an infra in the recipe: those on file, which are the enabled ones. Others are looked up in the table."""
    mine = fake_offer(500_000, infra="aws", gpu="A10G")
    free = replace(mine, price_micros_per_hour=0)
    cache = save(tmp_path, {"aws": [mine, free]}, datetime(2026, 6, 1, tzinfo=UTC))
    found = offers_for(Need(infra=("aws", "lambda"), gpus=("A10G", "A10")), CLOUD, None, CONFIG, cache)
    assert [(one.infra, one.price_micros_per_hour) for one in found] == [
        ("aws", 500_000),
        ("aws", None),
        ("lambda", 1_290_000),
    ]
    assert {one.infra for one in offers_for(Need(), CLOUD, None, CONFIG, cache)} == {"aws"}
    asked = Fixed(fake_offer(1))
    assert offers_for(Need(), CLOUD, asked, CONFIG, cache) == asked.known  # type: ignore[arg-type]


def test_nothing_is_a_price_on_the_own_machine_only() -> None:
    assert known_price(fake_offer(0, infra="local")) and not known_price(fake_offer(0, infra="aws"))


def test_a_provider_is_asked_once_for_each_need() -> None:
    provider = Fixed(fake_offer())
    source = offers_source(CLOUD, provider, CONFIG)  # type: ignore[arg-type]
    assert source(Need(infra=("aws",))) == source(Need(infra=("aws",)))
    source(Need())
    assert provider.asked == 2
