"""The samples of an evaluation: from a snapshot's shards, or directly from the source of a dataset card.

A card with local images (the drawn sets, a folder, tars) needs no shards: its rows are read or rendered on demand. A
card that lists URLs must be made into a snapshot first.
"""

import json
import logging
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from pipeline.config import near, require
from pipeline.dataset import Card, card_names, load_card
from pipeline.errors import DataError, SettingError
from pipeline.loaders.batches import Reader
from pipeline.loaders.samples import Samples, UnreadableSample
from pipeline.loaders.work_progress import WorkProgress
from pipeline.shards.media import MEDIA
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import Wanted
from pipeline.shards.snapshot import Snapshot, read_snapshot, snapshot_ids
from pipeline.shards.storage import Folder
from pipeline.sources import open_source
from pipeline.sources.source import Row, Slice, Source, fetches
from pipeline.sources.split_file import SplitFile

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 64  # rows of a source per read
# The folders of a divided folder of classes, and their parts.
PART_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
Value = TypeVar("Value")


@dataclass(frozen=True)
class SnapshotData:
    """The samples of a snapshot. ``card`` is the card of its data set, if it is known here."""

    snapshot: Snapshot
    card: Card | None

    def samples(self, limit: int | None, sidecars: Sequence[Wanted] = ()) -> Iterator[Sample]:
        """All samples, or ``limit`` of them at equal distances, so that sorted shards represent every class.

        They have their rows of ``sidecars``; raises ``SidecarError`` where one is missing.
        """
        samples = Samples(self.snapshot, open_shards=2, sidecars=sidecars)
        return (samples[number] for number in spread(len(samples), limit))


