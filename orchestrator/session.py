"""Starts, resumes and ends runs: puts recipe, ledger, bucket, lease, provider and runner together."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from orchestrator import __version__, access, grants
from orchestrator.bounded import Bounded
from orchestrator.budget import month_cap_micros
from orchestrator.clock import Clock, SystemClock
from orchestrator.config import Config, Home, load_config
from orchestrator.errors import BudgetExceeded, KdcloudError, NotOwner, TeardownUnconfirmed, UsageError
from orchestrator.handover import check_installed, code_wheel, put_code, upload_data, with_origin
from orchestrator.lease import Lease, NoLease, is_free, read_holder
from orchestrator.ledger import Ledger, Run
from orchestrator.mirror import adopt, catch_up
from orchestrator.names import new_run_id
from orchestrator.notify import Teller, addresses
from orchestrator.plan import Plan, plan_from_dict, plan_to_dict
from orchestrator.planner import unbooked_micros
from orchestrator.provision import NotYetGone, Provisioner, ProvisionError
from orchestrator.provision_local import LocalProvisioner
from orchestrator.quota import ask_aws, within_quota
from orchestrator.routing import Routed
from orchestrator.runner import Outcome, Runner, Snapshot, mark_to_dict, worst_case_micros
from orchestrator.states import State
from tasks.bucket import Bucket, BucketError, open_bucket, probe

RUN_SCHEMA = 1
Say = Callable[[str, str | None, str], None]
NO_CONDITIONS = (
    "this bucket has no conditional writes: kdcloud cannot promise that only one client drives the run, so start, "
    "resume and end it from one computer only"
)


@dataclass(frozen=True)
class Session:
    """One client on one run, holding its lease. Make it with `start_run` or `resume_run`."""

    run_id: str
    plan: Plan
    ledger: Ledger
    provider: Provisioner
    bucket: Bucket
    lease: Lease
    clock: Clock
    home: Home
    owner: str
    notes: tuple[str, ...] = ()  # what a person must know before it goes on

    def go(self, *, say: Say, stop: Callable[[], bool], on_turn: Callable[[Snapshot], None]) -> Outcome:
        config = load_config(self.home)
        urls = addresses(config.notify, os.environ)
        teller = Teller(self.ledger, self.run_id, self.plan, self.clock, say, urls)

        def turned(snapshot: Snapshot) -> None:
            teller.look(snapshot.spending_micros)
            on_turn(snapshot)

        runner = Runner(
            ledger=self.ledger,
            provider=self.provider,
            bucket=self.bucket,
            clock=self.clock,
            plan=self.plan,
            run_id=self.run_id,
            owner=self.owner,
            lease=self.lease,
            code_folder=self.home.runs / self.run_id / "code",
            say=say,
            stop=stop,
            month_cap_micros=month_cap_micros(config),
        )
        try:
            outcome = runner.run(on_turn=turned, turn_s=turn_s(self.plan))
            teller.end(outcome.state, outcome.message, outcome.hint, self._may_bill())
            return outcome
        except TeardownUnconfirmed as error:
            teller.end("unconfirmed", error.message, error.hint, self._may_bill())
            raise
        finally:
            self.lease.release()
            teller.close()

    def _may_bill(self) -> dict[str, int]:
        """The most that each machine which may still bill may cost, by name."""
        return {row.name: worst_case_micros(row, self.clock) for row in self.ledger.run(self.run_id).live}


def provider_for(
    infra: str | Iterable[str],
    home: Home,
    *,
    local_price_micros: int = 0,
    allow_account_key: bool = False,
    ordered_on: Callable[[str], str | None] = lambda name: None,
) -> Provisioner:
    """`KDCLOUD_PROVIDER=module:factory` if set, this machine for `local`, SkyPilot for everything else.

    For several infras a Routed one; `ordered_on` says where a machine was ordered, as the ledger knows it.
    """
    named = os.environ.get("KDCLOUD_PROVIDER")
    if named:
        return named_provider(named)
    kinds = {name.partition("/")[0] for name in ([infra] if isinstance(infra, str) else infra)}
    local = LocalProvisioner(home.root, price_micros_per_hour=local_price_micros)
    if kinds == {"local"}:
        return local
    from orchestrator.provision_sky import SkyProvisioner

    rented = SkyProvisioner(home.root, allow_account_key=allow_account_key)
    if "local" not in kinds:
        return rented
    return Routed({kind: local if kind == "local" else rented for kind in sorted(kinds)}, ordered_on)


def named_provider(named: str) -> Provisioner:
    """The provider that `module:factory` makes."""
    module, _, factory = named.partition(":")
    try:
        provider = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"KDCLOUD_PROVIDER={named} cannot be loaded: {error}",
            hint="it must be module:factory, and the module importable",
        ) from error
    if not isinstance(provider, Provisioner):
        raise UsageError(
            f"KDCLOUD_PROVIDER={named} makes no Provisioner", hint="see orchestrator/provision.py for the seven calls"
        )
    return provider


def start_run(
    plan: Plan,
    *,
    ledger: Ledger,
    home: Home,
    config: Config,
    provider: Provisioner,
    recipe_text: str,
    allow_account_key: bool = False,
    smoke: bool = False,
    clock: Clock | None = None,
    say: Say = lambda kind, stage, text: None,
) -> Session:
    """A new run: rights checked, bucket probed, code and data put there, ledger opened, lease taken; nothing rented."""
    clock = clock or SystemClock()
    plan = _rentable(plan, say)
    run_id = new_run_id(plan.name)
    bucket, notes = ready_bucket(plan, run_id, clock, allow_account_key=allow_account_key)
    code, sha256 = code_wheel()
    put_code(bucket, code, sha256)
    stages = tuple(
        replace(stage, settings=upload_data(bucket, with_origin(stage, plan, recipe_text))) for stage in plan.stages
    )
    plan = replace(plan, stages=stages)
    mark = clock.mark()
    lease = Lease.acquire(bucket, config.owner, clock)
    ledger.create_run(
        run_id,
        name=plan.name,
        bucket=bucket.url,
        cap_micros=plan.cap_micros,
        deadline_s=plan.deadline_s,
        mark=mark_to_dict(mark),
        at=mark.wall,
        data={
            "schema": RUN_SCHEMA,
            "version": __version__,
            "code_sha256": sha256,
            "owner": config.owner,
            "recipe_text": recipe_text,
            "allow_account_key": allow_account_key,
            "plan": plan_to_dict(plan),
            "digest": plan.digest,
            "smoke": smoke,
        },
    )
    return Session(run_id, plan, ledger, provider, bucket, lease, clock, home, config.owner, notes)


def _rentable(plan: Plan, say: Say) -> Plan:
    """The plan without machines that the account may not rent. Raises NothingFits, BudgetExceeded."""
    if "KDCLOUD_PROVIDER" in os.environ:
        return plan
    left = within_quota(plan, ask_aws)
    for before, after in zip(plan.stages, left.stages, strict=True):
        for one in after.rejected[len(before.rejected) :]:
            say("warn", after.name, f"{one.infra} is left out: {one.why}")
    if plan.fits and not left.fits:
        raise BudgetExceeded(
            "what the account may rent is dearer than the cap allows; nothing was started",
            hint="raise --budget, or ask AWS for a higher quota of the machines named above",
        )
    return left


def ready_bucket(plan: Plan, run_id: str, clock: Clock, *, allow_account_key: bool) -> tuple[Bucket, tuple[str, ...]]:
    """The run's place in the bucket, tried out, and reachable for the machines; what it cannot do, in words.

    Raises UsageError, BucketError.
    """
    if "KDCLOUD_PROVIDER" not in os.environ:
        access.check(plan, allow_account_key=allow_account_key)
        check_installed(plan.stages)
    root = open_bucket(plan.bucket)
    notes = () if probe(root).conditional else (NO_CONDITIONS,)
    bucket = root.at(run_id)
    _check_reach(plan, bucket, allow_account_key=allow_account_key)
    return Bounded(bucket, clock), notes


def _check_reach(plan: Plan, bucket: Bucket, *, allow_account_key: bool) -> None:
    """Raises UsageError when rented machines could not be given keys for this run only, for as long as they live."""
    way = grants.find_way(bucket) if any(True for _ in access.rented(plan)) else None
    if way is not None:
        access.check_way(way, access.longest_s(plan), allow_account_key=allow_account_key)


def resume_run(
    run_id: str,
    *,
    ledger: Ledger,
    home: Home,
    cap_micros: int | None = None,
    deadline_s: float | None = None,
    to_work: bool = True,
    clock: Clock | None = None,
) -> Session:
    """Takes an unfinished run over; `to_work` False only to end its machines, for which no keys are needed.

    Raises NotOwner while its client is alive, UsageError for another version's or when machines would get no keys.
    """
    clock = clock or SystemClock()
    run = ledger.run(run_id)
    plan = plan_of(run)
    store = open_bucket(run.bucket)
    bucket = Bounded(store, clock)
    allowed = bool(run.data.get("allow_account_key"))
    if to_work:
        given = replace(plan, cap_micros=cap_micros or run.cap_micros, deadline_s=deadline_s or run.deadline_s)
        left = [stage for stage in plan.stages if stage.name not in run.done]
        access.check_api_keys(left)
        if "KDCLOUD_PROVIDER" not in os.environ:
            check_installed(left)
        _check_reach(given, store, allow_account_key=allowed)
    provider = provider_for(
        infra_of(plan),
        home,
        local_price_micros=local_price(plan),
        allow_account_key=allowed,
        ordered_on=lambda name: ordered_on(ledger.run(run_id), name),
    )
    lease = Lease.acquire(bucket, str(run.data["owner"]), clock)
    try:
        notes = catch_up(ledger, bucket, run_id)
    except (KdcloudError, BucketError):
        lease.release()
        raise
    run = ledger.run(run_id)
    mark = clock.mark()
    if cap_micros is not None or deadline_s is not None:
        promised = unbooked_micros([stage for stage in plan.stages if stage.name not in run.done], run.apis)
        if cap_micros is not None and cap_micros < run.spent_micros + run.open_micros + promised:
            lease.release()
            raise UsageError(
                f"--budget is below what run {run_id} has spent or reserved already",
                hint="give a larger one, or leave it out",
            )
        ledger.set_cap(
            run_id,
            cap_micros if cap_micros is not None else run.cap_micros,
            deadline_s if deadline_s is not None else run.deadline_s,
            mark_to_dict(mark),
            mark.wall,
        )
    ledger.note(run_id, "resumed", mark.wall, data={"version": __version__, "fence": lease.fence})
    return Session(run_id, plan, ledger, provider, bucket, lease, clock, home, str(run.data["owner"]), notes)


def plan_of(run: Run) -> Plan:
    """The approved plan of a run. Raises UsageError naming the version that can read it."""
    if run.data.get("schema") != RUN_SCHEMA:
        raise UsageError(
            f"run {run.id} was started by kdcloud {run.data.get('version')}, this is {__version__}",
            hint=f"install kdcloud=={run.data.get('version')} to resume it",
        )
    return plan_from_dict(run.data["plan"])


def reapable_providers(home: Home, ledger: Ledger | None, *, infra: Sequence[str] = ()) -> dict[str, Provisioner]:
    """Everywhere this computer may have machines, by name: here, where its runs have been, and what `infra` names.

    `ledger` None: it cannot be read. AWS is also asked itself: what SkyPilot forgot only EC2 knows. Raises UsageError.
    """
    unknown = [name for name in infra if name.partition("/")[0] not in ("local", "slurm", "aws")]
    if unknown:
        raise UsageError(
            f"reap cannot be told to look at {', '.join(unknown)}",
            hint="--infra aws or slurm; where runs of this computer have been is looked at anyway",
        )
    named = os.environ.get("KDCLOUD_PROVIDER")
    if named:
        return {named: named_provider(named)}
    plans = [ledger.run(run_id).data.get("plan", {}) for run_id in ledger.runs()] if ledger is not None else []
    planned = {offer["infra"] for plan in plans for stage in plan.get("stages", ()) for offer in stage["candidates"]}
    named_too = {name for name in infra if name.partition("/")[0] != "aws"}  # EC2 itself is asked for that
    rented = sorted({*planned, *named_too} - {"local"})
    sky = {"sky": provider_for(rented, home)} if rented else {}
    return {"local": LocalProvisioner(home.root), **sky, **_ec2(ledger, infra)}


def _ec2(ledger: Ledger | None, infra: Sequence[str]) -> dict[str, Provisioner]:
    """EC2 itself, where a machine of some run was ordered from AWS, or it is named."""
    machines = [row for run_id in ledger.runs() for row in ledger.run(run_id).machines] if ledger is not None else []
    if not any(name.partition("/")[0] == "aws" for name in [*infra, *(m.order["offer"]["infra"] for m in machines)]):
        return {}
    from orchestrator.reap_ec2 import Ec2Machines

    return {"ec2": Ec2Machines()}


def infra_of(plan: Plan) -> tuple[str, ...]:
    """Every infra on which the plan may have machines; `provider_for` takes them."""
    return tuple(dict.fromkeys(offer.infra for stage in plan.stages for offer in stage.candidates))


def turn_s(plan: Plan) -> float:
    """Between two looks of the client: a login node or a cloud is asked once a second at most."""
    return 0.3 if all(infra == "local" for infra in infra_of(plan)) else 1.0


def ordered_on(run: Run, name: str) -> str | None:
    """The infra on which a machine of this run was ordered, None for a name the run does not know."""
    return next((str(row.order["offer"]["infra"]) for row in run.machines if row.name == name), None)


def local_price(plan: Plan) -> int:
    return next((o.price_micros_per_hour or 0 for s in plan.stages for o in s.candidates if o.infra == "local"), 0)


def end_run(
    run_id: str, *, ledger: Ledger, home: Home, say: Say, clock: Clock | None = None, patience_s: float = 150.0
) -> Outcome:
    """Ends every machine of a run. A living client is asked to stop and does it; a dead one's place is taken."""
    clock = clock or SystemClock()
    mark = clock.mark()
    ledger.note(run_id, "stop_requested", mark.wall)
    bucket = Bounded(open_bucket(ledger.run(run_id).bucket), clock)
    waited = 0.0
    while True:
        try:
            session = resume_run(run_id, ledger=ledger, home=home, to_work=False, clock=clock)
            break
        except NotOwner as error:
            if not _open_machines(ledger.run(run_id)):
                return Outcome("stopped")
            if waited >= patience_s:
                raise
            if waited == 0:
                holder = read_holder(bucket)
                say(
                    "wait",
                    None,
                    f"asked its client (process {holder[0].pid if holder else '?'}) to stop"
                    if holder
                    else error.message,
                )
            clock.sleep(0.5)
            waited += 0.5
        except BucketError as error:
            say("warn", None, f"{error.message}; ending the machines without it")
            session = _without_bucket(run_id, ledger, home, bucket, clock)
            break
    return session.go(say=say, stop=lambda: True, on_turn=lambda snapshot: None)


