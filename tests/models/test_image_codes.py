"""Codes against a search over all of them; the library's codes behind the same interface."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import JanusVQVAE, JanusVQVAEConfig

from pipeline.errors import SettingError
from pipeline.evaluation.image_codes import load_image_codes
from pipeline.models.towers import image_codes
from pipeline.models.towers.image_codes import ImageCodes, JanusCodes, nearest_codes, quantised, straight_through
from pipeline.models.vqgan import Vqgan
from pipeline.shards.storage import Folder
from pipeline.training.average import write_start


@pytest.mark.parametrize("at_once", [1 << 26, 100])
def test_nearest_codes_are_the_argmin_of_all_distances(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_codes, "MOST_DISTANCES", at_once)
    vectors, codebook = torch.randn(57, 6).double() * 3, torch.randn(19, 6).double()
    expected = [min(range(19), key=lambda k: float((one - codebook[k]).square().sum())) for one in vectors]
    assert nearest_codes(vectors, codebook).tolist() == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest_codes(vectors.float(), codebook.float()).tolist() == expected


def test_the_first_of_equal_codes_is_chosen() -> None:
    codebook = torch.tensor([[1.0, 0], [0, 1], [1, 0]])
    assert nearest_codes(torch.tensor([[2.0, 0]]), codebook).tolist() == [0]


def test_the_gradient_passes_the_codes_unchanged() -> None:
    latents, codebook = torch.randn(2, 4, 3, 5, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    codes, numbers = quantised(latents, codebook)
    assert numbers.shape == (2, 3, 5) and torch.equal(codes[1, :, 2, 4], codebook[numbers[1, 2, 4]])
    passed, weight = straight_through(latents, codes), torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(passed, codes)
    (passed * weight).sum().backward()
    assert torch.equal(latents.grad, weight) and codebook.grad is None


@pytest.fixture
def janus(tmp_path: Path) -> Path:
    """A small model of the library, in its own layout."""
    sizes = {"embed_dim": 8, "num_embeddings": 24, "latent_channels": 16, "num_patches": 16}
    config = JanusVQVAEConfig(**sizes, base_channels=32, channel_multiplier=[1, 2], num_res_blocks=1)
    JanusVQVAE(config).save_pretrained(tmp_path / "janus")
    return tmp_path / "janus"


def test_a_model_of_transformers_stands_in(janus: Path) -> None:
    codes = load_image_codes(str(janus), "cpu")
    assert isinstance(codes, JanusCodes) and isinstance(codes, ImageCodes)
    assert not any(parameter.requires_grad for parameter in codes.parameters())
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    latents = codes.encode(images)
    found, numbers = codes.quantise(latents)
    assert codes.downsampling == 2 and latents.shape == (2, 8, 16, 16) and codes.codebook.shape == (24, 8)
    cosines = torch.einsum("ndhw,kd->nkhw", latents, functional.normalize(codes.model.quantize.embedding.weight, dim=1))
    assert torch.equal(numbers, cosines.argmax(1))
    made = codes.decode(found)
    peer = JanusVQVAE.from_pretrained(janus).decode(numbers.flatten(1))
    torch.testing.assert_close(made, (peer + 1) / 2, rtol=1e-4, atol=1e-5)
    made.sum().backward()
    assert images.grad is not None and images.grad.any()


def test_runs_are_image_codes_and_other_places_are_refused(janus: Path, tmp_path: Path) -> None:
    method = Vqgan(Vqgan.smallest())
    write_start(method, Folder(str(tmp_path / "model")))
    codes = load_image_codes(str(tmp_path / "model"), "cpu")
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(codes.decode(codes.encode(images)), method.eval().decode(method.encode(images)))
    with pytest.raises(SettingError, match="codes"):
        load_image_codes("clipmill-tiny:untrained", "cpu")
    with pytest.raises(SettingError, match="checkpoint"):
        load_image_codes(str(tmp_path / "nowhere"), "cpu")
    (janus / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(SettingError, match="JanusVQVAE"):
        load_image_codes(str(janus), "cpu")
