"""The codec of sounds: what is stored, what fails and why, the process apart, a whole refresh."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from pipeline.codecs import codec_of
from pipeline.codecs.audio import AudioCodec, AudioOptions
from pipeline.codecs.options import MediaOptions
from pipeline.config import from_json, to_json
from pipeline.errors import SampleError, SettingError
from pipeline.shards.selection import read_samples
from pipeline.shards.storage import Folder
from pipeline.sources.drawn.source import Drawn
from pipeline.sources.source import SOUND_UNCHANGED, UNCHANGED
from pipeline.stages.crawl.decode_apart import Apart
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers
from tests.shards.test_waveforms import HOSTILE
from tests.sounds import by_ffmpeg, encoded, tone

CODEC = AudioCodec()
HERE = Workers(processes_count=0)


def stored(body: bytes) -> tuple[np.ndarray, int]:
    with soundfile.SoundFile(io.BytesIO(body)) as file:
        assert (file.format, file.subtype) == ("FLAC", "PCM_16")
        return file.read(dtype="float32"), file.samplerate


def test_a_sound_becomes_flac_with_its_columns() -> None:
    body = encoded(np.stack([tone(44_100, 2.0), 0 * tone(44_100, 2.0)], 1), 44_100, "WAV", "FLOAT")
    made = CODEC.encode(body, AudioOptions())
    assert list(made.fields) == ["flac"]
    samples, rate = stored(made.fields["flac"])
    assert samples.shape == (96_000,) and rate == 48_000
    np.testing.assert_allclose(samples[4_800:-4_800], tone(48_000, 2.0)[4_800:-4_800] / 2, atol=1e-3)
    assert dict(made.columns) == {
        "audio_seconds": 2.0,
        "audio_rate": 48_000,
        "audio_channels": 1,
        "audio_original_seconds": 2.0,
        "audio_original_rate": 44_100,
        "audio_original_channels": 2,
        "audio_loudness": pytest.approx(-15.05, abs=0.01),  # a sine of 0.25
        "audio_peak": pytest.approx(-12.04, abs=0.02),
        "audio_silent": 0.0,
        "audio_clipped": 0.0,
    }
    for name, kind in CODEC.columns.items():
        assert isinstance(made.columns[name], kind)


@pytest.mark.parametrize("rate", [8_000, 11_025, 96_000, 192_000])
@pytest.mark.parametrize("channels", [1, 2, 8])
def test_rates_and_channels(rate: int, channels: int) -> None:
    body = encoded(np.tile(tone(rate, 1.0)[:, None], (1, channels)), rate, "WAV")
    samples, stored_rate = stored(CODEC.encode(body, AudioOptions(audio_stereo=True)).fields["flac"])
    assert stored_rate == 48_000 and samples.shape == ((48_000, 2) if channels == 2 else (48_000,))
    assert stored(CODEC.encode(body, AudioOptions(audio_rate=0)).fields["flac"])[1] == rate


def test_segments() -> None:
    ramp = np.linspace(0, 1, 80_000, endpoint=False).astype(np.float32)  # 10 s
    body = encoded(ramp, 8_000, "WAV", "FLOAT")
    options: dict[str, Any] = {"audio_rate": 0, "audio_seconds": 2.0}
    for segment, first in (("start", 0.0), ("middle", 0.4)):
        made = CODEC.encode(body, AudioOptions(audio_segment=segment, **options))
        samples, _ = stored(made.fields["flac"])
        assert len(samples) == 16_000 and samples[0] == pytest.approx(first, abs=1e-4)
        assert (made.columns["audio_seconds"], made.columns["audio_original_seconds"]) == (2.0, 10.0)


def test_bytes_are_kept_where_nothing_changes() -> None:
    flac, ogg = encoded(tone(), 16_000), encoded(tone(), 16_000, "OGG", "VORBIS")
    keep = AudioOptions(audio_rate=16_000, audio_keep_bytes=True)
    assert CODEC.encode(flac, keep).fields == {"flac": flac} and CODEC.encode(ogg, keep).fields == {"ogg": ogg}
    for change in ({"audio_rate": 8_000}, {"audio_rate": 16_000, "audio_seconds": 0.5}):
        made = CODEC.encode(ogg, AudioOptions(audio_keep_bytes=True, **change))  # type: ignore[arg-type]
        assert list(made.fields) == ["flac"]
    stereo = encoded(np.stack([tone(), tone()], 1), 16_000)
    assert CODEC.encode(stereo, keep).fields["flac"] != stereo
    with pytest.raises(SampleError, match="damaged"):
        CODEC.encode(flac[: len(flac) // 2], keep)
    m4a = by_ffmpeg(tone(44_100), 44_100)
    kept = AudioOptions(**SOUND_UNCHANGED)  # type: ignore[arg-type]
    assert CODEC.encode(m4a, kept).fields == {"m4a": m4a}
    assert list(CODEC.encode(by_ffmpeg(tone(), 16_000, "matroska"), kept).fields) == ["flac"]


LIMITS: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "one sample": (encoded(np.array([0.5], np.float32), 8_000), {}, "too_short"),
    "silence": (encoded(np.zeros(16_000, np.float32), 16_000), {}, "silent"),
    "near silence": (encoded(tone(level=2e-3), 16_000), {"audio_min_loudness": -50.0}, "silent"),
    "clipped": (encoded(np.clip(9 * tone(), -1, 1), 16_000), {"audio_max_clipped": 0.5}, "clipped"),
    "long": (encoded(tone(seconds=3.0), 16_000), {"audio_max_seconds": 2.0}, "too_long"),
    "short": (encoded(tone(seconds=0.4), 16_000), {"audio_min_seconds": 0.5}, "too_short"),
    **{name: (body, {}, reason) for name, (body, reason) in HOSTILE.items()},
}


@pytest.fixture(scope="module")
def apart() -> Any:
    with Apart("audio", AudioOptions()) as child:
        yield child


@pytest.mark.parametrize("name", LIMITS)
def test_what_fails_and_why(name: str, apart: Apart) -> None:
    body, options, reason = LIMITS[name]
    with pytest.raises(SampleError) as caught:
        CODEC.encode(body, AudioOptions(**options))
    assert caught.value.error_class == reason and caught.value.status == "failed_to_resize"
    if not options:
        with pytest.raises(SampleError) as caught:
            apart.encode(body)
        assert caught.value.error_class == reason


def test_the_process_apart_gives_the_same(apart: Apart) -> None:
    for body in (
        encoded(tone(44_100, 2.0), 44_100, "MP3"),
        encoded(tone(192_000, 35.0), 192_000, "AIFF"),
        by_ffmpeg(tone(44_100, 2.0), 44_100),
    ):
        assert CODEC.needs_care(body) and apart.encode(body) == CODEC.encode(body, AudioOptions())
    assert not CODEC.needs_care(encoded(tone(), 16_000))


def test_silence_can_be_kept() -> None:
    made = CODEC.encode(encoded(np.zeros(16_000, np.float32), 16_000), AudioOptions(audio_min_loudness=-120))
    assert made.columns["audio_silent"] == 1.0 and made.columns["audio_loudness"] == -120


def test_readers_get_the_waveform() -> None:
    body = encoded(np.stack([tone(), -tone()], 1), 16_000, "WAV", "FLOAT")
    np.testing.assert_allclose(codec_of("audio").decode(body).samples, [tone(), -tone()], atol=1e-6)


def test_a_failed_row_has_what_the_header_says() -> None:
    measured = CODEC.measured(encoded(tone(), 16_000))
    assert measured["audio_original_seconds"] == 1.0 and measured["audio_original_rate"] == 16_000
    assert CODEC.measured(b"fLaC and nothing") == {} and CODEC.measured(b"") == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("audio_rate", 500),
        ("audio_seconds", 0.0),
        ("audio_seconds", 1e9),
        ("audio_segment", "end"),
        ("audio_min_seconds", 31.0),
        ("audio_max_seconds", 0.0),
        ("audio_min_loudness", 3.0),
        ("audio_max_clipped", 1.5),
    ],
)
def test_bad_settings(field: str, value: Any) -> None:
    with pytest.raises(SettingError, match=field):
        AudioOptions(**{field: value})


def test_options_survive_json() -> None:
    options = AudioOptions(audio_rate=16_000)
    assert from_json(AudioOptions, to_json(options)) == options


def test_one_snapshot_of_every_kind_of_sample(tmp_path: Path) -> None:
    """Image and text, sound and text, image and sound, and all three, with the bytes that were drawn."""
    source = Drawn(samples=40, size=64, sound="mixed", sound_seconds=0.5)
    options = ShardOptions(
        media=MediaOptions(
            image=codec_of("image").options(**UNCHANGED),
            audio=AudioOptions(**SOUND_UNCHANGED),  # type: ignore[arg-type]
        ),
        number_sample_per_shard=20,
    )
    snapshot = refresh(source, Folder(str(tmp_path)), options, HERE)
    assert {"jpg", "flac", "txt", "json"} <= set(snapshot.fields) and snapshot.samples == 40
    rows = [row for piece in source.slices(100, Folder("memory://x")) for row in source.rows(piece)]
    kinds: Counter[tuple[bool, bool, bool]] = Counter()
    samples = [sample for shard in snapshot.shards for sample in read_samples(Folder(str(tmp_path)), shard)]
    for row, sample in zip(rows, samples, strict=True):
        assert sample.fields.get("flac") == row.body("audio") and sample.fields.get("jpg") == row.body("image")
        kinds["jpg" in sample.fields, "flac" in sample.fields, bool(sample.fields["txt"])] += 1
        record = json.loads(sample.fields["json"])
        assert ("audio_seconds" in record) == ("flac" in sample.fields)
        assert "flac" not in sample.fields or record["audio_seconds"] == 0.5
    assert set(kinds) == {(True, False, True), (False, True, True), (True, True, False), (True, True, True)}
    table = pq.read_table(tmp_path / f"{snapshot.shards[0].name}.parquet")
    assert set(CODEC.columns) <= set(table.column_names) and set(table["status"].to_pylist()) == {"success"}


def test_a_segment_of_a_sound() -> None:
    wave = np.concatenate([0 * tone(16_000, 1.0), tone(16_000, 1.0), 0 * tone(16_000, 2.0)])
    body = encoded(wave, 16_000)
    made = CODEC.encode(body, AudioOptions(audio_rate=0, audio_keep_bytes=True), (0.5, 1.5))
    samples, _ = stored(made.fields["flac"])
    np.testing.assert_allclose(samples, wave[8_000:24_000], atol=1e-4)
    assert made.columns["audio_seconds"] == 1.0 and made.columns["audio_original_seconds"] == 4.0
    middle = AudioOptions(audio_rate=0, audio_seconds=0.5, audio_segment="middle")
    samples, _ = stored(CODEC.encode(body, middle, (0.5, 1.5)).fields["flac"])
    np.testing.assert_allclose(samples, wave[12_000:20_000], atol=1e-4)
    to_its_end = CODEC.encode(body, AudioOptions(audio_rate=0, audio_min_loudness=-120.0), (1.5, float("inf")))
    assert to_its_end.columns["audio_seconds"] == 2.5
    with pytest.raises(SampleError) as error:
        CODEC.encode(body, AudioOptions(), (9.0, 10.0))
    assert error.value.error_class == "empty"
