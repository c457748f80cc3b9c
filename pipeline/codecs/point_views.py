"""Depth views of point clouds, as in PointCLIP: many clouds and views at once, on any device.

Zhang, Guo, Zhang, Li, Miao, Cui, Qiao, Gao, Li, 2021, "PointCLIP: Point Cloud Understanding by CLIP", arXiv 2112.02413,
section 3.1. A camera looks at the cloud from several sides; y is up. For a view with the rotation R, the distance d and
S pixels, a point p has (a, b, z) = R p + (0, 0, d), and falls on

    row = ceil((a / z + 1) S / 2 - 1 / 2),    column = ceil((b / z + 1) S / 2 - 1 / 2)

that is the nearest pixel, if both are within 0 to S - 1 and z is positive. The half is in the authors' code, not in the
paper. A pixel is the mean of its points' depths z with the weights 1 / z, that is n / sum(1 / z), which the nearest
points dominate; a pixel without points is 0. So values are depths in the units of the points: black is empty, and
nearer is darker.

``ZERO_SHOT`` are the six views of the zero-shot model, ``FEW_SHOT`` the ten of the few-shot model. Points are expected
within the unit ball around the origin, see :func:`centred`.
"""

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

SMALLEST_DEPTH = 1e-6


@dataclass(frozen=True, kw_only=True)
class PointViews:
    """Cameras around a cloud. ``angles`` are Euler angles x, y, z of each view, in eighths of a turn.

    The rotation of a view is Rx Ry Rz. Rz turns the vertical into the rows of the image, Rx then turns the cloud about
    the vertical, and Ry inclines it.
    """

    angles: tuple[tuple[int, int, int], ...]
    distance: float
    """From the camera to the origin."""
    grid: int
    """Rows and columns onto which points are projected."""

    @property
    def count(self) -> int:
        """Number of views V."""
        return len(self.angles)

    def rotations(self) -> Tensor:
        """float64 [V, 3, 3]."""
        return torch.stack([_rotation(*angle) for angle in self.angles])


_SIDES = ((0, 0, 2), (2, 0, 2), (4, 0, 2), (6, 0, 2))
_TOP_AND_BOTTOM = ((0, -2, 2), (0, 2, 2))
_DIAGONALS = ((5, -1, 2), (5, 1, 2), (7, -1, 2), (7, 1, 2))
ZERO_SHOT = PointViews(angles=(*_SIDES, *_TOP_AND_BOTTOM), distance=1.6, grid=128)
"""Four sides, and the two ends of the vertical, at 128 pixels."""
FEW_SHOT = PointViews(angles=(*_SIDES, *_DIAGONALS, *_TOP_AND_BOTTOM), distance=1.4, grid=224)
"""Four sides, four diagonals, and the two ends of the vertical, at 224 pixels."""


def project(points: Tensor, views: PointViews, mask: Tensor | None = None) -> Tensor:
    """Depth views, float32 [B, V, S, S]. They are computed in float32 also within autocast.

    Args:
        points: float [B, N, 3], y up, within the unit ball.
        views: the cameras.
        mask: bool [B, N], False for padding; ``None`` without padding.
    """
    with torch.autocast(points.device.type, enabled=False):
        return _project(points, views, mask)


def _project(points: Tensor, views: PointViews, mask: Tensor | None) -> Tensor:
    size, count = views.grid, views.count
    # Products of tensors, not a matrix product: a GPU may compute that with the 10 bits of TF32.
    by_axis = _by_axis(views.angles).to(points.device)
    x, y, z = points.float().permute(2, 0, 1).contiguous()
    turned = torch.addcmul(torch.addcmul(by_axis[0] * x, by_axis[1], y), by_axis[2], z)  # [3, V, B, N]
    depth = turned[2] + views.distance
    near = depth.clamp(min=SMALLEST_DEPTH).reciprocal()
    with torch.no_grad():
        middle = turned.new_tensor((size - 1) / 2)
        places = torch.addcmul(middle, turned[:2], near, value=size / 2).ceil_()
        clamped = places.clamp(0, size - 1)
        (rows, columns), inside = clamped, clamped == places
        seen = (depth > SMALLEST_DEPTH).logical_and_(inside[0]).logical_and_(inside[1])
        if mask is not None:
            seen &= mask
        # Points that are not seen fall on one more pixel, behind the last.
        last = len(points) * count * size**2
        starts = torch.arange(0, last, size**2, device=points.device).view(-1, count).T[..., None]
        pixels = torch.where(seen, torch.add(columns, rows, alpha=size).long().add_(starts), last).flatten()
    # There are far more pixels than points, so nothing but the zeros is computed for each pixel: first the sum of the
    # weights, read back at each point; then each of the n points adds 1 / sum.
    images, weights = torch.zeros(last + 1, device=points.device), near.flatten()
    sums = _sums(images.clone() if near.requires_grad else images, pixels, weights)
    images.scatter_add_(0, pixels, sums.reciprocal())
    return images[:last].view(-1, count, size, size)


