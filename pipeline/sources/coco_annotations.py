"""Reading and validation of COCO and LVIS annotation files.

    {"images": [{"id", "width", "height", "file_name" and / or "coco_url"}, ...],
     "categories": [{"id", "name", LVIS: "frequency" of r, c or f, "synonyms"}, ...],
     "annotations": [{"image_id", "category_id", "bbox": [x, y, width, height], "segmentation", "iscrowd", ...}, ...]}

LVIS's images have ``neg_category_ids`` (verified absent) and ``not_exhaustive_category_ids`` (not all instances are
annotated). An inconsistent file is an error: a repeated id or name, an unknown id, boxes that cannot be x, y, width,
height. A single annotation with an unusable box is left out and counted by reason. An unusable segmentation is
removed from its annotation, which keeps its box, and counted by reason.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.errors import DataError, ReadError, SettingError, unreadable
from pipeline.shards.objects import SMALLEST, corners, inside, is_crowd, plain_word, word_of
from pipeline.shards.segmentation import MaskReason, checked
from pipeline.shards.storage import file_system, read_errors

logger = logging.getLogger(__name__)

KEPT = ("bbox", "iscrowd", "area", "id")
LONGEST_ID = 2**63
FREQUENCIES = ("r", "c", "f")
Reason = Literal["no_box", "no_area", "outside"]

_OUTSIDE_SHARE = 0.1
_FEW_UNFIT = 0.02  # share of broken boxes among corners
_FEW_OUTSIDE = 1.0  # pixels by which published boxes may stick out
_NORMALISED_FROM = 4  # boxes; fewer could all be below one pixel by chance


@dataclass(frozen=True, slots=True)
class CocoAnnotation:
    """An annotation: ``box`` is x1, y1, x2, y2 in pixels, float64 [4], or None where it is not four finite numbers.

    ``text`` is the JSON of the kept keys, with the published numbers; ``mask`` that of the segmentation, or empty.
    """

    image: int
    category: int
    box: NDArray[np.float64] | None
    text: str
    mask: str = ""


@dataclass(frozen=True, slots=True)
class AnnotatedImage:
    """An image record; ``file`` or ``url`` may be empty; ``negative`` and ``incomplete`` are None if not given."""

    id: int
    width: int
    height: int
    file: str
    url: str
    negative: tuple[int, ...] | None
    incomplete: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Category:
    """A class; ``frequency`` is LVIS's r, c or f, or empty; ``word`` holds the name and all synonyms."""

    id: int
    name: str
    frequency: str
    word: str


@dataclass(frozen=True)
class Annotations:
    """A file's content: images in file order, categories by id, usable annotations by image id."""

    images: tuple[AnnotatedImage, ...]
    categories: Mapping[int, Category]
    annotations: Mapping[int, Sequence[CocoAnnotation]]
    left_out: Mapping[int, Counter[Reason]]
    masks_left_out: Mapping[MaskReason, int] = field(default_factory=dict)


def read_annotations(uri: str) -> Annotations:
    """Read the annotation file at ``uri``, a path or fsspec URI; ``.gz`` is decompressed.

    Raises:
        SettingError: no file, or not an annotation file.
        DataError: the file is inconsistent.
    """
    content = _read(uri, ("images", "annotations", "categories"), "COCO's or LVIS's instances")
    try:
        images = tuple(_image(record) for record in content["images"])
        categories = tuple(_category(record) for record in content["categories"])
        annotations = [one if isinstance(one, CocoAnnotation) else _refused(one) for one in content["annotations"]]
    except KeyError as error:
        raise DataError(f"{uri} is not as COCO's files are (a record without {error})") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{uri} is not as COCO's files are ({error})") from error
    require(bool(images), "annotations", uri, "a file with at least one image")
    _check_ids(uri, images, categories, annotations)
    sizes = {image.id: (image.width, image.height) for image in images}
    _check_boxes(uri, annotations, sizes)
    kept, left_out = _usable(annotations, sizes)
    kept, masks = _with_masks(kept, sizes)
    for reason, count in sum(left_out.values(), Counter[Reason]()).most_common():
        logger.warning("%s: %d annotations left out (%s)", uri, count, reason)
    for mask_reason, count in masks.most_common():
        logger.warning("%s: %d segmentations left out (%s); their boxes are kept", uri, count, mask_reason)
    by_id = {one.id: one for one in sorted(categories, key=lambda one: one.id)}
    return Annotations(images, by_id, kept, left_out, masks)


