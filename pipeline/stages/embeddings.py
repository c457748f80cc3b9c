"""Image and text features of a snapshot as a sidecar, and as the files that clip-retrieval reads.

``00017.embeddings.parquet`` has a row for every sample that the tar stores, hidden ones too, so that it outlives
selections: ``key``, ``image`` and ``text``, L2-normalised float16 [D]; NaN where a sample has no readable picture or no
caption. The model is whatever has the few methods of :class:`Embedder`; the job brings it. One that gives several
views of a picture has a row of V x D numbers for each: see ``view_features.py``.
"""

import hashlib
import json
import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import accumulate, islice
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.errors import ClipmillError, DataError, SidecarError
from pipeline.shards.lease import lease
from pipeline.shards.sample import Sample
from pipeline.shards.selection import read_samples
from pipeline.shards.sidecar import MAKER, TAR_DIGEST, read_sidecar, sidecar_file, write_sidecar
from pipeline.shards.snapshot import Shard, Snapshot, publish_shards, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.tar import iterate_tar
from pipeline.stages.ray_session import connect
from pipeline.stages.shard_tasks import Workers, data_resource, run_tasks

logger = logging.getLogger(__name__)

JOB = "jobs/embed_dataset.py"
FACTS = b"clipmill.facts"
MOST_THREADS = 4  # of a worker without a GPU: more workers use the cores better than more threads
Features = NDArray[np.float16]


class Embedder(Protocol):
    """What this stage needs of a model; ``maker`` is the digest of its weights and of what is done to its input."""

    maker: str
    facts: Mapping[str, str | int]
    """What readers of the features should know of them, such as ``views``; kept with them."""
    reads_text: bool
    """Whether captions get features too."""

    def prepare(self, picture: bytes, key: str) -> Any | None:
        """The picture as :meth:`encode_image` wants it, ``None`` where it cannot be read; called from many threads.

        What is random about it depends on the sample's ``key`` alone.
        """
        ...

    def encode_image(self, pictures: Sequence[Any]) -> NDArray[np.float32]:
        """Features [B, D], L2-normalised; or raw features [B, V, D] of several views."""
        ...

    def encode_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """L2-normalised features [B, D]."""
        ...


MakeEmbedder = Callable[[int], Embedder]
"""Loads the model in the process that will use it, for a number of CPU threads; pickles."""


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """How the features are made and kept."""

    name: str = "embeddings"
    """Name of the sidecar: a plain word, so that the features of several models can lie side by side."""
    batch_size: int = 256
    """Pictures encoded at a time."""
    overwrite: bool = False
    """Replace features that another model made."""

    def __post_init__(self) -> None:
        require(self.name.isidentifier(), "name", self.name, "a plain word")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")


@dataclass(frozen=True)
class ShardFeatures:
    """Features float16 [N, D] of one shard's N stored samples; rows of NaN where a sample has none."""

    keys: list[str]
    image: Features
    text: Features | None


def embed(
    snapshot: Snapshot, make: MakeEmbedder, options: EmbedOptions, workers: Workers, use_gpu: bool | None = None
) -> Snapshot:
    """Give every shard of ``snapshot`` its features and publish that; shards that have them are not read again.

    ``use_gpu`` ``None``: where the cluster has GPUs.

    Raises:
        SidecarError: features of another model are there.
        DataError: a damaged shard.
        StorageError: the store refused (the same command goes on from there), or another job is at work in the folder.
    """
    digests: dict[tuple[str, str], str] = {}
    with lease(Folder(snapshot.folder), "an embedding") as held:
        for number, digest in _embedded(snapshot, make, options, workers, use_gpu):
            shard = snapshot.shards[number]
            digests[shard.name, shard.sha256] = digest
            logger.info("%d of %d shards have features, %s the last", len(digests), len(snapshot.shards), shard.name)
        held.check()
        return _publish(snapshot, digests, options.name)


