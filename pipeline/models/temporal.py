"""Parts that join the features of a clip's frames, which CLIP4Clip and ActionCLIP share.

Frames are float [B, T, D]; a mask, bool [B, T], is False after the end of a clip. A hidden frame has no influence on
the others.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

HIDDEN = -1e6
"""Attention logit of a hidden frame: finite, so that a clip without frames gives no NaN."""
WIDTH_OF_HEAD = 64  # features of an attention head, as in CLIP's text towers


class FrameTransformer(nn.Module):
    """frames + transformer(frames + positions): pre-norm blocks of open_clip with a residual over all of them."""

    def __init__(self, resblocks: Iterable[nn.Module], positions: Tensor) -> None:
        """``positions``: initial position table, float [longest clip, D]."""
        super().__init__()
        self.resblocks = nn.ModuleList(resblocks)
        self.positions = nn.Parameter(positions.clone())

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        """float [B, T, D] and bool [B, T] to float [B, T, D]."""
        hidden = frames + self.positions[: frames.shape[1]]
        return run_blocks(self.resblocks, hidden, mask).to(frames.dtype) + frames


class FrameLstm(nn.Module):
    """frames + LSTM(frames), one layer, forward in time: frames after the end do not reach those before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        """float [B, T, D] to the same; the mask has no effect on frames that it shows."""
        with torch.autocast(frames.device.type, enabled=False):
            hidden: Tensor = self.lstm(frames)[0]
        return hidden + frames


def masked_mean(frames: Tensor, mask: Tensor) -> Tensor:
    """The mean of each clip's frames, float [B, D]; zeros for a clip without frames."""
    weights = mask.to(frames.dtype)[..., None]
    return (frames * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def run_blocks(resblocks: Iterable[nn.Module], hidden: Tensor, mask: Tensor) -> Tensor:
    """Self-attention blocks of open_clip on [B, L, D], where no position attends to those that bool [B, L] hides."""
    bias: Tensor | None = None
    for block in resblocks:
        if bias is None:
            attention: Any = block.attn
            # torch numbers the matrices sample by sample, not head by head.
            rows = ((~mask).to(hidden.dtype) * HIDDEN)[:, None].expand(-1, mask.shape[1], -1)
            bias = rows.repeat_interleave(attention.num_heads, dim=0)
        hidden = block(hidden, attn_mask=bias)
    return hidden


def first_text_layers(model: Any, width: int, count: int, longest: int) -> tuple[list[nn.Module], Tensor]:
    """``count`` blocks of ``width`` and a position table [longest or more, width] for a head over frames.

    They are copies of the first blocks and of the positions of ``model``'s text tower, where that is open_clip's own
    transformer of this width. Blocks and positions that it lacks are random, as open_clip's new text towers are.
    """
    tower = getattr(model, "text", model)
    blocks: Sequence[nn.Module] = getattr(getattr(tower, "transformer", None), "resblocks", ())
    table = getattr(tower, "positional_embedding", None)
    fits = isinstance(table, Tensor) and table.shape[1] == width and len(blocks) > 0
    copies = [copy.deepcopy(block).requires_grad_() for block in blocks[:count]] if fits else []
    positions = table.detach().clone() if isinstance(table, Tensor) and fits else torch.empty(0, width)
    more = torch.empty(max(0, longest - len(positions)), width).normal_(std=0.01)
    return [*copies, *(new_block(width, count) for _ in range(count - len(copies)))], torch.cat([positions, more])


def new_block(width: int, layers: int) -> nn.Module:
    """A random block, initialised as one of ``layers`` in CLIP's text tower (its released code)."""
    block = ResidualAttentionBlock(width, heads_of(width), act_layer=QuickGELU)
    spread = width**-0.5
    nn.init.normal_(block.attn.in_proj_weight, std=spread)
    nn.init.normal_(block.attn.out_proj.weight, std=spread * (2 * layers) ** -0.5)
    nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
    nn.init.normal_(block.mlp.c_proj.weight, std=spread * (2 * layers) ** -0.5)
    return block


def heads_of(width: int) -> int:
    """Attention heads of a block of this width: one for 64 features, as far as they divide it."""
    heads = max(1, width // WIDTH_OF_HEAD)
    return next(count for count in range(heads, 0, -1) if width % count == 0)


def over_views(
    encode: Callable[[Tensor, Tensor | None], Tensor], video: Tensor, mask: Tensor | None, dimensions: int
) -> Tensor:
    """``encode`` of clips, [B, ...]; for V views of each, with one more dimension after the first, the mean of views.

    ``dimensions`` is the number of dimensions of ``video`` without views.
    """
    if video.ndim == dimensions:
        return encode(video, mask)
    found = encode(video.flatten(0, 1), None if mask is None else mask.flatten(0, 1))
    return found.unflatten(0, video.shape[:2]).mean(dim=1)
