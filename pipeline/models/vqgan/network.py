"""The encoder, the codebook and the decoder of VQGAN (arXiv 2012.09841, table 7).

Modules and weights have the names of https://github.com/CompVis/taming-transformers (MIT), so that its checkpoints fit
by name: see ``released.py``. Images are float [N, 3, H, W] from -1 to 1; their sides are multiples of
:attr:`VqganNetwork.downsampling`.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import require

GROUPS = 32  # of group normalisation


@dataclass(frozen=True, kw_only=True)
class VqganSizes:
    """Sizes of the network, with the values of taming's ImageNet model with 16 pixels per code (f16)."""

    resolution: int = 256
    """Side in pixels that says where attention is; the network reads images of other sizes as well."""
    channels: int = 128
    """Channels at full resolution, a multiple of 32."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Factors of the channels at each resolution; each but the last halves the sides."""
    residual_blocks: int = 2
    """Residual blocks at each resolution; the decoder has one more."""
    attention_at: tuple[int, ...] = (16,)
    """Sides of feature maps, of images of ``resolution`` pixels, whose residual blocks are followed by attention."""
    latent_channels: int = 256
    """Channels between the encoder and the codes."""
    dropout: float = 0.0
    """Dropout of the residual blocks, 0 to less than 1."""
    codes: int = 1024
    """Number of codes; the paper has 1024 and 16,384 for ImageNet."""
    code_width: int = 256
    """Width of a code."""

    def __post_init__(self) -> None:
        multipliers = self.multipliers
        require(bool(multipliers) and min(multipliers) >= 1, "multipliers", multipliers, "one or more numbers above 0")
        fits = self.channels >= GROUPS and self.channels % GROUPS == 0
        require(fits, "channels", self.channels, f"a multiple of {GROUPS}")
        for name in ("residual_blocks", "latent_channels", "code_width"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.codes >= 2, "codes", self.codes, "2 or more")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "0 to less than 1")
        step = self.downsampling
        fits = self.resolution >= step and self.resolution % step == 0
        require(fits, "resolution", self.resolution, f"a multiple of {step}, the pixels per code")
        sides = {self.resolution >> level for level in range(len(multipliers))}
        known = ", ".join(str(side) for side in sorted(sides))
        require(set(self.attention_at) <= sides, "attention_at", self.attention_at, f"sides of feature maps: {known}")

    @property
    def downsampling(self) -> int:
        """Pixels per code along each side."""
        return int(2 ** (len(self.multipliers) - 1))


class VqganNetwork(nn.Module):
    """Encoder, codebook and decoder."""

    def __init__(self, sizes: VqganSizes) -> None:
        super().__init__()
        self.downsampling = sizes.downsampling
        self.encoder, self.decoder = VqganEncoder(sizes), VqganDecoder(sizes)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(sizes.codes, sizes.code_width)
        nn.init.uniform_(self.codebook, -1 / sizes.codes, 1 / sizes.codes)
        self.quant_conv = nn.Conv2d(sizes.latent_channels, sizes.code_width, 1)
        self.post_quant_conv = nn.Conv2d(sizes.code_width, sizes.latent_channels, 1)

    @property
    def codebook(self) -> Tensor:
        """Float [K, D]."""
        weight = self.get_parameter("quantize.embedding.weight")
        return weight

    def encode(self, images: Tensor) -> Tensor:
        """Images to latents before quantisation, float [N, D, H / f, W / f]."""
        latents: Tensor = self.quant_conv(self.encoder(images))
        return latents

    def decode(self, codes: Tensor) -> Tensor:
        """Codes float [N, D, h, w] to images, about from -1 to 1."""
        images: Tensor = self.decoder(self.post_quant_conv(codes))
        return images


