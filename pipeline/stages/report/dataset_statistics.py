"""Statistics of a snapshot, computed per shard: sizes, captions, hosts, duplicates, and example samples.

Every summary has bounded size. Summaries merge by addition or by keeping the smallest hashes, with the same result in
any order and on any machine:

- Histograms have fixed bins and integer sums.
- Example samples are those with the smallest hashes of their keys.
- Hosts and duplicates are counted over all images up to ``EXACT_ROWS``, above that over those whose hash is below a
  limit (distinct sampling, Gibbons 2001), so a million entries describe any dataset.
"""

import base64
import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.codecs.image_encoding import ImageOptions, transform
from pipeline.config import from_json, require, to_json
from pipeline.errors import DataError, SampleError, SidecarError
from pipeline.shards.media import AUDIO, MEDIA, POINTS, VIDEO
from pipeline.shards.pixels import read_header
from pipeline.shards.sample import Sample
from pipeline.shards.selection import read_samples
from pipeline.shards.sidecar import read_sidecar, sidecar_file
from pipeline.shards.snapshot import Shard, Snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.text import decoded
from pipeline.stages.filters.language import identify
from pipeline.stages.report.clips import clip_values, example_clip
from pipeline.stages.report.clouds import cloud_values, example_cloud
from pipeline.stages.report.outlines import Region, read_regions
from pipeline.stages.report.pseudo_boxes import with_pseudo_boxes
from pipeline.stages.report.scales import SCALES, Scale
from pipeline.stages.report.sounds import example, sound_values
from pipeline.stages.shard_tasks import Workers, run_tasks

EXACT_ROWS = 1_000_000
IDENTIFIED = 20_000
CANDIDATES = 4
MESSAGES = 3
LONGEST_CAPTION, LONGEST_MESSAGE = 600, 300
MILLIONTHS = 1_000_000
EMBEDDINGS = "embeddings"
LANGUAGE = "language"
ROW_COLUMNS = ("key", "url", "status", "error_class", "error_message", "original_width", "original_height")


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts in the bins of a :class:`Scale`, with an exact integer sum: ``total`` is in millionths of the unit."""

    bins: Mapping[int, int] = field(default_factory=dict)
    count: int = 0
    total: int = 0
    least: float = math.inf
    most: float = -math.inf

    def __add__(self, other: "Histogram") -> "Histogram":
        return Histogram(
            bins=_sum(self.bins, other.bins),
            count=self.count + other.count,
            total=self.total + other.total,
            least=min(self.least, other.least),
            most=max(self.most, other.most),
        )

    @property
    def mean(self) -> float:
        """The mean; 0 without values."""
        return self.total / MILLIONTHS / self.count if self.count else 0.0

    def quantile(self, share: float, scale: Scale) -> float:
        """The quantile ``share`` (0 to 1) of the values, to within half a bin."""
        seen = 0
        for number, count in sorted(self.bins.items()):
            seen += count
            if seen >= share * self.count:
                middle = (scale.edge(number) + scale.edge(number + 1)) / 2
                return min(max(middle, self.least), self.most)
        return self.most


@dataclass(frozen=True, kw_only=True)
class ShownSample:
    """An example sample.

    ``thumbnail`` is a JPEG in base64: the image, views of a point cloud, or empty; ``regions`` are boxes and outlines.
    ``sound`` is a FLAC in base64, empty for a sample without a sound; ``video`` an MP4, with ``poster``, a JPEG.
    """

    order: str
    key: str
    caption: str
    width: int = 0
    height: int = 0
    thumbnail: str = ""
    regions: tuple[Region, ...] = ()
    sound: str = ""
    video: str = ""
    poster: str = ""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One failed row: its error message and its url."""

    order: str
    text: str
    url: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """Rows of one host in the url column, and how many of them became samples."""

    rows: int
    successes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Copies:
    """Number of samples with the same image, sound or video, the first they have, by SHA-256; and the first keys."""

    count: int
    keys: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """The statistics of some shards.

    ``visible`` counts samples with repeats, ``unique`` without. ``fields`` counts the samples with a field,
    ``field_bytes`` its bytes, with repeats. ``reasons`` and ``messages`` are of failed rows, by img2dataset's status
    and our error class: ``status/class``.
    """

    shards: int = 0
    visible: int = 0
    unique: int = 0
    unreadable: int = 0
    bytes: int = 0
    fields: Mapping[str, int] = field(default_factory=dict)
    field_bytes: Mapping[str, int] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    languages: Mapping[str, int] = field(default_factory=dict)
    samples: tuple[ShownSample, ...] = ()
    reasons: Mapping[str, int] = field(default_factory=dict)
    messages: Mapping[str, tuple[Message, ...]] = field(default_factory=dict)
    hosts: Mapping[str, Host] = field(default_factory=dict)
    images: Mapping[str, Copies] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ReportLimits:
    """Limits of the statistics of a dataset."""

    samples: int = 24
    """Number of example samples."""
    thumbnail_size: int = 224
    """Longer side of an example image in pixels."""
    sound_seconds: float = 5.0
    """Length of an example sound in seconds, from its start; 0 = no sounds in the page."""
    clip_seconds: float = 4.0
    """Length of an example video in seconds, from its start; 0 = no videos in the page."""
    seed: int = 0
    """Random seed of the choice of example samples."""
    languages: bool = True
    """Identify the languages of some captions, if no sidecar has a column ``language``."""

    def __post_init__(self) -> None:
        require(0 <= self.samples <= 1000, "samples", self.samples, "0 to 1000")
        require(16 <= self.thumbnail_size <= 1024, "thumbnail_size", self.thumbnail_size, "16 to 1024 pixels")
        require(0 <= self.sound_seconds <= 60, "sound_seconds", self.sound_seconds, "0 to 60 seconds")
        require(0 <= self.clip_seconds <= 60, "clip_seconds", self.clip_seconds, "0 to 60 seconds")
        require(self.seed >= 0, "seed", self.seed, "0 or more")


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Hash limits (0 to 2^64) of sampling: items with smaller hashes are used. They depend on the snapshot's size."""

    shown: int
    rows: int
    images: int
    captions: int


