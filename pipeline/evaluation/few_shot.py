"""The protocols of few-shot papers: the choice of shots, the new classes, and the reported numbers.

Shots are sampled as in CoOp's code (Zhou et al. 2022, arXiv 2109.01134; its library Dassl). A generator with the seed
(1, 2 and 3 in the papers) samples ``shots`` images of every class without replacement, class by class in the order in
which the split first names them; then min(shots, 4) validation images of every class in the same way, or all
validation images, as in Tip-Adapter's code. A class with fewer images gives all of them. Base and new classes are those
of CoCoOp (arXiv 2203.05557, section 4.1): the first half of the labels, rounded up, and the rest.
"""

import logging
import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from pipeline.config import near, require
from pipeline.dataset import PARTS, Card, card_names, load_card
from pipeline.errors import DataError, SettingError, missing
from pipeline.evaluation.classes import DEFAULT_TEMPLATES
from pipeline.evaluation.data import PART_FOLDERS
from pipeline.evaluation.suite import name_and_data
from pipeline.shards.media import IMAGE, POINTS
from pipeline.shards.snapshot import read_snapshot, snapshot_ids
from pipeline.shards.storage import Folder
from pipeline.sources import open_source
from pipeline.sources.picked import Picked
from pipeline.sources.source import Source, media_of
from pipeline.sources.split_file import SplitFile
from pipeline.sources.stored import StoredSamples

logger = logging.getLogger(__name__)

