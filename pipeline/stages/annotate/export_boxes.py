"""Boxes and phrases of a snapshot in the formats of other code: ODVG's lines, or MDETR's annotations.

Each shard becomes one file, ``00017.jsonl`` or ``00017.json``, beside ``images/00017/KEY.jpg``. A data set of boxes
with class names also gets ``label_map.json``, ``{"0": "person"}``. Hidden samples and crowds are left out, and repeated
samples occur once. An image with several captions has a record for each.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from pipeline.config import require
from pipeline.errors import DataError
from pipeline.shards.media import IMAGE
from pipeline.shards.objects import Objects, names_of, plain_word, read_objects
from pipeline.shards.sample import Sample
from pipeline.shards.selection import read_samples
from pipeline.shards.snapshot import Shard, Snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.pseudo_boxes import objects_of_row, read_pseudo_boxes
from pipeline.stages.shard_tasks import Workers, run_tasks

LABELS = "label_map.json"


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is written, and how."""

    format: Literal["odvg", "mdetr"] = "odvg"
    """odvg: one JSON object per line; mdetr: images and annotations in one JSON object per shard, captions only."""
    content: Literal["auto", "boxes", "captions"] = "auto"
    """boxes: boxes with class names; captions: captions with the boxes of their phrases; auto: captions where the
    labels are phrases, else boxes."""
    pseudo_boxes: str = ""
    """Sidecar of pseudo boxes to export in place of the boxes in the data; empty for those in the data."""
    least_score: float = 0.5
    """Minimum score of a pseudo box, 0 to 1."""
    images: bool = True
    """Write the images too."""

    def __post_init__(self) -> None:
        require(0 <= self.least_score <= 1, "least_score", self.least_score, "0 to 1")
        captions = self.format != "mdetr" or self.content != "boxes"
        require(captions, "content", self.content, "captions or auto: MDETR's annotations hold captions")


