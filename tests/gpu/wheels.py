"""List and fetch the wheels that ``tests/gpu/run.py`` needs on a machine that has torch and no network.

    pip list --format=freeze > there.txt                                    # there, with its python
    python tests/gpu/wheels.py --there there.txt --into wheels              # here: fetches what is missing
    pip install --no-index --no-deps --target site wheels/*.whl             # there
    PYTHONPATH=site python tests/gpu/run.py

What is needed is found by a dry run: the packages that this checkout's loaded modules import, and those of their
requirements that were loaded, too. Versions are those of requirements.lock, for Python 3.12 on x86-64. A package of the
other machine counts if its version is within pyproject.toml's bounds, or is not stated. torch and torchvision must be
installed there with their requirements, in builds that fit the driver.
"""

import argparse
import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT_MB = 60.0
BUILT_FOR_THE_DRIVER = {"torch", "torchvision", "triton"}
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64")
OLDER_PLATFORMS = ("manylinux2014_x86_64", "manylinux1_x86_64")


def needed_here() -> list[str]:
    """The distributions that this process's modules of this checkout need: imported by them, or required by those."""
    owners = packages_distributions()
    # Not what lies elsewhere under a name that some distribution claims too, such as tests.
    loaded = {name for name, module in sys.modules.items() if "." not in name and _is_installed(module)}
    used = {canonicalize_name(owner) for name in loaded for owner in owners.get(name, ())}
    files = [Path(module.__file__) for module in sys.modules.values() if getattr(module, "__file__", None)]
    own = {file for file in files if file.is_relative_to(ROOT) and "site-packages" not in file.parts}
    imported = {name for file in own if file.suffix == ".py" for name in top_level_imports(file.read_text())}
    direct = {canonicalize_name(owner) for name in imported & loaded for owner in owners.get(name, ())}
    return sorted(with_requirements(direct & used) & used - {"clipmill"})


def _is_installed(module: object) -> bool:
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any("site-packages" in str(place) or "dist-packages" in str(place) for place in places)


def top_level_imports(code: str) -> set[str]:
    """The first part of the name of every imported module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def with_requirements(names: Iterable[str]) -> set[str]:
    """The distributions and all that they require without extras, as far as it is installed here."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        found.add(name)
        required = (Requirement(line) for line in lines)
        waiting += [
            canonicalize_name(one.name) for one in required if one.marker is None or one.marker.evaluate({"extra": ""})
        ]
    return found


def packages_there(text: str) -> dict[str, str]:
    """Versions by name from lines ``name==version`` or ``name``; the version is empty where it is not stated."""
    found = {}
    for line in filter(None, (part.strip() for part in re.split(r"[\n,]", text))):
        match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)\s*(?:==\s*(\S+)|@\s*\S+)?", line)
        if match is None:
            raise SystemExit(
                f"--there: got {line!r}, expected lines NAME==VERSION as `pip list --format=freeze` prints"
            )
        found[canonicalize_name(match[1])] = match[2] or ""
    return found


def missing(needed: Iterable[str], there: Mapping[str, str], bounds: Mapping[str, Requirement]) -> list[str]:
    """The needed packages that are not there, or not in a version that pyproject.toml allows.

    Raises:
        SystemExit: torch or torchvision is among them.
    """
    with_torch = with_requirements(BUILT_FOR_THE_DRIVER) - BUILT_FOR_THE_DRIVER - bounds.keys()
    lacking = [name for name in needed if name not in with_torch and not _is_there(name, there, bounds)]
    unfit = sorted(BUILT_FOR_THE_DRIVER.intersection(lacking))
    if unfit:
        raise SystemExit(f"{', '.join(unfit)} must be installed there first, in a build that fits the driver")
    return lacking


def _is_there(name: str, there: Mapping[str, str], bounds: Mapping[str, Requirement]) -> bool:
    version = there.get(name)
    if not version:
        return version is not None
    return name not in bounds or bounds[name].specifier.contains(version, prereleases=True)


def bounds() -> dict[str, Requirement]:
    """The requirements of pyproject.toml by name."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*listed["dependencies"], *(line for lines in listed["optional-dependencies"].values() for line in lines)]
    return {canonicalize_name(one.name): one for one in map(Requirement, lines)}


def locked() -> dict[str, str]:
    """The versions of requirements.lock by name."""
    return packages_there("\n".join(_locked_lines((ROOT / "requirements.lock").read_text())))


def _locked_lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        plain = line.partition("#")[0].partition(";")[0].strip().rstrip("\\").strip()
        if plain and not plain.startswith("-"):
            yield plain


def needed_by_a_dry_run() -> list[str]:
    """The packages of all parts."""
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "run.py"), "--dry", "--packages"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode or not lines:
        raise SystemExit("the dry run failed: mend it first (python tests/gpu/run.py --dry)")
    return sorted({name for line in lines for name in line.get("packages", ())})


def download(names: Sequence[str], folder: Path) -> None:
    """Fetch the wheels of these requirements without theirs.

    Raises:
        SystemExit: pip fails, such as for a package without a wheel.
    """
    platforms = [word for name in (*PLATFORMS, *OLDER_PLATFORMS) for word in ("--platform", name)]
    target = ["--python-version", PYTHON, "--implementation", "cp", *platforms]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    if names and subprocess.run([*command, *target, "--dest", str(folder), *names], check=False).returncode:
        raise SystemExit("pip could not fetch these wheels; its last lines say which and why")


def main(arguments: Sequence[str] | None = None) -> None:
    """List what is missing; fetch it if a folder is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--there", type=Path, help="file with the packages of the other machine; none if not given")
    parser.add_argument("--into", type=Path, help="folder for the wheels; without it, only list them")
    parser.add_argument(
        "--limit-mb", type=float, default=LIMIT_MB, help="largest sum of the wheels' sizes (default 60)"
    )
    options = parser.parse_args(arguments)
    there = packages_there(options.there.read_text()) if options.there else dict.fromkeys(BUILT_FOR_THE_DRIVER, "")
    lacking = missing(needed_by_a_dry_run(), there, bounds())
    versions = locked()
    wanted = [f"{name}=={versions[name]}" if name in versions else name for name in lacking]
    print("\n".join(wanted) or "nothing is missing")
    if options.into is None or not wanted:
        return
    options.into.mkdir(parents=True, exist_ok=True)
    download(wanted, options.into)
    check_size(options.into, options.limit_mb)


def check_size(folder: Path, limit_mb: float) -> None:
    """Print the size of the wheels.

    Raises:
        SystemExit: it is over the limit; the largest ones are named.
    """
    sizes = {file.name: file.stat().st_size / 1e6 for file in folder.glob("*.whl")}
    total = sum(sizes.values())
    print(f"{len(sizes)} wheels, {total:.1f} MB")
    if total > limit_mb:
        largest = ", ".join(f"{name} ({sizes[name]:.1f} MB)" for name in sorted(sizes, key=sizes.__getitem__)[:-4:-1])
        raise SystemExit(f"more than {limit_mb:.0f} MB: install some there in another way, such as {largest}")


if __name__ == "__main__":
    main()
