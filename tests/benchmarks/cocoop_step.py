"""A training step of CoCoOp with eight images, in one batch against the authors' loop over single images.

    python tests/benchmarks/cocoop_step.py                    # 100 classes of the small model
    python tests/benchmarks/cocoop_step.py --device cuda --model ViT-B-32 --classes 1000

The plain way runs 77 tokens for every class and every image; see coop_step.py for how it is measured. Asked: 5 times
as fast.
"""

import argparse
import json

import torch
from coop_step import MODELS, frozen, names, plain_features, plain_prompts, report, step
from torch import Tensor
from torch.nn import functional

from pipeline.models.adapters.cocoop import CoCoOp, Config

IMAGES = 8


def plain_logits(adapter: CoCoOp, images: Tensor) -> Tensor:
    """CoCoOp as its authors' code computes it: one image after the other."""
    rows = []
    for feature in functional.normalize(images, dim=-1):
        context = adapter.context + adapter.meta_net(feature)
        vectors = plain_features(adapter.clip, *plain_prompts(adapter.clip, context, adapter.classes))
        rows.append(adapter.clip.scale * vectors @ feature)
    return torch.stack(rows)


def measure(model: str, classes: int, which: str, device: str) -> dict[str, float]:
    """Ours or the plain one."""
    adapter = CoCoOp(Config(), frozen(model, device), names(classes), ())
    logits = (lambda images: plain_logits(adapter, images)) if which == "plain" else adapter.logits
    return step(adapter, logits, IMAGES, device)


def main() -> None:
    """Rounds of both in turns, or one measurement for a parent process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--measure", choices=("batch", "plain"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        print(json.dumps(measure(options.model, options.classes, options.measure, options.device)))
        return
    arguments = ["--model", options.model, "--classes", str(options.classes), "--device", options.device]
    where = torch.cuda.get_device_name() if options.device == "cuda" else "one CPU thread"
    conditions = f"{options.model}, {IMAGES} images, 4 context vectors, {where}, median of {options.rounds} rounds"
    report(__file__, f"cocoop_step/{options.model}", "batch", arguments, options.rounds, options.classes, conditions)


if __name__ == "__main__":
    main()
