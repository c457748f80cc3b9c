"""One rule for sounds: every kind by files of the encoders, segments, hostile files, exact bytes."""

import io
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import scipy.signal

from pipeline.errors import SampleError
from pipeline.shards.loudness import FLOOR, measure
from pipeline.shards.sound_kinds import kind_of
from pipeline.shards.waveforms import Waveform, encode_flac, encode_wav, read_header, read_waveform, resampled
from tests.sounds import by_ffmpeg, encoded, piped, tone, video


def chirp(rate: int, seconds: float = 2.0) -> np.ndarray:
    """A tone that rises all the time: no part of it is like another."""
    time = np.arange(round(rate * seconds)) / rate
    return (0.5 * np.sin(2 * np.pi * (200 * time + 400 * time * time))).astype(np.float32)


def correlation(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.corrcoef(found, wanted[: len(found)])[0, 1])


LOSSLESS = [
    ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"),
    ("WAV", "PCM_U8"),
    ("WAV", "PCM_24"),
    ("WAV", "FLOAT"),
    ("AIFF", None),
]
LOSSY = [("OGG", "VORBIS", 16_000), ("OGG", "OPUS", 48_000), ("MP3", None, 44_100), ("MP3", None, 16_000)]
CONTAINERS = [
    ("mp4", "aac", 44_100),
    ("matroska", "pcm_s16le", 16_000),
    ("webm", "libopus", 48_000),
    ("avi", "pcm_s16le", 16_000),
]


@pytest.mark.parametrize(("kind", "subtype"), LOSSLESS)
def test_lossless_kinds_give_the_samples(kind: str, subtype: str | None) -> None:
    wanted = chirp(16_000)
    sound = read_waveform(encoded(wanted, 16_000, kind, subtype), seconds=60)
    assert sound.header == read_header(encoded(wanted, 16_000, kind, subtype))
    assert (sound.header.sample_rate, sound.header.channels, sound.header.seconds) == (16_000, 1, 2.0)
    np.testing.assert_allclose(sound.samples[0], wanted, atol=0.01 if subtype == "PCM_U8" else 4e-5)


