"""Which rights reach a rented machine? The table, the policies, keys for one run, and what is refused without them."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import hmac
import io
import json
import re
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from orchestrator import access, grants
from orchestrator.access import (
    CHAINED_S,
    ENDINGS,
    FEDERATION_S,
    INSTANCE_PROFILE,
    ROLE_S,
    STORE_S,
    Way,
    check,
    check_way,
    ending_of,
    identity_of,
    longest_s,
    own_tag_policy,
    run_policy,
    store_of,
    way_of,
)
from orchestrator.config import Home, load_config
from orchestrator.errors import UsageError
from orchestrator.grants import Keys, find_way, grant, link, r2_keys, session_name
from orchestrator.handover import (
    CODE_URL,
    CONSTRAINTS,
    ENVIRONMENTS,
    LOCK_FOLDER,
    LOCKED,
    MIRROR,
    PACKAGES,
    THEN,
    check_installed,
    code_wheel,
    environments,
    fetch_code,
    machine_env,
    packages,
    put_code,
    requirements,
)
from orchestrator.ledger import Ledger
from orchestrator.plan import Plan
from orchestrator.provision_sky import CAN_KEEP_KEYS, NO_AUTODOWN
from orchestrator.session import start_run
from orchestrator.testing import fake_offer
from tasks.bucket import Bucket, BucketError, NotFound, commit_folder, fetch_folder, open_bucket, probe, read_commit
from tasks.bucket_s3 import S3Bucket
from tasks.contract import (
    ApiTeacher,
    DataSource,
    EvaluateSettings,
    LabelSettings,
    ModelSource,
    RehearseSettings,
    TrainSettings,
)
from tests.plans import make_plan

ROOT = Path(__file__).parents[1]
USER = "arn:aws:iam::123456789012:user/me"


def rented_plan(infra: str = "aws", **changes: Any) -> Plan:
    offer = fake_offer(1_000_000, infra=infra)
    return make_plan({"train": 600.0}, offers=(offer,), bucket="s3://kd/runs", **changes)


# -- what ends a machine


def test_every_infra_that_the_plan_table_or_skypilot_settings_name_has_its_ending_with_a_source() -> None:
    from orchestrator.offers import TABLE

    named = {row.infra for row in TABLE} | {access.head(name) for name in CAN_KEEP_KEYS} | {"local", "slurm"}
    assert named <= set(ENDINGS)
    for ending in ENDINGS.values():
        assert re.search(r"\.py|\.json|\.j2", ending.source)
    # clouds whose keys SkyPilot can keep at home and that have no identity of their own for a machine
    assert {name for name, ending in ENDINGS.items() if not ending.itself} == {"nebius", "oci"}
    assert not set(ENDINGS) & NO_AUTODOWN  # those are refused before


@pytest.mark.parametrize(
    ("infra", "account"),
    [("local", False), ("slurm/lab", False), ("kubernetes/ctx", False), ("ssh/pool", False), ("azure", False),
     ("aws", True), ("gcp", True), ("runpod", True), ("vast", True), ("lambda", True), ("newcloud", True)],
)  # fmt: skip
def test_a_right_over_the_account_is_allowed_by_the_recipe_or_nothing_is_started(infra: str, account: bool) -> None:
    assert ending_of(infra, {}).account is account
    plan = rented_plan(infra)
    check(plan, allow_account_key=True, env={})
    if not account:
        check(plan, allow_account_key=False, env={})
        return
    with pytest.raises(UsageError) as caught:
        check(plan, allow_account_key=False, env={})
    assert "allow_account_key: true" in caught.value.hint
    assert list(access.notes(plan, False, {})) and "allow_account_key" in next(access.notes(plan, False, {}))
    assert "the recipe allows it" in next(access.notes(plan, True, {}))


def test_keys_of_several_accounts_are_one_note_that_names_each() -> None:
    offers = tuple(fake_offer(1_000_000, infra=infra) for infra in ("lambda", "runpod", "vast"))
    plan = make_plan({"train": 600.0}, offers=offers, bucket="s3://kd/runs")
    (note,) = [text for text in access.notes(plan, False, {}) if "account" in text and "your store" not in text]
    for words in ("lambda: the account's API key, ~/.lambda_cloud", "; runpod: ", "; vast: ", "allow_account_key"):
        assert words in note


def test_on_aws_a_profile_of_the_users_own_takes_the_account_out_of_it() -> None:
    env = {INSTANCE_PROFILE: "kdcloud-node"}
    check(rented_plan("aws"), allow_account_key=False, env=env)
    assert list(access.notes(rented_plan("aws"), False, env)) == []
    assert identity_of("aws", env) == {"aws": {"remote_identity": "kdcloud-node"}}
    assert identity_of("runpod", env) == identity_of("aws", {}) == {}


@pytest.mark.parametrize("infra", ["nebius", "oci"])
def test_machines_that_nothing_ends_are_refused_whatever_the_recipe_allows(infra: str) -> None:
    with pytest.raises(UsageError, match="cannot end themselves"):
        check(rented_plan(infra), allow_account_key=True, env={})


def test_a_folder_of_this_computer_is_no_bucket_for_a_cloud() -> None:
    with pytest.raises(UsageError, match="cannot reach a folder"):
        check(replace(rented_plan("azure"), bucket="file:/runs"), allow_account_key=True, env={})
    check(replace(rented_plan("slurm/lab"), bucket="file:/shared"), allow_account_key=False, env={})


# -- policies, by an evaluator of the few words that they use


def allows(policy: dict[str, Any], action: str, resource: str, context: dict[str, str] | None = None) -> bool:
    """As IAM decides: what one statement allows and none denies."""
    effects = [s["Effect"] for s in policy["Statement"] if _meets(s, action, resource, context or {})]
    return "Allow" in effects and "Deny" not in effects


def _meets(statement: dict[str, Any], action: str, resource: str, context: dict[str, str]) -> bool:
    actions, resources = ([v] if isinstance(v, str) else v for v in (statement["Action"], statement["Resource"]))
    conditions = statement.get("Condition", {}).get("StringLike", {})
    return (
        action in actions
        and any(fnmatch.fnmatchcase(resource, one) for one in resources)
        and all(fnmatch.fnmatchcase(context.get(key, ""), value) for key, value in conditions.items())
    )


def test_the_policy_of_a_run_reaches_its_folder_and_nothing_beside_it() -> None:
    policy = run_policy("kd", "team/r-abc123/")
    mine, arn = "arn:aws:s3:::kd/team/r-abc123/train/COMMIT", "arn:aws:s3:::kd"
    for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject"):
        assert allows(policy, action, mine)
        for other in ("kd/team/r-abc124/x", "kd/team/r-abc123", "kd/x", "kd2/team/r-abc123/x", "kd/team/r-abc1234/x"):
            assert not allows(policy, action, f"arn:aws:s3:::{other}"), other
    assert allows(policy, "s3:ListBucket", arn, {"s3:prefix": "team/r-abc123/train/"})
    for prefix in ("", "team/", "team/r-abc1234/", "team/r-abc123"):
        assert not allows(policy, "s3:ListBucket", arn, {"s3:prefix": prefix}), prefix
    assert not allows(policy, "s3:ListBucket", arn)
    for action in ("s3:ListAllMyBuckets", "s3:PutBucketPolicy", "s3:DeleteBucket", "sts:AssumeRole"):
        assert not allows(policy, action, arn) and not allows(policy, action, mine)
    assert run_policy("kd", "r", partition="aws-cn")["Statement"][0]["Resource"] == "arn:aws-cn:s3:::kd/r/*"


def test_a_machine_cannot_write_who_owns_the_run_what_it_may_cost_or_its_code() -> None:
    policy = run_policy("kd", "team/r-abc123")
    for key in ("ledger/0007.json", "ledger/run.json", "lease.json", "code/ab.whl"):
        mine = f"arn:aws:s3:::kd/team/r-abc123/{key}"
        assert allows(policy, "s3:GetObject", mine)
        assert not allows(policy, "s3:PutObject", mine) and not allows(policy, "s3:DeleteObject", mine)


@pytest.mark.parametrize("prefix", ["", "/", "a*", "a?b", "${aws:username}"])
def test_a_prefix_that_would_widen_the_policy_is_refused(prefix: str) -> None:
    with pytest.raises(UsageError):
        run_policy("kd", prefix)


def test_the_role_of_a_machine_ends_machines_with_kdclouds_tag_only() -> None:
    policy = own_tag_policy()
    one = "arn:aws:ec2:us-east-1:123456789012:instance/i-1"
    assert allows(policy, "ec2:TerminateInstances", one, {"aws:ResourceTag/kdcloud-name": "kd-own-run-train-x"})
    assert not allows(policy, "ec2:TerminateInstances", one, {"aws:ResourceTag/kdcloud-name": "web"})
    assert not allows(policy, "ec2:TerminateInstances", one)
    for action in ("ec2:RunInstances", "ec2:CreateTags", "iam:PassRole", "s3:GetObject"):
        assert not allows(policy, action, one) and not allows(policy, action, "*")


def test_the_documented_policy_is_the_one_that_was_tested() -> None:
    text = (ROOT / "docs" / "credentials.md").read_text()
    shown = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.S)]
    assert own_tag_policy() in shown
    assert run_policy("my-bucket", "kd/RUN") in shown
    assert len(shown) == 2


# -- which way to keys for one run


@pytest.mark.parametrize(
    ("endpoint", "store"),
    [(None, "aws"), ("https://s3.eu-west-1.amazonaws.com", "aws"), ("https://s3.cn-north-1.amazonaws.com.cn", "aws"),
     ("https://acc.r2.cloudflarestorage.com", "r2"), ("https://acc.eu.r2.cloudflarestorage.com", "r2"),
     ("https://storage.googleapis.com", "gcs"), ("http://127.0.0.1:9000", "other"),
     ("https://evil.example/amazonaws.com", "other"), ("https://amazonaws.com.evil.example", "other")],
)  # fmt: skip
def test_a_store_is_known_by_its_host(endpoint: str | None, store: str) -> None:
    assert store_of(endpoint) == store


@pytest.mark.parametrize(
    ("store", "arn", "role", "name", "longest_s"),
    [
        ("aws", USER, None, "federation", FEDERATION_S),
        ("aws", "arn:aws:iam::123456789012:root", None, "federation", CHAINED_S),
        ("aws", USER, "arn:aws:iam::1:role/x", "role", ROLE_S),
        ("aws", "arn:aws:sts::123456789012:assumed-role/sso/me", None, "account_key", CHAINED_S),
        ("aws", "arn:aws:sts::123456789012:assumed-role/sso/me", "arn:aws:iam::1:role/x", "role", CHAINED_S),
        ("aws", "arn:aws:sts::123456789012:federated-user/me", None, "account_key", CHAINED_S),
        ("other", None, None, "minio", STORE_S),
        ("r2", None, None, "r2", STORE_S),
        ("gcs", None, None, "account_key", STORE_S),
    ],
)
def test_the_way_and_its_longest_life(
    store: str, arn: str | None, role: str | None, name: str, longest_s: float
) -> None:
    way = way_of(store, arn, role)
    assert (way.name, way.longest_s) == (name, longest_s)


def test_a_run_whose_machines_may_outlive_their_keys_is_refused_with_the_deadline_that_helps() -> None:
    plan = rented_plan("azure", cap_micros=100_000_000)  # 100 h at 1 USD/h
    assert longest_s(plan) == pytest.approx(100 * 3600, abs=60)
    with pytest.raises(UsageError) as caught:
        check_way(Way("federation", FEDERATION_S), longest_s(plan), allow_account_key=False)
    assert "--deadline 36h" in caught.value.hint
    assert any("--deadline 36h" in note for note in access.notes(plan, False, {}))
    in_time = replace(plan, deadline_s=36 * 3600.0)
    check_way(Way("federation", FEDERATION_S), longest_s(in_time), allow_account_key=False)
    check_way(Way("account_key", CHAINED_S, "no"), longest_s(plan), allow_account_key=True)
    with pytest.raises(UsageError, match="no key can be had"):
        check_way(Way("account_key", CHAINED_S, "no"), 60.0, allow_account_key=False)


# -- keys from a token service (moto on loopback)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Bucket:
    """The run's own place in a bucket, with the client's account-wide keys in the usual place."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDPLANTED")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-account-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    opened = open_bucket(f"s3://kd-{abs(hash(request.node.nodeid)):x}/team/r-abc123")
    assert isinstance(opened, S3Bucket)
    opened.client.create_bucket(Bucket=opened.name)
    return opened


