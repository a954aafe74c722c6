"""One client owns a run: who may take it, and when."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from orchestrator.errors import NotOwner
from orchestrator.lease import LEASE_KEY, LEASE_S, RENEW_S, Lease, NoLease, read_holder
from orchestrator.testing import FakeBucket, VirtualClock
from tasks.bucket import BucketError, Unsupported, probe


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


def test_a_renewal_whose_answer_never_arrived_is_found_again(world):
    clock, bucket = world
    lease = Lease.acquire(bucket, "one", clock)
    put, answers = bucket.put, []

    def lossy(*args, **kwargs):
        etag = put(*args, **kwargs)
        if not answers:
            answers.append(etag)
            raise BucketError("the connection broke")
        return etag

    bucket.put = lossy
    clock.sleep(RENEW_S)
    with pytest.raises(BucketError):
        lease.renew_if_due()
    lease.renew_if_due()
    assert read_holder(bucket)[0].beat == 2
    with pytest.raises(NotOwner):
        Lease.acquire(bucket, "two", clock)


class Plain:
    """A store that refuses conditional writes."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def put(self, key, data, *, if_none_match=False, if_match=None):
        if if_none_match or if_match is not None:
            raise Unsupported("no conditional writes here")
        return self._inner.put(key, data)


def test_a_store_without_conditional_writes_still_tells_clients_apart_that_do_not_race(world):
    clock, bucket = world
    store = Plain(bucket)
    assert not probe(store).conditional
    old = Lease.acquire(store, "one", clock)
    with pytest.raises(NotOwner):
        Lease.acquire(store, "two", clock)
    clock.sleep(LEASE_S)
    new = Lease.acquire(store, "two", clock)
    assert new.fence == old.fence + 1
    with pytest.raises(NotOwner):
        old.confirm()
    new.confirm()


def test_giving_a_lease_back_to_a_store_that_is_away_is_no_error(world):
    clock, bucket = world
    lease = Lease.acquire(bucket, "one", clock)

    def away(*args, **kwargs):
        raise BucketError("away")

    bucket.put = away
    lease.release()


def test_the_age_of_a_lease_is_told_by_the_store_not_by_a_clock_that_is_wrong(world):
    clock, bucket = world
    Lease.acquire(bucket, "one", clock)
    clock.step(7200)
    with pytest.raises(NotOwner):
        Lease.acquire(bucket, "two", clock)
    clock.step(-14400)
    clock.sleep(LEASE_S)
    assert Lease.acquire(bucket, "two", clock).fence == 2


def test_without_a_lease_nothing_can_be_confirmed():
    with pytest.raises(NotOwner):
        NoLease().confirm()
    NoLease().renew_if_due()
    NoLease().release()
