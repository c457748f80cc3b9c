"""The command ``clipmill JOB ARGUMENTS``: runs a file of ``jobs/``, as ``python jobs/JOB.py ARGUMENTS`` does.

A job's name is that of its file, with ``-`` for ``_``, or its beginning: ``clipmill refresh`` is
``jobs/refresh_dataset.py``.
"""

import ast
import runpy
import sys
from pathlib import Path

from pipeline.config import near, shipped_folder

ALIASES = {"train": "pretrain-clip"}


def main() -> None:
    """Run the job that the first argument names; without one, list the jobs."""
    jobs = {path.stem.replace("_", "-"): path for path in sorted(shipped_folder("jobs").glob("*.py"))}
    wanted, *arguments = sys.argv[1:] or ["--help"]
    if wanted in ("--help", "-h"):
        sys.stdout.write(overview(jobs))
        return
    wanted = ALIASES.get(wanted, wanted).replace("_", "-")
    found = [wanted] if wanted in jobs else [name for name in jobs if name.startswith(wanted)]
    if len(found) != 1:
        allowed = ", ".join(found or jobs)
        print(f"error: job: got {wanted!r}, expected one of {allowed}{near(wanted, jobs)}", file=sys.stderr)
        raise SystemExit(2)
    path = str(jobs[found[0]])
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def overview(jobs: dict[str, Path]) -> str:
    """The jobs with the first lines of their docstrings."""
    width = max(map(len, jobs))
    lines = [f"  {name:{width}}  {_summary(path)}" for name, path in jobs.items()]
    names = ", ".join(f"{alias} = {name}" for alias, name in ALIASES.items())
    return "\n".join(["clipmill JOB --help", "", *lines, "", f"The beginning of a name is enough; {names}.", ""])


def _summary(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())