def _without_bucket(run_id: str, ledger: Ledger, home: Home, bucket: Bucket, clock: Clock) -> Session:
    """A session that can only end machines: a store that is away must not keep them alive."""
    run = ledger.run(run_id)
    plan, key = plan_of(run), bool(run.data.get("allow_account_key"))
    provider = provider_for(infra_of(plan), home, local_price_micros=local_price(plan), allow_account_key=key)
    return Session(run_id, plan, ledger, provider, bucket, NoLease(), clock, home, str(run.data["owner"]))


def _open_machines(run: Run) -> list[str]:
    return [m.name for m in run.machines if m.state is not State.GONE]


def end_local_strangers(ledger: Ledger, home: Home, *, say: Say, clock: Clock | None = None) -> int:
    """Ends machines of this home that the ledger does not know (it was lost or moved aside). Returns how many."""
    clock = clock or SystemClock()
    provider = LocalProvisioner(home.root)
    strangers = [seen.name for seen in provider.ours() if not ledger.machine_known(seen.name)]
    for name in strangers:
        for _ in range(80):
            try:
                provider.terminate(name)
                say("gone", None, f"{name} (not in the ledger) is gone")
                break
            except (NotYetGone, ProvisionError):
                clock.sleep(0.5)
    return len(strangers)


