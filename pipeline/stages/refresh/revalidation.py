"""Revalidate stored images: detect images that have changed at the same url.

Every stored image with an ``ETag`` or a date from its server is requested conditionally (RFC 9110, section 13). A 304
response costs a few hundred bytes, and the stored image stays. A response with a body is a change if its digest
differs, so servers that ignore conditions only cost time. An image that is now forbidden (``X-Robots-Tag``, robots.txt)
is a change too, since the download that follows is rejected. After any other failure the stored image stays.

One file per shard stores the result, so a killed job requests no image twice. The files are beside the refresh's plan,
and are deleted if there are no changes.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.errors import DataError, SampleError
from pipeline.shards.media import MEDIA
from pipeline.shards.parquet import parse_parquet
from pipeline.shards.segments import split_segment
from pipeline.shards.selection import read_selection
from pipeline.shards.snapshot import Shard, Snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.crawl.download import Download, DownloadOptions, KnownBody, Request, download_all
from pipeline.stages.refresh.comparison import ABSENT
from pipeline.stages.refresh.ledger import (
    column_values,
    opted_out_of_table,
    part_digests,
    prefixes,
    read_rows,
)
from pipeline.stages.refresh.opt_out import OptOut
from pipeline.stages.shard_tasks import Workers, run_tasks

logger = logging.getLogger(__name__)

Which = Literal["none", "known", "all"]
Stale = Mapping[int, NDArray[np.int64]]
"""Positions in the tar of images that have changed, by the number of their shard."""

FOLDER = "revalidated"
_TYPES: Mapping[str, pa.DataType] = {"position": pa.int32(), "verdict": pa.string()}
_COLUMNS = pa.schema(_TYPES)
# Of a row with several parts the last of these counts.
_SEVERITY = ("same", "failed", "changed", "forbidden")
FORBIDDEN = frozenset({"optout", "robots"})


@dataclass(frozen=True)
class Revalidation:
    """The task of a shard; requests nothing in ``opt_out``; ``which`` "all" includes parts without validators.

    ``first`` is the medium of the rows' first part.
    """

    folder: Folder
    place: Folder
    downloads: DownloadOptions
    opt_out: OptOut
    which: Which
    first: str

    def __call__(self, shard: Shard) -> str:
        """Revalidate the shard's visible images; returns counts as JSON."""
        file = f"{shard.name}.parquet"
        if not self.place.exists(file):
            buffer = BytesIO()
            pq.write_table(self._ask(shard), buffer)
            self.place.write_atomic(file, buffer.getvalue())
        return json.dumps(Counter(_verdicts(self.place, shard)["verdict"].to_pylist()))

    def _ask(self, shard: Shard) -> pa.Table:
        table = read_rows(self.folder, shard.name)
        good = np.array([status == "success" for status in table["status"].to_pylist()], np.bool_)
        shown = np.zeros(len(good), np.bool_)
        indices = read_selection(self.folder, shard)
        shown[np.flatnonzero(good)[slice(None) if indices is None else np.unique(indices)]] = True
        shown &= ~opted_out_of_table(self.opt_out, table)
        position = np.cumsum(good) - 1
        parts = _stored_parts(table, np.flatnonzero(shown).tolist(), self.first)
        wanted = [one for one in parts if self._asks_for(one.known)]
        requests: list[Request] = [(number, one.url, one.known) for number, one in enumerate(wanted)]
        answers = download_all(requests, self.downloads) if requests else iter(())
        verdicts: dict[int, str] = {}
        for number, answer in answers:
            row, verdict = wanted[number].row, _verdict(answer, wanted[number].digest)
            verdicts[row] = max(verdicts.get(row, verdict), verdict, key=_SEVERITY.index)
        rows = sorted(verdicts)
        return pa.table([[position[row] for row in rows], [verdicts[row] for row in rows]], schema=_COLUMNS)

    def _asks_for(self, known: KnownBody) -> bool:
        return self.which == "all" or bool(known.etag or known.last_modified)


def revalidate(
    folder: Folder,
    parent: Snapshot,
    place: Folder,
    downloads: DownloadOptions,
    opt_out: OptOut,
    which: Which,
    first: str,
    workers: Workers,
) -> Stale:
    """The stored images of ``parent`` that have changed at their urls.

    ``place`` stores the results per shard. The options for robots and rate limits are those of ``downloads``.

    Raises:
        SettingError: images are stored without a digest, so they cannot be compared.
        DataError: a stored shard is damaged.
    """
    name = downloads.compute_hash
    require(name is not None, "compute_hash", name, "sha256, md5 or sha512, to tell whether an image has changed")
    beside = place.folder(f"{FOLDER}/{which}")
    task = Revalidation(folder, beside, downloads, opt_out, which, first)
    shards = [shard for shard in parent.shards if shard.name.isdigit()]
    total: Counter[str] = Counter()
    for _, text in run_tasks(task, shards, workers):
        total.update(json.loads(text))
    logger.info("asked again for %d images: %s", total.total(), dict(sorted(total.items())) or "none has a validator")
    return {int(shard.name): _changed(beside, shard) for shard in shards}


def forget(place: Folder) -> None:
    """Delete the results, so that the next refresh requests the images again."""
    for which in ("known", "all"):
        beside = place.folder(f"{FOLDER}/{which}")
        for name in beside.names():
            beside.delete(name)


@dataclass(frozen=True, slots=True)
class _StoredPart:
    """A part of row ``row`` of a table, as stored: its url, its digest, and its server's validators."""

    row: int
    url: str
    digest: str | None
    known: KnownBody


def _stored_parts(table: pa.Table, rows: Sequence[int], first: str) -> list[_StoredPart]:
    """The stored parts of the given rows that have a url; ``first`` is the medium of the rows' first part."""
    found: list[_StoredPart] = []
    for (name, prefix), digests in zip(prefixes(table).items(), part_digests(table), strict=True):
        medium = MEDIA[name or first]
        names = (prefix + name for name in ("url", "etag", "last_modified"))
        urls, tags, dates = (column_values(table, name) for name in names)
        for row in rows:
            if urls[row] is not None and digests[row] != ABSENT:
                known = KnownBody(etag=tags[row], last_modified=dates[row], medium=medium)
                found.append(_StoredPart(row, split_segment(str(urls[row]))[0], digests[row], known))
    return found


def _verdict(answer: Download | SampleError, stored: str | None) -> str:
    if isinstance(answer, SampleError):
        return "forbidden" if answer.error_class in FORBIDDEN else "failed"
    return "same" if answer.not_modified or answer.digest == stored else "changed"


def _verdicts(place: Folder, shard: Shard) -> pa.Table:
    """The stored result of a shard; raises ``DataError`` for another table."""
    file = f"{shard.name}.parquet"
    try:
        table = parse_parquet(place.read_bytes(file)).cast(_COLUMNS)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{place.join(file)} is damaged ({error}); delete it to ask again") from error
    if any(column.null_count for column in table.columns):
        raise DataError(f"{place.join(file)} is damaged (a row without a value); delete it to ask again")
    return table


def _changed(place: Folder, shard: Shard) -> NDArray[np.int64]:
    table = _verdicts(place, shard)
    stale = np.array([verdict in ("changed", "forbidden") for verdict in table["verdict"].to_pylist()], np.bool_)
    positions: NDArray[np.int64] = table["position"].to_numpy().astype(np.int64)[stale]
    return positions
