"""GLIP over 1,200 names, with what is stored against without: seconds for each image, equal boxes.

    python tests/benchmarks/glip_vocabulary.py --device cuda      # GLIP-T, images of 800 pixels, names of LVIS's length
    python tests/benchmarks/glip_vocabulary.py                    # on a CPU: a small network, images of 256 pixels

The peer is the authors' way over the same modules: one whole forward pass of each prompt of 40 names, with the text
padded to 256 tokens. Ours computes the pyramid once an image and each text once, and pads a text to its own length;
without fusion (``late``) the whole image once. Two lines, ``deep`` and ``late``; rounds in turns, bfloat16 on a GPU.
Time is processor time on a CPU. The weights are random, so the threshold is set to where one anchor in a thousand of a
name is a candidate, as with trained ones.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import BertConfig

from pipeline.evaluation.encoder import inference
from pipeline.loaders.grounding import averaging_matrix, phrase_tokens
from pipeline.loaders.grounding_prompts import SpanTokenizer, name_chunks
from pipeline.models.detections import Detections
from pipeline.models.glip import Config, Glip
from pipeline.models.glip.config import SMALL
from pipeline.models.glip.model import TOKENIZER
from pipeline.models.glip.network import align
from pipeline.models.glip.phrases import suppress, together
from pipeline.models.glip.text import SETTINGS, settings_text
from pipeline.models.proposals import unplaced

LONGEST = 256
SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "zu")


def make_names(count: int) -> list[str]:
    """Made-up names of one to three pieces, as LVIS's have."""
    draw = random.Random(0)
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(draw.choice(SYLLABLES) for _ in range(draw.randint(1, 3)))] = None
    return list(found)


def make_method(fusion: bool, options: argparse.Namespace) -> Glip:
    """GLIP-T with random weights, or the small network of drawn data."""
    words = [*SYLLABLES, *(f"##{syllable}" for syllable in SYLLABLES)]
    tokenizer = SpanTokenizer.of_words(["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", *words])
    width, layers, heads = (64, 2, 4) if options.small else (768, 12, 12)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    settings = BertConfig(
        vocab_size=tokenizer.vocab_size, intermediate_size=4 * width, max_position_embeddings=LONGEST, **sizes
    )
    changes = {**SMALL, "text": "drawn"} if options.small else {}
    fixed = {"fusion": fusion, "image_size": options.image_size, "detections": 300}
    config = Config(**{**changes, **fixed})
    return Glip(config, {TOKENIZER: tokenizer.description, SETTINGS: settings_text(settings)}).eval()


@torch.no_grad()
def rare_score(method: Glip, image: Tensor, words: Sequence[str]) -> float:
    """The probability that one in a thousand anchors of a name exceeds."""
    (group,) = method._groups([image])
    levels = method.model.image(method.normalised(group.pixels))
    prompt = method._encoded_prompts(tuple(words))[0]
    ((found, weights),) = method.model.compare(levels, [prompt.text])
    probability = align(found.features, weights).sigmoid() @ prompt.averaging.transpose(1, 2)
    return float(probability.flatten().kthvalue(int(0.999 * probability.numel())).values)


@torch.no_grad()
def plain_predict(method: Glip, images: Sequence[Tensor], words: Sequence[str]) -> list[Detections]:
    """One forward pass of everything for each prompt."""
    found: dict[int, Detections] = {}
    chunks = name_chunks(words, method.tokenizer, method.config.chunk_words, LONGEST)
    for group in method._groups(images):
        parts = []
        for _, prompt in chunks:
            text = method.tokenizer(prompt.text, LONGEST)
            tokens = torch.full((1, LONGEST), method.tokenizer.pad)
            tokens[0, : len(text)] = torch.from_numpy(text.ids)
            mask = (torch.arange(LONGEST) < len(text))[None].to(method.mean.device)
            averaging = averaging_matrix([phrase_tokens(text, prompt.spans)], LONGEST).to(method.mean.device)
            count = len(group.numbers)
            levels = method.model.image(method.normalised(group.pixels))
            encoded = method.model.encode_text(tokens.to(method.mean.device).expand(count, -1), mask.expand(count, -1))
            ((features, weights),) = method.model.compare(levels, [encoded])
            parts.append(method._candidates(levels, features, weights, averaging.expand(count, -1, -1)))
        best = suppress(together(parts, [numbers.start for numbers, _ in chunks]), group.extents, method.config)
        for number, place, one in zip(group.numbers, group.places, best, strict=True):
            found[number] = Detections(unplaced(one.boxes, place), one.scores, one.phrases)
    return [found[number] for number in range(len(images))]


def seconds(work: Callable[[], object], device: str) -> float:
    """Of one call, with all that it has queued."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    began = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def compare(name: str, options: argparse.Namespace) -> None:
    """One line."""
    torch.manual_seed(0)
    method = make_method(name == "deep", options).to(options.device)
    words = make_names(options.names)
    draw = torch.Generator().manual_seed(1)
    size = options.image_size
    images = [torch.randint(0, 256, (3, size, size), generator=draw, dtype=torch.uint8) for _ in range(options.images)]
    method.config = replace(method.config, least_score=rare_score(method, images[0], words[:40]))
    works = {"ours": lambda: method.predict(images, words), "peer": lambda: plain_predict(method, images, words)}
    with inference(method, "bf16" if options.device == "cuda" else "fp32"):
        for one, other in zip(*(work() for work in works.values()), strict=True):
            assert len(one) == len(other) > 0
            if options.device == "cpu":  # bfloat16 rounds differently with another padding
                torch.testing.assert_close(one.scores, other.scores, rtol=1e-3, atol=1e-4)
        taken: dict[str, list[float]] = {which: [] for which in works}
        for _ in range(options.rounds):
            for which, work in works.items():
                taken[which].append(seconds(work, options.device) / options.images)
    ours, peer = (statistics.median(taken[which]) for which in works)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    line = {"name": f"glip_vocabulary/{name}", "ours": round(ours, 4), "peer": round(peer, 4)}
    line |= {"ratio": round(peer / ours, 2), "unit": "seconds per image", "n": options.images * options.rounds}
    network = "small" if options.small else "GLIP-T"
    line["conditions"] = f"{network}, {options.names} names, {size} pixels, {where}, torch {torch.__version__}"
    print(json.dumps(line), flush=True)


def main() -> None:
    """Deep fusion, then late."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--image-size", type=int, help="default: 256, on a GPU 800")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--names", type=int, default=1200)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.small = options.device == "cpu"
    options.image_size = options.image_size or (256 if options.small else 800)
    for name in ("deep", "late"):
        compare(name, options)


if __name__ == "__main__":
    main()
