"""The samples of a snapshot by number, read from mapped tars."""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterator
from itertools import accumulate
from typing import Protocol

from pipeline.errors import DataError
from pipeline.loaders.cache import FileCache
from pipeline.shards.sample import IMAGE_FIELDS, Sample
from pipeline.shards.selection import Indices, read_selection
from pipeline.shards.snapshot import Shard, Snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.tar import TarShard


class UnreadableSample(Exception):
    """A sample that cannot become an element of a batch: no picture in its bytes, no caption.

    Training counts it and takes the next sample of the shard; it is never seen by a user.
    """


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

    ``image`` stands for a picture in any format that shards hold.
    """
    for field in wanted:
        names = IMAGE_FIELDS if field == "image" else (field,)
        if not set(names) & set(snapshot.fields):
            has = ", ".join(snapshot.fields) or "none"
            raise DataError(f"{snapshot.uri} has no field {field}; its samples have: {has}")


class Samples:
    """Random access to a snapshot's samples, those that its selections show, numbered through its shards in order.

    At most ``open_shards`` tars are mapped at a time; those of a remote folder are fetched whole into ``cache``. An
    instance belongs to one process; it pickles as what it was made from.

    Raises:
        DataError: on access, when a shard is missing, damaged, or does not hold as many samples as the snapshot says.
    """

    def __init__(self, snapshot: Snapshot, cache: FileCache | None = None, open_shards: int = 128) -> None:
        self.snapshot, self.cache, self.open_shards = snapshot, cache or FileCache(), open_shards
        self._ends = list(accumulate(shard.samples for shard in snapshot.shards))
        self._open: OrderedDict[str, tuple[TarShard, Indices | None]] = OrderedDict()
        self._folder: Folder | None = None
        self._process = 0

    def __reduce__(self) -> tuple[type["Samples"], tuple[Snapshot, FileCache, int]]:
        return Samples, (self.snapshot, self.cache, self.open_shards)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> Sample:
        shard, index = self.find(number)
        tar, selection = self._tar(shard)
        return tar[index if selection is None else int(selection[index])]

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

    def _open_tar(self, shard: Shard) -> tuple[TarShard, Indices | None]:
        if self._folder is None or self._process != os.getpid():
            # A client of an object store does not survive the fork into a loader's process.
            self._folder, self._process = Folder(self.snapshot.folder), os.getpid()
        path = self.cache.fetch(self._folder, shard.tar, shard.sha256)
        if path.stat().st_size != shard.bytes:
            raise DataError(f"{path} has {path.stat().st_size} bytes, the snapshot says {shard.bytes}")
        tar = TarShard(path)
        if len(tar) != shard.stored:
            raise DataError(f"{path} holds {len(tar)} samples, the snapshot says {shard.stored}")
        return tar, read_selection(self._folder, shard)
