"""Features of a snapshot's images, sounds and captions, as a sidecar and as files for clip-retrieval.

``00017.embeddings.parquet`` has one row per sample of the tar, also for hidden ones, so it stays valid for every
selection: ``key``, and a column for each medium that the model encodes and the snapshot has (``image``, ``audio``,
``text``), L2-normalised float16 [D]; NaN where a sample has no readable part or no caption. The job passes the model,
any :class:`Embedder`. For a model with several views per image, ``image`` has V x D numbers: see ``view_features.py``.
"""

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate, islice
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.config import parse_json, require
from pipeline.errors import DataError, SidecarError
from pipeline.shards.media import MEDIA
from pipeline.shards.sample import Sample
from pipeline.shards.selection import read_samples
from pipeline.shards.sidecar import FACTS, Wanted, read_sidecar, sidecar_file
from pipeline.shards.snapshot import Shard, Snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.text import decoded
from pipeline.stages.annotate.annotator import Annotation, annotate
from pipeline.stages.shard_tasks import Workers, run_tasks

logger = logging.getLogger(__name__)

JOB = "jobs/embed_dataset.py"
TEXT = "text"
Features = NDArray[np.float16]


class Embedder(Protocol):
    """Interface of the model; ``maker`` is the digest of its weights and its preprocessing."""

    maker: str
    facts: Mapping[str, str | int]
    """Metadata of the features for readers, such as ``views``; stored with them."""
    media: tuple[str, ...]
    """Media that it encodes: ``image``, ``audio``, ..., and ``text`` for captions."""
    sidecars: tuple[Wanted, ...]
    """Sidecars that it reads of each sample."""

    def prepare(self, sample: Sample, medium: str) -> Any | None:
        """The input of :meth:`encode`, ``None`` without a readable part of the medium; called from many threads.

        Random augmentation depends on the sample's key only.
        """
        ...

    def encode(self, medium: str, inputs: Sequence[Any]) -> NDArray[np.float32]:
        """Features [B, D], L2-normalised; or raw features [B, V, D] of several views."""
        ...


MakeEmbedder = Callable[[int], Embedder]
"""Picklable function that loads the model in its worker process, for a number of CPU threads."""


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """Options of the features."""

    name: str = "embeddings"
    """Name of the sidecar, a plain word; use one name per model to store features of several models."""
    batch_size: int = 256
    """Batch size in samples, or in frames of videos."""
    overwrite: bool = False
    """Replace features of another model."""

    def __post_init__(self) -> None:
        require(self.name.isidentifier(), "name", self.name, "a plain word")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")


@dataclass(frozen=True)
class ShardFeatures:
    """Features float16 [N, D] of one shard's N stored samples by medium; NaN rows for samples without features."""

    keys: list[str]
    by_medium: Mapping[str, Features]


def embed(
    snapshot: Snapshot, make: MakeEmbedder, options: EmbedOptions, workers: Workers, use_gpu: bool | None = None
) -> Snapshot:
    """Make the features of every shard of ``snapshot`` and publish them; finished shards are not read again.

    ``use_gpu`` ``None`` = if the cluster has GPUs.

    Raises:
        SettingError: the snapshot has no medium that the model encodes.
        SidecarError: the sidecar has features of another model.
        DataError: a damaged shard.
        StorageError: the store failed (run the same command to continue), or another job holds the folder's lease.
    """
    load = LoadShardEmbedder(make, tuple(snapshot.fields), options.batch_size)
    annotation = Annotation(name=options.name, overwrite=options.overwrite)
    return annotate(snapshot, load, annotation, workers, use_gpu)


@dataclass(frozen=True)
class LoadShardEmbedder:
    """Load the annotator for samples with these ``fields``; ``make`` loads its embedder."""

    make: MakeEmbedder
    fields: tuple[str, ...]
    batch_size: int

    def __call__(self, threads: int) -> "ShardEmbedder":
        embedder = self.make(threads)
        names = ", ".join(one.name for one in embedder.sidecars)
        require(not names, "checkpoint", names, "a model that reads no sidecars, since its features become one")
        media = tuple(name for name in embedder.media if has_medium(self.fields, name))
        able, has = ", ".join(embedder.media), ", ".join(self.fields)
        require(bool(media), "checkpoint", able, f"a model that encodes what the samples have; their fields: {has}")
        return ShardEmbedder(embedder, media, self.batch_size, threads)


