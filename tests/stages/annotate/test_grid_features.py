"""The sidecar of grids: features as from one image at a time, made once, and what is refused."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.errors import DataError, SettingError, SidecarError
from pipeline.evaluation.grid_embedder import GridEmbedder, GridSize, LoadGridEmbedder
from pipeline.loaders.images import decode
from pipeline.loaders.samples import Samples, check_sidecars
from pipeline.models.class_vectors import untrained
from pipeline.models.towers.grid import GridTower
from pipeline.shards.sidecar import Wanted
from pipeline.shards.snapshot import Snapshot, read_snapshot
from pipeline.stages.annotate import grid_features as stage
from pipeline.stages.annotate.embeddings import EmbedOptions
from pipeline.stages.annotate.grid_features import JOB, embed_grids, stored_grid
from pipeline.stages.shard_tasks import Workers
from tests.models.test_grid_tower import random_norms, resnet

SIZE = GridSize(image_size=(64, 96))
MAKE = LoadGridEmbedder(checkpoint="clipmill-tiny:untrained", device="cpu", size=SIZE)
OPTIONS = EmbedOptions(name="grid", batch_size=3)
HERE = Workers(processes_count=0)


def embedded(snapshot: Snapshot, **changes: Any) -> Snapshot:
    settings: dict[str, Any] = {"make": MAKE, "options": OPTIONS, "workers": HERE, **changes}
    return embed_grids(snapshot, **settings)


@torch.no_grad()
def one_at_a_time(model: Any, content: bytes, size: tuple[int, int], stride: int) -> np.ndarray:
    """Features [rows, columns, D] with Pillow and open_clip's own ``forward_intermediates``."""
    settings = model.visual.preprocess_cfg
    image = Image.open(io.BytesIO(content)).convert("RGB")
    shrink = max(image.height / size[0], image.width / size[1])
    shape = round(image.height / shrink), round(image.width / shrink)
    whole = Image.new("RGB", size[::-1], tuple(round(255 * one) for one in settings["mean"]))
    whole.paste(image.resize(shape[::-1], Image.Resampling.BICUBIC), (0, 0))
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))
    pixels = (torch.from_numpy(np.array(whole)).permute(2, 0, 1) / 255 - mean) / std
    found = model.visual.forward_intermediates(
        pixels[None], indices=1, normalize_intermediates=True, intermediates_only=True
    )["image_intermediates"][0][0]
    return found.permute(1, 2, 0)[: -(-shape[0] // stride), : -(-shape[1] // stride)].numpy()


def resnet_with_norms() -> Any:
    model = resnet()
    random_norms(model)
    return model


@pytest.mark.parametrize(
    ("tower", "size", "stride"),
    [(resnet_with_norms, (64, 96), 32), (lambda: untrained("clipmill-tiny").model, (64, 64), 16)],
    ids=["resnet", "transformer"],
)
def test_features_are_those_of_one_image_at_a_time(
    tower: Callable[[], Any], size: tuple[int, int], stride: int, make_snapshot: Callable[..., Snapshot]
) -> None:
    snapshot = make_snapshot((5, 2), spoil={3: {"jpg": b"broken", "json": b"{}"}})
    embedder = GridEmbedder(GridTower(tower()), size)
    made = embedded(snapshot, make=lambda threads: embedder)
    facts, model = {"teacher": embedder.facts["teacher"]}, tower()
    samples = Samples(made, open_shards=2, sidecars=[Wanted(name="grid", job=JOB, facts=facts)])
    for number in range(7):
        sample = samples[number]
        found = stored_grid(sample.rows["grid"], sample.key)
        if number == 3:
            assert not found.size
            continue
        wanted = one_at_a_time(model, sample.image() or b"", size, stride)
        assert found.dtype == np.float16 and found.shape == wanted.shape
        # One level of a resized pixel, and float16.
        np.testing.assert_allclose(found, wanted, rtol=2e-2, atol=2e-2 * np.abs(wanted).max())
    check_sidecars(made, [Wanted(name="grid", job=JOB)])


@torch.no_grad()
def test_threads_that_prepare_give_the_tower_what_it_would_compute(make_snapshot: Callable[..., Snapshot]) -> None:
    """Bit for bit, and no matter how many images are encoded together."""
    tower = GridTower(resnet_with_norms())
    embedder, samples = GridEmbedder(tower, (64, 96)), Samples(make_snapshot((5,)), open_shards=1)
    contents = [samples[number].image() or b"" for number in range(5)]
    prepared = [embedder.prepare(content) for content in contents]
    pixels = torch.stack([tower.transform((64, 96))(decode(content))[0] for content in contents])
    wanted = tower(pixels[:2].contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1).half().numpy()
    images = [one.pixels for one in prepared if one is not None]
    assert images[0].dtype == torch.float32 and images[0].is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(embedder.encode(images[:2]), wanted)
    assert len(embedder.encode(images)) == 5 and np.array_equal(embedder.encode(images)[:2], wanted)


def test_shards_are_made_at_most_once(make_snapshot: Callable[..., Snapshot], monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = make_snapshot((3, 2))
    calls: list[str] = []
    table = stage.GridMaker.table

    def counted(self: Any, samples: Any, shard: Any) -> Any:
        calls.append(shard.name)
        if len(calls) == 2:
            raise DataError("killed")
        return table(self, samples, shard)

    monkeypatch.setattr(stage.GridMaker, "table", counted)
    with pytest.raises(DataError, match="killed"):
        embedded(snapshot)
    made = embedded(snapshot)
    assert calls == ["00000", "00001", "00001"]
    assert embedded(made).digest == read_snapshot(snapshot.folder).digest and len(calls) == 3
    file = pq.read_schema(Path(made.folder) / "00000.grid.parquet")
    assert b'"size": [64, 96]' in file.metadata[b"clipmill.facts"]


def test_another_tower_or_size_is_refused(make_snapshot: Callable[..., Snapshot]) -> None:
    made = embedded(make_snapshot((3,)))
    for other in (
        LoadGridEmbedder(checkpoint="clipmill-tiny:untrained", device="cpu", size=GridSize(image_size=(64, 64))),
        LoadGridEmbedder(checkpoint="clipmill-small:untrained", device="cpu", size=SIZE),
    ):
        with pytest.raises(SidecarError):
            embedded(made, make=other)
    wanted = Wanted(name="grid", job=JOB, facts={"teacher": "another"})
    with pytest.raises(SidecarError, match="teacher"):
        Samples(made, open_shards=1, sidecars=[wanted])[0]


def test_what_is_no_tower_is_refused() -> None:
    with pytest.raises(SettingError, match="image_size"):
        LoadGridEmbedder(checkpoint="clipmill-tiny:untrained", device="cpu", size=GridSize(image_size=(60, 64)))(1)


@pytest.mark.parametrize("factor", [1e9, float("nan")])
def test_features_beyond_half_precision_are_an_error(factor: float, make_snapshot: Callable[..., Snapshot]) -> None:
    tower = GridTower(untrained("clipmill-tiny").model)
    with torch.no_grad():
        tower.visual.ln_post.weight[3] *= factor
    with pytest.raises(DataError, match="half precision"):
        embedded(make_snapshot((2,)), make=lambda threads: GridEmbedder(tower, (64, 96)))
