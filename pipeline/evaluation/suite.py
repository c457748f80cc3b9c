"""Evaluations by name: which sets, with which classes and prompts, and one call that runs them all on a model.

    prepared = Evaluations(zero_shot=("drawn_shapes", "imagenet=s3://bucket/imagenet-val")).prepare()
    evaluate(model, prepared)  ->  {"zeroshot/drawn_shapes/top1": 0.61, ..., "zeroshot/imagenet/chance": 0.001, ...}

Preparing reads cards and manifests, so a wrong name is known before a model is loaded.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Literal, Protocol, TypeVar, cast

import torch
import yaml
from torch import Tensor

from pipeline.config import require
from pipeline.dataset import Card, card_names, load_card
from pipeline.errors import DataError, SettingError
from pipeline.evaluation.data import Data, SnapshotData, open_data, readable_images
from pipeline.evaluation.detection import (
    IMAGES_AT_ONCE,
    Vocabulary,
    as_detector,
    evaluate_detection,
    grouped_vocabulary,
    open_vocabulary,
    published_vocabulary,
)
from pipeline.evaluation.encoder import Encoder
from pipeline.evaluation.retrieval import retrieval
from pipeline.evaluation.zero_shot import WithHead, classifier, own_head, zero_shot
from pipeline.loaders.classes import classes_of
from pipeline.loaders.images import ImageTransform
from pipeline.loaders.samples import UnreadableSample
from pipeline.loaders.text import caption_field, read_caption
from pipeline.models.detections import Detector
from pipeline.shards.objects import FIELD
from pipeline.shards.sample import Sample
from pipeline.shards.storage import Folder

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Texts = tuple[tuple[str, ...], tuple[str, ...]]
Kind = Literal["zero_shot", "retrieval", "classification", "detection"]

PREFIX: Mapping[Kind, str] = {
    "zero_shot": "zeroshot",
    "retrieval": "retrieval",
    "classification": "classification",
    "detection": "det",
}
IMAGENET = ("imagenet", "imagenet_v2", "imagenet_sketch")  # the sets with all of ImageNet's 1,000 classes
DEFAULT_TEMPLATES = ("a photo of a {}.",)  # section 3.1.4 of the CLIP paper
CLASSES = "auto, imagenet, or a file with one name a line (or a YAML or JSON list)"
WORDS = "auto, a dataset card, an annotation file of COCO or LVIS, or a file with one word a line"
TEMPLATES = "auto, imagenet (80), imagenet-simple (7), none, or a file with one template a line"


class Evaluable(Encoder, Protocol):
    """An encoder that says how images become its input; every method here is one."""

    def transforms(self, train: bool) -> ImageTransform:
        """``train=False``: the transform of evaluation."""
        ...


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """One set. ``data`` is a dataset card's name or YAML file, or the folder of a snapshot, ``folder[@id]``."""

    name: str
    data: str
    kind: Kind
    samples: int | None = None
    classes: str = "auto"
    templates: str = "auto"
    label: str = ""
    caption: str = "auto"
    words: str = "auto"

    def __post_init__(self) -> None:
        plain = bool(re.fullmatch(r"[\w.\-]+", self.name))
        require(plain, "name", self.name, "letters, digits, '.', '_' and '-' (it is part of the metrics' names)")
        require(self.samples is None or self.samples > 0, "samples", self.samples, "1 or more")
        if self.caption != "auto":
            caption_field(self.caption)


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """Which sets are evaluated, and how."""

    zero_shot: tuple[str, ...] = ()
    """Classification sets: dataset cards or snapshot folders; NAME=DATA gives a set a name of its own."""
    retrieval: tuple[str, ...] = ()
    """Retrieval sets, named in the same way."""
    classification: tuple[str, ...] = ()
    """Classification sets for the own head of a fine-tuned model, named in the same way."""
    detection: tuple[str, ...] = ()
    """Sets with boxes (and masks) for a detector, named in the same way."""
    evaluation_samples: int | None = None
    """Samples of each set, taken at equal distances; all of them where it is not given."""
    classes: str = "auto"
    """Class names: auto (the card's, or ImageNet's for a set named imagenet), imagenet, or a file of names."""
    templates: str = "auto"
    """Prompts: auto (the card's), imagenet (80 prompts), imagenet-simple (7), none, or a file of templates with {}."""
    label: str = ""
    """Key of the samples' json that holds the class; empty for the card's; cls for webdataset's member .cls."""
    retrieval_caption: str = "auto"
    """Where captions are: auto (the list `captions` of the samples' json, else their txt), txt, or json:KEY."""
    detection_words: str = "auto"
    """Words looked for: auto (the classes of the data's card, or of the snapshot), a card, COCO's or LVIS's annotation
    JSON, or a file of words."""
    evaluation_batch: int = 64
    """Images encoded at a time."""
    evaluation_precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the towers; similarities are always fp32."""
    evaluation_threads: int = 4
    """Threads that decode images."""

    def __post_init__(self) -> None:
        require(
            self.evaluation_samples is None or self.evaluation_samples > 0,
            "evaluation_samples",
            self.evaluation_samples,
            "1 or more",
        )
        require(1 <= self.evaluation_batch <= 65_536, "evaluation_batch", self.evaluation_batch, "1 to 65,536")
        require(1 <= self.evaluation_threads <= 256, "evaluation_threads", self.evaluation_threads, "1 to 256")
        for kind in PREFIX:
            names = [one.name for one in self.sets() if one.kind == kind]
            require(len(set(names)) == len(names), kind, names, "sets with different names (NAME=DATA names one)")

    def sets(self) -> tuple[EvaluationSet, ...]:
        """The sets, classification first."""
        asked: tuple[tuple[Kind, str], ...] = (
            *(("zero_shot", text) for text in self.zero_shot),
            *(("retrieval", text) for text in self.retrieval),
            *(("classification", text) for text in self.classification),
            *(("detection", text) for text in self.detection),
        )
        return tuple(self._set(kind, text) for kind, text in asked)

    def prepare(self) -> "Prepared":
        """Read cards, manifests, class and template files.

        Raises:
            SettingError: an unknown set, a set without classes, a template without ``{}``.
            DataError: a broken snapshot.
        """
        return Prepared(self, tuple(prepare(one) for one in self.sets()))

    def _set(self, kind: Kind, text: str) -> EvaluationSet:
        name, data = name_and_data(text)
        return EvaluationSet(
            name=name,
            data=data,
            kind=kind,
            samples=self.evaluation_samples,
            classes=self.classes,
            templates=self.templates,
            label=self.label,
            caption=self.retrieval_caption,
            words=self.detection_words,
        )


@dataclass(frozen=True)
class PreparedSet:
    """A set with its data found and its classes read; ``classes`` and ``templates`` are empty for retrieval and for
    detection, which has a ``vocabulary``."""

    name: str
    kind: Kind
    data: Data
    limit: int | None
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    label: str
    caption: str
    vocabulary: Vocabulary | None = None

    def samples(self) -> Iterator[Sample]:
        """The samples to evaluate on."""
        return self.data.samples(self.limit)


@dataclass(frozen=True)
class Prepared:
    """All that :func:`evaluate` needs besides a model."""

    settings: Evaluations
    sets: tuple[PreparedSet, ...]


def prepare(wanted: EvaluationSet) -> PreparedSet:
    """Find the data, classes and templates of one set; raises as :meth:`Evaluations.prepare`."""
    data = open_data(wanted.data)
    card = data.card
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    if wanted.kind == "detection":
        return _with_boxes(wanted, data)
    if wanted.kind != "retrieval":
        classes = read_classes(wanted.classes, card, wanted.name)
        templates = read_templates(wanted.templates, card, wanted.name)
    label = wanted.label or (card.label if card else "label")
    return PreparedSet(wanted.name, wanted.kind, data, wanted.samples, classes, templates, label, wanted.caption)


def _with_boxes(wanted: EvaluationSet, data: Data) -> PreparedSet:
    if isinstance(data, SnapshotData):
        fields = data.snapshot.fields
        require(FIELD in fields, "detection", wanted.data, f"data with boxes, {FIELD}; this has {', '.join(fields)}")
    told = classes_of(data.snapshot) if isinstance(data, SnapshotData) else {}
    if wanted.words == "auto" and told and not (data.card and data.card.classes):
        vocabulary = grouped_vocabulary(told)
    else:
        vocabulary = read_vocabulary(wanted.words, data.card, wanted.name)
    return PreparedSet(wanted.name, wanted.kind, data, wanted.samples, (), (), "", "", vocabulary)


def read_vocabulary(setting: str, card: Card | None, name: str) -> Vocabulary:
    """The words that ``setting`` means for a detection set with this card and name.

    Raises:
        SettingError: none of :data:`WORDS`, a word twice, or one that is base and novel.
    """
    if setting in card_names():
        card, setting = load_card(setting), "auto"
    if setting == "auto":
        if card is None or not card.classes:
            raise SettingError("detection_words", setting, f"for {name}, whose card has no classes: {WORDS}")
        return card_vocabulary(card)
    if setting.endswith(".json"):
        record = _json_of("detection_words", setting, WORDS)
        if isinstance(record, dict):
            return published_vocabulary(record, setting)
    return Vocabulary(_lines_of("detection_words", setting, WORDS))


def card_vocabulary(card: Card) -> Vocabulary:
    """The classes of ``card``: its novel ones, and the others as base; nothing is base where none is novel."""
    base = [word for word in card.classes if word not in card.novel]
    return open_vocabulary(base, card.novel) if card.novel else Vocabulary(card.classes)


def read_classes(setting: str, card: Card | None, name: str) -> tuple[str, ...]:
    """The class names that ``setting`` means for a set with this card and name."""
    if setting == "imagenet" or (setting == "auto" and not (card and card.classes) and name in IMAGENET):
        from open_clip import IMAGENET_CLASSNAMES

        return tuple(IMAGENET_CLASSNAMES)
    if setting == "auto":
        if card is None or not card.classes:
            raise SettingError("classes", setting, f"for {name}, which has no card with classes: {CLASSES}")
        return card.classes
    return _lines_of("classes", setting, CLASSES)


def read_templates(setting: str, card: Card | None, name: str) -> tuple[str, ...]:
    """The prompt templates that ``setting`` means, each with one ``{}``."""
    if setting == "none":
        return ("{}",)
    own = card.templates if card else ()
    if setting in ("imagenet", "imagenet-simple") or (setting == "auto" and not own and name in IMAGENET):
        from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        chosen = SIMPLE_IMAGENET_TEMPLATES if setting == "imagenet-simple" else OPENAI_IMAGENET_TEMPLATES
        return tuple(template("{}") for template in chosen)
    if setting == "auto":
        return own or DEFAULT_TEMPLATES
    templates = _lines_of("templates", setting, TEMPLATES)
    for template in templates:
        require(template.count("{}") == 1, f"templates in {setting}", template, "exactly one {} for the class name")
    return templates


def evaluate(model: object, prepared: Prepared) -> dict[str, float]:
    """Run all sets: ``{"zeroshot/<set>/top1": ..., "retrieval/<set>/i2t_r1": ..., "det/<set>/ap_novel": ...}``.

    Class vectors are made once where sets share classes and templates.

    Raises:
        SettingError: the model cannot do what a set needs.
        DataError: no readable sample, a label that is none of the classes, a damaged shard.
    """
    vectors: dict[Texts, Tensor] = {}
    metrics: dict[str, float] = {}
    for one in prepared.sets:  # all of them before the first takes its hours
        (as_encoder if one.vocabulary is None else as_detector)(model, type(model).__name__)
    for one in prepared.sets:
        if one.vocabulary is None:
            found = _image_text(cast(Evaluable, model), one, prepared.settings, vectors)
        else:
            found = _detection(cast(Detector, model), one, one.vocabulary, prepared.settings)
        logger.info("%s %s: %s", PREFIX[one.kind], one.name, ", ".join(f"{k} {v:.4g}" for k, v in found.items()))
        metrics |= {f"{PREFIX[one.kind]}/{one.name}/{name}": value for name, value in found.items()}
    return metrics


def _image_text(
    model: Evaluable, one: PreparedSet, settings: Evaluations, vectors: dict[Texts, Tensor]
) -> dict[str, float]:
    precision = settings.evaluation_precision
    if one.kind == "retrieval":
        return retrieval(model, captioned_batches(model, one, settings), precision)
    batches = labelled_batches(model.transforms(train=False), one, settings)
    if one.kind == "classification":
        return own_head(_with_head(model, one), batches, one.classes, precision)
    texts = (one.classes, one.templates)
    if texts not in vectors:
        vectors[texts] = classifier(model, *texts, precision)
    return zero_shot(model, batches, vectors[texts], precision)


def _detection(model: Detector, one: PreparedSet, words: Vocabulary, settings: Evaluations) -> dict[str, float]:
    return evaluate_detection(
        model,
        one.samples(),
        words,
        batch=min(settings.evaluation_batch, IMAGES_AT_ONCE),
        threads=settings.evaluation_threads,
        precision=settings.evaluation_precision,
    )


def as_encoder(model: object, address: str) -> Evaluable:
    """``model``, if it encodes images and texts; raises ``SettingError`` if not."""
    both = all(callable(getattr(model, name, None)) for name in ("encode_image", "encode_text"))
    require(both, "checkpoint", address, "a model that encodes images and texts")
    return cast(Evaluable, model)


def _with_head(model: Evaluable, one: PreparedSet) -> WithHead:
    has = callable(getattr(model, "classify", None))
    require(has, "classification", one.name, "none, since the model has no head: jobs/finetune.py trains one")
    return cast(WithHead, model)


def labelled_batches(transform: ImageTransform, one: PreparedSet, settings: Evaluations) -> Iterator[dict[str, Tensor]]:
    """``image`` uint8 ``[B, 3, H, W]`` and ``label`` int64 ``[B]`` for :func:`zero_shot`."""
    number = {name: place for place, name in reversed(list(enumerate(one.classes)))}
    read = readable_images(
        one.samples(),
        transform,
        lambda sample: read_label(sample, one.label),
        settings.evaluation_threads,
    )
    for rows in _chunks(read, settings.evaluation_batch):
        labels = [_class_number(label, number, len(one.classes)) for _, label in rows]
        unknown = sorted({str(label) for (_, label), found in zip(rows, labels, strict=True) if found is None})
        if unknown:
            raise DataError(
                f"{one.name}: {_some(unknown)} in the samples' {one.label!r} is none of the {len(one.classes)} classes "
                f"({_some(one.classes)}); say where the class is with --label, or bring the names with --classes"
            )
        yield {"image": torch.stack([image for image, _ in rows]), "label": torch.tensor(labels)}


def captioned_batches(model: Evaluable, one: PreparedSet, settings: Evaluations) -> Iterator[dict[str, Tensor]]:
    """``image`` uint8 ``[B, 3, H, W]``, ``text`` int64 ``[T, L]``, ``owner`` int64 ``[T]`` for :func:`retrieval`."""
    read = readable_images(
        one.samples(),
        model.transforms(train=False),
        lambda sample: read_captions(sample, one.caption),
        settings.evaluation_threads,
    )
    for rows in _chunks(read, settings.evaluation_batch):
        captions = [caption for _, captions in rows for caption in captions]
        owners = [place for place, (_, captions) in enumerate(rows) for _ in captions]
        yield {
            "image": torch.stack([image for image, _ in rows]),
            "text": model.tokenizer(captions),
            "owner": torch.tensor(owners),
        }


def read_label(sample: Sample, key: str) -> str | int:
    """The class in the sample's json under ``key``; ``cls`` is webdataset's member with a class number.

    Raises:
        DataError: there is none; the keys that exist are listed.
    """
    if key == "cls" and "cls" in sample.fields:
        text = sample.fields["cls"].decode("utf-8", errors="replace").strip()
        return int(text) if text.isdigit() else text
    record = _record(sample)
    value = record.get(key)
    if isinstance(value, str | int) and not isinstance(value, bool):
        return value
    raise DataError(f"sample {sample.key} has no class under {key!r} in its json; its keys: {_some(sorted(record))}")


def read_captions(sample: Sample, where: str = "auto") -> list[str]:
    """All captions: the list ``captions`` of the json where there is one, else the text; or what ``where`` names.

    Raises:
        UnreadableSample: the sample has no caption.
    """
    several = _record(sample).get("captions") if where == "auto" else None
    texts = several if isinstance(several, list) else [read_caption(sample, "txt" if where == "auto" else where)]
    captions = [text for text in texts if isinstance(text, str) and text.strip()]
    if not captions:
        raise UnreadableSample(f"{sample.key} has no caption")
    return captions


def _record(sample: Sample) -> dict[str, object]:
    try:
        record = json.loads(sample.fields.get("json", b"{}"))
    except ValueError as error:
        raise UnreadableSample(f"{sample.key}.json is no JSON") from error
    return record if isinstance(record, dict) else {}


def _class_number(label: str | int, number: Mapping[str, int], classes: int) -> int | None:
    """The place of a class name; a number that is no name is a place itself."""
    if str(label) in number:
        return number[str(label)]
    return label if isinstance(label, int) and 0 <= label < classes else None


def name_and_data(text: str) -> tuple[str, str]:
    """``("val", "s3://bucket/val@1")`` of ``s3://bucket/val@1``, ``("it", "drawn_shapes")`` of ``it=drawn_shapes``."""
    name, named, data = text.partition("=") if re.match(r"[\w.\-]+=", text) else ("", "", text)
    last = PurePosixPath(data.rstrip("/")).name
    own = re.sub(r"[^\w.\-]", "-", last.removesuffix(".yaml").removesuffix(".yml").partition("@")[0])
    return (name if named else own), data


def _json_of(field: str, place: str, allowed: str) -> object:
    try:
        return json.loads(_text_of(field, place, allowed))
    except ValueError as error:  # annotation files are large: PyYAML would take minutes
        raise SettingError(field, place, f"well-formed JSON ({error})") from error


def _text_of(field: str, place: str, allowed: str) -> str:
    folder, _, name = place.rpartition("/")
    try:
        return Folder(folder or ("/" if place.startswith("/") else ".")).read_text(name)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise SettingError(field, place, f"{allowed} ({error})") from error


def _lines_of(field: str, place: str, allowed: str) -> tuple[str, ...]:
    text = _text_of(field, place, allowed)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if place.endswith((".yaml", ".yml", ".json")):
        lines = _list_of(field, place, text)
    require(bool(lines), field, place, "a file that is not empty")
    return tuple(lines)


def _list_of(field: str, place: str, text: str) -> list[str]:
    try:
        plain = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingError(field, place, f"well-formed YAML or JSON ({error})") from error
    if not isinstance(plain, list) or not all(isinstance(line, str) for line in plain):
        raise SettingError(field, place, "a YAML or JSON file that is a list of texts")
    return plain


def _some(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(map(repr, names[:count])) + (", ..." if len(names) > count else "")


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
