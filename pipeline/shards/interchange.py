"""Index files for other tools: ``sizes.json``, a wids index, a Croissant card.

They are stored in ``{folder}/_snapshots/{id}/``, with relative paths to the tars, and are written just before the
manifest that makes the snapshot visible. open_clip expects ``sizes.json`` beside the tars, so a copy is written there,
except in folders made by img2dataset: it reads every ``*.json`` beside its tars as one of its marks, and its resume
would fail. These tools ignore selections, so the counts include hidden samples.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pipeline.dataset import Card, card_names, load_card
from pipeline.shards.depth_values import DEPTH_FIELD
from pipeline.shards.label_values import MASK_FIELD
from pipeline.shards.manifest import Shard, Snapshot
from pipeline.shards.media import AUDIO, IMAGE, VIDEO, medium_of
from pipeline.shards.storage import Folder

SIZES, WIDS, CROISSANT = "sizes.json", "wids.json", "croissant.json"
UP = "../../"  # from `_snapshots/{id}/` to the tars
LISTED_SHARDS = 10_000  # largest number of tars that a Croissant card lists; above it, the card names the manifest only
FOREIGN_ENGINES = ("img2dataset", "adopted")
CROISSANT_VERSION = "http://mlcommons.org/croissant/1.0"
# The context prescribed by the Croissant 1.0 specification (appendix "JSON-LD context").
CONTEXT: Mapping[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
PIXEL_MAPS = (MASK_FIELD, DEPTH_FIELD)
TEXTS = {"txt": "text/plain", "json": "application/json"}
CONTENTS = {IMAGE.name: "sc:ImageObject", AUDIO.name: "sc:AudioObject", VIDEO.name: "sc:VideoObject"}


def write_indexes(folder: Folder, snapshot: Snapshot, manifest: bytes) -> None:
    """Write the index files of ``snapshot``; ``manifest`` is the parquet file that lists its shards.

    Raises:
        StorageError: the file system or store failed.
    """
    place = folder.folder(f"_snapshots/{snapshot.id}")
    sizes = json.dumps(shard_sizes(snapshot.shards)).encode()
    place.write_atomic(SIZES, sizes)
    place.write_atomic(WIDS, json.dumps(wids_index(snapshot), indent=2).encode())
    card = croissant_card(snapshot, hashlib.sha256(manifest).hexdigest())
    place.write_atomic(CROISSANT, json.dumps(card, indent=2, ensure_ascii=False).encode())
    if snapshot.options.get("engine") not in FOREIGN_ENGINES:
        folder.write_atomic(SIZES, sizes)


def delete_indexes(folder: Folder, snapshot_id: str) -> None:
    """Delete the index files of a snapshot, if any. ``sizes.json`` beside the tars stays: it is the latest's."""
    folder.delete_folder(f"_snapshots/{snapshot_id}")


def shard_sizes(shards: tuple[Shard, ...]) -> dict[str, int]:
    """open_clip's ``sizes.json``: tar to number of samples."""
    return {shard.tar: shard.stored for shard in shards}


def wids_index(snapshot: Snapshot) -> dict[str, Any]:
    """The index for ``wids.ShardListDataset``, local or remote."""
    shards = [
        {"url": UP + shard.tar, "nsamples": shard.stored, "filesize": shard.bytes, "sha256": shard.sha256}
        for shard in snapshot.shards
    ]
    name = snapshot.card or snapshot.folder.rsplit("/", 1)[-1]
    return {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": name, "shardlist": shards}


def croissant_card(snapshot: Snapshot, manifest_sha256: str) -> dict[str, Any]:
    """A Croissant 1.0 description (JSON-LD): licence, files with their hashes, fields of the samples."""
    card = _card(snapshot)
    listed = snapshot.shards if len(snapshot.shards) <= LISTED_SHARDS else ()
    sets = _file_sets(snapshot, listed)
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "name": card.name,
        "description": _description(card, snapshot, bool(listed)),
        "conformsTo": CROISSANT_VERSION,
        **({"license": card.licence} if card.licence else {}),
        **({"url": card.home} if card.home else {}),
        "version": f"{int(snapshot.id.split('-')[0])}.0.0",
        "datePublished": snapshot.created,
        "distribution": [
            _manifest(snapshot, manifest_sha256),
            *(_tar(snapshot, shard) for shard in listed),
            *sets.values(),
        ],
        "recordSet": [_record_set(field, kind) for field in sets if (kind := _data_type(field))],
    }


