"""CLAP: large-scale contrastive language-audio pretraining with feature fusion and keyword-to-caption augmentation.

Wu, Chen, Zhang, Hui, Berg-Kirkpatrick, Dubnov, 2022, arXiv 2211.06687

The idea: CLIP with sounds instead of images. HTSAT (arXiv 2202.00874) reads the log-mel spectrogram of a sound, RoBERTa
its caption; two linear layers behind each give features in one space. It is AudioCLIP with two modalities: the loss is
the sum of both cross-entropies of a batch (LAION's code has their mean, half of it), with one learned scale.

The model is transformers' ``ClapModel``, so a folder of LAION's checkpoints loads as it is, and a trained one is
exported to the same layout (jobs/export_model.py). ``ClapModel(return_loss=True)`` compares texts with sounds in both
of its terms; here each direction has one.

Differences from LAION's code: the batch normalisation of mel bands keeps the statistics of its checkpoint, so a step
does not depend on the number of processes; sounds are not rounded to 16 bits, since stored ones have 16; the second
scale of the checkpoint follows the first.

Left out: models with feature fusion; the loss of MLP features with two scales; PANN towers.

To hold a run against: zero-shot accuracy on ESC-50 / UrbanSound8K 91.0 / 77.0 (table 3, recalled).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal, Self

import torch
from tokenizers import Tokenizer as BytesTokenizer
from tokenizers import decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, ClapConfig, ClapModel, PreTrainedTokenizerFast

from pipeline.config import require
from pipeline.errors import SettingError
from pipeline.loaders.audio import AudioReader, AudioTransform, Padding
from pipeline.loaders.cache import FileCache
from pipeline.models.audioclip import Audioclip, Modality
from pipeline.models.audioclip.augment import SoundAugmentation
from pipeline.models.audioclip.readers import SoundReader
from pipeline.models.losses import TILE
from pipeline.models.method import Method
from pipeline.models.towers import openclip
from pipeline.models.towers.hugging_face_import import CONFIG, IMAGES, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS, parse
from pipeline.models.towers.layers import Layer, block_depths, blocks
from pipeline.models.towers.locked import locked_modules
from pipeline.models.towers.log_mel import LogMel, LogMelConfig
from pipeline.models.towers.weights import misfit, read_any_weights
from pipeline.shards.storage import Folder

PREFIX = "clap_"  # of transformers' files in a checkpoint, which has a config.json of its own
FILES = (CONFIG, IMAGES, TOKENIZER, TOKENIZER_CONFIG, "vocab.json", "merges.txt", "special_tokens_map.json")
CONTEXT = 77  # tokens of a text in LAION's code
RATE, LONGEST_FRAMES = 48_000, 1024
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The checkpoint to start from, sounds, and the loss."""

    pretrained: str = ""
    """Folder of transformers' ClapModel or of a checkpoint (path or URI), or hf-hub:REPO; random weights if empty."""
    size: Literal["laion", "tiny"] = "laion"
    """Size of a model with random weights, whose texts are read byte by byte: LAION's, or tiny for tests."""
    audio_seconds: float = 10.0
    """Length of every sound in seconds, up to 10.24."""
    augment_audio: bool = False
    """Augment training sounds as AudioCLIP does; else a random part of longer sounds is read."""
    audio_augmentation: SoundAugmentation = field(default_factory=SoundAugmentation)
    audio_padding: Padding = "repeat_zeros"
    """Padding of short sounds without augmentation: repeats and then zeros, repeats, zeros, or zeros on both sides."""
    lock_audio: bool = False
    """Freeze the audio tower."""
    lock_text: bool = False
    """Freeze the text tower."""
    positives: Literal["own", "same_text"] = "own"
    """Matching rows: own (each row's), or same_text (all rows of the batch with an equal text)."""
    missing: Literal["mask", "replace"] = "mask"
    """Samples that lack a sound or a text are not read in either case; replace checks the data for both fields."""
    loss_tile: int = TILE
    """Side of the tiles in which the logits of a larger batch are computed; bounds the loss's memory."""
    max_logit_scale: float = 100.0
    """Upper limit of the learned scale 1 / temperature."""

    modalities: ClassVar[tuple[Modality, ...]] = ("audio", "text")
    class_names: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        frames = LogMelConfig().frames(round(self.audio_seconds * RATE))
        require(
            0.1 <= self.audio_seconds and frames <= LONGEST_FRAMES, "audio_seconds", self.audio_seconds, "0.1 to 10.23"
        )
        require(self.loss_tile >= 1, "loss_tile", self.loss_tile, "1 or more")
        require(1 <= self.max_logit_scale <= 1000, "max_logit_scale", self.max_logit_scale, "1 to 1,000")
        require(not (self.lock_audio and self.lock_text), "lock_text", True, "False where the audio tower is locked")

    def pairs(self) -> dict[tuple[Modality, Modality], float]:
        """The one pair."""
        return {("audio", "text"): 1.0}

    def cut(self) -> AudioTransform:
        """Rate, channels and length of every sound."""
        return AudioTransform(
            sample_rate=RATE, seconds=self.audio_seconds, channels=1, crop="random", padding=self.audio_padding
        )

    def sounds(self, seed: int = 0) -> SoundReader | AudioReader:
        """The reader of sounds, for training and evaluation."""
        if not self.augment_audio:
            return AudioReader(transform=self.cut(), seed=seed)
        return SoundReader(
            sample_rate=RATE, seconds=self.audio_seconds, augmentation=self.audio_augmentation, seed=seed
        )


