"""Classify point clouds by the image tower of any CLIP: PointCLIP without training.

Zhang, Guo, Zhang, Li, Miao, Cui, Qiao, Gao, Li, 2021, arXiv 2112.02413, section 3.2. A cloud becomes depth views, see
:mod:`pipeline.codecs.point_views`; the tower encodes each of them. With unit features f_v of the views, unit class
vectors t_c and weights w_v

    logits_c = s sum_v w_v <f_v, t_c> / sum_v w_v

The authors concatenate the views and normalise the repeated text, which divides all logits by a constant. Their weights
are the best ones for the test set among {0.25, 0.5, 0.75, 1} for each view; here they are searched on other data. The
views are not normalised by the mean and deviation of CLIP's images, as in the authors' code; ``pixels`` decides.

To hold a run against: ModelNet40 with RN50, 20.18 % (first version of the paper; later papers cite 23.78 %).
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pipeline.codecs.point_views import FEW_SHOT, ZERO_SHOT, PointViews, brightness, project, view_images
from pipeline.config import require
from pipeline.errors import DataError, SettingError
from pipeline.evaluation.accuracy import FoldCounts, label_ranks
from pipeline.evaluation.classes import labelled_batches
from pipeline.evaluation.data import CardData, Data, SnapshotData, open_data
from pipeline.evaluation.encoder import inference
from pipeline.evaluation.media import encoded_media, inputs_of
from pipeline.evaluation.task import PreparedSet, Reading, option
from pipeline.loaders.points import PointReader, PointTransform
from pipeline.loaders.samples import UnreadableSample
from pipeline.models.towers.weights import digest_of
from pipeline.shards.media import POINTS
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import Wanted
from pipeline.sources import open_source

logger = logging.getLogger(__name__)

Projection = Literal["zero_shot", "few_shot"]
PROJECTIONS: Mapping[str, PointViews] = {"zero_shot": ZERO_SHOT, "few_shot": FEW_SHOT}
CHOICES = (0.25, 0.5, 0.75, 1.0)
"""Weights of a view in a search."""
MOST_SEARCHED = 6
"""Views in an exhaustive search: 4,096 combinations."""
WEIGHTS_AT_ONCE, IMAGES_AT_ONCE = 64, 256
CLOUDS_AT_ONCE = {"cpu": 4}
"""Clouds whose views are projected and encoded together; elsewhere as many as make ``IMAGES_AT_ONCE`` images. Views of
more clouds do not fit the cache of a CPU."""


@dataclass(frozen=True, kw_only=True)
class CloudViews:
    """How clouds become images of a CLIP."""

    projection: Projection = "zero_shot"
    """zero_shot: six views of 128 pixels; few_shot: ten views of 224 pixels."""
    pixels: Literal["depth", "image"] = "depth"
    """depth: depths as the tower's input, without CLIP's mean and deviation, as in the paper; image: images that are
    bright where points are near, normalised like all others, for a CLIP that was trained on such images."""
    up: Literal["y", "z"] = "y"
    """Vertical axis of the clouds: y in ModelNet40's HDF5 and ScanObjectNN, z in ModelNet's OFF files."""
    count: int = 0
    """Most points of a cloud; of a larger one a random subset. 0 uses all points."""

    def __post_init__(self) -> None:
        require(self.projection in PROJECTIONS, "projection", self.projection, " or ".join(PROJECTIONS))
        require(self.pixels in ("depth", "image"), "pixels", self.pixels, "depth or image")
        require(self.up in ("y", "z"), "up", self.up, "y or z")
        self.reader()

    @property
    def views(self) -> PointViews:
        """The cameras."""
        return PROJECTIONS[self.projection]

    def reader(self) -> PointReader:
        """Clouds without augmentation, in the unit ball, y up."""
        return PointReader(transform=PointTransform(count=self.count, up=self.up))

    def images(self, points: Tensor, mask: Tensor | None, size: tuple[int, int], mean: Tensor, std: Tensor) -> Tensor:
        """Views of clouds, float [B, N, 3], as float32 [B, V, 3, H, W] that become the tower's input when ``mean`` is
        subtracted and ``std`` divides them (both [1, 3, 1, 1], of values from 0 to 255).

        For an input smaller than the grid, points are projected onto its size: most would fall between its pixels."""
        views = replace(self.views, grid=min(self.views.grid, *size))
        depth = project(points, views, mask)
        if self.pixels == "depth":
            return view_images(depth, size) * std + mean
        return 255 * view_images(brightness(depth, views), size)


class PointClip(nn.Module):
    """A CLIP that also encodes point clouds, by views with ``weights``."""

    encodes = ("points", "text")

    def __init__(self, model: Any, clouds: CloudViews, weights: Sequence[float] = ()) -> None:
        super().__init__()
        check_sees(model)
        self.model, self.clouds = model, clouds
        self.training = bool(getattr(model, "training", False))  # so that `inference` restores the model's own mode
        self.weights = tuple(weights) or (1.0,) * clouds.views.count
        count = clouds.views.count
        require(len(self.weights) == count, "view_weights", self.weights, f"{count} weights")
        self.tokenizer = model.tokenizer
        self.end_of_text = getattr(model, "end_of_text", None)
        self.prompt_templates = getattr(model, "prompt_templates", ())

    def points_reader(self) -> PointReader:
        """The input of :meth:`encode_points`."""
        return self.clouds.reader()

    def encode_views(self, points: Tensor, mask: Tensor | None = None) -> Tensor:
        """Float [B, N, 3] in the unit ball and bool [B, N] to unit features of the views, float32 [B, V, D]."""
        return functional.normalize(_encoded(self.model.encode_image, self.model, self.clouds, points, mask), dim=-1)

    def encode_points(self, points: Tensor, mask: Tensor | None = None) -> Tensor:
        """As :meth:`encode_views`, to the weighted mean of the views, float32 [B, D]."""
        weights = torch.tensor(self.weights, device=points.device)
        features = self.encode_views(points, mask)
        with torch.autocast(points.device.type, enabled=False):
            return torch.einsum("bvd,v->bd", features, weights / weights.sum())

    def encode_text(self, text: Tensor) -> Tensor:
        """As the CLIP."""
        features: Tensor = self.model.encode_text(text)
        return features


def _encoded(
    encode: Callable[[Tensor], Tensor], model: Any, clouds: CloudViews, points: Tensor, mask: Tensor | None
) -> Tensor:
    """Features of the views by ``encode``, float32 [B, V, D], a few clouds at a time."""
    size = model.transforms(train=False).size
    at_once = CLOUDS_AT_ONCE.get(points.device.type, max(1, IMAGES_AT_ONCE // clouds.views.count))
    parts = points.split(at_once)
    masks = [None] * len(parts) if mask is None else mask.split(at_once)
    features = []
    for some, kept in zip(parts, masks, strict=True):
        images = clouds.images(some, kept, size, model.mean, model.std)
        features.append(encode(images.flatten(0, 1)).float().unflatten(0, (len(some), -1)))
    return torch.cat(features)


def check_sees(model: Any) -> None:
    """Raise ``SettingError`` unless ``model`` encodes images that it normalises, and texts."""
    has = all(hasattr(model, name) for name in ("encode_image", "encode_text", "mean", "std", "transforms"))
    require(has, "checkpoint", type(model).__name__, "a model that encodes images and texts, to see point clouds")


def view_scores(
    seen: PointClip, batches: Iterable[Mapping[str, Any]], vectors: Tensor, precision: str = "fp32"
) -> Iterable[tuple[Tensor, Mapping[str, Any]]]:
    """Cosines of each view with the class vectors [C, D], float32 [B, V, C] on the CPU, with their batch."""
    for batch in batches:
        with inference(seen, precision) as device:
            features = seen.encode_views(*inputs_of(batch, POINTS.name, device))
            with torch.autocast(device.type, enabled=False):
                scores = (features @ vectors.to(device).float().T).cpu()
        yield scores, batch


def cloud_digests(batch: Mapping[str, Any]) -> list[bytes]:
    """The SHA-256 of each cloud of a batch, by its points without padding."""
    pairs = zip(batch[POINTS.name], batch[f"{POINTS.name}_mask"], strict=True)
    return [hashlib.sha256(points[kept].cpu().numpy().tobytes()).digest() for points, kept in pairs]


def search_weights(scores: Tensor, labels: Tensor) -> tuple[tuple[float, ...], float]:
    """The most accurate weights of the views among ``CHOICES``, and their accuracy.

    ``scores`` are float [N, V, C], ``labels`` int64 [N]. Of equally accurate ones it takes the first: equal weights
    come first.

    Raises:
        SettingError: more than ``MOST_SEARCHED`` views.
    """
    views = scores.shape[1]
    allowed = f"a search over at most {MOST_SEARCHED} views; --projection zero_shot has {ZERO_SHOT.count}"
    require(views <= MOST_SEARCHED, "view_weights", f"search over {views} views", allowed)
    grid = torch.tensor(list(product(CHOICES, repeat=views)), dtype=scores.dtype)
    right = torch.cat([_right(scores, labels, part) for part in grid.split(WEIGHTS_AT_ONCE)])
    best = int(right.argmax())
    return tuple(grid[best].tolist()), int(right[best]) / len(labels)


def _right(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Correct samples for each row of weights [W, V]: int64 [W]."""
    right = torch.zeros(len(weights), dtype=torch.int64)
    for part, wanted in zip(scores.split(IMAGES_AT_ONCE), labels.split(IMAGES_AT_ONCE), strict=True):
        right += (torch.einsum("wv,nvc->wnc", weights, part).argmax(dim=2) == wanted).sum(dim=1)
    return right


