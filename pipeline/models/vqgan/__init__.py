"""VQGAN: Taming Transformers for High-Resolution Image Synthesis.

Esser, Rombach, Ommer, 2020, arXiv 2012.09841

The idea: an image x becomes a grid of codes. An encoder E gives a latent z at each of h x w places, the nearest entry
of a codebook replaces it (z_q), and a decoder G makes an image of the codes; the gradient passes the quantisation
unchanged. Reconstructions must look right rather than match pixels, so the loss has a distance d of a frozen network's
features, and a discriminator D of patches, which is trained in turns with the rest. With y = G(z_q),

    L     = mean |x - y| + d(x, y) + w_c |sg[z] - z_q|^2 + w_e |z - sg[z_q]|^2 + 0.8 lambda (- mean D(y))
    L_D   = ( mean max(0, 1 - D(x)) + mean max(0, 1 + D(y)) ) / 2
    lambda = |grad_last (mean |x - y| + d)| / ( |grad_last (- mean D(y))| + 1e-4 ),   last: the decoder's last weight

D and its term of L begin at a step of the training. A step has two turns, as in the authors' code: the autoencoder
is updated by L, then D by L_D of new reconstructions. The two squared distances are means. As in the authors' released
models the distance that moves codes has the weight 0.25 and the one that moves latents 1, the other way round than in
VQ-VAE.

Differences: the authors' d is LPIPS. Give its weights with ``perceptual_linear``; by default the layers of VGG-16 count
alike. Norms of lambda are those of the whole batch over all workers, and batch normalisation uses all of it; the
authors' differ by worker. A code that was not chosen for ``restart_after`` steps can become a latent of the batch
(Dhariwal et al. 2020, arXiv 2005.00341, section 3); the paper has no such rule.

Left out: the transformer that generates codes (section 3.2), codebooks with Gumbel noise, conditional discriminators.

To hold a run against: reconstruction FID on ImageNet validation, f16: 7.94 with 1024 codes, 4.98 with 16,384 (the
authors' repository).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from pipeline.config import require
from pipeline.loaders.batches import Reader
from pipeline.loaders.images import ImageTransform
from pipeline.loaders.readers import ImageReader
from pipeline.models.method import Method
from pipeline.models.towers import feature_network
from pipeline.models.towers.image_codes import quantised, straight_through
from pipeline.models.vqgan.codebook import CodebookUse, codebook_loss, commitment_loss, restart, spare_latents
from pipeline.models.vqgan.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    fake_loss,
    frozen,
    generator_loss,
    real_loss,
    smallest_side,
)
from pipeline.models.vqgan.network import VqganNetwork, VqganSizes
from pipeline.models.vqgan.perceptual import LPIPS_LAYERS, PerceptualDistance
from pipeline.models.vqgan.released import load_start

GENERATOR, DISCRIMINATOR = "autoencoder", "discriminator"
"""The turns of a step."""


@dataclass(frozen=True, kw_only=True)
class Config(VqganSizes):
    """Sizes and losses, with the values of the authors' ImageNet f16 model."""

    start_from: str = ""
    """Initial weights: a checkpoint file of taming-transformers, or a checkpoint folder; none for random weights."""
    image_size: int = 256
    """Side of training images in pixels, a multiple of the pixels per code."""
    crop: Literal["square", "centre"] = "square"
    """Training crop: square (random, of the short side's length) or centre."""
    flip: float = 0.0
    """Probability of mirroring a training image."""
    pixel_weight: float = 1.0
    """Weight of the absolute difference of pixels."""
    perceptual: str = "timm:vgg16.tv_in1k"
    """Network whose features are compared: timm:NAME, timm:NAME:FILE with its weights, or a CLIP as
    ARCHITECTURE:WEIGHTS; empty compares pixels alone."""
    perceptual_layers: tuple[str, ...] = LPIPS_LAYERS
    """Modules of the network whose outputs are compared; the default are LPIPS's layers of VGG-16."""
    perceptual_linear: str = ""
    """File with the linear weights of LPIPS; empty for equal weights."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual distance."""
    codebook_weight: float = 0.25
    """Weight of the distance that moves codes to latents."""
    commitment_weight: float = 1.0
    """Weight of the distance that moves latents to codes."""
    restart_after: int | None = None
    """Steps after which a code that is not chosen becomes a random latent of the batch; none keeps it."""
    discriminator_start: int = 250_001
    """Steps before the discriminator and its loss begin."""
    discriminator_weight: float = 0.8
    """Factor of the adversarial loss beside its adaptive weight; 0 trains no discriminator."""
    discriminator_channels: int = 64
    """Channels of the discriminator's first convolution."""
    discriminator_layers: int = 3
    """Convolutions of stride 2 of the discriminator."""

    def __post_init__(self) -> None:
        super().__post_init__()
        step, size = self.downsampling, self.image_size
        require(size >= step and size % step == 0, "image_size", size, f"a multiple of {step}, the pixels per code")
        require(0 <= self.flip <= 1, "flip", self.flip, "0 to 1")
        weights = ("pixel", "perceptual", "codebook", "commitment", "discriminator")
        for name in (f"{one}_weight" for one in weights):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        some = bool(self.perceptual_layers) or not self.perceptual
        require(some, "perceptual_layers", self.perceptual_layers, "one or more layers of perceptual")
        restart = self.restart_after
        require(restart is None or restart >= 1, "restart_after", restart, "1 or more, or none")
        require(self.discriminator_start >= 0, "discriminator_start", self.discriminator_start, "0 or more")
        for name in ("discriminator_channels", "discriminator_layers"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        least = smallest_side(self.discriminator_layers)
        fits = size >= least or not self.discriminator_weight
        require(fits, "discriminator_layers", self.discriminator_layers, f"fewer, since it needs {least} pixels a side")


class Vqgan(Method):
    """Encoder, codebook, decoder, and the discriminator that trains with them."""

    batch_keys: ClassVar[tuple[str, ...]] = ("image",)
    registered_as: ClassVar[str] = "vqgan"
    turns: ClassVar[tuple[str, ...]] = (GENERATOR, DISCRIMINATOR)
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.model = VqganNetwork(config)
        load_start(self.model, config.start_from)
        self.discriminator: PatchDiscriminator | None = None
        if config.discriminator_weight:
            self.discriminator = PatchDiscriminator(config.discriminator_channels, config.discriminator_layers)
        self.use = CodebookUse(config.codes)
        self.perceptual: PerceptualDistance | None = None
        self._spare: Tensor | None = None
        self._measured: dict[str, Tensor] = {}
        self._steps = 0  # of use.steps, without waiting for the device
        self.register_load_state_dict_post_hook(_count_as_saved)  # type: ignore[no-untyped-call]

    @classmethod
    def smallest(cls) -> Config:
        """Eight codes a side of 32 pixels, pixels and a discriminator from the first step."""
        return Config(
            resolution=32,
            image_size=32,
            channels=32,
            multipliers=(1, 1, 2),
            residual_blocks=1,
            attention_at=(8,),
            latent_channels=16,
            codes=32,
            code_width=8,
            perceptual="",
            discriminator_start=0,
            discriminator_channels=32,  # fewer give logits in which the hinge has no effect
            discriminator_layers=2,
        )

    @classmethod
    def check(cls, config: Config) -> None:
        """Check that the feature network exists."""
        if config.perceptual and config.perceptual_weight:
            feature_network.check_address(config.perceptual, "perceptual")

    @classmethod
    def restored(cls, config: Config, description: Mapping[str, str]) -> Self:
        """Without initial weights."""
        method = cls(replace(config, start_from=""))
        method.config = config
        return method

    def prepare_training(self) -> None:
        """Load the feature network, which only training needs."""
        config = self.config
        if config.perceptual and config.perceptual_weight:
            layers, linear = config.perceptual_layers, config.perceptual_linear
            self.perceptual = PerceptualDistance(config.perceptual, layers, linear)

    @classmethod
    def sample_fields(cls, config: Config, settings: Any = None) -> Sequence[str]:
        """Images alone."""
        return ("image",)

    def transforms(self, train: bool) -> ImageTransform:
        """The centre at the size of training images, or the config's random crop."""
        config, size = self.config, (self.config.image_size, self.config.image_size)
        return ImageTransform(size=size, crop=config.crop, flip=config.flip) if train else ImageTransform(size=size)

    def readers(self, train: bool, *, seed: int = 0, settings: Any = None) -> Sequence[Reader]:
        """Images alone."""
        return [ImageReader(transform=self.transforms(train), seed=seed)]

    def training_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The losses of both turns, with the same weights: each reaches the weights of its own part alone."""
        images = _scaled(batch["image"])
        losses, made = self._autoencoder_losses(images)
        return {**losses, **self._discriminator_losses(images, made.detach())}

    def turn_losses(self, batch: Mapping[str, Tensor], turn: str) -> dict[str, Tensor]:
        """Those of the autoencoder; then those of the discriminator, with reconstructions by the new weights."""
        images = _scaled(batch["image"])
        if turn == GENERATOR:
            return self._autoencoder_losses(images)[0]
        if self._critic() is None:
            return {}
        with torch.no_grad():
            made = self.model.decode(self.quantise(self.model.encode(images))[0])
        return self._discriminator_losses(images, made)

    def after_step(self) -> None:
        """Count the step, and restart codes that are not used."""
        self._steps += 1
        self.use.steps += 1
        if self.config.restart_after is not None and self._spare is not None:
            restart(self.model.codebook, self.use, self.config.restart_after, self._spare)
            self._spare = None

    def measures(self) -> dict[str, float]:
        """How much of the codebook is used, and the weights of the adversarial loss."""
        measured = {"codebook_usage": self.use.usage(), "codebook_perplexity": self.use.perplexity(), **self._measured}
        return {name: float(value) for name, value in measured.items()}

    @property
    def downsampling(self) -> int:
        """Pixels per code along each side."""
        return self.model.downsampling

    @property
    def codebook(self) -> Tensor:
        """Float [K, D]."""
        return self.model.codebook

    def encode(self, images: Tensor) -> Tensor:
        """Images float [N, 3, H, W] from 0 to 1 to latents before quantisation, float [N, D, h, w]."""
        return self.model.encode(images * 2 - 1)

    def quantise(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [N, D, h, w] to their nearest codes, with the gradient passed straight through, and int64 [N, h, w]
        numbers of these."""
        codes, numbers = quantised(latents, self.codebook)
        return straight_through(latents, codes), numbers

    def decode(self, codes: Tensor) -> Tensor:
        """Codes float [N, D, h, w] to images float [N, 3, H, W], about from 0 to 1, not clamped."""
        return (self.model.decode(codes) + 1) / 2

    def _autoencoder_losses(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The weighted losses of the autoencoder, and reconstructions from -1 to 1."""
        config = self.config
        latents = self.model.encode(images)
        codes, numbers = quantised(latents, self.codebook)
        if self.training:
            self.use.count(numbers, self.gather)
            self._spare = spare_latents(latents, self.gather) if config.restart_after is not None else None
        made = self.model.decode(straight_through(latents, codes))
        losses = {"pixels": config.pixel_weight * (images - made.float()).abs().mean()}
        if self.perceptual is not None:
            distance = self.perceptual((made + 1) / 2, (images + 1) / 2).mean()
            losses["perceptual"] = config.perceptual_weight * distance
        likeness = torch.stack(list(losses.values())).sum()
        losses["codebook"] = config.codebook_weight * codebook_loss(latents, codes)
        losses["commitment"] = config.commitment_weight * commitment_loss(latents, codes)
        if (critic := self._critic()) is not None:
            losses["adversarial"] = self._adversarial(critic, likeness, made)
        return losses, made

    def _adversarial(self, critic: PatchDiscriminator, likeness: Tensor, made: Tensor) -> Tensor:
        with frozen(critic):
            loss = generator_loss(critic(made, self.gather))
        if not loss.requires_grad:  # without gradients there is no weight
            return loss * 0
        weight = adaptive_weight(likeness, loss, self.model.decoder.conv_out.weight, self.gather)
        self._measured["adversarial_weight"] = weight
        return self.config.discriminator_weight * weight * loss

    def _discriminator_losses(self, images: Tensor, made: Tensor) -> dict[str, Tensor]:
        """Of real images and of reconstructions without gradient; none before the discriminator begins."""
        critic = self._critic()
        if critic is None:
            return {}
        return {
            "discriminator_real": real_loss(critic(images, self.gather)),
            "discriminator_fake": fake_loss(critic(made, self.gather)),
        }

    def _critic(self) -> PatchDiscriminator | None:
        """The discriminator, once it has begun."""
        return self.discriminator if self._steps >= self.config.discriminator_start else None


def _scaled(image: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] to float32 from -1 to 1."""
    return image.float() / 127.5 - 1


def _count_as_saved(method: Vqgan, _: object) -> None:
    method._steps = int(method.use.steps)
