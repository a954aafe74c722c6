"""How does a machine get at its run in an S3 store, and at nothing else? Short-lived keys for one folder.

`find_way` asks who the client is, before anything is rented; `grant` makes the keys for one machine. What they return
is secret: it goes into the environment of a job and nowhere else. The deciding is in access.py.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, runtime_checkable
from urllib.parse import urlsplit

from orchestrator.access import BUCKET_ROLE, POLICY_LIMIT, Way, run_policy, store_of, way_of
from orchestrator.bounded import Bounded
from orchestrator.errors import UsageError
from tasks.bucket import Bucket, BucketError

ADDRESSING = "KDCLOUD_S3_ADDRESSING"  # read in tasks/bucket_s3.py
LEAST_S = 900  # the shortest session that STS gives
LINK_S = 7 * 24 * 3600  # the longest life of a signed link (Signature Version 4)


@runtime_checkable
class S3Like(Protocol):
    """The part of tasks.bucket_s3.S3Bucket that is needed here."""

    client: Any
    name: str
    prefix: str  # "" or "some/prefix/"


@dataclass(frozen=True)
class Keys:
    """Credentials of a session. Its text hides them."""

    key_id: str
    secret: str
    token: str | None

    def __repr__(self) -> str:
        return "Keys(...)"

    def as_env(self) -> dict[str, str]:
        token = {"AWS_SESSION_TOKEN": self.token} if self.token else {}
        return {"AWS_ACCESS_KEY_ID": self.key_id, "AWS_SECRET_ACCESS_KEY": self.secret, **token}


def find_way(bucket: Bucket) -> Way | None:
    """How machines will reach this store; None for one that needs no keys. Asks the store's token service.

    Raises BucketError when that does not answer for another reason than that there is none.
    """
    bucket = _bare(bucket)
    if not _is_s3(bucket):
        return None
    store, role = store_of(_endpoint(bucket)), os.environ.get(BUCKET_ROLE)
    arn = _caller(bucket) if store == "aws" else None
    way = way_of(store, arn, role)
    if way.name == "account_key":
        return way
    try:
        _session(bucket, way, LEAST_S, arn)
    except BucketError as error:
        hint = f"; {error.hint}" if error.hint else ""
        return Way("account_key", way.longest_s, f"{error.message}{hint}")
    return way


def grant(bucket: Bucket, seconds: float, *, allow_account_key: bool) -> Mapping[str, str]:
    """Environment for one machine: keys for this run's folder that outlive `seconds`, region and endpoint.

    Empty for a store that needs none. Raises BucketError when no such keys can be had and no others are allowed.
    """
    bucket = _bare(bucket)
    if not _is_s3(bucket):
        return {}
    keys = _keys(bucket, seconds, allow_account_key)
    region = bucket.client.meta.region_name
    env = {**keys.as_env(), **({"AWS_REGION": region, "AWS_DEFAULT_REGION": region} if region else {})}
    if store_of(_endpoint(bucket)) != "aws":
        env["AWS_ENDPOINT_URL_S3"] = _endpoint(bucket)
    style = (bucket.client.meta.config.s3 or {}).get("addressing_style")
    return {**env, **({ADDRESSING: style} if style else {})}


def link(bucket: Bucket, key: str, seconds: float, keys_env: Mapping[str, str]) -> str | None:
    """A link that fetches one object without credentials, signed with the machine's own keys; None where not needed.

    A link dies with the keys that signed it, so those of the machine are the right ones.
    """
    bucket = _bare(bucket)
    if not _is_s3(bucket):
        return None
    keys = Keys(keys_env["AWS_ACCESS_KEY_ID"], keys_env["AWS_SECRET_ACCESS_KEY"], keys_env.get("AWS_SESSION_TOKEN"))
    signer = _client("s3", bucket, keys, endpoint=_endpoint(bucket))
    return str(
        signer.generate_presigned_url(
            "get_object",
            Params={"Bucket": bucket.name, "Key": bucket.prefix + key},
            ExpiresIn=int(min(LINK_S, max(LEAST_S, seconds))),
        )
    )


def _bare(bucket: Bucket) -> Bucket:
    """Without the time limits that a client puts around it."""
    return bucket.inner if isinstance(bucket, Bounded) else bucket


def _is_s3(bucket: Bucket | S3Like) -> TypeGuard[S3Like]:
    return isinstance(bucket, S3Like) and str(getattr(bucket, "url", "")).startswith("s3:")


def _keys(bucket: S3Like, seconds: float, allow_account_key: bool) -> Keys:
    store = store_of(_endpoint(bucket))
    arn = _caller(bucket) if store == "aws" else None
    way = way_of(store, arn, os.environ.get(BUCKET_ROLE))
    if way.name != "account_key" and (seconds <= way.longest_s or not allow_account_key):
        try:
            return _session(bucket, way, seconds, arn)
        except BucketError:
            if not allow_account_key:
                raise
    if not allow_account_key:
        raise BucketError(
            f"no key can be had that reaches this run only: {way.why}", hint="set `allow_account_key: true`"
        )
    own = _own()
    return Keys(own.access_key, own.secret_key, own.token)


def _session(bucket: S3Like, way: Way, seconds: float, arn: str | None) -> Keys:
    """Keys for the run's folder. Raises BucketError."""
    life = int(max(LEAST_S, seconds))
    if life > way.longest_s:
        raise BucketError(
            f"a key for this run only lives {way.longest_s / 3600:.0f} h, {seconds / 3600:.1f} h are needed",
            hint=f"give the run --deadline {way.longest_s / 3600:.0f}h",
        )
    if way.name == "r2":
        own = _own()
        keys = Keys(own.access_key, own.secret_key, None)
        return r2_keys(keys, _endpoint(bucket), bucket, life, now=int(time.time()))
    policy = _policy_text(bucket, arn)
    name = session_name(bucket.prefix)
    with _asking():
        sts = _client("sts", bucket, endpoint=_endpoint(bucket) if way.name == "minio" else None)
        if way.name == "federation":
            answer = sts.get_federation_token(Name=name, Policy=policy, DurationSeconds=life)
        else:  # MinIO takes whatever role is named: it limits the caller's own rights by the policy
            role = os.environ.get(BUCKET_ROLE) or "arn:aws:iam::000000000000:role/any"
            answer = sts.assume_role(RoleArn=role, RoleSessionName=name, Policy=policy, DurationSeconds=life)
    found = answer["Credentials"]
    return Keys(found["AccessKeyId"], found["SecretAccessKey"], found["SessionToken"])


