"""May this account rent that many GPUs at all? Asked of the cloud before anything is rented, where it tells.

Quotas of AWS count vCPUs of running machines by family and region; new accounts have 0 for GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from orchestrator import spend
from orchestrator.access import HOUR_S, head
from orchestrator.errors import NothingFits
from orchestrator.plan import Micros, Plan, Rejected, StagePlan
from orchestrator.provision import Offer

# Service Quotas, service ec2: "Running On-Demand G and VT instances", "Running On-Demand P instances",
# "All G and VT Spot Instance Requests", "All P Spot Instance Requests". Source: Amazon EC2 User Guide, "EC2 instance
# type quotas" and "Spot Instance quotas"; the codes as `aws service-quotas list-service-quotas` prints them.
CODES = {("g", False): "L-DB2E81BA", ("p", False): "L-417A185B", ("g", True): "L-3819A6DF", ("p", True): "L-7212CCBC"}
FAMILIES = {"g": "G and VT", "p": "P"}
SIZES = {"xlarge": 4, "metal": 96}  # vCPUs; <n>xlarge has 4 n. Source: Amazon EC2 instance types, g and p families


@dataclass(frozen=True)
class Quota:
    """One limit of the account: `code` in `region`."""

    code: str
    region: str
    what: str


Ask = Callable[[Quota], float | None]  # vCPUs allowed; None = the cloud did not tell


def quota_of(offer: Offer) -> Quota | None:
    """The quota that an offer falls under, None where none is known."""
    family = offer.instance[:1].lower()
    code = CODES.get((family, offer.spot))
    if head(offer.infra) != "aws" or offer.gpu is None or code is None or offer.region is None:
        return None
    kind = "spot" if offer.spot else "on-demand"
    return Quota(code, offer.region, f"{kind} {FAMILIES[family]} instances in {offer.region}")


def vcpus_of(instance: str) -> int:
    """vCPUs of an EC2 type by its size; at least 1, so that a quota of 0 refuses what is not known."""
    size = instance.rpartition(".")[2].lower()
    if size.endswith("xlarge") and size.removesuffix("xlarge").isdigit():
        return 4 * int(size.removesuffix("xlarge"))
    return SIZES.get(size, 1)


def within_quota(plan: Plan, ask: Ask) -> Plan:
    """The same plan without offers that the account may not rent, at the price of what is left.

    Raises NothingFits when a stage has none left.
    """
    quotas = {quota for stage in plan.stages for offer in stage.candidates if (quota := quota_of(offer)) is not None}
    if not quotas:
        return plan
    with ThreadPoolExecutor(8) as pool:  # one for each region
        known = dict(zip(quotas, pool.map(ask, quotas), strict=True))
    return replace(plan, stages=tuple(_stage(stage, known) for stage in plan.stages))


def _stage(stage: StagePlan, known: Mapping[Quota, float | None]) -> StagePlan:
    whys = [_refusal(offer, known) for offer in stage.candidates]
    kept = [at for at, why in enumerate(whys) if why is None]
    refused = [(offer, why) for offer, why in zip(stage.candidates, whys, strict=True) if why is not None]
    if not refused:
        return stage
    if not kept:
        offer, why = refused[0]
        quota = quota_of(offer)
        assert quota is not None
        raise NothingFits(f"stage {stage.name}: {why}", hint=raise_it(quota, vcpus_of(offer.instance)))
    rejected = tuple(Rejected(offer.gpu or "no GPU", why, f"{offer.infra} {offer.instance}") for offer, why in refused)
    left = replace(
        stage,
        candidates=tuple(stage.candidates[at] for at in kept),
        candidate_hours=tuple(stage.candidate_hours[at] for at in kept),
        candidate_parts=tuple(stage.candidate_parts[at] for at in kept if stage.candidate_parts),
        rejected=(*stage.rejected, *rejected),
    )
    if left.offer == stage.offer:
        return left
    hours = left.candidate_hours[0]
    costs = (spend.cost_micros(left.offer, at * HOUR_S) for at in (hours.low, hours.expected, hours.high))
    return replace(
        left,
        hours=hours,
        cost_micros=Micros(*costs),
        reserve_micros=0 if stage.joins else spend.latency_reserve_micros(left.offer),
    )


def _refusal(offer: Offer, known: Mapping[Quota, float | None]) -> str | None:
    quota = quota_of(offer)
    if quota is None:
        return None
    allowed, needed = known[quota], vcpus_of(offer.instance)
    if allowed is None or allowed >= needed:
        return None
    return f"your account may run {allowed:g} vCPUs of {quota.what}, {offer.instance} has {needed}"


def raise_it(quota: Quota, vcpus: int) -> str:
    """The command that asks for more, and the page that does."""
    return (
        f"ask for more: aws service-quotas request-service-quota-increase --service-code ec2 --quota-code {quota.code} "
        f"--region {quota.region} --desired-value {vcpus}, or "
        f"https://{quota.region}.console.aws.amazon.com/servicequotas/home/services/ec2/quotas/{quota.code}"
    )


def ask_aws(quota: Quota) -> float | None:
    """What AWS says; None when it does not: no right to ask, no boto3, no network. A launch tells it then."""
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return None
    config = Config(connect_timeout=5, read_timeout=10, retries={"mode": "standard", "max_attempts": 2})
    endpoint = os.environ.get("AWS_ENDPOINT_URL_SERVICE_QUOTAS")  # that of a store of one's own is not meant
    try:
        client = boto3.session.Session().client(
            "service-quotas", region_name=quota.region, config=config,
            endpoint_url=endpoint or f"https://servicequotas.{quota.region}.{_suffix(quota.region)}",
        )  # fmt: skip
        return float(client.get_service_quota(ServiceCode="ec2", QuotaCode=quota.code)["Quota"]["Value"])
    except (BotoCoreError, ClientError, KeyError, ValueError):
        return None


def _suffix(region: str) -> str:
    return "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
