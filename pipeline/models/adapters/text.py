"""open_clip's causal text tower on embeddings; all classes share the computation of their prompts' start.

A learned prompt is ``[start of text | shared rows | rows of the class]``. Under the causal mask the states of the
shared rows do not depend on the rows after them. So they are computed once (or once per image, if they depend on it),
and their keys and values are shared by all classes. The rows of a class end with its end-of-text token, after which
nothing matters. Classes with equally many rows go through the tower together, so there is no padding. In the last layer
only the end of text has a query. Classes can be spread over workers: each runs its own classes and gathers the features
of all. All of this is exact.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from open_clip import CLIP
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pipeline.config import require

KeysAndValues = list[tuple[Tensor, Tensor]]
"""For each layer, float [B, heads, P, width / heads] of the shared rows."""


@dataclass(frozen=True)
class Rows:
    """The rows of some classes, equally many for each.

    ``tokens`` is int64 [N, S], ending with end-of-text; ``slots`` int64 [N, S] has the index of the context row that
    replaces a token, or -1; ``classes`` int64 [N] are the class numbers.
    """

    classes: Tensor
    tokens: Tensor
    slots: Tensor

    def split(self, count: int) -> "list[Rows]":
        """Parts with at most ``count`` classes."""
        parts = zip(self.classes.split(count), self.tokens.split(count), self.slots.split(count), strict=True)
        return [Rows(*part) for part in parts]


def group(tokens: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> list[Rows]:
    """The rows of all classes, grouped by their number, shortest first."""
    lengths = sorted({len(row) for row in tokens})
    found = []
    for length in lengths:
        members = [number for number, row in enumerate(tokens) if len(row) == length]
        columns = (members, [tokens[number] for number in members], [slots[number] for number in members])
        found.append(Rows(*(torch.tensor(column, dtype=torch.int64) for column in columns)))
    return found


@dataclass(frozen=True)
class Spread:
    """Workers that share the classes; all have the same images and parameters.

    ``gather`` is float [n, ...] of this worker to [world * n, ...] of all, in the order of ranks; its gradient is the
    sum over workers. With gradients of parameters averaged over workers, they equal those of a single worker.
    """

    rank: int
    world: int
    gather: Callable[[Tensor], Tensor]

    def own(self, rows: Sequence[Rows]) -> list[Rows]:
        """The rows of this worker's classes: every ``world``-th, so that short and long names are spread evenly."""
        start, own = 0, []
        for part in rows:
            places = torch.arange(len(part.classes))[(self.rank - start) % self.world :: self.world]
            if len(places):
                own.append(Rows(part.classes[places], part.tokens[places], part.slots[places]))
            start += len(part.classes)
        return own

    def together(self, own: Tensor, count: int) -> Tensor:
        """This worker's features [B, n, D] to those of all ``count`` classes [B, count, D], in the order of rows."""
        most = -(-count // self.world)
        padded = functional.pad(own, (0, 0, 0, most - own.shape[1]))
        gathered = self.gather(padded.transpose(0, 1).contiguous())
        places = torch.arange(count, device=own.device)
        return gathered[places % self.world * most + places // self.world].transpose(0, 1)


class TextTower:
    """The parts of ``model``'s frozen text tower.

    Raises:
        SettingError: not open_clip's own causal tower with end-of-text pooling (such as Hugging Face's, captioners).
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        parts: Any = model if isinstance(model, CLIP) else getattr(model, "text", None)
        own = isinstance(parts, CLIP | TextTransformer) and parts.attn_mask is not None
        pool = getattr(parts, "text_pool_type", getattr(parts, "pool_type", None))
        fits = own and pool in ("argmax", "eos") and getattr(parts, "cls_emb", None) is None
        require(fits, "model", type(model).__name__, "a CLIP with open_clip's causal text tower, for learned prompts")
        require(parts.transformer.batch_first, "model", type(model).__name__, "a text tower with the batch first")
        self.parts, self.tokenizer = parts, tokenizer
        self.blocks: list[Any] = list(parts.transformer.resblocks)
        self.length: int = parts.positional_embedding.shape[0]
        self.width: int = parts.positional_embedding.shape[1]
        # These blocks can share keys and values; other blocks see whole prompts, cut after their end.
        self.shares = all(type(block) is ResidualAttentionBlock for block in self.blocks)
        self.spread: Spread | None = None

    def encode(self, text: str) -> list[int]:
        """The tokens of ``text``, without start and end, never truncated."""
        return cast(list[int], self.tokenizer.encode(text))

    def word(self, token: int) -> str:
        """The text of ``token``."""
        known: Any = getattr(self.tokenizer, "decoder", None)
        return str(known[token]) if known is not None and token in known else str(token)

    @property
    def start(self) -> int:
        """The token that every text begins with."""
        return int(self.tokenizer.sot_token_id)

    @property
    def end(self) -> int:
        """The token that every text ends with."""
        return int(self.tokenizer.eot_token_id)

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [...] to float [..., width], without positions."""
        return cast(Tensor, self.parts.token_embedding(tokens))

    def features(
        self,
        shared: Tensor,
        rows: Sequence[Rows],
        context: Tensor | None = None,
        *,
        deep: Sequence[Tensor] = (),
        classes_at_once: int | None = None,
    ) -> Tensor:
        """Features of all classes, not normalised: float [B, C, D].

        Args:
            shared: float [B, P, width], the first rows of every prompt, start of text included, without positions;
                B is 1 if all images share them.
            rows: the rows after them, for each class.
            context: the learned rows that ``slots`` refer to: float [M, width], or [C, M, width] of each class.
            deep: for each layer from the second on, float [b, width] that replaces rows 1 to b there.
            classes_at_once: maximum number of classes per pass; the activations of several passes are recomputed in
                the backward pass instead of being stored.

        Raises:
            SettingError: fewer classes than workers that share them.
        """
        order = torch.cat([part.classes for part in rows]).argsort().to(shared.device)
        if self.spread is None:
            return self._parts(shared, rows, context, deep, classes_at_once)[:, order]
        world = self.spread.world
        require(world <= len(order), "workers", world, f"at most {len(order)}, the number of classes")
        own = self._parts(shared, self.spread.own(rows), context, deep, classes_at_once)
        return self.spread.together(own, len(order))[:, order]

    def _parts(
        self,
        shared: Tensor,
        rows: Sequence[Rows],
        context: Tensor | None,
        deep: Sequence[Tensor],
        classes_at_once: int | None,
    ) -> Tensor:
        """Features of all ``rows``, in their order."""
        run = self._suffixes if self.shares else self._whole
        known: Any = self._keys_and_values(shared, deep) if self.shares else (shared, deep)
        parts = [part for one in rows for part in one.split(classes_at_once or len(one.classes))]
        again = classes_at_once is not None and torch.is_grad_enabled()
        features = []
        for part in parts:
            embedded = self._embedded(part, context)
            if again:
                features.append(checkpoint(run, embedded, known, shared.shape[1], use_reentrant=False))
            else:
                features.append(run(embedded, known, shared.shape[1]))
        return torch.cat(features, dim=1)

    def _embedded(self, rows: Rows, context: Tensor | None) -> Tensor:
        """float [B, N, S, width]: tokens' embeddings, with the context rows of ``slots``."""
        device = self.parts.positional_embedding.device
        tokens, slots = self.embed(rows.tokens.to(device))[None], rows.slots.to(device)
        if context is None or not (slots >= 0).any():
            return tokens
        index = slots.clamp(min=0)
        chosen = context[index] if context.ndim == 2 else context[rows.classes.to(device)[:, None], index]
        return torch.where(slots[None, ..., None] >= 0, chosen[None], tokens)

    def _keys_and_values(self, shared: Tensor, deep: Sequence[Tensor]) -> KeysAndValues:
        hidden = shared + self.parts.positional_embedding[: shared.shape[1]]
        found: KeysAndValues = []
        for number, block in enumerate(self.blocks):
            hidden = _replaced(hidden, deep, number)
            query, key, value = _heads(block, block.ln_1(hidden))
            found.append((key, value))
            if number < len(self.blocks) - 1:
                seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
                hidden = _rest_of_block(block, hidden, seen)
        return found

    def _suffixes(self, embedded: Tensor, known: KeysAndValues, offset: int) -> Tensor:
        """Rows of classes [B, N, S, width], after ``offset`` shared ones, to features [B, N, D]."""
        hidden = embedded + self.parts.positional_embedding[offset : offset + embedded.shape[2]]
        hidden = hidden.expand(max(len(hidden), len(known[0][0])), *hidden.shape[1:])
        for number, (block, (keys, values)) in enumerate(zip(self.blocks, known, strict=True)):
            is_last = number == len(self.blocks) - 1
            normed = block.ln_1(hidden)
            seen = _attend(_heads(block, normed, only_last=is_last), keys, values)
            hidden = _rest_of_block(block, hidden[:, :, -1:] if is_last else hidden, seen)
        return self._projected(hidden[:, :, -1])

    def _whole(self, embedded: Tensor, known: tuple[Tensor, Sequence[Tensor]], offset: int) -> Tensor:
        """Like :meth:`_suffixes`, for other kinds of blocks: whole prompts through open_clip's own code."""
        shared, deep = known
        size = max(len(embedded), len(shared))
        shape = (size, embedded.shape[1])
        prompts = torch.cat(
            [shared[:, None].expand(*shape, *shared.shape[1:]), embedded.expand(*shape, *embedded.shape[2:])], dim=2
        ).flatten(0, 1)
        length = prompts.shape[1]
        hidden: Tensor = prompts + self.parts.positional_embedding[:length]
        for number, block in enumerate(self.blocks):
            hidden = block(_replaced(hidden, deep, number), attn_mask=self.parts.attn_mask[:length, :length])
        features: Tensor = self._projected(hidden[:, -1]).unflatten(0, shape)
        return features

    def _projected(self, pooled: Tensor) -> Tensor:
        normed = self.parts.ln_final(pooled)
        projection = self.parts.text_projection
        if projection is None:
            return cast(Tensor, normed)
        return cast(Tensor, projection(normed) if isinstance(projection, nn.Linear) else normed @ projection)


def _replaced(hidden: Tensor, deep: Sequence[Tensor], layer: int) -> Tensor:
    """``hidden`` with rows 1 to b replaced, if layer ``layer`` has its own prompts."""
    if not 1 <= layer <= len(deep):
        return hidden
    rows = deep[layer - 1].expand(len(hidden), -1, -1)
    return torch.cat([hidden[:, :1], rows, hidden[:, 1 + rows.shape[1] :]], dim=1)


def _heads(block: Any, normed: Tensor, only_last: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, [..., heads, rows, width / heads] each; with ``only_last``, the last row's query."""
    attention = block.attn
    width, count = attention.embed_dim, attention.num_heads
    queries = normed[..., -1:, :] if only_last else normed
    weights, biases = attention.in_proj_weight, attention.in_proj_bias
    query = functional.linear(queries, weights[:width], biases[:width])
    key, value = functional.linear(normed, weights[width:], biases[width:]).chunk(2, dim=-1)
    split = (part.unflatten(-1, (count, width // count)).transpose(-2, -3) for part in (query, key, value))
    return cast(tuple[Tensor, Tensor, Tensor], tuple(split))


def _attend(own: tuple[Tensor, Tensor, Tensor], keys: Tensor, values: Tensor) -> Tensor:
    """Attention of classes' rows to the shared rows before them and, causally, to their own.

    ``own`` are [B, N, heads, S, d], ``keys`` and ``values`` [B, heads, P, d]. The shared keys are not repeated for each
    class: scores are small, keys are large.
    """
    query, key, value = own
    shared = keys.shape[-2]
    query = query * query.shape[-1] ** -0.5
    to_shared = query @ keys[:, None].transpose(-1, -2)
    to_own = query @ key.transpose(-1, -2)
    rows, columns = to_own.shape[-2:]
    ahead = torch.ones(rows, columns, dtype=torch.bool, device=query.device).triu(1 + columns - rows)
    scores = torch.cat([to_shared, to_own.masked_fill(ahead, float("-inf"))], dim=-1).softmax(dim=-1)
    return scores[..., :shared] @ values[:, None] + scores[..., shared:] @ value


def _rest_of_block(block: Any, hidden: Tensor, seen: Tensor) -> Tensor:
    """The part of a block after its attention, whose output is ``seen`` [..., heads, rows, d]."""
    attended = block.attn.out_proj(seen.transpose(-2, -3).flatten(-2))
    hidden = hidden + block.ls_1(attended)
    result: Tensor = hidden + block.ls_2(block.mlp(block.ln_2(hidden)))
    return result
