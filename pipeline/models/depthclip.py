"""Can Language Understand Depth?

Zhang, Zeng, Guo, Li, 2022, arXiv 2207.01077 (DepthCLIP)

The idea: "This object is far" is a class like any other. Each location of CLIP's image map is compared with seven words
for distances, and its depth is the mean of the words' distances, weighted by their softmax (``depth_words.py``):

    depth = sum_k softmax_k(1000 x.t_k) b_k,   b = 1, 1.5, 2, 2.25, 2.5, 2.75, 3 metres

Nothing is trained in the paper: evaluate any CLIP with ``--depth``. This method adds an adapter of a few numbers on a
frozen CLIP: the distances of the words (``bins``), for each class of scenes if there are several, the temperature and,
if asked for, the words' vectors. With the truth d*, the depth d resized to it and g = log d - log d* at the valid
pixels of an image, its loss is the mean over images of (Eigen, Puhrsch, Fergus, 2014, arXiv 1406.2283, equation 4)

    L = mean(g^2) - lambda mean(g)^2

``mode`` is the map that is compared. ``released`` is that of the authors' code: the map has 2048 numbers, texts have
1024, so it resizes the channels (which keeps 0, 2, 4, ...), after the normalisation. ``projected`` applies the value
and output projections of CLIP's attention pool at each location, which puts the map into the space of texts.

Differences from the authors' code: none in ``released`` with an image whose sides are multiples of 32; others are
resized to the nearest ones. Vision transformers, bins of classes of scenes and training are ours; few-shot work with
trained bins and prompts is Hu et al., 2023, arXiv 2311.01034.

Left out: the tuning of words and bins by hand (the paper's ablations; any words and bins can be given).

To hold a run against (table 1 as recalled, NYUv2, Eigen crop): delta 1.25 .394, 1.25^2 .683, 1.25^3 .851, absolute
relative error .388, log10 .156, RMSE 1.167 m.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import require
from pipeline.loaders.batches import Reader
from pipeline.loaders.depth import Box, DepthRange, DepthReader
from pipeline.loaders.depth_figures import samples_with_depth
from pipeline.models import clip
from pipeline.models.depth_words import NEAREST, DepthHead, DepthWords, WordDepth, word_vectors
from pipeline.models.towers import openclip
from pipeline.models.towers.grid import RESNET_STRIDE
from pipeline.models.towers.layers import Layer
from pipeline.models.towers.spatial import check_spatial
from pipeline.shards.depth_values import DEPTH_FIELD
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import Wanted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Trained = Literal["bins", "temperature", "words"]


@dataclass(frozen=True, kw_only=True)
class Config(clip.Config):
    """The words, what is trained, and CLIP's settings; its losses, temperature and locks have no effect."""

    architecture: str = "RN50-quickgelu"
    """open_clip architecture with a ResNet or a vision transformer, local-dir:FOLDER or hf-hub:REPO."""
    pretrained: str | None = "openai"
    """Weights of the frozen CLIP: a tag of the architecture, a file, or a checkpoint folder (path or URI)."""
    flip: float = 0.5
    """Probability of mirroring a training image."""
    words: DepthWords = field(default_factory=DepthWords)
    trained: tuple[Trained, ...] = ("bins", "temperature")
    """Parts that are trained: bins (a number for each word and class of scenes), temperature (one), words (a vector for
    each word)."""
    input_size: tuple[int, int] | None = None
    """Height and width to which training images are squashed: multiples of 32 for a ResNet, of the patch for a
    transformer; none for the model's own size."""
    input_crop: Box | None = None
    """Top, bottom, left and right of the part of training images that is used: 56 472 60 604 for NYUv2; none = all."""
    depth_range: DepthRange = DepthRange()
    scene_key: str = "scene"
    """Key of the class of the scene in the samples' json."""
    variance: float = 0.5
    """Lambda: part of the loss that a wrong scale of a whole image is forgiven, 0 to less than 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = self.trained
        require(
            bool(parts) and len(set(parts)) == len(parts), "trained", parts, "bins, temperature or words, each once"
        )
        require(0 <= self.variance < 1, "variance", self.variance, "0 to less than 1")
        require(not self.teacher, "teacher", self.teacher, "nothing: this method has no distillation")
        size = self.input_size
        require(size is None or min(size) >= 1, "input_size", size, "two numbers of pixels, or none")
        box = self.input_crop
        inside = box is None or (0 <= box[0] < box[1] and 0 <= box[2] < box[3])
        require(inside, "input_crop", box, "top, bottom, left and right, in this order, or none")


class DepthClip(clip.Clip):
    """A frozen CLIP with trained distances of words."""

    batch_keys: ClassVar[tuple[str, ...]] = ("image", "depth", "valid", "scene")
    registered_as: ClassVar[str] = "depthclip"
    config: Config

    def __init__(self, config: Config, description: Mapping[str, str] | None = None) -> None:
        """``description`` is given if weights are restored afterwards; words are not encoded then."""
        super().__init__(config, description)
        check_spatial(self.model.visual, config.architecture)
        width = int(openclip.check_architecture(config.architecture)["embed_dim"])
        empty = description is not None
        vectors = torch.zeros(len(config.words.words), width) if empty else word_vectors(self.eval(), config.words)
        self.head = DepthHead(vectors, config.words, config.trained)
        self.train()

    @classmethod
    def smallest(cls) -> Config:
        """The smallest CLIP with bins for four classes of scenes; a softmax that random weights do not saturate."""
        words = DepthWords(mode="projected", word_temperature=0.1, scenes=("red", "green", "blue", "yellow"))
        return Config(architecture="clipmill-tiny", pretrained=None, words=words, scene_key="label")

    @classmethod
    def check(cls, config: clip.Config) -> None:
        """As CLIP's; ``input_size`` is that of whole cells of the map."""
        super().check(config)
        assert isinstance(config, Config)
        vision = openclip.check_architecture(config.architecture)["vision_cfg"]
        cell = RESNET_STRIDE if isinstance(vision.get("layers"), list) else int(vision.get("patch_size") or 1)
        whole = all(side % cell == 0 for side in config.input_size or ())
        allowed = f"two multiples of {cell} pixels, as {config.architecture} has, or none"
        require(whole, "input_size", config.input_size, allowed)

    def _locked(self) -> tuple[nn.Module, ...]:
        """All of the CLIP."""
        self.model.requires_grad_(False)
        return (self.model,)

    @classmethod
    def sample_fields(cls, config: Any, settings: Any = None) -> Sequence[str]:
        """Images and depth maps, and the json with the class of the scene."""
        return ("image", DEPTH_FIELD, *(["json"] if config.words.scenes else []))

    @classmethod
    def sidecars(cls, config: Any, settings: Any = None) -> Sequence[Wanted]:
        """None: captions are not read."""
        return []

    def readers(self, train: bool, *, seed: int = 0, settings: Any = None) -> Sequence[Reader]:
        """Images and depth maps of one size."""
        config, own = self.config, self.transforms(train=False).size
        return [
            DepthReader(
                size=config.input_size or own,
                depth_range=config.depth_range,
                crop=config.input_crop,
                flip=config.flip if train else 0.0,
                scenes=config.words.scenes,
                scene_key=config.scene_key,
                seed=seed,
            )
        ]

    @classmethod
    def samples_figure(cls, config: Any, settings: Any, samples: Sequence[Sample], title: str) -> "Figure":
        """Images beside their depth maps."""
        return samples_with_depth(samples, config.depth_range, title)

    @cached_property
    def _words(self) -> WordDepth:
        return WordDepth(self, self.config.words, self.head)

    @property
    def scenes(self) -> tuple[str, ...]:
        """The classes of scenes with bins of their own."""
        return self.config.words.scenes

    def estimate_depth(
        self, images: Sequence[Tensor], scenes: Sequence[int] | None = None, flip: bool = True
    ) -> list[Tensor]:
        """See :class:`~pipeline.models.depth_words.DepthEstimator`."""
        return self._words.estimate_depth(images, scenes, flip)

    def embed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss of each image, float32 [B]."""
        found = self._words.map(batch["image"])
        with torch.autocast(found.device.type, enabled=False):
            depth = self.head(found, batch["scene"])
            size = batch["depth"].shape[1:]
            whole = functional.interpolate(depth[:, None], size=size, mode="bilinear", align_corners=True)[:, 0]
            return {"losses": log_loss(whole, batch["depth"], batch["valid"], self.config.variance)}

    def compare(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean over images."""
        return {"log_depth": embeddings["losses"].mean()}

    def lengths(self, batch: Mapping[str, Tensor]) -> Mapping[str, int]:
        """All images have one size."""
        return {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Nothing decays: a bin of zero metres is no simpler than another."""
        return [{"params": [one for one in self.parameters() if one.requires_grad], "weight_decay": 0.0}]

    def layers(self) -> Mapping[str, Layer]:
        """The head is a tower of its own."""
        return {**super().layers(), **{f"head.{name}": Layer("head", 0) for name, _ in self.head.named_parameters()}}

    def after_step(self) -> None:
        """Distances stay positive."""
        with torch.no_grad():
            self.head.bins.clamp_(min=NEAREST)

    def measures(self) -> dict[str, float]:
        """The temperature, and the nearest and the farthest bin in metres."""
        bins = self.head.bins.detach()
        return {
            "temperature": float((-self.head.log_scale.detach()).exp()),
            "nearest_bin": float(bins.min()),
            "farthest_bin": float(bins.max()),
        }


def log_loss(depth: Tensor, truth: Tensor, valid: Tensor, variance: float) -> Tensor:
    """The loss of each image, float32 [B], of metres [B, H, W]; 0 for an image without a valid pixel."""
    gap = depth.clamp(min=NEAREST).log() - torch.where(valid, truth, 1.0).log()
    gap = torch.where(valid, gap, 0.0).flatten(1)
    count = valid.flatten(1).sum(dim=1).clamp(min=1)
    mean = gap.sum(dim=1) / count
    return (gap**2).sum(dim=1) / count - variance * mean**2
