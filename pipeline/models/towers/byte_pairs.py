"""CLIP's own tokenizer, by open_clip."""

from functools import cache

import open_clip


@cache
def byte_pair_tokenizer(context_length: int) -> open_clip.SimpleTokenizer:
    """Texts to int64 [B, context length]. Models share it, because reading its vocabulary takes 0.2 s."""
    return open_clip.SimpleTokenizer(context_length=context_length)
