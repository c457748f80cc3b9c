"""BERT as a text tower, and its tokenizer: the text side of Chinese-CLIP.

Devlin, Chang, Lee, Toutanova, 2018, arXiv 1810.04805; Yang, Pan, Lin, Men, Zhang, Zhou, Zhou, 2022, "Chinese CLIP",
arXiv 2211.01335. The weights have transformers' names. Left out: dropout, and the second kind of tokens (the first is
used for all).
"""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

UNKNOWN, START, END, PAD = "[UNK]", "[CLS]", "[SEP]", "[PAD]"
LONGEST_WORD = 100  # characters; longer words are unknown
INNER = "##"  # prefix of pieces inside of a word
_IDEOGRAPHS = (
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF)),
    *((0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0x2F800, 0x2FA1F)),
)


class WordPieceTokenizer:
    """BERT's tokenizer: words and ideographs, cut into the longest pieces that are in the list ``words``."""

    def __init__(self, words: Sequence[str], context_length: int, lower: bool = True) -> None:
        self.words, self.context_length, self.lower = tuple(words), context_length, lower
        self.vocab_size = len(self.words)
        self.encoder = {word: number for number, word in enumerate(self.words)}

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """int64 [B, context length]: start, pieces, end, padding; longer texts are cut before their end."""
        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        rows = torch.full((len(texts), length), self.encoder[PAD], dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            tokens = [self.encoder[START], *self.encode(text)[: length - 2], self.encoder[END]]
            row[: len(tokens)] = torch.tensor(tokens)
        return rows

    def encode(self, text: str) -> list[int]:
        """The tokens of ``text`` without start and end."""
        return [self.encoder[piece] for word in self._words(text) for piece in self._pieces(word)]

    def _words(self, text: str) -> list[str]:
        kept = (" " if char in "\t\n\r" else char for char in text if char in "\t\n\r" or _is_text(char))
        spaced = "".join(f" {char} " if _is_ideograph(char) else char for char in kept)
        if self.lower:
            parts = unicodedata.normalize("NFD", spaced)
            spaced = "".join(char for char in parts if unicodedata.category(char) != "Mn").lower()
        return "".join(f" {char} " if _is_punctuation(char) else char for char in spaced).split()

    def _pieces(self, word: str) -> list[str]:
        pieces, start = [], 0
        while start < len(word):
            prefix = INNER if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self.encoder), None)
            if end is None or len(word) > LONGEST_WORD:
                return [UNKNOWN]
            pieces.append(prefix + word[start:end])
            start = end
        return pieces


def _is_text(char: str) -> bool:
    return char not in "\x00\ufffd" and not unicodedata.category(char).startswith("C")


def _is_ideograph(char: str) -> bool:
    return any(first <= ord(char) <= last for first, last in _IDEOGRAPHS)


def _is_punctuation(char: str) -> bool:
    is_symbol = 33 <= ord(char) <= 126 and not char.isalnum()
    return is_symbol or unicodedata.category(char).startswith("P")


class BertTextTower(nn.Module):
    """A text tower for open_clip's ``CustomTextCLIP``, read out at the first token, with a linear projection.

    ``settings`` are transformers' of the text model.
    """

    def __init__(self, settings: Mapping[str, Any], width: int, context_length: int) -> None:
        super().__init__()
        self.context_length, self.vocab_size = context_length, settings["vocab_size"]
        self.pad, hidden = settings["pad_token_id"], settings["hidden_size"]
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(settings["vocab_size"], hidden),
                "position_embeddings": nn.Embedding(settings["max_position_embeddings"], hidden),
                "token_type_embeddings": nn.Embedding(settings["type_vocab_size"], hidden),
                "LayerNorm": nn.LayerNorm(hidden, eps=settings["layer_norm_eps"]),
            }
        )
        blocks = nn.ModuleList(_BertBlock(settings) for _ in range(settings["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layer": blocks})
        self.projection = nn.Linear(hidden, width, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, text: Tensor) -> Tensor:
        """Tokens int64 [B, L] to features [B, D], not normalised; padding is ignored."""
        parts: Any = self.embeddings
        blocks: Any = self.encoder["layer"]
        positions = parts["position_embeddings"].weight[: text.shape[1]]
        hidden = parts["word_embeddings"](text) + positions + parts["token_type_embeddings"].weight[0]
        hidden, seen = parts["LayerNorm"](hidden), (text != self.pad)[:, None, None]
        for block in blocks:
            hidden = block(hidden, seen)
        features: Tensor = self.projection(hidden[:, 0])
        return features


class _BertBlock(nn.Module):
    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        width, inner, eps = settings["hidden_size"], settings["intermediate_size"], settings["layer_norm_eps"]
        self.heads = settings["num_attention_heads"]
        projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": projections, "output": _residual(width, width, eps)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = _residual(inner, width, eps)

    def forward(self, hidden: Tensor, seen: Tensor) -> Tensor:
        own: Any = self.attention
        parts = [own["self"][name](hidden).unflatten(-1, (self.heads, -1)) for name in ("query", "key", "value")]
        queries, keys, values = (part.transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
        mixed = own["output"]["dense"](mixed.transpose(1, 2).flatten(2))
        hidden = own["output"]["LayerNorm"](hidden + mixed)
        inner = self.output["dense"](functional.gelu(self.intermediate["dense"](hidden)))
        after: Tensor = self.output["LayerNorm"](hidden + inner)
        return after


def _residual(inner: int, width: int, eps: float) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inner, width), "LayerNorm": nn.LayerNorm(width, eps=eps)})
