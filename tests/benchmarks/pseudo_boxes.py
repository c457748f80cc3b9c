"""Pseudo boxes by GLIP in batches of 16 images, against one image at a time: seconds per image, equal boxes.

    python tests/benchmarks/pseudo_boxes.py --device cuda     # GLIP-T, images of 800 pixels
    python tests/benchmarks/pseudo_boxes.py                   # on a CPU: a small network, images of 128 pixels

Captions have 3 to 60 words. Three lines:

- ``reference``: the peer is the authors' way over the same modules, one image at a time with its text padded to 256
  tokens. Asked: twice as fast on a CPU, five times on a GPU.
- ``one_by_one``: the peer pads the text of one image to its own length.
- ``buckets``: images of several proportions; the peer batches them in the order of the shard. Asked: 20 % less padded
  work (pixels times tokens), which is in the conditions.

Rounds in turns; bfloat16 on a GPU.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from pipeline.evaluation.grounding_teachers import CheckpointTeacher, DecodedImage
from pipeline.models.glip import Config, Glip
from pipeline.models.glip.config import SMALL
from pipeline.sources.drawn.words import vocabulary
from pipeline.stages.annotate.pseudo_box_maker import FoundBoxes, length_buckets, padded_work

BATCH = 16
LONGEST = 256
PROPORTIONS = ((1.0, 0.75), (0.75, 1.0), (1.0, 1.0), (0.66, 1.0), (1.0, 0.56))


@dataclass(frozen=True)
class Work:
    """Images, captions, and the spans of their phrases."""

    images: list[DecodedImage]
    captions: list[str]
    spans: list[list[tuple[int, int]]]

    def ground(self, teacher: CheckpointTeacher, batches: Sequence[Sequence[int]]) -> list[FoundBoxes]:
        """The boxes of all images, in their order."""
        found: dict[int, FoundBoxes] = {}
        for batch in batches:
            parts = ([some[number] for number in batch] for some in (self.images, self.captions, self.spans))
            found |= dict(zip(batch, teacher.ground(*parts), strict=True))
        return [found[number] for number in range(len(self.images))]


def make_work(count: int, side: int, proportions: Sequence[tuple[float, float]]) -> Work:
    """Noise with captions of random words, some of which are phrases."""
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    words, made = sorted(vocabulary()), Work([], [], [])
    for _ in range(count):
        height, width = (int(side * share) for share in draw.choice(proportions))
        pixels = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        made.images.append(DecodedImage(pixels, height, width))
        length = min(max(round(draw.lognormvariate(2.4, 0.7)), 3), 60)
        spans, caption = [], ""
        for place in range(length):
            word = draw.choice(words)
            start = len(caption) + bool(caption)
            caption = f"{caption} {word}".strip()
            if place % 4 == 1:
                spans.append((start, start + len(word)))
        made.captions.append(caption)
        made.spans.append(spans)
    return made


def make_teacher(options: argparse.Namespace) -> CheckpointTeacher:
    """GLIP-T with random weights, or the small network of drawn data."""
    torch.manual_seed(0)
    small = SMALL if options.device == "cpu" else {"text": "drawn", "small_text": (768, 12, 12)}
    # With random weights every score is near the prior; the threshold is where trained ones leave as many.
    config = Config(**{**small, "image_size": options.image_size, "least_score": 0.0101, "detections": 100})
    precision: Any = "bf16" if options.device == "cuda" else "fp32"
    return CheckpointTeacher(Glip(config).to(options.device).eval(), "random", precision)


@contextmanager
def padded_texts() -> Iterator[None]:
    """All texts padded to the longest that there is."""
    with patch("pipeline.loaders.grounding.MULTIPLE", LONGEST):
        yield


def check_equal(one: Sequence[FoundBoxes], other: Sequence[FoundBoxes], device: str) -> None:
    """The same scores and boxes on a CPU; bfloat16 rounds differently with another padding."""
    for ours, theirs in zip(one, other, strict=True):
        assert len(ours.scores) and abs(len(ours.scores) - len(theirs.scores)) <= len(ours.scores) * 0.05
        if device == "cpu":
            np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-3, atol=1e-4)
            # Boxes with equal scores may be in another order.
            apart = np.abs(ours.boxes[:, None] - theirs.boxes[None]).max(axis=2)
            assert np.quantile(apart.min(axis=1), 0.98) < 0.05


def seconds(work: Callable[[], object], device: str) -> float:
    """Of one call, with all that it has queued."""
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(
    name: str,
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    images: int,
    options: argparse.Namespace,
    more: str = "",
) -> None:
    """One line; both are called once before the rounds, and compared."""
    check_equal(ours(), peer(), options.device)
    taken: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(options.rounds):
        for which, work in (("ours", ours), ("peer", peer)):
            taken[which].append(seconds(work, options.device) / images)
    mine, theirs = (statistics.median(taken[which]) for which in ("ours", "peer"))
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    network = "GLIP-T" if options.device == "cuda" else "small"
    line = {"name": f"pseudo_boxes/{name}", "ours": round(mine, 4), "peer": round(theirs, 4)}
    line |= {"ratio": round(theirs / mine, 2), "unit": "seconds per image", "n": images * options.rounds}
    line["conditions"] = f"{network}, {options.image_size} pixels, {where}, torch {torch.__version__}{more}"
    print(json.dumps(line), flush=True)


def main() -> None:
    """Three lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--image-size", type=int, help="default: 128, on a GPU 800")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ahead", type=int, default=8, help="batches that are sorted together")
    options = parser.parse_args()
    options.image_size = options.image_size or (128 if options.device == "cpu" else 800)
    teacher = make_teacher(options)
    work = make_work(BATCH, options.image_size, [(0.75, 1.0)])
    alone, together = [[number] for number in range(BATCH)], [list(range(BATCH))]

    def reference() -> list[FoundBoxes]:
        with padded_texts():
            return work.ground(teacher, alone)

    compare("reference", lambda: work.ground(teacher, together), reference, BATCH, options)
    compare("one_by_one", lambda: work.ground(teacher, together), lambda: work.ground(teacher, alone), BATCH, options)
    count = BATCH * options.ahead
    mixed = make_work(count, options.image_size, PROPORTIONS)
    sizes = [teacher.size(image) for image in mixed.images]
    lengths = [teacher.length(caption) for caption in mixed.captions]
    plain = [list(range(first, first + BATCH)) for first in range(0, count, BATCH)]
    buckets = length_buckets(sizes, lengths, BATCH)
    saved = 1 - padded_work(sizes, lengths, buckets) / padded_work(sizes, lengths, plain)
    more = f", {saved:.0%} less padded work"
    compare(
        "buckets", lambda: mixed.ground(teacher, buckets), lambda: mixed.ground(teacher, plain), count, options, more
    )


if __name__ == "__main__":
    main()
