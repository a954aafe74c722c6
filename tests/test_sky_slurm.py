"""The seam, and whole runs, on a real SkyPilot over a real Slurm: skipped where tests/slurm/up.sh has not been.

`make test-slurm` brings the cluster up, runs this file as the account that rents, and takes the cluster down.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.provision import Need, Offer, Status
from tests.test_provision_contract import (  # noqa: F401 - the same sentences, with the rig below
    Rig,
    test_a_job_that_ends_well_is_done_with_0,
    test_a_job_that_fails_is_done_with_its_status,
    test_a_machine_with_a_running_job_is_ended_and_then_absent,
    test_a_name_nobody_ordered_is_absent_and_ending_it_is_success,
    test_an_order_becomes_a_running_machine_that_is_listed_as_ours,
    test_names_say_by_when_the_machine_must_be_gone_and_are_short_enough,
    test_offers_say_what_where_and_for_how_much,
    test_the_same_job_twice_runs_once,
    test_the_same_order_twice_makes_one_machine,
)

UP = os.environ.get("KDSLURM_UP")
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(UP is None, reason="needs the cluster of tests/slurm/up.sh: make test-slurm"),
]
LAB = Need(infra=("slurm/lab",), gpus=("RTX3090",))


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sky-home")


@pytest.fixture(scope="session")
def provider(home: Path):
    from orchestrator.provision_sky import SkyProvisioner

    return SkyProvisioner(home)


@pytest.fixture(scope="session")
def offer(provider) -> Offer:
    (found,) = provider.offers(LAB)
    return found


@pytest.fixture
def rig(provider, offer) -> Iterator[Rig]:
    made = Rig(
        provider,
        offer,
        time.sleep,
        ["python", "-c", "print('it works')"],
        ["python", "-c", "raise SystemExit(3)"],
        ["python", "-c", "import time; print('still here', flush=True); time.sleep(600)"],
    )
    yield made
    for name in made.names:
        made.end(name)
        assert provider.observe(name).state is Status.ABSENT
