"""COCO and LVIS as published: an annotation file, and the images in a folder or on the web.

    jobs/refresh_dataset.py coco --annotations instances_train2017.json --images train2017 --output-folder coco

Each image becomes a sample with ``boxes.json`` (see ``shards/objects.py``): boxes, polygons, run lengths and crowds
with the numbers of the file, and LVIS's lists of absent and not exhaustively annotated classes. Planning parses the
file once and writes a table to the scratch folder, with one row group per slice. Workers read their slice from it.

``keep`` filters annotations, not images: an open-vocabulary detector is trained on images whose novel objects have no
boxes. A dataset card, or LVIS's frequency (rare), defines the novel classes. ``with_objects`` leaves out the images
without remaining annotations, as the usual split of COCO into 48 base and 17 novel classes does.
"""

import hashlib
import json
import logging
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any, ClassVar, Literal

import pyarrow as pa
from PIL import ExifTags, Image

from pipeline.config import require
from pipeline.dataset import load_card
from pipeline.errors import DataError, SampleError, missing
from pipeline.shards.objects import FIELD, MOST_OBJECTS, plain_word
from pipeline.shards.storage import Folder, file_stamp
from pipeline.sources.annotation_table import table_rows, table_slices
from pipeline.sources.coco_annotations import (
    AnnotatedImage,
    Annotations,
    Category,
    read_annotations,
    read_captions,
)
from pipeline.sources.source import UNCHANGED, Part, Row, Slice

logger = logging.getLogger(__name__)

RARE = "r"
_WEB = ("http://", "https://")
_TYPES: Mapping[str, pa.DataType] = {
    "url": pa.string(),
    "stamp": pa.string(),
    "caption": pa.string(),
    "image_id": pa.int64(),
    "objects": pa.int64(),
    "left_out": pa.int64(),
    "boxes": pa.binary(),
}
_SCHEMA = pa.schema(_TYPES)


