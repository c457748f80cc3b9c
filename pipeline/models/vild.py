"""ViLD: open-vocabulary object detection via vision and language knowledge distillation.

Gu, Lin, Kuo, Cui, 2021, arXiv 2104.13921

The idea: a Mask R-CNN whose classifier consists of the text vectors of class names, so that it detects any class at
test time. A region's embedding is trained with the names of base classes (ViLD-text), and with the features of CLIP's
image tower for regions of a proposer, including unlabelled objects (ViLD-image). With unit embeddings e_r of sampled
regions r and e'_s of stored ones, text vectors y_c of the base classes C, a learned background vector y_0 of unit
length, CLIP's unit features v_s and temperature t = 0.01 (equations 1 to 5)

    L_text = -1/R sum_r log softmax_c(e_r.y_c / t) at r's class,  c in {0} and C
    L_image = 1/S sum_s |e'_s - v_s|_1
    L = proposals (see proposals.py) + box + mask + L_text + w L_image,    w = 0.5

A region's class is that of the object with an overlap of more than a half, else 0. Box is the Huber loss of the four
offsets of regions with an object, mask the binary cross-entropy of 28 x 28 pixels; both are class-agnostic. ``mode`` is

- ``text``: L_text alone;  ``image``: L_image alone;
- ``vild``: both, of one embedding;
- ``ensemble``: both losses, each with its own embedding and head. A region's score for a word is the geometric mean of
  text head's p (background among the classes) and the image head's q (not among them), p^(2/3) q^(1/3) for base words,
  p^(1/3) q^(2/3) for novel ones (section 3.4);
- ``supervised``: a learned classifier of the base classes; all other words get a score of 0.

``image`` has no background: its score is the geometric mean of q and the proposal's objectness, a rule of ours.

Differences from the authors' code:

- classes without boxes are not in the softmax; there they have logits of 0 (``zeroed_classes`` adds them);
- an image and its stored regions are mirrored together; there by two independent random numbers;
- regions are cut by torchvision's RoIAlign, without an offset of half a pixel, from the levels up to 1/32, and the
  level at 1/64 is torchvision's max-pooling of the level at 1/32;
- the background vector has no weight decay, like other vectors here; it is of unit length, so decay only changes how
  fast it turns;
- linear layers and the mask head after its deconvolution have no batch normalisation.

As there, boxes that cover an object by exactly a half are background.

Left out: the generator of the features (jobs/extract_region_features.py is ours); the larger backbones' recipes, except
for the options in Config.

To hold a run against: LVIS v1 mask AP rare / common / frequent / all, ResNet-50: ViLD-text 10.1 / 23.9 / 32.5 / 24.9,
ViLD 16.1 / 20.0 / 28.3 / 22.5, ViLD-ensemble 16.6 / 24.6 / 30.3 / 25.5 (table 3; the released weights 16.6 / 19.8 /
28.2 / 22.5 and 18.0 / 24.7 / 30.6 / 25.9). All average the vectors of a class's LVIS synonyms, as this file does for
synonyms in the data (``couch; sofa``).
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, batched_nms, box_iou, clip_boxes_to_image, roi_align

from pipeline.config import require
from pipeline.dataset import check_templates
from pipeline.errors import DataError
from pipeline.loaders.batches import Reader
from pipeline.loaders.cache import FileCache
from pipeline.loaders.detection import Placement, StoredRegions
from pipeline.models import class_vectors, proposals
from pipeline.models.clip import Clip
from pipeline.models.detections import Detections, check_words
from pipeline.models.proposals import extents_of, generators, norm_layer, real_boxes, sample_balanced, unplaced
from pipeline.models.towers.openclip import WEIGHTS
from pipeline.models.towers.weights import misfit, read_tensors
from pipeline.shards.objects import names_of, plain_word
from pipeline.shards.sidecar import Wanted
from pipeline.shards.storage import Folder

Mode = Literal["text", "image", "vild", "ensemble", "supervised"]
DISTILLED = ("image", "vild", "ensemble")
"""Modes that are trained on stored features."""
NAMED = ("text", "vild", "ensemble")
"""Modes that are trained on text vectors."""
MOVES = (10.0, 10.0, 5.0, 5.0)  # factors of a box's offsets, which make them similar in size
FACTS = "vild.json"
REGIONS_JOB = "jobs/extract_region_features.py"


@dataclass(frozen=True, kw_only=True)
class Config(proposals.Config):
    """The detector, with the paper's values."""

    mode: Mode = "vild"
    """Training targets: text, image, vild (both), ensemble (both, separate heads), or supervised."""
    teacher: str = ""
    """CLIP that provides text vectors and region features: ARCHITECTURE:WEIGHTS, where WEIGHTS are a tag, a file, a
    checkpoint folder, or untrained. Not needed in supervised mode."""
    prompts: tuple[str, ...] = ()
    """Prompts with {} for a name and {article} for a or an; open_clip's 80 for ImageNet if empty."""
    regions: str = "regions"
    """Name of the sidecar with the stored regions."""
    most_regions: int = 300
    """Maximum number of stored regions per image in training."""
    distillation_weight: float = 0.5
    """Weight w of the distillation loss; the paper's ResNet-152 uses 1, and 2 in the ensemble."""
    temperature: float = 0.01
    """Softmax temperature t, more than 0."""
    zeroed_classes: int = 0
    """Classes without boxes that the softmax counts with a logit of 0, as the authors' code does (337 on LVIS)."""
    regions_drawn: int = 512
    """Regions per image that the loss samples."""
    foreground: float = 0.25
    """Maximum part of the sampled regions that cover an object, up to 1."""
    region_size: int = 224
    """Side of a box, in pixels, that is cut from the level at 1/16; half as large from 1/8."""
    crop_samples: int = 1
    """Points, down and across, whose mean is a cell of what is cut; 1 as in the authors' code, more are slower."""
    head_convolutions: tuple[int, ...] = (256, 256, 256, 256)
    """Channels of the convolutions of a region head."""
    head_layers: tuple[int, ...] = (1024, 1024)
    """Widths of the linear layers of a region head."""
    masks: bool = True
    """Train and predict masks."""
    mask_convolutions: tuple[int, ...] = (256, 256, 256, 256)
    """Channels of the convolutions of the mask head."""
    mask_cells: int = 112
    """Side of the grid over an object's box for its true mask, in cells."""
    detections: int = 300
    """Maximum number of detections per image."""
    detection_overlap: float = 0.5
    """Intersection over union above which non-maximum suppression removes the lower-scoring box of a class, up to 1."""
    candidates: int = 10_000
    """Highest scores per image, over all regions and words, before non-maximum suppression."""
    base_share: float = 2 / 3
    """Exponent of the text head's score for base words in the ensemble, and of the image head's for novel words."""
    start_from: str = ""
    """Checkpoint folder of a proposer, or a file of its weights, to initialise the backbone and the proposal head; the
    paper starts from random weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_templates(template.replace("{article}", "") for template in self.prompts)
        counts = ("most_regions", "regions_drawn", "region_size", "crop_samples", "mask_cells", "detections")
        for name in (*counts, "candidates"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("temperature", "distillation_weight"):
            require(getattr(self, name) > 0, name, getattr(self, name), "more than 0")
        require(self.zeroed_classes >= 0, "zeroed_classes", self.zeroed_classes, "0 or more")
        for name in ("foreground", "detection_overlap", "base_share"):
            require(0 < getattr(self, name) <= 1, name, getattr(self, name), "more than 0, up to 1")
        require(self.regions.isidentifier(), "regions", self.regions, "the name of a sidecar")

    def templates(self) -> tuple[str, ...]:
        """The prompts, or open_clip's."""
        if self.prompts:
            return self.prompts
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


