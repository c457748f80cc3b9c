"""transformers' ``CLIPModel`` and ``ChineseCLIPModel`` as open_clip models: configs, image settings, names of weights.

A folder or repository has ``config.json``, ``model.safetensors`` or ``pytorch_model.bin``, and often
``preprocessor_config.json``. ``config.json`` may leave out what equals transformers' defaults, which are below.
transformers itself is not needed. Other kinds of models are refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from pipeline.config import parse_json, require
from pipeline.errors import SettingError
from pipeline.models.towers import hugging_face

CONFIG, IMAGES = "config.json", "preprocessor_config.json"
VOCABULARY, TOKENIZER, TOKENIZER_CONFIG = "vocab.txt", "tokenizer.json", "tokenizer_config.json"
KINDS = ("clip", "chinese_clip")
SPECIAL = ("[UNK]", "[CLS]", "[SEP]", "[PAD]")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEX = "model.safetensors.index.json"  # of weights in several files
BYTE_PAIRS = 49408  # the vocabulary of CLIP's own tokenizer
OLD_END = 2  # in early configs, where transformers takes the largest token instead, which is the end of text

_TEXT = {
    "vocab_size": BYTE_PAIRS,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": BYTE_PAIRS - 1,
}
_BERT = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
MOST_WORDS = 1 << 20
CHINESE_LENGTH = 52  # tokens of a text in Chinese-CLIP's code; its table of positions is longer
_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
BERT_WORDS = "text_model.embeddings.word_embeddings.weight"
_ACTIVATIONS = {"gelu": {}, "gelu_new": {"approximate": "tanh"}, "gelu_pytorch_tanh": {"approximate": "tanh"}}
_INTERPOLATIONS = {hugging_face.BILINEAR: "bilinear", hugging_face.BICUBIC: "bicubic"}
_BLOCK = {theirs: ours for ours, theirs in hugging_face._BLOCK.items()}
_OTHERS = {theirs: ours for ours, theirs in hugging_face._OTHERS.items()}


@dataclass(frozen=True)
class WordPieces:
    """The word pieces of a BERT tokenizer in the order of their numbers, and whether it reads texts in lower case."""

    words: tuple[str, ...]
    lower: bool = True


def read_vocabulary(words: str | None, tokenizer: str | None, config: str | None, place: str) -> WordPieces | None:
    """The word pieces from the texts of ``vocab.txt`` or ``tokenizer.json``, and of ``tokenizer_config.json``."""
    lower = parse(config, place).get("do_lower_case", True) if config else True
    if words is not None:
        return WordPieces(tuple(words.removesuffix("\n").split("\n")), bool(lower))
    model = parse(tokenizer, place).get("model") if tokenizer else None
    found = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(found, Mapping) or not all(isinstance(number, int) for number in found.values()):
        return None
    by_number = {number: word for word, number in found.items() if 0 <= number < MOST_WORDS}
    return WordPieces(tuple(by_number.get(number, "") for number in range(1 + max(by_number, default=-1))), bool(lower))


def model_config(config: Mapping[str, Any], place: str, vocabulary: WordPieces | None = None) -> dict[str, Any]:
    """open_clip's model config for the content of ``config.json``; a ``ChineseCLIPModel`` needs a ``vocabulary``.

    Its text tower has the keys ``bert``, ``word_pieces`` and ``lower``, which open_clip does not know.

    Raises:
        SettingError: another kind of model, or one with parts that open_clip lacks; the message names them.
    """
    kind = config.get("model_type")
    allowed = f"a folder of a CLIPModel or a ChineseCLIPModel; its config.json is that of a {kind} model"
    require(kind in KINDS, "architecture", place, allowed)
    vision = _settings(_VISION, config, "vision")
    _require(vision["num_channels"] == 3, place, f"{vision['num_channels']} colour channels")
    quick = vision["hidden_act"] == "quick_gelu"
    bias = {"init_logit_bias": config["logit_bias"]} if "logit_bias" in config else {}
    tower = _byte_pair_tower(config, quick, place) if kind == "clip" else _bert_tower(config, place, vocabulary)
    return {
        "embed_dim": int(config.get("projection_dim", 512)),
        "quick_gelu": quick,
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            **_transformer(vision, place),
        },
        "text_cfg": tower,
        **bias,
    }


def _byte_pair_tower(config: Mapping[str, Any], quick: bool, place: str) -> dict[str, Any]:
    text = _settings(_TEXT, config, "text")
    _require(quick == (text["hidden_act"] == "quick_gelu"), place, "different activations in its two towers")
    _require(
        text["vocab_size"] == BYTE_PAIRS, place, f"{text['vocab_size']} tokens, where CLIP's tokenizer has {BYTE_PAIRS}"
    )
    _require(text["eos_token_id"] in (OLD_END, BYTE_PAIRS - 1), place, f"the end of text {text['eos_token_id']}")
    return {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "heads": text["num_attention_heads"],
        **_transformer(text, place),
    }


def _bert_tower(config: Mapping[str, Any], place: str, vocabulary: WordPieces | None) -> dict[str, Any]:
    text = _settings(_BERT, config, "text")
    _require(text["hidden_act"] == "gelu", place, f"the activation {text['hidden_act']} in its text tower")
    missing = f"a folder with {VOCABULARY} or {TOKENIZER}, the word pieces of its tokenizer"
    if vocabulary is None:
        raise SettingError("architecture", place, missing)
    words = len(vocabulary.words)
    _require(words <= text["vocab_size"], place, f"{words} word pieces and a table for {text['vocab_size']}")
    needed = [word for word in SPECIAL if word not in vocabulary.words]
    _require(not needed, place, f"word pieces without {', '.join(needed)}")
    return {
        "context_length": min(CHINESE_LENGTH, text["max_position_embeddings"]),
        "bert": {name: text[name] for name in _BERT},
        "word_pieces": list(vocabulary.words),
        "lower": vocabulary.lower,
    }


def is_quick(config: Mapping[str, Any]) -> bool | None:
    """Whether the model of a ``config.json`` has QuickGELU; ``None`` for another kind of file."""
    if config.get("model_type") not in KINDS:
        return None
    return bool(_settings(_VISION, config, "vision")["hidden_act"] == "quick_gelu")


def image_settings(plain: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's description of the image transform for the content of ``preprocessor_config.json``."""
    size = plain.get("size", 224)
    square = isinstance(size, Mapping) and "shortest_edge" not in size
    return {
        "mean": tuple(plain.get("image_mean", (0.48145466, 0.4578275, 0.40821073))),
        "std": tuple(plain.get("image_std", (0.26862954, 0.26130258, 0.27577711))),
        "interpolation": _INTERPOLATIONS.get(plain.get("resample", hugging_face.BICUBIC), "bicubic"),
        "resize_mode": "squash" if square else "shortest",
    }


