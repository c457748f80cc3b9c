"""The interface of evaluated models: images and texts in one space, and the tokenizer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import require
from pipeline.loaders.images import ImageTransform
from pipeline.loaders.text import cut_text
from pipeline.models.towers.modes import evaluation_mode

TEXTS_AT_ONCE = 512


class Encoder(Protocol):
    """An image-text method, or any other object with these three members."""

    tokenizer: Callable[[list[str]], Tensor]

    def encode_image(self, image: Tensor) -> Tensor:
        """uint8 ``[B, 3, H, W]`` -> L2-normalised float ``[B, D]``."""
        ...

    def encode_text(self, text: Tensor) -> Tensor:
        """Tokens, int64 ``[B, L]`` -> L2-normalised float ``[B, D]``."""
        ...


class Evaluable(Encoder, Protocol):
    """An encoder with an image transform; every image-text method is one."""

    def transforms(self, train: bool) -> ImageTransform:
        """``train=False``: the evaluation transform."""
        ...


@contextmanager
def inference(model: object, precision: str = "fp32") -> Iterator[torch.device]:
    """Evaluation mode without gradients; yields the device of the model and restores the mode of every part at the end.

    ``model`` is a module, or an object that has modules as attributes, such as the depth that words give.
    ``precision`` "bf16" computes features in bfloat16 where the operation allows; similarities stay float32.
    """
    modules = modules_of(model)
    device = next((one.device for module in modules for one in module.parameters()), torch.device("cpu"))
    with (
        evaluation_mode(*modules),
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        yield device


def modules_of(model: object) -> list[nn.Module]:
    """``model`` itself if it is a module, otherwise the modules among its attributes."""
    if isinstance(model, nn.Module):
        return [model]
    return [value for value in getattr(model, "__dict__", {}).values() if isinstance(value, nn.Module)]


def encode_tokens(model: Encoder, tokens: Tensor, device: torch.device) -> Tensor:
    """Features of many texts, a chunk at a time: int64 ``[N, L]`` -> float32 ``[N, D]`` on ``device``.

    Padding after the longest text of a chunk is cut off if the model ignores it.
    """
    end = getattr(model, "end_of_text", None)
    parts = (cut_text(chunk, end).to(device) for chunk in tokens.split(TEXTS_AT_ONCE))
    chunks = [model.encode_text(part).float() for part in parts]
    return functional.normalize(torch.cat(chunks), dim=-1)


def as_encoder(model: object, address: str) -> Evaluable:
    """``model``, if it encodes images and texts; else raises ``SettingError``."""
    both = all(callable(getattr(model, name, None)) for name in ("encode_image", "encode_text"))
    require(both, "checkpoint", address, "a model that encodes images and texts")
    return cast(Evaluable, model)
