"""Looks at everything a run needs, all at once and each for so long only; what it means is decided in doctor.py."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from orchestrator import doctor, sky_ask
from orchestrator.access import head, store_of
from orchestrator.bounded import Bounded
from orchestrator.clock import SystemClock
from orchestrator.config import Config, Home, load_config
from orchestrator.doctor import AwsFacts, BucketFacts, Check, Left, State, Wants
from orchestrator.errors import KdcloudError, NothingFits, UsageError
from orchestrator.plan import Plan
from orchestrator.provision import ProvisionError
from orchestrator.quota import CODES, FAMILIES, Ask, Quota, ask_aws, quota_of, within_quota
from tasks.bucket import Bucket, BucketError, open_bucket, probe

PLAN_LIMIT_S = 3.0  # a plan for Slurm asks the cluster
LOOK_LIMIT_S = 9.0  # with the plan: everything within 15 s
SKY_LIMIT_S = 10.0  # loading it alone takes seconds
CALL_LIMIT_S = 4.0  # one request to a store
HUB_LIMIT_S = 3.0
UNITS = ("kdcloud-reap.timer", "kdcloud-watch.service")  # as docs/reaper.md names them
K, T = TypeVar("K"), TypeVar("T")


@dataclass(frozen=True)
class Look:
    """Something to look at: what it is called when it gives no answer, for how long it may look, and how."""

    id: str
    group: str
    run: Callable[[], Iterable[Check]]
    network: bool = False
    limit_s: float = LOOK_LIMIT_S


@dataclass
class Told:
    """What looks find out beside their own checks; threads write, and only whole values."""

    secrets: set[str] = field(default_factory=set)
    off_s: dict[str, float] = field(default_factory=dict)  # server -> how far its clock is ahead of ours


PlanOf = Callable[[str], tuple[Plan, bool]]  # recipe -> its plan, and whether it allows an account's key


def examine(recipe: str | None, plan_of: PlanOf, *, offline: bool, ask_quota: Ask = ask_aws) -> list[Check]:
    """Every check, in order, without a secret in it."""
    told = Told(secrets=doctor.secrets_of(os.environ))
    checks: list[Check] = []
    home, config = Home.from_env(), None
    trouble = ""
    try:
        config = load_config(home)
    except UsageError as error:
        trouble = error.message
    plan, wants = None, Wants(bucket=config.bucket if config is not None else "")
    if recipe is not None and config is not None:
        plan, wants, check = _planned(recipe, plan_of, wants)
        checks.append(check)
        if plan is not None and wants.rented:
            checks.append(doctor.rights(plan, allowed=wants.allow_account_key, env=os.environ))
    looks = list(_looks(home, trouble, config, plan, wants, told, ask_quota))
    checks += at_once(looks, offline=offline)
    server, off_s = next(iter(sorted(told.off_s.items(), key=lambda item: item[0] == HUB)), ("", None))
    checks.append(doctor.clock(off_s, server))
    return doctor.in_order(doctor.hidden(checks, told.secrets))


def at_once(looks: Sequence[Look], *, offline: bool) -> list[Check]:
    """The checks of every look, in their order; one that takes too long, or breaks, says so and stops no other."""
    running = {look.id: _Thread(look.run) for look in looks if not (offline and look.network)}
    found: list[Check] = []
    for look in looks:
        if look.id not in running:
            found.append(doctor.not_asked(look.id, look.group))
            continue
        answer, error = running[look.id].wait(look.limit_s)
        if error is not None:
            found.append(doctor.broken(look.id, look.group, error))
        elif answer is None:
            found.append(doctor.late(look.id, look.group, look.limit_s))
        else:
            found += answer
    return found


class _Thread:
    """A call in a thread that nobody has to wait for: one that hangs ends with the program."""

    def __init__(self, call: Callable[[], Iterable[Any]]) -> None:
        self._answer: list[Any] | None = None
        self._error: Exception | None = None
        self._began, self._call = time.monotonic(), call
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def wait(self, limit_s: float) -> tuple[list[Any] | None, Exception | None]:
        """(what it answered or None, what it raised or None), at the latest so long after it began."""
        self._thread.join(max(0.0, self._began + limit_s - time.monotonic()))
        return self._answer, self._error

    def _work(self) -> None:
        try:
            self._answer = list(self._call())
        except Exception as error:  # noqa: BLE001 - one check that breaks must not hide the others
            self._error = error


def _planned(recipe: str, plan_of: PlanOf, wants: Wants) -> tuple[Plan | None, Wants, Check]:
    answer, error = _Thread(lambda: [plan_of(recipe)]).wait(PLAN_LIMIT_S)
    if answer is not None:
        plan, allow = answer[0]
        return plan, doctor.wants_of(plan, allow_account_key=allow), doctor.planned(plan)
    if isinstance(error, (KdcloudError, ProvisionError)):
        check = doctor.not_planned(error.message, error.hint)
    elif error is not None:
        check = doctor.broken("recipe", doctor.RECIPE, error)
    else:
        check = doctor.late("recipe", doctor.RECIPE, PLAN_LIMIT_S)
    return None, _wants_without_plan(recipe, wants), check


def _wants_without_plan(recipe: str, wants: Wants) -> Wants:
    """What a recipe names itself, so that its bucket and infras are looked at even if it does not plan."""
    from orchestrator.recipe import load_recipe

    try:
        loaded = load_recipe(recipe)
    except UsageError:
        return wants
    kinds = {head(name): None for stage in loaded.stages for name in stage.infra or loaded.infra or ()}
    return Wants(
        named=True,
        trains_here="local" in kinds,
        rented=tuple(name for name in kinds if name != "local"),
        bucket=loaded.bucket_url or wants.bucket,
        allow_account_key=loaded.allow_account_key,
    )


def _looks(
    home: Home, trouble: str, config: Config | None, plan: Plan | None, wants: Wants, told: Told, ask_quota: Ask
) -> Iterable[Look]:
    """What there is to look at; without a usable home, what can be seen all the same."""
    version = sky_ask.sky_version()
    rents = bool(wants.rented) if wants.named else version is not None
    yield Look("python", doctor.COMPUTER, lambda: _computer(home, trouble, wants))
    if "KDCLOUD_PROVIDER" not in os.environ:
        yield Look("sky", doctor.SKY, lambda: [doctor.skypilot(version, wants)])
        yield Look(
            "sky-infra",
            doctor.SKY,
            lambda: [_infra(home, version, wants)],
            network=version is not None,
            limit_s=SKY_LIMIT_S + 1,
        )
    yield Look("keys", doctor.KEYS, lambda: _keys(wants))
    asks_aws = find_spec("boto3") is not None
    yield Look("aws", doctor.KEYS, lambda: [_aws(wants, told)], network=asks_aws)
    if plan is not None and "aws" in wants.rented and asks_aws:
        yield Look("quota", doctor.KEYS, lambda: [_quota(plan, ask_quota)], network=True)
    elif not wants.named and asks_aws:
        yield Look("quota", doctor.KEYS, lambda: _own_quota(ask_quota), network=True)
    if wants.bucket:
        far = wants.s3
        yield Look("bucket", doctor.BUCKET, lambda: _bucket(wants, told), network=far)
        if far:
            yield Look("bucket-keys", doctor.BUCKET, lambda: _bucket_keys(wants), network=True)
    if config is not None:
        yield Look("prices", doctor.MONEY, lambda: _money(home, config, wants, rents=rents))
        yield Look("ledger", doctor.MONEY, lambda: _ledger(home, config, rents=rents))
    yield Look("hub", doctor.MODELS, lambda: [_hub(wants, told)], network=True, limit_s=HUB_LIMIT_S + 1)


# -- this computer


def _computer(home: Home, trouble: str, wants: Wants) -> Iterable[Check]:
    yield doctor.python(sys.version_info[:3])
    for name, modules in doctor.EXTRAS.items():
        yield doctor.extra(name, [one for one in modules if find_spec(one) is None], wants)
    root = home.root
    network, open_to_others = False, False
    if not trouble:
        from orchestrator.ledger import on_network

        trouble = _unwritable(root)
        network, open_to_others = on_network(root), _open_to_others(root)
    yield doctor.home(str(root), trouble, network=network, open_to_others=open_to_others)
    if not trouble:
        yield _disk("disk", root)
    yield _disk("temp", Path(tempfile.gettempdir()))


def _disk(id_: str, path: Path) -> Check:
    import shutil

    there = next(one for one in (path, *path.parents) if one.exists())
    return doctor.disk(id_, str(path), shutil.disk_usage(there).free)


def _unwritable(folder: Path) -> str:
    """Why nothing can be written there; empty when it can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"kdcloud was here\n")
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return ""


