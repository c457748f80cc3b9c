"""The documentation against the code: links, names, commands, sizes, and the examples of docs/library.md."""

import re
import runpy
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
# A changelog may name what is gone; the files that extending.md brings are used by test_extending.py.
USED = [page for page in PAGES if page.name not in ("CHANGELOG.md", "extending.md")]
COMING: set[str] = set()
LONGEST_LINE = 300
LONGEST_PARAGRAPH = 4
FENCE = re.compile(r"^```")


def page_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Number and text of the lines outside code blocks."""
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if FENCE.match(line):
            inside = not inside
        elif not inside:
            yield number, line


def code_blocks(page: Path, language: str | None = None) -> list[str]:
    """Contents of the fenced blocks; those of one language where it is named ("" for blocks without)."""
    found = re.findall(r"^```([\w-]*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [code for name, code in found if language is None or name == language]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every `python jobs/x.py ...` that a page shows, in blocks and in the text."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"python (jobs/\w+\.py[^\n`]*)", text):
        yield shlex.split(line.partition(" #")[0].replace("'", " ").replace('"', " "))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = [line.lstrip("#").strip().lower() for _, line in prose(page) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


@cache
def presets(job: str) -> frozenset[str]:
    return frozenset(runpy.run_path(str(ROOT / job))["PRESETS"])


def test_the_readme_is_a_first_screen() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_lines_and_paragraphs_are_short(page: Path) -> None:
    paragraph = 0
    for number, line in prose(page):
        if line.lstrip().startswith("|"):
            paragraph = 0
            continue
        assert len(re.sub(r"\]\([^)]*\)", "]", line)) <= LONGEST_LINE, f"line {number} is longer than {LONGEST_LINE}"
        is_text = bool(line.strip()) and not re.match(r"#|\s*([-*]|\d+\.) ", line)
        starts_item = bool(re.match(r"\s*([-*]|\d+\.) ", line))
        paragraph = paragraph + 1 if is_text else int(starts_item)
        assert paragraph <= LONGEST_PARAGRAPH, f"the paragraph at line {number} has more than {LONGEST_PARAGRAPH} lines"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_within_the_repository_resolve(page: Path) -> None:
    text = "\n".join(line for _, line in prose(page))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if page_name(target) in COMING:
            continue
        assert target.exists(), f"{link} leads nowhere"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link}: {target.name} has no such heading"


@pytest.mark.parametrize("page", USED, ids=page_name)
def test_files_and_targets_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for path in re.findall(r"\b((?:jobs|pipeline|tests|datasets|docs)/[\w./-]*\w)", text):
        if "NAME" not in path and path not in COMING:  # NAME: to be put in
            assert (ROOT / path).exists(), f"{path} does not exist"
    for path in re.findall(r"`((?:stages|models|training|evaluation|loaders|runs)/[\w/]+\.py)`", text):
        assert (ROOT / "pipeline" / path).exists(), f"pipeline/{path} does not exist"
    for target in re.findall(r"`make ([a-z-]+)", text) + re.findall(r"^make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, f"make {target} does not exist"


@pytest.mark.parametrize("page", USED, ids=page_name)
def test_presets_in_commands_exist(page: Path) -> None:
    for job, *words in commands(page):
        if words and re.fullmatch(r"[a-z][\w-]*", words[0]):
            assert words[0] in presets(job), f"{job} has no preset {words[0]}"


def test_the_table_of_methods_is_complete() -> None:
    text = README.read_text(encoding="utf-8")
    for folder in ("pipeline/models", "pipeline/models/adapters", "pipeline/generation/methods"):
        for path in sorted((ROOT / folder).glob("*.py")):
            source = path.read_text(encoding="utf-8")
            if re.search(r"^class Config\b", source, re.MULTILINE):
                assert f"({folder}/{path.name})" in text, f"{path.name} is in no row of the README's table"


def test_the_examples_of_the_library_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = code_blocks(ROOT / "docs" / "library.md", "python")
    assert len(blocks) >= 5
    names: dict[str, object] = {"__name__": "library"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"docs/library.md, block {number}", "exec"), names)
