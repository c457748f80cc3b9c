"""The rules of the code base: the place of files, the direction of imports, the parts of every file."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.dataset import card_names, load_card

ROOT = Path(__file__).resolve().parent.parent
PIPELINE = ROOT / "pipeline"

# Each folder may import itself, the modules at the root of pipeline/, and the folders before it.
ORDER = (
    *("shards", "sources", "codecs", "stages", "loaders", "models"),
    *("generation", "training", "evaluation", "tracking", "runs"),
)
ROOT_MODULES = {"config", "dataset", "errors"}
TOP_LEVEL = {
    ".ci",
    ".gitignore",
    ".pre-commit-config.yaml",
    ".rayignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "cluster.yaml",
    "datasets",
    "docs",
    "jobs",
    "pipeline",
    "pyproject.toml",
    "requirements.lock",
    "tests",
}
NOT_PINNED = {"gcs", "azure", "spacy"}  # extras that no test needs
# Names that say nothing about what is inside.
EMPTY_NAMES = {"base", "common", "core", "helper", "helpers", "misc", "util", "utils"}

MODULES = sorted(PIPELINE.rglob("*.py"))
JOBS = sorted((ROOT / "jobs").glob("*.py"))


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of every import, the names taken from a package included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute, so that this test can read them"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def may_import(folder: str, target: str) -> bool:
    """Whether code in ``pipeline/<folder>`` may import the name ``target``; ``""`` is the root of pipeline/."""
    first, *rest = target.split(".")
    if first in ("jobs", "tests"):
        return False
    if first != "pipeline" or not rest or rest[0] in ROOT_MODULES:
        return True
    if not folder:
        return False
    return rest[0] in ORDER and ORDER.index(rest[0]) <= ORDER.index(folder)


@pytest.mark.parametrize("path", MODULES, ids=by_name)
def test_imports_go_one_way(path):
    parts = path.relative_to(PIPELINE).parts
    folder = parts[0] if len(parts) > 1 else ""
    assert not folder or folder in ORDER, f"{folder} has no place in the order yet: {', '.join(ORDER)}"
    wrong = [f"line {line}: {name}" for line, name in imported(parsed(path)) if not may_import(folder, name)]
    assert not wrong, f"pipeline/{folder} may not import what comes later: {wrong}"


def test_the_import_rule_sees_every_form():
    code = "def f():\n    from pipeline import jobs\nimport pipeline.training.loop\nfrom pipeline.errors import X\n"
    found = sorted(name for _, name in imported(ast.parse(code)))
    assert found == ["pipeline.errors.X", "pipeline.jobs", "pipeline.training.loop"]
    assert [may_import("models", name) for name in found] == [True, False, False]
    assert may_import("training", "pipeline.training.loop") and not may_import("", "pipeline.shards.tar")


def imports_of(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Which of the modules each of them imports, imports within functions included."""
    found: dict[str, set[str]] = {}
    for module, tree in trees.items():
        names = [name for _, name in imported(tree)]
        found[module] = {name if name in trees else name.rpartition(".")[0] for name in names} & set(trees) - {module}
    return found


def circles(imports: dict[str, set[str]]) -> list[str]:
    """What is left when the modules that import nothing of the rest are taken away, again and again."""
    left = {module: set(names) for module, names in imports.items()}
    while free := [module for module, names in left.items() if not names]:
        for module in free:
            del left[module]
        left = {module: names & set(left) for module, names in left.items()}
    return sorted(left)


def test_no_two_modules_import_each_other():
    """Not by way of others either: a circle can only be read, tested and moved as a whole."""
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES}
    found = circles(imports_of({name.removesuffix(".__init__"): parsed(path) for path, name in names.items()}))
    assert not found, f"these import each other, or what does: {found}"


def test_the_search_for_circles_finds_them():
    codes = {"a": "import b", "b": "def f():\n    from c import x", "c": "from a import y", "d": "import e", "e": ""}
    assert circles(imports_of({name: ast.parse(code) for name, code in codes.items()})) == ["a", "b", "c"]


@pytest.mark.parametrize("path", MODULES, ids=by_name)
def test_public_names_have_docstrings(path):
    tree = parsed(path)
    bare = [] if ast.get_docstring(tree) or not tree.body else ["the module"]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            bare += [] if ast.get_docstring(node) else [f"{node.name} (line {node.lineno})"]
    assert not bare, f"without a docstring: {', '.join(bare)}"


@pytest.mark.parametrize("path", MODULES, ids=by_name)
def test_the_library_logs_and_does_not_print(path):
    calls = (node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call))
    prints = [
        node.lineno
        for node in calls
        # The last words of a job go to stderr by print(..., file=sys.stderr): logging may not be set up yet.
        if isinstance(node.func, ast.Name)
        and node.func.id == "print"
        and not any(k.arg == "file" for k in node.keywords)
    ]
    assert not prints, f"print() in lines {prints}"


