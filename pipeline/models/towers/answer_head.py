"""The head of models that answer questions."""

from torch import nn


def answer_head(width: int, answers: int) -> nn.Module:
    """Pooled float [B, width] to a logit for each possible answer: two layers, W2 LayerNorm(GELU(W1 p))."""
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.LayerNorm(2 * width), nn.Linear(2 * width, answers))
