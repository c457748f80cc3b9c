"""Search in a data set: its images, sounds, videos or captions, ranked by a text, an image, a sound or a video.

Features come from the sidecars of ``jobs/embed_dataset.py`` where they are of the same tar, model and settings; other
samples are encoded. Only the best samples so far are in memory. A model of images finds videos by their best frame, the
medium ``moments``.
"""

import heapq
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.errors import DataError, SettingError, SidecarError, unreadable
from pipeline.evaluation.data import Data, SnapshotData
from pipeline.evaluation.media import AUTO, KNOWN, LOOKED_AT, TEXT
from pipeline.evaluation.moments import MOMENTS, Moment, MomentFinder, best_moment
from pipeline.loaders.samples import Samples
from pipeline.loaders.work_progress import WorkProgress
from pipeline.shards.media import ENOUGH, MEDIA, VIDEO, Medium
from pipeline.shards.sample import Sample
from pipeline.shards.selection import read_samples, read_selection
from pipeline.shards.snapshot import Shard, Snapshot
from pipeline.shards.storage import Folder, split_file
from pipeline.stages.annotate.embeddings import Embedder, embedded_batches, has_medium, read_features

logger = logging.getLogger(__name__)

Vector = NDArray[np.float32]
MOST_QUERY_BYTES = 1 << 28
SEARCHED = (*(name for name in KNOWN if name != TEXT), MOMENTS, TEXT)
"""What results may be ranked by."""
AT_ONCE = 64  # samples of a shard without features, whose videos are in memory


@dataclass(frozen=True)
class Query:
    """A text, an image, a sound or a video, as a sample without a key."""

    medium: str
    sample: Sample

    @property
    def text(self) -> str:
        """The text; empty for other media."""
        return self.sample.fields["txt"].decode() if self.medium == TEXT else ""


@dataclass(frozen=True)
class Match:
    """A sample and its cosine with the query; of a video by its frames, the best moment."""

    score: float
    sample: Sample
    moment: Moment | None = None


@dataclass(frozen=True)
class SearchResult:
    """The best matches, the best first, and the number of samples that were compared."""

    medium: str
    matches: tuple[Match, ...]
    compared: int
    without: int
    """Samples without a readable part of the medium."""
    stored: int
    """Samples whose features were in a sidecar."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How a data set is searched."""

    top: int = 20
    sidecar: str = "embeddings"
    batch_size: int = 64
    threads: int = 4


def text_query(text: str) -> Query:
    """A query by text; raises ``SettingError`` if it is empty."""
    require(bool(text.strip()), "query", text, "a text with a word, or --query-file with a file")
    return Query(TEXT, Sample("query", {"txt": text.strip().encode(errors="replace")}))


def file_query(place: str) -> Query:
    """A query by the file at ``place``, a path or URI; its first bytes decide on the medium: see :func:`as_encoded`.

    Raises:
        SettingError: it cannot be read, is too large, or is of no known medium.
    """
    folder, name = split_file(place)
    try:
        body = folder.read_bytes(name)
    except (OSError, ValueError) as error:
        raise unreadable("query_file", place, "a file with an image or a sound", error) from error
    require(len(body) <= MOST_QUERY_BYTES, "query_file", place, f"a file of {MOST_QUERY_BYTES >> 20} MiB or less")
    for medium in MEDIA.values():
        if medium.starts(body[:ENOUGH]):
            return _by(medium, body)
    raise SettingError("query_file", place, "a file with an image, a sound or a video; its first bytes are of neither")


def as_encoded(query: Query, media: Sequence[str]) -> Query:
    """The query by a medium that a model encodes: a file such as MP4 may be a sound or a video."""
    if query.medium in (TEXT, *media):
        return query
    body = next(iter(query.sample.fields.values()))
    fitting = (MEDIA[name] for name in media if name in MEDIA and MEDIA[name].starts(body[:ENOUGH]))
    return next((_by(medium, body) for medium in fitting), query)


def _by(medium: Medium, body: bytes) -> Query:
    return Query(medium.name, Sample("query", {medium.endings[0]: body}))


def query_features(embedder: Embedder, query: Query) -> Vector:
    """Unit features float32 [D].

    Raises:
        SettingError: the model does not encode the medium, or the query's content is broken.
    """
    field_name = "query" if query.medium == TEXT else "query_file"
    able = ", ".join(embedder.media)
    require(query.medium in embedder.media, field_name, query.medium, f"a medium that the model encodes: {able}")
    prepared = embedder.prepare(query.sample, query.medium)
    if prepared is None:
        raise SettingError(field_name, query.medium, f"a readable file: its {query.medium} cannot be decoded")
    features: Vector = embedder.encode(query.medium, [prepared])[0].astype(np.float32)
    if not np.isfinite(features).all():
        raise DataError("the model gives features of the query that are not finite")
    return features


