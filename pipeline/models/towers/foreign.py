"""Weights of other programs: what a file holds, under open_clip's names.

    .safetensors                 tensors by name
    .pt, .pth, .bin              a dictionary of tensors, or one inside of ``state_dict``, ``model`` and the like
    OpenAI's TorchScript         its parameters, without running its code; or a state dict with its three extra buffers
    .safetensors.index.json      the tensors of all files that it lists
    transformers' CLIPModel      renamed, see hugging_face_import.py

Pickles are read with torch's ``weights_only``: they cannot run code either.
"""

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from torch import Tensor, nn

from pipeline.errors import DataError
from pipeline.models.towers import hugging_face_import
from pipeline.models.towers.torch_script import is_torch_script, read_script_tensors
from pipeline.models.towers.weights import read_tensors

OPENAI = ("input_resolution", "context_length", "vocab_size")  # buffers that only OpenAI's own class has
INSIDE = ("state_dict", "model", "model_state_dict", "module")
PREFIXES = ("module.", "_orig_mod.", "model.")
INDEX = ".index.json"
SHOWN = 3


@dataclass(frozen=True)
class ForeignWeights:
    """Tensors under open_clip's names. ``quick_gelu`` says whether they need QuickGELU; ``None`` if nothing says so."""

    tensors: Mapping[str, Tensor]
    quick_gelu: bool | None = None


def read_foreign(path: Path) -> ForeignWeights:
    """The weights in the file at ``path``, on the CPU.

    Raises:
        DataError: damaged, or not a file of weights; the message says what was found.
    """
    tensors = _unwrapped(_read(path), path)
    is_openai = all(name in tensors for name in OPENAI)
    tensors = {name: tensor for name, tensor in tensors.items() if not (is_openai and name in OPENAI)}
    if hugging_face_import.has_names_of(tensors):
        tensors = hugging_face_import.to_open_clip(tensors)
    return ForeignWeights(tensors, True if is_openai else None)


def load_foreign(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Load ``tensors`` into an open_clip model, with interpolated position embeddings where sizes differ.

    The bias of a sigmoid loss is left out for a model without one.

    Raises:
        RuntimeError: missing, unknown or wrongly shaped tensors; the message names some.
    """
    state: dict[str, Tensor] = convert_state_dict(model, dict(tensors))
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    if model.logit_bias is None:
        state.pop("logit_bias", None)  # features do not depend on it
    else:
        state.setdefault("logit_bias", torch.zeros(()))
    for name in ("logit_scale", "logit_bias"):
        if name in state and state[name].numel() == 1:
            state[name] = state[name].reshape(getattr(model, name).shape)
    own = model.state_dict()
    state = {name: tensor for name, tensor in state.items() if not name.endswith("position_ids") or name in own}
    _resize(state, model, own)
    problems = [
        *_some("without ", [name for name in own if name not in state]),
        *_some("with the unknown ", [name for name in state if name not in own]),
        *_some(
            "with another shape of ", [name for name in state if name in own and state[name].shape != own[name].shape]
        ),
    ]
    if problems:
        raise RuntimeError(" and ".join(problems))
    nn.Module.load_state_dict(model, state)


def _resize(state: dict[str, Tensor], model: nn.Module, own: Mapping[str, Tensor]) -> None:
    """Interpolate position embeddings of the same width; others are reported as another shape."""
    for names, resize in (
        (("visual.positional_embedding",), resize_pos_embed),
        (("positional_embedding", "text.positional_embedding"), resize_text_pos_embed),
    ):
        for name in names:
            if name in state and name in own and state[name].shape[-1] == own[name].shape[-1]:
                try:
                    resize(state, model)
                except RuntimeError:  # not a square of patches
                    continue


def _some(fault: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{fault}{', '.join(names[:SHOWN])}{more}"] if names else []


def _read(path: Path) -> object:
    if path.name.endswith(INDEX):
        files = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        return {name: tensor for file in files for name, tensor in read_tensors(path.parent / Path(file).name).items()}
    if path.suffix == ".safetensors":
        return read_tensors(path)
    if is_torch_script(path):
        return read_script_tensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        problem = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path} is no file of plain weights ({problem})") from error


def _unwrapped(found: object, path: Path) -> dict[str, Tensor]:
    """The tensors of a dictionary, which may be inside of another, without the prefixes of wrappers."""
    while isinstance(found, Mapping) and (
        inner := next((found[key] for key in INSIDE if _is_inside(found, key)), None)
    ):
        found = inner
    if not isinstance(found, Mapping):
        raise DataError(f"{path} holds a {type(found).__name__}, not tensors by name")
    tensors = {str(name): tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise DataError(f"{path} holds no tensors, but {', '.join(map(str, list(found)[:SHOWN])) or 'nothing'}")
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _is_inside(found: Mapping[Any, Any], key: str) -> bool:
    return isinstance(found.get(key), Mapping)
