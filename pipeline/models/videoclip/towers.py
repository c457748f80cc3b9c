"""VideoCLIP's two towers: BERTs over features of frames and over tokens, each read out as the mean of its states.

Both are transformers' ``BertModel``. The first position, [CLS], takes part in the attention but not in the mean; the
last one, [SEP], does. A clip's [SEP] has the position after the longest clip, however short the clip is.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, BertConfig, BertModel

from pipeline.config import require
from pipeline.errors import SettingError
from pipeline.loaders.grounding_prompts import DRAWN, SpanTokenizer

CLS, SEP = 0, 1  # rows of the frames' BERT, which has no other words


class FrameBert(nn.Module):
    """[CLS], the projected features of frames, [SEP], through a BERT."""

    def __init__(self, settings: BertConfig, feature_width: int, frames: int) -> None:
        """``settings`` are the texts' BERT's but for its number of layers; ``frames`` is the longest clip."""
        super().__init__()
        hidden = settings.hidden_size
        self.frames = frames
        self.embedding = nn.Sequential(
            nn.Linear(feature_width, hidden), nn.GELU(), nn.LayerNorm(hidden), nn.Linear(hidden, hidden)
        )
        self.bert = BertModel(settings, add_pooling_layer=False)

    def forward(self, video: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Float [B, T, D] and bool [B, T] to states float [B, T + 2, H], and bool [B, T + 2], True where one counts."""
        words = self.bert.embeddings.word_embeddings.weight
        rows = words[:, None, None].expand(-1, len(video), 1, -1)
        inputs = torch.cat([rows[CLS], self.embedding(video), rows[SEP]], dim=1)
        position = torch.arange(video.shape[1] + 2, device=video.device)
        position[-1] = self.frames + 1
        true = mask.new_ones(len(mask), 1)
        seen = torch.cat([true, mask, true], dim=1)
        embedded = self.bert.embeddings(inputs_embeds=inputs, position_ids=position[None])
        return states(self.bert, embedded, seen), torch.cat([~true, mask, true], dim=1)


class CaptionBert(nn.Module):
    """[CLS], tokens, [SEP], through a BERT."""

    def __init__(self, settings: BertConfig, pad: int) -> None:
        super().__init__()
        self.pad = pad
        self.bert = BertModel(settings, add_pooling_layer=False)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B, L] to states float [B, L, H], and bool [B, L], True where one counts."""
        seen = text != self.pad
        counts = torch.cat([torch.zeros_like(seen[:, :1]), seen[:, 1:]], dim=1)
        return states(self.bert, self.bert.embeddings(text), seen), counts


class DualBert(nn.Module):
    """Both towers, and the logarithm of the factor of their products."""

    def __init__(self, video: FrameBert, text: CaptionBert, scale: float, learn_scale: bool) -> None:
        super().__init__()
        self.video, self.text = video, text
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learn_scale)


def states(bert: BertModel, embedded: Tensor, seen: Tensor) -> Tensor:
    """States float [B, L, H] of embedded positions [B, L, H]; none attends to a position that is not ``seen``."""
    # BertModel.forward looks at the mask's contents, which waits for the GPU.
    mask = seen[:, None, None].expand(-1, -1, seen.shape[1], -1)
    found: Tensor = bert.encoder(embedded, attention_mask=mask).last_hidden_state
    return found


def pooled(states: Tensor, counts: Tensor) -> Tensor:
    """The mean float [B, H] of the states [B, L, H] where ``counts``, bool [B, L]."""
    weights = counts.to(states.dtype)
    return torch.einsum("blh,bl->bh", states, weights) / weights.sum(dim=1, keepdim=True)


def longest(bert: BertModel) -> Tensor:
    """An upper limit of the length of any state, and so of any mean of states, by the last layer's norm.

    A normalised vector of H numbers has the length sqrt(H) at most.
    """
    last: Any = bert.encoder.layer[-1]
    norm = last.output.LayerNorm
    limit: Tensor = norm.weight.detach().abs().max() * norm.weight.numel() ** 0.5 + norm.bias.detach().norm()
    return limit


def caption_settings(
    bert: str, small: tuple[int, int, int], tokenizer: SpanTokenizer, length: int, dropout: float
) -> BertConfig:
    """The settings of the texts' BERT: of the folder or model id ``bert``, or a small one for ``drawn``.

    ``length`` is the number of positions that a tower needs.

    Raises:
        SettingError: no BERT of that name, too few positions, or a vocabulary that is smaller than the tokenizer's.
    """
    width, layers, heads = small
    values: dict[str, Any]
    if bert == DRAWN:
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        values = {**sizes, "intermediate_size": 4 * width, "vocab_size": tokenizer.vocab_size}
        values |= {"max_position_embeddings": length, "pad_token_id": tokenizer.pad}
    else:
        allowed = "a folder or model id of a BERT in transformers' layout, or drawn"
        try:
            found = AutoConfig.from_pretrained(bert)
        except (OSError, ValueError, KeyError) as error:
            raise SettingError("bert", bert, f"{allowed} ({str(error).splitlines()[0]})") from error
        require(found.model_type == "bert", "bert", bert, f"{allowed}; this is a {found.model_type} model")
        values = found.to_dict()
        same = values["vocab_size"] >= tokenizer.vocab_size
        require(same, "bert", bert, "a vocabulary with every token of its tokenizer")
        has = values["max_position_embeddings"]
        require(length <= has, "bert", bert, f"{length} positions or more; this one has {has}")
    return bert_settings({**values, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout})


def bert_settings(values: Mapping[str, Any]) -> BertConfig:
    """A ``BertConfig`` with torch's fused attention."""
    return BertConfig(**{**values, "attn_implementation": "sdpa"})


def frame_settings(captions: BertConfig, layers: int) -> BertConfig:
    """The settings of the frames' BERT: as the texts', with its own number of layers and two words."""
    values = {**captions.to_dict(), "num_hidden_layers": layers, "vocab_size": 2, "pad_token_id": None}
    return bert_settings(values)


def settings_text(settings: BertConfig) -> str:
    """The settings as a JSON text, for :func:`stored_settings`."""
    text: str = settings.to_json_string(use_diff=False)
    return text


def stored_settings(text: str) -> BertConfig:
    """The settings of :func:`settings_text`."""
    return bert_settings(json.loads(text))


def load_bert(model: DualBert, name: str, tokenizer: SpanTokenizer) -> None:
    """Load the weights of the BERT ``name`` into both towers: the first layers into the frames one."""
    known = BertModel.from_pretrained(name, add_pooling_layer=False).state_dict()
    model.text.bert.load_state_dict(known)
    words = "embeddings.word_embeddings.weight"
    wanted = {key: known[key] for key in model.video.bert.state_dict() if key in known}
    wanted[words] = known[words][[tokenizer.start, tokenizer.end]]
    model.video.bert.load_state_dict(wanted)
