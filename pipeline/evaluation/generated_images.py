"""What a judge sees in generated images: whether each fits its own prompt best, and which class it shows.

- R-precision with R = 1 (Xu et al. 2018, AttnGAN, arXiv 1711.10485, section 4): the share of images that are closer to
  their own prompt than to any other text. The paper has 99 random other texts for an image.
- Recognition of sketches by a zero-shot classifier, by their number of strokes (Vinker et al. 2022, CLIPasso, arXiv
  2202.05822, table 1).

The judge must not be a model that the images were optimised for: it would only confirm itself.
"""

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pipeline.models.towers.prompts import readable_name

SKETCH_TEMPLATES = ("a sketch of a {}.", "a drawing of a {}.")


def texts_before(images: Tensor, texts: Tensor, own: Tensor) -> Tensor:
    """How many texts are at least as close to an image as its own one: int64 [N], 0 for the first place.

    ``images`` are unit features [N, D], ``texts`` [T, D], ``own`` int64 [N] the number of each image's own text. Equal
    texts count against the image, and so do features that are not finite.
    """
    scores = images @ texts.T
    right = scores.gather(1, own[:, None])
    others = torch.arange(len(texts), device=own.device) != own[:, None]
    found: Tensor = (~(scores < right) & others).sum(1)
    return found


def r_precision(before: Sequence[int]) -> float:
    """The share of images whose own text is first, by :func:`texts_before`; NaN without images."""
    return sum(place == 0 for place in before) / len(before) if before else float("nan")


def class_in(texts: Iterable[str], classes: Sequence[str]) -> str | None:
    """The class whose name occurs in the texts as whole words; the longest if names contain each other.

    ``None`` if no class occurs, or two that do not contain each other.
    """
    said = " ".join(f" {_plain(text)} " for text in texts)
    found = sorted((name for name in classes if f" {_plain(name)} " in said), key=lambda name: -len(_plain(name)))
    if not found or any(f" {_plain(name)} " not in f" {_plain(found[0])} " for name in found):
        return None
    return found[0]


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w]+", " ", readable_name(text)).lower().split())
