"""MaPLe: Multi-modal Prompt Learning.

Khattak, Rasheed, Maaz, Khan, Khan, 2022, arXiv 2210.03117. Both towers get b learned rows in each of their first J
layers. The image tower's rows are linear images of the text tower's, so the two are trained together (section 3.2):

    text    [start, P_0, words, name, end] into layer 0;  P_i replaces rows 1 ... b before layer i < J
    vision  [class, patches, F_0(P_0)] into layer 0;  F_i(P_i) replaces the last b rows before layer i < J

P_0 is initialised with the words "a photo", and "of a" follows it. The others are initialised at random with deviation
0.02, and F_1 to F_(J-1) equally. Only for ViT towers. For ViT-B/16 with J = 9, b = 2: 3,555,072 parameters.

To hold a run against: base to new over 11 sets with ViT-B/16, 82.28 / 75.14, H 78.55 (table 3).

Left out: the reference's mix of half and single precision; all trained parameters are float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config import require
from pipeline.models.adapters.adapter import Adapter, unit
from pipeline.models.adapters.prompts import SPREAD, deep_class_vectors, first_rows, lay_out
from pipeline.models.adapters.vision import VisionTower


@dataclass(frozen=True, kw_only=True)
class Config:
    """The paper's nine layers with two rows each."""

    depth: int = 9
    """Number J of layers with their own rows, the first included."""
    length: int = 2
    """Rows b per layer."""
    start: str | None = "a photo of a"
    """Words whose first b initialise the first layer's rows; the rest follows them; none for random numbers."""
    classes_at_once: int | None = None
    """Classes per pass of the text tower; fewer need less memory and take a third more time; none for all at once."""
    seed: int = 0
    """Seed of the random initial rows."""

    def __post_init__(self) -> None:
        require(self.depth >= 1, "depth", self.depth, "1 or more")
        require(self.length >= 1, "length", self.length, "1 or more")
        once = self.classes_at_once
        require(once is None or once >= 1, "classes_at_once", once, "1 or more, or none")


class MaPLe(Adapter):
    """Learned rows in both towers, coupled."""

    reads = "pixels"
    learns_vectors = True
    config: Config

    def build(self) -> None:
        """Rows of the text tower, and the linear maps to those of the image tower."""
        config = self.config
        self.tower, self.vision = self.clip.text_tower(), VisionTower(self.clip.model)
        layers = min(len(self.tower.blocks), self.vision.layers)
        require(config.depth <= layers, "depth", config.depth, f"at most the {layers} layers of the shallower tower")
        random = torch.Generator().manual_seed(config.seed)
        first, self.words = first_rows(self.tower, config.length, config.start, random)
        self.context = nn.Parameter(first)
        shape = (config.length, self.tower.width)
        self.deep = nn.ParameterList(torch.randn(shape, generator=random) * SPREAD for _ in range(config.depth - 1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.first_map = nn.Linear(self.tower.width, self.vision.width)
            one = nn.Linear(self.tower.width, self.vision.width)
        self.maps = nn.ModuleList(nn.Linear(self.tower.width, self.vision.width) for _ in self.deep)
        for each in self.maps:
            each.load_state_dict(one.state_dict())

    def rebind(self) -> None:
        """Lay out the prompts of the class names."""
        self.layout = lay_out(self.tower, self.classes, len(self.context) + len(self.words))

    def class_vectors(self) -> Tensor:
        """float [C, D], unit length."""
        at_once = self.config.classes_at_once
        return unit(deep_class_vectors(self.tower, self.layout, self.context, self.words, list(self.deep), at_once))

    def logits(self, images: Tensor) -> Tensor:
        """Images, uint8 [B, 3, H, W], to float [B, C]."""
        maps = [self.first_map, *self.maps]
        rows = [each(prompt) for each, prompt in zip(maps, [self.context, *self.deep], strict=True)]
        features = self.vision.features(self.clip.normalised(images), rows)
        return self.clip.scale * unit(features) @ self.vectors_now().T
