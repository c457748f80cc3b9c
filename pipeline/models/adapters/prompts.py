"""Prompts of class names around a learned context, as CoOp lays them out.

With M context rows v, the name's tokens n and the full stop, after the start and before the end of text:

    end     v1 ... vM  n  .
    middle  v1 ... v(M//2)  n  v(M//2 + 1) ... vM  .
    front   n  v1 ... vM  .
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.config import require
from pipeline.models.adapters.text import Rows, TextTower, group
from pipeline.models.towers.prompts import readable_name

Position = Literal["end", "middle", "front"]

NO_SLOT = -1
SPREAD = 0.02  # standard deviation of random context, as of CLIP's own token embeddings


@dataclass(frozen=True)
class Layout:
    """Number of context rows that all classes share at the start of their prompts, and the rest of each prompt."""

    shared: int
    rows: list[Rows]


def lay_out(
    tower: TextTower,
    classes: Sequence[str],
    context: int,
    position: Position = "end",
    *,
    class_specific: bool = False,
) -> Layout:
    """Prompts with ``context`` learned rows for each of ``classes``.

    ``class_specific`` rows differ between classes, so only the start of text is shared.

    Raises:
        SettingError: a prompt is longer than the tower's context; the message names the class.
    """
    leading = {"end": context, "middle": context // 2, "front": 0}[position]
    shared = 0 if class_specific else leading
    tokens, slots = [], []
    for name in classes:
        plain = readable_name(name)
        sentence = tower.encode(f"{plain}.")
        length = len(sentence) if position == "end" else len(tower.encode(plain))
        before = list(range(shared, leading))
        after = list(range(leading, context))
        pieces = [*before, *[NO_SLOT] * length, *after, *[NO_SLOT] * (len(sentence) - length), NO_SLOT]
        written = [*[0] * len(before), *sentence[:length], *[0] * len(after), *sentence[length:], tower.end]
        room = tower.length - 1 - shared
        require(
            len(pieces) <= room, "classes", name, f"a name that fits {tower.length} tokens with {context} of context"
        )
        tokens.append(written)
        slots.append(pieces)
    return Layout(shared, group(tokens, slots))


def initial_context(
    tower: TextTower,
    rows: int,
    phrase: str | None,
    classes: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The context before training: float [M, width], or [C, M, width] with ``classes``.

    The token embeddings of ``phrase``, which then determines M, or normal random numbers with deviation 0.02.

    Raises:
        SettingError: no rows, more rows than the tower's context, or a phrase without words.
    """
    if phrase is not None:
        words = tower.encode(phrase.replace("_", " "))
        require(len(words) > 0, "start", phrase, "one word or more, or none for a random start")
        with torch.no_grad():
            start = tower.embed(torch.tensor(words, device=tower.parts.positional_embedding.device)).float()
        return start.clone() if classes is None else start.repeat(classes, 1, 1)
    require(1 <= rows <= tower.length - 4, "context", rows, f"1 to {tower.length - 4}")
    shape = (rows, tower.width) if classes is None else (classes, rows, tower.width)
    random = torch.randn(shape, generator=generator) * SPREAD
    return random.to(tower.parts.positional_embedding.device)


def first_rows(
    tower: TextTower, rows: int, phrase: str | None, generator: torch.Generator | None = None
) -> tuple[Tensor, list[int]]:
    """The first ``rows`` words of ``phrase`` as a context, float [rows, width], and the tokens of its other words.

    A phrase with fewer words, or none, gives a random context and no further words, as in MaPLe's code.
    """
    tokens = tower.encode(phrase.replace("_", " ")) if phrase is not None else []
    if rows > len(tokens):
        return initial_context(tower, rows, None, None, generator), []
    return initial_context(tower, rows, phrase, None, generator)[:rows].clone(), tokens[rows:]


def deep_class_vectors(
    tower: TextTower,
    layout: Layout,
    first: Tensor,
    words: Sequence[int],
    deep: Sequence[Tensor],
    classes_at_once: int | None = None,
) -> Tensor:
    """Classes' features, float [C, D] and not normalised, with rows of their own in several layers.

    ``first`` [b, width] are the first layer's rows, followed by ``words``; ``deep`` the next layers' rows.
    """
    device = tower.parts.positional_embedding.device
    rest = tower.embed(torch.tensor([list(words)], dtype=torch.int64, device=device))
    shared = torch.cat([start_of_text(tower), first[None], rest], dim=1)
    return tower.features(shared, layout.rows, deep=deep, classes_at_once=classes_at_once)[0]


@torch.no_grad()
def nearest_words(tower: TextTower, context: Tensor, count: int = 3) -> list[list[tuple[str, float]]]:
    """For each row of ``context``, float [M, width], the ``count`` words with the nearest embeddings, and distances.

    The distance is Euclidean, as in CoOp's paper (section 4.3), where few of these words make sense. A word is a token:
    "</w>" ends a token that is not the beginning of a longer word.
    """
    table = tower.parts.token_embedding.weight.float()
    distances = torch.cdist(context.float().to(table.device), table)
    nearest = distances.topk(min(count, len(table)), largest=False)
    rows = zip(nearest.indices.tolist(), nearest.values.tolist(), strict=True)
    return [[(tower.word(token), far) for token, far in zip(*row, strict=True)] for row in rows]


def start_of_text(tower: TextTower) -> Tensor:
    """The embedding of the first token of every prompt: float [1, 1, width]."""
    with torch.no_grad():
        device = tower.parts.positional_embedding.device
        return tower.embed(torch.tensor([[tower.start]], device=device))