def measure(snapshot: Snapshot, options: ReportLimits, workers: Workers) -> Statistics:
    """The statistics of all visible samples of ``snapshot``.

    Raises:
        DataError: a shard or a sidecar is missing, damaged or stale.
    """
    texts = run_tasks(_MeasureShard(snapshot, options), range(len(snapshot.shards)), workers)
    parts = (from_json(Statistics, text) for _, text in texts)
    return merge_all(parts, options.samples)


def shares(snapshot: Snapshot, options: ReportLimits) -> Shares:
    """The fractions of the snapshot's rows, images and samples that are examined individually."""
    stored = sum(shard.stored for shard in snapshot.shards)
    return Shares(
        shown=_limit(CANDIDATES * options.samples, stored),
        rows=_limit(EXACT_ROWS, max(snapshot.rows, stored)),
        images=_limit(EXACT_ROWS, stored),
        captions=_limit(IDENTIFIED, stored),
    )


def merge_all(parts: Iterable[Statistics], samples: int) -> Statistics:
    """The merged statistics of all parts. Parts of similar size are merged pairwise: a running merge is quadratic."""
    sizes: list[int] = []
    merged: list[Statistics] = []
    for part in parts:
        sizes.append(1)
        merged.append(part)
        while len(sizes) > 1 and sizes[-1] == sizes[-2]:
            sizes.append(sizes.pop() + sizes.pop())
            merged.append(merge(merged.pop(), merged.pop(), samples))
    return reduce(lambda one, other: merge(one, other, samples), reversed(merged), Statistics())


def merge(one: Statistics, other: Statistics, samples: int) -> Statistics:
    """The merged statistics of two parts; commutative and associative."""
    return Statistics(
        shards=one.shards + other.shards,
        visible=one.visible + other.visible,
        unique=one.unique + other.unique,
        unreadable=one.unreadable + other.unreadable,
        bytes=one.bytes + other.bytes,
        fields=_sum(one.fields, other.fields),
        field_bytes=_sum(one.field_bytes, other.field_bytes),
        histograms=_joined(one.histograms, other.histograms, Histogram.__add__),
        languages=_sum(one.languages, other.languages),
        samples=tuple(sorted((*one.samples, *other.samples), key=lambda shown: (shown.order, shown.key))[:samples]),
        reasons=_sum(one.reasons, other.reasons),
        messages=_joined(one.messages, other.messages, lambda a, b: _first_messages((*a, *b))),
        hosts=_joined(one.hosts, other.hosts, _add_hosts),
        images=_joined(one.images, other.images, _add_copies),
    )


def measure_shard(folder: Folder, shard: Shard, options: ReportLimits, limits: Shares) -> Statistics:
    """The statistics of one shard: its visible samples from the tar, its input rows from the parquet file.

    Raises:
        DataError: the shard or its embeddings are missing, damaged or stale.
    """
    scores, languages = _scores(folder, shard), _languages(folder, shard)
    counted = _Counted(options, limits, scores, languages)
    last = ""
    for sample in with_pseudo_boxes(folder, shard, read_samples(folder, shard)):
        counted.add(sample, repeated=sample.key == last)
        last = sample.key
    rows = _RowCounts(limits, options.seed)
    for batch in _rows(folder, shard):
        rows.add(batch, counted.histograms)
    return counted.statistics(rows)


