"""Which rights reach a rented machine, and what lets it end itself? Pure; read in SkyPilot 0.14.1's source (sky/).

kdcloud sets `remote_identity: NO_UPLOAD` wherever SkyPilot knows the word. That keeps files at home, but two things
go all the same: on AWS and GCP the machine gets an identity of its own that SkyPilot makes, with rights over the whole
account; and clouds for which SkyPilot does not know the word get a file with the account's key.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from orchestrator import spend
from orchestrator.errors import UsageError
from orchestrator.plan import Plan, StagePlan
from tasks.contract import ApiTeacher, BoxSettings, ModelSource

INSTANCE_PROFILE = "KDCLOUD_AWS_INSTANCE_PROFILE"  # name of an IAM instance profile with no more than own_tag_policy()
BUCKET_ROLE = "KDCLOUD_BUCKET_ROLE"  # ARN of an IAM role that is taken, narrowed to a run, for machines
ALLOW = "set `allow_account_key: true` in the recipe if you accept that"
POLICY_LIMIT = 2048  # characters of a session policy (STS)
HOUR_S = 3600.0


@dataclass(frozen=True)
class Ending:
    """What ends a machine whose client is dead, and what it needs for that.

    `account`: the right that lies on the machine reaches beyond it, to other things of the account.
    """

    by: str
    right: str
    account: bool
    source: str
    itself: bool = True  # False: nothing on the machine or at the provider ends it


_SKYLET = "SkyPilot's timer (skylet/events.py)"
_FILE = "SkyPilot copies it, since it knows no NO_UPLOAD there (check.py: get_cloud_credential_file_mounts)"
ENDINGS: Mapping[str, Ending] = {
    "local": Ending("the supervisor, a process of this computer", "none", False, "orchestrator/provision_local.py"),
    "slurm": Ending(
        "Slurm's time limit for the job (sbatch --time)", "none: Slurm itself ends it", False,
        "provision_sky.time_to_live; sbatch_options in skylet/constants.py: OVERRIDEABLE_CONFIG_KEYS_IN_TASK",
    ),
    "kubernetes": Ending(
        "Kubernetes' activeDeadlineSeconds for the pod", "none: the kubelet ends it", False,
        "provision_sky.time_to_live; the pod's service account may change its own namespace "
        "(templates/kubernetes-ray.yml.j2)",
    ),
    "aws": Ending(
        f"{_SKYLET}, which calls ec2:TerminateInstances",
        "the instance profile skypilot-v1, whose role has AmazonEC2FullAccess and AmazonS3FullAccess", True,
        "provision/aws/config.py: _configure_iam_role, also with NO_UPLOAD; keys in the environment are dropped first",
    ),
    "gcp": Ending(
        f"{_SKYLET}, which deletes the instance",
        "the service account skypilot-v1, which has compute.admin and storage.admin of the project", True,
        "provision/gcp/config.py: _configure_iam_role; constants.py: DEFAULT_SERVICE_ACCOUNT_ROLES",
    ),
    "azure": Ending(
        f"{_SKYLET}, which deletes the machine",
        "a managed identity that is contributor of the machine's own resource group", False,
        "provision/azure/azure-config-template.json: roleAssignments, scope resourceGroup().id",
    ),
    "runpod": Ending(
        f"{_SKYLET}, which calls RunPod's API", "the account's API key, ~/.runpod/config.toml", True,
        f"clouds/runpod.py: get_credential_file_mounts; {_FILE}",
    ),
    "vast": Ending(
        f"{_SKYLET}, which calls Vast's API", "the account's API key", True,
        "provision/vast/utils.py writes it into the machine's start script, also with NO_UPLOAD",
    ),
    "lambda": Ending(
        f"{_SKYLET}, which calls Lambda's API", "the account's API key, ~/.lambda_cloud/lambda_keys", True,
        f"clouds/lambda_cloud.py: get_credential_file_mounts; {_FILE}",
    ),
    "nebius": Ending(
        "nothing", "the account's key, which kdcloud keeps at home", False,
        "clouds/nebius.py: get_credential_file_mounts, kept by NO_UPLOAD", itself=False,
    ),
    "oci": Ending(
        "nothing", "the account's key, which kdcloud keeps at home", False,
        "clouds/oci.py: get_credential_file_mounts, kept by NO_UPLOAD", itself=False,
    ),
}  # fmt: skip
_OTHER = Ending(f"{_SKYLET}, which calls the provider's API", "the account's key", True, _FILE)


def head(infra: str) -> str:
    """The kind of an infra: `slurm` of slurm/lab."""
    name = infra.partition("/")[0].lower()
    return {"k8s": "kubernetes", "ssh": "kubernetes"}.get(name, name)


def ending_of(infra: str, env: Mapping[str, str] | None = None) -> Ending:
    """What ends a machine there when nobody looks, and whether a right over the account lies on it."""
    env = os.environ if env is None else env
    profile = env.get(INSTANCE_PROFILE, "")
    if head(infra) == "aws" and profile:
        return Ending(
            ENDINGS["aws"].by, f"your instance profile {profile}", False, "templates/aws-ray.yml.j2: IamInstanceProfile"
        )
    return ENDINGS.get(head(infra), _OTHER)


def identity_of(infra: str, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """SkyPilot configuration, for one launch only, that gives the machine the narrow identity the user made."""
    env = os.environ if env is None else env
    if head(infra) == "aws" and env.get(INSTANCE_PROFILE):
        return {"aws": {"remote_identity": env[INSTANCE_PROFILE]}}
    return {}


# -- policies


CLIENTS_ONLY = ("ledger/*", "lease.json", "code/*")  # below a run


def run_policy(bucket: str, prefix: str, *, partition: str = "aws") -> dict[str, Any]:
    """A session policy: objects below `prefix` in `bucket`, and nothing else. `prefix` ends with the run's id.

    What only a client may write is kept from machines: who owns the run, what it may cost, the code it runs.
    """
    folder = prefix.strip("/")
    if not folder or any(char in folder for char in "*?$"):
        raise UsageError(f"{folder!r} cannot stand in a policy", hint="choose a bucket folder without * ? and $")
    objects = ("GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload", "ListMultipartUploadParts")
    arn = f"arn:{partition}:s3:::{bucket}"
    return {
        "Version": "2012-10-17",
        "Statement": [
            {"Effect": "Allow", "Action": [f"s3:{name}" for name in objects], "Resource": f"{arn}/{folder}/*"},
            {
                "Effect": "Allow",
                "Action": "s3:ListBucket",
                "Resource": arn,
                "Condition": {"StringLike": {"s3:prefix": f"{folder}/*"}},
            },
            {
                "Effect": "Deny",
                "Action": ["s3:PutObject", "s3:DeleteObject"],
                "Resource": [f"{arn}/{folder}/{name}" for name in CLIENTS_ONLY],
            },
        ],
    }


def own_tag_policy(*, partition: str = "aws") -> dict[str, Any]:
    """For the role of KDCLOUD_AWS_INSTANCE_PROFILE: end machines that carry kdcloud's tag, from a machine, no more.

    DescribeInstances knows no narrower resource than all; SkyPilot finds the machine to end with it.
    """
    return {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Action": "ec2:TerminateInstances",
                "Resource": f"arn:{partition}:ec2:*:*:instance/*",
                "Condition": {"StringLike": {"aws:ResourceTag/kdcloud-name": "kd-*"}},
            },
            {
                "Effect": "Allow",
                "Action": ["ec2:DescribeInstances", "ec2:DescribeSecurityGroups", "ec2:DescribeVpcs"],
                "Resource": "*",
            },
        ],
    }


# -- ways to a key that reaches one run only


@dataclass(frozen=True)
class Way:
    """How a machine gets to the run's folder. `longest_s`: such a key lives no longer."""

    name: str  # federation | role | minio | r2 | account_key
    longest_s: float
    why: str = ""