@dataclass(frozen=True, kw_only=True)
class BoxExport:
    """The boxes of ``snapshot`` as files in ``folder``; ``classes`` are the names of its classes."""

    snapshot: Snapshot
    folder: Folder
    classes: Sequence[str]
    options: ExportOptions

    def write(self, workers: Workers) -> int:
        """Write all files; returns the number of records.

        Raises:
            DataError: samples without boxes or with malformed ones, or of classes that ``classes`` do not name.
            SidecarError: the snapshot has no pseudo boxes of that name.
            StorageError: the file system or store failed.
        """
        if self.classes:
            names = {str(number): _name(name) for number, name in enumerate(self.classes)}
            self.folder.write_atomic(LABELS, json.dumps(names, ensure_ascii=False).encode())
        numbers = range(len(self.snapshot.shards))
        return sum(int(count) for _, count in run_tasks(self.write_shard, numbers, workers))

    def write_shard(self, number: int) -> str:
        """Write the file of one shard; returns its number of records, as text."""
        shard = self.snapshot.shards[number]
        found = list(self._samples(shard))
        if self.options.format == "odvg":
            records = [self._odvg(name, objects) for name, several in found for objects in several]
            lines = [json.dumps(record, ensure_ascii=False) for record in records]
            self.folder.write_atomic(f"{shard.name}.jsonl", "".join(f"{line}\n" for line in lines).encode())
        else:
            first = ([0, *accumulate(one.samples for one in self.snapshot.shards)])[number]
            self.folder.write_atomic(f"{shard.name}.json", json.dumps(self._mdetr(found, first)).encode())
        return str(sum(len(several) for _, several in found))

    def _samples(self, shard: Shard) -> Iterator[tuple[str, list[Objects]]]:
        """The file names of the visible samples and the objects of each caption, each once; writes the images."""
        folder, name = Folder(self.snapshot.folder), self.options.pseudo_boxes
        rows = {row["key"]: row for row in read_pseudo_boxes(folder, shard, name)} if name else {}
        place, last = self.folder.folder(f"images/{shard.name}"), ""
        for sample in read_samples(folder, shard):
            if sample.key == last:
                continue
            last = sample.key
            records = self._records(sample, rows)
            if not records:
                continue
            ending = IMAGE.field_of(sample.fields) or "jpg"
            if self.options.images and ending in sample.fields:
                place.write_atomic(f"{sample.key}.{ending}", sample.fields[ending])
            yield f"images/{shard.name}/{sample.key}.{ending}", records

    def _records(self, sample: Sample, rows: Mapping[str, Mapping[str, Any]]) -> list[Objects]:
        """The objects with each of their captions, or of all of them once; none where the image was unreadable."""
        found = self._objects(sample, rows)
        if found is None:
            return []
        return [found.with_caption(n) for n in range(len(found.captions))] if self._captions(found) else [found]

    def _objects(self, sample: Sample, rows: Mapping[str, Mapping[str, Any]]) -> Objects | None:
        if not self.options.pseudo_boxes:
            return read_objects(sample)
        if sample.key not in rows:
            raise DataError(f"sample {sample.key} has no pseudo boxes of the name {self.options.pseudo_boxes}")
        return objects_of_row(rows[sample.key], self.options.least_score)

    def _captions(self, objects: Objects) -> bool:
        """Whether captions with phrases are written, not boxes with class names."""
        mdetr, content = self.options.format == "mdetr", self.options.content
        return mdetr or content == "captions" or (content == "auto" and objects.open_labels)

    def _odvg(self, name: str, objects: Objects) -> dict[str, Any]:
        sized = {"filename": name, "height": objects.height, "width": objects.width}
        if not self._captions(objects):
            return {**sized, "detection": {"instances": self._instances(objects)}}
        regions = []
        for phrase in objects.phrases:
            kept = [number for number in phrase.objects if not objects.crowd[number]]
            if kept:
                boxes = {"bbox": objects.boxes[kept].tolist(), "score": objects.scores[kept].tolist()}
                text = objects.caption[phrase.start : phrase.end]
                regions.append({**boxes, "phrase": text, "tokens_positive": [[phrase.start, phrase.end]]})
        teacher = {"teacher": objects.teacher} if objects.teacher else {}
        return {**sized, **teacher, "grounding": {"caption": objects.caption, "regions": regions}}

    def _instances(self, objects: Objects) -> list[dict[str, Any]]:
        numbers = {plain_word(name): number for number, name in enumerate(self.classes)}
        instances = []
        for number, label in enumerate(objects.labels):
            if objects.crowd[number]:
                continue
            place = numbers.get(plain_word(label))
            if place is None:
                known = "the data name no classes" if not numbers else f"it is none of {len(numbers)} classes"
                raise DataError(f"sample {objects.key} has an object {label!r}, but {known}")
            box = {"bbox": objects.boxes[number].tolist(), "label": place, "category": _name(self.classes[place])}
            instances.append(box)
        return instances

    def _mdetr(self, found: Sequence[tuple[str, Sequence[Objects]]], first: int) -> dict[str, Any]:
        images, annotations = [], []
        for sample, (name, several) in enumerate(found, start=first):
            for caption, objects in enumerate(several):
                # First captions have the numbers of their samples; each further caption those behind all of these.
                number = sample + caption * self.snapshot.samples
                about = {"id": number, "original_img_id": sample, "file_name": name, "caption": objects.caption}
                sized = {"height": objects.height, "width": objects.width, "dataset_name": self.snapshot.card or ""}
                images.append({**about, **sized, "tokens_negative": [[0, len(objects.caption)]]})
                annotations += _annotations(objects, number)
        # Numbers that no other shard has: a shard's objects follow its samples' numbers.
        numbered = [{"id": first * 10_000 + place, **one} for place, one in enumerate(annotations)]
        return {"images": images, "annotations": numbered, "categories": [{"id": 1, "name": "object"}]}


def _annotations(objects: Objects, image: int) -> list[dict[str, Any]]:
    """MDETR's annotations of the objects that a phrase names, without their numbers."""
    found = []
    for place, box in enumerate(objects.boxes):
        spans = [[one.start, one.end] for one in objects.phrases if place in one.objects]
        if spans:
            corner, size = box[:2].tolist(), (box[2:] - box[:2]).tolist()
            about = {"bbox": [*corner, *size], "area": size[0] * size[1], "category_id": 1}
            crowd = {"iscrowd": int(objects.crowd[place]), "score": float(objects.scores[place])}
            found.append({"image_id": image, "tokens_positive": spans, **about, **crowd})
    return found


def _name(label: str) -> str:
    return names_of(label)[0]
