"""An open_clip model as a folder that transformers opens: ``CLIPModel`` and ``CLIPProcessor``.

The weights are the same under other names, with attention's fused projections split and the two output projections
transposed. The activation, the sizes and the image transform go into the configs, and the tokenizer's files come from
open_clip's own list of merges. ``CLIPModel`` is one architecture: a ViT pooled at its class token and a causal text
transformer pooled at the end of the text. Models with other parts are refused with an error that names them.

``CLIPModel`` has no bias for a sigmoid loss: ``config.json`` stores it as ``logit_bias``, to be added to
``logits_per_image`` before a sigmoid. Features do not need it.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import open_clip
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from pipeline.errors import SettingError

START, END = "<|startoftext|>", "<|endoftext|>"  # transformers' names of the last two tokens
WEIGHTS = "model.safetensors"
BICUBIC, BILINEAR = 3, 2  # Pillow's numbers

_BLOCK = {
    "ln_1.weight": "layer_norm1.weight",
    "ln_1.bias": "layer_norm1.bias",
    "attn.out_proj.weight": "self_attn.out_proj.weight",
    "attn.out_proj.bias": "self_attn.out_proj.bias",
    "ln_2.weight": "layer_norm2.weight",
    "ln_2.bias": "layer_norm2.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
}
_OTHERS = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers' own spelling
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}


def convert(model: Any, tokenizer: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights under transformers' names, and the text files that belong to them.

    Raises:
        SettingError: a model, a tokenizer or an image transform that ``CLIPModel`` and its processor cannot
            express; the message lists the reasons.
    """
    check(model, tokenizer)
    files = {
        "config.json": config(model),
        "preprocessor_config.json": preprocessor(model.visual.preprocess_cfg),
        **tokenizer_files(tokenizer),
    }
    texts = {name: json.dumps(plain, indent=2, ensure_ascii=False) for name, plain in files.items()}
    return weights(model.state_dict()), {**texts, "merges.txt": merges(tokenizer)}


def check(model: Any, tokenizer: Any) -> None:
    """Raise :class:`SettingError` with all reasons why ``model`` cannot be a ``CLIPModel``."""
    problems = list(_problems(model, tokenizer))
    if problems:
        allowed = f"open_clip, since transformers' CLIPModel has no place for {' and '.join(problems)}"
        raise SettingError("format", "hugging_face", allowed)


def weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights under transformers' names: the same numbers, split and transposed."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in _OTHERS:
            renamed[_OTHERS[name]] = tensor.reshape(()) if name == "logit_scale" else tensor
        elif name in ("visual.proj", "text_projection", "text_projection.weight"):
            tower = "visual" if name.startswith("visual") else "text"
            # open_clip multiplies rows by the matrix; transformers' Linear holds the transposed matrix.
            renamed[f"{tower}_projection.weight"] = tensor if name.endswith(".weight") else tensor.T
        elif ".resblocks." in name or name.startswith("transformer."):
            renamed.update(_block_weights(name, tensor))
        else:
            assert name == "logit_bias", name
    return {name: tensor.contiguous() for name, tensor in renamed.items()}


def config(model: Any) -> dict[str, Any]:
    """transformers' ``CLIPConfig``."""
    visual, width = model.visual, model.visual.output_dim
    text = {
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.context_length,
        "bos_token_id": model.vocab_size - 2,
        "eos_token_id": model.vocab_size - 1,
        "pad_token_id": model.vocab_size - 1,
        **_transformer(model.transformer, model.ln_final),
    }
    vision = {
        "image_size": visual.image_size[0],
        "patch_size": visual.patch_size[0],
        **_transformer(visual.transformer, visual.ln_post),
    }
    bias = {} if model.logit_bias is None else {"logit_bias": model.logit_bias.item()}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": width,
        "logit_scale_init_value": model.logit_scale.item(),
        "text_config": {"model_type": "clip_text_model", "projection_dim": width, **text},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": width, **vision},
        "torch_dtype": "float32",
        **bias,
    }


