"""How near reconstructed images are to their originals: PSNR, SSIM, and the Fréchet distance of features.

Images are float [N, 3, H, W] from 0 to 1.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

HIGHEST_PSNR = 100.0
"""dB of equal images."""
WINDOW, SIGMA = 11, 1.5  # of SSIM, in pixels
STABLE = (0.01**2, 0.03**2)


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, float64 [N], up to 100."""
    errors = (images.double() - others.double()).square().flatten(1).mean(dim=1)
    return (-10 * errors.clamp(min=1e-30).log10()).clamp(max=HIGHEST_PSNR)


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each image, float64 [N], up to 1 (Wang, Bovik, Sheikh, Simoncelli 2004).

    Gaussian windows of 11 pixels and deviation 1.5 that lie inside of the image; the mean over them and over channels.
    Sides are 11 pixels or more.
    """
    one, other = images.double(), others.double()
    mean, mean_other = _blurred(one), _blurred(other)
    variance, variance_other = _blurred(one * one) - mean**2, _blurred(other * other) - mean_other**2
    covariance = _blurred(one * other) - mean * mean_other
    light = (2 * mean * mean_other + STABLE[0]) / (mean**2 + mean_other**2 + STABLE[0])
    structure = (2 * covariance + STABLE[1]) / (variance + variance_other + STABLE[1])
    return (light * structure).flatten(1).mean(dim=1)


def _blurred(images: Tensor) -> Tensor:
    """[N, C, H, W] to [N, C, H - 10, W - 10]."""
    places = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    window = (-(places**2) / (2 * SIGMA**2)).exp()
    window = (window / window.sum()).expand(images.shape[1], 1, 1, WINDOW)
    rows = functional.conv2d(images, window, groups=images.shape[1])
    return functional.conv2d(rows, window.transpose(2, 3), groups=images.shape[1])


class FeatureMoments:
    """Mean and covariance of feature vectors, added batch by batch in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: NDArray[np.float64] = np.zeros(())
        self._squares: NDArray[np.float64] = np.zeros(())

    def add(self, vectors: Tensor) -> None:
        """Float [N, D]."""
        rows = vectors.detach().double().cpu().numpy()
        self.count += len(rows)
        self._sum = self._sum + rows.sum(axis=0)
        self._squares = self._squares + rows.T @ rows

    def mean(self) -> NDArray[np.float64]:
        """[D]."""
        mean: NDArray[np.float64] = self._sum / self.count
        return mean

    def covariance(self) -> NDArray[np.float64]:
        """[D, D], of a sample; zero for a single vector."""
        mean = self.mean()
        return (self._squares - self.count * np.outer(mean, mean)) / max(1, self.count - 1)


def frechet_distance(one: FeatureMoments, other: FeatureMoments) -> float:
    """The squared distance of two normal distributions (Dowson and Landau 1982), which FID takes of Inception features.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), 0 or more.
    """
    first, second = one.covariance(), other.covariance()
    root = _root(first)
    # The eigenvalues of S1 S2 are those of S1^(1/2) S2 S1^(1/2), which is symmetric.
    crossed = np.sqrt(np.clip(np.linalg.eigvalsh(root @ second @ root), 0, None)).sum()
    apart = np.square(one.mean() - other.mean()).sum()
    return max(0.0, float(apart + np.trace(first) + np.trace(second) - 2 * crossed))


def _root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The symmetric root of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    root: NDArray[np.float64] = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root
