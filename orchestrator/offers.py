"""Which machines can be had, and at what price? The provider's own offers, those on file, this machine, a dated table.

The table is a fallback that shows its age: prices are of the whole instance, an hour, on demand unless marked spot.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from orchestrator.catalog import GPUS
from orchestrator.config import Config
from orchestrator.errors import UsageError
from orchestrator.gpus import gpu_named
from orchestrator.money import price_micros
from orchestrator.price_cache import PriceCache
from orchestrator.provision import Latencies, Need, Offer, Provisioner
from orchestrator.recipe import Recipe

_V8 = "SkyPilot's public catalogue files, schema v8 (late 2025 to 2026)"
_V8_DATE = datetime(2025, 12, 1, tzinfo=UTC)  # the files carry no day: the earliest they may be from


@dataclass(frozen=True)
class Row:
    """One price on record; None = not offered."""

    infra: str
    region: str | None
    instance: str
    gpu: str
    gpus: int
    usd: str | None
    spot_usd: str | None = None
    as_of: datetime = _V8_DATE
    source: str = _V8


_V5 = {"as_of": datetime(2024, 1, 1, tzinfo=UTC), "source": "SkyPilot's public catalogue files, schema v5 (early 2024)"}
TABLE = (
    Row("runpod", None, "1x RTX 3090 secure", "RTX3090", 1, "0.50"),
    Row("runpod", None, "1x RTX 3090 community", "RTX3090", 1, "0.34", "0.19", **_V5),  # type: ignore[arg-type]
    Row("vast", None, "2x RTX 3090", "RTX3090", 2, "0.33"),
    Row("aws", "us-east-1", "g5.xlarge", "A10G", 1, "1.006", "0.4507"),
    Row(
        "aws",
        None,
        "g5.2xlarge",
        "A10G",
        1,
        "1.212",
        as_of=datetime(2024, 1, 1, tzinfo=UTC),
        source="price list read 2024-01",
    ),
    Row(
        "aws",
        None,
        "g5.12xlarge",
        "A10G",
        4,
        "5.67",
        as_of=datetime(2024, 4, 1, tzinfo=UTC),
        source="price list read 2024-04",
    ),
    Row("lambda", None, "gpu_1x_a10", "A10", 1, "1.29"),
    Row("aws", "us-east-1", "g6.2xlarge", "L4", 1, "0.9776", "0.5772"),
    Row("vast", None, "1x A100 40 GB", "A100", 1, "0.76"),
    Row("vast", None, "1x A100 80 GB PCIe", "A100-80GB", 1, "0.87"),
    Row("runpod", None, "1x A100 80 GB secure", "A100-80GB", 1, "1.39"),
    Row("runpod", None, "2x A100 80 GB secure", "A100-80GB", 2, "2.78"),
    Row("lambda", None, "gpu_1x_a6000", "A6000", 1, "1.09"),
    Row("lambda", None, "gpu_2x_a6000", "A6000", 2, "2.18"),
    Row("lambda", None, "gpu_4x_a6000", "A6000", 4, "4.36"),
    Row("lambda", None, "gpu_8x_a100_80gb_sxm4", "A100-80GB", 8, "22.32"),
    Row("vast", None, "1x H100 SXM", "H100", 1, "1.87"),
    Row("lambda", None, "gpu_1x_h100_pcie", "H100", 1, "3.29"),
    Row("lambda", None, "gpu_1x_h100_sxm5", "H100", 1, "4.29"),
    Row("lambda", None, "gpu_8x_h100_sxm5", "H100", 8, "31.92"),
    Row("lambda", None, "gpu_8x_v100", "V100", 8, "6.32"),
    Row("vast", None, "8x V100", "V100", 8, "0.85"),
)

# Worst-case seconds from a decision to the end of billing. Handover: what is billed before the supervisor counts.
# Unguarded: a reaper that looks every 5 minutes, its grace of 2, and the calls and delays of its teardown.
CLOUD_LATENCIES = Latencies(
    tick_s=5, flush_s=120, api_s=60, provision_s=90, handover_s=60, slack_s=90, unguarded_s=570
)
MINIMUM_S = {"aws": 60}
GCP_PLACEHOLDER_MICROS = 700_000_000


def offers_for(
    need: Need, recipe: Recipe, provider: Provisioner | None, config: Config, cache: PriceCache | None = None
) -> list[Offer]:
    """Everything that could serve `need`: asked from `provider` when there is one, else this machine, what is on file
    and, for infras that it does not know, the table.

    Raises UsageError for an infra that nobody here knows.
    """
    if provider is not None:
        return [checked(offer) for offer in provider.offers(need)]
    all_of_them = tuple(cache.infras) if cache is not None and cache.infras else table_infras()
    return [offer for one in need.infra or all_of_them for offer in _of_infra(one, need, recipe, config, cache)]


def offers_source(
    recipe: Recipe, provider: Provisioner | None, config: Config, cache: PriceCache | None = None
) -> Callable[[Need], list[Offer]]:
    """`offers_for` of one recipe, each need asked once."""
    known: dict[Need, list[Offer]] = {}

    def source(need: Need) -> list[Offer]:
        if need not in known:
            known[need] = offers_for(need, recipe, provider, config, cache)
        return known[need]

    return source


def known_price(offer: Offer) -> bool:
    """Whether the offer may be launched at all: a price is a whole number above 0; 0 is one on this machine only."""
    price = offer.price_micros_per_hour
    return type(price) is int and (price > 0 or (price == 0 and offer.infra == "local"))


def card_named(text: str, others: Iterable[str] = ()) -> str:
    """The name that offers have of a card, however it was typed: one of the catalogue, or of `others`.

    Raises UsageError, which lists what is known.
    """
    names = {name.upper(): name for name in (*GPUS, *others)}
    found = gpu_named(text)
    if text.strip().upper() in names or found is not None:
        return names.get(text.strip().upper()) or (found.name if found is not None else text)
    close = difflib.get_close_matches(text.strip().upper(), names, n=1)
    nearest = f"did you mean {names[close[0]]}? " if close else ""
    raise UsageError(f"unknown GPU {text!r}", hint=f"{nearest}known are {', '.join(sorted(names.values()))}")


def table_infras() -> tuple[str, ...]:
    return tuple(dict.fromkeys(row.infra for row in TABLE))


def table_offers(need: Need) -> list[Offer]:
    """The dated table of the package, as far as it serves `need`."""
    infras = [name.partition("/")[0] for name in need.infra]
    rows = [row for row in TABLE if not infras or row.infra in infras]
    return [offer for row in rows for offer in _of_row(row, need)]


def _of_infra(infra: str, need: Need, recipe: Recipe, config: Config, cache: PriceCache | None) -> list[Offer]:
    if infra == "local":
        if need.gpus:
            return []
        from orchestrator.provision_local import local_offer

        price = price_micros(recipe.local.price, config.rate) if recipe.local is not None else 0
        return [local_offer(price)]
    answers = cache.of(infra) if cache is not None else {}
    if answers:
        return [checked(offer) for one, asked in answers.items() for offer in asked.offers(one, need)]
    name = infra.partition("/")[0]
    names = set(table_infras())
    if name in ("slurm", "kubernetes", "k8s", "ssh"):
        return []  # priced by their own provider only
    if name not in names:
        close = difflib.get_close_matches(name, [*names, "local"], n=1, cutoff=0.5)
        nearest = f"did you mean {close[0]}? " if close else ""
        raise UsageError(
            f"no prices are known for infra {infra!r}",
            hint=f"{nearest}the table in this version knows {', '.join(sorted(names))} and local",
        )
    return table_offers(replace(need, infra=(name,)))


def _of_row(row: Row, need: Need) -> list[Offer]:
    if need.gpus and row.gpu not in need.gpus:
        return []
    on_demand = Offer(
        infra=row.infra,
        region=row.region,
        instance=row.instance,
        gpu=row.gpu,
        gpus=row.gpus,
        vram_gib=GPUS[row.gpu].vram_gib.value,
        spot=False,
        price_micros_per_hour=_micros(row.usd),
        as_of=row.as_of,
        source=row.source,
        minimum_s=MINIMUM_S.get(row.infra, 0),
        latencies=CLOUD_LATENCIES,
    )
    spot = replace(
        on_demand, spot=True, price_micros_per_hour=_micros(row.spot_usd), ceiling_micros_per_hour=_micros(row.usd)
    )
    if need.spot is True:
        return [spot] if row.spot_usd is not None else []
    return [on_demand] if need.spot is False or row.spot_usd is None else [on_demand, spot]


def _micros(usd: str | None) -> int | None:
    """A table price in micro-USD, exactly."""
    from decimal import Decimal

    return None if usd is None else int(Decimal(usd) * 1_000_000)


def checked(offer: Offer) -> Offer:
    """A provider's price that is no whole number above 0 (NaN, a float, 0 off this machine) is unknown, and so is the
    700 USD that SkyPilot's catalogue of GCP holds in place of a price."""
    placeholder = offer.infra == "gcp" and offer.price_micros_per_hour == GCP_PLACEHOLDER_MICROS
    return offer if known_price(offer) and not placeholder else replace(offer, price_micros_per_hour=None)
