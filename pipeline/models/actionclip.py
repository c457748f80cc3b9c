"""ActionCLIP: A New Paradigm for Video Action Recognition.

Wang, Xing, Liu, 2021, arXiv 2109.08472

The idea: action recognition as matching of videos and texts. The label of a clip is written into one of 16 templates
(``prompts``), both CLIP towers are fine-tuned, and a new action is named by its text. Several clips of a batch may have
the same action, so a row has several right columns. With unit features v_i of clips and w_j of texts, the scale t,
y_ij = 1 where clips i and j have one label, p_i = softmax_j(10 y_ij), and B pairs, the loss is (section 3.2, with the
factor of the authors' code)

    L = 1/2B sum_i [ KL(p_i || softmax_j(t v_i.w_j)) + KL(p_i || softmax_j(t w_i.v_j)) ]

``network_prompt`` and ``head`` are where frames meet (section 3.3, "prompts" of the video):

    joint        before the transformer: one sequence of all frames' patches, with an embedding of time (head meanP)
    shift        in it: an eighth of the channels of each patch comes from the next frame, an eighth from the one before
    meanP        after it: the mean of the frames' features f
    Conv_1D      f + depthwise convolution over 3 frames; starts as a shift of a quarter of the channels each way
    LSTM         f + LSTM(f)
    Transf       f + transformer(f + positions), 6 layers: the paper's choice
    Transf_cls   a post-norm transformer with a class token, whose output is the feature

``objective`` linear is the baseline of the paper's ablation: a linear layer over the classes instead of texts.

Differences from the authors' code: labels and features are those of all processes; Conv_1D convolves over time (there
it mixes time and channels by a reshape); clips with joint patches have one feature, so no head follows; a random crop
has any area and aspect ratio of its range (there one of four sizes of each side); weights are float32.

Left out: dropout and stochastic depth of the towers (0 in the paper's runs); optical flow.

To hold a run against: top-1 / top-5 on Kinetics-400, one crop (README of the authors' code): ViT-B/32 with 8 frames
78.36 / 94.25, ViT-B/16 with 8 frames 81.09 / 95.49, 16 frames 81.68 / 95.87, 32 frames 82.32 / 96.20; with 32 frames
on HMDB-51 76.2 and UCF-101 97.1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import require
from pipeline.loaders.augment import ColourReader, Colours
from pipeline.loaders.batches import Batch, Reader, Row, SamplePosition
from pipeline.loaders.clip_views import ClipViewsReader, clip_views
from pipeline.loaders.frames import ClipReader, FrameSampling
from pipeline.loaders.order import RandomStream, random_bits
from pipeline.loaders.rand_augment import RandomChange, check_policy
from pipeline.loaders.readers import LabelReader
from pipeline.loaders.text import TextSettings, Tokenizer, cut_text, faster
from pipeline.models import clip
from pipeline.models.losses import (
    ALONE,
    TILE,
    Exchange,
    Gather,
    alone,
    at_least_float32,
    contrastive_loss,
    tiled_contrastive_loss,
)
from pipeline.models.temporal import FrameLstm, FrameTransformer, heads_of, masked_mean, over_views
from pipeline.models.towers import openclip
from pipeline.models.towers.colours import recolour
from pipeline.models.towers.layers import Layer, blocks
from pipeline.models.towers.locked import lock
from pipeline.models.towers.prompts import fill_template
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import Wanted

# The paper's templates, as its code has them.
TEMPLATES = (
    "a photo of action {}",
    "a picture of action {}",
    "Human action of {}",
    "{}, an action",
    "{} this is an action",
    "{}, a video of action",
    "Playing action of {}",
    "{}",
    "Playing a kind of action, {}",
    "Doing a kind of action, {}",
    "Look, the human is {}",
    "Can you recognize the action of {}?",
    "Video classification of {}",
    "A video of {}",
    "The man is {}",
    "The woman is {}",
)
SHIFTED = 8  # one of so many channels comes from each neighbour (TSM, arXiv 1811.08383)
STD = 0.02  # of a head's initial weights
EPSILON = 1e-12  # of the normalisations in Transf
PLAIN = Colours(saturation=0.2, blur=0.0)


@dataclass(frozen=True, kw_only=True)
class Config(clip.Config):
    """CLIP's settings (softmax loss, no teacher), the actions, the frames and where they meet."""

    architecture: str = "ViT-B-32-quickgelu"
    """open_clip architecture, clipmill-tiny, clipmill-small, local-dir:FOLDER or hf-hub:REPO."""
    pretrained: str | None = "openai"
    """Initial weights of the towers: a tag of the architecture, a file, or a checkpoint folder (path or URI)."""
    crop: Literal["square", "resized"] = "resized"
    """Training crop, the same for all frames of a clip: a random square, or a box of random area and aspect ratio."""
    crop_scale: tuple[float, float] = (0.44, 1.0)
    """Range of a resized crop's area, as a part of the frame, 0 to 1."""
    flip: float = 0.5
    """Probability of mirroring a training clip; 0 where left and right distinguish actions."""
    augment: str = "rand-m9-n2"
    """RandAugment of training clips in timm's notation, the same for all frames of a clip; empty disables it."""
    colours: Colours = PLAIN
    objective: Literal["text", "linear"] = "text"
    """What clips are compared with: text (the paper's), or linear (a layer over the classes, its baseline)."""
    class_names: tuple[str, ...] = ()
    """Names of the actions."""
    label_key: str = "label"
    """Key of the action in the samples' json; its value is a name or a number."""
    prompts: tuple[str, ...] = TEMPLATES
    """Templates with {} for a name; training takes one of them for each clip."""
    network_prompt: Literal["none", "joint", "shift"] = "none"
    """Where frames meet in the image transformer: none, joint (one sequence), or shift (channels of neighbours)."""
    head: Literal["meanP", "Conv_1D", "LSTM", "Transf", "Transf_cls"] = "Transf"
    """What joins the frames' features: their mean, a convolution, an LSTM, or a transformer without or with a class
    token."""
    head_layers: int = 6
    """Layers of Transf and Transf_cls, 1 or more."""
    sampling: FrameSampling = field(default_factory=lambda: FrameSampling(mode="segments", frames=8))
    sharpness: float = 10.0
    """Factor of the labels in the softmax of the targets, more than 0, up to 50."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.loss == "softmax", "loss", self.loss, "softmax")
        require(not self.teacher, "teacher", self.teacher, "nothing: this method has no distillation")
        names = self.class_names
        require(len(set(names)) == len(names), "class_names", names, "distinct names")
        slots = bool(self.prompts) and all(one.count("{}") == 1 for one in self.prompts)
        require(slots, "prompts", self.prompts, "one or more, each with one {} for a name")
        require(self.head_layers >= 1, "head_layers", self.head_layers, "1 or more")
        require(0 < self.sharpness <= 50, "sharpness", self.sharpness, "more than 0, up to 50")
        joint = self.network_prompt == "joint"
        require(not joint or self.head == "meanP", "head", self.head, "meanP with joint, which has one feature")
        mode = self.sampling.mode  # the others may pad clips, and padding must not reach other frames
        require(
            self.network_prompt == "none" or mode == "segments", "mode", mode, f"segments with {self.network_prompt}"
        )
        if self.augment:
            check_policy(self.augment)


class ActionClip(clip.Clip):
    """A CLIP whose image tower reads clips; their labels are texts."""

    batch_keys: ClassVar[tuple[str, ...]] = ("video", "text", "label")
    registered_as: ClassVar[str] = "actionclip"
    config: Config

    def __init__(self, config: Config, description: Mapping[str, str] | None = None) -> None:
        """``description`` is given if weights are restored afterwards; no weights are downloaded then."""
        _check_classes(config)
        super().__init__(config, description)
        width = int(openclip.check_architecture(config.architecture)["embed_dim"])
        self.head = _head(config, width)
        self.time: nn.Parameter | None = None
        self._frames = 1  # of the clips that the image tower is reading
        if config.network_prompt != "none":
            self._meet(self.model.visual)
        self.linear: nn.Linear | None = None
        if config.objective == "linear":
            self.linear = nn.Linear(width, len(config.class_names))
            nn.init.normal_(self.linear.weight, std=0.01)
            nn.init.zeros_(self.linear.bias)
            self.logit_scale.requires_grad_(False)

    @classmethod
    def smallest(cls) -> Config:
        """The smallest CLIP with a transformer of one layer over three frames; colours are the actions."""
        return Config(
            architecture="clipmill-tiny",
            pretrained=None,
            class_names=("red", "green", "blue", "yellow"),
            head_layers=1,
            sampling=FrameSampling(mode="segments", frames=3),
        )

    @classmethod
    def check(cls, config: clip.Config) -> None:
        """Like CLIP's check; also of the classes, and of a tower in which frames can meet."""
        super().check(config)
        assert isinstance(config, Config)
        _check_classes(config)
        if config.network_prompt != "none":
            tower = openclip.check_architecture(config.architecture)["vision_cfg"]
            plain = "timm_model_name" not in tower and isinstance(tower.get("layers", 12), int)
            require(
                plain, "network_prompt", config.network_prompt, f"none for {config.architecture}, no CLIP transformer"
            )

    def _locked(self) -> tuple[nn.Module, ...]:
        """The text tower as well, where a linear layer replaces it."""
        more = lock(self.model, "text") if self.config.objective == "linear" else []
        return (*super()._locked(), *more)

    def _meet(self, tower: nn.Module) -> None:
        """Let frames meet in the image transformer. Its modules and their names stay those of open_clip."""
        config = self.config
        fits = isinstance(tower, VisionTransformer)
        require(fits, "network_prompt", config.network_prompt, f"none for {config.architecture}")
        assert isinstance(tower, VisionTransformer)
        if config.network_prompt == "shift":
            for block in tower.transformer.resblocks:
                block.register_forward_pre_hook(lambda _, inputs: (shifted(inputs[0], self._frames), *inputs[1:]))
            return
        width = tower.class_embedding.shape[0]
        self.time = nn.Parameter(width**-0.5 * torch.randn(config.sampling.frames, width))
        tower.ln_pre.register_forward_pre_hook(lambda _, inputs: (joined(inputs[0], self.time, self._frames),))

    @classmethod
    def sample_fields(cls, config: Any, settings: TextSettings | None = None) -> Sequence[str]:
        """Videos, and the json that has the label."""
        return ["video", "json"]

    @classmethod
    def sidecars(cls, config: Any, settings: TextSettings | None = None) -> Sequence[Wanted]:
        """None: texts are made of labels."""
        return []

    def readers(self, train: bool, *, seed: int = 0, settings: TextSettings | None = None) -> Sequence[Reader]:
        """Clips, in training with the parameters of their colours, and their labels as numbers and as texts."""
        config = self.config
        clips = ClipReader(transform=self.transforms(train), sampling=config.sampling, change=self._change, seed=seed)
        colours = [ColourReader(colours=config.colours, views=1, seed=seed)] if train else []
        label = LabelReader(classes=config.class_names, json_key=config.label_key)
        if config.objective == "linear":
            return [clips, *colours, label]
        text = ActionTextReader(
            label=label, prompts=config.prompts, tokenizer=self.tokenizer, end_of_text=self.end_of_text, seed=seed
        )
        return [clips, *colours, text]

    @property
    def _change(self) -> RandomChange | None:
        """RandAugment of a clip; what it uncovers has the mean colour."""
        if not self.config.augment:
            return None
        red, green, blue = (self.mean.flatten() / 255).tolist()
        deviations = (self.std.flatten() / 255).tolist()
        return RandomChange(
            policy=self.config.augment,
            erase=0.0,
            mean=(red, green, blue),
            std=(deviations[0], deviations[1], deviations[2]),
        )

    def video_reader(self, clips: int = 1, crops: int = 1) -> Reader:
        """The reader of videos for evaluation; with several clips or crops, a :class:`ClipViewsReader`."""
        reader = ClipReader(transform=self.transforms(train=False), sampling=self.config.sampling)
        views = clip_views(reader, clips, crops)
        return reader if len(views) == 1 else ClipViewsReader(views=views)

    @property
    def encodes(self) -> tuple[str, ...]:
        """Clips and texts; with a linear layer clips alone, since nothing brings them near texts."""
        return ("video", "text") if self.linear is None else ("video",)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the actions of the linear layer; empty without it."""
        return () if self.linear is None else self.config.class_names

    @property
    def prompt_templates(self) -> tuple[str, ...]:
        """The templates in which this method writes names, for zero-shot classification."""
        return self.config.prompts

    def encode_video(self, video: Tensor, mask: Tensor | None = None) -> Tensor:
        """Unit features of clips, float32 [B, D], of uint8 [B, T, 3, H, W] and bool [B, T].

        With V views of each clip both have a dimension V after the first: the mean of its views.
        """

        def encode(clips: Tensor, shown: Tensor | None) -> Tensor:
            return functional.normalize(self._features(clips.float(), shown), dim=-1)

        return functional.normalize(over_views(encode, video, mask, 5), dim=-1)

    def classify_video(self, video: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of the linear layer, float32 [B, C]; of several views the logarithm of their mean probability."""
        linear = self.linear
        assert linear is not None, "a linear layer"

        def probabilities(clips: Tensor, shown: Tensor | None) -> Tensor:
            logits: Tensor = linear(self._features(clips.float(), shown))
            return logits.float().softmax(dim=-1)

        return over_views(probabilities, video, mask, 5).log()

    def _features(self, video: Tensor, mask: Tensor | None) -> Tensor:
        """Features of clips, not normalised, float32 [B, D]; ``video`` is float [B, T, 3, H, W] from 0 to 255."""
        pixels = (video.flatten(0, 1) - self.mean) / self.std
        self._frames = video.shape[1]
        features: Tensor = self.model.encode_image(pixels)
        if self.config.network_prompt == "joint":
            return features.float()
        frames = features.float().unflatten(0, video.shape[:2])
        shown = frames.new_ones(frames.shape[:2], dtype=torch.bool) if mask is None else mask
        found: Tensor = masked_mean(frames, shown) if self.head is None else self.head(frames, shown)
        return found.float()

    def embed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The features of clips and of their labels' texts, or the cross-entropy of each clip."""
        features = self._features(self._coloured(batch), batch["video_mask"])
        if self.linear is not None:
            logits = self.linear(features).float()
            return {"losses": functional.cross_entropy(logits, batch["label"], reduction="none")}
        return {"video": functional.normalize(features, dim=-1), "text": self.encode_text(batch["text"])}

    def _coloured(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Clips as float, with random colours where the batch has their parameters: the same for all frames."""
        video = batch["video"].float()
        if "colours" not in batch:
            return video
        numbers = batch["colours"][:, 0].repeat_interleave(video.shape[1], dim=0)
        with torch.no_grad(), torch.autocast(video.device.type, enabled=False):
            frames = recolour(video.flatten(0, 1) / 255, numbers, self.config.colours.sigma[1]) * 255
        coloured: Tensor = frames.unflatten(0, video.shape[:2])
        return coloured

    def targets(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The labels' numbers, for texts."""
        return {} if self.linear is not None else {"labels": batch["label"].float()}

    def compare(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The divergence from the labels of all clips, or the mean cross-entropy."""
        if self.linear is not None:
            return {"classification": embeddings["losses"].mean()}
        return {
            "divergence": label_divergence(
                embeddings["video"],
                embeddings["text"],
                self.logit_scale.exp(),
                embeddings["labels"],
                self.config.sharpness,
                self.gather,
                self.exchange,
                self.config.loss_tile,
            )
        }

    def layers(self) -> Mapping[str, Layer]:
        """The layers of both towers; what is added to them is a tower of its own, ``head``."""
        added = [name for name, _ in self.named_parameters() if not name.startswith("model.")]
        return {**super().layers(), **{name: Layer("head", 0) for name in added}}

    def blocks(self) -> Sequence[nn.Module]:
        """The repeated parts of the towers and of the head."""
        return [*super().blocks(), *([] if self.head is None else blocks(self.head).values())]


@dataclass(frozen=True, kw_only=True)
class ActionTextReader:
    """``label``: int64 [B]; ``text``: int64 tokens [B, L] of each label's name in one of the ``prompts``.

    Training takes a random one for each sample and epoch, evaluation the first.
    """

    label: LabelReader
    prompts: tuple[str, ...]
    tokenizer: Tokenizer
    end_of_text: int | None = None
    seed: int = 0
    fields = ("json",)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """The number and the text; raises :class:`~pipeline.loaders.samples.UnreadableSample`."""
        number = self.label.read(sample, at)[self.label.key]
        bits = None if at is None else random_bits(self.seed, RandomStream.PROMPT_WORDS, *at, 1)
        prompt = self.prompts[0 if bits is None else int(bits[0] % len(self.prompts))]
        return {self.label.key: number, "text": fill_template(prompt, self.label.classes[number])}

    def collate(self, rows: list[Row]) -> Batch:
        """Both keys."""
        tokens = cut_text(self._faster([row["text"] for row in rows]), self.end_of_text)
        return {**self.label.collate(rows), "text": tokens}

    @cached_property
    def _faster(self) -> Tokenizer:
        return faster(self.tokenizer)


class FrameConvolution(nn.Module):
    """The mean over time of f + depthwise convolution of f over three frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Conv1d(width, width, 3, padding=1, groups=width, bias=False)
        quarter = width // 4
        weight = torch.zeros(width, 1, 3)
        weight[:quarter, 0, 0] = 1  # from the frame before
        weight[quarter : width - quarter, 0, 1] = 1
        weight[width - quarter :, 0, 2] = 1  # from the next frame
        self.shift.weight.data.copy_(weight)

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        """float [B, T, D] and bool [B, T] to float [B, D]."""
        shown = frames * mask[..., None]
        return masked_mean(self.shift(shown.transpose(1, 2)).transpose(1, 2) + frames, mask)


class MeanOf(nn.Module):
    """The mean over time of what ``layer`` makes of the frames."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        """float [B, T, D] and bool [B, T] to float [B, D]."""
        return masked_mean(self.layer(frames, mask), mask)


class ClassTokenTransformer(nn.Module):
    """A post-norm transformer over a class token and the frames; the token's output."""

    def __init__(self, width: int, layers: int, frames: int) -> None:
        super().__init__()
        heads = 8 if width % 8 == 0 else heads_of(width)
        layer = nn.TransformerEncoderLayer(width, heads, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, frames + 1, width))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _truncated(module.weight)
                nn.init.zeros_(module.bias)
        _truncated(self.class_token)
        _truncated(self.positions)

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        """float [B, T, D] and bool [B, T] to float [B, D]."""
        hidden = torch.cat([self.class_token.expand(len(frames), -1, -1), frames], dim=1)
        hidden = hidden + self.positions[:, : hidden.shape[1]]
        hides = torch.cat([mask.new_zeros(len(mask), 1), ~mask], dim=1)
        found: Tensor = self.encoder(hidden, src_key_padding_mask=hides)
        return found[:, 0]


def _head(config: Config, width: int) -> nn.Module | None:
    """float [B, T, D] and bool [B, T] to float [B, D]; ``None`` for the mean."""
    if config.head == "meanP":
        return None
    if config.head == "Conv_1D":
        return FrameConvolution(width)
    if config.head == "LSTM":
        return MeanOf(FrameLstm(width))
    if config.head == "Transf_cls":
        return ClassTokenTransformer(width, config.head_layers, config.sampling.frames)
    return MeanOf(
        FrameTransformer(_new_blocks(width, config.head_layers), STD * torch.randn(_positions(config), width))
    )


def _positions(config: Config) -> int:
    """Length of the table of positions: as long as a text, or as a clip."""
    return max(77, config.sampling.frames)


def _new_blocks(width: int, layers: int) -> list[nn.Module]:
    """Blocks of Transf: linear weights from N(0, 0.02)."""
    norm = partial(nn.LayerNorm, eps=EPSILON)
    made: list[nn.Module] = []
    for _ in range(layers):
        block = ResidualAttentionBlock(width, heads_of(width), act_layer=QuickGELU, norm_layer=norm)
        for module in block.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=STD)
                nn.init.zeros_(module.bias)
        made.append(block)
    return made


