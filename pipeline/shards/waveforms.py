"""Encoded sounds of strangers as waveforms: one rule for refreshes, filters and readers.

1. The kind is detected from the first bytes, never from a name.
2. libsndfile decodes FLAC, WAV, OGG (Vorbis, Opus) and AIFF, and seeks in them exactly. FFmpeg's libraries, inside the
   wheel of PyAV, decode MP3, AAC, and the sound of MP4, M4A, Matroska, WebM and AVI. (soundfile seeks after every read,
   which leaves gaps in MP3.) FFmpeg is given the name of the format: its own detection would also accept playlists,
   which open further files.
3. Only the wanted seconds are decoded, block by block, so memory is bounded by the segment. The length in a header is
   never trusted: nothing is allocated for it.
4. Channels are averaged at the sound's own rate, in float32. (A downmix by FFmpeg preserves power: it takes two equal
   channels of full scale to a peak of 1.41.)
5. soxr resamples ("HQ": the band up to 91 % of the lower rate passes, what would alias is 120 dB down).

A waveform is float32 [C, T] with full scale from -1 to 1; floats beyond that are kept until they are encoded.
All functions are pure and thread-safe: the decoders have no shared state and release the GIL.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO, NoReturn

import av
import numpy as np
import numpy.typing as npt
import soundfile
import soxr
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer

from pipeline.errors import SampleError

Samples = npt.NDArray[np.float32]

FFMPEG_KINDS = ("mp3", "mp4", "aac", "matroska", "avi")
"""Kinds that FFmpeg decodes; its formats have the same names."""
RATES = (1_000, 768_000)
MOST_CHANNELS = 64
CLIPPED_AT = 32_767 / 32_768
"""Magnitude from which a sample counts as clipped: the largest value of 16 bits."""

_BLOCK = 1 << 18  # numbers to decode at a time, over all channels
_IMAGE_BRANDS = (b"avif", b"avis", b"mif1", b"msf1", b"heic", b"heix")
_FORMS = {
    (b"RIFF", b"WAVE"): "wav",
    (b"RF64", b"WAVE"): "wav",
    (b"RIFF", b"AVI "): "avi",
    (b"FORM", b"AIFF"): "aiff",
    (b"FORM", b"AIFC"): "aiff",
}
_LARGEST = 1e9
_ENDLESS = 1 << 40  # frames; libsndfile reports 2^63 - 1 where a header does not say
_SLACK = 0.1  # seconds by which lossy formats may be shorter than their headers say
_PREROLL = 0.2  # seconds: lossy codecs need the frames before the first wanted one
_UNINDEXED = ("mp3", "aac")  # kinds in which FFmpeg seeks by the mean bit rate: they are read from their start
_UNKNOWN_LENGTHS = (0, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)
_FULL_SCALE = {"u8": 128.0, "s16": 32_768.0, "s32": 2.0**31, "s64": 2.0**63, "flt": 1.0, "dbl": 1.0}


@dataclass(frozen=True, slots=True)
class SoundHeader:
    """Header of a sound. ``seconds`` is what the header claims; None where it says nothing."""

    kind: str
    sample_rate: int
    channels: int
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Waveform:
    """A decoded segment: float32 [C, T] at ``sample_rate``.

    ``header`` describes the encoded sound, ``clipped`` is the fraction of clipped samples before averaging and
    resampling.
    """

    samples: Samples
    sample_rate: int
    header: SoundHeader
    clipped: float

    @property
    def seconds(self) -> float:
        """Length of the segment."""
        return int(self.samples.shape[1]) / self.sample_rate


def kind_of(start: bytes) -> str:
    """The kind by the first bytes (16 or more): flac, wav, ogg, aiff, one of ``FFMPEG_KINDS``; "" for others.

    An ID3 tag counts as mp3.

    >>> kind_of(b"fLaC" + bytes(12)), kind_of(b"<html>")
    ('flac', '')
    """
    plain = {b"fLaC": "flac", b"OggS": "ogg", b"\x1a\x45\xdf\xa3": "matroska", b"ID3": "mp3"}
    for signature, kind in plain.items():
        if start.startswith(signature):
            return kind
    if start[4:8] == b"ftyp":
        return "" if start[8:12] in _IMAGE_BRANDS else "mp4"
    return _FORMS.get((start[:4], start[8:12]), "") or _mpeg_kind(start)


def read_header(sound: bytes | BinaryIO) -> SoundHeader:
    """Kind, rate, channels and claimed length of an encoded sound, or of the sound in a video, without decoding it.

    Raises:
        SampleError: error classes empty, not_a_sound, damaged, no_sound (a video without), sample_rate, channels.
    """
    file = _as_file(sound)
    kind = _kind(file)
    if kind in FFMPEG_KINDS:
        with _opened_by_ffmpeg(file, kind) as container:
            return _stream_header(kind, _sound_stream(container))
    with _opened_by_sndfile(file) as sndfile:
        return _sndfile_header(kind, sndfile, file)


def read_waveform(
    sound: bytes | BinaryIO,
    *,
    seconds: float,
    start: float = 0.0,
    sample_rate: int | None = None,
    stereo: bool = False,
) -> Waveform:
    """Decode at most ``seconds`` of a sound (or of the sound in a video) from ``start`` on, in seconds.

    The result is mono, the average of all channels; with ``stereo`` two channels stay two. It is shorter than
    ``seconds`` where the sound ends, and has the sound's own rate without ``sample_rate``. ``start`` is exact to the
    sample, but for Matroska and WebM, whose clock counts milliseconds, and for AAC and AVI, which do not state the
    encoder's delay.

    Raises:
        SampleError: as :func:`read_header`; also truncated (it ends before its header says; "damaged" where the decoder
            objects first), not_finite (NaN or infinity), and empty (no sample from ``start`` on).
    """
    if not (0 < seconds < math.inf and 0 <= start < math.inf):
        raise ValueError(f"a segment of {seconds} seconds from {start}: both must be finite, the length above 0")
    file = _as_file(sound)
    kind = _kind(file)
    if kind in FFMPEG_KINDS:
        header, blocks = _by_ffmpeg(file, kind, start, seconds)
    else:
        header, blocks = _by_sndfile(file, kind, start, seconds)
    samples, clipped = _joined(blocks, stereo)
    _check_whole(header, start, seconds, samples.shape[1])
    return Waveform(
        resampled(samples, header.sample_rate, sample_rate or header.sample_rate),
        sample_rate or header.sample_rate,
        header,
        clipped,
    )


def resampled(samples: Samples, old_rate: int, new_rate: int) -> Samples:
    """float32 [C, T] at another rate: T * new / old samples, rounded, at least one."""
    if old_rate == new_rate:
        return samples
    wanted = max(1, round(samples.shape[1] * new_rate / old_rate))
    # One channel at a time in soxr's own layout [T, C] costs no copy for mono.
    found = np.asarray(soxr.resample(samples.T, old_rate, new_rate), np.float32).T[:, :wanted]
    missing = wanted - found.shape[1]
    return np.ascontiguousarray(np.pad(found, ((0, 0), (0, missing))) if missing else found)


def encode_flac(samples: Samples, sample_rate: int) -> bytes:
    """FLAC of 16 bits of a waveform float32 [C, T]; values beyond full scale are clipped.

    The same samples give the same bytes with the same version of libsndfile.
    """
    return _encoded(samples, sample_rate, "FLAC")


def encode_wav(samples: Samples, sample_rate: int) -> bytes:
    """WAV of 16 bits, for browsers and other tools; as :func:`encode_flac`."""
    return _encoded(samples, sample_rate, "WAV")


def bad_sound(error_class: str, message: str) -> NoReturn:
    """Raise the error of a bad sound; messages are few and fixed, for counting."""
    raise SampleError("failed_to_resize", error_class, f"Sound decoding error: {message}")


# Kinds


def _as_file(sound: bytes | BinaryIO) -> BinaryIO:
    return BytesIO(sound) if isinstance(sound, bytes) else sound


def _kind(file: BinaryIO) -> str:
    """The kind of a file, also behind an ID3 tag; the file is then at its start again."""
    file.seek(0)
    start = file.read(16)
    if not start:
        bad_sound("empty", "empty body")
    kind = kind_of(start)
    if start.startswith(b"ID3") and len(start) >= 10:
        file.seek(10 + sum((byte & 0x7F) << 7 * (3 - place) for place, byte in enumerate(start[6:10])))
        kind = kind_of(file.read(16)) or "mp3"
    file.seek(0)
    return kind or bad_sound("not_a_sound", "not a sound of a known kind")


def _mpeg_kind(start: bytes) -> str:
    """MP3 or AAC (ADTS) by the header of the first frame."""
    if len(start) < 4 or start[0] != 0xFF or start[1] & 0xE0 != 0xE0:
        return ""
    layer, bit_rate, sample_rate = start[1] & 0x06, start[2] & 0xF0, start[2] & 0x0C
    if layer == 0:
        return "aac" if start[1] & 0xF0 == 0xF0 else ""
    return "mp3" if bit_rate != 0xF0 and sample_rate != 0x0C else ""


def _checked(header: SoundHeader) -> SoundHeader:
    if not RATES[0] <= header.sample_rate <= RATES[1]:
        bad_sound("sample_rate", f"fewer than {RATES[0]} or more than {RATES[1]} samples per second")
    if not 1 <= header.channels <= MOST_CHANNELS:
        bad_sound("channels", f"no channel, or more than {MOST_CHANNELS}")
    return header


def _joined(blocks: Iterator[Samples], stereo: bool) -> tuple[Samples, float]:
    """Blocks [n, C] as one waveform [1 or 2, T], and the fraction of clipped samples."""
    parts: list[Samples] = []
    clipped = total = 0
    for block in blocks:
        magnitude = np.abs(block)
        peak = float(magnitude.max(initial=0.0))
        if not peak <= _LARGEST:
            bad_sound("not_finite", f"a sample is not a number, infinite, or beyond {_LARGEST:g}")
        clipped += int((magnitude >= CLIPPED_AT).sum()) if peak >= CLIPPED_AT else 0
        total += block.size
        parts.append(block if stereo and block.shape[1] == 2 else _average(block))
    if not total:
        bad_sound("empty", "no samples")
    return np.ascontiguousarray(np.concatenate(parts).T), clipped / total


def _average(block: Samples) -> Samples:
    """[n, C] to [n, 1]; added channel by channel, so that the bits do not depend on a library for matrices."""
    total = block[:, 0].copy()
    for channel in range(1, block.shape[1]):
        total += block[:, channel]
    return (total * np.float32(1 / block.shape[1]))[:, None]


def _check_whole(header: SoundHeader, start: float, seconds: float, found: int) -> None:
    """Raise where the header claims more samples of the segment than there are."""
    if header.seconds is None:
        return
    slack = 0.0 if header.kind in ("flac", "wav") else _SLACK
    wanted = (min(start + seconds, header.seconds) - start - slack) * header.sample_rate
    if found < math.floor(wanted) - 1:
        bad_sound("truncated", "the sound ends before its header says")


# libsndfile


def _opened_by_sndfile(file: BinaryIO) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(file)
    except (soundfile.LibsndfileError, TypeError, ValueError, OSError):
        bad_sound("damaged", "damaged")


def _sndfile_header(kind: str, sound: soundfile.SoundFile, file: BinaryIO) -> SoundHeader:
    frames = _wav_frames(file) if kind == "wav" else sound.frames
    known = frames is not None and frames < _ENDLESS
    return _checked(SoundHeader(kind, sound.samplerate, sound.channels, frames / sound.samplerate if known else None))


def _by_sndfile(file: BinaryIO, kind: str, start: float, seconds: float) -> tuple[SoundHeader, Iterator[Samples]]:
    sound = _opened_by_sndfile(file)
    place = file.tell()
    header = _sndfile_header(kind, sound, file)
    file.seek(place)
    return header, _sndfile_blocks(sound, header, start, seconds)


def _sndfile_blocks(sound: soundfile.SoundFile, header: SoundHeader, start: float, seconds: float) -> Iterator[Samples]:
    first = round(start * header.sample_rate)
    left = round(seconds * header.sample_rate)
    at_once = max(1, _BLOCK // header.channels)
    with sound:
        if first >= sound.frames:
            return
        try:
            sound.seek(first)
            while left > 0 and len(block := sound.read(min(left, at_once), dtype="float32", always_2d=True)):
                yield block
                left -= len(block)
        except (soundfile.LibsndfileError, OSError):
            bad_sound("damaged", "damaged")


def _wav_frames(file: BinaryIO) -> int | None:
    """Frames that a WAV's header claims; libsndfile quietly reports those that the file can hold.

    None where the header does not know, as in a WAV that was written to a pipe.
    """
    file.seek(0)
    head = file.read(12)
    width = 0
    while head[:4] == b"RIFF" and len(chunk := file.read(8)) == 8:
        size = int.from_bytes(chunk[4:], "little")
        if chunk[:4] == b"data":
            return None if size in _UNKNOWN_LENGTHS or not width else size // width
        body = file.read(min(size, 64))
        if chunk[:4] == b"fmt " and len(body) >= 14:
            width = int.from_bytes(body[12:14], "little")
        file.seek(size + size % 2 - len(body), 1)
    return None


def _encoded(samples: Samples, sample_rate: int, container: str) -> bytes:
    # libsndfile multiplies floats by 32,767 and divides by 32,768: its way back is not exact.
    whole = np.clip(np.rint(samples * np.float32(32_768)), -32_768, 32_767).astype(np.int16)
    stream = BytesIO()
    try:
        soundfile.write(stream, whole.T, sample_rate, format=container, subtype="PCM_16")
    except soundfile.LibsndfileError as error:
        raise SampleError("failed_to_resize", "encode", "Sound encoding error") from error
    return stream.getvalue()


# FFmpeg


def _opened_by_ffmpeg(file: BinaryIO, kind: str) -> InputContainer:
    try:
        return av.open(file, mode="r", format=kind)
    except (av.FFmpegError, ValueError):
        bad_sound("damaged", "damaged")


def _sound_stream(container: InputContainer) -> AudioStream:
    if not container.streams.audio:
        bad_sound("no_sound", "the file has no sound")
    return container.streams.audio[0]


def _stream_header(kind: str, stream: AudioStream) -> SoundHeader:
    # Matroska has the length of the whole file only; that of MP3 and of AAC is estimated from the bit rate.
    seconds = None
    if kind == "mp4" and stream.duration is not None and stream.time_base is not None:
        seconds = float(stream.duration * stream.time_base)
    context = stream.codec_context
    return _checked(SoundHeader(kind, context.sample_rate, context.channels, seconds))


def _by_ffmpeg(file: BinaryIO, kind: str, start: float, seconds: float) -> tuple[SoundHeader, Iterator[Samples]]:
    container = _opened_by_ffmpeg(file, kind)
    try:
        header = _stream_header(kind, _sound_stream(container))
    except BaseException:
        container.close()
        raise
    return header, _ffmpeg_blocks(container, header, start, seconds)


def _ffmpeg_blocks(container: InputContainer, header: SoundHeader, start: float, seconds: float) -> Iterator[Samples]:
    first = round(start * header.sample_rate)
    end = first + round(seconds * header.sample_rate)
    with container:
        stream = _sound_stream(container)
        try:
            position = None
            origin = (container.start_time or 0) / av.time_base
            for frame in _frames(container, stream, origin + start if header.kind not in _UNINDEXED else 0.0):
                if (frame.sample_rate, frame.layout.nb_channels) != (header.sample_rate, header.channels):
                    bad_sound("damaged", "rate or channels change")
                if position is None:
                    position = round(((frame.time or origin) - origin) * header.sample_rate)
                block = _frame_samples(frame)[max(0, first - position) : max(0, end - position)]
                position += frame.samples
                if len(block):
                    yield block
                if position >= end:
                    return
        except (av.FFmpegError, ValueError):
            bad_sound("damaged", "damaged")


def _frames(container: InputContainer, stream: AudioStream, start: float) -> Iterator[AudioFrame]:
    """Decoded frames from ``start`` seconds or somewhat earlier."""
    before = start - _PREROLL
    if before > 0 and stream.time_base:
        container.seek(int(before / stream.time_base), stream=stream)
    yield from container.decode(stream)


def _frame_samples(frame: AudioFrame) -> Samples:
    """float32 [n, C] of a decoded frame, planar or interleaved."""
    values = frame.to_ndarray()
    values = values.T if frame.format.is_planar else values.reshape(-1, frame.layout.nb_channels)
    name = frame.format.name.removesuffix("p")
    floats = values.astype(np.float32) / np.float32(_FULL_SCALE[name])
    return floats - 1 if name == "u8" else floats
