"""A class-agnostic region proposer: the region proposal network of Faster R-CNN on a feature pyramid.

Ren, He, Girshick, Sun, 2015, "Faster R-CNN", arXiv 1506.01497; Lin, Dollar, Girshick, He, Hariharan, Belongie, 2016,
"Feature Pyramid Networks", arXiv 1612.03144; as ViLD has it (Gu, Lin, Kuo, Cui, 2021, arXiv 2104.13921, section 3.2).

The idea: at every position of every pyramid level there are a few anchors, boxes of one size and several shapes. Two
small convolutions predict for each anchor whether it covers an object, and the four offsets to the object's box. The
network is trained on boxes of base classes, and its objectness transfers to classes without boxes. With o_i the score
of a sampled anchor, p_i whether it covers an object (an overlap of 0.7 or more, or the best of an object), d_i its four
offsets, t_i the true ones, S the sampled anchors of the batch's B images and P_l those of level l that cover an object:

    L = 1/256B sum_(i in S) BCE(sigmoid(o_i), p_i)  +  sum_l 1/N_l sum_(i in P_l, t_ik != 0) Huber(d_ik - t_ik)

with the N_l offsets t_ik of level l that are not exactly 0 and the Huber loss of delta 1/9, both as in ViLD's code. 256
anchors of each image are sampled; up to half of them cover an object. The best proposals that do not overlap each other
by more than 0.7 are kept. ViLD trains a proposer on base classes alone, and uses 300 of its proposals per image for its
image branch.

The network is torchvision's, on any ResNet of timm. Random numbers are seeded per image, so results do not depend on
the process that reads it. Batch normalisation over processes is torch's SyncBatchNorm, which runs on GPUs.

Left out of ViLD's code: batch normalisation inside of the proposal head. Other differences: anchors at the corner of a
cell, as torchvision has them, where theirs are at its middle; sampling by random numbers seeded per image; all anchors
that tie as the best of an object cover the object that they overlap most, where theirs are one anchor per object. As
there, background is sampled from the anchors below an overlap of 0.3, and those up to 0.7 are left out.

To hold a run against: recall of 1000 proposals on LVIS v1, base and novel; the paper reports only detection results
(see vild.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, cast

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from pipeline.config import require
from pipeline.loaders.batches import Reader
from pipeline.loaders.detection import FILL, DetectionReader, Placement, RandomResize, StoredBoxes
from pipeline.models.detections import check_words
from pipeline.models.method import Method
from pipeline.models.towers import small_resnet  # noqa: F401 - registers it with timm
from pipeline.shards.objects import FIELD
from pipeline.shards.sidecar import Wanted

STD = (58.4, 57.1, 57.4)  # ImageNet's; the mean is the fill value of images
MOMENTUM, EPSILON = 0.003, 1e-4  # of batch normalisation, as ViLD's code has them


@dataclass(frozen=True, kw_only=True)
class Config:
    """The proposer, with ViLD's values."""

    backbone: str = "resnet50"
    """ResNet of timm, or clipmill_small_resnet."""
    pretrained_backbone: bool = False
    """Initialise the backbone with timm's weights; the paper starts from random ones."""
    levels: tuple[int, ...] = (1, 2, 3, 4)
    """Backbone stages that become pyramid levels; one further level of half the size is added."""
    norm: Literal["batch", "group"] = "batch"
    """Normalisation layers: batch (over all processes) or group (over an image's channels)."""
    pyramid_width: int = 256
    """Channels of every pyramid level, a multiple of 8."""
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Side of the anchors of each pyramid level, in pixels; one more than levels."""
    anchor_shapes: tuple[float, ...] = (1.0, 2.0, 0.5)
    """Height over width of the anchors at each position."""
    head_depth: int = 2
    """Number of convolutions of the proposal head."""
    anchors_drawn: int = 256
    """Anchors per image that the loss samples."""
    proposals_tried: int = 2000
    """Highest-scoring proposals per level before non-maximum suppression, in training."""
    proposals_tried_in_test: int = 1000
    """The same, in evaluation."""
    proposals_kept: int = 1000
    """Proposals per image."""
    proposal_overlap: float = 0.7
    """Intersection over union above which non-maximum suppression removes the lower-scoring proposal, up to 1."""
    class_names: tuple[str, ...] = ()
    """Labels of the training objects, in the order of their class numbers: the base classes; all labels if empty.
    """
    image_size: int = 1024
    """Side of the square input, in pixels."""
    jitter_scale: tuple[float, float] = (0.1, 2.0)
    """Range of the random resize factor of training images, relative to the size at which they fit the square."""
    flip: float = 0.5
    """Probability of mirroring a training image."""
    most_objects: int = 300
    """Maximum number of training objects per image."""
    pseudo_boxes: str = ""
    """Sidecar of pseudo boxes (jobs/annotate_pseudo_boxes.py), read where a data set has it; their labels are phrases.
    None if empty."""
    least_box_score: float = 0.5
    """Minimum score of a pseudo box, 0 to 1."""

    def __post_init__(self) -> None:
        require(len(self.levels) >= 1, "levels", self.levels, "one or more")
        one_each = len(self.anchor_sizes) == len(self.levels) + 1
        require(one_each, "anchor_sizes", self.anchor_sizes, f"{len(self.levels) + 1}, one more than levels")
        for name in (
            "anchors_drawn",
            "proposals_tried",
            "proposals_tried_in_test",
            "proposals_kept",
            "most_objects",
            "head_depth",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(0 < self.proposal_overlap <= 1, "proposal_overlap", self.proposal_overlap, "more than 0, up to 1")
        require(len(set(self.class_names)) == len(self.class_names), "class_names", self.class_names, "distinct names")
        if self.class_names:
            check_words(self.class_names)
        self.stored_boxes()
        require(self.pyramid_width % 8 == 0, "pyramid_width", self.pyramid_width, "a multiple of 8")
        self.resize()

    def stored_boxes(self) -> StoredBoxes | None:
        """The sidecar of pseudo boxes, as a reader uses it."""
        return StoredBoxes.named(self.pseudo_boxes, self.least_box_score)

    def resize(self, train: bool = True) -> RandomResize:
        """The transform of images into the square."""
        if train:
            return RandomResize(size=self.image_size, scale=self.jitter_scale, flip=self.flip)
        return RandomResize(size=self.image_size, scale=(1.0, 1.0), flip=0.0)


def norm_layer(kind: str) -> Callable[..., nn.Module]:
    """The function that makes a normalisation layer for a number of channels."""
    if kind == "batch":
        return partial(EmptySafeBatchNorm, momentum=MOMENTUM, eps=EPSILON)
    return _group_norm


class EmptySafeBatchNorm(nn.SyncBatchNorm):
    """torch's batch normalisation over all processes, for a head whose input may be empty.

    For an empty input torch sends statistics in the input's type, otherwise in float32. With bfloat16, a rank whose
    images show no object would send half of the bytes that the others expect.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, ...] to the same."""
        found: Tensor = super().forward(input if input.numel() else input.float())
        return found


def _group_norm(channels: int, **place: Any) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, min(32, channels // 8)), channels, **place)


@dataclass(frozen=True)
class Proposed:
    """Proposals of each image sorted by score: ``boxes`` [n, 4] with ``scores`` [n], 0 to 1; and for all ``anchors``
    [A, 4] their ``logits`` [B, A] and ``moves`` [B, A, 4], where ``counts`` has the number of anchors per level."""

    boxes: list[Tensor]
    scores: list[Tensor]
    anchors: Tensor
    logits: Tensor
    moves: Tensor
    counts: tuple[int, ...]


class ProposalNetwork(RegionProposalNetwork):  # type: ignore[misc]  # torchvision is not typed
    """torchvision's, split into proposing and the loss; the loss is ViLD's."""

    def propose(self, images: Tensor, extents: Sequence[tuple[int, int]], features: Mapping[str, Tensor]) -> Proposed:
        """Proposals inside the ``extents`` (height, width) of images [B, 3, S, S] from their pyramid."""
        levels = list(features.values())
        logits, moves = self.head(levels)
        counts = tuple(level.shape[1] * level.shape[2] * level.shape[3] for level in logits)
        # The generator makes anchors in the features' type; in bfloat16 they would be off by pixels.
        shapes = [level.new_empty((), dtype=torch.float32).expand(level.shape) for level in levels]
        anchors = self.anchor_generator(ImageList(images, list(extents)), shapes)
        logits, moves = concat_box_prediction_layers(logits, moves)
        logits, moves = logits.float().view(len(images), -1), moves.float()
        decoded = self.box_coder.decode(moves.detach(), anchors).view(len(images), -1, 4)
        boxes, scores = self.filter_proposals(decoded, logits, list(extents), list(counts))
        return Proposed(boxes, scores, anchors[0], logits, moves.view(len(images), -1, 4), counts)

    def losses(
        self, proposed: Proposed, targets: Sequence[Tensor], draws: Sequence[torch.Generator], average: "Average"
    ) -> dict[str, Tensor]:
        """``objectness`` and ``proposal_box`` for the boxes [n, 4] of each image in ``targets``, in float32."""
        with torch.autocast(proposed.logits.device.type, enabled=False):
            return self._losses(proposed, targets, draws, average)

    def _losses(
        self, proposed: Proposed, targets: Sequence[Tensor], draws: Sequence[torch.Generator], average: "Average"
    ) -> dict[str, Tensor]:
        entropy, sums, counts = [], [], []
        ends = torch.tensor(proposed.counts, device=proposed.logits.device).cumsum(0)
        for logits, moves, boxes, draw in zip(proposed.logits, proposed.moves, targets, draws, strict=True):
            labels, matched = self.assign_targets_to_anchors([proposed.anchors], [{"boxes": boxes}])
            positive, negative = sample_balanced(labels[0], self.fg_bg_sampler.batch_size_per_image, 0.5, draw)
            chosen = torch.cat([positive, negative])
            truth = (torch.arange(len(chosen), device=chosen.device) < len(positive)).float()
            entropy.append(functional.binary_cross_entropy_with_logits(logits[chosen], truth, reduction="sum"))
            wanted = self.box_coder.encode([matched[0][positive]], [proposed.anchors[positive]])[0]
            counted = (wanted != 0).to(moves.dtype)  # ViLD's code weighs an offset of exactly 0 with 0
            errors = functional.huber_loss(moves[positive], wanted, delta=1 / 9, reduction="none") * counted
            level = functional.one_hot(torch.bucketize(positive, ends, right=True), len(ends)).to(errors.dtype)
            sums.append(level.T @ errors.sum(dim=1))
            counts.append(level.T @ counted.sum(dim=1))
        per_level = torch.stack(sums).sum(dim=0) / average(torch.stack(counts).sum(dim=0))
        sampled_in_all = len(targets) * self.fg_bg_sampler.batch_size_per_image
        return {"objectness": torch.stack(entropy).sum() / sampled_in_all, "proposal_box": per_level.sum()}


Average = Callable[[Tensor], Tensor]
"""Counts [n] of a rank to their means over ranks, at least 1: the divisors of a rank's sums."""