def _open_to_others(path: Path) -> bool:
    return bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))


# -- SkyPilot and keys


def _infra(home: Home, version: str | None, wants: Wants) -> Check:
    usable = version is not None and version.startswith(sky_ask.WANTED)
    return doctor.sky_infra(sky_ask.enabled(home.root, SKY_LIMIT_S) if usable else None, wants)


def _keys(wants: Wants) -> Iterable[Check]:
    """Keys of the infras that the recipe rents from; without one those that are there."""
    for infra, (name, _) in doctor.KEY_FILES.items():
        path = Path(name).expanduser()
        there = path.is_file()
        if infra in wants.rented or (there and not wants.named):
            yield doctor.key_file(infra, wants, there=there, open_to_others=there and _open_to_others(path))
    for name in wants.api_keys:
        yield doctor.api_key(name, there=bool(os.environ.get(name, "").strip()))


def _aws(wants: Wants, told: Told) -> Check:
    return doctor.aws(aws_facts(told.secrets), wants, datetime.now(UTC))


def aws_facts(secrets: set[str]) -> AwsFacts | None:
    """Who the usual AWS settings are, asked of AWS; what must not be shown is added to `secrets`."""
    try:
        import boto3
        from botocore.config import Config as BotoConfig
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return None
    try:
        session = boto3.session.Session()
        own = session.get_credentials()
        if own is None:
            return AwsFacts(found=False)
        expires_at = _expiry(session, own)
        if expires_at is not None and expires_at <= datetime.now(UTC):
            return AwsFacts(found=True, expires_at=expires_at)
        frozen = own.get_frozen_credentials()
        secrets |= {word for word in (frozen.secret_key, frozen.token) if word}
        elsewhere = _elsewhere(os.environ)
        if elsewhere:
            return AwsFacts(found=True, expires_at=expires_at, elsewhere=elsewhere)
        settings = BotoConfig(connect_timeout=3, read_timeout=4, retries={"mode": "standard", "max_attempts": 1})
        sts = session.client("sts", region_name=session.region_name or "us-east-1", config=settings)
        arn = str(sts.get_caller_identity()["Arn"])
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        return AwsFacts(
            found=True, trouble=f"AWS does not take these credentials ({code})", cure=_AWS_CURES.get(code, "")
        )
    except (BotoCoreError, RuntimeError) as error:  # RuntimeError: what was refreshed has ended, too
        kind = type(error).__name__
        if "SSO" in kind or "Token" in kind:
            return AwsFacts(found=True, trouble="the AWS sign-in has ended", cure="aws sso login")
        return AwsFacts(found=True, trouble=f"AWS cannot be asked: {error}", cure="check ~/.aws/config and the network")
    return AwsFacts(found=True, arn=arn, expires_at=expires_at, session=bool(frozen.token))


