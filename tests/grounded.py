"""Small snapshots with boxes, phrases and pseudo boxes, for the tests of grounding."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg

from pipeline.loaders.images import decode
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import write_sidecar
from pipeline.shards.snapshot import Shard, Snapshot, publish_shards
from pipeline.shards.storage import Folder, file_digest
from pipeline.shards.tar import TarWriter
from pipeline.stages.annotate.caption_phrases import CaptionPhrases, Span
from pipeline.stages.annotate.pseudo_box_maker import FoundBoxes
from pipeline.stages.annotate.pseudo_boxes import SCHEMA

SIDE = 64


def jpeg(height: int = SIDE, width: int = SIDE, seed: int = 0) -> bytes:
    """A noisy image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    encoded: bytes = simplejpeg.encode_jpeg(pixels, quality=90)
    return encoded


def obj(label: str, box: tuple[float, ...] = (8, 8, 16, 16), **more: Any) -> dict[str, Any]:
    """An entry of ``objects``; the box is x, y, width, height."""
    return {"label": label, "bbox": list(box), **more}


def grounded(objects: list[dict[str, Any]], key: str = "0", **more: Any) -> Sample:
    """A sample with an image and ``boxes.json``, with a caption where ``more`` has one."""
    record = {"width": SIDE, "height": SIDE, "objects": objects, **more}
    fields = {"jpg": jpeg(), "boxes.json": json.dumps(record).encode()}
    return Sample(key, fields | ({"txt": more["caption"].encode()} if "caption" in more else {}))


def row(
    key: str, caption: str, phrases: Sequence[tuple[int, int]], boxes: Sequence[Sequence[float]] = (), **more: Any
) -> dict[str, Any]:
    """A row of pseudo boxes, each of the phrase of its number modulo their count and with a score of 0.9."""
    plain = {"key": key, "height": SIDE, "width": SIDE, "captions": [caption]}
    spans = [{"caption": 0, "start": start, "end": end, "cut": False} for start, end in phrases]
    numbers = [number % len(phrases) for number in range(len(boxes))]
    flat = [float(value) for box in boxes for value in box]
    return {**plain, "phrases": spans, "boxes": flat, "scores": [0.9] * len(boxes), "phrase": numbers, **more}


def publish(
    place: Path,
    samples: Sequence[Sample],
    *,
    classes: Mapping[str, str] | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
    shard_size: int = 4,
) -> Snapshot:
    """A snapshot of ``samples``; with ``rows`` it has the sidecar ``boxes``."""
    place.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, first in enumerate(range(0, len(samples), shard_size)):
        part, path = samples[first : first + shard_size], place / f"{number:05d}.tar"
        with open(path, "wb") as file:
            writer = TarWriter(file)
            for one in part:
                writer.write(one)
            writer.close()
        shard = Shard(name=f"{number:05d}", samples=len(part), bytes=path.stat().st_size, sha256=file_digest(path))
        if rows is not None:
            table = pa.Table.from_pylist(list(rows[first : first + shard_size]), schema=SCHEMA)
            digest = write_sidecar(Folder(place), shard, "boxes", table, "teacher")
            shard = replace(shard, sidecars={"boxes": digest})
        shards.append(shard)
    fields = tuple(sorted(set.intersection(*(set(one.fields) for one in samples))))
    options = {} if classes is None else {"classes": dict(classes)}
    counts = {"rows": len(samples), "dropped": {}}
    return publish_shards(Folder(place), tuple(shards), fields=fields, card=None, options=options, **counts)


@dataclass
class LetterTeacher:
    """Finds each phrase in two boxes that depend on the image's size and the phrase's position, with a score by its
    length; a phrase of one letter is never found, and one behind character 30 is cut off."""

    maker: str = "letters"
    facts: dict[str, Any] = field(default_factory=lambda: {"teacher": "letters"})
    batches: list[list[str]] = field(default_factory=list)

    def prepare(self, image: bytes) -> tuple[int, int] | None:
        try:
            return decode(image).shape[:2]
        except UnreadableSample:
            return None

    def shape(self, image: tuple[int, int]) -> tuple[int, int]:
        return image

    def size(self, image: tuple[int, int]) -> tuple[int, int]:
        return image

    def length(self, caption: str) -> int:
        return len(caption)

    def ground(
        self, images: Sequence[tuple[int, int]], captions: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> list[FoundBoxes]:
        self.batches.append(list(captions))
        found = []
        for (height, width), some in zip(images, spans, strict=True):
            boxes, scores, owners = [], [], []
            for number, (start, end) in enumerate(some):
                if end - start > 1 and end <= 30:
                    boxes += [(start, 0, width, height), (start, 0, width + 9, height - 1), (0, 0, 4, 4)]
                    scores += [min(0.1 * (end - start), 1), 0.09 * (end - start), 0.05 * (end - start)]
                    owners += [number] * 3
            cut = tuple(end > 30 for _, end in some)
            plain = np.array(boxes, float).reshape(-1, 4)
            found.append(FoundBoxes(plain, np.array(scores, float), np.array(owners, np.int64), cut))
        return found


@dataclass(frozen=True)
class WordPhrases:
    """Every word is a phrase, and so are two unusable spans; captions are separated by a bar."""

    maker: str = "words"

    def of_shard(self, shard: Any) -> Any:
        def find(sample: Sample) -> list[CaptionPhrases]:
            found = []
            for text in sample.fields["txt"].decode().split("|") if "txt" in sample.fields else ():
                spans, start = [], 0
                for word in text.split(" "):
                    spans.append((start, start + len(word)))
                    start += len(word) + 1
                found.append(CaptionPhrases(text, [*spans, (5, 5), (90, 95)] if text else []))
            return found

        return find


def load_letters(threads: int) -> LetterTeacher:
    return LetterTeacher()
