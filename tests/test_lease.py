"""One client owns a run: who may take it, and when."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from orchestrator.errors import NotOwner
from orchestrator.lease import LEASE_KEY, LEASE_S, RENEW_S, Lease, read_holder
from orchestrator.testing import FakeBucket, VirtualClock


@pytest.fixture
def world():
    clock = VirtualClock()
    return clock, FakeBucket(clock)


def pretend(bucket: FakeBucket, **changes: object) -> None:
    holder, _ = read_holder(bucket) or (None, None)
    assert holder is not None
    bucket.put(LEASE_KEY, json.dumps(asdict(replace(holder, **changes))).encode())  # type: ignore[arg-type]


def test_a_living_client_keeps_its_run(world):
    clock, bucket = world
    Lease.acquire(bucket, "one", clock)
    with pytest.raises(NotOwner):
        Lease.acquire(bucket, "two", clock)


def test_an_expired_lease_is_taken_with_a_higher_fencing_number_and_the_old_owner_notices(world):
    clock, bucket = world
    old = Lease.acquire(bucket, "one", clock)
    pretend(bucket, host="elsewhere")
    old = Lease(bucket, replace(read_holder(bucket)[0]), bucket.head(LEASE_KEY).etag, clock)
    clock.sleep(LEASE_S)
    new = Lease.acquire(bucket, "two", clock)
    assert new.fence == old.fence + 1
    with pytest.raises(NotOwner):
        old.renew_if_due()


def test_renewing_keeps_it_beyond_its_first_length(world):
    clock, bucket = world
    lease = Lease.acquire(bucket, "one", clock)
    for _ in range(20):
        clock.sleep(RENEW_S)
        lease.renew_if_due()
    with pytest.raises(NotOwner):
        Lease.acquire(bucket, "two", clock)


def test_a_released_lease_is_free_at_once(world):
    clock, bucket = world
    Lease.acquire(bucket, "one", clock).release()
    assert Lease.acquire(bucket, "two", clock).fence == 2


def test_a_dead_process_of_this_host_does_not_hold_a_run(world):
    clock, bucket = world
    Lease.acquire(bucket, "one", clock)
    pretend(bucket, pid=2**22 - 1, started=1.0)
    assert Lease.acquire(bucket, "two", clock).fence == 2


def test_a_pid_that_was_given_to_another_process_does_not_hold_a_run(world):
    clock, bucket = world
    Lease.acquire(bucket, "one", clock)
    pretend(bucket, started=1.0)
    assert Lease.acquire(bucket, "two", clock).fence == 2


def test_releasing_after_it_was_taken_leaves_the_new_owner_alone(world):
    clock, bucket = world
    old = Lease.acquire(bucket, "one", clock)
    pretend(bucket, pid=2**22 - 1, started=1.0)
    new = Lease.acquire(bucket, "two", clock)
    old.release()
    clock.sleep(RENEW_S)
    new.renew_if_due()
    assert not read_holder(bucket)[0].released
