"""A CLIP of a few numbers for the loop: its image feature is the mean colour, its texts are names of colours."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.generation.guides import Guide
from pipeline.loaders.images import ImageTransform

COLOURS = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0)}


class ColourTokenizer:
    """Numbers of the words of a text, five at most with start and end."""

    def encode(self, text: str) -> list[int]:
        return [list(COLOURS).index(word) for word in text.split()]

    def __call__(self, texts: list[str]) -> Tensor:
        return torch.tensor([[*self.encode(text), 0, 0, 0, 0, 0][:5] for text in texts])


class ColourClip(nn.Module):
    """Unit vectors of three numbers, for images of ``side`` pixels."""

    def __init__(self, side: int = 8) -> None:
        super().__init__()
        self.side, self.tokenizer = side, ColourTokenizer()
        self.weight = nn.Parameter(torch.eye(3))

    def transforms(self, train: bool) -> ImageTransform:
        return ImageTransform(size=(self.side, self.side))

    def encode_image(self, image: Tensor) -> Tensor:
        assert tuple(image.shape[1:]) == (3, self.side, self.side)
        return functional.normalize(image.float().mean((2, 3)) @ self.weight + 1e-3, dim=1)

    def encode_text(self, text: Tensor) -> Tensor:
        return torch.tensor(list(COLOURS.values()))[text[:, 0]]


def colour_guide(side: int = 8) -> Guide:
    """The frozen one."""
    return Guide(ColourClip(side), "colours")
