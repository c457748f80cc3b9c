"""Waveforms of samples: segments, lengths, channels, randomness, missing and broken sounds."""

import numpy as np
import pytest
import torch
from transformers import ClapFeatureExtractor

from pipeline.errors import SettingError
from pipeline.loaders.audio import AudioReader, AudioTransform, padded
from pipeline.loaders.batches import SamplePosition
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.sample import Sample
from tests.sounds import by_ffmpeg, encoded, tone

RATE = 8_000
RAMP = np.linspace(-1, 1, 4 * RATE, endpoint=False).astype(np.float32)  # 4 s; a value is a time


def transform(**options: object) -> AudioTransform:
    return AudioTransform(**{"sample_rate": RATE, "seconds": 1.0, **options})  # type: ignore[arg-type]


def time_of(value: float) -> float:
    return (value + 1) / 2 * 4


@pytest.mark.parametrize(("crop", "start"), [("centre", 1.5), ("start", 0.0), ("random", 1.5)])
def test_longer_sounds_are_cropped(crop: str, start: float) -> None:
    found = transform(crop=crop).read(encoded(RAMP, RATE, "WAV", "FLOAT"))
    assert found.shape == (1, RATE) and found.dtype == torch.float32
    assert time_of(found[0, 0].item()) == pytest.approx(start, abs=1e-3)
    assert time_of(found[0, -1].item()) == pytest.approx(start + 1, abs=1e-3)


def test_a_sound_without_a_stated_length_is_cropped_too() -> None:
    body = by_ffmpeg(RAMP, RATE, "matroska", "pcm_s16le")
    assert time_of(transform(crop="centre").read(body)[0, 0].item()) == pytest.approx(1.5, abs=1e-3)
    assert time_of(transform(crop="random").read(body, 0.25)[0, 0].item()) == pytest.approx(0.75, abs=1e-3)


def test_random_segments_follow_seed_epoch_and_sample() -> None:
    sample = Sample("0", {"flac": encoded(RAMP, RATE)})
    reader = AudioReader(transform=transform(crop="random"), seed=1)
    starts = [time_of(reader.read(sample, SamplePosition(0, number))["audio"][0, 0].item()) for number in range(60)]
    assert min(starts) < 0.3 and max(starts) > 2.7 and np.mean(starts) == pytest.approx(1.5, abs=0.35)
    again = reader.read(sample, SamplePosition(0, 7))["audio"]
    assert time_of(again[0, 0].item()) == starts[7]
    assert not torch.equal(again, reader.read(sample, SamplePosition(1, 7))["audio"])
    assert time_of(reader.read(sample)["audio"][0, 0].item()) == pytest.approx(1.5, abs=1e-3)


@pytest.mark.parametrize(
    ("padding", "wanted"),
    [
        ("repeat_zeros", [1, 2, 3, 1, 2, 3, 0, 0]),
        ("repeat", [1, 2, 3, 1, 2, 3, 1, 2]),
        ("zeros", [1, 2, 3, 0, 0, 0, 0, 0]),
        ("zeros_around", [0, 0, 1, 2, 3, 0, 0, 0]),
    ],
)
def test_shorter_sounds_are_padded(padding: str, wanted: list[int]) -> None:
    found = padded(np.array([[1, 2, 3]], np.float32), 8, padding)  # type: ignore[arg-type]
    assert found.tolist() == [wanted]


@pytest.mark.parametrize(("ours", "theirs"), [("repeat_zeros", "repeatpad"), ("repeat", "repeat"), ("zeros", "pad")])
def test_padding_is_that_of_clap(ours: str, theirs: str) -> None:
    short = tone(48_000, 0.9)
    extractor = ClapFeatureExtractor(max_length_s=3)
    wanted = extractor._get_input_mel(short, 3 * 48_000, "rand_trunc", theirs)[0]
    whole = padded(short[None], 3 * 48_000, ours)  # type: ignore[arg-type]
    np.testing.assert_array_equal(wanted, extractor._get_input_mel(whole[0], 3 * 48_000, "rand_trunc", theirs)[0])


def test_channels() -> None:
    left, right = tone(RATE, 1.0), tone(RATE, 1.0, 200)
    stereo = encoded(np.stack([left, right], 1), RATE, "WAV", "FLOAT")
    np.testing.assert_allclose(transform(channels=2).read(stereo), np.stack([left, right]), atol=1e-6)
    np.testing.assert_allclose(transform(channels=2).read(encoded(left, RATE, "WAV", "FLOAT")), np.stack([left, left]))
    np.testing.assert_allclose(transform().read(stereo)[0], (left + right) / 2, atol=1e-6)


def test_another_rate_has_the_same_length_in_seconds() -> None:
    for rate in (11_025, 44_100, 192_000):
        assert transform(sample_rate=48_000).read(encoded(tone(rate, 1.3), rate)).shape == (1, 48_000)


def test_batches_and_missing_sounds() -> None:
    full, none = Sample("a", {"ogg": encoded(tone(RATE), RATE, "OGG", "VORBIS")}), Sample("b", {"txt": b"x"})
    reader = AudioReader(transform=transform(), optional=True)
    batch = reader.collate([reader.read(full), reader.read(none)])
    assert batch["audio"].shape == (2, 1, RATE) and batch["audio_present"].tolist() == [True, False]
    assert batch["audio"][0].abs().max() > 0.4 and batch["audio"][1].abs().max() == 0
    strict = AudioReader(transform=transform())
    assert list(strict.collate([strict.read(full)])) == ["audio"] and strict.fields == ("audio",)
    for broken in (none, Sample("c", {"flac": b"fLaC and then nothing"})):
        with pytest.raises(UnreadableSample):
            strict.read(broken)


@pytest.mark.parametrize(("field", "value"), [("sample_rate", 10), ("seconds", 0.0), ("seconds", 1e6)])
def test_bad_settings(field: str, value: float) -> None:
    with pytest.raises(SettingError, match=field):
        AudioTransform(**{field: value})
