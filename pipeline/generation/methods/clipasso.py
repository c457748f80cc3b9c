"""CLIPasso: Semantically-Aware Object Sketching.

Vinker, Pajouheshgar, Bo, Bachmann, Bermano, Cohen-Or, Zamir, Shamir, 2022, arXiv 2202.05822

The idea: a sketch of a photo is a few black strokes whose features are those of the photo. With features F_l of chosen
layers of CLIP's image tower and its embedding E, a sketch s, a photo p, and views a_0 (none) to a_K (a random
perspective and a crop, the same for both), the loss is the mean over views of

    L = sum_l w_l mean (F_l(a_k s) - F_l(a_k p))^2 + 0.1 (1 - cos(E(a_k s), E(a_k p)))

Strokes are single cubic curves of fixed width; only their control points are trained. They start where another CLIP
looks (the attention of its class token, mean over heads and layers) and where the photo has edges (XDoG): the product
of both becomes probabilities by a softmax with temperature 0.3 over its positive pixels. The number of strokes is the
level of abstraction. Of several seeds, the one with the lowest loss without augmentation is the sketch.

Left out: the U2-Net that masks the background, whose weights are elsewhere; give an image with alpha, or a mask.

To hold a run against: the paper's table 1, recognition of classes by CLIP's zero-shot classifier and by people, which
grows with the number of strokes (4, 8, 16, 32).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config import require
from pipeline.errors import SettingError
from pipeline.generation.attention import LayerFeatures, attention_maps
from pipeline.generation.curves import Strokes
from pipeline.generation.guides import Guide
from pipeline.generation.loop import LoopConfig, Objective, Picture
from pipeline.generation.method import NO_CODES, GenerationMethod, Subject
from pipeline.generation.streams import Draw, generators, uniform
from pipeline.generation.stroke_picture import StrokePicture, StrokeRates
from pipeline.generation.views import PerspectiveCrops, resized
from pipeline.models.towers.image_codes import ImageCodes


@dataclass(frozen=True, kw_only=True)
class Config:
    """The sketch and its optimisation, with the paper's values."""

    clip: str = "RN101-quickgelu:openai"
    """CLIP whose features are compared, as an address of a checkpoint or ARCHITECTURE:WEIGHTS."""
    layers: tuple[str, ...] = ("layer2", "layer3")
    """Modules of its image tower whose outputs are compared; none compares embeddings alone."""
    layer_weights: tuple[float, ...] = ()
    """Weights of the layers; none for 1 each."""
    embedding_weight: float = 0.1
    """Weight of the cosine distance of embeddings."""
    start: Literal["salient", "attention", "edges", "random"] = "salient"
    """First points: attention times edges, one of the two, or anywhere."""
    saliency: str = "ViT-B-32-quickgelu:openai"
    """CLIP whose attention says where strokes start."""
    attention_layers: int = 0
    """Last layers whose attention is averaged; 0 for all."""
    temperature: float = 0.3
    """Temperature of the softmax that turns saliency into probabilities."""
    strokes: int = 16
    """Number of strokes, the level of abstraction: the paper has 4, 8, 16 and 32."""
    width: float = 1.5
    """Width of strokes in pixels."""
    side: int = 224
    """Side of the sketch in pixels."""
    views: int = 4
    """Augmented views in a step, beside the sketch itself."""
    rate: float = 1.0
    """Learning rate of control points, in pixels."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=2001, patience=2))

    def __post_init__(self) -> None:
        for name in ("strokes", "views"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(16 <= self.side <= 4096, "side", self.side, "16 to 4096")
        for name in ("width", "rate", "temperature"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "more than 0")
        fits = len(self.layer_weights) in (0, len(self.layers))
        require(fits, "layer_weights", self.layer_weights, f"{len(self.layers)} numbers, one for each of the layers")
        finite = all(map(math.isfinite, self.layer_weights))
        require(finite, "layer_weights", self.layer_weights, "finite numbers")
        require(0 <= self.embedding_weight < math.inf, "embedding_weight", self.embedding_weight, "0 or more")
        some = bool(self.layers) or self.embedding_weight > 0
        require(some, "layers", self.layers, "one layer, or an embedding_weight above 0")
        require(self.attention_layers >= 0, "attention_layers", self.attention_layers, "0 or more")


class ClipAsso(GenerationMethod):
    """Strokes that fit an image."""

    reads: ClassVar[Literal["text", "image"]] = "image"
    config: Config

    @property
    def models(self) -> tuple[str, ...]:
        """The one that is compared and, if needed, the one that looks."""
        looks = self.config.start in ("salient", "attention")
        return (self.config.clip, *([self.config.saliency] if looks else []))

    def check(self, subject: Subject) -> None:
        """An image has edges at which all strokes can start."""
        config = self.config
        if subject.image is None or config.start not in ("salient", "edges"):
            return
        photo = resized(subject.image[None], (config.side, config.side))[0]
        salient_strokes(start_probabilities(edges(photo)[None], config.temperature), [0], config.strokes, config.width)

    def start(
        self,
        subjects: Sequence[Subject],
        seeds: Sequence[int],
        guides: Mapping[str, Guide],
        codes: Mapping[str, ImageCodes] = NO_CODES,
    ) -> tuple[Picture, Objective]:
        """Strokes at salient places."""
        config, guide = self.config, guides[self.config.clip]
        size = (config.side, config.side)
        images = [one.image for one in subjects if one.image is not None]
        require(len(images) == len(subjects), "images", len(images), f"an image for each of {len(subjects)} sketches")
        photos = torch.cat([resized(one[None].to(guide.device), size) for one in images])
        probabilities = start_probabilities(self._saliency(photos, guides), config.temperature)
        first = salient_strokes(probabilities.cpu(), seeds, config.strokes, config.width)
        sketch = StrokePicture(first, config.side, StrokeRates(points=config.rate))
        weights = config.layer_weights or (1.0,) * len(config.layers)
        views = PerspectiveCrops(count=config.views, scale=(0.8, 0.8), ratio=(1.0, 1.0), fill=0.0)
        features = LayerFeatures(guide, config.layers)
        objective = SketchObjective(photos, features, weights, config.embedding_weight, views)
        return sketch.to(guide.device), objective

    def _saliency(self, photos: Tensor, guides: Mapping[str, Guide]) -> Tensor:
        """Where strokes may start, float [N, side, side], 0 or more."""
        config = self.config
        found = torch.ones_like(photos[:, 0])
        if config.start in ("salient", "attention"):
            maps = attention_maps(guides[config.saliency], photos, config.attention_layers)
            large = functional.interpolate(maps[:, None], photos.shape[2:], mode="bicubic", align_corners=False)[:, 0]
            low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
            found = found * ((large - low) / (high - low).clamp(min=1e-12)).to(found)
        if config.start in ("salient", "edges"):
            found = found * torch.stack([edges(photo) for photo in photos]).to(found)
        return found


class SketchObjective:
    """The features of sketches are those of their photos, in the same views."""

    def __init__(
        self,
        photos: Tensor,
        features: LayerFeatures,
        weights: Sequence[float],
        embedding_weight: float,
        views: PerspectiveCrops,
    ) -> None:
        self.photos, self.features, self.views = photos, features, views
        self.weights, self.embedding_weight = tuple(weights), embedding_weight

    def losses(self, images: Tensor, random: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Of the sketch and its augmented views."""
        random_numbers, size = self.views.draw(random), (images.shape[2], images.shape[3])
        both = []
        for one in (images, self.photos):
            views = self.views.apply(one, random_numbers, size).unflatten(0, (len(one), self.views.count))
            both.append(torch.cat([one[:, None], views], dim=1).flatten(0, 1))
        return self.compared(both[0], both[1], len(images))

    def evaluation(self, images: Tensor) -> Tensor:
        """Of the sketch as it is."""
        return torch.stack(list(self.compared(images, self.photos, len(images)).values())).sum(0)

    def references(self, guide: Guide) -> Tensor:
        """The photos."""
        with torch.no_grad():
            return guide.images(self.photos)

    def compared(self, sketches: Tensor, photos: Tensor, images: int) -> dict[str, Tensor]:
        """Losses [N] of views [N x V, 3, H, W], each against its photo."""
        with torch.no_grad():
            wanted, theirs = self.features(photos)
        layers, ours = self.features(sketches)
        losses = {}
        for name, weight, one, other in zip(self.features.names, self.weights, layers, wanted, strict=True):
            losses[name] = weight * (one - other).square().flatten(1).mean(1)
        losses["embedding"] = self.embedding_weight * (1 - functional.cosine_similarity(ours, theirs))
        return {name: loss.unflatten(0, (images, -1)).mean(1) for name, loss in losses.items()}


