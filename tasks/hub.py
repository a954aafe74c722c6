"""Where does a model come from, and are its bytes those that the hub promised? Hugging Face, a mirror, or ModelScope.

`HF_ENDPOINT` names a mirror of Hugging Face and `HF_TOKEN` who may read; `KDCLOUD_HUB=modelscope` takes models of the
same names from ModelScope (public ones), at `MODELSCOPE_DOMAIN` where that is set.
"""

from __future__ import annotations

import hashlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, urlencode

from tasks.bucket import BucketError, check_key
from tasks.contract import ModelSource, TaskError

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")  # which say what goes along with a model made from this one
SMALL = ("*.json", "*.txt", "*.model", "*.jinja", *LICENCES)  # configuration, tokenizer, template
WEIGHTS = "*.safetensors"
DOUBLE = "consolidated*"  # the same weights once more, in their maker's own layout
CHUNK_BYTES = 1 << 20
TIMEOUT_S = 60
MODELSCOPE_MAIN = "master"


@dataclass(frozen=True)
class HubFile:
    """A file as the hub describes it: its SHA-256, or for small ones the hash that git gives to it."""

    path: str
    sha256: str | None
    git_sha1: str | None = None


def local_path(source: ModelSource, *, weights: bool = True) -> str:
    """A folder with the model's files, each checked against the hub's hash; a folder of one's own as it is.

    Offline (HF_HUB_OFFLINE) the name itself: the libraries then look into their cache. Raises TaskError.
    """
    assert source.path is not None
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    hub = os.environ.get("KDCLOUD_HUB", "huggingface")
    if Path(source.path).exists() or source.path.startswith(("/", ".", "~")) or (offline and hub == "huggingface"):
        return source.path
    if hub not in ("huggingface", "modelscope"):
        raise TaskError(f"KDCLOUD_HUB={hub} is unknown", hint="set it to modelscope, or leave it out")
    fetch = _from_modelscope if hub == "modelscope" else _from_hugging_face
    return fetch(source.path, source.revision, weights, source.trust_remote_code)


def wanted(path: str, *, weights: bool, code: bool) -> bool:
    """Whether a file of a model is needed: no folders, no pickles, code only where the recipe lets it run."""
    patterns = (*SMALL, *((WEIGHTS,) if weights else ()), *(("*.py",) if code else ()))
    return "/" not in path and not fnmatchcase(path, DOUBLE) and any(fnmatchcase(path, one) for one in patterns)


def check_file(path: Path, file: HubFile) -> None:
    """Raises TaskError when the bytes are not those the hub describes, or it describes none."""
    if file.sha256 is not None:
        with path.open("rb") as opened:
            found, promised = hashlib.file_digest(opened, "sha256").hexdigest(), file.sha256
    elif file.git_sha1 is not None:
        data = path.read_bytes()
        found, promised = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), file.git_sha1
    else:
        raise TaskError(f"the hub gives no hash of {file.path}", hint="use another hub, or a folder of your own")
    if found != promised:
        raise TaskError(
            f"{file.path} is not what the hub promises: it arrived damaged or was changed on its way",
            hint=f"remove {path} and try again, on another network or from another hub",
        )


# -- Hugging Face, or a mirror of it


@cache
def _from_hugging_face(name: str, revision: str | None, weights: bool, code: bool) -> str:
    from huggingface_hub import HfApi, hf_hub_download

    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
        listed = [_described(item) for item in info.siblings or ()]
        files = [file for file in listed if wanted(file.path, weights=weights, code=code)]
        with ThreadPoolExecutor(4) as pool:
            paths = list(pool.map(lambda file: hf_hub_download(name, file.path, revision=info.sha), files))
    except (unreachable(), OSError, ValueError) as error:
        raise _trouble(name, error) from error
    if not files:
        raise _empty(name)
    for path, file in zip(paths, files, strict=True):
        check_file(Path(path), file)
    folder = Path(paths[0]).parent
    _remember(folder, revision or "main")
    return str(folder)


def _remember(folder: Path, revision: str) -> None:
    """Notes in the hub's cache which commit a name stood for, as its own tools do: offline they look there."""
    ref = folder.parent.parent / "refs" / check_name(revision)
    with suppress(OSError):  # a cache that others keep may be read only
        if folder.name == revision or (ref.is_file() and ref.read_text() == folder.name):  # a commit itself; known
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        part = ref.with_name(f".{ref.name}.{os.getpid()}")
        part.write_text(folder.name)
        part.replace(ref)


