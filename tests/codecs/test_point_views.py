"""Depth views against a loop over points in plain Python, hand-made clouds, and the published cameras."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.codecs.point_views import (
    FEW_SHOT,
    ZERO_SHOT,
    PointViews,
    brightness,
    centred,
    depth_image,
    project,
    view_images,
)

ONE = PointViews(angles=((0, 0, 2),), distance=1.6, grid=128)
"""A single camera: rows are -y, columns are x."""


def rotation(x: float, y: float, z: float) -> np.ndarray:
    """Rx Ry Rz."""
    c, s = np.cos, np.sin
    return (
        np.array([[1, 0, 0], [0, c(x), -s(x)], [0, s(x), c(x)]])
        @ np.array([[c(y), 0, s(y)], [0, 1, 0], [-s(y), 0, c(y)]])
        @ np.array([[c(z), -s(z), 0], [s(z), c(z), 0], [0, 0, 1]])
    )


QUARTER = math.pi / 2
PUBLISHED = {
    "zero_shot": [
        *((turn * QUARTER, 0, QUARTER) for turn in range(4)),
        *((0, -QUARTER, QUARTER), (0, QUARTER, QUARTER)),
    ],
    "few_shot": [
        *((turn * QUARTER, 0, QUARTER) for turn in range(4)),
        *((turn * QUARTER / 2, side * QUARTER / 2, QUARTER) for turn in (5, 7) for side in (-1, 1)),
        *((0, -QUARTER, QUARTER), (0, QUARTER, QUARTER)),
    ],
}
"""The angles of the authors' code, in radians."""


def by_loops(points: np.ndarray, angles: list[tuple[float, float, float]], distance: float, grid: int) -> np.ndarray:
    """One point after the other, for each view. The authors' code shifts both coordinates by half a pixel."""
    found = np.zeros((len(angles), grid, grid))
    for view, angle in enumerate(angles):
        total, number = np.zeros((grid, grid)), np.zeros((grid, grid))
        for point in points.astype(np.float64):
            a, b, z = rotation(*angle) @ point + [0, 0, distance]
            if z <= 0:
                continue
            row, column = (math.ceil((side / z + 1) * grid / 2 - 0.5) for side in (a, b))
            if 0 <= row < grid and 0 <= column < grid:
                total[row, column] += 1 / z
                number[row, column] += 1
        found[view] = np.divide(number, total, out=np.zeros_like(total), where=number > 0)
    return found


@pytest.mark.parametrize(("name", "views"), [("zero_shot", ZERO_SHOT), ("few_shot", FEW_SHOT)])
def test_views_equal_a_loop_over_points(name: str, views: PointViews) -> None:
    random = np.random.default_rng(1)
    clouds = np.stack([random.normal(0, 0.35, (200, 3)), random.uniform(-0.9, 0.9, (200, 3))]).astype(np.float32)
    depth = project(torch.from_numpy(clouds), views)
    assert depth.shape == (2, views.count, views.grid, views.grid)
    wanted = np.stack([by_loops(cloud, PUBLISHED[name], views.distance, views.grid) for cloud in clouds])
    # A point on the edge of two pixels may fall on either, by the rounding of float32.
    same = np.isclose(depth.numpy(), wanted, atol=1e-5)
    assert (~same).sum() <= 4
    assert ((depth.numpy() > 0) == (wanted > 0)).mean() > 0.99999


def test_a_point_on_the_axis_falls_on_the_middle_pixel_of_every_view() -> None:
    for views in (ZERO_SHOT, FEW_SHOT):
        depth = project(torch.zeros(1, 1, 3), views)[0]
        middle = views.grid // 2
        assert depth[:, middle, middle].tolist() == pytest.approx([views.distance] * views.count)
        assert int((depth > 0).sum()) == views.count


@pytest.mark.parametrize(("at", "pixel"), [(64.4, 64), (64.5, 64), (64.6, 65), (-0.4, 0), (-0.6, None), (127.6, None)])
def test_a_point_falls_on_the_nearest_pixel(at: float, pixel: int | None) -> None:
    """In the plane through the origin, 1.6 from the camera, a column is (x / 1.6 + 1) 64."""
    (found,) = project(torch.tensor([[[1.6 * (at / 64 - 1), 0.0, 0.0]]]), ONE)[0]
    assert found.nonzero().tolist() == ([] if pixel is None else [[64, pixel]])


def test_points_on_one_pixel_give_their_harmonic_mean() -> None:
    cloud = torch.tensor([[[0.0, 0.0, -0.6], [0.0, 0.0, 0.4]]])
    depth = project(cloud, ONE)[0, 0, 64, 64]
    assert float(depth) == pytest.approx(2 / (1 / 1.0 + 1 / 2.0))
    assert float(depth) < (1.0 + 2.0) / 2