_AWS_CURES = {
    "InvalidClientTokenId": "aws configure: the key was deleted or mistyped",
    "SignatureDoesNotMatch": "aws configure: the secret is mistyped, or the clock of this computer is wrong",
}


def _expiry(session: Any, own: Any) -> datetime | None:
    """When the credentials end: as botocore knows it, or as a tool wrote it into the profile."""
    known = getattr(own, "_expiry_time", None)
    if isinstance(known, datetime):
        return known
    profile = session._session.full_config.get("profiles", {}).get(session.profile_name, {})
    for name in ("x_security_token_expires", "aws_expiration", "expiration"):
        try:
            when = datetime.fromisoformat(str(profile[name]))
        except (KeyError, ValueError):
            continue
        return when if when.tzinfo is not None else when.replace(tzinfo=UTC)
    return None


def _elsewhere(env: Mapping[str, str]) -> str:
    """Host of a store of one's own for which the AWS variables are meant; empty for AWS itself."""
    endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL")
    if not endpoint or env.get("AWS_ENDPOINT_URL_STS") or store_of(endpoint) == "aws":
        return ""
    return urlsplit(endpoint).hostname or "another host"


def _quota(plan: Plan, ask: Ask) -> Check:
    import boto3

    if boto3.session.Session().get_credentials() is None:
        return Check("quota", doctor.KEYS, State.SKIPPED, "no AWS credentials to ask for quotas with")
    quotas = {one for stage in plan.stages for offer in stage.candidates if (one := quota_of(offer)) is not None}
    threads = {one: _Thread(lambda one=one: [ask(one)]) for one in quotas}  # type: ignore[misc]
    answers = {one: thread.wait(LOOK_LIMIT_S - 1)[0] for one, thread in threads.items()}
    known: dict[Quota, float | None] = {one: answer[0] if answer else None for one, answer in answers.items()}
    untold = sum(value is None for value in known.values())
    try:
        left = within_quota(plan, known.__getitem__)
    except NothingFits as error:
        return doctor.quota((), len(known), untold, (error.message, error.hint))
    refused = [
        (after.name, one.why)
        for before, after in zip(plan.stages, left.stages, strict=True)
        for one in after.rejected[len(before.rejected) :]
    ]
    return doctor.quota(refused, len(known), untold, None)


