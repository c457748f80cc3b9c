"""The figures of a run: each function is a part of plan.py, and emits the lines of a benchmark of tests/benchmarks.

Benchmarks that measure each side in a process of its own, for the memory of a CPU, are measured in this process here:
on a GPU the peak of the allocated memory starts anew.
"""

import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pipeline.loaders.batches import SamplePosition
from pipeline.loaders.device_jpeg import EncodedImageReader
from pipeline.loaders.images import ImageTransform, crop_bits
from pipeline.loaders.readers import ImageReader
from pipeline.shards.sample import Sample
from pipeline.stages.cores import cores
from pipeline.training.flops import device_name
from tests.gpu.child import Emit, JsonLines
from tests.gpu.device import fp8_problem, warn
from tests.gpu.plan import Setting

Measure = Callable[[str], dict[str, float]]


def asked(line: dict[str, Any], key: str, least: float) -> dict[str, Any]:
    """The line with the smallest value asked of one of its figures, and whether it is met."""
    value = line.get(key)
    return line | {"asked": {key: least}, "met": None if value is None else value >= least}


def benchmark(name: str, arguments: Sequence[str], emit: Emit, least: dict[str, float] | None = None) -> None:
    """Run the command line of a benchmark in this process; ``least`` are the asked values of its lines' ratios."""

    def checked(line: dict[str, Any]) -> None:
        limit = (least or {}).get(line.get("name", ""))
        emit(line if limit is None else asked(line, "ratio", limit))

    module = import_module(name)
    with patch.object(sys, "argv", [str(module.__file__), *arguments]), patch.object(sys, "stdout", JsonLines(checked)):
        module.main()


def in_turns(names: Sequence[str], rounds: int, measure: Measure) -> dict[str, dict[str, float]]:
    """The medians of each name's measurements; nothing for one that runs out of the GPU's memory."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(rounds):
        for name, results in found.items():
            if number and not results:
                continue
            try:
                results.append(measure(name))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
    return {
        name: {key: round(statistics.median(one[key] for one in results), 6) for key in results[0]} if results else {}
        for name, results in found.items()
    }


def compare(
    name: str,
    results: dict[str, dict[str, float]],
    ours: str,
    peer: str,
    setting: Setting,
    least: dict[str, float] | None = None,
    **more: Any,
) -> list[dict[str, Any]]:
    """A line for the seconds and one for the memory of two measurements; ``ratio`` is the peer's over ours."""
    where = f"{device_name(torch.device(setting.device))}, torch {torch.__version__}"
    lines = []
    for key, unit in (("seconds", "s"), ("memory", "MB at peak")):
        mine, theirs = results[ours].get(key), results[peer].get(key)
        ratio = round(theirs / max(mine, 1e-9), 3) if mine is not None and theirs is not None else None
        line = {"name": f"{name}/{ours}/{peer}/{key}", "ours": mine, "peer": theirs, "ratio": ratio, "unit": unit}
        line |= {"conditions": where, **more}
        lines.append(asked(line, "ratio", least[key]) if least and key in least else line)
    return lines


def _train(architecture: str, setting: Setting, emit: Emit, mfu: float | None = None) -> None:
    def checked(line: dict[str, Any]) -> None:
        line = asked(line, "ratio", 1.5)
        emit(
            line if mfu is None else line | {"asked": {"ratio": 1.5, "mfu": mfu}, "met_mfu": (line["mfu"] or 0) >= mfu}
        )

    sizes = ["--architecture", architecture, "--batch-size", "512", "--steps", "10", "--device", "cuda"]
    tiny = ["--architecture", "clipmill-tiny", "--batch-size", "8", "--steps", "1"]
    benchmark("train_step_vs_open_clip", tiny if setting.dry else sizes, checked)


def train_b16(setting: Setting, emit: Emit) -> None:
    """A step of CLIP ViT-B/16 against open_clip's loop, both compiled, bfloat16; the share of the device's peak."""
    _train("ViT-B-16", setting, emit, 0.5)


def train_b32(setting: Setting, emit: Emit) -> None:
    """The same of ViT-B/32."""
    _train("ViT-B-32", setting, emit)


def _losses(pairs: int, setting: Setting, emit: Emit) -> None:
    """Value and gradient of both losses: tiles of several sizes, plain and compiled, against open_clip's."""
    losses = import_module("contrastive_loss_memory")
    for kind, known in losses.LOSSES.items():
        tiled = known["tiled"]
        tiles = (32, 64) if setting.dry else (1024, 4096, 8192)
        ways = {f"tiles of {tile}": partial(tiled, tile=tile) for tile in tiles}
        if not setting.dry:
            ways |= {f"compiled tiles of {tile}": partial(tiled, tile=tile, compiled=True) for tile in tiles[1:]}
        ways["open_clip"] = known["open_clip"]

        def measure(way: str, kind: str = kind, ways: dict[str, Any] = ways) -> dict[str, float]:
            return losses.measure_loss(kind, ways[way], pairs, setting.device)  # type: ignore[no-any-return]

        if not setting.dry:
            for way in [name for name in ways if name.startswith("compiled")]:
                measure(way)  # compiles
        results = in_turns(list(ways), 1 if setting.dry else 3, measure)
        exact = results[f"tiles of {tiles[0]}"]["loss"]
        for way, found in results.items():
            assert not found or abs(found["loss"] / exact - 1) < 1e-2, (kind, way, found, exact)
        for way in ways:
            if way != "open_clip":
                least = {"seconds": 1.0, "memory": 12.0}
                for line in compare(f"loss/{kind}", results, way, "open_clip", setting, least, n=pairs):
                    emit(line)