# AWS: GetFederationToken 36 h for IAM users, 1 h for root; AssumeRole as long as the role allows, at most 12 h, and
# 1 h when the caller has taken a role already (AWS STS API reference, "role chaining").
FEDERATION_S, ROLE_S, CHAINED_S = 36 * HOUR_S, 12 * HOUR_S, HOUR_S
STORE_S = 7 * 24 * HOUR_S  # MinIO's AssumeRole; R2 (Cloudflare's API: ttlSeconds at most 604800)


def store_of(endpoint: str | None) -> str:
    """aws, r2, gcs, or other (MinIO and everything else that speaks S3)."""
    host = (urlsplit(endpoint).hostname or "") if endpoint else ""
    if not host or host.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        return "aws"
    if host.endswith(".r2.cloudflarestorage.com"):
        return "r2"
    return "gcs" if host == "storage.googleapis.com" else "other"


def way_of(store: str, caller_arn: str | None, role: str | None) -> Way:
    """The way for a store of that kind. `caller_arn`: who the client's own keys are (AWS only)."""
    if store == "r2":
        return Way("r2", STORE_S)
    if store == "other":
        return Way("minio", STORE_S)
    if store == "gcs":
        return Way("account_key", STORE_S, "Google's store has no keys for one folder in its S3 interface")
    resource = (caller_arn or "").partition("::")[2].partition(":")[2]
    if resource.startswith(("assumed-role/", "federated-user/")):
        if role and resource.startswith("assumed-role/"):
            return Way("role", CHAINED_S, "your own credentials are those of a role: a role taken with them lives 1 h")
        return Way("account_key", CHAINED_S, "your own credentials are those of a session, which gives no others")
    if role:
        return Way("role", ROLE_S)
    return Way("federation", CHAINED_S if resource == "root" else FEDERATION_S)


