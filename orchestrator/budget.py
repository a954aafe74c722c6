"""What may all runs of this computer cost together in a calendar month, and what is left of it?"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from orchestrator import money
from orchestrator.config import Config
from orchestrator.ledger import Ledger, Month

SCHEMA = 1


def month_cap_micros(config: Config) -> int | None:
    """The cap of a month at the exchange rate set now, rounded down; None where there is none."""
    return None if config.monthly_cap is None else money.cap_micros(config.monthly_cap, config.rate)


def build_budget(month: Month, config: Config) -> dict[str, Any]:
    """The document of `kdcloud budget --json`. Money is integer micro-USD; null: no cap."""
    cap = month_cap_micros(config)
    return {
        "schema": SCHEMA,
        "month": month.name,
        "currency": config.currency,
        "cap": None if config.monthly_cap is None else str(config.monthly_cap),
        "cap_micros": cap,
        "spent_micros": month.spent_micros,
        "api_micros": month.api_micros,
        "open_micros": month.open_micros,
        "left_micros": None if cap is None else month.left_micros(cap),
        "usd_to_cny": str(config.rate.usd_to_cny),
    }


def describe(document: dict[str, Any], config: Config) -> str:
    """The same in words."""

    def both(micros: int) -> str:
        return money.both(micros, config.rate, config.currency)

    used = f"{document['month']} (UTC): spent {both(document['spent_micros'])}"
    if document["api_micros"]:
        used += f", {both(document['api_micros'])} of it on APIs"
    if document["open_micros"]:
        used += f", reserved and not settled {both(document['open_micros'])}"
    if document["cap_micros"] is None:
        return f"{used}; no cap for a month is set"
    return f"{used}; left {both(document['left_micros'])} of {both(document['cap_micros'])}"


def shortage(ledger: Ledger, config: Config, cap_micros: int, at: datetime) -> str:
    """What to say when the rest of the month is below the cap of a run; nothing when it is not."""
    cap = month_cap_micros(config)
    if cap is None or (left := ledger.month(at).left_micros(cap)) >= cap_micros:
        return ""
    rest, whole = (money.both(micros, config.rate, config.currency) for micros in (left, cap_micros))
    return f"this month's budget has {rest} left, less than the run's cap of {whole}: the run ends when it is used up"
