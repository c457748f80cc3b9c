"""Selected rows of other sources: the few images that a few-shot method is trained on."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from pipeline.config import require
from pipeline.shards.storage import Folder
from pipeline.sources import open_source
from pipeline.sources.source import Row, Slice, Source, media_of


@dataclass(frozen=True, kw_only=True)
class Picked:
    """The rows ``numbers`` of ``sources``, in the given order, without captions."""

    kind: ClassVar[str] = "picked"
    has_captions: ClassVar[bool] = False

    sources: Sequence[Mapping[str, Any]]
    """Kind and options of each source, as in a dataset card."""
    numbers: Sequence[tuple[int, int]]
    """Pairs of source index and row index, both from 0."""

    def __post_init__(self) -> None:
        require(bool(self.sources), "sources", (), "one source or more")
        require(bool(self.numbers), "numbers", (), "one row or more")

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; a slice lists the one-row slices that it consists of."""
        pieces = [list(source.slices(1, scratch.folder(str(place)))) for place, source in enumerate(self._opened)]
        for start in range(0, len(self.numbers), rows_per_shard):
            part = [(source, pieces[source][row]) for source, row in self.numbers[start : start + rows_per_shard]]
            digest = hashlib.sha256(repr([piece.digest for _, piece in part]).encode()).hexdigest()
            where = [[source, piece.digest, dict(piece.where)] for source, piece in part]
            yield Slice(count=len(part), digest=digest, where={"rows": json.dumps(where)})

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`."""
        for source, digest, where in json.loads(str(piece.where["rows"])):
            for row in self._opened[source].rows(Slice(count=1, digest=digest, where=where)):
                shown = {name: value for name, value in row.columns.items() if name in self.schema()}
                yield Row(url=row.url, parts=row.parts, columns=shown, problem=row.problem)

    def schema(self) -> Mapping[str, type]:
        """The columns that all sources share."""
        first, *others = (source.schema() for source in self._opened)
        return {name: kind for name, kind in first.items() if all(other.get(name) is kind for other in others)}

    @property
    def media(self) -> tuple[str, ...]:
        """Those of the first source."""
        return media_of(self._opened[0])

    @cached_property
    def _opened(self) -> list[Source]:
        return [open_source(options) for options in self.sources]