def preprocessor(images: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' ``CLIPImageProcessor`` for open_clip's description of the image transform."""
    size = images["size"]
    side = size if isinstance(size, int) else size[0]
    square = {"height": side, "width": side}
    shortest = images["resize_mode"] == "shortest"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side} if shortest else square,
        "resample": BILINEAR if images["interpolation"] == "bilinear" else BICUBIC,
        "do_center_crop": shortest,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(images["mean"]),
        "image_std": list(images["std"]),
    }


def tokenizer_files(tokenizer: Any) -> dict[str, dict[str, Any]]:
    """The JSON files of transformers' ``CLIPTokenizer``, with the token ids of ``tokenizer``."""
    own = {tokenizer.sot_token_id: START, tokenizer.eot_token_id: END}
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    names = {"tokenizer_class": "CLIPTokenizer", "processor_class": "CLIPProcessor"}
    return {
        "vocab.json": {own.get(number, token): number for token, number in tokenizer.encoder.items()},
        "special_tokens_map.json": special,
        "tokenizer_config.json": {**names, **special, "model_max_length": tokenizer.context_length},
    }


def merges(tokenizer: Any) -> str:
    """``merges.txt``: the pairs that are merged into one token, in order of their priority."""
    pairs = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    return "\n".join(["#version: 0.2", *(" ".join(pair) for pair in pairs), ""])


def _block_weights(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One tensor of a transformer's block: renamed, or split into its three projections."""
    tower = "vision_model" if name.startswith("visual.") else "text_model"
    number, part = name.split("resblocks.")[1].split(".", 1)
    place = f"{tower}.encoder.layers.{number}"
    if not part.startswith("attn.in_proj_"):
        yield f"{place}.{_BLOCK[part]}", tensor
        return
    for projection, third in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
        yield f"{place}.self_attn.{projection}.{part.removeprefix('attn.in_proj_')}", third


def _transformer(transformer: Any, norm: nn.LayerNorm) -> dict[str, Any]:
    block = transformer.resblocks[0]
    return {
        "hidden_size": transformer.width,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": _activation(block.mlp.gelu),
        "layer_norm_eps": norm.eps,
    }


def _activation(module: nn.Module) -> str | None:
    """transformers' name of an activation; ``None`` if it is not one of CLIP's."""
    if isinstance(module, QuickGELU):
        return "quick_gelu"
    if not isinstance(module, nn.GELU):
        return None
    return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"


def _problems(model: Any, tokenizer: Any) -> Iterator[str]:
    visual = model.visual
    if not isinstance(visual, VisionTransformer):
        yield f"an image tower that is a {_kind(visual)}"
    else:
        yield from _problems_of_images(visual)
        yield from _problems_of_blocks(visual.transformer, "image tower")
    if not isinstance(model, open_clip.CLIP):
        yield f"a text tower that is a {_kind(getattr(model, 'text', model))}"
        return
    if model.attn_mask is None:
        yield "a text tower that is not causal"
    if model.text_pool_type not in ("argmax", "eos"):
        yield f"texts read out by {model.text_pool_type}"
    if not isinstance(model.text_projection, nn.Parameter) and getattr(model.text_projection, "bias", None) is not None:
        yield "a text projection with a bias"
    if model.text_projection is None:
        yield "a text tower without a projection"
    if model.logit_scale.numel() != 1:
        yield "several logit scales"
    if type(tokenizer) is not open_clip.SimpleTokenizer or tokenizer.vocab_size != model.vocab_size:
        yield f"the tokenizer {_kind(tokenizer)}"
    yield from _problems_of_blocks(model.transformer, "text tower")


def _problems_of_images(visual: Any) -> Iterator[str]:
    images = visual.preprocess_cfg
    if visual.image_size[0] != visual.image_size[1] or visual.patch_size[0] != visual.patch_size[1]:
        yield "images or patches that are not square"
    if images["resize_mode"] == "longest":
        yield "images padded to their longest side"
    if visual.attn_pool is not None or visual.pool_type != "tok" or visual.final_ln_after_pool:
        yield "an image tower that is not read out at its class token"
    if isinstance(visual.ln_pre, nn.Identity):
        yield "an image tower without a norm before its blocks"
    if visual.proj is None:
        yield "an image tower without a projection"


def _problems_of_blocks(transformer: Any, tower: str) -> Iterator[str]:
    block = transformer.resblocks[0]
    if type(block) is not ResidualAttentionBlock or not isinstance(block.attn, nn.MultiheadAttention):
        yield f"the blocks of its {tower} ({_kind(block)})"
        return
    if not isinstance(block.ls_1, nn.Identity):
        yield f"the layer scale of its {tower}"
    if _activation(block.mlp.gelu) is None:
        yield f"the activation {_kind(block.mlp.gelu)} of its {tower}"


def _kind(module: Any) -> str:
    trunk = getattr(module, "trunk", None)  # open_clip's wrapper around a tower of timm
    return f"{type(trunk).__name__} of timm" if trunk is not None else type(module).__name__
