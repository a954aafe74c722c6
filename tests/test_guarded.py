"""Does the one who waits for a slow provider keep what must not run out meanwhile?"""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from orchestrator import guarded
from orchestrator.errors import NotOwner
from orchestrator.guarded import Guarded
from orchestrator.provision import ProvisionError
from orchestrator.testing import FakeBucket, FakeProvisioner, VirtualClock


class Slow(FakeProvisioner):
    def ours(self):
        time.sleep(0.2)
        return []


@pytest.fixture
def slow(monkeypatch) -> Slow:
    monkeypatch.setattr(guarded, "LOOK_UP_S", 0.03)
    clock = VirtualClock()
    return Slow(clock, FakeBucket(clock), {}, offered=())


def test_a_lease_can_be_renewed_while_the_provider_takes_its_time(slow):
    renewed: list[int] = []
    provider = Guarded(slow, lambda: datetime.now(UTC), waiting=lambda: renewed.append(1))
    assert provider.ours() == []
    assert len(renewed) >= 2


def test_a_run_that_was_taken_over_meanwhile_ends_the_waiting(slow):
    def taken() -> None:
        raise NotOwner("taken")

    with pytest.raises(NotOwner):
        Guarded(slow, lambda: datetime.now(UTC), waiting=taken).ours()


def test_the_limit_holds_whoever_looks_up(slow):
    with pytest.raises(ProvisionError, match="did not answer"):
        Guarded(slow, lambda: datetime.now(UTC), limit_s=0.05, waiting=lambda: None).ours()
