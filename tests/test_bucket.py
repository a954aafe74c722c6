"""Does a bucket keep its promises, as a folder and as an S3 store (a moto server on loopback)?"""

from __future__ import annotations

import io
import json
import os
import shutil
import string
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import bucket_file, bucket_s3
from tasks.bucket import (
    Bucket,
    BucketError,
    Corrupt,
    Manifest,
    NotFound,
    PreconditionFailed,
    Probe,
    Unsupported,
    check_key,
    commit_folder,
    delete_prefix,
    fetch_folder,
    open_bucket,
    probe,
    read_commit,
)
from tasks.bucket_file import FileBucket
from tasks.bucket_s3 import PART_BYTES, S3Bucket

ROOT = Path(__file__).parents[1]
KEY_CHARS = string.ascii_letters + string.digits + " ._-+=@()é漢"


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> S3Bucket:
    """An empty bucket behind a prefix, opened as a user would: everything from the AWS variables."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    bucket = open_bucket(f"s3://kd-{abs(hash(request.node.nodeid)):x}/some/prefix")
    assert isinstance(bucket, S3Bucket)
    bucket.client.create_bucket(Bucket=bucket.name)
    return bucket


@pytest.fixture(params=["file", "s3"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Bucket:
    if request.param == "s3":
        opened: Bucket = request.getfixturevalue("s3")
        return opened
    return open_bucket(f"file:{tmp_path}/bucket")


def keys(bucket: Bucket, prefix: str = "") -> list[str]:
    return [stat.key for stat in bucket.list(prefix)]


# -- objects: both stores


def test_what_is_put_is_got_with_its_size_etag_and_time(bucket: Bucket) -> None:
    etag = bucket.put("run/a.json", b"{}")
    data, stat = bucket.get("run/a.json")
    assert (data, stat.key, stat.size, stat.etag) == (b"{}", "run/a.json", 2, etag)
    assert bucket.head("run/a.json") == stat
    assert list(bucket.list()) == [stat]
    assert abs(stat.modified - datetime.now(UTC)) < timedelta(minutes=1)


def test_an_absent_object_is_not_found_and_deleting_it_is_success(bucket: Bucket, tmp_path: Path) -> None:
    for call in (lambda: bucket.get("no/thing"), lambda: bucket.get_file("no/thing", tmp_path / "x")):
        with pytest.raises(NotFound) as caught:
            call()
        assert caught.value.hint
    assert bucket.head("no/thing") is None
    bucket.delete("no/thing")
    assert keys(bucket) == []
    assert list(tmp_path.glob("x*")) == []


def test_list_goes_by_the_text_of_the_key_and_at_by_the_folder(bucket: Bucket) -> None:
    for key in (
        ("run/step-1/a", "run/step-10/a", "run/step-1", "b")
        if isinstance(bucket, S3Bucket)
        else (
            "run/step-1/a",
            "run/step-10/a",
            "b",
        )
    ):
        bucket.put(key, b"x")
    assert keys(bucket, "run/step-1/") == ["run/step-1/a"]
    assert set(keys(bucket, "run/step-1")) >= {"run/step-1/a", "run/step-10/a"}
    assert keys(bucket) == sorted(keys(bucket))
    assert keys(bucket.at("run/step-1")) == ["a"]
    assert bucket.at("run").at("step-1").url == bucket.at("run/step-1/").url == f"{bucket.url}/run/step-1"
    assert bucket.at("") is bucket


def test_writing_if_absent_succeeds_once(bucket: Bucket) -> None:
    bucket.put("lease", b"one", if_none_match=True)
    with pytest.raises(PreconditionFailed):
        bucket.put("lease", b"two", if_none_match=True)
    assert bucket.get("lease")[0] == b"one"


def test_writing_over_an_etag_succeeds_only_while_it_is_the_newest(bucket: Bucket) -> None:
    with pytest.raises(PreconditionFailed):
        bucket.put("lease", b"zero", if_match='"0"')
    first = bucket.put("lease", b"one")
    second = bucket.put("lease", b"two", if_match=first)
    assert second != first
    with pytest.raises(PreconditionFailed):
        bucket.put("lease", b"three", if_match=first)
    assert bucket.get("lease")[0] == b"two"


def test_the_stores_clock_agrees_with_the_times_of_its_objects(bucket: Bucket) -> None:
    before = bucket.now()
    bucket.put("a", b"x")
    stat = bucket.head("a")
    assert stat is not None
    assert before - timedelta(seconds=1) <= stat.modified <= bucket.now() + timedelta(seconds=1)
    assert before.utcoffset() == timedelta(0)


def test_a_probe_finds_conditional_writes_and_leaves_nothing(bucket: Bucket) -> None:
    assert probe(bucket) == Probe(writable=True, conditional=True)
    assert keys(bucket) == []


class Careless:
    """A store that ignores conditions, or refuses to know them, around one that has them."""

    def __init__(self, inner: Bucket, *, refuses: bool) -> None:
        self.inner, self.refuses = inner, refuses

    def put(self, key: str, data: bytes, *, if_none_match: bool = False, if_match: str | None = None) -> str:
        if self.refuses and (if_none_match or if_match):
            raise Unsupported("never heard of it")
        return self.inner.put(key, data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.mark.parametrize("refuses", [True, False])
def test_a_probe_notices_a_store_without_conditional_writes(tmp_path: Path, refuses: bool) -> None:
    store: Any = Careless(FileBucket(tmp_path), refuses=refuses)
    assert probe(store) == Probe(writable=True, conditional=False)
    assert keys(store) == []


# -- keys


@given(st.text(max_size=40))
def test_a_key_is_refused_or_names_a_path_inside_every_folder(key: str) -> None:
    try:
        check_key(key)
    except BucketError:
        return
    path = Path("/store", key)
    assert path.as_posix() == f"/store/{key}"  # pathlib changed nothing: no '//', './', absolute part or trailing '/'
    assert os.path.normpath(path) == str(path)
    assert key and "\0" not in key


ESCAPES = ["/", "/a", "..", "../a", "a/../b", "a/./b", "."]
MALFORMED = ["", "a/", "a//b", "a\\b", "a\0", "a\n", "\ud800", "x" * 256, "y/" * 600 + "z", ".kd~lock", "a/.kd~temp"]


@pytest.mark.parametrize("key", ESCAPES + MALFORMED)
def test_unsafe_keys_are_refused_everywhere(tmp_path: Path, key: str) -> None:
    store = FileBucket(tmp_path / "store")
    source = tmp_path / "source"
    source.write_bytes(b"x")
    for call in (
        lambda: store.put(key, b""),
        lambda: store.get(key),
        lambda: store.head(key),
        lambda: store.delete(key),
        lambda: store.put_file(source, key),
        lambda: store.get_file(key, tmp_path / "out"),
    ):
        with pytest.raises(BucketError):
            call()
    assert not (tmp_path / "store").exists()


@given(st.dictionaries(st.text(KEY_CHARS, min_size=1, max_size=20), st.binary(max_size=50), max_size=6))
def test_a_folder_is_a_dictionary_of_its_valid_keys(objects: dict[str, bytes]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store = FileBucket(Path(folder))
        put = {}
        for key, data in objects.items():
            try:
                store.put(key, data)
            except BucketError:
                continue
            put[key] = data
        assert {stat.key: store.get(stat.key)[0] for stat in store.list()} == put
        for key in put:
            store.delete(key)
        assert keys(store) == []


def test_listing_cannot_look_outside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    with pytest.raises(BucketError):
        list(FileBucket(tmp_path / "store").list("../"))


# -- opening


def test_file_urls_mean_the_folder_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    here = Path.cwd()
    assert open_bucket("file:runs/one").url == f"file:{here}/runs/one"
    assert open_bucket("file:/data/kd/../kd/").url == open_bucket("file:///data/kd").url == "file:/data/kd"
    assert open_bucket("file:~/kd").url == f"file:{tmp_path}/home/kd"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["", "runs", "/runs", "file:", "file://host/x", "gs://b", "s3:", "s3://", "s3://a b/c"])
def test_what_is_no_bucket_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(BucketError) as caught:
        open_bucket(url)
    assert "write " in caught.value.hint


# -- a folder as a bucket


def test_a_folder_that_cannot_be_made_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(BucketError) as caught:
        probe(open_bucket(f"file:{tmp_path}/taken/bucket"))
    assert "taken" in caught.value.message and caught.value.hint


def test_a_full_disk_is_one_clear_sentence_and_keeps_the_old_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileBucket(tmp_path)
    store.put("a", b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bucket_file.os, "fsync", full)
    with pytest.raises(BucketError) as caught:
        store.put("a", b"new")
    assert "full" in caught.value.message and "free" in caught.value.hint
    assert store.get("a")[0] == b"old"
    assert keys(store) == ["a"]


COUNT = """
import sys
from tasks.bucket import PreconditionFailed, open_bucket
store = open_bucket("file:" + sys.argv[1])
done = 0
while done < 40:
    data, stat = store.get("deep/er/count")
    try:
        store.put("deep/er/count", str(int(data) + 1).encode(), if_match=stat.etag)
        done += 1
    except PreconditionFailed:
        pass
