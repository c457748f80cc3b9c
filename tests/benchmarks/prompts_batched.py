"""Drawings of 16 prompts in one process, together against one after the other.

    python tests/benchmarks/prompts_batched.py                                   # a small CLIP, one CPU thread
    python tests/benchmarks/prompts_batched.py --device cuda --model ViT-B-32:untrained --strokes 256 --side 224

CLIPDraw's steps with all that belongs to them: strokes, views, CLIP, gradients, Adam. Both ways take turns; the fastest
round counts. Time is processor time (on a GPU, the wall time of a synchronised call). ``difference`` is the largest one
between images of both ways, 0 to 1. Asked: 1.5 times as fast, equal images.
"""

import argparse
import json
import os
import time

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor

from pipeline.evaluation.models import load_model
from pipeline.generation.guides import Guide
from pipeline.generation.loop import LoopConfig, Optimization
from pipeline.generation.method import Subject
from pipeline.generation.methods.clipdraw import ClipDraw, Config
from pipeline.generation.prompts import parse_prompts

COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("star", "disc", "ring", "house")


def draw(guide: Guide, options: argparse.Namespace, together: int) -> Tensor:
    """Images [prompts, 3, side, side] after all steps, ``together`` at a time."""
    texts = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES][: options.prompts]
    loop = LoopConfig(steps=options.steps, evaluate_every=options.steps, checkpoint_every=options.steps)
    method, images = ClipDraw(Config(clips=("one",), strokes=options.strokes, side=options.side, loop=loop)), []
    for start in range(0, len(texts), together):
        some = [Subject(prompts=parse_prompts(text)) for text in texts[start : start + together]]
        seeds = list(range(start, start + len(some)))
        picture, objective = method.start(some, seeds, {"one": guide})
        Optimization(picture, objective, loop, seeds).run()
        images.append(picture.render().detach())
    return torch.cat(images)


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="clipmill-small:untrained")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--strokes", type=int, default=16)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    guide = Guide(load_model(options.model, options.device), options.model)
    ways, seconds, images = {"together": options.prompts, "alone": 1}, dict[str, float](), dict[str, Tensor]()
    for number in range(options.rounds + 1):
        for name, together in ways.items():
            clock = time.perf_counter if options.device == "cuda" else time.process_time
            began = clock()
            images[name] = draw(guide, options, together).cpu()
            if number:  # the first round warms up
                seconds[name] = min(seconds.get(name, float("inf")), clock() - began)
    where = torch.cuda.get_device_name() if options.device == "cuda" else "one CPU thread"
    line = {"name": "prompts_batched", "ours": round(seconds["together"], 3), "peer": round(seconds["alone"], 3)}
    line |= {"ratio": round(seconds["alone"] / seconds["together"], 2), "unit": "s", "n": options.prompts}
    line |= {"difference": round(float((images["together"] - images["alone"]).abs().max()), 6)}
    line |= {
        "conditions": f"{options.model}, {options.strokes} strokes, {options.side} px, {options.steps} steps, {where}"
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
