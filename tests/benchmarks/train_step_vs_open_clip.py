"""One training step, ours against open_clip's own training loop, on the same batches.

    python tests/benchmarks/train_step_vs_open_clip.py --architecture ViT-B-32 --batch-size 16
    python tests/benchmarks/train_step_vs_open_clip.py --architecture clipmill-small --batch-size 128
    python tests/benchmarks/train_step_vs_open_clip.py --device cuda --architecture ViT-B-16 --batch-size 512

The peer is ``open_clip_train.train.train_one_epoch`` with the optimiser that its ``main`` makes, on images that are
already normalised floats; ours takes uint8 images and texts cut at the batch's longest, as our loader gives them.
Same weights at the start, captions of the drawn world (2 to 40 words). On a CPU: float32, one thread, samples per CPU
second; asked is a ratio of 1.25. On a GPU: bfloat16 (``amp_bf16``), TF32 for the rest, both compiled (open_clip its
whole model, ours its blocks), open_clip with local loss and gather with gradients, batches in pinned memory, samples
per second of wall time; asked is a ratio of 1.5, and 40 % MFU for ViT-B/16. MFU counts what each side's texts need, see
``pipeline.training.flops``. It needs neither Ray nor data.

Prints one JSON line, of medians over rounds that take turns. ``conditions`` tells how far apart the two losses are
after all steps.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"

import open_clip
import torch
from open_clip_train.train import train_one_epoch
from torch import Tensor

from pipeline.loaders.text import cut_text
from pipeline.models.clip import Clip, Config
from pipeline.sources.drawn.sample import draw_sample
from pipeline.training.blocks import compile_each
from pipeline.training.flops import Work, device_name, peak_of, precision
from pipeline.training.optimizer import AdamW, make_optimizer, take_step
from pipeline.training.skipping import Skipping

ROUNDS = 3
BATCH_SIZE, STEPS = {"cpu": 16, "cuda": 512}, {"cpu": 3, "cuda": 20}
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


@dataclass(frozen=True)
class Setting:
    """Where and how both sides compute."""

    device: torch.device
    bf16: bool
    compiled: bool

    def now(self) -> float:
        """Seconds: of the processor, or of the wall once the GPU is done."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


class Ours:
    """The step of ``pipeline.training.loop``, without its logging."""

    def __init__(self, method: Clip, setting: Setting) -> None:
        self.setting = setting
        self.method = method.to(setting.device).to(memory_format=torch.channels_last).train()
        if setting.compiled:
            compile_each(self.method.blocks())
        self.optimizer = make_optimizer(RECIPE, self.method)
        self.skipping = Skipping(self.method, 10, setting.device)

    def __call__(self, batches: list[tuple[Tensor, Tensor]]) -> float:
        """Train on the batches; seconds."""
        began = self.setting.now()
        for step, (image, text) in enumerate(batches, start=1):
            batch = {"image": image, "text": cut_text(text, self.method.end_of_text)}
            on_device = {key: value.to(self.setting.device, non_blocking=True) for key, value in batch.items()}
            self.skipping.before_step()
            with torch.autocast(self.setting.device.type, torch.bfloat16, enabled=self.setting.bf16):
                losses = self.method.training_step(on_device)
            total = torch.stack(list(losses.values())).sum()
            total.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.method.parameters() if p.grad is not None])
            take_step(self.optimizer, self.skipping.after_backward(step, total, norm))
            self.method.after_step()
        return self.setting.now() - began


class Theirs:
    """open_clip's epoch over the same batches."""

    def __init__(self, method: Clip, setting: Setting) -> None:
        self.setting = setting
        self.mean, self.std = method.mean.cpu().clone(), method.std.cpu().clone()
        model = open_clip.create_model(method.config.architecture, output_dict=True)
        model.load_state_dict(method.model.state_dict())
        model = model.to(setting.device)
        named = list(model.named_parameters())
        excluded = {n for n, p in named if p.ndim < 2 or any(w in n for w in ("bn", "ln", "bias", "logit_scale"))}
        groups = [
            {"params": [p for n, p in named if n in excluded], "weight_decay": 0.0},
            {"params": [p for n, p in named if n not in excluded], "weight_decay": RECIPE.weight_decay},
        ]
        betas = (RECIPE.beta1, RECIPE.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=RECIPE.learning_rate, betas=betas, eps=RECIPE.epsilon)
        self.model = torch.compile(model) if setting.compiled else model
        self.loss = open_clip.loss.ClipLoss(local_loss=True, gather_with_grad=True)
        off = dict.fromkeys(("distill", "horovod", "wandb", "skip_scheduler"), False) | {"grad_clip_norm": None}
        off["batch_size"] = 0
        rank = {"rank": 0, "local_rank": 0, "world_size": 1, "accum_freq": 1, "log_every_n_steps": 10**9}
        where = {"device": str(setting.device), "precision": "amp_bf16" if setting.bf16 else "fp32"}
        self.arguments = SimpleNamespace(save_logs=False, **where, **off, **rank)
        self.ready: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, batches: list[tuple[Tensor, Tensor]]) -> float:
        """Train on the batches, which are normalised before the clock starts; seconds."""
        for image, text in batches:
            if id(image) not in self.ready:
                self.ready[id(image)] = pinned((image - self.mean) / self.std), text
        ready = [self.ready[id(image)] for image, _ in batches]
        data = {"train": SimpleNamespace(dataloader=Batches(ready), set_epoch=lambda epoch: None)}
        began = self.setting.now()
        train_one_epoch(self.model, data, self.loss, 0, self.optimizer, None, lambda step: None, None, self.arguments)
        return self.setting.now() - began


