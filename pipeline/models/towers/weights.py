"""The digest of weights: whether two models are the same to the last bit."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


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
