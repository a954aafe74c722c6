"""How does a folder act as a bucket? Atomic writes, conditions that hold between processes, uploads that go on."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from tasks.bucket import (
    OWN_PREFIX,
    Bucket,
    BucketError,
    Moved,
    NotFound,
    PreconditionFailed,
    Stat,
    check_key,
    os_trouble,
)

LOCK = f"{OWN_PREFIX}lock"
TEMP = f"{OWN_PREFIX}temp"  # one a folder is enough: it is written under the lock
HASHED_BYTES = 1 << 20  # up to this size an ETag is the hash of the content; above it, size and time of writing
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileBucket:
    """Objects are files below `root`. Two processes that open it, at this or another folder above, see one store.

    A key cannot be a file and a folder at once, which S3 would allow.
    """

    root: Path

    @staticmethod
    def open(path: str) -> FileBucket:
        if path.startswith("//"):
            host, slash, rest = path[2:].partition("/")
            if host not in ("", "localhost"):
                raise BucketError(f"file:{path} names another machine", hint="write file:/some/folder")
            path = slash + rest
        if not path or "\0" in path:
            raise BucketError("file: names no folder", hint="write file:/some/folder")
        return FileBucket(Path(os.path.abspath(Path(path).expanduser())))

    @property
    def url(self) -> str:
        return f"file:{self.root}"

    def at(self, prefix: str) -> Bucket:
        prefix = prefix.strip("/")
        return FileBucket(self.root / check_key(prefix)) if prefix else self

    def put(self, key: str, data: bytes, *, if_none_match: bool = False, if_match: str | None = None) -> str:
        path = self._path(key)
        with _explained(path), _locked(path.parent):
            if if_none_match or if_match is not None:
                _check_condition(path, key, if_match)
            temp = path.parent / TEMP
            with temp.open("wb") as file:
                file.write(data)
                _flush(file)
            _replace(temp, path)
            return _etag(path)

    def get(self, key: str) -> tuple[bytes, Stat]:
        path = self._path(key)
        try:
            with _explained(path), path.open("rb") as file:
                status = os.fstat(file.fileno())
                data = file.read()
        except FileNotFoundError:
            raise _absent(self, key) from None
        etag = hashlib.sha256(data).hexdigest() if len(data) <= HASHED_BYTES else _etag_of_large(status)
        return data, Stat(key, len(data), etag, _modified(status))

    def head(self, key: str) -> Stat | None:
        path = self._path(key)
        try:
            with _explained(path):
                status = path.stat()
                return Stat(key, status.st_size, _etag(path), _modified(status)) if path.is_file() else None
        except FileNotFoundError:
            return None

    def list(self, prefix: str = "") -> Iterator[Stat]:
        start = self.root.joinpath(*prefix.split("/")[:-1])
        if not start.resolve().is_relative_to(self.root.resolve()):
            raise BucketError(f"{prefix!r} leaves the bucket", hint="use a prefix below it")
        paths = (Path(parent, name) for parent, _, names in os.walk(start, onerror=_unless_absent) for name in names)
        keys = (path.relative_to(self.root).as_posix() for path in paths)
        for key in sorted((key for key in keys if key.startswith(prefix) and _is_key(key)), key=str.encode):
            stat = self.head(key)
            if stat is not None:  # else deleted since
                yield stat

    def put_file(self, path: Path, key: str, moved: Moved | None = None) -> str:
        target = self._path(key)
        with _explained(target):
            if _same_bytes(path, target):
                if moved is not None:
                    moved(path.stat().st_size)
                return _etag(target)
            part_name = OWN_PREFIX + "part-" + hashlib.sha256(target.name.encode()).hexdigest()[:16]
            with _open_part(target.parent, part_name) as (part, part_path):
                with path.open("rb") as source:
                    _copy_on(source, part, moved)
                _flush(part)
                with _locked(target.parent):
                    _replace(part_path, target)
                    return _etag(target)

    def get_file(self, key: str, path: Path, moved: Moved | None = None) -> None:
        source_path = self._path(key)
        try:
            source = source_path.open("rb")
        except (FileNotFoundError, IsADirectoryError):
            raise _absent(self, key) from None
        except OSError as error:
            raise os_trouble(error, source_path) from error
        part_path = path.parent / f"{OWN_PREFIX}part-{os.getpid()}-{threading.get_ident()}"
        try:
            with source, part_path.open("wb") as part:
                while chunk := source.read(CHUNK_BYTES):
                    part.write(chunk)
                    if moved is not None:
                        moved(len(chunk))
            os.replace(part_path, path)
        except OSError as error:
            raise os_trouble(error, path) from error
        finally:
            part_path.unlink(missing_ok=True)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _explained(path):
            if not path.parent.is_dir():
                return
            with _locked(path.parent):
                path.unlink(missing_ok=True)
            folder = path.parent
            while folder != self.root and _pruned(folder):
                folder = folder.parent

    def now(self) -> datetime:
        """The clock that stamps the files: on a network file system that is the server's."""
        clock = self.root / f"{OWN_PREFIX}clock"
        if not self.root.is_dir():
            return datetime.now(UTC)
        with _explained(clock):
            clock.touch()
            return _modified(clock.stat())

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)


