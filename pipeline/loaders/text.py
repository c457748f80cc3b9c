"""Captions to tokens."""

import json
from typing import Protocol

import torch
from torch import Tensor

from pipeline.errors import SettingError
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.sample import Sample


class Tokenizer(Protocol):
    """What open_clip's tokenizers are: texts to int64 [B, L], each row padded to the tower's context length."""

    def __call__(self, texts: list[str]) -> Tensor: ...


def caption_field(caption: str) -> str:
    """The sample field that a caption setting reads: ``txt`` -> ``txt``, ``json:title`` -> ``json``.

    Raises:
        SettingError: neither of these forms.
    """
    field, _, key = caption.partition(":")
    if caption == "txt" or (field == "json" and key):
        return field
    raise SettingError("caption", caption, "txt, or json:KEY for a key of the sample's json")


def read_caption(sample: Sample, caption: str = "txt") -> str:
    """The caption of ``sample`` from its ``.txt``, or from a key of its ``.json`` (``json:KEY``).

    Raises:
        UnreadableSample: the sample has none there.
    """
    field, _, key = caption.partition(":")
    content = sample.fields.get(field)
    if content is None:
        raise UnreadableSample(f"{sample.key} has no .{field}")
    if not key:
        return content.decode("utf-8", errors="replace")
    try:
        value = json.loads(content).get(key)
    except (ValueError, AttributeError) as error:
        raise UnreadableSample(f"{sample.key}.json is no JSON object") from error
    if not isinstance(value, str):
        raise UnreadableSample(f"{sample.key}.json has no text {key}")
    return value


def cut_text(tokens: Tensor, end_of_text: int | None) -> Tensor:
    """Cut int64 [B, L] behind the batch's longest text; ``None`` leaves the full width.

    Exact for a causal tower that pools at the first ``end_of_text`` token of a row: what follows it is never seen. A
    row without that token keeps the full width.
    """
    if end_of_text is None or tokens.numel() == 0:
        return tokens
    is_end = tokens == end_of_text
    ends = torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1), tokens.shape[1] - 1)
    return tokens[:, : int(ends.max()) + 1]
