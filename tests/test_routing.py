"""Does every call reach the provider that has the machine, also after a client was killed?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from orchestrator.config import Home
from orchestrator.provision import Job, Need, NotYetGone, Observation, Offer, Order, ProvisionError, Status
from orchestrator.provision_local import LocalProvisioner
from orchestrator.provision_sky import SkyProvisioner
from orchestrator.routing import Routed
from orchestrator.session import infra_of, provider_for, turn_s
from orchestrator.testing import fake_offer
from tests.plans import make_plan

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Place:
    """A provider that keeps names, and what it was asked."""

    def __init__(self, kind: str) -> None:
        self.kind, self.machines, self.asked = kind, set[str](), list[str]()
        self.trouble: ProvisionError | None = None

    def _answer(self, what: str, name: str) -> None:
        self.asked.append(f"{what} {name}")
        if self.trouble is not None:
            raise self.trouble

    def offers(self, need: Need) -> list[Offer]:
        return [fake_offer(infra=infra) for infra in need.infra or (self.kind,)]

    def launch(self, order: Order) -> None:
        self._answer("launch", order.name)
        self.machines.add(order.name)

    def observe(self, name: str) -> Observation:
        self._answer("observe", name)
        return Observation(name, Status.RUNNING if name in self.machines else Status.ABSENT, None, None, Job(), NOW)

    def run(self, name: str, job_id: str, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self._answer("run", name)

    def logs(self, name: str, job_id: str) -> Iterator[str]:
        yield f"{self.kind} {name}"

    def terminate(self, name: str) -> None:
        self._answer("terminate", name)
        self.machines.discard(name)

    def ours(self) -> list[Observation]:
        self._answer("ours", "")
        return [self.observe(name) for name in sorted(self.machines)]


@pytest.fixture
def here() -> Place:
    return Place("local")


@pytest.fixture
def away() -> Place:
    return Place("aws")


def routed(here: Place, away: Place, ledger: Mapping[str, str] | None = None) -> Routed:
    return Routed({"local": here, "aws": away, "slurm": away}, dict(ledger or {}).get)


def order(name: str, infra: str) -> Order:
    return Order(name, "r", "train", fake_offer(infra=infra), NOW + timedelta(hours=1), 3600.0)


def test_a_machine_is_asked_for_only_where_it_was_ordered(here: Place, away: Place) -> None:
    routes = routed(here, away)
    routes.launch(order("kd-a", "slurm/lab"))
    assert routes.observe("kd-a").state is Status.RUNNING
    routes.run("kd-a", "job", (), {})
    assert list(routes.logs("kd-a", "job")) == ["aws kd-a"]
    routes.terminate("kd-a")
    assert away.asked == ["launch kd-a", "observe kd-a", "run kd-a", "terminate kd-a"]
    assert here.asked == []


def test_after_a_kill_the_ledger_says_where_a_machine_was_ordered(here: Place, away: Place) -> None:
    here.trouble = ProvisionError("must not be asked")
    away.machines.add("kd-a")
    routes = routed(here, away, {"kd-a": "aws"})
    assert routes.observe("kd-a").state is Status.RUNNING
    routes.terminate("kd-a")
    assert away.machines == set()


def test_a_name_nobody_remembers_is_asked_of_all(here: Place, away: Place) -> None:
    away.machines.add("kd-x")
    assert routed(here, away).observe("kd-x").state is Status.RUNNING
    assert routed(here, away).observe("kd-y").state is Status.ABSENT
    assert list(routed(here, away).logs("kd-x", "j")) == ["aws kd-x"]
    routed(here, away).terminate("kd-x")
    assert away.machines == set()
    with pytest.raises(ProvisionError, match="gone"):
        routed(here, away).run("kd-y", "j", (), {})


def test_no_answer_is_never_taken_for_absence(here: Place, away: Place) -> None:
    away.trouble = ProvisionError("no network")
    assert routed(here, away).observe("kd-x").state is Status.UNKNOWN
    with pytest.raises(ProvisionError, match="no network"):
        routed(here, away).terminate("kd-x")
    with pytest.raises(ProvisionError, match="no network"):
        routed(here, away).ours()
    here.machines.add("kd-h")
    assert [seen.name for seen in routed(here, away).ours()] == ["kd-h"]


def test_of_two_troubles_the_one_that_says_call_again_comes_last(here: Place, away: Place) -> None:
    here.trouble, away.trouble = NotYetGone("soon"), ProvisionError("403")
    with pytest.raises(ProvisionError, match="403"):
        routed(here, away).terminate("kd-x")


def test_offers_come_from_the_provider_of_each_infra(here: Place, away: Place) -> None:
    found = routed(here, away).offers(Need(infra=("aws", "local", "slurm/lab")))
    assert sorted(offer.infra for offer in found) == ["aws", "local", "slurm/lab"]
    assert sorted(offer.infra for offer in routed(here, away).offers(Need())) == ["aws", "local"]


def test_an_infra_that_was_not_planned_for_is_refused(here: Place, away: Place) -> None:
    with pytest.raises(ProvisionError, match="no provider for gcp"):
        routed(here, away).launch(order("kd-a", "gcp"))


def test_a_plan_may_mix_this_machine_slurm_and_clouds(tmp_path: Path) -> None:
    offers = (fake_offer(infra="local"), fake_offer(infra="slurm/lab"), fake_offer(infra="aws"))
    where = infra_of(make_plan({"train": 60.0}, offers=offers))
    assert where == ("local", "slurm/lab", "aws")
    assert isinstance(provider_for(where, Home(tmp_path)), Routed)
    assert isinstance(provider_for(("slurm/lab", "aws"), Home(tmp_path)), SkyProvisioner)
    assert isinstance(provider_for("local", Home(tmp_path)), LocalProvisioner)


@pytest.mark.parametrize(
    ("where", "s"), [(("local",), 0.3), (("slurm/lab",), 1.0), (("local", "slurm/lab"), 1.0), (("aws",), 1.0)]
)
def test_a_login_node_or_a_cloud_is_asked_once_a_second_at_most(where: tuple[str, ...], s: float) -> None:
    plan = make_plan({"train": 60.0}, offers=tuple(fake_offer(infra=one) for one in where))
    assert turn_s(plan) == s