"""


def test_conditional_writes_lose_nothing_between_processes(tmp_path: Path) -> None:
    store = FileBucket(tmp_path)
    store.put("deep/er/count", b"0")
    argv = [sys.executable, "-c", COUNT, str(tmp_path)]
    processes = [subprocess.Popen(argv, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert store.get("deep/er/count")[0] == b"120"


def test_of_many_who_write_if_absent_one_wins_while_others_empty_the_folder(tmp_path: Path) -> None:
    for turn in range(20):
        wins: list[int] = []

        def claim(who: int, key: str = f"leases/{turn}", wins: list[int] = wins) -> None:
            store = FileBucket(tmp_path) if who % 2 else FileBucket(tmp_path / "leases")
            try:
                store.put(key if who % 2 else key.removeprefix("leases/"), str(who).encode(), if_none_match=True)
                wins.append(who)
            except PreconditionFailed:
                FileBucket(tmp_path).delete(f"leases/none-{who}")

        threads = [threading.Thread(target=claim, args=(who,)) for who in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert len(wins) == 1
        assert FileBucket(tmp_path).get(f"leases/{turn}")[0] == str(wins[0]).encode()
        FileBucket(tmp_path).delete(f"leases/{turn}")


def test_a_folder_removed_while_a_writer_waits_for_its_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = bucket_file.fcntl.flock
    removed: list[Path] = []

    def removed_first(*args: Any) -> None:
        if not removed:
            removed.append(tmp_path / "leases")
            shutil.rmtree(tmp_path / "leases")
        flock(*args)

    monkeypatch.setattr(bucket_file.fcntl, "flock", removed_first)
    store = FileBucket(tmp_path)
    store.put("leases/run", b"mine", if_none_match=True)
    assert removed and store.get("leases/run")[0] == b"mine"


def test_deleting_the_last_object_leaves_no_empty_folders(tmp_path: Path) -> None:
    store = FileBucket(tmp_path)
    store.put("a/b/c/d", b"x")
    store.put("a/e", b"x")
    store.delete("a/b/c/d")
    assert not (tmp_path / "a" / "b").exists()
    store.delete("a/e")
    assert not (tmp_path / "a").exists() and tmp_path.is_dir()


@given(st.binary(max_size=300), st.binary(max_size=300), st.integers(0, 300))
def test_a_copy_goes_on_from_any_left_over(source: bytes, junk: bytes, kept: int) -> None:
    import tempfile

    before, bucket_file.CHUNK_BYTES = bucket_file.CHUNK_BYTES, 16
    try:
        with tempfile.TemporaryFile("a+b", buffering=32) as part:
            part.write(source[:kept] + junk)
            part.flush()
            counts: list[int] = []
            bucket_file._copy_on(io.BytesIO(source), part, counts.append)
            part.flush()
            part.seek(0)
            assert part.read() == source
            assert sum(counts) == len(source)
    finally:
        bucket_file.CHUNK_BYTES = before


def test_a_broken_upload_to_a_folder_goes_on_with_what_is_there_and_is_never_listed(tmp_path: Path) -> None:
    store = FileBucket(tmp_path / "store")
    source = tmp_path / "weights"
    source.write_bytes(os.urandom(5 << 20))
    with pytest.raises(KeyboardInterrupt):
        store.put_file(source, "w/weights", breaking_after(2))
    assert keys(store) == [] and store.head("w/weights") is None
    (part,) = (tmp_path / "store" / "w").glob(".kd~part*")
    half = part.stat()
    assert half.st_size > 0
    etag = store.put_file(source, "w/weights")
    final = tmp_path / "store" / "w" / "weights"
    assert final.stat().st_ino == half.st_ino
    assert final.read_bytes() == source.read_bytes()
    stat = store.head("w/weights")
    assert stat is not None and stat.etag == etag


def breaking_after(calls: int) -> Any:
    """A progress callback that is interrupted, as by Ctrl-C, at its call number `calls`."""
    seen = 0

    def moved(_: int) -> None:
        nonlocal seen
        seen += 1
        if seen == calls:
            raise KeyboardInterrupt

    return moved


# -- S3


class Watched:
    """An S3 client that counts its calls and can be made to break."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.breaks: dict[str, int] = {}  # call -> how many may succeed before the network fails

    def __getattr__(self, name: str) -> Any:
        from botocore.exceptions import ConnectionClosedError

        inner = getattr(self.client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, kwargs))
            if name in self.breaks:
                if self.breaks[name] == 0:
                    raise ConnectionClosedError(endpoint_url="http://store")
                self.breaks[name] -= 1
            return inner(*args, **kwargs)

        return call

    def parts_sent(self) -> list[int]:
        return [kwargs["PartNumber"] for name, kwargs in self.calls if name == "upload_part"]


