"""A proposer and a CLIP that compute regions with features, for ``stages/annotate/regions.py``."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.config import require
from pipeline.dataset import check_templates
from pipeline.errors import SettingError
from pipeline.evaluation.embedder import Precision
from pipeline.evaluation.encoder import Evaluable, inference
from pipeline.evaluation.models import load_model
from pipeline.loaders.images import decode
from pipeline.loaders.samples import UnreadableSample
from pipeline.models import class_vectors
from pipeline.models.clip import Clip
from pipeline.models.towers.crops import CropRule, crop_boxes, cut_crops
from pipeline.models.towers.weights import digest_of, misfit, read_any_weights
from pipeline.shards.objects import plain_word, read_objects
from pipeline.shards.sample import Sample
from pipeline.stages.annotate.regions import RegionProposals
from pipeline.training.checkpoint import load_method

CROPS_AT_ONCE = {"cpu": 128}  # their activations fit the cache: twice as fast as more crops
MANY = 1024
GIVEN, TORCHVISION = "boxes", "torchvision:"


@dataclass(frozen=True, kw_only=True)
class ProposerOptions:
    """The proposer, and the regions of an image to keep."""

    proposer: str = GIVEN
    """boxes: the data's boxes (boxes.json); torchvision:NAME or torchvision:NAME=FILE: a detector of torchvision, with
    its published weights or those in a file; else a checkpoint of a method that proposes regions, such as of
    jobs/train_vild.py."""
    most: int = 300
    """Maximum number of regions per image, sorted by score; 1 to 10,000."""
    smallest: float = 2.0
    """Minimum length of a region's shorter side, in pixels, 1 or more."""
    labels: tuple[str, ...] = ()
    """Labels of the data's boxes to use; all if empty."""

    def __post_init__(self) -> None:
        require(1 <= self.most <= 10_000, "most", self.most, "1 to 10,000")
        require(self.smallest >= 1, "smallest", self.smallest, "1 pixel or more")


class RegionProposer(Protocol):
    """Proposes regions; ``maker`` is a digest of everything that determines them."""

    maker: str

    def __call__(self, images: Sequence[Tensor], samples: Sequence[Sample]) -> list[RegionProposals]:
        """The regions of images uint8 [3, H, W] on the model's device."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoadRegionModel:
    """Loads teacher and proposer when it is called."""

    teacher: str
    """CLIP that encodes the regions: a checkpoint or run folder, ARCHITECTURE:TAG, or ARCHITECTURE:untrained."""
    proposer: ProposerOptions = field(default_factory=ProposerOptions)
    crop: CropRule = field(default_factory=CropRule)
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Prompts of the class names that check the features."""
    device: str = "auto"
    """Device of the models; auto uses GPUs if available."""
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        require(bool(self.templates), "templates", self.templates, "one or more")
        check_templates(self.templates)

    def __call__(self, threads: int) -> "ClipRegions":
        """``threads`` is the number of CPU threads for the models, if they do not run on a GPU.

        Raises:
            SettingError: no such checkpoint or detector, or a teacher that is not a CLIP.
        """
        model = load_model(self.teacher, self.device)
        require(isinstance(model, Clip), "teacher", self.teacher, "a CLIP")
        clip = cast(Clip, model)
        if clip.mean.device.type == "cpu":
            torch.set_num_threads(threads)
        return ClipRegions(clip, make_proposer(self.proposer, clip.mean.device), self)


