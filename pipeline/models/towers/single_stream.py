"""One transformer over the tokens of a text and the cells of an image's grid.

VisualBERT (Li, Yatskar, Yin, Hsieh, Chang, 2019, arXiv 1908.03557) with the grid input of CLIP-ViL (arXiv 2107.06383,
section 3.2): transformers' ``BertModel`` reads [text; grid], and every token attends to all others. A cell's input is a
linear layer on its features, plus an embedding of its row and one of its column, normalised. The authors add the two
embeddings before the linear layer, which gives the same sums.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import require
from pipeline.loaders.grounding import MULTIPLE

POSITIONS = 64
"""Fewest positions of a small transformer, so that one begins with the weights of another for longer texts."""


class SingleStream(nn.Module):
    """A BERT with a second kind of input; ``settings`` is a ``BertConfig``."""

    def __init__(self, settings: Any, width: int, positions: int) -> None:
        """``width`` is that of a cell's features, ``positions`` the largest number of rows and of columns."""
        from transformers import BertModel

        super().__init__()
        hidden = settings.hidden_size
        self.bert = BertModel(settings, add_pooling_layer=True)
        self.cell = nn.Linear(width, hidden)
        self.row, self.column = nn.Embedding(positions, hidden), nn.Embedding(positions, hidden)
        self.norm = nn.LayerNorm(hidden, eps=settings.layer_norm_eps)
        self.dropout = nn.Dropout(settings.hidden_dropout_prob)
        for module in (self.cell, self.row, self.column):
            nn.init.normal_(module.weight, std=settings.initializer_range)
        nn.init.zeros_(self.cell.bias)

    @property
    def words(self) -> Tensor:
        """The vector of each token number, [V, hidden]."""
        weight: Tensor = self.bert.embeddings.word_embeddings.weight
        return weight

    def forward(
        self, tokens: Tensor, token_mask: Tensor, grid: Tensor, cells: Tensor, cell_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The states of all tokens and cells, float [B, M + L, hidden], and the pooled first token, [B, hidden].

        Tokens int64 [B, M]; the features of cells, float [B, L, D], and their rows and columns, int64 [B, L, 2]. Masks
        are bool, False for padding, which nothing attends to.
        """
        embedded = self.embed(tokens, grid, cells)
        mask = attention_mask(torch.cat([token_mask, cell_mask], dim=1))
        bert: Any = self.bert
        hidden = bert.encoder(embedded, attention_mask=mask).last_hidden_state
        return hidden, bert.pooler(hidden)

    def embed(self, tokens: Tensor, grid: Tensor, cells: Tensor) -> Tensor:
        """The input of the first layer, float [B, M + L, hidden]."""
        projected = self.cell(grid.to(self.cell.weight.dtype))
        visual = projected + self.row(cells[..., 0]) + self.column(cells[..., 1])
        return torch.cat([self.bert.embeddings(tokens), self.dropout(self.norm(visual))], dim=1)

    @torch.no_grad()
    def attention(self, tokens: Tensor, token_mask: Tensor, grid: Tensor, cells: Tensor, cell_mask: Tensor) -> Tensor:
        """How much the first token attends to each cell in the last layer, the mean of its heads: float [B, L].

        Inputs as above. The rest of each row's sum of 1 goes to tokens of the text.
        """
        layers: Any = self.bert.encoder.layer
        hidden, mask = self.embed(tokens, grid, cells), torch.cat([token_mask, cell_mask], dim=1)
        for layer in layers[:-1]:
            hidden = layer(hidden, attention_mask(mask))
        own = layers[-1].attention.self
        query = own.query(hidden[:, :1]).unflatten(-1, (own.num_attention_heads, -1))
        keys = own.key(hidden).unflatten(-1, (own.num_attention_heads, -1))
        scores = torch.einsum("bqhd,bkhd->bhk", query, keys) / math.sqrt(keys.shape[-1])
        weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(dim=-1).mean(dim=1)
        found: Tensor = weights[:, tokens.shape[1] :]
        return found


def attention_mask(mask: Tensor) -> Tensor:
    """Bool [B, 1, N, N] of inputs [B, N] that are not padding, as BERT's layers expect it."""
    return mask[:, None, None, :].expand(-1, -1, mask.shape[1], -1)


def bert_settings(
    text: str, small: tuple[int, int, int], vocabulary: int, pad: int, tokens: int, dropout: float
) -> Any:
    """The ``BertConfig`` of ``text``, a folder or a model id of transformers; with ``small`` a new one instead.

    ``small`` is (width, layers, heads), or zeros for none.

    Raises:
        SettingError: no BERT of that name, or one for other or fewer tokens.
    """
    from transformers import AutoConfig, BertConfig

    drops: dict[str, Any] = {
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "attn_implementation": "sdpa",
    }
    if any(small):
        width, layers, heads = small
        return BertConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            initializer_range=width**-0.5,  # BERT's 0.02 is for 768; at 128 attention is uniform for thousands of steps
            max_position_embeddings=max(POSITIONS, -(-tokens // MULTIPLE) * MULTIPLE),
            pad_token_id=pad,
            **drops,
        )
    allowed = "a folder or model id of a BERT in transformers' layout, or drawn-questions"
    try:
        found: Any = AutoConfig.from_pretrained(text)
    except (OSError, ValueError, KeyError) as error:
        require(False, "text", text, f"{allowed} ({str(error).splitlines()[0]})")
    require(found.model_type == "bert", "text", text, f"{allowed}; this is a {found.model_type} model")
    require(found.vocab_size >= vocabulary, "text", text, f"a tokenizer of at most {found.vocab_size} tokens")
    fits = tokens <= found.max_position_embeddings
    require(fits, "text_tokens", tokens, f"up to {found.max_position_embeddings}")
    return BertConfig(**{**found.to_dict(), **drops})
