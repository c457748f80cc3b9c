"""AudioCLIP's augmentation against hand-made sounds, numpy's interpolation, and the bug that its authors' code has."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import SettingError
from pipeline.models.audioclip.augment import (
    NUMBERS,
    SoundAugmentation,
    augmented,
    cropped,
    fixed_length,
    padded,
    time_scaled,
    with_noise,
)

PLAIN = SoundAugmentation(invert=0, time_scale=1, noise=0)


def stereo(samples: int = 40) -> Tensor:
    return torch.stack([torch.arange(samples, dtype=torch.float32), -torch.arange(samples, dtype=torch.float32) - 1])


def changed(config: SoundAugmentation, sound: Tensor, length: int = 40, random: float = 0.0) -> Tensor:
    return augmented(sound, length, config, [random] * NUMBERS, torch.Generator().manual_seed(0))


def test_time_is_inverted_and_not_the_channels() -> None:
    inverted = changed(SoundAugmentation(invert=1, time_scale=1, noise=0), stereo())
    assert torch.equal(inverted, stereo().flip(1))
    theirs = SoundAugmentation(invert=1, inversion="channels", time_scale=1, noise=0)
    assert torch.equal(changed(theirs, stereo()), stereo().flip(0))
    assert torch.equal(changed(theirs, stereo()[:1]), stereo()[:1])  # nothing happens to a mono sound
    assert torch.equal(changed(PLAIN, stereo()), stereo())


@pytest.mark.parametrize("factor", [1 / 1.5, 0.9, 1.0, 1.27, 1.5])
def test_time_scaling_is_numpys_interpolation(factor: float) -> None:
    sound = torch.randn(2, 50)
    found = time_scaled(sound, factor)
    assert found.shape == (2, int(50 * factor))
    places = np.arange(found.shape[1]) / factor
    expected = np.stack([np.interp(places, np.arange(50), channel) for channel in sound.numpy()])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_padding_repeats_the_ends() -> None:
    sound = torch.tensor([[1.0, 2, 3], [3.0, 4, 5]])
    assert padded(sound, 8, 0.5).tolist() == [[2, 2, 1, 2, 3, 4, 4, 4], [2, 2, 3, 4, 5, 4, 4, 4]]
    assert padded(sound, 7).tolist() == [[2, 2, 1, 2, 3, 4, 4], [2, 2, 3, 4, 5, 4, 4]]  # as much on both sides
    assert padded(sound, 3) is sound


def test_a_quiet_crop_gives_way_to_the_start_or_the_end() -> None:
    loud, quiet = torch.tensor([[9.0, -9] * 10]), torch.zeros(1, 20)
    medium = torch.tensor([[0.5, -0.5] * 10])
    middle = 0.5
    even = torch.cat([loud, loud, loud], dim=1)
    assert torch.equal(cropped(even, 20, middle), even[:, 20:40])
    assert torch.equal(cropped(torch.cat([loud, quiet, loud], dim=1), 20, middle), loud)
    # Start and crop are below half the deviation of the whole, and the start is the louder one: the end is taken.
    assert torch.equal(cropped(torch.cat([medium, quiet, 2 * loud], dim=1), 20, middle), 2 * loud)
    assert torch.equal(cropped(torch.cat([quiet, medium, 2 * loud], dim=1), 20, middle), quiet)  # their rule
    assert torch.equal(fixed_length(torch.cat([loud, 2 * loud, loud], dim=1), 20), 2 * loud)


@pytest.mark.parametrize("decibels", [-10.0, 0.0, 20.0])
def test_noise_has_the_power_that_is_asked_for(decibels: float) -> None:
    times = torch.arange(200_000) / 1000
    sound = torch.stack([torch.sin(times), 0.1 * torch.cos(times)])
    noise = with_noise(sound, decibels, torch.Generator().manual_seed(0)) - sound
    found = 10 * torch.log10(sound.square().mean() / noise.square().mean())
    assert float(found) == pytest.approx(decibels, abs=0.1)
    silent = torch.zeros(1, 100)
    assert torch.equal(with_noise(silent, 10, torch.Generator()), silent)


@pytest.mark.parametrize("samples", [1, 2, 39, 40, 41, 400])
@pytest.mark.parametrize("random", [0.0, 0.3, 1 - 2**-53])
def test_every_length_becomes_the_wanted_one(samples: int, random: float) -> None:
    sound = torch.randn(2, samples)
    found = changed(SoundAugmentation(invert=1, noise=1), sound, random=random)
    assert found.shape == (2, 40) and found.isfinite().all()
    assert fixed_length(sound, 40).shape == (2, 40)


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"invert": 1.1}, {"time_scale": 0.5}, {"noise_snr": (20.0, 10.0)}, {"noise": -0.1}):
        with pytest.raises(SettingError, match=next(iter(wrong))):
            SoundAugmentation(**wrong)
