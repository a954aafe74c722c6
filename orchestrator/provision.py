"""The seam between kdcloud and whoever owns the machines: every type that crosses it, frozen, and the one protocol.

Implementations: `provision_local` (this machine), `provision_sky` (SkyPilot), `testing` (the fake), or
`KDCLOUD_PROVIDER=module:factory`, where `factory()` takes no argument and returns a Provisioner.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Protocol, runtime_checkable

NAME_PREFIX = "kd-"
MAX_NAME = 35


class Status(StrEnum):
    """What the provider says of a machine, right now."""

    ABSENT = "absent"  # never heard of it, or gone: nothing bills
    CREATING = "creating"
    RUNNING = "running"
    STOPPING = "stopping"
    FAILED = "failed"  # will never run; may still exist, so it is torn down like any other
    UNKNOWN = "unknown"  # the provider did not answer


class JobState(StrEnum):
    NONE = "none"
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    LOST = "lost"


@dataclass(frozen=True)
class Latencies:
    """Worst-case seconds between a decision and the end of billing, per provider; reserved for every machine."""

    tick_s: float = 5.0  # watchdog period
    flush_s: float = 120.0  # capped last upload
    api_s: float = 60.0  # calls until the provider accepts a teardown
    provision_s: float = 60.0  # the provider's own delay
    handover_s: float = 30.0  # job sent until the supervisor counts
    slack_s: float = 90.0
    unguarded_s: float = 0.0  # how late a reaper may be where the provider takes no time limit at create; else 0

    @property
    def total_s(self) -> float:
        own = self.tick_s + self.flush_s + self.handover_s + self.slack_s
        return own + self.ending_s + self.unguarded_s

    @property
    def ending_s(self) -> float:
        """From the decision to end a machine until the provider has ended it."""
        return self.api_s + self.provision_s


@dataclass(frozen=True)
class Offer:
    """One way to get a machine. `price_micros_per_hour` is for the whole machine; None = unknown, never launched."""

    infra: str  # local | aws | runpod | slurm/lab ...
    region: str | None
    instance: str
    gpu: str | None  # None = CPU only
    gpus: int
    vram_gib: float  # of one GPU (CPU: the memory a stage may use)
    spot: bool
    price_micros_per_hour: int | None
    as_of: datetime
    source: str = ""
    quantum_s: int = 1  # billed in steps of
    minimum_s: int = 0  # minimum charge
    ceiling_micros_per_hour: int | None = None  # what a spot price may rise to; None = the price is fixed
    latencies: Latencies = field(default_factory=Latencies)


@dataclass(frozen=True)
class Need:
    """What a stage asks for; empty tuples mean anything."""

    infra: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    gpu_count: int = 1
    vram_gib: float = 0.0
    disk_gib: float = 0.0
    spot: bool | None = None


@dataclass(frozen=True)
class Order:
    """One machine to create. Idempotent on `name`: the same order twice makes one machine."""

    name: str
    run: str
    stage: str
    offer: Offer
    deadline_at: datetime  # the machine must be gone by then
    lifetime_s: float  # the same, as an age from the moment the request is sent
    fence: int = 0


@dataclass(frozen=True)
class Job:
    id: str | None = None
    state: JobState = JobState.NONE
    rc: int | None = None  # set when DONE


@dataclass(frozen=True)
class Observation:
    """What the provider said at `read_at`; never from a cache."""

    name: str
    state: Status
    landed_offer: Offer | None
    created_at: datetime | None
    job: Job
    read_at: datetime
    ended_at: datetime | None = None  # when billing stopped, where the provider can tell; settles less than "until now"


class ProvisionError(Exception):
    """The provider did not do what was asked. `hint` says what the user can do."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class NoCapacity(ProvisionError):
    """This offer cannot be had now; the runner tries the next one."""


class NotYetGone(ProvisionError):
    """The teardown was asked for and the machine is still there: call again."""


class Partly(ProvisionError):
    """`ours()` could not look everywhere: `found` is what exists where it could."""

    def __init__(self, message: str, *, found: Sequence[Observation], hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.found = tuple(found)


@dataclass(frozen=True)
class Reach:
    """How the owner of a machine gets at what a job has there."""

    folders: tuple[str, ...]  # where the job's folder may be, as a shell there takes it: quoted where it must be
    ssh: tuple[str, ...] = ()  # the words of an ssh command, but for `host`; none: it is this machine
    host: str = ""


@runtime_checkable
class Reachable(Protocol):
    """A Provisioner whose machines can be worked on (`kdcloud dev`)."""

    def reach(self, name: str, job_id: str) -> Reach:
        """Asks the provider where it must. Raises ProvisionError."""
        ...


@runtime_checkable
class Provisioner(Protocol):
    """All calls may be repeated after a crash at any point; none may be assumed to have happened."""

    def offers(self, need: Need) -> list[Offer]:
        """Everything that could serve `need`, cheapest first is not promised. Price None = unknown."""
        ...

    def launch(self, order: Order) -> None:
        """Returns once the request is recorded with the provider; progress is seen by `observe`.

        Idempotent on `order.name`. Raises NoCapacity, ProvisionError.
        """
        ...

    def observe(self, name: str) -> Observation:
        """Asks the provider. A machine that is gone or was never made has state ABSENT; no answer is UNKNOWN."""
        ...

    def run(self, name: str, job_id: str, argv: Sequence[str], env: Mapping[str, str]) -> None:
        """Starts `argv` (the supervisor) there. Idempotent on `job_id`. `env` may hold secrets: never logged."""
        ...

    def logs(self, name: str, job_id: str) -> Iterator[str]:
        """Lines the job has printed so far."""
        ...

    def terminate(self, name: str) -> None:
        """Ends the machine. Already gone is success; still there raises NotYetGone: call again."""
        ...

    def ours(self) -> list[Observation]:
        """Every machine whose name starts with kdcloud's prefix, known to the ledger or not."""
        ...