@contextmanager
def opened_ledger(home: Home, *, say: Callable[[str], None] = lambda text: None) -> Iterator[Ledger]:
    ledger = Ledger(home.ledger, say=say)
    try:
        yield ledger
    finally:
        ledger.close()


def newest(ledger: Ledger, given: str | None) -> str:
    """The run a person means: what was typed, else (or for `last`) the newest. Raises UsageError when there is none.

    The address of a run in its bucket brings it into this ledger first, so that any computer can name any run.
    """
    if given and ":" in given:
        run_id, notes = adopt(ledger, open_bucket(given))
        for text in notes:
            print(text, file=sys.stderr)
        return run_id
    if given and given != "last":
        return ledger.find(given)
    runs = ledger.runs()
    if not runs:
        raise UsageError("nothing has run yet", hint="try `kdcloud run quickstart`")
    return runs[0]


def state_of(run: Run) -> str:
    """running (the lease tells whether somebody drives it) or what it ended as, see runner.Outcome."""
    ends = [e for e in run.entries if e.kind in ("ended", "resumed")]
    if ends and ends[-1].kind == "ended":
        return str(ends[-1].data["state"])
    return "running"


def live_machines(run: Run, provider: Provisioner | None, clock: Clock | None = None) -> list[dict[str, Any]]:
    """Machines that may bill, with what the provider says of them now (unknown when it was not asked)."""
    clock = clock or SystemClock()
    found = []
    for row in run.live:
        status = "unknown"
        if provider is not None:
            with suppress(ProvisionError, OSError):
                status = str(provider.observe(row.name).state)
        found.append(
            {
                "name": row.name,
                "stage": row.serves,
                "stages": list(row.stages),
                "state": str(row.state),
                "provider": status,
                "reserved_micros": row.reserved_micros,
                "worst_case_micros": worst_case_micros(row, clock),
            }
        )
    return found


def is_driven(bucket: Bucket, clock: Clock) -> bool:
    """Whether a living client holds the run's lease."""
    found = read_holder(bucket)
    return found is not None and not is_free(*found, now=bucket.now(), clock=clock)


def is_left(bucket: Bucket, clock: Clock) -> bool:
    """Whether the lease was given back, or its holder is known to be dead: not merely late."""
    found = read_holder(bucket)
    return found is None or is_free(*found, now=found[1], clock=clock)
