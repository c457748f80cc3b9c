"""PSNR, SSIM and the Fréchet distance against closed forms and scipy; the task on images whose codes are known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage
from torch import Tensor, nn

from pipeline.errors import SettingError
from pipeline.evaluation.fid import FidNetwork, fid_inception
from pipeline.evaluation.reconstruction import FeatureMoments, frechet_distance, psnr, ssim
from pipeline.evaluation.report import table
from pipeline.evaluation.showcase import model_figures
from pipeline.evaluation.suite import Evaluations, evaluate
from pipeline.evaluation.tasks.reconstruction import slug
from pipeline.loaders.images import ImageTransform
from pipeline.loaders.samples import Samples
from pipeline.models.towers.image_codes import quantised, straight_through
from tests.conftest import publish_coloured


def test_psnr_is_its_definition() -> None:
    images = torch.full((3, 3, 4, 5), 0.5)
    others = images + torch.tensor([0.1, 0.01, 0.0]).view(3, 1, 1, 1)
    others[0, 0] = 0.5  # a third of the values is right
    assert psnr(images, others).tolist() == pytest.approx([10 * np.log10(1 / (0.01 * 2 / 3)), 40, 100], rel=1e-6)


def by_scipy(one: np.ndarray, other: np.ndarray) -> float:
    """Windows of scipy, truncated after 5 pixels, without the border where they would leave the image."""

    def blurred(values: np.ndarray) -> Any:
        return ndimage.gaussian_filter(values, 1.5, radius=5)[5:-5, 5:-5]

    x, y = blurred(one), blurred(other)
    xx, yy, xy = blurred(one**2) - x * x, blurred(other**2) - y * y, blurred(one * other) - x * y
    found = (2 * x * y + 1e-4) * (2 * xy + 9e-4) / ((x * x + y * y + 1e-4) * (xx + yy + 9e-4))
    return float(found.mean())


def test_ssim_equals_scipys_windows() -> None:
    torch.manual_seed(2)
    images = torch.rand(3, 3, 17, 24)
    others = (images + 0.2 * torch.randn_like(images)).clamp(0, 1)
    expected = [
        np.mean([by_scipy(x.double().numpy(), y.double().numpy()) for x, y in zip(one, other, strict=True)])
        for one, other in zip(images, others, strict=True)
    ]
    assert ssim(images, others).tolist() == pytest.approx(expected, rel=1e-9)
    assert ssim(images, images).tolist() == pytest.approx([1, 1, 1])
    # Of two flat images only the first factor counts.
    flat = ssim(torch.full((1, 1, 11, 11), 0.2), torch.full((1, 1, 11, 11), 0.6))
    assert float(flat) == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4), rel=1e-6)


def moments(rows: np.ndarray) -> FeatureMoments:
    found = FeatureMoments()
    for part in np.array_split(rows, 3):
        found.add(torch.from_numpy(part))
    return found


@pytest.mark.parametrize("count", [40, 5])
def test_the_frechet_distance_equals_scipys(count: int) -> None:
    """Also with fewer vectors than dimensions, where the covariances have no full rank."""
    random = np.random.default_rng(0)
    one = random.normal(size=(count, 7)) @ random.normal(size=(7, 7))
    other = 1 + random.normal(size=(count + 3, 7)) @ random.normal(size=(7, 7))
    covariances = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(one.mean(0) - other.mean(0)).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(moments(one), moments(other)) == pytest.approx(float(expected), rel=1e-5)
    assert frechet_distance(moments(one), moments(one)) == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(moments(one).covariance(), covariances[0], rtol=1e-9, atol=1e-12)


def test_the_frechet_distance_of_shifted_points_is_the_shift() -> None:
    rows = np.random.default_rng(1).normal(size=(30, 4))
    assert frechet_distance(moments(rows), moments(rows + [3, 0, 4, 0])) == pytest.approx(25)


class Greys(nn.Module):
    """Codes are five greys: an image becomes the nearest of them in cells of 16 pixels."""

    downsampling = 16

    def __init__(self) -> None:
        super().__init__()
        self.codebook = torch.linspace(0, 1, 5)[:, None].repeat(1, 3)

    def transforms(self, train: bool) -> ImageTransform:
        return ImageTransform(size=(64, 64))

    def encode(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, 16)

    def quantise(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        codes, numbers = quantised(latents, self.codebook)
        return straight_through(latents, codes), numbers

    def decode(self, codes: Tensor) -> Tensor:
        return codes.repeat_interleave(16, 2).repeat_interleave(16, 3)


def test_the_task_measures_all_images(tmp_path: Path) -> None:
    data, model = publish_coloured(tmp_path, (5, 3), None, None), Greys()
    sets = Evaluations(
        reconstruction=(f"it={data.folder}",),
        evaluation_batch=3,
        reconstruction_network="clipmill-tiny:untrained",
    ).prepare()
    found = evaluate(model, sets)
    images = (
        torch.stack([model.transforms(False).read(sample.image() or b"") for sample in Samples(data)]).float() / 255
    )
    numbers = model.quantise(model.encode(images))[1]
    made = (numbers / 4).repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand_as(images)
    stored = (made * 255).round() / 255
    assert found["reconstruction/it/psnr"] == pytest.approx(float(psnr(images, stored).mean()), rel=1e-6)
    assert found["reconstruction/it/ssim"] == pytest.approx(float(ssim(images, stored).mean()), rel=1e-6)
    shares = torch.bincount(numbers.flatten(), minlength=5).double() / numbers.numel()
    assert found["reconstruction/it/codebook_usage"] == float((shares > 0).double().mean())
    expected = float(-(shares[shares > 0] * shares[shares > 0].log()).sum())
    assert found["reconstruction/it/codebook_perplexity"] == pytest.approx(np.exp(expected))
    assert found["reconstruction/it/samples"] == 8
    assert found["reconstruction/it/frechet_clipmill-tiny-untrained"] > 0
    head, line = table(found).splitlines()
    assert "frechet_clipmill-tiny-untrained" in head and "PSNR (dB)" in head and line.startswith("it")
    assert list(model_figures(model, sets, "at step 1")) == ["reconstructions/it"]


def test_fids_network_pools_without_padding(tmp_path: Path) -> None:
    """Each block's last branch, against the rule; weights load under the names of torchvision and pytorch-fid."""
    network, images = fid_inception().eval(), torch.rand(1, 2048, 4, 5)
    for name, channels in (("Mixed_5b", 192), ("Mixed_6e", 768), ("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        block, given = network.get_submodule(name), images[:, :channels]
        padded = nn.functional.pad(given, (1, 1, 1, 1), value=torch.nan)
        windows = padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)
        pooled = windows.nan_to_num(-torch.inf).amax(-1) if name == "Mixed_7c" else windows.nanmean(-1)
        with torch.no_grad():
            last = block.branch_pool(pooled)
            torch.testing.assert_close(block(given)[:, -last.shape[1] :], last, rtol=1e-4, atol=1e-5)
    state = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "inception.pth")
    vectors = FidNetwork(str(tmp_path / "inception.pth")).vectors(torch.rand(2, 3, 32, 40))
    assert vectors.shape == (2, 2048) and vectors.dtype == torch.float32
    state.pop("Mixed_7c.branch_pool.conv.weight")
    torch.save(state, tmp_path / "inception.pth")
    with pytest.raises(SettingError, match="fid_weights"):
        FidNetwork(str(tmp_path / "inception.pth"))