class Branch(nn.Module):
    """A head over crops of the pyramid and, if it is compared with CLIP, a projection to CLIP's space."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        convolutions, layers = list(config.head_convolutions), list(config.head_layers)
        norm = norm_layer(config.norm)
        self.head = FastRCNNConvFCHead((config.pyramid_width, 7, 7), convolutions, layers, norm_layer=norm)
        self.project = nn.Linear(layers[-1], width) if width else None

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, 7, 7] to hidden features [N, H] and unit embeddings, float32 [N, D] (the hidden features without a
        projection)."""
        hidden: Tensor = self.head(crops)
        if self.project is None:
            return hidden, hidden.float()
        return hidden, functional.normalize(self.project(hidden).float(), dim=-1)


@dataclass(frozen=True)
class SampledRegions:
    """The sampled regions of one image: ``boxes`` [n, 4], ``labels`` [n], 0 for background, else class + 1,
    ``matched`` [n], the index of each region's object, and ``truth`` [n, 4], its box; the last two are undefined
    for background."""

    boxes: Tensor
    labels: Tensor
    matched: Tensor
    truth: Tensor


class Vild(proposals.Proposals):
    """A detector for any class names."""

    batch_keys: ClassVar[tuple[str, ...]] = ("image", "extent", "boxes", "labels", "draws")
    registered_as: ClassVar[str] = "vild"
    config: Config
    vectors: Tensor

    def __init__(self, config: Config, description: Mapping[str, str] | None = None) -> None:
        """``description`` is given if weights are restored afterwards; the teacher is not loaded then."""
        _check_complete(config)
        super().__init__(config, description)
        self._load_start(description is None)
        vectors, self.teacher_digest = self._teacher_vectors(description)
        self.register_buffer("vectors", vectors)
        width, hidden = vectors.shape[1], config.head_layers[-1]
        names = [str(number) for number in range(len(config.levels))]
        size = {"canonical_scale": config.region_size, "canonical_level": 4, "sampling_ratio": config.crop_samples}
        self.crop, self.crop_mask = (MultiScaleRoIAlign(names, output_size=cells, **size) for cells in (7, 14))
        self.branch = Branch(config, width)
        self.image_branch = Branch(config, width) if config.mode == "ensemble" else None
        self.box = nn.Linear(hidden, 4)
        nn.init.normal_(self.box.weight, std=0.001)
        nn.init.zeros_(self.box.bias)
        self.background = nn.Parameter(torch.randn(width) * 0.01) if config.mode in NAMED else None
        self.classifier = nn.Linear(hidden, len(config.class_names) + 1) if config.mode == "supervised" else None
        self.mask = self._mask_head() if config.masks else None
        self.coder = BoxCoder(MOVES)
        self._learnt: dict[tuple[str, ...], Tensor] = {}

    @classmethod
    def smallest(cls) -> Config:
        """An ensemble with masks and an untrained teacher."""
        return Config(
            **proposals.SMALLEST,
            **SMALL_HEADS,
            mode="ensemble",
            class_names=("red", "green", "blue", "yellow"),
            teacher="clipmill-tiny:untrained",
            prompts=("a {} thing.",),
        )

    @classmethod
    def check(cls, config: proposals.Config) -> None:
        """Like the proposer's check; also requires classes and a teacher."""
        super().check(config)
        assert isinstance(config, Config)
        _check_complete(config)
        if config.teacher:
            class_vectors.check(config.teacher)

    def description(self) -> Mapping[str, str]:
        """The teacher's metadata, which a checkpoint stores."""
        return {FACTS: json.dumps({"width": self.vectors.shape[1], "teacher": self.teacher_digest})}

    @classmethod
    def sidecars(cls, config: proposals.Config, settings: None = None) -> Sequence[Wanted]:
        """The stored regions, in modes that are trained on them, and the pseudo boxes."""
        assert isinstance(config, Config)
        regions = [Wanted(name=config.regions, job=REGIONS_JOB)] if config.mode in DISTILLED else []
        return [*regions, *super().sidecars(config)]

    def readers(self, train: bool, *, seed: int = 0, settings: None = None) -> Sequence[Reader]:
        """Like the proposer's, and the labels, masks and stored regions that the mode needs."""
        config, regions = self.config, None
        keys = [*self.batch_keys, *(["masks"] if config.masks else [])]
        if config.mode in DISTILLED:
            wanted = Wanted(name=config.regions, job=REGIONS_JOB, facts={"teacher": self.teacher_digest})
            regions = StoredRegions(wanted=wanted, width=self.vectors.shape[1], most=config.most_regions)
            keys += ["region_boxes", "region_features"]
        return [self.reader(train, seed, tuple(keys), mask_cells=config.mask_cells, regions=regions)]

    def training_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The losses of proposals, boxes, masks and the mode's targets."""
        # Everything that waits for the GPU comes before the network is queued, which would have to finish first.
        draws, extents = generators(batch["draws"]), extents_of(batch["extent"])
        stored = self._distillation_targets(batch)
        real = [real_boxes(boxes) for boxes in batch["boxes"]]
        targets = [boxes[kept] for boxes, kept in zip(batch["boxes"], real, strict=True)]
        labels = [some[kept] for some, kept in zip(batch["labels"], real, strict=True)]
        images = self.normalised(batch["image"])
        features = self.model.features(images)
        proposed = self.model.proposer.propose(images, extents, features)
        losses = self.model.proposer.losses(proposed, targets, draws, self.average)
        regions = [self._draw(*one) for one in zip(proposed.boxes, targets, labels, draws, strict=True)]
        masks = None if self.mask is None else self._mask_loss(features, regions, targets, batch["masks"])
        return losses | self._region_losses(features, regions, stored, masks)

    def _region_losses(
        self,
        features: Mapping[str, Tensor],
        regions: Sequence[SampledRegions],
        stored: tuple[list[Tensor], Tensor],
        masks: Tensor | None,
    ) -> dict[str, Tensor]:
        """``stored`` is the result of :meth:`_distillation_targets`; ``masks`` the sum of :meth:`_mask_loss`."""
        labels = torch.cat([one.labels for one in regions])
        truth = torch.cat([one.truth for one in regions])
        stored_boxes, wanted = stored
        sizes = labels.new_tensor([len(labels), int((labels > 0).sum()), len(wanted)]).float()
        sampled_count, covering, stored_count = self.average(sizes)
        crops = self._cut(self.crop, features, [one.boxes for one in regions])
        stored_crops = self._cut(self.crop, features, stored_boxes)
        if self.image_branch is None:
            hidden, embedding = self.branch(torch.cat([crops, stored_crops]))
            hidden, (embedding, student) = hidden[: len(labels)], embedding.split([len(labels), len(wanted)])
        else:
            (hidden, embedding), (_, student) = self.branch(crops), self.image_branch(stored_crops)
        losses = {}
        with torch.autocast(hidden.device.type, enabled=False):
            if self.config.mode != "image":
                logits = self._logits(hidden, embedding)
                losses["class"] = class_loss(logits, labels, self.config.zeroed_classes) / sampled_count
            if self.config.mode in DISTILLED:
                distance = distillation_loss(student, wanted) / stored_count
                losses["distillation"] = self.config.distillation_weight * distance
            boxes = torch.cat([one.boxes for one in regions])
            moves = self.box(hidden.float())
            losses["box"] = box_loss(moves, boxes, truth, labels > 0, self.coder) / covering
        return losses if masks is None else losses | {"mask": masks / covering}

    def _draw(self, proposed: Tensor, boxes: Tensor, labels: Tensor, draw: torch.Generator) -> SampledRegions:
        """Sampled regions of one image from its proposals and the boxes of its objects."""
        candidates = torch.cat([proposed, boxes])
        best, matched = candidates.new_zeros(len(candidates)), labels.new_zeros(len(candidates))
        classes, truth = matched, candidates
        if len(boxes):
            best, matched = box_iou(boxes, candidates).max(dim=0)
            classes, truth = torch.where(best > 0.5, labels[matched] + 1, 0), boxes[matched]
        places = torch.cat(
            sample_balanced((best > 0.5).long(), self.config.regions_drawn, self.config.foreground, draw)
        )
        return SampledRegions(candidates[places], classes[places], matched[places], truth[places])

    def _distillation_targets(self, batch: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        """The stored regions that the images show: their boxes, and all their features [S, D]."""
        if self.config.mode not in DISTILLED:
            return [batch["boxes"].new_zeros(0, 4) for _ in batch["boxes"]], batch["boxes"].new_zeros(0, 0)
        real = [real_boxes(boxes) for boxes in batch["region_boxes"]]
        boxes = [boxes[kept] for boxes, kept in zip(batch["region_boxes"], real, strict=True)]
        features = [some[kept] for some, kept in zip(batch["region_features"], real, strict=True)]
        return boxes, torch.cat([some.float() for some in features])

    def _logits(self, hidden: Tensor, embedding: Tensor, vectors: Tensor | None = None) -> Tensor:
        """[N, 1 + C]: background, then the base classes or the classes of ``vectors``."""
        if self.classifier is not None:
            learned: Tensor = self.classifier(hidden.float())
            return learned
        assert self.background is not None
        background = functional.normalize(self.background, dim=0)
        classes = torch.cat([background[None], self.vectors if vectors is None else vectors])
        return embedding @ classes.T / self.config.temperature

    def _mask_loss(
        self,
        features: Mapping[str, Tensor],
        regions: Sequence[SampledRegions],
        targets: Sequence[Tensor],
        masks: Tensor,
    ) -> Tensor:
        """Summed over regions with an object, averaged over pixels."""
        chosen = [one.labels > 0 for one in regions]
        boxes = [one.boxes[kept] for one, kept in zip(regions, chosen, strict=True)]
        logits = self._mask_logits(features, boxes)
        wanted = [
            mask_targets(masks[number], targets[number], some, one.matched[kept], logits.shape[-1])
            for number, (some, one, kept) in enumerate(zip(boxes, regions, chosen, strict=True))
        ]
        errors = functional.binary_cross_entropy_with_logits(logits, torch.cat(wanted), reduction="sum")
        return errors / logits.shape[-1] ** 2

    def _mask_logits(self, features: Mapping[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """float32 [N, 28, 28]."""
        assert self.mask is not None
        logits: Tensor = self.mask(self._cut(self.crop_mask, features, boxes))
        return logits[:, 0].float()

    def _cut(self, crop: MultiScaleRoIAlign, features: Mapping[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """Crops [N, C, cells, cells]; all images have the size of the square."""
        sizes = [(self.config.image_size,) * 2 for _ in boxes]
        crops: Tensor = crop(dict(features), boxes, sizes)
        return crops

    @torch.no_grad()
    def predict(
        self, images: Sequence[Tensor], words: Sequence[str], base: Collection[str] | None = None
    ) -> list[Detections]:
        """See :class:`~pipeline.models.detections.Detector`.

        Words that are not training classes are encoded by the teacher's text tower, which is loaded when it is first
        needed.
        """
        check_words(words, base)
        known = {plain_word(word) for word in (self.config.class_names if base is None else base)}
        is_base = torch.tensor([plain_word(word) in known for word in words], device=self.mean.device)
        square, places = self.laid_out(images)
        features = self.model.features(square)
        proposed = self.model.proposer.propose(square, [place.extent for place in places], features)
        crops = self._cut(self.crop, features, proposed.boxes)
        hidden, embedding = self.branch(crops)
        image = embedding if self.image_branch is None else self.image_branch(crops)[1]
        with torch.autocast(hidden.device.type, enabled=False):  # as in training
            objectness = torch.cat(proposed.scores).float()
            scores = self._scores(hidden, embedding, image, objectness, words, is_base)
            moved = self.coder.decode(self.box(hidden.float()), proposed.boxes).reshape(-1, 4)
        sizes = [len(boxes) for boxes in proposed.boxes]
        pairs = zip(moved.split(sizes), scores.split(sizes), places, strict=True)
        kept = [self._best(boxes, some, place) for boxes, some, place in pairs]
        masks = self._found_masks(features, [boxes for boxes, _, _ in kept])
        return [
            Detections(unplaced(boxes, place).cpu(), some.cpu(), labels.cpu(), None if masks is None else masks[number])
            for number, ((boxes, some, labels), place) in enumerate(zip(kept, places, strict=True))
        ]

    def _scores(
        self,
        hidden: Tensor,
        embedding: Tensor,
        image: Tensor,
        objectness: Tensor,
        words: Sequence[str],
        is_base: Tensor,
    ) -> Tensor:
        """[N, W]: each region's score for each word."""
        config = self.config
        if self.classifier is not None:
            found = self._logits(hidden, embedding).softmax(dim=1)
            places = {plain_word(name): number + 1 for number, name in enumerate(config.class_names)}
            columns = [places.get(plain_word(word)) for word in words]
            nothing = found.new_zeros(len(found))
            return torch.stack([nothing if column is None else found[:, column] for column in columns], dim=1)
        vectors = self.word_vectors(words)
        by_image = (image @ vectors.T / config.temperature).softmax(dim=1)
        if config.mode == "image":
            return (by_image * objectness[:, None]).sqrt()
        by_text = self._logits(hidden, embedding, vectors).softmax(dim=1)[:, 1:]
        if config.mode == "ensemble":
            return ensemble(by_text, by_image, is_base, config.base_share)
        return by_text

    def _best(self, boxes: Tensor, scores: Tensor, place: Placement) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [n, 4], scores [n] and labels [n] of an image's detections, from boxes [N, 4] and scores [N, W]."""
        boxes = clip_boxes_to_image(boxes, place.extent)
        flat = torch.where(((boxes[:, 2:] - boxes[:, :2]) > 1e-2).all(dim=1)[:, None], scores, 0.0).flatten()
        best, places = flat.topk(min(len(flat), self.config.candidates))
        best, places = best[best > 0], places[best > 0]
        rows, labels = places // scores.shape[1], places % scores.shape[1]
        kept = batched_nms(boxes[rows], best, labels, self.config.detection_overlap)[: self.config.detections]
        return boxes[rows[kept]], best[kept], labels[kept]

    def _found_masks(self, features: Mapping[str, Tensor], boxes: list[Tensor]) -> list[Tensor] | None:
        """float32 [n, 28, 28] of each image, on the CPU."""
        if self.mask is None:
            return None
        found = self._mask_logits(features, boxes).sigmoid().cpu()
        return list(found.split([len(some) for some in boxes]))

    def word_vectors(self, words: Sequence[str]) -> Tensor:
        """Unit text vectors [W, D]. Those of the training classes are stored, by their first names and by all synonyms;
        the teacher encodes other words, and training classes with other synonyms.

        Raises:
            SettingError: the teacher's weights differ from those of the training.
        """
        known: dict[tuple[str, ...], Tensor] = {}
        for name, vector in zip(self.config.class_names, self.vectors, strict=True):
            known |= {(plain_word(name),): vector, _names(name): vector}
        asked = {word: _names(word) for word in words}
        have = known.keys() | self._learnt.keys()
        new = [word for word, names in asked.items() if names not in have]
        if new:
            clip = class_vectors.open_teacher(self.config.teacher)
            same = class_vectors.clip_digest(clip) == self.teacher_digest
            require(same, "teacher", self.config.teacher, "the CLIP that this detector was trained with")
            made = self._made_vectors(clip, new).to(self.vectors.device)
            self._learnt |= dict(zip(map(_names, new), made, strict=True))
        known |= {names: vector.to(self.vectors.device) for names, vector in self._learnt.items()}
        return torch.stack([known[asked[word]] for word in words])

    def _teacher_vectors(self, description: Mapping[str, str] | None) -> tuple[Tensor, str]:
        """The vectors of the base classes, and the teacher's digest; zeros if a checkpoint provides them."""
        config = self.config
        if description is not None:
            facts = json.loads(description[FACTS])
            return torch.zeros(len(config.class_names), int(facts["width"])), str(facts["teacher"])
        if config.mode == "supervised":
            return torch.zeros(len(config.class_names), 0), ""
        clip = class_vectors.open_teacher(config.teacher)
        digest = class_vectors.clip_digest(clip)
        return self._made_vectors(clip, config.class_names), digest

    def _made_vectors(self, clip: Clip, words: Sequence[str]) -> Tensor:
        return class_vectors.class_vectors(clip, words, self.config.templates(), class_vectors.fastest_device())

    def _load_start(self, fresh: bool) -> None:
        if not (fresh and self.config.start_from):
            return
        place = self.config.start_from
        folder, _, file = place.rpartition("/") if place.endswith(".safetensors") else (place, "", WEIGHTS)
        try:
            tensors = read_tensors(FileCache().fetch(Folder(folder), file))
        except DataError as error:
            require(False, "start_from", place, f"the checkpoint of a proposer ({error})")
        problem = misfit(self.model.state_dict(), tensors)
        allowed = f"the checkpoint of a proposer with the same network; this is {problem}"
        require(not problem, "start_from", place, allowed)
        self.model.load_state_dict(tensors)

    def _mask_head(self) -> nn.Module:
        config = self.config
        width, layers = config.pyramid_width, list(config.mask_convolutions)
        head = MaskRCNNHeads(width, layers, dilation=1, norm_layer=norm_layer(config.norm))
        return nn.Sequential(head, MaskRCNNPredictor(layers[-1], layers[-1], num_classes=1))


def _check_complete(config: Config) -> None:
    """Require the options that a preset may leave empty."""
    require(bool(config.class_names), "class_names", config.class_names, "the names of the base classes")
    needed = config.mode != "supervised"
    require(bool(config.teacher) or not needed, "teacher", config.teacher, f"a CLIP, for mode {config.mode}")


def _names(word: str) -> tuple[str, ...]:
    return tuple(map(plain_word, names_of(word)))


def class_loss(logits: Tensor, labels: Tensor, zeroed: int = 0) -> Tensor:
    """The cross-entropy of [N, 1 + C], summed; ``zeroed`` further classes have logits of 0."""
    if zeroed:
        logits = torch.cat([logits, logits.new_zeros(len(logits), zeroed)], dim=1)
    return functional.cross_entropy(logits, labels, reduction="sum")


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The sum over regions of the L1 distance of unit vectors [S, D] (equation 4)."""
    return (student - functional.normalize(teacher, dim=-1)).abs().sum()


def box_loss(moves: Tensor, boxes: Tensor, truth: Tensor, covering: Tensor, coder: BoxCoder) -> Tensor:
    """The Huber loss of offsets ``moves`` [N, 4] of ``boxes`` to the ``truth``, for boxes ``covering`` an object.

    Summed over boxes, averaged over the four moves.
    """
    wanted = coder.encode([truth[covering]], [boxes[covering]])[0]
    return functional.huber_loss(moves[covering], wanted, reduction="sum") / 4


def mask_targets(masks: Tensor, objects: Tensor, boxes: Tensor, matched: Tensor, cells: int) -> Tensor:
    """The masks of the objects ``matched`` [n] inside ``boxes`` [n, 4]: 0 and 1, float32 [n, cells, cells].

    ``masks`` are uint8 [N, m, m], each on a grid over its box in ``objects`` [N, 4]; 0 outside the box.
    """
    theirs = objects[matched]
    scale = masks.shape[-1] / (theirs[:, 2:] - theirs[:, :2]).clamp(min=1e-3)
    inside = torch.cat([(boxes[:, :2] - theirs[:, :2]) * scale, (boxes[:, 2:] - theirs[:, :2]) * scale], dim=1)
    numbers = torch.arange(len(boxes), device=boxes.device)[:, None].to(boxes.dtype)
    grids = functional.pad(masks[matched][:, None].to(boxes.dtype), (1, 1, 1, 1))
    found: Tensor = roi_align(grids, torch.cat([numbers, inside + 1], dim=1), cells, sampling_ratio=2, aligned=True)
    return (found[:, 0] >= 0.5).to(torch.float32)


def ensemble(by_text: Tensor, by_image: Tensor, is_base: Tensor, share: float = 2 / 3) -> Tensor:
    """The geometric mean of scores [N, W]: the text head has the exponent ``share`` for base words, the image head for
    the others (section 3.4)."""
    weight = torch.where(is_base, share, 1 - share)
    mean: Tensor = by_text**weight * by_image ** (1 - weight)
    return mean


SMALL_HEADS: dict[str, Any] = {
    "regions_drawn": 32,
    "region_size": 112,
    "crop_samples": 1,
    "head_convolutions": (),
    "head_layers": (128,),
    "mask_convolutions": (32,),
    "mask_cells": 56,
    "most_regions": 24,
    "detections": 50,
}
"""Preset for drawn images: see ``proposals.SMALL``."""
