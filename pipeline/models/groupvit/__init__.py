"""GroupViT: semantic segmentation emerges from text supervision.

Xu, De Mello, Liu, Byeon, Breuel, Kautz, Wang, 2022, arXiv 2202.11094

The idea: a vision transformer gathers patches into a few segments, stage by stage, and captions alone train it. Learned
group tokens attend to the patches; then each patch is assigned to one of the group tokens' segments, whose mean goes on
to the next stage. With segments g_i, patches x_j, linear maps q and k, width C and Gumbel noise n,

    A = softmax_i( q(g_i).k(x_j) / sqrt(C) + n_ij ),     A' = one-hot(argmax_i A) forward, A backward
    segment_i = g_i + o( sum_j A'_ij v(x_j) / (1 + sum_j A'_ij) )

The image's feature is the mean of the last segments. With unit features x_i of B images, y_i of captions and p_ik of K
prompts with a noun or a verb of the caption ("a photo of the dog."), and learned scales s and r, the loss is

    L = softmax loss of (x, y) at s  +  w softmax loss of (x, p) at r      (see ``pipeline.models.losses``), w = 1

A caption with fewer words than K is its own prompt. Prompts are a function of seed, epoch and sample.

Segmentation compares the last segments with words: see :meth:`Groupvit.segment`.

Differences from the authors' code:

- the noise of an image is a function of its seed, so a step does not depend on the number of processes;
- the two temperatures are clamped after a step, not within it;
- windows average probabilities; there, also a channel of the background (see :class:`Segmentation`);
- augmentation is DeiT's by timm, as theirs, on uint8 images; the crop and its mirroring are this project's.

Left out: the half precision of apex (bfloat16 instead); training on several sizes of images.

To hold a run against: mIoU on PASCAL VOC / Context / COCO-Object: 52.3 / 22.4 / 24.3 with CC3M, CC12M and YFCC14M, and
50.8 / 23.7 / 27.5 with RedCaps instead of YFCC14M and without prompts; ImageNet zero-shot 43.7 and 51.6 (README of the
authors' code).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from transformers import GroupViTConfig

from pipeline.config import require
from pipeline.errors import DataError
from pipeline.loaders.batches import Reader
from pipeline.loaders.cache import FileCache
from pipeline.loaders.images import ImageTransform
from pipeline.loaders.rand_augment import AugmentedImageReader, RandomChange, check_policy
from pipeline.loaders.readers import ImageReader
from pipeline.loaders.text import TextSettings, cut_text
from pipeline.models.groupvit.network import DroppableLayer, GroupingNetwork, start_as_bag_of_words
from pipeline.models.groupvit.prompts import PromptReader, SeedReader, phrases_of
from pipeline.models.groupvit.views import (
    GroupedView,
    GroupedWindow,
    assignment_maps,
    batches,
    best_of_views,
    largest_segment,
    resized,
    segment_scores,
    segments_of_windows,
)
from pipeline.models.losses import TILE, contrastive_loss, tiled_contrastive_loss
from pipeline.models.method import EmbeddingMethod, ImageTextMethod
from pipeline.models.segments import ImageViews, Segmentation, check_segment_words, window_starts
from pipeline.models.towers.byte_pairs import byte_pair_tokenizer
from pipeline.models.towers.layers import Layer
from pipeline.models.towers.prompts import fill_template
from pipeline.models.towers.weights import misfit, read_any_weights
from pipeline.shards.sidecar import Wanted
from pipeline.shards.storage import split_file

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of images between 0 and 1
NETWORK = "groupvit_config.json"
VOCABULARY = 49408
TEMPLATE = "a photo of a {}."
TEXTS_AT_ONCE, WINDOWS_AT_ONCE = 512, 8
STRIDE = 0.5  # distance of the windows, as a part of their side
_COUNTERS = ("num_batches_tracked", "position_ids")  # buffers of the port that ours does not have


@dataclass(frozen=True, kw_only=True)
class Config:
    """The network, the prompts and the augmentation, with the paper's values."""

    image_size: int = 224
    """Side of the square training input in pixels, a multiple of the patch."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    width: int = 384
    """Width of the image tower, a multiple of the heads."""
    heads: int = 6
    """Attention heads of the image tower."""
    depths: tuple[int, ...] = (6, 3, 3)
    """Blocks of each stage."""
    group_tokens: tuple[int, ...] = (64, 8)
    """Learned group tokens of each stage that groups: all stages, or all but the last."""
    segments: tuple[int, ...] = ()
    """Segments that each of these stages makes; as many as group tokens if empty. Only the last one may differ."""
    drop_path: float = 0.1
    """Probability that training skips a branch of the last block of the image tower; it rises linearly from 0."""
    text_width: int = 256
    """Width of the text tower, a multiple of its heads."""
    text_layers: int = 12
    """Blocks of the text tower."""
    text_heads: int = 4
    """Attention heads of the text tower."""
    context_length: int = 77
    """Tokens per text."""
    text_start: Literal["paper", "bag_of_words"] = "paper"
    """Initial text tower: paper (random), or bag_of_words (every layer averages words) for short runs."""
    dimension: int = 256
    """Dimension of the features of images and texts."""
    projection_hidden: int = 4096
    """Hidden width of both projections."""
    pretrained: str = ""
    """Initial weights: a file of transformers' GroupViTModel or of a checkpoint (path or URI); random if empty."""
    prompts: int = 3
    """Prompts per image, with nouns of its caption; 0 trains with captions alone and needs no phrases."""
    prompt_weight: float = 1.0
    """Weight of the prompts' loss, more than 0."""
    verbs: bool = True
    """Make prompts of verbs too, as the authors' code does."""
    temperature: float = 0.07
    """Initial softmax temperature of both losses."""
    max_logit_scale: float = 100.0
    """Upper limit of the learned scales 1 / temperature."""
    loss_tile: int = TILE
    """Side of the tiles in which the logits of a larger batch are computed; bounds the loss's memory."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Range of the random crop's area, as a part of the image, 0 to 1."""
    flip: float = 0.5
    """Probability of mirroring a training image."""
    augment: str = "rand-m9-mstd0.5-inc1"
    """RandAugment of training images in timm's notation; none if empty."""
    erase: float = 0.25
    """Probability of replacing a rectangle of a training image by noise."""
    window: int | None = None
    """Side of the input for segmentation in pixels, a multiple of the patch; none for twice the training's (448)."""
    top_classes: int = 5
    """Words with the highest scores for the whole window that its segments may get, 1 or more."""
    assignment: Literal["soft", "hard"] = "soft"
    """How segmentation chains the assignments of the stages: soft (the authors' code), or hard."""

    def __post_init__(self) -> None:
        for name in ("patch_size", "text_layers", "dimension", "projection_hidden", "loss_tile", "top_classes"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name, heads in (("width", self.heads), ("text_width", self.text_heads)):
            value = getattr(self, name)
            require(heads >= 1 and value >= heads and value % heads == 0, name, value, f"a multiple of {heads} heads")
        for name in ("image_size", "window"):
            value = getattr(self, name)
            fits = value is None or (value >= self.patch_size and value % self.patch_size == 0)
            require(fits, name, value, f"a multiple of the patch, {self.patch_size}")
        self._check_stages()
        require(0 <= self.drop_path < 1, "drop_path", self.drop_path, "0 to less than 1")
        require(2 <= self.context_length, "context_length", self.context_length, "2 or more")
        require(0 <= self.prompts <= 64, "prompts", self.prompts, "0 to 64")
        require(self.prompt_weight > 0, "prompt_weight", self.prompt_weight, "more than 0; prompts 0 leaves it out")
        require(self.temperature > 0, "temperature", self.temperature, "more than 0")
        require(self.max_logit_scale >= 1, "max_logit_scale", self.max_logit_scale, "1 or more")
        low, high = self.crop_scale
        require(0 < low <= high <= 1, "crop_scale", self.crop_scale, "0 < low <= high <= 1")
        for name in ("flip", "erase"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")

    def _check_stages(self) -> None:
        depths, tokens, segments = self.depths, self.group_tokens, self.segments or self.group_tokens
        require(bool(depths) and min(depths) >= 1, "depths", depths, "1 or more blocks for each stage")
        stages = len(depths)
        grouping = len(tokens) in (stages, stages - 1) and bool(tokens) and min(tokens) >= 1
        require(grouping, "group_tokens", tokens, f"1 or more for {stages} stages, or for all but the last")
        same = len(segments) == len(tokens) and min(segments) >= 1 and segments[:-1] == tokens[:-1]
        require(same, "segments", self.segments, f"{tokens}, where only the last number may differ")

    def network(self) -> GroupViTConfig:
        """transformers' config of the network."""
        rest = (0,) * (len(self.depths) - len(self.group_tokens))
        vision = {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_size": self.width,
            "intermediate_size": 4 * self.width,
            "num_attention_heads": self.heads,
            "num_hidden_layers": sum(self.depths),
            "depths": self.depths,
            "num_group_tokens": self.group_tokens + rest,
            "num_output_groups": (self.segments or self.group_tokens) + rest,
        }
        text = {
            "vocab_size": VOCABULARY,
            "hidden_size": self.text_width,
            "intermediate_size": 4 * self.text_width,
            "num_attention_heads": self.text_heads,
            "num_hidden_layers": self.text_layers,
            "max_position_embeddings": self.context_length,
        }
        return GroupViTConfig(
            text_config=text,
            vision_config=vision,
            projection_dim=self.dimension,
            projection_intermediate_dim=self.projection_hidden,
            logit_scale_init_value=math.log(1 / self.temperature),
        )


class Groupvit(ImageTextMethod, EmbeddingMethod):
    """An image tower that groups patches, a text tower, and the contrastive losses between them."""

    batch_keys: ClassVar[tuple[str, ...]] = ("image", "text", "prompts", "seeds")
    registered_as: ClassVar[str] = "groupvit"
    # Normalised small group tokens have large gradients, and their sums over rows round relative to these.
    parity_tolerance: ClassVar[float] = 5e-5
    config: Config
    model: GroupingNetwork
    mean: Tensor
    std: Tensor

    def __init__(self, config: Config, description: Mapping[str, str] | None = None) -> None:
        """``description`` is given if weights are restored afterwards; ``config.pretrained`` is not read then."""
        super().__init__(config)
        self.model = GroupingNetwork(config.network(), config.drop_path)
        if config.text_start == "bag_of_words":
            start_as_bag_of_words(self.model)
        tokenizer = byte_pair_tokenizer(config.context_length)
        self.tokenizer, self.end_of_text = tokenizer, tokenizer.eot_token_id
        if config.prompts:
            self.prompt_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))
        if config.pretrained and description is None:
            self._load(config.pretrained)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1) * 255, persistent=False)
        self._known: dict[str, Tensor] = {}

    @classmethod
    def smallest(cls) -> Config:
        """Two grouping stages of one block each; most of the weights are in the token table."""
        return Config(**TINY)

    @classmethod
    def check(cls, config: Config) -> None:
        """Require a policy that timm reads."""
        if config.augment:
            check_policy(config.augment)

    @classmethod
    def restored(cls, config: Config, description: Mapping[str, str]) -> Self:
        """The modules alone."""
        return cls(config, description)

    def description(self) -> Mapping[str, str]:
        """transformers' config, which belongs to ``model.safetensors``."""
        return {NETWORK: self.model.config.to_json_string(use_diff=False)}

    @classmethod
    def sidecars(cls, config: Config, settings: TextSettings | None = None) -> Sequence[Wanted]:
        """The phrases of the captions, where the config has prompts."""
        if not config.prompts:
            return super().sidecars(config, settings)
        return [phrases_of(settings or TextSettings())]

    def transforms(self, train: bool) -> ImageTransform:
        """Random crops, mirrored at random; in evaluation the middle."""
        config, size = self.config, (self.config.image_size,) * 2
        if not train:
            return ImageTransform(size=size)
        return ImageTransform(size=size, crop="resized", scale=config.crop_scale, flip=config.flip)

    def readers(self, train: bool, *, seed: int = 0, settings: TextSettings | None = None) -> Sequence[Reader]:
        """Images, captions with their prompts, and the seeds of each image's noise."""
        config, text = self.config, settings or TextSettings()
        images: list[Reader] = [self._image_reader(train, seed)]
        if train:
            images.append(SeedReader(seed=seed))
        if not config.prompts:
            return [*images, *self.text_readers(text, seed)]
        prompts = PromptReader(
            tokenizer=self.tokenizer,
            end_of_text=self.end_of_text,
            settings=text,
            prompts=config.prompts,
            verbs=config.verbs,
            seed=seed,
        )
        return [*images, prompts]

    def _image_reader(self, train: bool, seed: int) -> Reader:
        config, transform = self.config, self.transforms(train)
        if not train or not (config.augment or config.erase):
            return ImageReader(transform=transform, seed=seed)
        change = RandomChange(policy=config.augment, erase=config.erase, mean=MEAN, std=STD)
        return AugmentedImageReader(transform=transform, change=change, seed=seed)

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 to float32, with ImageNet's mean and deviation."""
        return (images.float() - self.mean) / self.std

    def encode_image(self, image: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to L2-normalised float32 [B, D]."""
        return self.model.projected("visual", self.model.group(self.normalised(image)).tokens.mean(dim=1))

    def encode_text(self, text: Tensor) -> Tensor:
        """Tokens, int64 [B, L], to L2-normalised float32 [B, D]."""
        return self.model.projected("text", self.model.text_states(text))

    def embed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What both towers give before the projections: ``image`` [B, C] and ``text`` [B, 1 + K, W]."""
        seeds = batch.get("seeds") if self.training else None
        image = self.model.group(self.normalised(batch["image"]), seeds).tokens.mean(dim=1)
        texts = batch["text"][:, None]
        if self.config.prompts:
            texts = torch.cat([texts, batch["prompts"]], dim=1)
        states = self.model.text_states(texts.flatten(0, 1))
        return {"image": image, "text": states.unflatten(0, (len(texts), -1))}

    def compare(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The losses of captions and, weighted, of prompts; the projections normalise over the rows of all ranks."""
        image = self.model.projected("visual", embeddings["image"], self.gather)
        states = embeddings["text"]
        texts = self.model.projected("text", states.flatten(0, 1), self.gather).unflatten(0, states.shape[:2])
        losses = {"contrastive": self._contrastive(image, texts[:, 0], self.model.logit_scale.exp())}
        if self.config.prompts:
            loss = self._contrastive(image, texts[:, 1:], self.prompt_scale.exp())
            losses["prompts"] = self.config.prompt_weight * loss
        return losses

    def _contrastive(self, image: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        tile = self.config.loss_tile
        if texts[..., 0].numel() * self.exchange.world > tile:
            return tiled_contrastive_loss(image, texts, scale, self.exchange, tile, self.compiled)
        return contrastive_loss(image, texts, scale, self.gather)

    def after_step(self) -> None:
        """Clamp the scales between 1 and their limit."""
        with torch.no_grad():
            for scale in self._scales().values():
                scale.clamp_(0, math.log(self.config.max_logit_scale))

    def measures(self) -> dict[str, float]:
        """The scales that multiply the cosines."""
        return {name: scale.exp().item() for name, scale in self._scales().items()}

    def _scales(self) -> dict[str, Tensor]:
        own = {"prompt_scale": self.prompt_scale} if self.config.prompts else {}
        return {"logit_scale": self.model.logit_scale, **own}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Vectors and biases do not decay; the authors' code decays the two scales, as it decays tables."""
        learned = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [
            {"params": [parameter for parameter in learned if parameter.ndim != 1]},
            {"params": [parameter for parameter in learned if parameter.ndim == 1], "weight_decay": 0.0},
        ]

    def layers(self) -> Mapping[str, Layer]:
        """The layers of both towers: embeddings, blocks (a stage's grouping is in its last one), and the rest."""
        names = [name for name, _ in self.named_parameters()]
        found: dict[str, Layer] = {}
        for tower, part in (("image", "vision_model"), ("text", "text_model")):
            blocks = self._blocks_of(part)
            top = len(blocks) + 1
            for name in names:
                if name.startswith(f"model.{part}."):
                    found[name] = Layer(tower, top - _depth(name, blocks, top))
                elif name.startswith(f"model.{'visual' if tower == 'image' else 'text'}_projection."):
                    found[name] = Layer(tower, 0)
        return found

    def _blocks_of(self, part: str) -> list[str]:
        modules = self.named_modules()
        return [n for n, module in modules if isinstance(module, DroppableLayer) and n.startswith(f"model.{part}.")]

    def blocks(self) -> Sequence[nn.Module]:
        """The blocks of both towers."""
        return [module for module in self.modules() if isinstance(module, DroppableLayer)]

    def train(self, mode: bool = True) -> Self:
        """Training forgets the vectors of words."""
        if mode:
            self._known.clear()
        return super().train(mode)

    @torch.no_grad()
    def segment(
        self, images: Sequence[Tensor], words: Sequence[str], views: ImageViews | None = None
    ) -> list[Segmentation]:
        """See :class:`~pipeline.models.segments.Segmenter`, and section 4.2 of the paper.

        An image is resized so that its shorter side is the window's. A pixel belongs to the segment with the largest
        chained assignment there. With the softmax P of a segment's scores over all words, and the softmax P' over the
        words with the highest scores of the whole window, a pixel's score is P P'. Half of a window overlaps the next.
        """
        check_segment_words(words)
        views = views or ImageViews()
        window = views.window or self.config.window or 2 * self.config.image_size
        require(window % self.config.patch_size == 0, "window", window, f"a multiple of {self.config.patch_size}")
        vectors = self.word_vectors(words)
        found = []
        for image in images:
            parts = [self._view(image, vectors, views, window, scale) for scale in views.scales]
            found.append(best_of_views(parts, image.shape[1], image.shape[2]))
        return found

    @torch.no_grad()
    def groups(self, images: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """See :class:`~pipeline.models.segments.Grouper`; the whole image, its shorter side the window's."""
        window, patch = self.config.window or 2 * self.config.image_size, self.config.patch_size
        found = []
        for image in images:
            whole = resized(image, patch, shorter=window)
            grouped = self.model.group(self.normalised(whole[None].to(self.mean.device)))
            maps = assignment_maps(grouped, whole.shape[1] // patch, self.config.assignment)
            found.append(tuple(largest_segment(one[0], image.shape[1], image.shape[2]) for one in maps))
        return found

    def word_vectors(self, words: Sequence[str]) -> Tensor:
        """Unit text vectors float32 [N, D] of the words in one prompt; kept until training goes on."""
        new = [word for word in words if word not in self._known]
        for some in (new[start : start + TEXTS_AT_ONCE] for start in range(0, len(new), TEXTS_AT_ONCE)):
            tokens = self.tokenizer([fill_template(TEMPLATE, word) for word in some])
            vectors = self.encode_text(cut_text(tokens, self.end_of_text).to(self.mean.device))
            self._known |= dict(zip(some, vectors, strict=True))
        return torch.stack([self._known[word].to(self.mean.device) for word in words])

    def _view(self, image: Tensor, vectors: Tensor, views: ImageViews, window: int, scale: float) -> GroupedView:
        """The windows of one size of an image."""
        longer = None if views.side is None else views.side * scale
        canvas = resized(image, self.config.patch_size, shorter=window * scale, longer=longer).to(vectors.device)
        size = tuple(min(side, window) for side in canvas.shape[1:])
        places = [
            (top, left)
            for top in window_starts(canvas.shape[1], size[0], views.stride or STRIDE)
            for left in window_starts(canvas.shape[2], size[1], views.stride or STRIDE)
        ]
        found: list[GroupedWindow] = []
        for some in batches(places, WINDOWS_AT_ONCE):
            parts = torch.stack([canvas[:, top : top + size[0], left : left + size[1]] for top, left in some])
            found += self._windows(some, parts, vectors, mirrored=False)
            if views.flip:
                found += self._windows(some, parts.flip(-1), vectors, mirrored=True)
        return GroupedView(canvas.shape[1], canvas.shape[2], found)

    def _windows(
        self, places: Sequence[tuple[int, int]], parts: Tensor, vectors: Tensor, mirrored: bool
    ) -> Iterator[GroupedWindow]:
        """The windows ``parts``, uint8 [B, 3, h, w], at ``places``."""
        config, model = self.config, self.model
        grouped = model.group(self.normalised(parts))
        tokens = torch.cat([grouped.tokens.mean(dim=1, keepdim=True), grouped.tokens], dim=1)
        unit = model.projected("visual", tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        with torch.autocast(parts.device.type, enabled=False):
            scale = model.logit_scale.exp()
            scores = segment_scores(unit[:, 1:], unit[:, 0], vectors, scale, config.top_classes)
            height, width = parts.shape[2:]
            segments = segments_of_windows(grouped, height, width, config.patch_size, config.assignment)
        segments = segments.flip(-1) if mirrored else segments
        for (top, left), one, some in zip(places, segments, scores, strict=True):
            yield GroupedWindow(top, left, one, some)

    def _load(self, place: str) -> None:
        """The weights of a file; raises ``DataError`` if they are not of this network."""
        folder, name = split_file(place)
        weights = read_any_weights(FileCache().fetch(folder, name), place)
        weights = {name: tensor for name, tensor in weights.items() if not name.endswith(_COUNTERS)}
        problem = misfit(self.model.state_dict(), weights)
        if problem:
            raise DataError(f"{place} does not fit this GroupViT: {problem}")
        self.model.load_state_dict(weights)
        self.after_step()  # the authors' weights may have a larger scale, since their code clamps it within the loss


def _depth(name: str, blocks: Sequence[str], top: int) -> int:
    """0 for embeddings and for what comes before the first block, i + 1 for block i, ``top`` for the rest."""
    inside = next((number for number, block in enumerate(blocks, start=1) if name.startswith(f"{block}.")), None)
    if inside is not None:
        return inside
    if ".stages." not in name:
        return 0 if ".embeddings." in name else top
    stage = name[: name.index(".stages.") + len(".stages.") + 1] + "."
    own = [number for number, block in enumerate(blocks, start=1) if block.startswith(stage)]
    return own[-1] if ".downsample." in name else own[0] - 1


TINY: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "width": 32,
    "heads": 2,
    "depths": (1, 1, 1),
    "group_tokens": (6, 3),
    "text_width": 16,
    "text_layers": 1,
    "text_heads": 2,
    "dimension": 16,
    "projection_hidden": 32,
    "prompts": 2,
}
"""For tests and the smoke preset."""
