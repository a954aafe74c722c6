"""What was offered when the providers were last asked? A file under KDCLOUD_HOME, infra by infra, with its true age."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator import __version__
from orchestrator.errors import UsageError
from orchestrator.provision import Latencies, Need, Offer

SCHEMA = 1
FILE = "prices.json"
FEW_FILE = "prices-few.json"  # what plans look at, of FILE
# A column each, so that a file of 50,000 offers stays small and is read in a moment.
ROW = ("region", "instance", "gpu", "gpus", "vram_gib", "spot", "price_micros_per_hour", "ceiling_micros_per_hour")


@dataclass(frozen=True)
class Asked:
    """One infra's answer: when it was asked, and its offers as they are written."""

    asked_at: datetime
    groups: tuple[Mapping[str, Any], ...]

    def offers(self, infra: str, need: Need) -> list[Offer]:
        """The offers that `need` leaves, built only now."""
        return [offer for group in self.groups for offer in _offers(infra, group, need)]


@dataclass(frozen=True)
class PriceCache:
    """The answers that are on file; `asked_at` of the oldest."""

    infras: Mapping[str, Asked]

    @property
    def asked_at(self) -> datetime | None:
        return min((one.asked_at for one in self.infras.values()), default=None)

    def of(self, infra: str) -> dict[str, Asked]:
        """Answers of an infra as a recipe names it: `slurm` means all of its clusters, `aws` all of its regions."""
        return {name: one for name, one in self.infras.items() if name == infra or name.startswith(f"{infra}/")}


def load(folder: Path) -> PriceCache | None:
    """What is on file; None where nobody has asked yet. Raises UsageError for a broken file."""
    path = folder / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="check its rights, or remove it") from error
    try:
        raw = json.loads(text)
        if raw["schema"] != SCHEMA:
            return None  # of another version: it is asked anew
        infras = _infras(raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is broken: {error}", hint="remove it, then `kdcloud offers --refresh`") from error
    return PriceCache(infras)


def few(folder: Path, worth_a_look: Callable[[Iterable[Offer]], Iterable[Offer]]) -> PriceCache | None:
    """What is on file, without offers that are not worth a look: of 50,000 a few thousand are. They are kept in a file
    of their own for as long as nothing new is written beside it. Raises UsageError for a broken file."""
    try:
        stat = (folder / FILE).stat()
    except OSError:
        return load(folder)
    stamp = [SCHEMA, __version__, stat.st_mtime_ns, stat.st_size]
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # then it is made anew
        raw = json.loads((folder / FEW_FILE).read_text(encoding="utf-8"))
        if raw["stamp"] == stamp:
            return PriceCache(_infras(raw))
    whole = load(folder)
    if whole is None:
        return None
    infras = {
        name: Asked(one.asked_at, tuple(_groups(worth_a_look(one.offers(name, Need())))))
        for name, one in whole.infras.items()
    }
    with suppress(OSError):  # a full disk, or a folder that others own
        _write(folder / FEW_FILE, {"stamp": stamp, **_document(infras)})
    return PriceCache(infras)


def save(folder: Path, answers: Mapping[str, Iterable[Offer]], asked_at: datetime) -> PriceCache:
    """Writes the answers, whole or not at all; infras that were not asked keep what was written of them."""
    kept = load(folder)
    infras = dict(kept.infras) if kept is not None else {}
    for name, offers in answers.items():
        infras[name] = Asked(asked_at.astimezone(UTC), tuple(_groups(offers)))
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write(folder / FILE, _document(infras))
    return PriceCache(infras)


def _infras(raw: Mapping[str, Any]) -> dict[str, Asked]:
    return {
        name: Asked(datetime.fromisoformat(one["asked_at"]), tuple(one["groups"]))
        for name, one in raw["infras"].items()
    }


def _document(infras: Mapping[str, Asked]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "infras": {
            name: {"asked_at": one.asked_at.isoformat(), "groups": list(one.groups)} for name, one in infras.items()
        },
    }


def _write(path: Path, document: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    handle, making = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, separators=(",", ":"))
        os.replace(making, path)
    except OSError:
        os.unlink(making)
        raise


def _groups(offers: Iterable[Offer]) -> list[dict[str, Any]]:
    """Offers with what they share written once."""
    found: dict[str, dict[str, Any]] = {}
    for offer in offers:
        shared = {
            "as_of": offer.as_of.isoformat(),
            "source": offer.source,
            "quantum_s": offer.quantum_s,
            "minimum_s": offer.minimum_s,
            "latencies": asdict(offer.latencies),
        }
        group = found.setdefault(json.dumps(shared, sort_keys=True), {**shared, "rows": []})
        group["rows"].append([getattr(offer, name) for name in ROW])
    return list(found.values())


def _offers(infra: str, group: Mapping[str, Any], need: Need) -> Iterable[Offer]:
    as_of, latencies = datetime.fromisoformat(group["as_of"]), Latencies(**group["latencies"])
    source, quantum_s, minimum_s = str(group["source"]), int(group["quantum_s"]), int(group["minimum_s"])
    wanted = frozenset(need.gpus)
    for region, instance, gpu, gpus, vram_gib, spot, price, ceiling in group["rows"]:
        if (wanted and gpu not in wanted) or (need.spot is not None and spot != need.spot):
            continue
        yield Offer(
            infra,
            region,
            instance,
            gpu,
            gpus,
            vram_gib,
            spot,
            price,
            as_of,
            source,
            quantum_s,
            minimum_s,
            ceiling,
            latencies,
        )
