"""Features of the frames of videos as a sidecar, for methods over frozen features and for search within videos.

``00017.frames.parquet`` has one row per sample of the tar: ``key``, ``seconds`` (end of the video), ``times`` (seconds
of the frames, float32 [T], rising) and ``features``, float16 [T, D] as bytes in C order. Features are those of the
image tower before normalisation, since some methods average or transform them first. A video that is not readable has
no frames. The metadata hold ``teacher`` (the digest of the model), ``width`` D and ``frames_per_second``.
"""

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.errors import DataError, SidecarError
from pipeline.shards.media import VIDEO
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import FACTS, read_sidecar, sidecar_facts, sidecar_file
from pipeline.shards.snapshot import Shard, Snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.video_frames import Timeline
from pipeline.stages.annotate.annotator import Annotation, annotate
from pipeline.stages.annotate.embeddings import EmbedOptions
from pipeline.stages.shard_tasks import Workers

JOB = "jobs/embed_dataset.py frames"
NAME = "frames"
COLUMNS: Mapping[str, pa.DataType] = {
    "key": pa.string(),
    "seconds": pa.float32(),
    "times": pa.list_(pa.float32()),
    "features": pa.binary(),
}
SCHEMA = pa.schema(COLUMNS)


class StoredFrames(NamedTuple):
    """Features of the frames of one video: times float32 [T], features float [T, D], and its end in seconds."""

    times: NDArray[np.float32]
    features: NDArray[np.floating]
    seconds: float

    @property
    def timeline(self) -> Timeline:
        """The stored frames as a video of their own."""
        return Timeline(begin=0.0, end=self.seconds, frames=len(self.times), stamps=self.times.tolist())


class DecodedFrames(NamedTuple):
    """Some frames of a video: uint8 [T, 3, H, W] as the model reads them, their times, and the video's end."""

    pixels: Any
    times: NDArray[np.float32]
    seconds: float
    more: bool
    """Whether frames follow."""


class FrameModel(Protocol):
    """Interface of the model; ``maker`` is the digest of its weights, its preprocessing and the choice of frames."""

    maker: str
    facts: Mapping[str, Any]
    """Metadata for readers: ``teacher``, ``width`` and ``frames_per_second``."""

    def decode(self, sample: Sample, part: int) -> DecodedFrames | None:
        """The frames of one part of a video, a bounded number; ``None`` if unreadable. Called from many threads."""
        ...

    def encode(self, pixels: Sequence[Any]) -> NDArray[np.float32]:
        """Features [N, D], not normalised, of all frames of several parts."""
        ...


class MakeFrameModel(Protocol):
    """Picklable function that loads the model in its worker process, for a number of CPU threads."""

    def __call__(self, threads: int) -> FrameModel: ...


def embed_frames(
    snapshot: Snapshot,
    make: MakeFrameModel,
    options: EmbedOptions,
    workers: Workers,
    use_gpu: bool | None = None,
) -> Snapshot:
    """Make the features of the frames of every shard and publish them; finished shards are not read again.

    ``use_gpu`` ``None`` = if the cluster has GPUs.

    Raises:
        SettingError: the snapshot has no videos.
        SidecarError: the sidecar has features of another model or of other frames.
        DataError: a damaged shard.
        StorageError: the store failed (run the same command to continue), or another job holds the folder's lease.
    """
    has = ", ".join(snapshot.fields) or "none"
    require(VIDEO.field_of(dict.fromkeys(snapshot.fields)) is not None, "data", has, "samples with videos")
    annotation = Annotation(name=options.name, overwrite=options.overwrite)
    return annotate(snapshot, LoadFrameMaker(make, options.batch_size), annotation, workers, use_gpu)


def stored_frames(row: Mapping[str, Any]) -> StoredFrames:
    """The features in a row of the sidecar."""
    times = np.array(row["times"], np.float32)
    features = np.frombuffer(row["features"], np.float16)
    return StoredFrames(times, features.reshape(len(times), -1) if len(times) else features[None][:0], row["seconds"])


class ShardFrames:
    """The features of the frames of a shard's stored samples, in the order of the tar."""

    def __init__(self, table: pa.Table) -> None:
        self.keys = [str(key) for key in table["key"].to_pylist()]
        self.facts = sidecar_facts(table.schema, "the sidecar", JOB)
        self._table = table

    def __getitem__(self, row: int) -> StoredFrames:
        """The features of the sample in a row."""
        return stored_frames({name: self._table[name][row].as_py() for name in ("seconds", "times", "features")})


