"""Where do artefacts live, and which of them count? One interface to a folder (`file:`) or an S3 store (`s3://`).

`open_bucket` opens one, `probe` tries it, `commit_folder` and `fetch_folder` move whole folders: one counts only with
its COMMIT manifest (sizes and SHA-256), which is written last. The stores are `bucket_file` and `bucket_s3`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from tasks.contract import COMMIT_FILE

COMMIT_SCHEMA = 1
OWN_PREFIX = ".kd~"  # names the stores keep to themselves (locks, half-written files): never a key, never listed
MAX_KEY_BYTES = 1024  # the limit of S3
MAX_NAME_BYTES = 255  # the limit of every common file system, for one part of a key


class BucketError(Exception):
    """The store did not do what was asked: message and hint for a person."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class NotFound(BucketError):
    """No object under that key."""


class PreconditionFailed(BucketError):
    """A conditional write lost: somebody else wrote first."""


class Corrupt(BucketError):
    """Bytes do not match the COMMIT manifest."""


class Unsupported(BucketError):
    """The store does not know this kind of request (conditional writes, most often)."""


@dataclass(frozen=True)
class Stat:
    key: str
    size: int
    etag: str
    modified: datetime


Moved = Callable[[int], None]  # called with the bytes moved since the last call


class Bucket(Protocol):
    """Keys are relative, '/'-separated, without '..'. Writes are atomic: a reader sees the old object or the new."""

    @property
    def url(self) -> str: ...

    def put(self, key: str, data: bytes, *, if_none_match: bool = False, if_match: str | None = None) -> str:
        """Writes and returns the ETag. if_none_match: only if absent; if_match: only over that ETag.

        Raises PreconditionFailed.
        """
        ...

    def get(self, key: str) -> tuple[bytes, Stat]:
        """Raises NotFound."""
        ...

    def head(self, key: str) -> Stat | None: ...

    def list(self, prefix: str = "") -> Iterator[Stat]:
        """Objects whose key starts with `prefix`, as text ("step-1" finds "step-10" too), ordered by key."""
        ...

    def put_file(self, path: Path, key: str, moved: Moved | None = None) -> str:
        """Uploads; a broken upload of the same bytes goes on where it stopped."""
        ...

    def get_file(self, key: str, path: Path, moved: Moved | None = None) -> None: ...

    def delete(self, key: str) -> None:
        """Absent is success."""
        ...

    def now(self) -> datetime:
        """The store's own clock (server Date), UTC."""
        ...

    def at(self, prefix: str) -> Bucket:
        """The same store below `prefix`."""
        ...


def open_bucket(url: str) -> Bucket:
    """The store at `file:/folder`, `file:folder` (from the working folder) or `s3://name/prefix`; writes nothing yet.

    For s3, region, profile, credentials and endpoint come from where every AWS tool takes them (AWS_* variables,
    ~/.aws). Raises BucketError for another kind of url.
    """
    scheme, colon, rest = url.partition(":")
    if scheme == "file" and colon:
        from tasks.bucket_file import FileBucket

        return FileBucket.open(rest)
    if scheme == "s3" and rest.startswith("//"):
        from tasks.bucket_s3 import S3Bucket

        return S3Bucket.open(rest.removeprefix("//"))
    raise BucketError(f"{url!r} is not a bucket", hint="write file:/some/folder or s3://bucket/prefix")


@dataclass(frozen=True)
class Probe:
    """What a bucket can do; one that cannot be written raises. Not conditional: two clients may both own a run."""

    writable: bool
    conditional: bool


def probe(bucket: Bucket) -> Probe:
    """Tries a write, conditional writes and a delete, on an object of its own. Raises BucketError if they fail."""
    key = f"probe-{uuid.uuid4().hex}"
    etag = bucket.put(key, b"kdcloud was here: 1\n")
    try:
        conditional = _keeps_conditions(bucket, key, etag)
    finally:
        bucket.delete(key)
    return Probe(writable=True, conditional=conditional)


def _keeps_conditions(bucket: Bucket, key: str, etag: str) -> bool:
    try:
        bucket.put(key, b"kdcloud was here: 2\n", if_none_match=True)
        return False  # a store that ignores the condition
    except PreconditionFailed:
        pass
    except Unsupported:
        return False
    try:
        newer = bucket.put(key, b"kdcloud was here: 3\n", if_match=etag)
        bucket.put(key, b"kdcloud was here: 4\n", if_match=etag)
        return False
    except PreconditionFailed:
        return bucket.get(key)[1].etag == newer
    except Unsupported:
        return False


