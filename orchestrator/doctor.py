"""Is everything there that a run needs? What was found becomes a judgement with its cure. Pure: doctor_look looks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from orchestrator import access, money
from orchestrator.config import Config
from orchestrator.lease import LEASE_S
from orchestrator.ledger import Month
from orchestrator.quota import Quota, raise_it
from orchestrator.reaper import GRACE
from orchestrator.sky_ask import WANTED as SKY_WANTED
from orchestrator.sky_ask import SkyAnswer
from tasks.contract import install_hint

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.plan import Plan

SCHEMA = 1
GIB = 2**30
COMPUTER, RECIPE, SKY, KEYS, BUCKET, MONEY, MODELS = (
    "This computer", "Recipe", "SkyPilot", "Keys", "Bucket", "Money and machines", "Models",
)  # fmt: skip
GROUPS = (RECIPE, COMPUTER, SKY, KEYS, BUCKET, MONEY, MODELS)
PYTHONS = ((3, 11), (3, 13))  # oldest that works, newest that the locked versions are made for
DISK_BAD_GIB, DISK_LOW_GIB = 1.0, 5.0
PRICES_OLD = timedelta(days=7)
RATE_OLD_DAYS = 90
CREDENTIALS_SHORT = timedelta(hours=1)
EXTRAS: Mapping[str, tuple[str, ...]] = {  # what each brings, by the names it is imported by
    "local": ("torch", "numpy", "transformers", "peft", "safetensors", "tensorboard", "math_verify", "gguf"),
    "page": ("jinja2", "matplotlib"),
    "s3": ("boto3",),
}
EXTRA_FOR = {
    "local": "stages on this machine",
    "page": "report pages (`report --html`)",
    "s3": "buckets in an S3 store",
}


class State(StrEnum):
    OK = "ok"
    WARN = "warn"
    BAD = "bad"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `cure`: a command, or a line to change; empty when there is nothing to do."""

    id: str
    group: str
    state: State
    found: str
    cure: str = ""


@dataclass(frozen=True)
class Wants:
    """What is asked of this computer: by a recipe, or (named False) by anybody who may run anything one day."""

    named: bool = False
    trains_here: bool = False  # a stage with a model on this machine
    rented: tuple[str, ...] = ()  # kinds of infra
    bucket: str = ""
    api_keys: tuple[str, ...] = ()  # names of variables
    hub_models: tuple[str, ...] = ()
    allow_account_key: bool = False

    @property
    def s3(self) -> bool:
        return self.bucket.startswith("s3:")

    def needs(self, wanted: bool) -> State:
        """How bad it is that something is missing: it stops this recipe, nothing here needs it, or it may matter."""
        return State.WARN if not self.named else State.BAD if wanted else State.SKIPPED


def wants_of(plan: Plan, *, allow_account_key: bool) -> Wants:
    """What a plan asks of this computer."""
    here = [stage for stage in plan.stages if any(offer.infra == "local" for offer in stage.candidates)]
    keys = [name for stage in plan.stages if (name := access.api_key_env(stage.settings)) is not None]
    return Wants(
        named=True,
        trains_here=any(stage.kind != "rehearse" for stage in here),
        rented=tuple(access.infras_of(plan)),
        bucket=plan.bucket,
        api_keys=tuple(dict.fromkeys(keys)),
        hub_models=tuple(dict.fromkeys(name for stage in here for name in access.hub_models(stage.settings))),
        allow_account_key=allow_account_key,
    )


# -- the recipe


def planned(plan: Plan) -> Check:
    """Whether it can start at all."""
    needed, cap = (money.both(one, plan.rate, plan.currency) for one in (plan.needed_micros, plan.cap_micros))
    if not plan.fits:
        found = f"{plan.name} needs {needed} with its reserves, the cap is {cap}"
        return Check("recipe", RECIPE, State.BAD, found, f"kdcloud plan {shlex.quote(plan.recipe)}")
    late = "" if plan.in_time else ", but misses its deadline"
    state = State.OK if plan.in_time else State.WARN
    return Check("recipe", RECIPE, state, f"{plan.name} plans: {needed} of {cap}{late}")