class ClipRegions:
    """A CLIP and a proposer with the interface of the stage."""

    def __init__(self, clip: Clip, proposer: RegionProposer, settings: LoadRegionModel) -> None:
        self._clip = clip.to(memory_format=torch.channels_last)
        self._propose, self._settings = proposer, settings
        self._size = clip.transforms(train=False).size[0]
        facts = {"proposer": proposer.maker, "crop": asdict(settings.crop), "precision": settings.precision}
        teacher = digest_of(cast(Evaluable, clip), str(self._size))
        options = {"most": settings.proposer.most, "smallest": settings.proposer.smallest}
        width = self._encoded(torch.zeros((1, 3, self._size, self._size), dtype=torch.uint8)).shape[1]
        self.facts: Mapping[str, Any] = {**facts, **options, "teacher": teacher, "width": width}
        self.maker = hashlib.sha256(repr(sorted(self.facts.items())).encode()).hexdigest()

    def prepare(self, image: bytes) -> Tensor | None:
        """uint8 [3, H, W]; ``None`` if it cannot be decoded."""
        try:
            return torch.from_numpy(decode(image)).permute(2, 0, 1)
        except UnreadableSample:
            return None

    def shape(self, image: Tensor) -> tuple[int, int]:
        """Height and width."""
        return image.shape[1], image.shape[2]

    def propose(self, images: Sequence[Tensor], samples: Sequence[Sample]) -> list[RegionProposals]:
        """The best regions of sufficient size, clipped to their image."""
        options = self._settings.proposer
        device = self._clip.mean.device
        with inference(cast(Evaluable, self._clip)):
            proposed = self._propose([image.to(device) for image in images], samples)
        shapes = [self.shape(image) for image in images]
        return [_kept(one, *shape, options) for one, shape in zip(proposed, shapes, strict=True)]

    def encode(self, images: Sequence[Tensor], boxes: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float32]]:
        """The features of all scales of each box, summed and normalised: [n, D] of each image."""
        rule, device = self._settings.crop, self._clip.mean.device
        crops = []
        for image, some in zip(images, boxes, strict=True):
            here, places = image.to(device), torch.from_numpy(some)
            height, width = self.shape(image)
            for scale in rule.scales:
                cut = crop_boxes(places, scale, height, width, rule.outside)
                crops.append(cut_crops(here, cut.to(device), self._size, rule.shape))
        if not sum(len(some) for some in crops):
            return [np.empty((0, self.facts["width"]), np.float32) for _ in boxes]
        encoded = self._encoded(torch.cat(crops)).float()
        parts = iter(encoded.split([len(some) for some in boxes for _ in rule.scales]))
        sums = [torch.stack([next(parts) for _ in rule.scales]).sum(dim=0) for _ in boxes]
        return [functional.normalize(one, dim=-1).cpu().numpy() for one in sums]

    def _encoded(self, crops: Tensor) -> Tensor:
        """uint8 [N, 3, size, size] to features [N, D], of unit length or raw as the rule specifies."""
        clip = self._clip
        with inference(cast(Evaluable, clip), self._settings.precision):
            crops = crops.to(clip.mean.device)
            # In place: on a CPU, allocating memory costs as much as the arithmetic.
            parts = [
                clip.model.encode_image(some.float().sub_(clip.mean).div_(clip.std)).float()
                for some in crops.split(CROPS_AT_ONCE.get(crops.device.type, MANY))
            ]
        features = torch.cat(parts)
        return functional.normalize(features, dim=-1) if self._settings.crop.average == "unit" else features

    def class_vectors(self, classes: Sequence[str]) -> NDArray[np.float32]:
        """The vectors of these names, cleaned and averaged over prompts as in ViLD's training: [C, D]."""
        with inference(cast(Evaluable, self._clip)):
            vectors = class_vectors.class_vectors(self._clip, classes, self._settings.templates)
        found: NDArray[np.float32] = vectors.cpu().numpy()
        return found


def make_proposer(options: ProposerOptions, device: torch.device) -> RegionProposer:
    """The proposer of ``options``.

    Raises:
        SettingError: no proposer of that name.
    """
    if options.proposer == GIVEN:
        return GivenBoxes(options.labels)
    if options.proposer.startswith(TORCHVISION):
        return TorchvisionDetector(options.proposer.removeprefix(TORCHVISION), device, options.most)
    return CheckpointProposer(options.proposer, device)