def _truncated(tensor: Tensor) -> None:
    nn.init.trunc_normal_(tensor, std=STD, a=-2 * STD, b=2 * STD)


def shifted(tokens: Tensor, frames: int) -> Tensor:
    """Patch tokens with channels of the neighbouring frames: float [B T, 1 + N, D] to the same.

    The first eighth of the channels comes from the next frame, the second from the one before, zeros at the ends. The
    class token stays.
    """
    part = tokens.shape[2] // SHIFTED
    patches = tokens[:, 1:].unflatten(0, (-1, frames))
    following = functional.pad(patches[:, 1:, :, :part], (0, 0, 0, 0, 0, 1))
    before = functional.pad(patches[:, :-1, :, part : 2 * part], (0, 0, 0, 0, 1, 0))
    mixed = torch.cat([following, before, patches[..., 2 * part :]], dim=-1).flatten(0, 1)
    return torch.cat([tokens[:, :1], mixed], dim=1)


def joined(tokens: Tensor, time: Tensor | None, frames: int) -> Tensor:
    """One sequence for each clip: float [B T, 1 + N, D] to [B, 1 + T N, D], frame after frame behind the class token.

    ``time``, float [T or more, D], is added to the patches of each frame; the class token is that of the first frame.
    """
    assert time is not None, "an embedding of time"
    clips = tokens.unflatten(0, (-1, frames))
    patches = clips[:, :, 1:] + time[:frames, None].to(tokens.dtype)
    return torch.cat([clips[:, 0, :1], patches.flatten(1, 2)], dim=1)