def has_medium(fields: Collection[str], medium: str) -> bool:
    """Whether samples with these fields may have the medium."""
    if medium == TEXT:
        return "txt" in fields
    return MEDIA[medium].field_of(dict.fromkeys(fields)) is not None


class ShardEmbedder:
    """Makes the table of features of a shard's samples; decodes ahead in ``threads`` threads."""

    def __init__(self, embedder: Embedder, media: tuple[str, ...], batch_size: int, threads: int) -> None:
        self._embedder, self._media, self._batch_size, self._threads = embedder, media, batch_size, threads
        self.maker = embedder.maker

    def table(self, samples: Iterator[Sample], shard: Shard) -> pa.Table:
        """Column ``key``, and one for each medium."""
        keys: list[str] = []
        parts: dict[str, list[NDArray[np.float32] | None]] = {medium: [] for medium in self._media}
        for batch, features in embedded_batches(samples, self._embedder, self._media, self._batch_size, self._threads):
            keys += [sample.key for sample in batch]
            for medium in self._media:
                parts[medium] += features[medium]
        width = next((row.size for part in parts.values() for row in part if row is not None), 1)
        columns = {medium: _column(rows, keys, width) for medium, rows in parts.items()}
        facts = {FACTS: json.dumps(dict(self._embedder.facts)).encode()} if self._embedder.facts else None
        return pa.table({"key": pa.array(keys, pa.string()), **columns}).replace_schema_metadata(facts)


def embedded_batches(
    samples: Iterator[Sample], embedder: Embedder, media: Sequence[str], batch_size: int, threads: int
) -> Iterator[tuple[list[Sample], dict[str, list[NDArray[np.float32] | None]]]]:
    """Batches of samples with the features of each medium, ``None`` for samples without; decodes ahead in threads."""
    with ThreadPoolExecutor(threads, thread_name_prefix="prepare") as pool:
        for batch in _prepared(samples, batch_size, pool, embedder, media):
            inputs = [future.result() for _, future in batch]
            features = {medium: _some(embedder, medium, [one[medium] for one in inputs]) for medium in media}
            yield [sample for sample, _ in batch], features


def read_features(folder: Folder, shard: Shard, name: str = "embeddings", maker: str | None = None) -> ShardFeatures:
    """The features of ``shard``'s stored samples, in the order of the tar.

    Raises:
        SidecarError: missing, stale, made by another model than ``maker`` (if given), or not features.
    """
    table = read_sidecar(folder, shard, name, JOB, maker)
    media = [name for name in (*MEDIA, TEXT) if name in table.column_names]
    if "key" not in table.column_names or not media:
        raise SidecarError(f"{folder.join(sidecar_file(shard, name))} holds no features; make them with {JOB}")
    keys = [str(key) for key in table["key"].to_pylist()]
    return ShardFeatures(keys, {medium: matrix(table[medium]) for medium in media})