def representative(
    folder: Folder, shards: Iterable[Shard], keys: Iterable[str], options: ReportLimits
) -> dict[str, ShownSample]:
    """The samples with the given keys as :class:`ShownSample`, from the given shards, without unreadable ones."""
    wanted = set(keys)
    found: dict[str, ShownSample] = {}
    for shard in shards:
        for sample in read_samples(folder, shard) if len(found) < len(wanted) else ():
            if sample.key in wanted and sample.key not in found:
                shown = _shown(sample, "", options)
                found |= {sample.key: shown} if shown else {}
    return found


class _Counted:
    """Statistics of the visible samples of one shard, added one by one."""

    def __init__(
        self, options: ReportLimits, limits: Shares, scores: Mapping[str, float], languages: Mapping[str, str]
    ) -> None:
        self._options, self._limits, self._scores, self._languages = options, limits, scores, languages
        self.histograms: dict[str, _Bins] = {}
        self._visible = self._unique = self._unreadable = self._bytes = 0
        self._fields: Counter[str] = Counter()
        self._field_bytes: Counter[str] = Counter()
        self._spoken: Counter[str] = Counter()
        self._shown: list[ShownSample] = []
        self._images: dict[str, Copies] = {}

    def add(self, sample: Sample, repeated: bool) -> None:
        """Count a sample with its repeats; use it as an example and for duplicates once."""
        self._visible += 1
        self._fields.update(sample.fields.keys())
        self._field_bytes.update({name: len(value) for name, value in sample.fields.items()})
        image = sample.image()
        self._count_words(sample)
        if image is not None:
            self._count_image(image)
        self._count_values(sound_values(sample))
        self._count_values(clip_values(sample))
        self._count_values(cloud_values(sample))
        if repeated:
            return
        self._unique += 1
        body = next((body for medium in MEDIA.values() if (body := sample.body(medium)) is not None), None)
        if body is not None:
            self._compare(sample.key, body)
        order = hashlib.sha256(f"{self._options.seed}:{sample.key}".encode()).hexdigest()
        chance = int(order[:16], 16)
        if chance < self._limits.captions and self._options.languages and not self._languages:
            self._identify(sample)
        if chance < self._limits.shown:
            shown = _shown(sample, order, self._options)
            self._shown += [shown] if shown else []

    def statistics(self, rows: "_RowCounts") -> Statistics:
        """The statistics, with the counts of the shard's rows."""
        first = heapq.nsmallest(self._options.samples, self._shown, key=lambda shown: (shown.order, shown.key))
        return Statistics(
            shards=1,
            visible=self._visible,
            unique=self._unique,
            unreadable=self._unreadable,
            bytes=self._bytes,
            fields=dict(sorted(self._fields.items())),
            field_bytes=dict(sorted(self._field_bytes.items())),
            histograms={name: bins.histogram() for name, bins in sorted(self.histograms.items())},
            languages=dict(sorted(self._spoken.items())),
            samples=tuple(first),
            reasons=dict(sorted(rows.reasons.items())),
            messages={name: _first_messages(rows.messages[name]) for name in sorted(rows.messages)},
            hosts={name: Host(rows=rows.hosts[name], successes=rows.good_hosts[name]) for name in sorted(rows.hosts)},
            images=dict(sorted(self._images.items())),
        )

    def _count_words(self, sample: Sample) -> None:
        if "txt" in sample.fields:
            self._put("words", len(sample.fields["txt"].split()))
        if sample.key in self._scores:
            self._put("score", self._scores[sample.key])
        if sample.key in self._languages:
            self._spoken[self._languages[sample.key]] += 1

    def _identify(self, sample: Sample) -> None:
        text = decoded(sample.fields.get("txt", b"")[:LONGEST_CAPTION]).strip()
        if text:
            self._spoken[identify(text)[0]] += 1

    def _count_image(self, image: bytes) -> None:
        self._bytes += len(image)
        self._put("bytes", len(image))
        try:
            header = read_header(image)
        except SampleError:
            self._unreadable += 1
            return
        self._put("width", header.width)
        self._put("height", header.height)
        self._put("aspect", header.width / max(header.height, 1))

    def _count_values(self, values: Mapping[str, float] | None) -> None:
        if values is None:
            self._unreadable += 1
        for name, value in (values or {}).items():
            self._put(name, value)

    def _compare(self, key: str, body: bytes) -> None:
        # 96 bits distinguish a million images, in less memory.
        digest = hashlib.sha256(body).hexdigest()[:24]
        if int(digest[:16], 16) < self._limits.images:
            copies = Copies(count=1, keys=(key,))
            known = self._images.get(digest)
            self._images[digest] = _add_copies(known, copies) if known else copies

    def _put(self, name: str, value: float) -> None:
        self.histograms.setdefault(name, _Bins(name)).add(value)


