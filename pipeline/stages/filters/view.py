"""A filter's view of a shard: captions, sizes, digests, images and embeddings of the remaining samples.

Columns are read from the shard's parquet file, a small read, or from the tar if there is none.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.config import parse_json
from pipeline.errors import DataError, SampleError, SidecarError
from pipeline.shards.media import AUDIO, IMAGE, MEDIA, Medium
from pipeline.shards.pixels import read_header
from pipeline.shards.sample import Sample, joined_fields
from pipeline.shards.selection import open_tar, read_selection
from pipeline.shards.sidecar import read_sidecar
from pipeline.shards.snapshot import Shard
from pipeline.shards.storage import Folder
from pipeline.shards.tar import iterate_tar
from pipeline.shards.text import decoded, storable
from pipeline.sources.tables import first_text, stored_text, texts_of
from pipeline.stages.filters.captions import clean_text

EMBEDDINGS_JOB = "jobs/embed_dataset.py"
SIDES = ("width", "height", "original_width", "original_height")
SHA256 = re.compile(r"[0-9a-fA-F]{64}")
Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Embeddings:
    """L2-normalised rows float32 [n, D] of a medium and of captions, and whether each sample has them, bool [n].

    Rows of samples without embeddings are zero.
    """

    features: Floats
    text: Floats | None
    present: Mask


class ShardView:
    """The samples of ``shard`` at ``positions`` among its visible ones (ascending int64 [n]; all by default)."""

    def __init__(self, folder: Folder, shard: Shard, positions: NDArray[np.int64] | None = None) -> None:
        self.folder, self.shard = folder, shard
        self._stored = _Stored(folder, shard)
        self._selection = read_selection(folder, shard)
        self.positions = np.arange(shard.samples) if positions is None else positions

    def __len__(self) -> int:
        return len(self.positions)

    def narrowed(self, keep: Mask) -> "ShardView":
        """The view of the samples selected by the mask bool [n]; shares the data read so far."""
        view = object.__new__(ShardView)
        view.__dict__.update(self.__dict__)
        view.positions = self.positions[keep]
        return view

    @property
    def indices(self) -> NDArray[np.int64]:
        """Positions in the tar, ascending int64 [n]; repeats where the parent snapshot repeats samples."""
        return self.positions if self._selection is None else self._selection[self.positions].astype(np.int64)

    def keys(self) -> list[str]:
        """Sample keys [n]."""
        return self._rows("key") or []

    def captions(self, cleaned: bool = True) -> list[str]:
        """Captions [n], "" for none; ``cleaned`` by :func:`clean_text`, or as stored."""
        found = self._rows("caption") if self._stored.has("caption") else None
        plain = [text or "" for text in found] if found is not None else [""] * len(self)
        return [clean_text(text) for text in plain] if cleaned else plain

    def column(self, name: str) -> list[Any]:
        """Values [n] of a column of the shard's parquet, or of the samples' json.

        Raises:
            DataError: the shard has no such column.
        """
        found = self._rows(name)
        if found is None:
            names = ", ".join(self._stored.names())
            raise DataError(f"{self.folder.join(self.shard.tar)} has no column {name!r}; it has {names}")
        return found

    def sizes(self, original: bool = True) -> NDArray[np.int64]:
        """Width and height int64 [n, 2], of the downloaded image (if known) or the stored one; 0 = unknown."""
        prefix = "original_" if original and self._stored.has("original_width") else ""
        pairs = [self._rows(f"{prefix}{side}") or [0] * len(self) for side in ("width", "height")]
        return np.array([[value or 0 for value in one] for one in pairs], np.int64).T.reshape(len(self), 2)

    def digests(self) -> list[bytes]:
        """SHA-256 [n] of the downloaded images or sounds (if the shard has it) or of the stored ones.

        Where samples have several parts it covers all of them; without any part, all fields but the json.
        """
        further = [f"{medium}_sha256" for medium in MEDIA]
        several = [name for name in ("sha256", *further) if self._stored.has(name)]
        if len(several) > 1:
            rows = zip(*(self._rows(name) or [] for name in several), strict=True)
            return [hashlib.sha256(json.dumps(row).encode()).digest() for row in rows]
        known = self._rows("sha256") if several == ["sha256"] else None
        if known is not None and all(isinstance(text, str) and SHA256.fullmatch(text) for text in known):
            return [bytes.fromhex(text) for text in known]
        return [hashlib.sha256(_content(sample)).digest() for sample in self.samples()]

    def images(self) -> Iterator[bytes | None]:
        """Encoded images, one per sample in order; ``None`` for a sample without one. Raises as :meth:`samples`."""
        return self.bodies(IMAGE)

    def bodies(self, medium: Medium) -> Iterator[bytes | None]:
        """Encoded parts of a medium, as :meth:`images`."""
        return (sample.body(medium) for sample in self.samples())

    def samples(self) -> Iterator[Sample]:
        """The samples themselves, in order, read from the tar.

        Raises:
            DataError: the keys of the tar and of the shard's parquet file differ.
        """
        wanted, keys, following = self.indices, self.keys(), 0
        for index, sample in enumerate(self._stored.samples()):
            while following < len(wanted) and wanted[following] == index:
                if sample.key != keys[following]:
                    raise DataError(f"{self.folder.join(self.shard.tar)}: its parquet lists other keys than the tar")
                following += 1
                yield sample
            if following == len(wanted):
                return

    def embeddings(self, name: str = "embeddings", text: bool = True, medium: str = "image") -> Embeddings:
        """The samples' rows of the sidecar ``name``.

        Raises:
            SidecarError: it is missing, stale, or without features of ``medium``.
        """
        table = read_sidecar(self.folder, self.shard, name, EMBEDDINGS_JOB)
        if medium not in table.column_names:
            raise SidecarError(f"the sidecar {name} of {self.shard.name} has no {medium}; it has {table.column_names}")
        keys = pa.array(self.keys(), pa.string())
        rows = pc.index_in(keys, value_set=table["key"].combine_chunks())
        features, present = _vectors(table[medium], rows)
        if not text or "text" not in table.column_names:
            return Embeddings(features, None, present)
        words, spoken = _vectors(table["text"], rows)
        return Embeddings(features, words, present & spoken)

    def _rows(self, name: str) -> list[Any] | None:
        column = self._stored.column(name)
        taken: list[Any] | None = (
            None if column is None else column.take(pa.array(self.indices, pa.int64())).to_pylist()
        )
        return taken


class _Stored:
    """The columns of all samples in a tar, in its order; read on first use."""

    def __init__(self, folder: Folder, shard: Shard) -> None:
        self._folder, self._shard = folder, shard
        self._columns: dict[str, Any] = {}
        self._file: pq.ParquetFile | None = None
        self._good: Any | None = None
        self._opened = False

    def samples(self) -> Iterator[Sample]:
        with open_tar(self._folder, self._shard) as file:
            yield from iterate_tar(file, self._folder.join(self._shard.tar))

    def has(self, name: str) -> bool:
        return name in self.names()

    def names(self) -> list[str]:
        self._open()
        return list(self._columns) if self._file is None else self._file.schema_arrow.names

    def column(self, name: str) -> Any | None:
        self._open()
        if name not in self._columns and self._file is not None and name in self._file.schema_arrow.names:
            values = self._file.read(columns=[name])[name]
            self._columns[name] = values if self._good is None else values.filter(self._good)
        return self._columns.get(name)

    def _open(self) -> None:
        if self._opened:
            return
        self._opened = True
        self._file = self._open_table()
        if self._file is None:
            table = _table([_described(sample) for sample in self.samples()])
            self._columns = {name: table[name] for name in table.column_names}

    def _open_table(self) -> pq.ParquetFile | None:
        """The shard's parquet file, if its successful rows are as many as the tar's samples."""
        try:
            content = self._folder.open(f"{self._shard.name}.parquet")
        except FileNotFoundError:
            return None
        try:
            file = pq.ParquetFile(content)
        except (pa.ArrowInvalid, OSError) as error:
            place = self._folder.join(f"{self._shard.name}.parquet")
            raise DataError(f"{place} is damaged, or no parquet file ({' '.join(str(error).split())})") from error
        names = file.schema_arrow.names
        if "status" in names:
            self._good = pc.equal(
                texts_of(file.read(columns=["status"])["status"].combine_chunks()), pa.scalar("success")
            )
        rows = file.metadata.num_rows if self._good is None else pc.sum(self._good).as_py()
        return file if rows == self._shard.stored and "key" in names else None


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    """One column for each name in any of the rows; values of types that do not fit together become text."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> Any:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or kinds == {bool}:
        try:
            return pa.array(values, pa.float64() if float in kinds else pa.bool_() if bool in kinds else pa.int64())
        except (pa.ArrowInvalid, OverflowError):
            pass  # whole numbers beyond 64 bits
    if kinds == {list}:
        lists = [None if value is None else [stored_text(entry) for entry in value] for value in values]
        return pa.array(lists, pa.list_(pa.string()))
    return pa.array([stored_text(value) for value in values], pa.string())


