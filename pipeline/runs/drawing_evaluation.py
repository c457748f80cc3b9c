"""Evaluate the images of a drawing job by a CLIP that guided none of them."""

import csv
import io
import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from statistics import mean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.config import require
from pipeline.errors import DataError, SettingError
from pipeline.evaluation.accuracy import label_ranks
from pipeline.evaluation.classes import text_of
from pipeline.evaluation.generated_images import class_in, r_precision, texts_before
from pipeline.evaluation.zero_shot import classifier
from pipeline.generation.guides import Guide
from pipeline.generation.method import generation_class
from pipeline.generation.prompts import WeightedPrompt, parse_prompts
from pipeline.generation.text_objective import reference
from pipeline.loaders.images import image_at
from pipeline.models.towers.weights import digest_of
from pipeline.runs.drawing_report import SCORES
from pipeline.runs.drawings import DrawingSpec, parse_drawing_spec
from pipeline.shards.privacy import masked
from pipeline.shards.storage import Folder

logger = logging.getLogger(__name__)

AT_ONCE = 64
"""Images that are encoded together."""


@dataclass(frozen=True, kw_only=True)
class JudgingTexts:
    """The texts that images are compared with."""

    distractors: tuple[str, ...] = ()
    """Texts beside the prompts, among which an image's own prompt should be first."""
    classes: tuple[str, ...] = ()
    """Class names; none for no recognition."""
    templates: tuple[str, ...] = ()
    """Templates of the classes' prompts."""
    labels: Mapping[str, str] | None = None
    """Classes by subject; none for the names that occur in prompts and file names."""

    def __post_init__(self) -> None:
        for subject, label in (self.labels or {}).items():
            require(label in self.classes, "labels", f"{subject}: {label}", f"one of {len(self.classes)} classes")


@dataclass(frozen=True, kw_only=True)
class JudgedImage:
    """One image in the judge's eyes."""

    name: str
    method: str
    strokes: int | None
    """Number of strokes of the method, its level of abstraction."""
    subject: str
    seed: int
    score: float | None
    """Cosine with its prompts; none for images of images."""
    texts_before: int | None
    """Number of rivals at least as close as its prompts; 0 is the first place."""
    texts: int | None
    """Number of different texts among which its prompts should be first."""
    label: str | None
    """Its class."""
    predicted: str | None
    classes_before: int | None
    """Number of classes before its own; 0 is a correct prediction."""


def evaluate_drawings(folder: Folder, judge: Guide, texts: JudgingTexts, best_only: bool = False) -> list[JudgedImage]:
    """Judge the finished images of ``scores.parquet`` in ``folder``, or the best seed of each method and subject.

    Raises:
        SettingError: a folder without scores, a judge that guided an image, or a text that it would cut.
        DataError: an image that cannot be read.
    """
    rows = [row for row in read_scores(folder) if row["best"] or not best_only]
    specs = {text: parse_drawing_spec(text) for text in {row["method"] for row in rows}}
    _check_held_out(judge, rows, specs)
    images = _features(folder, [row["png"] for row in rows], judge)
    of_text = [generation_class(specs[row["method"]].method).reads == "text" for row in rows]
    scores, before, count = _compared(rows, of_text, images, judge, texts.distractors)
    labels = [_label(row["subject"], text, texts) for row, text in zip(rows, of_text, strict=True)]
    predicted, ranks = _recognised(images, labels, judge, texts)
    return [
        JudgedImage(
            **{key: row[key] for key in ("name", "method", "subject", "seed")},
            strokes=getattr(specs[row["method"]].config, "strokes", None),
            score=scores[number],
            texts_before=before[number],
            texts=count if of_text[number] else None,
            label=labels[number],
            predicted=predicted[number],
            classes_before=ranks[number],
        )
        for number, row in enumerate(rows)
    ]


def _check_held_out(judge: Guide, rows: Sequence[Mapping[str, Any]], specs: Mapping[str, DrawingSpec]) -> None:
    """That the judge guided no image, by addresses and by weights; rows of older jobs have no digests of weights."""
    for spec in specs.values():
        models = spec.build().models
        require(judge.name not in models, "judge", judge.name, f"another CLIP than those of {spec.method}, {models}")
    digest = digest_of(judge.model)
    same = next((row["method"] for row in rows if digest in (row.get("guides") or ())), None)
    if same is not None:
        models = specs[same].build().models
        allowed = f"another CLIP than those of {specs[same].method}, {models}: one has the same weights"
        raise SettingError("judge", judge.name, allowed)


