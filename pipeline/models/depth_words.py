"""Distances by words: the vectors of words for distances, the distance of each word, and what they make of a map.

With the vector x of a location, the unit vectors t_k of K words ("This object is far"), their distances b_k in metres
("bins") and the temperature T, the depth is

    sum_k softmax_k(x.t_k / T) b_k

Bins may depend on the class of the scene: "far" is farther in a hall than in a bathroom. The class is given with an
image, or CLIP names it. The bins of an unknown class are the mean over classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import require
from pipeline.loaders.images import resize
from pipeline.models.class_vectors import class_vectors
from pipeline.models.towers.grid import grid_features
from pipeline.models.towers.spatial import check_spatial, map_size, projected_map

if TYPE_CHECKING:
    from pipeline.models.clip import Clip

WORDS = ("giant", "extremely close", "close", "not in distance", "a little remote", "far", "unseen")
BINS = (1.00, 1.50, 2.00, 2.25, 2.50, 2.75, 3.00)
TEMPLATE = "This object is {}"
SCENE_TEMPLATES = ("a photo of a {}.",)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NEAREST = 1e-3  # metres; no bin is nearer
MapMode = Literal["released", "projected"]


@dataclass(frozen=True, kw_only=True)
class DepthWords:
    """Words for distances and how they are compared with an image, with the authors' values."""

    mode: MapMode = "released"
    """Map that is compared with words: released (the authors' code: the tower's last map as unit vectors, then as many
    of its channels as texts have, in RN50 every second one), or projected (into the space of texts)."""
    words: tuple[str, ...] = WORDS
    """Words for distances, from near to far; quote those of several words."""
    template: str = TEMPLATE
    """Prompt with {} for a word."""
    bins: tuple[float, ...] = BINS
    """Distance of each word in metres, for each class of scenes unless `scene_bins` are given."""
    word_temperature: float = 1e-3
    """Temperature of the softmax over words; the authors multiply cosines by 100 and divide by 0.1."""
    pixels: Literal["imagenet", "model"] = "imagenet"
    """Normalisation of the pixels: by the statistics of imagenet, as the authors do, or by the model's own."""
    scenes: tuple[str, ...] = ()
    """Classes of scenes with bins of their own, such as kitchen bathroom; an unknown one gets their mean. None for the
    same bins everywhere."""
    scene_bins: Annotated[tuple[tuple[float, ...], ...], tyro.conf.UseAppendAction] = ()
    """Distances of the words in a class of scenes; repeat the option for each of `scenes`. Empty = `bins` for all."""

    def __post_init__(self) -> None:
        count = len(self.words)
        require(count >= 2 and len(set(self.words)) == count, "words", self.words, "two or more words, each once")
        require(self.template.count("{}") == 1, "template", self.template, "one {} for the word")
        require(0 < self.word_temperature <= 100, "word_temperature", self.word_temperature, "more than 0, up to 100")
        require(len(set(self.scenes)) == len(self.scenes), "scenes", self.scenes, "distinct names")
        each = self.scene_bins or tuple(self.bins for _ in self.scenes)
        require(len(each) == len(self.scenes), "scene_bins", len(each), f"one for each of {len(self.scenes)} scenes")
        for name, bins in (("bins", self.bins), *(("scene_bins", one) for one in self.scene_bins)):
            known = len(bins) == count and all(math.isfinite(one) and one >= NEAREST for one in bins)
            require(known, name, bins, f"{count} distances in metres, one for each word")

    def table(self) -> Tensor:
        """Float32 [S, K]: the bins of each class of scenes; without classes one row."""
        return torch.tensor(self.scene_bins or [self.bins] * max(1, len(self.scenes)))


class DepthEstimator(Protocol):
    """A method that gives the depth of images."""

    @property
    def scenes(self) -> tuple[str, ...]:
        """The classes of scenes that it distinguishes; empty if none."""
        ...

    def estimate_depth(
        self, images: Sequence[Tensor], scenes: Sequence[int] | None = None, flip: bool = True
    ) -> list[Tensor]:
        """The distance of every pixel of ``images``, uint8 [3, H, W] of any sizes: float32 [H, W] on the CPU, metres.

        ``scenes`` are the positions of the images' classes in :attr:`scenes`, -1 for an unknown one; ``None`` lets the
        method name them. ``flip`` averages with the mirrored image.
        """
        ...


