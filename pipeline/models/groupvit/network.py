"""GroupViT's network: transformers' port and its names of weights, with changes where the port is wrong.

Kept from ``transformers.GroupViTModel`` (Apache-2.0): embeddings, stages, grouping blocks, projections. The same
weights give the same features, so a state of either loads into the other. Changed, because the port cannot train:

- initial weights: the port's position embeddings and group tokens are zeros, and its linear layers have other
  deviations than the authors' 0.02;
- stochastic depth, which the port lacks;
- attention by torch's fused kernels, without the matrix of weights;
- random numbers of a row depend on the row's seed alone, so that several processes compute what one would;
- biases that a later normalisation removes are not trained;
- images of any size that is a multiple of the patch; batch normalisation over all processes.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GroupViTConfig, GroupViTModel
from transformers.models.groupvit.modeling_groupvit import GroupViTAttention, GroupViTEncoderLayer

from pipeline.models.losses import Gather, alone
from pipeline.models.towers.batch_norm import GatheredBatchNorm

DEVIATION = 0.02
BRANCHES = 0  # the stream of random numbers of the branches; those of the groupings follow
TOKENS, POSITIONS = 0.02, 0.01  # deviations of the text tower's tables, as CLIP's
_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685  # SplitMix64, as int64


class Grouped(NamedTuple):
    """The segments of images: ``tokens`` float [B, G, C] and, for each grouping, ``logits`` float [B, S, L].

    ``logits`` compare S segments with the L tokens of the stage before, image patches first. Their softmax over S is
    the soft assignment.
    """

    tokens: Tensor
    logits: tuple[Tensor, ...]


class FusedAttention(GroupViTAttention):
    """The port's attention, with the same weights, by torch's fused kernels."""

    def __init__(self, config: Any, causal: bool = False) -> None:
        super().__init__(config)  # type: ignore[no-untyped-call]
        self.causal = causal

    def forward(  # type: ignore[override]  # the port's block and cross-attention call it so
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Float [B, L, C] to the same; keys and values are those of the other states, if there are some."""
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projection(states).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for projection, states in ((self.q_proj, hidden_states), (self.k_proj, keys), (self.v_proj, keys))
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None