class Asked:
    """What reached the token service, read in the requests themselves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        before = grants._client

        def watched(service: str, *args: Any, **kwargs: Any) -> Any:
            client = before(service, *args, **kwargs)
            client.meta.events.register("provide-client-params.*.*", self._note)
            return client

        monkeypatch.setattr(grants, "_client", watched)

    def _note(self, params: dict[str, Any], model: Any, **_: Any) -> None:
        self.calls.append((model.name, params))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


def test_a_store_of_ones_own_is_asked_for_a_key_limited_to_the_run(bucket: Bucket, asked: Asked, endpoint: str) -> None:
    assert find_way(bucket) == Way("minio", STORE_S)
    env = grant(bucket, 7200.0, allow_account_key=False)
    ((_, probe_call), (name, call)) = asked.calls
    assert name == "AssumeRole" and call["DurationSeconds"] == 7200 and probe_call["DurationSeconds"] == 900
    assert json.loads(call["Policy"]) == run_policy(bucket.name, "team/r-abc123")  # type: ignore[attr-defined]
    assert call["RoleSessionName"] == "kd-r-abc123"
    assert set(env) == {
        "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
        "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3",
    }  # fmt: skip
    assert env["AWS_ENDPOINT_URL_S3"] == endpoint
    assert "AKIDPLANTED" not in env.values() and "planted-account-secret" not in env.values()


def test_on_aws_a_users_keys_become_a_federation_token_and_a_role_is_taken_where_one_is_named(
    bucket: Bucket, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grants, "store_of", lambda endpoint: "aws")
    monkeypatch.setattr(grants, "_caller", lambda bucket: USER)
    first = grant(bucket, 100_000.0, allow_account_key=False)
    assert "AWS_ENDPOINT_URL_S3" not in first
    monkeypatch.setenv(access.BUCKET_ROLE, "arn:aws:iam::123456789012:role/kd")
    grant(bucket, 60.0, allow_account_key=False)
    names = [(name, call["DurationSeconds"], call.get("RoleArn")) for name, call in asked.calls]
    assert names == [
        ("GetFederationToken", 100_000, None),
        ("AssumeRole", 900, "arn:aws:iam::123456789012:role/kd"),  # STS gives none that lives shorter
    ]
    for _, call in asked.calls:
        assert json.loads(call["Policy"]) == run_policy(bucket.name, "team/r-abc123")  # type: ignore[attr-defined]
        assert len(call["Policy"]) <= access.POLICY_LIMIT


def test_every_job_gets_keys_of_its_own(bucket: Bucket) -> None:
    first, second = (grant(bucket, 900.0, allow_account_key=False) for _ in range(2))
    assert first["AWS_SECRET_ACCESS_KEY"] != second["AWS_SECRET_ACCESS_KEY"]


def test_no_token_service_means_the_account_key_only_if_it_is_allowed(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import ClientError

    class Refusing:
        def assume_role(self, **_: Any) -> Any:
            raise ClientError({"Error": {"Code": "NotImplemented", "Message": "no"}}, "AssumeRole")

    before = grants._client
    monkeypatch.setattr(
        grants, "_client", lambda service, *a, **k: Refusing() if service == "sts" else before(service, *a, **k)
    )
    way = find_way(bucket)
    assert way is not None and way.name == "account_key" and "NotImplemented" in way.why
    with pytest.raises(UsageError, match="reaches this run only"):
        check_way(way, 60.0, allow_account_key=False)
    with pytest.raises(BucketError) as caught:
        grant(bucket, 900.0, allow_account_key=False)
    assert "planted" not in f"{caught.value.message} {caught.value.hint}"
    assert grant(bucket, 900.0, allow_account_key=True)["AWS_SECRET_ACCESS_KEY"] == "planted-account-secret"


def test_a_key_is_never_asked_for_longer_than_the_store_gives_one(bucket: Bucket, asked: Asked) -> None:
    with pytest.raises(BucketError) as caught:
        grant(bucket, STORE_S + 1, allow_account_key=False)
    assert "--deadline 168h" in caught.value.hint
    assert asked.calls == []


def test_keys_do_not_show_in_a_traceback() -> None:
    assert "hush" not in repr(Keys("id-hush", "hush", "hush"))


def test_a_folder_needs_no_keys(tmp_path: Path) -> None:
    here = open_bucket(f"file:{tmp_path}")
    assert find_way(here) is None
    assert grant(here, 60.0, allow_account_key=False) == {}
    assert link(here, "code/x.whl", 60.0, {}) is None


@pytest.mark.parametrize("prefix", ["a/r-abc123/", "ü b/" + "x" * 80 + "/"])
def test_the_name_of_a_session_is_one_that_sts_takes(prefix: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_+=,.@-]{2,32}", session_name(prefix))


def test_r2_keys_are_signed_here_for_one_folder_as_cloudflare_describes() -> None:
    class Place:
        client, name, prefix = None, "kd", "team/r-abc123/"

    host = "acc0.eu.r2.cloudflarestorage.com"
    keys = r2_keys(Keys("PARENT", "parent-secret", None), f"https://{host}", Place(), 7200, now=1_000)
    token = base64.b64decode(str(keys.token)).decode()
    assert token.startswith("jwt/") and "parent-secret" not in token
    jwt = token.removeprefix("jwt/")
    header, body, signature = jwt.split(".")

    def read(part: str) -> bytes:
        return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))

    assert json.loads(read(header)) == {"alg": "HS256", "typ": "JWT"}
    assert json.loads(read(body)) == {
        "bucket": "kd", "scope": "object-read-write", "sub": "acc0", "iss": "PARENT", "aud": host,
        "paths": {"prefixPaths": ["team/r-abc123/"], "objectPaths": []}, "iat": 1_000, "exp": 8_200,
    }  # fmt: skip
    assert read(signature) == hmac.new(b"parent-secret", f"{header}.{body}".encode(), hashlib.sha256).digest()
    assert (keys.key_id, keys.secret) == ("PARENT", hashlib.sha256(jwt.encode()).hexdigest())


# -- what goes with a job


def test_a_rented_machine_gets_code_by_a_link_packages_by_version_and_no_key_of_the_account(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MIRROR, "https://mirror.example.com/simple")
    data, sha256 = code_wheel()
    put_code(bucket, data, sha256)
    wheel = fetch_code(bucket, sha256, tmp_path)
    settings = make_plan({"train": 1.0}).stages[0].settings
    env = machine_env(bucket, wheel, settings, kind="rehearse", infra="azure", seconds=5000.0, allow_account_key=False)
    with urllib.request.urlopen(env[CODE_URL]) as answer:
        assert answer.read() == data
    assert int(re.search(r"X-Amz-Expires=(\d+)", env[CODE_URL])[1]) >= 5000  # type: ignore[index]
    assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in env[CODE_URL]
    assert env["AWS_ACCESS_KEY_ID"] in env[CODE_URL]  # dies with the machine's own keys, not with the client's
    assert set(json.loads(env[PACKAGES])) == {"psutil", "boto3"}
    assert any(line.startswith("botocore==") for line in json.loads(env[CONSTRAINTS]))
    assert env[ENVIRONMENTS] == ""  # of a rehearsal: two packages are enough
    assert env["VLLM_NO_USAGE_STATS"] == "1"
    assert env[MIRROR] == "https://mirror.example.com/simple"
    assert not any("\n" in value for value in env.values())
    assert "planted-account-secret" not in "".join(env.values()) and "AKIDPLANTED" not in "".join(env.values())


def test_a_job_of_several_stages_brings_the_packages_of_each_and_the_hub_where_one_of_them_needs_it(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hub-secret")
    monkeypatch.setenv("KD_API_KEY", "api-secret")
    data, sha256 = code_wheel()
    put_code(bucket, data, sha256)
    wheel, rehearsal = fetch_code(bucket, sha256, tmp_path), RehearseSettings(1, 1.0)
    train = TrainSettings(student=ModelSource(path="org/model"), labels="label")

    def env(*then: tuple[str, object]) -> dict[str, str]:
        return machine_env(
            bucket, wheel, rehearsal, kind="rehearse", infra="azure", seconds=5000.0, allow_account_key=False, then=then
        )

    alone, both = env(), env(("rehearse", rehearsal), ("train", train))
    assert THEN not in alone and "HF_TOKEN" not in alone
    assert both["HF_TOKEN"] == "hub-secret" and "api-secret" not in "".join(both.values())
    assert both[PACKAGES] == alone[PACKAGES]
    later = json.loads(both[THEN])
    assert [set(one[PACKAGES]) >= {"torch"} for one in later] == [False, True]
    assert [one[ENVIRONMENTS] for one in later] == [[], ["train"]]
    assert "secret" not in both[THEN] and "\n" not in both[THEN]


def test_this_machine_needs_none_of_that(bucket: Bucket, tmp_path: Path) -> None:
    env = machine_env(
        bucket, tmp_path / "x.whl", object(), kind="train", infra="local", seconds=1.0, allow_account_key=False
    )
    assert set(env) == {"PYTHONPATH", "PYTHONUNBUFFERED", "TOKENIZERS_PARALLELISM"}


def test_packages_are_looked_for_where_a_stage_runs_on_this_computer_only() -> None:
    stage, rented = (replace(rented_plan(infra).stages[0], kind="train") for infra in ("local", "aws"))
    with pytest.raises(UsageError, match=r"stage train .* needs peft, torch, not installed here") as refused:
        check_installed([stage], lambda name: None if name in {"torch", "peft"} else name)
    assert "local" in (refused.value.hint or "")
    check_installed([stage], lambda name: name)
    check_installed([replace(stage, kind="rehearse")], lambda name: None if name == "torch" else name)
    check_installed([rented], lambda name: None)


@pytest.mark.parametrize(("kind", "s3", "count"), [("rehearse", False, 1), ("rehearse", True, 2), ("train", True, 8)])
def test_packages_are_those_of_the_kind_in_the_locked_versions(kind: str, s3: bool, count: int) -> None:
    found = packages(kind, s3=s3)
    assert len(found) == count and ("torch" in found) == (kind == "train")
    lines = (ROOT / "requirements" / "lock.txt").read_text().splitlines()
    for requirement in found.values():
        assert "==" in requirement and requirement in lines


def test_every_package_that_a_stage_imports_is_brought() -> None:
    import ast
    import sys

    found = set()
    for path in sorted((ROOT / "tasks").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            found |= {name.partition(".")[0] for name in names}
    needed = found - sys.stdlib_module_names - {"tasks"}
    assert {"torch", "boto3", "psutil"} <= needed
    implied = {"botocore": "boto3", "tokenizers": "transformers", "numpy": "torch", "triton": "torch"}
    implied |= {"huggingface_hub": "transformers", "yaml": "transformers", "jinja2": "torch"}
    optional = {"vllm", "lm_eval"}  # used where a machine has it
    brought = packages("train", s3=True, quantized=True)
    assert set(packages("export", s3=True)) == set(packages("train", s3=True)) | {"gguf"}
    assert {implied.get(name, name) for name in needed - optional} <= {*brought, "gguf"}
    distributions = {requirement.partition("==")[0] for requirement in brought.values()} - {"bitsandbytes"}
    assert len(distributions) == 8
    for name in LOCKED:
        lines = requirements(name).read_text().splitlines()
        assert {one for one in distributions if any(line.startswith(f"{one}==") for line in lines)} == distributions


@pytest.mark.parametrize(
    ("kind", "engine", "names"),
    [
        ("label", "auto", ("label", "train")),
        ("label", "vllm", ("label",)),
        ("label", "transformers", ("train",)),
        ("train", "", ("train",)),
        ("evaluate", "auto", ("label", "train")),
        ("evaluate", "transformers", ("train",)),
        ("export", "", ("train",)),
        ("rehearse", "", ()),
    ],
)
def test_each_kind_of_stage_has_its_environment(kind: str, engine: str, names: tuple[str, ...]) -> None:
    source = ModelSource(path="m")
    made: dict[str, object] = {
        "label": LabelSettings(source, DataSource("p"), "math", 10, engine=engine),
        "evaluate": EvaluateSettings("train", source, DataSource("p"), "math", engine=engine),
    }
    settings = made.get(kind, object())
    assert environments(kind, settings) == names


def test_a_stage_that_asks_an_api_needs_no_engine() -> None:
    api = ApiTeacher("https://api.example.com", "m", None, 1, 1, 1)
    settings = LabelSettings(ModelSource(path="m"), DataSource("p"), "math", 10, api=api)
    assert environments("label", settings) == ("train",)


def test_locks_go_to_the_machine_with_the_code_that_is_verified() -> None:
    data, _ = code_wheel()
    with zipfile.ZipFile(io.BytesIO(data)) as code:
        for name in LOCKED:
            assert code.read(f"{LOCK_FOLDER}/{name}.txt") == requirements(name).read_bytes()
        assert "tasks/bootstrap.py" in code.namelist()


# -- nothing is started, or even written, without the rights


class Hands:
    """A provider that must not be touched."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was called")