def not_planned(message: str, hint: str) -> Check:
    return Check("recipe", RECIPE, State.BAD, "; ".join(message.splitlines()), hint)


def rights(plan: Plan, *, allowed: bool, env: Mapping[str, str]) -> Check:
    """Whether a run would be refused for the rights that lie on machines. `allowed`: the recipe's allow_account_key."""
    endings = {infra: access.ending_of(infra, env) for infra in access.infras_of(plan)}
    stuck = [infra for infra, ending in endings.items() if not ending.itself]
    wide = [infra for infra, ending in endings.items() if ending.itself and ending.account and not allowed]
    if stuck:
        found = f"machines on {', '.join(stuck)} cannot end themselves: they are not rented"
        return Check("rights", RECIPE, State.BAD, found, f"leave {', '.join(stuck)} out of `infra:`")
    if wide:
        found = f"on {', '.join(wide)} a machine ends itself with a right over your whole account"
        return Check("rights", RECIPE, State.BAD, found, f"{access.ALLOW}, or leave them out (docs/credentials.md)")
    return Check("rights", RECIPE, State.OK, "machines carry no more rights than the recipe allows")


def quota(refused: Sequence[tuple[str, str]], asked: int, untold: int, stop: tuple[str, str] | None) -> Check:
    """What the account may rent on AWS. `refused`: (stage, why) of machines left out; `stop`: why nothing is left."""
    if stop is not None:
        return Check("quota", KEYS, State.BAD, *stop)
    if refused:
        stage, why = refused[0]
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        return Check(
            "quota", KEYS, State.WARN, f"{stage}: {why}{more}; others are taken", "kdcloud run leaves them out"
        )
    if asked == 0:
        return Check("quota", KEYS, State.SKIPPED, "no GPU quota of AWS is in question")
    if untold == asked:
        found = "AWS does not say how many GPUs your account may run"
        return Check("quota", KEYS, State.WARN, found, "allow your user servicequotas:GetServiceQuota")
    return Check("quota", KEYS, State.OK, f"the GPU quotas of AWS that matter here are large enough ({asked - untold})")


def own_quota(quota: Quota, allowed: float | None) -> Check:
    """How many vCPUs of GPU machines the account may run, where no recipe says which are wanted."""
    if allowed is None:
        return Check("quota", KEYS, State.SKIPPED, "AWS does not say how many GPUs your account may run")
    found = f"your account may run {allowed:g} vCPUs of {quota.what}"
    few = allowed < LEAST_VCPUS
    return Check("quota", KEYS, State.WARN if few else State.OK, found, raise_it(quota, LEAST_VCPUS) if few else "")


LEAST_VCPUS = 4  # of the smallest machines with a GPU (g4dn.xlarge, g5.xlarge, g6.xlarge)


# -- this computer


def python(version: tuple[int, int, int]) -> Check:
    words = "Python " + ".".join(map(str, version))
    oldest, newest = PYTHONS
    if version[:2] < oldest:
        return Check("python", COMPUTER, State.BAD, f"{words} is too old", f"install Python {_dots(newest)}")
    if version[:2] > newest:
        return Check(
            "python", COMPUTER, State.WARN, f"{words}: locked versions are for {_dots(oldest)} to {_dots(newest)}",
            f"make the environment with Python {_dots(newest)}",
        )  # fmt: skip
    return Check("python", COMPUTER, State.OK, words)


