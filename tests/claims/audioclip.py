"""AudioCLIP against CLIP: what images and texts lose, what sounds gain, and classes heard only beside images.

Guzhov et al. 2021, arXiv 2106.13043. The training set is drawn: a quarter each of image and text, sound and text, image
and sound, and all three. A sound with a novel shape never has a text, so its class is known by way of the image alone.
The baseline reads the images and texts of the same set, in half as many steps: it sees as many pairs of them. Retrieval
is on a validation set with all three, classification on sounds of one main shape: among the 18 base shapes, and among
the 6 novel ones.
"""

from collections.abc import Sequence
from pathlib import Path

from claim import Claim, named, run

SAMPLES, EPOCHS, BATCH, EVALUATED = 8000, 8, 128, 960
MARGIN = 0.05  # the largest loss of image-text quality that is still a yes
FAR = 3  # times chance
COMMON = ("--batch-size", BATCH, "--warmup-steps", 30, "--workers", 0, "--loader-workers", 1)
WORLD = ("--size", "64", "--number-sample-per-shard", "1000", "--processes-count", "0")
MODELS = {"clip": ("--modalities", "image", "text", "--epochs", EPOCHS / 2), "audioclip": ("--epochs", EPOCHS)}
IMAGES = ("drawn_shapes", "drawn_colours")
DIRECTIONS = ("audio_to_text", "text_to_audio", "audio_to_image", "image_to_audio")


def measure(seed: int, folder: Path) -> dict[str, float]:
    """Metrics of both models, as ``clip/retrieval/drawn_val/i2t_r10`` and ``sound/novel_top1``."""
    from pipeline.evaluation.models import load_model
    from pipeline.evaluation.suite import Evaluations, evaluate

    mixed = _drawn(folder / "mixed", "mixed", "train", SAMPLES)
    retrieved = _drawn(folder / "val", "beside", "val", EVALUATED)
    classified = _drawn(folder / "shapes", "beside", "shapes", EVALUATED)
    metrics: dict[str, float] = {}
    for name, words in MODELS.items():
        output = folder / f"{name}-{seed}"
        places = ("--data", mixed, "--output-folder", output, "--tracking-uri", f"sqlite:///{folder}/mlflow.db")
        run("train_audioclip", "drawn", *places, "--seed", seed, *COMMON, *words)
        model = load_model(str(output), "cpu")
        sets = Evaluations(zero_shot=IMAGES, retrieval=("drawn_val",), evaluation_samples=EVALUATED)
        metrics |= {f"{name}/{key}": value for key, value in evaluate(model, sets.prepare()).items()}
    return {**metrics, **_retrieved(model, retrieved), **_classified(model, classified)}


def _drawn(folder: Path, sound: str, split: str, samples: int) -> Path:
    words = ("--sound", sound, "--split", split, "--samples", samples, *WORLD)
    run("refresh_dataset", "drawn", *words, "--output-folder", folder)
    return folder


def _retrieved(model: object, data: Path) -> dict[str, float]:
    """R@10 between sounds and the two other modalities, in both directions."""
    import torch

    from pipeline.evaluation.retrieval import retrieval_metrics

    features, _ = _features(model, data)
    own = torch.arange(len(features["audio"])).repeat(2, 1).T
    found = {"sound/chance_r10": 10 / len(own)}
    for direction in DIRECTIONS:
        one, other = direction.split("_to_")
        found[f"sound/{direction}_r10"] = retrieval_metrics(features[one], features[other], own)["i2t_r10"]
    return found


def _classified(model: object, data: Path) -> dict[str, float]:
    """Accuracy by the nearest name, among the base shapes and among the novel ones."""
    from pipeline.evaluation.zero_shot import classifier
    from pipeline.sources.drawn.world import base_shapes, novel_shapes

    features, labels = _features(model, data)
    found: dict[str, float] = {}
    for kind, names in (("base", base_shapes()), ("novel", novel_shapes())):
        rows = [row for row, label in enumerate(labels) if label in names]
        vectors = classifier(model, names, ("the sound of a {}.", "you can hear a {}.", "a {}."))
        nearest = (features["audio"][rows] @ vectors.T).argmax(dim=1).tolist()
        right = [names[choice] == labels[row] for choice, row in zip(nearest, rows, strict=True)]
        found |= {f"sound/{kind}_top1": sum(right) / len(right), f"sound/{kind}_chance": 1 / len(names)}
    return found


def _features(model: object, data: Path) -> tuple[dict[str, object], Sequence[str]]:
    """Unit features of the samples with all three modalities, and their labels."""
    import torch

    from pipeline.evaluation.encoder import inference
    from pipeline.loaders.batches import LoaderConfig, snapshot_batches
    from pipeline.loaders.samples import Samples, json_of_sample
    from pipeline.shards.snapshot import read_snapshot

    snapshot = read_snapshot(str(data))
    (reader,) = model.readers(train=False)
    samples = Samples(snapshot)
    labels = [str(json_of_sample(samples[number])["label"]) for number in range(len(samples))]
    parts: dict[str, list[object]] = {"audio": [], "image": [], "text": []}
    batches = snapshot_batches(snapshot, [reader], batch_size=64, config=LoaderConfig(loader_workers=0))
    with inference(model):
        for batch in batches:
            for name, found in parts.items():
                assert batch[f"has_{name}"].all()
                found.append(getattr(model, f"encode_{name}")(batch[name]))
    features = {name: torch.cat(found) for name, found in parts.items()}
    assert len(labels) == len(features["audio"])
    return features, labels


def _kept(text: str, *names: str) -> Claim:
    """AudioCLIP is at most ``MARGIN`` below the model of two modalities."""
    sides = [named(*(f"{model}/{name}" for name in names)) for model in MODELS]
    return Claim(text, *sides, test=lambda baseline, result: result >= baseline - MARGIN)


def _far(text: str, name: str, chance: str) -> Claim:
    return Claim(text, named(chance), named(name), test=lambda baseline, result: result >= FAR * baseline)


CLAIMS = (
    _kept(
        f"images and texts lose at most {100 * MARGIN:.0f} points: zero-shot",
        *(f"zeroshot/{one}/top1" for one in IMAGES),
    ),
    _kept("… retrieval, R@10", "retrieval/drawn_val/i2t_r10", "retrieval/drawn_val/t2i_r10"),
    *(
        _far(f"{one.replace('_', ' ')}, R@10: {FAR} times chance", f"sound/{one}_r10", "sound/chance_r10")
        for one in DIRECTIONS
    ),
    Claim("sounds of base shapes are named: above chance", named("sound/base_chance"), named("sound/base_top1")),
    Claim("sounds of novel shapes, never heard with a text", named("sound/novel_chance"), named("sound/novel_top1")),
)
