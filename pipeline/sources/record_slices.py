"""Slices of sources that list their rows beforehand: a slice is a JSON file of records in the scratch folder."""

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pipeline.shards.storage import Folder, split_file
from pipeline.sources.source import Slice

Record = TypeVar("Record")


def record_slices(
    records: list[Record],
    rows_per_shard: int,
    scratch: Folder,
    name: str,
    digest: Callable[[list[Record]], str],
    stored: Callable[[Record], object] = lambda record: record,
) -> Iterator[Slice]:
    """A slice for every ``rows_per_shard`` records.

    ``stored`` gives what :func:`slice_records` returns of a record, as JSON; ``digest`` that of a slice's content.
    """
    for start in range(0, len(records), rows_per_shard):
        part = records[start : start + rows_per_shard]
        file = f"{name}-{start:09d}.json"
        scratch.write_atomic(file, json.dumps([stored(record) for record in part]).encode())
        yield Slice(count=len(part), digest=digest(part), where={"list": scratch.join(file)})


def slice_records(piece: Slice) -> list[Any]:
    """The stored records of a slice."""
    place, name = split_file(str(piece.where["list"]))
    records: list[Any] = json.loads(place.read_bytes(name))
    return records


def json_digest(content: object) -> str:
    """SHA-256 in hex of what JSON can say, such as records with the sizes and times of their files."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
