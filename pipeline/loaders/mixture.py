"""Several snapshots as one, in given proportions.

Every global batch holds the same number of samples of each snapshot: the batch is divided by the weights, as closely as
whole samples and lanes allow. Each snapshot has its own epochs, so a small snapshot with a large weight repeats more
often. Every sample is seen once per epoch of its snapshot. In a snapshot smaller than a few batches, lanes end their
epochs at different steps, so a sample may repeat before another is seen for the first time. Samples are numbered
through all snapshots, so augmentation, replacement and the position of a run work as with one snapshot.
"""

import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from pipeline.config import require
from pipeline.errors import SettingError
from pipeline.loaders.cache import FileCache
from pipeline.loaders.order import Integers, Order, RandomStream, random_bits
from pipeline.loaders.samples import Samples
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import Wanted
from pipeline.shards.snapshot import Shard, Snapshot, read_snapshot

CLOSE = 0.01
"""Largest relative error of a part's size, compared with its weight, for whole multiples of the lanes."""


@dataclass(frozen=True)
class Mixture:
    """Snapshots with positive weights, which need not sum to one; has the interface of a snapshot."""

    parts: tuple[Snapshot, ...]
    weights: tuple[float, ...]

    @property
    def samples(self) -> int:
        """Samples of all parts."""
        return sum(part.samples for part in self.parts)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Shards of all parts."""
        return tuple(shard for part in self.parts for shard in part.shards)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that all parts have."""
        return tuple(field for field in self.parts[0].fields if all(field in part.fields for part in self.parts))

    @property
    def uri(self) -> str:
        """The address that :func:`read_data` reads, with the snapshots pinned."""
        return ",".join(f"{part.uri}={weight:g}" for part, weight in zip(self.parts, self.weights, strict=True))

    @property
    def digest(self) -> str:
        """SHA-256 hex of the content and the weights of the parts."""
        described = [(part.digest, weight) for part, weight in zip(self.parts, self.weights, strict=True)]
        return hashlib.sha256(repr(described).encode()).hexdigest()


TrainingData = Snapshot | Mixture


def places(data: str) -> list[tuple[str, float | None]]:
    """The addresses in a ``data`` setting with their weights: one without a weight, or ``A=0.7,B=0.3``.

    Raises:
        SettingError: a weight that is not a positive number, or an address that occurs twice.
    """
    if "," not in data:
        return [(data, None)]
    found: list[tuple[str, float | None]] = []
    for part in data.split(","):
        address, _, weight = part.strip().rpartition("=")
        found.append((address, _weight(data, weight) if address else None))
        require(bool(address), "data", data, "FOLDER=WEIGHT for each of several folders")
    addresses = [address for address, _ in found]
    require(len(set(addresses)) == len(addresses), "data", data, "every folder once")
    return found


def read_data(data: str) -> TrainingData:
    """The snapshot, or the mixture of snapshots, that a ``data`` setting names.

    Raises:
        SettingError: as :func:`places`.
        SnapshotError: no snapshot at an address.
    """
    return mixed(places(data))


def mixed(parts: Sequence[tuple[str, float | None]]) -> TrainingData:
    """The data at the addresses that :func:`places` returns."""
    snapshots = tuple(read_snapshot(address) for address, _ in parts)
    if len(snapshots) == 1:
        return snapshots[0]
    folders = [snapshot.folder for snapshot in snapshots]
    require(len(set(folders)) == len(folders), "data", folders, "every folder once")
    return Mixture(snapshots, tuple(weight or 0.0 for _, weight in parts))


def parts_of(data: TrainingData) -> tuple[Snapshot, ...]:
    """The snapshots that ``data`` is made of."""
    return data.parts if isinstance(data, Mixture) else (data,)


def make_order(
    data: TrainingData, *, seed: int, batch_size: int, lanes: int, shuffle_block: int
) -> "Order | MixedOrder":
    """The order of the samples of ``data``; raises ``SettingError`` as :class:`Order` and :func:`divided` do."""
    sizes = [[shard.samples for shard in part.shards] for part in parts_of(data)]
    if not isinstance(data, Mixture):
        return Order(sizes[0], seed=seed, batch_size=batch_size, lanes=lanes, shuffle_block=shuffle_block)
    counts = divided(batch_size, data.weights, lanes)
    orders = [
        Order(part, seed=_seed(seed, number), batch_size=count, lanes=lanes, shuffle_block=shuffle_block)
        for number, (part, count) in enumerate(zip(sizes, counts, strict=True))
    ]
    return MixedOrder(orders)