def _is_key(key: str) -> bool:
    """False for our own files, and for what people put into the folder and no key can name."""
    try:
        return bool(check_key(key))
    except BucketError:
        return False


def _unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise os_trouble(error, Path(error.filename))


def _absent(bucket: FileBucket, key: str) -> NotFound:
    return NotFound(f"{bucket.url}/{key} does not exist", hint="check the run's name with kdcloud status")


def _check_condition(path: Path, key: str, if_match: str | None) -> None:
    """Raises PreconditionFailed unless `path` is absent (if_match None) or has that ETag. Call it under the lock."""
    found = _etag(path) if path.is_file() else None
    if found != if_match:
        what = "exists already" if if_match is None else "was changed by somebody else"
        raise PreconditionFailed(f"{key} {what}", hint="another client works on the same run")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Lets FileNotFoundError through (its meaning differs) and says in words what else went wrong."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise os_trouble(error, path) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, against other processes and threads; makes the folder.

    A `delete` that empties the folder removes it with its lock: only the lock that is still found there counts.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = (folder / LOCK).open("ab")
        except FileNotFoundError:
            continue
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _still_there(lock, folder / LOCK):
                yield
                return


def _still_there(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _open_part(folder: Path, name: str) -> Iterator[tuple[BinaryIO, Path]]:
    """The half-written file of an upload that may have broken, or one of our own while somebody else is at it."""
    path = folder / name
    with _locked(folder):
        part = path.open("a+b")
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            part.close()
            path = folder / f"{name}-{os.getpid()}"
            part = path.open("a+b")
    with part:
        yield part, path


def _copy_on(source: BinaryIO, part: BinaryIO, moved: Moved | None) -> None:
    """Makes `part` equal to `source`, keeping what it has of it already."""
    part.seek(0)
    while True:
        chunk, kept = source.read(CHUNK_BYTES), part.read(CHUNK_BYTES)
        if chunk != kept:
            start = source.tell() - len(chunk)
            part.seek(start)
            part.truncate()
            source.seek(start)
            break
        if not chunk:
            return
        if moved is not None:
            moved(len(chunk))
    while chunk := source.read(CHUNK_BYTES):
        part.write(chunk)
        if moved is not None:
            moved(len(chunk))


def _same_bytes(one: Path, other: Path) -> bool:
    if not other.is_file() or one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as left, other.open("rb") as right:
        while chunk := left.read(CHUNK_BYTES):
            if chunk != right.read(CHUNK_BYTES):
                return False
    return True


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _replace(temp: Path, path: Path) -> None:
    os.replace(temp, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # else a power cut may undo the rename
    finally:
        os.close(folder)


def _pruned(folder: Path) -> bool:
    """Whether the folder is gone: one in which nothing but our own left-overs is left is removed."""
    if not set(os.listdir(folder)) <= {LOCK, TEMP}:
        return False
    with _locked(folder):
        if not set(os.listdir(folder)) <= {LOCK, TEMP}:
            return False
        (folder / TEMP).unlink(missing_ok=True)
        (folder / LOCK).unlink()
        try:
            folder.rmdir()
        except OSError:
            return False  # somebody put something there meanwhile
    return True


def _etag(path: Path) -> str:
    status = path.stat()
    if status.st_size > HASHED_BYTES:
        return _etag_of_large(status)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _etag_of_large(status: os.stat_result) -> str:
    return f"{status.st_size:x}-{status.st_mtime_ns:x}"


def _modified(status: os.stat_result) -> datetime:
    return datetime.fromtimestamp(status.st_mtime, UTC)
