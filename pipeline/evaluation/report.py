"""The result of an evaluation as a printed table and a JSON file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.evaluation.search import Match
from pipeline.evaluation.task import Column, Report, tasks
from pipeline.models.detections import Detections
from pipeline.models.segments import Segmentation
from pipeline.shards.objects import names_of
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.embeddings import caption_of
from pipeline.stages.report.dataset_report import plain

LONGEST = 60  # characters of a caption in a table


def table(metrics: Mapping[str, float], reports: Sequence[Report] = ()) -> str:
    """The metrics, one table per kind of evaluation in ``reports`` (by default all kinds), one line per set.

    Only columns with a number are shown: the metrics may depend on the set and the model.
    """
    parts = []
    for report in reports or [task.report for task in tasks().values()]:
        prefix = report.prefix
        sets = list(dict.fromkeys(name.split("/")[1] for name in metrics if name.startswith(f"{prefix}/")))
        if sets:
            columns = _columns(report, metrics)
            shown = [one for one in columns if any(f"{prefix}/{name}/{one.name}" in metrics for name in sets)]
            head = [report.title, *(column.title or column.name for column in shown)]
            lines = [[name, *(one.shown(metrics.get(f"{prefix}/{name}/{one.name}")) for one in shown)] for name in sets]
            parts.append(_aligned([head, *lines]))
    return "\n\n".join(parts)


def detections_table(found: Detections, words: Sequence[str]) -> str:
    """One line per detection: its word, score, and box in pixels."""
    rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    called = [names_of(word)[0] for word in words]
    lines = [[called[label], f"{score:.3f}", *(f"{edge:.0f}" for edge in box)] for label, score, box in rows]
    return _aligned([["word", "score", "left", "top", "right", "bottom"], *lines])


def segments_table(found: Segmentation, words: Sequence[str]) -> str:
    """One line per word that a pixel has: its part of the pixels in percent, and the mean probability there."""
    rows = []
    for number in found.labels.unique().tolist():
        inside = found.labels == number
        part, mean = float(inside.float().mean()), f"{float(found.scores[inside].mean()):.3f}"
        name, shown = ("no word", "-") if number < 0 else (names_of(words[number])[0], mean)
        rows.append((part, [name, f"{100 * part:.1f}", shown]))
    return _aligned([["word", "pixels", "probability"], *(row for _, row in sorted(rows, reverse=True))])


def answers_table(answers: Sequence[tuple[str, float]]) -> str:
    """One line per answer with its probability."""
    return _aligned([["answer", "probability"], *([text, f"{value:.3f}"] for text, value in answers)])


def matches_table(matches: Sequence[Match]) -> str:
    """One line per match of a search: its caption, cosine and key; of videos by their frames, the best moment."""
    captions = [plain(caption_of(match.sample) or "", LONGEST) for match in matches]
    rows = zip(captions, matches, strict=True)
    lines = [
        [caption, f"{match.score:.3f}", *([f"{match.moment.seconds:.2f} s"] if match.moment else []), match.sample.key]
        for caption, match in rows
    ]
    moment = ["moment"] if any(match.moment for match in matches) else []
    return _aligned([["caption", "cosine", *moment, "key"], *lines])


def write_result(place: str, metrics: Mapping[str, float], about: Mapping[str, Any]) -> None:
    """Write ``{**about, "metrics": {...}}`` as JSON to the file at ``place``, a path or URI.

    Raises:
        StorageError: it cannot be written.
    """
    folder, _, name = place.rpartition("/")
    text = json.dumps({**about, "metrics": dict(metrics)}, indent=2) + "\n"
    Folder(folder or ("/" if place.startswith("/") else ".")).write_atomic(name, text.encode())


def _columns(report: Report, metrics: Mapping[str, float]) -> list[Column]:
    """The columns of a report; one that ends in ``*`` is one for each metric that begins so."""
    names = sorted({name.split("/", 2)[2] for name in metrics if name.startswith(f"{report.prefix}/")})
    found: list[Column] = []
    for one in report.columns:
        begin = one.name.removesuffix("*")
        matching = [name for name in names if name.startswith(begin)] if one.name != begin else [one.name]
        found += [replace(one, name=name) for name in matching]
    return found


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)