def _card(snapshot: Snapshot) -> Card:
    if snapshot.card in card_names():
        return load_card(str(snapshot.card))
    name = snapshot.card or snapshot.folder.rsplit("/", 1)[-1]
    return Card(name=name, title=name)


def _description(card: Card, snapshot: Snapshot, listed: bool) -> str:
    said = card.description or card.title
    counts = f"{snapshot.samples} samples in {len(snapshot.shards)} WebDataset tars; snapshot {snapshot.id}."
    missing = "" if listed else f" The tars and their SHA-256 are listed in {snapshot.id}.shards.parquet."
    return f"{said} {counts}{missing}".strip()


def _manifest(snapshot: Snapshot, sha256: str) -> dict[str, Any]:
    file = f"{snapshot.id}.shards.parquet"
    return {
        "@type": "cr:FileObject",
        "@id": file,
        "name": file,
        "description": "The shards with their counts, bytes, SHA-256 and selections.",
        "contentUrl": f"../{file}",
        "encodingFormat": "application/x-parquet",
        "sha256": sha256,
    }


def _tar(snapshot: Snapshot, shard: Shard) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": shard.tar,
        "name": shard.tar,
        # The path includes the snapshot's folder: mlcroissant caches extracted files by the literal address, and would
        # confuse the `../../00000.tar` of two datasets.
        "contentUrl": f"../{snapshot.id}/{UP}{shard.tar}",
        "contentSize": f"{shard.bytes} B",
        "encodingFormat": "application/x-tar",
        "sha256": shard.sha256,
    }


def _file_sets(snapshot: Snapshot, listed: tuple[Shard, ...]) -> dict[str, dict[str, Any]]:
    """For each field of the samples, its members in the tars."""
    sets = {}
    for field in snapshot.fields if listed else ():
        # `*.json` would match the members `.boxes.json` too; keys end in a digit.
        ambiguous = any(other.endswith(f".{field}") for other in snapshot.fields)
        sets[field] = {
            "@type": "cr:FileSet",
            "@id": f"{field}-files",
            "name": f"{field}-files",
            "containedIn": [{"@id": shard.tar} for shard in listed],
            "encodingFormat": _mime_type(field),
            "includes": f"*[0-9].{field}" if ambiguous else f"*.{field}",
        }
    return sets


def _data_type(field: str) -> str | None:
    """Croissant's type of a field's content; None where it has no such type, as for arrays."""
    medium = IMAGE if field in PIXEL_MAPS else medium_of(field)
    if medium is not None:
        return CONTENTS.get(medium.name)
    return "sc:Text" if field.rpartition(".")[2] in TEXTS else None


def _mime_type(field: str) -> str:
    ending = field.rpartition(".")[2]
    medium = medium_of(ending)
    return TEXTS.get(ending, "application/octet-stream") if medium is None else medium.mime_of(ending)


def _record_set(field: str, kind: str) -> dict[str, Any]:
    """Records of key and content; records with equal keys belong to one sample."""
    name = field.replace(".", "-")
    source = {"fileSet": {"@id": f"{field}-files"}}
    key = {
        "@type": "cr:Field",
        "@id": f"{name}/key",
        "name": f"{name}/key",
        "description": "What the members of one sample share.",
        "dataType": "sc:Text",
        "source": {**source, "extract": {"fileProperty": "filename"}, "transform": {"regex": r"^([^.]+)\."}},
    }
    content = {
        "@type": "cr:Field",
        "@id": f"{name}/content",
        "name": f"{name}/content",
        "dataType": kind,
        "source": {**source, "extract": {"fileProperty": "content"}},
    }
    return {"@type": "cr:RecordSet", "@id": name, "name": name, "key": {"@id": f"{name}/key"}, "field": [key, content]}
