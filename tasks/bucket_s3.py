"""How does an S3-compatible store act as a bucket? Conditional writes, and transfers that go on where they broke.

A broken upload is found again by its key; of its parts only those are kept whose size and ETag (MD5) match the file, so
it needs no memory of its own. Stores that encrypt with a key of their own (SSE-KMS) have other ETags: there every part
is sent again, which is slower and still right.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from tasks.bucket import (
    OWN_PREFIX,
    Bucket,
    BucketError,
    Corrupt,
    Moved,
    NotFound,
    PreconditionFailed,
    Stat,
    Unsupported,
    check_key,
    os_trouble,
)
from tasks.contract import install_hint

MIB = 1 << 20
PART_BYTES = 8 * MIB  # larger files go up in parts
MAX_PARTS = 10_000  # the limit of S3
OUR_PARTS = "kdcloud-parts"  # metadata of objects whose parts are cut as `part_bytes` says
CHUNK_BYTES = MIB
DOWNLOAD_TRIES = 5  # in a row without a byte
ADDRESSING = "KDCLOUD_S3_ADDRESSING"  # path or virtual: what ~/.aws/config says at home, for machines without one


@dataclass(frozen=True)
class S3Bucket:
    client: Any  # a boto3 S3 client, safe to share between threads
    name: str
    prefix: str  # "" or "some/prefix/"

    @staticmethod
    def open(rest: str) -> S3Bucket:
        """The store behind `name/prefix`. Only looks at the AWS settings of this machine; asks nobody yet."""
        name, _, prefix = rest.partition("/")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}", name):
            raise BucketError(f"s3://{rest} names no bucket", hint="write s3://bucket/prefix")
        prefix = prefix.strip("/")
        if prefix:
            check_key(prefix)
        return S3Bucket(_client(), name, f"{prefix}/" if prefix else "")

    @property
    def url(self) -> str:
        return f"s3://{self.name}/{self.prefix}".rstrip("/")

    def at(self, prefix: str) -> Bucket:
        prefix = prefix.strip("/")
        return S3Bucket(self.client, self.name, f"{self.prefix}{check_key(prefix)}/") if prefix else self

    def put(self, key: str, data: bytes, *, if_none_match: bool = False, if_match: str | None = None) -> str:
        condition: dict[str, str] = {}
        if if_none_match:
            condition["IfNoneMatch"] = "*"
        if if_match is not None:
            condition["IfMatch"] = if_match
        try:
            with self._asking("write", key, conditional=bool(condition)):
                answer = self.client.put_object(
                    **self._place(key), Body=data, ContentMD5=_md5_header(data), **condition
                )
        except PreconditionFailed as error:
            if _was_repeated(error.__cause__):  # the first try may have been the one that got through
                now_there = self.head(key)
                if now_there is not None and now_there.etag == _etag(hashlib.md5(data).hexdigest()):
                    return now_there.etag
            raise
        return str(answer["ETag"])

    def get(self, key: str) -> tuple[bytes, Stat]:
        with self._missing(key), self._asking("read", key):
            answer = self.client.get_object(**self._place(key))
            data = answer["Body"].read()
        return data, Stat(key, len(data), answer["ETag"], answer["LastModified"])

    def head(self, key: str) -> Stat | None:
        try:
            with self._missing(key), self._asking("read", key):
                answer = self.client.head_object(**self._place(key))
        except NotFound:
            return None
        return Stat(key, answer["ContentLength"], answer["ETag"], answer["LastModified"])

    def list(self, prefix: str = "") -> Iterator[Stat]:
        with self._asking("list", prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=self.prefix + prefix)
            for page in pages:
                for item in page.get("Contents", ()):
                    key = item["Key"].removeprefix(self.prefix)
                    if key and not key.endswith("/"):  # consoles make such empty objects to show a folder
                        yield Stat(key, item["Size"], item["ETag"], item["LastModified"])

    def put_file(self, path: Path, key: str, moved: Moved | None = None) -> str:
        size = path.stat().st_size
        there = self.head(key)
        if there is not None and there.size == size and there.etag == _etag_of(path, size):
            if moved is not None:
                moved(size)
            return there.etag
        if size > PART_BYTES:
            return self._put_parts(path, key, size, moved)
        etag = self.put(key, path.read_bytes())
        if moved is not None:
            moved(size)
        return etag

    def _put_parts(self, path: Path, key: str, size: int, moved: Moved | None) -> str:
        with self._asking("write", key):
            upload_id, sent = self._broken_upload(key)
            if upload_id is None:
                started = self.client.create_multipart_upload(**self._place(key), Metadata={OUR_PARTS: "1"})
                upload_id = started["UploadId"]
            upload = {**self._place(key), "UploadId": upload_id}
            parts = []
            for number, data in enumerate(_chunks(path, part_bytes(size)), start=1):
                etag = _etag(hashlib.md5(data).hexdigest())
                if sent.get(number) != (len(data), etag):
                    answer = self.client.upload_part(
                        **upload, PartNumber=number, Body=data, ContentLength=len(data), ContentMD5=_md5_header(data)
                    )
                    etag = answer["ETag"]
                parts.append({"PartNumber": number, "ETag": etag})
                if moved is not None:
                    moved(len(data))
            return str(self.client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})["ETag"])

    def _broken_upload(self, key: str) -> tuple[str | None, dict[int, tuple[int, str]]]:
        """The newest unfinished upload of that key and its parts by number: (size, ETag)."""
        from botocore.exceptions import ClientError

        full = self.prefix + key
        pages = self.client.get_paginator("list_multipart_uploads").paginate(Bucket=self.name, Prefix=full)
        try:
            found = [upload for page in pages for upload in page.get("Uploads", ()) if upload["Key"] == full]
        except ClientError as error:
            if _code(error) not in _FORBIDDEN:  # keys for one folder cannot list them: every part is sent
                raise
            return None, {}
        if not found:
            return None, {}
        newest = max(found, key=lambda upload: (upload["Initiated"], upload["UploadId"]))["UploadId"]
        pages = self.client.get_paginator("list_parts").paginate(**self._place(key), UploadId=newest)
        parts = {part["PartNumber"]: (part["Size"], part["ETag"]) for page in pages for part in page.get("Parts", ())}
        return newest, parts

    def get_file(self, key: str, path: Path, moved: Moved | None = None) -> None:
        with self._missing(key), self._asking("read", key):
            answer = self.client.head_object(**self._place(key))
        stat = Stat(key, answer["ContentLength"], answer["ETag"], answer["LastModified"])
        md5_etag = "SSECustomerAlgorithm" not in answer and "kms" not in answer.get("ServerSideEncryption", "")
        our_parts = OUR_PARTS in answer.get("Metadata", {})
        # The name holds the ETag: bytes of an older object under the same key are never taken for this one's.
        part = path.parent / f"{OWN_PREFIX}part-{hashlib.sha256(f'{path.name} {stat.etag}'.encode()).hexdigest()[:16]}"
        try:
            for attempt in range(2):
                self._get_rest(stat, part, moved)
                if part.stat().st_size == stat.size and not (md5_etag and _contradicts(part, stat, our_parts)):
                    os.replace(part, path)
                    return
                part.unlink()  # resumed onto wrong bytes, perhaps: one fresh start
                if attempt == 1:
                    raise Corrupt(f"{self.url}/{key} arrived damaged twice", hint="try again on another network")
        except OSError as error:
            raise os_trouble(error, path) from error

    def _get_rest(self, stat: Stat, part: Path, moved: Moved | None) -> None:
        """Appends to `part` what it lacks of the object; goes on after a broken connection."""
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        with part.open("ab") as file:
            if file.tell() > stat.size:
                file.truncate(0)
            if moved is not None and file.tell():
                moved(file.tell())
            failures = 0
            while file.tell() < stat.size:
                before = file.tell()
                with self._asking("read", stat.key):
                    try:
                        answer = self.client.get_object(
                            **self._place(stat.key), Range=f"bytes={before}-", IfMatch=stat.etag
                        )
                        for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
                            file.write(chunk)
                            if moved is not None:
                                moved(len(chunk))
                    except (HTTPClientError, IncompleteReadError):
                        failures = 0 if file.tell() > before else failures + 1
                        if failures == DOWNLOAD_TRIES:
                            raise
                        time.sleep(min(2**failures, 10) / 10)

    def delete(self, key: str) -> None:
        with self._asking("delete", key):
            self.client.delete_object(**self._place(key))

    def now(self) -> datetime:
        from botocore.exceptions import ClientError

        with self._asking("reach", ""):
            try:
                answer = self.client.head_bucket(Bucket=self.name)
            except ClientError as error:
                if _code(error) not in _FORBIDDEN:  # who may not list still hears the time
                    raise
                answer = error.response
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        if date is None:
            raise BucketError(f"{self.url} does not say what time it is", hint="use a store that sends a Date header")
        return parsedate_to_datetime(date).astimezone(UTC)

    def _place(self, key: str) -> dict[str, str]:
        return {"Bucket": self.name, "Key": self.prefix + check_key(key)}

    @contextmanager
    def _missing(self, key: str) -> Iterator[None]:
        """To keys that may not list the whole bucket, S3 answers 403 for what is not there: a listing tells."""
        try:
            yield
        except BucketError as error:
            if _code(error.__cause__) in _FORBIDDEN and not self._is_listed(key):
                raise _absent(f"{self.url}/{key}") from error
            raise

    def _is_listed(self, key: str) -> bool:
        """Whether a listing shows the object; True when one cannot be had."""
        try:
            return any(stat.key == key for stat in self.list(key))
        except BucketError:
            return True

    @contextmanager
    def _asking(self, verb: str, key: str, *, conditional: bool = False) -> Iterator[None]:
        """Says in words what went wrong between us and the store."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        where = f"{self.url}/{key}".rstrip("/")
        try:
            yield
        except ClientError as error:
            raise _refusal(error, verb, where, self.name, conditional) from error
        except (BotoCoreError, Boto3Error) as error:
            raise _trouble(error, verb, where, self.name) from error