def read_frame_features(folder: Folder, shard: Shard, name: str = NAME, maker: str | None = None) -> ShardFrames:
    """The features of the frames of ``shard``.

    Raises:
        SidecarError: missing, of another tar, by another maker, or without features of frames.
    """
    table = read_sidecar(folder, shard, name, JOB, maker)
    file = folder.join(sidecar_file(shard, name))
    width = sidecar_facts(table.schema, file, JOB).get("width")
    if not isinstance(width, int) or not set(COLUMNS) <= set(table.column_names):
        raise SidecarError(f"{file} holds no features of frames; make it with {JOB}")
    return ShardFrames(table)


@dataclass(frozen=True)
class LoadFrameMaker:
    """Load the annotator of frames."""

    make: MakeFrameModel
    batch_size: int

    def __call__(self, threads: int) -> "FrameMaker":
        return FrameMaker(self.make(threads), self.batch_size, threads)


@dataclass
class _Clip:
    """Features of a video under construction."""

    key: str
    seconds: float = 0.0
    times: list[float] = field(default_factory=list)
    features: list[NDArray[np.float16]] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        features = b"".join(part.tobytes() for part in self.features)
        return {"key": self.key, "seconds": self.seconds, "times": self.times, "features": features}


class FrameMaker:
    """Makes the table of a shard's samples; decodes ahead in ``threads`` threads.

    A video is decoded in parts, so the memory does not depend on its length.
    """

    def __init__(self, model: FrameModel, batch_size: int, threads: int) -> None:
        self._model, self._batch_size, self._threads = model, batch_size, threads
        self.maker = model.maker

    def table(self, samples: Iterator[Sample], shard: Shard) -> pa.Table:
        """The sidecar's rows; raises ``DataError`` for features that half precision cannot hold."""
        return self.made(samples)

    def made(self, samples: Iterator[Sample]) -> pa.Table:
        """The rows of these samples, in order."""
        clips: list[_Clip] = []
        waiting: list[tuple[_Clip, DecodedFrames]] = []
        with ThreadPoolExecutor(self._threads, thread_name_prefix="frames") as pool:
            for clip, part in self._parts(samples, clips, pool):
                waiting.append((clip, part))
                if sum(len(one.times) for _, one in waiting) >= self._batch_size:
                    self._encode(waiting)
                    waiting.clear()
        self._encode(waiting)
        table = pa.Table.from_pylist([clip.row() for clip in clips], schema=SCHEMA)
        return table.replace_schema_metadata({FACTS: json.dumps(dict(self._model.facts)).encode()})

    def _parts(
        self, samples: Iterator[Sample], clips: list[_Clip], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[_Clip, DecodedFrames]]:
        """The parts of all videos in order; the first parts of the next videos are decoded in the meantime."""
        ahead: deque[tuple[Sample, Future[DecodedFrames | None]]] = deque()

        def begin() -> None:
            sample = next(samples, None)
            if sample is not None:
                ahead.append((sample, pool.submit(self._model.decode, sample, 0)))

        for _ in range(2 * self._threads):
            begin()
        while ahead:
            sample, future = ahead.popleft()
            begin()
            clips.append(_Clip(sample.key))
            found, number = future.result(), 0
            while found is not None:
                number += 1
                following = pool.submit(self._model.decode, sample, number) if found.more else None
                yield clips[-1], found
                found = following.result() if following else None

    def _encode(self, waiting: Sequence[tuple[_Clip, DecodedFrames]]) -> None:
        if not waiting:
            return
        features = self._model.encode([part.pixels for _, part in waiting])
        with np.errstate(over="ignore"):
            halves = features.astype(np.float16)
        starts = np.cumsum([0, *(len(part.times) for _, part in waiting)])
        for (clip, part), start in zip(waiting, starts[:-1], strict=True):
            rows = halves[start : start + len(part.times)]
            if not np.isfinite(rows).all():
                raise DataError(
                    f"sample {clip.key}: the model gives features that are not finite, or too large for half precision"
                )
            clip.seconds = part.seconds
            clip.times += part.times.tolist()
            clip.features.append(rows)
