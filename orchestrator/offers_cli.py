"""Machines and their prices for people: `kdcloud offers`. What needs SkyPilot is loaded only with --refresh."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from orchestrator import completion
from orchestrator.errors import UsageError
from orchestrator.plain import json_text

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.config import Config, Home
    from orchestrator.price_cache import PriceCache
    from orchestrator.provision import Need, Offer

SCHEMA = 1
SHOWN = 40
WIDE = 100  # columns: regions are shown


@dataclass(frozen=True)
class Shown:
    """What there is to print: where it is from (asked | file | table), when that was read, and why it is not newer."""

    source: str
    read_at: datetime | None
    offers: tuple[Offer, ...]
    failures: tuple[str, ...] = ()
    was_asked: bool = True  # False: somebody was to be asked, and nobody answered


@click.command(short_help="Machines and their prices; --refresh asks for today's.")
@click.option("--refresh", is_flag=True, help="Ask SkyPilot what every enabled infra offers now, and keep it.")
@click.option("--infra", metavar="WHERE", help="Only of this infra, like runpod or slurm/CLUSTER.")
@click.option("--gpu", metavar="CARD", help="Only with this card, like A10G.", shell_complete=completion.cards)
@click.option("--spot/--on-demand", default=None, help="Only spot machines, or only others.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout: every region and price.")
def offers(refresh: bool, infra: str | None, gpu: str | None, spot: bool | None, as_json: bool) -> None:
    """Which machines can be had, and at what price: the cheapest region of each, with the age of the prices.

    \b
    kdcloud offers --refresh
    kdcloud offers --gpu A10G --spot
    """
    from rich.console import Console

    from orchestrator.config import Home, load_config
    from orchestrator.offers import card_named
    from orchestrator.provision import Need

    home = Home.from_env()
    config = load_config(home)
    need = Need(infra=(infra,) if infra else (), spot=spot)
    if gpu:
        need = replace(need, gpus=(card_named(gpu, cards_on_file(home)),))
    now = datetime.now(UTC)
    shown = look(home, need, refresh=refresh, now=now)
    if shown.was_asked:
        for failure in shown.failures:
            click.echo(failure, err=True)
    if as_json:
        click.echo(json_text(to_json(shown, config, now), indent=1))
    else:
        render(shown, config, now, Console(highlight=False))
    if not shown.was_asked:
        before = "the table in this version of kdcloud" if shown.source == "table" else "what was asked before"
        raise UsageError("; ".join(shown.failures), hint=f"mend that, and ask again; what is shown is {before}")


def look(home: Home, need: Need, *, refresh: bool, now: datetime) -> Shown:
    """What `need` can have: asked now, else what is on file, else the package's dated table. Raises UsageError."""
    from orchestrator import offers as market
    from orchestrator import price_cache

    answers: dict[str, list[Offer]] = {}
    failures: tuple[str, ...] = ()
    if refresh:
        answers, failures = ask(home, need.infra)
        if answers:
            price_cache.save(home.offers_cache, answers, now)
    was_asked = not refresh or bool(answers)
    cache = price_cache.load(home.offers_cache)
    if cache is not None and cache.infras:
        found_there = _on_file(cache, need, "asked" if refresh and not failures else "file", failures)
        return replace(found_there, was_asked=was_asked)
    found = market.table_offers(need)
    return Shown("table", min((one.as_of for one in found), default=None), tuple(found), failures, was_asked)


def cards_on_file(home: Home) -> set[str]:
    """Cards that providers told of, which the catalogue may not know."""
    from orchestrator import price_cache
    from orchestrator.provision import Need

    cache = price_cache.load(home.offers_cache)
    asked = {} if cache is None else cache.infras
    return {one.gpu for name, answers in asked.items() for one in answers.offers(name, Need()) if one.gpu}


def ask(home: Home, infra: tuple[str, ...] = ()) -> tuple[dict[str, list[Offer]], tuple[str, ...]]:
    """(offers by infra, who gave none and why): of the named infras, or of all that are enabled."""
    from orchestrator.provision import Need, ProvisionError
    from orchestrator.session import named_provider

    named = os.environ.get("KDCLOUD_PROVIDER")
    answers: dict[str, list[Offer]] = {}
    try:
        if named:
            return _by_infra(named_provider(named).offers(Need(infra=infra))), ()
        from orchestrator.provision_sky import NO_AUTODOWN, SkyApi, SkyProvisioner

        names = infra or tuple(SkyApi(home.root / "sky").enabled())
    except ProvisionError as error:
        return {}, (f"no prices were asked: {error.message} ({error.hint})",)
    failures = [] if names else ["no prices were asked: SkyPilot has no infra enabled (`sky check` says why)"]
    for name in names:
        if name in NO_AUTODOWN or name == "local":
            continue
        try:
            answers.update(_by_infra(SkyProvisioner(home.root).offers(Need(infra=(name,)))))
        except ProvisionError as error:
            failures.append(f"{name} gave no prices: {error.message}")
    return answers, tuple(failures)


