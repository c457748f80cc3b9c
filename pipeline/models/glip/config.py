"""GLIP's settings, and presets of the architecture."""

from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.config import require
from pipeline.loaders.detection import RandomResize
from pipeline.loaders.grounding import GroundingOptions
from pipeline.loaders.grounding_prompts import DRAWN

FINEST = 8  # pixels of a cell of the finest level
LEVELS = 5
STAGES = 5  # of the backbone, with the patch embedding


@dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture and the data, with the values of GLIP-T."""

    backbone: str = "swin_tiny_patch4_window7_224"
    """Swin transformer of timm, or clipmill_small_swin."""
    pretrained_backbone: bool = False
    """Initialise the backbone with timm's weights, as the paper does with ImageNet's."""
    drop_path: float = 0.2
    """Probability that training leaves out the last block of the backbone, lower for earlier ones; 0 to less than 1."""
    text: str = "bert-base-uncased"
    """Text tower and tokenizer: a folder or model id of a BERT or a CLIP in transformers' layout, or drawn for an
    untrained small BERT that knows the words of the embedded world."""
    pretrained_text: bool = True
    """Initialise the text tower with the weights of `text`; not used with drawn."""
    small_text: tuple[int, int, int] = (64, 2, 4)
    """Width, number of layers and number of heads of the text tower drawn."""
    text_dropout: float = 0.1
    """Dropout of the text tower and of the layers after each fusion, 0 to less than 1."""
    fusion: bool = True
    """Deep fusion of image and text in every block of the head; without it both meet in the last product (GLIP-A)."""
    fusion_width: int = 2048
    """Width of the cross-attention, a multiple of fusion_heads."""
    fusion_heads: int = 8
    """Heads of the cross-attention."""
    fusion_dropout: float = 0.1
    """Dropout of the cross-attention's weights, 0 to less than 1."""
    blocks: int = 6
    """Number of blocks of the head, 1 or more: each a fusion, a layer of the text tower's kind and a block of the
    dynamic head."""
    width: int = 256
    """Channels of every pyramid level, a multiple of norm_groups and of 4."""
    norm_groups: int = 16
    """Groups of the group normalisation in the dynamic head."""
    compat_offsets: bool = False
    """Read the offsets of the level above as the authors' CUDA kernel does: for weights that were trained with it."""
    anchor_scale: float = 8.0
    """Side of an anchor in cells of its level."""
    candidates: int = 9
    """Number of anchors of each level, the nearest ones to a box, among which ATSS chooses."""
    first_logit_scale: float = 1.0
    """Initial factor of the product of pixels and tokens, more than 0. Small networks learn names sooner with 10."""
    box_weight: float = 2.0
    """Weight of the box loss; the other losses have 1."""
    grounding: GroundingOptions = field(default_factory=GroundingOptions)
    class_names: tuple[str, ...] = ()
    """Names of the classes whose boxes are read, from which prompts are sampled; the classes of the data if empty."""
    image_size: int = 1088
    """Side of the square input in pixels, a multiple of 32; the longer side of a test image."""
    jitter_scale: tuple[float, float] = (0.6, 1.0)
    """Range of the random resize factor of training images, relative to the size at which they fit the square."""
    flip: float = 0.5
    """Probability of mirroring a training image."""
    most_objects: int = 300
    """Maximum number of training objects per image."""
    chunk_words: int = 40
    """Maximum number of names in one prompt at test time; more names take several prompts."""
    least_score: float = 0.05
    """Least mean probability of a phrase's tokens at which an anchor becomes a detection, 0 to less than 1."""
    level_detections: int = 1000
    """Highest scores per level, over all anchors and phrases of a prompt, before non-maximum suppression."""
    detections: int = 300
    """Maximum number of detections per image; COCO's evaluation uses 100."""
    detection_overlap: float = 0.6
    """Intersection over union above which non-maximum suppression removes the lower-scoring box of a phrase, up to 1.
    """
    tuning: Literal["full", "prompt", "linear"] = "full"
    """Trained weights: full (all), prompt (only a table added to the text's features), or linear (only the last layers:
    boxes, centerness, and the product of pixels and tokens)."""
    frozen_stages: int = 0
    """Lowest stages of the backbone that full tuning leaves as they are, 0 to 5; the patch embedding is the first."""
    start_from: str = ""
    """Initial weights: a file of the authors' released weights, or a checkpoint or run folder of the same network."""

    def __post_init__(self) -> None:
        for name in ("drop_path", "text_dropout", "fusion_dropout", "least_score"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "0 to less than 1")
        for name in ("blocks", "fusion_heads", "norm_groups", "candidates", "most_objects", "chunk_words"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("level_detections", "detections"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("anchor_scale", "box_weight", "first_logit_scale"):
            require(getattr(self, name) > 0, name, getattr(self, name), "more than 0")
        require(0 < self.detection_overlap <= 1, "detection_overlap", self.detection_overlap, "more than 0, up to 1")
        stages = self.frozen_stages
        require(0 <= stages <= STAGES, "frozen_stages", stages, f"0 to {STAGES}")
        require(not stages or self.tuning == "full", "frozen_stages", stages, f"0 with tuning {self.tuning}")
        fixed = self.grounding.fixed_prompts or self.tuning != "prompt"
        require(fixed, "fixed_prompts", False, "True with tuning prompt: a row belongs to a position of the prompt")
        whole = self.width % self.norm_groups == 0 and self.width % 4 == 0
        require(whole, "width", self.width, f"a multiple of {self.norm_groups} and of 4")
        heads = self.fusion_width % self.fusion_heads
        require(heads == 0, "fusion_width", self.fusion_width, f"a multiple of {self.fusion_heads}")
        width, layers, small_heads = self.small_text
        small = layers >= 1 and small_heads >= 1 and width % max(small_heads, 1) == 0 and width > 0
        require(small, "small_text", self.small_text, "a width that is a multiple of the heads, layers, heads")
        require(self.image_size % 32 == 0, "image_size", self.image_size, "a multiple of 32")
        self.resize()

    def resize(self, train: bool = True) -> RandomResize:
        """The transform of images into the square."""
        if train:
            return RandomResize(size=self.image_size, scale=self.jitter_scale, flip=self.flip)
        return RandomResize(size=self.image_size, scale=(1.0, 1.0), flip=0.0)


def strides() -> tuple[int, ...]:
    """Pixels of a cell of each level: 8 to 128."""
    return tuple(FINEST * 2**level for level in range(LEVELS))


LARGE: dict[str, Any] = {"backbone": "swin_large_patch4_window12_384", "drop_path": 0.4, "blocks": 8}
"""GLIP-L, in which it differs from GLIP-T."""

SMALL: dict[str, Any] = {
    "backbone": "clipmill_small_swin",
    "drop_path": 0.0,
    "text": DRAWN,
    "text_dropout": 0.0,
    "fusion_width": 128,
    "fusion_heads": 4,
    "fusion_dropout": 0.0,
    "blocks": 2,
    "width": 64,
    "anchor_scale": 4.0,
    "first_logit_scale": 10.0,
    "image_size": 128,
    "jitter_scale": (0.8, 1.25),
    "most_objects": 20,
    "detections": 50,
}
"""For drawn images: trains in minutes on a CPU."""

SMALLEST: dict[str, Any] = {
    **SMALL,
    "first_logit_scale": 1.0,
    "small_text": (32, 1, 2),
    "fusion_width": 32,
    "fusion_heads": 2,
    "width": 32,
    "norm_groups": 4,
    "image_size": 64,
    "class_names": ("red", "green", "blue", "yellow"),
}
