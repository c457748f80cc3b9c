#!/usr/bin/env python
"""Draw images for prompts, or sketches of images: methods x subjects x seeds, in parallel, each restartable.

    python jobs/draw_prompts.py clipdraw --prompts "a red star" "a cat|text:-0.3" --seeds 1 2 --output-folder runs/drawn
    python jobs/draw_prompts.py vqgan_clip --prompts "a city at night|image=sky.png:0.5" \
        --methods vqgan_clip:codes=vqgan.ckpt,start=image,start_image=photo.png --output-folder runs/painted
    python jobs/draw_prompts.py clipasso --images horse.png --methods clipasso:strokes=8 clipasso:strokes=32 \
        --output-folder runs/sketched
    ray job submit --working-dir . -- python jobs/draw_prompts.py clipdraw --prompts /data/prompts.txt --per-gpu 4 \
        --together 8 --output-folder s3://bucket/drawn

Append a method's options to its name: clipdraw:strokes=64,loop.steps=500. The folder has a PNG, an SVG, a film and
images of some steps for each, gallery.html, sheet.png and scores.parquet. The same command goes on with what is not
finished. Scores are those of --judge, a CLIP that guides no method; jobs/evaluate_drawings.py has more.
"""

import getpass
import tempfile
from dataclasses import dataclass, field
from typing import Literal

from pipeline.config import require, run_job, writable_folder
from pipeline.runs.drawing_records import DrawingRecord
from pipeline.runs.drawing_subjects import read_subjects
from pipeline.runs.drawings import DrawingRunner, parse_drawing_spec, plan_drawings, refuse_failed, run_drawings
from pipeline.runs.few_shot import find_place
from pipeline.runs.films import FilmKind
from pipeline.shards.storage import Folder
from pipeline.stages.shard_tasks import Workers
from pipeline.tracking.runs import Tracking

SMOKE = f"{tempfile.gettempdir()}/clipmill-smoke-{getpass.getuser()}/drawings"
TINY = "clips=[clipmill-tiny:untrained],strokes=6,side=64,views=2,loop.steps=4,loop.evaluate_every=2"
TINY_SKETCH = (
    "clip=clipmill-tiny:untrained,saliency=clipmill-tiny:untrained,layers=[transformer.resblocks.1],strokes=4,side=64,"
    "views=1,loop.steps=4,loop.evaluate_every=2"
)
TINY_CODES = (
    "codes=vqgan:untrained,clips=[clipmill-tiny:untrained],size=[64,48],views=2,loop.steps=4,loop.evaluate_every=2"
)


@dataclass(frozen=True, kw_only=True)
class DrawPrompts:
    """Methods, what they draw, and where."""

    methods: tuple[str, ...]
    """Names of pipeline/generation/methods, each with optional :key=value,... that override the paper's values."""
    prompts: tuple[str, ...] = ()
    """Texts, or .txt files with one in each line: TEXT:WEIGHT:STOP or image=FILE:WEIGHT:STOP, several between |."""
    images: tuple[str, ...] = ()
    """Images to sketch: paths or URIs; transparent parts are white."""
    masks: tuple[str, ...] = ()
    """Masks of the images, in their order: what is dark in a mask becomes white in the image."""
    seeds: tuple[int, ...] = (1,)
    """Seeds, each an image of its own; the gallery marks the one with the lowest loss."""
    judge: str = "ViT-B-16-quickgelu:openai"
    """CLIP that scores images and gives no gradients: an address as in jobs/evaluate.py, none of a method's."""
    output_folder: str = "runs/drawings"
    """Folder for images, scores and the gallery; a path or a URI."""
    steps: int | None = None
    """Steps of every method; none for each method's own."""
    together: int = 1
    """Images of one method that are optimised in one process at the same time."""
    per_gpu: int = 1
    """Tasks that share a GPU."""
    film: FilmKind = "gif"
    """Film of the steps."""
    frames: int = 30
    """Images of the film, the last one among them; 1 or more."""
    shown: int = 4
    """Images of steps that are kept as PNG and logged to MLflow."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the tasks; auto uses GPUs if available."""
    workers: Workers = field(default_factory=Workers)
    track: bool = True
    """Record the job as an MLflow run, with a child run per image."""
    tracking: Tracking = field(default_factory=lambda: Tracking(system_metrics=False, primary_metric="drawing/judge"))

    def __post_init__(self) -> None:
        for name in ("methods", "seeds"):
            chosen = getattr(self, name)
            require(len(chosen) > 0 and len(set(chosen)) == len(chosen), name, chosen, "one or more, each once")
        require(all(0 <= seed < 2**32 for seed in self.seeds), "seeds", self.seeds, "0 to 2**32 - 1")
        for name in ("together", "per_gpu", "frames", "shown"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.steps is None or self.steps >= 1, "steps", self.steps, "1 or more")