def classify_clouds(
    seen: PointClip,
    batches: Iterable[Mapping[str, Any]],
    vectors: Tensor,
    precision: str = "fp32",
    searched: frozenset[bytes] = frozenset(),
) -> dict[str, float]:
    """The metrics of :func:`~pipeline.evaluation.zero_shot.zero_shot` with the weights of ``seen``, and ``equal_top1``,
    the accuracy with equal weights.

    Raises:
        DataError: a cloud whose digest is among ``searched``: the weights of the views were searched on it.
    """
    counts, equal = FoldCounts(len(vectors)), FoldCounts(len(vectors))
    given = torch.tensor(seen.weights)
    for scores, batch in view_scores(seen, batches, vectors, precision):
        if searched and not searched.isdisjoint(cloud_digests(batch)):
            raise DataError("the data of the search have clouds of the evaluated ones; give others to `search`")
        labels, folds = batch["label"].cpu(), batch.get("fold")
        counts.add(label_ranks(torch.einsum("bvc,v->bc", scores, given), labels), labels, folds)
        equal.add(label_ranks(scores.mean(dim=1), labels), labels, folds)
    return {**counts.metrics(), "equal_top1": equal.metrics()["top1"]}


@dataclass(frozen=True, kw_only=True)
class WeightsFound:
    """The weights of the views of a result, and where they come from."""

    weights: tuple[float, ...]
    searched_on: str = ""
    """The data of the search; empty where the weights were given."""
    searched_samples: int = 0
    accuracy: float | None = None
    """On the data of the search."""

    def to_json(self) -> bytes:
        """For a file beside the result."""
        record = {
            "view_weights": list(self.weights),
            "searched": bool(self.searched_on),
            "searched_on": self.searched_on,
            "searched_samples": self.searched_samples,
            "accuracy_there": self.accuracy,
        }
        return json.dumps(record, indent=2).encode()