class _Bins:
    """A histogram under construction."""

    def __init__(self, name: str) -> None:
        self._scale = SCALES[name]
        self._bins: Counter[int] = Counter()
        self._total = 0
        self._least, self._most = math.inf, -math.inf

    def add(self, value: float) -> None:
        self._bins[self._scale.bin(value)] += 1
        self._total += round(value * MILLIONTHS)
        self._least, self._most = min(self._least, value), max(self._most, value)

    def histogram(self) -> Histogram:
        return Histogram(
            bins=dict(sorted(self._bins.items())),
            count=self._bins.total(),
            total=self._total,
            least=self._least,
            most=self._most,
        )


class _RowCounts:
    """Statistics of the input rows of one shard: reasons of failures, and hosts."""

    def __init__(self, limits: Shares, seed: int) -> None:
        self._limit, self._seed = limits.rows, seed
        self.reasons: Counter[str] = Counter()
        self.messages: dict[str, list[Message]] = {}
        self.hosts: Counter[str] = Counter()
        self.good_hosts: Counter[str] = Counter()

    def add(self, batch: Mapping[str, list[Any]], histograms: dict[str, _Bins]) -> None:
        """Count a batch of rows, given as columns."""
        length = len(batch["key"])
        columns = [batch.get(name, [None] * length) for name in ROW_COLUMNS]
        for key, url, status, error_class, message, width, height in zip(*columns, strict=True):
            if status != "success":
                self._failed(str(key), str(url or ""), f"{status}/{error_class or status}", str(message or ""))
            elif width and height:
                histograms.setdefault("original", _Bins("original")).add(min(width, height))
            if url and int(self._hash(str(key))[:16], 16) < self._limit:
                host = host_of(str(url))
                self.hosts[host] += 1
                self.good_hosts[host] += status == "success"

    def _failed(self, key: str, url: str, reason: str, text: str) -> None:
        self.reasons[reason] += 1
        kept = self.messages.setdefault(reason, [])
        kept.append(Message(order=self._hash(key), text=text[:LONGEST_MESSAGE], url=url[:LONGEST_MESSAGE]))
        if len(kept) > 100 * MESSAGES:
            self.messages[reason] = list(_first_messages(kept))

    def _hash(self, key: str) -> str:
        return hashlib.sha256(f"{self._seed}:{key}".encode()).hexdigest()


def host_of(url: str) -> str:
    """The host of a url in lower case, at most 253 characters; empty without a host.

    >>> host_of("https://me@Example.com:8080/a?b")
    'example.com'
    """
    try:
        return (urlsplit(url).hostname or "")[:253]
    except ValueError:
        return ""


def _limit(wanted: int, present: int) -> int:
    return 2**64 if present <= wanted else wanted * 2**64 // present


def _shown(sample: Sample, order: str, options: ReportLimits) -> ShownSample | None:
    """The example; ``None`` for an undecodable image; without a thumbnail for a sample without an image."""
    image, audio, video = sample.image(), sample.body(AUDIO), sample.body(VIDEO)
    sound = example(audio, options.sound_seconds) if audio is not None and options.sound_seconds else ""
    clip = example_clip(video, options.clip_seconds) if video is not None and options.clip_seconds else None
    caption = decoded(sample.fields.get("txt", b""))[:LONGEST_CAPTION]
    shown = ShownSample(
        order=order,
        key=sample.key,
        caption=caption,
        sound=sound,
        video=clip.mp4 if clip else "",
        poster=clip.poster if clip else "",
    )
    if image is None:
        cloud = sample.body(POINTS)
        views = None if cloud is None else example_cloud(cloud)
        return shown if views is None else replace(shown, thumbnail=views[0], width=views[1], height=views[2])
    small = ImageOptions(
        image_size=options.thumbnail_size,
        resize_mode="keep_ratio_largest",
        resize_only_if_bigger=True,
        encode_quality=82,
        extract_exif=False,
    )
    try:
        made = transform(image, small)
    except SampleError:
        return None
    width, height = made.original_width or 1, made.original_height or 1
    thumbnail = base64.b64encode(made.data).decode()
    regions = read_regions(sample, width, height)
    return replace(shown, width=width, height=height, thumbnail=thumbnail, regions=regions)