def _own_quota(ask: Ask) -> Iterable[Check]:
    """Of the usual machines in the usual region, where AWS is used at all."""
    import boto3

    session = boto3.session.Session()
    if session.get_credentials() is not None and not _elsewhere(os.environ):
        region = session.region_name or "us-east-1"
        quota = Quota(CODES["g", False], region, f"on-demand {FAMILIES['g']} instances in {region}")
        yield doctor.own_quota(quota, ask(quota))


# -- bucket


def _bucket(wants: Wants, told: Told) -> Iterable[Check]:
    facts, off_s = try_bucket(wants.bucket)
    if off_s is not None:
        told.off_s[facts.url] = off_s
    return doctor.bucket(facts, wants)


def try_bucket(url: str) -> tuple[BucketFacts, float | None]:
    """What a bucket can do, and how far its clock is ahead; every request has a time limit."""
    began, step = time.monotonic(), "open"
    try:
        bucket: Bucket = Bounded(open_bucket(url), SystemClock(), CALL_LIMIT_S)
        for name, call in _steps(bucket):
            step = name
            call()
        step = "conditional writes"
        conditional = probe(bucket).conditional
        seconds = time.monotonic() - began
        step = "tell the time"
        off_s = _off_s(bucket)
    except BucketError as error:
        return BucketFacts(url, step=step, trouble=error.message, cure=error.hint), None
    return BucketFacts(bucket.url, conditional=conditional, seconds=seconds), off_s


def _steps(bucket: Bucket) -> Iterable[tuple[str, Callable[[], None]]]:
    key, data = f"probe-{uuid.uuid4().hex}", b"kdcloud doctor was here\n"

    def read() -> None:
        if bucket.get(key)[0] != data:
            raise BucketError("other bytes came back than were written", hint="do not use this store")

    def listed() -> None:
        if [one.key for one in bucket.list(key)] != [key]:
            raise BucketError("what was written is not listed", hint="use a store whose listings are up to date")

    def delete() -> None:
        bucket.delete(key)
        if bucket.head(key) is not None:
            raise BucketError("what was deleted is still there", hint="allow your keys to delete")

    yield "write", lambda: void(bucket.put(key, data))
    yield "read", read
    yield "list", listed
    yield "delete", delete


def void(_: object) -> None:
    return None


def _off_s(bucket: Bucket) -> float | None:
    """Seconds by which the store's clock is ahead; None for a folder of this computer, whose clock is ours."""
    if bucket.url.startswith("file:"):
        from orchestrator.ledger import on_network

        if not on_network(Path(bucket.url.removeprefix("file:"))):
            return None
    before = datetime.now(UTC)
    there = bucket.now()
    return _ahead(there, before, datetime.now(UTC))


def _ahead(there: datetime, before: datetime, after: datetime) -> float:
    """Seconds by which `there` lies outside of the time in which it was asked for; servers round to a second."""
    early, late_ = (before - there).total_seconds(), (there - after).total_seconds()
    return -max(0.0, early - 1.0) if early > 0 else max(0.0, late_)


def _bucket_keys(wants: Wants) -> Iterable[Check]:
    from orchestrator.grants import find_way

    try:
        way = find_way(open_bucket(wants.bucket).at("doctor"))
    except BucketError as error:
        yield Check("bucket-keys", doctor.BUCKET, State.WARN, error.message, error.hint)
        return
    if way is not None:
        yield doctor.bucket_keys(way, wants)


