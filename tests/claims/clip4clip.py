"""CLIP4Clip: the mean of frames cannot tell directions, a transformer over the frames can.

Luo et al. 2021, arXiv 2104.08860: sequential heads win where time matters. The videos are drawn. Every motion and its
opposite show the same frames in the opposite order, so that a model without order is right half of the time when it
chooses between a motion and its opposite. Both heads are trained from random weights on the same videos with captions,
and find videos by text on a validation set: the mean of frames learns what does not move.
"""

from pathlib import Path

from claim import Claim, named, run

SAMPLES, EPOCHS, BATCH, EVALUATED = 4000, 8, 64, 600
HEADS = ("meanP", "seqTransf")
WORLD = ("--size", 64, "--number-sample-per-shard", 500, "--processes-count", 0)
CHANCE = 0.5
NEAR, ABOVE, TIMES = 0.04, 0.1, 3
SHAPES = ("star", "square", "heart", "triangle")


def measure(seed: int, folder: Path) -> dict[str, float]:
    """``meanP/directions``, the choice between opposite motions; ``meanP/t2v_r10``, retrieval; both for each head."""
    from pipeline.evaluation.models import load_any
    from pipeline.evaluation.suite import Evaluations, evaluate

    train, val = (drawn(folder / split, split, count) for split, count in (("train", SAMPLES), ("val", EVALUATED)))
    motions = drawn(folder / "motions", "motions", EVALUATED)
    metrics = {"chance": CHANCE, "chance_r10": 10 / EVALUATED}
    for head in HEADS:
        output = folder / f"{head}-{seed}"
        places = ("--data", train, "--output-folder", output, "--tracking-uri", f"sqlite:///{folder}/mlflow.db")
        how = ("--epochs", EPOCHS, "--batch-size", BATCH, "--workers", 0, "--seed", seed, "--head", head)
        run("train_clip4clip", "drawn", *places, *how)
        model = load_any(str(output), "cpu")
        found = evaluate(model, Evaluations(retrieval=(f"val={val},media=video+text",)).prepare())
        metrics |= {f"{head}/{name}": found[f"retrieval/val/{name}"] for name in ("t2v_r10", "v2t_r10")}
        metrics[f"{head}/directions"] = directions(model, motions)
    return metrics


def drawn(folder: Path, split: str, samples: int) -> Path:
    """A snapshot of drawn videos."""
    words = ("--video", "True", "--split", split, "--samples", samples, *WORLD)
    run("refresh_dataset", "drawn", *words, "--output-folder", folder)
    return folder


def directions(model: object, data: Path) -> float:
    """The share of videos that are nearer to the name of their motion than to that of the opposite one."""
    from pipeline.evaluation.encoder import inference
    from pipeline.evaluation.media import encode_inputs
    from pipeline.evaluation.zero_shot import classifier
    from pipeline.loaders.batches import LoaderConfig, snapshot_batches
    from pipeline.loaders.readers import LabelReader
    from pipeline.shards.snapshot import read_snapshot
    from pipeline.sources.drawn.motion import MOTIONS, OPPOSITES

    vectors = classifier(model, MOTIONS, [f"a video of a {shape} {{}}" for shape in SHAPES])
    readers = (model.video_reader(), LabelReader(classes=MOTIONS))
    batches = snapshot_batches(read_snapshot(str(data)), readers, batch_size=32, config=LoaderConfig(loader_workers=0))
    right = []
    with inference(model) as device:
        for batch in batches:
            scores = (encode_inputs(model, "video", batch, device) @ vectors.T).tolist()
            for row, label in zip(scores, batch["label"].tolist(), strict=True):
                if MOTIONS[label] in OPPOSITES:
                    right.append(row[label] > row[MOTIONS.index(OPPOSITES[MOTIONS[label]])])
    return sum(right) / len(right)


CLAIMS = (
    Claim(
        f"the mean of frames cannot tell a motion from its opposite: within {100 * NEAR:.0f} points of a half",
        named("chance"),
        named("meanP/directions"),
        test=lambda chance, found: abs(found - chance) <= NEAR,
    ),
    Claim(
        f"a transformer over the frames can: {100 * ABOVE:.0f} points above it",
        named("meanP/directions"),
        named("seqTransf/directions"),
        test=lambda mean, found: found >= mean + ABOVE,
    ),
    Claim(
        f"the mean of frames finds videos: R@10 {TIMES} times chance",
        named("chance_r10"),
        named("meanP/t2v_r10", "meanP/v2t_r10"),
        test=lambda chance, found: found >= TIMES * chance,
    ),
    Claim(
        "a transformer finds them better: R@10",
        named("meanP/t2v_r10", "meanP/v2t_r10"),
        named("seqTransf/t2v_r10", "seqTransf/v2t_r10"),
    ),
)
