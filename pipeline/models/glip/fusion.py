"""Deep fusion: cross-attention between the pixels of a pyramid and the tokens of a text, in both directions at once.

Section 3.2 of GLIP (arXiv 2112.03857). With unit-variance inputs v = LN(V) of N pixels and t = LN(T) of M tokens, the
scores A = (W_q v)(W_k t)^T / sqrt(d) of each head serve both directions:

    v' = v + g_v * W_v softmax_tokens(A) W_lt t        t' = t + g_t * W_t softmax_pixels(A^T) W_lv v

The residual is on the normalised stream: with g = 0 the block is LayerNorm, not the identity. Each direction is one
call of torch's ``scaled_dot_product_attention``, so no N x M matrix is stored. The authors clamp scores to 50,000 for
half precision; bfloat16 and float32 do not need that.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Pixels:
    """Normalised ``features`` [B, N, C], and ``query`` and ``value`` [B, heads, N, d] of each pixel."""

    features: Tensor
    query: Tensor
    value: Tensor


class CrossFusion(nn.Module):
    """One fusion block; ``scale`` is the initial value of the layer scales g, 1 / number of blocks in the paper."""

    def __init__(
        self, image_width: int, text_width: int, width: int, heads: int, *, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.image_norm, self.text_norm = nn.LayerNorm(image_width), nn.LayerNorm(text_width)
        self.query, self.key = nn.Linear(image_width, width), nn.Linear(text_width, width)
        self.image_value, self.text_value = nn.Linear(image_width, width), nn.Linear(text_width, width)
        self.to_image, self.to_text = nn.Linear(width, image_width), nn.Linear(width, text_width)
        self.image_scale = nn.Parameter(torch.full((image_width,), scale))
        self.text_scale = nn.Parameter(torch.full((text_width,), scale))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, N, C] and tokens [B, M, D] to the same.

        ``mask`` is bool [B, M], False for padding tokens, which no pixel attends to. All pixels are attended to, also
        those of an image's padding, as in the authors' code.
        """
        pixels = self.view(image)
        text = self.text_norm(text)
        key = self._split(self.key(text))
        to_image = self._attend(pixels.query, key, self._split(self.text_value(text)), mask[:, None, None, :])
        return pixels.features + self.image_scale * self.to_image(to_image), self._read(pixels, text, key)

    def view(self, image: Tensor) -> "Pixels":
        """Pixels [B, N, C] as texts read them."""
        image = self.image_norm(image)
        return Pixels(image, self._split(self.query(image)), self._split(self.image_value(image)))

    def read(self, pixels: "Pixels", text: Tensor) -> Tensor:
        """Tokens [B, M, D] to the same; the pixels do not see the text, so a token depends on no other token."""
        text = self.text_norm(text)
        return self._read(pixels, text, self._split(self.key(text)))

    def _read(self, pixels: "Pixels", text: Tensor, key: Tensor) -> Tensor:
        to_text = self.to_text(self._attend(key, pixels.query, pixels.value, None))
        read: Tensor = text + self.text_scale * to_text
        return read

    def _split(self, features: Tensor) -> Tensor:
        """[B, L, heads * d] to [B, heads, L, d]."""
        split: Tensor = features.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return split

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return mixed.transpose(1, 2).flatten(2)
