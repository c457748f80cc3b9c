"""Images as grids of codes from a codebook: what VQGAN trains, and what methods that optimise such a grid read.

A latent z, float [N, D, h, w], becomes its nearest codes by Euclidean distance. The gradient of the codes is passed to
z unchanged (van den Oord, Vinyals, Kavukcuoglu 2017, arXiv 1711.00937, section 3.2).
"""

from pathlib import Path
from typing import Any, Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

MOST_DISTANCES = 1 << 26
"""Distances that are computed at once: 256 MiB of float32."""


@runtime_checkable
class ImageCodes(Protocol):
    """An encoder to latents, a codebook, and a decoder."""

    @property
    def downsampling(self) -> int:
        """Pixels per latent along each side, such as 16; sides of images are multiples of it."""
        ...

    @property
    def codebook(self) -> Tensor:
        """Float [K, D]."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Images float [N, 3, H, W] from 0 to 1 to latents before quantisation, float [N, D, h, w]."""
        ...

    def quantise(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [N, D, h, w] to their codes [N, D, h, w], with the gradient passed straight through, and the codes'
        numbers, int64 [N, h, w].
        """
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Codes float [N, D, h, w] to images float [N, 3, H, W], about from 0 to 1, not clamped."""
        ...


@torch.no_grad()
def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The number of the code [K, D] with the least Euclidean distance to each vector [M, D]: int64 [M].

    Float32 regardless of autocast (float64 stays); the first of equally near codes. Memory is bounded.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        kind = torch.promote_types(vectors.dtype, torch.float32)
        vectors, codebook = vectors.to(kind), codebook.to(kind)
        half = codebook.square().sum(1) / 2  # |v - c|^2 / 2 without |v|^2 / 2, which is the same for all codes
        parts = vectors.split(max(1, MOST_DISTANCES // len(codebook)))
        return torch.cat([torch.addmm(half, part, codebook.T, alpha=-1).argmin(1) for part in parts])


def quantised(latents: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes of latents float [N, D, h, w], with gradients of the codebook, and int64 [N, h, w]."""
    numbers = nearest_codes(latents.permute(0, 2, 3, 1).flatten(0, 2), codebook)
    numbers = numbers.view(len(latents), *latents.shape[2:])
    return functional.embedding(numbers, codebook).permute(0, 3, 1, 2), numbers


def straight_through(latents: Tensor, codes: Tensor) -> Tensor:
    """The value of ``codes`` with the gradient of ``latents``."""
    return latents + (codes - latents).detach()


def perplexity(counts: Tensor) -> Tensor:
    """The exponential of the entropy of the codes' frequencies float [K]: float [], from 1 to K."""
    shares = counts.double() / counts.double().sum().clamp(min=1e-12)
    entropy: Tensor = torch.special.entr(shares).sum()
    return entropy.exp()


class JanusCodes(nn.Module):
    """The image codes of Janus (Wu et al. 2024, arXiv 2410.13848) in transformers: 16,384 codes of width 8, 16 pixels.

    Codes and latents are unit vectors, so the nearest code is that with the largest cosine.
    """

    def __init__(self, model: Any) -> None:
        """``model`` is a ``transformers.JanusVQVAE``."""
        super().__init__()
        self.model = model
        self.downsampling = 2 ** (len(model.config.channel_multiplier) - 1)
        self.eval().requires_grad_(False)

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """The folder holds config.json and model.safetensors of a ``JanusVQVAE``; transformers' errors are raised."""
        from transformers import JanusVQVAE  # seconds to import

        return cls(JanusVQVAE.from_pretrained(folder, local_files_only=True, use_safetensors=True))

    @property
    def codebook(self) -> Tensor:
        """Unit float [K, D]."""
        return functional.normalize(self.model.quantize.embedding.weight, dim=-1)

    def encode(self, images: Tensor) -> Tensor:
        """Images float [N, 3, H, W] from 0 to 1 to unit latents float [N, D, h, w]."""
        return functional.normalize(self.model.quant_conv(self.model.encoder(images * 2 - 1)), dim=1)

    def quantise(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`ImageCodes`; latents need not be unit vectors."""
        codes, numbers = quantised(latents, self.codebook)
        return straight_through(latents, codes), numbers

    def decode(self, codes: Tensor) -> Tensor:
        """Codes float [N, D, h, w] to images float [N, 3, H, W], about from 0 to 1."""
        return (cast(Tensor, self.model.decoder(self.model.post_quant_conv(codes))) + 1) / 2
