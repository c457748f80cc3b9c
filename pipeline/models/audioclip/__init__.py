"""AudioCLIP: extending CLIP to image, text and audio.

Guzhov, Raue, Hees, Dengel, 2021, arXiv 2106.13043

The idea: a third tower reads sounds, and each pair of the three modalities is contrasted as images and texts are in
CLIP. Sounds of classes without a sound in the training data are then found by text, by way of images. With the loss
L(x, y) of two modalities (the sum of both cross-entropies, see ``pipeline.models.audioclip.loss``), features a of
sounds, v of images, t of texts, learned scales for each pair, and P pairs (three), the loss is

    L = [ w_av L(a, v) + w_at L(a, t) + w_vt L(v, t) ] / P!  +  fbsp        w = 1, scales clamped to 1 ... 100

so the mean of six cross-entropies for three modalities, and the sum of two for two of them. fbsp is the penalty of the
paper's audio tower: the mean of (length - 1)^2 of its wavelets. A pair uses the samples that have both modalities; the
other rows are masked. With several processes, negatives come from all of them, with gradients.

The paper trains in stages, each from the checkpoint of the one before (``pretrained``):

1. the audio tower alone on tags (``modalities`` audio): a head of one logit per class, the binary cross-entropy summed
   over classes, and fbsp;
2. the audio tower with a new head against frozen towers of images and texts (``lock_image``, ``lock_text``), whose
   weights and scale stay the same to the bit;
3. all three towers. To fine-tune on labelled sounds is stage 2 again, with labels as texts.

LAION-CLAP (Wu, Chen, Zhang, Hui, Berg-Kirkpatrick, Dubnov, 2022, arXiv 2211.06687) is the case of two modalities, with
a log-mel tower: ``pipeline.models.clap``.

Differences from the authors' code: negatives of all processes (there, of each GPU); time inversion inverts time (see
``augment``); scales are clamped after each step, so that they go on learning at their limit, where they start.

Left out: class weights of the cross-entropy; the peak normalisation of one data set's loader; loading the authors' own
checkpoints of all towers (those of the audio tower alone load). Batch normalisation of audio towers uses each process's
own rows, as in the ResNets of CLIP.

To hold a run against: accuracy on ESC-50 / UrbanSound8K 97.15 / 90.07, zero-shot 69.40 / 68.78 (README of the authors'
code).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import require
from pipeline.errors import DataError
from pipeline.loaders.audio import AudioReader, AudioTransform, Padding
from pipeline.loaders.batches import Reader
from pipeline.loaders.cache import FileCache
from pipeline.loaders.readers import ImageReader
from pipeline.loaders.text import TextSettings, caption_field
from pipeline.models import clip
from pipeline.models.audioclip.augment import SoundAugmentation
from pipeline.models.audioclip.esresnext import EsResNextFbsp
from pipeline.models.audioclip.loss import pair_loss, text_groups, tiled_pair_loss
from pipeline.models.audioclip.presence import PresentRows
from pipeline.models.audioclip.readers import PRESENCE, ModalitiesReader, SoundReader, TagReader
from pipeline.models.audioclip.towers import audio_tower, check_tower, is_head, sound_input
from pipeline.models.towers import openclip
from pipeline.models.towers.layers import Layer, block_depths, blocks
from pipeline.models.towers.locked import locked_modules
from pipeline.models.towers.weights import misfit, read_any_weights, read_tensors
from pipeline.shards.sidecar import Wanted
from pipeline.shards.storage import Folder, split_file

Modality = Literal["audio", "image", "text"]
MODALITIES: tuple[Modality, ...] = ("audio", "image", "text")
IMAGENET = "imagenet"
# Files of a checkpoint with the weights outside of open_clip's model, beside those of the model and of its average.
_BESIDE = {"model.safetensors": "method.safetensors", "model_ema.safetensors": "method_ema.safetensors"}


@dataclass(frozen=True, kw_only=True)
class Config(clip.Config):
    """CLIP's settings (softmax loss, no teacher), the audio tower, and the pairs, with the paper's values."""

    architecture: str = "RN50"
    """open_clip architecture of the image and text towers; audio features get their width."""
    pretrained: str | None = None
    """Initial weights: a tag of the architecture, a file, or a checkpoint folder, which may bring an audio tower."""
    modalities: tuple[Modality, ...] = MODALITIES
    """Modalities to train on, two or three; audio alone trains the audio tower on tags. Other towers are frozen."""
    audio_tower: str = "esresnext-fbsp"
    """Audio tower: esresnext-fbsp (the paper's), htsat-tiny, htsat-base, small, or timm:NAME."""
    audio_pretrained: str = ""
    """Initial weights of the audio tower: a file, or imagenet for the trunk of esresnext-fbsp; after --pretrained."""
    audio_seconds: float = 10.0
    """Length of every sound in seconds; shorter ones are padded, longer ones cropped."""
    audio_rate: int | None = None
    """Samples per second; none for the tower's. Log-mel towers have one rate."""
    audio_channels: Literal[1, 2] | None = None
    """Channels of every sound; none for the tower's."""
    augment_audio: bool = True
    """Augment training sounds: inversion, speed, position and noise; else a random part of longer sounds is read."""
    audio_padding: Padding = "repeat_zeros"
    """Padding of short sounds without augmentation: repeats and then zeros (LAION-CLAP), repeats, zeros, or zeros on
    both sides. With augmentation their ends continue (AudioCLIP)."""
    audio_augmentation: SoundAugmentation = field(default_factory=SoundAugmentation)
    lock_audio: bool = False
    """Freeze the audio tower."""
    audio_scale: float = 100.0
    """Initial scale of the pairs with audio; ignored if the pretrained weights have it."""
    audio_image_weight: float = 1.0
    """Weight of the loss of sounds and images; 0 leaves the pair out."""
    audio_text_weight: float = 1.0
    """Weight of the loss of sounds and texts; 0 leaves the pair out."""
    image_text_weight: float = 1.0
    """Weight of the loss of images and texts; 0 leaves the pair out."""
    positives: Literal["own", "same_text"] = "own"
    """Matching rows: own (each row's, the paper's), or same_text (all rows of the batch with an equal text)."""
    missing: Literal["mask", "replace"] = "mask"
    """Samples that lack a modality: mask (train the pairs that they have), or replace (read another sample)."""
    class_names: tuple[str, ...] = ()
    """Names of the tags, for audio alone."""
    label_key: str = "labels"
    """Key of the tags in the samples' json: a list of names, or one name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.loss == "softmax", "loss", self.loss, "softmax")
        require(not self.teacher, "teacher", self.teacher, "nothing: this method has no distillation")
        known = sorted(set(self.modalities)) == sorted(self.modalities) and bool(self.modalities)
        require(known, "modalities", self.modalities, f"some of {', '.join(MODALITIES)}, each once")
        alone = self.modalities == ("audio",)
        require(alone or len(self.modalities) > 1, "modalities", self.modalities, "two or three, or audio alone")
        require(0.1 <= self.audio_seconds <= 600, "audio_seconds", self.audio_seconds, "0.1 to 600")
        rate = self.audio_rate
        require(rate is None or 1_000 <= rate <= 192_000, "audio_rate", rate, "1,000 to 192,000, or none")
        require(self.max_logit_scale <= 1000, "max_logit_scale", self.max_logit_scale, "1 to 1,000")
        most = self.max_logit_scale
        require(1 <= self.audio_scale <= most, "audio_scale", self.audio_scale, f"1 to max_logit_scale, {most:g}")
        for name in ("audio_image_weight", "audio_text_weight", "image_text_weight"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(alone or bool(self.pairs()), "modalities", self.modalities, "a pair with a weight of more than 0")
        names = self.class_names
        require(len(set(names)) == len(names), "class_names", names, "distinct names")
        require(not alone or not self.lock_audio, "lock_audio", self.lock_audio, "False for audio alone")

    def pairs(self) -> dict[tuple[Modality, Modality], float]:
        """The weights of the pairs that are trained."""
        weights: dict[tuple[Modality, Modality], float] = {
            ("audio", "image"): self.audio_image_weight,
            ("audio", "text"): self.audio_text_weight,
            ("image", "text"): self.image_text_weight,
        }
        return {pair: weight for pair, weight in weights.items() if weight and set(pair) <= set(self.modalities)}

    def sounds(self, seed: int = 0) -> SoundReader | AudioReader:
        """The reader of sounds, for training and evaluation."""
        cut = self.cut()
        if not self.augment_audio:
            return AudioReader(transform=cut, seed=seed)
        return SoundReader(
            sample_rate=cut.sample_rate,
            seconds=cut.seconds,
            channels=cut.channels,
            augmentation=self.audio_augmentation,
            seed=seed,
        )

    def cut(self) -> AudioTransform:
        """Rate, channels and length of every sound."""
        default = sound_input(self.audio_tower)
        return AudioTransform(
            sample_rate=self.audio_rate or default.sample_rate,
            seconds=self.audio_seconds,
            channels=self.audio_channels or default.channels,
            crop="random",
            padding=self.audio_padding,
        )


class Audioclip(clip.Clip):
    """open_clip's image and text towers, an audio tower, and the contrastive losses of their pairs."""

    batch_keys: ClassVar[tuple[str, ...]] = ("audio", "image", "text")
    registered_as: ClassVar[str] = "audioclip"
    config: Config

    def __init__(self, config: Config, description: Mapping[str, str] | None = None) -> None:
        """``description`` is given if weights are restored afterwards; none are read then."""
        super().__init__(config, description)
        self._build_audio(self._audio_width(), load=description is None)

    def _audio_width(self) -> int:
        """Features of the audio tower: those of the other towers, or one for each tag."""
        if self._tags():
            return len(self.config.class_names)
        return int(openclip.check_architecture(self.config.architecture)["embed_dim"])

    def _build_audio(self, width: int, load: bool) -> None:
        """The audio tower, its scales, and what is frozen."""
        config = self.config
        self.audio = audio_tower(config.audio_tower, width, config.audio_seconds)
        self.logit_scale_ai = nn.Parameter(torch.tensor(math.log(config.audio_scale)))
        self.logit_scale_at = nn.Parameter(torch.tensor(math.log(config.audio_scale)))
        if load:
            self._load_audio()
        self._freeze()

    @classmethod
    def smallest(cls) -> Config:
        """The smallest CLIP and a small audio tower."""
        return Config(architecture="clipmill-tiny", audio_tower="small", audio_seconds=0.5, audio_scale=10.0)

    @classmethod
    def check(cls, config: clip.Config) -> None:
        """Like CLIP's check; also of the audio tower, its weights and the tags."""
        super().check(config)
        assert isinstance(config, Config)
        check_tower(config.audio_tower, config.audio_seconds, config.audio_rate)
        _check_tags(config)
        trunk = config.audio_tower == "esresnext-fbsp"
        weights = config.audio_pretrained
        if weights == IMAGENET:
            require(trunk, "audio_pretrained", weights, "a file: only esresnext-fbsp has a trunk of images")
        elif weights:
            folder, name = split_file(weights)
            require(folder.exists(name), "audio_pretrained", weights, "imagenet, or an existing file")

    def _tags(self) -> bool:
        return self.config.modalities == ("audio",)

    def _load_audio(self) -> None:
        """Read the audio tower of a checkpoint, then that of ``audio_pretrained``."""
        config = self.config
        if (state := _beside(config.pretrained)) is not None:
            self._take_audio(state, config.pretrained or "")
            for name in ("logit_scale_ai", "logit_scale_at"):
                if name in state:
                    getattr(self, name).data.copy_(state[name])
        if config.audio_pretrained == IMAGENET:
            assert isinstance(self.audio, EsResNextFbsp)
            self.audio.load_imagenet()
        elif config.audio_pretrained:
            folder, name = split_file(config.audio_pretrained)
            self._take_audio(read_any_weights(FileCache().fetch(folder, name), name), config.audio_pretrained)

    def _take_audio(self, state: Mapping[str, Tensor], place: str) -> None:
        """Load weights named as the tower's or with the prefix ``audio.``; a head of another width stays random.

        Raises:
            SettingError: weights of another tower.
        """
        prefix = "audio." if any(name.startswith("audio.") for name in state) else ""
        found = {name.removeprefix(prefix): one for name, one in state.items() if name.startswith(prefix)}
        wanted = self.audio.state_dict()
        fits = {name for name in wanted if name in found and found[name].shape == wanted[name].shape}
        heads = {name for name in {*wanted, *found} if is_head(name) and name not in fits}
        found = {name: one for name, one in found.items() if name not in heads and name != "window"}
        problem = misfit({name: one for name, one in wanted.items() if name not in heads}, found)
        allowed = f"weights of {self.config.audio_tower}; these are {problem}"
        require(not problem, "audio_pretrained" if not prefix else "pretrained", place, allowed)
        self.audio.load_state_dict(found, strict=False)

    def _freeze(self) -> None:
        """Freeze what the config locks, and what no trained pair reads."""
        config = self.config
        used = {modality for pair in config.pairs() for modality in pair} | ({"audio"} if self._tags() else set())
        frozen: list[nn.Parameter] = []
        towers = {name: self._parts(name) for name in MODALITIES}
        for modality, modules in towers.items():
            if modality not in used or (modality == "audio" and config.lock_audio):
                frozen += [one for module in modules for one in module.parameters()]
        if "text" not in used:
            frozen += self._loose_text()
        for parameter in frozen:
            parameter.requires_grad_(False)
        parts = [part for modules in towers.values() for part in modules]
        trained = {name for name, modules in towers.items() if any(_trains(module) for module in modules)}
        for pair, scale in self._scales().items():
            scale.requires_grad_(pair in config.pairs() and bool(trained & set(pair)))
        self._still = tuple(module for part in parts for module in locked_modules(part))
        self.train()

    def _parts(self, tower: str) -> list[nn.Module]:
        """The modules of a tower."""
        if tower == "audio":
            return [self.audio]
        if tower == "image":
            return [self.model.visual]
        if hasattr(self.model, "text"):
            return [self.model.text]
        return [module for name, module in self.model.named_children() if name != "visual"]

    def _loose_text(self) -> list[nn.Parameter]:
        """Weights of open_clip's own text tower that are in none of its modules."""
        loose = (getattr(self.model, name, None) for name in ("positional_embedding", "text_projection"))
        return [one for one in loose if isinstance(one, nn.Parameter)]

    def _scales(self) -> dict[tuple[Modality, Modality], nn.Parameter]:
        """The logarithm of each pair's scale."""
        return {
            ("audio", "image"): self.logit_scale_ai,
            ("audio", "text"): self.logit_scale_at,
            ("image", "text"): self.model.logit_scale,
        }

    def _largest(self) -> float:
        """Limit of the scales' logarithm, as float32 has it."""
        return torch.tensor(math.log(self.config.max_logit_scale)).item()

    @classmethod
    def sample_fields(cls, config: Any, settings: TextSettings | None = None) -> Sequence[str]:
        """Fields that every sample has: none where samples may lack a modality."""
        if config.modalities == ("audio",):
            return ("audio", "json")
        if config.missing == "mask":
            return ()
        text = settings or TextSettings()
        of_text = [] if text.tokens else [caption_field(text.caption)]
        return [name for one in config.modalities for name in (of_text if one == "text" else [one])]

    @classmethod
    def sidecars(cls, config: Any, settings: TextSettings | None = None) -> Sequence[Wanted]:
        """The captions' tokens, where the run names a sidecar and texts are trained on."""
        return super().sidecars(config, settings) if "text" in config.modalities else []

    def readers(self, train: bool, *, seed: int = 0, settings: TextSettings | None = None) -> Sequence[Reader]:
        """The modalities that the config trains on, or sounds and their tags."""
        config, sounds = self.config, self.config.sounds(seed)
        if self._tags():
            return [sounds, TagReader(classes=config.class_names, json_key=config.label_key)]
        every: dict[str, Reader] = {"audio": sounds}
        if "image" in config.modalities:
            every["image"] = ImageReader(transform=self.transforms(train), seed=seed)
        if "text" in config.modalities:
            (every["text"],) = self.text_readers(settings, seed)
        readers: dict[str, Reader] = {name: every[name] for name in config.modalities}
        if config.missing == "replace":
            return list(readers.values())
        stored = bool(settings and settings.tokens)
        return [ModalitiesReader(readers=readers, blanks=self._blanks(readers, stored))]

    def _blanks(self, readers: Mapping[str, Reader], stored: bool) -> dict[str, Any]:
        """What missing modalities have in a batch; no tower reads it."""
        cut = self.config.cut()
        blanks: dict[str, Any] = {"audio": {"audio": torch.zeros(cut.channels, cut.samples)}}
        if "image" in readers:
            height, width = self.transforms(False).size
            blanks["image"] = {"image": torch.zeros(3, height, width, dtype=torch.uint8)}
        blanks["text"] = {"text": self.tokenizer([""])[0].tolist() if stored else ""}
        return blanks

    def prepare_training(self) -> None:
        """Nothing to load: there is no teacher."""

    def encode_audio(self, audio: Tensor) -> Tensor:
        """Float [B, C, T] in -1 to 1, at :attr:`sample_rate`, to L2-normalised float32 [B, D].

        :meth:`audio_reader` gives sounds of the length that the tower was trained on.
        """
        require(not self._tags(), "modalities", self.config.modalities, "a model of two modalities, not of tags")
        features, _ = self._hear(audio)
        return functional.normalize(features.float(), dim=-1)

    @property
    def sample_rate(self) -> int:
        """Samples per second of the waveforms that :meth:`encode_audio` reads."""
        return self.config.cut().sample_rate

    def audio_reader(self) -> SoundReader | AudioReader:
        """The reader of sounds for evaluation; its key is ``audio``."""
        return self.config.sounds()

    @property
    def encodes(self) -> tuple[str, ...]:
        """The modalities with trained towers: those of the config, and of a pretrained CLIP its own."""
        of_clip = ("image", "text") if self.config.pretrained and not self._tags() else ()
        return tuple(dict.fromkeys((*self.config.modalities, *of_clip)))

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the tags."""
        return self.config.class_names

    def tag_audio(self, audio: Tensor) -> Tensor:
        """Float [B, C, T] in -1 to 1 to the logits of each tag, float32 [B, classes]."""
        require(self._tags(), "modalities", self.config.modalities, "audio, for a model of tags")
        logits, _ = self._hear(audio)
        return logits.float()

    def _hear(self, audio: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features of the audio tower, not normalised, and its penalty."""
        found: tuple[Tensor, Tensor | None] = self.audio(audio, self.gather)
        return found

    def embed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Unit features by modality (zeros where it is missing) or tags' logits, and the penalty of each row."""
        found: dict[str, Tensor] = {}
        if "audio" in self.config.modalities:
            rows = self._rows(batch, "audio")
            with rows.of(*self._parts("audio")):
                features, penalty = self._hear(rows.taken(batch["audio"]))
            name = "tags" if self._tags() else "audio"
            features = features.float() if self._tags() else functional.normalize(features.float(), dim=-1)
            found[name] = rows.put_back(features)
            if penalty is not None and not self.config.lock_audio:
                found["penalty"] = penalty.expand(len(found[name]))
        for name, encode in (("image", self.encode_image), ("text", self.encode_text)):
            if name in self.config.modalities:
                rows = self._rows(batch, name)
                with rows.of(*self._parts(name)):
                    found[name] = rows.put_back(encode(rows.taken(batch[name])))
        return found

    def _rows(self, batch: Mapping[str, Tensor], modality: str) -> PresentRows:
        return PresentRows(batch.get(PRESENCE + modality), len(batch[modality]))

    def targets(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tags, or which rows have a modality and which texts are equal."""
        if self._tags():
            return {"targets": batch["tags"]}
        found = {PRESENCE + name: batch[PRESENCE + name] for name in self.config.modalities if PRESENCE + name in batch}
        if self.config.positives == "same_text" and "text" in batch:
            found["groups"] = text_groups(batch["text"], getattr(self.tokenizer, "padding", 0))
        return found

    def compare(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The losses of all pairs, or of the tags; and the penalty of the spectrogram."""
        penalty = {"fbsp": embeddings["penalty"].mean()} if "penalty" in embeddings else {}
        if self._tags():
            logits, targets = embeddings["tags"], embeddings["targets"]
            loss = functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)
            return {"tags": loss, **penalty}
        pairs = self.config.pairs()
        share = 1 / math.factorial(len(pairs))
        return {
            **{"_".join(pair): weight * share * self._pair(pair, embeddings) for pair, weight in pairs.items()},
            **penalty,
        }

    def _pair(self, pair: tuple[Modality, Modality], embeddings: Mapping[str, Tensor]) -> Tensor:
        first, second = (embeddings[name] for name in pair)
        ones = torch.ones(len(first), device=first.device)
        present = math.prod((embeddings.get(PRESENCE + name, ones) for name in pair), start=ones)
        log_scale = self._scales()[pair]
        # clamp() has no gradient at its limits, where the paper's scales start; beyond them there is none.
        inside = (log_scale >= 0) & (log_scale <= self._largest())
        scale = torch.where(inside, log_scale, log_scale.detach().clamp(0, self._largest())).exp()
        groups = embeddings.get("groups")
        if groups is not None and "text" not in pair:
            # Rows without a text are groups of their own, marked by numbers below 1 of their features.
            written = embeddings.get(PRESENCE + "text", ones)[:, None]
            groups = torch.where(written > 0, groups + 1, first[:, : groups.shape[1]].detach())
        if len(first) * self.exchange.world > self.config.loss_tile:
            return tiled_pair_loss(first, second, present, scale, self.exchange, self.config.loss_tile, groups)
        return pair_loss(first, second, present, scale, self.gather, groups)

    def layers(self) -> Mapping[str, Layer]:
        """The layers of all three towers' weights; scales have none."""
        names = [name for name, _ in self.audio.named_parameters()]
        found = block_depths(names, blocks(self.audio))
        deepest = max(found.values())
        return {**super().layers(), **{f"audio.{name}": Layer("audio", deepest - found[name]) for name in names}}

    def blocks(self) -> Sequence[nn.Module]:
        """The repeated parts of all towers."""
        return [*super().blocks(), *blocks(self.audio).values()]

    def after_step(self) -> None:
        """Clamp the scales that are trained between 1 and their limit."""
        with torch.no_grad():
            for scale in self._scales().values():
                if scale.requires_grad:
                    scale.clamp_(0, self._largest())

    def measures(self) -> dict[str, float]:
        """The scales of the pairs that are trained."""
        return {
            f"logit_scale/{'_'.join(pair)}": scale.exp().item()
            for pair, scale in self._scales().items()
            if pair in self.config.pairs()
        }


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _check_tags(config: Config) -> None:
    if config.modalities == ("audio",):
        require(len(config.class_names) >= 2, "class_names", config.class_names, "two class names or more")


def _beside(pretrained: str | None) -> dict[str, Tensor] | None:
    """The weights outside of open_clip's model in a checkpoint's folder, or beside the file of its average."""
    if not pretrained:
        return None
    folder, name = Folder(pretrained), _BESIDE["model.safetensors"]
    if pretrained.endswith(tuple(_BESIDE)):
        parent, _, file = pretrained.rpartition("/")
        folder, name = Folder(parent), _BESIDE[file]
    if not folder.exists(name):
        return None
    try:
        state = read_tensors(FileCache().fetch(folder, name))
    except OSError as error:
        raise DataError(f"{folder.join(name)} cannot be read ({error})") from error
    return state if any(key.startswith("audio.") for key in state) else None