class CloudSetting:
    """The options of a set of clouds. ``found`` are the weights of the last run, once there was one."""

    def __init__(self, clouds: CloudViews, weights: tuple[float, ...] | None, search: PreparedSet | None) -> None:
        """``search`` are the data on which weights are searched where ``weights`` is ``None``."""
        self.clouds, self.search = clouds, search
        self.found = None if weights is None else WeightsFound(weights=weights)

    def run(self, model: Any, one: PreparedSet, reading: Reading, vectors: Tensor) -> dict[str, float]:
        """The metrics of a set; finds the weights first, if they are to be searched."""
        precision, searched = reading.evaluation_precision, frozenset[bytes]()
        if self.search is not None:
            self.found, searched = self._searched(model, self.search, reading, vectors)
        assert self.found is not None, "given, or searched"
        seen = PointClip(model, self.clouds, self.found.weights)
        batches = labelled_batches(seen.points_reader(), one, reading)
        metrics = classify_clouds(seen, batches, vectors, precision, searched)
        return metrics | {"searched_samples": float(self.found.searched_samples)}

    def _searched(
        self, model: Any, data: PreparedSet, reading: Reading, vectors: Tensor
    ) -> tuple[WeightsFound, frozenset[bytes]]:
        """The weights, and the digests of the clouds on which they were searched."""
        seen = PointClip(model, self.clouds)
        batches = labelled_batches(seen.points_reader(), data, reading)
        parts = list(view_scores(seen, batches, vectors, reading.evaluation_precision))
        labels = torch.cat([batch["label"] for _, batch in parts])
        weights, accuracy = search_weights(torch.cat([scores for scores, _ in parts]), labels)
        shown = ", ".join(f"{weight:g}" for weight in weights)
        logger.info("view weights %s, the best on %d samples of %s (%.4f)", shown, len(labels), data.name, accuracy)
        found = WeightsFound(weights=weights, searched_on=data.name, searched_samples=len(labels), accuracy=accuracy)
        return found, frozenset(digest for _, batch in parts for digest in cloud_digests(batch))


