"""A training step of ViLD at the paper's size, in images a second, against torchvision's Mask R-CNN.

    python tests/benchmarks/vild_step.py --device cuda         # ResNet-50, eight images of 1024 pixels, 866 classes
    python tests/benchmarks/vild_step.py                       # on a CPU, one of 256 pixels: minutes

The peer is ``torchvision.models.detection.MaskRCNN`` over the same parts: backbone, pyramid, anchors, proposal head,
heads of boxes and masks, as many proposals, as many regions drawn; losses and classifier are its own, with boxes and
masks for every class. Images, 20 objects each, are on the device before the clock starts. ``supervised`` is the same
work as the peer's but for boxes and masks, which know no classes; ``vild`` has 300 regions of each image to distil on
top, ``ensemble`` a head of their own besides. bfloat16 on a GPU; forward, backward and SGD; rounds in turns.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from pipeline.models.proposals import Network, norm_layer
from pipeline.models.vild import FACTS, Config, Mode, Vild

MODES: tuple[Mode, ...] = ("supervised", "vild", "ensemble")
OBJECTS, CLASSES, WIDTH = 20, 866, 512
TINY: dict[str, Any] = {
    "backbone": "resnet18",
    "pyramid_width": 32,
    "proposals_tried": 50,
    "proposals_kept": 20,
    "regions_drawn": 8,
    "most_regions": 4,
    "head_convolutions": (32,),
    "head_layers": (64,),
    "mask_convolutions": (32,),
}
Step = Callable[[], Tensor]


def boxes_of(count: int, size: int, smallest: float, draw: torch.Generator) -> Tensor:
    """Boxes [count, 4] inside a square of ``size``, log-uniform from ``smallest`` pixels to half the side."""
    low, high = torch.tensor(smallest).log(), torch.tensor(size / 2).log()
    sides = (low + (high - low) * torch.rand(count, 2, generator=draw)).exp()
    corner = torch.rand(count, 2, generator=draw) * (size - sides)
    return torch.cat([corner, corner + sides], dim=1)


def make_batch(config: Config, images: int, device: torch.device) -> dict[str, Tensor]:
    """What the loader gives: see ``Vild.readers``."""
    draw, size = torch.Generator().manual_seed(0), config.image_size
    drawn = {
        "image": torch.randint(0, 256, (images, 3, size, size), generator=draw, dtype=torch.uint8),
        "extent": torch.full((images, 2), size),
        "boxes": torch.stack([boxes_of(OBJECTS, size, 16, draw) for _ in range(images)]),
        "labels": torch.randint(0, CLASSES, (images, OBJECTS), generator=draw),
        "masks": torch.ones(images, OBJECTS, config.mask_cells, config.mask_cells, dtype=torch.uint8),
        "region_boxes": torch.stack([boxes_of(config.most_regions, size, 16, draw) for _ in range(images)]),
        "region_features": torch.randn(images, config.most_regions, WIDTH, generator=draw).half(),
    }
    return {name: tensor.to(device) for name, tensor in drawn.items()} | {"draws": torch.arange(images)}


def our_step(mode: Mode, settings: Mapping[str, Any], images: int, setting: tuple[torch.device, bool]) -> Step:
    """A step of ViLD with the vectors of a teacher that there is not."""
    device, bf16 = setting
    names = tuple(f"class {number}" for number in range(CLASSES))
    config = Config(mode=mode, teacher="none", class_names=names, **settings)
    method = Vild(config, {FACTS: json.dumps({"width": WIDTH, "teacher": ""})})
    method.vectors = nn.functional.normalize(torch.randn(CLASSES, WIDTH), dim=-1)
    method = method.to(device).to(memory_format=torch.channels_last).train()
    batch = make_batch(config, images, device)
    return stepper(method, lambda: method.training_step(batch), device, bf16)


class Levels(nn.Module):
    """Our backbone and pyramid, as torchvision wants them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        network = Network(config)
        self.body, self.pyramid, self.out_channels = network.body, network.pyramid, config.pyramid_width

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        levels = {str(number): level for number, level in enumerate(self.body(images))}
        found: dict[str, Tensor] = self.pyramid(levels)
        return found