def test_modules_are_named_for_what_they_hold():
    assert not [by_name(path) for path in MODULES + JOBS if path.stem in EMPTY_NAMES]


def test_a_class_name_means_one_class():
    """A name in a traceback or a message says where to look; ``Config`` is every method's own, by convention."""
    places: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef) and node.name != "Config":
                places.setdefault(node.name, []).append(by_name(path))
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_jobs_do_not_shadow_a_library():
    """``python jobs/x.py`` puts jobs/ first on sys.path, so a job called like a module hides that module."""
    assert not {path.stem for path in JOBS} & set(sys.stdlib_module_names)
    assert not [path.stem for path in JOBS if importlib.util.find_spec(path.stem)]


@pytest.mark.parametrize("path", JOBS, ids=by_name)
def test_jobs_can_be_run_as_they_say(path):
    first_line = path.read_text(encoding="utf-8").split("\n", 1)[0]
    assert first_line == "#!/usr/bin/env python"
    assert os.access(path, os.X_OK), "`ray job submit -- jobs/x.py` needs the run bit"
    assert f"jobs/{path.name}" in (ast.get_docstring(parsed(path)) or ""), "the docstring shows the command"


@pytest.mark.parametrize("path", JOBS, ids=by_name)
def test_jobs_have_a_smoke_preset(path):
    presets = [
        node.value
        for node in parsed(path).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and target.id == "PRESETS"
    ]
    assert len(presets) == 1 and isinstance(presets[0], ast.Dict)
    assert "smoke" in [key.value for key in presets[0].keys if isinstance(key, ast.Constant)]


def test_moving_bytes_needs_no_torch():
    """Every Ray worker imports the stages; torch would cost each 4 s and 600 MB."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in MODULES
        if path.relative_to(PIPELINE).parts[0] in ("shards", "sources", "stages") and path.stem != "__init__"
    ]
    code = f"import {', '.join(names)}, sys; sys.exit(' '.join({{'torch', 'ray', 'mlflow'}} & set(sys.modules)) or 0)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, f"imported on the way: {found.stderr}"


def test_a_source_loads_no_other_source():
    """A worker that reads a url table needs none of the drawing code, nor a dozen other readers."""
    code = (
        "import sys; from pipeline.sources import source_class; source_class('urls');"
        "print(*[name for name in sys.modules if name.startswith('pipeline.sources.')])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stdout.split()
    assert set(loaded) == {"pipeline.sources.source", "pipeline.sources.tables", "pipeline.sources.urls"}


def test_the_folder_datasets_holds_no_python(monkeypatch):
    """With code in it, it would hide Hugging Face's package of that name; without, the installed package wins."""
    assert not list((ROOT / "datasets").rglob("*.py"))
    monkeypatch.syspath_prepend(str(ROOT))
    spec = importlib.util.find_spec("datasets")
    assert spec is not None and spec.origin is not None and "site-packages" in spec.origin


def test_there_are_cards():
    assert "drawn" in card_names()


@pytest.mark.parametrize("name", card_names())
def test_cards_load(name):
    card = load_card(name)
    assert card.title and card.source["kind"]


def test_the_top_level_is_the_agreed_one():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {line.split("/", 1)[0] for line in listed.stdout.splitlines()} <= TOP_LEVEL


def test_the_lock_file_pins_versions_and_names_no_place():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
    form = re.compile(r"[a-z0-9-]+(\[[a-z0-9,-]+\])?==[^\s;@]+( ; .+)?")
    assert lines and not [line for line in lines if not form.fullmatch(line) or "://" in line]


def test_the_lock_file_fulfils_pyproject():
    pinned: dict[str, list[Requirement]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and line[0] != "#":
            pin = Requirement(line)
            pinned.setdefault(canonicalize_name(pin.name), []).append(pin)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    extras = project["optional-dependencies"]
    tested = [needs for name, needs in extras.items() if name not in NOT_PINNED]
    wanted = project["dependencies"] + sum(tested, []) + build
    for need in map(Requirement, wanted):
        pins = pinned.get(canonicalize_name(need.name), [])
        assert pins, f"{need.name} is not in requirements.lock"
        for pin in pins:
            version = next(iter(pin.specifier)).version
            assert need.specifier.contains(version, prereleases=True), f"{pin} does not fulfil {need}"


def test_what_the_readmes_commands_write_is_neither_committed_nor_uploaded() -> None:
    """`ray job submit --working-dir .` leaves out what .gitignore names; shards would be uploaded with every job."""
    written = set(re.findall(r"--output-folder (\w+)/", (ROOT / "README.md").read_text(encoding="utf-8")))
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert written >= {"data", "runs"} and all(f"/{folder}/" in ignored for folder in written)
