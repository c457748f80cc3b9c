"""Features as sidecars: of every stored sample, made once, joined by key; exported in clip-retrieval's layout."""

import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import DataError, SettingError, SidecarError
from pipeline.shards.sample import Sample
from pipeline.shards.selection import select
from pipeline.shards.sidecar import Wanted
from pipeline.shards.snapshot import Snapshot, publish_shards, read_snapshot, snapshot_ids
from pipeline.shards.storage import Folder, file_digest
from pipeline.stages.annotate.embeddings import EmbedOptions, FeatureExport, caption_of, embed, read_features
from pipeline.stages.shard_tasks import Workers

HERE = Workers(processes_count=0)
MakeSnapshot = Callable[..., Snapshot]


@dataclass
class Colours:
    """A model whose features are easily computed another way: the mean colour, and the counts of three letters."""

    maker: str = "colours-1"
    facts: Mapping[str, str | int] = field(default_factory=dict)
    media: tuple[str, ...] = ("image", "audio", "text")
    sidecars: tuple[Wanted, ...] = ()

    def prepare(self, sample: Sample, medium: str) -> Any | None:
        if medium == "text":
            return caption_of(sample)
        if medium == "audio":
            return sample.fields.get("wav")
        try:
            return np.asarray(Image.open(io.BytesIO(sample.image() or b"")).convert("RGB"), np.float32)
        except OSError:
            return None

    def encode(self, medium: str, inputs: Sequence[Any]) -> NDArray[np.float32]:
        if medium == "image":
            return unit(np.stack([image.mean((0, 1)) for image in inputs]))
        if medium == "audio":
            return unit(np.array([[1 + body.count(bytes([byte])) for byte in range(3)] for body in inputs], np.float32))
        return unit(np.array([[1 + text.count(letter) for letter in "aer"] for text in inputs], np.float32))


def jpeg(number: int) -> bytes:
    from tests.conftest import image

    return image(number)


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@dataclass(frozen=True)
class Load:
    maker: str = "colours-1"

    def __call__(self, threads: int) -> Colours:
        return Colours(self.maker)


def run(snapshot: Snapshot, maker: str = "colours-1", workers: Workers = HERE, **options: Any) -> Snapshot:
    return embed(snapshot, Load(maker), EmbedOptions(batch_size=3, **options), workers)


def sidecars(snapshot: Snapshot) -> dict[str, str]:
    return {path.name: file_digest(path) for path in Path(snapshot.folder).glob("*.embeddings.parquet")}


def expected(number: int, side: int = 72) -> NDArray[np.float32]:
    """The feature of conftest's image ``number`` from its pixels, with Pillow and numpy alone."""
    from tests.conftest import image

    return unit(np.asarray(Image.open(io.BytesIO(image(number, side))), np.float32).mean((0, 1))[None])[0]


@pytest.fixture
def snapshot(make_snapshot: MakeSnapshot, tmp_path: Path) -> Snapshot:
    return make_snapshot((4, 5), folder=tmp_path / "set")


def test_every_stored_sample_gets_its_features(snapshot: Snapshot) -> None:
    embedded = run(snapshot)
    assert embedded.parent == snapshot.id and embedded.samples == 9
    rows = []
    for shard in embedded.shards:
        file = Path(snapshot.folder) / f"{shard.name}.embeddings.parquet"
        assert shard.sidecars == {"embeddings": file_digest(file)}
        table = pq.read_table(file)
        assert table.schema.field("image").type == pa.list_(pa.float16(), 3) == table.schema.field("text").type
        rows += table.to_pylist()
    assert [row["key"] for row in rows] == [
        f"{shard:05d}{n:02d}" for shard, size in ((0, 4), (1, 5)) for n in range(size)
    ]
    from tests.conftest import coloured_sample

    for number, row in enumerate(rows):
        text = coloured_sample(0, 0, number).fields["txt"].decode()
        letters = unit(np.array([[1 + text.count(letter) for letter in "aer"]], np.float32))[0]
        np.testing.assert_allclose(np.array(row["image"], np.float32), expected(number), atol=1e-3)
        np.testing.assert_allclose(np.array(row["text"], np.float32), letters, atol=1e-3)


