"""The reader of point clouds: padding, subsets, axes, and samples that cannot be read."""

import numpy as np
import pytest
import torch

from pipeline.errors import SettingError
from pipeline.loaders.points import PointReader, PointTransform
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.clouds import write_npy
from pipeline.shards.sample import Sample

RANDOM = np.random.default_rng(0)
CLOUD = RANDOM.normal(0, 1, (100, 3)).astype(np.float32)


def sample(points: np.ndarray, field: str = "points.npy") -> Sample:
    return Sample("7", {field: write_npy(points)})


def test_clouds_of_a_batch_are_padded_and_masked() -> None:
    reader = PointReader()
    rows = [reader.read(sample(CLOUD)), reader.read(sample(CLOUD[:40]))]
    batch = reader.collate(rows)
    assert batch["points"].shape == (2, 100, 3) and batch["points"].dtype == torch.float32
    assert batch["points_mask"].sum(dim=1).tolist() == [100, 40]
    assert not batch["points"][1, 40:].any()
    for row in rows:
        assert float(row["points"].norm(dim=1).max()) == pytest.approx(1, abs=1e-6)


def test_units_do_not_matter_but_with_scale_none() -> None:
    plain, large = (PointReader().read(sample(factor * CLOUD))["points"] for factor in (1, 1_000))
    torch.testing.assert_close(plain, large, rtol=0, atol=1e-5)
    raw = PointReader(transform=PointTransform(scale="none")).read(sample(1_000 * CLOUD))["points"]
    np.testing.assert_array_equal(raw.numpy(), 1_000 * CLOUD)


def test_subsets_are_a_function_of_the_position_in_training_and_fixed_in_evaluation() -> None:
    reader = PointReader(transform=PointTransform(count=30, scale="none"))

    def read(*at: int) -> set[tuple[float, ...]]:
        found = reader.read(sample(CLOUD), at or None)["points"]  # type: ignore[arg-type]
        assert found.shape == (30, 3)
        return {tuple(row) for row in found.tolist()}

    assert read() == read() and read(0, 5) == read(0, 5)
    assert len({frozenset(one) for one in (read(), read(0, 5), read(1, 5), read(0, 6))}) == 4
    assert read(3, 1) <= {tuple(row) for row in CLOUD.tolist()}
    other = PointReader(transform=PointTransform(count=30, scale="none"), seed=1)
    assert {tuple(row) for row in other.read(sample(CLOUD), (0, 5))["points"].tolist()} != read(0, 5)


def strip(faces: int) -> bytes:
    """A mesh: a strip of squares from x = 0 to ``faces``, each a face."""
    rows = [f"{x} {y} 0" for x in range(faces + 1) for y in (0, 1)]
    sides = [f"4 {2 * x} {2 * x + 1} {2 * x + 3} {2 * x + 2}" for x in range(faces)]
    return "\n".join(["OFF", f"{len(rows)} {len(sides)} 0", *rows, *sides, ""]).encode()


@pytest.mark.parametrize("at", [None, (0, 5)])
def test_the_subset_of_a_mesh_covers_all_of_it(at: tuple[int, int] | None) -> None:
    """Eight parts of a strip are equally large, so each has an eighth of the points."""
    reader = PointReader(transform=PointTransform(count=512, scale="none"))
    points = reader.read(Sample("7", {"off": strip(64)}), at)["points"]  # type: ignore[arg-type]
    assert points.shape == (512, 3)
    parts, _ = np.histogram(points[:, 0].numpy(), bins=8, range=(0, 64))
    assert parts.min() > 35 and parts.max() < 100, parts  # 64 each, with a deviation of 7.5


def test_a_subset_without_an_extent_is_unreadable() -> None:
    cloud = np.zeros((1_000, 3), np.float32)
    cloud[500] = 1
    assert len(PointReader().read(sample(cloud))["points"]) == 1_000
    with pytest.raises(UnreadableSample, match="all points in one place"):
        PointReader(transform=PointTransform(count=2)).read(sample(cloud))


def test_z_up_becomes_y_up_by_a_rotation() -> None:
    reader = PointReader(transform=PointTransform(up="z", scale="none"))
    turned = reader.read(sample(np.eye(3, dtype=np.float32)))["points"]
    assert turned.T.tolist() == [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
    assert float(torch.linalg.det(turned)) == 1  # no mirror image


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        (CLOUD[:0], "no points"),
        (CLOUD[:1], "one point, or all points in one place"),
        (np.full((9, 3), 2.5, np.float32), "one point, or all points in one place"),
        (np.array([[0, 0, np.nan], [1, 1, 1]], np.float32), "not finite"),
    ],
)
def test_bad_clouds_are_unreadable_samples(points: np.ndarray, reason: str) -> None:
    with pytest.raises(UnreadableSample, match=reason):
        PointReader().read(sample(points))


def test_other_arrays_are_no_clouds() -> None:
    """A member .npy holds features of other kinds; clouds are .points.npy."""
    with pytest.raises(UnreadableSample, match="7 has no point cloud"):
        PointReader().read(sample(CLOUD, "npy"))


def test_settings() -> None:
    for count in (-1, 1):
        with pytest.raises(SettingError, match=f"count: got {count}"):
            PointTransform(count=count)
