"""A CLIP that teaches another one: its towers, frozen, on the same images and tokens."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import require
from pipeline.errors import SettingError
from pipeline.models.towers import openclip


class Teacher(nn.Module):
    """The CLIP at ``address``, an open_clip architecture with weights; always in evaluation mode.

    It is a module so that it moves with the student, but its weights are not part of the student's checkpoints.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, address: str) -> None:
        super().__init__()
        self.model: Any = openclip.create(*_parsed(address))
        self.cuts_text = openclip.end_of_text(self.model, openclip.tokenizer(_parsed(address)[0])) is not None
        images = openclip.preprocessing(self.model)
        size = images["size"]
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.register_buffer("mean", torch.tensor(images["mean"]).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(images["std"]).view(1, 3, 1, 1) * 255)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)

    def state_dict(self, *args: Any, destination: Any = None, **settings: Any) -> Any:
        """Nothing."""
        return {} if destination is None else destination

    @torch.no_grad()
    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 3, H, W] and int64 tokens [B, L] to float32 [B, D] of both; their products are the teacher's
        logits.

        Images of another size are resized; texts come from the student's tokenizer.
        """
        pixels = image.float()
        if pixels.shape[-2:] != self.size:
            pixels = functional.interpolate(pixels, self.size, mode="bicubic", antialias=True).clamp(0, 255)
        images = self.model.encode_image((pixels - self.mean) / self.std)
        if not self.cuts_text:
            text = functional.pad(text, (0, self.model.context_length - text.shape[1]))
        texts = openclip.encode_text(self.model, text)
        images, texts = (functional.normalize(features.float(), dim=-1) for features in (images, texts))
        return images * self.model.logit_scale.exp(), texts


def check(address: str, student: Mapping[str, Any], context_length: int | None) -> None:
    """Raise ``SettingError`` unless ``address`` is a CLIP with the inputs of a student with this model config.

    ``context_length`` is the student's, if it differs from its architecture's. Builds and downloads nothing.
    """
    architecture, weights = _parsed(address)
    openclip.check(architecture, weights)
    config = openclip.check_architecture(architecture)
    same = openclip.same_tokens(config, student)
    require(same, "teacher", address, "a CLIP with the tokenizer of the student")
    longest = int(config["text_cfg"].get("context_length", 77))
    length = context_length or int(student["text_cfg"].get("context_length", 77))
    require(length <= longest, "teacher", address, f"a CLIP for texts of {length} tokens; this one reads {longest}")


def _parsed(address: str) -> tuple[str, str | None]:
    found = openclip.parse_address(address)
    if found is None:
        raise SettingError("teacher", address, "ARCHITECTURE:WEIGHTS, such as ViT-L-14:laion2b_s32b_b82k")
    return found
