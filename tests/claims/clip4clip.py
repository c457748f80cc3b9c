"""CLIP4Clip: the mean of frames cannot tell directions, a transformer over the frames can.

Luo et al. 2021, arXiv 2104.08860: sequential heads win where time matters. The videos are drawn. Every motion and its
opposite show the same frames in the opposite order, so that a model without order is right half of the time when it
chooses between a motion and its opposite. Both heads start from a CLIP of drawn images and read the features of its
image tower; heads and text tower are trained on captions such as "a red star moving to the left". They find videos by
text among those of another split.
"""

from pathlib import Path

from claim import Claim, drawn_videos, embed_frames, named, run, trained_clip

IMAGES, IMAGE_EPOCHS = 12_000, 5
VIDEOS, EVALUATED, EPOCHS = 8000, 480, 12
RATE = 4  # frames per second
LEARNING_RATE, TEXT_RATE, HEAD_RATE = 7e-4, 0.1, 5  # the others are factors; with less the head learns no order
HEADS = ("meanP", "seqTransf")
CHANCE = 0.5
NEAR, ABOVE, TIMES = 0.04, 0.1, 3
SHAPES = ("star", "square", "heart", "triangle")


def measure(seed: int, folder: Path) -> dict[str, float]:
    """``meanP/directions``, the choice between opposite motions; ``meanP/t2v_r10``, retrieval; both for each head."""
    from pipeline.evaluation.models import load_any
    from pipeline.evaluation.suite import Evaluations, evaluate

    clip = trained_clip(folder, IMAGES, IMAGE_EPOCHS, seed=0)
    data = drawn_videos(folder / "train", "motions_train", VIDEOS)
    motions = drawn_videos(folder / "motions", "motions", EVALUATED)
    embed_frames(data, clip, RATE, "frames")
    metrics = {"chance": CHANCE, "chance_r10": 10 / EVALUATED}
    for head in HEADS:
        output = folder / f"{head}-{seed}"
        places = ("--data", data, "--output-folder", output, "--tracking-uri", f"sqlite:///{folder}/mlflow.db")
        start = ("--pretrained", clip, "--frame-features", "frames", "--head", head)
        how = ("--epochs", EPOCHS, "--workers", 0, "--seed", seed, "--learning-rate", LEARNING_RATE)
        how += ("--tower-rates", "text", TEXT_RATE, *(("head", HEAD_RATE) if head != "meanP" else ()))
        run("train_clip4clip", "drawn", *places, *start, *how)
        model = load_any(str(output), "cpu")
        found = evaluate(model, Evaluations(retrieval=(f"val={motions},media=video+text",)).prepare())
        metrics |= {f"{head}/{name}": found[f"retrieval/val/{name}"] for name in ("t2v_r10", "v2t_r10")}
        metrics[f"{head}/directions"] = directions(model, motions)
    return metrics


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
