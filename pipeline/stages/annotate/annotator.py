"""Sidecars for a whole snapshot: one per shard, made on the cluster's CPUs or GPUs, each once.

An :class:`Annotator` makes the table of a shard, with a column ``key``: features, pseudo boxes, features of regions.
The job passes a function that loads the annotator in the process that uses it.
"""

import logging
import pickle
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import require
from pipeline.errors import ClipmillError, DataError, SidecarError
from pipeline.shards.lease import lease
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import MAKER, TAR_DIGEST, sidecar_facts, sidecar_file, write_sidecar
from pipeline.shards.snapshot import Shard, Snapshot, publish_shards, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.tar import iterate_tar
from pipeline.stages.cores import threads
from pipeline.stages.ray_session import connect
from pipeline.stages.shard_tasks import Workers, data_resource

logger = logging.getLogger(__name__)

Prepared = TypeVar("Prepared")
MOST_THREADS = 4  # of a worker without a GPU: more workers use the cores better than more threads


class Annotator(Protocol):
    """Makes the table of one shard; ``maker`` is the digest of everything that determines it, such as weights."""

    maker: str

    def table(self, samples: Iterator[Sample], shard: Shard) -> pa.Table:
        """One row per sample, in order, with its ``key``; raises ``DataError`` for unusable samples."""
        ...


MakeAnnotator = Callable[[int], Annotator]
"""Picklable function that loads the annotator in its worker process, for a number of CPU threads."""


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """Name of the sidecars, and whether to replace those of another maker.

    With ``overwrite`` a finished sidecar is kept if it has the same maker and the metadata ``facts``.
    """

    name: str
    overwrite: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.name.isidentifier(), "name", self.name, "a plain word")


def annotate(
    snapshot: Snapshot, make: MakeAnnotator, annotation: Annotation, workers: Workers, use_gpu: bool | None = None
) -> Snapshot:
    """Make the sidecar of every shard of ``snapshot`` and publish it; finished shards are not read again.

    ``use_gpu`` ``None`` = if the cluster has GPUs.

    Raises:
        SidecarError: a sidecar of this name was made by another maker.
        DataError: a damaged shard.
        StorageError: the store failed (run the same command to continue), or another job holds the folder's lease.
    """
    digests: dict[tuple[str, str], str] = {}
    with lease(Folder(snapshot.folder), f"the making of {annotation.name}") as held:
        for number, digest in _annotated(snapshot, held.folder, make, annotation, workers, use_gpu):
            shard = snapshot.shards[number]
            digests[shard.name, shard.sha256] = digest
            done, total = len(digests), len(snapshot.shards)
            logger.info("%d of %d shards have %s, %s the last", done, total, annotation.name, shard.name)
        return _publish(held.folder, digests, annotation.name)


def annotate_shard(folder: Folder, shard: Shard, annotator: Annotator, annotation: Annotation) -> str:
    """Write the sidecar of one shard unless it exists; returns its SHA-256 (hex). Raises as :func:`annotate`."""
    done = _finished(folder, shard, annotator.maker, annotation)
    if done is not None:
        return done
    with folder.open(shard.tar) as file:
        table = annotator.table(iterate_tar(file, folder.join(shard.tar)), shard)
    if len(table) != shard.stored:
        raise DataError(f"{folder.join(shard.tar)} holds {len(table)} samples, the snapshot says {shard.stored}")
    return write_sidecar(folder, shard, annotation.name, table, annotator.maker)


def decoded_batches(
    samples: Iterator[Sample], size: int, pool: ThreadPoolExecutor, prepare: Callable[[bytes], Prepared | None]
) -> Iterator[list[tuple[Sample, Prepared | None]]]:
    """Batches of samples with their prepared images; the next batch is prepared by ``pool`` in the meantime."""

    def begin(sample: Sample) -> tuple[Sample, Any]:
        content = sample.image()
        return sample, None if content is None else pool.submit(prepare, content)

    ahead = [begin(sample) for sample in islice(samples, size)]
    while ahead:
        following = [begin(sample) for sample in islice(samples, size)]
        yield [(sample, future.result() if future is not None else None) for sample, future in ahead]
        ahead = following


