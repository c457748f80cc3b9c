"""Sources of an annotation file with a caption and regions for each image, and a folder of images.

A subclass parses the file: :meth:`AnnotatedFiles.records` gives the image's file name with its record, or with the
reason why there is none. One image may have several records, each with its own caption: each becomes a sample.
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from pipeline.config import require
from pipeline.errors import SampleError, missing
from pipeline.shards.objects import FIELD
from pipeline.shards.storage import Folder, file_stamp
from pipeline.sources.annotation_table import table_rows, table_slices
from pipeline.sources.grounding_records import COLUMNS, SCHEMA, FoundFiles, GroundingRecord, problem_of, problem_row
from pipeline.sources.source import UNCHANGED, Part, Row, Slice

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AnnotatedFiles(ABC):
    """An annotation file and a folder of images."""

    image_options: ClassVar[Mapping[str, Any]] = UNCHANGED
    has_captions: ClassVar[bool] = True

    annotations: str
    """Annotation file, as a path or fsspec URI; compressed files (.gz) are unpacked."""
    images: str
    """Folder of the images, as a path or fsspec URI that every worker can read. A file is found by its path in the
    folder, or by its name if only one file has it."""

    def __post_init__(self) -> None:
        require(bool(self.annotations), "annotations", self.annotations, "an annotation file")
        require(bool(self.images), "images", self.images, "the folder of the images")

    @abstractmethod
    def records(self) -> Iterator[tuple[str, GroundingRecord | Exception]]:
        """File name and record of each image, in the order of the file; raises ``SettingError`` for another file."""

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; the digest covers annotations and versions of the images."""
        return table_slices(self._table_rows(), SCHEMA, rows_per_shard, scratch, self.images)

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`; an unusable annotation or image is a row with a problem."""
        return (self._row(values) for values in table_rows(piece))

    def schema(self) -> Mapping[str, type]:
        """``left_out`` counts unusable boxes and regions; ``boxes_digest`` shows a refresh which have changed."""
        return COLUMNS

    @cached_property
    def _place(self) -> Folder:
        return Folder(self.images)

    def _table_rows(self) -> Iterator[dict[str, Any]]:
        if self._place.kind() != "directory":
            raise missing("images", self.images)
        files = FoundFiles.of({path: file_stamp(about) for path, about in self._place.find().items()})
        absent = count = 0
        for name, record in self.records():
            path = files.find(name)
            count, absent = count + 1, absent + (path is None)
            stamp = files.stamps.get(path or "", "")
            if isinstance(record, Exception):
                yield problem_row(path or name, record, stamp)
            else:
                yield record.row(path or name, stamp)
        require(absent < count, "images", self.images, "a folder with the images of the annotations in it")
        if absent:
            logger.warning("%s: %d of %d images have no file in %s", self.annotations, absent, count, self.images)

    def _row(self, values: Mapping[str, Any]) -> Row:
        columns = {name: values[name] for name in ("objects", "left_out")}
        columns["boxes_digest"] = hashlib.sha256(values["boxes"]).hexdigest()[:16]
        image, problem = None, problem_of(values)
        try:
            image = None if problem else self._place.read_bytes(values["url"])
        except OSError as error:
            problem = SampleError("failed_to_download", "unreadable", f"cannot read the file: {error}")
        members = {} if problem else {FIELD: values["boxes"]}
        parts = (Part("image", image),)
        url, caption = values["url"], values["caption"]
        return Row(url=url, caption=caption, parts=parts, columns=columns, members=members, problem=problem)
