"""Is a machine that the account may not rent left out before anything is reserved, with the way to get it?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from orchestrator.errors import BudgetExceeded, NothingFits
from orchestrator.plan import Part, Range
from orchestrator.provision import Offer
from orchestrator.quota import Quota, ask_aws, quota_of, vcpus_of, within_quota
from orchestrator.spend import cost_micros
from orchestrator.testing import fake_offer
from tests.plans import make_plan
from tests.test_access import started


def aws(instance: str, gpu: str = "A10G", *, spot: bool = False, region: str | None = "us-east-1") -> Offer:
    return fake_offer(1_000_000, gpu=gpu, infra="aws", instance=instance, spot=spot, region=region)


@pytest.mark.parametrize(
    ("offer", "code"),
    [
        (aws("g5.xlarge"), "L-DB2E81BA"),
        (aws("g6.2xlarge", spot=True), "L-3819A6DF"),
        (aws("p4d.24xlarge", "A100"), "L-417A185B"),
        (aws("p5.48xlarge", "H100", spot=True), "L-7212CCBC"),
        (aws("m5.large"), None),
        (aws("g5.xlarge", region=None), None),
        (fake_offer(infra="runpod", instance="g5.xlarge"), None),
    ],
)
def test_an_offer_falls_under_the_quota_of_its_family_and_region(offer: Offer, code: str | None) -> None:
    found = quota_of(offer)
    assert (found and found.code) == code
    assert found is None or found.region == "us-east-1"


@pytest.mark.parametrize(
    ("instance", "vcpus"), [("g5.xlarge", 4), ("g5.12xlarge", 48), ("p5.48xlarge", 192), ("g4dn.metal", 96), ("odd", 1)]
)
def test_a_size_tells_its_vcpus(instance: str, vcpus: int) -> None:
    assert vcpus_of(instance) == vcpus


def test_what_may_not_be_rented_is_left_out_with_its_reason_and_asked_for_once() -> None:
    asked: list[Quota] = []

    def ask(quota: Quota) -> float:
        asked.append(quota)
        return 0.0 if quota.code == "L-417A185B" else 4.0

    offers = (aws("p4d.24xlarge", "A100"), aws("g5.12xlarge"), aws("g5.xlarge"), fake_offer(infra="runpod"))
    plan = within_quota(make_plan({"label": 60.0, "train": 60.0}, offers=offers), ask)
    for stage in plan.stages:
        assert [offer.instance for offer in stage.candidates] == ["g5.xlarge", offers[3].instance]
        assert len(stage.candidate_hours) == 2
        assert [(one.infra, one.why.split(",")[0]) for one in stage.rejected] == [
            ("aws p4d.24xlarge", "your account may run 0 vCPUs of on-demand P instances in us-east-1"),
            ("aws g5.12xlarge", "your account may run 4 vCPUs of on-demand G and VT instances in us-east-1"),
        ]
        dearer = stage.cost_micros.expected == cost_micros(offers[2], 60.0)  # of what is left, not of what was planned
        assert dearer and stage.hours == stage.candidate_hours[0]
    assert len(asked) == len(set(asked)) == 2


def test_what_is_left_keeps_its_own_parts_of_time() -> None:
    """What a machine took is compared with what was estimated for that machine, by its place among those left."""
    offers = (aws("p4d.24xlarge", "A100"), aws("g5.xlarge"), fake_offer(infra="runpod"))
    made = make_plan({"train": 60.0}, offers=offers)
    parts = tuple({"work": Part(f"work on {offer.instance}", Range(1.0, 2.0, 3.0))} for offer in offers)
    plan = within_quota(
        replace(made, stages=(replace(made.stages[0], candidate_parts=parts),)),
        lambda quota: 0.0 if quota.code == "L-417A185B" else 4.0,
    )
    (stage,) = plan.stages
    assert [one["work"].key for one in stage.candidate_parts] == [f"work on {one.instance}" for one in stage.candidates]
    assert stage.parts["work"].key == "work on g5.xlarge"


def test_a_stage_that_has_nothing_left_says_how_to_get_more() -> None:
    with pytest.raises(NothingFits) as caught:
        within_quota(make_plan({"train": 60.0}, offers=(aws("g5.2xlarge"),)), lambda quota: 0.0)
    assert "may run 0 vCPUs" in caught.value.message
    assert "--quota-code L-DB2E81BA --region us-east-1 --desired-value 8" in caught.value.hint
    assert "https://us-east-1.console.aws.amazon.com/servicequotas/" in caught.value.hint


def test_a_cloud_that_does_not_tell_refuses_nothing() -> None:
    plan = make_plan({"train": 60.0}, offers=(aws("g5.xlarge"),))
    assert within_quota(plan, lambda quota: None) == plan


@pytest.fixture
def quotas(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """AWS Service Quotas on loopback (moto has none of EC2's): code -> value."""
    values: dict[str, Any] = {}

    class Service(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            values["asked"] = (self.headers["X-Amz-Target"], asked)
            known = asked["QuotaCode"] in values
            body = (
                {"Quota": {"Value": values.get(asked["QuotaCode"])}} if known else {"__type": "AccessDeniedException"}
            )
            self.send_response(200 if known else 400)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Service)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_SERVICE_QUOTAS", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    yield values
    server.shutdown()
    server.server_close()


def test_aws_is_asked_in_its_own_words_and_a_refusal_is_no_answer(quotas: dict[str, Any]) -> None:
    quotas["L-DB2E81BA"] = 0.0
    assert ask_aws(Quota("L-DB2E81BA", "eu-west-1", "")) == 0.0
    target, asked = quotas["asked"]
    assert target.endswith(".GetServiceQuota") and asked == {"ServiceCode": "ec2", "QuotaCode": "L-DB2E81BA"}
    assert ask_aws(Quota("L-417A185B", "eu-west-1", "")) is None


def test_a_run_leaves_out_what_may_not_be_rented_before_its_bucket_is_touched(
    quotas: dict[str, Any], tmp_path: Path
) -> None:
    quotas["L-DB2E81BA"] = 0.0
    plan = make_plan({"train": 60.0}, offers=(aws("g5.xlarge"),), bucket="s3://nowhere/x")
    with pytest.raises(NothingFits, match="0 vCPUs"):
        started(plan, tmp_path, allow_account_key=True)
    dear = fake_offer(10**9, infra="runpod")
    with pytest.raises(BudgetExceeded, match="dearer"):
        started(replace(plan, stages=make_plan({"train": 60.0}, offers=(aws("g5.xlarge"), dear)).stages), tmp_path)
