"""Our shards read by other tools: webdataset, wids, open_clip, Ray Data, Croissant."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.shards.interchange import LISTED_SHARDS, croissant_card
from pipeline.shards.selection import select
from pipeline.shards.snapshot import Shard, Snapshot, publish_shards
from pipeline.shards.storage import Folder, file_digest

MakeSnapshot = Callable[..., Snapshot]

# webdataset leaves its files open; torch warns about loaders without workers.
pytestmark = pytest.mark.filterwarnings("ignore")


def indexes(snapshot: Snapshot) -> Path:
    return Path(snapshot.folder) / "_snapshots" / snapshot.id


def captions() -> list[str]:
    names = ["red", "green", "blue", "yellow"]
    return [f"a {'very ' * (number % 5)}{names[number % 4]} image number {number}" for number in range(20)]


def test_wids_finds_every_sample_by_number(make_snapshot: MakeSnapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    wids = pytest.importorskip("wids", reason="webdataset 1.0 comes without it")
    snapshot = make_snapshot()
    monkeypatch.chdir(snapshot.folder)
    dataset = wids.ShardListDataset(str(indexes(snapshot) / "wids.json"), keep=True, transformations=[])
    assert len(dataset) == 20
    assert [dataset[number][".txt"].read().decode() for number in (0, 6, 7, 19)] == [
        captions()[number] for number in (0, 6, 7, 19)
    ]
    plain = json.loads((indexes(snapshot) / "wids.json").read_text())
    assert plain["__kind__"] == "wids-shard-index-v1" and plain["wids_version"] == 1
    for entry in plain["shardlist"]:
        file = (indexes(snapshot) / entry["url"]).resolve()
        assert (file.stat().st_size, file_digest(file)) == (entry["filesize"], entry["sha256"])


def test_open_clips_own_loader_counts_and_reads_them(make_snapshot: MakeSnapshot) -> None:
    data = pytest.importorskip("open_clip_train.data")
    snapshot = make_snapshot()
    shards = f"{snapshot.folder}/{{00000..00002}}.tar"
    assert data.get_dataset_size(shards) == (20, 3)
    args = SimpleNamespace(
        train_data=shards,
        val_data=shards,
        train_num_samples=None,
        val_num_samples=None,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=4,
        world_size=1,
        workers=1,
        distributed=False,
    )
    trained = data.get_wds_dataset(args, lambda image: image.size[0], True, tokenizer=lambda text: [text])
    assert trained.dataloader.num_samples == 20 and trained.dataloader.num_batches == 5
    info = data.get_wds_dataset(args, lambda image: image.size[0], False, tokenizer=lambda text: [text])
    read = [text for _, texts in info.dataloader for text in texts]
    assert sorted(read) == sorted(captions())


def test_ray_data_reads_them(make_snapshot: MakeSnapshot, ray_cluster: Any) -> None:
    import ray

    snapshot = make_snapshot()
    tars = [f"{snapshot.folder}/{shard.tar}" for shard in snapshot.shards]
    rows = ray.data.read_webdataset(tars, decoder=None).take_all()
    assert sorted(row["txt"].decode() for row in rows) == sorted(captions())
    assert all(row["jpg"][:2] == b"\xff\xd8" and json.loads(row["json"])["caption"] for row in rows)


def test_hidden_samples_are_counted_where_tools_will_meet_them(make_snapshot: MakeSnapshot) -> None:
    """These tools read whole tars: an index that left out what a selection hides would miscount."""
    snapshot = make_snapshot()
    folder = Folder(snapshot.folder)
    shards = (select(folder, snapshot.shards[0], [0, 2, 2]), *snapshot.shards[1:])  # type: ignore[arg-type]
    smaller = publish_shards(
        folder, shards, fields=snapshot.fields, card=None, options={}, rows=snapshot.rows, dropped={}
    )
    assert smaller.samples == 16
    sizes = {"00000.tar": 7, "00001.tar": 5, "00002.tar": 8}
    for place in (Path(snapshot.folder), indexes(snapshot), indexes(smaller)):
        assert json.loads((place / "sizes.json").read_text()) == sizes


@pytest.mark.parametrize("engine", ["img2dataset", "adopted"])
def test_nothing_is_put_beside_tars_that_img2dataset_resumes(engine: str, tmp_path: Path) -> None:
    shard = Shard(name="00000", samples=1, bytes=1, sha256="0" * 64)
    snapshot = publish_shards(
        Folder(tmp_path), (shard,), fields=("jpg",), card=None, options={"engine": engine}, rows=1, dropped={}
    )
    assert os.listdir(tmp_path) == ["_snapshots"]
    assert sorted(os.listdir(indexes(snapshot))) == ["croissant.json", "sizes.json", "wids.json"]


def expand(context: dict[str, Any], term: str) -> str:
    """A JSON-LD term as the IRI it stands for."""
    found = context.get(term, term)
    found = found["@id"] if isinstance(found, dict) else found
    prefix, colon, rest = found.partition(":")
    if colon and not rest.startswith("//"):
        return str(context[prefix]) + rest
    return found if colon else str(context["@vocab"]) + found


def terms(value: Any) -> set[str]:
    if isinstance(value, list):
        return set().union(*map(terms, value)) if value else set()
    if not isinstance(value, dict):
        return set()
    return {key for key in value if key[0] != "@"}.union(*map(terms, value.values()))


def test_the_croissant_card_names_files_that_are_there(make_snapshot: MakeSnapshot) -> None:
    snapshot = make_snapshot()
    card = json.loads((indexes(snapshot) / "croissant.json").read_text())
    context = card.pop("@context")
    assert card["@type"] == "sc:Dataset" and card["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    # What the specification's own vocabulary defines, and what it takes from schema.org and Dublin Core.
    ours = {expand(context, term) for term in terms(card)}
    croissant = {iri.rsplit("/", 1)[1] for iri in ours if "mlcommons" in iri}
    assert croissant == {"extract", "field", "fileProperty", "fileSet", "includes", "key", "recordSet", "regex"} | {
        "dataType",
        "source",
        "transform",
    }
    assert "http://purl.org/dc/terms/conformsTo" in ours
    files = [entry for entry in card["distribution"] if entry["@type"] == "cr:FileObject"]
    assert len(files) == 4 and all(snapshot.id in entry["contentUrl"] for entry in files)
    for entry in files:
        content = (indexes(snapshot) / entry["contentUrl"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        assert entry.get("contentSize", f"{len(content)} B") == f"{len(content)} B"
    identities = {entry["@id"] for entry in card["distribution"]}
    for entry in card["distribution"]:
        assert {inner["@id"] for inner in entry.get("containedIn", [])} <= identities
    for record in card["recordSet"]:
        assert {field["source"]["fileSet"]["@id"] for field in record["field"]} <= identities
        assert record["key"]["@id"] in {field["@id"] for field in record["field"]}


def test_mlcroissant_reads_images_and_captions_through_the_card(
    make_snapshot: MakeSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROISSANT_CACHE", str(tmp_path))
    mlcroissant = pytest.importorskip("mlcroissant", reason="not a dependency: it brings stubs that change our types")
    snapshot = make_snapshot()
    dataset = mlcroissant.Dataset(jsonld=str(indexes(snapshot) / "croissant.json"))
    texts = [record["txt/content"].decode() for record in dataset.records("txt")]
    assert sorted(texts) == sorted(captions())
    assert {record["jpg/content"].size for record in dataset.records("jpg")} == {(72, 72)}


def test_the_card_of_a_data_set_brings_its_licence(make_snapshot: MakeSnapshot, tmp_path: Path) -> None:
    plain = vars(make_snapshot())
    card = croissant_card(Snapshot(**{**plain, "card": "tuxpaint_stamps"}), "0" * 64)
    assert card["license"] and card["url"].startswith("http") and card["name"] == "tuxpaint_stamps"


def test_a_huge_snapshot_is_described_by_its_manifest(make_snapshot: MakeSnapshot) -> None:
    plain = vars(make_snapshot())
    shards = tuple(
        Shard(name=f"{number:05d}", samples=1, bytes=1, sha256="0" * 64) for number in range(LISTED_SHARDS + 1)
    )
    card = croissant_card(Snapshot(**{**plain, "shards": shards}), "1" * 64)
    assert [entry["sha256"] for entry in card["distribution"]] == ["1" * 64]
    assert "shards.parquet" in card["description"] and len(json.dumps(card)) < 10_000
