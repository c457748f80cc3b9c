"""Decoding in a child process: the same images, and decoders that raise, hang, crash and print."""

import io
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from PIL import Image

from pipeline.codecs.image import ImageCodec
from pipeline.codecs.image_encoding import ImageOptions, transform
from pipeline.errors import SampleError
from pipeline.stages.crawl import decode_apart
from pipeline.stages.crawl.decode_apart import Apart

CODEC = ImageCodec()
STAND_IN = """
import os, time
from pipeline.stages.crawl import decode_apart
from pipeline.codecs import image
honest = image.transform
def decoder(body, options):
    if body.endswith(b"hang"): time.sleep(3600)
    if body.endswith(b"spin"):
        while True: pass
    if body.endswith(b"crash"): os.abort()
    if body.endswith(b"raise"): raise ZeroDivisionError("a hole in a decoder")
    if body.endswith(b"chatter"): os.write(1, b"a library says hello")
    return honest(body, options)
image.transform = decoder
decode_apart.serve()
"""


def encoded(kind: str, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "apart"),
    [
        ("JPEG", False),
        ("PNG", False),
        ("WEBP", False),
        ("GIF", True),
        ("BMP", True),
        ("TIFF", True),
        ("JPEG2000", True),
    ],
)
def test_only_rare_kinds_are_decoded_apart(kind: str, apart: bool) -> None:
    assert CODEC.needs_care(encoded(kind)) is apart


def test_what_is_no_picture_needs_no_care() -> None:
    assert not any(map(CODEC.needs_care, (b"", b"<html>", b"RIFF", b"\xff\xd8\xff")))


def test_the_images_are_the_same() -> None:
    options = ImageOptions(image_size=32, encode_format="png", encode_quality=3, apply_exif_orientation=True)
    with Apart("image", options) as apart:
        for kind in ("GIF", "BMP", "TIFF", "PPM", "JPEG2000"):
            for seed in range(2):
                body = encoded(kind, seed)
                assert apart.encode(body) == CODEC.encode(body, options)
        with pytest.raises(SampleError) as theirs:
            transform(encoded("GIF")[:200], options)
        with pytest.raises(SampleError) as ours:
            apart.encode(encoded("GIF")[:200])
        assert str(ours.value) == str(theirs.value) and ours.value.error_class == theirs.value.error_class
        assert ours.value.status == "failed_to_resize"


def test_no_process_is_started_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    with Apart("image", ImageOptions()):
        pass


@pytest.fixture
def strange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_apart, "_PROGRAM", STAND_IN)


@pytest.mark.usefixtures("strange")
def test_one_bad_decoder_costs_one_image(capfd: pytest.CaptureFixture[str]) -> None:
    good, options = encoded("GIF"), ImageOptions(image_size=32)
    expected = CODEC.encode(good, options)
    with Apart("image", options, seconds=0.5) as apart:
        for tail, error_class in [
            (b"hang", "decode_timeout"),
            (b"spin", "decode_timeout"),
            (b"crash", "decode_crash"),
            (b"raise", "decode"),
            (b"", None),
            (b"chatter", None),
        ]:
            if error_class is None:
                assert apart.encode(good + tail).fields == expected.fields
                continue
            with pytest.raises(SampleError) as error:
                apart.encode(good + tail)
            assert (error.value.status, error.value.error_class) == ("failed_to_resize", error_class)
            assert apart.encode(good) == expected, "the next image is as good as ever"


@pytest.mark.usefixtures("strange")
def test_a_child_that_was_killed_between_two_images_is_replaced() -> None:
    good = encoded("GIF")
    with Apart("image", ImageOptions()) as apart:
        expected = apart.encode(good)
        assert apart._child is not None
        os.kill(apart._child.pid, signal.SIGKILL)
        with pytest.raises(SampleError, match="crashed"):
            apart.encode(good)
        assert apart.encode(good) == expected


def test_the_child_goes_with_its_parent() -> None:
    program = f"""
import os, signal
from pipeline.stages.crawl import decode_apart
from pipeline.codecs.image_encoding import ImageOptions
decode_apart._PROGRAM = {STAND_IN!r}
apart = decode_apart.Apart("image", ImageOptions(image_size=32), seconds=1.0)
apart.encode(bytes.fromhex({encoded("GIF").hex()!r}))
print(apart._child.pid, flush=True)
signal.setitimer(signal.ITIMER_REAL, 0.3)  # ends the parent while the child hangs
apart.encode(bytes.fromhex({(encoded("GIF") + b"hang").hex()!r}))
"""
    path = os.pathsep.join(part for part in sys.path if part)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert done.returncode == -signal.SIGALRM
    child = int(done.stdout)
    patience = time.monotonic() + 10
    while is_running(child) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_time_of_a_decoder_is_limited_by_its_work() -> None:
    """A text PPM is parsed in Python: seconds for the work of a few bytes in other kinds."""
    body = b"P3 1500 1500 255\n" + b"1 2 3 " * (1500 * 1500)
    with Apart("image", ImageOptions(), seconds=0.2) as apart, pytest.raises(SampleError) as error:
        apart.encode(body)
    assert error.value.error_class == "decode_timeout"


HUNGRY = """
from pipeline.codecs import image
from pipeline.stages.crawl import decode_apart
honest = image.transform
def decoder(body, options):
    if body.endswith(b"hungry"): bytearray(400_000_000)
    return honest(body, options)
image.transform = decoder
decode_apart.serve()
"""


def test_memory_of_a_decoder_is_limited_by_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_apart, "_PROGRAM", HUNGRY)
    good = encoded("GIF")
    with Apart("image", ImageOptions(max_pixels=10_000_000)) as apart:
        with pytest.raises(SampleError, match="--max-pixels") as error:
            apart.encode(good + b"hungry")
        assert error.value.error_class == "decode_memory"
        assert apart.encode(good).columns["width"] == 256
    with Apart("image", ImageOptions(max_pixels=100_000_000)) as apart:
        assert apart.encode(good + b"hungry").columns["width"] == 256


def test_jpeg_2000_pays_for_the_memory_of_its_decoder() -> None:
    body = encoded("JPEG2000")
    assert transform(body, ImageOptions(image_size=32, max_pixels=60 * 90 * 5 // 3)).width == 32
    with pytest.raises(SampleError) as error:
        transform(body, ImageOptions(image_size=32, max_pixels=60 * 90 * 5 // 3 - 1))
    assert error.value.error_class == "too_many_pixels"
