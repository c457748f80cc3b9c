"""Zero-shot classification: an image, a sound, a video or a point cloud belongs to the class with the nearest prompts.

A model that encodes images and no point clouds classifies them by depth views: :mod:`pipeline.evaluation.point_clip`.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from pipeline.config import require
from pipeline.evaluation.classes import (
    CLASSES_HELP,
    LABEL_HELP,
    Labels,
    check_views,
    label_key,
    labelled_batches,
    read_classes,
    read_templates,
)
from pipeline.evaluation.data import Data, evaluation_batches
from pipeline.evaluation.encoder import inference
from pipeline.evaluation.figures import RIGHT, WRONG
from pipeline.evaluation.media import AUTO, check_medium, encode_inputs, medium_of_set, medium_reader, require_text
from pipeline.evaluation.point_clip import CloudOptions, PointClip, seen_by_views
from pipeline.evaluation.shown_clips import clip_files
from pipeline.evaluation.shown_media import SampleReader, sound_files, sound_grid
from pipeline.evaluation.task import ACCURACY, FOLDS, Cache, Column, PreparedSet, Reading, Report, Task, option
from pipeline.evaluation.zero_shot import class_scores, classifier, prompt_vectors, zero_shot
from pipeline.loaders.readers import LabelReader
from pipeline.loaders.sample_figures import clip_grid, cloud_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 8
OF_MODEL = "model"


@dataclass(frozen=True, kw_only=True)
class Config(CloudOptions):
    """The options of a set."""

    classes: str = option("auto", "classes", CLASSES_HELP)
    templates: str = option(
        "auto",
        "templates",
        "Prompts: auto (the card's), imagenet (80 prompts), imagenet-simple (7), none, model (ActionCLIP's own), or a "
        "file of templates with {}.",
    )
    label: str = option("", "label", LABEL_HELP)
    medium: str = option(AUTO)
    """Medium to classify: auto (the first one that the model encodes and the data have), image, audio, video, points. A
    model of images reads videos by the mean of their frames, and every CLIP reads points by depth views."""
    clips: int = option(1)
    """Clips of a video at equal distances, 1 to 64, whose features are averaged; for models that read segments or
    windows of frames."""
    crops: int = option(1)
    """Crops of a video along its longer side, 1 or 3."""
    ensemble: Literal["vectors", "probabilities"] = option("vectors")
    """Several prompts of a class: vectors (their mean is the class, CLIP's protocol), or probabilities (the mean of the
    softmaxes over the classes, one for each prompt: ActionCLIP's protocol)."""
    fold: str = option("")
    """Key of the samples' json that holds the fold; the metrics are then means over the folds."""
    folds: str = option("")
    """Folds to evaluate, joined by +; empty for all of them."""

    def __post_init__(self) -> None:
        check_medium(self.medium)
        named = bool(self.fold or not self.folds)
        require(named, "folds", self.folds, "empty, or with fold=KEY, the key of the samples' json that holds the fold")


class ZeroShot(Task):
    """The nearest class vector."""

    report = Report(
        "zeroshot",
        "zero-shot",
        (*ACCURACY, FOLDS, Column("equal_top1", "equal weights"), Column("searched_samples", "searched on", ",.0f")),
    )
    help = "Zero-shot classification sets: dataset cards or snapshot folders; NAME=DATA gives a set a name of its own."
    rank = 0
    options = Config

    def check(self, model: object, one: PreparedSet) -> None:
        """Require an encoder of texts and of the set's medium."""
        model = seen_by_views(model, one.ready.clouds)
        require_text(model)
        check_views(model, one, medium_of_set(model, one, one.ready.medium))
        own = bool(one.ready.templates or getattr(model, "prompt_templates", ()))
        require(own, "templates", OF_MODEL, f"others for {type(model).__name__}, which has none of its own")

    def prepare(self, config: Config, data: Data, name: str) -> Labels:
        """Classes and templates."""
        labels = Labels(
            classes=read_classes(config.classes, data.card, name),
            templates=() if config.templates == OF_MODEL else read_templates(config.templates, data.card, name),
            label=label_key(config.label, data.card),
            medium=config.medium,
            fold=config.fold,
            folds=config.folds,
            ensemble=config.ensemble,
            clips=config.clips,
            crops=config.crops,
        )
        return replace(labels, clouds=config.cloud_setting(config.medium, data, labels))

    def run(self, model: Any, one: PreparedSet, reading: Reading, cache: Cache) -> dict[str, float]:
        """Accuracies. Class vectors are computed once for all sets with these classes and templates."""
        precision, seen = reading.evaluation_precision, seen_by_views(model, one.ready.clouds)
        medium = medium_of_set(seen, one, one.ready.medium)
        vectors = _class_vectors(model, one.ready, precision, cache)
        if isinstance(seen, PointClip):
            metrics: dict[str, float] = one.ready.clouds.run(model, one, reading, vectors)
            return metrics
        batches = labelled_batches(medium_reader(model, medium, **one.ready.views), one, reading)
        return zero_shot(model, batches, vectors, precision, medium)

    def figures(self, model: Any, one: PreparedSet, title: str) -> dict[str, "Figure"]:
        """``sounds``, ``clips`` or ``clouds``: spectrograms, frames or views of a few samples with the best class;
        nothing for images."""
        model = seen_by_views(model, one.ready.clouds)
        medium = medium_of_set(model, one, one.ready.medium)
        if medium == "image":
            return {}
        samples, captions, right = _predicted(model, one, medium)
        named, colours = f"{one.name} {title}: zero-shot".strip(), [RIGHT if hit else WRONG for hit in right]
        if medium == "video":
            return {"clips": clip_grid(samples, captions, colours, named)}
        if medium == "points":
            return {"clouds": cloud_grid(samples, captions, colours, named, model.points_reader())}
        return {"sounds": sound_grid(samples, captions, right, title=named)}

    def files(self, model: Any, one: PreparedSet) -> dict[str, bytes]:
        """The same sounds or clips to play; each name has the label and the best class. Of clouds, the weights of the
        views and the data of their search."""
        model = seen_by_views(model, one.ready.clouds)
        medium = medium_of_set(model, one, one.ready.medium)
        if medium in ("image", "points"):
            known = one.ready.clouds and one.ready.clouds.found
            return {"view_weights.json": known.to_json()} if known else {}
        samples, captions, _ = _predicted(model, one, medium)
        files = clip_files if medium == "video" else sound_files
        return files(zip(samples, captions, strict=True))


def _class_vectors(model: Any, labels: Labels, precision: str, cache: Cache) -> Tensor:
    texts = (labels.classes, _templates(model, labels))
    make = classifier if labels.ensemble == "vectors" else prompt_vectors
    if ("zero_shot", labels.ensemble, texts) not in cache:
        cache["zero_shot", labels.ensemble, texts] = make(model, *texts, precision)
    vectors: Tensor = cache["zero_shot", labels.ensemble, texts]
    return vectors


def _templates(model: Any, labels: Labels) -> tuple[str, ...]:
    """The set's templates, or the model's own."""
    return labels.templates or tuple(model.prompt_templates)


def _predicted(model: Any, one: PreparedSet, medium: str) -> tuple[list[Any], list[str], list[bool]]:
    """A few samples of a medium, with a caption of each (label, best class and its score), and whether it is right."""
    labels: Labels = one.ready
    label = LabelReader(classes=labels.classes, json_key=labels.label, evaluated=one.name)
    readers = (medium_reader(model, medium), label, SampleReader())
    (batch,) = evaluation_batches(one.samples(SHOWN, readers), readers, SHOWN, threads=2)
    vectors = _class_vectors(model, labels, "fp32", {})
    with inference(model) as device:
        best = class_scores(encode_inputs(model, medium, batch, device), vectors).cpu().max(dim=1)
    pairs = zip(batch["label"].tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
    captions, right = [], []
    for number, found, score in pairs:
        captions.append(f"{labels.classes[number]}, found {labels.classes[found]} ({score:.2f})")
        right.append(number == found)
    return batch[SampleReader.key], captions, right