class ClapTokenizer:
    """transformers' tokenizer as a function: texts to int64 [B, 77], cut or padded."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.context_length = tokenizer, CONTEXT
        self.end, self.padding = int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """int64 [B, context length]."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        length = context_length or self.context_length
        found = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        tokens: Tensor = found["input_ids"]
        return tokens


class Clap(Audioclip):
    """transformers' ``ClapModel``, whose two towers are contrasted as AudioCLIP's."""

    batch_keys: ClassVar[tuple[str, ...]] = ("audio", "text")
    registered_as: ClassVar[str] = "clap"
    encode_image: ClassVar[None] = None  # type: ignore[assignment]
    """There is no image tower: evaluations of images refuse this method."""
    config: Any
    model: Any
    tokenizer: ClapTokenizer

    def __init__(self, config: Config, description: Mapping[str, str] | None = None) -> None:
        """``description`` is given if weights are restored afterwards; none are read then."""
        Method.__init__(self, config)
        files = _unprefixed(description) if description else _files_of(config)
        settings = ClapConfig.from_dict(parse(files[CONFIG], config.pretrained))
        audio: Any = settings.audio_config
        require(
            not audio.enable_fusion,
            "pretrained",
            config.pretrained,
            "a model without feature fusion, such as clap-htsat-unfused",
        )
        self.model = ClapModel(settings)
        if config.pretrained and description is None:
            self._load(config.pretrained)
        extractor = parse(files[IMAGES], config.pretrained) if IMAGES in files else {}
        self.front = LogMel(_bands(extractor))
        self.tokenizer, self._files = _tokenizer(files)
        self.end_of_text = self.tokenizer.end
        self._freeze()

    @classmethod
    def smallest(cls) -> Config:  # type: ignore[override]
        """Random weights: one block in each of four stages, and one layer for texts."""
        return Config(size="tiny", audio_seconds=0.5)

    @classmethod
    def check(cls, config: Any) -> None:
        """Check that the files of the checkpoint exist and describe a model without fusion."""
        settings = parse(_files_of(config)[CONFIG], config.pretrained)
        kind = settings.get("model_type", "clap")
        require(kind == "clap", "pretrained", config.pretrained, f"a folder of a ClapModel, not of a {kind} model")
        if config.pretrained:
            _weights_of(config.pretrained)

    @classmethod
    def restored(cls, config: Any, description: Mapping[str, str]) -> Self:
        """The modules alone."""
        return cls(config, description)

    def description(self) -> Mapping[str, str]:
        """transformers' files, with a prefix."""
        return {PREFIX + name: text for name, text in self.transformers_files().items()}

    def transformers_files(self) -> Mapping[str, str]:
        """For ``from_pretrained`` of ClapModel and ClapProcessor."""
        settings = {**self.model.config.to_dict(), "architectures": ["ClapModel"], "model_type": "clap"}
        bands = self.front.config
        extractor = {
            "feature_extractor_type": "ClapFeatureExtractor",
            "processor_class": "ClapProcessor",
            "sampling_rate": bands.sample_rate,
            "fft_window_size": bands.window,
            "hop_length": bands.hop,
            "feature_size": bands.bands,
            "frequency_min": bands.low,
            "frequency_max": bands.high,
            "truncation": "rand_trunc" if bands.scale == "slaney" else "fusion",
            "padding": "repeatpad",
            "max_length_s": 10,
        }
        own = {CONFIG: json.dumps(settings, indent=2), IMAGES: json.dumps(extractor, indent=2)}
        return {**self._files, **own}

    def _load(self, address: str) -> None:
        """Read a checkpoint's weights; raises ``SettingError`` if they do not fit its own config."""
        found = read_any_weights(_weights_of(address), address)
        wanted = self.model.state_dict()
        # Older files lack what follows from the config.
        made = {name for name in wanted if name.endswith(("position_ids", "token_type_ids", "relative_position_index"))}
        problem = misfit(
            {name: one for name, one in wanted.items() if name not in made},
            {name: one for name, one in found.items() if name not in made},
        )
        require(not problem, "pretrained", address, f"the weights of its config.json; these are {problem}")
        self.model.load_state_dict(found, strict=False)

    def _freeze(self) -> None:
        """Freeze what the config locks, the second scale, and the statistics of the mel bands."""
        self.model.logit_scale_t.requires_grad_(False)
        for tower, locked in (("audio", self.config.lock_audio), ("text", self.config.lock_text)):
            for part in self._parts(tower) if locked else []:
                part.requires_grad_(False)
        norm = self.model.audio_model.audio_encoder.batch_norm
        parts = [part for tower in ("audio", "text") for part in self._parts(tower)]
        self._still = (norm, *(module for part in parts for module in locked_modules(part)))
        self.train()

    def _parts(self, tower: str) -> list[nn.Module]:
        """A tower and its projection."""
        return [getattr(self.model, f"{tower}_model"), getattr(self.model, f"{tower}_projection")]

    def _scales(self) -> dict[tuple[Modality, Modality], nn.Parameter]:
        return {("audio", "text"): self.model.logit_scale_a}

    def _hear(self, audio: Tensor) -> tuple[Tensor, Tensor | None]:
        decibels = self.front(audio.mean(dim=1))[:, None]
        pooled = self.model.audio_model(input_features=decibels).pooler_output
        return self.model.audio_projection(pooled), None

    def encode_text(self, text: Tensor) -> Tensor:
        """Tokens, int64 [B, L], to L2-normalised float32 [B, D]."""
        seen = (text != self.tokenizer.padding).long()
        seen[:, 0] = 1  # a text of padding alone, where a row has none
        pooled = self.model.text_model(input_ids=text, attention_mask=seen).pooler_output
        return functional.normalize(self.model.text_projection(pooled).float(), dim=-1)

    def layers(self) -> Mapping[str, Layer]:
        """The layers of both towers' weights; scales have none."""
        found: dict[str, Layer] = {}
        for tower in ("audio", "text"):
            names = [name for name, _ in self.model.named_parameters() if name.startswith(f"{tower}_")]
            known = {name: one for name, one in blocks(self.model).items() if name.startswith(f"{tower}_")}
            depth_of = block_depths(names, known)
            deepest = max(depth_of.values())
            found |= {f"model.{name}": Layer(tower, deepest - depth) for name, depth in depth_of.items()}
        return found

    def blocks(self) -> Sequence[nn.Module]:
        """The repeated parts of both towers."""
        return list(blocks(self.model).values())

    def after_step(self) -> None:
        """Clamp the scale; transformers' second one follows it."""
        super().after_step()
        with torch.no_grad():
            self.model.logit_scale_t.copy_(self.model.logit_scale_a)


