"""How much, in which currency, for how long? Amounts and durations as people write them; inside, integer micro-USD.

Decimal and int only: no float ever holds money. A cap is rounded down and a cost up, so rounding never spends.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from datetime import date
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_UP, Decimal

MICROS = 1_000_000
CURRENCIES = ("CNY", "USD")

_SPELLINGS = {
    "CNY": "CNY",
    "RMB": "CNY",
    "YUAN": "CNY",
    "¥": "CNY",
    "￥": "CNY",
    "元": "CNY",
    "块": "CNY",
    "USD": "USD",
    "$": "USD",
    "US$": "USD",
    "DOLLAR": "USD",
    "DOLLARS": "USD",
}
_NUMBER = r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[+-]?\.\d+"
_WORD = r"[^\d\s.,+/-][^\d\s.,+/]*"
_AMOUNT = re.compile(
    rf"^\s*(?P<before>{_WORD})?\s*(?P<number>{_NUMBER})\s*(?P<after>{_WORD})?\s*(?P<hourly>/\s*(?:h|hr|hour))?\s*$"
)
_PART = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([a-z]+)\s*")
_SECONDS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), 86400),
}


@dataclass(frozen=True)
class Amount:
    """So much money in the currency it was written in; `hourly` for a price an hour."""

    value: Decimal
    currency: str
    hourly: bool = False

    def __str__(self) -> str:
        return f"{plain(self.value)} {self.currency}{'/h' if self.hourly else ''}"


@dataclass(frozen=True)
class Rate:
    """What one USD costs in CNY. Frozen into a plan when it is approved."""

    usd_to_cny: Decimal
    as_of: date


def parse_amount(text: object) -> Amount:
    """The amount in `50 CNY`, `50CNY`, `$7`, `¥50`, `7 USD`, `0.10 USD/h`. Raises ValueError in one sentence."""
    if isinstance(text, bool) or not isinstance(text, (str, int, float, Decimal)):
        raise ValueError("an amount is written like 50 CNY or $7")
    match = _AMOUNT.match(str(text))
    if match is None:
        raise ValueError(f"{text!r} is not an amount; write it like 50 CNY or $7")
    before, after = match["before"], match["after"]
    if before and after and _currency(before) != _currency(after):
        raise ValueError(f"{text!r} names two currencies")
    word = before or after
    if word is None:
        raise ValueError(f"{text!r} names no currency; write {match['number']} CNY or {match['number']} USD")
    return Amount(Decimal(match["number"].replace(",", "")), _currency(word), match["hourly"] is not None)


def parse_budget(text: object) -> Amount:
    """The amount in `text`, above 0 and not an hour's price. Raises ValueError in one sentence."""
    amount = parse_amount(text)
    if amount.hourly:
        raise ValueError(f"{text!r} is a price an hour; a budget is an amount, like 50 CNY")
    if amount.value <= 0:
        raise ValueError(f"must be above 0, not {amount}")
    return amount


def parse_duration(text: object) -> float:
    """Seconds in `8h`, `60min`, `90s`, `1h30m`, `1.5 h`. Raises ValueError in one sentence."""
    if not isinstance(text, str):
        raise ValueError(f"{text!r} has no unit; a duration is written like 8h, 60min or 90s")
    body = text.strip().lower()
    total, end = Decimal(0), 0
    for part in _PART.finditer(body):
        if part.start() != end:
            break
        if part[2] not in _SECONDS:
            raise ValueError(f"{text!r} has an unknown unit {part[2]!r}; units are s, min, h and d")
        total += Decimal(part[1]) * _SECONDS[part[2]]
        end = part.end()
    if not body or end != len(body):
        raise ValueError(f"{text!r} is not a duration; write it like 8h, 60min, 90s or 1h30m")
    return float(total)


def cap_micros(amount: Amount, rate: Rate) -> int:
    """The amount in micro-USD, rounded down: a cap is never raised by rounding."""
    return int(_micros(amount, rate).to_integral_value(ROUND_FLOOR))


def price_micros(amount: Amount, rate: Rate) -> int:
    """The amount in micro-USD, rounded up: a price is never lowered by rounding."""
    return int(_micros(amount, rate).to_integral_value(ROUND_CEILING))


def usd(micros: int) -> str:
    """`$7.04`; tiny amounts keep two digits that say something: `$0.00052`."""
    return _signed("$", Decimal(micros) / MICROS)


def cny(micros: int, rate: Rate) -> str:
    """`¥50.00`, at the plan's rate."""
    return _signed("¥", Decimal(micros) / MICROS * rate.usd_to_cny)


def both(micros: int, rate: Rate, currency: str = "CNY") -> str:
    """`¥50.00 ($7.04)`, the display currency first."""
    first, second = cny(micros, rate), usd(micros)
    return f"{first} ({second})" if currency == "CNY" else f"{second} ({first})"


def shown(micros: int, rate: Rate, currency: str) -> str:
    """The amount in the display currency alone."""
    return cny(micros, rate) if currency == "CNY" else usd(micros)


def budget_for(micros: int, rate: Rate, currency: str) -> str:
    """The smallest round amount that is at least `micros`, as --budget takes it: two digits, more for tiny amounts."""
    value = Decimal(micros) / MICROS * (rate.usd_to_cny if currency == "CNY" else 1)
    places = 2 if value >= Decimal("0.1") else 1 - min(0, value.adjusted())
    return f"{value.quantize(Decimal(1).scaleb(-places), ROUND_CEILING):f}{currency}"


def human_seconds(seconds: float) -> str:
    """`0.4 s`, `48 s`, `3.5 min`, `1.2 h`, `3.5 d`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 59.5 * 60:
        minutes = seconds / 60
        return f"{minutes:.1f} min" if minutes < 9.95 else f"{minutes:.0f} min"
    hours = seconds / 3600
    if hours < 72:
        return f"{hours:.1f} h" if hours < 9.95 else f"{hours:.0f} h"
    return f"{hours / 24:.1f} d"


def human_age(seconds: float) -> str:
    """`12 s`, `3.5 h`, `12 d`, `8 months`, `2.9 years`: how old prices are."""
    days = seconds / 86_400
    if days < 60:
        return human_seconds(max(0.0, seconds)) if days < 3 else f"{days:.0f} d"
    return f"{days / 30.44:.0f} months" if days < 700 else f"{days / 365.25:.1f} years"


def plain(value: Decimal) -> str:
    """The number without exponent and without needless zeros."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _currency(word: str) -> str:
    found = _SPELLINGS.get(word.upper())
    if found is not None:
        return found
    close = difflib.get_close_matches(word.upper(), _SPELLINGS, n=1)
    nearest = f"; did you mean {_SPELLINGS[close[0]]}?" if close else ""
    raise ValueError(f"unknown currency {word!r}: kdcloud counts in {' and '.join(CURRENCIES)}{nearest}")


def _micros(amount: Amount, rate: Rate) -> Decimal:
    usd_value = amount.value if amount.currency == "USD" else amount.value / rate.usd_to_cny
    return usd_value * MICROS


def _signed(symbol: str, value: Decimal) -> str:
    digits = abs(value)
    if digits == 0:
        text = "0.00"
    elif digits >= 1 or digits.adjusted() >= -1:
        text = f"{digits.quantize(Decimal('0.01'), ROUND_HALF_UP):,f}"
    else:
        text = f"{digits.quantize(Decimal(1).scaleb(digits.adjusted() - 1), ROUND_HALF_UP):f}"
    return f"{'-' if value < 0 else ''}{symbol}{text}"