@dataclass(frozen=True, kw_only=True)
class Coco:
    """The images of an annotation file, in the order of the file."""

    kind: ClassVar[str] = "coco"
    summary: ClassVar[str] = (
        "COCO's or LVIS's annotations and images; images are stored unchanged, since boxes are in their pixels."
    )
    image_options: ClassVar[Mapping[str, Any]] = UNCHANGED

    annotations: str
    """COCO's or LVIS's instances (JSON), as a path or fsspec URI."""
    images: str = ""
    """Folder of the images, as a path or fsspec URI that every worker can read, or a URL prefix (https://…);
    empty = download each image's coco_url."""
    captions: str = ""
    """COCO's captions (JSON); each image gets its first caption. Empty = no captions."""
    classes_of: str = ""
    """Dataset card of the classes to keep; annotations of other classes are left out. Empty = all categories."""
    keep: Literal["all", "base", "novel"] = "all"
    """Annotations to keep: all, or those of base or novel classes, by the card or by LVIS's frequency (rare)."""
    with_objects: bool = False
    """Keep only images with a kept annotation (crowds count), as Bansal et al. 2018 and OVR-CNN do."""

    def __post_init__(self) -> None:
        require(bool(self.annotations), "annotations", self.annotations, "COCO's or LVIS's instances (JSON)")

    @property
    def has_captions(self) -> bool:
        """Whether the samples get a ``txt`` field."""
        return bool(self.captions)

    @property
    def downloads(self) -> bool:
        """Whether the images are downloaded from the web."""
        return not self.images or self.images.startswith(_WEB)

    @cached_property
    def classes(self) -> Mapping[str, str]:
        """Kept class name (LVIS's with synonyms) to group, in the order of the category ids.

        The group is LVIS's frequency (r, c or f), the card's base or novel, or empty.
        """
        return self._groups(read_annotations(self.annotations))

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; holds the annotation file in memory, annotations as text.

        Raises:
            DataError: the annotations are inconsistent, or boxes cannot be x, y, width, height.
        """
        found = read_annotations(self.annotations)
        self.__dict__["classes"] = self._groups(found)  # as cached_property does; the file is not read again
        yield from table_slices(self._table_rows(found), _SCHEMA, rows_per_shard, scratch, self.images)

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`; an image that cannot be read is a row with a problem."""
        turned = 0
        for values in table_rows(piece):
            row = self._row(values)
            image = row.body("image")
            turned += image is not None and _is_turned(image)
            yield row
        if turned:
            message = "%s: %d of %d images have an EXIF orientation, and boxes are read in the pixels as stored; "
            advice = "if they were drawn on the images as displayed, use --apply-exif-orientation"
            logger.warning(message + advice, self.annotations, turned, piece.count)

    def schema(self) -> Mapping[str, type]:
        """``left_out`` counts unusable boxes; ``boxes_digest`` shows a refresh which annotations have changed."""
        return {"image_id": int, "objects": int, "left_out": int, "boxes_digest": str}

    @cached_property
    def _place(self) -> Folder:
        return Folder(self.images)

    def _groups(self, found: Annotations) -> dict[str, str]:
        """Name to group of the kept categories."""
        if self.classes_of:
            groups = self._card_groups(tuple(found.categories.values()))
        else:
            groups = {one.word: one.frequency for one in found.categories.values()}
        if self.keep == "all":
            return groups
        allowed = "all, or a card with novel classes in classes_of, or a file that says how frequent its classes are"
        require(any(groups.values()), "keep", self.keep, allowed)
        novel = self.keep == "novel"
        return {name: group for name, group in groups.items() if (group in (RARE, "novel")) == novel}

    def _card_groups(self, categories: Sequence[Category]) -> dict[str, str]:
        card = load_card(self.classes_of)
        known = {plain_word(category.name) for category in categories}
        missing = [name for name in card.classes if plain_word(name) not in known]
        allowed = f"a card with classes of {self.annotations}; it has no {', '.join(missing[:5]) or 'classes'}"
        require(bool(card.classes) and not missing, "classes_of", self.classes_of, allowed)
        novel = set(map(plain_word, card.novel))
        said = {plain_word(name): "base" if novel else "" for name in card.classes} | dict.fromkeys(novel, "novel")
        kept = {one.word: plain_word(one.name) for one in categories if plain_word(one.name) in said}
        return {one.word: said[kept[one.word]] or one.frequency for one in categories if one.word in kept}

    def _table_rows(self, found: Annotations) -> Iterator[dict[str, Any]]:
        captions = self._captions(found.images)
        files = None if self.downloads else self._files()
        urls = [self._url(image) for image in found.images] if files is None else self._paths(found.images, files)
        self._check_once(found.images, urls)
        missing = 0
        for image, url in zip(found.images, urls, strict=True):
            stamp = files.get(url, "") if files is not None else ""
            missing += files is not None and not stamp
            require(missing < len(found.images), "images", self.images, f"a folder with {url} and the others in it")
            count, boxes = self._boxes(image, found)
            if self.with_objects and not count:
                continue
            left_out = sum(found.left_out.get(image.id, {}).values())
            about = {"image_id": image.id, "objects": count, "left_out": left_out}
            yield {"url": url, "stamp": stamp, "caption": captions.get(image.id, ""), "boxes": boxes, **about}
        if files is not None:
            unnamed = len(files) - (len(found.images) - missing)
            message = "%s: %d images have no file in %s; %d files there are not in it"
            logger.info(message, self.annotations, missing, self.images, unnamed)

    def _captions(self, images: Sequence[AnnotatedImage]) -> dict[int, str]:
        """The captions by image id; a warning counts the images without one."""
        captions = read_captions(self.captions) if self.captions else {}
        without = sum(not captions.get(image.id) for image in images)
        if self.captions and without:
            logger.warning("%s: %d of %d images have no caption there", self.captions, without, len(images))
        return captions

    def _files(self) -> dict[str, str]:
        """Relative paths of all files in the folder, with their version stamps."""
        if self._place.kind() != "directory":
            raise missing("images", self.images)
        return {path: file_stamp(about) for path, about in self._place.find().items()}

    @staticmethod
    def _paths(images: Sequence[AnnotatedImage], files: Mapping[str, str]) -> list[str]:
        """The images' paths relative to the folder, all by the one rule that finds most files.

        The rules shorten the path of a record or of its url from the left. Were each image found by its own rule,
        the file of another image could be taken for a missing one.
        """
        best = max(_RULES, key=lambda rule: sum(rule(image) in files for image in images))
        return [best(image) or image.file or str(image.id) for image in images]

    def _check_once(self, images: Sequence[AnnotatedImage], urls: Sequence[str]) -> None:
        """Require a file of its own for each image: the objects of a file's other record would be missing from it."""
        first: dict[str, int] = {}
        for image, url in zip(images, urls, strict=True):
            if first.setdefault(url, image.id) != image.id:
                both = f"the images {first[url]} and {image.id} are both {url}"
                raise DataError(f"{self.annotations}: {both}: merge their annotations, or give each image its own file")

    def _url(self, image: AnnotatedImage) -> str:
        url = image.url
        if self.images:
            name = _slashed(image.file) or _last(image.url, 1)
            url = f"{self.images.rstrip('/')}/{name}" if name and ".." not in name.split("/") else ""
        if not url.startswith(_WEB):
            raise DataError(f"{self.annotations}: the image {image.id} has no address ({url or image.file!r})")
        return url

    def _boxes(self, image: AnnotatedImage, found: Annotations) -> tuple[int, bytes]:
        """Number of objects, and the content of the member ``boxes.json``."""
        names = {number: one.name for number, one in found.categories.items() if one.word in self.classes}
        annotations = [one for one in found.annotations.get(image.id, ()) if one.category in names]
        objects = ", ".join(f'{{"label": {json.dumps(names[one.category])}, {one.text[1:]}' for one in annotations)
        text = f'{{"width": {image.width}, "height": {image.height}, "objects": [{objects}]'
        if image.negative is not None and image.incomplete is not None:
            lists = (("negative", image.negative), ("incomplete", image.incomplete))
            for key, numbers in lists:
                text += f', "{key}": ' + json.dumps([names[number] for number in numbers if number in names])
        return len(annotations), (text + "}").encode()

    def _row(self, values: Mapping[str, Any]) -> Row:
        columns = {name: values[name] for name in ("image_id", "objects", "left_out")}
        columns["boxes_digest"] = hashlib.sha256(values["boxes"]).hexdigest()[:16]
        image, problem = None, None
        try:
            if values["objects"] > MOST_OBJECTS:
                raise SampleError("failed_to_resize", "too_many_objects", f"more than {MOST_OBJECTS} objects")
            if not self.downloads:
                # A name that the folder's listing does not have is never opened: it may lead out of the folder.
                if not values["stamp"]:
                    raise SampleError("failed_to_download", "unreadable", f"no file of this name in {self.images}")
                image = self._place.read_bytes(values["url"])
        except SampleError as error:
            problem = error
        except OSError as error:
            problem = SampleError("failed_to_download", "unreadable", f"cannot read the file: {error}")
        return Row(
            url=values["url"],
            caption=values["caption"],
            parts=(Part("image", image, url=values["url"]),),
            columns=columns,
            members={FIELD: values["boxes"]},
            problem=problem,
        )


def _is_turned(image: bytes) -> bool:
    """Whether a program that obeys EXIF displays the image turned or mirrored; a damaged one is not."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(BytesIO(image)) as opened:
            return opened.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except (OSError, ValueError, SyntaxError, LookupError, TypeError, ArithmeticError, struct.error):
        return False


def _slashed(path: str) -> str:
    """A path as Windows' tools write it, with slashes."""
    return path.replace("\\", "/").removeprefix("./")


def _last(path: str, parts: int) -> str:
    return "/".join(path.split("/")[-parts:])


_RULES: tuple[Callable[[AnnotatedImage], str], ...] = (
    lambda image: image.file,
    lambda image: _slashed(image.file),
    lambda image: _last(_slashed(image.file), 2),
    lambda image: _last(image.url, 2),
    lambda image: _last(_slashed(image.file), 1),
    lambda image: _last(image.url, 1),
)