def words_read(tokenizer: Any, text: str) -> int | None:
    """How many words of ``text`` the model reads, if its tokenizer cuts the text; else ``None``."""
    words = text.split()

    def cut(count: int) -> bool:
        """Whether the first ``count`` words have the tokens of the whole text."""
        return bool((tokenizer([" ".join(words[:count])]) == tokenizer([" ".join(words)])).all())

    if len(words) < 2 or not cut(len(words) - 1):
        return None
    low, high = 0, len(words) - 1  # the tokens of `high` words are those of all, of `low` words they are not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cut(middle) else (middle, high)
    return high


def medium_to_search(wanted: str, query: Query, embedder: Embedder, data: Data) -> str:
    """The medium of the results: ``wanted``, or for ``auto`` the first other one than the query's.

    Raises:
        SettingError: the model does not encode it, or the samples do not have it.
    """
    require(wanted in (AUTO, *SEARCHED), "medium", wanted, ", ".join((AUTO, *SEARCHED)))
    fields = _fields(data)
    able = tuple(name for name in SEARCHED if name in embedder.media or (name == MOMENTS and "image" in embedder.media))
    found = [name for name in able if has_medium(fields, VIDEO.name if name == MOMENTS else name)]
    if wanted == AUTO:
        # Captions come last: who searches by a picture or a sound wants to see or hear something.
        ranked = sorted(found, key=lambda name: (name == query.medium, name == TEXT))
        has = ", ".join(sorted(fields)) or "none"
        require(bool(ranked), "data", has, "samples with a medium that the model encodes: " + ", ".join(able))
        return ranked[0]
    require(wanted in able, "medium", wanted, "a medium that the model encodes: " + ", ".join(able))
    require(wanted in found, "medium", wanted, "one that the samples have: " + (", ".join(found) or "none"))
    return wanted


def _fields(data: Data) -> set[str]:
    if isinstance(data, SnapshotData):
        return set(data.snapshot.fields)
    return {name for sample in islice(data.samples(LOOKED_AT), LOOKED_AT) for name in sample.fields}


def search(
    embedder: Embedder,
    query: Vector,
    data: Data,
    medium: str,
    options: SearchOptions,
    finder: MomentFinder | None = None,
) -> SearchResult:
    """The best samples of ``data`` for a query's features, float [D]; at equal scores the earlier sample first.

    The medium ``moments`` needs the ``finder``.

    Raises:
        DataError: no sample has a readable part of the medium, or a shard is damaged.
    """
    best = _Best(options.top)
    if medium == MOMENTS:
        assert finder is not None, "a search for moments needs a finder"
        _search_moments(finder, query, data, best)
    elif isinstance(data, SnapshotData):
        _search_snapshot(embedder, query, data.snapshot, medium, options, best)
    else:
        _encode(embedder, query, data.samples(None), medium, options, best, None)
    if not best.compared:
        what = VIDEO.name if medium == MOMENTS else medium
        raise DataError(f"none of {best.without} samples has a readable {what}")
    matches = tuple(Match(entry.score, entry.read(), entry.moment) for entry in best.ranked())
    return SearchResult(medium, matches, best.compared, best.without, best.stored)


def scores_of(features: NDArray[Any], query: Vector) -> NDArray[np.float64]:
    """Cosines float64 [N] of features [N, D]; NaN rows give NaN."""
    scores: NDArray[np.float64] = features.astype(np.float64) @ query.astype(np.float64)
    return scores


@dataclass(frozen=True, order=True)
class _Entry:
    """Ordered by score, and by place from the last to the first."""

    score: float
    before: int
    sample: Sample | None = field(compare=False)
    stored: "tuple[Samples, int] | None" = field(compare=False, default=None)
    moment: Moment | None = field(compare=False, default=None)

    def read(self) -> Sample:
        if self.stored is not None:
            samples, number = self.stored
            return samples[number]
        assert self.sample is not None
        return self.sample


class _Best:
    """The best ``top`` entries so far."""

    def __init__(self, top: int) -> None:
        self.top = top
        self.compared = self.without = self.stored = 0
        self._heap: list[_Entry] = []
        self._seen = 0

    def add(
        self,
        score: float,
        sample: Sample | None = None,
        stored: tuple[Samples, int] | None = None,
        moment: Moment | None = None,
    ) -> None:
        self._seen += 1
        if np.isnan(score):
            self.without += 1
            return
        self.compared += 1
        entry = _Entry(score, -self._seen, sample, stored, moment)
        if len(self._heap) < self.top:
            heapq.heappush(self._heap, entry)
        elif entry > self._heap[0]:
            heapq.heapreplace(self._heap, entry)

    def ranked(self) -> list[_Entry]:
        return sorted(self._heap, reverse=True)