def losses_32k(setting: Setting, emit: Emit) -> None:
    """32,768 pairs."""
    _losses(128 if setting.dry else 32768, setting, emit)


def losses_131k(setting: Setting, emit: Emit) -> None:
    """131,072 pairs, for which open_clip's matrices may not fit."""
    _losses(192 if setting.dry else 131072, setting, emit)


def trace_b16(setting: Setting, emit: Emit) -> None:
    """Three steps of ViT-B/16 under torch's profiler: the three largest costs, and the trace in a file."""
    bench = import_module("train_step_vs_open_clip")
    device = torch.device(setting.device)
    torch.set_float32_matmul_precision("high")
    method = bench.Clip(bench.Config(architecture="clipmill-tiny" if setting.dry else "ViT-B-16"))
    batches = bench.make_batches(method, 8 if setting.dry else 512, 3)
    step = bench.Ours(method, bench.Setting(device, bf16=not setting.dry, compiled=not setting.dry))
    step(batches)
    kinds = [ProfilerActivity.CPU, *([] if setting.dry else [ProfilerActivity.CUDA])]
    with profile(activities=kinds) as profiled:
        seconds = step(batches)
    key = "self_cpu_time_total" if setting.dry else "self_device_time_total"
    events = [event for event in profiled.key_averages() if getattr(event, key) > 0]
    events.sort(key=lambda event: getattr(event, key), reverse=True)
    total = sum(getattr(event, key) for event in events)
    trace = Path(setting.folder) / "trace_b16.json.gz"
    profiled.export_chrome_trace(str(trace))
    costs = {event.key[:120]: round(getattr(event, key) / total, 3) for event in events[:3]}
    share = None if setting.dry else round(total / 1e6 / seconds, 3)
    emit({"name": "trace_b16", "largest_costs": costs, "busy": share, "seconds": seconds / 3, "trace": trace.name})


def vild(setting: Setting, emit: Emit) -> None:
    """A step of ViLD against torchvision's Mask R-CNN."""
    tiny = ["--image-size", "64", "--modes", "vild", "--rounds", "1", "--tiny"]
    arguments = tiny if setting.dry else ["--device", "cuda", "--modes", "supervised", "vild"]
    benchmark("vild_step", arguments, emit, {"vild_step/supervised": 1.0, "vild_step/vild": 1.0})


def feed(setting: Setting, emit: Emit) -> None:
    """The loader feeding a step of ViT-B/32."""

    def checked(line: dict[str, Any]) -> None:
        emit(line | {"asked": {"data_wait": 0.03}, "met": line["data_wait"] <= 0.03})

    sizes = ["--architecture", "ViT-B-32", "--size", "256", "--samples", "2048", "--batch-size", "512", "--steps", "80"]
    workers = ["--loader-workers", str(max(1, cores() - 2)), "--compile-blocks"]
    tiny = ["--architecture", "clipmill-tiny", "--size", "64", "--samples", "32", "--batch-size", "2", "--steps", "20"]
    benchmark("end_to_end", ["feed", *(tiny if setting.dry else [*sizes, *workers])], checked)
    if not setting.dry:
        benchmark("end_to_end", ["feed", *sizes, *workers, "--image-decoder", "cuda"], checked)


def jpeg(setting: Setting, emit: Emit) -> None:
    """Crops of photographs a second by the GPU's decoder and by one core, and how far each is from the exact ones."""
    count, device = 4 if setting.dry else 512, torch.device(setting.device)
    contents = import_module("region_features").photographs(count)
    transform = ImageTransform(size=(224, 224), crop="resized")
    samples = [(Sample(str(number), {"jpg": some}), SamplePosition(0, number)) for number, some in enumerate(contents)]
    on_device, on_cpu = EncodedImageReader(transform=transform), ImageReader(transform=transform)
    batch = on_device.collate([on_device.read(*one) for one in samples])

    def by_device() -> Tensor:
        return on_device.finish(batch, device)["image"].cpu()

    def by_core() -> Tensor:
        return torch.stack([on_cpu.read(*one)["image"] for one in samples])

    exact = [_exact_crop(some, transform, crop_bits(0, 0, number)) for number, some in enumerate(contents)]
    rates, decibels = {}, {}
    for name, work in (("device", by_device), ("core", by_core)):
        images = work()
        began = time.perf_counter()
        work()
        rates[name] = count / (time.perf_counter() - began)
        error = (images.float() - torch.stack(exact).float()).square().mean(dim=(1, 2, 3))
        decibels[name] = float((10 * (255**2 / error.clamp(min=1e-6)).log10()).min())
    line = {"name": "jpeg_decoding", "ours": round(rates["device"], 1), "peer": round(rates["core"], 1)}
    line |= {"ratio": round(rates["device"] / rates["core"], 2), "unit": "images per second, GPU and one core"}
    emit(line | {"n": count, "worst_decibels": {name: round(value, 1) for name, value in decibels.items()}})


