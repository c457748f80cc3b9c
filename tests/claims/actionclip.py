"""ActionCLIP: labels as texts beat a linear head in few shots, and name classes that the fine-tuning has not seen.

Wang et al. 2021, arXiv 2109.08472. What a video shows is its class here: the shape that moves, which one frame gives
away, as it does for most of the actions in the paper's data sets. A CLIP of drawn images is the start of all models.
They read a few videos of every class, in the same number of steps, with the same frames, head and seeds. For unseen
classes the texts are those of the 18 base shapes; the 6 novel ones are classified among themselves.
"""

from pathlib import Path

from claim import Claim, drawn_videos, named, run, trained_clip

IMAGES, EPOCHS = 12_000, 5
POOL, EVALUATED, STEPS, BATCH = 960, 600, 100, 24
SHOTS = (1, 4)
RATE, HEAD_RATE = 2e-4, 5.0


def measure(seed: int, folder: Path) -> dict[str, float]:
    """Top-1, as ``text/4`` and ``linear/4`` by shots, and ``novel`` for unseen shapes with ``novel_chance``."""
    from pipeline.evaluation.models import load_any
    from pipeline.evaluation.suite import Evaluations, evaluate
    from pipeline.sources.drawn.world import base_shapes

    start = trained_clip(folder, IMAGES, EPOCHS, seed)
    pool, test = (
        drawn_videos(folder / split, split, count) for split, count in (("shapes_train", POOL), ("shapes", EVALUATED))
    )
    card = ("--card", "drawn_shapes")
    metrics: dict[str, float] = {}
    for shots in SHOTS:
        for objective in ("text", "linear"):
            kind = ("--objective", objective, "--shots", shots)
            output = tuned(folder / f"{objective}-{shots}-{seed}", folder, start, pool, seed, *card, *kind)
            model = load_any(str(output), "cpu")
            names = folder / "shapes.txt"
            names.write_text("\n".join(shapes()))
            if objective == "text":
                sets = {"zero_shot": (f"test={test},medium=video,templates=model,ensemble=probabilities",)}
            else:
                sets = {"classification": (f"test={test}",)}
            found = evaluate(model, Evaluations(**sets, classes=str(names)).prepare())
            (metrics[f"{objective}/{shots}"],) = (value for name, value in found.items() if name.endswith("/top1"))
    base = ("--class-names", *base_shapes(), "--shots", max(SHOTS))
    model = load_any(str(tuned(folder / f"base-{seed}", folder, start, pool, seed, *base)), "cpu")
    return metrics | novel(model, test)


def shapes() -> tuple[str, ...]:
    """All classes, in the order of their card."""
    from pipeline.dataset import load_card

    return load_card("drawn_shapes").classes


def tuned(output: Path, folder: Path, start: Path, data: Path, seed: int, *words: str | int) -> Path:
    """The output folder of a model that starts from the CLIP and reads a few videos."""
    places = ("--data", data, "--pretrained", start, "--output-folder", output)
    rates = ("--learning-rate", RATE, "--tower-rates", "head", HEAD_RATE, "--warmup-steps", 10)
    how = ("--steps", STEPS, "--batch-size", BATCH, "--workers", 0, "--seed", seed, "--shot-seed", seed)
    run("train_actionclip", "drawn", *places, *rates, *how, *words, "--tracking-uri", f"sqlite:///{folder}/mlflow.db")
    return output


def novel(model: object, data: Path) -> dict[str, float]:
    """Accuracy on the videos of novel shapes, among these."""
    from pipeline.evaluation.encoder import inference
    from pipeline.evaluation.media import encode_inputs
    from pipeline.evaluation.zero_shot import classifier
    from pipeline.loaders.batches import LoaderConfig, snapshot_batches
    from pipeline.loaders.readers import LabelReader
    from pipeline.shards.snapshot import read_snapshot
    from pipeline.sources.drawn.world import novel_shapes

    names = novel_shapes()
    vectors = classifier(model, names, model.prompt_templates)
    # Videos of other shapes have no label among these classes, so they are left out.
    readers = (model.video_reader(), LabelReader(classes=names))
    batches = snapshot_batches(read_snapshot(str(data)), readers, batch_size=32, config=LoaderConfig(loader_workers=0))
    right = []
    with inference(model) as device:
        for batch in batches:
            best = (encode_inputs(model, "video", batch, device) @ vectors.T).argmax(dim=1)
            right += (best.cpu() == batch["label"]).tolist()
    return {"novel": sum(right) / len(right), "novel_chance": 1 / len(names)}


CLAIMS = (
    *(
        Claim(
            f"labels as texts beat a linear head, {shots} videos of a class",
            named(f"linear/{shots}"),
            named(f"text/{shots}"),
        )
        for shots in SHOTS
    ),
    Claim(
        "unseen classes are named: twice chance",
        named("novel_chance"),
        named("novel"),
        test=lambda chance, found: found >= 2 * chance,
    ),
)
