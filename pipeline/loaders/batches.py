"""Batches for training and evaluation: a torch DataLoader over an order of sample numbers.

What a batch holds is said by *readers*, those of :mod:`pipeline.loaders.readers` or a method's own. Each reads one or
several keys: it turns a sample into values and a list of these into tensors. A batch is the union of what its readers
give. A sample that a reader cannot read (an undecodable image, no caption) is replaced by the next readable one of its
shard, so that batches keep their size and every run makes the same replacement; ``replaced`` counts them.
"""

import logging
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice, starmap
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline.config import require
from pipeline.errors import ClipmillError, DataError
from pipeline.loaders.cache import FileCache
from pipeline.loaders.mixture import MixedSamples, TrainingData, open_samples
from pipeline.loaders.order import SampleOrder
from pipeline.loaders.samples import Samples, UnreadableSample, check_fields
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import Wanted
from pipeline.shards.snapshot import Snapshot
from pipeline.stages.cores import cores

logger = logging.getLogger(__name__)

DEFAULT_WORKERS = 4
MAX_WARNINGS = 20  # a process logs this many unreadable samples as warnings

Batch = dict[str, Tensor]
Row = Mapping[str, Any]
"""The values that one reader reads from one sample, by key."""
COUNTED = "replaced"


class SamplePosition(NamedTuple):
    """Position of a training sample in the order; randomness is a function of the seed and of this position."""

    epoch: int
    number: int
    """Number of the sample in the snapshot."""


class Reader(Protocol):
    """One or several keys of a batch. Readers pickle: they travel to the loader's processes.

    A reader of sidecars has them in ``sidecars``, a sequence of :class:`~pipeline.shards.sidecar.Wanted`. A reader that
    can leave a part of its work to the training's device has ``on_device()``, which gives a :class:`DeviceReader`.
    """

    @property
    def fields(self) -> Sequence[str]:
        """The sample fields that must exist in the snapshot (``image`` for an image of any format)."""
        ...

    def read(self, sample: Sample, at: SamplePosition | None) -> Row:
        """The values of one sample, by key; raises :class:`UnreadableSample`.

        ``at`` is ``None`` in evaluation: nothing is random then.
        """
        ...

    def collate(self, rows: list[Row]) -> Batch:
        """The batch of ``rows``, with the same keys for every batch."""
        ...


class DeviceReader(Reader, Protocol):
    """A reader whose batches are finished in the training process."""

    def finish(self, batch: Batch, device: torch.device) -> Batch:
        """The batch with what :meth:`collate` left to do done on ``device``."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How the data loader reads samples; no option here changes which samples a batch holds."""

    loader_workers: int | None = None
    """Decoding processes per training worker; 0 decodes in the worker; none is four, or fewer where cores are fewer."""
    prefetch: int = 4
    """Batches that each decoding process prepares ahead, 1 to 64."""
    image_decoder: Literal["cpu", "cuda"] = "cpu"
    """Where training decodes JPEGs: cpu (the decoding processes) or cuda (the GPU that trains, by nvJPEG), which frees
    cores. Only for methods that read one random crop of an image. Pixels differ by rounding."""
    open_shards: int = 128
    """Shards that each decoding process keeps memory-mapped, 1 or more."""
    cache_folder: str = ""
    """Folder of the cache of remote shards; empty for $CLIPMILL_CACHE or ~/.cache/clipmill."""
    cache_gigabytes: float = 100.0
    """Size limit of the cache, in gigabytes."""

    def __post_init__(self) -> None:
        workers = self.loader_workers
        require(workers is None or 0 <= workers <= 256, "loader_workers", workers, "0 to 256, or none")
        require(1 <= self.prefetch <= 64, "prefetch", self.prefetch, "1 to 64")
        require(self.open_shards >= 1, "open_shards", self.open_shards, "1 or more")
        require(self.cache_gigabytes > 0, "cache_gigabytes", self.cache_gigabytes, "more than 0")

    def processes(self) -> int:
        """How many processes decode for this one."""
        return min(DEFAULT_WORKERS, cores()) if self.loader_workers is None else self.loader_workers

    def cache(self) -> FileCache:
        """The cache that these settings describe."""
        return FileCache(self.cache_folder, int(self.cache_gigabytes * 2**30))


def training_batches(
    snapshot: TrainingData,
    readers: Sequence[Reader],
    order: SampleOrder,
    *,
    steps: range,
    rank: int = 0,
    world: int = 1,
    config: LoaderConfig,
) -> Generator[Batch, None, None]:
    """The batches of one rank for the given steps of ``order``, each with B / world rows.

    Raises:
        DataError: the snapshot lacks a field, a shard is damaged, or all samples of a shard are unreadable.
        SettingError: two readers give the same key, or the GPU cannot decode what they read.
    """
    sampler = _Steps(order, steps, rank, world)
    if config.image_decoder == "cpu":
        return _batches(snapshot, readers, sampler, config)
    device, on_device = decoding_device(), [reader.on_device() for reader in readers if hasattr(reader, "on_device")]
    allowed = "cpu, since this method's own readers decode its images"
    require(bool(on_device), "image_decoder", config.image_decoder, allowed)
    others = [reader for reader in readers if not hasattr(reader, "on_device")]
    return _finished(_batches(snapshot, [*on_device, *others], sampler, config), on_device, device)


def sidecars_of(readers: Iterable[object]) -> tuple[Wanted, ...]:
    """The sidecars that the readers read, each once."""
    found = {wanted.name: wanted for reader in readers for wanted in getattr(reader, "sidecars", ())}
    return tuple(found.values())