def _exact_crop(content: bytes, transform: ImageTransform, bits: Any) -> Tensor:
    """Pillow's crop of the whole image, resized with its bicubic filter."""
    image = Image.open(BytesIO(content)).convert("RGB")
    top, left, height, width = transform.box(image.height, image.width, bits)
    resized = image.crop((left, top, left + width, top + height)).resize(transform.size, Image.Resampling.BICUBIC)
    return torch.from_numpy(numpy.array(resized)).permute(2, 0, 1)


def glip(setting: Setting, emit: Emit) -> None:
    """A step of GLIP-T against transformers' Grounding DINO of the same parts."""
    bench = import_module("glip_step")
    sizes = (64, 1, 2, 1) if setting.dry else (800, 4, 6, 10)
    names = ("image_size", "batch_size", "blocks", "steps")
    options = Namespace(device=setting.device, **dict(zip(names, sizes, strict=True)))
    results = in_turns(list(bench.PEERS), 1 if setting.dry else 2, lambda which: bench.measure(which, options))
    for line in compare("glip_step", results, *bench.PEERS, setting, n=options.batch_size):
        emit(line)


def pseudo_boxes(setting: Setting, emit: Emit) -> None:
    """Pseudo boxes in batches against one image at a time."""
    tiny = ["--image-size", "64", "--rounds", "1", "--ahead", "1"]
    arguments = tiny if setting.dry else ["--device", "cuda", "--rounds", "2", "--ahead", "4"]
    benchmark("pseudo_boxes", arguments, emit, {"pseudo_boxes/reference": 5.0})


def regions(setting: Setting, emit: Emit) -> None:
    """Crops of regions a second against a transform for every box."""
    tiny = ["--boxes", "4", "--images", "1", "--rounds", "1"]
    arguments = tiny if setting.dry else ["--device", "cuda", "--model", "ViT-B-32", "--rounds", "3"]
    benchmark("region_features", arguments, emit, {"region_features/ViT-B-32": 10.0})


def _prompts(name: str, module: str, ways: Sequence[str], classes: int, setting: Setting, emit: Emit) -> None:
    bench = import_module(module)
    model, count = ("small", 4) if setting.dry else ("ViT-B-32", classes)
    measure = partial(bench.measure, model, count)
    results = in_turns([*ways, "plain"], 1 if setting.dry else 2, lambda which: measure(which, setting.device))
    for way in ways:
        for line in compare(name, results, way, "plain", setting, n=count):
            emit(line)


def coop(setting: Setting, emit: Emit) -> None:
    """A step of CoOp with 1,000 classes against the papers' computation."""
    _prompts("coop_step", "coop_step", ("whole", "parts"), 1000, setting, emit)


def cocoop(setting: Setting, emit: Emit) -> None:
    """A step of CoCoOp with 100 classes against the papers' computation."""
    _prompts("cocoop_step", "cocoop_step", ("batch",), 100, setting, emit)


def groupvit(setting: Setting, emit: Emit) -> None:
    """A step of GroupViT against transformers' port."""
    tiny = ["--tiny", "--batch-size", "2", "--rounds", "1"]
    arguments = tiny if setting.dry else ["--device", "cuda", "--batch-size", "128", "--steps", "5"]
    benchmark("groupvit_step", arguments, emit)


def pixel_text(setting: Setting, emit: Emit) -> None:
    """LSeg's loss in strips against all logits at once."""
    bench = import_module("pixel_text_loss")
    labels, side = (5, 32) if setting.dry else (1000, 480)
    options = Namespace(device=setting.device, block="none", images=1, labels=labels, side=side)
    results = in_turns(list(bench.LOSSES), 1 if setting.dry else 3, lambda which: bench.measure(which, options))
    for line in compare("pixel_text_loss", results, "strips", "plain", setting, n=labels):
        emit(line)


def blocks(setting: Setting, emit: Emit) -> None:
    """Time and memory of a step with recomputed, compiled and 8-bit blocks."""
    tiny = ["--architecture", "clipmill-tiny", "--rows", "4", "--rounds", "1", "--options", "again"]
    options = ["extras", "again", "compiled", "both"]
    if not setting.dry:
        problem = fp8_problem(torch.device("cuda"))
        options += [] if problem else ["eight"]
        if problem:
            warn(emit, problem)
    arguments = ["--device", "cuda", "--rows", "512", "--rounds", "10", "--options", *options]
    benchmark("block_options", tiny if setting.dry else arguments, emit)