def test_finished_shards_are_not_read_again(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(snapshot)
    before = sidecars(whole)
    (Path(snapshot.folder) / "00001.embeddings.parquet").unlink()  # as after a kill
    read: list[str] = []
    real = Folder.open
    monkeypatch.setattr(Folder, "open", lambda self, name: read.append(name) or real(self, name))
    again = run(snapshot)
    assert [name for name in read if name.endswith(".tar")] == ["00001.tar"]
    assert again == whole and sidecars(again) == before
    assert len(snapshot_ids(Folder(snapshot.folder))) == 2


def test_another_model_is_refused_or_put_beside_or_replaces(snapshot: Snapshot) -> None:
    first = run(snapshot)
    with pytest.raises(SidecarError, match="another model or other settings; --overwrite"):
        run(first, maker="colours-2")
    beside = run(first, maker="colours-2", name="other")
    assert all(sorted(shard.sidecars) == ["embeddings", "other"] for shard in beside.shards)
    replaced = run(beside, maker="colours-2", overwrite=True)
    assert all(shard.sidecars["embeddings"] == shard.sidecars["other"] for shard in replaced.shards)


def test_features_of_another_tar_are_made_again(snapshot: Snapshot, make_snapshot: MakeSnapshot) -> None:
    run(snapshot)
    shutil.rmtree(Path(snapshot.folder) / "_snapshots")
    changed = make_snapshot((3, 5), folder=Path(snapshot.folder))
    embedded = run(changed)
    assert len(read_features(Folder(changed.folder), embedded.shards[0]).keys) == 3


def test_samples_without_image_or_caption_are_not_numbers(make_snapshot: MakeSnapshot, tmp_path: Path) -> None:
    spoil = {1: {"jpg": b"broken", "txt": b"words"}, 2: {"txt": b"only words"}, 3: {"json": b"{}"}}
    embedded = run(make_snapshot((4, 4), folder=tmp_path / "set", spoil=spoil))
    features = read_features(Folder(embedded.folder), embedded.shards[0])
    assert np.isnan(features.by_medium["image"]).all(axis=1).tolist() == [False, True, True, True]
    assert np.isnan(features.by_medium["text"]).all(axis=1).tolist() == [False, False, False, True]
    exported = FeatureExport(snapshot=embedded, folder=Folder(tmp_path / "out"))
    assert exported.write(HERE) == 5


def test_snapshots_without_captions_get_image_features_alone(snapshot: Snapshot, tmp_path: Path) -> None:
    plain = {**vars(snapshot), "fields": ("jpg",)}
    Folder(snapshot.folder).folder("_snapshots").delete(f"{snapshot.id}.json")
    bare = publish_shards(
        Folder(snapshot.folder), plain["shards"], fields=("jpg",), card=None, options={}, rows=9, dropped={}
    )
    embedded = run(bare)
    assert list(read_features(Folder(bare.folder), embedded.shards[0]).by_medium) == ["image"]
    FeatureExport(snapshot=embedded, folder=Folder(tmp_path / "out")).write(HERE)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["img_emb", "metadata"]


def test_sounds_get_a_column_of_their_own(make_snapshot: MakeSnapshot, tmp_path: Path) -> None:
    """The first sample has all media, the second a sound alone, the third no sound."""
    spoil = {
        0: {"jpg": jpeg(0), "wav": b"\0\1\1", "txt": b"a red tree"},
        1: {"wav": b"\2\2\2"},
        2: {"jpg": jpeg(2), "txt": b"are"},
    }
    made = make_snapshot((3,), folder=tmp_path / "set", spoil=spoil)
    embedded = run(replace(made, fields=("jpg", "txt", "wav")))
    features = read_features(Folder(embedded.folder), embedded.shards[0]).by_medium
    assert list(features) == ["image", "audio", "text"]
    heard = unit(np.array([[2, 3, 1], [1, 1, 4]], np.float32))
    np.testing.assert_allclose(features["audio"][:2].astype(np.float32), heard, atol=1e-3)
    missing = {medium: np.isnan(rows).all(axis=1).tolist() for medium, rows in features.items()}
    assert missing["audio"] == [False, False, True] and missing["image"] == missing["text"] == [False, True, False]
    out = tmp_path / "out"
    assert FeatureExport(snapshot=embedded, folder=Folder(out)).write(HERE) == 1
    assert sorted(path.name for path in out.iterdir()) == ["audio_emb", "img_emb", "metadata", "text_emb"]
    np.testing.assert_allclose(np.load(out / "audio_emb" / "audio_emb_0.npy"), heard[:1], atol=1e-3)


def test_a_snapshot_without_a_medium_of_the_model_is_refused(make_snapshot: MakeSnapshot, tmp_path: Path) -> None:
    bare = make_snapshot((1,), folder=tmp_path / "set", spoil={0: {"npy": b"numbers"}})
    with pytest.raises(SettingError, match="image, audio, text.*fields: .*npy"):
        run(replace(bare, fields=("npy",)))


def test_ray_makes_the_same_files(snapshot: Snapshot, tmp_path: Path, ray_cluster: Any) -> None:
    copy = Path(shutil.copytree(snapshot.folder, tmp_path / "copy"))
    whole = run(snapshot)
    by_ray = embed(read_snapshot(str(copy)), LoadHere(), EmbedOptions(batch_size=3), Workers())
    assert sidecars(by_ray) == sidecars(whole) and by_ray.digest == whole.digest
    with pytest.raises(SidecarError, match="another model"):
        embed(read_snapshot(str(copy)), LoadHere("colours-2"), EmbedOptions(), Workers(processes_count=2))


class LoadHere:
    """Pickled by value, since Ray's workers cannot import the tests."""

    def __init__(self, maker: str = "colours-1") -> None:
        self.maker = maker

    def __call__(self, threads: int) -> Any:
        return self.model()

    def __reduce__(self) -> Any:
        import cloudpickle

        return cloudpickle.loads, (cloudpickle.dumps(_loader(self.maker)),)


def _loader(maker: str) -> Any:
    import sys

    import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return lambda threads: Colours(maker)


def test_a_damaged_tar_is_said_so(snapshot: Snapshot) -> None:
    path = Path(snapshot.folder) / "00001.tar"
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(DataError, match="00001.tar"):
        run(snapshot)
    assert list(sidecars(snapshot)) == ["00000.embeddings.parquet"]


def test_a_snapshot_published_meanwhile_gets_them_too(snapshot: Snapshot) -> None:
    """The features took days; a filter was run in between."""
    folder = Folder(snapshot.folder)
    fewer = (select(folder, snapshot.shards[0], np.array([1, 3])), *snapshot.shards[1:])
    filtered = publish_shards(
        folder, fewer, fields=snapshot.fields, card=None, options={}, rows=9, dropped={"too_small": 2}
    )
    embedded = run(snapshot)
    assert embedded.parent == filtered.id and embedded.samples == 7 and embedded.dropped == {"too_small": 2}
    assert all("embeddings" in shard.sidecars for shard in embedded.shards)


def read_as_clip_retrieval_does(folder: Path) -> tuple[Any, Any, pd.DataFrame]:
    """As its index and its back end: npy and parquet files in the order of their names, row by row."""
    images = np.concatenate([np.load(path, mmap_mode="r") for path in sorted((folder / "img_emb").iterdir())])
    texts = np.concatenate([np.load(path, mmap_mode="r") for path in sorted((folder / "text_emb").iterdir())])
    return images, texts, pd.concat([pd.read_parquet(path) for path in sorted((folder / "metadata").iterdir())])


@pytest.mark.parametrize("rows_per_file", [1000, 5, 1])
def test_the_export_is_what_readers_see_in_clip_retrievals_layout(
    snapshot: Snapshot, tmp_path: Path, rows_per_file: int
) -> None:
    folder = Folder(snapshot.folder)
    some = (select(folder, snapshot.shards[0], np.array([0, 2, 2, 3])), snapshot.shards[1])
    publish_shards(folder, some, fields=snapshot.fields, card=None, options={}, rows=9, dropped={})
    export = FeatureExport(snapshot=run(snapshot), folder=Folder(tmp_path / "out"), rows_per_file=rows_per_file)
    assert export.write(HERE) == 9
    images, texts, metadata = read_as_clip_retrieval_does(tmp_path / "out")
    assert images.dtype == texts.dtype == np.float16 and images.shape == texts.shape == (9, 3)
    numbers = [0, 2, 2, 3, 4, 5, 6, 7, 8]
    assert metadata["number"].tolist() == numbers and list(metadata.columns[:2]) == ["image_path", "caption"]
    assert metadata["image_path"].iloc[0] == "0000000" and "image number 2" in metadata["caption"].iloc[1]
    np.testing.assert_allclose(images.astype(np.float32), np.stack([expected(n) for n in numbers]), atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(texts.astype(np.float32), axis=1), 1, atol=2e-3)
    names = {1000: ["0"], 5: ["0", "1"], 1: list("012345678")}[rows_per_file]
    assert sorted(path.stem for path in (tmp_path / "out" / "text_emb").iterdir()) == [f"text_emb_{n}" for n in names]


def test_file_numbers_have_clip_retrievals_width(snapshot: Snapshot, tmp_path: Path) -> None:
    for files, width in ((1, 1), (9, 1), (10, 2), (100, 3), (101, 3)):
        export = FeatureExport(snapshot=snapshot, folder=Folder(tmp_path), rows_per_file=1)
        assert len(str(files)) == int(np.log10(files)) + 1 == width
        assert export.files == 9
