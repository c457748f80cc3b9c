"""A training step of CLIP4Clip from stored features of frames against one from pixels, and retrieval in tiles.

    python tests/benchmarks/clip4clip_step.py                        # ViT-B/32, 8 clips of 12 frames, meanP
    python tests/benchmarks/clip4clip_step.py --head seqTransf --rows 16
    python tests/benchmarks/clip4clip_step.py --device cuda

Both steps have the same weights and the same clips, whose stored features are those of the frozen image tower; the
loss is compared. Both towers are frozen for meanP (the scale is trained), the text tower is trained for other heads.
Forward and backward pass in one process: processor time (on a GPU, wall time), the median of rounds in turns. Retrieval
of N texts among N clips in both directions is a process of its own for each N: seconds, and what the peak of memory
rises by, beside the N x N matrix. One JSON line each. Asked: 20 times as fast for meanP; flat memory.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from contrastive_loss_memory import peak
from torch import Tensor

from pipeline.evaluation.retrieval import Ranking, retrieval_metrics
from pipeline.models.clip4clip import Clip4Clip, Config

FRAMES, WIDTH = 12, 512
SIZES = (5_000, 10_000, 20_000)
CAPTION = "a man is talking about a car that is parked in front of a large house"


def method_of(head: str, architecture: str, device: str) -> Clip4Clip:
    """A CLIP4Clip with random weights and a frozen image tower."""
    torch.manual_seed(0)
    config = Config(architecture=architecture, pretrained=None, head=head, freeze_layers=None)
    method = Clip4Clip(config).to(device)
    method.model.visual.requires_grad_(False)
    if head == "meanP":
        method.model.requires_grad_(False)
        method.logit_scale.requires_grad_(True)
    return method.train()


def step(method: Clip4Clip, batch: dict[str, Tensor], device: str) -> tuple[float, float]:
    """Seconds of one step, and its loss."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    if device == "cuda":
        torch.cuda.synchronize()
    began = clock()
    loss = method.training_step(batch)["contrastive"]
    loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    method.zero_grad()
    return clock() - began, loss.item()


def steps(options: Any) -> dict[str, Any]:
    """Both steps in turns, after one of each that fills caches."""
    method = method_of(options.head, options.architecture, options.device)
    height, width = method.transforms(train=False).size
    video = torch.randint(0, 256, (options.rows, FRAMES, 3, height, width), dtype=torch.uint8, device=options.device)
    mask = torch.ones(options.rows, FRAMES, dtype=torch.bool, device=options.device)
    text = method.text_readers()[0].collate([{"text": f"{CAPTION} {row}"} for row in range(options.rows)])["text"]
    pixels = {"video": video, "video_mask": mask, "text": text.to(options.device)}
    with torch.no_grad():
        stored = {**pixels, "video": method.encode_frames(video).half().float()}
    times: dict[str, list[float]] = {"pixels": [], "stored": []}
    for number in range(options.rounds + 1):
        losses = {}
        for name, batch in (("pixels", pixels), ("stored", stored)):
            seconds, losses[name] = step(method, batch, options.device)
            times[name] += [seconds] if number else []
    assert abs(losses["pixels"] - losses["stored"]) < 2e-2, losses  # stored in half precision
    return {name: median(found) for name, found in times.items()}


def retrieve(count: int, ranking: Ranking) -> dict[str, float]:
    """Seconds and the rise of the peak in MB for ``count`` clips and texts, features near their own pair."""
    generator = torch.Generator().manual_seed(0)
    clips = torch.nn.functional.normalize(torch.randn(count, WIDTH, generator=generator), dim=-1)
    texts = torch.nn.functional.normalize(clips + 0.06 * torch.randn(count, WIDTH, generator=generator), dim=-1)
    own = torch.arange(count).repeat(2, 1).T
    retrieval_metrics(clips[:64], texts[:64], own[:64], ("v", "t"), ranking)
    before, began = peak("cpu", first=True), time.process_time()
    found = retrieval_metrics(clips, texts, own, ("v", "t"), ranking, scale=100.0)
    return {"seconds": time.process_time() - began, "memory": peak("cpu") - before, "t2v_r1": found["t2v_r1"]}


def main() -> None:
    """Both parts, or one retrieval for the parent process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", choices=("meanP", "seqLSTM", "seqTransf"), default="meanP")
    parser.add_argument("--architecture", default="ViT-B-32-quickgelu")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--retrieve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dual", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.retrieve:
        print(json.dumps(retrieve(options.retrieve, replace(Ranking(), dual_softmax=options.dual))))
        return
    found = steps(options)
    where = torch.cuda.get_device_name() if options.device == "cuda" else "one CPU thread"
    line = {
        "name": f"clip4clip_step/{options.head}",
        "ours": round(found["stored"], 5),
        "peer": round(found["pixels"], 4),
    }
    line |= {"ratio": round(found["pixels"] / found["stored"], 1), "unit": "s", "n": options.rows}
    conditions = f"{options.architecture}, {FRAMES} frames, float32, {where}, median of {options.rounds} rounds"
    print(json.dumps(line | {"conditions": f"stored features against pixels, {conditions}"}), flush=True)
    for dual in (False, True):
        for count in SIZES:
            command = [sys.executable, __file__, "--retrieve", str(count), *(["--dual"] if dual else [])]
            one = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            name = f"retrieval{'_dual_softmax' if dual else ''}/{count}"
            line = {"name": name, "ours": round(one["memory"], 1), "peer": round(count**2 * 4 / 2**20, 1)}
            line |= {"unit": "MB at peak", "n": count, "seconds": round(one["seconds"], 2)}
            print(json.dumps(line | {"conditions": f"{WIDTH} features, both directions, one thread"}), flush=True)


if __name__ == "__main__":
    main()
