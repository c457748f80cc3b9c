"""The codec of videos: what is stored, what fails and why, the process apart, a whole refresh."""

import io
import json
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipeline.codecs import codec_of, video_encoding
from pipeline.codecs import video as video_codec
from pipeline.codecs.video import VideoCodec, VideoOptions
from pipeline.config import from_json, to_json
from pipeline.errors import SampleError, SettingError
from pipeline.shards import video_cut, video_frames
from pipeline.shards.video_frames import read_frames, read_timeline, read_video_header
from pipeline.stages.crawl.decode_apart import Apart
from tests.hostile_videos import HOSTILE, STORED, faststart
from tests.sounds import tone, video
from tests.videos import encoded_video, every_frame, numbered, numbers_of

CODEC = VideoCodec()
UNEVEN = [0, 1, 2, 7, 8, 20, 21, 22, 30, 31]


def stored_numbers(body: bytes) -> tuple[list[int], list[float]]:
    frames = every_frame(body)
    pixels = np.stack([frame.to_ndarray(format="rgb24") for _, frame in frames])
    return numbers_of(pixels), [round(stamp, 4) for stamp, _ in frames]


def test_a_video_becomes_mp4_with_its_columns() -> None:
    body = encoded_video(numbered(40, 96, 160), kind="avi", codec="mpeg4", options={"bf": "2"})
    made = CODEC.encode(body, VideoOptions(video_size=48))
    assert list(made.fields) == ["mp4"]
    assert stored_numbers(made.fields["mp4"]) == (list(range(40)), [round(0.1 * at, 4) for at in range(40)])
    assert dict(made.columns) == {
        "video_seconds": pytest.approx(4.0),
        "video_width": 80,
        "video_height": 48,
        "video_frames": 40,
        "video_rate": pytest.approx(10.0),
        "video_begin": 0.0,
        "video_motion": pytest.approx(0.2, abs=0.1),
        "video_sound_seconds": None,
        "video_original_seconds": pytest.approx(4.0),
        "video_original_width": 160,
        "video_original_height": 96,
        "video_original_rate": pytest.approx(10.0),
    }
    for name, kind in CODEC.columns.items():
        assert made.columns[name] is None or isinstance(made.columns[name], kind)
    header = read_video_header(made.fields["mp4"])
    assert (header.width, header.height, header.seconds) == (80, 48, pytest.approx(4.0))


def test_times_between_frames_are_kept() -> None:
    made = CODEC.encode(encoded_video(numbered(10), UNEVEN, kind="matroska"), VideoOptions())
    assert stored_numbers(made.fields["mp4"]) == (list(range(10)), [at / 10 for at in UNEVEN])
    assert read_timeline(made.fields["mp4"]).end == pytest.approx(made.columns["video_seconds"], abs=1e-4)


def test_frames_at_a_rate_are_those_that_are_shown() -> None:
    body = encoded_video(numbered(10), UNEVEN, kind="matroska")
    made = CODEC.encode(body, VideoOptions(video_frames_per_second=4))
    numbers, times = stored_numbers(made.fields["mp4"])
    assert times == [0.25 * number for number in range(len(times))]
    assert numbers == [max(at for at, stamp in enumerate(UNEVEN) if stamp / 10 <= time) for time in times]
    assert made.columns["video_rate"] == pytest.approx(4.0)
    assert made.columns["video_frames"] == len(times) == 13
    short = CODEC.encode(encoded_video(numbered(100)), VideoOptions(video_seconds=2.5, video_frames_per_second=1))
    assert short.columns["video_seconds"] == pytest.approx(2.5) and short.columns["video_frames"] == 3
    assert read_timeline(short.fields["mp4"]).end == pytest.approx(2.5)


@pytest.mark.parametrize(
    "kind, codec", [("mp4", "libx264"), ("matroska", "libx264"), ("avi", "mpeg4"), ("webm", "libvpx")]
)
def test_segments_begin_with_the_frame_that_is_shown(kind: str, codec: str) -> None:
    fast = {"deadline": "realtime", "cpu-used": "8"} if codec == "libvpx" else {"bf": "2"}
    body = encoded_video(numbered(300), kind=kind, codec=codec, options={"g": "40", **fast})
    made = CODEC.encode(body, VideoOptions(), (12.25, 13.5))
    numbers, times = stored_numbers(made.fields["mp4"])
    assert numbers == list(range(122, 135))
    assert times == [0.0, *(round(0.05 + 0.1 * at, 4) for at in range(12))]
    assert made.columns["video_seconds"] == pytest.approx(1.25)
    middle = CODEC.encode(body, VideoOptions(video_seconds=1, video_segment="middle"))
    assert stored_numbers(middle.fields["mp4"])[0][0] == 145
    for end in (float("inf"), 400.0):  # the middle of what the file has of the segment
        middle = CODEC.encode(body, VideoOptions(video_seconds=1, video_segment="middle"), (10.0, end))
        assert stored_numbers(middle.fields["mp4"])[0][0] == 195
    assert CODEC.encode(body, VideoOptions(), (29.0, float("inf"))).columns["video_seconds"] == pytest.approx(1.0)
    assert CODEC.encode(body, VideoOptions(), (29.0, 40.0)).columns["video_seconds"] == pytest.approx(1.0)


