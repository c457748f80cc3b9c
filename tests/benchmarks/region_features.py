"""Region features, crops a second, against Pillow's crop and open_clip's transform for every box.

    python tests/benchmarks/region_features.py                                  # a small tower on one CPU thread
    python tests/benchmarks/region_features.py --device cuda --model ViT-B-32 --boxes 300 --images 32

Both start from encoded JPEGs (photograph-like, 640 x 480) and the same boxes, cut the box and the box enlarged by 1.5,
and encode with the same weights; the plain way transforms box by box and encodes all crops of an image at once, so
that only what is asked about differs. Rounds in turns. Features are compared with exact ones: Pillow's bicubic of the
stretched box, in float32. Asked: 3 times as fast on a CPU, 10 times on a GPU, cosine 0.999 or more.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import open_clip
import simplejpeg
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional

from pipeline.evaluation.models import load_model
from pipeline.evaluation.regions import ClipRegions, GivenBoxes, LoadRegionModel
from pipeline.models.towers.crops import CropRule, crop_boxes

SCALES = (1.0, 1.5)
HEIGHT, WIDTH = 480, 640


def photographs(count: int) -> list[bytes]:
    """JPEGs with smooth areas, edges and some grain."""
    made = []
    for number in range(count):
        random = np.random.default_rng(number)
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT))
        pixels = np.asarray(coarse.filter(ImageFilter.GaussianBlur(2))).astype(np.int16)
        for _ in range(12):
            y, x, h, w = random.integers([0, 0, 20, 20], [HEIGHT - 40, WIDTH - 40, 200, 260])
            pixels[y : y + h, x : x + w] += random.integers(-60, 61, 3).astype(np.int16)
        pixels += random.integers(-6, 7, pixels.shape, dtype=np.int16)
        made.append(simplejpeg.encode_jpeg(pixels.clip(0, 255).astype(np.uint8), quality=90))
    return made


def boxes_of(number: int, count: int) -> np.ndarray:
    """Boxes of all sizes from 16 pixels on, log-uniform as proposals are, inside the image."""
    random = np.random.default_rng(1000 + number)
    sides = np.exp(random.uniform(np.log(16), np.log(400), (count, 2)))
    low = random.uniform(0, 1, (count, 2)) * ([WIDTH, HEIGHT] - sides)
    return np.concatenate([low, low + sides], axis=1)


@torch.no_grad()
def plain(clip: Any, transform: Callable[[Image.Image], Tensor], image: bytes, boxes: np.ndarray) -> Tensor:
    """The way of the papers' code: Pillow and the model's own transform for each box, then one batch."""
    whole = Image.open(BytesIO(image)).convert("RGB")
    crops = [
        transform(whole.crop(tuple(box)))
        for scale in SCALES
        for box in crop_boxes(torch.from_numpy(boxes), scale, HEIGHT, WIDTH).tolist()
    ]
    batch = torch.stack(crops).to(clip.mean.device)
    encoded = functional.normalize(clip.model.encode_image(batch).float(), dim=-1)
    return functional.normalize(encoded.unflatten(0, (len(SCALES), -1)).sum(dim=0), dim=-1)


@torch.no_grad()
def exact(clip: Any, image: bytes, boxes: np.ndarray, size: int) -> Tensor:
    """Stretched by Pillow, encoded in float32: what ours has to equal."""
    whole = Image.open(BytesIO(image)).convert("RGB")
    crops = [
        np.asarray(whole.crop(tuple(box)).resize((size, size), Image.Resampling.BICUBIC))
        for scale in SCALES
        for box in crop_boxes(torch.from_numpy(boxes), scale, HEIGHT, WIDTH).tolist()
    ]
    encoded = clip.encode_image(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).to(clip.mean.device))
    return functional.normalize(encoded.unflatten(0, (len(SCALES), -1)).sum(dim=0), dim=-1)


def main() -> None:
    """Rounds of both in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="clipmill-tiny", help="architecture, with random weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--boxes", type=int, default=100)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    clip: Any = load_model(f"{options.model}:untrained", options.device)
    _, _, transform = open_clip.create_model_and_transforms(options.model)
    settings = LoadRegionModel(
        teacher=options.model, crop=CropRule(scales=SCALES), device=options.device, precision=options.precision
    )
    ours = ClipRegions(clip, GivenBoxes(), settings)
    images = photographs(options.images)
    boxes = [boxes_of(number, options.boxes) for number in range(options.images)]

    def run_ours() -> list[np.ndarray]:
        return ours.encode([ours.prepare(image) for image in images], boxes)

    def run_plain() -> list[Tensor]:
        return [plain(clip, transform, image, some).cpu() for image, some in zip(images, boxes, strict=True)]

    found = run_ours()
    wanted = [exact(clip, image, some, ours._size).cpu() for image, some in zip(images, boxes, strict=True)]
    cosines = torch.cat([(torch.from_numpy(a) * b).sum(dim=1) for a, b in zip(found, wanted, strict=True)])
    run_plain()
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(options.rounds):
        for name, run in (("ours", run_ours), ("plain", run_plain)):
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    crops = len(SCALES) * options.boxes * options.images
    speed = {name: crops / statistics.median(took) for name, took in seconds.items()}
    where = torch.cuda.get_device_name() if options.device == "cuda" else "one CPU thread"
    conditions = (
        f"{options.model} {options.precision}, {options.boxes} boxes of {options.images} images, {where}, cosine "
        f"to exact features {cosines.min():.5f} at worst; {2 * found[0].shape[1]} bytes a region stored, half of fp32"
    )
    report = {"name": f"region_features/{options.model}", "ours": round(speed["ours"]), "peer": round(speed["plain"])}
    ratio = round(speed["ours"] / speed["plain"], 2)
    print(json.dumps({**report, "ratio": ratio, "unit": "crops/s", "n": crops, "conditions": conditions}))


if __name__ == "__main__":
    main()
