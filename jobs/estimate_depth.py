#!/usr/bin/env python
"""Estimate the depth of an image: prints its range, and writes the depth in colours beside the image.

    python jobs/estimate_depth.py image IMAGE --checkpoint runs/depth --output depth-figure.png
    python jobs/estimate_depth.py image s3://bucket/room.jpg --checkpoint RN50-quickgelu:openai --words kitchen.json \
        --depth-output depth.png

Works with a run of jobs/train_depthclip.py, and with any CLIP whose image tower is open_clip's ResNet or vision
transformer. --depth-output is a grey PNG of 16 bits in millimetres, as `depth.png` of a sample.
"""

from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import tyro

from pipeline.config import require, run_job, writable_file
from pipeline.evaluation.depth import as_depth_estimator
from pipeline.evaluation.encoder import inference
from pipeline.evaluation.models import load_any
from pipeline.evaluation.tasks.depth import Config, read_words
from pipeline.loaders.depth_figures import estimate_figure
from pipeline.loaders.images import as_stored
from pipeline.models.depth_words import MapMode
from pipeline.runs.drawn_data import DRAWN_IMAGE, read_image
from pipeline.shards.depth_values import encode_depth
from pipeline.shards.storage import split_file


@dataclass(frozen=True, kw_only=True)
class EstimateDepth:
    """An image and the model. The words are for a plain CLIP."""

    image: tyro.conf.Positional[str]
    """Image file: a path or any fsspec URI."""
    checkpoint: str
    """Checkpoint or run folder (path or URI) of a DepthCLIP or a CLIP, or ARCHITECTURE:WEIGHTS."""
    mode: MapMode = "projected"
    """Map of a plain CLIP: released (the authors' code) or projected (into the space of texts)."""
    words: str = "auto"
    """Words of a plain CLIP with their distances: auto (the paper's), or a JSON file {"word": metres}."""
    pixels: Literal["imagenet", "model"] = "imagenet"
    """Normalisation of a plain CLIP's pixels: by the statistics of imagenet, as the authors do, or by the model's
    own."""
    temperature: float = 1e-3
    """Temperature of the softmax over words, for a plain CLIP."""
    scene: str = ""
    """Class of the scene, for bins that depend on it; the CLIP names it if empty."""
    output: str = "depth-figure.png"
    """PNG file for the image beside its depth: a path or a URI."""
    depth_output: str = ""
    """PNG file of 16 bits for the depth in millimetres, 0 beyond 65.535 m; none if empty."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; auto uses a GPU if available."""

    def __post_init__(self) -> None:
        for name in ("output", "depth_output"):
            value = getattr(self, name)
            require(not value or value.endswith(".png"), name, value, "a file that ends in .png")
        require(bool(self.output), "output", self.output, "a file that ends in .png")


PRESETS: dict[str, tuple[str, EstimateDepth]] = {
    "image": ("Depth of one image.", EstimateDepth(image=tyro.MISSING, checkpoint=tyro.MISSING)),
    "smoke": (
        "Depth of a drawn image by an untrained CLIP.",
        EstimateDepth(image=DRAWN_IMAGE, checkpoint="clipmill-tiny:untrained"),
    ),
}


def main(run: EstimateDepth) -> None:
    """Check words and files, then estimate, print and draw."""
    places = [
        split_file(writable_file(name, getattr(run, name))) for name in ("output", "depth_output") if getattr(run, name)
    ]
    words = read_words(Config(mode=run.mode, words=run.words, temperature=run.temperature, pixels=run.pixels))
    image = as_stored(read_image(run.image))
    model = load_any(run.checkpoint, run.device)
    estimator = as_depth_estimator(model, run.checkpoint, words)
    known = estimator.scenes
    require(not run.scene or run.scene in known, "scene", run.scene, f"one of {', '.join(known) or 'none'}, or empty")
    with inference(model):
        (depth,) = estimator.estimate_depth([image], [known.index(run.scene)] if run.scene else None)
    low, middle, high = (float(value) for value in (depth.min(), depth.median(), depth.max()))
    print(f"{low:.2f} to {high:.2f} m, half of the pixels nearer than {middle:.2f} m")
    figure = BytesIO()
    estimate_figure(image, depth).savefig(figure, format="png")
    contents = [figure.getvalue(), *([encode_depth(depth.numpy(), unit_known=True)] if run.depth_output else [])]
    for (folder, name), content in zip(places, contents, strict=True):
        folder.write_atomic(name, content)


if __name__ == "__main__":
    run_job(PRESETS, main)
