"""Starts, resumes and ends runs: puts recipe, ledger, bucket, lease, provider and runner together."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from orchestrator import __version__
from orchestrator.clock import Clock, Mark, SystemClock, age_s
from orchestrator.config import Config, Home
from orchestrator.errors import NotOwner, UsageError
from orchestrator.guarded import CALL_LIMIT_S
from orchestrator.handover import code_wheel, put_code, upload_data
from orchestrator.lease import Lease, is_free, read_holder
from orchestrator.ledger import Ledger, Run
from orchestrator.names import new_run_id
from orchestrator.plan import Plan, plan_from_dict, plan_to_dict
from orchestrator.provision import NotYetGone, Provisioner, ProvisionError
from orchestrator.provision_local import LocalProvisioner
from orchestrator.runner import Outcome, Runner, Snapshot, mark_to_dict, snapshot_of
from orchestrator.states import State
from tasks.bucket import Bucket, open_bucket, probe
from tasks.contract import LOG_FILE

RUN_SCHEMA = 1
Say = Callable[[str, str | None, str], None]


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

    def go(self, *, say: Say, stop: Callable[[], bool], on_turn: Callable[[Snapshot], None]) -> Outcome:
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
        )
        try:
            return runner.run(on_turn=on_turn)
        finally:
            self.lease.release()


def provider_for(
    plan_infra: str, home: Home, *, local_price_micros: int = 0, allow_account_key: bool = False
) -> Provisioner:
    """`KDCLOUD_PROVIDER=module:factory` if set, this machine for `local`, SkyPilot for Slurm.

    Raises UsageError for what is not there yet: clouds need the code and the bucket's keys brought to the machine.
    """
    named = os.environ.get("KDCLOUD_PROVIDER")
    if named:
        return named_provider(named)
    if plan_infra == "local":
        return LocalProvisioner(home.root, price_micros_per_hour=local_price_micros)
    if plan_infra.startswith("slurm"):
        from orchestrator.provision_sky import SkyProvisioner

        return SkyProvisioner(home.root, allow_account_key=allow_account_key)
    raise UsageError(
        f"this version of kdcloud plans for {plan_infra} but cannot rent machines there yet",
        hint="run with --infra local, or --infra slurm/CLUSTER",
    )


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
    clock: Clock | None = None,
) -> Session:
    """A new run: bucket probed, code and data put there, ledger opened, lease taken. Nothing is rented yet."""
    clock = clock or SystemClock()
    run_id = new_run_id(plan.name)
    root = open_bucket(plan.bucket)
    probe(root)
    bucket = root.at(run_id)
    code, sha256 = code_wheel()
    put_code(bucket, code, sha256)
    stages = tuple(replace(stage, settings=upload_data(bucket, stage.settings)) for stage in plan.stages)
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
        },
    )
    return Session(run_id, plan, ledger, provider, bucket, lease, clock, home, config.owner)


def resume_run(
    run_id: str,
    *,
    ledger: Ledger,
    home: Home,
    cap_micros: int | None = None,
    deadline_s: float | None = None,
    clock: Clock | None = None,
) -> Session:
    """Takes an unfinished run over. Raises NotOwner while its client is alive, UsageError for another version's."""
    clock = clock or SystemClock()
    run = ledger.run(run_id)
    plan = plan_of(run)
    bucket = open_bucket(run.bucket)
    provider = provider_for(
        infra_of(plan),
        home,
        local_price_micros=local_price(plan),
        allow_account_key=bool(run.data.get("allow_account_key")),
    )
    lease = Lease.acquire(bucket, str(run.data["owner"]), clock)
    mark = clock.mark()
    if cap_micros is not None or deadline_s is not None:
        if cap_micros is not None and cap_micros < run.spent_micros + run.open_micros:
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
    return Session(run_id, plan, ledger, provider, bucket, lease, clock, home, str(run.data["owner"]))


def plan_of(run: Run) -> Plan:
    """The approved plan of a run. Raises UsageError naming the version that can read it."""
    if run.data.get("schema") != RUN_SCHEMA:
        raise UsageError(
            f"run {run.id} was started by kdcloud {run.data.get('version')}, this is {__version__}",
            hint=f"install kdcloud=={run.data.get('version')} to resume it",
        )
    return plan_from_dict(run.data["plan"])


def reapable_providers(home: Home, ledger: Ledger) -> dict[str, Provisioner]:
    """Everywhere this computer may have machines, by name: here, and where its runs have been."""
    named = os.environ.get("KDCLOUD_PROVIDER")
    if named:
        return {named: named_provider(named)}
    plans = [ledger.run(run_id).data["plan"] for run_id in ledger.runs()]
    infra = {offer["infra"] for plan in plans for stage in plan["stages"] for offer in stage["candidates"]}
    rented = {"slurm": provider_for("slurm", home)} if any(name.startswith("slurm") for name in infra) else {}
    return {"local": LocalProvisioner(home.root), **rented}


