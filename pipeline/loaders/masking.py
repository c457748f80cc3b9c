"""Which tokens of a text are masked, for models that predict them."""

import numpy as np
from numpy.typing import NDArray

from pipeline.loaders.order import uniform

MASKED, REPLACED = 0.8, 0.9  # cumulated shares among the tokens to be predicted


def mask_tokens(
    ids: NDArray[np.int64],
    allowed: NDArray[np.bool_],
    bits: NDArray[np.uint64],
    share: float,
    mask: int,
    vocabulary: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """BERT's masking (arXiv 1810.04805, section 3.1) of ``ids`` [M]: the changed tokens, and those to be predicted.

    A token that is ``allowed`` is chosen with the probability ``share``. Of the chosen ones, 80 % become ``mask``, 10 %
    a random token, and 10 % stay. ``bits`` [3, M] are random 64-bit integers.
    """
    chosen = allowed & (uniform(bits[0]) < share)
    kind = uniform(bits[1])
    random = (bits[2] % np.uint64(vocabulary)).astype(np.int64)
    changed = np.where(chosen & (kind < MASKED), mask, ids)
    changed = np.where(chosen & (kind >= MASKED) & (kind < REPLACED), random, changed)
    return changed, np.flatnonzero(chosen)
