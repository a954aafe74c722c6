"""What keeps the promise, by name: with any one of these taken away the fire drill must fail.

A drill that goes on passing without a guard proves nothing about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Guard:
    """`says`: the rule. `removed`: (owner, name, what stands there instead) for each place it lives in."""

    says: str
    removed: Callable[[], list[tuple[Any, str, Any]]]


@contextmanager
def without(name: str) -> Iterator[None]:
    """The code as it would be without this guard. Processes forked meanwhile are without it too."""
    with ExitStack() as stack:
        for owner, attribute, instead in GUARDS[name].removed():
            stack.enter_context(mock.patch.object(owner, attribute, instead))
        yield


def _cap() -> list[tuple[Any, str, Any]]:
    from orchestrator import spend

    return [(spend, "available_micros", lambda *, cap, spent, open_, later_floor: cap)]


def _latencies() -> list[tuple[Any, str, Any]]:
    from orchestrator.provision import Latencies

    return [(Latencies, "total_s", property(lambda self: 0.0))]


def _reprice() -> list[tuple[Any, str, Any]]:
    from orchestrator import runner

    return [(runner, "landed_offer", lambda ordered, seen: ordered)]


def _client_limit() -> list[tuple[Any, str, Any]]:
    from orchestrator import states

    live = states._live

    def endless(machine: Any, seen: Any, stopping: bool) -> Any:
        return live(replace(machine, hard_limit_s=1e12), seen, stopping)

    return [(states, "_live", endless)]


def _supervisor_limit() -> list[tuple[Any, str, Any]]:
    from tasks import watch

    decide = watch.decide
    return [(watch, "decide", lambda view: decide(replace(view, remaining_s=1e12)))]


def _create_limit() -> list[tuple[Any, str, Any]]:
    from orchestrator import states

    creating = states._creating

    def patient(machine: Any, seen: Any, stopping: bool) -> Any:
        return creating(replace(machine, lifetime_s=1e12, provision_limit_s=1e12), seen, stopping)

    return [(states, "_creating", patient)]


def _two_looks() -> list[tuple[Any, str, Any]]:
    from orchestrator import runner, states

    ending = states._ending

    def hasty(machine: Any, seen: Any) -> Any:
        return ending(replace(machine, absent_s=1e12), seen)

    return [(states, "_ending", hasty), (runner.Runner, "_look_for_strangers", lambda self: [])]


def _again() -> list[tuple[Any, str, Any]]:
    from orchestrator.runner import Runner

    terminate, asked = Runner._terminate, set()

    def once(self: Any, row: Any) -> bool:
        if (machine := (id(self.provider._provider), row.name)) in asked:
            return False
        asked.add(machine)
        return terminate(self, row)

    return [(Runner, "_terminate", once)]


def _reaper() -> list[tuple[Any, str, Any]]:
    from datetime import timedelta

    from orchestrator import reaper

    return [(reaper, "GRACE", timedelta(days=365))]


def _owner() -> list[tuple[Any, str, Any]]:
    from orchestrator import names, reaper

    parse = names.parse_machine_name

    def mine(name: str) -> Any:
        parsed = parse(name)
        return parsed and replace(parsed, owner="owner1")

    return [(reaper, "parse_machine_name", mine)]


def _lease() -> list[tuple[Any, str, Any]]:
    from orchestrator.lease import Lease

    nothing = lambda self: None  # noqa: E731
    return [(Lease, "confirm", nothing), (Lease, "renew_if_due", nothing)]


def _minimum() -> list[tuple[Any, str, Any]]:
    from orchestrator import spend

    def per_second(function: Any) -> Any:
        return lambda offer, amount: function(replace(offer, minimum_s=0, quantum_s=1), amount)

    places = ("lifetime_s", "create_limit_s", "reserve_micros", "cost_micros")
    return [(spend, name, per_second(getattr(spend, name))) for name in places]


def _settled() -> list[tuple[Any, str, Any]]:
    from orchestrator import spend

    return [(spend, "settled_micros", lambda offer, **facts: 0)]


def _twins() -> list[tuple[Any, str, Any]]:
    from orchestrator.runner import Runner

    return [(Runner, "_look_for_strangers", lambda self: [])]


def _stall() -> list[tuple[Any, str, Any]]:
    from tasks import watch

    return [(watch, "stall_limit_s", lambda progress, watch: 1e12)]


def _prices() -> list[tuple[Any, str, Any]]:
    from orchestrator import market, offers, planner

    return [(module, "known_price", lambda offer: True) for module in (offers, market, planner)]


GUARDS: dict[str, Guard] = {
    "cap": Guard("no reservation passes the cap, and it is checked where it is written", _cap),
    "latencies": Guard("a reservation pays for every delay until the machine is gone", _latencies),
    "reprice": Guard("what landed dearer gets a nearer deadline", _reprice),
    "client_limit": Guard("the client ends a machine whose supervisor did not", _client_limit),
    "supervisor_limit": Guard("the supervisor ends a machine whose client is away", _supervisor_limit),
    "create_limit": Guard("a machine that is not up in time is given up", _create_limit),
    "two_looks": Guard("gone is what was looked for twice, the second time after the provider's own delay", _two_looks),
    "again": Guard("a teardown that was refused is repeated", _again),
    "reaper": Guard("a reaper ends what is past the deadline in its name", _reaper),
    "owner": Guard("a reaper leaves machines of others alone", _owner),
    "lease": Guard("a client makes sure that the run is still its own before it acts", _lease),
    "minimum": Guard("a minimum charge and a billing step are reserved and settled", _minimum),
    "settled": Guard("an attempt that failed is paid for", _settled),
    "twins": Guard("machines nobody counts with are looked for during the run", _twins),
    "stall": Guard("work that moves nothing is ended", _stall),
    "prices": Guard("an unknown price is never rented", _prices),
}