# -- what the plan says, and what is refused


def rented(plan: Plan) -> Iterator[StagePlan]:
    return (stage for stage in plan.stages if any(head(offer.infra) != "local" for offer in stage.candidates))


def infras_of(plan: Plan) -> list[str]:
    """Kinds of infra on which this plan may rent machines."""
    return sorted({head(offer.infra) for stage in rented(plan) for offer in stage.candidates} - {"local"})


def longest_s(plan: Plan) -> float:
    """How long a rented machine of this plan may live at most, in seconds: by the cap, and by the deadline."""
    known = {id(offer): offer for stage in rented(plan) for offer in stage.candidates}  # stages share candidates
    offers = [offer for offer in known.values() if offer.price_micros_per_hour]
    longest = max((spend.lifetime_s(offer, plan.cap_micros) + offer.latencies.total_s for offer in offers), default=0.0)
    return max(0.0, longest if plan.deadline_s is None else min(longest, plan.deadline_s))


def hub_models(settings: object) -> list[str]:
    """Names of models that a stage fetches from a hub."""
    if isinstance(settings, BoxSettings):
        chat = settings.chat.path if settings.chat is not None and settings.chat.path else None
        return [*hub_models(settings.settings), *([chat] if chat and not chat.startswith(("/", ".", "~")) else [])]
    sources = [value for value in vars(settings).values() if isinstance(value, ModelSource)]
    return [source.path for source in sources if source.path and not source.path.startswith(("/", ".", "~"))]


def api_key_env(settings: object) -> str | None:
    """Name of the variable whose key a stage sends to an API."""
    api = getattr(settings, "api", None)
    return api.key_env if isinstance(api, ApiTeacher) else None


def account_infras(plan: Plan, env: Mapping[str, str] | None = None) -> list[str]:
    """Where a machine ends itself by a right over the account, which the recipe must allow."""
    return [infra for infra in infras_of(plan) if ending_of(infra, env).account]


