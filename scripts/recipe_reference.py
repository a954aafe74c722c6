"""Writes docs/recipe.md from the types of a recipe: every key, what it takes, its default, its meaning.

python scripts/recipe_reference.py            # writes it
python scripts/recipe_reference.py --check    # fails when the file is not what the types say
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # of this checkout, wherever it is called from

from orchestrator.gpus import GPUS  # noqa: E402
from orchestrator.recipe import KINDS, recipe_schema  # noqa: E402

FILE = ROOT / "docs" / "recipe.md"
EXAMPLES = {"50 CNY": "money", "0.10 USD/h": "money an hour", "0.55 USD": "money", "8h": "time"}
TITLES = {  # parts in the order in which a reader meets them: definition -> (title, where it stands)
    "LocalPart": ("local", "under `local:`"),
    "DataPart": ("data", "under `data:`"),
    "ComparePart": ("compare", "under `compare:`"),
    **{part.__name__: (f"kind: {kind}", f"a stage with `kind: {kind}`") for kind, part in KINDS.items()},
    "SoftLabelsPart": ("soft_labels", "in a label stage, under `soft_labels:`"),
    "ApiPart": ("api", "in a label stage, under `api:`"),
    "LoraPart": ("lora", "in a train stage, under `lora:`"),
    "LossPart": ("loss", "in a train stage, under `loss:`"),
    "ArchitecturePart": ("model", "in a pretrain stage under `model:`, in a train stage under `student:`"),
}
SHARED = ("name", "infra", "gpus", "spot", "threads")  # keys that stages have in common
HEAD = """\
<!-- Written by scripts/recipe_reference.py from the types in orchestrator/recipe.py: change those. -->
# Every key of a recipe

A recipe is one YAML file. An unknown key is refused with the nearest known one, and all mistakes are told at once with
their lines. What is left out, the planner chooses and `kdcloud plan` shows. `kdcloud init` writes a recipe in which
each key is explained; `kdcloud recipe-schema > recipe.schema.json` makes what editors complete recipes with. The
built-in recipes ([quickstart](../recipes/quickstart.yaml), [r1-qwen-1.5b](../recipes/r1-qwen-1.5b.yaml),
[lora-24gb](../recipes/lora-24gb.yaml), [staged](../recipes/staged.yaml), [api-teacher](../recipes/api-teacher.yaml),
[rehearsal](../recipes/rehearsal.yaml)) are whole examples.

*Money* is a number and `CNY`, `USD`, `¥` or `$`: `50 CNY`, `$7`. A *time* is `90s`, `30min`, `8h`, `2d`. An *infra* is
`local`, `slurm/CLUSTER`, or a cloud by SkyPilot's name, like `aws` or `runpod`. A *GPU* is a name of the table in
[gpus.md](gpus.md), with a number of them on a machine where one is wanted: `A100:8`. **needed** stands where there is
no default, *none* where leaving the key out means that there is no such thing, or what its meaning says.
"""


def reference() -> str:
    """The whole page."""
    schema = recipe_schema()
    return "\n".join([HEAD, *_lines(schema)]) + "\n"


def _lines(schema: dict[str, Any]) -> Iterator[str]:
    parts = schema["$defs"]
    unknown = sorted(set(parts) - set(TITLES))
    if unknown:
        raise ValueError(f"parts without a title here: {', '.join(unknown)}")
    yield from ("## The recipe itself", "")
    yield from _table(schema["properties"], schema.get("required", []))
    common = {key: value for key, value in parts["TrainStage"]["properties"].items() if key in SHARED}
    yield from ("", "## Every stage", "", "Beside the keys of its kind. A rehearsal has no `threads`.", "")
    yield from _table(common, parts["TrainStage"]["required"])
    for name, (title, place) in TITLES.items():
        own = {key: value for key, value in parts[name]["properties"].items() if key not in (*SHARED, "kind")}
        keys = own if name.endswith("Stage") else parts[name]["properties"]
        yield from ("", f"## {title}", "", f"{parts[name]['description']} ({place.capitalize()}.)", "")
        yield from _table(keys, parts[name].get("required", []))


def _table(keys: dict[str, Any], needed: list[str]) -> Iterator[str]:
    yield "| key | takes | default | meaning |"
    yield "|---|---|---|---|"
    for key, said in keys.items():
        meaning = said.get("description")
        if not meaning:
            raise ValueError(f"{key} has no description in orchestrator/recipe.py")
        default = "**needed**" if key in needed else _default(said)
        yield f"| `{key}` | {_takes(said)} | {default} | {_escaped(meaning)} |"


def _takes(said: dict[str, Any]) -> str:
    """The type and its bounds in words."""
    if "$ref" in said:
        title = TITLES[said["$ref"].rpartition("/")[2]][0]
        return f"[keys](#{title.replace(': ', '-').replace(' ', '-')})"
    if "oneOf" in said:
        return "a stage" if "discriminator" in said else " or ".join(_takes(one) for one in said["oneOf"])
    if "const" in said:
        return f"`{said['const']}`"
    if set(said.get("enum", ())) == set(GPUS):
        return "a GPU"
    if "enum" in said:
        return ", ".join(f"`{word}`" for word in said["enum"])
    if "anyOf" in said:
        known = [
            one for one in said["anyOf"] if one.get("type") != "null" and not one.get("pattern", "").startswith("^(")
        ]
        return " or ".join(dict.fromkeys(_takes(one) for one in known))
    match said.get("type"):
        case "array":
            least = ", at least one" if said.get("minItems") else ""
            return f"list of {_takes(said['items'])}{least}".replace("list of a ", "list: a ")
        case "boolean":
            return "`true`, `false`"
        case "integer" | "number":
            return _number(said)
        case "string":
            (example,) = said.get("examples", [""])
            if example:
                return f"{EXAMPLES.get(example, 'text')}, like `{example}`"
            most = f", at most {said['maxLength']} characters" if "maxLength" in said else ""
            return f"text{most}"
    raise ValueError(f"no words for {said}")


def _number(said: dict[str, Any]) -> str:
    word = "whole number" if said["type"] == "integer" else "number"
    least, above, most = said.get("minimum"), said.get("exclusiveMinimum"), said.get("maximum")
    if "enum" in said:
        return ", ".join(map(str, said["enum"]))
    if above is not None and most is not None:
        return f"{word}, above {above:g}, at most {most:g}"
    if least is not None and most is not None:
        return f"{word} from {least:g} to {most:g}"
    if above is not None:
        return f"{word} above {above:g}"
    return f"{word}, at least {least:g}" if least is not None else word


def _default(said: dict[str, Any]) -> str:
    value = said.get("default")
    if value is None:
        return "*none*"
    if isinstance(value, dict):
        return "its defaults"
    if _takes(said).startswith("time"):
        return f"`{_time(float(value))}`"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{json.dumps(value)}`".replace('"', "")


def _time(seconds: float) -> str:
    return f"{seconds / 60:g}min" if seconds % 60 == 0 else f"{seconds:g}s"


def _escaped(text: str) -> str:
    """As a cell of a table in Markdown."""
    return text.replace("|", "\\|").replace("* ", "\\* ")


def main() -> None:
    """Writes the page, or says that it is not up to date."""
    text = reference()
    if "--check" not in sys.argv[1:]:
        FILE.write_text(text, encoding="utf-8")
    elif FILE.read_text(encoding="utf-8") != text:
        sys.exit(f"{FILE.relative_to(ROOT)} is not what the types say: run python scripts/recipe_reference.py")


if __name__ == "__main__":
    main()
