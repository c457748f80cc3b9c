"""VideoCLIP: contrastive pre-training for zero-shot video-text understanding.

Xu, Ghosh, Huang, Okhonko, Aghajanyan, Metze, Zettlemoyer, Feichtenhofer, 2021, arXiv 2109.14084

The idea: two transformers over frozen features of frames and over tokens learn from narrated videos, with positives
that overlap in time without being aligned (``alignment``), and negatives from similar videos: the batches of an epoch
are clusters of neighbours among the videos, as the model of that moment sees them (``clusters``). Each tower is read
out as the mean z of its states without [CLS]. Of B videos with P pairs each, the loss over all pairs is

    L = 1/BP sum_i [ log sum_j exp(v_i . t_j) + log sum_j exp(v_j . t_i) - 2 v_i . t_i ]

the sum (not the mean) of both cross-entropies of plain products: no norm, no temperature. The fine-tuning for
retrieval has the term of the texts alone, -log softmax_j(v_j . t_i). Negatives come from all processes.

Evaluations, search and stored features compare by cosines. So the encoders return unit vectors of H + 2 numbers,

    v -> ( v, sqrt(V^2 - |v|^2), 0 ) / V        t -> ( t, 0, sqrt(T^2 - |t|^2) ) / T

whose cosines are v . t / VT: with the constants V and T, limits of the lengths (``towers.longest``), ranks and
thresholds of products are exact. With ``normalise`` they are the unit vectors themselves.

Differences from the paper: it reads S3D's features of HowTo100M; here features are what a sidecar or members
``frames.npy`` have, such as those of CLIP. Negatives are those of all processes (there, of each GPU), neighbours are
exact (there, an inverted file). Videos longer than a clip are read at equal distances in evaluation.

Left out: the ablations that generate text or share one tower; CrossTask's action localisation.

To hold a run against, R@1 / R@5 / R@10 as the project's notes recall the paper's table 1 (not checked): zero-shot on
YouCook2 22.7 / 50.4 / 63.1 and on MSR-VTT 10.4 / 22.2 / 30.0; fine-tuned 32.2 / 62.6 / 75.0 and 30.9 / 55.4 / 66.8.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pipeline.config import require
from pipeline.errors import DataError
from pipeline.loaders.batches import Reader
from pipeline.loaders.cache import FileCache
from pipeline.loaders.frames import FrameFeatureReader, FrameSampling
from pipeline.loaders.grounding_prompts import DRAWN, SpanTokenizer
from pipeline.models.losses import TILE, Gather, alone, at_least_float32, contrastive_loss, tiled_contrastive_loss
from pipeline.models.method import EmbeddingMethod
from pipeline.models.towers.layers import Layer, block_depths
from pipeline.models.towers.weights import misfit, read_tensors
from pipeline.models.videoclip import towers
from pipeline.models.videoclip.alignment import Overlap
from pipeline.models.videoclip.clusters import RetrievedClusters
from pipeline.models.videoclip.pairs import CaptionTokenizer, ClipPairReader, EveryFrameReader, Positives
from pipeline.shards.sidecar import Wanted
from pipeline.shards.storage import Folder, split_file

TOKENIZER, SETTINGS = "tokenizer.json", "bert.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The towers, what they read, and the loss, with the paper's values."""

    pretrained: str = ""
    """Initial weights: a checkpoint or run folder of this method; replaces those of BERT."""
    bert: str = "bert-base-uncased"
    """Text tower and tokenizer: a folder or model id of a BERT of transformers, or drawn (a small one)."""
    bert_weights: bool = True
    """Start both towers from that BERT's weights; else from random ones, as with drawn."""
    video_layers: int = 6
    """Layers of the video tower, 1 or more; with BERT's weights at most as many as it has."""
    small_bert: tuple[int, int, int] = (64, 2, 2)
    """Width, layers and attention heads of the BERT drawn."""
    dropout: float = 0.1
    """Dropout of both towers, 0 to less than 1."""
    features: str = "frames"
    """Sidecar with the features of frames, made by jobs/embed_dataset.py frames; empty for members frames.npy."""
    features_per_second: float = 1.0
    """Rate of the features in members frames.npy."""
    feature_width: int = 0
    """Numbers of a frame's features, such as 512 of S3D and of ViT-B/32; 0 for those of the data."""
    frames: int = 32
    """Most frames of a clip."""
    text_tokens: int = 61
    """Most tokens of a text without [CLS] and [SEP]: the paper's 96 less 32 frames and three marks."""
    pairs: int = 16
    """Pairs of text and clip of each video in a batch."""
    positives: Positives = "overlapped"
    """Pairs of a video: overlapped (of its timed captions), or whole (the video with a random caption)."""
    overlap: Overlap = field(default_factory=Overlap)
    objective: Literal["both", "text_to_video"] = "both"
    """Cross-entropies: both (the sum of the two directions), or text_to_video (videos of each text)."""
    normalise: bool = False
    """Compare by cosines instead of products; needs a larger logit_scale."""
    logit_scale: float = 1.0
    """Factor of the products, more than 0."""
    learn_scale: bool = False
    """Train the factor, between 1 and 100."""
    batches: Literal["random", "retrieved"] = "retrieved"
    """Batches of an epoch: retrieved (clusters of similar videos, found anew in each epoch), or random."""
    cluster: int = 32
    """Videos of a cluster; the batch size must be a multiple."""
    candidates: int = 64
    """Nearest videos from which a cluster is sampled, the query included; at least cluster."""
    loss_tile: int = TILE
    """Side of the tiles in which the logits of a larger batch are computed; bounds the loss's memory."""

    def __post_init__(self) -> None:
        for name in ("video_layers", "frames", "text_tokens", "pairs", "loss_tile"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.feature_width >= 0, "feature_width", self.feature_width, "0 or more")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "0 to less than 1")
        require(self.logit_scale > 0, "logit_scale", self.logit_scale, "more than 0")
        inside = not self.learn_scale or 1 <= self.logit_scale <= 100
        require(inside, "logit_scale", self.logit_scale, "1 to 100 with learn_scale")
        longest = self.overlap.clip_frames[1]
        require(longest <= self.frames, "clip_frames", self.overlap.clip_frames, f"at most frames, {self.frames}")
        width, layers, heads = self.small_bert
        small = min(width, layers, heads) >= 1 and width % heads == 0
        require(small, "small_bert", self.small_bert, "a width that is a multiple of the heads, layers, heads")
        require(self.features == "" or self.features.isidentifier(), "features", self.features, "a sidecar, or empty")
        self.clusters()
        self.frame_reader()

    def clusters(self) -> RetrievedClusters:
        """How batches are retrieved."""
        return RetrievedClusters(size=self.cluster, candidates=self.candidates)

    def frame_reader(self) -> FrameFeatureReader:
        """The reader of features, for whole videos: all frames, or the longest clip's number at equal distances."""
        sampling = FrameSampling(mode="uniform", frames=self.frames, rate=0)
        rate, width = self.features_per_second, self.feature_width
        return FrameFeatureReader(sampling=sampling, name=self.features, rate=rate, width=width)

    @property
    def positions(self) -> int:
        """Positions that the longer tower's input has."""
        return 2 + max(self.frames, self.text_tokens)