def test_a_segment_outside_of_the_video_has_its_own_reason() -> None:
    with pytest.raises(SampleError) as error:
        CODEC.encode(encoded_video(numbered(20)), VideoOptions(), (5.0, 6.0))
    assert error.value.error_class == "segment"


def test_key_frames_are_as_near_as_asked() -> None:
    body = encoded_video(numbered(60), options={"g": "1000"})
    made = CODEC.encode(body, VideoOptions(video_key_seconds=0.5))
    keys = [stamp for stamp, frame in every_frame(made.fields["mp4"]) if frame.key_frame]
    assert max(np.diff(keys)) <= 0.5 + 1e-6
    assert len([1 for _, frame in every_frame(CODEC.encode(body, VideoOptions()).fields["mp4"]) if frame.key_frame]) < 8


def test_sound_is_kept_for_the_segment() -> None:
    sound = np.concatenate([0 * tone(16_000, 2.0), tone(16_000, 2.0)])
    body = video(numbered(40), 10, sound)
    made = CODEC.encode(body, VideoOptions(video_keep_sound=True, video_sound_rate=16_000), (1.5, 3.0))
    assert list(made.fields) == ["mp4", "flac"]
    samples, rate = soundfile.read(io.BytesIO(made.fields["flac"]), dtype="float32")
    assert rate == 16_000 and len(samples) == 24_000
    assert made.columns["video_sound_seconds"] == pytest.approx(1.5)
    assert np.abs(samples[:7_500]).max() < 0.02 and np.abs(samples[8_500:]).max() > 0.4
    assert not read_video_header(made.fields["mp4"]).has_sound
    silent = CODEC.encode(video(numbered(40), 10, None), VideoOptions(video_keep_sound=True))
    assert list(silent.fields) == ["mp4"] and silent.columns["video_sound_seconds"] is None


def test_bytes_are_kept_where_nothing_changes() -> None:
    for kind, codec, ending in (("mp4", "libx264", "mp4"), ("webm", "libvpx", "webm"), ("matroska", "libx264", "mkv")):
        body = encoded_video(numbered(20), kind=kind, codec=codec)
        assert CODEC.encode(body, VideoOptions(video_keep_bytes=True)).fields == {ending: body}
    body = encoded_video(numbered(40))
    for changes in ({"video_size": 32}, {"video_seconds": 1.0}, {"video_frames_per_second": 5.0}):
        assert CODEC.encode(body, VideoOptions(video_keep_bytes=True, **changes)).fields["mp4"] != body
    assert CODEC.encode(body, VideoOptions(video_keep_bytes=True), (0.0, 2.0)).fields["mp4"] != body


def test_still_videos_have_no_motion() -> None:
    still = CODEC.encode(encoded_video(np.full((40, 48, 80, 3), 77, np.uint8)), VideoOptions())
    assert still.columns["video_motion"] < 1e-3
    flicker = np.repeat([[[[0]]], [[[255]]]], 20, axis=0).astype(np.uint8)
    images = np.broadcast_to(
        flicker.reshape(2, 20, 1, 1, 1).transpose(1, 0, 2, 3, 4).reshape(40, 1, 1, 1), (40, 48, 80, 3)
    )
    moving = CODEC.encode(encoded_video(images, unit=Fraction(1, 4)), VideoOptions())
    assert moving.columns["video_motion"] == pytest.approx(1.0, abs=0.02)


def test_the_same_video_gives_the_same_bytes() -> None:
    body = encoded_video(np.random.default_rng(1).integers(0, 255, (20, 144, 176, 3), np.uint8))
    made = {CODEC.encode(body, VideoOptions()).fields["mp4"] for _ in range(6)}
    assert len(made) == 1, "x264 reads beyond frames of such a size, but for its options"


def test_decoding_gives_frames_over_the_whole_length() -> None:
    frames = codec_of("video").decode(encoded_video(numbered(160)))
    assert numbers_of(frames.pixels) == list(range(5, 160, 10))


@pytest.fixture(scope="module")
def outcome() -> tuple[dict[str, str], int]:
    """What becomes of each hostile video in one process apart, and the most memory that it had, in bytes."""
    answers = {}
    with Apart("video", VideoOptions()) as apart:
        for name, (make, _) in HOSTILE.items():
            try:
                apart.encode(make())
                answers[name] = STORED
            except SampleError as error:
                answers[name] = error.error_class
                assert not re.search(r"\d{4}", error.message), "few and fixed messages"
        status = Path(f"/proc/{apart._child.pid}/status").read_text()
    return answers, int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10