def started(plan: Plan, home: Path, **options: Any) -> None:
    with_home = Home(home)
    ledger = Ledger(with_home.ledger)
    try:
        start_run(
            plan, ledger=ledger, home=with_home, config=load_config(with_home), provider=Hands(),  # type: ignore[arg-type]
            recipe_text="", **options,
        )  # fmt: skip
    finally:
        assert ledger.runs() == []
        ledger.close()


def test_a_run_is_refused_before_anything_is_written_or_rented(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"s3://{bucket.name}/runs"  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="skypilot-v1"):
        started(replace(rented_plan("aws"), bucket=place), tmp_path)
    with pytest.raises(UsageError, match="a key that reaches this run only"):
        started(replace(rented_plan("azure", cap_micros=10**9), bucket=place), tmp_path)
    assert list(open_bucket(place).list()) == []
    monkeypatch.setattr("orchestrator.handover.packages", lambda kind, **where: {"no_such_package": "x==1"})
    with pytest.raises(UsageError, match="needs no_such_package, not installed here"):
        started(replace(rented_plan("local"), bucket=place), tmp_path)
    assert list(open_bucket(place).list()) == []


def break_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")


def break_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


@pytest.mark.parametrize(
    ("broken", "words", "hint"),
    [(break_credentials, "no credentials", "AWS_PROFILE"), (break_endpoint, "cannot be reached", "AWS_ENDPOINT_URL")],
)
def test_a_bucket_that_cannot_be_used_is_said_before_anything_is_rented(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Any, words: str, hint: str
) -> None:
    broken(monkeypatch)
    with pytest.raises(BucketError) as caught:
        started(rented_plan("azure"), tmp_path)
    assert words in caught.value.message and hint in caught.value.hint


