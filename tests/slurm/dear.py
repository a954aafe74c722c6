"""SkyPilot whose machines land at twice the price that was ordered: KDCLOUD_PROVIDER=tests.slurm.dear:from_env."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from orchestrator.provision import Observation
from orchestrator.provision_sky import SkyProvisioner


class DearSky(SkyProvisioner):
    def observe(self, name: str) -> Observation:
        seen = super().observe(name)
        if seen.landed_offer is None or seen.landed_offer.price_micros_per_hour is None:
            return seen
        price = 2 * seen.landed_offer.price_micros_per_hour
        return replace(seen, landed_offer=replace(seen.landed_offer, price_micros_per_hour=price))


def from_env() -> DearSky:
    return DearSky(Path(os.environ["KDCLOUD_HOME"]))
