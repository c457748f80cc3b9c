"""Depth views of batches of clouds against one cloud after the other.

    python tests/benchmarks/point_views.py [--clouds 1000] [--points 1024] [--views few_shot] [--rounds 5] [--threads 1]

The loop makes all views of a cloud at once, with two scatters and a division for each pixel, as the authors' code does
when it is called for single clouds. Views are compared first. Times are CPU seconds of all threads, since other work
may run on the machine; both sides take turns, and each round has its ratio.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from pipeline.codecs.point_views import FEW_SHOT, ZERO_SHOT, PointViews, project
from pipeline.evaluation.point_clip import CLOUDS_AT_ONCE


def views_of_one(cloud: Tensor, rotations: Tensor, views: PointViews) -> Tensor:
    """All views of a cloud, float [N, 3]: float32 [V, S, S]. ``rotations`` are float [V, 3, 3]."""
    size, small = views.grid, 1e-12
    moved = cloud.repeat(views.count, 1, 1) @ rotations.transpose(1, 2) + torch.tensor([0.0, 0.0, views.distance])
    a, b, depth = moved.unbind(dim=2)
    rows = ((a / (depth + small) + 1) * size / 2 - 0.5).ceil()
    columns = ((b / (depth + small) + 1) * size / 2 - 0.5).ceil()
    seen = (rows >= 0) & (rows <= size - 1) & (columns >= 0) & (columns <= size - 1) & (depth >= 0)
    weight = seen.float() / (depth + small)
    pixels = ((rows % size) * size + columns % size).long()
    weights = torch.zeros(views.count, size * size).scatter_add(1, pixels, weight)
    depths = torch.zeros(views.count, size * size).scatter_add(1, pixels, depth * weight)
    weights += (weights == 0).float()
    return (depths / weights).view(views.count, size, size)


def cpu_seconds(work: Callable[[], None]) -> float:
    """CPU seconds of this process, over all its threads."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    """Print the times and ratios of all rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clouds", type=int, default=1000)
    parser.add_argument("--points", type=int, default=1024)
    parser.add_argument("--views", choices=("zero_shot", "few_shot"), default="few_shot")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=CLOUDS_AT_ONCE["cpu"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    views = {"zero_shot": ZERO_SHOT, "few_shot": FEW_SHOT}[options.views]
    rotations = views.rotations().float()
    points = torch.nn.functional.normalize(torch.randn(options.clouds, options.points, 3), dim=2)

    def loop() -> None:
        for cloud in points:
            views_of_one(cloud, rotations, views)

    def batches() -> None:
        for part in points.split(options.at_once):
            project(part, views)

    few = points[:4]
    one, other = torch.stack([views_of_one(cloud, rotations, views) for cloud in few]), project(few, views)
    assert ((one - other).abs() > 1e-4).float().mean() < 1e-4, "both sides compute the same views"
    ratios = []
    for number in range(options.rounds):
        slow, fast = cpu_seconds(loop), cpu_seconds(batches)
        ratios.append(slow / fast)
        print(f"round {number}: loop {slow:.2f} CPU s, batches {fast:.2f} CPU s, {ratios[-1]:.2f} times as fast")
    print(
        f"median {median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}; {options.at_once} clouds at a time"
    )


if __name__ == "__main__":
    main()