def _unprefixed(description: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix(PREFIX): text for name, text in description.items()}


def _files_of(config: Config) -> dict[str, str]:
    """The text files of the checkpoint that the config names, or of a model with random weights."""
    if not config.pretrained:
        return _made_files(config.size)
    found = {name: path.read_text("utf-8") for name in FILES if (path := _file(config.pretrained, name)) is not None}
    found |= {
        name: path.read_text("utf-8") for name in FILES if (path := _file(config.pretrained, PREFIX + name)) is not None
    }
    if CONFIG not in found:
        raise SettingError("pretrained", config.pretrained, f"a folder or a repository with {CONFIG}")
    return found


def _weights_of(address: str) -> Path:
    path = next((path for name in WEIGHTS if (path := _file(address, name)) is not None), None)
    if path is None:
        raise SettingError("pretrained", address, f"a folder or a repository with {' or '.join(WEIGHTS)}")
    return path


def _file(address: str, name: str) -> Path | None:
    """A file of a folder, or of a repository of the hub."""
    if address.startswith("hf-hub:"):
        return openclip.file_of(address, name)
    folder = Folder(address)
    return FileCache().fetch(folder, name) if folder.exists(name) else None


def _bands(extractor: Mapping[str, Any]) -> LogMelConfig:
    """The spectrogram that a ``preprocessor_config.json`` describes; LAION's without fusion by default."""
    return LogMelConfig(
        sample_rate=int(extractor.get("sampling_rate", RATE)),
        window=int(extractor.get("fft_window_size", 1024)),
        hop=int(extractor.get("hop_length", 480)),
        bands=int(extractor.get("feature_size", 64)),
        low=float(extractor.get("frequency_min", 50)),
        high=float(extractor.get("frequency_max", 14_000)),
        scale="htk" if extractor.get("truncation") == "fusion" else "slaney",
    )