# -- what the policy lets through is what machines need, against a store that enforces it as S3 does

ACTIONS = {
    "PutObject": "s3:PutObject", "CreateMultipartUpload": "s3:PutObject", "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject", "GetObject": "s3:GetObject", "HeadObject": "s3:GetObject",
    "DeleteObject": "s3:DeleteObject", "ListParts": "s3:ListMultipartUploadParts",
    "ListObjectsV2": "s3:ListBucket", "HeadBucket": "s3:ListBucket",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
}  # fmt: skip


class Enforced:
    """An S3 client under a policy. Who may not list the whole bucket hears 403 of what is not there, as on AWS."""

    def __init__(self, client: Any, policy: dict[str, Any]) -> None:
        self._client, self._policy, self.refused = client, policy, list[str]()
        client.meta.events.register("provide-client-params.s3.*", self._check)

    def _check(self, params: dict[str, Any], model: Any, **_: Any) -> None:
        arn = f"arn:aws:s3:::{params['Bucket']}" + (f"/{params['Key']}" if "Key" in params else "")
        context = {"s3:prefix": params["Prefix"]} if "Prefix" in params and model.name == "ListObjectsV2" else {}
        if not allows(self._policy, ACTIONS[model.name], arn, context):
            self.refused.append(model.name)
            raise forbidden(model.name)

    def __getattr__(self, name: str) -> Any:
        from botocore.exceptions import ClientError

        inner = getattr(self._client, name)
        if name not in ("get_object", "head_object"):
            return inner

        def call(**kwargs: Any) -> Any:
            try:
                return inner(**kwargs)
            except ClientError as error:
                if error.response["Error"]["Code"] in ("404", "NoSuchKey"):
                    raise forbidden(name) from error
                raise

        return call


