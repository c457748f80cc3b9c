"""MDETR's annotations of captions (GoldG: Flickr30k entities, the mixed set of COCO and Visual Genome).

    {"images": [{"id", "file_name", "height", "width", "caption", ...}, ...],
     "annotations": [{"image_id", "bbox": [x, y, width, height], "tokens_positive": [[begin, end], ...], ...}, ...]}

    jobs/refresh_dataset.py mdetr --annotations final_mixed_train.json --images gqa --output-folder mixed

Each image record has one caption and becomes one sample; Flickr30k's images occur five times. ``tokens_positive`` are
code points of the caption.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.config import require
from pipeline.errors import ReadError, unreadable
from pipeline.shards.objects import corners, is_crowd
from pipeline.shards.storage import file_system, read_errors
from pipeline.sources.annotated_files import AnnotatedFiles
from pipeline.sources.grounding_records import BAD, GroundedRegion, GroundingRecord, caption_record


@dataclass(frozen=True, kw_only=True)
class Mdetr(AnnotatedFiles):
    """The image records of a file, in its order."""

    kind: ClassVar[str] = "mdetr"
    summary: ClassVar[str] = "MDETR's annotations of captions with phrases (GoldG), and a folder of images."

    def records(self) -> Iterator[tuple[str, GroundingRecord | Exception]]:
        """See :class:`~pipeline.sources.annotated_files.AnnotatedFiles`; holds the file in memory, annotations as
        text."""
        content = self._content()
        regions: dict[Any, list[str]] = {}
        for text in content["annotations"]:
            require(isinstance(text, _Region), "annotations", self.annotations, ALLOWED)
            regions.setdefault(text.image, []).append(text.text)
        for number, image in enumerate(content["images"]):
            name = str(image.get("file_name", number)) if isinstance(image, dict) else str(number)
            try:
                yield name, _record(image, regions.get(image["id"], []))
            except BAD as error:
                yield name, error

    def _content(self) -> dict[str, Any]:
        fs, path = file_system(self.annotations)
        try:
            with (
                read_errors(self.annotations),
                fs.open(path, "rt", encoding="utf-8-sig", compression="infer") as file,
            ):
                content = json.load(file, object_hook=_compact)
        except ReadError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise unreadable("annotations", self.annotations, ALLOWED, error) from error
        lists = isinstance(content, dict) and all(
            isinstance(content.get(key), list) for key in ("images", "annotations")
        )
        require(lists and bool(content["images"]), "annotations", self.annotations, ALLOWED)
        found: dict[str, Any] = content
        return found


ALLOWED = "MDETR's annotations, a JSON file with images and their annotations"


@dataclass(frozen=True, slots=True)
class _Region:
    """An annotation of the image with the id ``image``, as JSON text: as Python objects it takes ten times as much."""

    image: Any
    text: str


def _compact(record: dict[str, Any]) -> "dict[str, Any] | _Region":
    if "image_id" not in record or "bbox" not in record:
        return record
    kept = {key: record[key] for key in ("bbox", "tokens_positive", "iscrowd", "score") if key in record}
    image = record["image_id"]
    return _Region(image if isinstance(image, str | int) else str(image), json.dumps(kept))


def _record(image: Any, texts: list[str]) -> GroundingRecord:
    return caption_record(
        int(image["height"]), int(image["width"]), str(image["caption"]), [_region(json.loads(text)) for text in texts]
    )


def _region(record: dict[str, Any]) -> GroundedRegion:
    try:
        box = corners(record["bbox"]).tolist()
    except BAD:
        box = None
    scores = [record["score"]] if "score" in record else ()
    return GroundedRegion([box], record.get("tokens_positive") or (), scores, is_crowd(record.get("iscrowd", 0)))