class GivenBoxes:
    """The boxes in the data except crowds, which are not single objects; all with a score of one."""

    def __init__(self, labels: Sequence[str] = ()) -> None:
        self._labels = frozenset(map(plain_word, labels))
        self.maker = " ".join(["boxes.json without crowds", *sorted(self._labels)])

    def __call__(self, images: Sequence[Tensor], samples: Sequence[Sample]) -> list[RegionProposals]:
        """Raises ``DataError`` for a sample without boxes."""
        return [self._of(sample, image) for sample, image in zip(samples, images, strict=True)]

    def _of(self, sample: Sample, image: Tensor) -> RegionProposals:
        objects = read_objects(sample)
        objects.check_size(image.shape[1], image.shape[2], sample.key)
        wanted = [not self._labels or plain_word(label) in self._labels for label in objects.labels]
        kept = [n for n, (want, crowd) in enumerate(zip(wanted, objects.crowd, strict=True)) if want and not crowd]
        return RegionProposals(objects.boxes[kept], np.ones(len(kept)))


class TorchvisionDetector:
    """The detections of a torchvision model, of any class."""

    def __init__(self, name: str, device: torch.device, most: int) -> None:
        """``NAME`` loads its published weights, ``NAME=FILE`` those in a file; detects at most ``most`` objects."""
        name, _, file = name.partition("=")
        if name not in torchvision.models.list_models(module=torchvision.models.detection):
            known = ", ".join(torchvision.models.list_models(module=torchvision.models.detection))
            raise SettingError("proposer", name, f"one of {known}")
        weights = {"weights": None, "weights_backbone": None} if file else {"weights": "DEFAULT"}
        model: Any = torchvision.models.get_model(name, **weights)
        if file:
            require(Path(file).is_file(), "proposer", f"{name}={file}", "a file of weights that exists")
            tensors = read_any_weights(Path(file))
            problem = misfit(model.state_dict(), tensors)
            require(not problem, "proposer", f"{name}={file}", f"weights of {name}; these are {problem}")
            model.load_state_dict(tensors)
        limited = getattr(model, "roi_heads", model)  # 100 to 300 detections of an image by default
        limited.detections_per_img = max(limited.detections_per_img, most)
        self._model = model.to(device).eval()
        self.maker = digest_of(self._model, f"{name} {limited.detections_per_img}")

    def __call__(self, images: Sequence[Tensor], samples: Sequence[Sample]) -> list[RegionProposals]:
        """Boxes sorted by score; the model resizes and normalises."""
        found = self._model([image.float() / 255 for image in images])
        return [_proposals(one["boxes"], one["scores"]) for one in found]


class CheckpointProposer:
    """The proposals of one of our methods."""

    def __init__(self, address: str, device: torch.device) -> None:
        method: Any = load_method(address, str(device))
        require(callable(getattr(method, "propose", None)), "proposer", address, "a method that proposes regions")
        self._method = method.eval()
        self.maker = digest_of(method)

    def __call__(self, images: Sequence[Tensor], samples: Sequence[Sample]) -> list[RegionProposals]:
        """In the method's order."""
        return [_proposals(boxes, scores) for boxes, scores in self._method.propose(images)]


def _proposals(boxes: Tensor, scores: Tensor) -> RegionProposals:
    return RegionProposals(boxes.double().cpu().numpy(), scores.double().cpu().numpy())


def _kept(proposed: RegionProposals, height: int, width: int, options: ProposerOptions) -> RegionProposals:
    """The best ``most`` of the finite boxes with sufficient size inside the image."""
    boxes = np.clip(proposed.boxes, 0, [width, height, width, height])
    large = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] >= options.smallest).all(axis=1))  # False for NaN
    order = large[np.argsort(-proposed.scores[large], kind="stable")][: options.most]
    return RegionProposals(boxes[order], proposed.scores[order])
