"""Frames of videos at wanted times, against decoding every frame."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from pipeline.errors import SampleError
from pipeline.shards.video_frames import read_frame, read_frames, read_timeline, read_video_header
from tests.hostile_videos import one_frame_many_times
from tests.videos import encoded_video, every_frame, numbered, numbers_of

COUNT = 40
UNEVEN = np.cumsum(np.random.default_rng(5).integers(1, 9, COUNT)).tolist()
MILLI = Fraction(1, 1000)
OPEN_GOP = {"x264-params": "open-gop=1:keyint=8:min-keyint=8:bframes=3:b-adapt=0:scenecut=0"}
VIDEOS = {
    "even": encoded_video(numbered(COUNT)),
    "one key frame": encoded_video(numbered(COUNT), options={"g": "1000", "sc_threshold": "0", "bf": "3"}),
    "open groups": encoded_video(numbered(COUNT), options=OPEN_GOP),
    "open groups in matroska": encoded_video(numbered(COUNT), unit=Fraction(1, 25), kind="matroska", options=OPEN_GOP),
    "variable rate": encoded_video(numbered(COUNT), UNEVEN, options={"g": "10", "bf": "2"}),
    "variable rate in matroska": encoded_video(numbered(COUNT), [7 * at for at in UNEVEN], unit=MILLI, kind="matroska"),
    "late first stamp": encoded_video(numbered(COUNT), range(1000, 1000 + COUNT), kind="matroska"),
    "negative first stamp": encoded_video(
        numbered(COUNT), range(-7, COUNT - 7), container_options={"avoid_negative_ts": "disabled"}
    ),
    "no edit list": encoded_video(numbered(COUNT), container_options={"use_editlist": "0"}, options={"bf": "3"}),
    "avi": encoded_video(numbered(COUNT), kind="avi", codec="mpeg4", options={"g": "12", "bf": "2"}),
    "avi of h264": encoded_video(numbered(COUNT), kind="avi", options={"g": "12", "bf": "2"}),
    "vp9": encoded_video(numbered(COUNT), kind="webm", codec="libvpx-vp9", options={"cpu-used": "8", "g": "12"}),
    "vp8 with hidden frames": encoded_video(
        numbered(COUNT), kind="webm", codec="libvpx", options={"auto-alt-ref": "1", "lag-in-frames": "12", "g": "20"}
    ),
    "hevc": encoded_video(numbered(COUNT), codec="libx265", options={"x265-params": "keyint=9:log-level=none"}),
    "images": encoded_video(numbered(COUNT), codec="mjpeg", pixels="yuvj420p", kind="avi"),
    "program stream": encoded_video(
        numbered(COUNT), unit=Fraction(1, 25), kind="mpeg", codec="mpeg2video", options={"g": "9", "bf": "2"}
    ),
    "windows media": encoded_video(numbered(COUNT), kind="asf", codec="wmv2", options={"g": "9"}),
    "flash": encoded_video(numbered(COUNT), kind="flv", codec="flv", options={"g": "9"}),
    "h264 in flash": encoded_video(numbered(COUNT), kind="flv", options={"g": "9", "bf": "2"}),
    "one frame": encoded_video(numbered(1)),
    "fragmented": encoded_video(
        numbered(COUNT), container_options={"movflags": "frag_keyframe+empty_moov"}, options={"g": "8"}
    ),
}


def by_brute_force(body: bytes, times: list[float]) -> tuple[list[np.ndarray], list[float]]:
    frames = every_frame(body)
    origin = frames[0][0]
    found = []
    for time in times:
        before = [(stamp - origin, frame) for stamp, frame in frames if stamp - origin <= time + 1e-6]
        found.append(before[-1] if before else (0.0, frames[0][1]))
    return [frame.to_ndarray(format="gray") for _, frame in found], [stamp for stamp, _ in found]


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_are_those_of_decoding_everything(name: str) -> None:
    body = VIDEOS[name]
    stamps = np.array([stamp for stamp, _ in every_frame(body)])
    stamps -= stamps[0]
    random = np.random.default_rng(3)
    for count in (1, 2, 5, 12):
        times = [*random.uniform(-0.5, stamps[-1] + 1, count), *random.choice(stamps, count)]
        found = read_frames(body, times)
        wanted, wanted_times = by_brute_force(body, times)
        assert numbers_of(found.pixels) == numbers_of(np.stack(wanted)[..., None])
        np.testing.assert_allclose(found.times, wanted_times, atol=1e-6)


@pytest.mark.parametrize("name", VIDEOS)
def test_all_frames_at_their_own_times(name: str) -> None:
    body = VIDEOS[name]
    frames = every_frame(body)
    origin = frames[0][0]
    timelines = []

    def all_of(timeline):
        timelines.append(timeline)
        return [stamp - origin for stamp, _ in frames]

    found = read_frames(body, all_of)
    hidden = COUNT - len(frames) if name == "negative first stamp" else 0
    assert numbers_of(found.pixels) == list(range(hidden, hidden + len(frames)))
    assert len(frames) == (1 if name == "one frame" else COUNT - hidden)
    assert timelines[-1].begin == 0 and timelines[-1].frames == len(frames)
    assert timelines[-1].end > frames[-1][0] - origin


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_frames_are_upright(degrees: int, mirrored: bool) -> None:
    """The muxer's matrix turns counter-clockwise, then mirrors; FFmpeg's command line gives the same pixels."""
    images = np.zeros((2, 48, 96, 3), np.uint8)
    images[:, :24, :48], images[:, :24, 48:], images[:, 24:, :48] = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    body = encoded_video(images, degrees=degrees, mirrored=mirrored, options={"qp": "0"}, pixels="yuv444p")
    turned = np.rot90(images[0], degrees // 90)
    wanted = turned[:, ::-1] if mirrored else turned
    found = read_frames(body, [0.0])
    assert found.pixels.shape[1:] == wanted.shape
    np.testing.assert_allclose(found.pixels[0].astype(int), wanted.astype(int), atol=8)
    header = read_video_header(body)
    assert (header.height, header.width) == wanted.shape[:2]


def test_pixels_become_square_and_frames_small() -> None:
    body = encoded_video(numbered(3, 72, 80), pixel_ratio=Fraction(16, 15))
    assert read_frames(body, [0.0]).pixels.shape == (1, 72, 85, 3)
    assert read_video_header(body).width == 85
    assert read_frames(body, [0.0, 0.1], size=36).pixels.shape == (2, 36, 42, 3)
    assert read_frames(body, [0.0], size=500).pixels.shape == (1, 72, 85, 3)
    assert numbers_of(read_frames(encoded_video(numbered(9, 96, 160)), [0.8, 0.3], size=48).pixels) == [8, 3]


def test_transparent_frames_are_on_white() -> None:
    images = np.zeros((2, 32, 64, 4), np.uint8)
    images[:, :, :, 3], images[:, :, :32] = 0, (200, 100, 0, 255)
    images[:, :, 32:48] = (200, 100, 0, 128)
    body = encoded_video(images, codec="png", kind="mov", pixels="rgba", images_format="rgba")
    pixels = read_frames(body, [0.0]).pixels[0]
    assert pixels[5, 60].tolist() == [255, 255, 255] and pixels[5, 5].tolist() == [200, 100, 0]
    np.testing.assert_allclose(pixels[5, 40], [227, 177, 127], atol=1)


def pq(nits: np.ndarray) -> np.ndarray:
    """Code of a light in cd/m2, 0 to 1 (SMPTE ST 2084)."""
    power = (nits / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(light: np.ndarray) -> np.ndarray:
    """Code of a scene's light from 0 to 1 (ARIB STD-B67)."""
    return np.where(
        light <= 1 / 12, np.sqrt(3 * light), 0.55991 + 0.17883277 * np.log(np.maximum(12 * light, 1) - 0.28466892)
    )


