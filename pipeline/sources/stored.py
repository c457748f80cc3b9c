"""The labelled images or point clouds of a snapshot, in its order, for few-shot learning on one's own data."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, ClassVar

from pipeline.errors import DataError, SampleError
from pipeline.shards.media import MEDIA
from pipeline.shards.sample import Sample
from pipeline.shards.selection import read_selection
from pipeline.shards.snapshot import Snapshot, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.tar import TarShard
from pipeline.sources.source import Part, Row, Slice

OPEN_TARS = 8


@dataclass(frozen=True, kw_only=True)
class StoredSamples:
    """The visible samples of a snapshot; each needs a class."""

    kind: ClassVar[str] = "stored"
    has_captions: ClassVar[bool] = False

    data: str
    """Snapshot of the data set: folder@id."""
    label: str = "label"
    """Key of the class in the samples' json; cls for webdataset's member .cls."""
    medium: str = "image"
    """Medium of the samples."""

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; the digest covers the snapshot and the row numbers."""
        total = self._snapshot.samples
        for start in range(0, total, rows_per_shard):
            count = min(rows_per_shard, total - start)
            said = f"{self._snapshot.digest} {self.label} {start} {count}"
            yield Slice(count=count, digest=hashlib.sha256(said.encode()).hexdigest(), where={"start": start})

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`; a sample without a part of the medium is a row with a
        problem."""
        start = int(piece.where["start"])
        for number in range(start, start + piece.count):
            yield self._row(self._sample(number))

    def schema(self) -> Mapping[str, type]:
        """The class."""
        return {"label": str}

    def labels(self) -> list[str]:
        """The class of every sample, in order.

        Raises:
            DataError: a sample has no class.
        """
        return [self._label(self._sample(number)) for number in range(self._snapshot.samples)]

    @property
    def media(self) -> tuple[str, ...]:
        """The medium."""
        return (self.medium,)

    @property
    def _snapshot(self) -> Snapshot:
        return _listed(self.data)

    @cached_property
    def _ends(self) -> list[int]:
        ends = [0]
        for shard in self._snapshot.shards:
            ends.append(ends[-1] + shard.samples)
        return ends

    def _sample(self, number: int) -> Sample:
        at = next(place for place, end in enumerate(self._ends[1:]) if number < end)
        tar, visible = _opened(self.data, at)
        index = number - self._ends[at]
        return tar[index if visible is None else int(visible[index])]

    def _label(self, sample: Sample) -> str:
        if self.label == "cls" and "cls" in sample.fields:
            return sample.fields["cls"].decode("utf-8", errors="replace").strip()
        try:
            record = json.loads(sample.fields.get("json", b"{}"))
        except ValueError:
            record = {}
        value = record.get(self.label) if isinstance(record, dict) else None
        if not isinstance(value, str | int):
            keys = ", ".join(sorted(record)[:8]) if isinstance(record, dict) else ""
            raise DataError(f"{self.data}: sample {sample.key} has no class under {self.label!r}; it has {keys or '-'}")
        return str(value)

    def _row(self, sample: Sample) -> Row:
        medium, columns = MEDIA[self.medium], {"label": self._label(sample)}
        body, problem = sample.body(medium), None
        if body is None:
            kind = "no_picture" if self.medium == "image" else f"no_{self.medium}"
            problem = SampleError("failed_to_download", kind, f"the sample is without {medium.noun}")
        return Row(url=sample.key, parts=(Part(self.medium, body),), columns=columns, problem=problem)


@lru_cache(maxsize=OPEN_TARS)
def _listed(data: str) -> Snapshot:
    return read_snapshot(data)


@lru_cache(maxsize=OPEN_TARS)
def _opened(data: str, number: int) -> tuple[TarShard, Any]:
    """The tar of a shard, mapped, and its selection; a remote tar is copied into a file without a name."""
    snapshot = _listed(data)
    place, shard = Folder(snapshot.folder), snapshot.shards[number]
    visible = read_selection(place, shard)
    if place.is_local:
        return TarShard(Path(str(place.path)) / shard.tar), visible
    with NamedTemporaryFile(suffix=".tar") as file:
        place.fs.get_file(f"{place.path}/{shard.tar}", file.name)
        return TarShard(file.name), visible
