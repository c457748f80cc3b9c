"""The samples of a snapshot by number, read from memory-mapped tars."""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from itertools import accumulate
from typing import Any, Protocol

import pyarrow as pa

from pipeline.config import parse_json
from pipeline.errors import DataError, SidecarError
from pipeline.loaders.cache import FileCache
from pipeline.shards.media import MEDIA
from pipeline.shards.sample import Sample
from pipeline.shards.selection import Indices, read_selection
from pipeline.shards.sidecar import SidecarRows, Wanted, sidecar_file
from pipeline.shards.snapshot import Shard, Snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.tar import TarShard
from pipeline.shards.text import decoded

HELD_BYTES = 64 << 20  # cache of sidecar rows, in each process


class UnreadableSample(Exception):
    """A sample that cannot become an element of a batch: no decodable image, no caption.

    Training counts it and uses the next sample of the shard; users never see this exception.
    """


def json_of_sample(sample: Sample) -> dict[str, Any]:
    """The object in the sample's ``json``; empty where it has none.

    Raises:
        UnreadableSample: the field is no JSON.
    """
    try:
        record = parse_json(decoded(sample.fields.get("json", b"{}")))
    except ValueError as error:
        raise UnreadableSample(f"{sample.key}.json is no JSON") from error
    return record if isinstance(record, dict) else {}


class Fielded(Protocol):
    """A snapshot, or a mixture of several."""

    @property
    def uri(self) -> str:
        """Its address."""
        ...

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of its samples."""
        ...


def check_fields(snapshot: Fielded, wanted: Collection[str]) -> None:
    """Raise ``DataError`` unless the snapshot's samples have the fields ``wanted``.

    ``image`` and ``audio`` mean a part of that medium in any format that shards hold.
    """
    for field in wanted:
        names = MEDIA[field].endings if field in MEDIA else (field,)
        if not set(names) & set(snapshot.fields):
            has = ", ".join(snapshot.fields) or "none"
            raise DataError(f"{snapshot.uri} has no field {field}; its samples have: {has}")


def check_sidecars(snapshot: Snapshot, wanted: Collection[Wanted]) -> None:
    """Raise ``SidecarError``, which names the job to run, unless every shard has the ``wanted`` sidecars.

    An optional one may be missing from all shards.
    """
    for one in wanted:
        bare = [shard.name for shard in snapshot.shards if one.name not in shard.sidecars]
        if bare and not (one.optional and len(bare) == len(snapshot.shards)):
            some = f"{len(bare)} of its {len(snapshot.shards)} shards, such as {bare[0]}"
            raise SidecarError(f"{snapshot.uri} has no {one.name} for {some}; make them with {one.job}")


class Samples:
    """Random access to a snapshot's samples, those that its selections show, numbered through its shards in order.

    At most ``open_shards`` tars are mapped at a time; tars of a remote folder are downloaded into ``cache``. An
    instance belongs to one process; it pickles as its arguments. ``sidecars`` are joined by key: a sample gets its
    rows of them.

    Raises:
        SidecarError: a shard has no sidecar of a wanted name; on access, if it belongs to another tar or was made
            with other settings.
        DataError: on access, if a shard is missing, damaged, or has another number of samples than the snapshot lists.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        cache: FileCache | None = None,
        open_shards: int = 128,
        sidecars: Collection[Wanted] = (),
    ) -> None:
        self.snapshot, self.cache, self.open_shards = snapshot, cache or FileCache(), open_shards
        self.sidecars = {wanted.name: wanted for wanted in sidecars}
        check_sidecars(snapshot, self.sidecars.values())
        self._rows: OrderedDict[tuple[str, str], SidecarRows] = OrderedDict()
        self._groups: OrderedDict[tuple[str, str, int], pa.Table] = OrderedDict()
        self._held = 0
        self._ends = list(accumulate(shard.samples for shard in snapshot.shards))
        self._open: OrderedDict[str, tuple[TarShard, Indices | None]] = OrderedDict()
        self._folder: Folder | None = None
        self._process = 0

    def __reduce__(self) -> tuple[type["Samples"], tuple[Snapshot, FileCache, int, tuple[Wanted, ...]]]:
        return Samples, (self.snapshot, self.cache, self.open_shards, tuple(self.sidecars.values()))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> Sample:
        shard, index = self.find(number)
        tar, selection = self._tar(shard)
        sample = tar[index if selection is None else int(selection[index])]
        joined = (name for name in self.sidecars if name in shard.sidecars)
        sample.rows.update({name: self._row(shard, name, sample.key) for name in joined})
        return sample

    def from_here(self, number: int) -> Iterator[Sample]:
        """Every sample of the shard of ``number`` once, from ``number`` on and then from the shard's start."""
        shard, index = self.find(number)
        for step in range(shard.samples):
            yield self[number - index + (index + step) % shard.samples]

    def where(self, number: int) -> str:
        """The tar of sample ``number``, for error messages."""
        return f"{self.snapshot.folder}/{self.find(number)[0].tar}"

    def find(self, number: int) -> tuple[Shard, int]:
        """The shard of sample ``number``, and its index there."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        at = bisect_right(self._ends, number)
        shard = self.snapshot.shards[at]
        return shard, number - (self._ends[at] - shard.samples)

    def _tar(self, shard: Shard) -> tuple[TarShard, Indices | None]:
        if shard.name not in self._open:
            self._open[shard.name] = self._open_tar(shard)
            if len(self._open) > self.open_shards:
                # Not closed here, because a caller may still iterate over it; the last reference closes the map.
                self._open.popitem(last=False)
        self._open.move_to_end(shard.name)
        return self._open[shard.name]

    def _row(self, shard: Shard, name: str, key: str) -> Mapping[str, Any]:
        """The sample's row of a sidecar; row groups that were read stay in memory up to a size limit."""
        if (name, shard.name) not in self._rows:
            path = self.cache.fetch(self._home(), sidecar_file(shard, name), shard.sidecars[name])
            self._rows[name, shard.name] = SidecarRows(path, shard, self.sidecars[name])
            if len(self._rows) > self.open_shards:
                self._rows.popitem(last=False)
        rows = self._rows[name, shard.name]
        self._rows.move_to_end((name, shard.name))
        place = (name, shard.name, rows.group(key))
        table = self._groups.pop(place, None)
        if table is None:
            table = rows.read(place[2])
            self._held += table.nbytes
        self._groups[place] = table
        while self._held > HELD_BYTES and len(self._groups) > 1:
            self._held -= self._groups.popitem(last=False)[1].nbytes
        return rows.row(key, table)

    def _home(self) -> Folder:
        if self._folder is None or self._process != os.getpid():
            # A client of an object store does not work after a fork into a loader process.
            self._folder, self._process = Folder(self.snapshot.folder), os.getpid()
        return self._folder

    def _open_tar(self, shard: Shard) -> tuple[TarShard, Indices | None]:
        path = self.cache.fetch(self._home(), shard.tar, shard.sha256)
        if path.stat().st_size != shard.bytes:
            raise DataError(f"{path} has {path.stat().st_size} bytes, but the snapshot lists {shard.bytes}")
        tar = TarShard(path)
        if len(tar) != shard.stored:
            raise DataError(f"{path} holds {len(tar)} samples, but the snapshot lists {shard.stored}")
        return tar, read_selection(self._home(), shard)
