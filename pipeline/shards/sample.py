"""A sample of a tar: a key and named fields. Keys are numbered as by img2dataset."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import require
from pipeline.shards.media import IMAGE, Medium

SHARD_WIDTH = 5


@dataclass(slots=True)
class Sample:
    """``fields`` maps the part of the member's name after the key's first dot (``jpg``, ``boxes.json``) to bytes.

    ``rows`` are the sample's rows of the sidecars that a reader requested, by the sidecar's name. ``part`` is the
    number of the sample's snapshot in a mixture, from 0.
    """

    key: str
    fields: dict[str, bytes]
    rows: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    part: int = 0

    def image(self) -> bytes | None:
        """The encoded image in any format; ``None`` where the sample has none."""
        return self.body(IMAGE)

    def body(self, medium: Medium) -> bytes | None:
        """The encoded part of a medium; ``None`` where the sample has none."""
        field = medium.field_of(self.fields)
        return None if field is None else self.fields[field]


def joined_fields(fields: Mapping[str, bytes]) -> bytes:
    """The fields as one byte string, sorted by name: the content for the digest of a sample without an image."""
    return b"".join(f"{name} {len(fields[name])}\n".encode() + fields[name] for name in sorted(fields))


def shard_name(shard_id: int) -> str:
    """``00017``: img2dataset's zero-padded shard number (more digits from 100,000 shards on)."""
    return f"{shard_id:0{SHARD_WIDTH}d}"


def sample_key(shard_id: int, index: int, rows_per_shard: int) -> str:
    """img2dataset's key of row ``index`` of a shard: shard number, then the zero-padded index.

    >>> sample_key(3, 17, 10_000)
    '000030017'
    """
    digits = math.ceil(math.log10(rows_per_shard)) if rows_per_shard > 1 else 0
    return f"{shard_id * 10**digits + index:0{SHARD_WIDTH + digits}d}"


def check_rows_per_shard(value: int) -> None:
    """Raise ``SettingError`` unless ``value`` is a valid number of rows per shard."""
    require(1 <= value <= 10_000_000, "number_sample_per_shard", value, "1 to 10,000,000")
