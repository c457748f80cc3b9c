"""A training step of GroupViT, in images a second, against transformers' port.

    python tests/benchmarks/groupvit_step.py                                   # on a CPU, one thread: minutes
    python tests/benchmarks/groupvit_step.py --device cuda --batch-size 256    # the paper's batch for one GPU

The peer is ``GroupViTModel`` with its own loss, the paper's size, the same weights at the start, normalised images and
tokens. It has no prompts and no stochastic depth, so ours trains without them as well (``pairs``). ``prompts`` is the
paper's recipe: three prompts an image, stochastic depth. Both get tokens cut at the batch's longest text, captions of
the drawn world; ours gets uint8 images. ``padded`` compares ``pairs`` with the port on texts padded to 77 tokens, as in
the authors' code; ours never computes on padding. Forward, backward and AdamW; bfloat16 on a GPU; rounds in turns.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import transformers
from torch import Tensor, nn
from transformers import GroupViTModel

from pipeline.loaders.text import cut_text
from pipeline.models.groupvit import TINY, Config, Groupvit
from pipeline.sources.drawn.sample import draw_sample

Step = Callable[[], Tensor]


def make_batch(method: Groupvit, images: int, device: torch.device) -> dict[str, Tensor]:
    """Images of noise, drawn captions, and as prompts the captions of further samples."""
    size, each = method.config.image_size, 1 + method.config.prompts
    captions = [draw_sample("train", 0, number, 64).caption for number in range(images * each)]
    texts = cut_text(method.tokenizer(captions), method.end_of_text).unflatten(0, (images, each))
    batch = {
        "image": torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8),
        "text": texts[:, 0],
        "prompts": texts[:, 1:],
        "seeds": torch.arange(images),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def stepper(model: nn.Module, losses: Callable[[], Mapping[str, Tensor]], device: torch.device) -> Step:
    """Forward, backward and an optimiser's step, which changes nothing: the rate is 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.05, fused=True)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = torch.stack([value.float() for value in losses().values()]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def our_step(config: Config, images: int, device: torch.device) -> Step:
    """A step of ours."""
    method = Groupvit(config).to(device).train()
    batch = make_batch(method, images, device)
    return stepper(method, lambda: method.training_step(batch), device)


def their_step(config: Config, images: int, device: torch.device, padded: bool = False) -> Step:
    """A step of the port; texts are ``padded`` to the context, or cut at the longest one."""
    method = Groupvit(config).to(device)
    batch = make_batch(method, images, device)
    if padded:
        missing = config.context_length - batch["text"].shape[1]
        batch["text"] = nn.functional.pad(batch["text"], (0, missing))
    model = GroupViTModel(config.network())
    model.load_state_dict(method.model.state_dict())
    model = model.to(device).train()
    pixels = method.normalised(batch["image"])
    given = {"input_ids": batch["text"], "pixel_values": pixels, "return_loss": True}
    return stepper(model, lambda: {"loss": model(**given).loss}, device)


def seconds(step: Step, times: int, device: torch.device) -> float:
    """Of one step, with all that it has queued; CPU seconds on a CPU."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    for _ in range(times):
        loss = step()
    assert loss.isfinite()  # waits for the device as well
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - began) / times


def main(arguments: Sequence[str] | None = None) -> None:
    """One line for each of ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch-size", type=int, help="default: 8, on a GPU 256")
    parser.add_argument("--steps", type=int, help="in a round; default: 1, on a GPU 10")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a tiny network, to try this script")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    images, times = options.batch_size or (256 if on_gpu else 8), options.steps or (10 if on_gpu else 1)
    size = TINY if options.tiny else {}
    plain = Config(**{**size, "prompts": 0, "drop_path": 0.0})
    steps = {
        "pairs": our_step(plain, images, device),
        "prompts": our_step(Config(**size), images, device),
        "port": their_step(plain, images, device),
        "padded port": their_step(plain, images, device, padded=True),
    }
    for step in steps.values():
        seconds(step, 2 if on_gpu else 1, device)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            taken[name].append(seconds(step, times, device))
    rates = {name: images / statistics.median(some) for name, some in taken.items()}
    where = torch.cuda.get_device_name() if on_gpu else "one CPU thread, per CPU second"
    for name, ours, peer in (
        ("pairs", "pairs", "port"),
        ("padded", "pairs", "padded port"),
        ("prompts", "prompts", "port"),
    ):
        line = {
            "name": f"groupvit_step/{name}",
            "ours": round(rates[ours], 2),
            "peer": round(rates[peer], 2),
            "ratio": round(rates[ours] / rates[peer], 3),
            "unit": "images per second",
            "n": images * times * options.rounds,
            "conditions": f"{plain.image_size} pixels, batch {images}, {'bfloat16' if on_gpu else 'float32'}, {where}, "
            f"torch {torch.__version__}, transformers {transformers.__version__}",
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