Validation = Literal["few", "whole"]
"""Validation images: min(shots, 4) of every class (CoOp's code), or the whole validation split (Tip-Adapter's)."""
VALIDATION_SHOTS = 4
ROOTED = (SplitFile.kind, "hdf5-points")  # kinds whose folder is below --root
FEWEST = 4  # classes of base-to-new: two in each half


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set as its split lists it; its images are not read yet.

    ``sources`` has the options of each part's source, ``labels`` the class numbers of its rows in their order;
    ``classes`` the names of the numbers 0, 1, ...
    """

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    sources: Mapping[str, Mapping[str, Any]]
    labels: Mapping[str, tuple[int, ...]]
    medium: str = IMAGE.name
    """image or points."""


@dataclass(frozen=True)
class Drawing:
    """The sample of one seed: parts and row numbers of the shots and of the validation images."""

    train: tuple[tuple[str, int], ...]
    validation: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Halves:
    """Class numbers of the base classes and of the new ones, in order."""

    base: tuple[int, ...]
    new: tuple[int, ...]


def read_data_set(name: str, root: str = "", samples: int | None = None) -> DataSet:
    """Read the split of the card ``name``, or divide the data in the folder ``name``.

    Args:
        name: a dataset card's name or YAML file; or the folder of a snapshot, or a folder with one folder of images
            per class, both maybe as ``NAME=FOLDER``. A folder of classes may be divided into ``train``, ``val`` and
            ``test``; other data are divided as in CoOp's code: 50, 20 and 30 % of each class.
        root: folder that holds the data sets' own folders, for cards with split files.
        samples: images of each part of a drawn set, if not the card's own number.

    Raises:
        SettingError: an unknown card, a card without parts, a missing folder or split file, less than two classes,
            duplicate class names.
        DataError: an invalid split file.
    """
    called, place = name_and_data(name)
    if place not in card_names() and not place.endswith((".yaml", ".yml")):
        return _own_data_set(called, place)
    card = load_card(place)
    if card.few_shot is None:
        require(False, "data", name, "a card with `few_shot`, which defines the training and test parts")
        raise AssertionError
    sources = {part: _options(card, part, root, samples) for part in PARTS if part in card.few_shot.parts}
    (medium,) = {media_of(open_source(options))[0] for options in sources.values()}
    listed = {part: _listed(open_source(options), card) for part, options in sources.items()}
    classes, labels = _dense(card, listed)
    require(len(classes) > 1, "classes", classes, f"two class names or more, for {name}")
    doubled = next((one for one in classes if classes.count(one) > 1), None)
    allowed = f"distinct names; `renames` in the source of the card {name} can rename them"
    require(doubled is None, "classes", doubled, allowed)
    unseen = [classes[number] for number in sorted(set(range(len(classes))) - set(labels.get("train", ())))]
    if "train" in labels and unseen:
        logger.warning("%s: no training images of %d classes: %s", name, len(unseen), ", ".join(unseen[:10]))
    templates = card.few_shot.templates or card.templates or DEFAULT_TEMPLATES
    return DataSet(name=card.name, classes=classes, templates=templates, sources=sources, labels=labels, medium=medium)


def _own_data_set(name: str, place: str) -> DataSet:
    folder = Folder(place.partition("@")[0])
    if not folder.fs.isdir(folder.path):
        cards = card_names()
        allowed = f"a card with `few_shot`, a snapshot's folder, or a folder of class folders{near(place, cards)}"
        raise missing("data", place) if "/" in place else SettingError("data", place, allowed)
    medium = IMAGE.name
    card = None
    if snapshot_ids(folder):
        snapshot = read_snapshot(place)
        stored_fields = dict.fromkeys(snapshot.fields)
        medium = next((one for one in (IMAGE, POINTS) if one.field_of(stored_fields)), IMAGE).name
        card = load_card(snapshot.card) if snapshot.card in card_names() else None
        stored = StoredSamples(data=snapshot.uri, label=card.label if card else "label", medium=medium)
        parts = _divided({"kind": StoredSamples.kind, **asdict(stored)}, stored.labels())
    else:
        parts = _class_folders(folder)
    found = {label for _, labels in parts.values() for label in labels}
    classes = tuple(one for one in (card.classes if card else ()) if one in found) or tuple(sorted(found))
    require(len(classes) > 1, "classes", classes, f"two class names or more, for {place}")
    foreign = sorted(found - set(classes))
    require(not foreign, "data", foreign[:5], f"samples of the classes of the card {card.name if card else ''}")
    numbers = {label: number for number, label in enumerate(classes)}
    return DataSet(
        name=name,
        classes=classes,
        templates=(card.templates if card else ()) or DEFAULT_TEMPLATES,
        sources={part: options for part, (options, _) in parts.items()},
        labels={part: tuple(numbers[label] for label in labels) for part, (_, labels) in parts.items()},
        medium=medium,
    )


Parts = dict[str, tuple[Mapping[str, Any], list[str]]]


def _class_folders(folder: Folder) -> Parts:
    """The options and labels of each part of a folder of class folders."""
    plain = {"kind": SplitFile.kind, "folder": folder.uri, "format": "folders"}
    below = {PurePosixPath(str(entry["name"])).name for entry in folder.fs.ls(folder.path, detail=True)}
    named = {PART_FOLDERS[one]: one for one in sorted(below) if one in PART_FOLDERS}
    if "test" not in named and "val" in named:
        named["test"] = named.pop("val")
    if not {"train", "test"} <= named.keys():
        return _divided(plain, [item.name for item in SplitFile(folder=folder.uri, format="folders").items])
    parts: Parts = {}
    for part in (one for one in PARTS if one in named):
        source = SplitFile(folder=folder.uri, format="folders", pictures=named[part])
        parts[part] = {**plain, "pictures": named[part]}, [item.name for item in source.items]
    return parts


def _divided(options: Mapping[str, Any], labels: Sequence[str]) -> Parts:
    """50, 20 and 30 % of each class in a fixed random order; at least one image to train, then one to test."""
    groups: dict[str, list[int]] = {}
    for number, label in enumerate(labels):
        groups.setdefault(label, []).append(number)
    chosen: dict[str, list[int]] = {part: [] for part in PARTS}
    generator = random.Random(0)
    for _, group in sorted(groups.items()):
        generator.shuffle(group)
        train = max(1, round(0.5 * len(group)))
        train = train - 1 if train == len(group) > 1 else train
        val = min(round(0.2 * len(group)), max(0, len(group) - train - 1))
        chosen["train"] += group[:train]
        chosen["val"] += group[train : train + val]
        chosen["test"] += group[train + val :]
    parts: Parts = {}
    for part, numbers in chosen.items():
        if numbers:
            picked = {"kind": Picked.kind, "sources": [dict(options)], "numbers": [(0, one) for one in sorted(numbers)]}
            parts[part] = picked, [labels[one] for one in sorted(numbers)]
    return parts


def draw(data: DataSet, shots: int, seed: int, validation: Validation = "few") -> Drawing:
    """The shots and validation images of ``seed``; a class with fewer images gives all of them.

    If the data set has no validation images, they are sampled from the training images that are not shots.

    Raises:
        SettingError: no training images, no images are left for validation, or ``validation`` is ``whole`` for a data
            set without validation images.
    """
    require(shots >= 1, "shots", shots, "1 or more")
    require("train" in data.labels, "data", data.name, "a data set with training images; this one is for testing only")
    generator = random.Random(seed)
    labels = data.labels["train"]
    train = draw_numbers(labels, range(len(labels)), shots, generator)
    wanted = min(shots, VALIDATION_SHOTS)
    part = "val" if "val" in data.labels else "train"
    if validation == "whole":
        require(
            part == "val", "validation", validation, f"few for {data.name}, which has no validation images of its own"
        )
        every = tuple((part, number) for number in range(len(data.labels[part])))
        return Drawing(tuple(("train", one) for one in train), every)
    taken = set(train) if part == "train" else set()
    rest = [number for number in range(len(data.labels[part])) if number not in taken]
    held_out = draw_numbers(data.labels[part], rest, wanted, generator)
    allowed = f"fewer, so that images of {data.name} are left for validation"
    require(bool(held_out), "shots", shots, allowed)
    return Drawing(tuple(("train", one) for one in train), tuple((part, one) for one in held_out))


def draw_numbers(labels: Sequence[int], among: Iterable[int], shots: int, generator: random.Random) -> list[int]:
    """``shots`` of the rows ``among`` of every class without replacement, or all if there are fewer."""
    groups: dict[int, list[int]] = {}
    for number in among:
        groups.setdefault(labels[number], []).append(number)
    drawn = (group if len(group) < shots else generator.sample(group, shots) for group in groups.values())
    return [number for group in drawn for number in group]


def halves(classes: int) -> Halves:
    """Base and new class numbers.

    Raises:
        SettingError: fewer than four classes: each half needs two.
    """
    require(classes >= FEWEST, "classes", classes, f"{FEWEST} classes or more, for base-to-new needs two in each half")
    base = -(-classes // 2)
    return Halves(tuple(range(base)), tuple(range(base, classes)))


def harmonic_mean(base: float, new: float) -> float:
    """2bn / (b + n), 0 if one of them is."""
    return 2 * base * new / (base + new) if base > 0 and new > 0 else 0.0


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation of a sample (n - 1); NaN for the deviation of one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def _options(card: Card, part: str, root: str, samples: int | None) -> dict[str, Any]:
    assert card.few_shot is not None
    options = {**card.source, **card.few_shot.parts[part]}
    if options["kind"] == "drawn" and samples is not None:
        options["samples"] = samples
    if options["kind"] in ROOTED and root:
        options["folder"] = Folder(root).join(str(options["folder"]))
    return options


def _listed(source: Source, card: Card) -> list[tuple[int | None, str]]:
    """Class number, if the source has one, and class name of every row."""
    if isinstance(source, SplitFile):
        by_name = source.format == "folders" and not source.split  # the names of all parts together are numbered
        return [(None if by_name else item.number, item.name) for item in source.items]
    labels: Callable[[], list[str]] | None = getattr(source, "labels", None)
    if labels is not None:
        return [(None, name) for name in labels()]
    raise DataError(f"{card.name}: the source {source.kind} has no fixed order of images, which a split needs")


def _dense(
    card: Card, listed: Mapping[str, list[tuple[int | None, str]]]
) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """Class names in the order of their numbers, and the rows' labels as indices into them.

    Classes without an image in any part are left out: ImageNet-A has 200 of ImageNet's classes.
    """
    unnumbered = {name for rows in listed.values() for number, name in rows if number is None}
    known = card.classes if unnumbered <= set(card.classes) else sorted(unnumbered)
    order = {name: number for number, name in enumerate(known)}
    names: dict[int, str] = {}
    numbers: dict[str, list[int]] = {}
    for part, rows in listed.items():
        numbers[part] = [order[name] if number is None else number for number, name in rows]
        for number, (_, name) in zip(numbers[part], rows, strict=True):
            if names.setdefault(number, name) != name:
                raise DataError(f"{card.name} calls the class {number} both {names[number]!r} and {name!r}")
    place = {number: at for at, number in enumerate(sorted(names))}
    labels = {part: tuple(place[number] for number in found) for part, found in numbers.items()}
    return tuple(names[number] for number in sorted(names)), labels