class VqganEncoder(nn.Module):
    """Images to features at the lowest resolution."""

    def __init__(self, sizes: VqganSizes) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, sizes.channels, 3, padding=1)
        self.down = nn.ModuleList()
        width, side = sizes.channels, sizes.resolution
        for level, factor in enumerate(sizes.multipliers):
            stage = VqganStage(width, factor * sizes.channels, sizes.residual_blocks, side in sizes.attention_at, sizes)
            width = factor * sizes.channels
            if level < len(sizes.multipliers) - 1:
                stage.downsample = HalfResolution(width)
            side //= 2
            self.down.append(stage)
        self.mid = VqganMiddle(width, sizes)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, sizes.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Float [N, 3, H, W] to float [N, latent_channels, H / f, W / f]."""
        features = self.conv_in(images)
        for stage in self.down:
            features = stage(features)
        features = self.mid(features)
        last: Tensor = self.conv_out(functional.silu(self.norm_out(features)))
        return last


class VqganDecoder(nn.Module):
    """Features at the lowest resolution to images."""

    def __init__(self, sizes: VqganSizes) -> None:
        super().__init__()
        width = sizes.multipliers[-1] * sizes.channels
        self.conv_in = nn.Conv2d(sizes.latent_channels, width, 3, padding=1)
        self.mid = VqganMiddle(width, sizes)
        stages: list[nn.Module] = []
        for level in reversed(range(len(sizes.multipliers))):
            after, attends = sizes.multipliers[level] * sizes.channels, sizes.resolution >> level in sizes.attention_at
            stage = VqganStage(width, after, sizes.residual_blocks + 1, attends, sizes)
            width = after
            if level:
                stage.upsample = DoubleResolution(width)
            stages.append(stage)
        self.up = nn.ModuleList(reversed(stages))  # taming numbers them by resolution, the highest first
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Float [N, latent_channels, h, w] to float [N, 3, f h, f w]."""
        features = self.mid(self.conv_in(latents))
        for stage in reversed(self.up):
            features = stage(features)
        images: Tensor = self.conv_out(functional.silu(self.norm_out(features)))
        return images


class VqganStage(nn.Module):
    """The residual blocks of one resolution, each with attention where it has some, and the change of resolution."""

    downsample: nn.Module | None
    upsample: nn.Module | None

    def __init__(self, before: int, after: int, blocks: int, attends: bool, sizes: VqganSizes) -> None:
        super().__init__()
        widths = [before, *[after] * blocks]
        self.block = nn.ModuleList(Residual(*pair, sizes.dropout) for pair in zip(widths, widths[1:], strict=False))
        self.attn = nn.ModuleList(SpatialAttention(after) for _ in range(blocks if attends else 0))
        self.downsample = self.upsample = None

    def forward(self, features: Tensor) -> Tensor:
        """Float [N, before, H, W] to float [N, after, H', W']."""
        for number, block in enumerate(self.block):
            features = block(features)
            if self.attn:
                features = self.attn[number](features)
        for change in (self.downsample, self.upsample):
            if change is not None:
                features = change(features)
        return features


class VqganMiddle(nn.Module):
    """Two residual blocks with attention between them."""

    def __init__(self, width: int, sizes: VqganSizes) -> None:
        super().__init__()
        self.block_1 = Residual(width, width, sizes.dropout)
        self.attn_1 = SpatialAttention(width)
        self.block_2 = Residual(width, width, sizes.dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Float [N, width, h, w] to the same."""
        features = self.block_2(self.attn_1(self.block_1(features)))
        return features


class Residual(nn.Module):
    """Two convolutions after normalisation and SiLU, added to the input."""

    def __init__(self, before: int, after: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(before), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = _norm(after), nn.Conv2d(after, after, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Float [N, before, H, W] to float [N, after, H, W]."""
        hidden = self.conv1(functional.silu(self.norm1(features)))
        hidden = self.conv2(self.dropout(functional.silu(self.norm2(hidden))))
        shortcut = self.nin_shortcut(features) if hasattr(self, "nin_shortcut") else features
        added: Tensor = shortcut + hidden
        return added


class SpatialAttention(nn.Module):
    """Attention of one head between all positions, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, features: Tensor) -> Tensor:
        """Float [N, width, h, w] to the same."""
        normed = self.norm(features)
        query, key, value = (one(normed).flatten(2).mT[:, None] for one in (self.q, self.k, self.v))
        found = functional.scaled_dot_product_attention(query, key, value)[:, 0].mT
        added: Tensor = self.proj_out(found.reshape(features.shape))
        return features + added


class HalfResolution(nn.Module):
    """A convolution of stride 2, padded on the right and at the bottom."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, features: Tensor) -> Tensor:
        """Float [N, width, H, W] to float [N, width, H / 2, W / 2]."""
        half: Tensor = self.conv(functional.pad(features, (0, 1, 0, 1)))
        return half


class DoubleResolution(nn.Module):
    """Each position four times, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Float [N, width, H, W] to float [N, width, 2 H, 2 W]."""
        double: Tensor = self.conv(functional.interpolate(features, scale_factor=2.0, mode="nearest"))
        return double


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, width, eps=1e-6)