@dataclass(frozen=True)
class CardData:
    """The samples of a card's source, read or rendered on demand."""

    source: Source
    card: Card

    def samples(self, limit: int | None, sidecars: Sequence[Wanted] = ()) -> Iterator[Sample]:
        """Like :meth:`SnapshotData.samples`, but in runs of up to 64 rows, because a source is read in slices.

        Raises:
            SettingError: the model reads sidecars, which only snapshots have.
        """
        names = ", ".join(one.name for one in sidecars)
        require(not sidecars, "data", self.card.name, f"a snapshot, whose shards have the {names} that the model reads")
        return self._samples(limit)

    def _samples(self, limit: int | None) -> Iterator[Sample]:
        with tempfile.TemporaryDirectory() as scratch:
            together = ROWS_AT_ONCE if limit is None else max(1, min(ROWS_AT_ONCE, limit // 8))
            slices = list(self.source.slices(together, Folder(scratch)))
            wanted = None if limit is None else -(-limit // together)
            rows = (row for number in spread(len(slices), wanted) for row in self._rows(slices[number]))
            for count, row in enumerate(islice(rows, limit)):
                yield self._sample(count, row)

    def _rows(self, piece: Slice) -> Iterator[Row]:
        return self.source.rows(piece)

    def _sample(self, number: int, row: Row) -> Sample:
        if row.problem is not None:
            return Sample(f"{number:09d}", {})
        if any(part.body is None for part in row.parts) and fetches(self.source):
            raise DataError(f"the card {self.card.name} lists urls; {_download(self.card)}")
        record = json.dumps({**row.columns, "caption": row.caption}).encode()
        text = {} if row.caption is None else {"txt": row.caption.encode()}
        # Readers detect the format by the first bytes, whatever the ending says.
        parts = {MEDIA[part.medium].endings[0]: part.body for part in row.parts if part.body is not None}
        return Sample(f"{number:09d}", {**row.members, **parts, "json": record, **text})


Data = SnapshotData | CardData


def open_data(data: str) -> Data:
    """The samples at ``data``: a card's name or YAML file, the URI of a snapshot's folder, ``folder[@id]``, or of a
    folder with one folder of images per class.

    Raises:
        SettingError: an invalid card, or invalid options of its source.
        SnapshotError: neither a card nor a folder with a snapshot.
    """
    if data in card_names() or data.endswith((".yaml", ".yml")):
        given = load_card(data)
        source = open_source(given.source)
        require(not fetches(source), "data", data, f"a set with local images; {_download(given)}")
        return CardData(source, given)
    require(bool(data), "data", data, "a dataset card (" + ", ".join(card_names()) + ") or the folder of a snapshot")
    place = Folder(data.rpartition("@")[0] if "@" in data.rsplit("/", 1)[-1] else data)
    if not place.fs.exists(place.path):
        similar = near(data, card_names())
        raise SettingError(
            "data", data, f"a dataset card or the folder of a snapshot{similar}", f"no such set: {data!r}"
        )
    if not snapshot_ids(place) and (folders := _class_folders(data, place)) is not None:
        return folders
    snapshot = read_snapshot(data)
    card = load_card(snapshot.card) if snapshot.card in card_names() else None
    return SnapshotData(snapshot, card)


def _class_folders(data: str, folder: Folder) -> CardData | None:
    """The images of a folder with one folder per class; ``None`` if there are none."""
    source = SplitFile(folder=folder.uri, format="folders")
    try:
        classes = sorted({item.name for item in source.items})
    except SettingError:
        return None
    parts = [name for name in classes if name in PART_FOLDERS]
    require(len(parts) < len(classes), "data", data, f"a folder of class folders, such as {folder.join(classes[0])}")
    options = {"kind": source.kind, "folder": folder.uri, "format": "folders"}
    return CardData(
        source, Card(name=folder.uri.rpartition("/")[2], title=data, source=options, classes=tuple(classes))
    )


def _download(card: Card) -> str:
    return f"`jobs/refresh_dataset.py card {card.name} --output-folder FOLDER` downloads it: evaluate on FOLDER"


def spread(count: int, limit: int | None) -> Sequence[int]:
    """``limit`` of the numbers ``0 ... count - 1`` at equal distances; all of them if ``limit`` is none or larger."""
    if limit is None or limit >= count:
        return range(count)
    return [number * count // limit for number in range(limit)]


def evaluation_batches(
    samples: Iterable[Sample], readers: Sequence[Reader], batch: int, threads: int
) -> Iterator[dict[str, Any]]:
    """Batches with the keys of all ``readers``, in order.

    ``threads`` threads read samples ahead. Samples for which a reader raises :class:`UnreadableSample` are left out;
    a log line at the end counts them.

    Raises:
        DataError: no sample is readable.
    """
    rows: Iterator[Mapping[str, Any]] = _readable(iter(samples), readers, threads)
    while together := list(islice(rows, batch)):
        yield {key: value for reader in readers for key, value in reader.collate(list(together)).items()}


def _readable(samples: Iterator[Sample], readers: Sequence[Reader], threads: int) -> Iterator[dict[str, Any]]:
    good = bad = 0
    reason = ""
    progress = WorkProgress(logger, "evaluation", "samples")
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        for future in _ahead(pool, samples, lambda sample: _read(sample, readers), 4 * threads):
            result = future.result()
            if isinstance(result, UnreadableSample):
                bad, reason = bad + 1, str(result)
            else:
                good += 1
                yield result
            progress.advance()
    if bad:
        logger.warning("%d of %d samples are unreadable and left out; the last one: %s", bad, good + bad, reason)
    if not good:
        raise DataError(f"none of {bad} samples is readable; the last one: {reason or 'there are none'}")


def _read(sample: Sample, readers: Sequence[Reader]) -> dict[str, Any] | UnreadableSample:
    try:
        return {key: value for reader in readers for key, value in reader.read(sample, None).items()}
    except UnreadableSample as error:
        return error


def _ahead(
    pool: ThreadPoolExecutor, samples: Iterator[Sample], work: Callable[[Sample], Value], distance: int
) -> Iterator[Future[Value]]:
    """Futures of ``work`` in the order of ``samples``, at most ``distance`` of them unfinished or unread."""
    waiting: deque[Future[Value]] = deque()
    for sample in samples:
        waiting.append(pool.submit(work, sample))
        if len(waiting) >= distance:
            yield waiting.popleft()
    yield from waiting
