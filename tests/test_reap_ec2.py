"""What EC2 itself lists and ends: by tag, in every region, and never an instance of somebody else (moto)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from orchestrator.clock import SystemClock
from orchestrator.config import Home
from orchestrator.ledger import Ledger
from orchestrator.names import machine_name
from orchestrator.provision import NotYetGone, Order, Partly, Provisioner, ProvisionError, Status
from orchestrator.reap import reap
from orchestrator.reap_ec2 import ASK_FIRST, CLUSTER_TAGS, LABEL, Ec2Machines, found_of, machine_of, requested
from orchestrator.reaper import Action
from orchestrator.session import reapable_providers
from orchestrator.testing import fake_offer
from tests.whole_runs import make_home

OWNER, HASH = "owner1", "1a2b3c4d"
REGIONS = ("us-east-1", "eu-west-1")
IMAGE = "ami-12c6146b"
OVERDUE, LATER = datetime.now(UTC) - timedelta(hours=1), datetime.now(UTC) + timedelta(hours=5)


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from moto import mock_aws

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with mock_aws():
        yield


def ec2(region: str) -> Any:
    import boto3

    return boto3.client("ec2", region_name=region)


def start(
    name: str | None, region: str = "us-east-1", *, tag: str = CLUSTER_TAGS[0], hashed: bool = True, **how: Any
) -> str:
    """An instance as SkyPilot tags it; `name` None: without any tag. Returns its id."""
    value = f"{name}-{HASH}" if hashed and tag != LABEL else name
    tags = [{"ResourceType": "instance", "Tags": [{"Key": tag, "Value": value}]}] if name else []
    answer = ec2(region).run_instances(
        ImageId=IMAGE, MinCount=1, MaxCount=1, TagSpecifications=tags, **{"InstanceType": "g5.xlarge", **how}
    )
    return str(answer["Instances"][0]["InstanceId"])


def state(instance: str, region: str = "us-east-1") -> str:
    answer = ec2(region).describe_instances(InstanceIds=[instance])
    return str(answer["Reservations"][0]["Instances"][0]["State"]["Name"])


def named(deadline: datetime, *, owner: str = OWNER, run: str = "r-abc123") -> str:
    return machine_name(owner, run, "train", deadline)


# -- what tags mean ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "name"),
    [
        ({"skypilot-cluster-name": f"kd-a-b-{HASH}"}, "kd-a-b"),
        ({"ray-cluster-name": f"kd-a-b-{HASH}"}, "kd-a-b"),
        ({"skypilot-cluster-name": "kd-a-b"}, "kd-a-b"),
        ({"kdcloud-name": "kd-a-b", "skypilot-cluster-name": "something"}, "kd-a-b"),
        ({"kdcloud-name": "web"}, None),
        ({"skypilot-cluster-name": f"web-{HASH}"}, None),
        ({"Name": "kd-a-b"}, None),  # a name that anybody may give
        ({}, None),
    ],
)
def test_only_skypilots_tags_and_our_own_make_an_instance_ours(tags, name):
    assert machine_of(tags) == name


@pytest.mark.parametrize(
    ("word", "status"),
    [
        ("pending", Status.CREATING),
        ("running", Status.RUNNING),
        ("stopping", Status.STOPPING),
        ("stopped", Status.STOPPING),  # its disks bill
        ("shutting-down", None),
        ("terminated", None),
    ],
)
def test_states_that_bill_exist_and_the_others_are_gone(word, status):
    row = {"InstanceId": "i-1", "State": {"Name": word}, "Tags": [{"Key": LABEL, "Value": "kd-a"}]}
    found = found_of(row, "us-east-1")
    assert (found and found.status) == status


def test_a_spot_request_without_an_instance_exists_and_one_with_an_instance_is_found_by_that():
    request = {"SpotInstanceRequestId": "sir-1", "State": "open", "Tags": [{"Key": LABEL, "Value": "kd-a"}]}
    found = requested(request, "us-east-1")
    assert found is not None
    assert (found.id, found.request, found.status) == ("sir-1", "sir-1", Status.CREATING)
    for other in ({"State": "active"}, {"State": "cancelled"}, {"Tags": []}):
        assert requested({**request, **other}, "us-east-1") is None


# -- over moto ---------------------------------------------------------------------------------------------------------


def test_it_is_a_provisioner_that_only_looks(aws):
    machines = Ec2Machines(regions=REGIONS)
    assert isinstance(machines, Provisioner)
    with pytest.raises(ProvisionError):
        machines.launch(Order("kd-a", "r", "train", fake_offer(), LATER, 1.0))
    with pytest.raises(ProvisionError):
        machines.run("kd-a", "j", [], {})


@pytest.fixture
def everywhere(aws: None, monkeypatch: pytest.MonkeyPatch) -> Ec2Machines:
    """Looks at whatever regions EC2 names; here it names two, since moto takes seconds for each."""
    machines = Ec2Machines()

    def enabled(AllRegions: bool) -> Any:
        assert not AllRegions, "regions that are not enabled cannot be asked"
        return {"Regions": [{"RegionName": region} for region in REGIONS]}

    monkeypatch.setattr(machines._client(ASK_FIRST), "describe_regions", enabled)
    return machines


def test_machines_are_listed_from_every_region_with_their_price_where_it_is_known(everywhere):
    here, there = named(OVERDUE), named(OVERDUE, run="r-def456")
    start(here)
    start(there, "eu-west-1", tag=LABEL)
    start("web-server")
    start(None)
    found = {seen.name: seen for seen in everywhere.ours()}
    assert set(found) == {here, there}
    offer = found[here].landed_offer
    assert offer is not None
    assert (offer.infra, offer.region, offer.instance, offer.price_micros_per_hour) == (
        "aws", "us-east-1", "g5.xlarge", 1_006_000,
    )  # fmt: skip
    other = found[there].landed_offer
    assert other is not None and other.price_micros_per_hour is None  # not in the table: unknown, not 0
    assert all(seen.state is Status.RUNNING and seen.created_at is not None for seen in found.values())


def test_pages_are_read_to_their_end(aws, monkeypatch):
    names = [named(OVERDUE, run=f"r-{number:06d}") for number in range(7)]
    for name in names:
        start(name)
    machines = Ec2Machines(regions=("us-east-1",))
    client, asked = machines._client("us-east-1"), []
    paginator = client.get_paginator

    def small(operation: str) -> Any:
        pages = paginator(operation)
        real = pages.paginate

        def paginate(**words: Any) -> Any:
            for page in real(**words, PaginationConfig={"PageSize": 5}):
                asked.append(operation)
                yield page

        pages.paginate = paginate
        return pages

    monkeypatch.setattr(client, "get_paginator", small)
    assert [seen.name for seen in machines.ours()] == sorted(names)
    assert asked.count("describe_instances") == 2


def test_only_the_instances_that_carry_the_name_now_are_ended(aws):
    mine, young, other = named(OVERDUE), named(LATER, run="r-def456"), named(OVERDUE, owner="other1")
    doomed = [start(mine), start(mine, "eu-west-1")]  # a create that was sent twice
    kept = {start(young): "running", start(other): "running", start("web"): "running", start(None): "running"}
    retagged = start(mine)
    machines = Ec2Machines(regions=REGIONS)
    machines.ours()
    ec2("us-east-1").create_tags(Resources=[retagged], Tags=[{"Key": CLUSTER_TAGS[0], "Value": "web-2"}])
    result = reap(ledger=Ledger.in_memory(), providers={"ec2": machines}, owner=OWNER, clock=SystemClock(), do_end=True)
    assert result.ended == (mine,)
    assert [state(doomed[0]), state(doomed[1], "eu-west-1")] == ["terminated", "terminated"]
    assert {instance: state(instance) for instance in kept} == kept
    assert state(retagged) == "running"
    assert {f.name: f.action for f in result.findings} == {
        mine: Action.END,
        young: Action.ASK,
        other: Action.FOREIGN,
    }
    assert machines.observe(mine).state is Status.ABSENT


def test_a_stopped_instance_is_still_found_and_ended(aws):
    name = named(OVERDUE)
    instance = start(name)
    ec2("us-east-1").stop_instances(InstanceIds=[instance])
    machines = Ec2Machines(regions=("us-east-1",))
    (seen,) = machines.ours()
    assert seen.state is Status.STOPPING
    assert seen.landed_offer is not None and seen.landed_offer.price_micros_per_hour is None
    machines.terminate(name)
    assert state(instance) == "terminated"
    machines.terminate(name)  # already gone is success


def test_an_instance_that_aws_does_not_end_is_not_called_gone(aws):
    name = named(OVERDUE)
    instance = start(name)
    ec2("us-east-1").modify_instance_attribute(InstanceId=instance, DisableApiTermination={"Value": True})
    machines = Ec2Machines(regions=("us-east-1",))
    with pytest.raises(ProvisionError, match="OperationNotPermitted"):
        machines.terminate(name)
    assert state(instance) == "running"
    assert machines.observe(name).state is Status.RUNNING


def test_an_end_that_was_accepted_and_is_not_seen_yet_is_asked_again(aws, monkeypatch):
    name = named(OVERDUE)
    start(name)
    machines = Ec2Machines(regions=("us-east-1",))
    monkeypatch.setattr(machines._client("us-east-1"), "terminate_instances", lambda **words: None)
    with pytest.raises(NotYetGone):
        machines.terminate(name)


def test_spot_requests_are_cancelled_so_that_nothing_starts_again(aws):
    name, other = named(OVERDUE), named(OVERDUE, owner="other1")
    client = ec2("us-east-1")
    numbers = {}
    for whose in (name, other):
        tags = [{"ResourceType": "spot-instances-request", "Tags": [{"Key": LABEL, "Value": whose}]}]
        answer = client.request_spot_instances(
            SpotPrice="0.5", Type="persistent", TagSpecifications=tags,
            LaunchSpecification={"ImageId": IMAGE, "InstanceType": "g5.xlarge"},
        )  # fmt: skip
        numbers[whose] = answer["SpotInstanceRequests"][0]["SpotInstanceRequestId"]
    from moto.ec2.models import ec2_backends

    for backend in ec2_backends["123456789012"]["us-east-1"].spot_instance_requests.values():
        backend.state = "open"  # moto fills every request at once
    machines = Ec2Machines(regions=("us-east-1",))
    assert {seen.name: seen.state for seen in machines.ours()} == {name: Status.CREATING, other: Status.CREATING}
    machines.terminate(name)
    left = client.describe_spot_instance_requests()["SpotInstanceRequests"]
    assert {row["SpotInstanceRequestId"] for row in left if row["State"] == "open"} == {numbers[other]}


@pytest.mark.parametrize(("kind", "raises"), [("one-time", False), ("persistent", True)])
def test_a_request_that_may_not_be_cancelled_matters_only_if_it_starts_another_instance(aws, monkeypatch, kind, raises):
    from botocore.exceptions import ClientError

    name = named(OVERDUE)
    client = ec2("us-east-1")
    answer = client.request_spot_instances(
        SpotPrice="0.5", Type=kind, LaunchSpecification={"ImageId": IMAGE, "InstanceType": "g5.xlarge"}
    )
    request = answer["SpotInstanceRequests"][0]
    client.create_tags(Resources=[request["InstanceId"]], Tags=[{"Key": LABEL, "Value": name}])
    machines = Ec2Machines(regions=("us-east-1",))
    (found,) = machines._look(["us-east-1"], name)[0]
    spot = replace(found, request=request["SpotInstanceRequestId"])  # moto does not say so of the instance
    looks = iter([([spot], []), ([], [])])
    monkeypatch.setattr(machines, "_look", lambda *words: next(looks))

    def refused(**words: Any) -> Any:
        raise ClientError({"Error": {"Code": "UnauthorizedOperation"}}, "CancelSpotInstanceRequests")

    monkeypatch.setattr(machines._client("us-east-1"), "cancel_spot_instance_requests", refused)
    if raises:
        with pytest.raises(ProvisionError, match="could not cancel"):
            machines.terminate(name)
    else:
        machines.terminate(name)
    assert state(request["InstanceId"]) == "terminated"  # in both cases


def test_a_region_that_refuses_does_not_hide_the_others(aws, monkeypatch):
    from botocore.exceptions import ClientError

    name = named(OVERDUE)
    start(name)
    machines = Ec2Machines(regions=REGIONS)

    def refused(operation: str) -> Any:
        raise ClientError({"Error": {"Code": "UnauthorizedOperation"}}, operation)

    monkeypatch.setattr(machines._client("eu-west-1"), "get_paginator", refused)
    with pytest.raises(Partly) as caught:
        machines.ours()
    assert [seen.name for seen in caught.value.found] == [name]
    assert "eu-west-1" in caught.value.message and "UnauthorizedOperation" in caught.value.message
    result = reap(ledger=Ledger.in_memory(), providers={"ec2": machines}, owner=OWNER, clock=SystemClock(), do_end=True)
    assert result.ended == (name,)
    assert len(result.unanswered) == 1


def test_no_credentials_are_said_and_not_crashed_on():
    with pytest.raises(ProvisionError) as caught:
        Ec2Machines().ours()
    assert "no AWS credentials" in caught.value.message
    assert caught.value.hint


def test_the_command_line_says_that_it_could_not_look(tmp_path):
    done = make_home(tmp_path, "").call("reap", "--infra", "aws", "--yes")
    assert done.returncode == 6, done.stderr
    assert "no answer from ec2: no AWS credentials" in done.stderr
    assert "Traceback" not in done.stderr


def test_ec2_is_asked_where_a_machine_was_ordered_from_aws_or_it_is_named(tmp_path):
    from orchestrator.runner import offer_to_dict
    from tests.test_reap import open_run

    home, ledger, clock = Home(tmp_path), Ledger.in_memory(), SystemClock()
    open_run(ledger, clock, "r-abc123")
    assert set(reapable_providers(home, ledger)) == {"local"}
    assert set(reapable_providers(home, ledger, infra=("aws",))) == {"local", "ec2"}
    order = {"offer": offer_to_dict(fake_offer(infra="aws")), "lifetime_s": 60.0}
    ledger.reserve("r-abc123", "train", named(LATER), 1, clock.mark().wall, later_floor=0, order=order)
    assert set(reapable_providers(home, ledger)) == {"local", "ec2"}
