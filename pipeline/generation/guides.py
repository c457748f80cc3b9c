"""A frozen CLIP that compares images with texts: it guides an optimised image, or judges it."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import require
from pipeline.generation.views import resized
from pipeline.loaders.images import ImageTransform
from pipeline.models.towers.prompts import count_tokens


class ImageTextEncoder(Protocol):
    """Any method with image and text towers, as :func:`pipeline.evaluation.models.load_model` gives them."""

    tokenizer: Callable[[list[str]], Tensor]

    def encode_image(self, image: Tensor) -> Tensor:
        """Pixels from 0 to 255 [B, 3, H, W] -> L2-normalised float [B, D]."""
        ...

    def encode_text(self, text: Tensor) -> Tensor:
        """Tokens, int64 [B, L] -> L2-normalised float [B, D]."""
        ...

    def transforms(self, train: bool) -> ImageTransform:
        """``train=False``: the evaluation transform, which has the size of the input."""
        ...


class Guide:
    """A frozen CLIP.

    Raises:
        SettingError: a model through which images have no gradient.
    """

    def __init__(self, model: ImageTextEncoder, name: str) -> None:
        self.model, self.name = model, name
        self.size = model.transforms(train=False).size
        if isinstance(model, nn.Module):
            model.eval().requires_grad_(False)
        some = torch.rand(1, 3, *self.size, device=self.device).requires_grad_()
        found = self.images(some)
        slope = torch.autograd.grad(found.sum(), some, allow_unused=True)[0] if found.requires_grad else None
        require(slope is not None and bool(slope.any()), "model", name, "a CLIP with gradients of its images")

    @property
    def device(self) -> torch.device:
        """That of the model."""
        some = self.model.parameters() if isinstance(self.model, nn.Module) else iter(())
        return next((parameter.device for parameter in some), torch.device("cpu"))

    def images(self, images: Tensor) -> Tensor:
        """Features of images float [B, 3, H, W] from 0 to 1, of any size: unit float32 [B, D], with gradients."""
        return self.model.encode_image(resized(images, self.size) * 255).float()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features of texts: unit float32 [B, D].

        Raises:
            SettingError: a text that is longer than the context, and would be cut.
        """
        self.check_lengths(texts)
        tokens = self.model.tokenizer(list(texts)).to(self.device)
        return functional.normalize(self.model.encode_text(tokens).float(), dim=-1)

    def check_lengths(self, texts: Sequence[str]) -> None:
        """Raises as :meth:`texts`; encodes nothing."""
        room = int(self.model.tokenizer([""]).shape[1])
        for text in texts:
            length = count_tokens(self.model.tokenizer, text)
            require(length <= room, "prompt", text, f"at most {room} tokens for {self.name}; it has {length}")
