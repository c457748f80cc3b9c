"""Cells of images: where an image is placed, which cells it has, and which of them a step reads."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import SettingError, SidecarError
from pipeline.loaders.batches import SamplePosition
from pipeline.loaders.grid import GridFeatureReader, GridImageReader, GridTransform, chosen_cells
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.sample import Sample

TRANSFORM = GridTransform(size=(64, 96), stride=16, fill=(10, 20, 30))


def encoded(height: int, width: int) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, format="png")
    return content.getvalue()


def stored(rows: int, columns: int, width: int = 5, count: int | None = None) -> Sample:
    features = np.arange(rows * columns * width, dtype=np.float16)[:count]
    row = {"rows": rows, "columns": columns, "features": features.tobytes()}
    return Sample("7", {}, {"grid": row})


@pytest.mark.parametrize(
    ("shape", "fitted", "cells"),
    [
        ((64, 96), (64, 96), (4, 6)),
        ((128, 128), (64, 64), (4, 4)),
        ((32, 96), (32, 96), (2, 6)),
        ((300, 100), (64, 21), (4, 2)),
        ((100, 1), (64, 1), (4, 1)),
        ((1, 10_000), (1, 96), (1, 6)),
    ],
)
def test_an_image_fits_at_the_top_left(shape: tuple[int, int], fitted: tuple[int, int], cells: tuple[int, int]) -> None:
    pixels = np.full((*shape, 3), 200, np.uint8)
    image, found = TRANSFORM(pixels)
    assert TRANSFORM.fitted(*shape) == fitted and found == cells and image.shape == (3, 64, 96)
    assert (image[:, : fitted[0], : fitted[1]] == 200).all()
    padding = torch.ones(64, 96, dtype=torch.bool)
    padding[: fitted[0], : fitted[1]] = False
    assert (image[:, padding].T == torch.tensor([10, 20, 30])).all()
    size = TRANSFORM.cell_size(*shape)
    assert size == (16 * shape[0] / fitted[0], 16 * shape[1] / fitted[1])


def test_the_resize_is_pillows() -> None:
    image, _ = TRANSFORM(np.array(Image.open(io.BytesIO(encoded(120, 90)))))
    wanted = Image.open(io.BytesIO(encoded(120, 90))).resize((48, 64), Image.Resampling.BICUBIC)
    assert (image[:, :, :48].permute(1, 2, 0).int() - torch.from_numpy(np.array(wanted)).int()).abs().max() <= 1


def test_cells_are_read_row_by_row() -> None:
    assert chosen_cells((2, 3), 0, 0, None).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert chosen_cells((2, 3), 4, 0, None).shape == (6, 2)  # evaluation reads all


def test_a_part_of_the_cells_differs_by_sample_and_epoch_and_is_reproducible() -> None:
    def cells(epoch: int, number: int, seed: int = 0) -> list[list[int]]:
        return chosen_cells((12, 20), 100, seed, SamplePosition(epoch, number)).tolist()

    first = cells(0, 0)
    assert len(first) == 100 and first == sorted(first) and len({tuple(one) for one in first}) == 100
    assert first == cells(0, 0)
    assert len({str(cells(*at)) for at in ((0, 0), (0, 1), (1, 0), (0, 0, 1))}) == 4
    counts = np.zeros((12, 20))
    for number in range(400):
        rows, columns = np.array(cells(0, number)).T
        counts[rows, columns] += 1
    assert 100 < counts.min() and counts.max() < 235  # of 400 x 100 / 240 = 167 each


def test_stored_features_of_several_shapes_in_a_batch() -> None:
    reader = GridFeatureReader(name="grid")
    batch = reader.collate([reader.read(stored(2, 3)), reader.read(stored(1, 2))])
    assert batch["grid"].shape == (2, 6, 5) and batch["grid"].dtype == torch.float16
    assert batch["grid"][0].flatten().tolist() == list(range(30))
    assert batch["grid"][1, :2].flatten().tolist() == list(range(10)) and not batch["grid"][1, 2:].any()
    assert batch["cell_mask"].tolist() == [[True] * 6, [True] * 2 + [False] * 4]
    assert batch["cells"][1, :2].tolist() == [[0, 0], [0, 1]]
    part = GridFeatureReader(name="grid", most=2).read(stored(2, 3), SamplePosition(0, 1))
    (rows, columns) = part["cells"].T
    assert part["grid"][:, 0].tolist() == [5 * (3 * r + c) for r, c in zip(rows, columns, strict=True)]


def test_images_of_several_shapes_in_a_batch() -> None:
    reader = GridImageReader(transform=TRANSFORM)
    rows = [reader.read(Sample("1", {"png": encoded(64, 96)})), reader.read(Sample("2", {"png": encoded(64, 30)}))]
    batch = reader.collate(rows)
    assert batch["image"].shape == (2, 3, 64, 96) and batch["cell_mask"].sum(dim=1).tolist() == [24, 8]


def test_bad_input() -> None:
    reader = GridFeatureReader(name="grid", width=4)
    with pytest.raises(UnreadableSample, match="7 has no grid"):
        reader.read(stored(0, 0))
    with pytest.raises(SidecarError, match="5 features a cell, not 4"):
        reader.read(stored(2, 3))
    broken: list[Any] = [stored(2, 3, count=29), stored(2, 3, count=0), stored(0, 4, count=0)]
    broken[2].rows["grid"]["features"] = b"\0\0"
    for sample in broken:
        with pytest.raises(SidecarError, match="sample 7 has"):
            GridFeatureReader(name="grid").read(sample)
    with pytest.raises(UnreadableSample):
        GridImageReader(transform=TRANSFORM).read(Sample("1", {"png": b"nothing"}))
    with pytest.raises(SettingError, match="grid"):
        GridFeatureReader(name="a b")