def _dots(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def extra(name: str, missing: Sequence[str], wants: Wants) -> Check:
    """An optional part of the installation. `missing`: names that cannot be imported."""
    id_, use = f"extra-{name}", EXTRA_FOR[name]
    if not missing:
        return Check(id_, COMPUTER, State.OK, f"installed: {use}")
    wanted = {"local": wants.trains_here, "s3": wants.s3}.get(name, False)
    state = State.WARN if name == "page" else wants.needs(wanted)
    if name == "s3" and not wants.named and not wants.s3:
        state = State.SKIPPED
    found = f"not installed ({', '.join(missing)}): {use}"
    cure = "" if state is State.SKIPPED else install_hint(name)
    return Check(id_, COMPUTER, state, found, cure)


def home(path: str, trouble: str, *, network: bool, open_to_others: bool) -> Check:
    """kdcloud's own folder. `trouble`: why it cannot be written."""
    if trouble:
        return Check("home", COMPUTER, State.BAD, f"{path}: {trouble}", "export KDCLOUD_HOME=/a/folder/of/yours")
    if open_to_others:
        return Check("home", COMPUTER, State.WARN, f"others on this computer can read {path}", f"chmod 700 {path}")
    if network:
        found = f"{path} lies on a network file system: the ledger is slower there, and right"
        return Check("home", COMPUTER, State.WARN, found, "export KDCLOUD_HOME=/a/folder/on/this/computer")
    return Check("home", COMPUTER, State.OK, f"{path} can be written")


def disk(id_: str, path: str, free_bytes: int) -> Check:
    free = free_bytes / GIB
    found = f"{free:.1f} GiB free in {path}"
    if free < DISK_BAD_GIB:
        return Check(id_, COMPUTER, State.BAD, found, "free some space, or name another folder" + _DISK_CURE[id_])
    if free < DISK_LOW_GIB:
        return Check(id_, COMPUTER, State.WARN, f"{found}: little for models", "free some space" + _DISK_CURE[id_])
    return Check(id_, COMPUTER, State.OK, found)


_DISK_CURE = {"disk": " (KDCLOUD_HOME); `kdcloud artifacts --prune` shows what old runs left", "temp": " (TMPDIR)"}


def clock(off_s: float | None, against: str) -> Check:
    """This computer's clock against a server's. None: nobody was asked."""
    if off_s is None:
        return Check("clock", COMPUTER, State.SKIPPED, "no server told the time")
    grace_s = GRACE.total_seconds()
    where = "ahead of" if off_s < 0 else "behind"
    found = f"{money.human_seconds(abs(off_s))} {where} {against}"
    if abs(off_s) > grace_s:
        more = f"{found}: machines' deadlines are of this clock, and a reaper allows {grace_s:.0f} s"
        return Check("clock", COMPUTER, State.BAD, more, "set the clock: sudo timedatectl set-ntp true")
    if abs(off_s) > LEASE_S:
        return Check("clock", COMPUTER, State.WARN, found, "set the clock: sudo timedatectl set-ntp true")
    return Check("clock", COMPUTER, State.OK, f"within {max(1.0, abs(off_s)):.0f} s of {against}")


# -- SkyPilot and keys


def skypilot(version: str | None, wants: Wants) -> Check:
    cloudy = [name for name in wants.rented if name != "local"]
    if version is None:
        state = wants.needs(bool(cloudy))
        found = "not installed: without it nothing can be rented" if state is not State.SKIPPED else "not installed"
        cure = "" if state is State.SKIPPED else install_hint("sky", *_sky_clouds(cloudy))
        return Check("sky", SKY, state, found, cure)
    if not version.startswith(SKY_WANTED):
        found = f"SkyPilot {version} is installed, kdcloud knows {SKY_WANTED}x"
        return Check("sky", SKY, wants.needs(bool(cloudy)), found, install_hint("", f"skypilot=={SKY_WANTED}*"))
    return Check("sky", SKY, State.OK, f"SkyPilot {version}")


def _sky_clouds(names: Sequence[str]) -> list[str]:
    own = [name for name in names if name != "slurm"]  # which kdcloud[sky] brings
    return [f"skypilot[{','.join(own)}]=={SKY_WANTED}*"] if own else []


def sky_infra(answer: SkyAnswer | None, wants: Wants) -> Check:
    """What can be rented. `answer` None: SkyPilot is not there to be asked."""
    if answer is None:
        return Check("sky-infra", SKY, State.SKIPPED, "there is no SkyPilot to ask")
    if answer.enabled is None:
        state = State.WARN if answer.late else wants.needs(bool(wants.rented))
        return Check("sky-infra", SKY, state, f"SkyPilot: {answer.trouble}", answer.hint or "sky check")
    names = [name for name in answer.enabled if name != "local"]
    lacking = [name for name in wants.rented if name not in names]
    listed = ", ".join(names) or "none"
    if lacking:
        found = f"the recipe names {', '.join(lacking)}, enabled: {listed}"
        all_gone = len(lacking) == len(wants.rented)
        cure = f"sky check {' '.join(lacking)}, or leave out of `infra:` what you do not use"
        return Check("sky-infra", SKY, State.BAD if all_gone else State.WARN, found, cure)
    if not names:
        return Check("sky-infra", SKY, wants.needs(False), "no infra is enabled", "sky check")
    return Check("sky-infra", SKY, State.OK, f"enabled: {listed}")


# Where SkyPilot 0.14 looks for keys (sky/clouds/<name>.py), and what puts them there.
KEY_FILES: Mapping[str, tuple[str, str]] = {
    "runpod": ("~/.runpod/config.toml", "runpod config"),
    "vast": ("~/.config/vastai/vast_api_key", "vastai set api-key YOUR_KEY"),
    "lambda": ("~/.lambda_cloud/lambda_keys", "write `api_key = YOUR_KEY` into ~/.lambda_cloud/lambda_keys"),
    "gcp": ("~/.config/gcloud/application_default_credentials.json", "gcloud auth application-default login"),
    "azure": ("~/.azure/msal_token_cache.json", "az login"),
    "kubernetes": ("~/.kube/config", "put your cluster into ~/.kube/config"),
    "slurm": ("~/.slurm/config", "put `Host NAME` with HostName and User into ~/.slurm/config"),
}


def key_file(infra: str, wants: Wants, *, there: bool, open_to_others: bool) -> Check:
    """A file with a provider's key: its end is not known, `sky-infra` says whether it is taken."""
    path, cure = KEY_FILES[infra]
    if not there:
        return Check(
            f"key-{infra}", KEYS, _one_of_many(wants), f"{path} is not there", f"{cure}{_or_leave(infra, wants)}"
        )
    if open_to_others and infra not in ("slurm", "kubernetes"):
        found = f"others on this computer can read {path}"
        return Check(f"key-{infra}", KEYS, State.WARN, found, f"chmod 600 {path}")
    return Check(f"key-{infra}", KEYS, State.OK, f"{path} is there")


def _one_of_many(wants: Wants) -> State:
    """How bad it is that one infra cannot be had: the others that a recipe names stand in for it."""
    return State.WARN if len(wants.rented) > 1 else State.BAD


def _or_leave(infra: str, wants: Wants) -> str:
    return f"; or leave {infra} out of `infra:`" if len(wants.rented) > 1 else ""


@dataclass(frozen=True)
class AwsFacts:
    """Who the AWS credentials are (`arn` None: not asked or refused), and when they end (None: not known, or never)."""

    found: bool
    arn: str | None = None
    expires_at: datetime | None = None
    session: bool = False  # of a session, which ends some time
    trouble: str = ""
    cure: str = ""
    elsewhere: str = ""  # host of another store, which these keys are for


def aws(facts: AwsFacts | None, wants: Wants, now: datetime) -> Check:
    """`facts` None: boto3 is not there."""
    store = wants.s3 and not (facts and facts.elsewhere)
    rented = "aws" in wants.rented
    missing = State.BAD if store else _one_of_many(wants) if rented else State.SKIPPED
    wrong = State.WARN if missing is State.SKIPPED else missing
    if facts is None:
        return Check("aws", KEYS, State.SKIPPED, "boto3 is not installed: AWS cannot be asked")
    if not facts.found:
        found = facts.trouble or "no AWS credentials"
        cure = f"aws configure, or aws sso login{'' if store else _or_leave('aws', wants)}"
        return Check("aws", KEYS, missing, found, "" if missing is State.SKIPPED else cure)
    if facts.expires_at is not None and facts.expires_at <= now:
        ago = money.human_seconds((now - facts.expires_at).total_seconds())
        return Check("aws", KEYS, wrong, f"the AWS credentials ended {ago} ago", _SIGN_IN)
    if facts.elsewhere:
        return Check("aws", KEYS, State.OK, f"keys for the store at {facts.elsewhere}; AWS itself is not asked")
    if facts.trouble:
        return Check("aws", KEYS, wrong, facts.trouble, facts.cure or _SIGN_IN)
    who = facts.arn or "AWS credentials"
    if facts.expires_at is not None:
        left = facts.expires_at - now
        found = f"{who}, for {money.human_seconds(left.total_seconds())} more"
        short = left < CREDENTIALS_SHORT
        return Check("aws", KEYS, State.WARN if short else State.OK, found, _SIGN_IN if short else "")
    return Check("aws", KEYS, State.OK, f"{who}, of a session that ends some time" if facts.session else who)


_SIGN_IN = "aws sso login, or renew them as you got them"


def api_key(name: str, *, there: bool) -> Check:
    if there:
        return Check(f"api-{name}", KEYS, State.OK, f"{name} is set")
    return Check(f"api-{name}", KEYS, State.BAD, f"{name} is not set", f"export {name}=...")


# -- bucket


@dataclass(frozen=True)
class BucketFacts:
    """What a write, a read, a listing and a delete came to. `step` is the one that failed, with what was said."""

    url: str
    step: str = ""
    trouble: str = ""
    cure: str = ""
    conditional: bool | None = None
    seconds: float = 0.0


def bucket(facts: BucketFacts, wants: Wants) -> Iterable[Check]:
    if facts.trouble:
        yield Check("bucket", BUCKET, State.BAD, f"{facts.step}: {facts.trouble}", facts.cure)
        yield Check("bucket-conditions", BUCKET, State.SKIPPED, "not tried")
        return
    cloudy = [name for name in wants.rented if name not in ("slurm", "local")]
    if cloudy and not wants.s3:
        yield Check(
            "bucket", BUCKET, State.BAD, f"{facts.url}: a rented machine cannot reach a folder of yours",
            "`bucket: s3://name/prefix` in the recipe, or in config.yaml for all",
        )  # fmt: skip
    else:
        found = f"{facts.url}: wrote, read, listed, deleted in {money.human_seconds(facts.seconds)}"
        yield Check("bucket", BUCKET, State.OK, found)
    if facts.conditional:
        yield Check("bucket-conditions", BUCKET, State.OK, "conditional writes hold: one client only owns a run")
    else:
        yield Check(
            "bucket-conditions", BUCKET, State.WARN, "no conditional writes: two clients may take the same run",
            "drive each run from one computer only, or use a store that has If-Match (S3, R2, MinIO)",
        )  # fmt: skip


def bucket_keys(way: access.Way, wants: Wants) -> Check:
    """How machines would reach the bucket."""
    if way.name != "account_key":
        found = f"machines get keys for their run only ({way.name}), at most {way.longest_s / access.HOUR_S:.0f} h"
        return Check("bucket-keys", BUCKET, State.OK, found)
    if wants.allow_account_key:
        return Check("bucket-keys", BUCKET, State.OK, "your own key goes to the machines: the recipe allows it")
    found = f"no keys for one run only: {way.why}"
    state = wants.needs(bool(wants.rented))
    return Check("bucket-keys", BUCKET, state, found, f"docs/credentials.md, or {access.ALLOW}")


# -- money and machines


def prices(asked_at: datetime | None, oldest: datetime | None, now: datetime, wants: Wants) -> Check:
    """Age of the prices on file; `asked_at` None: there are none, and the package's table (from `oldest`) is used."""
    if wants.named and not wants.rented:
        return Check("prices", MONEY, State.SKIPPED, "the recipe rents nothing")
    cure = "kdcloud offers --refresh"
    if asked_at is None:
        dated = f", its oldest of {oldest:%Y-%m}" if oldest is not None else ""
        return Check("prices", MONEY, State.WARN, f"nobody was asked yet: plans use a dated table{dated}", cure)
    age = money.human_seconds((now - asked_at).total_seconds())
    of = f", the oldest of {oldest:%Y-%m-%d}" if oldest is not None else ""
    state = State.WARN if now - min(asked_at, oldest or asked_at) > PRICES_OLD else State.OK
    return Check("prices", MONEY, state, f"asked {age} ago{of}", cure if state is State.WARN else "")


def rate(config: Config, today: date, file: str) -> Check:
    age = (today - config.rate.as_of).days
    found = f"1 USD = {config.rate.usd_to_cny} CNY as of {config.rate.as_of}"
    if age <= RATE_OLD_DAYS:
        return Check("rate", MONEY, State.OK, found)
    cure = f"`usd_to_cny:` and `rate_as_of: {today}` in {file}"
    return Check("rate", MONEY, State.WARN, f"{found}, {age} days ago", cure)


def month(config: Config, used: Month | None, *, rents: bool) -> Check:
    """The cap of all runs of a month together. `used` None: nothing ran yet."""
    if config.monthly_cap is None:
        if not rents:
            return Check("month", MONEY, State.SKIPPED, "no monthly cap; nothing can be rented from here yet")
        found = "no monthly cap: each run has its own only"
        return Check("month", MONEY, State.WARN, found, "kdcloud budget --month 200CNY")
    cap = money.cap_micros(config.monthly_cap, config.rate)
    left = cap if used is None else used.left_micros(cap)
    found = f"{money.both(max(0, left), config.rate, config.currency)} left of {config.monthly_cap} this month"
    return Check("month", MONEY, State.OK if left > 0 else State.WARN, found, "" if left > 0 else "kdcloud budget")


def reaper(places: Sequence[str], *, rents: bool) -> Check:
    """What ends forgotten machines when this terminal is closed. `places`: where it was found."""
    if places:
        return Check("reaper", MONEY, State.OK, f"set up: {', '.join(places)}")
    if not rents:
        return Check("reaper", MONEY, State.SKIPPED, "none is set up; nothing can be rented from here yet")
    found = "none is set up here: nobody ends what is forgotten while this computer sleeps"
    return Check("reaper", MONEY, State.WARN, found, "docs/reaper.md has a systemd timer, a cron line and a CI job")


@dataclass(frozen=True)
class Left:
    """Machines of a run that may bill. `driven` None: its bucket did not tell whether a client is there."""

    run: str
    machines: tuple[str, ...]
    driven: bool | None


def machines(left: Sequence[Left], runs: int, trouble: str = "", cure: str = "") -> Iterable[Check]:
    """Every machine that the ledger does not know to be gone. `trouble`: the ledger cannot be read."""
    if trouble:
        yield Check("ledger", MONEY, State.BAD, trouble, cure)
        return
    lost = [one for one in left if one.driven is not True]
    for one in lost:
        nobody = "no client drives it" if one.driven is False else "its bucket does not say whether a client is there"
        found = f"{one.run}: {_count(len(one.machines), 'machine')} may still bill, and {nobody}"
        yield Check("ledger", MONEY, State.BAD, found, f"kdcloud down {one.run}")
    if not lost:
        kept = f"; {_count(sum(len(one.machines) for one in left), 'machine')} at work now" if left else ""
        said = f"{_count(runs, 'run')}, every machine accounted for{kept}" if runs else "nothing ran from here yet"
        yield Check("ledger", MONEY, State.OK, said)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# -- models


def hub(name: str, trouble: str, *, token: bool, wants: Wants) -> Check:
    """Where models come from. `trouble`: why it does not answer."""
    if trouble and wants.named and not wants.hub_models:
        return Check("hub", MODELS, State.SKIPPED, f"{name} does not answer; the recipe fetches nothing from it")
    if trouble:
        cure = "set HF_ENDPOINT to a mirror, or KDCLOUD_HUB=modelscope; rented machines have a network of their own"
        return Check("hub", MODELS, State.WARN, f"{name} does not answer: {trouble}", cure)
    return Check("hub", MODELS, State.OK, f"{name} answers; HF_TOKEN is {'set' if token else 'not set'}")


# -- all together


def late(id_: str, group: str, limit_s: float) -> Check:
    found = f"gave no answer within {limit_s:.0f} s, and was given up"
    return Check(id_, group, State.WARN, found, "look at the network, or leave it out with --offline")


def broken(id_: str, group: str, error: Exception) -> Check:
    """A check that broke says nothing about what it looked at."""
    return Check(id_, group, State.WARN, f"could not be looked at: {type(error).__name__}: {error}")


def not_asked(id_: str, group: str) -> Check:
    return Check(id_, group, State.SKIPPED, "--offline")


def is_well(checks: Iterable[Check]) -> bool:
    return all(check.state is not State.BAD for check in checks)


def hidden(checks: Iterable[Check], secrets: Iterable[str]) -> list[Check]:
    """The same checks without a secret in them, without passwords in addresses, and without control characters."""
    words = sorted({one for one in secrets if len(one) >= SECRET_LENGTH}, key=len, reverse=True)

    def plain(text: str) -> str:
        for word in words:
            text = text.replace(word, "***")
        text = re.sub(r"://[^/@\s]+@", "://***@", text)
        return "".join(char if char.isprintable() else " " for char in text)

    return [replace(check, found=plain(check.found), cure=plain(check.cure)) for check in checks]


SECRET_LENGTH = 6  # shorter words are no secrets, and hiding them would hide half of the text
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.I)


