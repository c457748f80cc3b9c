"""The result of an evaluation as a table to read and a JSON file to keep."""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.shards.storage import Folder

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "zeroshot": ("top1", "top5", "mean_per_class", "chance", "samples"),
    "retrieval": (
        *("i2t_r1", "i2t_r5", "i2t_r10", "i2t_median_rank"),
        *("t2i_r1", "t2i_r5", "t2i_r10", "t2i_median_rank"),
        *("chance", "samples"),
    ),
    "classification": ("top1", "top5", "mean_per_class", "chance", "samples"),
    "linear_probe": ("top1", "top5", "mean_per_class", "chance", "samples", "trained_on"),
}
PLAIN = {"samples": ",.0f", "trained_on": ",.0f", "i2t_median_rank": ".1f", "t2i_median_rank": ".1f"}
TITLES = {
    "zeroshot": "zero-shot",
    "linear_probe": "linear probe",
    "mean_per_class": "per class",
    "trained_on": "trained on",
}


def table(metrics: Mapping[str, float]) -> str:
    """The metrics of evaluations and of linear probes, a line for each set; shares in percent."""
    parts = []
    for kind, columns in COLUMNS.items():
        sets = list(dict.fromkeys(name.split("/")[1] for name in metrics if name.startswith(f"{kind}/")))
        if sets:
            head = [_title(kind), *map(_title, columns)]
            lines = [[one, *(_shown(column, metrics[f"{kind}/{one}/{column}"]) for column in columns)] for one in sets]
            parts.append(_aligned([head, *lines]))
    return "\n\n".join(parts)


def write_result(place: str, metrics: Mapping[str, float], about: Mapping[str, Any]) -> None:
    """Write ``{**about, "metrics": {...}}`` as JSON to the file at ``place``, a path or URI.

    Raises:
        StorageError: it cannot be written.
    """
    folder, _, name = place.rpartition("/")
    text = json.dumps({**about, "metrics": dict(metrics)}, indent=2) + "\n"
    Folder(folder or ("/" if place.startswith("/") else ".")).write_atomic(name, text.encode())


def _title(name: str) -> str:
    words = TITLES.get(name, name.replace("_median_rank", " median").replace("_r", " R@"))
    return words.replace("top", "top-") if words.startswith("top") else words


def _shown(column: str, value: float) -> str:
    return format(value, PLAIN[column]) if column in PLAIN else f"{100 * value:.2f} %"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)