def their_step(settings: Mapping[str, Any], images: int, setting: tuple[torch.device, bool]) -> Step:
    """A step of torchvision's detector."""
    device, bf16 = setting
    config = Config(mode="supervised", class_names=("any",), **settings)
    names = [str(number) for number in range(len(config.levels))]
    width, norm = config.pyramid_width, norm_layer(config.norm)
    sizes = tuple((size,) for size in config.anchor_sizes)
    convolutions, layers = list(config.head_convolutions), list(config.head_layers)
    masks = list(config.mask_convolutions)
    model = MaskRCNN(
        Levels(config),
        min_size=config.image_size,
        max_size=config.image_size,
        rpn_anchor_generator=AnchorGenerator(sizes, (config.anchor_shapes,) * len(sizes)),
        rpn_head=RPNHead(width, len(config.anchor_shapes), config.head_depth),
        rpn_pre_nms_top_n_train=config.proposals_tried,
        rpn_post_nms_top_n_train=config.proposals_kept,
        box_batch_size_per_image=config.regions_drawn,
        box_roi_pool=MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
        box_head=FastRCNNConvFCHead((width, 7, 7), convolutions, layers, norm_layer=norm),
        box_predictor=FastRCNNPredictor(layers[-1], CLASSES + 1),
        mask_roi_pool=MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2),
        mask_head=MaskRCNNHeads(width, masks, dilation=1, norm_layer=norm),
        mask_predictor=MaskRCNNPredictor(masks[-1], masks[-1], CLASSES + 1),
    )
    model = model.to(device).to(memory_format=torch.channels_last).train()
    batch, size = make_batch(config, images, device), config.image_size
    bitmaps = torch.ones(OBJECTS, size, size, dtype=torch.uint8, device=device)
    targets = [
        {"boxes": boxes, "labels": labels + 1, "masks": bitmaps}
        for boxes, labels in zip(batch["boxes"], batch["labels"], strict=True)
    ]
    return stepper(model, lambda: model([image / 255 for image in batch["image"]], targets), device, bf16)


def stepper(model: nn.Module, losses: Callable[[], Mapping[str, Tensor]], device: torch.device, bf16: bool) -> Step:
    """Forward, backward and an optimiser's step, which change nothing: the rate is 0."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=True)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = torch.stack([value.float() for value in losses().values()]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def seconds(step: Step, times: int, device: torch.device) -> float:
    """Of one step, with all that it has queued."""
    began = time.perf_counter()
    for _ in range(times):
        loss = step()
    assert loss.isfinite()  # waits for the device as well
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def memory(step: Step) -> float:
    """GB of the GPU at the peak of a step, the other models' weights included."""
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**30


def main(arguments: Sequence[str] | None = None) -> None:
    """A line for each mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--image-size", type=int, help="default: 256, on a GPU 1024")
    parser.add_argument("--batch-size", type=int, help="default: 1, on a GPU 8")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, help="in a round; default: 1, on a GPU 5")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a small network with few regions, to try this script")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device, bf16 = torch.device(options.device), options.device == "cuda"
    size = options.image_size or (1024 if bf16 else 256)
    images, times = options.batch_size or (8 if bf16 else 1), options.steps or (5 if bf16 else 1)
    # On a CPU torch has no batch normalisation over processes.
    settings: dict[str, Any] = (
        {"image_size": size} | ({} if bf16 else {"norm": "group"}) | (TINY if options.tiny else {})
    )
    setting = (device, bf16)
    steps = {mode: our_step(mode, settings, images, setting) for mode in options.modes}
    steps["torchvision"] = their_step(settings, images, setting)
    for step in steps.values():
        seconds(step, 2 if bf16 else 1, device)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            taken[name].append(seconds(step, times, device))
    rates = {name: images / statistics.median(some) for name, some in taken.items()}
    peaks = {name: memory(step) for name, step in steps.items()} if bf16 else {}
    where = torch.cuda.get_device_name() if bf16 else f"{torch.get_num_threads()} CPU threads"
    for mode in options.modes:
        line = {
            "name": f"vild_step/{mode}",
            "ours": round(rates[mode], 2),
            "peer": round(rates["torchvision"], 2),
            "ratio": round(rates[mode] / rates["torchvision"], 3),
            "unit": "images per second",
            "n": images * times * options.rounds,
            "conditions": f"{settings.get('backbone', 'resnet50')}, {size} pixels, batch {images}, "
            f"{'bfloat16' if bf16 else 'float32'}, {where}, torch {torch.__version__}, torchvision "
            f"{torchvision.__version__}"
            + (f"; peaks {peaks[mode]:.1f} and {peaks['torchvision']:.1f} GB" if peaks else ""),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
