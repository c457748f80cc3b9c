"""VQGAN-CLIP: Open Domain Image Generation and Editing with Natural Language Guidance.

Crowson, Biderman, Kornis, Stander, Hallahan, Castricato, Raff, 2022, arXiv 2204.08583

The idea: the parameters of an image are the codes z of a frozen VQGAN, and CLIP says how well the decoded image fits
its prompts. In each step z is replaced by its nearest codes q(z), whose gradients pass to z unchanged; the image
x = D(q(z)) is cut into K views x_k, and with unit features u of CLIP and prompts j with weights w_j and vectors t_j

    L = sum_j |w_j| mean_k sign(w_j) 2 arcsin(|u(x_k) - t_j| / 2)^2  +  init_weight / (2 (2i + 1)) mean z^2   (step i)

After the step z is clipped to the smallest and largest value of each channel over all codes. Prompts are texts or
images, with weights and stops. An image starts from random codes, noise, a gradient of colours, or a given image; with
a mask only a part of it is changed.

Left out: the authors' video and zoom loops, and optimisers other than Adam. Views are those of
:mod:`pipeline.generation.views`, in which each augmentation is sampled by itself.

The paper reports human ratings; a run is held against a second CLIP's score (``judge``) and R-precision.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pipeline.config import require
from pipeline.generation.guides import Guide
from pipeline.generation.loop import LoopConfig, Objective, Picture
from pipeline.generation.method import NO_CODES, GenerationMethod, Subject
from pipeline.generation.streams import Draw, generators, uniform
from pipeline.generation.text_objective import TextObjective
from pipeline.generation.views import Augmentation, as_float, resized, views_of
from pipeline.loaders.images import image_at
from pipeline.models.towers.image_codes import ImageCodes


@dataclass(frozen=True, kw_only=True)
class Config:
    """The image and its optimisation, with the authors' values."""

    codes: str = "runs/vqgan"
    """VQGAN whose codes are optimised: a run of jobs/train_vqgan.py, FILE.ckpt of taming, or a folder of JanusVQVAE."""
    clips: tuple[str, ...] = ("ViT-B-32-quickgelu:openai",)
    """CLIPs that guide the image, as addresses of checkpoints or ARCHITECTURE:WEIGHTS; losses are added."""
    size: tuple[int, int] = (512, 512)
    """Width and height of the image in pixels, multiples of the VQGAN's factor."""
    start: Literal["codes", "noise", "gradient", "image"] = "codes"
    """First image: random codes, uniform noise, a random gradient of colours, or `start_image`."""
    start_image: str = ""
    """Image to start from: a path or URI that tasks can read. It is resized to `size`; transparent parts are white."""
    edit_mask: str = ""
    """Image of the same size as `start_image`: dark parts keep the pixels of the start image. Empty edits all."""
    init_weight: float = 0.0
    """Weight of the mean square of the codes, which falls with the steps."""
    average: float = 0.0
    """Decay of a moving average of the codes, which is what is shown; 0 shows the codes themselves. 0 to 1."""
    views: int = 32
    """Augmented views in a step."""
    augmentation: Augmentation = "cutouts"
    """Kind of views: pooled and augmented cut-outs, random squares, CLIPDraw's perspectives, or the image itself."""
    cut_power: float = 1.0
    """Power of the random sides of squares; more than 1 prefers small squares."""
    rate: float = 0.1
    """Learning rate of Adam."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=500))

    def __post_init__(self) -> None:
        require(len(self.clips) >= 1, "clips", self.clips, "one CLIP or more")
        require(all(16 <= side <= 4096 for side in self.size), "size", self.size, "two sides from 16 to 4096")
        require(self.views >= 1, "views", self.views, "1 or more")
        for name in ("rate", "cut_power"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "more than 0")
        require(0 <= self.init_weight < math.inf, "init_weight", self.init_weight, "0 or more")
        require(0 <= self.average < 1, "average", self.average, "0 to 1, without 1")
        is_image = self.start == "image"
        allowed = "an image" if is_image else "none, or start=image"
        require(bool(self.start_image) == is_image, "start_image", self.start_image, allowed)
        require(is_image or not self.edit_mask, "edit_mask", self.edit_mask, "none, or start=image")


class VqganClip(GenerationMethod):
    """Codes of a VQGAN that fit prompts."""

    reads: ClassVar[Literal["text", "image"]] = "text"
    config: Config

    @property
    def models(self) -> tuple[str, ...]:
        """Those that guide."""
        return self.config.clips

    @property
    def codes(self) -> tuple[str, ...]:
        """The VQGAN."""
        return (self.config.codes,)

    @property
    def files(self) -> tuple[str, ...]:
        """The start image and the mask, if there are any."""
        return tuple(filter(None, (self.config.start_image, self.config.edit_mask)))

    def start(
        self,
        subjects: Sequence[Subject],
        seeds: Sequence[int],
        guides: Mapping[str, Guide],
        codes: Mapping[str, ImageCodes] = NO_CODES,
    ) -> tuple[Picture, Objective]:
        """Codes by seed, or those of the start image."""
        config, some = self.config, [guides[name] for name in self.config.clips]
        device = some[0].device
        vqgan = codes[config.codes]
        factor, (width, height) = vqgan.downsampling, config.size
        fits = width % factor == 0 and height % factor == 0
        require(fits, "size", config.size, f"multiples of {factor}, the pixels of a code")
        given = None if config.start != "image" else _read(config.start_image, (height, width))
        first = start_codes(vqgan, config.start, seeds, (height, width), given)
        kept = None
        if given is not None and config.edit_mask:
            kept = given.to(device), self._mask((height, width)).to(device)
        painted = CodePicture(vqgan, first, config.rate, config.init_weight, config.average, kept)
        views = views_of(config.augmentation, config.views, config.cut_power)
        objective = TextObjective([one.prompts for one in subjects], some, views, "spherical", "mean")
        return painted.to(device), objective

    def _mask(self, size: tuple[int, int]) -> Tensor:
        """1 where the image is changed, 0 where the start image stays: float [1, H, W]."""
        config = self.config
        mask, image = image_at(config.edit_mask), image_at(config.start_image)
        wanted = f"the size of {config.start_image}, {image.shape[1]} x {image.shape[0]}"
        require(mask.shape == image.shape, "edit_mask", config.edit_mask, wanted)
        found = resized(as_float(mask)[None], size)[0].mean(0, keepdim=True)
        require(bool((found > 0.5).any()), "edit_mask", config.edit_mask, "a mask with a light part, which is edited")
        return found


class CodePicture(Picture):
    """N images as codes of a VQGAN: ``z``, float [N, D, h, w]."""

    def __init__(
        self,
        codes: ImageCodes,
        start: Tensor,
        rate: float = 0.1,
        init_weight: float = 0.0,
        average: float = 0.0,
        kept: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """``kept`` are a start image [3, H, W], and a mask [1, H, W] that is 0 where its pixels stay."""
        super().__init__()
        # A frozen model is no part of the image: as a submodule it would be in every checkpoint.
        self._codes, self._kept = (codes,), kept
        self.rate, self.init_weight, self.decay = rate, init_weight, average
        self.z = nn.Parameter(start.clone())
        book = codes.codebook
        self._limits = book.amin(0)[:, None, None], book.amax(0)[:, None, None]
        if average:
            self.register_buffer("averaged", torch.zeros_like(start))
            self.register_buffer("rest", torch.ones(len(start)))
            self._add_to_average()

    def render(self) -> Tensor:
        """The decoded nearest codes."""
        return self._decoded(self.z)

    def shown(self) -> Tensor:
        """The decoded average, or the image as it is."""
        if not self.decay:
            return self.render()
        averaged: Any = self.averaged
        rest: Any = self.rest
        return self._decoded(averaged / (1 - rest).view(-1, 1, 1, 1))

    def _decoded(self, z: Tensor) -> Tensor:
        (codes,) = self._codes
        images = clamp_with_gradient(codes.decode(codes.quantise(z)[0]), 0, 1)
        if self._kept is None:
            return images
        start, mask = self._kept
        return start + mask * (images - start)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One."""
        return [{"params": [self.z], "lr": self.rate}]

    def penalties(self, step: int) -> dict[str, Tensor]:
        """The mean square of z, weighted by step."""
        if not self.init_weight:
            return {}
        return {"init": self.z.square().flatten(1).mean(1) * self.init_weight / (2 * (2 * step + 1))}

    @torch.no_grad()
    def after_step(self) -> None:
        """z within the codes' limits of each channel."""
        self.z.copy_(torch.minimum(torch.maximum(self.z, self._limits[0]), self._limits[1]))
        if self.decay:
            self._add_to_average()

    @torch.no_grad()
    def _add_to_average(self) -> None:
        """The average without bias is ``averaged`` / (1 - ``rest``), as Adam's moments are."""
        averaged: Any = self.averaged
        rest: Any = self.rest
        averaged.mul_(self.decay).add_((1 - self.decay) * self.z)
        rest.mul_(self.decay)


