"""BERT as GLIP reads texts, and the layers of BERT that follow each fusion; both are transformers' modules.

Devlin, Chang, Lee, Toutanova, 2018, arXiv 1810.04805. All tokens are attended to and aligned with pixels, also the
start, the end and full stops. Texts are padded to the longest of a batch: padding is never attended to, so the result
does not depend on it.
"""

import json
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import require
from pipeline.loaders.grounding_prompts import DRAWN, SpanTokenizer
from pipeline.models.glip.config import Config

BERT = "bert.json"
"""File of a checkpoint with the settings of the text tower."""


class BertText(nn.Module):
    """transformers' ``BertModel`` without its pooling layer; the state of the last layer."""

    def __init__(self, settings: Any) -> None:
        """``settings`` is a ``BertConfig``."""
        from transformers import BertModel

        super().__init__()
        self.bert = BertModel(settings, add_pooling_layer=False)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """int64 [B, M] and bool [B, M] to float [B, M, D]; rows of padding have values without meaning."""
        # BertModel.forward looks at the mask's contents, which waits for the GPU.
        hidden = self.bert.embeddings(tokens)
        found: Tensor = self.bert.encoder(hidden, attention_mask=attention_mask(mask)).last_hidden_state
        return found


def attention_mask(mask: Tensor) -> Tensor:
    """Bool [B, 1, M, M] of tokens [B, M] that are not padding, as BERT's layers expect it."""
    return mask[:, None, None, :].expand(-1, -1, mask.shape[1], -1)


def text_layer(settings: Any) -> nn.Module:
    """A new layer of BERT, after BERT's own rule for initial weights."""
    from transformers.models.bert.modeling_bert import BertLayer

    layer: nn.Module = BertLayer(settings)
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=settings.initializer_range)
            nn.init.zeros_(module.bias)
    return layer


def text_settings(config: Config, tokenizer: SpanTokenizer) -> Any:
    """The ``BertConfig`` of ``config.text``.

    Raises:
        SettingError: no BERT of that name, or one whose vocabulary is not the tokenizer's.
    """
    from transformers import AutoConfig

    dropout = {"hidden_dropout_prob": config.text_dropout, "attention_probs_dropout_prob": config.text_dropout}
    if config.text == DRAWN:
        width, layers, heads = config.small_text
        return _settings(
            vocab_size=tokenizer.vocab_size,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=config.grounding.text_tokens,
            pad_token_id=tokenizer.pad,
            **dropout,
        )
    allowed = "a folder or model id of a BERT in transformers' layout, or drawn"
    try:
        found: Any = AutoConfig.from_pretrained(config.text, attn_implementation="sdpa", **dropout)
    except (OSError, ValueError, KeyError) as error:
        require(False, "text", config.text, f"{allowed} ({str(error).splitlines()[0]})")
    require(found.model_type == "bert", "text", config.text, f"{allowed}; this is a {found.model_type} model")
    same = found.vocab_size >= tokenizer.vocab_size
    require(same, "text", config.text, f"a tokenizer of at most {found.vocab_size} tokens, the rows of its embedding")
    longest = found.max_position_embeddings
    require(config.grounding.text_tokens <= longest, "text_tokens", config.grounding.text_tokens, f"up to {longest}")
    return found


def stored_settings(text: str) -> Any:
    """The ``BertConfig`` of a checkpoint's :data:`BERT`."""
    return _settings(**json.loads(text))


def _settings(**values: Any) -> Any:
    from transformers import BertConfig

    make: Any = BertConfig
    return make(**values, attn_implementation="sdpa")


def settings_text(settings: Any) -> str:
    """The content of :data:`BERT`."""
    text: str = settings.to_json_string(use_diff=False)
    return text


def load_pretrained(tower: BertText, name: str) -> None:
    """Load transformers' weights of the BERT ``name`` into ``tower``."""
    from transformers import BertModel

    known: Any = BertModel.from_pretrained(name, add_pooling_layer=False)
    with torch.no_grad():
        tower.bert.load_state_dict(known.state_dict())
