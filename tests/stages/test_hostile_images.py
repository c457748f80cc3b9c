"""Images that are small in bytes and expensive to decode: none may use much memory, each must give a result.

The whole collection is decoded in one child process, whose peak memory the kernel tells.
"""

import base64
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

BOMB = 256 * 2**20


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deflated(size: int) -> bytes:
    """``size`` zero bytes, packed a thousand to one."""
    packer, block = zlib.compressobj(6), bytes(2**20)
    return b"".join(packer.compress(block) for _ in range(size // 2**20)) + packer.flush()


def png(width: int, height: int, pixels: bytes, *extra: bytes, depth: int = 8) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


SMALL = zlib.compress(bytes(10 * (1 + 10 * 3)))


def gif(screen: tuple[int, int], frame: tuple[int, int], frames: int = 1) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(6)
    # Codes of two bits: clear, then the colour 0 again and again, then nothing more.
    image = b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02" + (b"\xff" + b"\x84" * 255) * 3 + b"\0"
    return head + image * frames + b";"


def tiff(width: int, height: int, strip: bytes, compression: int) -> bytes:
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, compression),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (278, 4, 1, height),
        (279, 4, 1, len(strip)),
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory + bytes(4)


def endless_directories() -> bytes:
    """A TIFF whose list of images leads back to itself."""
    body = bytearray(tiff(10, 10, bytes(100), 1))
    body[-4:] = struct.pack("<I", 108)
    return bytes(body)


def encoded(kind: str, size: tuple[int, int], **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((*size[::-1], 3), np.uint8)).save(file, kind, **options)
    return file.getvalue()


def jpeg_of_many_scans() -> bytes:
    body = encoded("JPEG", (2000, 2000), progressive=True)
    scan = body[body.rindex(b"\xff\xda") : -2]
    return body[:-2] + scan * 5000 + b"\xff\xd9"


def resized_in_its_header(kind: str, old: bytes, new: bytes) -> bytes:
    body = encoded(kind, (40, 30))
    assert old in body
    return body.replace(old, new)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "png of many pixels": lambda: png(100_000, 100_000, SMALL),
    "png of most pixels": lambda: png(2**31 - 1, 2**31 - 1, SMALL),
    "png with a bomb behind ten rows": lambda: png(10, 10, deflated(BOMB)),
    "png with a bomb for a colour profile": lambda: png(10, 10, SMALL, chunk(b"iCCP", b"a\0\0" + deflated(BOMB))),
    "png with bombs for texts": lambda: png(10, 10, SMALL, *[chunk(b"zTXt", b"a\0\0" + deflated(BOMB // 4))] * 4),
    "png with an international bomb": lambda: png(10, 10, SMALL, chunk(b"iTXt", b"a\0\1\0\0\0" + deflated(BOMB))),
    "png with a lying chunk": lambda: png(10, 10, SMALL)[:33] + struct.pack(">I", 2**31 - 1) + b"IDAT" + SMALL,
    "png of many chunks": lambda: png(10, 10, SMALL, chunk(b"tEXt", b"") * 100_000),
    "gif with a huge screen": lambda: gif((65_535, 65_535), (10, 10)),
    "gif with a huge frame": lambda: gif((10, 10), (65_535, 65_535)),
    "gif of many frames": lambda: gif((500, 500), (500, 500), 5_000),
    "gif that never ends": lambda: gif((10, 10), (10, 10))[:-1] + b"!\xfe" + (b"\xff" + b"x" * 255) * 40_000,
    "bmp of many pixels": lambda: resized_in_its_header(
        "BMP", struct.pack("<ii", 40, 30), struct.pack("<ii", 60_000, 60_000)
    ),
    "ppm of many pixels": lambda: b"P6 99999 99999 255\n" + bytes(100),
    "ppm of a long number": lambda: b"P6 " + b"9" * 5_000_000 + b" 1 255\n",
    "tiff of many pixels": lambda: tiff(100_000, 100_000, bytes(100), 1),
    "tiff with a bomb for a strip": lambda: tiff(10, 10, deflated(BOMB), 8),
    "tiff that leads back to itself": endless_directories,
    "tiff with a million tags": lambda: b"II*\0\x08\0\0\0\xff\xff" + struct.pack("<HHII", 700, 1, 2**31, 8) * 65_535,
    "webp of many pixels": lambda: b"RIFF\x40\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff" * 6 + bytes(64),
    "jpeg of many pixels": lambda: resized_in_its_header(
        "JPEG", struct.pack(">HH", 30, 40), struct.pack(">HH", 65_500, 65_500)
    ),
    "jpeg of many passes": jpeg_of_many_scans,
    "jpeg of a long comment": lambda: b"\xff\xd8" + (b"\xff\xfe\xff\xff" + bytes(65_533)) * 200 + b"\xff\xd9",
    "jpeg 2000 of many pixels": lambda: resized_in_its_header(
        "JPEG2000", struct.pack(">II", 30, 40), struct.pack(">II", 2**31 - 1, 2**31 - 1)
    ),
}
PROGRAM = """
import base64, json, os, re, sys, time
from pipeline.errors import SampleError
from pipeline.codecs.image import ImageCodec
from pipeline.stages.crawl.decode_apart import Apart
from pipeline.codecs.image_encoding import ImageOptions
codec, options, answers = ImageCodec(), ImageOptions(image_size=64), {}
with Apart("image", options) as apart:
    while line := sys.stdin.readline():
        name, text = json.loads(line)
        body = base64.b64decode(text)
        began = time.process_time()
        try:
            part = apart.encode(body) if codec.needs_care(body) else codec.encode(body, options)
            answers[name] = "decoded" if len(next(iter(part.fields.values()))) < 20_000 else "large"
        except SampleError as error:
            answers[name] = error.error_class
        assert time.process_time() - began < 5, name
    # Not getrusage: its value starts at the parent's memory at the fork.
    processes = [os.getpid(), apart._child.pid]
    peaks = [re.search(r"VmHWM:\\s+(\\d+) kB", open(f"/proc/{one}/status").read())[1] for one in processes]
print(json.dumps([answers, max(map(int, peaks))]))
"""


def run(bodies: dict[str, bytes]) -> tuple[dict[str, str], int]:
    """The result of each, and the peak memory in bytes of the process or its child."""
    lines = "".join(json.dumps([name, base64.b64encode(body).decode()]) + "\n" for name, body in bodies.items())
    path = os.pathsep.join(part for part in sys.path if part)
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, input=lines, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}, check=True
    )
    answers, peak = json.loads(done.stdout)
    return answers, peak * 1024


@pytest.fixture(scope="module")
def outcome() -> tuple[dict[str, str], int, int]:
    _, before = run({"plain": encoded("JPEG", (40, 30)), "gif": encoded("GIF", (40, 30))})
    answers, after = run({name: make() for name, make in HOSTILE.items()})
    return answers, before, after


def test_hostile_images_cost_little_memory(outcome: tuple[dict[str, str], int, int]) -> None:
    answers, before, after = outcome
    assert len(answers) == len(HOSTILE)
    assert after - before < 150 * 2**20, "none was unpacked or allocated"


@pytest.mark.parametrize("name", [name for name in HOSTILE if "many pixels" in name or "most pixels" in name])
def test_many_pixels_are_refused_as_such(outcome: tuple[dict[str, str], int, int], name: str) -> None:
    assert outcome[0][name] == "too_many_pixels"


@pytest.mark.parametrize("name", HOSTILE)
def test_each_gets_an_answer(outcome: tuple[dict[str, str], int, int], name: str) -> None:
    known = {"decoded", "damaged", "truncated", "too_many_pixels", "not_a_picture", "aspect_ratio"}
    assert outcome[0][name] in known
