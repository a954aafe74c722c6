"""Publishes a run's exported student on the Hugging Face hub, after a yes to what exactly goes where.

The token comes from HF_TOKEN or from `hf auth login`, and goes nowhere but to the hub (HF_ENDPOINT, where that is set).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import click

from orchestrator.artifacts import bytes_bar, human_bytes
from orchestrator.config import Home
from orchestrator.errors import KdcloudError, UsageError
from orchestrator.ledger import Run
from orchestrator.plain import json_text
from orchestrator.scene import clean
from orchestrator.student import EXPORTED, Role, bring, find
from tasks.bucket import FileEntry, Manifest, open_bucket

SCHEMA = 1
REPO_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
CARD = "README.md"
SHOWN_LICENCE = 60  # characters


@dataclass(frozen=True)
class Item:
    """One file: where it lies here, and its path in the repository."""

    path: str
    local: Path
    size: int


@dataclass(frozen=True)
class Target:
    """The repository as the hub knows it. `private` None: it is not there yet."""

    repo: str
    endpoint: str
    user: str
    private: bool | None = None
    files: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Push:
    """What is about to be done."""

    run: str
    target: Target
    items: tuple[Item, ...]
    public: bool
    licence: str | None  # of the model card; None = it states none


def push_command(run: Run, home: Home, repo: str, stage: str | None, public: bool, yes: bool, as_json: bool) -> None:
    """Looks, says what would be done, asks, does it. Raises UsageError."""
    if not REPO_NAME.fullmatch(repo):
        raise UsageError(f"{repo!r} is no name on the hub", hint="write it like you/name-of-the-model")
    if not yes and not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask on", hint="add --yes to upload without being asked")
    items, card = _exported(run, home, stage)
    api = _api()
    target = look(api, repo)
    check(target, public)
    push = Push(run.id, target, items, public, licence_of(card))
    for line in lines_of(push):
        click.echo(line, err=True)
    if not yes and not click.confirm("Upload them?", err=True):
        click.echo("nothing was uploaded", err=True)
        return
    url = upload(api, push)
    if as_json:
        click.echo(json_text(to_json(push, url), indent=1))
    else:
        click.echo(url)


def files_to_push(manifest: Manifest) -> dict[str, FileEntry]:
    """Of an export stage: the Hugging Face folder, and models of llama.cpp and Ollama with what they need."""
    return {rel: entry for rel, entry in manifest.files.items() if path_in_repo(rel) is not None}


def path_in_repo(rel: str) -> str | None:
    """Where a file of the export stage goes; None for what stays here. The Hugging Face folder becomes the root."""
    path = PurePosixPath(rel)
    if path.parts[0] == EXPORTED:
        return str(path.relative_to(EXPORTED))
    return rel if path.suffix == ".gguf" or path.name.startswith("Modelfile") else None


def licence_of(card: str) -> str | None:
    """The `license` (and `license_name`) in the head of a model card, in one printable line; None without one."""
    import yaml

    head = re.match(r"---\r?\n(.*?)\r?\n---\s*(?:\n|$)", card, re.S)
    try:
        told = yaml.safe_load(head.group(1)) if head else None
    except yaml.YAMLError:
        return None
    if not isinstance(told, dict) or not told.get("license"):
        return None
    words = " ".join(str(told[key]) for key in ("license", "license_name") if told.get(key))
    return "".join(char if char.isprintable() else "?" for char in words)[:SHOWN_LICENCE]


def check(target: Target, public: bool) -> None:
    """Raises UsageError where others see the repository than was asked for: an upload never changes who may."""
    if target.private is False and not public:
        raise UsageError(
            f"{target.repo} is there already, for everybody to see", hint="add --public, or choose another name"
        )
    if target.private is True and public:
        raise UsageError(
            f"{target.repo} is there already, and private",
            hint="leave --public out; the hub's own page opens it to others",
        )


def lines_of(push: Push) -> list[str]:
    """What is asked for a yes: repository, who sees it, licence, files with sizes."""
    target = push.target
    seen_by = "public: everybody can see and download it" if push.public else "private: only you and your organisation"
    state = "new" if target.private is None else "there already"
    width = max(len(item.path) for item in push.items)
    return [
        f"run          {push.run}",
        f"repository   {target.repo} at {target.endpoint}, {state}; as {target.user}",
        f"visibility   {seen_by}",
        f"licence      {push.licence or 'the model card states none: add `license:` to its head if others may use it'}",
        *(f"  {clean(item.path):<{width}}  {human_bytes(item.size):>7}{_instead(item, target)}" for item in push.items),
        f"{len(push.items)} files, {human_bytes(sum(item.size for item in push.items))}",
    ]


def _instead(item: Item, target: Target) -> str:
    return "  replaces the one there" if item.path in target.files else ""


def to_json(push: Push, url: str) -> dict[str, Any]:
    """The document of `kdcloud artifacts --push-to-hub --json`."""
    return {
        "schema": SCHEMA,
        "run": push.run,
        "repo": push.target.repo,
        "url": url,
        "private": not push.public,
        "licence": push.licence,
        "files": [{"path": item.path, "bytes": item.size} for item in push.items],
    }


# -- this machine ------------------------------------------------------------------------------------------------------


def _exported(run: Run, home: Home, stage: str | None) -> tuple[tuple[Item, ...], str]:
    """The files of the run's export stage, here and checked, and the model card. Raises UsageError."""
    bucket = open_bucket(run.bucket)
    found = find(run, bucket, stage=stage, roles=(Role.STUDENT,), exported=stage is None)
    (student,) = found.models
    if student.part != EXPORTED or student.stage is None:
        raise UsageError(
            f"run {run.id} has a student, but no export of it: {student.name} holds what training left",
            hint="a stage `{kind: export, student: ..., formats: [hf]}` makes the folder that others can load; "
            f"`kdcloud run --resume {run.id}` if it was not done yet",
        )
    wanted = files_to_push(found.manifests[student.stage])
    with bytes_bar(sum(entry.size for entry in wanted.values()), "fetching") as moved:
        folder = bring({student.stage: wanted}, run.id, bucket, home, moved=moved) / student.stage
    items = [Item(str(path_in_repo(rel)), folder / rel, entry.size) for rel, entry in sorted(wanted.items())]
    card = next((item.local.read_text("utf-8", "replace") for item in items if item.path == CARD), "")
    return tuple(items), card


