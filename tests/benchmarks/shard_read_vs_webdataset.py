#!/usr/bin/env python
"""Tar to training batch: this loader against open_clip's own, in CPU seconds of all processes.

    python tests/benchmarks/shard_read_vs_webdataset.py

Both read the same shards (img2dataset's layout: jpg, txt, json; JPEG quality 95) with the same number of worker
processes into batches of images of 224 px and tokens: open_clip's with `open_clip_train.data.get_wds_dataset` and
the training transform and tokenizer of ViT-B-32, ours with `training_batches`. Each measurement is a process of its
own: what is counted is the CPU time (user and system, its worker processes included) from the first request for a
batch until the loader's processes have ended, imports excluded. Rounds alternate; ratios are medians over rounds.

How alike the images are is measured on the same boxes, from the JPEG's bytes to 224 px: PSNR against Pillow's
decoder and torchvision's `resized_crop` (bicubic, antialiased), which is what open_clip uses.

One JSON line: the worst ratio, then a row for every shard size, crop scale and number of workers.
"""

import argparse
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.shards.sample import Sample, sample_key
from pipeline.shards.snapshot import Shard, Snapshot, publish_shards, read_snapshot
from pipeline.shards.storage import Folder, file_digest
from pipeline.shards.tar import TarWriter

Pixels = NDArray[np.uint8]
TARGET = 224
ARCHITECTURE = "ViT-B-32"
SAMPLES_PER_SHARD = 250
BATCH = 128
SHAPES = {256: [(256, 256), (256, 384), (341, 256)], 512: [(512, 512), (512, 768), (682, 512)]}