def _tokenizer(files: Mapping[str, str]) -> tuple[ClapTokenizer, dict[str, str]]:
    """The tokenizer, and the files from which transformers makes it again."""
    with TemporaryDirectory(prefix="clipmill-clap-") as place:
        for name in FILES:
            if name in files:
                Path(place, name).write_text(files[name], "utf-8")
        tokenizer = AutoTokenizer.from_pretrained(place)
        tokenizer.save_pretrained(f"{place}/saved")
        kept = {name: Path(place, "saved", name).read_text("utf-8") for name in (TOKENIZER, TOKENIZER_CONFIG)}
    return ClapTokenizer(tokenizer), kept


def _made_files(size: str) -> dict[str, str]:
    """The files of a model with random weights."""
    settings = ClapConfig()
    if size == "tiny":
        audio: dict[str, Any] = {
            "patch_embeds_hidden_size": 16,
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
        }
        text: dict[str, Any] = {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        }
        text |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 80}
        audio |= {"hidden_size": 128, "hidden_dropout_prob": 0.0}
        settings = ClapConfig(audio_config=audio, text_config=text, projection_dim=32)
    plain = settings.to_dict()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain["text_config"]["vocab_size"] = len(SPECIAL) + len(letters)
    tokenizer = BytesTokenizer(BPE(vocab={one: rank for rank, one in enumerate((*SPECIAL, *letters))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    with TemporaryDirectory(prefix="clipmill-clap-") as place:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(place)
        files = {name: Path(place, name).read_text("utf-8") for name in (TOKENIZER, TOKENIZER_CONFIG)}
    return {**files, CONFIG: json.dumps({**plain, "model_type": "clap"})}
