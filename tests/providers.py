"""Providers for KDCLOUD_PROVIDER that behave worse than was ordered."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from orchestrator.provision import Need, Observation, Offer
from orchestrator.provision_local import LocalProvisioner
from orchestrator.provision_sky import Note, job_task


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


class RentedProvisioner(LocalProvisioner):
    """Machines of a cloud, played by this computer: a job gets what SkyPilot would be given, and nothing else.

    The task that provision_sky makes is run by a shell whose environment is empty but for the task's secrets.
    """

    def offers(self, need: Need) -> list[Offer]:
        here = super().offers(replace(need, infra=()))
        return [replace(offer, infra="azure", instance="Standard_NC4", region="eastus") for offer in here]

    def run(self, name: str, job_id: str, argv: Sequence[str], env: Mapping[str, str]) -> None:
        landed = self.observe(name).landed_offer
        offer = {**asdict(landed), "as_of": ""} if landed else {}
        task = job_task(Note(name, order={"offer": offer}), job_id, argv, env)
        home = self._machines / name / "home"
        home.mkdir(exist_ok=True)
        path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
        mine = dict(os.environ)
        os.environ.clear()  # a machine inherits nothing of its client's
        os.environ.update({"PATH": path, "HOME": str(home), "KDCLOUD_HOME": mine["KDCLOUD_HOME"]})
        try:
            super().run(name, job_id, ["bash", "-c", task["run"]], task["secrets"])
        finally:
            os.environ.clear()
            os.environ.update(mine)


def rented() -> RentedProvisioner:
    """KDCLOUD_PROVIDER=tests.providers:rented"""
    return RentedProvisioner(price_micros_per_hour=100_000)
