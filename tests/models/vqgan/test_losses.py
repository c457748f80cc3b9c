"""Losses against closed forms and autograd by hand; the use of the codebook; perceptual distances by hand."""

import math
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from pipeline.errors import SettingError
from pipeline.models.class_vectors import untrained
from pipeline.models.towers.feature_network import FeatureNetwork
from pipeline.models.towers.image_codes import perplexity
from pipeline.models.vqgan.codebook import (
    CodebookUse,
    codebook_loss,
    commitment_loss,
    restart,
    spare_latents,
)
from pipeline.models.vqgan.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    fake_loss,
    frozen,
    generator_loss,
    real_loss,
    smallest_side,
)
from pipeline.models.vqgan.perceptual import LPIPS_LAYERS, PerceptualDistance


def test_hinge_losses() -> None:
    logits = torch.tensor([-2.0, 0.0, 0.5, 3.0])
    assert float(real_loss(logits)) == pytest.approx((3 + 1 + 0.5 + 0) / 4 / 2)
    assert float(fake_loss(logits)) == pytest.approx((0 + 1 + 1.5 + 4) / 4 / 2)
    assert float(generator_loss(logits)) == pytest.approx(-1.5 / 4)


def test_codebook_losses_move_one_side_each() -> None:
    latents, codes = torch.randn(2, 3, 2, 2, requires_grad=True), torch.randn(2, 3, 2, 2, requires_grad=True)
    expected = float((latents - codes).detach().square().mean())
    for loss, moved, still in ((codebook_loss, codes, latents), (commitment_loss, latents, codes)):
        value = loss(latents, codes)
        assert float(value.detach()) == pytest.approx(expected)
        assert torch.autograd.grad(value, moved, retain_graph=True)[0].any()
        assert torch.autograd.grad(value, still, allow_unused=True)[0] is None


def test_the_adaptive_weight_is_the_ratio_of_gradients() -> None:
    """Of two losses of y = w x, whose gradients of w are known."""
    last, x = torch.tensor([[2.0, -1.0]], requires_grad=True), torch.tensor([3.0, 4.0])
    y = last @ x
    weight = adaptive_weight((y * 2).sum(), (y**2).sum(), last)
    expected = 2 * 5 / (2 * abs(2 * 3 - 4) * 5 + 1e-4)  # |2 x| / (|2 y x| + 1e-4), with y = 2
    assert float(weight) == pytest.approx(expected) and not weight.requires_grad
    assert float(adaptive_weight(y.sum(), (y * 0).sum(), last)) == 10_000  # at most, where there is no gradient
    # Two ranks whose gradients cancel in the second loss: the norm of their mean.
    halves = lambda rows: torch.cat([rows, torch.stack([rows[0, 0], -rows[0, 1]])[None]])  # noqa: E731
    assert float(adaptive_weight(y.sum(), (y * 2).sum(), last, halves)) == pytest.approx(10_000)


def test_a_frozen_discriminator_passes_gradients_and_gets_none() -> None:
    critic, images = PatchDiscriminator(4, 2), torch.randn(2, 3, 16, 16, requires_grad=True)
    with frozen(critic):
        loss = critic(images).sum()
    loss.backward()
    assert images.grad is not None and images.grad.any()
    assert all(one.grad is None and one.requires_grad for one in critic.parameters())


def test_the_discriminator_is_isolas() -> None:
    """Against the layers written out, with torch's own batch normalisation."""
    critic = PatchDiscriminator(8, 3)
    peer = nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(8, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2),
        nn.Conv2d(16, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, 1, 1, bias=False), nn.BatchNorm2d(64), nn.LeakyReLU(0.2),
        nn.Conv2d(64, 1, 4, 1, 1),
    )  # fmt: skip
    peer.load_state_dict(critic.main.state_dict(), strict=False)
    images = torch.randn(3, 3, 40, 40)
    torch.testing.assert_close(critic(images), peer(images), rtol=1e-4, atol=1e-5)
    side = smallest_side(3)
    assert critic(torch.randn(2, 3, side, side)).shape == (2, 1, 1, 1)
    with pytest.raises(RuntimeError):
        critic(torch.randn(2, 3, side - 8, side - 8))


def test_perplexity_and_usage() -> None:
    assert float(perplexity(torch.tensor([5, 5, 5, 5.0]))) == pytest.approx(4)
    assert float(perplexity(torch.tensor([7, 0, 0, 0.0]))) == pytest.approx(1)
    shares = torch.tensor([0.5, 0.25, 0.25])
    assert float(perplexity(shares)) == pytest.approx(2**1.5)
    use = CodebookUse(4)
    assert float(use.usage()) == 0
    use.count(torch.tensor([[0, 0], [2, 0]]))
    use.steps += 1
    assert float(use.usage()) == 0.5
    torch.testing.assert_close(use.shares, torch.tensor([0.75, 0, 0.25, 0]) * 0.01)
    for _ in range(101):
        use.count(torch.tensor([3]))
        use.steps += 1
    assert float(use.usage()) == 0.25


def test_codes_that_nothing_chose_become_latents() -> None:
    use, codebook = CodebookUse(5), torch.zeros(5, 2)
    for _ in range(3):
        use.count(torch.tensor([1]))
        use.steps += 1
    spare = torch.tensor([[1.0, 1], [math.nan, 2], [3, 3]])
    assert not restart(codebook, use, 3, spare).any()
    use.count(torch.tensor([1]))
    use.steps += 1
    # Codes 0, 2, 3 and 4 are dead; there are three latents, one without a value.
    assert restart(codebook, use, 3, spare).tolist() == [True, False, False, True, False]
    assert codebook.tolist() == [[1, 1], [0, 0], [0, 0], [3, 3], [0, 0]]
    assert not restart(codebook, use, 3, torch.zeros(1, 2)).tolist()[0]  # it has time again


