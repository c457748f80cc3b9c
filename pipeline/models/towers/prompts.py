"""Prompts of class names, and the vector of a class: the mean of its prompts.

Radford et al. 2021, arXiv 2103.00020, section 3.1.4: the unit features of a class's name in many prompts are averaged,
and the mean is normalised. Every method and evaluation writes a name into a prompt by :func:`fill_template`.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional


def readable_name(name: str) -> str:
    """A class name as prompts have it: ``apple pie`` for ``apple_pie``; one blank between words.

    Labels are compared by the stored name, so this is for prompts alone.
    """
    return " ".join(name.replace("_", " ").split())


def fill_template(template: str, name: str) -> str:
    """The prompt of a class: ``template`` with the :func:`readable_name` in place of ``{}``."""
    return template.replace("{}", readable_name(name))


def average_prompts(features: Tensor, prompts: int) -> Tensor:
    """Unit vectors [C, D] of classes from the unit features [C x prompts, D] of their prompts, class after class."""
    means = features.reshape(len(features) // prompts, prompts, -1).mean(dim=1)
    return functional.normalize(means, dim=-1)


def count_tokens(tokenizer: Any, text: str) -> int:
    """The number of tokens of ``text`` without truncation, start and end included."""
    encode = getattr(tokenizer, "encode", None)  # open_clip's own; others wrap a tokenizer of transformers
    return len(tokenizer.tokenizer(text)["input_ids"]) if encode is None else len(encode(text)) + 2
