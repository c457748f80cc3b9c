"""Encode doubtful bodies in a child process, so that a hanging or crashing decoder does not harm the job.

A codec says which bodies need that care. They are sent through a pipe to one child process for each medium, which
starts with the first such body. The kernel kills it when a body takes more CPU time than the codec allows for its
options, or three times as long by the clock. Its memory is limited to what the codec allows.

Frames on the pipe are an 8-byte length and that many bytes. The child answers in JSON and raw bytes, not in pickles,
because it has parsed untrusted data.
"""

import contextlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
from types import TracebackType
from typing import IO, Any, Self

from pipeline.codecs import codec_of
from pipeline.codecs.codec import AnyCodec, Encoded
from pipeline.config import from_json, to_json
from pipeline.errors import SampleError
from pipeline.shards.segments import Segment

HEADROOM = 64 * 2**20
_PROGRAM = "from pipeline.stages.crawl.decode_apart import serve; serve()"
_LENGTH = struct.Struct(">Q")


class Apart:
    """``encode`` of a codec in a child process; a context manager. The child starts with the first body."""

    def __init__(self, medium: str, options: Any, seconds: float | None = None) -> None:
        limit = codec_of(medium).seconds(options) if seconds is None else seconds
        self._first = (medium.encode(), to_json(options).encode(), json.dumps(limit).encode())
        self._what = medium.capitalize()
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def encode(self, body: bytes, segment: Segment | None = None) -> Encoded:
        """As :meth:`pipeline.codecs.codec.Codec.encode`, in the child process.

        Raises:
            SampleError: its error classes; also "decode_timeout" and "decode_crash" where the child died.
        """
        child = self._child or self._start()
        assert child.stdin is not None and child.stdout is not None
        try:
            _write(child.stdin, json.dumps(segment).encode())
            _write(child.stdin, body)
            answer = _read(child.stdout)
            values = {} if answer is None else json.loads(answer)
            fields = {name: _read(child.stdout) for name in values.get("fields", ())}
        except BrokenPipeError:
            answer = None
        if answer is None or any(data is None for data in fields.values()):
            raise self._lost(child)
        if "error_class" in values:
            raise SampleError(**values)
        return Encoded({name: data for name, data in fields.items() if data is not None}, values["columns"])

    def _start(self) -> subprocess.Popen[bytes]:
        # Ray and tests find the package by sys.path, which a child does not inherit.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-c", _PROGRAM]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._child = child
        assert child.stdin is not None
        for frame in self._first:
            _write(child.stdin, frame)
        return child

    def _lost(self, child: subprocess.Popen[bytes]) -> SampleError:
        # It closed its end because it is gone, or about to be.
        child.wait()
        self._end()
        if child.returncode in (-signal.SIGALRM, -signal.SIGPROF):
            return SampleError("failed_to_resize", "decode_timeout", f"{self._what} decoding error: took too long")
        return SampleError("failed_to_resize", "decode_crash", f"{self._what} decoding error: the decoder crashed")

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
    """The child process: reads bodies from standard input until its end, writes answers to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The default action kills the process, even inside a decoder.
    for clock in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(clock, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM, signal.SIGPROF])
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries must not mix with the answers
    codec = codec_of((_read(requests) or b"").decode())
    options: Any = from_json(codec.options, (_read(requests) or b"").decode())
    seconds = float(_read(requests) or b"0")
    codec.load()
    memory = codec.memory(options)
    while (segment := _read(requests)) is not None and (body := _read(requests)) is not None:
        _limit_memory(memory + len(body))
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 3 * seconds)
        answer, fields = _answer(codec, body, options, json.loads(segment))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(answers, json.dumps(answer).encode())
        for data in fields:
            _write(answers, data)


def _limit_memory(allowed: int) -> None:
    """Limit the memory of this process for one body, in bytes; Linux only. A lower limit of the user stays."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            present = int(file.read().split()[5]) * resource.getpagesize()
    except FileNotFoundError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = present + HEADROOM + allowed
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _answer(
    codec: AnyCodec, body: bytes, options: Any, segment: Segment | None
) -> tuple[dict[str, object], list[bytes]]:
    what = f"{codec.medium.capitalize()} decoding error"
    try:
        part = codec.encode(body, options, segment)
    except SampleError as error:
        return {"status": error.status, "error_class": error.error_class, "message": error.message}, []
    except MemoryError:
        message = f"{what}: needs more memory than {codec.limit} allows"
        return {"status": "failed_to_resize", "error_class": "decode_memory", "message": message}, []
    except Exception as error:
        # The sample boundary, as in the parent: decoders raise arbitrary exceptions.
        return {"status": "failed_to_resize", "error_class": "decode", "message": f"{what}: {error}"}, []
    return {"fields": list(part.fields), "columns": dict(part.columns)}, list(part.fields.values())


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
