"""Make the sidecar of pseudo boxes: a teacher finds the phrases of captions in their images.

An image is grounded with each of its captions. Images and captions of different sizes are batched together. Of those
that are read ahead, those of similar size and length are grounded together, so little is padded. The rows of the
sidecar keep the order of the tar. A teacher's result for an image does not depend on the others in its batch, so
neither do the boxes.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.errors import DataError
from pipeline.shards.objects import is_span, overlaps
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import FACTS
from pipeline.shards.snapshot import Shard, Snapshot
from pipeline.stages.annotate.annotator import Annotation, annotate
from pipeline.stages.annotate.caption_phrases import CaptionPhrases, PhrasesOf, PhraseSource, Span
from pipeline.stages.annotate.pseudo_boxes import NAME, SCHEMA, PseudoBoxCounts, counts_of_row
from pipeline.stages.shard_tasks import Workers

logger = logging.getLogger(__name__)

MOST_CANDIDATES = 1000
"""Boxes per phrase that non-maximum suppression compares, those with the highest scores."""


@dataclass(frozen=True)
class FoundBoxes:
    """The boxes of one image: ``boxes`` x1, y1, x2, y2 in pixels of the stored image, float64 [n, 4]; ``scores``
    float64 [n], 0 to 1; ``spans`` int64 [n], numbers of the requested spans.

    ``cut`` has a value for each requested span: whether the teacher's token limit cut it off.
    """

    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    spans: NDArray[np.int64]
    cut: tuple[bool, ...]


class GroundingTeacher(Protocol):
    """Interface of a model that finds phrases; ``maker`` is the digest of its weights and settings."""

    maker: str
    facts: Mapping[str, Any]
    """Metadata for readers, stored with the boxes."""

    def prepare(self, image: bytes) -> Any | None:
        """The decoded image, ``None`` if unreadable; called from many threads."""
        ...

    def shape(self, image: Any) -> tuple[int, int]:
        """Height and width of the stored image."""
        ...

    def size(self, image: Any) -> tuple[int, int]:
        """Height and width at which the model reads the image, padding included."""
        ...

    def length(self, caption: str) -> int:
        """The number of tokens of a caption."""
        ...

    def ground(
        self, images: Sequence[Any], captions: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> list[FoundBoxes]:
        """The boxes of the ``spans`` of each caption, in code points, in its image.

        The result for an image does not depend on the others.
        """
        ...


class MakeGroundingTeacher(Protocol):
    """Picklable function that loads the teacher in its worker process, for a number of CPU threads."""

    def __call__(self, threads: int) -> GroundingTeacher: ...


@dataclass(frozen=True, kw_only=True)
class PseudoBoxOptions:
    """Options of the pseudo boxes."""

    name: str = NAME
    """Name of the sidecar, a plain word; use one name per teacher to store boxes of several teachers."""
    least_score: float = 0.25
    """Minimum score of a stored box, 0 to 1; training can require a higher one."""
    overlap: float = 0.6
    """Intersection over union above which the lower-scoring box of the same phrase is removed, up to 1."""
    most: int = 100
    """Maximum number of boxes per caption, the highest-scoring ones, 1 or more."""
    smallest: float = 1.0
    """Minimum length of a box's shorter side, in pixels of the stored image, 0 or more."""
    batch_size: int = 16
    """Batch size in captions with their images, 1 or more."""
    batches_ahead: int = 8
    """Batches whose images are decoded together, to batch those of similar size and caption length, 1 or more."""
    overwrite: bool = False
    """Replace boxes of another teacher or of other settings."""

    def __post_init__(self) -> None:
        require(self.name.isidentifier(), "name", self.name, "a plain word")
        require(0 <= self.least_score <= 1, "least_score", self.least_score, "0 to 1")
        require(0 < self.overlap <= 1, "overlap", self.overlap, "more than 0, up to 1")
        require(self.smallest >= 0, "smallest", self.smallest, "0 pixels or more")
        for name in ("most", "batch_size", "batches_ahead"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")


def make_pseudo_boxes(
    snapshot: Snapshot,
    make: MakeGroundingTeacher,
    phrases: PhraseSource,
    options: PseudoBoxOptions,
    workers: Workers,
    use_gpu: bool | None = None,
) -> Snapshot:
    """Make the pseudo boxes of every shard and publish them; finished shards are not read again.

    Raises:
        SidecarError: the sidecar has boxes of another teacher or other settings, or that of the phrases is unusable.
        DataError: a damaged shard.
        StorageError: the store failed (run the same command to continue), or another job holds the folder's lease.
    """
    load = LoadPseudoBoxMaker(make, phrases, options)
    annotation = Annotation(name=options.name, overwrite=options.overwrite)
    return annotate(snapshot, load, annotation, workers, use_gpu)


@dataclass(frozen=True)
class LoadPseudoBoxMaker:
    """Load the annotator of pseudo boxes."""

    make: MakeGroundingTeacher
    phrases: PhraseSource
    options: PseudoBoxOptions

    def __call__(self, threads: int) -> "PseudoBoxMaker":
        return PseudoBoxMaker(self.make(threads), self.phrases, self.options, threads)


@dataclass
class _Read:
    """A sample that was read ahead: its captions with their usable phrases, and its image, which is being decoded."""

    key: str
    captions: list[CaptionPhrases]
    unusable: int
    image: "Future[Any] | None"


class PseudoBoxMaker:
    """Makes the table of pseudo boxes of a shard's samples; decodes ahead in ``threads`` threads."""

    def __init__(
        self, teacher: GroundingTeacher, phrases: PhraseSource, options: PseudoBoxOptions, threads: int
    ) -> None:
        self._teacher, self._phrases, self._options, self._threads = teacher, phrases, options, threads
        settings = {name: getattr(options, name) for name in ("least_score", "overlap", "most", "smallest")}
        self._facts = {**teacher.facts, "phrases": phrases.maker, **settings}
        self.maker = hashlib.sha256(repr((teacher.maker, phrases.maker, settings, SCHEMA.names)).encode()).hexdigest()

    def table(self, samples: Iterator[Sample], shard: Shard) -> pa.Table:
        """The sidecar's rows in the order of ``samples``, with the counts of the shard in its metadata."""
        parts, counts, phrases_of = [SCHEMA.empty_table()], PseudoBoxCounts(), self._phrases.of_shard(shard)
        with ThreadPoolExecutor(self._threads, thread_name_prefix="prepare") as pool:
            for window in self._windows(samples, phrases_of, pool):
                rows = self._rows(window)
                parts.append(pa.Table.from_pylist(rows, schema=SCHEMA))
                unusable = sum(one.unusable for one in window)
                counts += sum((counts_of_row(row) for row in rows), PseudoBoxCounts(unusable=unusable))
        logger.info("%s: %s", shard.name, counts)
        facts = {**self._facts, "counts": asdict(counts)}
        return pa.concat_tables(parts).replace_schema_metadata({FACTS: json.dumps(facts).encode()})

    def _windows(
        self, samples: Iterator[Sample], phrases_of: PhrasesOf, pool: ThreadPoolExecutor
    ) -> Iterator[list[_Read]]:
        """Runs of samples; the images of the next run are decoded while a run is grounded."""

        def begin(sample: Sample) -> _Read:
            found, content = phrases_of(sample), sample.image()
            usable = [CaptionPhrases(one.caption, _usable(one)) for one in found]
            unusable = sum(not is_span(*span, one.caption) for one in found for span in one.spans)
            image = None if content is None else pool.submit(self._teacher.prepare, content)
            return _Read(sample.key, usable, unusable, image)

        size = self._options.batch_size * self._options.batches_ahead
        ahead = [begin(sample) for sample in islice(samples, size)]
        while ahead:
            following = [begin(sample) for sample in islice(samples, size)]
            yield ahead
            ahead = following

    def _rows(self, window: Sequence[_Read]) -> list[dict[str, Any]]:
        teacher = self._teacher
        images = [None if one.image is None else one.image.result() for one in window]
        wanted = [
            (number, caption)
            for number, (one, image) in enumerate(zip(window, images, strict=True))
            if image is not None
            for caption, phrases in enumerate(one.captions)
            if phrases.spans
        ]
        texts = [window[number].captions[caption] for number, caption in wanted]
        sizes = [teacher.size(images[number]) for number, _ in wanted]
        lengths = [teacher.length(text.caption) for text in texts]
        found: dict[tuple[int, int], FoundBoxes] = {}
        for batch in length_buckets(sizes, lengths, self._options.batch_size):
            grounded = teacher.ground(
                [images[wanted[place][0]] for place in batch],
                [texts[place].caption for place in batch],
                [texts[place].spans for place in batch],
            )
            found |= dict(zip([wanted[place] for place in batch], grounded, strict=True))
        rows = enumerate(zip(window, images, strict=True))
        return [
            self._row(one, image, [found.get((number, caption)) for caption in range(len(one.captions))])
            for number, (one, image) in rows
        ]

    def _row(self, one: _Read, image: Any | None, found: Sequence[FoundBoxes | None]) -> dict[str, Any]:
        height, width = (0, 0) if image is None else self._teacher.shape(image)
        row: dict[str, Any] = {"key": one.key, "height": height, "width": width}
        row |= {"captions": [text.caption for text in one.captions], "phrases": []}
        row |= {"boxes": [], "scores": [], "phrase": []}
        for number, (text, boxes) in enumerate(zip(one.captions, found, strict=True)):
            first = len(row["phrases"])
            cut = (False,) * len(text.spans) if boxes is None else boxes.cut
            row["phrases"] += [
                {"caption": number, "start": start, "end": end, "cut": off}
                for (start, end), off in zip(text.spans, cut, strict=True)
            ]
            if boxes is not None:
                kept = kept_boxes(boxes, height, width, self._options)
                row["boxes"] += kept.boxes.astype(np.float32).ravel().tolist()
                row["scores"] += kept.scores.astype(np.float32).tolist()
                row["phrase"] += (kept.spans + first).tolist()
        return row


def _usable(text: CaptionPhrases) -> list[Span]:
    return sorted({span for span in text.spans if is_span(*span, text.caption)})


def length_buckets(sizes: Sequence[tuple[int, int]], lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of numbers of samples with similar image size and caption length: each number once."""
    order = sorted(range(len(sizes)), key=lambda number: (sizes[number], lengths[number], number))
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def padded_work(sizes: Sequence[tuple[int, int]], lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> int:
    """Pixels times tokens of all ``batches``, each padded to its largest height, width and length."""
    return sum(
        len(batch)
        * max(sizes[number][0] for number in batch)
        * max(sizes[number][1] for number in batch)
        * max(lengths[number] for number in batch)
        for batch in batches
    )


def kept_boxes(found: FoundBoxes, height: int, width: int, options: PseudoBoxOptions) -> FoundBoxes:
    """The boxes to store, the best first: clipped, large enough, with a sufficient score, without duplicates.

    Raises:
        DataError: a box of a span that was not requested.
    """
    if len(found.spans) and not 0 <= found.spans.min() <= found.spans.max() < len(found.cut):
        raise DataError(f"the teacher gives a box of phrase {found.spans.max()} of {len(found.cut)}")
    boxes = np.clip(found.boxes, 0, [width, height, width, height])
    usable = (found.scores >= options.least_score) & np.isfinite(found.boxes).all(axis=1)
    usable &= (boxes[:, 2:] - boxes[:, :2] >= max(options.smallest, 1e-3)).all(axis=1)
    order = np.flatnonzero(usable)
    order = order[np.argsort(-found.scores[order], kind="stable")]
    kept: list[int] = []
    for span in np.unique(found.spans[order]):
        same = order[found.spans[order] == span][:MOST_CANDIDATES]
        kept += same[suppressed(boxes[same], options.overlap)].tolist()
    best = np.array(sorted(kept, key=lambda number: (-found.scores[number], number))[: options.most], np.int64)
    return replace(found, boxes=boxes[best], scores=found.scores[best].clip(0, 1), spans=found.spans[best])


def suppressed(boxes: NDArray[np.float64], overlap: float) -> NDArray[np.int64]:
    """The numbers of the boxes [n, 4], the best first, that remain after non-maximum suppression."""
    remaining, kept = np.arange(len(boxes)), []
    while len(remaining):
        best, others = remaining[0], remaining[1:]
        kept.append(int(best))
        remaining = others[overlaps(boxes[best][None], boxes[others])[0] <= overlap]
    return np.array(kept, np.int64)