def edges(photo: Tensor) -> Tensor:
    """1 on the edges of an image [3, H, W] from 0 to 1, 0 elsewhere: float32 [H, W].

    XDoG (Winnemöller, Kyprianidis, Olsen, 2012) with the authors' values: sigma 0.8, k 10, gamma 0.98, phi 200,
    epsilon -0.1, and Otsu's threshold.
    """
    grey = (photo.detach().cpu().float().numpy().transpose(1, 2, 0) @ (0.2125, 0.7154, 0.0721)).astype(np.float32)
    fine, coarse = (cv2.GaussianBlur(grey, (0, 0), sigma, borderType=cv2.BORDER_REFLECT) for sigma in (0.8, 8.0))
    difference = fine - 0.98 * coarse
    light = np.where(difference < -0.1, 1.0, 1.0 + np.tanh(200 * difference))
    light -= light.min()
    if not light.any():  # one colour
        return torch.zeros(grey.shape)
    levels = np.round(255 * light / light.max()).astype(np.uint8)
    _, paper = cv2.threshold(levels, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return 1 - torch.from_numpy(paper.astype(np.float32))


def start_probabilities(saliency: Tensor, temperature: float) -> Tensor:
    """Probabilities [N, H, W] of first points: a softmax over the positive pixels, 0 elsewhere.

    Raises:
        SettingError: an image without positive pixels.
    """
    positive = saliency > 0
    require(bool(positive.flatten(1).any(1).all()), "images", "an image without edges", "images that show something")
    logits = (saliency / temperature).masked_fill(~positive, -torch.inf)
    return logits.flatten(1).softmax(1).view_as(saliency)


def salient_strokes(probabilities: Tensor, seeds: Sequence[int], count: int, width: float) -> Strokes:
    """Black curves whose first points are sampled without replacement, the others near the ones before.

    Raises:
        SettingError: fewer places than strokes.
    """
    side = probabilities.shape[2]
    random = generators(seeds, 0, Draw.START)
    places = []
    for chances, one in zip(probabilities.flatten(1), random, strict=True):
        some = int((chances > 0).sum())
        if some < count:
            raise SettingError("strokes", count, f"at most {some}, the pixels at which strokes may start")
        places.append(torch.multinomial(chances, count, replacement=False, generator=one))
    cells = torch.stack(places)
    begin = torch.stack([cells % side, cells // side], dim=2).float()[:, :, None] + 0.5
    steps = (uniform(random, count, 3, 2) - 0.5) * 0.05 * side
    return Strokes(
        points=torch.cat([begin, begin + steps.cumsum(2)], dim=2),
        widths=torch.full((len(seeds), count), width),
        colours=torch.tensor([0.0, 0, 0, 1]).expand(len(seeds), count, 4).clone(),
    )
