"""Decode rare image formats in a child process, so that a hanging or crashing decoder does not harm the job.

JPEG, PNG and WebP are decoded in this process: the work of their decoders (libjpeg-turbo, libpng, libwebp) is bounded
by the checks before (bytes, pixels, passes over the pixels), and they have been fuzzed for a decade. Other formats are
decoded by Pillow, and are a few in a thousand images of the web. They are sent through a pipe to one child process,
which starts with the first such image. The kernel kills it when an image takes more than ``SECONDS`` of CPU time, or
three times as long by the clock. Its memory is limited to ``BYTES_PER_PIXEL`` for each of the ``max_pixels`` of the
options: a file of 300 bytes may claim any size, and some decoders need 20 bytes for each pixel.

Frames on the pipe are an 8-byte length and that many bytes. The child answers in JSON and raw bytes, not in pickles,
because it has parsed untrusted data.
"""

import contextlib
import dataclasses
import json
import os
import resource
import signal
import struct
import subprocess
import sys
from types import TracebackType
from typing import IO, Self

from pipeline.config import from_json, to_json
from pipeline.errors import SampleError
from pipeline.stages.crawl.images import EncodedImage, ImageOptions, transform
from pipeline.stages.crawl.sniff import starts_like_an_image

SECONDS = 10.0
BYTES_PER_PIXEL = 12  # enough for an RGB image in Pillow, in NumPy and on the way between them
HEADROOM = 64 * 2**20
_PROGRAM = "from pipeline.stages.crawl.decode_apart import serve; serve()"
_IN_PLACE = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF")
_LENGTH = struct.Struct(">Q")


def needs_care(body: bytes) -> bool:
    """Whether ``body`` has a format that is decoded in the child process."""
    return not body.startswith(_IN_PLACE) and starts_like_an_image(body)


class Apart:
    """``transform`` in a child process; a context manager. The child starts with the first image."""

    def __init__(self, options: ImageOptions, seconds: float = SECONDS) -> None:
        self._first = to_json(options).encode()
        self._seconds = seconds
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def transform(self, body: bytes) -> EncodedImage:
        """As :func:`pipeline.stages.crawl.images.transform`, in the child process.

        Raises:
            SampleError: its error classes; also "decode_timeout" and "decode_crash" where the child died.
        """
        child = self._child or self._start()
        assert child.stdin is not None and child.stdout is not None
        try:
            _write(child.stdin, body)
            answer, data = _read(child.stdout), _read(child.stdout)
        except BrokenPipeError:
            answer = data = None
        if answer is None or data is None:
            raise self._lost(child)
        values = json.loads(answer)
        if "error_class" in values:
            raise SampleError(**values)
        return EncodedImage(data=data, **values)

    def _start(self) -> subprocess.Popen[bytes]:
        # Ray and tests find the package by sys.path, which a child does not inherit.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-c", _PROGRAM]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._child = child
        assert child.stdin is not None
        _write(child.stdin, json.dumps(self._seconds).encode())
        _write(child.stdin, self._first)
        return child

    def _lost(self, child: subprocess.Popen[bytes]) -> SampleError:
        # It closed its end because it is gone, or about to be.
        child.wait()
        self._end()
        if child.returncode in (-signal.SIGALRM, -signal.SIGPROF):
            return SampleError("failed_to_resize", "decode_timeout", "Image decoding error: took too long")
        return SampleError("failed_to_resize", "decode_crash", "Image decoding error: the decoder crashed")

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()


def serve() -> None:
    """The child process: reads images from standard input until its end, writes answers to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The default action kills the process, even inside a decoder.
    for clock in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(clock, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM, signal.SIGPROF])
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries must not mix with the answers
    seconds = float(_read(requests) or b"0")
    options = from_json(ImageOptions, (_read(requests) or b"").decode())
    while (body := _read(requests)) is not None:
        _limit_memory(options, body)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 3 * seconds)
        answer, data = _answer(body, options)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(answers, json.dumps(answer).encode())
        _write(answers, data)


def _limit_memory(options: ImageOptions, body: bytes) -> None:
    """Limit the memory of this process for one image; Linux only. A lower limit of the user stays."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            present = int(file.read().split()[5]) * resource.getpagesize()
    except FileNotFoundError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = present + HEADROOM + len(body) + BYTES_PER_PIXEL * options.max_pixels
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _answer(body: bytes, options: ImageOptions) -> tuple[dict[str, object], bytes]:
    try:
        image = transform(body, options)
    except SampleError as error:
        return {"status": error.status, "error_class": error.error_class, "message": error.message}, b""
    except MemoryError:
        message = "Image decoding error: needs more memory than --max-pixels allows"
        return {"status": "failed_to_resize", "error_class": "decode_memory", "message": message}, b""
    except Exception as error:
        # The sample boundary, as in the parent: decoders raise arbitrary exceptions.
        message = f"Image decoding error: {error}"
        return {"status": "failed_to_resize", "error_class": "decode", "message": message}, b""
    names = [field.name for field in dataclasses.fields(image) if field.name != "data"]
    return {name: getattr(image, name) for name in names}, image.data


def _write(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(_LENGTH.pack(len(data)))
    pipe.write(data)
    pipe.flush()


def _read(pipe: IO[bytes]) -> bytes | None:
    """The next frame; None where the other side has closed the pipe."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    data = pipe.read(length)
    return data if len(data) == length else None