PRESETS: dict[str, tuple[str, DrawPrompts]] = {
    "clipdraw": ("256 coloured strokes for each prompt (CLIPDraw).", DrawPrompts(methods=("clipdraw",))),
    "clipasso": (
        "A sketch of 16 strokes of each image, best of three seeds (CLIPasso).",
        DrawPrompts(methods=("clipasso",), seeds=(0, 1000, 2000)),
    ),
    "vqgan_clip": ("500 steps of 512 x 512 pixels for each prompt (VQGAN-CLIP).", DrawPrompts(methods=("vqgan_clip",))),
    "vqgan_clip_small": (
        "64 x 64 pixels by a VQGAN and CLIPs of one's own, minutes of a CPU.",
        DrawPrompts(
            methods=("vqgan_clip:codes=runs/vqgan,clips=[runs/guide],size=[64,64],views=8,loop.steps=200",),
            judge="runs/judge",
            workers=Workers(processes_count=0),
        ),
    ),
    "smoke": (
        "All methods for four steps with untrained models, in this process.",
        DrawPrompts(
            methods=(f"clipdraw:{TINY}", f"clipasso:{TINY_SKETCH}", f"vqgan_clip:{TINY_CODES}"),
            prompts=("a red star",),
            images=("drawn://val/0/0",),
            judge="clipmill-small:untrained",
            output_folder=SMOKE,
            seeds=(1, 2),
            together=2,
            workers=Workers(processes_count=0),
        ),
    ),
}


def main(run: DrawPrompts) -> None:
    """Wire methods, subjects and tasks; checks all settings before anything is drawn."""
    folder = Folder(writable_folder("output_folder", run.output_folder))
    specs = {spec.text: spec for spec in (parse_drawing_spec(text, run.steps) for text in run.methods)}
    require(len(specs) == len(run.methods), "methods", run.methods, "methods that differ in more than loop.steps")
    subjects = read_subjects(run.prompts, run.images, run.masks)
    units = plan_drawings(list(specs.values()), subjects, run.seeds)
    for spec in specs.values():
        models = spec.build().models
        require(run.judge not in models, "judge", run.judge, f"another CLIP than those of {spec.method}, {models}")
    place = find_place(run.device, 1 / run.per_gpu, 1, run.workers)
    runner = DrawingRunner(
        specs=specs,
        subjects={one.text: one for one in subjects},
        judge=run.judge,
        output=folder.uri,
        device=place.device,
        film=run.film,
        frames=run.frames,
        shown=run.shown,
    )
    here = "cpu" if place.device == "cuda" else place.device
    runner = runner.with_contents(units, here)
    runner.check(units, here)
    with DrawingRecord(run.tracking, run, folder, run.track) as record:
        results = run_drawings(runner, units, run.workers, run.together, place.gpus, record.add)
        facts = {"judge": run.judge, "seeds": ", ".join(map(str, run.seeds))}
        photos = {one.text: one.pixels for one in subjects if one.pixels is not None}
        print(record.conclude(results, facts, photos))
    refuse_failed(results)


if __name__ == "__main__":
    run_job(PRESETS, main, "the same command goes on and keeps the finished images")