def _described(sample: Sample) -> dict[str, Any]:
    """The values of a parquet row, from the sample itself; json that cannot be parsed has none."""
    try:
        plain = parse_json(decoded(sample.fields.get("json", b"{}")))
    except ValueError:
        plain = {}
    row: dict[str, Any] = {storable(name): value for name, value in plain.items()} if isinstance(plain, dict) else {}
    for name in SIDES:
        if name in row:
            row[name] = _pixels(row[name])
    if "txt" in sample.fields:
        row["caption"] = decoded(sample.fields["txt"])
    elif "caption" in row or "text" in row:
        # LAION's audio sets have a list `text`.
        row["caption"] = stored_text(first_text(row.get("caption", row.get("text"))))
    if row.get("width") is None or row.get("height") is None:
        row["width"], row["height"] = _size(sample.image() or b"")
    return {**_sound(sample), **row, "key": sample.key}


def _pixels(value: Any) -> int | None:
    """A number of pixels as the sample's json states it; ``None`` for other values."""
    try:
        number = int(float(value))
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 < number < 2**31 else None


def _content(sample: Sample) -> bytes:
    """The part; all parts of several; for a sample without one, all fields but the json, which contains the key."""
    bodies = {name: body for name, one in MEDIA.items() if (body := sample.body(one)) is not None}
    if len(bodies) == 1:
        return next(iter(bodies.values()))
    rest = {name: value for name, value in sample.fields.items() if name != "json"}
    return joined_fields(bodies or rest)


