"""Class names and prompts of a set, and the batches of a labelled set."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.config import parse_json, require
from pipeline.dataset import Card, card_names, load_card
from pipeline.errors import SettingError, unreadable
from pipeline.evaluation.data import evaluation_batches
from pipeline.evaluation.folds import FoldReader, of_folds
from pipeline.evaluation.media import medium_reader
from pipeline.evaluation.task import PreparedSet, Reading
from pipeline.loaders.batches import Reader
from pipeline.loaders.readers import LabelReader
from pipeline.shards.storage import Folder

IMAGENET = ("imagenet", "imagenet_v2", "imagenet_sketch")  # the sets with all of ImageNet's 1,000 classes
DEFAULT_TEMPLATES = ("a photo of a {}.",)  # section 3.1.4 of the CLIP paper
CLASSES = "auto, imagenet, a card such as drawn_shapes, or a file with one name a line (or a YAML or JSON list)"
TEMPLATES = "auto, imagenet (80), imagenet-simple (7), none, or a file with one template a line"
CLASSES_HELP = "Class names: auto (the card's, or ImageNet's for a set named imagenet), imagenet, a card, or a file."
LABEL_HELP = "Key of the samples' json that holds the class; empty for the card's; cls for webdataset's member .cls."


@dataclass(frozen=True)
class Labels:
    """The classes of a labelled set.

    ``label`` and ``fold`` are the keys of the class and of the fold in its samples; ``folds`` names those to evaluate.
    ``medium`` is the setting of :func:`pipeline.evaluation.media.medium_of_set`. Without ``templates`` they are the
    model's. ``ensemble`` is how templates are joined; ``clips`` and ``crops`` are the views of a video.
    """

    classes: tuple[str, ...]
    templates: tuple[str, ...]
    label: str
    medium: str = "auto"
    fold: str = ""
    folds: str = ""
    ensemble: str = "vectors"
    clips: int = 1
    crops: int = 1
    clouds: Any = None
    """The :class:`~pipeline.evaluation.point_clip.CloudSetting` of a set of point clouds."""

    @property
    def views(self) -> dict[str, int]:
        """The views of a video, where there are several."""
        return {} if self.clips == self.crops == 1 else {"clips": self.clips, "crops": self.crops}


def check_views(model: object, one: PreparedSet, medium: str) -> None:
    """Raise ``SettingError`` if the model cannot read the views that the options of a set name."""
    labels: Labels = one.ready
    if labels.views:
        require(medium == "video", f"{one.name}: clips, crops", (labels.clips, labels.crops), f"1 for {medium}")
        medium_reader(model, medium, **labels.views)


def label_key(setting: str, card: Card | None) -> str:
    """The label key for ``setting``, for a set with this card."""
    return setting or (card.label if card else "label")


def labelled_batches(reader: Reader, one: PreparedSet, reading: Reading) -> Iterator[dict[str, Any]]:
    """The key of ``reader``, ``label``, int64 ``[B]``, and ``fold`` with folds, of a set with :class:`Labels`."""
    labels: Labels = one.ready
    readers = [reader, LabelReader(classes=labels.classes, json_key=labels.label, evaluated=one.name)]
    samples = one.samples(readers=readers)
    if labels.fold:
        readers.append(FoldReader(json_key=labels.fold))
        samples = of_folds(samples, labels.fold, labels.folds)
    return evaluation_batches(samples, readers, reading.evaluation_batch, reading.evaluation_threads)


def read_classes(setting: str, card: Card | None, name: str) -> tuple[str, ...]:
    """The class names for ``setting``, for a set with this card and name."""
    if setting == "imagenet" or (setting == "auto" and not (card and card.classes) and name in IMAGENET):
        from open_clip import IMAGENET_CLASSNAMES

        return tuple(IMAGENET_CLASSNAMES)
    if setting in card_names():
        card, setting = load_card(setting), "auto"
    if setting == "auto":
        if card is None or not card.classes:
            raise SettingError("classes", setting, f"{CLASSES}; the data of {name} have no card with classes")
        return card.classes
    names = lines_of("classes", setting, CLASSES)
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    require(not twice, "classes", setting, f"a file with distinct names; twice there: {', '.join(twice[:5])}")
    return names


def read_templates(setting: str, card: Card | None, name: str) -> tuple[str, ...]:
    """The prompt templates for ``setting``, each with one ``{}``."""
    if setting == "none":
        return ("{}",)
    own = card.templates if card else ()
    if setting in ("imagenet", "imagenet-simple") or (setting == "auto" and not own and name in IMAGENET):
        from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        chosen = SIMPLE_IMAGENET_TEMPLATES if setting == "imagenet-simple" else OPENAI_IMAGENET_TEMPLATES
        return tuple(template("{}") for template in chosen)
    if setting == "auto":
        return own or DEFAULT_TEMPLATES
    templates = lines_of("templates", setting, TEMPLATES)
    for template in templates:
        require(template.count("{}") == 1, f"templates in {setting}", template, "exactly one {} for the class name")
    return templates


def json_of(field: str, place: str, allowed: str) -> object:
    """The content of the JSON file at ``place``; ``allowed`` completes the error about ``field`` if unreadable."""
    text = text_of(field, place, allowed)
    try:
        return parse_json(text)
    except ValueError as error:  # annotation files are large; PyYAML would take minutes
        raise unreadable(field, place, "well-formed JSON", error) from error


def text_of(field: str, place: str, allowed: str) -> str:
    """The text of the file at ``place``; other arguments as in :func:`json_of`."""
    folder, _, name = place.rpartition("/")
    try:
        return Folder(folder or ("/" if place.startswith("/") else ".")).read_text(name)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise unreadable(field, place, allowed, error) from error


def lines_of(field: str, place: str, allowed: str) -> tuple[str, ...]:
    """The lines of the file at ``place``, or the list in it; other arguments as in :func:`json_of`."""
    text = text_of(field, place, allowed)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if place.endswith((".yaml", ".yml", ".json")):
        lines = _list_of(field, place, text)
    require(bool(lines), field, place, "a file that is not empty")
    return tuple(lines)


def _list_of(field: str, place: str, text: str) -> list[str]:
    try:
        plain = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise unreadable(field, place, "well-formed YAML or JSON", error) from error
    if not isinstance(plain, list):
        raise SettingError(field, place, "a YAML or JSON file that is a list of texts")
    others = [line for line in plain if not isinstance(line, str)]  # YAML reads no, 007 and null as other values
    if others:
        raise SettingError(field, place, f"a list of texts, with {others[0]!r} in quotation marks if it is a name")
    return plain
