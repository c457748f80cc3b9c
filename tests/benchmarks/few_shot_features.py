"""Few-shot methods from cached features: Tip-Adapter-F and CLIP-Adapter, 20 epochs of 16 shots of 100 classes.

    python tests/benchmarks/few_shot_features.py

A whole adaptation is timed as a job does it: class vectors of ViT-B-32's text tower, the epochs, the choice of the
epoch on 4 validation images a class and, for Tip-Adapter-F, the search of alpha and beta. Its peer is what is asked:
20 seconds on two cores; with one thread (the default) processor time is measured, which others on the machine do not
change much, with several wall time. The search is timed against the plain way as
well: the formula with one-hot labels, computed again for each of the 4,000 pairs. Features are random around a centre
for each class, the weights are random too: nothing here depends on what they mean. One JSON line each.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from coop_step import names
from torch import Tensor
from torch.nn import functional

from pipeline.evaluation.zero_shot import classifier
from pipeline.models.adapters.adapter import FrozenClip
from pipeline.models.adapters.tip_adapter import Config, TipAdapter, grid
from pipeline.models.clip import Clip
from pipeline.models.clip import Config as ClipConfig
from pipeline.training.adapt import Labelled, adapt
from pipeline.training.adapt_recipes import paper_config, paper_recipe

CLASSES, SHOTS, VIEWS, HELD, EPOCHS = 100, 16, 10, 4, 20
ASKED = 20.0
TEMPLATES = ("a photo of a {}.",)


def images(count: int, views: int, seed: int, width: int) -> Labelled:
    """``count`` of each class, as raw features."""
    centres = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(CLASSES).repeat(count)
    noise = torch.randn(len(labels), views, width, generator=torch.Generator().manual_seed(seed))
    return Labelled(labels=labels, features=5 * (centres[labels][:, None] + 2 * noise))


def seconds(work: Callable[[], object]) -> float:
    """What one call takes: processor time of one thread, or wall time of several."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    work()
    return clock() - began


def plain_search(tip: TipAdapter, held: Labelled) -> tuple[float, float]:
    """alpha and beta as the formula says, everything again for every pair."""
    features = functional.normalize(held.shots().first_view(), dim=-1)
    values = functional.one_hot(tip.values, CLASSES).float()
    best, chosen = -1.0, (0.0, 0.0)
    for beta in grid(tip.config.largest_beta, tip.config.betas):
        for alpha in grid(tip.config.largest_alpha, tip.config.alphas):
            affinity: Tensor = features @ tip.keys.T
            cache = (-beta * (1 - affinity)).exp() @ values
            logits = tip.clip.scale * features @ tip.vectors.T + alpha * cache
            accuracy = float((logits.argmax(dim=1) == held.labels).float().mean())
            if accuracy > best:
                best, chosen = accuracy, (alpha, beta)
    return chosen


def report(name: str, ours: float, peer: float, conditions: str) -> None:
    """One JSON line."""
    line = {"name": f"few_shot_features/{name}", "ours": round(ours, 3), "peer": round(peer, 3)}
    line |= {"ratio": round(peer / ours, 2), "unit": "s", "n": CLASSES * SHOTS, "conditions": conditions}
    print(json.dumps(line), flush=True)


def main() -> None:
    """Both methods, then the search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clip = FrozenClip(Clip(ClipConfig(architecture="ViT-B-32")), classifier)
    train, held = (images(count, views, views, clip.features) for count, views in ((SHOTS, VIEWS), (HELD, 1)))
    where = f"{CLASSES} classes, {SHOTS} shots, {clip.features} features, {options.threads} threads"
    for method in ("tip_adapter_f", "clip_adapter"):
        recipe = paper_recipe(method, SHOTS)
        assert recipe is not None
        short = replace(recipe, epochs=EPOCHS)
        words = (method, paper_config(method), short, clip, names(CLASSES), TEMPLATES, train, held)
        taken = median(seconds(lambda words=words: adapt(*words)) for _ in range(options.rounds))
        report(method, taken, ASKED, f"{where}, {EPOCHS} epochs, peer: what is asked, median of {options.rounds}")
    tip = TipAdapter(Config(), clip, names(CLASSES), TEMPLATES)
    tip.prepare(train.shots())
    alpha, beta, _ = tip.search(held.shots())
    assert plain_search(tip, held) == (alpha, beta)
    ours = median(seconds(lambda: tip.search(held.shots())) for _ in range(options.rounds))
    report("search", ours, seconds(lambda: plain_search(tip, held)), f"{where}, 4,000 pairs, {len(held)} images")


if __name__ == "__main__":
    main()