class DepthHead(nn.Module):
    """Vectors of words, bins and the temperature; those that are trained have gradients."""

    def __init__(self, vectors: Tensor, words: DepthWords, trained: Sequence[str] = ()) -> None:
        """``vectors``: unit float32 [K, D]; ``trained``: some of bins, temperature and words."""
        super().__init__()
        self.vectors = nn.Parameter(vectors.clone(), requires_grad="words" in trained)
        self.bins = nn.Parameter(words.table(), requires_grad="bins" in trained)
        scale = torch.tensor(-math.log(words.word_temperature))
        self.log_scale = nn.Parameter(scale, requires_grad="temperature" in trained)

    def forward(self, found: Tensor, scenes: Tensor) -> Tensor:
        """float32 [B, D, h, w] and int64 [B], the classes of the scenes, to metres, float32 [B, h, w].

        A class of -1 is unknown: its bins are the mean over classes, so it trains those of all.
        """
        vectors = functional.normalize(self.vectors, dim=-1)
        logits = self.log_scale.exp() * torch.einsum("bdhw,kd->bkhw", found, vectors)
        bins = torch.cat([self.bins.mean(dim=0, keepdim=True), self.bins])[scenes + 1]
        return torch.einsum("bkhw,bk->bhw", logits.softmax(dim=1), bins)


def released_map(found: Tensor, width: int) -> Tensor:
    """A map [B, C, h, w] as the authors compare it: unit vectors, then ``width`` of their channels at equal distances.

    Of 2048 channels for texts of 1024 numbers these are 0, 2, 4, ... The result is no unit vector.
    """
    unit = functional.normalize(found, dim=1)
    picked = torch.arange(width, device=found.device) * found.shape[1] // width
    return unit[:, picked]


class WordDepth:
    """The depth that a CLIP's map and a head of words give: a :class:`DepthEstimator`."""

    def __init__(self, clip: "Clip", words: DepthWords, head: DepthHead) -> None:
        self.clip, self.words, self.head = clip, words, head
        self._scene_vectors: Tensor | None = None

    @property
    def scenes(self) -> tuple[str, ...]:
        """The classes of scenes with bins of their own."""
        return self.words.scenes

    def map(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to the map that is compared with words, float32 [B, D, h, w].

        Always in float32: with the authors' temperature, bfloat16 would round logits by whole units.
        """
        visual: Any = self.clip.model.visual
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            found = grid_features(visual, self._normalised(images))
            if self.words.mode == "released":
                return released_map(found, self.head.vectors.shape[1])
            return functional.normalize(projected_map(visual, found), dim=1)

    def _normalised(self, images: Tensor) -> Tensor:
        if self.words.pixels == "model":
            return (images.float() - self.clip.mean) / self.clip.std
        mean, std = (torch.tensor(one, device=images.device).view(1, 3, 1, 1) * 255 for one in IMAGENET)
        return (images.float() - mean) / std

    @torch.no_grad()
    def estimate_depth(
        self, images: Sequence[Tensor], scenes: Sequence[int] | None = None, flip: bool = True
    ) -> list[Tensor]:
        """See :class:`DepthEstimator`; the map is resized bilinearly with aligned corners, as in the authors' code."""
        if scenes is None:
            scenes = self._named(images) if self.scenes else [-1] * len(images)
        return [self._estimated(image, scene, flip) for image, scene in zip(images, scenes, strict=True)]

    def _estimated(self, image: Tensor, scene: int, flip: bool) -> Tensor:
        height, width = image.shape[1:]
        device = self.head.bins.device
        size = map_size(self.clip.model.visual, height, width)
        pixels = resize(image.permute(1, 2, 0).cpu().numpy(), size, "bilinear")[None].to(device)
        row = torch.tensor([scene], device=device)
        with torch.autocast(device.type, enabled=False):
            depth = self.head(self.map(pixels), row)
            if flip:
                depth = (depth + self.head(self.map(pixels.flip(-1)), row).flip(-1)) / 2
            whole = functional.interpolate(depth[:, None], size=(height, width), mode="bilinear", align_corners=True)
        return whole[0, 0].cpu()

    def _named(self, images: Sequence[Tensor]) -> list[int]:
        """The scene of each image, as the CLIP names it among the classes."""
        if self._scene_vectors is None:
            self._scene_vectors = class_vectors(self.clip, self.scenes, SCENE_TEMPLATES)
        transform = self.clip.transforms(train=False)
        device = self.head.bins.device
        pixels = torch.stack([transform(image.permute(1, 2, 0).cpu().numpy(), None) for image in images])
        scores = self.clip.encode_image(pixels.to(device)) @ self._scene_vectors.to(device).T
        named: list[int] = scores.argmax(dim=1).tolist()
        return named


def word_vectors(clip: "Clip", words: DepthWords) -> Tensor:
    """The unit vectors of the words in their prompt, float32 [K, D]."""
    return class_vectors(clip, words.words, (words.template,))


def zero_shot_depth(clip: "Clip", words: DepthWords, address: str) -> WordDepth:
    """The depth that a CLIP gives without training.

    Raises:
        SettingError: its image tower has no map.
    """
    check_spatial(clip.model.visual, address)
    head = DepthHead(word_vectors(clip, words), words).to(clip.mean.device)
    return WordDepth(clip, words, head.requires_grad_(False))
