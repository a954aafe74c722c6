"""Is what SECURITY.md claims held by tests that exist, and does it promise no address that nobody reads?"""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

from orchestrator.recipe import RecipeSpec
from tasks.contract import ModelSource, TaskError

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "SECURITY.md").read_text()
NAMED = re.findall(r"`(tests/[a-z0-9_]+\.py)::([A-Za-z0-9_]+)`", TEXT)


@cache
def functions_of(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_every_test_that_is_named_exists() -> None:
    assert len(NAMED) >= 50 and len(NAMED) == TEXT.count(".py::")
    assert [f"{file}::{name}" for file, name in NAMED if name not in functions_of(file)] == []


def test_every_claim_names_a_test() -> None:
    tables = [part.split("\n\n")[0] for part in TEXT.split("| claim | held by |\n|---|---|\n")[1:]]
    rows = [row for table in tables for row in table.splitlines()]
    assert len(tables) == 6 and len(rows) >= 25
    assert [row for row in rows if "`tests/" not in row.split(" | ")[1]] == []


def test_every_file_that_is_named_exists() -> None:
    files = set(re.findall(r"\]\(([^)]+)\)", TEXT)) | set(re.findall(r"`(docs/[^`]+)`", TEXT))
    assert {"docs/money.md", "docs/credentials.md"} <= files
    assert [name for name in files if not (ROOT / name).is_file()] == []


def test_no_address_is_invented() -> None:
    assert not re.search(r"\S+@\S+\.\S+|https?://", TEXT)


def test_code_that_comes_with_a_model_is_not_run_unless_the_recipe_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    from tasks import models

    assert RecipeSpec.model_fields["trust_remote_code"].default is False and not ModelSource().trust_remote_code
    mark = tmp_path / "it-ran"
    folder = tmp_path / "model"
    folder.mkdir()
    code = f"from transformers import PretrainedConfig\nopen({str(mark)!r}, 'w')\nclass C(PretrainedConfig): pass\n"
    (folder / "theirs.py").write_text(code)
    config = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.C", "AutoTokenizer": ["theirs.T", None]}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TaskError, match="cannot load the tokenizer"):
        models.load_tokenizer(ModelSource(path=str(folder)))
    assert not mark.exists()
    with pytest.raises(TaskError, match="cannot load the model"):
        models._pretrained(ModelSource(path=str(folder)), dtype=models.torch.float32)
    assert not mark.exists()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))  # not in the user's own
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    with pytest.raises(TaskError, match="cannot load the model"):
        models._pretrained(ModelSource(path=str(folder), trust_remote_code=True), dtype=models.torch.float32)
    assert mark.exists(), "with it, it does run: the two looks above saw something"