def _search_snapshot(
    embedder: Embedder, query: Vector, snapshot: Snapshot, medium: str, options: SearchOptions, best: _Best
) -> None:
    folder, samples = Folder(snapshot.folder), Samples(snapshot, open_shards=2, sidecars=embedder.sidecars)
    progress = WorkProgress(logger, "search", "samples", snapshot.samples)
    start, encoded, reason = 0, 0, ""
    for shard in snapshot.shards:
        try:
            features = _stored_features(folder, shard, medium, options.sidecar, embedder)
        except SidecarError as error:
            encoded, reason = encoded + 1, str(error)
            shown: Iterator[Sample]
            if embedder.sidecars:
                shown = (samples[number] for number in range(start, start + shard.samples))
            else:
                shown = read_samples(folder, shard)
            _encode(embedder, query, _distinct(shown), medium, options, best, progress)
        else:
            scores = scores_of(features, query)
            for place, row in _visible(folder, shard):
                best.add(float(scores[row]), stored=(samples, start + place))
                best.stored += 1
            progress.advance(shard.samples)
        start += shard.samples
    if encoded:
        logger.info("%d of %d shards were encoded; the last one: %s", encoded, len(snapshot.shards), reason)


def _search_moments(finder: MomentFinder, query: Vector, data: Data, best: _Best) -> None:
    if not isinstance(data, SnapshotData):
        _encode_moments(finder, query, data.samples(None), best)
        return
    snapshot = data.snapshot
    folder, samples = Folder(snapshot.folder), Samples(snapshot, open_shards=2)
    progress = WorkProgress(logger, "search", "videos", snapshot.samples)
    start = 0
    for shard in snapshot.shards:
        try:
            features = finder.stored(folder, shard)
        except SidecarError as error:
            logger.info("%s is encoded: %s", shard.name, error)
            _encode_moments(finder, query, _distinct(read_samples(folder, shard)), best)
        else:
            for place, row in _visible(folder, shard):
                moment = best_moment(features[row], query)
                best.add(np.nan if moment is None else moment.score, stored=(samples, start + place), moment=moment)
                best.stored += 1
        progress.advance(shard.samples)
        start += shard.samples


def _encode_moments(finder: MomentFinder, query: Vector, samples: Iterator[Sample], best: _Best) -> None:
    while some := list(islice(samples, AT_ONCE)):
        for sample, features in zip(some, finder.encoded(some), strict=True):
            moment = best_moment(features, query)
            best.add(np.nan if moment is None else moment.score, sample, moment=moment)


def _visible(folder: Folder, shard: Shard) -> Iterator[tuple[int, int]]:
    """Place and row in the tar of each visible sample of a shard, repeats once."""
    selection = read_selection(folder, shard)
    rows = np.arange(shard.stored) if selection is None else selection
    for place in np.unique(rows, return_index=True)[1].tolist():
        yield place, int(rows[place])


def _stored_features(
    folder: Folder, shard: Shard, medium: str, sidecar: str, embedder: Embedder
) -> NDArray[np.float16]:
    """Features of the shard's stored samples; raises ``SidecarError`` if they are not there or not of this model."""
    found = read_features(folder, shard, sidecar, embedder.maker)
    if medium not in found.by_medium or len(found.keys) != shard.stored:
        raise SidecarError(f"{sidecar} of {shard.name} has no {medium} for each of its {shard.stored} samples")
    return found.by_medium[medium]


def _distinct(samples: Iterator[Sample]) -> Iterator[Sample]:
    """Without the repeats of a selection, which follow one another."""
    last = ""
    for sample in samples:
        if sample.key != last:
            yield sample
        last = sample.key


def _encode(
    embedder: Embedder,
    query: Vector,
    samples: Iterator[Sample],
    medium: str,
    options: SearchOptions,
    best: _Best,
    progress: WorkProgress | None,
) -> None:
    progress = progress or WorkProgress(logger, "search", "samples")
    for batch, features in embedded_batches(samples, embedder, (medium,), options.batch_size, options.threads):
        for sample, row in zip(batch, features[medium], strict=True):
            score = np.nan if row is None else float(scores_of(row[None], query)[0])
            best.add(score, sample)
        progress.advance(len(batch))
