#!/usr/bin/env python
"""Draw a sample page of the embedded world as PNG.

    python jobs/draw_gallery.py scenes --output scenes.png --seed 1

Pages: shapes (every shape in every style), attributes (every colour with every texture), scenes (with boxes, masks,
phrases and questions), sets (the first samples of every split), motions (frames of a clip of every motion).
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import cv2

from pipeline.config import require, run_job, writable_file
from pipeline.shards.storage import split_file
from pipeline.sources.drawn import gallery
from pipeline.sources.drawn.outlines import Pixels


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The page and its file."""

    page: Literal["shapes", "attributes", "scenes", "sets", "motions"] = "scenes"
    output: str = "gallery.png"
    """PNG file: a path or any fsspec URI."""
    seed: int = 0
    """Seed of the samples, 0 or more."""

    def __post_init__(self) -> None:
        require(self.output.endswith(".png"), "output", self.output, "a file that ends in .png")
        require(self.seed >= 0, "seed", self.seed, "0 or more")


PAGES: dict[str, Callable[[int], Pixels]] = {
    "shapes": lambda seed: gallery.shapes_page(seed=seed),
    "attributes": lambda seed: gallery.attributes_page(seed=seed),
    "scenes": lambda seed: gallery.scenes_page(seed=seed),
    "sets": lambda seed: gallery.sets_page(seed=seed),
    "motions": lambda seed: gallery.motions_page(seed=seed),
}
PRESETS = {
    "shapes": ("Every shape in every style.", Gallery(page="shapes")),
    "attributes": ("Every colour with every texture.", Gallery(page="attributes")),
    "scenes": ("Scenes with their boxes, masks, phrases and questions.", Gallery(page="scenes")),
    "sets": ("The first samples of every split.", Gallery(page="sets")),
    "motions": ("Frames of a clip of every motion.", Gallery(page="motions")),
    "smoke": (
        "The attributes page in the temporary folder.",
        Gallery(page="attributes", output=f"{tempfile.gettempdir()}/clipmill-gallery.png"),
    ),
}


def main(run: Gallery) -> None:
    """Draw and write."""
    folder, name = split_file(writable_file("output", run.output))
    page = cv2.cvtColor(PAGES[run.page](run.seed), cv2.COLOR_RGB2BGR)
    folder.write_atomic(name, cv2.imencode(".png", page)[1].tobytes())


if __name__ == "__main__":
    run_job(PRESETS, main)
