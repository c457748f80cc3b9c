"""Clips copied out of long files, against decoding everything; changes of shots in videos that are put together."""

import io
from fractions import Fraction

import numpy as np
import pytest

from pipeline.codecs.video import VideoCodec, VideoOptions
from pipeline.errors import SampleError
from pipeline.shards.video_cut import copy_clip, shot_changes
from tests.sounds import tone, video
from tests.videos import encoded_video, every_frame, numbered, numbers_of

OPEN = {"x264-params": "open-gop=1:keyint=25:min-keyint=25:bframes=3:b-adapt=0:scenecut=0"}
LONG = {
    "mp4": encoded_video(numbered(600), unit=Fraction(1, 30), options={"g": "50", "bf": "2"}),
    "open groups": encoded_video(numbered(600), unit=Fraction(1, 30), options=OPEN),
    "matroska": encoded_video(numbered(600), unit=Fraction(1, 25), kind="matroska", options={"g": "50", "bf": "2"}),
    "avi": encoded_video(numbered(600), unit=Fraction(1, 25), kind="avi", codec="mpeg4", options={"g": "40"}),
    "windows media": encoded_video(numbered(600), unit=Fraction(1, 25), kind="asf", codec="wmv2", options={"g": "50"}),
    "flash": encoded_video(numbered(600), unit=Fraction(1, 25), kind="flv", options={"g": "50", "bf": "2"}),
    "one key frame": encoded_video(numbered(600), unit=Fraction(1, 25), options={"g": "9999", "sc_threshold": "0"}),
    "png": encoded_video(numbered(300), unit=Fraction(1, 15), kind="mov", codec="png", pixels="rgb24"),
    "with sound": video(numbered(600), 30, tone(16_000, 20.0)),
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("begin", [0.0, 3.21, 11.0, 19.5])
def test_a_copied_clip_has_the_frames_of_the_whole(name: str, begin: float) -> None:
    body, inside = copy_clip(io.BytesIO(LONG[name]), begin, 0.5)
    made = VideoCodec().encode(body, VideoOptions(), (inside, inside + 0.5))
    frames = every_frame(made.fields["mp4"])
    found = numbers_of(np.stack([frame.to_ndarray(format="rgb24") for _, frame in frames]))
    stamps = [stamp for stamp, _ in every_frame(LONG[name])]
    first = max(at for at, stamp in enumerate(stamps) if stamp - stamps[0] <= begin + 1e-3)
    last = max(at for at, stamp in enumerate(stamps) if stamp - stamps[0] < begin + 0.5 - 1e-3)
    assert found == list(range(first, last + 1))
    if name != "one key frame":
        assert len(body) < 0.5 * len(LONG[name]), "only the clip is copied"


def test_the_sound_is_copied_too() -> None:
    sound = np.concatenate([0 * tone(16_000, 10.0), tone(16_000, 10.0)])
    body, inside = copy_clip(io.BytesIO(video(numbered(600), 30, sound)), 9.0, 2.0)
    options = VideoOptions(video_keep_sound=True, video_sound_rate=16_000)
    import soundfile

    samples, _ = soundfile.read(
        io.BytesIO(VideoCodec().encode(body, options, (inside, inside + 2.0)).fields["flac"]), dtype="float32"
    )
    assert len(samples) == pytest.approx(32_000, abs=200)
    assert np.abs(samples[:15_000]).max() < 0.02 and np.abs(samples[17_500:-400]).max() > 0.4


def test_a_clip_after_the_end_has_its_reason() -> None:
    with pytest.raises(SampleError) as error:
        body, inside = copy_clip(io.BytesIO(LONG["mp4"]), 50.0, 1.0)
        VideoCodec().encode(body, VideoOptions(), (inside, inside + 1.0))
    assert error.value.error_class == "segment"


def scene(random: np.random.Generator, count: int) -> np.ndarray:
    """A textured picture that moves slowly to the right."""
    ground = random.integers(0, 255, (6, 8, 3)).repeat(20, 0).repeat(40, 1)
    return np.stack([np.roll(ground, 2 * at, axis=1)[:72, :128] for at in range(count)]).astype(np.uint8)


def test_shots_change_where_scenes_were_joined() -> None:
    random = np.random.default_rng(4)
    lengths = [25, 40, 18, 33]
    images = np.concatenate([scene(random, count) for count in lengths])
    body = encoded_video(images, unit=Fraction(1, 25))
    found, length = shot_changes(io.BytesIO(body))
    np.testing.assert_allclose(found, np.cumsum(lengths[:-1]) / 25, atol=1e-6)
    assert length == pytest.approx(sum(lengths) / 25)


def test_a_flash_and_a_slow_change_are_no_cuts() -> None:
    images = scene(np.random.default_rng(4), 60)
    images[20] = 255
    fade = np.linspace(1, 0, 60)[:, None, None, None]
    images[:] = fade * images + (1 - fade) * scene(np.random.default_rng(5), 60)
    assert shot_changes(io.BytesIO(encoded_video(images, unit=Fraction(1, 25))))[0] == []