def _rows(folder: Folder, shard: Shard) -> Iterator[dict[str, list[Any]]]:
    """The needed columns of the shard's parquet file, in batches; empty if there is no such file."""
    name = f"{shard.name}.parquet"
    if not folder.exists(name):
        return
    with folder.open(name) as file:
        try:
            table = pq.ParquetFile(file)
            columns = [column for column in ROW_COLUMNS if column in table.schema_arrow.names]
            if {"key", "status"} <= set(columns):
                yield from (batch.to_pydict() for batch in table.iter_batches(10_000, columns=columns))
        except pa.ArrowException as error:
            raise DataError(f"{folder.join(name)} is damaged ({error})") from error


def _scores(folder: Folder, shard: Shard) -> dict[str, float]:
    """Cosine of image and caption by key, if the shard has embeddings of both, L2-normalised, [D] each."""
    if EMBEDDINGS not in shard.sidecars:
        return {}
    table = read_sidecar(folder, shard, EMBEDDINGS, "jobs/embed_dataset.py")
    if not {"image", "text"} <= set(table.column_names):
        return {}
    scores: dict[str, float] = {}
    for batch in table.select(["key", "image", "text"]).to_batches(4096):
        try:
            images, texts = _matrix(batch.column("image")), _matrix(batch.column("text"))
        except (ValueError, TypeError) as error:
            file = folder.join(sidecar_file(shard, EMBEDDINGS))
            raise SidecarError(f"{file} holds no lists of numbers of one length; run jobs/embed_dataset.py") from error
        if images.shape != texts.shape:
            return {}
        # Rounded, so that the sum does not depend on the machine's BLAS library.
        cosines = np.round((images * texts).sum(axis=1), 4)
        pairs = zip(batch.column("key").to_pylist(), cosines.tolist(), strict=True)
        scores |= {str(key): score for key, score in pairs if math.isfinite(score)}
    return scores


def _matrix(column: "pa.Array[Any]") -> "np.ndarray[Any, np.dtype[np.float64]]":
    """A column of equally long lists as float [rows, D]; rows without a list become NaN."""
    lists = column.to_pylist()
    width = max((len(one) for one in lists if one is not None), default=0)
    return np.array([one if one is not None else [math.nan] * width for one in lists], np.float64).reshape(-1, width)


def _languages(folder: Folder, shard: Shard) -> dict[str, str]:
    """Language by key, from the first sidecar that has a column ``language``."""
    for name in sorted(shard.sidecars):
        if LANGUAGE in _columns(folder, shard, name):
            table = read_sidecar(folder, shard, name, "the job that made it")
            pairs = zip(table["key"].to_pylist(), table[LANGUAGE].to_pylist(), strict=True)
            return {str(key): str(language)[:40] for key, language in pairs if language}
    return {}


def _columns(folder: Folder, shard: Shard, name: str) -> list[str]:
    """The columns of a sidecar, from its footer."""
    try:
        with folder.open(sidecar_file(shard, name)) as file:
            return list(pq.ParquetFile(file).schema_arrow.names)
    except (FileNotFoundError, pa.ArrowInvalid):
        return [LANGUAGE]  # reading it raises the error


class _MeasureShard:
    """The task of one shard of a snapshot; returns its statistics as JSON text."""

    def __init__(self, snapshot: Snapshot, options: ReportLimits) -> None:
        self._folder, self._shards = Folder(snapshot.folder), snapshot.shards
        self._options, self._limits = options, shares(snapshot, options)

    def __call__(self, number: int) -> str:
        return to_json(measure_shard(self._folder, self._shards[number], self._options, self._limits))


def _sum(one: Mapping[Any, int], other: Mapping[Any, int]) -> dict[Any, int]:
    return _joined(one, other, int.__add__)


def _joined(one: Mapping[Any, Any], other: Mapping[Any, Any], add: Any) -> dict[Any, Any]:
    """The merged mapping, sorted; ``add`` combines two values."""
    both = dict(one)
    for name, value in other.items():
        both[name] = add(both[name], value) if name in both else value
    return dict(sorted(both.items()))


def _add_hosts(one: Host, other: Host) -> Host:
    return Host(rows=one.rows + other.rows, successes=one.successes + other.successes)


def _add_copies(one: Copies, other: Copies) -> Copies:
    return Copies(count=one.count + other.count, keys=tuple(sorted((*one.keys, *other.keys))[:MESSAGES]))


def _first_messages(messages: Iterable[Message]) -> tuple[Message, ...]:
    return tuple(heapq.nsmallest(MESSAGES, messages, key=lambda one: (one.order, one.text)))