def test_settings_and_models_that_do_not_fit(tmp_path: Path) -> None:
    place = publish_coloured(tmp_path, (2,), None, None).folder
    with pytest.raises(SettingError, match="reconstruction_network"):
        Evaluations(reconstruction=(f"it={place},network=timm:no_such",)).prepare()
    with pytest.raises(SettingError, match="a file that exists"):
        Evaluations(reconstruction=(f"it={place},network=timm:vgg11:file://{place}/none.pth",)).prepare()
    with pytest.raises(SettingError, match="fid_weights"):
        Evaluations(reconstruction=(f"it={place}",), fid_weights=str(tmp_path / "none.pth")).prepare()
    sets = Evaluations(reconstruction=(f"it={place}",)).prepare()
    with pytest.raises(SettingError, match="reconstructs images"):
        evaluate(nn.Linear(1, 1), sets)
    small = Greys()
    small.transforms = lambda train: ImageTransform(size=(8, 8))  # type: ignore[method-assign]
    with pytest.raises(SettingError, match="image_size"):
        evaluate(small, sets)


def test_names_say_which_network() -> None:
    assert slug("timm:vgg16.tv_in1k") == "timm-vgg16.tv_in1k"
    assert slug("timm:vgg16.tv_in1k:/weights/vgg.pth") == "timm-vgg16.tv_in1k"
    assert slug("ViT-B-32:laion2b_s34b_b79k") == "ViT-B-32-laion2b_s34b_b79k"
    assert slug("clipmill-small:s3://bucket/runs/first/checkpoints/step-00000100") == "clipmill-small"
