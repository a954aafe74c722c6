"""Providers for KDCLOUD_PROVIDER that behave worse than was ordered."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.provision import Need, Observation, Offer
from orchestrator.provision_local import LocalProvisioner


class DearProvisioner(LocalProvisioner):
    """What lands costs three times what was ordered."""

    def observe(self, name: str) -> Observation:
        seen = super().observe(name)
        if seen.landed_offer is None:
            return seen
        price = 3 * (seen.landed_offer.price_micros_per_hour or 0)
        return replace(seen, landed_offer=replace(seen.landed_offer, price_micros_per_hour=price))

    def offers(self, need: Need) -> list[Offer]:
        return super().offers(replace(need, infra=()))


def dear() -> DearProvisioner:
    """KDCLOUD_PROVIDER=tests.providers:dear"""
    return DearProvisioner(price_micros_per_hour=100_000)
