"""Looks for forgotten machines wherever this computer can look, and ends them when told to (reaper.py decides)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from orchestrator.clock import Clock
from orchestrator.guarded import CALL_LIMIT_S, Guarded
from orchestrator.ledger import Ledger
from orchestrator.provision import Observation, Provisioner, ProvisionError, Status
from orchestrator.reaper import Action, Finding, Known, judge
from orchestrator.session import is_driven, state_of
from tasks.bucket import Bucket, BucketError, open_bucket

END_LIMIT_S = 120.0


@dataclass(frozen=True)
class Reaped:
    """What was found and what became of it. `left`: asked to end and still there."""

    findings: tuple[Finding, ...]
    ended: tuple[str, ...]
    left: tuple[str, ...]
    unanswered: tuple[str, ...]  # providers that did not answer: what they hold is not known

    @property
    def saved_micros_per_hour(self) -> int:
        """What the machines in `ended` cost an hour, as far as their prices are known."""
        return sum(f.price_micros_per_hour or 0 for f in self.findings if f.name in self.ended)


def reap(
    *,
    ledger: Ledger,
    providers: dict[str, Provisioner],
    owner: str,
    clock: Clock,
    do_end: bool,
    orphans: bool = False,
    older_than: timedelta | None = None,
    say: Callable[[str], None] = lambda text: None,
    bucket_of: Callable[[str], Bucket] = open_bucket,
    call_limit_s: float | None = CALL_LIMIT_S,
) -> Reaped:
    """Lists every machine of ours everywhere; with `do_end` ends what is forgotten and waits until it is gone.

    `call_limit_s` None: no threads and no time limits, for providers and clocks that live in memory.
    """
    found: list[tuple[Provisioner, Observation]] = []
    unanswered = []
    for name, bare in providers.items():
        provider = Guarded(bare, lambda: clock.mark().wall, limit_s=call_limit_s)
        try:
            found += [(provider, seen) for seen in provider.ours()]
        except (ProvisionError, OSError) as error:
            unanswered.append(f"{name}: {error}")
    known = known_machines(ledger, {seen.name for _, seen in found}, clock, bucket_of)
    now = clock.mark().wall
    findings = judge([s for _, s in found], known, owner=owner, now=now, orphans=orphans, older_than=older_than)
    ended: list[str] = []
    left: list[str] = []
    if do_end:
        where = {seen.name: provider for provider, seen in found}
        for finding in findings:
            if finding.action is Action.END:
                say(f"ending {finding.name}: {finding.why}")
                (ended if _end(where[finding.name], finding.name, clock) else left).append(finding.name)
    return Reaped(tuple(findings), tuple(ended), tuple(left), tuple(unanswered))


def known_machines(
    ledger: Ledger, names: set[str], clock: Clock, bucket_of: Callable[[str], Bucket]
) -> dict[str, Known]:
    """What the ledger and the leases say of these machines."""
    known: dict[str, Known] = {}
    for run_id in ledger.runs():
        run = ledger.run(run_id)
        mine = [row for row in run.machines if row.name in names]
        if not mine:
            continue
        try:
            driven = is_driven(bucket_of(run.bucket), clock)
        except BucketError:
            driven = True  # nobody can tell: a machine that may be somebody's work is kept until its deadline
        for row in mine:
            known[row.name] = Known(row, state_of(run) != "running", driven, row.stage in run.done)
    return known


def _end(provider: Provisioner, name: str, clock: Clock) -> bool:
    """Asks until the provider says it is gone, or the limit is reached."""
    since = clock.mark()
    while (clock.mark().boot_s - since.boot_s) < END_LIMIT_S:
        try:
            provider.terminate(name)
            if provider.observe(name).state is Status.ABSENT:
                return True
        except (ProvisionError, OSError):
            pass  # said to be tried again; what is left is reported
        clock.sleep(0.5)
    return False
