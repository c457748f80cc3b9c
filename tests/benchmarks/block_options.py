"""What a step costs in time and memory with its blocks computed again, compiled, in eight bits, against plain ones.

    python tests/benchmarks/block_options.py                                    # ViT-B-32, 16 rows, one CPU thread
    python tests/benchmarks/block_options.py --device cuda --rows 512 --options again compiled both eight --rounds 20

Forward and backward pass of CLIP in turns; the fastest round counts. Memory is what a forward pass leaves allocated for
the backward pass, parameters aside. "extras" is no variant of the blocks: the plain step, and what the loop adds to it
(the norm of the gradient that finds what is not finite, and the moving average).
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pipeline.models.clip import Clip, Config
from pipeline.training import fp8
from pipeline.training.blocks import compile_each, recompute_each
from pipeline.training.moving_average import MovingAverage
from pipeline.training.skipping import Skipping

OPTIONS: dict[str, tuple[Callable[[Any], object], ...]] = {
    "plain": (),
    "extras": (),
    "again": (recompute_each,),
    "compiled": (compile_each,),
    "both": (recompute_each, compile_each),
    "eight": (fp8.convert, compile_each),
}


class Step:
    """A CLIP whose blocks are changed by an option, and a batch."""

    def __init__(self, option: str, architecture: str, rows: int, tokens: int, device: str) -> None:
        torch.manual_seed(0)
        self.option, self.device = option, torch.device(device)
        self.method = Clip(Config(architecture=architecture)).to(device).train()
        for change in OPTIONS[option]:
            change(self.method.blocks())
        self.average, self.skipping = MovingAverage(self.method, 0.999), Skipping(self.method, 1, self.device)
        text = torch.randint(1, 400, (rows, tokens), device=device)
        text[:, -1] = 49407
        size = self.method.transforms(True).size
        self.batch = {"image": torch.randint(0, 256, (rows, 3, *size), dtype=torch.uint8, device=device), "text": text}

    def forward(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return torch.stack(list(self.method(self.batch).values())).sum()

    def seconds(self) -> float:
        began = self._now()
        loss = self.forward()
        loss.backward()
        if self.option == "extras":
            norm = torch.nn.utils.get_total_norm([value.grad for value in self.method.parameters()])
            self.average.update(1, self.skipping.after_backward(1, loss, norm))
        ended = self._now()
        self.method.zero_grad()
        return ended - began

    def kept(self) -> float:
        """Megabytes that a forward pass leaves allocated."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            loss = self.forward()
            return (torch.cuda.memory_allocated() - before) / 1e6 + 0 * loss.item()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
            loss = self.forward()
        return sum(event.self_cpu_memory_usage for event in profiled.key_averages()) / 1e6 + 0 * loss.item()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    """A line for each option and unit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="ViT-B-32")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--options", nargs="+", choices=[name for name in OPTIONS if name != "plain"])
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    options = ["plain", *(asked.options or ["extras", "again"])]
    steps = {name: Step(name, asked.architecture, asked.rows, asked.tokens, asked.device) for name in options}
    for step in steps.values():
        step.seconds()  # compiles
    seconds = {name: [] for name in steps}
    for _ in range(asked.rounds):
        for name, step in steps.items():
            seconds[name].append(step.seconds())
    found = {name: {"seconds": min(seconds[name]), "memory": step.kept()} for name, step in steps.items()}
    where = torch.cuda.get_device_name() if asked.device == "cuda" else "one CPU thread"
    number = "bfloat16" if asked.device == "cuda" else "float32"
    conditions = f"{asked.architecture}, {asked.rows} rows, {asked.tokens} tokens, {number}, {where}"
    for name in options[1:]:
        for what, unit in (("seconds", "s"), ("memory", "MB")):
            ours, peer = found[name][what], found["plain"][what]
            line = {"name": f"block_options/{name}/{what}", "ours": round(ours, 4), "peer": round(peer, 4)}
            line |= {"ratio": round(peer / ours, 3), "unit": unit, "n": asked.rounds, "conditions": conditions}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
