"""A model that computes features of stored images, sounds and captions, for ``stages/annotate/embeddings.py``."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import require
from pipeline.evaluation.encoder import Evaluable, encode_tokens, inference
from pipeline.evaluation.media import TEXT, encode_inputs, encoded_media, medium_reader
from pipeline.evaluation.models import load_any
from pipeline.evaluation.point_clip import CloudEmbedder, CloudViews
from pipeline.evaluation.zero_shot import classifier
from pipeline.loaders.batches import sidecars_of
from pipeline.loaders.images import crop_bits, read_crops
from pipeline.loaders.samples import UnreadableSample
from pipeline.models.adapters.adapter import FrozenClip
from pipeline.models.clip import Clip
from pipeline.models.towers.weights import digest_of
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import Wanted
from pipeline.stages.annotate.embeddings import caption_of

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
    """Loads the model at ``checkpoint`` (see :func:`pipeline.evaluation.models.load_any`) when it is called."""

    checkpoint: str
    device: str = "auto"
    precision: Precision = "fp32"
    views: Views | None = None
    """Compute raw features of several views of images instead of unit features of all media."""
    clouds: CloudViews | None = None
    """Compute raw features of the views of point clouds instead."""

    def __call__(self, threads: int) -> "ModelEmbedder | ViewEmbedder | CloudEmbedder":
        """``threads`` is the number of CPU threads for the model, if it does not run on a GPU.

        Raises:
            SettingError: no such checkpoint, a model that encodes nothing; or views of a model that is not a CLIP.
        """
        model = load_any(self.checkpoint, self.device)
        if not torch.cuda.is_available() or self.device == "cpu":
            torch.set_num_threads(threads)
        if self.views is None and self.clouds is None:
            return ModelEmbedder(model, self.precision)
        require(isinstance(model, Clip), "checkpoint", self.checkpoint, "a CLIP, for raw features of views")
        if self.clouds is not None:
            return CloudEmbedder(model, self.clouds, self.precision)
        assert self.views is not None
        return ViewEmbedder(cast(Evaluable, model), self.views, self.precision)


class ModelEmbedder:
    """A model with its own readers, without augmentation, and tokenizer."""

    facts: Mapping[str, str | int] = {}

    def __init__(self, model: Any, precision: Precision = "fp32") -> None:
        require(bool(encoded_media(model)), "checkpoint", type(model).__name__, "a model that encodes images or texts")
        self._model, self._precision = model, precision
        self.media = encoded_media(model)
        self._readers = {medium: medium_reader(model, medium) for medium in self.media if medium != TEXT}
        self.sidecars = sidecars_of(self._readers.values())
        # Digests of models of images and texts alone stay what they were before there were other media.
        others = [repr(reader) for medium, reader in self._readers.items() if medium != "image"]
        looks = [repr(model.transforms(train=False))] if "image" in self.media else []
        self.maker = digest_of(model, *looks, precision, *others)

    def prepare(self, sample: Sample, medium: str) -> Any | None:
        """The reader's row, or the caption; ``None`` without a readable one."""
        if medium == TEXT:
            return caption_of(sample)
        try:
            return self._readers[medium].read(sample, None)
        except UnreadableSample:
            return None

    def encode(self, medium: str, inputs: Sequence[Any]) -> NDArray[np.float32]:
        """B rows of the medium's reader, or captions, -> L2-normalised [B, D]."""
        with inference(self._model, self._precision) as device:
            if medium == TEXT:
                return _array(encode_tokens(self._model, self._model.tokenizer(list(inputs)), device))
            batch = self._readers[medium].collate(list(inputs))
            return _array(encode_inputs(self._model, medium, batch, device))


class ViewEmbedder:
    """A CLIP that computes raw features of several views of each image, for few-shot methods."""

    media: tuple[str, ...] = ("image",)
    sidecars: tuple[Wanted, ...] = ()

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

    def prepare(self, sample: Sample, medium: str) -> Tensor | None:
        """The views as uint8 [V, 3, H, W]; ``None`` if there is no image that can be decoded."""
        image = sample.image()
        if image is None:
            return None
        number = int.from_bytes(hashlib.sha256(sample.key.encode()).digest()[:8], "big")
        bits = [crop_bits(self._views.seed, view, number) for view in range(1, 1 + self._views.views)]
        try:
            still = self._still.read(image)
            crops = read_crops(image, [(self._random, random) for random in bits]) if bits else []
            return torch.stack([still, *crops])
        except UnreadableSample:
            return None

    def encode(self, medium: str, inputs: Sequence[Tensor]) -> NDArray[np.float32]:
        """uint8 B x [V, 3, H, W] -> raw features [B, V, D]."""
        views = torch.cat(list(inputs))
        with inference(self._model, self._precision):
            features = torch.cat([self._clip.raw_features(part).cpu() for part in views.split(VIEWS_AT_ONCE)])
        return _array(features.unflatten(0, (len(inputs), -1)))


def _array(features: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = features.float().cpu().numpy()
    return array
