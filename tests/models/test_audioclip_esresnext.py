"""ESResNeXt-fbsp against closed forms, numpy's Fourier transform, torchvision and parameter counts of the paper."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnext50_32x4d

from pipeline.models.audioclip.esresnext import FRAME, HOP, TRANSFORM, EsResNextFbsp
from pipeline.models.audioclip.fbsp import FbspTransform, frame_count, framed
from pipeline.models.losses import Gather, alone


@pytest.fixture(scope="module")
def tower() -> EsResNextFbsp:
    torch.manual_seed(0)
    return EsResNextFbsp(width=8, blocks=(1, 1, 1, 1))


def sound(samples: int = 9000, rows: int = 2, channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 0.3 * torch.randn(rows, channels, samples, generator=generator).clamp(-3, 3)


@pytest.mark.parametrize(("seconds", "frames"), [(4, 313), (5, 392), (10, 785)])
def test_frames_of_the_papers_lengths(seconds: int, frames: int) -> None:
    assert frame_count(44100 * seconds, FRAME, HOP) == frames


def test_frames_by_hand() -> None:
    """Seven samples in frames of 4 at a distance of 2 need 8: none is missing before, one after."""
    found = framed(torch.arange(1.0, 8.0), 4, 2)
    assert found.tolist() == [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 0]]
    assert framed(torch.ones(3), 6, 2).tolist() == [[0, 1, 1, 1, 0, 0]]  # three are missing: one before, two after
    assert frame_count(4, 4, 2) == 1 and frame_count(5, 4, 2) == 2


def test_the_first_wavelets_are_nearly_a_fourier_transform() -> None:
    transform = FbspTransform(1025)
    real, imaginary = (part.detach() for part in transform.wavelets(2048))
    lengths = (real.square() + imaginary.square()).sum(dim=1).sqrt()
    torch.testing.assert_close(lengths, torch.ones(1025), rtol=0, atol=1e-5)
    random = np.random.default_rng(0).normal(size=2048)
    found = transform(torch.from_numpy(random).float())
    assert float(found.penalty.detach()) < 1e-10
    magnitude = (found.real.square() + found.imaginary.square()).sqrt().detach().numpy()
    exact = np.abs(np.fft.rfft(random)) / math.sqrt(2048)
    apart = np.linalg.norm(magnitude - exact) / np.linalg.norm(exact)
    low = np.linalg.norm((magnitude - exact)[:100]) / np.linalg.norm(exact[:100])
    assert low < 0.05 < apart < 0.5


def complex_wavelet(order: float, bandwidth: float, frequency: float, length: int) -> np.ndarray:
    """One row with numpy's complex powers."""
    times = np.pi * np.linspace(-1, 1, length) + 1e-8
    argument = bandwidth * times / (order + 1e-8)
    window = (np.sin(argument) / argument).astype(complex) ** order
    return np.sqrt(bandwidth / length) * window * np.exp(-1j * frequency * times)


def test_wavelets_of_other_orders_are_complex_powers() -> None:
    """Also where the sinc is negative, whose power has a phase."""
    settings = [(0.5, 2.0, 3.0), (1.0, 1.5, 7.2), (2.0, 9.0, 0.4), (1.7, 6.0, 11.0)]
    transform = FbspTransform(4).double()
    with torch.no_grad():
        for name, values in zip(("m", "fb", "fc"), zip(*settings, strict=True), strict=True):
            getattr(transform, name).copy_(torch.tensor(values, dtype=torch.float64))
    real, imaginary = (part.detach().numpy() for part in transform.wavelets(64))
    for row, values in enumerate(settings):
        expected = complex_wavelet(*values, 64)
        np.testing.assert_allclose(real[row] + 1j * imaginary[row], expected, rtol=1e-9, atol=1e-12)


def test_gradients_have_a_largest_entry_of_one_and_the_direction_of_the_loss() -> None:
    transform = FbspTransform(6).double()
    with torch.no_grad():
        transform.m.copy_(torch.rand(6) + 0.5)
    frames = torch.randn(3, 40, dtype=torch.float64)

    def loss() -> Tensor:
        spectrum = transform(frames)
        return (spectrum.real.square() + spectrum.imaginary.square()).log().sum() + spectrum.penalty

    loss().backward()
    for parameter in transform.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) == pytest.approx(1, abs=1e-6)
        numeric = torch.zeros_like(parameter)
        for place in range(len(parameter)):
            with torch.no_grad():
                parameter[place] += 1e-6
                above = loss()
                parameter[place] -= 2e-6
                numeric[place] = (above - loss()) / 2e-6
                parameter[place] += 1e-6
        torch.testing.assert_close(parameter.grad, numeric / numeric.abs().max(), rtol=1e-4, atol=1e-5)