def noise(generator: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    """Noise [H, W] with the amplitude spectrum 1/f of natural images, mean 0 and deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    spectrum = np.exp(2j * np.pi * generator.random(frequency.shape)) / frequency
    field = np.fft.irfft2(spectrum, s=(height, width))
    return np.asarray((field - field.mean()) / field.std())


def image(seed: int, height: int, width: int) -> Pixels:
    """An image with the statistics of a photograph: shapes that hide one another, 1/f texture, a sensor's noise."""
    generator = np.random.default_rng(seed)
    canvas = np.full((height, width, 3), generator.integers(0, 256, 3), np.uint8)
    for _ in range(120):
        radius = int(min(height, width) * 0.5 * generator.random() ** 3) + 2
        colour = generator.normal(120, 60, 3).clip(0, 255).tolist()
        centre = (int(generator.integers(width)), int(generator.integers(height)))
        axes = (radius, int(radius * generator.uniform(0.3, 1)))
        cv2.ellipse(canvas, centre, axes, generator.uniform(0, 180), 0, 360, colour, -1, cv2.LINE_AA)
    texture = noise(generator, height, width)[..., None] * generator.uniform(8, 25)
    tint = noise(generator, height, width)[..., None] * generator.normal(0, 4, 3)
    grain = generator.normal(0, generator.uniform(0, 3), (height, width, 1))
    return np.clip(canvas + texture + tint + grain, 0, 255).astype(np.uint8)


def captions(count: int) -> Iterator[str]:
    """Alt texts of 4 to 20 words of the tokenizer's vocabulary, frequent ones often; a tenth with odd characters."""
    from open_clip.tokenizer import SimpleTokenizer

    words = [token[:-4] for token in SimpleTokenizer().encoder if token.endswith("</w>") and token[:-4].isalpha()]
    generator = np.random.default_rng(0)
    for number in range(count):
        ranks = np.minimum(generator.zipf(1.2, int(generator.integers(4, 21))), len(words)) - 1
        text = " ".join(words[rank] for rank in ranks).capitalize()
        yield f"{text} – “café” &amp; it's" if number % 10 == 0 else f"{text}, {number % 2000}"


def make_shards(place: Path, side: int, samples: int) -> Snapshot:
    """Shards of images with short side ``side``, and their snapshot."""
    folder = Folder(str(place))
    texts = list(captions(samples))
    shards = []
    for first in range(0, samples, SAMPLES_PER_SHARD):
        name = f"{first // SAMPLES_PER_SHARD:05d}"
        with open(place / f"{name}.tar", "wb") as file:
            writer = TarWriter(file)
            for index in range(SAMPLES_PER_SHARD):
                writer.write(_sample(first + index, int(name), index, side, texts[first + index]))
            writer.close()
        tar = place / f"{name}.tar"
        shards.append(Shard(name=name, samples=SAMPLES_PER_SHARD, bytes=tar.stat().st_size, sha256=file_digest(tar)))
    fields = ("jpg", "json", "txt")
    return publish_shards(folder, tuple(shards), fields=fields, card=None, options={}, rows=samples, dropped={})


def _sample(number: int, shard: int, index: int, side: int, caption: str) -> Sample:
    height, width = SHAPES[side][number % 3]
    jpeg = cv2.imencode(".jpg", image(number, height, width), [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    key = sample_key(shard, index, SAMPLES_PER_SHARD)
    facts = {"key": key, "caption": caption, "url": f"http://host/{number}.jpg", "width": width, "height": height}
    facts |= {"status": "success", "error_message": None, "exif": "{}", "sha256": "0" * 64}
    return Sample(key, {"jpg": jpeg, "txt": caption.encode(), "json": json.dumps(facts).encode()})


def read_ours(folder: str, workers: int, scale: tuple[float, float], epochs: int) -> tuple[int, float]:
    """Samples read and CPU seconds used by our loader."""
    import open_clip

    from pipeline.loaders.batches import LoaderConfig, training_batches
    from pipeline.loaders.images import ImageTransform
    from pipeline.loaders.order import Order
    from pipeline.loaders.readers import ImageReader, TextReader

    snapshot = read_snapshot(folder)
    transform = ImageTransform(size=(TARGET, TARGET), crop="resized", scale=scale)
    readers = [
        ImageReader(transform=transform),
        TextReader(tokenizer=open_clip.get_tokenizer(ARCHITECTURE), end_of_text=49407),
    ]
    order = Order([shard.samples for shard in snapshot.shards], seed=0, batch_size=BATCH)
    steps = range(snapshot.samples // BATCH * epochs)
    started, count = cpu_seconds(), 0
    for batch in training_batches(snapshot, readers, order, steps=steps, config=LoaderConfig(loader_workers=workers)):
        count += len(batch["image"])
    return count, cpu_seconds() - started


def read_theirs(folder: str, workers: int, scale: tuple[float, float], epochs: int) -> tuple[int, float]:
    """Samples read and CPU seconds used by open_clip's loader."""
    import open_clip
    from open_clip_train import data as training_data

    # open_clip's reader knows webdataset to 0.2.86; later ones put marks between files, which it takes for files.
    training_data.tar_file_expander = partial(training_data.tar_file_expander, eof_value=None)
    last = len(read_snapshot(folder).shards) - 1
    options = SimpleNamespace(
        train_data=f"{folder}/{{00000..{last:05d}}}.tar",
        train_num_samples=None,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=BATCH,
        workers=workers,
        world_size=1,
    )
    transform = open_clip.image_transform(TARGET, is_train=True, aug_cfg={"scale": scale})
    tokenizer = open_clip.get_tokenizer(ARCHITECTURE)
    data = training_data.get_wds_dataset(options, transform, True, floor=True, tokenizer=tokenizer)
    started, count = cpu_seconds(), 0
    for epoch in range(epochs):
        data.set_epoch(epoch)
        for images, _ in data.dataloader:
            count += len(images)
    del data  # ends its processes, whose time counts once they are gone
    return count, cpu_seconds() - started


def cpu_seconds() -> float:
    """User and system time of this process and of its processes that have ended."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def alikeness(folder: str, scale: tuple[float, float], count: int) -> tuple[float, float]:
    """Mean and least PSNR in dB of ``count`` samples against Pillow and torchvision on the same boxes."""
    from PIL import Image
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resized_crop

    from pipeline.loaders.images import ImageTransform, crop_bits
    from pipeline.loaders.samples import Samples

    samples = Samples(read_snapshot(folder))
    transform = ImageTransform(size=(TARGET, TARGET), crop="resized", scale=scale)
    found = []
    for number in range(count):
        content, random_bits = samples[number].fields["jpg"], crop_bits(0, 0, number)
        image = Image.open(BytesIO(content)).convert("RGB")
        box = transform.box(image.height, image.width, random_bits)
        expected = np.asarray(resized_crop(image, *box, [TARGET, TARGET], InterpolationMode.BICUBIC, antialias=True))
        made = transform.read(content, random_bits).permute(1, 2, 0).numpy()
        found.append(float(10 * np.log10(255**2 / max(np.mean((made.astype(float) - expected) ** 2), 1e-9))))
    return statistics.mean(found), min(found)


def measure(folder: str, which: str, workers: int, scale: tuple[float, float], epochs: int) -> float:
    """Samples per CPU second of one process that reads ``folder``."""
    command = [sys.executable, __file__, "--read", which, "--folder", folder, "--epochs", str(epochs)]
    command += ["--workers", str(workers), "--scale", str(scale[0]), str(scale[1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    count, seconds = json.loads(done.stdout.splitlines()[-1])
    return float(count / seconds)


def compare(folder: str, workers: int, scale: tuple[float, float], rounds: int, epochs: int) -> dict[str, Any]:
    """One row: both loaders in turn, ``rounds`` times."""
    pairs = [
        tuple(measure(folder, which, workers, scale, epochs) for which in ("ours", "theirs")) for _ in range(rounds)
    ]
    ours, theirs = (round(statistics.median(column)) for column in zip(*pairs, strict=True))
    return {
        "workers": workers,
        "scale": list(scale),
        "ours": ours,
        "peer": theirs,
        "ratio": round(statistics.median(mine / other for mine, other in pairs), 2),
    }


def main() -> None:
    """Parse, measure, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2, help="passes over the shards for one measurement")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--read", choices=["ours", "theirs"], help="one measurement of --folder, for this program")
    parser.add_argument("--folder", default="", help="keeps the shards there; a temporary folder otherwise")
    parser.add_argument("--scale", type=float, nargs=2, default=None, help="this crop scale only")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.read:
        read = read_ours if options.read == "ours" else read_theirs
        print(json.dumps(read(options.folder, options.workers[0], tuple(options.scale), options.epochs)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        rows = [row for side in options.sides for row in _rows(Path(options.folder or temporary), side, options)]
    worst = min(rows, key=lambda row: row["ratio"])
    result = {key: worst[key] for key in ("ours", "peer", "ratio")}
    conditions = (
        f"open_clip_train.data.get_wds_dataset, {ARCHITECTURE}, batches of {BATCH} at {TARGET} px, JPEG quality 95, "
        f"local disk, one thread a process, median of {options.rounds} alternating rounds; the worst of the rows"
    )
    unit, n = "samples per CPU second", sum(row["n"] for row in rows)
    print(json.dumps({"name": "shard_read", **result, "unit": unit, "n": n, "conditions": conditions, "rows": rows}))


def _rows(place: Path, side: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    folder, samples = place / str(side), 2000 if side == 256 else 1000
    if not folder.exists():
        folder.mkdir(parents=True)
        make_shards(folder, side, samples)
    scales = [tuple(options.scale)] if options.scale else [(0.9, 1.0), (0.08, 1.0)]
    for scale in scales:
        mean, least = alikeness(str(folder), scale, 200)
        for workers in options.workers:
            row = compare(str(folder), workers, scale, options.rounds, options.epochs)
            decibels = {"mean_db": round(mean, 1), "worst_db": round(least, 1)}
            yield {"side": side, **row, **decibels, "n": samples * options.epochs * options.rounds}


if __name__ == "__main__":
    main()