class VideoClip(EmbeddingMethod):
    """Two BERTs over stored features of frames and over texts, and the contrastive loss of their pairs."""

    batch_keys: ClassVar[tuple[str, ...]] = ("video", "video_mask", "text")
    registered_as: ClassVar[str] = "videoclip"
    config: Config
    model: towers.DualBert

    def __init__(self, config: Config, description: Mapping[str, str] | None = None) -> None:
        """``description`` is given if weights are restored afterwards; none are read then."""
        super().__init__(config)
        require(config.feature_width >= 1, "feature_width", config.feature_width, "1 or more: the width of the data")
        if description is None:
            self.words, self.settings = _texts_of(config)
        else:
            self.words = SpanTokenizer(description[TOKENIZER])
            self.settings = towers.stored_settings(description[SETTINGS])
        self.tokenizer = CaptionTokenizer(self.words, config.text_tokens + 2)
        self.end_of_text = self.words.end
        frames = towers.frame_settings(self.settings, config.video_layers)
        self.model = towers.DualBert(
            towers.FrameBert(frames, config.feature_width, config.frames),
            towers.CaptionBert(self.settings, self.words.pad),
            config.logit_scale,
            config.learn_scale,
        )
        if description is None:
            self._load_initial()

    def _load_initial(self) -> None:
        config = self.config
        if config.pretrained:
            state = _weights_at(config.pretrained)
            problem = misfit(self.model.state_dict(), state)
            require(not problem, "pretrained", config.pretrained, f"a VideoCLIP of these settings; this has {problem}")
            self.model.load_state_dict(state)
        elif config.bert_weights and config.bert != DRAWN:
            towers.load_bert(self.model, config.bert, self.words)

    @classmethod
    def smallest(cls) -> Config:
        """Small towers without dropout, and four pairs of each video."""
        return Config(bert=DRAWN, small_bert=(32, 1, 2), video_layers=1, dropout=0.0, feature_width=32, pairs=4)

    @classmethod
    def check(cls, config: Config) -> None:
        """Check that the BERT and the checkpoint exist and fit."""
        _, settings = _texts_of(config)
        starts = config.bert_weights and config.bert != DRAWN and not config.pretrained
        has = settings.num_hidden_layers
        fits = not starts or config.video_layers <= has
        require(fits, "video_layers", config.video_layers, f"at most the {has} of {config.bert}, whose weights it gets")
        if config.pretrained:
            folder, name = _file_at(config.pretrained)
            require(folder.exists(name), "pretrained", config.pretrained, "a checkpoint or run folder of this method")

    @classmethod
    def restored(cls, config: Config, description: Mapping[str, str]) -> Self:
        """The modules alone."""
        return cls(config, description)

    def description(self) -> Mapping[str, str]:
        """The tokenizer and the settings of the text tower."""
        return {TOKENIZER: self.words.description, SETTINGS: towers.settings_text(self.settings)}

    @classmethod
    def sample_fields(cls, config: Config, settings: Any = None) -> Sequence[str]:
        """The json with the texts, and the features' field."""
        return ("json", *config.frame_reader().fields)

    @classmethod
    def sidecars(cls, config: Config, settings: Any = None) -> Sequence[Wanted]:
        """The features of frames."""
        return config.frame_reader().sidecars

    @classmethod
    def batch_planner(cls, config: Config) -> RetrievedClusters | None:
        """Clusters of similar videos."""
        return config.clusters() if config.batches == "retrieved" else None

    def readers(self, train: bool, *, seed: int = 0, settings: Any = None) -> Sequence[Reader]:
        """Pairs of clips and texts."""
        config = self.config
        reader = ClipPairReader(
            features=config.frame_reader(),
            tokenizer=self.words,
            pairs=config.pairs,
            positives=config.positives,
            overlap=config.overlap,
            text_tokens=config.text_tokens,
            seed=seed,
        )
        return [reader]

    def video_reader(self) -> FrameFeatureReader:
        """The reader of whole videos for evaluation; its key is ``video``."""
        return self.config.frame_reader()

    def frames_reader(self) -> EveryFrameReader:
        """The reader of all stored frames of a video, for :meth:`encode_moments`."""
        return EveryFrameReader(features=self.config.frame_reader())

    def lengths(self, batch: Mapping[str, Tensor]) -> Mapping[str, int]:
        """Texts are cut to their batch's longest."""
        return {"text tokens": batch["text"].shape[2]}

    def embed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The means of each pair's states: ``video`` and ``text``, float [B, P, H]."""
        video, mask, text = (batch[key].flatten(0, 1) for key in self.batch_keys)
        rows = (len(batch["text"]), -1)
        return {
            "video": self._pooled_video(video, mask).unflatten(0, rows),
            "text": self._pooled_text(text).unflatten(0, rows),
        }

    def compare(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss over all pairs."""
        video, text = (embeddings[name].flatten(0, 1).float() for name in ("video", "text"))
        if self.config.normalise:
            video, text = functional.normalize(video, dim=-1), functional.normalize(text, dim=-1)
        scale, tile = self.model.log_scale.exp(), self.config.loss_tile
        if self.config.objective == "text_to_video":
            return {"text_to_video": text_to_video_loss(text, video, scale, self.gather, tile)}
        if len(video) * self.exchange.world > tile:
            return {"contrastive": 2 * tiled_contrastive_loss(video, text, scale, self.exchange, tile, self.compiled)}
        return {"contrastive": 2 * contrastive_loss(video, text, scale, self.gather)}

    def _pooled_video(self, video: Tensor, mask: Tensor) -> Tensor:
        return towers.pooled(*self._video_states(video, mask))

    def _video_states(self, video: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        width, own = video.shape[-1], self.config.feature_width
        require(width == own, "feature_width", own, f"{width}, the width of the features of the data")
        found: tuple[Tensor, Tensor] = self.model.video(video, mask)
        return found

    def _pooled_text(self, text: Tensor) -> Tensor:
        return towers.pooled(*self.model.text(text))

    def encode_video(self, video: Tensor, video_mask: Tensor | None = None) -> Tensor:
        """Float [B, T, D] of at most ``frames`` frames to unit float32 [B, H + 2]; see the module's text.

        ``video_mask`` bool [B, T] is False for padding; without it frames of zeros are padding.
        """
        mask = video.any(dim=-1) if video_mask is None else video_mask
        return self._unit(self._pooled_video(video, mask).float(), of_video=True)

    def encode_text(self, text: Tensor) -> Tensor:
        """Tokens, int64 [B, L], to unit float32 [B, H + 2]; see the module's text."""
        return self._unit(self._pooled_text(text).float(), of_video=False)

    def encode_moments(self, frames: Tensor, frames_mask: Tensor) -> Tensor:
        """Features float [B, T, D] of any number of frames to unit float32 [B, T, H + 2], comparable with texts.

        The states of frames in windows of the longest clip, half a window apart, averaged where windows overlap.
        """
        length, longest = frames.shape[1], self.config.frames
        starts = range(0, length, max(longest // 2, 1)) if length > longest else range(1)
        total = frames.new_zeros(*frames.shape[:2], self.settings.hidden_size, dtype=torch.float32)
        count = torch.zeros_like(total[..., :1])
        for start in sorted({min(start, max(length - longest, 0)) for start in starts}):
            window = slice(start, start + longest)
            states, _ = self._video_states(frames[:, window], frames_mask[:, window])
            total[:, window] += states[:, 1:-1].float()
            count[:, window] += 1
        return self._unit(total / count, of_video=True)

    def moment_threshold(self, texts: Tensor) -> float:
        """The cosine of a moment and a text whose product is the largest one of two different ``texts``.

        The authors' limit in zero-shot action segmentation: at or below it, a frame shows none of the actions.
        ``texts`` are unit features of :meth:`encode_text`, [C, H + 2], C at least 2.
        """
        if self.config.normalise:
            return float((texts @ texts.T).fill_diagonal_(-1.0).max())
        products = texts[:, :-2] @ texts[:, :-2].T  # t_i . t_j / T^2
        products.fill_diagonal_(-torch.inf)
        ratio = towers.longest(self.model.text.bert) / towers.longest(self.model.video.bert)
        return float(products.max() * ratio)

    def _unit(self, vectors: Tensor, of_video: bool) -> Tensor:
        if self.config.normalise:
            return functional.normalize(vectors, dim=-1)
        limit = towers.longest((self.model.video if of_video else self.model.text).bert)
        missing = (limit**2 - vectors.square().sum(dim=-1, keepdim=True)).clamp(min=0).sqrt()
        nothing = torch.zeros_like(missing)
        rest = (missing, nothing) if of_video else (nothing, missing)
        return functional.normalize(torch.cat([vectors, *rest], dim=-1), dim=-1)

    def layers(self) -> Mapping[str, Layer]:
        """The layers of both towers; the scale has none."""
        found: dict[str, Layer] = {}
        for name, tower in (("video", self.model.video), ("text", self.model.text)):
            known = {f"bert.encoder.layer.{number}": layer for number, layer in enumerate(tower.bert.encoder.layer)}
            depths = block_depths([key for key, _ in tower.named_parameters()], known)
            deepest = max(depths.values())
            found |= {f"model.{name}.{key}": Layer(name, deepest - depth) for key, depth in depths.items()}
        return found

    def blocks(self) -> Sequence[nn.Module]:
        """The layers of both BERTs."""
        return [*self.model.video.bert.encoder.layer, *self.model.text.bert.encoder.layer]

    def after_step(self) -> None:
        """Clamp the trained scale between 1 and 100."""
        if self.config.learn_scale:
            with torch.no_grad():
                self.model.log_scale.clamp_(0, math.log(100))

    def measures(self) -> dict[str, float]:
        """The trained scale."""
        return {"logit_scale": self.model.log_scale.exp().item()} if self.config.learn_scale else {}


def text_to_video_loss(text: Tensor, video: Tensor, scale: Tensor, gather: Gather = alone, tile: int = TILE) -> Tensor:
    """The cross-entropy of each text's own video among the videos of all ranks; a scalar, with exact gradients.

    ``text`` and ``video`` are float [N, H] of matching pairs. Logits exist for ``tile`` texts at a time: the backward
    pass computes them again.
    """
    with torch.autocast(text.device.type, enabled=False):
        text, video, scale = at_least_float32(text, video, scale)
        everything = gather(video)
        parts = [checkpoint(_log_sums, part, everything, scale, use_reentrant=False) for part in text.split(tile)]
        matching = scale * (text * video).sum(dim=1)
        return (torch.cat(parts) - matching).mean()


def _log_sums(text: Tensor, videos: Tensor, scale: Tensor) -> Tensor:
    return (scale * text @ videos.T).logsumexp(dim=1)


def _texts_of(config: Config) -> tuple[SpanTokenizer, Any]:
    """The tokenizer and the settings of the text tower that the config names."""
    words = SpanTokenizer.load(config.bert)
    return words, towers.caption_settings(config.bert, config.small_bert, words, config.positions, config.dropout)


def _file_at(place: str) -> tuple[Folder, str]:
    """The file with the weights of a checkpoint's folder; or that file, as for moving averages."""
    return split_file(place) if place.endswith(".safetensors") else (Folder(place), WEIGHTS)


def _weights_at(place: str) -> dict[str, Tensor]:
    folder, name = _file_at(place)
    try:
        return read_tensors(FileCache().fetch(folder, name))
    except OSError as error:
        raise DataError(f"{folder.join(name)} cannot be read ({error})") from error
