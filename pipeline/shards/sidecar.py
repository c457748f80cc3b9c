"""Sidecars: annotations made later, one parquet beside each tar, joined to it by key.

``00017.regions.parquet`` carries, in its schema's metadata, the digest of the tar it was made from and of its maker
(a model, a rule). Images are never rewritten for an annotation, and an annotation of other images is never taken for
one of these.
"""

import hashlib
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SidecarError
from pipeline.shards.snapshot import Shard
from pipeline.shards.storage import Folder

TAR_DIGEST = b"clipmill.tar_sha256"
MAKER = b"clipmill.maker"


def sidecar_file(shard: Shard, name: str) -> str:
    """``00017.regions.parquet``"""
    return f"{shard.name}.{name}.parquet"


def write_sidecar(folder: Folder, shard: Shard, name: str, table: pa.Table, maker: str) -> str:
    """Write ``table`` (it has a column ``key``) as the sidecar ``name`` of ``shard``; returns its SHA-256 hex.

    ``maker`` is the digest of what made it: the model's weights, the rule's version.

    Raises:
        SidecarError: no column ``key``, or ``name`` is not a plain word.
        StorageError: the store refused.
    """
    if "key" not in table.column_names or not name.isidentifier():
        raise SidecarError(f"sidecar {name!r}: needs a plain word as its name and a column `key`")
    stamps = {TAR_DIGEST: shard.sha256.encode(), MAKER: maker.encode()}
    stamped = table.replace_schema_metadata({**(table.schema.metadata or {}), **stamps})
    buffer = BytesIO()
    pq.write_table(stamped, buffer)
    folder.write_atomic(sidecar_file(shard, name), buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def read_sidecar(folder: Folder, shard: Shard, name: str, job: str, maker: str | None = None) -> pa.Table:
    """The sidecar ``name`` of ``shard``; ``job`` is named in errors as the way to make it.

    Raises:
        SidecarError: missing, made from another tar, or made by something else than ``maker``.
    """
    file = sidecar_file(shard, name)
    try:
        table = pq.read_table(BytesIO(folder.read_bytes(file)))
    except FileNotFoundError as error:
        raise SidecarError(f"{folder.join(file)} is missing; make it with {job}") from error
    except pa.ArrowInvalid as error:
        raise SidecarError(f"{folder.join(file)} is not parquet ({error}); make it again with {job}") from error
    metadata = table.schema.metadata or {}
    if metadata.get(TAR_DIGEST) != shard.sha256.encode():
        raise SidecarError(f"{folder.join(file)} was made from another {shard.tar}; make it again with {job}")
    if maker is not None and metadata.get(MAKER) != maker.encode():
        made_by = metadata.get(MAKER, b"?").decode()
        raise SidecarError(f"{folder.join(file)} was made by {made_by}, not {maker}; make it again with {job}")
    return table