def pinned(tensor: Tensor) -> Tensor:
    """In memory from which a GPU can fetch it by itself, if there is one."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def make_batches(method: Clip, batch_size: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Images of noise, uint8, and tokens of drawn captions, int64."""
    side = method.transforms(train=False).size[0]
    count = batch_size * steps
    captions = [draw_sample("train", 0, number, 64).caption for number in range(count)]
    tokens = method.tokenizer(captions).split(batch_size)
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, 3, side, side)
    images = (torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in tokens)
    return [(pinned(image), pinned(text.contiguous())) for image, text in zip(images, tokens, strict=True)]


def utilisation(
    method: Clip, batches: list[tuple[Tensor, Tensor]], setting: Setting, peak: float | None
) -> Callable[[float, bool], float | None]:
    """From seconds for the batches, texts cut or not, to the share of the device's peak; to be asked for first."""
    work = Work(method)
    flops = {
        cut: sum(
            work.of({"image": image, "text": cut_text(text, method.end_of_text) if cut else text}) or 0.0
            for image, text in batches
        )
        for cut in (True, False)
    }
    most = peak or peak_of(device_name(setting.device), precision(setting.device, setting.bf16))
    return lambda seconds, cut: round(flops[cut] / seconds / 1e12 / most, 4) if most else None


def main() -> None:
    """Take turns, print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--architecture", default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, help="default: 16, on a GPU 512")
    parser.add_argument("--steps", type=int, help="in a round; default: 3, on a GPU 20")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    parser.add_argument("--peak-tflops", type=float, help="of the device, where it is not known by its name")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    on_gpu, place = arguments.device == "cuda", arguments.device
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # TF32, on both sides
    bf16, compiled = (on_gpu if asked is None else asked for asked in (arguments.bf16, arguments.compile))
    setting = Setting(torch.device(place), bf16, compiled)
    batch_size, steps = arguments.batch_size or BATCH_SIZE[place], arguments.steps or STEPS[place]
    method = Clip(Config(architecture=arguments.architecture))
    batches = make_batches(method, batch_size, steps)
    share = utilisation(method, batches, setting, arguments.peak_tflops)
    theirs, ours = Theirs(method, setting), Ours(method, setting)
    for way in (ours, theirs):
        way(batches if compiled else batches[:1])
    seconds = [(ours(batches), theirs(batches)) for _ in range(ROUNDS)]
    medians = [statistics.median(column) for column in zip(*seconds, strict=True)]
    rates = [batch_size * steps / median for median in medians]
    numbers = "bfloat16" if bf16 else "float32"
    where = device_name(setting.device) if on_gpu else "one thread"
    losses = f"{_loss(ours.method, batches[0]):.4f} and {_loss(theirs.model, batches[0], theirs):.4f}"
    line = {
        "name": "train_step_vs_open_clip",
        "ours": round(rates[0], 2),
        "peer": round(rates[1], 2),
        "ratio": round(rates[0] / rates[1], 3),
        "unit": "samples per second" if on_gpu else "samples per CPU second",
        "n": batch_size * steps * ROUNDS,
        "conditions": f"{arguments.architecture}, batch {batch_size}, {numbers}, {'' if compiled else 'not '}compiled, "
        f"{where}, open_clip {open_clip.__version__}, torch {torch.__version__}; losses afterwards {losses}",
        "mfu": share(medians[0], True),
        "peer_mfu": share(medians[1], False),
    }
    print(json.dumps(line))


@torch.no_grad()
def _loss(model: torch.nn.Module, batch: tuple[Tensor, Tensor], side: Theirs | None = None) -> float:
    """The contrastive loss of a batch in training mode."""
    image, text = (tensor.to(next(model.parameters()).device) for tensor in batch)
    if side is None:
        return float(model.training_step({"image": image, "text": text})["contrastive"])
    images = (image - side.mean.to(image.device)) / side.std.to(image.device)
    return float(open_clip.loss.ClipLoss()(**model(images, text)))


if __name__ == "__main__":
    main()
