"""The samples of a snapshot by number, read from mapped tars."""

import json
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from itertools import accumulate
from typing import Any, Protocol

import pyarrow as pa

from pipeline.errors import DataError, SidecarError
from pipeline.loaders.cache import FileCache
from pipeline.shards.sample import IMAGE_FIELDS, Sample
from pipeline.shards.selection import Indices, read_selection
from pipeline.shards.sidecar import SidecarRows, Wanted, sidecar_file
from pipeline.shards.snapshot import Shard, Snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.tar import TarShard

HELD_BYTES = 64 << 20  # of sidecars' rows, in each process


class UnreadableSample(Exception):
    """A sample that cannot become an element of a batch: no image in its bytes, no caption.

    Training counts it and takes the next sample of the shard; it is never seen by a user.
    """


def json_of_sample(sample: Sample) -> dict[str, Any]:
    """The object in the sample's ``json``; empty where it has none.

    Raises:
        UnreadableSample: the field is no JSON.
    """
    try:
        record = json.loads(sample.fields.get("json", b"{}"))
    except ValueError as error:
        raise UnreadableSample(f"{sample.key}.json is no JSON") from error
    return record if isinstance(record, dict) else {}


class Fielded(Protocol):
    """A snapshot, or several of them."""

    @property
    def uri(self) -> str:
        """Its address."""
        ...

    @property
    def fields(self) -> tuple[str, ...]:
        """What its samples hold."""
        ...


def check_fields(snapshot: Fielded, wanted: Collection[str]) -> None:
    """Raise ``DataError`` unless the snapshot's samples have the fields ``wanted``.

    ``image`` stands for an image in any format that shards hold.
    """
    for field in wanted:
        names = IMAGE_FIELDS if field == "image" else (field,)
        if not set(names) & set(snapshot.fields):
            has = ", ".join(snapshot.fields) or "none"
            raise DataError(f"{snapshot.uri} has no field {field}; its samples have: {has}")


def check_sidecars(snapshot: Snapshot, wanted: Collection[Wanted]) -> None:
    """Raise ``SidecarError``, which names the job that makes it, unless every shard has the ``wanted`` sidecars."""
    for one in wanted:
        bare = [shard.name for shard in snapshot.shards if one.name not in shard.sidecars]
        if bare:
            some = f"{len(bare)} of its {len(snapshot.shards)} shards, such as {bare[0]}"
            raise SidecarError(f"{snapshot.uri} has no {one.name} for {some}; make them with {one.job}")


class Samples:
    """Random access to a snapshot's samples, those that its selections show, numbered through its shards in order.

    At most ``open_shards`` tars are mapped at a time; those of a remote folder are fetched whole into ``cache``. An
    instance belongs to one process; it pickles as what it was made from. ``sidecars`` are joined by key: a sample gets
    its rows of them.

    Raises:
        SidecarError: a shard has no sidecar of a wanted name; on access, when it is of another tar or not as wanted.
        DataError: on access, when a shard is missing, damaged, or does not hold as many samples as the snapshot says.
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
        sample.rows.update({name: self._row(shard, name, sample.key) for name in self.sidecars})
        return sample

    def from_here(self, number: int) -> Iterator[Sample]:
        """Every sample of the shard that holds ``number`` once, beginning there and going round."""
        shard, index = self.find(number)
        for step in range(shard.samples):
            yield self[number - index + (index + step) % shard.samples]

    def where(self, number: int) -> str:
        """The tar of sample ``number``, for messages."""
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
                # Not closed here: a caller may still iterate over it; the map goes with the last reference.
                self._open.popitem(last=False)
        self._open.move_to_end(shard.name)
        return self._open[shard.name]

    def _row(self, shard: Shard, name: str, key: str) -> Mapping[str, Any]:
        """The sample's row of a sidecar; groups of rows that were read are kept while they are small."""
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
            # A client of an object store does not survive the fork into a loader's process.
            self._folder, self._process = Folder(self.snapshot.folder), os.getpid()
        return self._folder

    def _open_tar(self, shard: Shard) -> tuple[TarShard, Indices | None]:
        path = self.cache.fetch(self._home(), shard.tar, shard.sha256)
        if path.stat().st_size != shard.bytes:
            raise DataError(f"{path} has {path.stat().st_size} bytes, the snapshot says {shard.bytes}")
        tar = TarShard(path)
        if len(tar) != shard.stored:
            raise DataError(f"{path} holds {len(tar)} samples, the snapshot says {shard.stored}")
        return tar, read_selection(self._home(), shard)