def label_divergence(
    video: Tensor,
    text: Tensor,
    scale: Tensor,
    labels: Tensor,
    sharpness: float = 10.0,
    gather: Gather = alone,
    exchange: Exchange = ALONE,
    tile: int = TILE,
) -> Tensor:
    """The paper's loss of this rank's rows against those of all ranks; a scalar, see the module.

    ``video`` and ``text`` are unit features, float [B, D], ``labels`` float [B] with numbers of classes, ``scale`` the
    positive factor itself. Beyond ``tile`` rows the logits are computed in tiles. KL(p || q) is the contrastive loss,
    whose target is a row's own column, plus what depends on the targets p: their entropy, and the difference between
    the own column and the columns' mean weighted by p. The latter needs sums of features by class alone.
    """
    with torch.autocast(video.device.type, enabled=False):
        video, text, scale, labels = at_least_float32(video, text, scale, labels)
        if len(video) * exchange.world > tile:
            contrastive = tiled_contrastive_loss(video, text, scale, exchange, tile)
        else:
            contrastive = contrastive_loss(video, text, scale, gather)
        everything = gather(torch.cat([video, text, labels[:, None]], dim=1))
        width = video.shape[1]
        # A class is the first row with its label: no number of classes, which a GPU would have to tell the CPU.
        known = everything[:, -1].detach()
        numbers = (known[:, None] == known).to(torch.uint8).argmax(dim=1)
        own = (labels.detach()[:, None] == known).to(torch.uint8).argmax(dim=1)
        counts = torch.zeros_like(known).index_add(0, numbers, torch.ones_like(known))
        strength = torch.tensor(sharpness, dtype=video.dtype, device=video.device).exp()
        total = counts * strength + len(everything) - counts  # the denominator of a row's softmax, by its class
        by_class = video.new_zeros(len(everything), 2 * width).index_add(0, numbers, everything[:, :-1])
        means = (by_class.sum(dim=0) + (strength - 1) * by_class) / total[:, None]
        mean_video, mean_text = means[own].split(width, dim=1)
        entropy = (total.log() - sharpness * counts * strength / total)[own]
        matching = (video * text).sum(dim=1)
        expected = ((video * mean_text).sum(dim=1) + (text * mean_video).sum(dim=1)) / 2
        loss: Tensor = contrastive + (scale * (matching - expected) - entropy).mean()
        return loss


def _check_classes(config: Config) -> None:
    require(len(config.class_names) >= 2, "class_names", config.class_names, "two class names or more")
