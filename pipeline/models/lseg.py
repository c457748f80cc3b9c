"""LSeg: language-driven semantic segmentation.

Li, Weinberger, Belongie, Koltun, Ranftl, 2022, arXiv 2201.03546

The idea: an image network gives every pixel a vector in the space of CLIP's text features, and is trained so that a
pixel's vector is nearest to the text of its class. The text tower is frozen, so a pixel can be compared with any words
at test time. With unit vectors f_p of pixels p and t_n of the N class names, a fixed scale s = 1 / 0.07, the class y_p
of a pixel and V the pixels that are not void

    z_pn = s f_p.t_n        L = -1/|V| sum_(p in V) log softmax_n(B(z)_p) at n = y_p

B is the spatial regularisation, or nothing: one 3 x 3 convolution with one channel in and out, applied to
the score map of each label by itself, d times with the same weights; between two times an activation. ``bottleneck``
adds the largest score over all labels to each. So permuting the labels permutes the result. Scores are made at half of
the input's size and resized.

The image network is DPT (arXiv 2103.13413; ``towers/dpt.py``) on any vision transformer of timm with a class token: the
tokens after four blocks, each joined with the class token and projected, become feature maps of four sizes, which
residual units and bilinear resizing fuse from coarse to fine. A ResNet has such maps by itself.

Loss and scores are computed a strip of rows at a time, again in the backward pass: pixels x labels never exist at once.

Labels may differ. In a mixture each data set has its classes; a pixel is compared with the union of all, with those of
its own data set, or with its image's labels and random others (``loaders/label_lists.py``). The sum over n then runs
over the image's list only; the loss stays exact. Classes that a card holds out (PASCAL-5i, COCO-20i) have no labels:
their pixels are void, or count as unlabelled.

Differences from the authors' code:

- class vectors are computed once, without gradients, not in every step;
- the residual unit of the coarsest level that has no input is left out, as are the blocks above the last tap;
- the product of pixels and texts is computed in float32; there, in half precision;
- images are resized by a random factor, cut and mirrored by this project's reader; the padding is void. The authors
  squash the images of few-shot sets to 480 x 480, without augmentation;
- the learning rate falls with every step, not every epoch;
- class names are put in lower case without underscores; theirs are as written. Neither uses a prompt;
- the training for few-shot sets was not released. Ours compares all base classes and ``others`` at once, with held-out
  pixels void. ``two_words`` with ``other_classes`` unlabelled reads images as the authors' code does, for one class and
  ``others``, but for void pixels, which they count as ``others``.

Left out: MSeg's taxonomy by hand; in a union, classes of equal names are one class. Lists of the labels that were
verified in an image (LVIS): pixels without a label should be void there.

To hold a run against: ADE20K, pixel accuracy / mIoU with a ViT-B/32 image network, 79.70 / 37.83 without blocks, 39.79
with two bottleneck blocks; ViT-L/16 82.46 / 46.28 (tables 4 and 6, not checked against the paper). Zero-shot with a
ResNet-101, mIoU of the held-out classes in pairs with ``others``: PASCAL-5i 52.8 / 53.8 / 44.4 / 38.5 by fold, COCO-20i
22.1 / 25.1 / 24.9 / 21.5, FSS-1000 84.7 (the authors' README; users report 28.4 for the first with its code).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import require
from pipeline.loaders.batches import Reader
from pipeline.loaders.detection import FILL, RandomResize
from pipeline.loaders.images import resize
from pipeline.loaders.label_figures import samples_with_labels
from pipeline.loaders.label_lists import LabelLists, ListedSegmentationReader, ListKind
from pipeline.loaders.segmentation import (
    VOID,
    LabelClasses,
    LabelField,
    OtherClasses,
    SegmentationReader,
)
from pipeline.models import class_vectors
from pipeline.models.detections import check_words
from pipeline.models.method import Method
from pipeline.models.pixel_text import Activation, Block, SpatialBlock, pixel_text_loss, scores_of
from pipeline.models.segments import ImageViews, Segmentation, best_words, check_segment_words, window_starts
from pipeline.models.towers.dpt import (
    STRIDE,
    Decoder,
    TransformerMaps,
    check_backbone,
    image_statistics,
    make_backbone,
)
from pipeline.models.towers.layers import Layer
from pipeline.shards.sample import Sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WINDOW_STRIDE = 2 / 3  # distance of the windows, as a part of their side
FACTS = "lseg.json"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The network and the data, with the paper's values for ViT-L/16."""

    text_tower: str = ""
    """CLIP whose frozen text tower encodes the words: ARCHITECTURE:WEIGHTS, where WEIGHTS are a tag, a file, a
    checkpoint folder, or untrained. The paper's is ViT-B-32-quickgelu:openai."""
    backbone: str = "vit_large_patch16_384"
    """Vision transformer of timm with a class token and patches of 8, 16 or 32 pixels, or a ResNet of timm."""
    pretrained_backbone: bool = False
    """Initialise the backbone with timm's weights, as the paper does with ImageNet's."""
    taps: tuple[int, ...] = ()
    """The four blocks of a transformer, from 0, after which tokens are taken; the end of each quarter if empty."""
    tap_widths: tuple[int, ...] = (256, 512, 1024, 1024)
    """Channels of the four maps that a transformer's tokens become, finest first; 96, 192, 384 and 768 for ViT-B."""
    width: int = 256
    """Channels of the decoder, a multiple of 8."""
    norm: Literal["batch", "group"] = "batch"
    """Normalisation of the decoder and of a ResNet: batch (over all processes) or group (over an image's channels)."""
    block: Block = "none"
    """Spatial regularisation of the score maps: none, bottleneck or depthwise."""
    block_depth: int = 0
    """Number of times that the regularisation is applied, 1 to 4; 0 with block none."""
    activation: Activation = "lrelu"
    """Activation between the times: lrelu, relu or tanh."""
    class_names: tuple[str, ...] = ()
    """Names of the training classes, in the order of their numbers."""
    labels: LabelField = "boxes.json"
    """Field with the labels: boxes.json (masks of objects) or mask.png (a class number for each pixel)."""
    dataset_classes: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """Classes of a data set, in the order of the values 1, 2, ... of mask.png; repeat the option for each data set."""
    unlabelled: str = ""
    """Class name of the pixels without a label; void if empty, which the loss leaves out."""
    other_classes: OtherClasses = "void"
    """Pixels of classes that are not trained, such as held-out ones: void, or unlabelled."""
    label_list: ListKind = "union"
    """Labels that a pixel is compared with: the union of all data sets' classes, or those of its own dataset."""
    labels_per_image: int = 0
    """Length of an image's label list, 2 or more: its own labels and random others; 0 for all labels."""
    two_words: bool = False
    """Compare the pixels of an image with two words: one of its classes, and unlabelled for all other pixels."""
    image_size: int = 480
    """Side of the square input in pixels, a multiple of 32."""
    jitter_scale: tuple[float, float] = (0.5 * 520 / 480, 2 * 520 / 480)
    """Range of the random resize factor of training images, relative to the size at which they fit the square."""
    flip: float = 0.5
    """Probability of mirroring a training image."""

    def __post_init__(self) -> None:
        none = self.block == "none"
        allowed = "0 with block none" if none else "1 to 4"
        require(self.block_depth == 0 if none else 1 <= self.block_depth <= 4, "block_depth", self.block_depth, allowed)
        require(self.width >= 8 and self.width % 8 == 0, "width", self.width, "a multiple of 8")
        require(len(self.tap_widths) == 4 and min(self.tap_widths) > 0, "tap_widths", self.tap_widths, "four widths")
        rising = not self.taps or (len(self.taps) == 4 and [*self.taps] == sorted({*self.taps}) and self.taps[0] >= 0)
        require(rising, "taps", self.taps, "four rising numbers of blocks, or none")
        require(self.image_size % STRIDE == 0, "image_size", self.image_size, f"a multiple of {STRIDE}")
        needed = self.two_words or self.other_classes == "unlabelled"
        allowed = "a class name, with two_words or other_classes unlabelled"
        require(bool(self.unlabelled) or not needed, "unlabelled", self.unlabelled, allowed)
        self.lists()
        if self.class_names:
            check_words(self.class_names)
            classes = self.classes()
            complete = not self.two_words or all({*one.own_numbers} - {one.ground} for one in classes)
            require(complete, "dataset_classes", self.dataset_classes, "a trained class in each data set for two_words")
        self.resize()

    def classes(self) -> tuple[LabelClasses, ...]:
        """The class numbers of the labels of each data set."""
        return tuple(
            LabelClasses(
                classes=self.class_names,
                field=self.labels,
                unlabelled=self.unlabelled,
                mask_classes=names,
                other_classes=self.other_classes,
            )
            for names in self.dataset_classes or (self.class_names,)
        )

    def lists(self) -> LabelLists:
        """The labels that an image's pixels are compared with."""
        return LabelLists(kind=self.label_list, per_image=self.labels_per_image, two_words=self.two_words)

    def resize(self, train: bool = True) -> RandomResize:
        """The transform of images into the square."""
        if train:
            return RandomResize(size=self.image_size, scale=self.jitter_scale, flip=self.flip)
        return RandomResize(size=self.image_size, scale=(1.0, 1.0), flip=0.0)


