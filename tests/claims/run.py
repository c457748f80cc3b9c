"""The papers' claims in miniature, on the embedded world, several seeds, with their spread.

    python tests/claims/run.py slip                    # the table on standard output and in FOLDER/slip.md
    python tests/claims/run.py clip --seeds 0 1 2 3 4 --folder runs/claims

Minutes to hours on two cores, so not a part of the tests. Every training goes on from its last checkpoint, and what a
seed has measured is kept, so the same command goes on where it was stopped. A module beside this one has ``measure``,
which gives a seed's metrics, and ``CLAIMS``. What does not hold is printed as such.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from claim import Claim

HERE = Path(__file__).parent
SHARED = ("run", "claim", "coloured_shapes")


def measured(name: str, seed: int, folder: Path) -> dict[str, float]:
    """The metrics of one seed, from the file of an earlier call or measured now."""
    kept = folder / name / f"seed-{seed}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    began = time.monotonic()
    metrics = import_module(name).measure(seed, folder / name)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({**metrics, "minutes": (time.monotonic() - began) / 60}, indent=2))
    return measured(name, seed, folder)


def table(claims: Sequence[Claim], seeds: Sequence[Mapping[str, float]]) -> str:
    """Markdown: a row for each claim, with mean and standard deviation over the seeds."""
    lines = ["| claim | baseline | result | gain | holds |", "| --- | --- | --- | --- | --- |"]
    for claim in claims:
        before, after = [claim.baseline(one) for one in seeds], [claim.result(one) for one in seeds]
        gains = [new - old for old, new in zip(before, after, strict=True)]
        cells = [claim.text, *(spread(values) for values in (before, after)), spread(gains, "+"), claim.verdict(seeds)]
        lines.append("| " + " | ".join(cells) + " |")
    minutes = statistics.mean(one["minutes"] for one in seeds)
    return "\n".join([*lines, "", f"{len(seeds)} seeds, {minutes:.0f} minutes each."])


def spread(values: Sequence[float], sign: str = "") -> str:
    """``62.1 ± 1.3``, in percent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):{sign}.1f} ± {100 * deviation:.1f}"


def main() -> None:
    """Measure what is not measured yet, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in SHARED)
    parser.add_argument("name", choices=names)
    parser.add_argument("--folder", type=Path, default=Path("runs/claims"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    sys.path.insert(0, str(HERE.parents[1]))
    folder = options.folder.absolute()
    seeds = [measured(options.name, seed, folder) for seed in options.seeds]
    text = table(import_module(options.name).CLAIMS, seeds)
    (folder / f"{options.name}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