def read_scores(folder: Folder) -> list[dict[str, Any]]:
    """The rows of ``scores.parquet`` about images that have not failed; raises as :func:`evaluate_drawings`."""
    place = folder.join(SCORES)
    try:
        rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(folder.read_bytes(SCORES))).to_pylist()
    except FileNotFoundError as error:
        raise SettingError("drawings", place, "the output folder of a finished jobs/draw_prompts.py") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{place} cannot be read ({error})") from error
    wanted = {"name", "method", "subject", "seed", "best", "png"}
    if not rows or not wanted <= rows[0].keys():
        raise DataError(f"{place} has no rows with {', '.join(sorted(wanted))}")
    found = [row for row in rows if row.get("status") != "failed"]
    if not found:
        raise DataError(f"{place} has failed images only")
    if len(found) < len(rows):
        logger.warning("%d of %d images of %s failed and are left out", len(rows) - len(found), len(rows), place)
    return found


def read_labels(place: str) -> dict[str, str]:
    """Classes by subject from a CSV file with the columns ``subject`` and ``class``; raises ``SettingError``."""
    allowed = "a CSV file with the columns subject and class"
    rows = list(csv.DictReader(io.StringIO(text_of("labels", place, allowed))))
    require(bool(rows) and {"subject", "class"} <= rows[0].keys(), "labels", place, allowed)
    return {row["subject"]: row["class"] for row in rows}


@torch.no_grad()
def _features(folder: Folder, files: Sequence[str], judge: Guide) -> Tensor:
    """Unit features [N, D] of PNG files, read as needed."""
    found = []
    for start in range(0, len(files), AT_ONCE):
        pixels = [image_at(folder.join(file)) for file in files[start : start + AT_ONCE]]
        # Methods may differ in size; images of one size share a call.
        rows: list[Tensor] = [torch.empty(0)] * len(pixels)
        for shape in {one.shape for one in pixels}:
            same = [number for number, one in enumerate(pixels) if one.shape == shape]
            stacked = torch.stack([torch.from_numpy(pixels[number]) for number in same]).permute(0, 3, 1, 2)
            for number, row in zip(same, judge.images(stacked.to(judge.device).float() / 255), strict=True):
                rows[number] = row
        found.append(torch.stack(rows))
    return torch.cat(found)


def _compared(
    rows: Sequence[Mapping[str, Any]], of_text: Sequence[bool], images: Tensor, judge: Guide, distractors: Sequence[str]
) -> tuple[list[float | None], list[int | None], int]:
    """For images of texts, the cosine with their prompts, and the number of rivals that are at least as close; and the
    number of all texts. Prompts with the same vector are one text, and no rivals of each other."""
    some = [number for number, text in enumerate(of_text) if text]
    if not some:
        return [None] * len(rows), [None] * len(rows), 0
    prompts = {subject: parse_prompts(subject) for subject in dict.fromkeys(rows[number]["subject"] for number in some)}
    vectors, places = dict[Wanted, Tensor](), dict[str, int]()
    for subject, those in prompts.items():
        vector = reference(judge, those)  # first, since it refuses texts that would be cut
        wanted = _wanted(judge, those)
        vectors.setdefault(wanted, vector)
        places[subject] = list(vectors).index(wanted)
    others = [text for text in dict.fromkeys(distractors) if text not in prompts]
    for text, vector in zip(others, judge.texts(others) if others else (), strict=True):
        vectors.setdefault(_wanted(judge, [WeightedPrompt(text)]), vector)
    texts = torch.stack(list(vectors.values()))
    own = torch.tensor([places[rows[number]["subject"]] for number in some], device=texts.device)
    cosines = (images[some] * texts[own]).sum(1).tolist()
    before = texts_before(images[some], texts, own).tolist()
    return _filled(len(rows), some, cosines), _filled(len(rows), some, before), len(texts)


Wanted = frozenset[tuple[Hashable, float]]
"""Texts, as the judge reads them, or images, each with its part of the positive weights."""


