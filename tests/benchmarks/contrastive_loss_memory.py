"""Value and gradient of the contrastive losses in tiles, against the plain formulas and open_clip's losses.

``pair`` is AudioCLIP's loss of two modalities, which some rows lack.

    python tests/benchmarks/contrastive_loss_memory.py                    # 4,096 pairs of 512 numbers on one CPU thread
    python tests/benchmarks/contrastive_loss_memory.py --pairs 131072 --device cuda --rounds 5

Every measurement is a process of its own, in turns. Time is processor time (on a GPU, the wall time of a synchronised
call); memory is what the peak of the resident set (on a GPU, of what is allocated) rises by over imports and features.
One JSON line for each loss, peer and unit; ``ratio`` is the peer's figure over ours, null where the peer ran out of the
GPU's memory (at 131,072 pairs a matrix of logits has 69 GB, and peers hold several). Asked at 8,192 pairs: an eighth of
open_clip's memory and at most 1.1 times its time.
"""

import argparse
import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.nn import functional

from pipeline.models.audioclip.loss import pair_loss, tiled_pair_loss
from pipeline.models.losses import contrastive_loss, tiled_contrastive_loss, tiled_sigmoid_loss

WIDTH = 512


def plain_sigmoid_loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The loss as its paper's pseudocode writes it."""
    signs = 2 * torch.eye(len(images), device=images.device) - 1
    return -functional.logsigmoid(signs * (scale * images @ texts.T + bias)).sum() / len(images)


def masked(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss of AudioCLIP's pairs, where three quarters of the rows have both modalities."""
    return lambda one, other, scale: loss(
        one, other, (torch.arange(len(one), device=one.device) % 4 > 0).float(), scale
    )


def of_present_rows(one: Tensor, other: Tensor, scale: Tensor) -> Tensor:
    """The same by open_clip's loss of the rows that have both; it is the mean of both directions."""
    present = torch.arange(len(one), device=one.device) % 4 > 0
    return 2 * ClipLoss()(one[present], other[present], scale)


LOSSES: dict[str, dict[str, Callable[..., Tensor]]] = {
    "softmax": {"tiled": tiled_contrastive_loss, "plain": contrastive_loss, "open_clip": ClipLoss()},
    "sigmoid": {"tiled": tiled_sigmoid_loss, "plain": plain_sigmoid_loss, "open_clip": SigLipLoss()},
    "pair": {"tiled": masked(tiled_pair_loss), "plain": masked(pair_loss), "open_clip": of_present_rows},
}


def inputs(kind: str, pairs: int, device: str) -> list[Tensor]:
    """Features near their pairs, scale and bias."""
    generator = torch.Generator().manual_seed(0)
    images = functional.normalize(torch.randn(pairs, WIDTH, generator=generator), dim=1)
    texts = functional.normalize(images + 0.1 * torch.randn(pairs, WIDTH, generator=generator), dim=1)
    scalars = [torch.tensor(20.0), torch.tensor(-10.0)] if kind == "sigmoid" else [torch.tensor(20.0)]
    return [tensor.to(device).requires_grad_() for tensor in (images, texts, *scalars)]


def measure(kind: str, which: str, pairs: int, device: str) -> dict[str, float]:
    """One call in this process, after a small one."""
    return measure_loss(kind, LOSSES[kind][which], pairs, device)


def measure_loss(kind: str, loss: Callable[..., Tensor], pairs: int, device: str) -> dict[str, float]:
    """One call of ``loss`` in this process, after a small one."""
    loss(*inputs(kind, 64, device)).backward()
    tensors = inputs(kind, pairs, device)
    clock = time.perf_counter if device == "cuda" else time.process_time
    before, began = peak(device, first=True), clock()
    value = loss(*tensors)
    value.backward()
    after, ended = peak(device), clock()
    slope = tensors[2].grad
    assert slope is not None
    return {"seconds": ended - began, "memory": after - before, "loss": value.item(), "to_scale": slope.item()}


def peak(device: str, first: bool = False) -> float:
    """Peak memory in MB since the ``first`` call, which gives what is held then; waits for the GPU."""
    if device != "cuda":
        if first:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed is not there to be used again
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew, see proc(5)
        peak_line = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert peak_line
        return int(peak_line[1]) / 1024
    torch.cuda.synchronize()
    if first:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / 2**20


def compare(kind: str, pairs: int, device: str, rounds: int) -> None:
    """Rounds of all three in turns; prints a line for each peer and unit."""
    results: dict[str, list[dict[str, float]]] = {which: [] for which in LOSSES[kind]}
    for number in range(rounds):
        for which, found in results.items():
            if number and not found:
                continue  # it ran out of memory
            command = [sys.executable, __file__, "--pairs", str(pairs), "--device", device, "--measure", kind, which]
            found += json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    exact = (results["plain"] or results["tiled"])[0]
    for found in filter(None, results.values()):
        assert abs(found[0]["loss"] / exact["loss"] - 1) < 1e-3 and abs(found[0]["to_scale"] - exact["to_scale"]) < 1e-4
    where = torch.cuda.get_device_name() if device == "cuda" else "one CPU thread"
    conditions = f"float32, width {WIDTH}, value and gradient, {where}, median of {rounds} rounds"
    for peer in ("plain", "open_clip"):
        for name, unit in (("memory", "MB at peak"), ("seconds", "s")):
            ours = statistics.median(one[name] for one in results["tiled"])
            theirs = statistics.median(one[name] for one in results[peer]) if results[peer] else None
            line = {
                "name": f"contrastive_loss/{kind}/{peer}/{name}",
                "ours": round(ours, 4),
                "peer": None if theirs is None else round(theirs, 4),
                "ratio": None if theirs is None else round(theirs / ours, 2),
                "unit": unit,
                "n": pairs,
                "conditions": conditions,
            }
            print(json.dumps(line), flush=True)


def main() -> None:
    """All of them, or one measurement for a parent process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4096)
    parser.add_argument("--losses", nargs="+", choices=sorted(LOSSES), default=list(LOSSES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--measure", nargs=2, metavar=("LOSS", "WHICH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        try:
            print(json.dumps([measure(*options.measure, options.pairs, options.device)]))
        except torch.OutOfMemoryError:
            print("[]")
        return
    for kind in options.losses:
        compare(kind, options.pairs, options.device, options.rounds)


if __name__ == "__main__":
    main()