def _sums(images: Tensor, pixels: Tensor, weights: Tensor) -> Tensor:
    """The sum of the weights on the pixel of each point; ``images`` are zeros, and are left so without gradients."""
    sums = images.scatter_add_(0, pixels, weights).index_select(0, pixels)
    if not weights.requires_grad:
        images.scatter_(0, pixels, weights.new_zeros(()).expand_as(weights))
    return sums


def view_images(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Depth views [..., S, S] as images with three equal channels, float32 [..., 3, H, W], still in units of depth.

    Another size is interpolated bilinearly with the corners kept, as in the authors' code.
    """
    images = depth.flatten(0, -3)[:, None]
    if images.shape[-2:] != size:
        images = functional.interpolate(images, size, mode="bilinear", align_corners=True)
    return images.expand(-1, 3, -1, -1).reshape(*depth.shape[:-2], 3, *size)


def centred(points: Tensor, mask: Tensor | None = None) -> Tensor:
    """The clouds moved to their means and scaled into the unit ball, so that units do not matter: float32 [B, N, 3].

    Sums are in float64. Padding becomes 0; the points of a cloud without an extent become 0, too.
    """
    wide = points.double()
    kept = torch.ones_like(wide[..., :1]) if mask is None else mask[..., None].double()
    mean = (wide * kept).sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True).clamp(min=1)
    moved = (wide - mean) * kept
    longest = moved.norm(dim=2).amax(dim=1)[:, None, None]
    return torch.where(longest > 0, moved / longest.where(longest > 0, 1.0), 0.0).float()


def brightness(depth: Tensor, views: PointViews) -> Tensor:
    """Depths as grey values from 0 to 1: 1 at the near side of the unit ball, 0.2 at its far side, 0 without points."""
    least = views.distance - 1
    return torch.where(depth > 0, 1 - 0.4 * (depth - least), 0.0).clamp(0, 1)


def depth_image(points: Tensor, views: PointViews = ZERO_SHOT, size: int = 128) -> Tensor:
    """The views of one cloud, float [N, 3], side by side: uint8 [3, size, V * size], bright where points are near."""
    (depth,) = project(centred(points[None]), replace(views, grid=size))
    grey = torch.cat(list(brightness(depth, views)), dim=1)
    return (255 * grey).round().to(torch.uint8).expand(3, -1, -1)


@cache
def _by_axis(angles: tuple[tuple[int, int, int], ...]) -> Tensor:
    """The rotations of all views by the axis of the points, then of the camera: float32 [3, 3, V, 1, 1]."""
    return torch.stack([_rotation(*angle) for angle in angles]).permute(2, 1, 0)[..., None, None].float().contiguous()


@cache
def _rotation(x: int, y: int, z: int) -> Tensor:
    """Rx Ry Rz of angles in eighths of a turn, float64 [3, 3]."""
    (cx, sx), (cy, sy), (cz, sz) = ((_cosine(angle), _cosine(angle - 2)) for angle in (x, y, z))
    about_x = torch.tensor([[1.0, 0.0, 0.0], [0.0, cx, -sx], [0.0, sx, cx]], dtype=torch.float64)
    about_y = torch.tensor([[cy, 0.0, sy], [0.0, 1.0, 0.0], [-sy, 0.0, cy]], dtype=torch.float64)
    about_z = torch.tensor([[cz, -sz, 0.0], [sz, cz, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    return about_x @ about_y @ about_z


def _cosine(eighths: int) -> float:
    """The cosine of an angle in eighths of a turn; exact at quarters, so that no point leaves its pixel by rounding."""
    return {0: 1.0, 2: 0.0, 4: -1.0, 6: 0.0}.get(eighths % 8, math.cos(math.pi * eighths / 4))
