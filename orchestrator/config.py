"""Where does kdcloud keep its things, and what has the user set for every run? KDCLOUD_HOME and its config.yaml."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.money import CURRENCIES, Amount, Rate, parse_amount
from orchestrator.names import new_id

DEFAULT_RATE = Rate(Decimal("7.1"), date(2026, 1, 15))
KEYS = ("currency", "usd_to_cny", "rate_as_of", "owner", "monthly_cap", "bucket", "notify")

_NEW_FILE = """\
# What kdcloud uses for every run. Remove the # of a line to set it.
# currency: CNY            # shown first: CNY or USD
# usd_to_cny: 7.1          # what one USD costs in CNY; frozen into a run when its plan is approved
# rate_as_of: 2026-01-15   # the day that rate was read
# monthly_cap: 300 CNY     # all runs of a calendar month (UTC) together: `kdcloud budget --month 300CNY`
# bucket: s3://name/prefix # where runs are kept when their recipe names no bucket, and where reap looks for them
# notify: [mailtos://...]  # who is told how a run goes (docs/notify.md); addresses hold passwords: show them to nobody
owner: {owner}              # in the names of your machines; keep it
"""


@dataclass(frozen=True)
class Home:
    """Folder with everything kdcloud remembers on this computer."""

    root: Path

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.sqlite"

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def offers_cache(self) -> Path:
        return self.root / "offers"

    @property
    def bucket(self) -> Path:
        return self.root / "bucket"

    @staticmethod
    def from_env(env: Mapping[str, str] | None = None) -> Home:
        """KDCLOUD_HOME, else ~/.kdcloud. Makes nothing."""
        values = os.environ if env is None else env
        named = values.get("KDCLOUD_HOME")
        return Home(Path(named).expanduser().absolute() if named else Path.home() / ".kdcloud")

    def make(self) -> None:
        """Creates the folder, for its owner only (mode 0700). Raises UsageError."""
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UsageError(
                f"cannot make kdcloud's folder {self.root}: {error.strerror}",
                hint="set KDCLOUD_HOME to a folder that can be written",
            ) from error


@dataclass(frozen=True)
class Config:
    """The user's settings for every run."""

    owner: str
    currency: str = "CNY"
    rate: Rate = DEFAULT_RATE
    monthly_cap: Amount | None = None
    bucket: str = ""  # url of the default bucket
    notify: tuple[str, ...] = field(default=(), repr=False)  # Apprise addresses; they hold passwords


def load_config(home: Home) -> Config:
    """The settings in config.yaml; makes the file, and an owner id, where there is none. Raises UsageError."""
    home.make()
    try:
        text = home.config.read_text(encoding="utf-8")
    except FileNotFoundError:
        _write(home.config, _NEW_FILE.format(owner=new_id()), replace=False)
        return load_config(home)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {home.config}: {error}", hint="mend or remove the file") from error
    config, has_owner = _parse(text, home.config)
    if not has_owner:
        _write(
            home.config,
            text.rstrip("\n") + f"\nowner: {config.owner}\n" if text.strip() else f"owner: {config.owner}\n",
        )
    return config if config.bucket else replace(config, bucket=f"file:{home.bucket}")


def set_monthly_cap(home: Home, amount: Amount | None) -> None:
    """Writes the cap of a calendar month into config.yaml, or removes it; every other line stays as it is.

    Raises UsageError.
    """
    load_config(home)  # makes the file, and refuses to write into one that is broken
    lines = home.config.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not re.match(r"monthly_cap\s*:", line)]
    if amount is not None:
        kept.append(f"monthly_cap: {amount}")
    text = "\n".join(kept) + "\n"
    try:
        config, _ = _parse(text, home.config)
    except UsageError as error:
        raise UsageError(
            f"cannot write the monthly cap into {home.config}", hint="write `monthly_cap: 200 CNY` there yourself"
        ) from error
    if config.monthly_cap != amount:
        raise UsageError(f"{home.config} holds a monthly cap in another form", hint="remove it there yourself")
    _write(home.config, text)


