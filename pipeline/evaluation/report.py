"""The result of an evaluation as a table to read and a JSON file to keep."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.models.detections import Detections
from pipeline.shards.objects import names_of
from pipeline.shards.storage import Folder

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "zeroshot": ("top1", "top5", "mean_per_class", "chance", "samples"),
    "retrieval": (
        *("i2t_r1", "i2t_r5", "i2t_r10", "i2t_median_rank"),
        *("t2i_r1", "t2i_r5", "t2i_r10", "t2i_median_rank"),
        *("chance", "samples"),
    ),
    "classification": ("top1", "top5", "mean_per_class", "chance", "samples"),
    "det": (
        *("ap", "ap50", "ap75", "ap_base", "ap50_base", "ap_novel", "ap50_novel", "ap_r", "ap_c", "ap_f"),
        *("mask_ap", "mask_ap_base", "mask_ap_novel", "mask_ap_r", "mask_ap_c", "mask_ap_f"),
        *("ar100", "ar300", "ar1000", "samples"),
    ),
    "linear_probe": ("top1", "top5", "mean_per_class", "chance", "samples", "trained_on"),
}
PLAIN = {"samples": ",.0f", "trained_on": ",.0f", "i2t_median_rank": ".1f", "t2i_median_rank": ".1f"}
TITLES = {
    "zeroshot": "zero-shot",
    "det": "detection",
    "linear_probe": "linear probe",
    "mean_per_class": "per class",
    "trained_on": "trained on",
}


def table(metrics: Mapping[str, float]) -> str:
    """The metrics of evaluations and of linear probes, a line for each set; shares in percent.

    Of detection, which measures what a set and a detector allow, columns are shown that have a number.
    """
    parts = []
    for kind, columns in COLUMNS.items():
        sets = list(dict.fromkeys(name.split("/")[1] for name in metrics if name.startswith(f"{kind}/")))
        if sets:
            shown = [name for name in columns if any(f"{kind}/{one}/{name}" in metrics for one in sets)]
            head = [_title(kind), *map(_title, shown)]
            lines = [[one, *(_shown(name, metrics.get(f"{kind}/{one}/{name}")) for name in shown)] for one in sets]
            parts.append(_aligned([head, *lines]))
    return "\n\n".join(parts)


def detections_table(found: Detections, words: Sequence[str]) -> str:
    """A line for each detection: its word, score, and box in pixels."""
    rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    called = [names_of(word)[0] for word in words]
    lines = [[called[label], f"{score:.3f}", *(f"{edge:.0f}" for edge in box)] for label, score, box in rows]
    return _aligned([["word", "score", "left", "top", "right", "bottom"], *lines])


def write_result(place: str, metrics: Mapping[str, float], about: Mapping[str, Any]) -> None:
    """Write ``{**about, "metrics": {...}}`` as JSON to the file at ``place``, a path or URI.

    Raises:
        StorageError: it cannot be written.
    """
    folder, _, name = place.rpartition("/")
    text = json.dumps({**about, "metrics": dict(metrics)}, indent=2) + "\n"
    Folder(folder or ("/" if place.startswith("/") else ".")).write_atomic(name, text.encode())


def _title(name: str) -> str:
    if re.match(r"(mask_)?a[pr]\d*(_|$)", name):
        return re.sub(r"a[pr]", lambda found: found[0].upper(), name).replace("_", " ")
    words = TITLES.get(name, name.replace("_median_rank", " median").replace("_r", " R@"))
    return words.replace("top", "top-") if words.startswith("top") else words


def _shown(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    return format(value, PLAIN[column]) if column in PLAIN else f"{100 * value:.2f} %"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)