# -- the hub -----------------------------------------------------------------------------------------------------------


def _api() -> Any:
    """Raises UsageError without the library or a token."""
    try:
        from huggingface_hub import HfApi, get_token
    except ModuleNotFoundError as error:
        raise UsageError(
            "publishing needs huggingface_hub, which is not installed here", hint="pip install huggingface_hub"
        ) from error
    token = get_token()
    if not token:
        raise UsageError(
            "there is no token for the hub",
            hint="make one with write access at huggingface.co/settings/tokens, then `hf auth login` or HF_TOKEN",
        )
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token, library_name="kdcloud")


def look(api: Any, repo: str) -> Target:
    """The repository and whose token this is; nothing is changed. Raises UsageError."""
    from huggingface_hub.errors import RepositoryNotFoundError

    with _explained(api, repo):
        me = api.whoami()
        names = [str(me["name"]), *(str(one["name"]) for one in me.get("orgs") or ())]
        owner = repo.partition("/")[0]
        if owner.lower() not in [name.lower() for name in names]:
            raise UsageError(
                f"this token is of {names[0]}, who cannot publish under {owner}", hint=f"one of: {', '.join(names)}"
            )
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:
            return Target(repo, api.endpoint, names[0])
        files = frozenset(item.rfilename for item in info.siblings or ())
        return Target(repo, api.endpoint, names[0], bool(info.private), files)


def upload(api: Any, push: Push) -> str:
    """Makes the repository where it is not there, and puts everything there in one commit: its address."""
    from huggingface_hub import CommitOperationAdd

    repo = push.target.repo
    with _explained(api, repo):
        if push.target.private is None:
            api.create_repo(repo, private=not push.public, exist_ok=False)
            if bool(api.model_info(repo).private) == push.public:  # a mirror or proxy may not know the word
                raise UsageError(
                    f"the hub made {repo} {'private' if push.public else 'public'}, which was not asked for: nothing "
                    "was uploaded",
                    hint="set who may see it on its page, and upload again",
                )
        operations = [CommitOperationAdd(item.path, str(item.local)) for item in push.items]
        api.create_commit(repo, operations, commit_message=f"Student of run {push.run}, distilled with kdcloud")
    return f"{api.endpoint}/{repo}"


@contextmanager
def _explained(api: Any, repo: str) -> Iterator[None]:
    """What the hub or the way to it says, as a UsageError; the token is in none of it."""
    from huggingface_hub.errors import HfHubHTTPError

    # Of the HTTP client, which was requests, then httpx, then httpx2.
    unreachable = cast(type[Exception], HfHubHTTPError.__bases__[0])
    try:
        yield
    except KdcloudError:
        raise
    except HfHubHTTPError as error:
        raise _refused(error.response.status_code, repo, _first_line(error, api)) from None
    except (OSError, unreachable, ValueError) as error:
        raise UsageError(
            f"cannot reach the hub at {api.endpoint}: {_first_line(error, api)}",
            hint="check the network, HF_ENDPOINT and HF_HUB_OFFLINE, and try again: what is there already stays",
        ) from None


def _refused(status: int, repo: str, said: str) -> UsageError:
    match status:
        case 401:
            return UsageError(
                "the hub does not know this token", hint="make a new one, then `hf auth login` or HF_TOKEN"
            )
        case 403:
            hint = "make one with write access to it at huggingface.co/settings/tokens"
            return UsageError(f"this token may not write {repo}: {said}", hint=hint)
        case 409:
            return UsageError(f"{repo} is taken already", hint="look at its page, or choose another name")
        case _:
            return UsageError(
                f"the hub refused ({status}): {said}", hint="try again later, or look at status.huggingface.co"
            )


def _first_line(error: Exception, api: Any) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = line.replace(str(api.token), "***") if api.token else line
    return "".join(char if char.isprintable() else "?" for char in line)