class _ClampWithGradient(torch.autograd.Function):
    """Clamp, whose gradient also passes outside of the limits where a step would lead back inside."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, low: float, high: float) -> Tensor:
        clamped = values.clamp(low, high)
        ctx.save_for_backward(values - clamped)
        return clamped

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor, None, None]:
        (outside,) = ctx.saved_tensors
        return incoming[0] * (incoming[0] * outside >= 0), None, None


def clamp_with_gradient(values: Tensor, low: float, high: float) -> Tensor:
    """``values`` within the limits. Outside, a gradient g passes if a step by -g leads back towards them."""
    clamped: Tensor = _ClampWithGradient.apply(values, low, high)
    return clamped


@torch.no_grad()
def start_codes(
    codes: ImageCodes, kind: str, seeds: Sequence[int], size: tuple[int, int], given: Tensor | None = None
) -> Tensor:
    """First codes, float [N, D, h, w]: entries of the codebook for ``size`` = (height, width) pixels.

    ``given`` [3, H, W] is the start image of the kind ``image``.
    """
    random = generators(seeds, 0, Draw.START)
    book = codes.codebook
    if kind == "codes":
        height, width = (side // codes.downsampling for side in size)
        numbers = (uniform(random, height, width) * len(book)).long().clamp(max=len(book) - 1)
        return book[numbers.to(book.device)].permute(0, 3, 1, 2).contiguous()
    if kind == "image":
        assert given is not None
        images = given.expand(len(seeds), -1, -1, -1)
    else:
        images = uniform(random, 3, *size) if kind == "noise" else gradients(random, size)
    # One by one: so the codes of an image do not depend on the batch, not even by rounding.
    found = [codes.quantise(codes.encode(image[None].to(book)))[0] for image in images]
    return torch.cat(found)


def gradients(random: Sequence[torch.Generator], size: tuple[int, int]) -> Tensor:
    """Each channel goes from one random value to another, down or to the right: float [N, 3, *size], 0 to 1."""
    values = uniform(random, 3, 3)[..., None, None]
    down = torch.linspace(0, 1, size[0])[:, None]
    right = torch.linspace(0, 1, size[1])[None]
    along = torch.where(values[:, :, 2] < 0.5, down, right)
    return values[:, :, 0] + (values[:, :, 1] - values[:, :, 0]) * along


def _read(place: str, size: tuple[int, int]) -> Tensor:
    """The image at ``place``, resized: float [3, *size]."""
    return resized(as_float(image_at(place))[None], size)[0]
