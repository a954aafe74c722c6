"""Where does a call go when a run has machines in several places? To the provider that made the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from orchestrator.provision import (
    Job,
    Need,
    NotYetGone,
    Observation,
    Offer,
    Order,
    Provisioner,
    ProvisionError,
    Reach,
    Reachable,
    Status,
)


class Routed:
    """One Provisioner before several, by kind of infra (`local`, `slurm`, `aws`); kinds may share a provider.

    `infra_of` says where a machine was ordered, as the ledger knows it, or None. A name that nobody remembers is asked
    of all: it is absent only if all say so.
    """

    def __init__(
        self, providers: Mapping[str, Provisioner], infra_of: Callable[[str], str | None] = lambda name: None
    ) -> None:
        self._providers, self._infra_of = dict(providers), infra_of
        self._ordered: dict[str, str] = {}  # by machine

    def offers(self, need: Need) -> list[Offer]:
        if not need.infra:
            return [offer for provider in self._all() for offer in provider.offers(need)]
        groups: dict[int, tuple[Provisioner, list[str]]] = {}
        for infra in need.infra:
            provider = self._at(infra)
            groups.setdefault(id(provider), (provider, []))[1].append(infra)
        found: list[Offer] = []
        for provider, infras in groups.values():
            found += provider.offers(replace(need, infra=tuple(infras)))
        return found

    def launch(self, order: Order) -> None:
        provider = self._at(order.offer.infra)
        self._ordered[order.name] = order.offer.infra
        provider.launch(order)

    def observe(self, name: str) -> Observation:
        known = self._of(name)
        if known is not None:
            return known.observe(name)
        unknown: Observation | None = None
        for provider in self._all():
            try:
                seen = provider.observe(name)
            except ProvisionError:
                seen = Observation(name, Status.UNKNOWN, None, None, Job(), datetime.now(UTC))
            if seen.state not in (Status.ABSENT, Status.UNKNOWN):
                return seen
            unknown = seen if seen.state is Status.UNKNOWN else unknown
        return unknown or Observation(name, Status.ABSENT, None, None, Job(), datetime.now(UTC))

    def run(self, name: str, job_id: str, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self._where(name).run(name, job_id, argv, env)

    def logs(self, name: str, job_id: str) -> Iterator[str]:
        return self._where(name).logs(name, job_id)

    def reach(self, name: str, job_id: str) -> Reach:
        where = self._where(name)
        if not isinstance(where, Reachable):
            raise ProvisionError(f"the machine {name} cannot be reached", hint="name another infra in the recipe")
        return where.reach(name, job_id)

    def terminate(self, name: str) -> None:
        known = self._of(name)
        if known is not None:
            known.terminate(name)
            return
        troubles: list[ProvisionError] = []
        for provider in self._all():
            try:
                provider.terminate(name)
            except ProvisionError as error:
                troubles.append(error)
        for trouble in sorted(troubles, key=lambda error: isinstance(error, NotYetGone)):
            raise trouble

    def ours(self) -> list[Observation]:
        """What those that answer have. Raises when somebody did not and nothing was found: no answer is not none."""
        found: list[Observation] = []
        trouble: ProvisionError | None = None
        for provider in self._all():
            try:
                found += provider.ours()
            except ProvisionError as error:
                trouble = error
        if trouble is not None and not found:
            raise trouble
        return found

    def _all(self) -> list[Provisioner]:
        return list({id(provider): provider for provider in self._providers.values()}.values())

    def _at(self, infra: str) -> Provisioner:
        kind = infra.partition("/")[0]
        if kind not in self._providers:
            raise ProvisionError(f"this run has no provider for {infra}", hint="start a new run with it in `infra:`")
        return self._providers[kind]

    def _of(self, name: str) -> Provisioner | None:
        """The provider of a machine that was ordered, None for a name nobody remembers."""
        infra = self._ordered.get(name) or self._infra_of(name)
        return self._providers.get(infra.partition("/")[0]) if infra else None

    def _where(self, name: str) -> Provisioner:
        """The provider that has the machine. Raises ProvisionError when none says so."""
        known = self._of(name)
        if known is not None:
            return known
        for provider in self._all():
            if provider.observe(name).state not in (Status.ABSENT, Status.UNKNOWN):
                return provider
        raise ProvisionError(f"{name} is gone")