def embed_shard(
    folder: Folder, shard: Shard, fields: Iterable[str], embedder: Embedder, options: EmbedOptions, threads: int = 4
) -> str:
    """Write the sidecar of one shard, unless it is there; returns its SHA-256 hex. Raises as :func:`embed`."""
    done = _finished(folder, shard, embedder.maker, options)
    if done is not None:
        return done
    with_text = "txt" in fields and embedder.reads_text
    keys: list[str] = []
    parts: dict[str, list[NDArray[np.float32] | None]] = {"image": [], "text": []}
    with folder.open(shard.tar) as file, ThreadPoolExecutor(threads, thread_name_prefix="prepare") as pool:
        samples = iterate_tar(file, folder.join(shard.tar))
        for batch in _prepared(samples, options.batch_size, pool, embedder):
            keys += [sample.key for sample, _ in batch]
            parts["image"] += _some(embedder.encode_image, [future.result() for _, future in batch])
            if with_text:
                parts["text"] += _some(embedder.encode_text, [_caption(sample) for sample, _ in batch])
    if len(keys) != shard.stored:
        raise DataError(f"{folder.join(shard.tar)} holds {len(keys)} samples, the snapshot says {shard.stored}")
    width = next((row.size for part in parts.values() for row in part if row is not None), 1)
    kinds = ("image", "text") if with_text else ("image",)
    columns = {"key": pa.array(keys, pa.string()), **{kind: _column(parts[kind], keys, width) for kind in kinds}}
    table = pa.table(columns)
    if embedder.facts:
        table = table.replace_schema_metadata({FACTS: json.dumps(dict(embedder.facts)).encode()})
    return write_sidecar(folder, shard, options.name, table, embedder.maker)


def read_features(folder: Folder, shard: Shard, name: str = "embeddings") -> ShardFeatures:
    """The features of ``shard``'s stored samples, in the order of the tar.

    Raises:
        SidecarError: missing, stale or not features.
    """
    table = read_sidecar(folder, shard, name, JOB)
    if not {"key", "image"} <= set(table.column_names):
        raise SidecarError(f"{folder.join(sidecar_file(shard, name))} holds no features; make them with {JOB}")
    text = matrix(table["text"]) if "text" in table.column_names else None
    return ShardFeatures([str(key) for key in table["key"].to_pylist()], matrix(table["image"]), text)