def _policy_text(bucket: S3Like, arn: str | None) -> str:
    partition = (arn or "arn:aws").split(":")[1]
    try:
        text = json.dumps(run_policy(bucket.name, bucket.prefix, partition=partition), separators=(",", ":"))
    except UsageError as error:
        raise BucketError(error.message, hint=error.hint) from error
    if len(text) > POLICY_LIMIT:
        raise BucketError("the bucket's folder has too long a name for a policy", hint="choose a shorter one")
    return text


def session_name(prefix: str) -> str:
    """What the store's own log shows: kdcloud and the run, in the characters and the length that STS takes."""
    return re.sub(r"[^\w+=,.@-]", "-", f"kd-{prefix.strip('/').rpartition('/')[2]}", flags=re.ASCII)[:32]


def r2_keys(own: Keys, endpoint: str, bucket: S3Like, life_s: int, *, now: int) -> Keys:
    """Keys for one folder of an R2 bucket, signed here with the account's own: R2 checks that, nobody is asked.

    Source: Cloudflare's documentation, "Authenticate against R2 with temporary credentials" (client-side signing).
    """
    host = urlsplit(endpoint).hostname or ""
    claims = {
        "bucket": bucket.name,
        "scope": "object-read-write",
        "paths": {"prefixPaths": [bucket.prefix], "objectPaths": []},
        "sub": host.partition(".")[0],  # the account
        "iss": own.key_id,
        "aud": host,
        "iat": now,
        "exp": now + life_s,
    }
    signed = ".".join(_base64url(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims))
    signature = hmac.new(own.secret.encode(), signed.encode(), hashlib.sha256).digest()
    jwt = f"{signed}.{_base64url(signature)}"
    secret = hashlib.sha256(jwt.encode()).hexdigest()
    return Keys(own.key_id, secret, base64.b64encode(f"jwt/{jwt}".encode()).decode())


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _caller(bucket: S3Like) -> str:
    """ARN of whoever the client's own keys belong to."""
    with _asking():
        return str(_client("sts", bucket).get_caller_identity()["Arn"])


def _own() -> Any:
    """The client's own credentials, as they are now."""
    import boto3

    with _asking():
        found = boto3.session.Session().get_credentials()
        if found is None:
            raise BucketError("no credentials for the bucket", hint="set AWS_ACCESS_KEY_ID, or AWS_PROFILE")
        return found.get_frozen_credentials()


def _endpoint(bucket: S3Like) -> str:
    return str(bucket.client.meta.endpoint_url)


def _client(service: str, bucket: S3Like, keys: Keys | None = None, *, endpoint: str | None = None) -> Any:
    """A client with the user's own settings, or with `keys`; `endpoint` None leaves it to those settings."""
    import boto3
    from botocore.config import Config

    style = (bucket.client.meta.config.s3 or {}).get("addressing_style")
    plain = Config(connect_timeout=10, read_timeout=30, retries={"mode": "standard"})
    config = plain.merge(Config(signature_version="s3v4", s3={"addressing_style": style} if style else None))
    own = (
        {"aws_access_key_id": keys.key_id, "aws_secret_access_key": keys.secret, "aws_session_token": keys.token}
        if keys
        else {}
    )
    return boto3.session.Session().client(
        service,
        region_name=bucket.client.meta.region_name or "us-east-1",
        endpoint_url=endpoint,
        config=config if service == "s3" else plain,
        **own,
    )


class _asking:
    """Whatever the token service or its client raises becomes a BucketError without a secret in it."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        if isinstance(error, ClientError):
            code = str(error.response.get("Error", {}).get("Code", ""))
            raise BucketError(
                f"the store's token service refused a key for this run only ({code})", hint=_HINTS.get(code, _HINT)
            ) from error
        if isinstance(error, BotoCoreError):
            raise BucketError(
                f"the store's token service does not answer ({type(error).__name__})",
                hint="check the network; a store of your own needs AssumeRole, as MinIO has it",
            ) from error


_HINT = "look the code up in the store's manual"
_HINTS = {
    "AccessDenied": "allow your user sts:GetFederationToken, or name a role of yours with " + BUCKET_ROLE,
    "ValidationError": "the role may not live so long: raise its maximum session duration, or give --deadline",
    "ExpiredToken": "sign in again, or renew your keys",
    "ExpiredTokenException": "sign in again, or renew your keys",
    "InvalidClientTokenId": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
}