class PixelNetwork(nn.Module):
    """Backbone, decoder and the regularisation of the scores."""

    def __init__(self, config: Config, dimension: int, load: bool = True) -> None:
        super().__init__()
        pretrained = config.pretrained_backbone and load
        body = make_backbone(config.backbone, pretrained, config.norm, config.taps, config.tap_widths)
        self.backbone, widths = body
        self.decoder = Decoder(widths, config.width, config.norm, dimension)
        self.block = SpatialBlock(config.block, config.block_depth, config.activation) if config.block_depth else None

    def forward(self, images: Tensor) -> Tensor:
        """Normalised [B, 3, H, W] to unit vectors, float32 [B, D, H/2, W/2]."""
        return functional.normalize(self.decoder(self.backbone(images)).float(), dim=1)


class Lseg(Method):
    """A network that segments by any words."""

    batch_keys: ClassVar[tuple[str, ...]] = ("image", "labels")
    registered_as: ClassVar[str] = "lseg"
    # Sums over many pixels round relative to their largest term, also in small entries of a filter.
    parity_tolerance: ClassVar[float] = 1e-4
    config: Config
    model: PixelNetwork
    vectors: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, config: Config, description: Mapping[str, str] | None = None) -> None:
        """``description`` is given if weights are restored afterwards; the text tower is not loaded then."""
        _check_complete(config)
        super().__init__(config)
        vectors, self.tower_digest = self._class_vectors(description)
        self.register_buffer("vectors", vectors)
        self.model = PixelNetwork(config, vectors.shape[1], load=description is None)
        mean, std = image_statistics(config.backbone)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)
        self._known: dict[str, Tensor] = {}

    @classmethod
    def smallest(cls) -> Config:
        """A narrow transformer with blocks and an untrained text tower."""
        return Config(
            **SMALL,
            backbone="clipmill_small_vit",
            block="bottleneck",
            block_depth=2,
            class_names=("red", "green", "blue", "yellow"),
            text_tower="clipmill-tiny:untrained",
        )

    @classmethod
    def check(cls, config: Config) -> None:
        """Require classes, a text tower, and a backbone that timm has."""
        _check_complete(config)
        check_backbone(config.backbone)
        class_vectors.check(config.text_tower, "text_tower")

    @classmethod
    def check_workers(cls, config: Config, gpus: bool) -> None:
        """``norm`` batch needs GPUs, even for one worker: in a process group torch's SyncBatchNorm refuses CPUs."""
        allowed = "group where workers have no GPU each, or `workers` 0, which trains in this process"
        require(gpus or config.norm != "batch", "norm", config.norm, allowed)

    @classmethod
    def restored(cls, config: Config, description: Mapping[str, str]) -> "Lseg":
        """The modules alone."""
        return cls(config, description)

    def description(self) -> Mapping[str, str]:
        """The text tower's metadata, which a checkpoint stores."""
        return {FACTS: json.dumps({"width": self.vectors.shape[1], "text_tower": self.tower_digest})}

    @classmethod
    def sample_fields(cls, config: Config, settings: None = None) -> Sequence[str]:
        """Images and their labels."""
        return ("image", config.labels)

    def readers(self, train: bool, *, seed: int = 0, settings: None = None) -> Sequence[Reader]:
        """Images and label maps in the square."""
        resize = self.config.resize(train)
        each = [SegmentationReader(classes=classes, resize=resize, seed=seed) for classes in self.config.classes()]
        return [ListedSegmentationReader(datasets=tuple(each), lists=self.config.lists(), seed=seed)]

    @classmethod
    def samples_figure(cls, config: Config, settings: None, samples: Sequence[Sample], title: str) -> "Figure":
        """Images as training reads them, each beside its label map."""
        reader = SegmentationReader(classes=config.classes()[0], resize=config.resize(train=False))
        return samples_with_labels(reader, samples, config.class_names, title)

    def training_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The cross-entropy of the pixels that are not void; 0 where a batch has none."""
        labels = batch["labels"].long()
        total = self.loss(self.model(self.normalised(batch["image"])), labels, batch.get("label_list"))
        count = (labels != VOID).sum().float()
        mean = self.gather(count[None]).mean(dim=0)
        return {"cross_entropy": total / mean.clamp(min=1 / len(labels))}

    def loss(self, pixels: Tensor, labels: Tensor, listed: Tensor | None) -> Tensor:
        """The summed loss of unit vectors [B, D, h, w] for labels [B, H, W], among the ``listed`` labels [B, K]."""
        return pixel_text_loss(pixels, self.vectors, labels, self.model.block, listed=listed)

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 to float32, with the mean and the deviation that the backbone expects."""
        return (images.float() - self.mean) / self.std

    @torch.no_grad()
    def segment(
        self, images: Sequence[Tensor], words: Sequence[str], views: ImageViews | None = None
    ) -> list[Segmentation]:
        """See :class:`~pipeline.models.segments.Segmenter`.

        Words that are not training classes are encoded by the text tower, which is loaded when it is first needed.
        """
        check_segment_words(words)
        vectors, views = self.word_vectors(words), views or ImageViews()
        window = views.window or self.config.image_size
        require(window % STRIDE == 0, "window", window, f"a multiple of {STRIDE}")
        logits = _Logits(vectors, has_scores=self.model.block is not None)
        found = []
        for image in images:
            maps = [self._view(image, vectors, views, window, scale) for scale in views.scales]
            with torch.autocast(vectors.device.type, enabled=False):
                found.append(best_words(maps, image.shape[1], image.shape[2], logits))
        return found

    def _view(self, image: Tensor, vectors: Tensor, views: ImageViews, window: int, scale: float) -> Tensor:
        """The map of one size of an image: mean vectors [D, h, w] of its pixels, or mean scores [N, h, w] with a block.

        Both are averaged before they are resized, which are linear steps, as is the product with the text vectors.
        """
        factor = (views.side or window) * scale / max(image.shape[1:])
        height, width = (max(1, round(side * factor)) for side in image.shape[1:])
        pixels = resize(image.permute(1, 2, 0).cpu().numpy(), (height, width), "bilinear")
        canvas = torch.tensor(FILL, dtype=torch.uint8)[:, None, None].repeat(1, max(height, window), max(width, window))
        canvas[:, :height, :width] = pixels
        places = [
            (top, left)
            for top in window_starts(height, window, views.stride or WINDOW_STRIDE)
            for left in window_starts(width, window, views.stride or WINDOW_STRIDE)
        ]
        total = counts = torch.zeros(())
        for top, left in places:
            part = canvas[None, :, top : top + window, left : left + window].to(vectors.device)
            found = self._window(part, vectors)
            if views.flip:
                found = (found + self._window(part.flip(-1), vectors).flip(-1)) / 2
            if len(places) == 1:
                return found[:, :height, :width]
            if not total.ndim:
                total, counts = found.new_zeros(len(found), *canvas.shape[1:]), found.new_zeros(canvas.shape[1:])
            total[:, top : top + window, left : left + window] += found
            counts[top : top + window, left : left + window] += 1
        return (total / counts)[:, :height, :width]

    def _window(self, part: Tensor, vectors: Tensor) -> Tensor:
        """Vectors or scores of every pixel of one window, [C, S, S]."""
        pixels = self.model(self.normalised(part))
        with torch.autocast(part.device.type, enabled=False):
            if self.model.block is not None:
                pixels = self.model.block(scores_of(pixels, vectors))
            size = part.shape[2:]
            whole: Tensor = functional.interpolate(pixels, size=size, mode="bilinear", align_corners=True)[0]
        return whole

    def word_vectors(self, words: Sequence[str]) -> Tensor:
        """Unit text vectors [W, D]: stored ones of training classes, else those of the text tower, which are kept.

        Raises:
            SettingError: the text tower's weights differ from those of the training.
        """
        known = {word: vector for word, vector in zip(self.config.class_names, self.vectors, strict=True)}
        new = [word for word in words if word not in known and word not in self._known]
        if new:
            clip = class_vectors.open_teacher(self.config.text_tower, "text_tower")
            same = class_vectors.clip_digest(clip) == self.tower_digest
            require(same, "text_tower", self.config.text_tower, "the CLIP that this model was trained with")
            self._known |= dict(zip(new, _made_vectors(clip, new), strict=True))
        return torch.stack([known[word] if word in known else self._known[word].to(self.vectors) for word in words])

    def layers(self) -> Mapping[str, Layer]:
        """The towers ``image`` (backbone and reassembly) and ``decoder``, for rates; all of one depth."""
        return {
            name: Layer("image" if name.startswith("model.backbone.") else "decoder", 0)
            for name, _ in self.named_parameters()
        }

    def blocks(self) -> Sequence[nn.Module]:
        """The transformer's blocks or the ResNet's stages."""
        backbone = self.model.backbone
        if isinstance(backbone, TransformerMaps):
            return list(backbone.body.blocks)
        return [module for name, module in backbone.named_children() if name.startswith("layer")]

    def _class_vectors(self, description: Mapping[str, str] | None) -> tuple[Tensor, str]:
        """The vectors of the training classes, and the text tower's digest; zeros if a checkpoint provides them."""
        if description is not None:
            facts = json.loads(description[FACTS])
            return torch.zeros(len(self.config.class_names), int(facts["width"])), str(facts["text_tower"])
        clip = class_vectors.open_teacher(self.config.text_tower, "text_tower")
        return _made_vectors(clip, self.config.class_names), class_vectors.clip_digest(clip)


def _made_vectors(clip: Any, words: Sequence[str]) -> Tensor:
    return class_vectors.class_vectors(clip, words, ("{}",), class_vectors.fastest_device())


def _check_complete(config: Config) -> None:
    """Require the options that a preset may leave empty."""
    require(len(config.class_names) >= 1, "class_names", config.class_names, "the names of the classes")
    require(bool(config.text_tower), "text_tower", config.text_tower, "a CLIP, such as ViT-B-32-quickgelu:openai")


@dataclass(frozen=True)
class _Logits:
    """The logits of rows of vectors, or of scores."""

    vectors: Tensor
    has_scores: bool

    @property
    def words(self) -> int:
        """The number of words."""
        return len(self.vectors)

    def __call__(self, rows: Tensor) -> Tensor:
        """[C, r, w] to [W, r, w]."""
        return rows if self.has_scores else scores_of(rows[None], self.vectors)[0]


SMALL: dict[str, Any] = {
    "tap_widths": (16, 24, 32, 32),
    "width": 32,
    "norm": "group",
    "image_size": 64,
    "jitter_scale": (0.8, 1.25),
}
"""Preset for drawn images: trains in minutes on a CPU."""
