"""CLIP4Clip: An Empirical Study of CLIP for End to End Video Clip Retrieval.

Luo, Ji, Zhong, Chen, Lei, Duan, Li, 2021, arXiv 2104.08860

The idea: CLIP's image tower reads a few frames of a clip, a small head joins their features, and all of it is
fine-tuned on clips with captions. With the head's unit features v_i of clips, unit features w_j of captions and CLIP's
scale t, the loss is CLIP's over the B pairs of the batch (section 3.4):

    L = -1/2B sum_i [ log softmax_j(t v_i.w_j) at j = i  +  log softmax_j(t w_i.v_j) at j = i ]

``head`` is what joins the features f_1 ... f_T of a clip's frames (section 3.3):

    meanP        v = unit(mean_k unit(f_k)), no parameters
    seqLSTM      f + LSTM(f) instead of f
    seqTransf    f + transformer(f + positions) instead of f, 4 layers
    tightTransf  no feature of a clip: a transformer reads [text, f_1 ... f_T] + positions of each pair, and an MLP on
                 its first output gives the logit of the pair; the scale is not used

Layers and positions of the last two start as copies of the text tower's first ones. ``freeze_layers`` 0 is the rule of
the paper's runs: patch and token embeddings, positions and ``ln_pre`` are frozen. The towers learn a thousand times
slower than the head: ``tower_rates`` of the optimiser.

With ``frame_features`` stored features of frames replace the image tower (``jobs/embed_dataset.py frames``): it is
frozen, and one step costs a small part.

Differences from the authors' code: negatives of all processes have gradients (there each process keeps the gradient of
its own rows, a W-th of the whole for W processes); for tightTransf negatives come from all processes (there from its
own); masks of padded frames belong to their own clips in the attention (there heads and clips are in another order).

With ``linear_patch`` 3d, the image tower's patches are those of three consecutive frames (section 3.2): a convolution
over time whose middle starts as CLIP's own, the other two slices as zeros. It is trained whatever is frozen.

Left out: the post-pretraining on HowTo100M (section 4.4); BERT's Adam
without bias correction, with a limit for each tensor's gradient (AdamW, and a limit for all of it).

To hold a run against: text to video R@1 / R@5 / R@10 on MSR-VTT 1k-A, table 2 as recalled: meanP 43.1 / 70.4 / 80.8,
seqLSTM 42.5 / 70.8 / 80.7, seqTransf 44.5 / 71.4 / 81.6, tightTransf 40.2 / 71.5 / 80.5.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pipeline.config import require
from pipeline.loaders.batches import Reader
from pipeline.loaders.clip_views import ClipViewsReader, clip_views
from pipeline.loaders.frames import ClipReader, FrameFeatureReader, FrameSampling
from pipeline.loaders.text import TextSettings, caption_field
from pipeline.models import clip
from pipeline.models.temporal import (
    FrameLstm,
    FrameTransformer,
    first_text_layers,
    masked_mean,
    over_views,
    run_blocks,
)
from pipeline.models.towers import openclip
from pipeline.models.towers.layers import Layer, blocks, layers
from pipeline.models.towers.locked import lock
from pipeline.shards.sidecar import Wanted

Head = Literal["meanP", "seqLSTM", "seqTransf", "tightTransf"]


@dataclass(frozen=True, kw_only=True)
class Config(clip.Config):
    """CLIP's settings (softmax loss, no teacher), the frames and the head, with the paper's values."""

    architecture: str = "ViT-B-32-quickgelu"
    """open_clip architecture, clipmill-tiny, clipmill-small, local-dir:FOLDER or hf-hub:REPO."""
    pretrained: str | None = "openai"
    """Initial weights of the towers: a tag of the architecture, a file, or a checkpoint folder (path or URI)."""
    head: Head = "meanP"
    """What joins the frames: meanP (their mean), seqLSTM, seqTransf, or tightTransf (a transformer over each pair)."""
    head_layers: int = 4
    """Layers of seqTransf and tightTransf, 1 or more; they start as the text tower's first layers."""
    head_dropout: float = 0.1
    """Dropout of tightTransf's inputs, 0 to less than 1."""
    pair_tile: int = 2048
    """Pairs whose activations tightTransf keeps at once; bounds the memory of the loss and of the evaluation."""
    linear_patch: Literal["2d", "3d"] = "2d"
    """Patches of the image tower: 2d (of each frame), or 3d (of three consecutive frames)."""
    sampling: FrameSampling = field(default_factory=FrameSampling)
    frame_features: str = ""
    """Sidecar with features of frames, which replace the image tower; empty to read videos. Make it with the same
    weights: jobs/embed_dataset.py frames --checkpoint ARCHITECTURE:PRETRAINED."""
    text_tokens: int | None = 32
    """Longest text in tokens, with its start and end; longer texts are cut. None for the text tower's limit."""
    freeze_layers: int | None = 0
    """Lowest blocks of both towers that are frozen, with all embeddings: 0 freezes the embeddings alone (the paper's
    runs); none trains all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.loss == "softmax", "loss", self.loss, "softmax")
        require(not self.teacher, "teacher", self.teacher, "nothing: this method has no distillation")
        require(self.head_layers >= 1, "head_layers", self.head_layers, "1 or more")
        require(0 <= self.head_dropout < 1, "head_dropout", self.head_dropout, "0 to less than 1")
        require(self.pair_tile >= 1, "pair_tile", self.pair_tile, "1 or more")
        length = self.text_tokens
        require(length is None or length >= 3, "text_tokens", length, "3 or more, or none")
        frozen = self.freeze_layers
        require(frozen is None or frozen >= 0, "freeze_layers", frozen, "0 or more, or none")
        starts = bool(self.pretrained or self.pretrained_towers or ":" in self.architecture)
        for name, value in (("freeze_layers", frozen), ("frame_features", self.frame_features or None)):
            require(starts or value is None, name, value, "none, since random weights must be trained: --pretrained")
        if self.linear_patch == "3d":
            require(self.sampling.frames >= 2, "frames", self.sampling.frames, "2 or more with linear_patch 3d")
            stored = self.frame_features
            require(not stored, "frame_features", stored, "nothing with linear_patch 3d, which reads neighbours")
        if self.frame_features:
            require(self.frame_features.isidentifier(), "frame_features", self.frame_features, "a sidecar's name")
            image = self.lock_image_unlocked
            require(not image, "lock_image_unlocked", image, "0 with frame_features, which has no image tower")


class Clip4Clip(clip.Clip):
    """A CLIP that reads the frames of clips, and the head that joins them."""

    batch_keys: ClassVar[tuple[str, ...]] = ("video", "text")
    registered_as: ClassVar[str] = "clip4clip"
    config: Config

    def __init__(self, config: Config, description: Mapping[str, str] | None = None) -> None:
        """``description`` is given if weights are restored afterwards; no weights are downloaded then."""
        super().__init__(config, description)
        self.head = make_head(config, self.model)
        self.patches: NeighbourPatches | None = None
        self._frames = 1  # of the clips that the image tower is reading
        if config.linear_patch == "3d":
            self.patches = self._meet(self.model.visual)
        if config.text_tokens is not None:
            fits = self.end_of_text is not None and config.text_tokens <= self.model.context_length
            limit = self.model.context_length
            require(
                fits, "text_tokens", config.text_tokens, f"none for this text tower, or 3 to {limit} for CLIP's own"
            )
            self.tokenizer = openclip.tokenizer(config.architecture, config.text_tokens)
        self.logit_scale.requires_grad_(self.tight is None)

    @classmethod
    def smallest(cls) -> Config:
        """The smallest CLIP with a transformer of one layer over three frames."""
        return Config(
            architecture="clipmill-tiny",
            pretrained=None,
            head="seqTransf",
            head_layers=1,
            sampling=FrameSampling(frames=3),
            freeze_layers=None,
        )

    def _meet(self, tower: nn.Module) -> "NeighbourPatches":
        """Let the patches of consecutive frames meet. The tower's modules and their names stay those of open_clip."""
        architecture = self.config.architecture
        require(isinstance(tower, VisionTransformer), "linear_patch", "3d", f"2d for {architecture}")
        assert isinstance(tower, VisionTransformer)
        patches = NeighbourPatches(tower.conv1)
        tower.conv1.register_forward_hook(
            lambda _, inputs, output: output + patches(inputs[0], self._frames) if self._frames > 1 else output
        )
        return patches

    def _locked(self) -> tuple[nn.Module, ...]:
        """The lowest layers of both towers, and the image tower where stored features replace it."""
        still = list(super()._locked())
        if self.config.frame_features:
            still += lock(self.model, "image")
        if self.config.freeze_layers is not None:
            for tower in ("image", "text"):
                depth = 1 + max(layer.above for layer in layers(self.model).values() if layer.tower == tower)
                still += lock(self.model, tower, max(1, depth - 1 - self.config.freeze_layers))
        if self.config.linear_patch == "3d":
            patches = self.model.visual.conv1.requires_grad_()
            still = [module for module in still if module is not patches]
        return tuple(still)

    @classmethod
    def sample_fields(cls, config: Any, settings: TextSettings | None = None) -> Sequence[str]:
        """Videos where no stored features replace them, and captions where no sidecar has their tokens."""
        text = settings or TextSettings()
        captions = [] if text.tokens else [caption_field(text.caption)]
        return [*([] if config.frame_features else ["video"]), *captions]

    @classmethod
    def sidecars(cls, config: Any, settings: TextSettings | None = None) -> Sequence[Wanted]:
        """The features of frames and the captions' tokens, where the config and the run name them."""
        of_frames = _features(config).sidecars if config.frame_features else ()
        return [*of_frames, *super().sidecars(config, settings)]

    def readers(self, train: bool, *, seed: int = 0, settings: TextSettings | None = None) -> Sequence[Reader]:
        """Clips, or the stored features of their frames, and captions."""
        return [self._clips(train, seed), *self.text_readers(settings, seed)]

    def _clips(self, train: bool, seed: int) -> ClipReader | FrameFeatureReader:
        config = self.config
        if config.frame_features:
            return _features(config, seed)
        return ClipReader(transform=self.transforms(train), sampling=config.sampling, seed=seed)

    def video_reader(self, clips: int = 1, crops: int = 1) -> Reader:
        """The reader of videos for evaluation; with several clips or crops, a :class:`ClipViewsReader`."""
        reader = ClipReader(transform=self.transforms(train=False), sampling=self.config.sampling)
        views = clip_views(reader, clips, crops)
        return reader if len(views) == 1 else ClipViewsReader(views=views)

    @property
    def encodes(self) -> tuple[str, ...]:
        """Clips and texts, and single images where a clip is the mean of its frames; nothing apart for pairs."""
        if self.tight is not None:
            return ()
        alone = self.head is None and self.patches is None
        return ("image", "video", "text") if alone else ("video", "text")

    @property
    def scores_pairs(self) -> tuple[str, ...]:
        """The media that are only compared pair by pair."""
        return () if self.tight is None else ("video", "text")

    @property
    def tight(self) -> "PairHead | None":
        """The head over pairs of clip and text, if it is one."""
        return self.head if isinstance(self.head, PairHead) else None

    def encode_frames(self, video: Tensor, mask: Tensor | None = None) -> Tensor:
        """uint8 [B, T, 3, H, W] to float32 [B, T, D], not normalised; stored features float [B, T, D] stay.

        ``mask`` bool [B, T] keeps what follows a clip out of the patches over time.
        """
        if video.ndim == 3:
            return video.float()
        pixels = (video.flatten(0, 1).float() - self.mean) / self.std
        if self.patches is not None:
            pixels = pixels if mask is None else pixels * mask.flatten()[:, None, None, None]
            self._frames = video.shape[1]
        features: Tensor = self.model.encode_image(pixels)
        self._frames = 1
        frames: Tensor = features.float().unflatten(0, video.shape[:2])
        return frames

    def encode_video(self, video: Tensor, mask: Tensor | None = None) -> Tensor:
        """Unit features of clips, float32 [B, D].

        ``video``: uint8 [B, T, 3, H, W], or float [B, T, D] of stored features; ``mask``: bool [B, T], none for clips
        without padding. With V views of each clip both have a dimension V after the first: the mean of its views.
        """
        require(self.tight is None, "head", self.config.head, "meanP, seqLSTM or seqTransf, which encode a clip alone")
        stored = video.ndim < 5
        return functional.normalize(over_views(self._encode_clips, video, mask, 3 if stored else 5), dim=-1)

    def _encode_clips(self, video: Tensor, mask: Tensor | None) -> Tensor:
        frames = self.encode_frames(video, mask)
        shown = frames.new_ones(frames.shape[:2], dtype=torch.bool) if mask is None else mask
        joined = frames if self.head is None else self.head(frames, shown)
        return clip_features(joined, shown)

    def pair_features(self, medium: str, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """What :meth:`pair_scores` compares, on the model's device.

        float32 [B, D] of the tokens of texts; float32 [B, T, D + 1] of clips, whose last number is 1 for a frame, 0 for
        padding.
        """
        if medium == "text":
            return openclip.encode_text(self.model, inputs).float()
        frames = self.encode_frames(inputs, mask)
        shown = frames.new_ones(frames.shape[:2]) if mask is None else mask.to(frames.dtype)
        return torch.cat([frames, shown[..., None]], dim=-1)

    def pair_scores(self, clips: Tensor, texts: Tensor) -> Tensor:
        """Logits of all pairs, float32 [V, N], from the :meth:`pair_features` of V clips and N texts."""
        assert self.tight is not None, "a head over pairs"
        scores: Tensor = self.tight(texts, clips[..., :-1], clips[..., -1] > 0, self.config.pair_tile)
        return scores.T

    def embed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The features of clips and captions; for a head over pairs those of frames, not normalised."""
        if self.tight is None:
            video = self.encode_video(batch["video"], batch["video_mask"])
            return {"video": video, "text": self.encode_text(batch["text"])}
        return {
            "video": self.pair_features("video", batch["video"], batch["video_mask"]),
            "text": self.pair_features("text", batch["text"]),
        }

    def targets(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """None: captions are the targets of their clips."""
        return {}

    def compare(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """CLIP's loss between clips and captions."""
        video, text = embeddings["video"], embeddings["text"]
        if self.tight is None:
            return {"contrastive": self._contrastive(video, text, self.logit_scale.exp())}
        # Rows are this rank's texts; gathered, every rank has all logits and computes the loss of the global batch.
        clips = self.gather(video.flatten(1)).unflatten(1, video.shape[1:])
        return {"contrastive": score_loss(self.gather(self.pair_scores(clips, text).T))}

    def layers(self) -> Mapping[str, Layer]:
        """The layers of both towers, with the scale at the rate of the text tower; the head is a tower of its own."""
        of_head = (
            {} if self.head is None else {f"head.{name}": Layer("head", 0) for name, _ in self.head.named_parameters()}
        )
        found = {**super().layers(), "model.logit_scale": Layer("text", 0), **of_head}
        if self.patches is not None:
            names = [f"patches.{name}" for name, _ in self.patches.named_parameters()]
            found |= dict.fromkeys(names, found["model.visual.conv1.weight"])
        return found

    def blocks(self) -> Sequence[nn.Module]:
        """The repeated parts of the towers and of the head."""
        return [*super().blocks(), *([] if self.head is None else blocks(self.head).values())]


class NeighbourPatches(nn.Module):
    """What the frames before and after add to the patches of each frame: the outer slices of a convolution over three
    frames, whose middle one is the tower's own. Zeros at the start, and beyond both ends of a clip."""

    def __init__(self, middle: nn.Conv2d) -> None:
        super().__init__()
        size: Any = middle.kernel_size
        stride: Any = middle.stride
        self.before, self.after = (
            nn.Conv2d(middle.in_channels, middle.out_channels, size, stride, bias=False) for _ in range(2)
        )
        for part in (self.before, self.after):
            nn.init.zeros_(part.weight)

    def forward(self, pixels: Tensor, frames: int) -> Tensor:
        """float [B T, 3, H, W] to float [B T, W, h, w], for clips of ``frames`` T, 2 or more."""
        clips = pixels.unflatten(0, (-1, frames))
        earlier = self.before(clips[:, :-1].flatten(0, 1)).unflatten(0, (-1, frames - 1))
        later = self.after(clips[:, 1:].flatten(0, 1)).unflatten(0, (-1, frames - 1))
        nothing = torch.zeros_like(earlier[:, :1])
        return (torch.cat([nothing, earlier], dim=1) + torch.cat([later, nothing], dim=1)).flatten(0, 1)


class PairHead(nn.Module):
    """tightTransf: the logit of each pair of text and clip, from a transformer over the text and the frames."""

    def __init__(self, resblocks: Sequence[nn.Module], positions: Tensor, dropout: float) -> None:
        super().__init__()
        width = positions.shape[1]
        self.resblocks = nn.ModuleList(resblocks)
        self.positions = nn.Parameter(positions.clone())
        self.dropout = nn.Dropout(dropout)
        self.ln_pool = nn.LayerNorm(width, eps=1e-12)
        self.dense, self.score = nn.Linear(width, width), nn.Linear(width, 1)
        self.activation = QuickGELU()
        for layer in (self.dense, self.score):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, texts: Tensor, frames: Tensor, mask: Tensor, tile: int) -> Tensor:
        """float [N, D], float [V, T, D] and bool [V, T] to float32 [N, V], at most ``tile`` pairs at once."""
        columns = min(len(frames), tile)
        lines = max(1, tile // columns)
        again = torch.is_grad_enabled() and len(texts) * len(frames) > lines * columns
        rows = []
        for some in texts.split(lines):
            parts = zip(frames.split(columns), mask.split(columns), strict=True)
            work = (
                checkpoint(self._pairs, some, *part, use_reentrant=False) if again else self._pairs(some, *part)
                for part in parts
            )
            rows.append(torch.cat(list(work), dim=1))
        return torch.cat(rows)

    def _pairs(self, texts: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
        """All pairs of one tile, float32 [n, v]."""
        count, clips = len(texts), len(frames)
        first = texts[:, None, None].expand(-1, clips, -1, -1)
        hidden = torch.cat([first, frames[None].expand(count, -1, -1, -1)], dim=2).flatten(0, 1)
        shown = torch.cat([mask.new_ones(clips, 1), mask], dim=1).repeat(count, 1)
        hidden = self.dropout(hidden + self.positions[: hidden.shape[1]])
        pooled = self.ln_pool(run_blocks(self.resblocks, hidden, shown)[:, 0])
        scores: Tensor = self.score(self.activation(self.dense(pooled)))
        return scores.float().view(count, clips)


def _features(config: Config, seed: int = 0) -> FrameFeatureReader:
    """The reader of stored features; sidecars of an image tower of another width are refused."""
    width = int(openclip.check_architecture(config.architecture)["embed_dim"])
    return FrameFeatureReader(sampling=config.sampling, name=config.frame_features, width=width, seed=seed)


def make_head(config: Config, model: Any) -> nn.Module | None:
    """The head of ``config``; ``None`` for meanP, which has no parameters."""
    if config.head == "meanP":
        return None
    width = int(openclip.check_architecture(config.architecture)["embed_dim"])
    if config.head == "seqLSTM":
        return FrameLstm(width)
    positions = config.sampling.frames + (config.head == "tightTransf")
    resblocks, table = first_text_layers(model, width, config.head_layers, positions)
    if config.head == "seqTransf":
        return FrameTransformer(resblocks, table)
    return PairHead(resblocks, table, config.head_dropout)


def clip_features(frames: Tensor, mask: Tensor) -> Tensor:
    """The unit mean of each clip's unit frames: float [B, T, D] and bool [B, T] to float32 [B, D]."""
    return functional.normalize(masked_mean(functional.normalize(frames.float(), dim=-1), mask), dim=-1)


def score_loss(scores: Tensor) -> Tensor:
    """CLIP's loss from the logits of all pairs, float [B, B] with matching pairs on the diagonal; a scalar."""
    matching = torch.arange(len(scores), device=scores.device)
    with torch.autocast(scores.device.type, enabled=False):
        scores = scores.float()
        return (functional.cross_entropy(scores, matching) + functional.cross_entropy(scores.T, matching)) / 2
