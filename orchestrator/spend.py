"""How much may be spent, for how long does it last: integer micro-USD in, integer micro-USD or seconds out. Pure.

The bound (one machine): spend <= p * ceil_q(max(m, D + latencies)), so the age D at which its work must stop is
D = floor_q(B / p) - latencies. A cost is always rounded up, a lifetime always down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

from orchestrator.provision import Latencies, Offer

DEARER = 2  # what lands may cost so many times what was ordered, and the cap still holds
COPIES = 2  # so many machines may come of one order, each as dear as that
MAX_LIFETIME_S = 7 * 24 * 3600.0  # no machine is ordered for longer; also the lifetime of one that costs nothing


@dataclass(frozen=True)
class ApiLine:
    """The money of one stage for an API, as the ledger has it; the stage may spend settled + open in all."""

    settled_micros: int = 0
    open_micros: int = 0  # set apart, and not settled
    limit_micros: int = 0  # the most that settled + open ever were
    cap_micros: int = 0  # of the run, when something was last set apart

    def to_book_micros(self, whole: int, *, spare: int = 0) -> int:
        """What must be set apart before the stage goes on, so that it has its worst case of `whole` micro-USD.

        `spare`: after attempts that broke off the line is filled up again, as far as this reaches. Give it after the
        run's cap was raised, and only then.
        """
        limit = max(whole, self.limit_micros, self.settled_micros + min(whole, spare))
        return limit - self.settled_micros - self.open_micros


def cost_micros(offer: Offer, seconds: float) -> int:
    """What `seconds` of the offer cost: billed in steps of its quantum, at least its minimum charge, rounded up.

    Raises ValueError for an unknown price: unknown is never free.
    """
    return math.ceil(Fraction(_price(offer) * billed_s(offer, seconds), 3600))


def billed_s(offer: Offer, seconds: float) -> int:
    """Seconds that are billed for `seconds`, whatever the price."""
    quantum = max(1, offer.quantum_s)
    return max(offer.minimum_s, math.ceil(max(0.0, seconds) / quantum) * quantum)


def lifetime_s(offer: Offer, reserved_micros: int) -> float:
    """Largest age D at which work must stop so that the machine ends within its reservation; below 0: do not launch."""
    price = _burn(offer)
    if price == 0:
        return MAX_LIFETIME_S
    if cost_micros(at_worst(offer), 0) > reserved_micros:
        return -1.0
    quantum = max(1, offer.quantum_s)
    affordable = int(Fraction(reserved_micros * 3600, price)) // quantum * quantum
    if affordable < offer.minimum_s:
        return -1.0
    return min(MAX_LIFETIME_S, affordable - offer.latencies.total_s)


def order_lifetime_s(offer: Offer, reserved_micros: int) -> float:
    """`lifetime_s` of a machine that does not exist yet: below 0 also where the worst that may land cannot be ended."""
    may_land = create_limit_s(offer, reserved_micros) > 0 and _landing_micros(offer) <= reserved_micros
    return lifetime_s(offer, reserved_micros) if may_land else -1.0


def reserve_micros(offer: Offer, work_s: float) -> int:
    """Reservation that lets work go on until the age `work_s`, and holds should the machine land too dear."""
    return max(cost_micros(at_worst(offer), work_s + offer.latencies.total_s), _landing_micros(offer))


def create_limit_s(offer: Offer, reserved_micros: int) -> float:
    """The age by which a machine must be up: until then nobody knows that it did not land DEARER times as dear."""
    price = DEARER * _burn(offer)
    if price == 0:
        return MAX_LIFETIME_S
    quantum = max(1, offer.quantum_s)
    affordable = int(Fraction(reserved_micros * 3600, price)) // quantum * quantum
    return affordable - offer.latencies.ending_s if affordable >= offer.minimum_s else -1.0


def at_worst(offer: Offer) -> Offer:
    """The offer at the highest price it may be billed at."""
    return replace(offer, price_micros_per_hour=_burn(offer))


def latency_reserve_micros(offer: Offer) -> int:
    """Part of a reservation that pays for latencies only: what the plan adds for every machine."""
    return cost_micros(at_worst(offer), offer.latencies.total_s) if _price(offer) else 0


def settled_micros(
    offer: Offer, *, until_s: float, alive_s: float, reserved: int, copies: int = 1, landed: bool = True
) -> int:
    """What a machine is settled at that was last seen at the age `alive_s` and missing at `until_s`.

    `copies`: so many carried its name, and each bills. `landed` False: it never came up, so nobody knows what it
    was, or whether there were two: it counts as one that cost DEARER times as much as the `offer` that was ordered.

    It may have ended at any moment between the two: all of it is counted, but no more than its reservation, since its
    own watchdog ended it by then; what was seen alive is counted whatever was reserved.
    """
    seen = copies * cost_micros(offer, min(alive_s, until_s))
    worst = copies * cost_micros(offer if landed else _dearer(offer), until_s)
    return max(seen, min(worst, reserved))


def worst_case_micros(offer: Offer, *, reserved: int, age_s: float) -> int:
    """The most a machine that is not seen gone may cost; grows for as long as nothing confirms its end.

    Its reservation, or, once it is older than that pays for, all until a teardown that is accepted now takes effect.
    """
    return max(reserved, cost_micros(offer, age_s + offer.latencies.api_s + offer.latencies.provision_s))


def available_micros(*, cap: int, spent: int, open_: int, later_floor: int) -> int:
    """What the stage at hand may reserve, so that it cannot eat the later ones: cap - spent - open - their floor."""
    return max(0, cap - spent - open_ - later_floor)


def supervisor_remaining_s(lifetime: float, age: float, latencies: Latencies) -> float:
    """Seconds the supervisor has until it must have ended, its last upload included, when its job is sent at `age`."""
    return lifetime + latencies.tick_s + latencies.flush_s - age


def _landing_micros(offer: Offer) -> int:
    """What the worst that may land costs though ended at once: a first billing step, or minimum charge, of each."""
    at_once = COPIES * cost_micros(_dearer(offer), 1)
    return max(at_once, cost_micros(_dearer(offer), offer.latencies.ending_s))


def _dearer(offer: Offer) -> Offer:
    return replace(offer, price_micros_per_hour=DEARER * _burn(offer))


def _burn(offer: Offer) -> int:
    return max(_price(offer), offer.ceiling_micros_per_hour or 0)


def _price(offer: Offer) -> int:
    price = offer.price_micros_per_hour
    if price is None or price < 0:
        raise ValueError(f"price of {offer.infra}/{offer.instance} is not known")
    if price == 0 and offer.infra != "local":
        raise ValueError(f"a price of 0 is only a price on your own machine, not on {offer.infra}/{offer.instance}")
    return price