@pytest.mark.parametrize("curve", ["pq", "hlg"])
def test_a_high_range_becomes_a_usual_one(curve: str) -> None:
    """White paper at 203 cd/m2 is bright, grey at a ninth of it in the middle, the peak white, all without colour."""
    nits = np.array([0.0, 203 / 9, 203.0, 1000.0])
    values = pq(nits) if curve == "pq" else hlg((nits / 1000) ** (1 / 1.2))
    images = np.repeat(np.rint(values * 65535).astype(np.uint16), 32)[None, None, :, None].repeat(32, 1).repeat(3, 3)
    colours = {"color_trc": 16 if curve == "pq" else 18, "color_primaries": 9, "colorspace": 9, "color_range": 1}
    body = encoded_video(
        images,
        pixels="yuv420p10le",
        options={"crf": "1"},
        colours=colours,
        images_format="rgb48le",
    )
    found = read_frames(body, [0.0]).pixels[0, 16, 16::32].astype(int)
    # Reinhard's curve by hand: light * (1 + light / peak^2) / (1 + light), then the power 1 / 2.4.
    light = nits / 203
    wanted = 255 * (light * (1 + light / (1000 / 203) ** 2) / (1 + light)) ** (1 / 2.4)
    np.testing.assert_allclose(found, wanted[:, None].repeat(3, 1), atol=6)


def test_the_header() -> None:
    header = read_video_header(VIDEOS["even"])
    assert (header.kind, header.frames, header.has_sound) == ("mp4", COUNT, False)
    assert header.seconds == pytest.approx(COUNT / 10) and header.frame_rate == pytest.approx(10)
    assert read_timeline(VIDEOS["even"]).end == pytest.approx(COUNT / 10)
    assert read_timeline(VIDEOS["one frame"]).end == pytest.approx(0.1)


def test_a_function_gives_the_times() -> None:
    found = read_frames(VIDEOS["even"], lambda line: np.linspace(line.begin, line.end, 5)[:-1] + line.end / 8)
    assert numbers_of(found.pixels) == [5, 15, 25, 35]
    with pytest.raises(ValueError, match="no time"):
        read_frames(VIDEOS["even"], [])


def test_a_frame_of_a_long_file() -> None:
    body = VIDEOS["open groups"]
    assert numbers_of(np.stack([read_frame(io.BytesIO(body), at) for at in (0.0, 1.75, 99.0)])) == [0, 17, 39]


BAD = {
    "nothing": (b"", "empty"),
    "a page": (b"<html><body>no video</body></html>", "not_a_video"),
    "a sound": (b"fLaC" + bytes(100), "not_a_video"),
    "only the first bytes": (VIDEOS["even"][:200], "damaged"),
    "zeros for frames": (VIDEOS["even"][:40] + bytes(len(VIDEOS["even"]) - 40), "damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_videos(name: str) -> None:
    body, reason = BAD[name]
    with pytest.raises(SampleError) as error:
        read_frames(body, [0.0])
    assert error.value.error_class == reason


def test_an_index_that_gives_one_frame_many_times_costs_no_memory() -> None:
    """Readers of training hold the packets of a video: their memory must follow the file, not its index."""
    body = one_frame_many_times()
    with av.open(io.BytesIO(body)) as container:
        assert sum(packet.size for packet in container.demux(video=0)) > 1000 * len(body)
    for read in (lambda: read_frames(body, [1.0]), lambda: read_timeline(body)):
        with pytest.raises(SampleError) as error:
            read()
        assert error.value.error_class == "damaged"