def _parse(text: str, path: Path) -> tuple[Config, bool]:
    import yaml

    try:
        node = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UsageError(
            f"{path}{where}: not YAML: {error.problem}", hint="mend the line, or remove the file"
        ) from error
    if node is None:
        return Config(owner=new_id()), False
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{path}:1: must hold keys and values", hint=f"known keys: {', '.join(KEYS)}")
    problems: list[str] = []
    values: dict[str, Any] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        try:
            if key.value in values:
                raise ValueError("stands here twice")
            if key.value == "notify":
                parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
                values["notify"] = tuple(_address(part.value) for part in parts)
                continue
            if not isinstance(value, yaml.ScalarNode):
                raise ValueError("must be a single value")
            values[key.value] = _value(key.value, value.value)
        except ValueError as error:
            problems.append(f"{path}:{line}: {key.value}: {error}")
    if problems:
        raise UsageError("\n".join(problems), hint=f"mend {path}; known keys: {', '.join(KEYS)}")
    rate = Rate(values.get("usd_to_cny", DEFAULT_RATE.usd_to_cny), values.get("rate_as_of", DEFAULT_RATE.as_of))
    owner = values.get("owner")
    config = Config(
        owner or new_id(), values.get("currency", "CNY"), rate, values.get("monthly_cap"), values.get("bucket", ""),
        values.get("notify", ()),
    )  # fmt: skip
    return config, owner is not None


def _value(key: str, text: str) -> Any:
    match key:
        case "currency":
            if text.upper() not in CURRENCIES:
                raise ValueError(f"unknown currency {text!r}: CNY or USD")
            return text.upper()
        case "usd_to_cny":
            return _positive(text)
        case "rate_as_of":
            try:
                return date.fromisoformat(text)
            except ValueError:
                raise ValueError(f"{text!r} is not a day; write it like 2026-01-15") from None
        case "owner":
            if not re.fullmatch(r"[a-z0-9]{6}", text):
                raise ValueError("must be six characters of a-z and 0-9; remove the line to get a new one")
            return text
        case "monthly_cap":
            amount = parse_amount(text)
            if amount.value <= 0 or amount.hourly:
                raise ValueError("must be an amount above 0, like 300 CNY")
            return amount
        case "bucket":
            if not re.match(r"s3://[^/]|file:/", text):
                raise ValueError(f"{text!r} is not a bucket; write s3://name/prefix or file:/some/folder")
            return text.rstrip("/")
        case _:
            close = difflib.get_close_matches(key, KEYS, n=1)
            raise ValueError(f"unknown key{f'; did you mean {close[0]}?' if close else ''}")


def _address(text: object) -> str:
    """An address of Apprise's, never repeated in an error: it holds a password."""
    if not isinstance(text, str) or not re.match(r"[A-Za-z][A-Za-z0-9+-]*://\S+$", text):
        raise ValueError("must be addresses like json://host/path or mailtos://user:password@host (docs/notify.md)")
    return text


def _positive(text: str) -> Decimal:
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"{text!r} is not a number") from None
    if not value.is_finite() or value <= 0:
        raise ValueError(f"{text!r} must be above 0")
    return value


def _write(path: Path, text: str, *, replace: bool = True) -> None:
    """Whole file or nothing; without `replace`, a file that another process made meanwhile stays."""
    making = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        making.write_text(text, encoding="utf-8")
        making.chmod(0o600)
        if replace:
            making.replace(path)
            return
        with contextlib.suppress(FileExistsError):
            os.link(making, path)
        making.unlink()
    except OSError as error:
        making.unlink(missing_ok=True)
        raise UsageError(
            f"cannot write {path}: {error.strerror}", hint="check disk space and rights, or set KDCLOUD_HOME"
        ) from error