def test_gradients_of_ranks_are_averaged_before_they_are_divided() -> None:
    """Two ranks, played by a gather that appends what the other rank's gather was given."""
    frames = torch.randn(2, 1, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sent: list[Tensor] = []

    def gradients(rows: Tensor, gather: Gather = alone) -> list[Tensor]:
        transform = FbspTransform(6).double()
        with torch.no_grad():
            transform.m.fill_(0.7)
        (transform(rows, gather).real.square().sum() / len(rows)).backward()
        return [parameter.grad for parameter in transform.parameters() if parameter.grad is not None]

    gradients(frames[1], lambda slope: sent.append(slope) or slope)
    others = iter(sent)
    together = gradients(frames[0], lambda slope: torch.cat([slope, next(others)]))
    for found, expected in zip(together, gradients(frames.flatten(0, 1)), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_tone_is_in_its_band_and_rows_are_three_thirds(tower: EsResNextFbsp) -> None:
    times = torch.arange(9000) / 44100
    bins = 44100 / TRANSFORM
    tones = [torch.sin(2 * math.pi * (row * bins) * times) for row in (40, 341 + 60, 682 + 25)]
    decibels, penalty = tower.spectrograms(torch.stack(tones)[:, None])
    assert decibels.shape == (3, 1, 3, 341, frame_count(9000, FRAME, HOP)) and float(penalty.detach()) < 1e-10
    middle = decibels[:, 0, :, :, decibels.shape[-1] // 2].detach()
    for tone, row in enumerate((40, 60, 25)):
        band, place = divmod(int(middle[tone].flatten().argmax()), 341)
        assert band == tone and abs(place - row) <= 2
    silent, _ = tower.spectrograms(torch.full((1, 1, 4000), -1 / 65536))  # becomes exactly 0
    assert float(silent.detach().min()) == pytest.approx(-180)


def test_decibels_are_numpys(tower: EsResNextFbsp) -> None:
    audio = sound(4000, rows=1)
    found, _ = tower.spectrograms(audio)
    signal = np.interp(audio[0, 0].numpy() * 32768.0, (-32768, 32767), (-1, 1), left=None, right=None)
    count = frame_count(4000, FRAME, HOP)
    missing = (count - 1) * HOP + FRAME - 4000
    padded = np.pad(signal, (missing // 2, missing - missing // 2))
    terms = (0.35875, 0.48829, 0.14128, 0.01168)
    phase = 2 * np.pi * np.arange(FRAME) / FRAME
    window = sum((-1) ** k * a * np.cos(k * phase) for k, a in enumerate(terms))
    rows = np.stack([complex_wavelet(0.0, 1.0, float(row), TRANSFORM) for row in (0, 340, 341, 1022)])
    for frame in (0, count - 1):
        piece = np.pad(padded[frame * HOP : frame * HOP + FRAME] * window, 197)
        expected = 10 * np.log10(np.abs(rows @ piece) ** 2)
        places = found[0, 0, [0, 0, 1, 2], [0, 340, 0, 340], frame].detach().numpy()
        np.testing.assert_allclose(places, expected, atol=0.02)


def test_two_equal_channels_pool_to_twice_one(tower: EsResNextFbsp) -> None:
    tower.eval()
    mono = sound()
    pooled: list[Tensor] = []
    handle = tower.fc.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
    with torch.no_grad():
        tower(mono)
        tower(mono.expand(-1, 2, -1))
    handle.remove()
    tower.train()
    torch.testing.assert_close(pooled[1], 2 * pooled[0])


def test_a_gate_multiplies_each_stage(tower: EsResNextFbsp) -> None:
    """With gates of one half at every place, the trunk is torchvision's with halved stages."""
    tower.eval()
    for number in range(1, 6):
        gate = getattr(tower, f"att{number}")
        nn.init.zeros_(gate.bn.weight)
        nn.init.zeros_(gate.bn.bias)
    image = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        found = tower._pooled(image)
        hidden = torch.relu(tower.bn1(tower.conv1(image)))
        hidden = nn.MaxPool2d(3, 2, 1)(hidden)
        for number in range(1, 5):
            hidden = getattr(tower, f"layer{number}")(hidden) / 2
    tower.train()
    torch.testing.assert_close(found, hidden.mean(dim=(2, 3)) / 2)


def test_the_papers_size_and_weights_of_imagenet() -> None:
    tower, theirs = EsResNextFbsp(width=1024), resnext50_32x4d()
    count = {
        part: sum(one.numel() for name, one in tower.named_parameters() if name.startswith(part))
        for part in ("att", "fbsp", "fc")
    }
    trunk = sum(one.numel() for one in tower.parameters()) - sum(count.values())
    assert count == {"att": pytest.approx(7.02e6, rel=1e-3), "fbsp": 3075, "fc": 2048 * 1024 + 1024}
    assert trunk == pytest.approx(22.98e6, rel=1e-3)
    tower.load_trunk(theirs.state_dict())
    assert torch.equal(tower.layer4[2].conv3.weight, theirs.layer4[2].conv3.weight)
    assert tower.att3.bn.bias.eq(1).all() and tower.att3.bn.weight.eq(1).all()
    assert tower.fc.out_features == 1024