class DroppableLayer(GroupViTEncoderLayer):
    """The port's transformer block, whose two branches a training image may skip."""

    def __init__(self, config: Any, causal: bool = False) -> None:
        super().__init__(config)
        self.self_attn: FusedAttention = FusedAttention(config, causal)

    def forward(self, hidden_states: Tensor, kept: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Float [B, L, C] to the same; ``kept`` [2, B, 1, 1] are factors of the branches, 0 or 1 / probability."""
        attended = self.self_attn(self.layer_norm1(hidden_states))[0]
        hidden_states = hidden_states + (attended if kept is None else attended * kept[0])
        changed: Tensor = self.mlp(self.layer_norm2(hidden_states))
        return hidden_states + (changed if kept is None else changed * kept[1])


class GroupingNetwork(GroupViTModel):
    """The port with the changes of this module."""

    def __init__(self, config: GroupViTConfig, drop_path: float = 0.0) -> None:
        super().__init__(config)
        image_config: Any = config.vision_config
        vision: Any = self.vision_model
        depth = sum(image_config.depths)
        self.drop_rates = [drop_path * number / max(depth - 1, 1) for number in range(depth)]
        for stage in vision.encoder.stages:
            stage.layers = nn.ModuleList(DroppableLayer(image_config) for _ in stage.layers)
            if stage.downsample is not None:
                stage.downsample.pre_assign_attn.attn = FusedAttention(image_config)
        layers = self.text_model.encoder.layers
        self.text_model.encoder.layers = nn.ModuleList(DroppableLayer(config.text_config, True) for _ in layers)
        for projection in (self.visual_projection, self.text_projection):
            projection[1] = GatheredBatchNorm(config.projection_intermediate_dim)
        for bias in self._redundant():
            bias.requires_grad_(False)
        initialise(self)

    def _redundant(self) -> Iterator[Tensor]:
        """Biases that a later normalisation removes: their gradients would be rounding errors."""
        vision: Any = self.vision_model
        for stage in vision.encoder.stages:
            if stage.downsample is not None:
                yield stage.downsample.mlp_inter.fc2.bias
            if stage.group_projector is not None:
                yield stage.group_projector[1].fc2.bias
        yield vision.layernorm.bias
        text: Any = self.text_model
        yield text.final_layer_norm.bias
        projections: Any = (self.visual_projection, self.text_projection)
        for projection in projections:
            yield projection[0].bias

    def group(self, images: Tensor, seeds: Tensor | None = None) -> Grouped:
        """Normalised images float [B, 3, H, W] to their segments; sides are multiples of the patch.

        ``seeds``, int64 [B], add Gumbel noise to the assignments and skip branches, as in training. The noise of an
        image is a pure function of its seed.
        """
        vision: Any = self.vision_model
        states, tokens = vision.embeddings(images, interpolate_pos_encoding=True), None
        kept, found = iter(kept_branches(seeds, self.drop_rates, states)), []
        for number, stage in enumerate(vision.encoder.stages):
            if stage.with_group_token:
                own = stage.group_token.expand(len(states), -1, -1)
                tokens = own if stage.group_projector is None else own + stage.group_projector(tokens)
            states = stage.concat_x(states, tokens if stage.with_group_token else None)
            for layer in stage.layers:
                states = layer(states, next(kept))
            if stage.with_group_token:
                states, tokens = stage.split_x(states)
                states, logits = assign(stage.downsample, states, tokens, seeds, BRANCHES + 1 + number)
                found.append(logits)
        return Grouped(vision.layernorm(states), tuple(found))

    def text_states(self, tokens: Tensor) -> Tensor:
        """Tokens, int64 [B, L], to float [B, C] at the end of the text, which is the largest number of a row."""
        text = self.text_model
        states = text.embeddings(tokens)
        for layer in text.encoder.layers:
            states = layer(states)
        rows = torch.arange(len(tokens), device=tokens.device)
        ends: Tensor = text.final_layer_norm(states[rows, tokens.argmax(dim=1)])
        return ends

    def projected(self, kind: str, states: Tensor, gather: Gather = alone) -> Tensor:
        """States [B, C] of ``visual`` or ``text`` to unit vectors, float32 [B, D]."""
        first, norm, _, last = getattr(self, f"{kind}_projection")
        hidden = first(states)
        hidden = functional.relu(norm(hidden.to(torch.promote_types(hidden.dtype, torch.float32)), gather))
        unit = last(hidden)
        return functional.normalize(unit.to(torch.promote_types(unit.dtype, torch.float32)), dim=-1)


def assign(block: Any, states: Tensor, tokens: Tensor, seeds: Tensor | None, stream: int) -> tuple[Tensor, Tensor]:
    """Group ``states`` [B, L, C] by ``tokens`` [B, T, C]: segments [B, S, C], logits of the assignment [B, S, L].

    ``block`` is the port's ``GroupViTTokenAssign``. Each state goes to one segment. With ``seeds`` and the ``stream``
    of their random numbers, the choice is sampled.
    """
    tokens, states = block.norm_tokens(tokens), block.norm_x(states)
    segments = block.pre_assign_attn(block.project_group_token(tokens), states)
    heads = block.assign
    logits = (heads.q_proj(segments) @ heads.k_proj(states).transpose(1, 2)).float() * heads.scale
    noise = None if seeds is None else gumbel(seeds, stream, logits.shape[1:], logits.dtype)
    weights = hard_assignment(logits if noise is None else logits + noise)
    weights = weights / (weights.sum(dim=2, keepdim=True) + heads.assign_eps)
    found = heads.proj(weights.to(states.dtype) @ heads.v_proj(states)) + segments
    return found + block.mlp_channels(block.norm_new_x(found)), logits


def hard_assignment(logits: Tensor) -> Tensor:
    """One-hot over dimension 1 of float [B, S, L], with the gradient of the softmax (straight through)."""
    chosen: Tensor = _StraightThrough.apply(logits)
    return chosen


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, logits: Tensor) -> Tensor:
        soft = logits.softmax(dim=1)
        context.save_for_backward(soft)
        return torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)

    @staticmethod
    def backward(context: Any, *slopes: Tensor) -> Tensor:
        (soft,) = context.saved_tensors
        found: Tensor = torch.ops.aten._softmax_backward_data(slopes[0], soft, 1, soft.dtype)
        return found


def kept_branches(seeds: Tensor | None, rates: Sequence[float], states: Tensor) -> Sequence[Tensor | None]:
    """For each layer the factors [2, B, 1, 1] of its branches: 0 with its rate, else 1 / (1 - rate); none for rate 0.

    Those of all layers at once: on a GPU the many small operations of each would take longer than its arithmetic.
    """
    if seeds is None or not any(rates):
        return [None] * len(rates)
    limits = seeds.new_tensor(rates, dtype=torch.float32)[:, None]
    kept = (uniforms(seeds, BRANCHES, 2 * len(rates)).unflatten(1, (-1, 2)) >= limits) / (1 - limits)
    factors = kept.permute(1, 2, 0)[..., None, None].to(states.dtype)
    return [one if rate else None for one, rate in zip(factors, rates, strict=True)]


def gumbel(seeds: Tensor, stream: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise [B, *shape], row by row from ``seeds``."""
    return uniforms(seeds, stream, math.prod(shape)).log_().neg_().log_().neg_().view(-1, *shape).to(dtype)


def uniforms(seeds: Tensor, stream: int, count: int) -> Tensor:
    """Float32 [B, count] between 0 and 1, both excluded: a function of each row's seed, int64 [B], and the stream.

    Numbers of a counter, mixed by SplitMix64 (Steele, Lea, Flood 2014), on the device of ``seeds``.
    """
    counters = torch.arange(1, count + 1, device=seeds.device) + (stream << 32)
    bits = _mixed(seeds)[:, None] + counters * _GOLDEN
    return (_mixed(bits) >> 41 & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)  # 24 bits: none rounds to 1


def _mixed(bits: Tensor) -> Tensor:
    """The finaliser of SplitMix64, with the logical shifts that torch lacks."""
    bits = (bits ^ (bits >> 30 & (1 << 34) - 1)) * _FIRST
    bits = (bits ^ (bits >> 27 & (1 << 37) - 1)) * _SECOND
    return bits ^ (bits >> 31 & (1 << 33) - 1)


@torch.no_grad()
def initialise(network: GroupingNetwork) -> None:
    """The authors' initial weights: a truncated normal of 0.02 for images, CLIP's for texts, torch's for projections.

    Group tokens of later stages start at zero, since the projected tokens of the stage before are added to them.
    """
    vision: Any = network.vision_model
    for module in vision.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=DEVIATION)
            nn.init.zeros_(module.bias)
    vision.embeddings.patch_embeddings.projection.reset_parameters()
    nn.init.trunc_normal_(vision.embeddings.position_embeddings, std=DEVIATION)
    nn.init.trunc_normal_(vision.encoder.stages[0].group_token, std=DEVIATION)
    _initialise_text(network.text_model, network.config.text_config)
    projections: Any = (network.visual_projection, network.text_projection)
    for projection in projections:
        for linear in (projection[0], projection[3]):
            linear.reset_parameters()