def part_bytes(size: int) -> int:
    """Bytes of a part for a file of `size` bytes: the same each time, so that a resumed upload finds its parts."""
    least = -(-size // MAX_PARTS)
    return max(PART_BYTES, -(-least // MIB) * MIB)


def _client() -> Any:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise BucketError("s3:// needs boto3, which is not installed", hint=install_hint("s3")) from error
    style = os.environ.get(ADDRESSING)
    config = Config(
        s3={"addressing_style": style} if style else None,
        connect_timeout=10,
        read_timeout=60,
        retries={"mode": "standard"},
        request_checksum_calculation="when_required",  # other stores refuse the newer checksums; we send Content-MD5
        response_checksum_validation="when_required",
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise BucketError(f"the AWS settings of this machine cannot be used: {error}", hint=_SETTINGS_HINT) from error


_SETTINGS_HINT = "check AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL and ~/.aws"
_KEYS_HINT = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run aws configure"


_FORBIDDEN = ("403", "AccessDenied")


def _absent(where: str) -> NotFound:
    return NotFound(f"{where} does not exist", hint="check the run's name with kdcloud status")


def _code(error: Any) -> str:
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))


def _refusal(error: Any, verb: str, where: str, name: str, conditional: bool) -> BucketError:
    """What an answer of the store with an error code means."""
    code = _code(error)
    if code == "NoSuchBucket":
        return BucketError(f"there is no bucket {name}", hint=f"make it (aws s3 mb s3://{name}) or mend its name")
    if conditional and code in ("412", "PreconditionFailed", "409", "ConditionalRequestConflict", "404", "NoSuchKey"):
        return PreconditionFailed(f"somebody else wrote {where} first", hint="another client works on the same run")
    if conditional and code in ("501", "NotImplemented", "InvalidArgument", "InvalidRequest"):
        return Unsupported(f"{where} knows no conditional writes", hint="use a store that has them, or one client only")
    if code in ("404", "NoSuchKey") and verb == "write":
        return BucketError(
            f"what answers there is no S3 store, or has no bucket {name}: {where}",
            hint="check AWS_ENDPOINT_URL: is it S3?",
        )
    if code in ("404", "NoSuchKey"):
        return _absent(where)
    if code in ("ExpiredToken", "ExpiredTokenException"):
        return BucketError(
            f"the credentials for {where} have expired", hint="sign in again (AWS_PROFILE: aws sso login)"
        )
    if code in ("403", "AccessDenied", "AllAccessDisabled"):
        return BucketError(f"these credentials may not {verb} {where}", hint="allow list, read, write and delete there")
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "401"):
        return BucketError(f"{where} does not accept these credentials ({code})", hint=_KEYS_HINT)
    if code == "RequestTimeTooSkewed":
        return BucketError("the clock of this machine is wrong by more than the store allows", hint="set the clock")
    if code in ("301", "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        return BucketError(f"the bucket {name} is in another region", hint="set AWS_REGION to the bucket's region")
    if code in ("412", "PreconditionFailed"):
        return Corrupt(f"{where} changed while it was read", hint="try again")
    return BucketError(f"the store would not {verb} {where}: {error}", hint="look the code up in the store's manual")


def _trouble(error: Exception, verb: str, where: str, name: str) -> BucketError:
    """What a failure before or without an answer means."""
    from botocore import exceptions as boto

    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return BucketError(f"no credentials for {where}", hint=_KEYS_HINT)
    if isinstance(error, boto.TokenRetrievalError | boto.SSOError | boto.UnauthorizedSSOTokenError):
        return BucketError(f"the sign-in for {where} has expired", hint="run aws sso login")
    if isinstance(error, boto.ConnectionError | boto.HTTPClientError | boto.IncompleteReadError):
        hint = "check the network and AWS_ENDPOINT_URL, resume"
        if f"//{name}." in str(error):
            hint += (
                "; a store without a host name for each bucket needs `s3 = addressing_style = path` in ~/.aws/config"
            )
        return BucketError(f"{where} cannot be reached: {error}", hint=hint)
    if isinstance(error, boto.ParamValidationError):
        return BucketError(f"{where} is not a place in a bucket: {error}", hint="write s3://bucket/prefix")
    return BucketError(f"could not {verb} {where}: {error}", hint=_SETTINGS_HINT)


def _was_repeated(error: BaseException | None) -> bool:
    response = getattr(error, "response", {})
    return bool(response.get("ResponseMetadata", {}).get("RetryAttempts"))


def _md5_header(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()


def _etag(digest: str) -> str:
    return f'"{digest}"'


def _etag_of(path: Path, size: int) -> str:
    """The ETag S3 gives to these bytes when `put_file` sends them: MD5, or MD5 of the parts' MD5s and their number."""
    if size <= PART_BYTES:
        return _etag(hashlib.md5(path.read_bytes()).hexdigest())
    digests = [hashlib.md5(data).digest() for data in _chunks(path, part_bytes(size))]
    return _etag(f"{hashlib.md5(b''.join(digests)).hexdigest()}-{len(digests)}")


def _chunks(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(size):
            yield chunk


def _contradicts(path: Path, stat: Stat, our_parts: bool) -> bool:
    """Whether the file has another MD5 than the ETag tells. It tells nothing of parts that another tool has cut."""
    etag = stat.etag.strip('"')
    if re.fullmatch("[0-9a-f]{32}", etag):
        with path.open("rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest() != etag
    if our_parts and re.fullmatch("[0-9a-f]{32}-[0-9]+", etag):
        return _etag_of(path, stat.size) != _etag(etag)
    return False
