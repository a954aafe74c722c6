"""One interface to where artefacts live: a folder (`file:`) or an S3-compatible store (`s3://`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol


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


@dataclass(frozen=True)
class Stat:
    key: str
    size: int
    etag: str
    modified: datetime


Moved = Callable[[int], None]  # called with the bytes moved since the last call


class Bucket(Protocol):
    """Keys are relative, '/'-separated, without '..'. Writes are atomic: a reader sees the old object or the new one."""

    url: str

    def put(self, key: str, data: bytes, *, if_none_match: bool = False, if_match: str | None = None) -> str:
        """Writes and returns the ETag. if_none_match: only if absent; if_match: only over that ETag; else PreconditionFailed."""
        ...

    def get(self, key: str) -> tuple[bytes, Stat]:
        """Raises NotFound."""
        ...

    def head(self, key: str) -> Stat | None: ...

    def list(self, prefix: str = "") -> Iterator[Stat]: ...

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
