"""Value and gradient of painted strokes, against a dense computation of strokes x pixels.

    python tests/benchmarks/strokes.py                                  # 256 strokes at 224 px, one CPU thread
    python tests/benchmarks/strokes.py --device cuda --images 8 --rounds 5
    python tests/benchmarks/strokes.py --segments 3 --width 5           # as CLIPDraw has them

The dense computation has the distance of every pixel from every stroke, by a loop over chords without gradients, and
paints all strokes over all pixels. Every measurement is a process of its own, in turns. Time is processor time (on a
GPU, the wall time of a synchronised call); memory is what the peak of the resident set (on a GPU, of what is
allocated) rises by. One JSON line for each unit; ``ratio`` is the dense figure over ours. Asked: 8 times as fast, an
eighth of the memory, equal images and gradients.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from contrastive_loss_memory import peak
from torch import Tensor

from pipeline.generation.curves import Strokes, chords_of
from pipeline.generation.strokes import SOFTNESS, render


def scene(images: int, strokes: int, segments: int, width: float, side: int) -> Strokes:
    """Random curves as CLIPDraw starts, a little longer: each point up to a tenth of the side from the one before."""
    start = torch.rand(images, strokes, 1, 2)
    steps = (torch.rand(images, strokes, 3 * segments, 2) - 0.5) * 0.2
    points = torch.cat([start, start + steps.cumsum(2)], dim=2) * side
    widths, colours = torch.full((images, strokes), width), torch.rand(images, strokes, 4)
    return Strokes(points=points, widths=widths, colours=colours)


def dense(strokes: Strokes, height: int, width: int) -> Tensor:
    """Images [B, 3, H, W] over white, from all pixels and all strokes; lines only."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = (torch.stack([x, y], dim=2).flatten(0, 1) + 0.5).to(strokes.points)
    return torch.stack([_dense(strokes, image, pixels).view(height, width, 3) for image in range(len(strokes.points))])


def _dense(strokes: Strokes, image: int, pixels: Tensor) -> Tensor:
    one = Strokes(
        points=strokes.points[image, None],
        widths=strokes.widths[image, None],
        colours=strokes.colours[image, None],
        segments=None if strokes.segments is None else strokes.segments[image, None],
    )
    every = torch.ones_like(one.widths, dtype=torch.bool)
    chords = chords_of(one, every, longest=one.widths.detach().clamp(min=0) + 2 * SOFTNESS + 8)
    counts = torch.bincount(chords.owner)
    rank = torch.arange(len(chords.owner), device=pixels.device) - (counts.cumsum(0) - counts)[chords.owner]
    best = pixels.new_full((len(counts), len(pixels)), torch.inf)
    nearest = torch.zeros(best.shape, dtype=torch.long, device=pixels.device)
    with torch.no_grad():
        for number in range(int(counts.max())):
            some = (rank == number).nonzero()[:, 0]
            owner = chords.owner[some]
            distance = _distance(chords.start[some, None], chords.end[some, None], pixels)
            closer = distance < best[owner]
            nearest[owner] = torch.where(closer, some[:, None], nearest[owner])
            best[owner] = torch.minimum(distance, best[owner])
    distance = _distance(chords.start[nearest], chords.end[nearest], pixels)
    half = one.widths[0, :, None] / 2
    high, low = (((edge / SOFTNESS + 1) / 2).clamp(0, 1) for edge in (half - distance, -half - distance))
    alpha = (high**2 * (3 - 2 * high) - low**2 * (3 - 2 * low)) * one.colours[0, :, 3:]
    canvas = torch.ones(len(pixels), 3).to(pixels)
    for part, colour in zip(alpha, one.colours[0, :, :3], strict=True):
        canvas = canvas + part[:, None] * (colour - canvas)
    return canvas


def _distance(start: Tensor, end: Tensor, pixels: Tensor) -> Tensor:
    along, offset = end - start, pixels - start
    part = ((offset * along).sum(-1) / along.square().sum(-1).clamp(min=1e-12)).clamp(0, 1)
    return ((offset - part[..., None] * along).square().sum(-1) + 1e-12).sqrt()


PAINTERS = {"sparse": render, "dense": lambda strokes, *size: dense(strokes, *size).permute(0, 3, 1, 2)}


def measure(which: str, options: argparse.Namespace) -> dict[str, float]:
    """One call in this process, after a small one."""
    torch.manual_seed(0)
    weights = torch.rand(options.images, 3, options.side, options.side, device=options.device)
    for count in (2, options.strokes):
        made = scene(options.images, count, options.segments, options.width, options.side)
        leaves = [one.to(options.device).requires_grad_() for one in (made.points, made.widths, made.colours)]
        strokes = Strokes(points=leaves[0], widths=leaves[1], colours=leaves[2])
        clock = time.perf_counter if options.device == "cuda" else time.process_time
        before, began = peak(options.device, first=True), clock()
        value = (PAINTERS[which](strokes, options.side, options.side) * weights).sum()
        value.backward()
        after, ended = peak(options.device), clock()
    norms = {f"norm{n}": float(one.grad.double().norm()) for n, one in enumerate(leaves) if one.grad is not None}
    return {"seconds": ended - began, "memory": after - before, "value": value.item(), **norms}


def main() -> None:
    """Both in turns, or one measurement for a parent process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strokes", type=int, default=256)
    parser.add_argument("--segments", type=int, default=1)
    parser.add_argument("--width", type=float, default=1.5)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--measure", choices=sorted(PAINTERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        print(json.dumps(measure(options.measure, options)))
        return
    results: dict[str, list[dict[str, float]]] = {which: [] for which in PAINTERS}
    for _ in range(options.rounds):
        for which, found in results.items():
            command = [sys.executable, *sys.argv, "--measure", which]
            found.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
    ours, theirs = results["sparse"], results["dense"]
    for name in ("value", "norm0", "norm1", "norm2"):
        assert abs(ours[0][name] / theirs[0][name] - 1) < 1e-3, (name, ours[0], theirs[0])
    where = torch.cuda.get_device_name() if options.device == "cuda" else "one CPU thread"
    conditions = (
        f"{options.images} x {options.side} px, {options.segments} curves of width {options.width} a stroke, float32, "
        f"value and gradient, {where}, median of {options.rounds} rounds"
    )
    for name, unit in (("memory", "MB at peak"), ("seconds", "s")):
        mine, plain = (statistics.median(one[name] for one in found) for found in (ours, theirs))
        line = {"name": f"strokes/{name}", "ours": round(mine, 4), "peer": round(plain, 4)}
        line |= {"ratio": round(plain / mine, 2), "unit": unit, "n": options.strokes, "conditions": conditions}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
