"""Depth views of many clouds at once against one cloud and one view after the other.

    python tests/benchmarks/point_views.py [--clouds 1000] [--points 1024] [--views few_shot] [--repeats 3]

Both sides compute the same images with the same torch functions; the loop is how the authors' code would be called for
single clouds: rotate, project, scatter, for each view. Images are compared first.
"""

import argparse
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.codecs.point_views import FEW_SHOT, ZERO_SHOT, PointViews, project
from pipeline.evaluation.point_clip import CLOUDS_AT_ONCE

AT_ONCE = CLOUDS_AT_ONCE["cpu"]


def looped(points: Tensor, views: PointViews) -> Iterator[Tensor]:
    """Views of one cloud after the other: float [B, N, 3] to float32 [S, S], B times V."""
    rotations, size = views.rotations().float(), views.grid
    for cloud in points:
        for rotation in rotations:
            a, b, depth = (cloud @ rotation.T + torch.tensor([0.0, 0.0, views.distance])).unbind(dim=1)
            rows, columns = (torch.ceil((axis / depth + 1) * size / 2) for axis in (a, b))
            seen = (depth > 0) & (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
            pixels = rows[seen].long() * size + columns[seen].long()
            weights = torch.zeros(size * size).scatter_add(0, pixels, 1 / depth[seen])
            depths = torch.zeros(size * size).scatter_add(0, pixels, torch.ones_like(depth[seen]))
            yield (depths / torch.where(weights > 0, weights, 1.0)).view(size, size)


def batched(points: Tensor, views: PointViews) -> Iterator[Tensor]:
    """The same by batches of ``AT_ONCE`` clouds, float32 [``AT_ONCE``, V, S, S]."""
    for part in points.split(AT_ONCE):
        yield project(part, views)


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clouds", type=int, default=1000)
    parser.add_argument("--points", type=int, default=1024)
    parser.add_argument("--views", choices=("zero_shot", "few_shot"), default="few_shot")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    views = {"zero_shot": ZERO_SHOT, "few_shot": FEW_SHOT}[options.views]
    points = torch.nn.functional.normalize(torch.randn(options.clouds, options.points, 3), dim=2)
    few = points[:4]
    one, other = torch.stack(list(looped(few, views))), torch.cat(list(batched(few, views))).flatten(0, 1)
    different = (one - other).abs() > 1e-4
    assert different.float().mean() < 1e-4, "both sides compute the same images"
    times: dict[str, list[float]] = {"loop": [], "batches": []}
    for _ in range(options.repeats):
        for name, function in (("loop", looped), ("batches", batched)):
            began = time.perf_counter()
            for _images in function(points, views):
                pass
            times[name].append(time.perf_counter() - began)
    best = {name: min(one) for name, one in times.items()}
    for name, seconds in best.items():
        print(f"{name:8} {seconds:7.2f} s, {options.clouds * views.count / seconds:9.0f} views/s")
    print(f"{best['loop'] / best['batches']:.1f} times as fast, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
