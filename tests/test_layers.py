"""Who may import whom? Read from the source, and once from what Python really loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIGHT = {"tasks.contract", "tasks.bucket", "tasks.watch"}  # all of tasks that orchestrator may know
HEAVY = ("sky", "torch", "transformers", "peft", "boto3", "botocore")


def modules(package: str) -> dict[str, ast.Module]:
    return {path.stem: ast.parse(path.read_text(), str(path)) for path in sorted((ROOT / package).rglob("*.py"))}


def imports(tree: ast.AST, *, at_import_time: bool = False) -> Iterator[str]:
    """Full names of what is imported: of `from a import b` both a and a.b, since b may be a module.

    at_import_time leaves out what stands in functions and under TYPE_CHECKING.
    """
    for node in ast.iter_child_nodes(tree):
        if at_import_time and (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or for_types(node)
        ):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports out in full"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            yield from (
                arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            )
        yield from imports(node, at_import_time=at_import_time)


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def below(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize(
    ("source", "at_import_time", "found"),
    [
        ("import a.b", True, ["a.b"]),
        ("from a import b, c", True, ["a.b", "a.c"]),
        ("def f():\n    import a", True, []),
        ("def f():\n    import a", False, ["a"]),
        ("class C:\n    import a", True, ["a"]),
        ("try:\n    import a\nexcept ImportError:\n    pass", True, ["a"]),
        ("if TYPE_CHECKING:\n    import a", True, []),
        ("importlib.import_module('a.b')", True, ["a.b"]),
    ],
)
def test_the_reader_of_imports_sees_them_all(source: str, at_import_time: bool, found: list[str]) -> None:
    assert list(imports(ast.parse(source), at_import_time=at_import_time)) == found


def test_tasks_know_nothing_of_the_orchestrator() -> None:
    trees = modules("tasks")
    assert {"contract", "bucket", "bucket_file", "bucket_s3", "watch", "stage"} <= set(trees) and len(trees) >= 8
    assert {
        (name, found) for name, tree in trees.items() for found in imports(tree) if below(found, "orchestrator")
    } == set()


def test_the_orchestrator_knows_three_modules_of_tasks() -> None:
    trees = modules("orchestrator")
    assert {"errors", "provision"} <= set(trees) and len(trees) >= 10
    known = {
        found
        for name, tree in trees.items()
        for found in imports(tree)
        if below(found, "tasks") and (name, found) != ("labels_cli", "tasks.labels_text")
    }
    assert known, "nothing of tasks is imported at all: is this test reading the right files?"
    # `import tasks` alone is how the client finds the folder it sends to a machine: an empty package.
    assert {found for found in known if not below(found, *LIGHT)} <= {"tasks"}
    assert list(imports(modules("tasks")["__init__"])) == []
    # The one command that needs torch here loads it when it runs.
    assert "tasks.labels_text" in set(imports(trees["labels_cli"]))
    assert "tasks.labels_text" not in set(imports(trees["labels_cli"], at_import_time=True))


def test_skypilot_is_imported_in_one_file_and_only_inside_functions() -> None:
    trees = {**modules("orchestrator"), **{f"tasks.{name}": tree for name, tree in modules("tasks").items()}}
    assert {name for name, tree in trees.items() if any(below(f, "sky") for f in imports(tree))} <= {"provision_sky"}
    at_once = {name for name, tree in trees.items() if any(below(f, "sky") for f in imports(tree, at_import_time=True))}
    assert at_once == set()


def test_the_contract_needs_the_standard_library_only() -> None:
    found = {name.partition(".")[0] for name in imports(modules("tasks")["contract"])}
    assert found and found <= sys.stdlib_module_names


def loaded_by(*names: str) -> set[str]:
    """Top-level packages that a fresh Python has loaded after importing those modules."""
    code = f"import sys, {', '.join(names)}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(answer.stdout.split())


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    loaded = loaded_by("orchestrator.cli")
    assert {"click", "orchestrator"} <= loaded
    assert loaded.isdisjoint(HEAVY)


def test_importing_what_both_sides_share_loads_nothing_heavy() -> None:
    loaded = loaded_by(*sorted(LIGHT))
    assert "tasks" in loaded
    assert loaded.isdisjoint(HEAVY)