def read_captions(uri: str) -> dict[int, str]:
    """The first caption of each image in a captions file, by image id.

    Raises:
        SettingError: no file, or not a captions file.
    """
    captions: dict[int, str] = {}
    for record in _read(uri, ("annotations",), "COCO's captions")["annotations"]:
        fits = isinstance(record, dict) and isinstance(record.get("caption"), str) and "image_id" in record
        require(fits, "captions", uri, "COCO's captions, each with image_id and caption")
        text = " ".join(record["caption"].split()).encode("utf-8", "replace").decode()
        try:
            captions.setdefault(_whole(record["image_id"]), text)
        except ValueError as error:
            raise SettingError("captions", uri, f"COCO's captions ({error})") from error
    return captions


def _read(uri: str, keys: Sequence[str], kind: str) -> dict[str, Any]:
    field = "captions" if "captions" in kind else "annotations"
    allowed = f"{kind}, a JSON file with " + ", ".join(keys)
    fs, path = file_system(uri)
    try:
        with read_errors(uri), fs.open(path, "rt", encoding="utf-8-sig", compression="infer") as file:
            content = json.load(file, object_hook=_compact)
    except ReadError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(field, uri, allowed, error) from error
    missing = [key for key in keys if not (isinstance(content, dict) and isinstance(content.get(key), list))]
    require(not missing, field, uri, f"{allowed}; it has no list {' and no list '.join(missing)}")
    found: dict[str, Any] = content
    return found


def _compact(record: dict[str, Any]) -> "dict[str, Any] | CocoAnnotation":
    """Keep annotations as JSON text while parsing: as Python objects, LVIS's would take ten times the memory."""
    if not record.keys() >= {"image_id", "category_id", "bbox"}:
        return record
    try:
        image, category = _whole(record["image_id"]), _whole(record["category_id"])
    except ValueError as error:
        raise DataError(f"an annotation of the image {record['image_id']!r}: {error}") from error
    try:
        box = corners(record["bbox"] if isinstance(record["bbox"], list) else ())
    except (ValueError, TypeError, OverflowError):  # not four numbers
        return CocoAnnotation(image, category, None, "")
    kept = {key: record[key] for key in KEPT if key in record}
    if "iscrowd" in kept:
        kept["iscrowd"] = int(is_crowd(kept["iscrowd"]))
    if not _is_finite(kept.get("area", 0.0)):
        del kept["area"]  # the box's is used
    text = json.dumps(kept) if np.isfinite(box).all() else ""
    mask = json.dumps(record["segmentation"]) if "segmentation" in record else ""
    return CocoAnnotation(image, category, box if text else None, text, mask)


def _whole(value: object) -> int:
    """An id: a whole number, also as text (``"17"``) or as 17.0; ``ValueError`` for others, or one beyond 64 bits."""
    number = value if type(value) is int else None
    if isinstance(value, float) and value.is_integer():
        number = int(value)
    if isinstance(value, str) and value.strip().isdecimal():
        number = int(value)
    if number is None or not -LONGEST_ID <= number < LONGEST_ID:
        raise ValueError(f"the id {value!r} is no whole number of at most 64 bits")
    return number


def _is_finite(value: object) -> bool:
    try:
        return math.isfinite(float(cast(Any, value)))
    except (TypeError, ValueError, OverflowError):
        return False


def _refused(record: Any) -> CocoAnnotation:
    raise DataError(f"the annotation {str(record)[:100]} has not image_id, category_id and bbox")


def _image(record: Mapping[str, Any]) -> AnnotatedImage:
    if not isinstance(record, dict):
        raise TypeError(f"the image {str(record)[:100]} is no object")
    width, height = _side(record, "width"), _side(record, "height")
    file, url = (str(record.get(key) or "") for key in ("file_name", "coco_url"))
    (file + url).encode()  # raises ValueError for a lone surrogate, which no file system can store
    negative, incomplete = (record.get(key) for key in ("neg_category_ids", "not_exhaustive_category_ids"))
    federated = negative is not None or incomplete is not None
    return AnnotatedImage(
        _whole(record["id"]),
        width,
        height,
        file,
        url,
        tuple(map(_whole, negative or ())) if federated else None,
        tuple(map(_whole, incomplete or ())) if federated else None,
    )


def _side(record: Mapping[str, Any], name: str) -> int:
    try:
        side = _whole(record.get(name))
    except ValueError:
        side = 0
    if side <= 0:
        raise ValueError(f"the image {record['id']} has the {name} {record.get(name)!r}, not a number of pixels")
    return side


def _category(record: Mapping[str, Any]) -> Category:
    if not isinstance(record, dict):
        raise TypeError(f"the category {str(record)[:100]} is no object")
    name, frequency = str(record["name"]), str(record.get("frequency") or "")
    if not name.strip() or frequency not in ("", *FREQUENCIES):
        raise ValueError(f"category {record['id']} called {name!r} of frequency {frequency!r}")
    return Category(_whole(record["id"]), name, frequency, class_word(record))