def watched(bucket: S3Bucket) -> tuple[S3Bucket, Watched]:
    client = Watched(bucket.client)
    return S3Bucket(client, bucket.name, bucket.prefix), client


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A file of three parts, the last one short."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(2 * PART_BYTES + 12345))
    return path


def test_a_broken_upload_goes_on_and_sends_only_the_missing_parts(s3: S3Bucket, big: Path, tmp_path: Path) -> None:
    first, client = watched(s3)
    client.breaks["upload_part"] = 1
    with pytest.raises(BucketError) as caught:
        first.put_file(big, "ckpt/model")
    assert "cannot be reached" in caught.value.message and caught.value.hint
    assert s3.head("ckpt/model") is None and keys(s3) == []

    second, client = watched(s3)
    counts: list[int] = []
    etag = second.put_file(big, "ckpt/model", counts.append)
    assert client.parts_sent() == [2, 3]
    assert sum(counts) == big.stat().st_size
    s3.get_file("ckpt/model", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == big.read_bytes()
    stat = s3.head("ckpt/model")
    assert stat is not None and stat.etag == etag


def test_parts_of_other_bytes_under_the_same_key_are_not_kept(s3: S3Bucket, big: Path, tmp_path: Path) -> None:
    first, client = watched(s3)
    client.breaks["upload_part"] = 2
    with pytest.raises(BucketError):
        first.put_file(big, "ckpt/model")
    data = bytearray(big.read_bytes())
    data[PART_BYTES + 7] ^= 1  # the second part is another one now
    big.write_bytes(data)
    second, client = watched(s3)
    second.put_file(big, "ckpt/model")
    assert client.parts_sent() == [2, 3]
    s3.get_file("ckpt/model", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data


def test_what_is_there_already_is_not_sent_again(s3: S3Bucket, big: Path) -> None:
    small = big.with_name("config.json")
    small.write_bytes(b"{}")
    etags = [s3.put_file(path, path.name) for path in (small, big)]
    again, client = watched(s3)
    counts: list[int] = []
    assert [again.put_file(path, path.name, counts.append) for path in (small, big)] == etags
    assert {name for name, _ in client.calls} == {"head_object"}
    assert sum(counts) == 2 + big.stat().st_size


def test_a_broken_download_goes_on_from_the_bytes_it_has(s3: S3Bucket, big: Path, tmp_path: Path) -> None:
    s3.put_file(big, "model")
    dest = tmp_path / "dest"
    with pytest.raises(KeyboardInterrupt):
        s3.get_file("model", dest, breaking_after(3))
    assert not dest.exists()
    again, client = watched(s3)
    counts: list[int] = []
    again.get_file("model", dest, counts.append)
    (request,) = [kwargs for name, kwargs in client.calls if name == "get_object"]
    assert int(request["Range"].removeprefix("bytes=").removesuffix("-")) >= 2 << 20
    assert sum(counts) == big.stat().st_size
    assert dest.read_bytes() == big.read_bytes()


def test_a_connection_that_breaks_while_reading_is_taken_up_again(s3: S3Bucket, big: Path, tmp_path: Path) -> None:
    from botocore.exceptions import ReadTimeoutError

    s3.put_file(big, "model")
    bodies: list[str] = []

    class Flaky(Watched):
        def get_object(self, **kwargs: Any) -> Any:
            answer = self.client.get_object(**kwargs)
            body = answer["Body"]
            bodies.append(kwargs["Range"])
            if len(bodies) == 1:

                class Breaking:
                    def iter_chunks(self, size: int) -> Iterator[bytes]:
                        yield body.read(size)
                        raise ReadTimeoutError(endpoint_url="http://store")

                answer["Body"] = Breaking()
            return answer

    S3Bucket(Flaky(s3.client), s3.name, s3.prefix).get_file("model", tmp_path / "back")
    assert bodies == ["bytes=0-", f"bytes={1 << 20}-"]
    assert (tmp_path / "back").read_bytes() == big.read_bytes()


def test_a_download_resumed_onto_wrong_bytes_starts_afresh(s3: S3Bucket, big: Path, tmp_path: Path) -> None:
    s3.put_file(big, "model")
    dest = tmp_path / "back"
    with pytest.raises(KeyboardInterrupt):
        s3.get_file("model", dest, breaking_after(3))
    (part,) = tmp_path.glob(".kd~part*")
    part.write_bytes(b"\0" * part.stat().st_size)
    s3.get_file("model", dest)
    assert dest.read_bytes() == big.read_bytes()


def test_part_sizes_depend_on_the_size_alone_and_stay_within_the_limits() -> None:
    for size in (0, PART_BYTES, 80 << 30, 5 << 40):
        part = bucket_s3.part_bytes(size)
        assert part >= PART_BYTES and part % (1 << 20) == 0
        assert -(-size // part) <= bucket_s3.MAX_PARTS


def test_a_repeated_conditional_write_that_finds_its_own_bytes_has_won(s3: S3Bucket) -> None:
    from botocore.exceptions import ClientError

    class Repeating(Watched):
        """The first try gets through, its answer is lost, the second try meets it."""

        def put_object(self, **kwargs: Any) -> Any:
            if not self.calls:
                self.calls.append(("lost", {}))
                self.client.put_object(**kwargs)
            try:
                return self.client.put_object(**kwargs)
            except ClientError as error:
                error.response["ResponseMetadata"]["RetryAttempts"] = 1
                raise

    store = S3Bucket(Repeating(s3.client), s3.name, s3.prefix)
    etag = store.put("lease", b"mine", if_none_match=True)
    assert s3.get("lease")[1].etag == etag
    with pytest.raises(PreconditionFailed):
        store.put("lease", b"other", if_none_match=True)


ERRORS = [
    ("NoSuchBucket", "there is no bucket", "aws s3 mb"),
    ("AccessDenied", "may not write", "allow"),
    ("InvalidAccessKeyId", "does not accept these credentials", "AWS_ACCESS_KEY_ID"),
    ("ExpiredToken", "have expired", "AWS_PROFILE"),
    ("404", "no S3 store", "AWS_ENDPOINT_URL"),
    ("PermanentRedirect", "another region", "AWS_REGION"),
    ("RequestTimeTooSkewed", "clock", "set the clock"),
    ("SlowDown", "would not write", "manual"),
]


@pytest.mark.parametrize(("code", "message", "hint"), ERRORS)
def test_a_refusal_of_the_store_says_what_to_do(s3: S3Bucket, code: str, message: str, hint: str) -> None:
    from botocore.exceptions import ClientError

    class Refusing(Watched):
        def put_object(self, **_: Any) -> Any:
            raise ClientError({"Error": {"Code": code, "Message": "no"}}, "PutObject")

    with pytest.raises(BucketError) as caught:
        S3Bucket(Refusing(s3.client), s3.name, s3.prefix).put("a", b"x")
    assert message in caught.value.message and hint in caught.value.hint


@pytest.mark.parametrize(
    ("code", "kind"), [("NotImplemented", Unsupported), ("ConditionalRequestConflict", PreconditionFailed)]
)
def test_a_refused_condition_is_told_from_a_lost_one(s3: S3Bucket, code: str, kind: type[BucketError]) -> None:
    from botocore.exceptions import ClientError

    class Refusing(Watched):
        def put_object(self, **_: Any) -> Any:
            raise ClientError({"Error": {"Code": code, "Message": "no"}}, "PutObject")

    with pytest.raises(kind):
        S3Bucket(Refusing(s3.client), s3.name, s3.prefix).put("a", b"x", if_none_match=True)


def test_a_bucket_that_does_not_exist_is_said_by_the_store(s3: S3Bucket) -> None:
    with pytest.raises(BucketError, match="there is no bucket kd-nowhere"):
        probe(open_bucket("s3://kd-nowhere/x"))


def test_missing_credentials_and_an_unreachable_store_are_said(s3: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # discard: nobody listens there
    with pytest.raises(BucketError, match="cannot be reached"):
        open_bucket(s3.url).put("a", b"x")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(BucketError, match="no credentials") as caught:
        open_bucket(s3.url).put("a", b"x")
    assert "AWS_PROFILE" in caught.value.hint
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(BucketError) as caught:
        open_bucket(s3.url)
    assert "nobody" in caught.value.message


# -- committed folders: both stores


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "out"
    (made / "model" / "deep").mkdir(parents=True)
    (made / "model" / "weights").write_bytes(os.urandom(3000))
    (made / "model" / "deep" / "empty").write_bytes(b"")
    (made / "result.json").write_text("{}")
    return made


FILES = ["model/deep/empty", "model/weights", "result.json"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_committed_folder_comes_back_byte_for_byte(bucket: Bucket, folder: Path, tmp_path: Path) -> None:
    up: list[int] = []
    down: list[int] = []
    manifest = commit_folder(bucket, folder, "run/train", fence=7, moved=up.append)
    assert read_commit(bucket, "run/train") == manifest
    assert (manifest.fence, sorted(manifest.files), manifest.size) == (7, FILES, 3002)
    assert contents(fetch_folder(bucket, "run/train", tmp_path / "dest", moved=down.append)) == contents(folder)
    assert sum(up) == sum(down) == 3002
    raw = json.loads(bucket.get("run/train/COMMIT")[0])
    assert raw["schema"] == 1 and raw["files"]["result.json"]["size"] == 2


class Logged:
    """A bucket that writes down what is asked of it, and breaks before write number `dies_at`."""

    def __init__(self, inner: Bucket, log: list[str], dies_at: list[int]) -> None:
        self.inner, self.log, self.dies_at = inner, log, dies_at

    def at(self, prefix: str) -> Any:
        return Logged(self.inner.at(prefix), self.log, self.dies_at)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if name not in ("put", "put_file", "get_file", "delete"):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            if name != "get_file":
                self.dies_at[0] -= 1
                if self.dies_at[0] == 0:
                    raise KeyboardInterrupt
            self.log.append(f"{name} {args[1] if name == 'put_file' else args[0]}")
            return value(*args, **kwargs)

        return call


def logged(bucket: Bucket, dies_at: int = 0) -> tuple[Any, list[str]]:
    log: list[str] = []
    return Logged(bucket, log, [dies_at]), log


def test_the_commit_is_written_last_and_only_when_the_guard_lets_it(bucket: Bucket, folder: Path) -> None:
    class Fenced(Exception):
        pass

    def guard() -> None:
        assert {f"run/train/{name}" for name in FILES} <= set(keys(bucket))
        raise Fenced

    watched_bucket, log = logged(bucket)
    with pytest.raises(Fenced):
        commit_folder(watched_bucket, folder, "run/train", fence=1, guard=guard)
    assert read_commit(bucket, "run/train") is None
    commit_folder(watched_bucket, folder, "run/train", fence=1)
    assert log[-1] == "put COMMIT" and log.count("put COMMIT") == 1


@pytest.mark.parametrize("dies_at", range(1, 9))
def test_wherever_a_commit_is_killed_readers_see_all_of_one_version_or_nothing(
    tmp_path: Path, folder: Path, dies_at: int
) -> None:
    bucket = FileBucket(tmp_path / "bucket")
    commit_folder(bucket, folder, "step-1", fence=1)
    old = contents(folder)
    (folder / "result.json").write_text('{"new": 1}')
    (folder / "added").write_text("more")
    new = contents(folder)
    broken, log = logged(bucket, dies_at)
    try:
        commit_folder(broken, folder, "step-1", fence=1)
        assert dies_at > 6  # delete COMMIT, four files, COMMIT
    except KeyboardInterrupt:
        assert len(log) == dies_at - 1
    if read_commit(bucket, "step-1") is None:
        with pytest.raises(NotFound):
            fetch_folder(bucket, "step-1", tmp_path / "dest")
    else:
        assert contents(fetch_folder(bucket, "step-1", tmp_path / "dest")) in (old, new)
    commit_folder(bucket, folder, "step-1", fence=1)
    assert contents(fetch_folder(bucket, "step-1", tmp_path / "dest")) == new


def test_committing_the_same_again_never_takes_the_old_commit_away(tmp_path: Path, folder: Path) -> None:
    bucket, log = logged(FileBucket(tmp_path / "bucket"))
    commit_folder(bucket, folder, "step-1", fence=1)
    log.clear()
    commit_folder(bucket, folder, "step-1", fence=2)
    assert not [entry for entry in log if entry.startswith("delete")]


def test_a_client_with_an_older_fence_cannot_commit_over_a_newer_one(bucket: Bucket, folder: Path) -> None:
    manifest = commit_folder(bucket, folder, "step-1", fence=5)
    (folder / "result.json").write_text("stale")
    with pytest.raises(PreconditionFailed):
        commit_folder(bucket, folder, "step-1", fence=4)
    assert read_commit(bucket, "step-1") == manifest
    assert bucket.get("step-1/result.json")[0] == b"{}"


def test_only_what_is_missing_is_fetched(bucket: Bucket, folder: Path, tmp_path: Path) -> None:
    commit_folder(bucket, folder, "run/train", fence=1)
    dest = fetch_folder(bucket, "run/train", tmp_path / "dest")
    (dest / "result.json").write_text("spoilt")
    (dest / "mine").write_text("kept")
    watched_bucket, log = logged(bucket)
    fetch_folder(watched_bucket, "run/train", dest)
    assert log == ["get_file result.json"]
    assert contents(dest) == {**contents(folder), "mine": b"kept"}


def test_bytes_that_do_not_match_the_commit_are_refused(bucket: Bucket, folder: Path, tmp_path: Path) -> None:
    commit_folder(bucket, folder, "run/train", fence=1)
    bucket.put("run/train/model/weights", os.urandom(3000))  # same size
    with pytest.raises(Corrupt) as caught:
        fetch_folder(bucket, "run/train", tmp_path / "dest")
    assert "model/weights" in caught.value.message and caught.value.hint
    assert not (tmp_path / "dest" / "model" / "weights").exists()
    bucket.delete("run/train/model/weights")
    with pytest.raises(Corrupt, match="missing"):
        fetch_folder(bucket, "run/train", tmp_path / "dest")


def test_what_was_never_committed_is_not_found(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("run/train/model", b"half of it")
    with pytest.raises(NotFound, match="nothing is committed"):
        fetch_folder(bucket, "run/train", tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


HASH = "0" * 64


def manifest_text(rel: str = "a", size: object = 1, sha256: object = HASH, fence: object = 1, schema: int = 1) -> str:
    return json.dumps({"schema": schema, "fence": fence, "files": {rel: {"size": size, "sha256": sha256}}})


BAD_MANIFESTS = [
    "not json",
    "[]",
    "{}",
    '{"schema": 1, "fence": 1, "files": []}',
    '{"schema": 1, "fence": 1, "files": {"a": {"size": 1}}}',
    manifest_text(schema=2),
    manifest_text(fence="1"),
    manifest_text(size=-1),
    manifest_text(size="1"),
    manifest_text(sha256=HASH[1:]),
    manifest_text(sha256=None),
    manifest_text(rel="../a"),
    manifest_text(rel="/etc/a"),
]


@pytest.mark.parametrize("text", BAD_MANIFESTS)
def test_a_manifest_that_cannot_be_trusted_writes_nothing(tmp_path: Path, text: str) -> None:
    bucket = FileBucket(tmp_path / "bucket")
    bucket.put("step-1/COMMIT", text.encode())
    bucket.put("step-1/a", b"x")
    with pytest.raises(Corrupt) as caught:
        fetch_folder(bucket, "step-1", tmp_path / "dest")
    assert caught.value.hint
    assert not (tmp_path / "dest").exists() and not (tmp_path / "a").exists()


@given(st.dictionaries(st.text(string.ascii_letters, min_size=1), st.binary(max_size=8), max_size=5), st.integers(0, 9))
def test_a_manifest_reads_back_as_it_was_written(files: dict[str, bytes], fence: int) -> None:
    from hashlib import sha256

    from tasks.bucket import FileEntry

    entries = {rel: FileEntry(len(data), sha256(data).hexdigest()) for rel, data in files.items()}
    manifest = Manifest(fence=fence, files=entries)
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_a_link_in_the_destination_does_not_lead_writes_out_of_it(tmp_path: Path, folder: Path) -> None:
    bucket = FileBucket(tmp_path / "bucket")
    commit_folder(bucket, folder, "step-1", fence=1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "dest").mkdir()
    (tmp_path / "dest" / "model").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Corrupt, match="outside"):
        fetch_folder(bucket, "step-1", tmp_path / "dest")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_folders_that_cannot_be_committed_whole_are_refused(tmp_path: Path, folder: Path) -> None:
    bucket = FileBucket(tmp_path / "bucket")
    (folder / "COMMIT").write_text("mine")
    with pytest.raises(BucketError, match="of its own"):
        commit_folder(bucket, folder, "step-1", fence=1)
    (folder / "COMMIT").unlink()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(BucketError, match="link to a folder"):
        commit_folder(bucket, folder, "step-1", fence=1)
    assert keys(bucket) == []


def test_a_file_that_changes_while_it_is_uploaded_is_not_committed(tmp_path: Path, folder: Path) -> None:
    bucket = FileBucket(tmp_path / "bucket")

    def moved(_: int) -> None:
        (folder / "result.json").write_text('{"later": true}')

    with pytest.raises(BucketError, match="changed while"):
        commit_folder(bucket, folder, "step-1", fence=1, moved=moved)
    assert read_commit(bucket, "step-1") is None


def test_deleting_a_folder_takes_its_commit_first_and_its_neighbours_never(bucket: Bucket, folder: Path) -> None:
    (folder / "0001").write_text("its name comes before COMMIT")
    commit_folder(bucket, folder, "run/step-1", fence=1)
    commit_folder(bucket, folder, "run/step-10", fence=1)
    watched_bucket, log = logged(bucket)
    delete_prefix(watched_bucket, "run/step-1")
    assert log[0] == "delete run/step-1/COMMIT"
    assert keys(bucket, "run/step-1/") == []
    assert len(keys(bucket, "run/step-10/")) == len(FILES) + 2
    delete_prefix(bucket, "run/step-1")