def has_names_of(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of a ``CLIPModel``, by their names."""
    return "visual_projection.weight" in tensors and "text_projection.weight" in tensors


def to_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' weights under open_clip's names: attention's projections joined, the output projections transposed.

    Unknown names stay as they are.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("position_ids") or name.startswith("text_model.pooler."):
            continue
        if BERT_WORDS in tensors and name.startswith(("text_model.", "text_projection.")):
            renamed["text." + name.removeprefix("text_model.").replace("text_projection.", "projection.")] = tensor
        elif name in ("visual_projection.weight", "text_projection.weight"):
            renamed["visual.proj" if name.startswith("visual") else "text_projection"] = tensor.T
        elif ".encoder.layers." in name:
            renamed.update(_block_weights(name, tensors))
        else:
            renamed[_OTHERS.get(name, name)] = tensor
    return renamed


def _block_weights(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One tensor of a block; all three of attention's projections at the first of them, and nothing at the others."""
    tower, _, rest = name.partition(".encoder.layers.")
    number, _, part = rest.partition(".")
    place = f"{'visual.' if tower == 'vision_model' else ''}transformer.resblocks.{number}"
    if part in _BLOCK:
        return {f"{place}.{_BLOCK[part]}": tensors[name]}
    for kind in ("weight", "bias"):
        parts = [f"{tower}.encoder.layers.{number}.self_attn.{letter}_proj.{kind}" for letter in "qkv"]
        if name == parts[0] and all(one in tensors for one in parts):
            return {f"{place}.attn.in_proj_{kind}": torch.cat([tensors[one] for one in parts])}
        if name in parts and all(one in tensors for one in parts):
            return {}
    return {name: tensors[name]}


def _settings(defaults: Mapping[str, Any], config: Mapping[str, Any], tower: str) -> dict[str, Any]:
    """A tower's settings; the older key with ``_dict`` wins, as in transformers."""
    given = (config.get(f"{tower}_config{suffix}") or {} for suffix in ("", "_dict"))
    return {**defaults, **{key: value for one in given for key, value in one.items() if value is not None}}


def _transformer(settings: Mapping[str, Any], place: str) -> dict[str, Any]:
    width, hidden = settings["hidden_size"], settings["intermediate_size"]
    ratio = hidden / width
    activation = settings["hidden_act"]
    _require(activation == "quick_gelu" or activation in _ACTIVATIONS, place, f"the activation {activation}")
    return {
        "width": width,
        "layers": settings["num_hidden_layers"],
        "mlp_ratio": ratio if int(width * ratio) == hidden else (hidden + 0.5) / width,
        "norm_kwargs": {"eps": settings["layer_norm_eps"]},
        **({"act_kwargs": kwargs} if (kwargs := _ACTIVATIONS.get(activation)) else {}),
    }


def _require(fits: bool, place: str, found: str) -> None:
    if not fits:
        raise SettingError("architecture", place, f"a CLIPModel that open_clip can express; this one has {found}")


def parts_of(index: str, place: str) -> list[str]:
    """The names of the files that an index of weights lists."""
    files = parse(index, place).get("weight_map")
    if not isinstance(files, Mapping) or not all(isinstance(name, str) for name in files.values()):
        raise SettingError("architecture", place, f"a folder whose {INDEX} has a weight_map")
    return sorted({PurePosixPath(name).name for name in files.values()})


def parse(text: str, place: str) -> dict[str, Any]:
    """The JSON object in ``text``; raises ``SettingError`` if it is none."""
    try:
        plain = parse_json(text)
    except ValueError as error:
        raise SettingError("architecture", place, f"a folder with well-formed JSON ({error})") from error
    if not isinstance(plain, dict):
        raise SettingError("architecture", place, "a folder whose JSON files hold objects")
    return plain
