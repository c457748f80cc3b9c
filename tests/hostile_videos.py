"""Videos that are broken, that lie, or that are dear to decode, each with what becomes of it by default options."""

import io
import struct
import tempfile
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np

from tests.sounds import by_ffmpeg, encoded, tone
from tests.videos import encoded_video, numbered

STORED = "stored"


def faststart(**options: str) -> bytes:
    """A MP4 whose index stands before its frames."""
    body = encoded_video(numbered(60), options={"g": "10", **options})
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        settings = {"movflags": "faststart"}
        with av.open(io.BytesIO(body)) as source, av.open(file.name, "w", format="mp4", options=settings) as target:
            stream = source.streams.video[0]
            track = target.add_stream_from_template(stream)
            for packet in source.demux(stream):
                if packet.size:
                    packet.stream = track
                    target.mux(packet)
        return file.read()


def patched(body: bytes, box: bytes, change: Callable[[bytearray, int], None]) -> bytes:
    """The body after ``change(content, place of the box's first byte after its name)`` for every such box."""
    content = bytearray(body)
    place = content.find(box)
    assert place > 0
    while place > 0:
        change(content, place + 4)
        place = content.find(box, place + 4)
    return bytes(content)


def number(content: bytearray, place: int, value: int) -> None:
    content[place : place + 4] = struct.pack(">I", value)


def longer(content: bytearray, place: int) -> None:
    """Ten times the duration of a ``mdhd`` of version 0."""
    number(content, place + 16, 10 * struct.unpack_from(">I", content, place + 16)[0])


def without_key_frames() -> bytes:
    body = encoded_video(numbered(60), options={"g": "30"})
    target_file = io.BytesIO()
    with av.open(io.BytesIO(body)) as source, av.open(target_file, "w", format="mp4") as target:
        stream = source.streams.video[0]
        track = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size and not packet.is_keyframe:
                packet.stream = track
                target.mux(packet)
    return target_file.getvalue()


def damaged_in_the_middle() -> bytes:
    body = bytearray(faststart())
    place = body.find(b"mdat") + 4
    random = np.random.default_rng(1)
    for at in random.integers(place + 300, len(body), 600):
        body[at] = random.integers(256)
    return bytes(body)


def two_frames_in_ten_hours() -> bytes:
    return encoded_video(numbered(2), [0, 36_000], unit=Fraction(1, 1), kind="matroska")


def rebuilt(body: bytes, changes: dict[bytes, Callable[[bytes], bytes]]) -> bytes:
    """A MP4 whose boxes with these names have other contents; sizes of the boxes around them follow. No edit lists."""
    made, place = b"", 0
    while place < len(body):
        (size,) = struct.unpack_from(">I", body, place)
        name, content = body[place + 4 : place + 8], body[place + 8 : place + size]
        if name in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
            content = rebuilt(content, changes)
        if name != b"edts":
            content = changes.get(name, bytes)(content)
            made += struct.pack(">I", 8 + len(content)) + name + content
        place += size
    return made


def one_frame_many_times(count: int = 4_000) -> bytes:
    """An index with so many frames, all in the same bytes of the file: 300 MB of packets."""
    noise = np.random.default_rng(0).integers(0, 256, (1, 320, 320, 3), np.uint8)
    body = encoded_video(noise, codec="mjpeg", pixels="yuvj420p", kind="mov", options={"qscale": "2"})
    many = struct.pack(">I", count)
    changes = {
        b"stsz": lambda content: content[:4] + struct.pack(">I", len(body) - 2_000) + many,
        b"stco": lambda content: content[:4] + many + content[8:12] * count,
        b"stts": lambda content: content[:8] + many + content[12:],
    }
    return rebuilt(body, changes)


def huge(height: int = 4_320, width: int = 7_680) -> bytes:
    images = np.full((1, height, width, 3), 90, np.uint8)
    return encoded_video(images, codec="mjpeg", pixels="yuvj420p", kind="avi")


def transparent() -> bytes:
    images = np.full((4, 33, 65, 4), 90, np.uint8)
    return encoded_video(images, codec="png", kind="mov", pixels="rgba", images_format="rgba")


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "plain": (lambda: encoded_video(numbered(60)), STORED),
    "empty": (lambda: b"", "empty"),
    "a page": (lambda: b"<html><body>404</body></html>", "not_a_video"),
    "a sound": (lambda: encoded(tone(), 16_000), "not_a_video"),
    "a playlist": (lambda: b"#EXTM3U\n#EXTINF:10,\n/etc/passwd\n#EXT-X-ENDLIST\n", "not_a_video"),
    "sound alone": (lambda: by_ffmpeg(tone(), 16_000), "no_picture"),
    "index without frames": (lambda: faststart()[: faststart().find(b"mdat") + 4], "no_picture"),
    "cut in the middle": (lambda: faststart()[: faststart().find(b"mdat") + 4 + 1_500], "truncated"),
    "cut before the index": (lambda: encoded_video(numbered(60))[:2_000], "damaged"),
    "cut in the middle of matroska": (
        lambda: encoded_video(numbered(60), kind="matroska", unit=Fraction(1, 25))[:2_000],
        "truncated",
    ),
    "bytes changed in the middle": (damaged_in_the_middle, "damaged"),
    "a longer time in the header": (lambda: patched(faststart(), b"mdhd", longer), STORED),
    "a shorter time in the header": (
        lambda: patched(faststart(), b"mdhd", lambda content, place: number(content, place + 16, 1)),
        STORED,
    ),
    "a thousand frames a second": (lambda: encoded_video(numbered(900), unit=Fraction(1, 1000)), "frame_rate"),
    "no time between frames": (
        lambda: patched(faststart(bf="0"), b"stts", lambda content, place: number(content, place + 12, 0)),
        "frame_rate",
    ),
    "8K": (huge, "too_many_pixels"),
    "ten hours in a few kB": (two_frames_in_ten_hours, STORED),
    "no key frame": (without_key_frames, "no_picture"),
    "transparent, odd sizes": (transparent, STORED),
    "turned": (lambda: encoded_video(numbered(20), degrees=90), STORED),
    "one frame": (lambda: encoded_video(numbered(1)), STORED),
    "one frame of a fiftieth of a second": (lambda: encoded_video(numbered(1), unit=Fraction(1, 50)), "too_short"),
    "an index of 200 million frames": (
        lambda: patched(faststart(), b"stsz", lambda content, place: number(content, place + 8, 200_000_000)),
        "damaged",
    ),
    "one frame in four thousand places": (one_frame_many_times, STORED),
    "an index of a billion times": (
        lambda: patched(faststart(), b"stts", lambda content, place: number(content, place + 8, 1_000_000_000)),
        STORED,
    ),
}
