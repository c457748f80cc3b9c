"""A model that computes features of stored images and captions, for ``stages/annotate/embeddings.py``."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.config import require
from pipeline.evaluation.encoder import Evaluable, inference
from pipeline.evaluation.models import load_model
from pipeline.evaluation.zero_shot import classifier
from pipeline.loaders.images import crop_bits, decode, read_crops
from pipeline.loaders.samples import UnreadableSample
from pipeline.loaders.text import cut_text
from pipeline.models.adapters.adapter import FrozenClip
from pipeline.models.clip import Clip
from pipeline.models.towers.weights import digest_of

Precision = Literal["fp32", "bf16"]
VIEWS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Views:
    """The views of an image to embed: view 0 as in evaluation, then random crops.

    View v of a sample is a pure function of (seed, v, key): more views do not change the first ones.
    """

    views: int = 10
    """Number of random crops per image, 0 to 1000; 0 for test images."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Range of a random crop's area, as a part of the image, 0 to 1; default Tip-Adapter's, CoOp uses 0.08 to 1."""
    flip: float = 0.5
    """Probability of mirroring a random crop."""
    seed: int = 0
    """Seed of the random crops."""

    def __post_init__(self) -> None:
        require(0 <= self.views <= 1000, "views", self.views, "0 to 1000")
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2**63 - 1")
        low, high = self.crop_scale
        require(0 < low <= high <= 1, "crop_scale", self.crop_scale, "0 < low <= high <= 1")
        require(0 <= self.flip <= 1, "flip", self.flip, "0 to 1")


@dataclass(frozen=True, kw_only=True)
class LoadEmbedder:
    """Loads the model at ``checkpoint`` (see :func:`pipeline.evaluation.models.load_model`) when it is called."""

    checkpoint: str
    device: str = "auto"
    precision: Precision = "fp32"
    views: Views | None = None
    """Compute raw features of several views instead of unit features of images and captions."""

    def __call__(self, threads: int) -> "ModelEmbedder | ViewEmbedder":
        """``threads`` is the number of CPU threads for the model, if it does not run on a GPU.

        Raises:
            SettingError: no such checkpoint; or views of a model that is not a CLIP.
        """
        model = load_model(self.checkpoint, self.device)
        if not torch.cuda.is_available() or self.device == "cpu":
            torch.set_num_threads(threads)
        if self.views is None:
            return ModelEmbedder(model, self.precision)
        require(isinstance(model, Clip), "checkpoint", self.checkpoint, "a CLIP, for raw features of views")
        return ViewEmbedder(model, self.views, self.precision)


class ModelEmbedder:
    """A model with its own evaluation transform and tokenizer."""

    facts: Mapping[str, str | int] = {}
    reads_text = True

    def __init__(self, model: Evaluable, precision: Precision = "fp32") -> None:
        self._model, self._precision = model, precision
        self._transform = model.transforms(train=False)
        self.maker = digest_of(model, repr(self._transform), precision)

    def prepare(self, image: bytes, key: str = "") -> Tensor | None:
        """The image as uint8 [3, H, W]; ``None`` if it cannot be decoded."""
        try:
            return self._transform(decode(image))
        except UnreadableSample:
            return None

    def encode_image(self, images: Sequence[Tensor]) -> NDArray[np.float32]:
        """uint8 B × [3, H, W] -> L2-normalised [B, D]."""
        with inference(self._model, self._precision) as device:
            return _normalised(self._model.encode_image(torch.stack(list(images)).to(device)))

    def encode_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """B texts -> L2-normalised [B, D]."""
        tokens = cut_text(self._model.tokenizer(list(texts)), getattr(self._model, "end_of_text", None))
        with inference(self._model, self._precision) as device:
            return _normalised(self._model.encode_text(tokens.to(device)))


class ViewEmbedder:
    """A CLIP that computes raw features of several views of each image, for few-shot methods."""

    reads_text = False

    def __init__(self, model: Evaluable, views: Views, precision: Precision = "fp32") -> None:
        """``model`` is a :class:`Clip`."""
        self._model, self._precision, self._views = model, precision, views
        self._clip = FrozenClip(cast(Clip, model), classifier)
        self._still = model.transforms(train=False)
        self._random = replace(self._still, crop="resized", scale=views.crop_scale, flip=views.flip)
        settings = (repr(self._still), repr(self._random) if views.views else "", repr(views.seed), precision)
        self.maker = digest_of(model, "raw views", str(views.views), *settings)
        self.facts: Mapping[str, str | int] = {
            "views": 1 + views.views,
            "still": settings[0],
            "random": settings[1],
            "seed": views.seed,
        }

    def prepare(self, image: bytes, key: str) -> Tensor | None:
        """The views as uint8 [V, 3, H, W]; ``None`` if the image cannot be decoded."""
        number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
        bits = [crop_bits(self._views.seed, view, number) for view in range(1, 1 + self._views.views)]
        try:
            still = self._still.read(image)
            crops = read_crops(image, [(self._random, random) for random in bits]) if bits else []
            return torch.stack([still, *crops])
        except UnreadableSample:
            return None

    def encode_image(self, images: Sequence[Tensor]) -> NDArray[np.float32]:
        """uint8 B x [V, 3, H, W] -> raw features [B, V, D]."""
        views = torch.cat(list(images))
        with inference(self._model, self._precision):
            features = torch.cat([self._clip.raw_features(part).cpu() for part in views.split(VIEWS_AT_ONCE)])
        raw: NDArray[np.float32] = features.unflatten(0, (len(images), -1)).numpy()
        return raw

    def encode_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Not supported: texts have no views."""
        raise AssertionError("views are of images alone")


def _normalised(features: Tensor) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = functional.normalize(features.float(), dim=-1).cpu().numpy()
    return unit
