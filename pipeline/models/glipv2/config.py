"""GLIPv2's settings, and presets of the architecture."""

from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config import require
from pipeline.models.glip.config import LARGE, SMALL, SMALLEST
from pipeline.models.glip.config import Config as GlipConfig


@dataclass(frozen=True, kw_only=True)
class Config(GlipConfig):
    """The architecture and the data, with the values of GLIPv2-T."""

    contrast_weight: float = 1.0
    """Weight of the loss between images; 0 leaves it out."""
    contrast_width: int = 64
    """Dimensions in which anchors and tokens of different images are compared."""
    contrast_anchors: int = 100
    """Maximum number of anchors per image in the loss between images, drawn from those that are trained on a box."""
    language_weight: float = 1.0
    """Weight of the loss of masked tokens; 0 leaves it out."""
    masked_tokens: float = 0.15
    """Probability that a token is to be predicted, 0 to 1; 80 % of them are masked, 10 % replaced, 10 % kept."""
    masks: Literal["no", "joint", "head"] = "no"
    """Masks of objects: no, trained with all the rest (joint), or the mask head alone with frozen other weights (head).
    """
    mask_weight: float = 1.0
    """Weight of the mask loss."""
    mask_convolutions: tuple[int, ...] = (256, 256, 256, 256)
    """Channels of the convolutions of the mask head, multiples of norm_groups."""
    mask_jitter: float = 0.1
    """Maximum shift of each edge of a training box of the mask head, relative to the box's side; 0 to less than 0.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("contrast_weight", "language_weight"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("contrast_width", "contrast_anchors"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.mask_weight > 0, "mask_weight", self.mask_weight, "more than 0")
        require(0 < self.masked_tokens <= 1, "masked_tokens", self.masked_tokens, "more than 0, up to 1")
        alone = self.masks != "head" or self.tuning == "full"
        require(alone, "tuning", self.tuning, "full with masks head, which trains nothing else")
        require(0 <= self.mask_jitter < 0.5, "mask_jitter", self.mask_jitter, "0 to less than 0.5")
        whole = self.mask_convolutions and all(c > 0 and c % self.norm_groups == 0 for c in self.mask_convolutions)
        require(bool(whole), "mask_convolutions", self.mask_convolutions, f"multiples of {self.norm_groups}")

    @property
    def pretrains(self) -> bool:
        """Whether the losses between images and of masked words are computed: not while a part is tuned."""
        return self.masks != "head" and self.tuning == "full"


BASE: dict[str, Any] = {
    "backbone": "swin_base_patch4_window12_384",
    "drop_path": 0.3,
    "text": "openai/clip-vit-base-patch32",
}
"""GLIPv2-B, in which it differs from GLIPv2-T: a larger backbone, and CLIP's text tower."""
HUGE: dict[str, Any] = LARGE
"""GLIPv2-H as GLIP-L: the paper's backbone CoSwin-H is not public."""
DRAWN: dict[str, Any] = {**SMALL, "masks": "joint", "mask_convolutions": (64, 64)}
"""For drawn images, with masks: trains in minutes on a CPU."""
LEAST: dict[str, Any] = {**SMALLEST, "contrast_width": 16, "masks": "joint", "mask_convolutions": (32,)}
"""The smallest config with every part."""
