"""Selections: the visible samples of a tar.

Filters, opt-outs and removed source rows hide samples without changing a tar; a selection that lists a sample twice
repeats it. ``{folder}/_selections/{sha256}.parquet`` has one column ``index``: ascending positions in the tar. A
selection is named by its content, so snapshots can share it and rewriting it is safe.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.shards.parquet import parse_parquet
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Shard
from pipeline.shards.storage import Folder
from pipeline.shards.tar import iterate_tar

SELECTIONS = "_selections"
Indices = NDArray[np.int32]


def select(folder: Folder, shard: Shard, keep: NDArray[np.bool_] | NDArray[np.integer]) -> Shard:
    """``shard`` restricted to the visible samples in ``keep``; writes the selection.

    ``keep`` is a mask bool [samples], or positions int [any] among the visible samples, ascending, repeats allowed.

    Raises:
        ValueError: a mask of the wrong length, positions out of range or not ascending.
        DataError: the shard's current selection is missing or damaged.
        StorageError: the file system or store failed.
    """
    positions = np.asarray(keep)
    if positions.dtype == np.bool_:
        if len(positions) != shard.samples:
            raise ValueError(f"a mask of {len(positions)} for {shard.samples} samples of {shard.tar}")
        positions = np.flatnonzero(positions)
    if positions.size and (positions[0] < 0 or positions[-1] >= shard.samples or (np.diff(positions) < 0).any()):
        raise ValueError(f"positions in {shard.tar} have to ascend within 0 to {shard.samples - 1}")
    present = read_selection(folder, shard)
    indices = (positions if present is None else present[positions]).astype(np.int32)
    if len(indices) == shard.stored and (np.diff(indices) == 1).all():
        return replace(shard, samples=shard.stored, selection="")
    return replace(shard, samples=len(indices), selection=write_selection(folder, indices))


def write_selection(folder: Folder, indices: Indices) -> str:
    """Store ascending positions, int32 [any]; returns the SHA-256 (hex) that names the file.

    Raises:
        StorageError: the file system or store failed.
    """
    buffer = BytesIO()
    pq.write_table(pa.table({"index": pa.array(indices, pa.int32())}), buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    place = folder.folder(SELECTIONS)
    if not place.exists(f"{digest}.parquet"):
        place.write_atomic(f"{digest}.parquet", buffer.getvalue())
    return digest


def read_selection(folder: Folder, shard: Shard) -> Indices | None:
    """Positions in the tar of the visible samples of ``shard``, int32 [samples]; ``None`` = all.

    Raises:
        DataError: the selection is missing, damaged, or does not fit the shard.
    """
    if not shard.selection:
        return None
    place, file = folder.folder(SELECTIONS), f"{shard.selection}.parquet"
    try:
        content = place.read_bytes(file)
    except FileNotFoundError as error:
        raise DataError(f"{place.join(file)} is missing; {shard.tar} cannot be read without it") from error
    if hashlib.sha256(content).hexdigest() != shard.selection:
        raise DataError(f"{place.join(file)} is damaged: its bytes do not match its name")
    indices = _parse_indices(content)
    if indices is None:
        raise DataError(f"{place.join(file)} is no selection: it has no column index of whole numbers")
    inside = not len(indices) or (indices[0] >= 0 and indices[-1] < shard.stored and (np.diff(indices) >= 0).all())
    if len(indices) != shard.samples or not inside:
        raise DataError(f"{place.join(file)} does not fit {shard.tar} with {shard.samples} of {shard.stored} samples")
    return indices


def _parse_indices(content: bytes) -> Indices | None:
    try:
        column = parse_parquet(content)["index"]
    except (pa.ArrowInvalid, OSError, KeyError):
        return None
    return column.to_numpy() if column.type == pa.int32() and not column.null_count else None


def open_tar(folder: Folder, shard: Shard) -> BinaryIO:
    """The tar of ``shard`` for binary reading; raises ``DataError`` if it is missing."""
    try:
        return folder.open(shard.tar)
    except FileNotFoundError as error:
        raise DataError(f"{folder.join(shard.tar)} is missing, though a snapshot lists it") from error


def read_samples(folder: Folder, shard: Shard) -> Iterator[Sample]:
    """The visible samples of ``shard`` in the order of the tar, local or remote, with repeats.

    Raises:
        DataError: the tar is missing; see :func:`read_selection` and :func:`pipeline.shards.tar.iterate_tar`.
    """
    indices = read_selection(folder, shard)
    numbers, times = (None, None) if indices is None else np.unique(indices, return_counts=True)
    count = following = 0
    with open_tar(folder, shard) as file:
        for sample in iterate_tar(file, folder.join(shard.tar)):
            if numbers is None or times is None:
                yield sample
            elif following < len(numbers) and numbers[following] == count:
                yield from [sample] * int(times[following])
                following += 1
            count += 1
    if count != shard.stored:
        raise DataError(f"{folder.join(shard.tar)} holds {count} samples, the snapshot says {shard.stored}")