@pytest.mark.parametrize(("kind", "subtype", "rate"), LOSSY)
@pytest.mark.parametrize("start", [0.0, 0.7])
def test_lossy_kinds_keep_the_time(kind: str, subtype: str | None, rate: int, start: float) -> None:
    wanted = chirp(rate)
    sound = read_waveform(encoded(wanted, rate, kind, subtype), start=start, seconds=0.5)
    assert sound.samples.shape == (1, rate // 2)
    first = round(start * rate)
    assert correlation(sound.samples[0], wanted[first:]) > 0.99
    np.testing.assert_allclose(sound.samples[0], wanted[first : first + rate // 2], atol=0.1)


@pytest.mark.parametrize(("kind", "codec", "rate"), CONTAINERS)
@pytest.mark.parametrize("start", [0.0, 0.7])
def test_containers_keep_the_time(kind: str, codec: str, rate: int, start: float) -> None:
    wanted = chirp(rate)
    sound = read_waveform(by_ffmpeg(wanted, rate, kind, codec), start=start, seconds=0.5)
    assert sound.samples.shape == (1, rate // 2)
    slack = 0.001 if kind in ("webm", "matroska") and start else 0.0
    lags = range(-round(slack * rate), round(slack * rate) + 1)
    first = round(start * rate)
    assert max(correlation(sound.samples[0, 200:-200], wanted[first + 200 + lag :]) for lag in lags) > 0.99


def test_adts_and_mp3_in_avi_are_read() -> None:
    wanted = chirp(44_100)
    for body in (by_ffmpeg(wanted, 44_100, "adts"), by_ffmpeg(wanted, 44_100, "avi", "libmp3lame")):
        sound = read_waveform(body, start=0.5, seconds=1)
        assert max(correlation(sound.samples[0], wanted[22_050 - lag :]) for lag in (1024, 1105)) > 0.99


def test_the_sound_of_a_video() -> None:
    wanted = chirp(16_000)
    body = video(np.zeros((20, 64, 64, 3), np.uint8), 10, wanted)
    assert read_header(body).kind == "mp4"
    assert correlation(read_waveform(body, start=0.5, seconds=1).samples[0], wanted[8_000:]) > 0.99


def test_channels_are_averaged() -> None:
    left, right = chirp(16_000), tone(16_000, 2.0)
    body = encoded(np.stack([left, right], 1), 16_000, "WAV", "FLOAT")
    np.testing.assert_allclose(read_waveform(body, seconds=9).samples, [(left + right) / 2], atol=1e-7)
    np.testing.assert_array_equal(read_waveform(body, seconds=9, stereo=True).samples, [left, right])
    full = np.ones((4_000, 2), np.float32)
    assert read_waveform(encoded(full, 16_000, "WAV", "FLOAT"), seconds=9).samples.max() == 1.0  # FFmpeg's has 1.41
    eight = np.stack([tone(16_000, 1.0, 100 * (1 + channel)) for channel in range(8)], 1)
    for stereo in (False, True):
        found = read_waveform(encoded(eight, 16_000, "WAV", "FLOAT"), seconds=9, stereo=stereo).samples
        np.testing.assert_allclose(found, eight.mean(axis=1)[None], atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 96_000, 192_000])
def test_rates_are_converted(rate: int) -> None:
    sound = read_waveform(encoded(tone(rate, 2.0), rate, "WAV", "FLOAT"), seconds=9, sample_rate=48_000)
    assert sound.samples.shape == (1, 96_000) and sound.sample_rate == 48_000 and sound.seconds == 2
    np.testing.assert_allclose(sound.samples[0, 4_800:-4_800], tone(48_000, 2.0)[4_800:-4_800], atol=1e-3)


def test_resampling_against_scipy_and_without_aliases() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 48_000).astype(np.float32)
    low = scipy.signal.sosfiltfilt(scipy.signal.butter(12, 6_000, fs=48_000, output="sos"), noise).astype(np.float32)
    ours, theirs = resampled(low[None], 48_000, 16_000)[0], scipy.signal.resample_poly(low, 1, 3)
    np.testing.assert_allclose(ours[500:-500], theirs[500:-500], atol=2e-3)
    high = tone(48_000, 1.0, 15_000.0)
    assert np.abs(resampled(high[None], 48_000, 16_000)[0, 500:-500]).max() < 1e-4
    assert resampled(np.ones((2, 1), np.float32), 8_000, 48_000).shape == (2, 6)
    assert resampled(np.ones((1, 2), np.float32), 192_000, 8_000).shape == (1, 1)


def test_flac_of_sixteen_bits_is_exact() -> None:
    integers = np.arange(-32_768, 32_768, 7, dtype=np.int16)
    waveform = integers.astype(np.float32)[None] / 32_768
    for encode in (encode_flac, encode_wav):
        again = read_waveform(encode(waveform, 48_000), seconds=9)
        np.testing.assert_array_equal(again.samples * 32_768, integers[None])
    assert encode_flac(waveform, 48_000) == encode_flac(waveform.copy(), 48_000)
    beyond = read_waveform(encode_flac(np.array([[2.0, -2.0, 1.0]], np.float32), 8_000), seconds=9)
    np.testing.assert_array_equal(beyond.samples, [[32_767 / 32_768, -1.0, 32_767 / 32_768]])


def test_clipped_samples_are_counted_before_averaging() -> None:
    clean, loud = tone(16_000), np.clip(4 * tone(16_000), -1, 1)
    assert read_waveform(encoded(clean, 16_000), seconds=9).clipped == 0
    found = read_waveform(encoded(np.stack([clean, loud], 1), 16_000), seconds=9).clipped
    assert found == pytest.approx((np.abs(loud) >= 1).mean() / 2, abs=0.01)


# Hostile files


def wav(samples: np.ndarray, rate: int = 16_000, claimed: int | None = None) -> bytes:
    """Floats as a WAV by the specification; ``claimed`` bytes in place of the right number."""
    data = samples.astype("<f4").tobytes()
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    shape = struct.pack("<HHIIHH", 3, channels, rate, rate * 4 * channels & 0xFFFFFFFF, 4 * channels, 32)
    size = len(data) if claimed is None else claimed
    head = b"fmt " + struct.pack("<I", len(shape)) + shape + b"data" + struct.pack("<I", size)
    return b"RIFF" + struct.pack("<I", min(4 + len(head) + size, 0xFFFFFFFF)) + b"WAVE" + head + data


def flac_that_claims(frames: int) -> bytes:
    """A second of FLAC whose header claims another length: 36 bits, from the 21st byte's last four on."""
    body = bytearray(encoded(tone(), 16_000))
    body[21] = body[21] & 0xF0 | frames >> 32
    body[22:26] = (frames & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(body)


WHOLE = encoded(tone(seconds=3.0), 16_000)
NAN, INFINITE = tone().copy(), tone().copy()
NAN[77], INFINITE[77] = np.nan, np.inf
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "empty"),
    "no sample": (wav(np.zeros(0)), "empty"),
    "a FLAC without samples": (encoded(np.zeros(0, np.float32), 16_000), "empty"),
    "a text page": (b"<!doctype html><title>404</title>", "not_a_sound"),
    "a JPEG": (b"\xff\xd8\xff\xe0" + bytes(100), "not_a_sound"),
    "an AVIF": (b"\0\0\0\x1cftypavif" + bytes(100), "not_a_sound"),
    "a playlist": (b"#EXTM3U\n#EXTINF:10\nfile:///etc/passwd\n", "not_a_sound"),
    "one byte": (b"f", "not_a_sound"),
    "a header alone": (WHOLE[:20], "damaged"),
    "a truncated FLAC": (WHOLE[: len(WHOLE) // 2], "damaged"),
    "a truncated WAV": (wav(tone())[:-20_000], "truncated"),
    "a truncated MP4": (by_ffmpeg(tone(44_100), 44_100)[:5_000], "damaged"),
    "an MP4 whose end is lost": (
        by_ffmpeg(tone(44_100, 3.0), 44_100, options={"movflags": "faststart"})[:-9_000],
        "damaged",
    ),
    "a WAV that claims hours": (wav(tone(), claimed=0x70000000), "truncated"),
    "a FLAC that claims hours": (flac_that_claims(1 << 35), "damaged"),
    "NaN": (wav(NAN), "not_finite"),
    "infinity": (wav(INFINITE), "not_finite"),
    "doubles beyond floats": (encoded(np.full(999, 1e300), 16_000, "WAV", "DOUBLE"), "not_finite"),
    "no rate": (wav(tone(), rate=0), "damaged"),
    "one sample per second": (wav(tone(), rate=1), "sample_rate"),
    "gigahertz": (wav(tone(), rate=2_000_000_000), "sample_rate"),
    "a hundred channels": (wav(np.zeros((50, 100))), "channels"),
    "a silent film": (video(np.zeros((4, 64, 64, 3), np.uint8), 10, None), "no_sound"),
    "noise behind a FLAC's start": (b"fLaC" + np.random.default_rng(1).bytes(5_000), "damaged"),
    "noise behind an MP4's start": (b"\0\0\0\x18ftypisom" + np.random.default_rng(2).bytes(5_000), "damaged"),
    "noise behind an EBML's start": (b"\x1a\x45\xdf\xa3" + np.random.default_rng(3).bytes(5_000), "damaged"),
    "noise behind an OGG's start": (b"OggS" + np.random.default_rng(4).bytes(5_000), "damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_have_a_reason(name: str) -> None:
    body, reason = HOSTILE[name]
    with pytest.raises(SampleError) as caught:
        read_waveform(body, seconds=60)
    assert caught.value.error_class == reason


def test_a_segment_before_the_damage_is_read() -> None:
    for body in (WHOLE[: len(WHOLE) // 2], flac_that_claims(1 << 35), wav(tone(), claimed=0x70000000)):
        np.testing.assert_allclose(read_waveform(body, seconds=0.5).samples[0], tone(seconds=0.5), atol=4e-5)


PIPED = piped(chirp(16_000, 3.0), 16_000, "flac", "flac")


def test_a_flac_written_to_a_pipe_is_read_to_its_end() -> None:
    assert PIPED[18:26][3] & 0x0F == 0 and PIPED[22:26] == bytes(4)  # STREAMINFO: 36 bits of length, all zero
    assert read_header(PIPED).seconds is None
    wanted = chirp(16_000, 3.0)
    for start, seconds, found in ((0.0, 60.0, 3.0), (1.3, 0.5, 0.5), (2.5, 60.0, 0.5)):
        sound = read_waveform(PIPED, start=start, seconds=seconds)
        first = round(start * 16_000)
        assert sound.seconds == found
        np.testing.assert_allclose(sound.samples[0], wanted[first : first + round(found * 16_000)], atol=4e-5)
    with pytest.raises(SampleError, match="no samples"):
        read_waveform(PIPED, start=3.0, seconds=1)


@pytest.mark.parametrize("lost", [1, 100, 3_000, len(PIPED) // 2])
def test_a_flac_written_to_a_pipe_and_truncated(lost: int) -> None:
    with pytest.raises(SampleError, match="damaged"):
        read_waveform(PIPED[:-lost], seconds=60)
    np.testing.assert_allclose(read_waveform(PIPED[:-lost], seconds=0.5).samples[0], chirp(16_000, 0.5), atol=4e-5)


def test_a_flac_written_to_a_pipe_and_changed() -> None:
    """The CRC of each frame; 8,192 bytes of padding come before the first."""
    for place in range(9_000, len(PIPED), 5_000):
        broken = PIPED[:place] + bytes([PIPED[place] ^ 0x10]) + PIPED[place + 1 :]
        with pytest.raises(SampleError, match="damaged"):
            read_waveform(broken, seconds=60)


@pytest.mark.parametrize("claimed", [0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
@pytest.mark.parametrize("whole", [None, 0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_wavs_written_to_a_pipe_end_with_the_file(claimed: int, whole: int | None) -> None:
    body = wav(chirp(16_000), claimed=claimed)
    body = body if whole is None else body[:4] + struct.pack("<I", whole) + body[8:]
    assert read_header(body).seconds == 2.0
    np.testing.assert_array_equal(read_waveform(body, seconds=60).samples, [chirp(16_000)])
    np.testing.assert_array_equal(read_waveform(body, start=1.5, seconds=60).samples, [chirp(16_000)[24_000:]])


def test_ffmpegs_wav_from_a_pipe() -> None:
    body = piped(chirp(16_000), 16_000, "wav", "pcm_s16le")
    assert body[4:8] == b"\xff" * 4 and read_header(body).seconds == 2.0
    np.testing.assert_allclose(read_waveform(body, seconds=60).samples[0], chirp(16_000), atol=4e-5)


def test_a_wav_without_samples_stays_empty() -> None:
    body = wav(np.zeros(0)) + b"LIST" + struct.pack("<I", 4_000) + bytes(4_000)
    body = body[:4] + struct.pack("<I", len(body) - 8) + body[8:]
    with pytest.raises(SampleError, match="no samples"):
        read_waveform(body, seconds=60)


@pytest.mark.parametrize("subtype", ["IMA_ADPCM", "MS_ADPCM", "GSM610"])
def test_compressed_wavs_have_their_length(subtype: str) -> None:
    body = encoded(chirp(16_000), 16_000, "WAV", subtype)
    assert read_header(body).seconds == pytest.approx(2.0, abs=0.1)
    assert read_waveform(body, seconds=60).seconds == read_header(body).seconds


def ogg_without_end(body: bytes) -> bytes:
    """Without the flag "end of stream" of the last page; its CRC-32 is computed by the specification."""
    last = body.rindex(b"OggS")
    page = bytearray(body[last:])
    page[5] &= ~4
    page[22:26] = bytes(4)
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ 0x104C11DB7) if crc & 0x80000000 else crc << 1
    page[22:26] = struct.pack("<I", crc)
    return body[:last] + bytes(page)


def test_an_ogg_without_an_end_of_stream() -> None:
    body = encoded(chirp(16_000), 16_000, "OGG", "VORBIS")
    cut = ogg_without_end(body)
    assert cut != body
    np.testing.assert_array_equal(read_waveform(cut, seconds=60).samples, read_waveform(body, seconds=60).samples)
    opus = encoded(chirp(48_000), 48_000, "OGG", "OPUS")
    first_pages = ogg_without_end(opus)[: opus.rindex(b"OggS")]  # as a stream that was recorded for a while
    found = read_waveform(first_pages, seconds=60)
    assert 0.5 < found.seconds < 2 and correlation(found.samples[0], chirp(48_000)) > 0.99


def test_one_sample_and_silence_are_sounds() -> None:
    for kind in ("FLAC", "WAV"):
        assert read_waveform(encoded(np.array([0.5], np.float32), 8_000, kind), seconds=9).samples.tolist() == [[0.5]]
    assert read_waveform(encoded(np.zeros(800, np.float32), 8_000), seconds=9, sample_rate=16_000).samples.max() == 0


def test_a_tag_before_the_sound() -> None:
    tag = b"ID3\x04\0\0" + bytes([0, 0, 0x7D, 0]) + bytes(0x7D << 7)  # longer than any first read
    for kind, body in (("mp3", encoded(tone(44_100), 44_100, "MP3")), ("aac", by_ffmpeg(tone(44_100), 44_100, "adts"))):
        assert read_header(tag + body).kind == kind
        assert read_waveform(tag + body, seconds=9).samples.shape[1] >= 44_100


def test_damage_anywhere_is_an_error_or_a_sound() -> None:
    """Flipped bytes never raise anything but a sample's error."""
    random = np.random.default_rng(0)
    bodies = [encoded(tone(), 16_000), encoded(tone(), 16_000, "WAV"), encoded(tone(), 16_000, "OGG", "VORBIS")]
    bodies += [
        encoded(tone(44_100), 44_100, "MP3"),
        by_ffmpeg(tone(44_100), 44_100),
        by_ffmpeg(tone(), 16_000, "matroska"),
    ]
    ended: list[Any] = []
    for body in bodies:
        for _ in range(30):
            broken = np.frombuffer(body, np.uint8).copy()
            places = random.integers(0, min(len(broken), 400) if random.random() < 0.5 else len(broken), 5)
            broken[places] = random.integers(0, 256, 5)
            try:
                ended.append(read_waveform(broken.tobytes(), seconds=5))
            except SampleError as error:
                ended.append(error.error_class)
    assert any(isinstance(one, Waveform) for one in ended) and "damaged" in ended


_HOUR = """
import resource, sys
from pipeline.shards.waveforms import read_waveform
with open(sys.argv[1], "rb") as file:
    read_waveform(file, seconds=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sound = read_waveform(file, start=3000, seconds=10, sample_rate=48000)
print(sound.samples.shape, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_that_of_the_segment(tmp_path: Any) -> None:
    """Ten seconds of an hour: 230 MB decoded would be the hour in float32, ten seconds are 2 MB."""
    path = tmp_path / "hour.flac"
    path.write_bytes(encode_flac(np.tile(chirp(16_000, 60.0), 60)[None], 16_000))
    done = subprocess.run([sys.executable, "-c", _HOUR, str(path)], capture_output=True, text=True, check=True)
    shape, _, grown = done.stdout.rpartition(" ")
    assert shape == "(1, 480000)" and int(grown) < 30_000  # KiB


def test_kinds_by_their_first_bytes() -> None:
    assert kind_of(b"RIFF\0\0\0\0WAVEfmt ") == "wav" and kind_of(b"RIFF\0\0\0\0WEBPVP8 ") == ""
    assert kind_of(b"\xff\xfb\x90\0" + bytes(12)) == "mp3" and kind_of(b"\xff\xf1\x50\x80" + bytes(12)) == "aac"
    assert kind_of(b"\xff\xfb\xf0\0") == "" and kind_of(b"\xff") == "" and kind_of(b"") == ""


def test_a_segment_must_be_finite() -> None:
    for seconds, start in ((0.0, 0.0), (float("inf"), 0.0), (1.0, -1.0), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="must be finite"):
            read_waveform(WHOLE, seconds=seconds, start=start)
    with pytest.raises(SampleError, match="no samples"):
        read_waveform(WHOLE, start=3.0, seconds=1)
    assert read_waveform(io.BytesIO(WHOLE), start=2.5, seconds=1).seconds == 0.5


def test_loudness_of_known_waveforms() -> None:
    sine = tone(16_000, 1.0, level=1.0)[None]
    assert measure(sine, 16_000).level == pytest.approx(-3.0103, abs=1e-3)
    assert measure(sine, 16_000).peak == pytest.approx(0.0, abs=0.01)
    half = np.concatenate([sine, np.zeros_like(sine)], axis=1)
    assert measure(half, 16_000).silent == pytest.approx(0.5, abs=0.02)
    assert measure(np.full((2, 1), 0.1, np.float32), 16_000).level == pytest.approx(-20, abs=1e-4)
    zeros = measure(np.zeros((1, 5), np.float32), 16_000)
    assert (zeros.level, zeros.peak, zeros.silent) == (FLOOR, FLOOR, 1.0)
