"""Weights in files, and their digest, which identifies a model to the last bit."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import DataError


def add_weights(digest: Any, state: Mapping[str, Tensor]) -> None:
    """Feed names, types, shapes and bytes of all tensors into a hashlib ``digest``, in the order of their names."""
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(memoryview(plain))


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 hex of all tensors by name."""
    digest = hashlib.sha256()
    add_weights(digest, state)
    return digest.hexdigest()


def digest_of(model: object, *settings: str) -> str:
    """SHA-256 hex of all weights and buffers by name, of the tokenizer's kind if there is one, and of ``settings``."""
    digest = hashlib.sha256(repr([type(getattr(model, "tokenizer", None)).__name__, *settings]).encode())
    state = model.state_dict() if isinstance(model, nn.Module) else {}
    add_weights(digest, state)
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; raises ``DataError`` if it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
