"""From token features to words: the head of masked language modelling, which also writes captions."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class LanguageHead(nn.Module):
    """BERT's prediction head (arXiv 1810.04805): a layer, then the product with the embeddings of all tokens."""

    def __init__(self, settings: Any) -> None:
        """``settings`` are those of the text tower; the head is BERT's also behind CLIP's."""
        from transformers import BertConfig
        from transformers.models.bert.modeling_bert import BertPredictionHeadTransform

        super().__init__()
        own = settings if settings.model_type == "bert" else BertConfig(hidden_size=settings.hidden_size)
        self.transform = BertPredictionHeadTransform(own)
        nn.init.normal_(self.transform.dense.weight, std=settings.initializer_range)
        nn.init.zeros_(self.transform.dense.bias)
        self.bias = nn.Parameter(torch.zeros(settings.vocab_size))

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """Features [..., D] and the text tower's ``embeddings`` [V, D] to logits float32 [..., V]."""
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(self.transform(hidden.float()), embeddings.float(), self.bias)


def masked_token_loss(head: LanguageHead, hidden: Tensor, embeddings: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
    """The cross-entropy of the ``tokens`` int64 [B, K] at their ``places`` in ``hidden`` [B, M, D], summed; tokens of
    -100 are padding."""
    picked = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
    logits = head(picked, embeddings).flatten(0, 1)
    return functional.cross_entropy(logits, tokens.flatten(), ignore_index=-100, reduction="sum")