def forbidden(name: str) -> Exception:
    from botocore.exceptions import ClientError

    answer = {"Error": {"Code": "403", "Message": "Forbidden"}, "ResponseMetadata": {"HTTPHeaders": {"date": NOW}}}
    return ClientError(answer, name)  # type: ignore[arg-type]


NOW = "Thu, 01 Jan 2026 00:00:00 GMT"


def test_with_keys_for_one_run_a_machine_can_do_all_its_work_and_nothing_elsewhere(
    bucket: S3Bucket, tmp_path: Path
) -> None:
    enforced = Enforced(bucket.client, run_policy(bucket.name, bucket.prefix))
    mine = S3Bucket(enforced, bucket.name, bucket.prefix)
    out = tmp_path / "out"
    (out / "model").mkdir(parents=True)
    (out / "model" / "weights").write_bytes(b"w" * (9 << 20))  # in parts
    (out / "result.json").write_text("{}")
    assert read_commit(mine, "train") is None
    assert mine.head("train/task.json") is None
    with pytest.raises(NotFound):
        mine.get("train/task.json")
    with pytest.raises(NotFound):
        mine.get_file("train/log.txt", tmp_path / "log")
    commit_folder(mine, out, "train", fence=1)
    back = fetch_folder(mine, "train", tmp_path / "back")
    assert (back / "model" / "weights").read_bytes() == (out / "model" / "weights").read_bytes()
    mine.delete("train/COMMIT")
    assert [stat.key for stat in mine.list("train/")] == ["train/model/weights", "train/result.json"]
    assert mine.now().year == 2026
    assert set(enforced.refused) == {"ListMultipartUploads", "HeadBucket"}  # both do without
    for other in ("team/r-abc124/", "team/", ""):
        neighbour = S3Bucket(enforced, bucket.name, other)
        with pytest.raises(BucketError, match="may not write"):
            neighbour.put("x", b"x")
        with pytest.raises(BucketError, match="may not read"):
            neighbour.get("x")
        with pytest.raises(BucketError, match="may not list"):
            list(neighbour.list())