@pytest.mark.parametrize("name", HOSTILE)
def test_each_hostile_video_has_its_reason(outcome: tuple[dict[str, str], int], name: str) -> None:
    assert outcome[0][name] == HOSTILE[name][1]


def test_hostile_videos_cost_little_memory(outcome: tuple[dict[str, str], int]) -> None:
    assert outcome[1] < 400 << 20


def test_damage_anywhere_gives_an_answer() -> None:
    """Random bytes at random places of the index and the frames; the process apart outlives all of it."""
    bodies = [faststart(), encoded_video(numbered(40), kind="matroska"), encoded_video(numbered(40), kind="avi")]
    random, reasons = np.random.default_rng(2), Counter()
    with Apart("video", VideoOptions(video_seconds=2), seconds=5.0) as apart:
        for number in range(45):
            body = bytearray(bodies[number % 3])
            for at in random.integers(16, len(body) if number % 2 else 900, random.integers(1, 30)):
                body[at] = random.integers(256)
            try:
                apart.encode(bytes(body))
                reasons[STORED] += 1
            except SampleError as error:
                reasons[error.error_class] += 1
    known = {
        STORED,
        "damaged",
        "truncated",
        "no_picture",
        "frame_rate",
        "too_short",
        "too_many_pixels",
        "unknown_codec",
    }
    assert set(reasons) <= known, reasons
    assert len(reasons) > 2


def test_a_decoder_that_takes_too_long_is_stopped() -> None:
    body = encoded_video(numbered(900), options={"preset": "ultrafast"})
    with Apart("video", VideoOptions(), seconds=0.02) as apart, pytest.raises(SampleError) as error:
        apart.encode(body)
    assert error.value.error_class == "decode_timeout"


def test_memory_does_not_grow_with_the_length() -> None:
    peaks = []
    for count in (150, 900):
        images = np.repeat(numbered(10, 180, 320), count // 10, axis=0)
        body = encoded_video(images, unit=Fraction(1, 25), options={"preset": "ultrafast", "g": "250"})
        with Apart("video", VideoOptions(video_seconds=60)) as apart:
            apart.encode(body)
            status = Path(f"/proc/{apart._child.pid}/status").read_text()
        peaks.append(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10)
    assert peaks[1] < peaks[0] + (32 << 20), "the further frames have 130 MB"


@pytest.mark.parametrize(
    "field, value",
    [
        ("video_seconds", 0),
        ("video_seconds", 601.0),
        ("video_segment", "end"),
        ("video_size", 8),
        ("video_frames_per_second", 500.0),
        ("video_quality", 52),
        ("video_key_seconds", 0.0),
        ("video_max_pixels", 0),
        ("video_min_seconds", 31.0),
        ("video_max_seconds", 0.0),
        ("video_sound_rate", 10),
    ],
)
def test_bad_options_are_named(field: str, value: object) -> None:
    with pytest.raises(SettingError, match=f"^{field}: got "):
        VideoOptions(**{field: value})


def test_options_survive_json() -> None:
    options = VideoOptions(video_size=128, video_keep_sound=True)
    assert from_json(VideoOptions, to_json(options)) == options
    assert json.loads(to_json(options))["video_size"] == 128


def test_limits_become_reasons() -> None:
    body = encoded_video(numbered(40))
    for options, reason in (
        (VideoOptions(video_max_seconds=3.0), "too_long"),
        (VideoOptions(video_min_seconds=5.0), "too_short"),
        (VideoOptions(video_max_pixels=100), "too_many_pixels"),
    ):
        with pytest.raises(SampleError) as error:
            CODEC.encode(body, options)
        assert error.value.error_class == reason


def test_stored_videos_are_read_back_exactly() -> None:
    """The loader's exact reading and decoding everything agree on what the codec writes."""
    made = CODEC.encode(encoded_video(numbered(100), unit=Fraction(1, 24)), VideoOptions(video_key_seconds=1.0))
    found = read_frames(made.fields["mp4"], lambda line: np.linspace(0, line.end, 13)[:-1])
    assert numbers_of(found.pixels) == [int(100 * part / 12 + 1e-9) for part in range(12)]


def test_every_reason_is_in_the_guides() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs"
    code = "".join(
        Path(module.__file__).read_text() for module in (video_frames, video_cut, video_encoding, video_codec)
    )
    reasons = set(re.findall(r'bad_video\(\s*"(\w+)"', code)) | {reason for _, reason in HOSTILE.values()} - {STORED}
    assert len(reasons) > 10
    for page in ("video.md", "operations.md"):
        text = (docs / page).read_text()
        assert {reason for reason in reasons if f"`{reason}`" not in text} == set(), page