def _size(image: bytes) -> tuple[int, int]:
    try:
        header = read_header(image)
    except SampleError:
        return 0, 0
    return header.width, header.height


def _sound(sample: Sample) -> dict[str, Any]:
    """The length of a sound as its header states it, for tars without a table; nothing without a sound."""
    body = sample.body(AUDIO)
    if body is None:
        return {}
    from pipeline.shards import waveforms  # loads decoders, which views of images do not need

    try:
        header = waveforms.read_header(body)
    except SampleError:
        return {}
    return {"audio_seconds": header.seconds, "audio_rate": header.sample_rate, "audio_channels": header.channels}


def _vectors(column: Any, rows: Any) -> tuple[Floats, Mask]:
    """The lists of ``column`` at ``rows`` (null = none) as float32 [n, D], and a mask of the present ones."""
    taken = column.combine_chunks().take(rows)
    present: Mask = pc.is_valid(taken).to_numpy(zero_copy_only=False).copy()
    flat = taken.drop_null().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    dimension = len(flat) // max(int(present.sum()), 1)
    vectors = np.zeros((len(taken), dimension), np.float32)
    vectors[present] = flat.reshape(-1, dimension) if dimension else 0
    # The embedding job marks samples without an embedding by NaN.
    present &= ~np.isnan(vectors).any(axis=1)
    vectors[~present] = 0
    return vectors, present