def sample_balanced(labels: Tensor, count: int, share: float, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of ``count`` of the ``labels`` [N] at random: up to ``share`` of them with label 1, the rest with label
    0; fewer if there are not enough."""
    priority = torch.rand(len(labels), generator=draw).to(labels.device)
    found = []
    for value, most in ((1, int(count * share)), (0, count)):
        places = torch.where(labels == value)[0]
        found.append(places[priority[places].argsort()[:most]])
    return found[0], found[1][: count - len(found[0])]


class Network(nn.Module):
    """Backbone, feature pyramid and proposal head."""

    def __init__(self, config: Config, load: bool = True) -> None:
        super().__init__()
        norm = norm_layer(config.norm)
        self.body = timm.create_model(
            config.backbone,
            pretrained=config.pretrained_backbone and load,
            features_only=True,
            out_indices=config.levels,
            norm_layer=norm,
        )
        widths: list[int] = cast(Any, self.body).feature_info.channels()
        width = config.pyramid_width
        self.pyramid = FeaturePyramidNetwork(widths, width, extra_blocks=LastLevelMaxPool(), norm_layer=norm)
        sizes = tuple((size,) for size in config.anchor_sizes)
        anchors = AnchorGenerator(sizes, (config.anchor_shapes,) * len(sizes))
        tried, kept = (config.proposals_tried, config.proposals_tried_in_test), config.proposals_kept
        self.proposer = ProposalNetwork(
            anchors,
            RPNHead(width, len(config.anchor_shapes), config.head_depth),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=config.anchors_drawn,
            positive_fraction=0.5,
            pre_nms_top_n={"training": tried[0], "testing": tried[1]},
            post_nms_top_n={"training": kept, "testing": kept},
            nms_thresh=config.proposal_overlap,
        )

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images [B, 3, S, S] to the pyramid's levels, the finest first."""
        levels = {str(number): level for number, level in enumerate(self.body(images))}
        found: dict[str, Tensor] = self.pyramid(levels)
        return found


class Proposals(Method):
    """A method that trains a region proposer."""

    batch_keys: ClassVar[tuple[str, ...]] = ("image", "extent", "boxes", "draws")
    registered_as: ClassVar[str] = "proposals"
    # A detector's sums over many positions round relative to their largest term, also in small entries of a filter.
    parity_tolerance: ClassVar[float] = 5e-5
    config: Config
    model: Network
    mean: Tensor
    std: Tensor

    def __init__(self, config: Config, description: Mapping[str, str] | None = None) -> None:
        """``description`` is given if weights are restored afterwards; no weights are downloaded then."""
        super().__init__(config)
        self.model = Network(config, load=description is None)
        self.register_buffer("mean", torch.tensor(FILL).float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def smallest(cls) -> Config:
        """A pyramid of two levels and the one above, on images of 64 pixels."""
        return Config(**SMALLEST)

    @classmethod
    def check(cls, config: Config) -> None:
        """Check that timm has the backbone."""
        known = timm.is_model(config.backbone)
        require(known, "backbone", config.backbone, "a ResNet of timm (timm.list_models('*resnet*'))")

    @classmethod
    def check_workers(cls, config: Config, gpus: bool) -> None:
        """``norm`` batch needs GPUs, even for one worker: in a process group torch's SyncBatchNorm refuses CPUs."""
        allowed = "group where workers have no GPU each, or `workers` 0, which trains in this process"
        require(gpus or config.norm != "batch", "norm", config.norm, allowed)

    @classmethod
    def restored(cls, config: Config, description: Mapping[str, str]) -> "Proposals":
        """The modules alone."""
        return cls(config, description)

    @classmethod
    def sample_fields(cls, config: Config, settings: None = None) -> Sequence[str]:
        """Images and their objects, unless a sidecar has these."""
        return ("image",) if config.pseudo_boxes else ("image", FIELD)

    @classmethod
    def sidecars(cls, config: Config, settings: None = None) -> Sequence[Wanted]:
        """The pseudo boxes, if they are read."""
        stored = config.stored_boxes()
        return [] if stored is None else [stored.wanted]

    def readers(self, train: bool, *, seed: int = 0, settings: None = None) -> Sequence[Reader]:
        """Images in the square, their extents there, and their objects' boxes."""
        return [self.reader(train, seed, self.batch_keys)]

    def reader(self, train: bool, seed: int, keys: tuple[str, ...], **more: Any) -> DetectionReader:
        """A reader of ``keys`` for the training classes; ``more`` are further fields of the reader."""
        config = self.config
        return DetectionReader(
            keys=keys,
            resize=config.resize(train),
            classes=config.class_names,
            most=config.most_objects,
            seed=seed,
            pseudo=config.stored_boxes() if train else None,
            **more,
        )

    def training_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The two losses of the proposal network."""
        # Everything that waits for the GPU comes before the network is queued, which would have to finish first.
        draws, extents = generators(batch["draws"]), extents_of(batch["extent"])
        targets = [boxes[real_boxes(boxes)] for boxes in batch["boxes"]]
        images = self.normalised(batch["image"])
        features = self.model.features(images)
        proposed = self.model.proposer.propose(images, extents, features)
        return self.model.proposer.losses(proposed, targets, draws, self.average)

    @torch.no_grad()
    def propose(self, images: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Boxes x1, y1, x2, y2 in pixels, float32 [n, 4], and scores [n] of images uint8 [3, H, W], sorted by score.

        Runs on the method's device. Training mode differs by statistics of batch normalisation and, at a level with
        more than ``proposals_tried_in_test`` anchors, by the number of proposals.
        """
        square, places = self.laid_out(images)
        features = self.model.features(square)
        proposed = self.model.proposer.propose(square, [place.extent for place in places], features)
        return [
            (unplaced(boxes, place), scores)
            for boxes, scores, place in zip(proposed.boxes, proposed.scores, places, strict=True)
        ]

    def laid_out(self, images: Sequence[Tensor]) -> tuple[Tensor, list[Placement]]:
        """Images uint8 [3, H, W] of any sizes as normalised [B, 3, S, S], and their placements."""
        resize = self.config.resize(train=False)
        places = [resize.whole(*image.shape[1:]) for image in images]
        squares = [
            place.image(image.permute(1, 2, 0).cpu().numpy()) for place, image in zip(places, images, strict=True)
        ]
        return self.normalised(torch.stack(squares).to(self.mean.device)), places

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 to float32 of mean 0 and variance 1; the fill value becomes 0."""
        return ((images.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def average(self, counts: Tensor) -> Tensor:
        """See :data:`Average`."""
        means = self.gather(counts[None]).mean(dim=0)
        return torch.where(means > 0, means, torch.ones_like(means))

    def blocks(self) -> Sequence[nn.Module]:
        """The backbone's stages."""
        return [module for name, module in self.model.body.named_children() if name.startswith("layer")]


def real_boxes(boxes: Tensor) -> Tensor:
    """Bool [N]: which of the boxes [N, 4] are not padding."""
    real: Tensor = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return real


def extents_of(extents: Tensor) -> list[tuple[int, int]]:
    """int64 [B, 2] as the list that torchvision expects."""
    return [(height, width) for height, width in extents.tolist()]


def generators(draws: Tensor) -> list[torch.Generator]:
    """A random generator for each sample of a batch."""
    return [torch.Generator().manual_seed(draw) for draw in draws.tolist()]


def unplaced(boxes: Tensor, place: Placement) -> Tensor:
    """Boxes [n, 4] in the square to boxes in the image, clipped; for a placement without a mirror or an offset."""
    across, down = place.width / place.scaled[1], place.height / place.scaled[0]
    limits = boxes.new_tensor([place.width, place.height] * 2)
    return torch.minimum((boxes * boxes.new_tensor([across, down] * 2)).clamp(min=0), limits)


SMALL: dict[str, Any] = {
    "backbone": "clipmill_small_resnet",
    "levels": (1, 2, 3),
    "norm": "group",
    "pyramid_width": 32,
    "anchor_sizes": (16, 24, 40, 64),
    "head_depth": 1,
    "anchors_drawn": 64,
    "proposals_tried": 100,
    "proposals_tried_in_test": 100,
    "proposals_kept": 50,
    "image_size": 96,
    "jitter_scale": (0.8, 1.25),
    "most_objects": 20,
}
"""Preset for drawn images: trains in minutes on a CPU."""

SMALLEST: dict[str, Any] = {
    **SMALL,
    "levels": (2, 3),
    "pyramid_width": 16,
    "anchor_sizes": (16, 32, 48),
    "anchors_drawn": 32,
    "proposals_tried": 20,
    "proposals_tried_in_test": 20,
    "proposals_kept": 16,
    "image_size": 64,
}


def small(**differences: Any) -> Config:
    """The proposer for drawn images, with ``differences``."""
    return replace(Config(**SMALL), **differences)