def secrets_of(env: Mapping[str, str]) -> set[str]:
    """Values of variables that are named like secrets; paths are none."""
    return {value for name, value in env.items() if SECRET_NAME.search(name) and not value.startswith(("/", "~", "."))}


def in_order(checks: Iterable[Check]) -> list[Check]:
    return sorted(checks, key=lambda check: GROUPS.index(check.group))


def to_json(checks: Sequence[Check]) -> dict[str, Any]:
    """The document of `kdcloud doctor --json`; an empty cure is null."""
    rows = [
        {"id": c.id, "group": c.group, "state": str(c.state), "found": c.found, "cure": c.cure or None} for c in checks
    ]
    return {"schema": SCHEMA, "ok": is_well(checks), "checks": rows}


STYLES = {State.OK: "green", State.WARN: "yellow", State.BAD: "bold red", State.SKIPPED: "dim"}


def render(checks: Sequence[Check], console: Console) -> None:
    """Group by group: state, what it is, what was found, and below it the cure."""
    from rich.table import Table
    from rich.text import Text

    width = max(len(check.id) for check in checks)
    for group in dict.fromkeys(check.group for check in checks):
        console.print(Text(group, style="bold"))
        table = Table.grid(padding=(0, 1))
        table.add_column(width=7)
        table.add_column(width=width)
        table.add_column(overflow="fold")
        for check in (one for one in checks if one.group == group):
            words = Text(check.found, style="dim" if check.state is State.SKIPPED else "")
            if check.cure:
                words.append(f"\n-> {check.cure}", style="cyan")
            table.add_row(Text(str(check.state), style=STYLES[check.state]), Text(check.id, style="dim"), words)
        console.print(table)
        console.print()
    counts = {state: sum(check.state is state for check in checks) for state in (State.BAD, State.WARN, State.OK)}
    said = f"{counts[State.BAD]} bad, {counts[State.WARN]} to look at, {counts[State.OK]} ok"
    console.print(Text(said, style="bold red" if counts[State.BAD] else "bold green"))