def test_spare_latents_are_rows_of_the_batch() -> None:
    latents = torch.randn(2, 3, 4, 4)
    rows = {tuple(row) for row in latents.permute(0, 2, 3, 1).reshape(-1, 3).tolist()}
    spare = spare_latents(latents)
    assert len(spare) == 32 and {tuple(row) for row in spare.tolist()} == rows


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a VGG-11 with random weights in torchvision's layout, whose features timm's rule renames."""
    file = tmp_path_factory.mktemp("vgg") / "vgg11.safetensors"
    torch.manual_seed(1)
    save_file(timm.create_model("vgg11").state_dict(), file)
    return f"timm:vgg11:{file}"


def by_hand(model: nn.Module, images: torch.Tensor, layers: tuple[int, ...]) -> list[torch.Tensor]:
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    features, found = (images - mean) / std, []
    for number, module in enumerate(model.features):  # type: ignore[arg-type]
        features = module(features)
        if number in layers:
            found.append(functional.normalize(features, dim=1))
    return found


def test_the_perceptual_distance_is_that_of_lpips(vgg: str, tmp_path: Path) -> None:
    model, layers = timm.create_model("vgg11").eval(), (1, 4, 9)
    model.load_state_dict(load_file(vgg.rpartition(":")[2]))
    images, others = torch.rand(2, 3, 40, 32, requires_grad=True), torch.rand(2, 3, 40, 32)
    weights = [torch.rand(channels) for channels in (64, 128, 256)]
    linear = {f"lin{number}.model.1.weight": one.view(1, -1, 1, 1) for number, one in enumerate(weights)}
    torch.save(linear, tmp_path / "vgg.pth")
    names = tuple(f"features.{number}" for number in layers)
    pairs = list(zip(by_hand(model, images, layers), by_hand(model, others, layers), strict=True))
    for file, factors in (("", [torch.ones(len(one)) for one in weights]), (str(tmp_path / "vgg.pth"), weights)):
        distance = PerceptualDistance(vgg, names, file)
        expected = sum(
            ((one - other) ** 2 * factor.view(1, -1, 1, 1)).sum(1).mean((1, 2))
            for (one, other), factor in zip(pairs, factors, strict=True)
        )
        found = distance(images, others)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert float(distance(others, others).abs().max()) == 0
        assert not distance.state_dict() and not any(one.requires_grad for one in distance.parameters())
        assert torch.autograd.grad(found.sum(), images, retain_graph=True)[0].any()


def test_weights_of_lpips_belong_to_the_layers_in_the_order_of_their_names(tmp_path: Path) -> None:
    """Not in the order in which layers run."""
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "small.safetensors")
    address, layers = f"timm:test_resnet:{tmp_path}/small.safetensors", ("layer1", "layer3")
    images, others, found = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32), []
    channels = [one.shape[1] for one in FeatureNetwork(address).layers(images, layers)]
    assert channels[0] != channels[1]
    weights = {name: torch.rand(1, count, 1, 1) for name, count in zip(layers, channels, strict=True)}
    for names in (layers, layers[::-1]):
        file = tmp_path / f"{names[0]}.pth"
        torch.save({f"lin{number}.model.1.weight": weights[name] for number, name in enumerate(names)}, file)
        found.append(PerceptualDistance(address, names, str(file))(images, others))
    torch.testing.assert_close(*found)


def test_a_layer_that_does_not_run_is_refused() -> None:
    distance = PerceptualDistance("clipmill-tiny:untrained", ("transformer.resblocks.0.attn.out_proj",))
    with pytest.raises(SettingError, match="^perceptual_layers: got 'transformer.resblocks.0.attn.out_proj'"):
        distance(torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64))


def test_lpips_layers_are_the_last_activations_before_each_pooling() -> None:
    with torch.device("meta"):
        features = timm.create_model("vgg16").features
    pools = [number for number, module in enumerate(features) if isinstance(module, nn.MaxPool2d)]
    assert LPIPS_LAYERS == tuple(f"features.{number - 1}" for number in pools)


@pytest.mark.parametrize("layers", [("transformer.resblocks.0", "transformer.resblocks.1"), ("conv1",)])
def test_layers_of_a_clip_are_compared(layers: tuple[str, ...]) -> None:
    distance = PerceptualDistance("clipmill-tiny:untrained", layers)
    visual = untrained("clipmill-tiny").model.visual
    assert torch.equal(distance.network.body.conv1.weight, visual.conv1.weight)
    images = torch.rand(2, 3, 64, 64)
    assert (distance(images, torch.rand(2, 3, 64, 64)) > 0).all() and not distance(images, images).any()


def test_networks_that_are_none_are_refused(tmp_path: Path) -> None:
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "small.safetensors")
    small = f"timm:test_resnet:{tmp_path}/small.safetensors"
    with pytest.raises(SettingError, match="perceptual"):
        PerceptualDistance("timm:no_such_model", ("layer1",))
    with pytest.raises(SettingError, match="perceptual_layers"):
        PerceptualDistance(small, ("layer9",))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(SettingError, match="perceptual_linear"):
        PerceptualDistance(small, ("layer1",), str(tmp_path / "text.pth"))
    with pytest.raises(SettingError, match="weights of timm's test_vit"):
        PerceptualDistance(small.replace("test_resnet", "test_vit"), ("blocks.1",))
    torch.save({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, tmp_path / "one.pth")
    with pytest.raises(SettingError, match="weights of 2 layers"):
        PerceptualDistance(small, ("layer1", "layer2"), str(tmp_path / "one.pth"))
