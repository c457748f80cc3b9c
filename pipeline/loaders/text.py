"""Captions to tokens."""

import copy
import re
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import SettingError
from pipeline.loaders.samples import UnreadableSample, json_of_sample
from pipeline.shards.sample import Sample
from pipeline.shards.text import decoded

REMEMBERED_WORDS = 100_000
LONGEST_REMEMBERED = 64  # characters: a longer word is an address or an attack, and occurs once
# ftfy and html change nothing in such a text: printable ASCII without "&", and ordinary white space.
CLEAN = re.compile(r"[ !-%'-~\t\n]*")


class Tokenizer(Protocol):
    """The interface of open_clip's tokenizers: texts to int64 [B, L], each row padded to the tower's context length."""

    def __call__(self, texts: list[str]) -> Tensor: ...


def faster(tokenizer: Tokenizer) -> Tokenizer:
    """A faster tokenizer with the same tokens, where one is known; else ``tokenizer`` itself."""
    kind = type(tokenizer)
    if (kind.__module__, kind.__name__) != ("open_clip.tokenizer", "SimpleTokenizer"):
        return tokenizer
    # Texts with other clean-up functions or reductions than truncation use open_clip's tokenizer.
    known: Any = tokenizer
    plain = known.clean_fn.__name__ == "_clean_lower" and known.reduction_fn is None
    return WordTokenizer(known) if plain and (known.context_length or 0) >= 2 else tokenizer


class WordTokenizer:
    """open_clip's byte-pair tokenizer with a cache of words and a fast path for plain ASCII.

    Its pattern never matches across white space, so a text's tokens are the concatenated tokens of its words.
    ``tokenizer`` is not changed.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = copy.copy(tokenizer)
        self._special = {text: text for text in map(tokenizer.decoder.get, tokenizer.all_special_ids)}
        self._words: dict[str, list[int]] = {}

    def __call__(self, texts: list[str]) -> Tensor:
        """int64 [B, context length]."""
        known = self._tokenizer
        tokens = np.zeros((len(texts), known.context_length), np.int64)
        for row, text in zip(tokens, texts, strict=True):
            found = self._encode(text, known.context_length - 2)
            row[: len(found) + 2] = [known.sot_token_id, *found, known.eot_token_id]
        return torch.from_numpy(tokens)

    def _encode(self, text: str, limit: int) -> list[int]:
        clean = " ".join(text.split()).lower() if CLEAN.fullmatch(text) else self._tokenizer.clean_fn(text)
        found: list[int] = []
        for word in clean.split(" "):
            tokens = self._words.get(word)
            found.extend(self._learn(word) if tokens is None else tokens)
            if len(found) >= limit:
                break
        return found[:limit]

    def _learn(self, word: str) -> list[int]:
        known = self._tokenizer
        known.cache = dict(self._special)  # open_clip would keep every part of every word here
        tokens: list[int] = []
        for part in known.pat.findall(word):
            letters = "".join(known.byte_encoder[byte] for byte in part.encode("utf-8"))
            tokens.extend(known.encoder[piece] for piece in known.bpe(letters).split(" "))
        if len(self._words) >= REMEMBERED_WORDS:
            self._words.clear()
        if len(word) <= LONGEST_REMEMBERED:
            self._words[word] = tokens
        return tokens


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Where a run reads its texts from.

    Raises:
        SettingError: ``caption`` is neither ``txt`` nor ``json:KEY``.
    """

    caption: str = "txt"
    """Field of the captions: txt, or json:KEY for a text or a list of texts."""
    tokens: str = ""
    """Sidecar with the captions' tokens; if empty, captions are tokenised during loading."""

    def __post_init__(self) -> None:
        caption_field(self.caption)


def caption_field(caption: str) -> str:
    """The sample field that a caption setting reads: ``txt`` -> ``txt``, ``json:title`` -> ``json``.

    Raises:
        SettingError: neither of these two forms.
    """
    field, _, key = caption.partition(":")
    if caption == "txt" or (field == "json" and key):
        return field
    raise SettingError("caption", caption, "txt, or json:KEY for a key of the sample's json")


def read_caption(sample: Sample, caption: str = "txt") -> str:
    """The caption of ``sample`` from its ``.txt``, or from a key of its ``.json`` (``json:KEY``).

    Raises:
        UnreadableSample: the sample has no caption there.
    """
    field, _, key = caption.partition(":")
    if field not in sample.fields:
        raise UnreadableSample(f"{sample.key} has no .{field}")
    if not key:
        return decoded(sample.fields[field])
    value = json_of_sample(sample).get(key)
    if not isinstance(value, str):
        raise UnreadableSample(f"{sample.key}.json has no text {key}")
    return value


def read_texts(sample: Sample, caption: str = "txt") -> list[str]:
    """The caption of :func:`read_caption`, or the texts of a list under the json's key; one or more.

    Raises:
        UnreadableSample: the sample has no caption there.
    """
    key = caption.partition(":")[2]
    value = json_of_sample(sample).get(key) if key else None
    if not isinstance(value, list):
        return [read_caption(sample, caption)]
    texts = [text for text in value if isinstance(text, str) and text.strip()]
    if not texts:
        raise UnreadableSample(f"{sample.key}.json has no text in its list {key}")
    return texts


def read_captions(sample: Sample, caption: str = "auto") -> list[str]:
    """The captions of ``sample`` that are not empty, one or more.

    ``auto`` takes the list ``captions`` of its json where there is one, else its ``.txt``; the rest is as in
    :func:`read_caption`.

    Raises:
        UnreadableSample: the sample has none.
    """
    several = json_of_sample(sample).get("captions") if caption == "auto" else None
    texts = several if isinstance(several, list) else [read_caption(sample, "txt" if caption == "auto" else caption)]
    found = [text for text in texts if isinstance(text, str) and text.strip()]
    if not found:
        raise UnreadableSample(f"{sample.key} has no caption")
    return found


def cut_text(tokens: Tensor, end_of_text: int | None) -> Tensor:
    """Cut int64 [B, L] after the batch's longest text; ``None`` keeps the full width.

    Exact for a causal tower that pools at the first ``end_of_text`` token of a row: later tokens have no effect. A
    row without that token keeps the full width.
    """
    if end_of_text is None or tokens.numel() == 0:
        return tokens
    is_end = tokens == end_of_text
    ends = torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1), tokens.shape[1] - 1)
    return tokens[:, : int(ends.max()) + 1]