def _annotated(
    snapshot: Snapshot,
    folder: Folder,
    make: MakeAnnotator,
    annotation: Annotation,
    workers: Workers,
    use_gpu: bool | None,
) -> Iterator[tuple[int, str]]:
    if workers.processes_count != 0:
        yield from _annotated_by_ray(snapshot, folder, make, annotation, workers, use_gpu)
        return
    work = _AnnotateShards(make, snapshot, folder, annotation, threads())
    yield from ((number, work.digest(number)) for number in range(len(snapshot.shards)))


def _annotated_by_ray(
    snapshot: Snapshot,
    folder: Folder,
    make: MakeAnnotator,
    annotation: Annotation,
    workers: Workers,
    use_gpu: bool | None,
) -> Iterator[tuple[int, str]]:
    import ray

    connect()
    places = _places(workers.processes_count, use_gpu, len(snapshot.shards))
    rows = [{"number": number} for number in range(len(snapshot.shards))]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _AnnotateShards,
        fn_constructor_args=(make, snapshot, folder, annotation, places.threads),
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
    """Number of actors and CPUs per actor: one actor per GPU, or on CPUs several with a few threads each."""
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


class _AnnotateShards:
    """The actor: holds the annotator; maps a batch of shard numbers to a batch of digests."""

    def __init__(
        self, make: MakeAnnotator, snapshot: Snapshot, folder: Folder, annotation: Annotation, threads: int
    ) -> None:
        self._make, self._snapshot, self._folder = make, snapshot, folder
        self._annotation, self._threads = annotation, threads
        self._annotator: Annotator | None = None

    def digest(self, number: int) -> str:
        # Load with the first shard: Ray loses the error of a bad checkpoint if __init__ raises it.
        self._annotator = self._annotator or self._make(self._threads)
        shard = self._snapshot.shards[number]
        return annotate_shard(self._folder, shard, self._annotator, self._annotation)

    def __call__(self, batch: Any) -> Any:
        digests, errors = [], []
        for number in batch["number"]:
            try:
                digests.append(self.digest(int(number)))
                errors.append(b"")
            except ClipmillError as error:
                # Return the error as a value: Ray passes on only the text of an actor's exception.
                digests.append("")
                errors.append(pickle.dumps(error))
        return {"number": batch["number"], "digest": np.array(digests, object), "error": np.array(errors, object)}


def _finished(folder: Folder, shard: Shard, maker: str, annotation: Annotation) -> str | None:
    """The digest of the existing sidecar of the same tar and maker."""
    name = sidecar_file(shard, annotation.name)
    try:
        with folder.open(name) as file:
            schema = pq.read_schema(file)
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    metadata = schema.metadata or {}
    if metadata.get(TAR_DIGEST) != shard.sha256.encode():
        return None
    facts = sidecar_facts(schema, folder.join(name), "--overwrite")
    same = all(facts.get(name) == value for name, value in annotation.facts.items())
    if metadata.get(MAKER) == maker.encode() and (same or not annotation.overwrite):
        return folder.digest(name)
    if not annotation.overwrite:
        ways = "--overwrite replaces it, another --name keeps both"
        raise SidecarError(f"{folder.join(name)} was made with another model or other settings; {ways}")
    return None


def _publish(folder: Folder, digests: dict[tuple[str, str], str], name: str) -> Snapshot:
    """The newest snapshot with the new sidecars, matched by tar: it may be newer than the annotated one."""
    latest = read_snapshot(folder.uri)
    shards = []
    for shard in latest.shards:
        digest = digests.get((shard.name, shard.sha256))
        shards.append(replace(shard, sidecars={**shard.sidecars, name: digest}) if digest else shard)
    bare = sum(name not in shard.sidecars for shard in shards)
    if bare:
        logger.warning("%s has %d shards without %s; run again to add them", latest.uri, bare, name)
    return publish_shards(
        folder,
        tuple(shards),
        fields=latest.fields,
        card=latest.card,
        options=latest.options,
        rows=latest.rows,
        dropped=latest.dropped,
        changes={f"{name}_added": sum(shard.stored for shard in shards if name in shard.sidecars)},
    )
