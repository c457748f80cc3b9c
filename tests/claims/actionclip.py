"""ActionCLIP: labels as texts beat a linear head in few shots, and name classes that the fine-tuning has not seen.

Wang et al. 2021, arXiv 2109.08472. What a video shows is its class here: the colour of the object that moves, which one
frame gives away, as it does for most of the actions in the paper's data sets. (Shapes are no classes for it: the small
CLIP of drawn images that all models start from names 52 % of large shapes in images and 8 % of the small moving ones,
but a third of their colours.) All read a few videos of every class, in the same number of steps, with the same frames,
head and seeds. For unseen classes the texts are those of six colours; the other four are classified among themselves.
"""

from pathlib import Path

from claim import Claim, drawn_videos, named, run, trained_clip

IMAGES, EPOCHS = 12_000, 5
POOL, EVALUATED, STEPS, BATCH = 960, 600, 60, 10
SHOTS = (1, 4)
UNSEEN = ("orange", "purple", "pink", "brown")
ABOVE = 0.05
RATE, HEAD_RATE = 1e-4, 10.0


def measure(seed: int, folder: Path) -> dict[str, float]:
    """Top-1, as ``text/4`` and ``linear/4`` by shots, and ``novel`` for unseen colours with ``novel_chance``."""
    from pipeline.evaluation.models import load_any
    from pipeline.evaluation.suite import Evaluations, evaluate
    from pipeline.sources.drawn.world import COLOUR_NAMES

    start = trained_clip(folder, IMAGES, EPOCHS, seed)
    pool, test = (
        drawn_videos(folder / split, split, count) for split, count in (("shapes_train", POOL), ("shapes", EVALUATED))
    )
    words = folder / "colours.txt"
    words.write_text("\n".join(COLOUR_NAMES))
    metrics: dict[str, float] = {}
    for shots in SHOTS:
        for objective in ("text", "linear"):
            kind = ("--objective", objective, "--shots", shots, "--class-names", *COLOUR_NAMES)
            output = tuned(folder / f"{objective}-{shots}-{seed}", folder, start, pool, seed, *kind)
            model = load_any(str(output), "cpu")
            if objective == "text":
                sets = {"zero_shot": (f"test={test},medium=video,label=colour,templates=model,ensemble=probabilities",)}
            else:
                sets = {"classification": (f"test={test},label=colour",)}
            found = evaluate(model, Evaluations(**sets, classes=str(words)).prepare())
            (metrics[f"{objective}/{shots}"],) = (value for name, value in found.items() if name.endswith("/top1"))
    base = ("--shots", max(SHOTS), "--class-names", *(one for one in COLOUR_NAMES if one not in UNSEEN))
    model = load_any(str(tuned(folder / f"base-{seed}", folder, start, pool, seed, *base)), "cpu")
    return metrics | novel(model, test)


def tuned(output: Path, folder: Path, start: Path, data: Path, seed: int, *words: str | int) -> Path:
    """The output folder of a model that starts from the CLIP and reads a few videos."""
    places = ("--data", data, "--pretrained", start, "--label-key", "colour", "--output-folder", output)
    rates = ("--learning-rate", RATE, "--tower-rates", "head", HEAD_RATE, "--warmup-steps", 10)
    how = ("--steps", STEPS, "--batch-size", BATCH, "--workers", 0, "--seed", seed, "--shot-seed", seed)
    run("train_actionclip", "drawn", *places, *rates, *how, *words, "--tracking-uri", f"sqlite:///{folder}/mlflow.db")
    return output


def novel(model: object, data: Path) -> dict[str, float]:
    """Accuracy on the videos of unseen colours, among these."""
    from pipeline.evaluation.encoder import inference
    from pipeline.evaluation.media import encode_inputs
    from pipeline.evaluation.zero_shot import classifier
    from pipeline.loaders.batches import LoaderConfig, snapshot_batches
    from pipeline.loaders.readers import LabelReader
    from pipeline.shards.snapshot import read_snapshot

    vectors = classifier(model, UNSEEN, model.prompt_templates)
    # Videos of other colours have no label among these classes, so they are left out.
    readers = (model.video_reader(), LabelReader(classes=UNSEEN, json_key="colour"))
    batches = snapshot_batches(read_snapshot(str(data)), readers, batch_size=32, config=LoaderConfig(loader_workers=0))
    right = []
    with inference(model) as device:
        for batch in batches:
            best = (encode_inputs(model, "video", batch, device) @ vectors.T).argmax(dim=1)
            right += (best.cpu() == batch["label"]).tolist()
    return {"novel": sum(right) / len(right), "novel_chance": 1 / len(UNSEEN)}


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
        f"unseen classes are named: {100 * ABOVE:.0f} points above chance",
        named("novel_chance"),
        named("novel"),
        test=lambda chance, found: found >= chance + ABOVE,
    ),
)