@dataclass(frozen=True, kw_only=True)
class FeatureExport:
    """A snapshot's features in the files of clip-retrieval's inference, to build an index from.

    ``img_emb/img_emb_0.npy`` and ``text_emb/text_emb_0.npy``, float16 [N, D], and ``metadata/metadata_0.parquet`` with
    ``image_path`` (the key), ``caption`` and the keys of the samples' json: row ``i`` of all three is one sample. Other
    media are beside them: ``audio_emb/audio_emb_0.npy``. Rows are in the snapshot's order; samples that lack features
    of one of the media are left out.
    """

    snapshot: Snapshot
    folder: Folder
    name: str = "embeddings"
    rows_per_file: int = 250_000

    def write(self, workers: Workers) -> int:
        """Write all files; returns the number of rows.

        Raises:
            SidecarError: the snapshot has no features of this name.
            StorageError: the file system or store failed.
        """
        return sum(int(rows) for _, rows in run_tasks(self.write_file, range(self.files), workers))

    @property
    def files(self) -> int:
        """Number of files of each kind."""
        return max(1, -(-self.snapshot.samples // self.rows_per_file))

    def write_file(self, number: int) -> str:
        """Write the files ``number``; returns the number of their rows, as text."""
        features: dict[str, list[Any]] = {}
        rows = []
        for key, found, sample in self._visible(number * self.rows_per_file, self.rows_per_file):
            for medium, row in found.items():
                features.setdefault(medium, []).append(row)
            rows.append({"image_path": key, **_described(sample, TEXT in found)})
        ending = f"{number:0{len(str(self.files))}d}"
        if not rows:
            return "0"
        for medium, vectors in features.items():
            self._writematrix("img_emb" if medium == "image" else f"{medium}_emb", ending, vectors)
        content = BytesIO()
        pq.write_table(pa.Table.from_pandas(_uniform(pd.json_normalize(rows)), preserve_index=False), content)
        self.folder.folder("metadata").write_atomic(f"metadata_{ending}.parquet", content.getvalue())
        return str(len(rows))

    def _visible(self, start: int, count: int) -> Iterator[tuple[str, dict[str, Features], Sample]]:
        folder = Folder(self.snapshot.folder)
        ends = list(accumulate(shard.samples for shard in self.snapshot.shards))
        for shard, end in zip(self.snapshot.shards, ends, strict=True):
            begin = end - shard.samples
            if end <= start or begin >= start + count:
                continue
            features = read_features(folder, shard, self.name)
            rows = {key: row for row, key in enumerate(features.keys)}
            inside = islice(read_samples(folder, shard), max(0, start - begin), start + count - begin)
            for sample in inside:
                found = {medium: column[rows[sample.key]] for medium, column in features.by_medium.items()}
                if not any(np.isnan(row[0]) for row in found.values()):
                    yield sample.key, found, sample

    def _writematrix(self, kind: str, ending: str, rows: list[Any]) -> None:
        content = BytesIO()
        np.save(content, np.stack(rows))
        self.folder.folder(kind).write_atomic(f"{kind}_{ending}.npy", content.getvalue())


def _prepared(
    samples: Iterator[Sample], size: int, pool: ThreadPoolExecutor, embedder: Embedder, media: Sequence[str]
) -> Iterator[list[tuple[Sample, "Future[dict[str, Any]]"]]]:
    """Batches with their inputs being decoded; decoding of the next batch starts before a batch is yielded."""

    def inputs(sample: Sample) -> dict[str, Any]:
        return {medium: embedder.prepare(sample, medium) for medium in media}

    ahead: list[tuple[Sample, Future[dict[str, Any]]]] = []
    while batch := list(islice(samples, size)):
        begun = [(sample, pool.submit(inputs, sample)) for sample in batch]
        if ahead:
            yield ahead
        ahead = begun
    if ahead:
        yield ahead


def _some(embedder: Embedder, medium: str, inputs: Sequence[Any | None]) -> list[NDArray[np.float32] | None]:
    """The features of each input; ``None`` stays ``None``."""
    present = [one for one in inputs if one is not None]
    made = iter(embedder.encode(medium, present)) if present else iter(())
    return [None if one is None else next(made) for one in inputs]


def caption_of(sample: Sample) -> str | None:
    """The caption whose features are ``text``: the sample's ``txt``."""
    content = sample.fields.get("txt")
    return None if content is None else decoded(content)


def _column(rows: list[NDArray[np.float32] | None], keys: Sequence[str], width: int) -> Any:
    """Lists of ``width`` float16; NaN for ``None``, since parquet does not preserve null lists of fixed size."""
    empty = np.full(width, np.nan, np.float16)
    parts = [empty if row is None else _half(row, key) for row, key in zip(rows, keys, strict=True)]
    return pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate([empty[:0], *parts]), pa.float16()), width)


def _half(row: NDArray[np.float32], key: str) -> Features:
    with np.errstate(over="ignore"):
        half: Features = row.astype(np.float16).ravel()
    if not np.isfinite(half).all():
        raise DataError(f"sample {key}: the model gives features that are not finite, or too large for half precision")
    return half


def matrix(column: Any) -> Features:
    """float16 [N, D] of a column of lists of one length; raises ``DataError`` for another type."""
    if not pa.types.is_fixed_size_list(column.type):
        raise DataError(f"a column of features has the type {column.type}, not lists of numbers of one length")
    array = column.combine_chunks()
    rows: Features = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, array.type.list_size)
    return rows


def _described(sample: Sample, with_caption: bool) -> dict[str, Any]:
    try:
        plain = parse_json(decoded(sample.fields.get("json", b"{}")))
    except ValueError:
        plain = {}
    columns = plain if isinstance(plain, dict) else {}
    rest = {name: value for name, value in columns.items() if name not in ("caption", "metadata", "image_path")}
    return {"caption": caption_of(sample) or "", **rest} if with_caption else rest


def _uniform(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns with values of several types become strings, since a parquet column has one type."""
    for name in frame.columns:
        try:
            pa.array(frame[name], from_pandas=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            frame[name] = frame[name].map(lambda value: value if value is None else str(value))
    return frame