def _by_infra(found: Iterable[Offer]) -> dict[str, list[Offer]]:
    from orchestrator.offers import checked

    answers: dict[str, list[Offer]] = {}
    for offer in found:
        answers.setdefault(offer.infra, []).append(checked(offer))
    return answers


def _on_file(cache: PriceCache, need: Need, source: str, failures: tuple[str, ...]) -> Shown:
    wanted = need.infra or tuple(cache.infras)
    asked = {name: one for infra in wanted for name, one in cache.of(infra).items()}
    if need.infra and not asked:
        raise UsageError(
            f"no prices of {need.infra[0]} are on file, only those of {', '.join(sorted(cache.infras))}",
            hint=f"`kdcloud offers --refresh --infra {need.infra[0]}` asks for them",
        )
    plain = replace(need, infra=())
    found = [offer for name, one in asked.items() for offer in one.offers(name, plain)]
    return Shown(source, min((one.asked_at for one in asked.values()), default=None), tuple(found), failures)


# --- for programs and for people


def to_json(shown: Shown, config: Config, now: datetime) -> dict[str, Any]:
    """The document of `kdcloud offers --json`: micro-USD of a whole machine and hour; an unknown price is null."""
    age_s = None if shown.read_at is None else (now - shown.read_at).total_seconds()
    return {
        "schema": SCHEMA,
        "source": shown.source,
        "read_at": None if shown.read_at is None else shown.read_at.isoformat(),
        "age_s": age_s,
        "rate": {"usd_to_cny": float(config.rate.usd_to_cny), "as_of": config.rate.as_of.isoformat()},
        "failures": list(shown.failures),
        "offers": [
            {
                "infra": one.infra,
                "region": one.region,
                "instance": one.instance,
                "gpu": one.gpu,
                "gpus": one.gpus,
                "vram_gib": one.vram_gib,
                "spot": one.spot,
                "price_micros_per_hour": one.price_micros_per_hour,
                "as_of": one.as_of.isoformat(),
                "source": one.source,
            }
            for one in sorted(shown.offers, key=_order)
        ],
    }


def render(shown: Shown, config: Config, now: datetime, console: Console) -> None:
    """The cheapest region of each machine, cheapest card first, and how old the prices are."""
    from rich import box
    from rich.table import Table

    from orchestrator.money import shown as amount

    rows = cheapest(shown.offers)
    wide = console.width >= WIDE
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for name in ("GPU", "", "infra", "machine", *(("region",) if wide else ())):
        table.add_column(name, no_wrap=name != "machine", overflow="fold")
    for name in ("GiB", "price/h", "a card"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in rows[:SHOWN]:
        price = one.price_micros_per_hour
        table.add_row(
            f"{one.gpus}x {one.gpu}" if one.gpus > 1 else str(one.gpu or "none"),
            "spot" if one.spot else "",
            one.infra,
            one.instance,
            *((one.region or "",) if wide else ()),
            f"{one.vram_gib:.1f}",
            "not found" if price is None else amount(price, config.rate, config.currency),
            "" if price is None else amount(price // max(1, one.gpus), config.rate, config.currency),
        )
    if rows:
        console.print(table)
    if len(rows) > SHOWN:
        console.print(f"{len(rows) - SHOWN} more: --gpu, --infra and --json show them")
    if rows:
        regions = "" if wide else "; regions: --json, or 100 columns"
        console.print(f"GiB of one card; each machine in its cheapest region{regions}", style="dim")
    console.print(age(shown, now))
    console.print(f"1 USD = {config.rate.usd_to_cny} CNY as of {config.rate.as_of}")


def age(shown: Shown, now: datetime) -> str:
    """Where the prices are from and how old they are, one sentence."""
    from orchestrator.money import human_age

    if shown.read_at is None:
        return "no such machine is on offer; `kdcloud offers` shows all, `--refresh` asks for more (needs SkyPilot)"
    old = human_age((now - shown.read_at).total_seconds())
    if shown.source == "table":
        newest = human_age((now - max(one.as_of for one in shown.offers)).total_seconds())
        ages = old if newest == old else f"{newest} to {old}"
        return (
            f"prices from the table in this version of kdcloud, {ages} old: nobody was asked; "
            "`kdcloud offers --refresh` asks (needs SkyPilot)"
        )
    priced = min((one.as_of for one in shown.offers), default=shown.read_at)
    written = human_age((now - priced).total_seconds())
    if shown.source == "asked":
        return f"asked just now; the oldest of these prices was written {written} ago"
    return f"asked {old} ago, the oldest of these prices written {written} ago; `kdcloud offers --refresh` asks again"


def cheapest(found: Iterable[Offer]) -> list[Offer]:
    """Of each machine its cheapest region, by price a card; unknown prices last."""
    best: dict[tuple[Any, ...], Offer] = {}
    for one in sorted(found, key=_order):
        best.setdefault((one.infra, one.instance, one.gpu, one.gpus, one.spot), one)
    return sorted(best.values(), key=_order)


def _order(offer: Offer) -> tuple[Any, ...]:
    price = offer.price_micros_per_hour
    each = float("inf") if price is None else price / max(1, offer.gpus)
    return (each, offer.infra, offer.instance, offer.region or "", offer.spot)