def fetched(source: ModelSource) -> Path | None:
    """Where the hub in use keeps a model on this machine; None where it was not fetched whole. Asks nobody."""
    assert source.path is not None
    if os.environ.get("KDCLOUD_HUB") == "modelscope":
        try:
            folder = _modelscope_folder(source.path, source.revision)
        except TaskError:
            return None
    else:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            folder = Path(snapshot_download(source.path, revision=source.revision, local_files_only=True))
        except (HfHubHTTPError, HFValidationError, OSError, ValueError):
            return None
    return folder if (folder / "config.json").is_file() and _has_weights(folder) else None


def _has_weights(folder: Path) -> bool:
    """Whether all files of the weights are there: where they are several, an index names them."""
    index = folder / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return all((folder / name).is_file() for name in names) and any(folder.glob(WEIGHTS))


def unreachable() -> type[Exception]:
    """What huggingface_hub raises when the hub refuses or does not answer: it lets its HTTP client's errors through,
    which was requests, then httpx, then httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    return cast(type[Exception], HfHubHTTPError.__bases__[0])


def _described(item: Any) -> HubFile:
    sha256 = item.lfs.sha256 if item.lfs is not None else None
    return HubFile(item.rfilename, sha256, item.blob_id)


def _trouble(name: str, error: Exception) -> TaskError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return TaskError(
        f"cannot fetch {name} from the hub: {first}",
        hint="check the name; a gated model needs HF_TOKEN; where the hub cannot be reached set HF_ENDPOINT to a "
        "mirror, or KDCLOUD_HUB=modelscope",
    )


def _empty(name: str) -> TaskError:
    return TaskError(f"{name} has no safetensors and no configuration", hint="choose a model with safetensors")


# -- ModelScope


@cache
def _from_modelscope(name: str, revision: str | None, weights: bool, code: bool) -> str:
    domain = os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    base = f"{domain if '://' in domain else f'https://{domain}'}/api/v1/models/{quote(name)}/repo"
    version = {"Revision": revision or MODELSCOPE_MAIN}
    folder = _modelscope_folder(name, revision)
    try:
        with _opened(f"{base}/files?{urlencode({**version, 'Recursive': 'true'})}") as answer:
            files = [file for file in _listed(json.load(answer)) if wanted(file.path, weights=weights, code=code)]
        if not files:
            raise _empty(name)
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            _fetch(f"{base}?{urlencode({**version, 'FilePath': file.path})}", folder / file.path, file)
    except (OSError, ValueError, KeyError, TypeError) as error:  # URLError is an OSError
        raise TaskError(
            f"cannot fetch {name} from ModelScope: {error}", hint="check the name there, and MODELSCOPE_DOMAIN"
        ) from error
    return str(folder)


def _modelscope_folder(name: str, revision: str | None) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "kdcloud", "modelscope")
    return cache / check_name(name) / check_name(revision or MODELSCOPE_MAIN)


def check_name(text: str) -> str:
    """The text as a relative path that leads nowhere else. Raises TaskError."""
    try:
        return check_key(text)
    except BucketError as error:
        raise TaskError(f"{text!r} is not a name on the hub", hint="write it as owner/name") from error


def _listed(answer: Mapping[str, Any]) -> list[HubFile]:
    rows = answer["Data"]["Files"]
    return [HubFile(check_name(str(row["Path"])), row.get("Sha256") or None) for row in rows if row["Type"] != "tree"]


def _fetch(url: str, path: Path, file: HubFile) -> None:
    """The file, checked; one that is there already and right is not fetched again."""
    if path.exists():
        try:
            check_file(path, file)
            return
        except TaskError:
            path.unlink()
    part = path.with_name(f".{path.name}.part")
    with _opened(url) as answer, part.open("wb") as out:
        while chunk := answer.read(CHUNK_BYTES):
            out.write(chunk)
    check_file(part, file)
    part.replace(path)


def _opened(url: str) -> Any:
    if not url.startswith(("https://", "http://127.0.0.1", "http://localhost")):
        raise TaskError("MODELSCOPE_DOMAIN must be a host, or a https:// address", hint="leave it out")
    return urllib.request.urlopen(url, timeout=TIMEOUT_S)
