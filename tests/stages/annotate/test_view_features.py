"""Raw features of several views, each compared with model and crop applied alone; and every kind of error."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import DataError, SettingError, SidecarError
from pipeline.evaluation.embedder import LoadEmbedder, ViewEmbedder, Views
from pipeline.evaluation.models import load_model
from pipeline.loaders.images import ImageTransform, crop_bits, decode
from pipeline.shards.sample import Sample
from pipeline.shards.selection import select
from pipeline.shards.sidecar import write_sidecar
from pipeline.shards.snapshot import Snapshot, publish_shards
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.embeddings import EmbedOptions, embed
from pipeline.stages.annotate.view_features import ViewFeatures, read_views
from pipeline.stages.shard_tasks import Workers
from tests.conftest import coloured_sample

HERE = Workers(processes_count=0)
MakeSnapshot = Callable[..., Snapshot]
TINY = "clipmill-tiny:untrained"


def views_of(snapshot: Snapshot, views: int = 2, **settings: Any) -> Snapshot:
    load = LoadEmbedder(checkpoint=TINY, device="cpu", views=Views(views=views, **settings))
    return embed(snapshot, load, EmbedOptions(name="views", batch_size=3), HERE)


def maker(views: int = 2, **settings: Any) -> str:
    return ViewEmbedder(load_model(TINY, "cpu"), Views(views=views, **settings)).maker


@pytest.fixture
def snapshot(make_snapshot: MakeSnapshot, tmp_path: Path) -> Snapshot:
    return make_snapshot((4, 5), folder=tmp_path / "set")


def test_every_view_is_what_the_model_gives_for_its_crop(snapshot: Snapshot) -> None:
    """Not normalised; view v is cropped by random bits of (seed, v, key)."""
    found = read_views(views_of(snapshot, seed=7), maker(seed=7))
    assert found.features.shape[:2] == (9, 3) and found.features.dtype == np.float16
    assert found.facts["views"] == 3 and found.facts["seed"] == 7 and "resized" in str(found.facts["random"])
    model: Any = load_model(TINY, "cpu")
    size = model.transforms(train=False).size
    assert found.keys[5] == "0000101"
    image = coloured_sample(1, 1, 5).image()
    assert image is not None
    number = int.from_bytes(hashlib.sha256(b"0000101").digest()[:8], "big")
    crops = ImageTransform(size=size, crop="resized", scale=(0.5, 1.0), flip=0.5)
    images = [ImageTransform(size=size)(decode(image))]
    images += [crops.read(image, crop_bits(7, view, number)) for view in (1, 2)]
    with torch.no_grad():
        raw = model.model.encode_image((torch.stack(images).float() - model.mean) / model.std)
    np.testing.assert_allclose(found.of(["0000101"])[0], raw.numpy(), rtol=2e-3, atol=2e-3)
    assert abs(float(raw[0].norm()) - 1) > 0.05
    assert np.abs(found.features[:, 0] - found.features[:, 1]).max() > 1e-3


def test_more_views_leave_the_first_ones_as_they_are(snapshot: Snapshot) -> None:
    few, many = (ViewEmbedder(load_model(TINY, "cpu"), Views(views=views)) for views in (2, 5))
    image = coloured_sample(0, 0, 0).image()
    assert image is not None
    one, other = few.prepare(Sample("a", {"jpg": image}), "image"), many.prepare(Sample("a", {"jpg": image}), "image")
    assert one is not None and other is not None and torch.equal(one, other[:3])
    assert not torch.equal(one[1:], few.prepare(Sample("b", {"jpg": image}), "image")[1:])  # type: ignore[index]
    assert few.prepare(Sample("a", {"jpg": b"no image"}), "image") is None


def test_what_a_selection_hides_is_not_read(snapshot: Snapshot) -> None:
    made = views_of(snapshot)
    folder = Folder(made.folder)
    some = (select(folder, made.shards[0], np.array([1, 3])), made.shards[1])
    fewer = publish_shards(folder, some, fields=made.fields, card=None, options={}, rows=9, dropped={})
    found = read_views(fewer)
    assert found.keys[:3] == ("0000001", "0000003", "0000100") and len(found.features) == 7
    np.testing.assert_array_equal(found.of(["0000003"]), read_views(made).of(["0000003"]))


def test_other_models_other_views_and_other_tars_are_refused(snapshot: Snapshot, make_snapshot: MakeSnapshot) -> None:
    with pytest.raises(SidecarError, match="missing; make it with jobs/embed_dataset.py views"):
        read_views(snapshot)
    made = views_of(snapshot)
    assert len({maker(), maker(3), maker(seed=1), maker(crop_scale=(0.1, 1.0)), maker(flip=0.0)}) == 5
    for other in ("another model", maker(3)):
        with pytest.raises(SidecarError, match="was made by .*, not .*; make it again"):
            read_views(made, other)
    with pytest.raises(SidecarError, match="other settings; --overwrite"):
        views_of(snapshot, seed=1)
    embedded = embed(made, LoadEmbedder(checkpoint=TINY, device="cpu"), EmbedOptions(), HERE)
    with pytest.raises(SidecarError, match="no features of views"):
        read_views(embedded, name="embeddings")
    changed = make_snapshot((3, 5), folder=Path(snapshot.folder))
    with pytest.raises(SidecarError, match="another 00000.tar"):
        read_views(changed)


def test_images_that_cannot_be_read_are_refused_when_they_are_asked_for(
    make_snapshot: MakeSnapshot, tmp_path: Path
) -> None:
    spoil = {number: {"jpg": b"broken"} for number in (1, 2, 3)}
    found = read_views(views_of(make_snapshot((2, 2, 2), folder=tmp_path / "set", spoil=spoil)))
    assert np.isnan(found.features).any(axis=(1, 2)).tolist() == [False, True, True, True, False, False]
    assert np.isfinite(found.of(["0000000", "0000200"])).all()
    with pytest.raises(DataError, match="features of sample 0000101 are not finite"):
        found.of(["0000000", "0000101"])
    with pytest.raises(DataError, match="sample 99 has no features"):
        found.of(["99"])


def test_numbers_that_are_none_in_a_sidecar_are_refused(snapshot: Snapshot) -> None:
    made = views_of(snapshot)
    folder, shard = Folder(made.folder), made.shards[0]
    file = Path(made.folder) / "00000.views.parquet"
    table = pq.read_table(file)
    facts = json.loads(table.schema.metadata[b"clipmill.facts"])
    assert facts == read_views(made).facts
    rows = table.to_pydict()
    rows["image"][2][5] = float("inf")
    import pyarrow as pa

    write_sidecar(folder, shard, "views", pa.table(rows, schema=table.schema), maker())
    with pytest.raises(DataError, match="features of sample 0000002 are not finite"):
        read_views(made, maker()).of(["0000002"])


def test_a_model_without_finite_features_is_said_so(snapshot: Snapshot) -> None:
    class Broken:
        maker, facts, media, sidecars = "broken", {"views": 1}, ("image",), ()

        def prepare(self, sample: Sample, medium: str) -> bytes | None:
            return sample.image()

        def encode(self, medium: str, inputs: Any) -> Any:
            return np.full((len(inputs), 1, 4), 1e6, np.float32)

    with pytest.raises(DataError, match="sample 0000000: the model gives features that are not finite, or too large"):
        embed(snapshot, lambda threads: Broken(), EmbedOptions(), HERE)


def test_ray_makes_the_same(make_snapshot: MakeSnapshot, tmp_path: Path, ray_cluster: Any) -> None:
    here = read_views(views_of(make_snapshot((2, 3), folder=tmp_path / "here")))
    load = LoadEmbedder(checkpoint=TINY, device="cpu", views=Views(views=2))
    there = make_snapshot((2, 3), folder=tmp_path / "there")
    found = read_views(embed(there, load, EmbedOptions(name="views"), Workers(processes_count=1)), maker())
    assert found.keys == here.keys
    np.testing.assert_allclose(found.features.astype(np.float32), here.features.astype(np.float32), atol=4e-3)


@pytest.mark.parametrize("settings", [{"views": -1}, {"crop_scale": (0.0, 1.0)}, {"flip": 2.0}, {"seed": -1}])
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        Views(**settings)


def test_features_are_found_by_key_in_any_order() -> None:
    features = np.arange(12, dtype=np.float16).reshape(3, 2, 2)
    found = ViewFeatures(("a", "b", "c"), features, {}).of(["c", "a", "c"])
    np.testing.assert_array_equal(found, features[[2, 0, 2]])