def _wanted(judge: Guide, prompts: Sequence[WeightedPrompt]) -> Wanted:
    """The positive prompts up to a common factor: equal ones have equal references."""
    weights: dict[Hashable, float] = {}
    for one in prompts:
        if one.weight > 0:
            read = one.image or tuple(judge.model.tokenizer([one.text])[0].tolist())
            weights[read] = weights.get(read, 0.0) + one.weight
    total = sum(weights.values())
    return frozenset((read, round(weight / total, 9)) for read, weight in weights.items())


def _label(subject: str, is_text: bool, texts: JudgingTexts) -> str | None:
    if texts.labels is not None:
        return texts.labels.get(subject)
    if is_text:
        return class_in([prompt.text for prompt in parse_prompts(subject) if prompt.weight > 0], texts.classes)
    return class_in([PurePosixPath(subject).stem], texts.classes)


def _recognised(
    images: Tensor, labels: Sequence[str | None], judge: Guide, texts: JudgingTexts
) -> tuple[list[str | None], list[int | None]]:
    """For images with a label, the nearest class, and the number of classes before the label."""
    some = [number for number, label in enumerate(labels) if label is not None]
    if not some:
        return [None] * len(labels), [None] * len(labels)
    scores = images[some] @ classifier(judge.model, texts.classes, texts.templates).to(images).T
    numbers = torch.tensor([texts.classes.index(str(labels[number])) for number in some], device=scores.device)
    nearest = [texts.classes[number] for number in scores.argmax(1).tolist()]
    return _filled(len(labels), some, nearest), _filled(len(labels), some, label_ranks(scores, numbers).tolist())


def _filled(length: int, places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """``values`` at their ``places``, ``None`` elsewhere."""
    found = [None] * length
    for place, value in zip(places, values, strict=True):
        found[place] = value
    return found


def summaries(judged: Sequence[JudgedImage]) -> dict[str, dict[str, float]]:
    """For each method, by number of strokes: ``images``, and of those that have one ``score``, ``r_precision``,
    ``top1``, ``top5`` and ``labelled``."""
    found = {}
    order = sorted(judged, key=lambda one: one.strokes or 0)
    for method in dict.fromkeys(one.method for one in order):
        some = [one for one in judged if one.method == method]
        numbers = {"images": float(len(some))}
        scores = [one.score for one in some if one.score is not None]
        before = [one.texts_before for one in some if one.texts_before is not None]
        ranks = [one.classes_before for one in some if one.classes_before is not None]
        if scores:
            numbers |= {"score": mean(scores), "r_precision": r_precision(before)}
        if ranks:
            numbers |= {"top1": mean(rank == 0 for rank in ranks), "top5": mean(rank < 5 for rank in ranks)}
            numbers["labelled"] = float(len(ranks))
        found[method] = numbers
    return found


def evaluation_table(judged: Sequence[JudgedImage], texts: JudgingTexts) -> str:
    """Markdown: a row for each method, by number of strokes, and the chances below."""
    strokes = {one.method: one.strokes for one in judged}
    names = ("score", "r_precision", "top1", "top5")
    lines = ["| method | strokes | images | score | R-precision | top-1 | top-5 |", "| --- " * 7 + "|"]
    for method, numbers in summaries(judged).items():
        cells = [masked(method), str(strokes[method] or "-"), f"{numbers['images']:.0f}"]
        cells += [f"{numbers[name]:.3f}" if name in numbers else "-" for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    count = next((one.texts for one in judged if one.texts), 0)
    lines += ["", f"R-precision among {count} texts, by chance {1 / count:.3f}."] if count else []
    if any(one.label for one in judged):
        chance, without = 1 / len(texts.classes), sum(one.label is None for one in judged)
        lines += ["", f"Recognition among {len(texts.classes)} classes, by chance {chance:.3f}; {without} unlabelled."]
    return "\n".join(lines)


def judged_parquet(judged: Sequence[JudgedImage]) -> bytes:
    """A row for each image with the fields of :class:`JudgedImage`; secrets in addresses are masked."""
    types: dict[str, pa.DataType] = {"strokes": pa.int64(), "seed": pa.int64(), "score": pa.float64()}
    types |= dict.fromkeys(("texts_before", "texts", "classes_before"), pa.int64())
    rows = [{**asdict(one), "method": masked(one.method), "subject": masked(one.subject)} for one in judged]
    schema = pa.schema({name: types.get(name, pa.string()) for name in rows[0]})
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), content)
    return content.getvalue()
