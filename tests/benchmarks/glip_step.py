"""A training step of GLIP, in images a second and memory, against transformers' Grounding DINO of the same parts.

    python tests/benchmarks/glip_step.py --device cuda     # GLIP-T: Swin-T, BERT, six blocks, images of 800 pixels
    python tests/benchmarks/glip_step.py                   # on a CPU: Swin-T, a small BERT, three blocks, 256 pixels

Both have the same backbone, text tower, width, number of blocks (there: layers of the encoder, and as many of the
decoder), images, prompt of 20 names and ten objects an image; losses, assignment and the rest are each its own, without
Grounding DINO's auxiliary losses. The width of the fusion is the same; dropout is off. Every measurement is a process
of its own, in turns: forward, backward and AdamW, bfloat16 on a GPU. Time is processor time on a CPU; memory is the
peak over imports, weights and the optimiser's state.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from contrastive_loss_memory import peak
from torch import Tensor, nn
from transformers import BertConfig, GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

from pipeline.loaders.grounding_prompts import SpanTokenizer
from pipeline.models.glip import Config, Glip
from pipeline.models.glip.model import TOKENIZER
from pipeline.models.glip.text import SETTINGS, settings_text

START, END, STOP = 101, 102, 1012  # bert-base-uncased's, by which Grounding DINO knows phrases
NAMES, OBJECTS = 20, 10
Loss = Callable[[], Tensor]


def text_tower(small: bool) -> BertConfig:
    """BERT's base, or a third of its width and of its depth."""
    width, layers, heads = (256, 4, 4) if small else (768, 12, 12)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(intermediate_size=4 * width, attn_implementation="sdpa", **sizes, **off)


def make_batch(options: argparse.Namespace) -> dict[str, Tensor]:
    """What the loader gives, for a prompt of names of one token each."""
    draw, images, size = torch.Generator().manual_seed(0), options.batch_size, options.image_size
    names = torch.randint(2000, 30_000, (images, NAMES), generator=draw)
    inner = torch.stack([names, torch.full_like(names, STOP)], dim=2).flatten(1)
    ends = [torch.full((images, 1), token) for token in (START, END)]
    tokens = torch.cat([ends[0], inner, ends[1]], dim=1)
    tokens = nn.functional.pad(tokens, (0, -tokens.shape[1] % 8))
    labels = torch.randint(0, NAMES, (images, OBJECTS), generator=draw)
    sides = size * (0.05 + 0.4 * torch.rand(images, OBJECTS, 2, generator=draw))
    corner = torch.rand(images, OBJECTS, 2, generator=draw) * (size - sides)
    return {
        "image": torch.randint(0, 256, (images, 3, size, size), generator=draw, dtype=torch.uint8),
        "tokens": tokens,
        "token_mask": tokens > 0,
        "boxes": torch.cat([corner, corner + sides], dim=2),
        "positive_map": nn.functional.one_hot(1 + 2 * labels, tokens.shape[1]).bool(),
        "annotated": torch.ones(images, dtype=torch.bool),
        "left_out": torch.zeros(images, dtype=torch.int64),
        "labels": labels,
    }


def glip(options: argparse.Namespace, batch: Mapping[str, Tensor]) -> tuple[nn.Module, Loss]:
    """GLIP-T with fewer blocks."""
    config = Config(
        blocks=options.blocks,
        image_size=options.image_size,
        fusion_width=1024,  # that of the other, half of its feed-forward layers
        fusion_heads=4,
        drop_path=0.0,
        fusion_dropout=0.0,
        text_dropout=0.0,
    )
    described = {
        TOKENIZER: SpanTokenizer.load("drawn").description,
        SETTINGS: settings_text(text_tower(options.device == "cpu")),
    }
    method = Glip(config, described).train()

    def loss() -> Tensor:
        return torch.stack([value.float() for value in method.training_step(batch).values()]).sum()

    return method, loss


def grounding_dino(options: argparse.Namespace, batch: Mapping[str, Tensor]) -> tuple[nn.Module, Loss]:
    """transformers' detector with the parts of GLIP-T; it gets normalised images and boxes as it wants them."""
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(image_size=options.image_size, drop_path_rate=0.0, out_indices=[2, 3, 4]),
        text_config=text_tower(options.device == "cpu"),
        encoder_layers=options.blocks,
        decoder_layers=options.blocks,
        num_queries=min(900, sum((options.image_size // stride) ** 2 for stride in (8, 16, 32, 64))),
        dropout=0.0,
        fusion_droppath=0.0,
        disable_custom_kernels=True,
    )
    model = GroundingDinoForObjectDetection(config).train()
    size = options.image_size
    boxes = batch["boxes"] / size
    centred = torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], dim=-1)
    targets = [{"class_labels": labels, "boxes": some} for labels, some in zip(batch["labels"], centred, strict=True)]

    def loss() -> Tensor:
        pixels = (batch["image"].float() - 124) / 58
        found: Any = model(
            pixel_values=pixels,
            input_ids=batch["tokens"],
            attention_mask=batch["token_mask"].long(),
            labels=targets,
        )
        total: Tensor = found.loss
        return total

    return model, loss


PEERS = {"glip": glip, "grounding_dino": grounding_dino}


def measure(which: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step and MB at its peak, in this process, after two steps."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device(options.device)
    batch = {name: tensor.to(device) for name, tensor in make_batch(options).items()}
    model, loss = PEERS[which](options, batch)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            total = loss()
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(total.detach())

    for _ in range(2):
        assert 0 < step() < 1e6
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    before, began = peak(options.device, first=True), clock()
    for _ in range(options.steps):
        step()
    seconds = (clock() - began) / options.steps
    return {"seconds": seconds, "memory": peak(options.device) - before}


def main() -> None:
    """Both in turns, or one measurement for a parent process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--image-size", type=int, help="default: 256, on a GPU 800")
    parser.add_argument("--batch-size", type=int, help="default: 2, on a GPU 4")
    parser.add_argument("--blocks", type=int, help="2 or more; default: 3, on a GPU 6")
    parser.add_argument("--steps", type=int, help="in a round; default: 3, on a GPU 10")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=sorted(PEERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    gpu = options.device == "cuda"
    for name, small, large in (("image_size", 256, 800), ("batch_size", 2, 4), ("blocks", 3, 6), ("steps", 3, 10)):
        setattr(options, name, getattr(options, name) or (large if gpu else small))
    if options.measure:
        print(json.dumps(measure(options.measure, options)))
        return
    results: dict[str, list[dict[str, float]]] = {which: [] for which in PEERS}
    for _ in range(options.rounds):
        for which, found in results.items():
            command = [sys.executable, *sys.argv, "--measure", which]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    where = torch.cuda.get_device_name() if gpu else f"{os.environ.get('OMP_NUM_THREADS', 'all')} CPU threads"
    conditions = (
        f"Swin-T, {options.blocks} blocks, {options.image_size} pixels, batch {options.batch_size}, "
        f"{'bfloat16' if gpu else 'float32'}, {where}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, median of {options.rounds} rounds"
    )
    for name, unit in (("speed", "images per second"), ("memory", "MB at peak")):
        key = "seconds" if name == "speed" else name
        mine, theirs = (statistics.median(one[key] for one in results[which]) for which in PEERS)
        ours, peer = (options.batch_size / mine, options.batch_size / theirs) if name == "speed" else (mine, theirs)
        ratio = round(theirs / mine, 3)
        line = {"name": f"glip_step/{name}", "ours": round(ours, 3), "peer": round(peer, 3), "ratio": ratio}
        line |= {"unit": unit, "n": options.steps * options.rounds, "conditions": conditions}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