# -- money and machines


def _money(home: Home, config: Config, wants: Wants, *, rents: bool) -> Iterable[Check]:
    from orchestrator import price_cache
    from orchestrator.offers import TABLE

    now = datetime.now(UTC)
    try:
        cache = price_cache.load(home.offers_cache)
        asked_at = cache.asked_at if cache is not None else None
        dates = (
            [datetime.fromisoformat(g["as_of"]) for one in cache.infras.values() for g in one.groups] if cache else []
        )
        oldest = min(dates, default=None) if asked_at else min(row.as_of for row in TABLE)
        yield doctor.prices(asked_at, oldest, now, wants)
    except UsageError as error:
        yield Check("prices", doctor.MONEY, State.WARN, error.message, error.hint)
    yield doctor.rate(config, now.date(), str(home.config))
    yield doctor.reaper(reapers(Path.home()), rents=rents)


def reapers(user: Path) -> list[str]:
    """Where a reaper is set up for this user: systemd's enabled units, cron."""
    units = user / ".config" / "systemd" / "user"
    found = [name for name in UNITS if any(units.glob(f"*.wants/{name}"))]
    try:
        listed = subprocess.run(
            ["crontab", "-l"], capture_output=True, text=True, timeout=2, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return found
    lines = [
        line for line in listed.stdout.splitlines() if "kdcloud reap" in line and not line.lstrip().startswith("#")
    ]
    return found + (["cron"] if lines else [])


def _ledger(home: Home, config: Config, *, rents: bool) -> Iterable[Check]:
    """Machines that may still bill, and the month; makes no ledger where there is none."""
    if not home.ledger.exists():
        yield from doctor.machines((), 0)
        yield doctor.month(config, None, rents=rents)
        return
    import sqlite3

    from orchestrator.session import opened_ledger

    try:
        with opened_ledger(home) as ledger:
            runs = [ledger.run(name) for name in ledger.runs()]
            used = ledger.month(datetime.now(UTC))
    except (KdcloudError, sqlite3.Error, OSError) as error:
        hint = error.hint if isinstance(error, KdcloudError) else "move it aside, and `kdcloud reap` looks everywhere"
        yield from doctor.machines((), 0, trouble=f"{home.ledger}: {error}", cure=hint)
        return
    rented = any(head(str(row.order["offer"]["infra"])) != "local" for run in runs for row in run.machines)
    left = [Left(run.id, tuple(row.name for row in run.live), _driven(run.bucket, run.id)) for run in runs if run.live]
    yield from doctor.machines(left, len(runs))
    yield doctor.month(config, used, rents=rents or rented)


def _driven(url: str, run_id: str) -> bool | None:
    from orchestrator.session import is_driven

    clock = SystemClock()
    try:
        return is_driven(Bounded(open_bucket(url), clock, CALL_LIMIT_S), clock)
    except (BucketError, KdcloudError):
        return None


# -- models

HUB = "the model hub"


def _hub(wants: Wants, told: Told) -> Check:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return Check("hub", doctor.MODELS, State.SKIPPED, "HF_HUB_OFFLINE is set: models come from the cache")
    url = hub_url(os.environ)
    before = datetime.now(UTC)
    trouble, date = "", None
    try:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "kdcloud"})
        with urllib.request.urlopen(request, timeout=HUB_LIMIT_S) as answer:
            date = answer.headers.get("Date")
    except urllib.error.HTTPError as error:
        date = error.headers.get("Date")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        trouble = str(getattr(reason, "strerror", None) or reason) or type(error).__name__
    if date is not None and not trouble:
        told.off_s[HUB] = _ahead(parsedate_to_datetime(date).astimezone(UTC), before, datetime.now(UTC))
    return doctor.hub(urlsplit(url).hostname or url, trouble, token=bool(os.environ.get("HF_TOKEN")), wants=wants)


def hub_url(env: Mapping[str, str]) -> str:
    """Where models are fetched from, as tasks/hub.py reads it."""
    if env.get("KDCLOUD_HUB") == "modelscope":
        domain = env.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
        return domain if "://" in domain else f"https://{domain}"
    return env.get("HF_ENDPOINT") or "https://huggingface.co"