def put_if(bucket: Bucket, key: str, data: bytes, *, if_match: str | None = None) -> str:
    """Writes only where nothing is, or over that ETag, as well as the store can. Raises PreconditionFailed.

    A store that refuses conditional writes is looked at first: then two who write in the same moment may both win.
    """
    try:
        return bucket.put(key, data, if_none_match=if_match is None, if_match=if_match)
    except Unsupported:
        there = bucket.head(key)
        if (None if there is None else there.etag) != if_match:
            raise PreconditionFailed(f"{key} was written by somebody else", hint=_ANOTHER) from None
        return bucket.put(key, data)


_ANOTHER = "another client works on the same run"


def check_key(key: str) -> str:
    """The key itself. Raises BucketError unless it is relative, '/'-separated, and safe as a path below any folder."""
    parts = key.split("/")
    try:
        lengths = [len(part.encode()) for part in parts]
    except UnicodeEncodeError:
        raise _bad_key(key, "is not valid Unicode") from None
    if sum(lengths) + len(parts) - 1 > MAX_KEY_BYTES or max(lengths) > MAX_NAME_BYTES:
        raise _bad_key(key, "is too long")
    if min(lengths) == 0:
        raise _bad_key(key, "is empty or has an empty part")
    if any(part in (".", "..") for part in parts):
        raise _bad_key(key, "leaves its folder")
    if any(ord(char) < 32 or char in "\\\x7f" for char in key):
        raise _bad_key(key, "has a backslash or a control character")
    if any(part.startswith(OWN_PREFIX) for part in parts):
        raise _bad_key(key, f"has a part that starts with {OWN_PREFIX}, which kdcloud keeps to itself")
    return key


def _bad_key(key: str, why: str) -> BucketError:
    return BucketError(f"{key[:80]!r} cannot be a key in a bucket: it {why}", hint="rename the file")


_REMAKE = "delete that folder in the bucket and resume: it is made again"


