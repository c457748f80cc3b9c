"""The text towers of GLIP, and the layers that follow each fusion; both are transformers' modules.

BERT (Devlin, Chang, Lee, Toutanova, 2018, arXiv 1810.04805), or CLIP's text tower (arXiv 2103.00020) as GLIPv2's public
code reads texts with it: every token sees all others, and positions beyond CLIP's 77 are interpolated. All tokens are
attended to and aligned with pixels, also the start, the end and full stops. Texts are padded to the longest of a batch:
padding is never attended to, so the result does not depend on it.
"""

import json
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import require
from pipeline.loaders.grounding_prompts import DRAWN, SpanTokenizer
from pipeline.models.glip.config import Config

SETTINGS = "bert.json"
"""File of a checkpoint with the settings of the text tower."""
CLIP = "clip_text_model"
"""transformers' name of CLIP's text tower."""


class GroundingTextTower(nn.Module, ABC):
    """A tower from token numbers to the states of its last layer."""

    @property
    @abstractmethod
    def embeddings(self) -> nn.Module:
        """From token numbers [B, M] to vectors [B, M, D], with their positions."""

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """The layers, the first one first."""

    @property
    @abstractmethod
    def words(self) -> Tensor:
        """The vector of each token number, [V, D]."""

    @abstractmethod
    def encode(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """Vectors [B, M, D] to states, float [B, M, D]; ``mask`` bool [B, 1, M, M] says which tokens see which."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """int64 [B, M] and bool [B, M] to float [B, M, D]; rows of padding have values without meaning."""
        return self.encode(self.embeddings(tokens), attention_mask(mask))


class BertText(GroundingTextTower):
    """transformers' ``BertModel`` without its pooling layer."""

    def __init__(self, settings: Any) -> None:
        """``settings`` is a ``BertConfig``."""
        from transformers import BertModel

        super().__init__()
        self.bert = BertModel(settings, add_pooling_layer=False)

    @property
    def embeddings(self) -> nn.Module:
        """BERT's."""
        return self.bert.embeddings

    @property
    def layers(self) -> nn.ModuleList:
        """BERT's."""
        return self.bert.encoder.layer

    @property
    def words(self) -> Tensor:
        """BERT's."""
        return self.bert.embeddings.word_embeddings.weight

    def encode(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """See the base class."""
        # BertModel.forward looks at the mask's contents, which waits for the GPU.
        found: Tensor = self.bert.encoder(embedded, attention_mask=mask).last_hidden_state
        return found


class ClipText(GroundingTextTower):
    """transformers' ``CLIPTextModel`` without its causal mask and its pooling."""

    def __init__(self, settings: Any) -> None:
        """``settings`` is a ``CLIPTextConfig``."""
        from transformers import CLIPTextModel

        super().__init__()
        self.clip = CLIPTextModel(settings)

    @property
    def embeddings(self) -> nn.Module:
        """CLIP's."""
        return self.clip.embeddings

    @property
    def layers(self) -> nn.ModuleList:
        """CLIP's."""
        return self.clip.encoder.layers

    @property
    def words(self) -> Tensor:
        """CLIP's."""
        return self.clip.embeddings.token_embedding.weight

    def encode(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """See the base class."""
        found = self.clip.encoder(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        normalised: Tensor = self.clip.final_layer_norm(found)
        return normalised


def make_text_tower(settings: Any) -> GroundingTextTower:
    """The tower of a ``BertConfig`` or a ``CLIPTextConfig``, with new weights."""
    return ClipText(settings) if settings.model_type == CLIP else BertText(settings)


def attention_mask(mask: Tensor) -> Tensor:
    """Bool [B, 1, M, M] of tokens [B, M] that are not padding, as BERT's layers expect it."""
    return mask[:, None, None, :].expand(-1, -1, mask.shape[1], -1)


def text_layer(settings: Any) -> nn.Module:
    """A new layer of the text tower's kind, after BERT's rule for initial weights."""
    from transformers.models.bert.modeling_bert import BertLayer
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    layer: nn.Module = CLIPEncoderLayer(settings) if settings.model_type == CLIP else BertLayer(settings)
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=settings.initializer_range)
            nn.init.zeros_(module.bias)
    return layer


def text_settings(config: Config, tokenizer: SpanTokenizer) -> Any:
    """The ``BertConfig`` or ``CLIPTextConfig`` of ``config.text``.

    Raises:
        SettingError: no such tower of that name, or one whose vocabulary is not the tokenizer's.
    """
    from transformers import AutoConfig

    dropout: dict[str, Any] = {
        name: config.text_dropout
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout")
    }
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
    allowed = "a folder or model id of a BERT or CLIP in transformers' layout, or drawn"
    try:
        found: Any = AutoConfig.from_pretrained(config.text)
    except (OSError, ValueError, KeyError) as error:
        require(False, "text", config.text, f"{allowed} ({str(error).splitlines()[0]})")
    found = found.text_config if found.model_type == "clip" else found
    known = found.model_type in ("bert", CLIP)
    require(known, "text", config.text, f"{allowed}; this is a {found.model_type} model")
    same = found.vocab_size >= tokenizer.vocab_size
    require(same, "text", config.text, f"a tokenizer of at most {found.vocab_size} tokens, the rows of its embedding")
    longest = config.grounding.text_tokens
    if found.model_type == CLIP:
        positions = max(longest, found.max_position_embeddings)
        return _settings(**{**found.to_dict(), "max_position_embeddings": positions, **dropout})
    fits = longest <= found.max_position_embeddings
    require(fits, "text_tokens", longest, f"up to {found.max_position_embeddings}")
    return _settings(**{**found.to_dict(), **dropout})


def stored_settings(text: str) -> Any:
    """The settings in a checkpoint's :data:`SETTINGS`."""
    return _settings(**json.loads(text))


def _settings(**values: Any) -> Any:
    from transformers import BertConfig, CLIPTextConfig

    make: Any = CLIPTextConfig if values.get("model_type") == CLIP else BertConfig
    return make(**{**values, "attn_implementation": "sdpa"})


def settings_text(settings: Any) -> str:
    """The content of :data:`SETTINGS`."""
    text: str = settings.to_json_string(use_diff=False)
    return text


def load_pretrained(tower: GroundingTextTower, name: str) -> None:
    """Load transformers' weights of the BERT or CLIP ``name`` into ``tower``."""
    from transformers import BertModel, CLIPTextModel

    with torch.no_grad():
        if isinstance(tower, ClipText):
            known: Any = CLIPTextModel.from_pretrained(name)
            state, place = known.state_dict(), "embeddings.position_embedding.weight"
            state[place] = resized_positions(state[place], len(tower.clip.state_dict()[place]))
            tower.clip.load_state_dict(state)
        elif isinstance(tower, BertText):
            known = BertModel.from_pretrained(name, add_pooling_layer=False)
            tower.bert.load_state_dict(known.state_dict())


def resized_positions(positions: Tensor, count: int) -> Tensor:
    """Vectors [P, D] of ``count`` positions, linearly interpolated as in GLIPv2's public code."""
    if len(positions) == count:
        return positions
    return functional.interpolate(positions.T[None], size=count, mode="linear", align_corners=False)[0].T