def notes(plan: Plan, allowed: bool, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """What the plan says about rights on rented machines; asks nobody. `allowed`: the recipe's allow_account_key."""
    env = os.environ if env is None else env
    then = "the recipe allows it" if allowed else ALLOW
    account = []
    for infra in infras_of(plan):
        ending = ending_of(infra, env)
        if not ending.itself:
            yield f"{infra}: machines there cannot end themselves without {ending.right}: they are not rented"
        elif ending.account:
            account.append((infra, ending.right))
    if len(account) == 1:
        ((infra, right),) = account
        yield f"{infra}: {right}{',' if ',' in right else ''} lies on the machine so that it can end itself: {then}"
    elif account:
        rights = "; ".join(f"{infra}: {right}" for infra, right in account)
        yield f"rights over your account lie on the machines so that they can end themselves ({rights}): {then}"
    if any(True for _ in rented(plan)) and plan.bucket.startswith("s3:"):
        yield from _bucket_notes(plan, then, env)
        if env.get("HF_TOKEN") and any(hub_models(stage.settings) for stage in rented(plan)):
            yield "HF_TOKEN goes to machines that fetch models: use one that can only read"


def _bucket_notes(plan: Plan, then: str, env: Mapping[str, str]) -> Iterator[str]:
    store = store_of(env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL"))
    if store == "gcs":
        yield f"{way_of(store, None, None).why}: your own key goes to the machine; {then}"
        return
    if store == "other":
        yield f"your store is asked for a key that reaches this run only before anything is rented; has it none, {then}"
    limit = FEDERATION_S if store == "aws" else STORE_S
    longest = longest_s(plan)
    if longest > limit:
        yield (
            f"a machine may live {longest / HOUR_S:.0f} h under this cap, a key for this run only "
            f"{limit / HOUR_S:.0f} h: give it --deadline {limit / HOUR_S:.0f}h"
        )


def check(plan: Plan, *, allow_account_key: bool, env: Mapping[str, str] | None = None) -> None:
    """Raises UsageError for machines that cannot end themselves, or that would carry rights nobody allowed, and for
    a key of an API that is not there."""
    check_api_keys(plan.stages, env)
    if any(True for _ in rented(plan)) and plan.bucket.startswith("file:") and infras_of(plan) != ["slurm"]:
        raise UsageError("a rented machine cannot reach a folder of yours", hint="set `bucket: s3://...` in the recipe")
    for infra in infras_of(plan):
        ending = ending_of(infra, env)
        if not ending.itself:
            raise UsageError(
                f"machines on {infra} cannot end themselves without {ending.right}",
                hint=f"leave {infra} out of `infra:` in the recipe",
            )
        if ending.account and not allow_account_key:
            narrower = f"name a narrower one with {INSTANCE_PROFILE}, or " if infra == "aws" else ""
            raise UsageError(
                f"on {infra} a machine ends itself with {ending.right}: whoever owns the machine could use it",
                hint=f"{narrower}{ALLOW}, or leave {infra} out",
            )


def check_api_keys(stages: Iterable[StagePlan], env: Mapping[str, str] | None = None) -> None:
    """Raises UsageError for a stage whose teacher's key is not there."""
    for stage in stages:
        name = api_key_env(stage.settings)
        if name is not None and not (os.environ if env is None else env).get(name, "").strip():
            raise UsageError(
                f"stage {stage.name} sends the key in {name}, which is not set", hint=f"export {name}=... and try again"
            )


def check_way(way: Way, needed_s: float, *, allow_account_key: bool) -> None:
    """Raises UsageError when a key for this run only cannot be had, or not for so long, and nobody allowed another."""
    if allow_account_key or (way.name != "account_key" and needed_s <= way.longest_s):
        return
    if way.name == "account_key":
        hint = f"use another store, or {ALLOW}"
        raise UsageError(f"no key can be had that reaches this run only: {way.why}", hint=hint)
    because = f" ({way.why})" if way.why else ""
    raise UsageError(
        f"a machine may live {needed_s / HOUR_S:.1f} h, a key that reaches this run only {way.longest_s / HOUR_S:.0f} h"
        f"{because}",
        hint=f"give it --deadline {way.longest_s / HOUR_S:.0f}h or a smaller budget, or {ALLOW}",
    )
