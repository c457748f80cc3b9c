"""GLIP: grounded language-image pre-training.

Li, Zhang, Zhang, Yang, Li, Zhong, Wang, Yuan, Zhang, Hwang, Chang, Gao, 2021, arXiv 2112.03857

The idea: detection is grounding. The names of the classes become a text, "person. bicycle. car", and every anchor of
the image is compared with every token of the text instead of with a fixed list of classes. So boxes with class names
and captions with boxes train the same network, and any words can be detected at test time. With features f_n of
anchor n after the last block, unit features w_m of token m, learned projections and c the number of positive anchors,

    z_nm = f_n . P(w_m / 2) / exp(s) + b . w_m + b_0
    L = 1/c sum_n sum_m focal(z_nm, [m is a token of the phrase of n's box])
        + 2/C sum_(n positive) c_n (1 - GIoU(box_n, truth))      c_n the centerness, C the sum of all c_n
        + 1/c sum_(n positive) BCE(centerness logit_n, c_n)

where c and C are means over the processes of the numbers of the global batch. A background anchor has no token. Images
and texts meet before the product, too: in each of L blocks, pixels and tokens attend to each other
(``fusion.py``), then tokens go through a new layer of BERT and pixels through a block of the dynamic head
(``dyhead.py``). Which anchors are trained on a box is decided by ATSS (``assignment.py``). Variant A has no fusion: its
tokens are BERT's, and its features of an image do not depend on the text.

The backbone is timm's Swin transformer under torchvision's feature pyramid (levels of 8 to 128 pixels a cell). The text
tower is transformers' BERT, or CLIP's (``text.py``). Texts are padded to the longest of a batch, which is exact. In
detection a prompt holds up to 40 names: the pyramid is computed once for all prompts, and texts once for all images.

Differences from the authors' code:

- images are fitted into a square; theirs have a shorter side of 480 to 800 and a longer one of at most 1,333 pixels;
- the offsets of the level above are resized (``compat_offsets`` of ``dyhead.py`` has theirs);
- boxes are continuous; in theirs x2 is the last pixel, which shifts the GIoU and the centerness by half a pixel;
- no layer that is unused: a classifier of fixed classes, whose loss has a weight of 0 there;
- activations are not clamped to 50,000, which half precision needs.

Tuning on few images, of all weights, of a prompt or of the last layers: ``tuning.py``.

Left out: the losses that the authors tried (soft tokens, MDETR's contrastive alignment).

To hold a run against: COCO zero-shot AP of GLIP-T (A) 42.9, (B) 44.9, (C) 46.7, GLIP-T 46.3, GLIP-L 49.8; LVIS minival
AP (rare) 18.5 (14.2), 17.8 (13.5), 24.9 (17.7), 26.0 (20.8), 37.3 (28.2) (tables 2 and 3).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import timm
import torch
from torch import Tensor, nn

from pipeline.config import require
from pipeline.loaders.batches import Reader
from pipeline.loaders.detection import FILL, Placement
from pipeline.loaders.grounding import (
    GroundingData,
    GroundingReader,
    averaging_matrix,
    grounding_data,
    padded_tokens,
    phrase_tokens,
)
from pipeline.loaders.grounding_prompts import DRAWN, SpanTokenizer, TokenizedText, name_chunks
from pipeline.models.detections import Detections, GroundedBoxes, check_words
from pipeline.models.glip import losses, text, tuning
from pipeline.models.glip.assignment import Anchors, Assignment, assign, make_anchors
from pipeline.models.glip.config import SMALLEST, Config, strides
from pipeline.models.glip.network import AnchorFeatures, EncodedText, GlipNetwork, TokenWeights, align
from pipeline.models.glip.phrases import (
    CODER,
    Candidates,
    FoundPhrases,
    find_candidates,
    suppress,
    together,
)
from pipeline.models.glip.released import load_start
from pipeline.models.method import Method
from pipeline.models.proposals import STD, unplaced
from pipeline.models.towers.layers import Layer
from pipeline.shards.objects import FIELD
from pipeline.shards.sidecar import Wanted

TOKENIZER = "tokenizer.json"
GRAIN = 32  # sides of a test image are padded to a multiple of this many pixels


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt of class names: the number of its first name, its text [1, M, D], and its ``averaging`` [1, P, M]."""

    first: int
    text: EncodedText
    averaging: Tensor

    def expand(self, count: int) -> "EncodedPrompt":
        """One prompt for ``count`` images."""
        return EncodedPrompt(self.first, self.text.expand(count), self.averaging.expand(count, -1, -1))


