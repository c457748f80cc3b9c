"""Drawings that a second CLIP recognises: augmentations of CLIPDraw; strokes and first points of CLIPasso.

Frans et al. 2021, arXiv 2106.14843: without augmented views a drawing fits its CLIP and nothing else. Vinker et al.
2022, arXiv 2202.05822: recognition grows with the number of strokes (table 1), and strokes that start at salient places
beat random ones (section 3.2). Three CLIPs are trained on drawn images, once: one guides, a second one, with another
start and order, judges, and a vision transformer says where sketches start. A seed decides the first strokes, the views
and the photos. Prompts are the 24 shapes; sketches are of flat drawings of them.
"""

from pathlib import Path
from typing import Any

from claim import Claim, Metrics, drawn, named, run, trained_clip

IMAGES, EPOCHS, SIDE = 12_000, 5, 64
STROKES, START_STROKES = (4, 8, 16, 32), (8, 16)
PHOTOS = 1  # of each shape
FAR = 5  # times chance
DRAW = "strokes=24,side=64,rates.points=0.5,loop.steps=300,loop.evaluate_every=100,loop.checkpoint_every=100"
SKETCH = (
    "layers=[trunk.blocks.2,trunk.blocks.3],side=64,width=1.5,rate=0.5,"
    "loop.steps=200,loop.evaluate_every=50,loop.checkpoint_every=100,loop.patience=0"
)
QUIET = ("--processes-count", 0, "--no-track", "--film", "none", "--shown", 1)


def measure(seed: int, folder: Path) -> dict[str, float]:
    """The judge's top-1 and cosine, as ``augmented/top1``, ``plain/judge``, ``salient/16/top1``; and ``chance``."""
    guide, judge = (trained_clip(folder, IMAGES, EPOCHS, number) for number in (0, 1))
    methods = {
        f"{name}": f"clipdraw:clips=[{guide}],augmentation={kind},{DRAW}"
        for name, kind in (("augmented", "perspective"), ("plain", "none"))
    }
    prompts = [f"a {shape}" for shape in _shapes()]
    metrics = _drawn(folder / f"prompts-{seed}", methods, ("--prompts", *prompts), judge, seed)
    sketch = f"clipasso:clip={guide},saliency={_looker(folder)},{SKETCH}"
    levels = {f"salient/{count}": f"{sketch},strokes={count}" for count in STROKES}
    levels |= {f"random/{count}": f"{sketch},strokes={count},start=random" for count in START_STROKES}
    photos = _photos(folder / f"photos-{seed}", seed)
    metrics |= _drawn(folder / f"sketches-{seed}", levels, ("--images", *photos), judge, seed)
    return {**metrics, "chance": 1 / len(_shapes())}


def _looker(folder: Path) -> Path:
    """The output folder of a small vision transformer of a CLIP, trained on the same images."""
    output = folder / "looker"
    places = ("--data", drawn(folder / "images", IMAGES), "--output-folder", output)
    how = ("--architecture", "clipmill-small-vit", "--epochs", EPOCHS, "--workers", 0, "--loader-workers", 1)
    run("pretrain_clip", "demo", *places, *how, "--tracking-uri", f"sqlite:///{folder}/mlflow.db")
    return output


def _drawn(output: Path, methods: dict[str, str], subjects: tuple[object, ...], judge: Path, seed: int) -> Metrics:
    """Draw with all methods and evaluate: top-1 and scores by name of the method."""
    import pyarrow.parquet as pq

    words = ("--methods", *methods.values(), *subjects, "--seeds", seed, "--judge", judge, "--together", 24)
    run("draw_prompts", next(iter(methods.values())).partition(":")[0], *words, *QUIET, "--output-folder", output)
    classes = ("--classes", "drawn_shapes", "--images", "all", "--no-track")
    run("evaluate_drawings", "prompts", "--drawings", output, "--judge", judge, *classes)
    judged = pq.read_table(output / "evaluation.parquet").to_pylist()
    scores = pq.read_table(output / "scores.parquet").to_pylist()
    metrics: dict[str, float] = {}
    for name, method in methods.items():
        ranks = [row["classes_before"] for row in judged if row["method"] == method]
        own = [row for row in scores if row["method"] == method]
        assert None not in ranks and len(ranks) == len(own) > 0
        metrics[f"{name}/top1"] = sum(rank == 0 for rank in ranks) / len(ranks)
        metrics[f"{name}/judge"] = sum(row["judge"] for row in own) / len(own)
        metrics[f"{name}/loss"] = sum(row["loss"] for row in own) / len(own)
    return metrics


def _shapes() -> tuple[str, ...]:
    from pipeline.sources.drawn import world

    return world.SHAPE_NAMES


def _photos(folder: Path, seed: int) -> list[Path]:
    """Flat drawings of all shapes, transparent around them, in files with the names of the shapes."""
    import numpy as np
    from PIL import Image

    from pipeline.sources.drawn.draws import Draws
    from pipeline.sources.drawn.render import render

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, shape in enumerate(_shapes() * PHOTOS):
        file = folder / f"{number:03d}_{shape.replace(' ', '_')}.png"
        draws = Draws(seed, "val", number, "scene")
        scene = _scene(shape, draws)
        pixels = np.dstack([render(scene, draws), scene.objects[0].coverage])
        Image.fromarray(pixels).save(file)
        files.append(file)
    return files


def _scene(shape: str, draws: Any) -> Any:
    """One dark object that fills the image, turned a little."""
    from dataclasses import replace

    from pipeline.sources.drawn.scenes import Look, Scene, finished, make_object, sample_pose, sample_rgb

    side = 2 * SIDE
    colour = draws.pick(("red", "blue", "green"))
    pose = replace(sample_pose(draws, shape, 0.36 * side), angle=0.2 * draws.normal())
    look = Look(shape, None, colour, "plain", "large", sample_rgb(draws, colour))
    centre = (side / 2, side / 2)
    return Scene(side, "flat", "clear", finished([make_object(look, pose, centre, side)]), 0)


def _judged(name: str) -> Any:
    return named(f"{name}/top1")


def _far(text: str, name: str) -> Claim:
    return Claim(text, named("chance"), _judged(name), lambda chance, found: found >= FAR * chance)


def _rises(low: int, high: int) -> Claim:
    names = (f"salient/{count}" for count in (low, high))
    return Claim(f"sketches: {high} strokes are recognised better than {low}", *(_judged(name) for name in names))


CLAIMS = (
    _far(f"drawings of prompts: {FAR} times chance", "augmented"),
    Claim("augmented views beat none", _judged("plain"), _judged("augmented")),
    _far(f"sketches of {STROKES[-1]} strokes: {FAR} times chance", f"salient/{STROKES[-1]}"),
    *(_rises(low, high) for low, high in zip(STROKES, STROKES[1:], strict=False)),
    Claim(
        "salient first points beat random ones: recognition",
        *(named(*(f"{start}/{count}/top1" for count in START_STROKES)) for start in ("random", "salient")),
    ),
    Claim(
        "... the judge's cosine with the photo",
        *(named(*(f"{start}/{count}/judge" for count in START_STROKES)) for start in ("random", "salient")),
    ),
)
