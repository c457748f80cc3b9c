"""Flickr30k Entities as published: sentences with marked phrases of a type each, and boxes of the entities.

Plummer, Wang, Cervantes, Caicedo, Hockenmaier, Lazebnik, 2015, arXiv 1505.04870

    Sentences/36979.txt     a line per caption: [/EN#1/people Two men] cut [/EN#2/other wood] .
    Annotations/36979.xml   the size of the image, and boxes with the numbers of their entities
    test.txt                the images of a split, a number per line

    jobs/refresh_dataset.py flickr30k-entities --annotations entities --images flickr30k-images \\
        --split entities/test.txt --output-folder flickr30k-test

Each sentence becomes one sample. The types of its phrases (people, clothing, bodyparts, animals, vehicles, instruments,
scene, other) are their kinds. Phrases of entities without a box are left out, as in the evaluation. Coordinates in the
files count pixels from 1, the last one included.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar
from xml.etree import ElementTree

from pipeline.config import require
from pipeline.errors import missing, unreadable
from pipeline.shards.storage import Folder, split_file
from pipeline.sources.annotated_files import AnnotatedFiles
from pipeline.sources.grounding_records import BAD, GroundedRegion, GroundingRecord, caption_record

SENTENCES, BOXES = "Sentences", "Annotations"
LARGEST = 4 << 20
"""Bytes of a file; those of the data set have a few thousand."""
_PHRASE = re.compile(r"\[/EN#(?P<entity>\w+)(?P<types>(?:/[^\s/\[\]]+)+) (?P<text>[^\[\]]*)\]")


@dataclass(frozen=True, kw_only=True)
class Flickr30kEntities(AnnotatedFiles):
    """The sentences of all images, or of those of a split."""

    kind: ClassVar[str] = "flickr30k-entities"
    summary: ClassVar[str] = (
        "Flickr30k Entities' sentences and boxes, with the types of phrases, and a folder of images."
    )

    annotations: str
    """Folder with Sentences and Annotations, as a path or fsspec URI."""
    split: str = ""
    """File with the numbers of the images to read, one per line; empty for all images."""

    def records(self) -> Iterator[tuple[str, GroundingRecord | Exception]]:
        """See :class:`~pipeline.sources.annotated_files.AnnotatedFiles`; one record per sentence."""
        folder = Folder(self.annotations)
        if folder.kind() != "directory":
            raise missing("annotations", self.annotations)
        names = self._names(folder)
        require(bool(names), "annotations", self.annotations, f"a folder with {SENTENCES} and {BOXES}")
        for name in names:
            try:
                size, boxes = _entities(_content(folder, f"{BOXES}/{name}.xml"))
                lines = _content(folder, f"{SENTENCES}/{name}.txt").decode("utf-8-sig").splitlines()
                records = [record_of_sentence(line, size, boxes) for line in lines if line.strip()]
            except (FileNotFoundError, ElementTree.ParseError, *BAD) as error:
                yield f"{name}.jpg", error
                continue
            yield from ((f"{name}.jpg", record) for record in records)

    def _names(self, folder: Folder) -> list[str]:
        if not self.split:
            files = folder.folder(SENTENCES).find()
            return sorted(path.removesuffix(".txt") for path in files if path.endswith(".txt"))
        place, file = split_file(self.split)
        try:
            text = place.read_text(file)
        except (FileNotFoundError, UnicodeDecodeError) as error:
            raise unreadable("split", self.split, "a file with the number of an image per line", error) from error
        names = [line.strip().removesuffix(".jpg") for line in text.splitlines() if line.strip()]
        odd = next((name for name in names if not re.fullmatch(r"\w+", name)), None)
        require(bool(names) and odd is None, "split", odd or self.split, "a file with the number of an image per line")
        return names


def record_of_sentence(
    sentence: str, size: tuple[int, int], boxes: Mapping[str, Sequence[Sequence[float]]]
) -> GroundingRecord:
    """The record of a marked sentence, for an image of ``size`` (height, width) and the boxes of its entities.

    Raises:
        ValueError: marks that are not as described.
    """
    caption, last = "", 0
    spans: dict[str, list[tuple[int, int]]] = defaultdict(list)
    kinds: dict[str, list[str]] = {}
    for match in _PHRASE.finditer(sentence):
        caption += sentence[last : match.start()]
        spans[match["entity"]].append((len(caption), len(caption) + len(match["text"])))
        kinds.setdefault(match["entity"], match["types"].split("/")[1:])
        caption, last = caption + match["text"], match.end()
    caption += sentence[last:]
    if "[/EN#" in caption:
        raise ValueError(f"marks of phrases in {caption[:80]!r}")
    regions = [GroundedRegion(boxes[one], spans[one], kinds=kinds[one]) for one in spans if one in boxes]
    return caption_record(*size, caption, regions)


def _entities(content: bytes) -> tuple[tuple[int, int], dict[str, list[list[float]]]]:
    """Height and width, and the boxes x1, y1, x2, y2 of each entity with boxes."""
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise ValueError("XML with definitions of its own")
    root = ElementTree.fromstring(content)
    size = int(root.findtext("size/height", "")), int(root.findtext("size/width", ""))
    boxes: dict[str, list[list[float]]] = defaultdict(list)
    for one in root.iterfind("object"):
        for box in one.iterfind("bndbox"):
            x1, y1, x2, y2 = (float(box.findtext(name, "")) for name in ("xmin", "ymin", "xmax", "ymax"))
            for name in one.iterfind("name"):
                boxes[str(name.text).strip()].append([x1 - 1, y1 - 1, x2, y2])
    return size, dict(boxes)


def _content(folder: Folder, name: str) -> bytes:
    content = folder.read_bytes(name)
    if len(content) > LARGEST:
        raise ValueError(f"{name} has {len(content)} bytes")
    return content
