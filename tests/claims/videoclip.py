"""VideoCLIP's batches of similar videos: harder negatives, and better retrieval than by random batches.

Xu et al. 2021, arXiv 2109.14084, section 3.4. Videos are drawn; features of their frames are those of a small CLIP that
was trained on drawn images. Both models of a seed are trained alike but for their batches. The loss of a model is
measured on batches that are not trained on: random ones, and those that are planned by the model itself. Retrieval is
that of texts and whole videos that were not trained on.
"""

from pathlib import Path

from claim import Claim, drawn_videos, embed_frames, named, run, trained_clip

IMAGES, IMAGE_EPOCHS = 12_000, 5
VIDEOS, EVALUATED, EPOCHS = 1600, 480, 25
BATCH, BATCHES = 32, 12
RATE = 4  # features per second
KINDS = ("random", "retrieved")


def measure(seed: int, folder: Path) -> dict[str, float]:
    """For each kind of batches of the training: ``<kind>/loss/<kind of batches>`` and retrieval metrics."""
    from pipeline.evaluation.models import load_any
    from pipeline.evaluation.suite import Evaluations, evaluate

    store = ("--tracking-uri", f"sqlite:///{folder}/mlflow.db")
    clip = trained_clip(folder, IMAGES, IMAGE_EPOCHS, seed=0)
    data, held_out = (_filmed(folder, clip, *one) for one in (("train", VIDEOS), ("val", EVALUATED)))
    metrics: dict[str, float] = {}
    for kind in KINDS:
        output = folder / f"{kind}-{seed}"
        words = ("--data", data, "--output-folder", output, "--seed", seed, "--epochs", EPOCHS, "--batch-size", BATCH)
        run("pretrain_videoclip", "drawn", *words, *store, "--batches", kind, "--log-every-steps", 100)
        model = load_any(str(output), "cpu")
        found = evaluate(model, Evaluations(retrieval=(f"val={held_out},media=video+text",)).prepare())
        metrics |= {f"{kind}/{name}": value for name, value in found.items()}
        metrics |= {f"{kind}/loss/{batches}": value for batches, value in _losses(model, data, seed).items()}
    return metrics


def _filmed(folder: Path, clip: Path, split: str, samples: int) -> Path:
    """Drawn videos of a split with features of their frames."""
    data = drawn_videos(folder / split, split, samples)
    embed_frames(data, clip, RATE, "frames")
    return data


def _losses(model: object, data: Path, seed: int) -> dict[str, float]:
    """The mean loss over pairs on batches of an epoch that is not trained on, by the kind of batches."""
    import numpy as np
    import torch

    from pipeline.loaders.batches import LoaderConfig, training_batches
    from pipeline.loaders.order import permutation
    from pipeline.loaders.planned_order import PlannedOrder
    from pipeline.shards.snapshot import read_snapshot

    snapshot, epoch = read_snapshot(str(data)), 1000
    (reader,) = model.readers(train=True, seed=seed)
    planner = model.config.clusters()
    order = PlannedOrder(snapshot.samples, BATCH)
    steps = order.epoch_steps

    def batches(numbers: np.ndarray, count: int) -> object:
        order.follow(epoch, numbers.reshape(steps, BATCH))
        span = range(epoch * steps, epoch * steps + count)
        return training_batches(snapshot, [reader], order, steps=span, config=LoaderConfig(loader_workers=0))

    everything = np.arange(steps * BATCH)
    shuffled = permutation(seed, 0, epoch, 0, len(everything))
    losses = {}
    with torch.no_grad():
        features = torch.cat([planner.features(model, batch) for batch in batches(everything, steps)])
        planned = planner.plan(features, steps, BATCH, seed=seed, epoch=epoch)
        for kind, numbers in (("random", shuffled), ("retrieved", planned)):
            found = [float(model.training_step(batch)["contrastive"]) for batch in batches(numbers, BATCHES)]
            losses[kind] = sum(found) / len(found)
    return losses


DIRECTIONS = ("v2t_r1", "t2v_r1", "v2t_r5", "t2v_r5")
CLAIMS = (
    *(
        Claim(
            f"similar videos are harder negatives: 100 x loss, trained on {kind} batches",
            named(f"{kind}/loss/random"),
            named(f"{kind}/loss/retrieved"),
        )
        for kind in KINDS
    ),
    *(
        Claim(f"retrieved batches retrieve better, {one}", *(named(f"{kind}/retrieval/val/{one}") for kind in KINDS))
        for one in DIRECTIONS
    ),
)
