"""The discriminator of patches (Isola et al. 2017, arXiv 1611.07004) with the hinge loss, and its adaptive weight."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.losses import Gather, alone
from pipeline.models.towers.batch_norm import GatheredBatchNorm

SLOPE = 0.2
MOST_FACTOR = 8  # of the channels
LARGEST_WEIGHT = 1e4
EPSILON = 1e-4


class PatchDiscriminator(nn.Module):
    """Says of each patch of an image whether it is real: convolutions of stride 2, then two of stride 1.

    With 3 layers a patch is 70 pixels wide. Batch normalisation uses the rows of all ranks.
    """

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        widths = [channels * min(2**number, MOST_FACTOR) for number in range(layers + 1)]
        modules: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for number, (before, after) in enumerate(zip(widths, widths[1:], strict=False), start=1):
            stride = 2 if number < layers else 1
            modules.append(nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False))
            modules += [GatheredBatchNorm(after), nn.LeakyReLU(SLOPE)]
        self.main = nn.Sequential(*modules, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_start)

    def forward(self, images: Tensor, gather: Gather = alone) -> Tensor:
        """Images float [N, 3, H, W] from -1 to 1 to logits float [N, 1, h, w], high where they look real."""
        features = images
        for module in self.main:
            if isinstance(module, GatheredBatchNorm):
                rows = features.float().permute(0, 2, 3, 1)
                features = module(rows.flatten(0, 2), gather).view(rows.shape).permute(0, 3, 1, 2)
            else:
                features = module(features)
        return features


def smallest_side(layers: int) -> int:
    """The least side in pixels of images that a discriminator with ``layers`` layers can read."""
    # The strides give side / 2^layers, and each of the two last convolutions takes one away.
    return int(3 * 2**layers)


def real_loss(logits: Tensor) -> Tensor:
    """Half of the discriminator's hinge loss, of real images (Lim and Ye 2017, arXiv 1705.02894)."""
    return functional.relu(1 - logits.float()).mean() / 2


def fake_loss(logits: Tensor) -> Tensor:
    """The other half, of reconstructions."""
    return functional.relu(1 + logits.float()).mean() / 2


def generator_loss(logits: Tensor) -> Tensor:
    """The loss of reconstructions that should look real."""
    return -logits.float().mean()


def adaptive_weight(likeness: Tensor, adversarial: Tensor, last: Tensor, gather: Gather = alone) -> Tensor:
    """Factor of the ``adversarial`` loss, float [] without gradient (VQGAN paper, equation 7).

    It is the ratio of the norms of both losses' gradients of the decoder's ``last`` weight, ``likeness`` first, up to
    10,000. Gradients are averaged over ranks.
    """
    gradients = [torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (likeness, adversarial)]
    with torch.no_grad():
        means = gather(torch.stack([gradient.float().flatten() for gradient in gradients])[None]).mean(dim=0)
        norms = means.norm(dim=1)
        ratio: Tensor = norms[0] / (norms[1] + EPSILON)
        return ratio.clamp(0, LARGEST_WEIGHT)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """What is computed inside gives the module's weights no gradient."""
    changed = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)


def _start(module: nn.Module) -> None:
    """Normal weights of deviation 0.02, around 1 for batch normalisation; biases 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, GatheredBatchNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