def test_up_is_up_and_views_turn_about_the_vertical() -> None:
    above = project(torch.tensor([[[0.0, 0.8, 0.0]]]), ZERO_SHOT)[0]
    rows = [int(view.nonzero()[0, 0]) for view in above[:4]]
    assert len(set(rows)) == 1 and rows[0] == math.ceil((1 - 0.8 / 1.6) * 64)
    # The ends of the vertical: from one of them the point is near, from the other far.
    assert sorted(float(view.max()) for view in above[4:]) == pytest.approx([0.8, 2.4])
    right = project(torch.tensor([[[0.5, 0.0, 0.0]]]), ONE)[0, 0]
    assert right.nonzero().tolist() == [[64, math.ceil((0.5 / 1.6 + 1) * 64)]]


def test_points_behind_the_camera_and_beside_the_image_are_not_seen() -> None:
    cloud = torch.tensor([[[0.0, 0.0, -2.0], [0.0, 0.0, -1.6], [5.0, 0.0, 0.0], [0.0, -5.0, 0.0]]])
    assert not project(cloud, ONE).any()
    assert project(torch.cat([cloud, torch.zeros(1, 1, 3)], 1), ONE).count_nonzero() == 1


def test_padding_and_other_clouds_of_the_batch_change_nothing() -> None:
    random = torch.Generator().manual_seed(0)
    first, second = (torch.randn(count, 3, generator=random) / 3 for count in (50, 80))
    padded = torch.stack([torch.cat([first, torch.zeros(30, 3)]), second])
    mask = torch.arange(80) < torch.tensor([[50], [80]])
    both = project(padded, FEW_SHOT, mask)
    torch.testing.assert_close(both[0], project(first[None], FEW_SHOT)[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(both[1], project(second[None], FEW_SHOT)[0], rtol=0, atol=1e-6)


def test_images_are_interpolated_with_their_corners_kept() -> None:
    depth = torch.rand(2, 3, 128, 128)
    images = view_images(depth, (224, 224))
    assert images.shape == (2, 3, 3, 224, 224)
    assert torch.equal(images[:, :, 0], images[:, :, 2])
    torch.testing.assert_close(images[..., 0, 0, 0], depth[..., 0, 0])
    torch.testing.assert_close(images[..., 1, -1, -1], depth[..., -1, -1])
    # Column 1 of 224 is at 127 / 223 of the way to column 1 of 128.
    part = 127 / 223
    torch.testing.assert_close(images[..., 0, 0, 1], (1 - part) * depth[..., 0, 0] + part * depth[..., 0, 1])
    assert torch.equal(view_images(depth, (128, 128))[:, :, 1], depth)


def test_centred_clouds_have_no_units() -> None:
    random = torch.Generator().manual_seed(3)
    cloud = torch.randn(1, 500, 3, generator=random)
    plain = centred(cloud)
    assert float(plain.norm(dim=2).max()) == pytest.approx(1, abs=1e-6)
    assert float(plain.mean(dim=1).abs().max()) < 1e-6
    millimetres = centred(cloud * 1_000 + 500)
    torch.testing.assert_close(millimetres, plain, rtol=0, atol=1e-4)
    mask = torch.arange(700)[None] < 500
    padded = centred(torch.cat([cloud, torch.full((1, 200, 3), 9.0)], 1), mask)
    torch.testing.assert_close(padded[:, :500], plain)
    assert not padded[:, 500:].any()
    assert not centred(torch.full((1, 4, 3), 7.0)).any()


def test_images_are_bright_where_points_are_near() -> None:
    depth = torch.tensor([0.0, 0.6, 1.6, 2.6])
    torch.testing.assert_close(brightness(depth, ZERO_SHOT), torch.tensor([0.0, 1.0, 0.6, 0.2]))
    image = depth_image(torch.randn(64, 3), size=32)
    assert image.shape == (3, 32, 6 * 32) and image.dtype == torch.uint8 and 50 < int(image.max()) <= 255


def test_autocast_changes_no_view() -> None:
    cloud = centred(torch.randn(2, 300, 3, generator=torch.Generator().manual_seed(5)))
    mask = torch.arange(300) < torch.tensor([[300], [200]])
    plain = view_images(project(cloud, ZERO_SHOT, mask), (160, 160))
    with torch.autocast("cpu", torch.bfloat16):
        within = view_images(project(cloud, ZERO_SHOT, mask), (160, 160))
    assert within.dtype == torch.float32 and torch.equal(within, plain)


def test_gradients_reach_the_points() -> None:
    cloud = torch.tensor([[[0.1, 0.2, 0.3]]], requires_grad=True)
    project(cloud, replace(ONE, grid=16)).sum().backward()
    assert cloud.grad is not None and cloud.grad[0, 0, 2] == pytest.approx(1, abs=1e-5)