@dataclass(frozen=True)
class ImageGroup:
    """Images that are padded to the same size: their ``numbers`` in the request, ``pixels`` uint8 [B, 3, H, W], and
    their ``places``."""

    numbers: list[int]
    pixels: Tensor
    places: list[Placement]

    @property
    def extents(self) -> list[tuple[int, int]]:
        """Height and width without padding."""
        return [place.extent for place in self.places]


class Glip(Method):
    """A detector of anything that words describe."""

    batch_keys: ClassVar[tuple[str, ...]] = (
        *("image", "tokens", "token_mask", "boxes"),
        *("positive_map", "annotated", "left_out"),
    )
    registered_as: ClassVar[str] = "glip"
    # A detector's sums over many positions round relative to their largest term, also in small entries of a filter.
    parity_tolerance: ClassVar[float] = 1e-4
    config: Config
    model: GlipNetwork
    mean: Tensor
    std: Tensor

    def __init__(self, config: Config, description: Mapping[str, str] | None = None) -> None:
        """``description`` is given if weights are restored afterwards; no weights are downloaded then."""
        super().__init__(config)
        if description is None:
            self.tokenizer = SpanTokenizer.load(config.text)
            self.settings = text.text_settings(config, self.tokenizer)
        else:
            self.tokenizer = SpanTokenizer(description[TOKENIZER])
            self.settings = text.stored_settings(description[text.SETTINGS])
        self.model = GlipNetwork(config, self.settings, load=description is None)
        if description is None:
            self._load_initial()
        self.register_buffer("mean", torch.tensor(FILL).float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self._prompts: dict[tuple[str, ...], list[EncodedPrompt]] = {}
        self._still = tuning.freeze(self.model, config)
        self._counted: Tensor | None = None

    def _load_initial(self) -> None:
        config = self.config
        if config.pretrained_text and config.text != DRAWN and not config.start_from:
            text.load_pretrained(self.model.text, config.text)
        load_start(self.model, config)

    @classmethod
    def smallest(cls) -> Config:
        """Deep fusion on images of 64 pixels."""
        return Config(**SMALLEST)

    @classmethod
    def check(cls, config: Config) -> None:
        """Require a Swin transformer that timm has, and a text tower that transformers can read."""
        known = timm.is_model(config.backbone) and "swin_" in f"{config.backbone}_"
        require(known, "backbone", config.backbone, "a Swin transformer of timm (timm.list_models('swin_*'))")
        text.text_settings(config, SpanTokenizer.load(config.text))

    @classmethod
    def restored(cls, config: Config, description: Mapping[str, str]) -> Self:
        """The modules alone."""
        return cls(config, description)

    def description(self) -> Mapping[str, str]:
        """The tokenizer and the settings of the text tower."""
        return {TOKENIZER: self.tokenizer.description, text.SETTINGS: text.settings_text(self.settings)}

    def train(self, mode: bool = True) -> Self:
        """torch's, but frozen modules stay in evaluation mode; encoded prompts are forgotten where training begins."""
        if mode:
            self._prompts.clear()
        super().train(mode)
        for module in self._still:
            module.eval()
        return self

    @classmethod
    def reader_settings(cls, run: Any) -> str:
        """The data, whose classes and captions the prompts are made of."""
        data: str = run.data
        return data

    @classmethod
    def sample_fields(cls, config: Config, settings: str | None = None) -> Sequence[str]:
        """Images and their objects, unless a sidecar has these."""
        return ("image",) if config.grounding.pseudo_boxes else ("image", FIELD)

    @classmethod
    def sidecars(cls, config: Config, settings: str | None = None) -> Sequence[Wanted]:
        """The pseudo boxes, where the settings name them."""
        stored = config.grounding.stored_boxes()
        return [] if stored is None else [stored.wanted]

    def readers(self, train: bool, *, seed: int = 0, settings: str | None = None) -> Sequence[Reader]:
        """Images in the square, prompts, and boxes with their tokens."""
        config = self.config
        data = GroundingData(classes=(config.class_names,))
        if settings:
            data = grounding_data(settings, config.grounding, config.class_names, seed)
        return [
            GroundingReader(
                tokenizer=self.tokenizer,
                resize=config.resize(train),
                options=config.grounding,
                data=data,
                most=config.most_objects,
                seed=seed,
            )
        ]

    def lengths(self, batch: Mapping[str, Tensor]) -> Mapping[str, int]:
        """Texts are padded to their batch's longest."""
        return {"text tokens": batch["tokens"].shape[1]}

    def layers(self) -> Mapping[str, Layer]:
        """The backbone as tower ``image`` and the text tower as ``text``, block by block."""
        body, texts = cast(Any, self.model.image.body), self.model.text
        image = [body.patch_embed, *(block for stage in self._stages() for block in _stage_blocks(stage))]
        depths = {"image": image, "text": [texts.embeddings, *texts.layers]}
        above: dict[int, Layer] = {}
        for tower, modules in depths.items():
            for number, module in enumerate(modules):
                layer = Layer(tower, len(modules) - 1 - number)
                above |= {id(parameter): layer for parameter in module.parameters()}
        return {name: above[id(value)] for name, value in self.named_parameters() if id(value) in above}

    def blocks(self) -> Sequence[nn.Module]:
        """The blocks of the backbone, the text tower's layers, and the parts of the head's blocks."""
        tower = self.model.tower
        return [*self._swin(), *self.model.text.layers, *tower.fusions, *tower.texts, *tower.images]

    def compiled_blocks(self) -> Sequence[nn.Module]:
        """Those of texts and of the fusion. The others meet maps of several sizes: torch's compiler does not end with
        windows and levels of any size."""
        images = {*self._swin(), *self.model.tower.images}
        return [block for block in self.blocks() if block not in images]

    def _swin(self) -> list[nn.Module]:
        return [block for stage in self._stages() for block in cast(Any, stage).blocks]

    def _stages(self) -> list[nn.Module]:
        return [module for name, module in self.model.image.body.named_children() if name.startswith("layers_")]

    def training_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``alignment``, ``box`` and ``centerness``.

        An image without objects of the prompt's classes is background. A caption without any annotated object takes no
        part.
        """
        self._count(batch)
        levels = self.model.image(self.normalised(batch["image"]))
        encoded = self.model.encode_text(batch["tokens"], batch["token_mask"])
        ((found, weights),) = self.model.compare(levels, [encoded])
        with torch.autocast(found.features.device.type, enabled=False):
            anchors = self._anchors(levels)
            return self._losses(batch, anchors, self._assign(batch, anchors), found, weights)

    def _assign(self, batch: Mapping[str, Tensor], anchors: Anchors) -> Assignment:
        return assign(anchors, batch["boxes"].float(), real_boxes(batch), self.config.candidates)

    def _losses(
        self,
        batch: Mapping[str, Tensor],
        anchors: Anchors,
        assigned: Assignment,
        found: AnchorFeatures,
        weights: TokenWeights,
    ) -> dict[str, Tensor]:
        boxes, phrases = batch["boxes"].float(), batch["positive_map"]
        tokens = batch["token_mask"] & batch["annotated"][:, None]
        positive, row = assigned.positive, assigned.matched[..., None]
        targets = phrases.gather(1, row.expand(-1, -1, phrases.shape[-1])) & positive[..., None]
        truth = torch.where(positive[..., None], boxes.gather(1, row.expand(-1, -1, 4)), anchors.boxes)
        near = losses.centerness((anchors.boxes[:, :2] + anchors.boxes[:, 2:]) / 2, truth) * positive
        count, total = self._average(torch.stack([positive.sum().float(), near.sum()])).unbind()
        moves = found.moves.flatten(0, 1)
        decoded = CODER.decode_single(moves, anchors.boxes.repeat(len(boxes), 1)).view_as(truth)
        return {
            "alignment": losses.alignment_loss(align(found.features, weights), targets, tokens) / count,
            "box": self.config.box_weight * losses.box_loss(decoded, truth, near) / total,
            "centerness": losses.centerness_loss(found.centerness, near, positive) / count,
        }

    def _count(self, batch: Mapping[str, Tensor]) -> None:
        counts = torch.stack([batch["left_out"].sum(), (~batch["annotated"]).sum()]).float()
        self._counted = counts if self._counted is None else self._counted + counts

    @torch.no_grad()
    def measures(self) -> dict[str, float]:
        """Sums over all processes since they were last logged.

        - ``boxes_left_out``: boxes whose phrase has no token within the limit
        - ``captions_without_boxes``: captions that take no part in the losses
        """
        if self._counted is None:
            return {}
        left_out, without = self.gather(self._counted[None]).sum(dim=0).tolist()
        self._counted = None
        return {"boxes_left_out": left_out, "captions_without_boxes": without}

    def _average(self, counts: Tensor) -> Tensor:
        """Sums [n] of this rank to their means over ranks, which divide this rank's losses; 1 instead of 0."""
        means = self.gather(counts[None]).mean(dim=0)
        return torch.where(means > 0, means, torch.ones_like(means))

    def _anchors(self, levels: Sequence[Tensor]) -> Anchors:
        sizes = [(level.shape[-2], level.shape[-1]) for level in levels]
        return make_anchors(sizes, strides(), self.config.anchor_scale, levels[0].device)

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 to float32 of mean 0 and variance 1; the fill value becomes 0."""
        return (images.float() - self.mean) / self.std

    @torch.no_grad()
    def predict(
        self, images: Sequence[Tensor], words: Sequence[str], base: Collection[str] | None = None
    ) -> list[Detections]:
        """See :class:`~pipeline.models.detections.Detector`; ``base`` makes no difference, and synonyms are not read.

        Raises:
            SettingError: also for a word that has more tokens than a prompt.
        """
        check_words(words, base)
        order = tuning.prompt_order(words, self.config)
        prompts, numbers = self._encoded_prompts(tuple(words[number] for number in order)), torch.tensor(order)
        found: dict[int, Detections] = {}
        for group in self._groups(images):
            best = self._find(group, [prompt.expand(len(group.numbers)) for prompt in prompts])
            for number, place, one in zip(group.numbers, group.places, best, strict=True):
                found[number] = Detections(unplaced(one.boxes, place), one.scores, numbers[one.phrases], one.masks)
        return [found[number] for number in range(len(images))]

    @torch.no_grad()
    def ground(
        self, images: Sequence[Tensor], captions: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]
    ) -> list[GroundedBoxes]:
        """See :class:`~pipeline.models.detections.Grounder`."""
        tokenized = self.tokenizer.batch(captions, self.config.grounding.text_tokens)
        positive = [phrase_tokens(one, some) for one, some in zip(tokenized, spans, strict=True)]
        found: dict[int, GroundedBoxes] = {}
        for group in self._groups(images):
            tokens, mask = self._padded([tokenized[number] for number in group.numbers])
            averaging = averaging_matrix([positive[number] for number in group.numbers], tokens.shape[1])
            prompt = EncodedPrompt(0, self.model.encode_text(tokens, mask), averaging.to(tokens.device))
            for number, place, one in zip(group.numbers, group.places, self._find(group, [prompt]), strict=True):
                found[number] = GroundedBoxes(unplaced(one.boxes, place), one.scores, one.phrases, one.masks)
        return [found[number] for number in range(len(images))]

    def _find(self, group: ImageGroup, prompts: Sequence[EncodedPrompt]) -> list[FoundPhrases]:
        """The phrases of all ``prompts`` in each image of ``group``; each prompt has a text for every image."""
        levels = self.model.image(self.normalised(group.pixels))
        compared = zip(prompts, self.model.compare(levels, [prompt.text for prompt in prompts]), strict=True)
        parts = [self._candidates(levels, *pair, prompt.averaging) for prompt, pair in compared]
        return suppress(together(parts, [prompt.first for prompt in prompts]), group.extents, self.config)

    def _candidates(
        self, levels: Sequence[Tensor], features: AnchorFeatures, weights: TokenWeights, averaging: Tensor
    ) -> Candidates:
        with torch.autocast(averaging.device.type, enabled=False):
            return find_candidates(self._anchors(levels), features, weights, averaging, self.config)

    def _encoded_prompts(self, words: tuple[str, ...]) -> list[EncodedPrompt]:
        """The prompts that hold ``words``; those of the last words are remembered."""
        if words not in self._prompts:
            most = self.config.grounding.text_tokens
            made = []
            for numbers, prompt in name_chunks(words, self.tokenizer, self.config.chunk_words, most):
                tokenized = self.tokenizer(prompt.text, most)
                tokens, mask = self._padded([tokenized])
                averaging = averaging_matrix([phrase_tokens(tokenized, prompt.spans)], tokens.shape[1])
                encoded = self.model.encode_text(tokens, mask)
                made.append(EncodedPrompt(numbers.start, encoded, averaging.to(tokens.device)))
            self._prompts = {words: made}
        return self._prompts[words]

    def _padded(self, texts: Sequence[TokenizedText]) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B, M] and bool [B, M] on the method's device."""
        tokens, mask = padded_tokens([one.ids for one in texts], self.tokenizer.pad)
        return tokens.to(self.mean.device), mask.to(self.mean.device)

    def _groups(self, images: Sequence[Tensor]) -> Iterator[ImageGroup]:
        """Images uint8 [3, H, W] of any sizes, resized and padded, those of one size together.

        The size depends on the image alone, so the results do not depend on what else is requested.
        """
        resize = self.config.resize(train=False)
        groups: dict[tuple[int, int], list[tuple[int, Tensor, Placement]]] = {}
        for number, image in enumerate(images):
            place = resize.whole(*image.shape[1:])
            height, width = (-(-side // GRAIN) * GRAIN for side in place.extent)
            pixels = place.image(image.permute(1, 2, 0).cpu().numpy())[:, :height, :width]
            groups.setdefault((height, width), []).append((number, pixels, place))
        for members in groups.values():
            stacked = torch.stack([pixels for _, pixels, _ in members])
            yield ImageGroup(
                [number for number, _, _ in members],
                stacked.to(self.mean.device),
                [place for _, _, place in members],
            )


def real_boxes(batch: Mapping[str, Tensor]) -> Tensor:
    """Bool [B, G]: boxes with area and a phrase; one whose phrase has no token would teach that no word names it."""
    boxes = batch["boxes"]
    return (boxes[..., 2:] > boxes[..., :2]).all(dim=-1) & batch["positive_map"].any(dim=-1)


def _stage_blocks(stage: nn.Module) -> list[nn.Module]:
    """The blocks of a stage of timm's Swin; the downsampling before the first one belongs to it."""
    parts = cast(Any, stage)
    first, *others = list(parts.blocks)
    return [nn.ModuleList([parts.downsample, first]), *others]