def divided(batch_size: int, weights: Sequence[float], lanes: int) -> list[int]:
    """How many samples of a batch each part gives, by largest remainders (Hamilton's method).

    Parts are whole multiples of the lanes, or of their largest divisor with which every part is within ``CLOSE`` of
    its weight: lanes spread a part's samples over its shards.

    Raises:
        SettingError: a weight too small for one sample per batch.
    """
    shares = [batch_size * weight / sum(weights) for weight in weights]
    common = math.gcd(lanes, batch_size)
    for unit in (unit for unit in range(common, 0, -1) if common % unit == 0):
        counts = [unit * count for count in _apportioned(batch_size // unit, [share / unit for share in shares])]
        close = all(abs(count - share) <= CLOSE * share for count, share in zip(counts, shares, strict=True))
        if close or unit == 1:
            break
    if min(counts) < 1:
        raise SettingError("data", min(weights), f"weights of at least one sample in a batch of {batch_size}")
    return counts


class MixedOrder:
    """Which samples make up which global batch of a mixture: :class:`Order`, for several snapshots.

    The samples of each part are spread evenly over a batch, so that every rank gets its share of each part.
    """

    def __init__(self, orders: Sequence[Order]) -> None:
        self.orders = tuple(orders)
        self.samples = sum(order.samples for order in orders)
        self.batch_size = sum(order.batch_size for order in orders)
        self.lanes = sum(order.lanes for order in orders)
        self._first = [0, *accumulate(order.samples for order in orders)]
        middles = np.concatenate([(np.arange(order.batch_size) + 0.5) / order.batch_size for order in orders])
        self._places = np.argsort(middles, kind="stable")

    def steps(self, epochs: float) -> int:
        """The smallest number of global batches with ``epochs`` times as many samples as all parts together."""
        return math.ceil(epochs * self.samples / self.batch_size)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Integers:
        """Like :meth:`Order.batch`; sample numbers run through all parts, epochs are those of the part."""
        require(self.batch_size % world == 0, "batch_size", self.batch_size, f"a multiple of the {world} workers")
        whole = np.concatenate(
            [order.batch(step) + [0, first] for order, first in zip(self.orders, self._first, strict=False)]
        )
        per_rank = self.batch_size // world
        rows: Integers = whole[self._places[rank * per_rank : (rank + 1) * per_rank]]
        return rows


class MixedSamples:
    """The samples of a mixture by number: :class:`Samples`, for several snapshots."""

    def __init__(self, mixture: Mixture, cache: FileCache, open_shards: int, sidecars: Collection[Wanted] = ()) -> None:
        each = max(1, open_shards // len(mixture.parts))
        self._parts = [Samples(part, cache, each, sidecars) for part in mixture.parts]
        self._first = [0, *accumulate(len(part) for part in self._parts)]

    def __len__(self) -> int:
        return self._first[-1]

    def from_here(self, number: int) -> Iterator[Sample]:
        """As :meth:`Samples.from_here`; the samples have the number of their part."""
        at, local = self._part(number)
        for sample in self._parts[at].from_here(local):
            sample.part = at
            yield sample

    def where(self, number: int) -> str:
        """As :meth:`Samples.where`."""
        at, local = self._part(number)
        return self._parts[at].where(local)

    def _part(self, number: int) -> tuple[int, int]:
        at = int(np.searchsorted(self._first, number, side="right")) - 1
        return at, number - self._first[at]


def open_samples(
    data: TrainingData, cache: FileCache, open_shards: int, sidecars: Collection[Wanted] = ()
) -> Samples | MixedSamples:
    """Access to the samples of ``data`` by number, with their rows of ``sidecars``."""
    if isinstance(data, Mixture):
        return MixedSamples(data, cache, open_shards, sidecars)
    return Samples(data, cache, open_shards, sidecars)


def _seed(seed: int, number: int) -> int:
    """The seed of a part: parts of equal size, and the same part with other seeds, are shuffled differently."""
    return int(random_bits(seed, RandomStream.PARTS, number, 0, 1)[0] >> np.uint64(1))


def _weight(data: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    require(0 < weight < math.inf, "data", data, "FOLDER=WEIGHT for each of several folders, weights more than 0")
    return weight


def _apportioned(total: int, shares: Sequence[float]) -> list[int]:
    counts = [math.floor(share) for share in shares]
    # Of equal remainders the first gets the sample; rounding makes float noise equal.
    remainders = [round(share - count, 9) for share, count in zip(shares, counts, strict=True)]
    for place in sorted(range(len(shares)), key=lambda place: -remainders[place])[: total - sum(counts)]:
        counts[place] += 1
    return counts
