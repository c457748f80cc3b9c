"""One training step on a CPU, ours against open_clip's own training loop, on the same batches.

    python tests/benchmarks/train_step_vs_open_clip.py --architecture ViT-B-32 --batch-size 16
    python tests/benchmarks/train_step_vs_open_clip.py --architecture clipmill-small --batch-size 128

The peer is ``open_clip_train.train.train_one_epoch`` with the optimiser that its ``main`` makes, on pictures that are
already normalised floats; ours takes uint8 pictures and texts cut at the batch's longest, as our loader gives them.
Same weights at the start, float32, one thread, captions of the drawn world (2 to 40 words). Prints one JSON line:
samples per CPU second, medians over rounds that take turns; asked is a ratio of 1.25 or more. ``conditions`` tells how
far apart the two losses are after all steps.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"

import open_clip
import torch
from open_clip_train.train import train_one_epoch
from torch import Tensor

from pipeline.loaders.text import cut_text
from pipeline.models.clip import Clip, Config
from pipeline.sources.drawn.source import Drawn
from pipeline.sources.source import Slice
from pipeline.training.optimizer import AdamW, make_optimizer

ROUNDS = 3
RECIPE = AdamW(learning_rate=1e-4)


@dataclass
class Batches:
    """What open_clip's loop takes for a data loader."""

    batches: list[tuple[Tensor, Tensor]]

    @property
    def num_batches(self) -> int:
        """Batches in an epoch."""
        return len(self.batches)

    @property
    def num_samples(self) -> int:
        """Samples in an epoch."""
        return sum(len(images) for images, _ in self.batches)

    @property
    def batch_size(self) -> int:
        """Samples in a batch."""
        return len(self.batches[0][0])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


class Ours:
    """The step of ``pipeline.training.loop``, without its logging."""

    def __init__(self, method: Clip) -> None:
        self.method = method.to(memory_format=torch.channels_last).train()
        self.optimizer = make_optimizer(RECIPE, self.method)

    def __call__(self, batches: list[tuple[Tensor, Tensor]]) -> float:
        """Train on the batches; CPU seconds."""
        began = time.process_time()
        for image, text in batches:
            losses = self.method.training_step({"image": image, "text": cut_text(text, self.method.end_of_text)})
            torch.stack(list(losses.values())).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.method.after_step()
        return time.process_time() - began


class Theirs:
    """open_clip's epoch over the same batches."""

    def __init__(self, method: Clip) -> None:
        self.method = method
        self.model = open_clip.create_model(method.config.architecture, output_dict=True)
        self.model.load_state_dict(method.model.state_dict())
        named = list(self.model.named_parameters())
        excluded = {n for n, p in named if p.ndim < 2 or any(w in n for w in ("bn", "ln", "bias", "logit_scale"))}
        groups = [
            {"params": [p for n, p in named if n in excluded], "weight_decay": 0.0},
            {"params": [p for n, p in named if n not in excluded], "weight_decay": RECIPE.weight_decay},
        ]
        betas = (RECIPE.beta1, RECIPE.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=RECIPE.learning_rate, betas=betas, eps=RECIPE.epsilon)
        off = dict.fromkeys(("distill", "horovod", "wandb", "skip_scheduler"), False) | {"grad_clip_norm": None}
        off["batch_size"] = 0
        rank = {"rank": 0, "local_rank": 0, "world_size": 1, "accum_freq": 1, "log_every_n_steps": 10**9}
        self.arguments = SimpleNamespace(device="cpu", precision="fp32", save_logs=False, **off, **rank)

    def __call__(self, batches: list[tuple[Tensor, Tensor]]) -> float:
        """Train on the batches; CPU seconds."""
        ready = [((image - self.method.mean) / self.method.std, text) for image, text in batches]
        data = {"train": SimpleNamespace(dataloader=Batches(ready), set_epoch=lambda epoch: None)}
        loss, nothing = open_clip.loss.ClipLoss(), lambda step: None
        began = time.process_time()
        train_one_epoch(self.model, data, loss, 0, self.optimizer, None, nothing, None, self.arguments)
        return time.process_time() - began


def make_batches(method: Clip, batch_size: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Pictures of noise, uint8, and tokens of drawn captions, int64."""
    side = method.transforms(train=False).size[0]
    count = batch_size * steps
    rows = Drawn(samples=count, size=64).rows(Slice(count=count, digest="", where={"start": 0}))
    tokens = method.tokenizer([row.caption for row in rows]).split(batch_size)
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, 3, side, side)
    return [(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), text) for text in tokens]


def main() -> None:
    """Take turns, print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    method = Clip(Config(architecture=arguments.architecture))
    batches = make_batches(method, arguments.batch_size, arguments.steps)
    theirs, ours = Theirs(method), Ours(method)
    for way in (ours, theirs):
        way(batches[:1])
    seconds = [(ours(batches), theirs(batches)) for _ in range(ROUNDS)]
    count = arguments.batch_size * arguments.steps
    rates = [count / statistics.median(column) for column in zip(*seconds, strict=True)]
    line = {
        "name": "train_step_vs_open_clip",
        "ours": round(rates[0], 2),
        "peer": round(rates[1], 2),
        "ratio": round(rates[0] / rates[1], 3),
        "unit": "samples per CPU second",
        "n": count * ROUNDS,
        "conditions": f"{arguments.architecture}, batch {arguments.batch_size}, float32, one thread, open_clip "
        f"{open_clip.__version__}, torch {torch.__version__}; losses afterwards {_loss(method, batches[0]):.4f} and "
        f"{_loss(theirs.model, batches[0], method):.4f}",
    }
    print(json.dumps(line))


@torch.no_grad()
def _loss(model: torch.nn.Module, batch: tuple[Tensor, Tensor], method: Clip | None = None) -> float:
    """The contrastive loss of a batch in training mode."""
    image, text = batch
    if method is None:
        return float(model.training_step({"image": image, "text": text})["contrastive"])
    return float(open_clip.loss.ClipLoss()(**model((image - method.mean) / method.std, text)))


if __name__ == "__main__":
    main()