def class_word(record: Mapping[str, Any]) -> str:
    """Name and synonyms of a category record, ``couch; sofa``; raises ``TypeError`` if its synonyms are not a list."""
    synonyms = record.get("synonyms") or []
    if not isinstance(synonyms, list):
        raise TypeError(f"synonyms {synonyms!r}")
    return word_of([str(record["name"]), *map(str, synonyms)])


def _check_ids(
    uri: str, images: Sequence[AnnotatedImage], categories: Sequence[Category], annotations: Sequence[CocoAnnotation]
) -> None:
    _once(uri, "image id", (image.id for image in images))
    _once(uri, "category id", (category.id for category in categories))
    _once(uri, "category name", (plain_word(category.name) for category in categories))
    known, classes = {image.id for image in images}, {category.id for category in categories}
    _known(uri, "image id", (annotation.image for annotation in annotations), known)
    _known(uri, "category id", (annotation.category for annotation in annotations), classes)
    listed = (number for one in images for number in (*(one.negative or ()), *(one.incomplete or ())))
    _known(uri, "category id", listed, classes)


def _once(uri: str, what: str, values: Iterable[object]) -> None:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise DataError(f"{uri}: the {what} {repeated[0]!r} is there twice ({len(repeated)} such)")


def _known(uri: str, what: str, values: Iterable[object], known: set[int]) -> None:
    unknown = Counter(value for value in values if value not in known)
    if unknown:
        count, first = sum(unknown.values()), next(iter(unknown))
        raise DataError(f"{uri}: {count} annotations name an unknown {what}, such as {first!r}")


def _check_boxes(uri: str, annotations: Sequence[CocoAnnotation], sizes: Mapping[int, tuple[int, int]]) -> None:
    """Check that the boxes of the whole file are plausible as x, y, width, height in pixels."""
    known = [annotation for annotation in annotations if annotation.box is not None]
    if not known:
        return
    boxes = np.array([annotation.box for annotation in known])
    published = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    if len(boxes) >= _NORMALISED_FROM and (boxes >= 0).all() and (boxes <= 1 + 1e-6).all():
        raise DataError(f"{uri}: no box reaches beyond 1: they seem to be shares of the image's sides, not pixels")
    limits = np.array([sizes[annotation.image] for annotation in known]) + _FEW_OUTSIDE
    beyond = (boxes[:, 2:] > limits).any(axis=1)
    if beyond.mean() <= _OUTSIDE_SHARE:
        return
    said = f"{uri}: {beyond.sum()} of {len(boxes)} boxes reach out of their images as x, y, width, height"
    corners_fit = (published[:, 2:] >= published[:, :2]).all(axis=1) & (published[:, 2:] <= limits).all(axis=1)
    if (~corners_fit).mean() <= _FEW_UNFIT:
        few = (~corners_fit).sum() or "none"
        raise DataError(f"{said}, and {few} as x1, y1, x2, y2: write width and height in place of the second corner")
    raise DataError(f"{said}: they seem to be measured in images of another size than the file says")


def _usable(
    annotations: Iterable[CocoAnnotation], sizes: Mapping[int, tuple[int, int]]
) -> tuple[dict[int, list[CocoAnnotation]], dict[int, Counter[Reason]]]:
    kept: dict[int, list[CocoAnnotation]] = {}
    left_out: dict[int, Counter[Reason]] = {}
    for annotation in annotations:
        reason = _unusable(annotation, sizes[annotation.image])
        if reason is None:
            kept.setdefault(annotation.image, []).append(annotation)
        else:
            left_out.setdefault(annotation.image, Counter())[reason] += 1
    return kept, left_out


def _with_masks(
    kept: Mapping[int, Sequence[CocoAnnotation]], sizes: Mapping[int, tuple[int, int]]
) -> tuple[dict[int, list[CocoAnnotation]], Counter[MaskReason]]:
    """The annotations with their usable segmentations in ``text``, and the number of the others by reason."""
    left_out = Counter[MaskReason]()

    def joined(annotation: CocoAnnotation) -> CocoAnnotation:
        width, height = sizes[annotation.image]
        found = json.loads(annotation.mask or "null")
        mask, reason = checked(found, height, width)
        if reason is not None:
            left_out[reason] += 1
        if reason is not None or not annotation.mask:
            return replace(annotation, mask="")
        head, _, tail = annotation.text.partition("]")  # behind the box, as published
        written = annotation.mask if mask in (found, None) else json.dumps(mask)
        return replace(annotation, text=f'{head}], "segmentation": {written}{tail}', mask="")

    return {image: [joined(one) for one in some] for image, some in kept.items()}, left_out


def _unusable(annotation: CocoAnnotation, size: tuple[int, int]) -> Reason | None:
    if annotation.box is None:
        return "no_box"
    if not (annotation.box[2:] - annotation.box[:2] > SMALLEST).all():
        return "no_area"
    width, height = size
    return "outside" if inside(annotation.box, height, width) is None else None
