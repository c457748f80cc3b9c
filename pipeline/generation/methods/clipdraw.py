"""CLIPDraw: Exploring Text-to-Drawing Synthesis through Language-Image Encoders.

Frans, Soros, Witkowski, 2021, arXiv 2106.14843

The idea: the parameters of a drawing are its strokes, and CLIP says how well the drawing fits a text. With the text's
unit feature t, negative prompts n_j, and unit features x_k of K augmented views of the drawing, the loss is

    L = - sum_k t.x_k + 0.3 sum_j sum_k n_j.x_k

Strokes are paths of one to three cubic curves with a width and a colour; all of them are trained by Adam. Views are a
random perspective and a random crop, which keep the drawing from being an adversarial example.

Left out: the paper's own runs had no normalisation of CLIP's input; here it is each model's own, as in the authors'
notebook. The crops' aspect ratio is sampled from those that fit, where torchvision tries ten times.

The paper reports no numbers; a run is held against a second CLIP's score (``judge``) of the same prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pipeline.config import require
from pipeline.generation.curves import Strokes
from pipeline.generation.guides import Guide
from pipeline.generation.loop import LoopConfig, Objective, Picture
from pipeline.generation.method import NO_CODES, GenerationMethod, Subject
from pipeline.generation.streams import Draw, generators, uniform
from pipeline.generation.stroke_picture import StrokePicture, StrokeRates
from pipeline.generation.text_objective import TextObjective
from pipeline.generation.views import Augmentation, views_of
from pipeline.models.towers.image_codes import ImageCodes

FALLS = ((0.5, 0.4), (0.75, 0.1))
MOST_WIDTH = 50.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """The drawing and its optimisation, with the paper's values."""

    clips: tuple[str, ...] = ("ViT-B-32-quickgelu:openai",)
    """CLIPs that guide the drawing, as addresses of checkpoints or ARCHITECTURE:WEIGHTS; losses are added."""
    strokes: int = 256
    """Number of strokes."""
    segments: int = 3
    """Largest number of curves of a stroke; each stroke has 1 to this many."""
    side: int = 224
    """Side of the drawing in pixels."""
    width: float = 1.0
    """Initial width of strokes in pixels, 1 to 50."""
    views: int = 4
    """Augmented views in a step."""
    augmentation: Augmentation = "perspective"
    """Kind of views: the paper's, VQGAN-CLIP's two, or the drawing itself."""
    distance: Literal["cosine", "spherical"] = "cosine"
    """Distance of views from prompts: the paper's cosine, or VQGAN-CLIP's half squared angle."""
    rates: StrokeRates = field(default_factory=lambda: StrokeRates(points=1.0, widths=0.1, colours=0.01))
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        require(len(self.clips) >= 1, "clips", self.clips, "one CLIP or more")
        for name in ("strokes", "segments", "views"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(16 <= self.side <= 4096, "side", self.side, "16 to 4096")
        require(1 <= self.width <= MOST_WIDTH, "width", self.width, "1 to 50")


class ClipDraw(GenerationMethod):
    """Strokes that fit a text."""

    reads: ClassVar[Literal["text", "image"]] = "text"
    config: Config

    @property
    def models(self) -> tuple[str, ...]:
        """Those that guide."""
        return self.config.clips

    def start(
        self,
        subjects: Sequence[Subject],
        seeds: Sequence[int],
        guides: Mapping[str, Guide],
        codes: Mapping[str, ImageCodes] = NO_CODES,
    ) -> tuple[Picture, Objective]:
        """Random strokes by seed."""
        config, some = self.config, [guides[name] for name in self.config.clips]
        reduce: Literal["sum", "mean"] = "sum" if config.distance == "cosine" else "mean"
        prompts = [subject.prompts for subject in subjects]
        objective = TextObjective(prompts, some, views_of(config.augmentation, config.views), config.distance, reduce)
        first = random_strokes(seeds, config.strokes, config.segments, config.side, config.width)
        drawing = StrokePicture(first, config.side, config.rates, (1.0, MOST_WIDTH), FALLS)
        return drawing.to(some[0].device), objective


def random_strokes(seeds: Sequence[int], count: int, segments: int, side: int, width: float) -> Strokes:
    """The authors' start: a uniform first point, and each next one up to a twentieth of the side from the last; random
    colours and alphas; 1 to ``segments`` curves."""
    random = generators(seeds, 0, Draw.START)
    begin = uniform(random, count, 1, 2)
    steps = (uniform(random, count, 3 * segments, 2) - 0.5) * 0.1
    lengths = (uniform(random, count) * segments).long() + 1
    points: Tensor = torch.cat([begin, begin + steps.cumsum(2)], dim=2) * side
    return Strokes(
        points=points,
        widths=torch.full((len(seeds), count), width),
        colours=uniform(random, count, 4),
        segments=lengths.clamp(max=segments),
    )