@dataclass(frozen=True, kw_only=True)
class Export:
    """A snapshot's features as clip-retrieval's inference writes them, to build an index from.

    ``img_emb/img_emb_0.npy`` and ``text_emb/text_emb_0.npy``, float16 [N, D], and ``metadata/metadata_0.parquet`` with
    ``image_path`` (the key), ``caption`` and the keys of the samples' json: row ``i`` of all three is one sample. Rows
    are in the order that readers see; samples without a picture's or a caption's features are left out.
    """

    snapshot: Snapshot
    folder: Folder
    name: str = "embeddings"
    rows_per_file: int = 250_000

    def write(self, workers: Workers) -> int:
        """Write all files; returns the number of rows.

        Raises:
            SidecarError: the snapshot has no features of this name.
            StorageError: the store refused.
        """
        return sum(int(rows) for _, rows in run_tasks(self.write_file, range(self.files), workers))

    @property
    def files(self) -> int:
        """Number of files of each kind."""
        return max(1, -(-self.snapshot.samples // self.rows_per_file))

    def write_file(self, number: int) -> str:
        """Write the files ``number``; returns the number of their rows, as text."""
        images, texts, rows = [], [], []
        for key, image, text, sample in self._visible(number * self.rows_per_file, self.rows_per_file):
            images.append(image)
            texts.append(text)
            rows.append({"image_path": key, **_described(sample, text is not None)})
        ending = f"{number:0{len(str(self.files))}d}"
        if not images:
            return "0"
        self._writematrix("img_emb", ending, images)
        if texts[0] is not None:
            self._writematrix("text_emb", ending, texts)
        content = BytesIO()
        pq.write_table(pa.Table.from_pandas(_uniform(pd.json_normalize(rows)), preserve_index=False), content)
        self.folder.folder("metadata").write_atomic(f"metadata_{ending}.parquet", content.getvalue())
        return str(len(rows))

    def _visible(self, start: int, count: int) -> Iterator[tuple[str, Features, Features | None, Sample]]:
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
                row = rows[sample.key]
                text = None if features.text is None else features.text[row]
                if not np.isnan(features.image[row, 0]) and (text is None or not np.isnan(text[0])):
                    yield sample.key, features.image[row], text, sample

    def _writematrix(self, kind: str, ending: str, rows: list[Any]) -> None:
        content = BytesIO()
        np.save(content, np.stack(rows))
        self.folder.folder(kind).write_atomic(f"{kind}_{ending}.npy", content.getvalue())


def _embedded(
    snapshot: Snapshot, make: MakeEmbedder, options: EmbedOptions, workers: Workers, use_gpu: bool | None
) -> Iterator[tuple[int, str]]:
    if workers.processes_count != 0:
        yield from _embedded_by_ray(snapshot, make, options, workers, use_gpu)
        return
    work = _EmbedShards(make, snapshot, options, os.cpu_count() or 1)
    yield from ((number, work.digest(number)) for number in range(len(snapshot.shards)))


def _embedded_by_ray(
    snapshot: Snapshot, make: MakeEmbedder, options: EmbedOptions, workers: Workers, use_gpu: bool | None
) -> Iterator[tuple[int, str]]:
    import ray

    connect()
    places = _places(workers.processes_count, use_gpu, len(snapshot.shards))
    rows = [{"number": number} for number in range(len(snapshot.shards))]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _EmbedShards,
        fn_constructor_args=(make, snapshot, options, places.threads),
        batch_size=1,
        batch_format="numpy",
        num_cpus=places.threads,
        num_gpus=1 if places.gpu else None,
        compute=ray.data.ActorPoolStrategy(size=places.count),
        resources=None if places.gpu else data_resource(dict(ray.cluster_resources())),
    )
    for batch in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        for number, digest, error in zip(batch["number"], batch["digest"], batch["error"], strict=True):
            if error:
                raise pickle.loads(error)
            yield int(number), str(digest)


@dataclass(frozen=True)
class _Places:
    count: int
    threads: int
    gpu: bool


def _places(asked: int | None, use_gpu: bool | None, shards: int) -> _Places:
    """How many actors, each with how many CPUs: one for each GPU, or on CPUs some of a few threads."""
    import ray

    cluster = dict(ray.cluster_resources())
    sizes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    cpus, smallest = int(cluster.get("CPU", 1)), min([size for size in sizes if size] or [1])
    gpus = int(cluster.get("GPU", 0))
    if gpus if use_gpu is None else use_gpu:
        require(gpus > 0, "device", "cuda", "cpu: the cluster has no GPU")
        count = min(asked or gpus, shards)
        return _Places(count, max(1, min(8, smallest, cpus // max(gpus, 1))), True)
    count = min(asked or max(1, cpus // min(MOST_THREADS, smallest)), shards)
    return _Places(count, max(1, min(MOST_THREADS, smallest, cpus // count)), False)


class _EmbedShards:
    """The actor: holds the model; a batch of shard numbers to a batch of digests."""

    def __init__(self, make: MakeEmbedder, snapshot: Snapshot, options: EmbedOptions, threads: int) -> None:
        self._make, self._snapshot, self._options, self._threads = make, snapshot, options, threads
        self._embedder: Embedder | None = None

    def digest(self, number: int) -> str:
        folder, shard = Folder(self._snapshot.folder), self._snapshot.shards[number]
        # Loaded with the first shard: what is wrong with a checkpoint is lost on the way where __init__ raises it.
        self._embedder = self._embedder or self._make(self._threads)
        return embed_shard(folder, shard, self._snapshot.fields, self._embedder, self._options, self._threads)

    def __call__(self, batch: Any) -> Any:
        digests, errors = [], []
        for number in batch["number"]:
            try:
                digests.append(self.digest(int(number)))
                errors.append(b"")
            except ClipmillError as error:
                # As a value: of what an actor raises, Ray gives back the text alone.
                digests.append("")
                errors.append(pickle.dumps(error))
        return {"number": batch["number"], "digest": np.array(digests, object), "error": np.array(errors, object)}


def _finished(folder: Folder, shard: Shard, maker: str, options: EmbedOptions) -> str | None:
    """The digest of the sidecar that is there already, of the same tar and maker."""
    file = sidecar_file(shard, options.name)
    try:
        content = folder.read_bytes(file)
        metadata = pq.read_schema(BytesIO(content)).metadata or {}
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    if metadata.get(TAR_DIGEST) != shard.sha256.encode():
        return None
    if metadata.get(MAKER) == maker.encode():
        return hashlib.sha256(content).hexdigest()
    if not options.overwrite:
        ways = "--overwrite replaces it, another --name keeps both"
        raise SidecarError(f"{folder.join(file)} holds the features of another model; {ways}")
    return None


def _prepared(
    samples: Iterator[Sample], size: int, pool: ThreadPoolExecutor, embedder: Embedder
) -> Iterator[list[tuple[Sample, "Future[Any]"]]]:
    """Batches with their pictures being decoded; the next batch is begun before one is handed out."""
    ahead: list[tuple[Sample, Future[Any]]] = []
    while batch := list(islice(samples, size)):
        begun = [(sample, pool.submit(_prepare, embedder, sample)) for sample in batch]
        if ahead:
            yield ahead
        ahead = begun
    if ahead:
        yield ahead


def _prepare(embedder: Embedder, sample: Sample) -> Any | None:
    picture = sample.image()
    return None if picture is None else embedder.prepare(picture, sample.key)


def _some(
    encode: Callable[[list[Any]], NDArray[np.float32]], inputs: Sequence[Any | None]
) -> list[NDArray[np.float32] | None]:
    """The features of each input, ``None`` for ``None``."""
    present = [one for one in inputs if one is not None]
    made = iter(encode(present)) if present else iter(())
    return [None if one is None else next(made) for one in inputs]


def _caption(sample: Sample) -> str | None:
    content = sample.fields.get("txt")
    return None if content is None else content.decode("utf-8", errors="replace")


def _column(rows: list[NDArray[np.float32] | None], keys: Sequence[str], width: int) -> Any:
    """Lists of ``width`` float16; NaN for ``None``, since null lists of fixed size do not survive parquet."""
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
    array = column.combine_chunks()
    rows: Features = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, array.type.list_size)
    return rows


def _publish(snapshot: Snapshot, digests: dict[tuple[str, str], str], name: str) -> Snapshot:
    """The newest snapshot with the new sidecars, by tar: it may have been published while the features were made."""
    latest = read_snapshot(snapshot.folder)
    shards = []
    for shard in latest.shards:
        digest = digests.get((shard.name, shard.sha256))
        shards.append(replace(shard, sidecars={**shard.sidecars, name: digest}) if digest else shard)
    bare = sum(name not in shard.sidecars for shard in shards)
    if bare:
        logger.warning("%s has %d shards without %s; run again to add them", latest.uri, bare, name)
    return publish_shards(
        Folder(snapshot.folder),
        tuple(shards),
        fields=latest.fields,
        card=latest.card,
        options=latest.options,
        rows=latest.rows,
        dropped=latest.dropped,
        changes={f"{name}_added": sum(shard.stored for shard in shards if name in shard.sidecars)},
    )


def _described(sample: Sample, with_caption: bool) -> dict[str, Any]:
    try:
        plain = json.loads(sample.fields.get("json", b"{}"))
    except ValueError:
        plain = {}
    columns = plain if isinstance(plain, dict) else {}
    rest = {name: value for name, value in columns.items() if name not in ("caption", "metadata", "image_path")}
    return {"caption": _caption(sample) or "", **rest} if with_caption else rest


def _uniform(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns whose values are of several types become text, since parquet has one type a column."""
    for name in frame.columns:
        try:
            pa.array(frame[name], from_pandas=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            frame[name] = frame[name].map(lambda value: value if value is None else str(value))
    return frame