@dataclass(frozen=True)
class FileEntry:
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """COMMIT: the files of a committed folder, and the fencing number of whoever committed it."""

    fence: int
    files: Mapping[str, FileEntry]
    schema: int = COMMIT_SCHEMA

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str | bytes) -> Manifest:
        """Raises Corrupt for anything but a manifest: it may have been written by a machine that was not ours."""
        try:
            raw = json.loads(text)
            if raw["schema"] != COMMIT_SCHEMA:
                raise Corrupt(
                    f"the COMMIT manifest has schema {raw['schema']}, this kdcloud reads {COMMIT_SCHEMA}",
                    hint="use the kdcloud version that wrote it",
                )
            files = {rel: FileEntry(size=entry["size"], sha256=entry["sha256"]) for rel, entry in raw["files"].items()}
            fence = raw["fence"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Corrupt("the COMMIT manifest cannot be read", hint=_REMAKE) from error
        for rel, entry in files.items():
            _check_entry(rel, entry)
        if type(fence) is not int:
            raise Corrupt("the COMMIT manifest has no fencing number", hint=_REMAKE)
        return Manifest(fence=fence, files=files)


def _check_entry(rel: str, entry: FileEntry) -> None:
    try:
        check_key(rel)
    except BucketError as error:
        raise Corrupt(f"the COMMIT manifest names a file that cannot be: {error.message}", hint=_REMAKE) from error
    whole = type(entry.size) is int and entry.size >= 0 and isinstance(entry.sha256, str)
    if not whole or not re.fullmatch("[0-9a-f]{64}", entry.sha256):
        raise Corrupt(f"the COMMIT manifest has no usable size and hash for {rel!r}", hint=_REMAKE)


def read_commit(bucket: Bucket, prefix: str) -> Manifest | None:
    """The manifest of the folder at `prefix`, or None while it is not committed. Raises Corrupt."""
    try:
        data, _ = bucket.at(prefix).get(COMMIT_FILE)
    except NotFound:
        return None
    return Manifest.from_json(data)


def commit_folder(
    bucket: Bucket,
    folder: Path,
    prefix: str,
    *,
    fence: int,
    moved: Moved | None = None,
    guard: Callable[[], None] | None = None,
) -> Manifest:
    """Uploads the files of `folder` to `prefix` and makes them count by writing COMMIT last; returns what was written.

    Files that are there already are not sent again. `guard` is called before anything that others can see is changed
    and again before COMMIT; raise in it to stop. A folder that counted before stops counting while other bytes are put
    in its place. Raises PreconditionFailed when somebody with a higher fencing number committed here.
    """
    target = bucket.at(prefix)
    before = read_commit(bucket, prefix)
    if before is not None and before.fence > fence:
        raise PreconditionFailed(
            f"{target.url} was committed by a newer client", hint="this run goes on elsewhere: look at kdcloud status"
        )
    paths = _files_of(folder)
    stamps = {rel: _stamp(path) for rel, path in paths.items()}
    files = {rel: FileEntry(size=path.stat().st_size, sha256=sha256_of(path)) for rel, path in paths.items()}
    if before is not None and any(rel in files and files[rel] != entry for rel, entry in before.files.items()):
        if guard is not None:
            guard()
        target.delete(COMMIT_FILE)
    for rel, path in paths.items():
        target.put_file(path, rel, moved)
        if _stamp(path) != stamps[rel]:
            raise BucketError(f"{path} changed while it was uploaded", hint="write it completely, then commit")
    manifest = Manifest(fence=fence, files=files)
    if guard is not None:
        guard()
    target.put(COMMIT_FILE, manifest.to_json().encode())
    return manifest


def _files_of(folder: Path) -> dict[str, Path]:
    """Every file below `folder` by its relative, '/'-separated name, sorted."""
    found: dict[str, Path] = {}
    for parent, folders, names in os.walk(folder, onerror=_raise):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        if links:
            raise BucketError(f"{Path(parent, links[0])} is a link to a folder", hint="put the files there themselves")
        for name in names:
            if not name.startswith(OWN_PREFIX):
                path = Path(parent, name)
                found[check_key(path.relative_to(folder).as_posix())] = path
    if COMMIT_FILE in found:
        raise BucketError(f"{folder} has a file of its own called {COMMIT_FILE}", hint="rename it")
    return dict(sorted(found.items()))


def _raise(error: OSError) -> None:
    raise error


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def fetch_folder(
    bucket: Bucket, prefix: str, dest: Path, *, moved: Moved | None = None,
    only: Callable[[str], bool] = lambda rel: True,
) -> Path:  # fmt: skip
    """`dest`, holding every file of the committed folder, each checked against its size and hash.

    What is there already is not fetched again; files the manifest does not name are left alone. `only`: those of the
    manifest that are wanted. Raises NotFound when nothing is committed at `prefix`, Corrupt when bytes do not match.
    """
    source = bucket.at(prefix)
    manifest = read_commit(bucket, prefix)
    if manifest is None:
        raise NotFound(f"nothing is committed at {source.url}", hint="resume the run: the stage before did not finish")
    try:
        dest.mkdir(parents=True, exist_ok=True)
        for rel, entry in manifest.files.items():
            if only(rel):
                _fetch(source, rel, entry, dest, moved)
    except OSError as error:
        raise os_trouble(error, dest) from error
    return dest


def _fetch(source: Bucket, rel: str, entry: FileEntry, dest: Path, moved: Moved | None) -> None:
    path = dest / rel
    if not path.resolve().is_relative_to(dest.resolve()):
        raise Corrupt(f"{rel!r} would be written outside of {dest}", hint="remove the link that leads out of it")
    if _is(path, entry):
        if moved is not None:
            moved(entry.size)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):  # a download that was resumed onto wrong bytes gets one fresh start
        try:
            source.get_file(rel, path, moved)
        except NotFound as error:
            raise Corrupt(f"{source.url}/{rel} is missing", hint=_REMAKE) from error
        if _is(path, entry):
            return
        path.unlink()
    raise Corrupt(f"{source.url}/{rel} is not what was committed", hint=_REMAKE)


def _is(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.size and sha256_of(path) == entry.sha256


def delete_prefix(bucket: Bucket, prefix: str) -> None:
    """Removes the folder at `prefix`, its COMMIT first, so that half a folder never counts. Absent is success."""
    folder = check_key(prefix.strip("/"))
    bucket.delete(f"{folder}/{COMMIT_FILE}")
    for stat in list(bucket.list(f"{folder}/")):
        bucket.delete(stat.key)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(files: Mapping[str, FileEntry]) -> str:
    """SHA-256 of a folder: of its files' names and hashes."""
    lines = (f"{entry.sha256} {rel}\n" for rel, entry in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def os_trouble(error: OSError, path: Path) -> BucketError:
    """What a failed file operation below `path` means for a person."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BucketError(f"the disk that holds {path} is full", hint="free some space there and resume")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return BucketError(f"{path} cannot be written or read: {error.strerror}", hint="choose a folder of your own")
    if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return BucketError(f"{path}: a file and a folder want the same name", hint="choose another folder")
    return BucketError(f"{path} cannot be used: {error.strerror or error}", hint="check the disk and the folder's name")