# -- places: profile, region and endpoint of the usual AWS files; each trouble before anything is rented


def test_a_profile_brings_endpoint_region_keys_and_style_and_the_machine_gets_them_too(
    bucket: Bucket, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text(
        f"[profile mine]\nregion = auto\nendpoint_url = {endpoint}\ns3 =\n  addressing_style = path\n"
    )
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = AKIDFILE\naws_secret_access_key = file-secret\n")
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    opened = open_bucket(bucket.url)
    assert probe(opened).conditional
    env = grant(opened, 900.0, allow_account_key=False)
    place = {key: env[key] for key in ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "KDCLOUD_S3_ADDRESSING")}
    assert place == {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_REGION": "auto", "KDCLOUD_S3_ADDRESSING": "path"}
    assert "file-secret" not in env.values()
    monkeypatch.delenv("AWS_PROFILE")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    there = open_bucket(bucket.url)
    assert probe(there).writable
    assert there.client.meta.config.s3["addressing_style"] == "path"  # type: ignore[attr-defined]


def test_the_endpoint_of_s3_alone_wins_over_that_of_everything(
    bucket: Bucket, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    assert find_way(open_bucket(bucket.url)) == Way("minio", STORE_S)


class Answering:
    """A store that answers every request with one error."""

    def __init__(self, status: int, code: str) -> None:
        body = (
            f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode() if code else b"hi"
        )

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_HEAD(self) -> None:  # boto asks so for the region that a redirect leads to
                self.send_response(403)
                self.end_headers()

            do_GET = do_DELETE = do_POST = do_PUT

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.mark.parametrize(
    ("status", "code", "words", "hint"),
    [
        (400, "ExpiredToken", "have expired", "sign in again"),
        (403, "InvalidAccessKeyId", "does not accept these credentials", "AWS_PROFILE"),
        (403, "SignatureDoesNotMatch", "does not accept these credentials", "AWS_SECRET_ACCESS_KEY"),
        (403, "AccessDenied", "may not write", "allow list, read, write and delete"),
        (404, "NoSuchBucket", "there is no bucket kd", "aws s3 mb"),
        (301, "PermanentRedirect", "another region", "AWS_REGION"),
        (400, "AuthorizationHeaderMalformed", "another region", "AWS_REGION"),
        (404, "", "no S3 store", "AWS_ENDPOINT_URL"),
    ],
)
def test_each_trouble_with_a_bucket_is_said_with_its_way_out_before_anything_is_rented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: str, words: str, hint: str
) -> None:
    store = Answering(status, code)
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{store.server.server_port}", "AWS_ACCESS_KEY_ID": "AKID",
        "AWS_SECRET_ACCESS_KEY": "hush-secret", "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    try:
        with pytest.raises(BucketError) as caught:
            started(rented_plan("azure"), tmp_path)
    finally:
        store.server.shutdown()
        store.server.server_close()
    assert words in caught.value.message and hint in caught.value.hint
    assert "hush-secret" not in caught.value.message + caught.value.hint


def test_a_resumed_run_is_asked_for_keys_and_one_that_is_ended_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import UTC, datetime

    from orchestrator.plan import plan_to_dict
    from orchestrator.session import resume_run

    def refused(bucket: Bucket) -> Way:
        return Way("account_key", CHAINED_S, "the sign-in has expired")

    home, now = Home(tmp_path), datetime(2026, 1, 1, tzinfo=UTC)
    plan = rented_plan("azure")
    ledger = Ledger(home.ledger)
    ledger.create_run(
        "r-abc123", name="r", bucket=f"file:{tmp_path}/b", cap_micros=plan.cap_micros, deadline_s=None, at=now,
        mark={"wall": now.isoformat(), "boot_id": "b", "boot_s": 0.0},
        data={"schema": 1, "owner": "owner1", "plan": plan_to_dict(plan)},
    )  # fmt: skip
    monkeypatch.setattr(grants, "find_way", refused)
    with pytest.raises(UsageError, match="sign-in has expired"):
        resume_run("r-abc123", ledger=ledger, home=home)
    resume_run("r-abc123", ledger=ledger, home=home, to_work=False).lease.release()
    ledger.close()