@dataclass(frozen=True, kw_only=True)
class CloudOptions:
    """The options of a set that concern point clouds alone."""

    projection: Projection = option("zero_shot")
    """Views of a point cloud: zero_shot (PointCLIP's six of 128 pixels) or few_shot (its ten of 224)."""
    pixels: Literal["depth", "image"] = option("depth")
    """Input of the tower: depth (as PointCLIP's code), or image (bright where points are near, with CLIP's mean and
    deviation)."""
    up: Literal["y", "z"] = option("y")
    """Vertical axis of point clouds."""
    view_weights: str = option("equal")
    """Weights of the views of a point cloud: equal, numbers joined by +, or search (0.25, 0.5, 0.75 or 1 for each of
    six views: the most accurate ones on the data `search`)."""
    search: str = option("")
    """Data of the search, not the evaluated ones: a card, a snapshot's folder, or train, the training part that the
    evaluated card names."""
    search_samples: int = option(2_000)
    """Samples of the search, 1 or more."""

    def cloud_setting(self, medium: str, data: Data, labels: Any) -> CloudSetting | None:
        """The setting of a set with these ``data`` and ``labels``; ``None`` for other media than points.

        Raises:
            SettingError: options that do not fit each other or the medium, or a search on the evaluated data.
        """
        if medium != POINTS.name:
            for one in fields(CloudOptions):
                value = getattr(self, one.name)
                require(value == one.default, one.name, value, f"{one.default!r} without medium=points")
            return None
        searches = self.view_weights == "search"
        require(searches == bool(self.search), "search", self.search, "data with view_weights=search, else empty")
        require(self.search_samples >= 1, "search_samples", self.search_samples, "1 or more")
        clouds = CloudViews(projection=self.projection, pixels=self.pixels, up=self.up)
        weights = read_weights(self.view_weights, clouds.views.count)
        return CloudSetting(clouds, weights, self._search_set(data, labels) if searches else None)

    def _search_set(self, data: Data, labels: Any) -> PreparedSet:
        found = open_data(self.search) if self.search != "train" else _train_part(data)
        require(_origin(found) != _origin(data), "search", self.search, "other data than the evaluated ones")
        name = self.search if data.card is None or self.search != "train" else f"{data.card.name}/train"
        return PreparedSet(name, "zero_shot", found, self.search_samples, replace(labels, fold="", folds=""))


def _train_part(data: Data) -> Data:
    card = data.card if isinstance(data, CardData) else None
    parts = card.few_shot.parts if card and card.few_shot else {}
    if card is None or "train" not in parts:
        raise SettingError("search", "train", "a folder of training data; train needs a card with a training part")
    return CardData(open_source({**card.source, **parts["train"]}), card)


def _origin(data: Data) -> object:
    return data.snapshot.digest if isinstance(data, SnapshotData) else data.source


def seen_by_views(model: Any, setting: CloudSetting | None) -> Any:
    """``model``; where it shall classify clouds and does not encode them, a :class:`PointClip` around it."""
    if setting is None or POINTS.name in encoded_media(model):
        return model
    return PointClip(model, setting.clouds, setting.found.weights if setting.found else ())


def read_weights(text: str, count: int) -> tuple[float, ...] | None:
    """The weights of ``count`` views for the setting ``equal``, ``search`` (``None``) or numbers joined by +."""
    allowed = f"equal, search, or {count} numbers of 0 or more joined by +, not all 0"
    if text == "search":
        require(
            count <= MOST_SEARCHED, "view_weights", text, f"a search over at most {MOST_SEARCHED} views, not {count}"
        )
        return None
    if text == "equal":
        return (1.0,) * count
    try:
        weights = tuple(float(word) for word in text.split("+"))
    except ValueError:
        weights = ()
    fits = len(weights) == count and all(0 <= weight < float("inf") for weight in weights) and sum(weights) > 0
    require(fits, "view_weights", text, allowed)
    return weights


class CloudEmbedder:
    """A CLIP that computes raw features of the views of clouds, for few-shot methods."""

    media: tuple[str, ...] = ("points",)
    sidecars: tuple[Wanted, ...] = ()

    def __init__(self, model: Any, clouds: CloudViews, precision: str = "fp32") -> None:
        check_sees(model)
        self._model, self._clouds, self._precision = model, clouds, precision
        self._reader, size = clouds.reader(), model.transforms(train=False).size
        self.maker = digest_of(model, "views of clouds", repr(clouds), repr(size), precision)
        self.facts: Mapping[str, str | int] = {"views": clouds.views.count, "clouds": repr(clouds)}

    def prepare(self, sample: Sample, medium: str) -> Mapping[str, Any] | None:
        """The reader's row; ``None`` without a readable cloud."""
        try:
            return self._reader.read(sample)
        except UnreadableSample:
            return None

    def encode(self, medium: str, inputs: Sequence[Any]) -> NDArray[np.float32]:
        """Rows of the reader to raw features [B, V, D]."""
        batch, model = self._reader.collate(list(inputs)), self._model
        with inference(model, self._precision) as device:
            features = _encoded(self._raw, model, self._clouds, *inputs_of(batch, POINTS.name, device))
        array: NDArray[np.float32] = features.cpu().numpy()
        return array

    def _raw(self, images: Tensor) -> Tensor:
        features: Tensor = self._model.model.encode_image((images - self._model.mean) / self._model.std)
        return features