def _initialise_text(text: Any, config: Any) -> None:
    nn.init.normal_(text.embeddings.token_embedding.weight, std=TOKENS)
    nn.init.normal_(text.embeddings.position_embedding.weight, std=POSITIONS)
    wide, out = config.hidden_size**-0.5, (2 * config.num_hidden_layers) ** -0.5
    for layer in text.encoder.layers:
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            nn.init.normal_(linear.weight, std=wide)
        nn.init.normal_(attention.out_proj.weight, std=wide * out)
        nn.init.normal_(layer.mlp.fc1.weight, std=wide * 0.5**0.5)
        nn.init.normal_(layer.mlp.fc2.weight, std=wide * out)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
            nn.init.zeros_(linear.bias)


@torch.no_grad()
def start_as_bag_of_words(network: GroupingNetwork) -> None:
    """Initialise every layer of the text tower as the mean of the words before it, for runs of minutes.

    The same start as that of a small CLIP (``towers.openclip.start_as_bag_of_words``); all of it is trained.
    """
    text: Any = network.text_model
    nn.init.zeros_(text.embeddings.position_embedding.weight)
    text.embeddings.token_embedding.weight[-2:] = 0  # the boundaries of a text
    for layer in text.encoder.layers:
        attention = layer.self_attn
        nn.init.zeros_(attention.q_proj.weight)
        nn.init.eye_(attention.v_proj.weight)
        nn.init.eye_(attention.out_proj.weight)
        nn.init.zeros_(layer.mlp.fc2.weight)
        nn.init.zeros_(layer.mlp.fc2.bias)
