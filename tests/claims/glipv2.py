"""GLIPv2's claims (Zhang et al. 2022) on scenes of coloured shapes (``coloured_shapes.py``), with one seed.

Two trainings on equal data, of equal length, with masks: ``contrast`` has the loss between images, ``plain`` has not.
``contrast`` goes on with captions and with questions. Their baselines need no image: masks that fill the boxes which
they belong to, the caption of another image, and the most frequent answer to questions of a kind.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from claim import Claim, named, run
from coloured_shapes import SEEN, Part, make, words_file
from glip import COMMON, NETWORK, evaluated, store

STEPS, CAPTION_STEPS, ANSWER_STEPS = 1000, 500, 700
PARTS = {
    "boxes": Part(1500, labels="seen"),
    "gold": Part(600, captions=True),
    "val": Part(200, captions=True),
}
PRETRAININGS = {"plain": ("--contrast-weight", 0), "contrast": ()}
TASKS = {"captions": ("captioning", CAPTION_STEPS), "answers": ("vqa", ANSWER_STEPS)}


def measure(seed: int, folder: Path) -> dict[str, float]:
    """Detection and phrases as ``contrast/det/ap`` and ``plain/grounding/r1``, masks, captions and answers."""
    folder.mkdir(parents=True, exist_ok=True)
    boxes, gold, val = (make(folder, name, part) for name, part in PARTS.items())
    metrics: dict[str, float] = {}
    for name, options in PRETRAININGS.items():
        output = folder / f"{name}-{seed}"
        what = ("--data", f"{boxes}=0.6,{gold}=0.4", "--class-names", *SEEN, "--output-folder", output)
        run("pretrain_glipv2", "drawn", *what, *COMMON, "--steps", STEPS, "--seed", seed, *options, *store(folder))
        sets = ("--detection", f"val={val},words={words_file(folder)}", "--referring-expressions", f"val={val}")
        metrics |= named_as(name, evaluated(output, *sets, "--phrase-grounding", f"val={val}"))
    metrics["filled/mask_miou"] = filled_boxes(folder / f"contrast-{seed}", val)
    for task, (evaluation, steps) in TASKS.items():
        output = folder / f"{task}-{seed}"
        what = ("--start-from", folder / f"contrast-{seed}", "--data", gold, "--output-folder", output)
        how = ("--batch-size", 8, "--steps", steps, "--workers", 0, "--loader-workers", 0, "--seed", seed)
        run("finetune_glipv2", f"drawn-{task}", *what, *NETWORK, *how, *store(folder))
        metrics |= named_as(task, evaluated(output, f"--{evaluation}", f"val={val}"))
    return metrics | without_images(val)


def named_as(name: str, found: dict[str, float]) -> dict[str, float]:
    """``contrast/det/ap`` for ``det/val/ap``."""
    parts = {key: key.split("/", 2) for key in found if "/val/" in key}
    return {f"{name}/{first}/{last}": found[key] for key, (first, _, last) in parts.items()}


def filled_boxes(checkpoint: Path, val: Path) -> float:
    """The mean overlap of expressions' masks that fill the boxes of a method."""
    import torch

    from pipeline.evaluation.grounding import ReferringAccuracy, locate, referring_phrases
    from pipeline.training.checkpoint import load_method

    method, accuracy = load_method(str(checkpoint), "cpu"), ReferringAccuracy()
    for located in locate(method, samples_of(val), referring_phrases):
        masks = torch.ones_like(located.found.masks)
        accuracy.add(replace(located, found=replace(located.found, masks=masks)))
    return accuracy.metrics()["mask_miou"]


def without_images(val: Path) -> dict[str, float]:
    """CIDEr of another image's caption, and the accuracy of the most frequent answer to each kind of questions."""
    from pipeline.evaluation.caption_scores import caption_metrics
    from pipeline.loaders.questions import read_questions
    from pipeline.shards.objects import FIELD

    samples = samples_of(val)
    texts = [one.fields["txt"].decode() for one in samples]
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for question in (question for one in samples for question in read_questions(one, FIELD)):
        kinds[question.kind][question.answers[0]] += 1
    most = {kind: counts.most_common(1)[0][1] for kind, counts in kinds.items()}
    return {
        "other/cider": caption_metrics([*texts[1:], texts[0]], [[text] for text in texts])["cider"],
        "frequent/accuracy": sum(most.values()) / sum(counts.total() for counts in kinds.values()),
        **{f"frequent/accuracy_{kind}": count / kinds[kind].total() for kind, count in most.items()},
    }


def samples_of(folder: Path) -> Sequence[Any]:
    """The samples of a snapshot."""
    from pipeline.loaders.samples import Samples
    from pipeline.shards.snapshot import read_snapshot

    samples = Samples(read_snapshot(str(folder)), open_shards=2)
    return [samples[number] for number in range(len(samples))]


CLAIMS = (
    Claim("the loss between images helps: AP", named("plain/det/ap"), named("contrast/det/ap")),
    Claim("… AP of unseen names", named("plain/det/ap_r"), named("contrast/det/ap_r")),
    Claim("… phrases, R@1", named("plain/grounding/r1"), named("contrast/grounding/r1")),
    Claim("masks are better than filled boxes, mIoU", named("filled/mask_miou"), named("contrast/referring/mask_miou")),
    Claim("captions are better than another image's, CIDEr", named("other/cider"), named("captions/captioning/cider")),
    Claim("answers beat the most frequent one", named("frequent/accuracy"), named("answers/vqa/accuracy")),
    *(
        Claim(f"… to questions about {kind}", *(named(f"{of}/accuracy_{kind}") for of in ("frequent", "answers/vqa")))
        for kind in ("colour", "shape", "presence", "side")
    ),
)
