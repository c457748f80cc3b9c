"""The part of a segmentation's evaluation that its metric takes, with LSeg as the model. Asked: 5 % at most.

    python tests/benchmarks/segmentation_metric.py                        # 20 classes, images of 480 px, one CPU thread
    python tests/benchmarks/segmentation_metric.py --classes 847 --device cuda --backbone vit_base_patch16_384

The evaluation runs as users start it; the clock of a process stands around the label counts (``metric``), around the
background rule as well (``rule``), and around all of it (``evaluation``). Images and labels are in memory, so that
reading and decoding, which run in threads beside, do not hide the metric. One JSON line.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor

from pipeline.evaluation import segmentation
from pipeline.evaluation.background import Background
from pipeline.evaluation.pixel_counts import PixelCounts
from pipeline.evaluation.segmentation import SegmentationSet, evaluate_segmentation
from pipeline.loaders.segmentation import LabelClasses
from pipeline.models.lseg import Config, Lseg

Batches = Iterator[tuple[list[Tensor], list[Tensor]]]


def timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    """``function``, whose time is added to ``spent``."""

    def call(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments, **named)
        spent[name] += time.perf_counter() - began
        return result

    return call


def main() -> None:
    """Evaluate, and print the parts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--side", type=int, default=480)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backbone", default="vit_small_patch16_384")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names = tuple(f"class {number}" for number in range(options.classes))
    config = Config(backbone=options.backbone, class_names=names, text_tower="clipmill-tiny:untrained")
    model = Lseg(config).eval().to(options.device)
    shape = (options.side, options.side)
    images = [torch.randint(0, 256, (3, *shape), dtype=torch.uint8) for _ in range(options.images)]
    maps = [torch.randint(-1, options.classes + 1, shape).to(torch.int16) for _ in images]

    def stored(*_: Any) -> Batches:
        for start in range(0, len(images), 4):
            yield images[start : start + 4], maps[start : start + 4]

    segmentation.labelled_images = stored
    spent = dict.fromkeys(("metric", "rule"), 0.0)
    PixelCounts.add = timed(PixelCounts.add, spent, "metric")  # type: ignore[method-assign]
    SegmentationSet.predicted = timed(SegmentationSet.predicted, spent, "rule")  # type: ignore[method-assign]
    one = SegmentationSet(
        names, LabelClasses(classes=(*names, "ground"), unlabelled="ground"), background=Background((0.1,))
    )
    rows = []
    for number in range(options.rounds + 1):
        spent.update(metric=0.0, rule=0.0)
        began = time.perf_counter()
        evaluate_segmentation(model, [], one)
        whole = time.perf_counter() - began
        if number:  # the first round warms up
            rows.append((spent["metric"] / whole, (spent["metric"] + spent["rule"]) / whole, whole / len(images)))
    metric, rule, seconds = (statistics.median(column) for column in zip(*rows, strict=True))
    about = {key: getattr(options, key) for key in ("classes", "side", "backbone", "device")}
    shares = {"metric_share": round(metric, 4), "metric_and_rule_share": round(rule, 4)}
    print(json.dumps({"benchmark": "segmentation_metric", **about, **shares, "seconds_per_image": round(seconds, 4)}))


if __name__ == "__main__":
    main()
