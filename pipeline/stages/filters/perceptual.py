"""Near duplicates by perceptual hash: images that look the same at 32 pixels.

The hash is the 64-bit DCT hash of Zauner (2010, "Implementation and benchmarking of perceptual image hash functions"),
as in the imagehash package: of the cosine transform of the 32×32 grey image, one bit for each of the 8×8 lowest
frequencies, set above their median. Two images are near duplicates if at most ``max_hamming`` bits differ. Clusters are
the connected components of such pairs; the first image of a cluster in the snapshot's order is kept. (The threshold is
not from a paper.)

Pairs are found without comparing all: the bits are divided into blocks, and two hashes that differ in d bits agree in
all but d blocks. For every choice of that many blocks the hashes are sorted by these blocks only, and equal neighbours
are compared; by the pigeonhole principle no pair is missed. The hashes of the whole dataset (16 bytes per sample with
its position, about 50 during sorting) must fit into the memory of one worker: a calculated 5 GB for 100 million.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.errors import SampleError
from pipeline.shards.pixels import WHITE, Header, composite, decode_pixels, read_header
from pipeline.stages.filters.duplicates import Positions, duplicates_table, in_duplicates
from pipeline.stages.filters.filter import Filter, Step, Verdict
from pipeline.stages.filters.view import ShardView

SIDE, LOW = 32, 8
MAX_PIXELS = 100_000_000
BATCH = 1024
Hashes = NDArray[np.uint64]


class HashDuplicates(Filter):
    """What filters by 64-bit hashes share: clusters of samples whose hashes differ in at most ``distance`` bits."""

    scratch: ClassVar[tuple[str, ...]] = ("hashes", "distinct", "pairs")

    @property
    def distance(self) -> int:
        """Largest number of bits in which the hashes of near duplicates differ, at most 16."""
        raise AssertionError("a filter says its distance")

    @staticmethod
    def hashes(view: ShardView) -> pa.Table:
        """Columns ``hash`` (uint64) and ``index`` (int32) of the samples that have a hash."""
        raise AssertionError("a filter says its hashes")

    def prepare(self, step: Step) -> None:
        """Make tables of hashes by shard, distinct hashes, pairs by choice of blocks, and clusters."""
        step.each_shard("hashes", self.hashes)
        step.each_part("distinct", 1, _distinct)
        masks = self._masks(step)
        step.each_part("pairs", len(masks), self._pairs)
        step.each_part("duplicates", 1, self._clusters)

    def _masks(self, step: Step) -> list[int]:
        count = sum(shard.samples for shard in step.shards)
        return block_masks(self.distance, count)

    def _pairs(self, step: Step, number: int) -> pa.Table:
        hashes = step.read("distinct", 0, columns=["hash"])["hash"].to_numpy()
        left, right = pairs_within(hashes, self._masks(step)[number], self.distance)
        return pa.table({"left": left.astype(np.int32), "right": right.astype(np.int32)})

    def _clusters(self, step: Step, number: int) -> pa.Table:
        distinct = step.read("distinct", 0)
        tables = [table for _, table in step.read_all("pairs", len(self._masks(step)))]
        pairs = pa.concat_tables(tables)
        label = join_pairs(len(distinct), pairs["left"].to_numpy(), pairs["right"].to_numpy())
        hashes, first = distinct["hash"].to_numpy(), distinct["first"].to_numpy()
        # The distinct hashes are in order of their first sample, so a cluster's smallest number is its first sample's.
        kept_of, sorter = first[label], np.argsort(hashes)
        ranked = hashes[sorter]
        dropped, kept = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for shard, table in step.read_all("hashes", len(step.shards)):
            position = (shard << 32) + table["index"].to_numpy().astype(np.int64)
            stays = kept_of[sorter[np.searchsorted(ranked, table["hash"].to_numpy())]]
            dropped.append(position[stays != position])
            kept.append(stays[stays != position])
        return duplicates_table(np.concatenate(dropped), np.concatenate(kept))


@dataclass(frozen=True, kw_only=True)
class PerceptualDuplicates(HashDuplicates):
    """Drop images that look like an earlier one: ``near_duplicate``. Undecodable images are kept."""

    name: ClassVar[str] = "near_duplicates"
    rank: ClassVar[int] = 6
    max_hamming: int = 4

    def check(self) -> None:
        """Require at most a quarter of the bits; above it, most pairs match by chance."""
        require(0 <= self.max_hamming <= 16, "max_hamming", self.max_hamming, "0 to 16 bits")

    @property
    def distance(self) -> int:
        """``max_hamming``."""
        return self.max_hamming

    @staticmethod
    def hashes(view: ShardView) -> pa.Table:
        """The hashes of all decodable images."""
        images = ((int(place), image) for place, image in zip(view.positions, view.images(), strict=True))
        return hashes_of((place, grey_thumbnail(image)) for place, image in images if image is not None)

    def judge(self, view: ShardView, step: Step) -> Verdict:
        """Judge by the table of duplicates."""
        return Verdict({"near_duplicate": in_duplicates(view, step, 1)})


def perceptual_hashes(grey: NDArray[np.uint8]) -> Hashes:
    """Hashes uint64 [n] of grey images uint8 [n, 32, 32]; the first bit is that of the mean."""
    low = _COSINES @ grey.astype(np.float64) @ _COSINES.T
    flat = low.reshape(len(grey), LOW * LOW)
    bits = flat > np.median(flat, axis=1, keepdims=True)
    hashes: Hashes = np.packbits(bits, axis=1).view(">u8").astype(np.uint64).reshape(len(grey))
    return hashes


def grey_thumbnail(image: bytes) -> NDArray[np.uint8] | None:
    """The image as uint8 [32, 32]; ``None`` if it is undecodable or too large."""
    try:
        header = read_header(image)
    except SampleError:
        return None
    if header.width * header.height > MAX_PIXELS:
        return None
    pixels = _grey_jpeg(image, header) if header.kind == "jpeg" else _grey(image, header)
    small: NDArray[np.uint8] | None = None if pixels is None else _shrunk(pixels)
    return small


def _grey_jpeg(image: bytes, header: Header) -> NDArray[np.uint8] | None:
    # JPEG's transform makes decoding at half size and below almost free.
    shrink = min(header.width, header.height) // (4 * SIDE)
    flag = next((flag for factor, flag in _REDUCED if shrink >= factor), cv2.IMREAD_GRAYSCALE)
    try:
        found = cv2.imdecode(np.frombuffer(image, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None
    return None if found is None else np.asarray(found, np.uint8)


def _grey(image: bytes, header: Header) -> NDArray[np.uint8] | None:
    try:
        pixels = decode_pixels(image, header)
    except SampleError:
        return None
    if pixels.ndim == 2:
        return pixels
    if pixels.shape[2] == 4:
        pixels = composite(pixels, WHITE)
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY))


def block_masks(distance: int, count: int) -> list[int]:
    """Bit masks: two hashes at most ``distance`` apart agree under at least one of them.

    The number of blocks minimises the cost for ``count`` hashes: more blocks mean more sorts and fewer comparisons.
    """

    def cost(blocks: int) -> float:
        bits = 64 * (blocks - distance) / blocks
        return math.comb(blocks, distance) * (count * math.log2(count + 2) + count**2 / 2**bits)

    blocks = min(range(distance + 1, distance + 7), key=cost)
    edges = [64 * number // blocks for number in range(blocks + 1)]
    parts = [sum(1 << bit for bit in range(low, high)) for low, high in itertools.pairwise(edges)]
    return [sum(chosen) for chosen in itertools.combinations(parts, blocks - distance)]


def pairs_within(hashes: Hashes, mask: int, distance: int) -> tuple[Positions, Positions]:
    """Indices int64 of the pairs of distinct ``hashes`` that agree under ``mask`` and differ in few bits."""
    keys = hashes & np.uint64(mask)
    order = np.argsort(keys, kind="stable")
    keys, ranked = keys[order], hashes[order]
    left, right = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start, end in _steps(keys):
        near = np.bitwise_count(ranked[start] ^ ranked[end]) <= distance
        left.append(order[start[near]])
        right.append(order[end[near]])
    return np.concatenate(left), np.concatenate(right)


def join_pairs(count: int, left: NDArray[np.integer], right: NDArray[np.integer]) -> Positions:
    """The smallest number in the cluster of each node, int64 [count]: union-find, vectorised over all pairs."""
    label = np.arange(count)
    while True:
        low = np.minimum(label[left], label[right])
        before = label.copy()
        # Attach both ends and their current roots to the smaller root, then compress all paths.
        for ends in (left, right):
            np.minimum.at(label, before[ends], low)
            np.minimum.at(label, ends, low)
        while (label[label] != label).any():
            label = label[label]
        if (label == before).all():
            return label


def _steps(keys: Hashes) -> Iterator[tuple[Positions, Positions]]:
    """Indices of all pairs of equal keys in sorted ``keys``: neighbours, then at distance two, and so on."""
    start = np.arange(len(keys))
    for step in itertools.count(1):
        start = start[start < len(keys) - step]
        start = start[keys[start] == keys[start + step]]
        if not len(start):
            return
        yield start, start + step


def hashes_of(thumbnails: Iterable[tuple[int, NDArray[np.uint8] | None]]) -> pa.Table:
    """The hashes of (position, grey image uint8 [32, 32]), without those that have none."""
    hashes, places = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    batch: list[tuple[int, NDArray[np.uint8]]] = []
    for place, small in thumbnails:
        if small is not None:
            batch.append((place, small))
        if len(batch) == BATCH:
            _add(batch, hashes, places)
    _add(batch, hashes, places)
    return pa.table({"hash": np.concatenate(hashes), "index": np.concatenate(places).astype(np.int32)})


def _add(batch: list[tuple[int, NDArray[np.uint8]]], hashes: list[Hashes], places: list[Positions]) -> None:
    if batch:
        hashes.append(perceptual_hashes(np.stack([small for _, small in batch])))
        places.append(np.array([place for place, _ in batch]))
        batch.clear()


def _distinct(step: Step, number: int) -> pa.Table:
    """Distinct hashes with the position of their first sample, sorted by that position."""
    hashes, positions = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for shard, table in step.read_all("hashes", len(step.shards)):
        hashes.append(table["hash"].to_numpy())
        positions.append((shard << 32) + table["index"].to_numpy().astype(np.int64))
    distinct, first = np.unique(np.concatenate(hashes), return_index=True)
    order = np.argsort(first)
    return pa.table({"hash": distinct[order], "first": np.concatenate(positions)[first[order]]})


def _shrunk(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    method = cv2.INTER_AREA if min(pixels.shape) > SIDE else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(pixels, (SIDE, SIDE), interpolation=method), np.uint8)


def _cosines() -> NDArray[np.float64]:
    """The lowest rows of the unscaled DCT-II, float64 [8, 32]."""
    angle = np.pi * np.outer(np.arange(LOW), 2 * np.arange(SIDE) + 1) / (2 * SIDE)
    return 2 * np.cos(angle)


_COSINES = _cosines()
_REDUCED = (
    (8, cv2.IMREAD_REDUCED_GRAYSCALE_8),
    (4, cv2.IMREAD_REDUCED_GRAYSCALE_4),
    (2, cv2.IMREAD_REDUCED_GRAYSCALE_2),
)
