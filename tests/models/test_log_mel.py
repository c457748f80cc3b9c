"""The log-mel front end against transformers' extractor of CLAP and against a closed form."""

import numpy as np
import pytest
import torch
from transformers import ClapFeatureExtractor

from pipeline.errors import SettingError
from pipeline.models.towers.log_mel import LogMel, LogMelConfig

SAMPLES = 48_000


def waveforms() -> dict[str, np.ndarray]:
    random, time = np.random.default_rng(0), np.arange(SAMPLES) / 48_000
    noise = random.normal(0, 0.1, SAMPLES)
    return {
        "noise": noise,
        "tones": 0.4 * np.sin(2 * np.pi * 440 * time) + 0.2 * np.sin(2 * np.pi * 5_000 * time) + 0.01 * noise,
        "pure tone": 0.9 * np.sin(2 * np.pi * 1_000 * time),
        "click": (np.arange(SAMPLES) == 20_000).astype(float),
        "silence": np.zeros(SAMPLES),
        "full scale": np.sign(noise),
    }


def theirs(waveform: np.ndarray, scale: str) -> np.ndarray:
    extractor = ClapFeatureExtractor(frequency_min=50, frequency_max=14_000)
    filters = extractor.mel_filters if scale == "htk" else extractor.mel_filters_slaney
    return extractor._np_extract_fbank_features(waveform, filters)


@pytest.mark.parametrize("scale", ["htk", "slaney"])
@pytest.mark.parametrize("name", waveforms())
def test_equal_to_claps_extractor(name: str, scale: str) -> None:
    waveform = waveforms()[name]
    wanted = theirs(waveform, scale)
    exact = LogMel(LogMelConfig(scale=scale), torch.float64)(torch.from_numpy(waveform))  # type: ignore[arg-type]
    assert exact.shape == (101, 64) and LogMelConfig().frames(SAMPLES) == 101
    np.testing.assert_allclose(exact, wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["noise", "tones", "full scale"])
def test_float32_is_as_exact_within_60_decibels_of_the_loudest_band(name: str) -> None:
    wanted = theirs(waveforms()[name], "htk")
    found = LogMel(LogMelConfig())(torch.from_numpy(waveforms()[name]).float()).numpy()
    loud = wanted > wanted.max(axis=1, keepdims=True) - 60
    np.testing.assert_allclose(found[loud], wanted[loud], atol=1e-4)
    np.testing.assert_allclose(found, wanted, atol=0.1)


def test_a_tone_has_its_power_in_its_band() -> None:
    """A sine of amplitude a in the middle of a bin has power (a * N / 4)^2 there, and a quarter of it on both sides."""
    bin_number, amplitude, window = 64, 0.5, 1024
    time = np.arange(SAMPLES)
    waveform = torch.from_numpy(amplitude * np.sin(2 * np.pi * bin_number * time / window))
    front = LogMel(LogMelConfig(), torch.float64)
    power = 10 ** (front(waveform)[50] / 10)
    peak = (amplitude * window / 4) ** 2
    weights = front.filters[bin_number - 1 : bin_number + 2]
    wanted = peak * (weights[1] + (weights[0] + weights[2]) / 4)
    torch.testing.assert_close(power, wanted.clamp(min=1e-10), rtol=1e-6, atol=1e-6)


def test_batches_channels_autocast_and_gradients() -> None:
    front = LogMel(LogMelConfig(sample_rate=16_000, window=400, hop=160, bands=40, high=8_000))
    waveform = torch.randn(3, 2, 4_000).requires_grad_()
    whole = front(waveform)
    assert whole.shape == (3, 2, 26, 40)
    torch.testing.assert_close(whole[1, 1], front(waveform[1, 1]), atol=1e-4, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert front(waveform.bfloat16()).dtype == torch.float32
        torch.testing.assert_close(front(waveform), whole)
    whole.sum().backward()
    assert waveform.grad is not None and waveform.grad.isfinite().all()
    assert not list(front.parameters()) and not front.state_dict()


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("hop", {"hop": 0}),
        ("high", {"sample_rate": 16_000}),
        ("bands", {"bands": 0}),
        ("window", {"window": 4}),
        ("sample_rate", {"sample_rate": 1}),
    ],
)
def test_bad_settings(field: str, options: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=field):
        LogMelConfig(**options)  # type: ignore[arg-type]