def infra_of(plan: Plan) -> str:
    """The one infra of the plan's machines. Raises UsageError for several: a run has one provider yet."""
    kinds = {offer.infra.partition("/")[0] for stage in plan.stages for offer in stage.candidates}
    if len(kinds) > 1 and "KDCLOUD_PROVIDER" not in os.environ:
        raise UsageError(
            f"this plan needs machines on {', '.join(sorted(kinds))}; a run cannot mix them yet",
            hint="name one infra in the recipe, or with --infra",
        )
    return plan.stages[0].candidates[0].infra


def local_price(plan: Plan) -> int:
    return next((o.price_micros_per_hour or 0 for s in plan.stages for o in s.candidates if o.infra == "local"), 0)


def end_run(
    run_id: str, *, ledger: Ledger, home: Home, say: Say, clock: Clock | None = None, patience_s: float = 150.0
) -> Outcome:
    """Ends every machine of a run. A living client is asked to stop and does it; a dead one's place is taken."""
    clock = clock or SystemClock()
    mark = clock.mark()
    ledger.note(run_id, "stop_requested", mark.wall)
    bucket = open_bucket(ledger.run(run_id).bucket)
    waited = 0.0
    while True:
        try:
            session = resume_run(run_id, ledger=ledger, home=home, clock=clock)
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
    return session.go(say=say, stop=lambda: True, on_turn=lambda snapshot: None)


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
    """The run a person means: what was typed, else (or for `last`) the newest. Raises UsageError when there is none."""
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


def live_machines(run: Run, provider: Provisioner | None) -> list[dict[str, Any]]:
    """Machines that may bill, with what the provider says of them now (unknown when it was not asked)."""
    found = []
    for row in run.live:
        status = "unknown"
        if provider is not None:
            with suppress(ProvisionError, OSError):
                status = str(provider.observe(row.name).state)
        found.append(
            {
                "name": row.name,
                "stage": row.stage,
                "state": str(row.state),
                "provider": status,
                "reserved_micros": row.reserved_micros,
            }
        )
    return found


def watch_run(
    run_id: str,
    *,
    ledger: Ledger,
    plan: Plan,
    on_turn: Callable[[Snapshot], None],
    clock: Clock | None = None,
    turn_s: float = 0.5,
) -> Outcome:
    """Follows a run that another client drives until it ends. Raises UsageError when nobody drives it any more.

    A client that waits for its provider may be late with its lease: it is given the time such a call may take.
    """
    clock = clock or SystemClock()
    bucket = open_bucket(ledger.run(run_id).bucket)
    silent: Mark | None = None
    while True:
        run = ledger.run(run_id)
        ends = [e for e in run.entries if e.kind in ("ended", "resumed")]
        if ends and ends[-1].kind == "ended":
            return Outcome(**{k: str(ends[-1].data[k]) for k in ("state", "message", "hint")})
        silent = None if is_driven(bucket, clock) else silent or clock.mark()
        if silent is not None and (is_left(bucket, clock) or age_s(silent, clock.mark()) > CALL_LIMIT_S):
            raise UsageError(
                f"nobody drives {run_id} any more: its client is gone",
                hint=f"go on with `kdcloud run --resume {run_id}`",
            )
        on_turn(snapshot_of(run, plan, bucket, clock))
        clock.sleep(turn_s)


def is_driven(bucket: Bucket, clock: Clock) -> bool:
    """Whether a living client holds the run's lease."""
    found = read_holder(bucket)
    return found is not None and not is_free(*found, now=bucket.now(), clock=clock)


def is_left(bucket: Bucket, clock: Clock) -> bool:
    """Whether the lease was given back, or its holder is known to be dead: not merely late."""
    found = read_holder(bucket)
    return found is None or is_free(*found, now=found[1], clock=clock)


def read_log(run: Run, stage: str | None) -> str:
    """The log of a stage, or of the newest stage that has one. Raises UsageError."""
    bucket = open_bucket(run.bucket)
    names = [s.name for s in plan_of(run).stages]
    if stage is not None and stage not in names:
        raise UsageError(f"run {run.id} has no stage {stage!r}", hint=f"its stages: {', '.join(names)}")
    for name in [stage] if stage else reversed(names):
        if bucket.head(f"{name}/{LOG_FILE}") is not None:
            return bucket.get(f"{name}/{LOG_FILE}")[0].decode(errors="replace")
    raise UsageError(
        f"run {run.id} has no log{f' of stage {stage}' if stage else ''} yet",
        hint="a log appears once its stage has started",
    )
