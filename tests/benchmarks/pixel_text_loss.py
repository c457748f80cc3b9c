"""Value and gradient of LSeg's loss in strips of rows, against the plain formula with all logits.

    python tests/benchmarks/pixel_text_loss.py                       # 1,000 labels, an image of 480 px, one CPU thread
    python tests/benchmarks/pixel_text_loss.py --device cuda --images 4 --rounds 5
    python tests/benchmarks/pixel_text_loss.py --block bottleneck    # with two passes of a spatial block

Every measurement is a process of its own, in turns. Time is processor time (on a GPU, the wall time of a synchronised
call); memory is what the peak of the resident set (on a GPU, of what is allocated) rises by over imports, features and
labels. One JSON line for each unit; ``ratio`` is the plain formula's figure over ours. Asked: a quarter of its memory,
equal values and gradients.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from contrastive_loss_memory import peak
from torch import Tensor
from torch.nn import functional

from pipeline.loaders.segmentation import VOID
from pipeline.models.pixel_text import SpatialBlock, pixel_text_loss, scores_of

WIDTH = 512


def plain_loss(pixels: Tensor, vectors: Tensor, labels: Tensor, block: SpatialBlock | None) -> Tensor:
    """The formula."""
    scores = scores_of(pixels, vectors)
    if block is not None:
        scores = block(scores)
    logits = functional.interpolate(scores, labels.shape[1:], mode="bilinear", align_corners=True)
    return functional.cross_entropy(logits, labels, ignore_index=VOID, reduction="sum")


LOSSES = {"strips": pixel_text_loss, "plain": plain_loss}


def measure(which: str, options: argparse.Namespace) -> dict[str, float]:
    """One call in this process, after a small one."""
    torch.manual_seed(0)
    block = None if options.block == "none" else SpatialBlock(options.block, 2).to(options.device)
    for side in (32, options.side):
        pixels = torch.randn(options.images, WIDTH, side // 2, side // 2, device=options.device)
        pixels = functional.normalize(pixels, dim=1).requires_grad_()
        vectors = functional.normalize(torch.randn(options.labels, WIDTH, device=options.device), dim=1)
        labels = torch.randint(VOID, options.labels, (options.images, side, side), device=options.device)
        clock = time.perf_counter if options.device == "cuda" else time.process_time
        before, began = peak(options.device, first=True), clock()
        loss = LOSSES[which](pixels, vectors, labels, block)
        loss.backward()
        after, ended = peak(options.device), clock()
    assert pixels.grad is not None
    norm = pixels.grad.norm().item()
    return {"seconds": ended - began, "memory": after - before, "loss": loss.item(), "norm": norm}


def main() -> None:
    """Both in turns, or one measurement for a parent process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=1000)
    parser.add_argument("--side", type=int, default=480)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--block", choices=("none", "bottleneck", "depthwise"), default="none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--measure", choices=sorted(LOSSES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        print(json.dumps(measure(options.measure, options)))
        return
    results: dict[str, list[dict[str, float]]] = {which: [] for which in LOSSES}
    for _ in range(options.rounds):
        for which, found in results.items():
            command = [sys.executable, *sys.argv, "--measure", which]
            found.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
    ours, theirs = results["strips"], results["plain"]
    for name in ("loss", "norm"):
        assert abs(ours[0][name] / theirs[0][name] - 1) < 1e-4, (name, ours[0], theirs[0])
    where = torch.cuda.get_device_name() if options.device == "cuda" else "one CPU thread"
    conditions = (
        f"{options.images} x {options.side} px, block {options.block}, width {WIDTH}, float32, value and gradient, "
        f"{where}, median of {options.rounds} rounds"
    )
    for name, unit in (("memory", "MB at peak"), ("seconds", "s")):
        mine, plain = (statistics.median(one[name] for one in found) for found in (ours, theirs))
        line = {"name": f"pixel_text_loss/{name}", "ours": round(mine, 4), "peer": round(plain, 4)}
        line |= {"ratio": round(plain / mine, 2), "unit": unit, "n": options.labels, "conditions": conditions}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
