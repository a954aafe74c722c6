"""Machines on AWS as EC2 itself lists them, found by their tags: what SkyPilot forgot only the cloud knows.

Behind the seam, so that judge and reap work unchanged; it looks and ends, and neither offers nor launches. SkyPilot
0.14 tags every instance with its cluster's name (sky/provision/aws/instance.py: ray-cluster-name and
skypilot-cluster-name, the name on the cloud, which ends in a hash of the user); kdcloud adds a label of its own.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from orchestrator.offers import TABLE
from orchestrator.provision import (
    NAME_PREFIX,
    Job,
    Need,
    NotYetGone,
    Observation,
    Offer,
    Order,
    Partly,
    ProvisionError,
    Status,
)
from tasks.contract import install_hint

LABEL = "kdcloud-name"  # as provision_sky.launch_task writes it: the machine's name, exactly
CLUSTER_TAGS = ("skypilot-cluster-name", "ray-cluster-name")
USER_HASH = re.compile(r"-[0-9a-f]{8}$")
# What exists: a stopped instance still bills its disks. shutting-down and terminated bill nothing.
STATES = {
    "pending": Status.CREATING,
    "running": Status.RUNNING,
    "stopping": Status.STOPPING,
    "stopped": Status.STOPPING,
}
OPEN = "open"  # a spot request that has no instance yet; one that has is found by its instance
ASK_FIRST = "us-east-1"  # the region that is asked which regions there are, where none is set
AT_ONCE = 16


@dataclass(frozen=True)
class Found:
    """One instance, or a spot request that has none yet (then `id` is the request's)."""

    id: str
    name: str
    region: str
    status: Status
    created_at: datetime | None
    instance_type: str
    spot: bool
    billing: bool  # stopped ones bill their disks only
    request: str | None  # its spot request, which may start another


class Ec2Machines:
    """Every enabled region of the account that the usual AWS settings name. `regions`: only these."""

    def __init__(
        self, *, regions: Sequence[str] | None = None, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._only, self._now = regions, now
        self._seen_in: dict[str, set[str]] = {}  # machine -> regions where it was found
        self._clients: dict[str, Any] = {}
        self._boto: Any = None
        self._making = threading.Lock()

    def offers(self, need: Need) -> list[Offer]:
        return []

    def launch(self, order: Order) -> None:
        raise _only_looks()

    def run(self, name: str, job_id: str, argv: Sequence[str], env: Mapping[str, str]) -> None:
        raise _only_looks()

    def logs(self, name: str, job_id: str) -> Iterator[str]:
        raise _only_looks()

    def ours(self) -> list[Observation]:
        """Raises Partly with what was found when some region did not answer, ProvisionError when none did."""
        found, troubles = self._look(self._regions())
        listed = [observation(name, rows, self._now()) for name, rows in sorted(by_name(found).items())]
        if troubles:
            raise Partly("; ".join(troubles), found=listed)
        return listed

    def observe(self, name: str) -> Observation:
        rows, troubles = self._look(self._regions_of(name), name)
        if troubles and not rows:
            return Observation(name, Status.UNKNOWN, None, None, Job(), self._now())
        return observation(name, rows, self._now())

    def terminate(self, name: str) -> None:
        """Cancels its spot requests, then ends its instances: by id, and only those that carry the name now."""
        rows, troubles = self._look(self._regions_of(name), name)
        for region in sorted({row.region for row in rows}):
            there = [row for row in rows if row.region == region]
            requests = sorted({row.request for row in there if row.request is not None})
            instances = [row.id for row in there if row.id.startswith("i-")]
            refused = self._cancel(region, requests) if requests else None
            if instances:
                with asking(f"end {name} in {region}"):
                    self._client(region).terminate_instances(InstanceIds=instances)
            if refused is not None and self._starts_again(region, requests):
                raise refused
        if troubles:
            raise ProvisionError("; ".join(troubles))
        left, troubles = self._look({row.region for row in rows}, name) if rows else ([], [])
        if left or troubles:
            raise NotYetGone("; ".join(troubles) or f"EC2 still lists {name}")

    def _cancel(self, region: str, requests: list[str]) -> ProvisionError | None:
        """What went wrong: the key may be allowed to end instances only."""
        try:
            with asking(f"cancel {', '.join(requests)} in {region}"):
                self._client(region).cancel_spot_instance_requests(SpotInstanceRequestIds=requests)
        except ProvisionError as error:
            return error
        return None

    def _starts_again(self, region: str, requests: list[str]) -> bool:
        """Whether one of them would start another instance: one that waits for its first, or a persistent one."""
        with asking(f"see what became of {', '.join(requests)} in {region}"):
            answer = self._client(region).describe_spot_instance_requests(SpotInstanceRequestIds=requests)
        return any(
            row["State"] == OPEN or (row["State"] in ("active", "disabled") and row.get("Type") == "persistent")
            for row in answer["SpotInstanceRequests"]
        )

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _look(self, regions: Iterable[str], name: str | None = None) -> tuple[list[Found], list[str]]:
        """(what exists there, of one machine or of all, and what went wrong in which region)"""
        found: list[Found] = []
        troubles: list[str] = []
        places = sorted(regions)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for region, answer in zip(places, pool.map(self._in_region, places), strict=True):
                if isinstance(answer, ProvisionError):
                    troubles.append(f"{region}: {answer.message}")
                    continue
                found += [one for one in answer if name is None or one.name == name]
        if places and len(troubles) == len(places):
            raise ProvisionError(troubles[0] if len(places) == 1 else f"no region answers; {troubles[0]}")
        for one in found:
            self._seen_in.setdefault(one.name, set()).add(one.region)
        return found, troubles

    def _in_region(self, region: str) -> list[Found] | ProvisionError:
        try:
            with asking(f"list the instances in {region}"):
                ec2 = self._client(region)
                tagged = {"Name": "tag-key", "Values": [LABEL, *CLUSTER_TAGS]}
                alive = {"Name": "instance-state-name", "Values": list(STATES)}
                pages = ec2.get_paginator("describe_instances").paginate(Filters=[tagged, alive])
                rows = [i for page in pages for r in page["Reservations"] for i in r["Instances"]]
                waiting = {"Name": "state", "Values": [OPEN]}
                pages = ec2.get_paginator("describe_spot_instance_requests").paginate(Filters=[tagged, waiting])
                requests = [request for page in pages for request in page["SpotInstanceRequests"]]
        except ProvisionError as error:
            return error
        instances = [found for row in rows if (found := found_of(row, region)) is not None]
        return instances + [found for one in requests if (found := requested(one, region)) is not None]

    def _regions_of(self, name: str) -> Iterable[str]:
        return self._seen_in.get(name) or self._regions()

    def _regions(self) -> list[str]:
        if self._only is not None:
            return list(self._only)
        with asking("ask which AWS regions are enabled"):
            answer = self._client(self._home_region()).describe_regions(AllRegions=False)
        return sorted(str(region["RegionName"]) for region in answer["Regions"])

    def _home_region(self) -> str:
        session = self._session()
        if session.get_credentials() is None:
            raise ProvisionError(
                "no AWS credentials were found", hint="`aws sts get-caller-identity` must answer: set AWS_PROFILE"
            )
        return session.region_name or ASK_FIRST

    def _client(self, region: str) -> Any:
        from botocore.config import Config

        with self._making:
            if region not in self._clients:
                config = Config(
                    connect_timeout=5,
                    read_timeout=20,
                    retries={"max_attempts": 3, "mode": "standard"},
                    user_agent_extra="kdcloud",
                )
                self._clients[region] = self._session().client("ec2", region_name=region, config=config)
            return self._clients[region]

    def _session(self) -> Any:
        """One for all regions: reading what EC2 can do takes longer than asking it. Not safe between threads."""
        import boto3

        if self._boto is None:
            self._boto = boto3.session.Session()
        return self._boto


# -- pure: what EC2's words mean ---------------------------------------------------------------------------------------


def machine_of(tags: Mapping[str, str]) -> str | None:
    """The kdcloud name that an instance's tags tell; None for everything else in the account."""
    label = tags.get(LABEL, "")
    if label.startswith(NAME_PREFIX):
        return label
    for tag in CLUSTER_TAGS:
        if tags.get(tag, "").startswith(NAME_PREFIX):
            return USER_HASH.sub("", tags[tag])
    return None


def found_of(row: Mapping[str, Any], region: str) -> Found | None:
    """An instance of describe_instances."""
    name, state = machine_of(tags_of(row)), str(row["State"]["Name"])
    if name is None or state not in STATES:
        return None
    return Found(
        id=str(row["InstanceId"]),
        name=name,
        region=region,
        status=STATES[state],
        created_at=row.get("LaunchTime"),
        instance_type=str(row.get("InstanceType", "")),
        spot=row.get("InstanceLifecycle") == "spot",
        billing=state in ("pending", "running"),
        request=row.get("SpotInstanceRequestId"),
    )


def requested(request: Mapping[str, Any], region: str) -> Found | None:
    """A spot request that may still start an instance."""
    name = machine_of(tags_of(request))
    if name is None or request["State"] != OPEN:
        return None
    number = str(request["SpotInstanceRequestId"])
    kind = str(request.get("LaunchSpecification", {}).get("InstanceType", ""))
    return Found(number, name, region, Status.CREATING, request.get("CreateTime"), kind, True, True, number)


def tags_of(row: Mapping[str, Any]) -> dict[str, str]:
    return {str(tag["Key"]): str(tag["Value"]) for tag in row.get("Tags") or []}


def by_name(found: Iterable[Found]) -> dict[str, list[Found]]:
    groups: dict[str, list[Found]] = {}
    for one in found:
        groups.setdefault(one.name, []).append(one)
    return groups


def observation(name: str, rows: Sequence[Found], read_at: datetime) -> Observation:
    """One machine; several instances may carry its name (nodes, or a create that was sent twice)."""
    if not rows:
        return Observation(name, Status.ABSENT, None, None, Job(), read_at)
    states = [row.status for row in rows]
    state = next(one for one in (Status.RUNNING, Status.CREATING, Status.STOPPING) if one in states)
    created_at = min((row.created_at for row in rows if row.created_at is not None), default=None)
    return Observation(name, state, landed(rows, read_at), created_at, Job(), read_at)


def landed(rows: Sequence[Found], read_at: datetime) -> Offer:
    """What bills under that name. The price is that of the dated table, None where it has none."""
    prices = [_price(row) for row in rows]
    known = [price for price in prices if price is not None]
    first = rows[0]
    return Offer(
        infra="aws",
        region=first.region,
        instance=" + ".join(row.instance_type for row in rows),
        gpu=None,
        gpus=0,
        vram_gib=0.0,
        spot=first.spot,
        price_micros_per_hour=sum(known) if len(known) == len(prices) else None,
        as_of=read_at,
        source="EC2, priced by the table of known prices",
        minimum_s=60,
    )


def _price(row: Found) -> int | None:
    from decimal import Decimal

    usd = next(
        (
            line.spot_usd if row.spot else line.usd
            for line in TABLE
            if (line.infra, line.region, line.instance) == ("aws", row.region, row.instance_type)
        ),
        None,
    )
    return int(Decimal(usd) * 1_000_000) if usd is not None and row.billing else None


def _only_looks() -> ProvisionError:
    return ProvisionError(
        "kdcloud looks at EC2 only to find and end machines", hint="machines are rented through SkyPilot"
    )


@contextmanager
def asking(doing: str) -> Iterator[None]:
    """Whatever boto3 raises becomes a ProvisionError that says what was tried. No key is ever in it."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError as error:
        raise ProvisionError(
            "looking at AWS itself needs boto3, which is not installed", hint=install_hint("s3")
        ) from error
    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "?")
        raise ProvisionError(f"could not {doing}: AWS says {code}", hint=_hint(code)) from error
    except BotoCoreError as error:
        raise ProvisionError(f"could not {doing}: {error}", hint="check the network and the AWS settings") from error


def _hint(code: str) -> str:
    if code in ("UnauthorizedOperation", "AccessDenied"):
        return "docs/reaper.md lists the rights that the key needs"
    if code in ("AuthFailure", "ExpiredToken", "RequestExpired", "InvalidClientTokenId"):
        return "its credentials have expired or are wrong: log in again"
    return "try again in a moment"