def decoding_device() -> torch.device:
    """The GPU of this training process; raises ``SettingError`` if it has none."""
    require(torch.cuda.is_available(), "image_decoder", "cuda", "cpu, since torch finds no GPU here")
    return torch.device("cuda", torch.cuda.current_device())


def snapshot_batches(
    snapshot: Snapshot,
    readers: Sequence[Reader],
    *,
    batch_size: int,
    limit: int | None = None,
    config: LoaderConfig,
) -> Iterator[Batch]:
    """The snapshot's first ``limit`` samples in their own order, once; the last batch may be smaller.

    Unreadable samples are left out, not replaced: evaluation must not count one twice. ``replaced`` counts them.

    Raises:
        DataError: as :func:`training_batches`.
    """
    count = snapshot.samples if limit is None else min(limit, snapshot.samples)
    batches = _batches(snapshot, readers, _InOrder(count, batch_size), config, replace=False)
    return (batch for batch in batches if len(batch) > 1)


class _Steps(Sampler[list[SamplePosition]]):
    def __init__(self, order: SampleOrder, steps: range, rank: int, world: int) -> None:
        self.order, self.steps, self.rank, self.world = order, steps, rank, world

    def __iter__(self) -> Iterator[list[SamplePosition]]:
        for step in self.steps:
            yield list(starmap(SamplePosition, self.order.batch(step, self.rank, self.world).tolist()))

    def __len__(self) -> int:
        return len(self.steps)


class _InOrder(Sampler[list[SamplePosition]]):
    def __init__(self, count: int, batch_size: int) -> None:
        self.count, self.batch_size = count, batch_size

    def __iter__(self) -> Iterator[list[SamplePosition]]:
        numbers = iter(range(self.count))
        while chunk := list(islice(numbers, self.batch_size)):
            yield [SamplePosition(0, number) for number in chunk]

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)


class _Readable(Dataset[Batch | ClipmillError]):
    """Loads whole batches, so that the text of a batch is tokenised and cut together.

    ``replace=False`` is for evaluation: unreadable samples are left out, and readers get no position.
    """

    def __init__(self, samples: Samples | MixedSamples, readers: Sequence[Reader], replace: bool) -> None:
        self.samples, self.readers, self.replace = samples, readers, replace
        self.warned = 0

    def __getitems__(self, positions: list[SamplePosition]) -> Batch | ClipmillError:
        # An exception would reach the user inside a long DataLoader traceback; returned as a value it is one sentence.
        try:
            return self._batch(positions)
        except ClipmillError as error:
            return error

    def _batch(self, positions: list[SamplePosition]) -> Batch:
        rows = [self._row(position) for position in positions]
        kept = [row for row, _ in rows if row is not None]
        batch: Batch = {}
        for number, reader in enumerate(self.readers if kept else ()):
            part = reader.collate([row[number] for row in kept])
            twice = sorted(part.keys() & {*batch, COUNTED})
            require(not twice, "readers", f"two that give {', '.join(twice)}", "one reader for each key of a batch")
            batch |= part
        batch[COUNTED] = torch.tensor(sum(skipped for _, skipped in rows))
        return batch

    def _row(self, position: SamplePosition) -> tuple[list[Row] | None, int]:
        """Each reader's values for the sample at ``position`` or its replacement, and how many were unreadable."""
        skipped, problem = 0, ""
        at = position if self.replace else None
        for sample in self.samples.from_here(position.number):
            try:
                return [reader.read(sample, at) for reader in self.readers], skipped
            except UnreadableSample as error:
                skipped, problem = skipped + 1, str(error)
                self._warn(sample.key, error)
                if not self.replace:
                    return None, skipped
        raise DataError(f"{self.samples.where(position.number)}: no sample is readable; the last one: {problem}")

    def _warn(self, key: str, error: UnreadableSample) -> None:
        level = logging.WARNING if self.warned < MAX_WARNINGS else logging.DEBUG
        self.warned += 1
        verdict = "replaced" if self.replace else "left out"
        logger.log(level, "sample %s is unreadable and is %s: %s", key, verdict, error)
        if self.warned == MAX_WARNINGS:
            logger.warning("further unreadable samples are counted and no longer named")


def _batches(
    snapshot: TrainingData,
    readers: Sequence[Reader],
    sampler: Sampler[list[SamplePosition]],
    config: LoaderConfig,
    replace: bool = True,
) -> Generator[Batch, None, None]:
    check_fields(snapshot, [field for reader in readers for field in reader.fields])
    samples = open_samples(snapshot, config.cache(), config.open_shards, sidecars_of(readers))
    workers = config.processes()
    loader: DataLoader[Batch | ClipmillError] = DataLoader(
        _Readable(samples, readers, replace),
        batch_sampler=sampler,
        num_workers=workers,
        prefetch_factor=config.prefetch if workers else None,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_one_thread,
        generator=torch.Generator(),  # the loader seeds its processes from it; ours must not disturb the model's
    )
    return _raising(loader)


def _raising(batches: Iterable[Batch | ClipmillError]) -> Generator[Batch, None, None]:
    for batch in batches:
        if isinstance(batch, ClipmillError):
            raise batch
        yield batch


def _finished(
    batches: Generator[Batch, None, None], readers: Sequence[DeviceReader], device: torch.device
) -> Generator[Batch, None, None]:
    with closing(batches):
        for batch in batches:
            for reader in readers:
                batch = reader.finish(batch, device)
            yield batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _one_thread(worker: int) -> None:
    # Decoding runs in parallel processes; threads within each of them would only compete for cores.
    torch.set_num_threads(1)
