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
All functions are pure and thread-safe: the decoders have no shared state and release the GIL. FFmpeg is loaded with the
first sound that needs it, since its import takes a fifth of a second.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from pipeline.errors import SampleError
from pipeline.shards.sound_kinds import (
    FFMPEG_KINDS,
    MOST_CHANNELS,
    RATES,
    Samples,
    SoundHeader,
    bad_sound,
    file_kind,
)

CLIPPED_AT = 32_767 / 32_768
"""Magnitude from which a sample counts as clipped: the largest value of 16 bits."""

_LARGEST = 1e9
_ENDLESS = 1 << 40  # frames; libsndfile reports 2^63 - 1 where a header does not say
_SLACK = 0.1  # seconds by which lossy formats may be shorter than their headers say
_BLOCK = 1 << 20  # numbers to decode at a time, over all channels
_PLAIN = ("FLOAT", "DOUBLE", "ULAW", "ALAW")
_MOST_CHUNKS = 1_000  # of a WAV before its samples
_UNKNOWN_LENGTHS = (0, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)


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


def read_header(sound: bytes | BinaryIO) -> SoundHeader:
    """Kind, rate, channels and claimed length of an encoded sound, or of the sound in a video, without decoding it.

    Raises:
        SampleError: error classes empty, not_a_sound, damaged, no_sound (a video without), sample_rate, channels.
    """
    file = _as_file(sound)
    kind = file_kind(file)
    if kind in FFMPEG_KINDS:
        from pipeline.shards.sound_streams import read_stream_header

        return _checked(read_stream_header(file, kind))
    with _opened_by_sndfile(file) as sndfile:
        return _checked(_sndfile_header(kind, sndfile, file))


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
    kind = file_kind(file)
    if kind in FFMPEG_KINDS:
        from pipeline.shards.sound_streams import stream_blocks

        header, blocks = stream_blocks(file, kind, start, seconds)
    else:
        header, blocks = _by_sndfile(file, kind, start, seconds)
    _checked(header)
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


def _as_file(sound: bytes | BinaryIO) -> BinaryIO:
    return BytesIO(sound) if isinstance(sound, bytes) else sound


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
    if header.seconds is None or not header.exact:
        return
    slack = 0.0 if header.kind in ("flac", "wav") else _SLACK
    wanted = (min(start + seconds, header.seconds) - start - slack) * header.sample_rate
    if found < math.floor(wanted) - 1:
        bad_sound("truncated", "the sound ends before its header says")


# libsndfile


class _SoundFile(soundfile.SoundFile):  # type: ignore[misc]
    """A file that is only read on where its header states no length, as a FLAC that was written to a pipe.

    libsndfile cannot seek in such a FLAC, not even to where it is, which soundfile does after every read.
    """

    def seekable(self) -> bool:
        return bool(self.frames < _ENDLESS and super().seekable())


def _opened_by_sndfile(file: BinaryIO) -> soundfile.SoundFile:
    offset = _unfinished_size(file)
    file.seek(0)
    try:
        return _SoundFile(file if offset is None else _UnfinishedWav(file, offset))
    except (soundfile.LibsndfileError, TypeError, ValueError, OSError):
        bad_sound("damaged", "damaged")


def _sndfile_header(kind: str, sound: soundfile.SoundFile, file: BinaryIO) -> SoundHeader:
    # The blocks of compressed WAVs (ADPCM) hold more than one sample of each channel.
    plain = kind == "wav" and (sound.subtype.startswith("PCM_") or sound.subtype in _PLAIN)
    claimed = _wav_frames(file) if plain else None
    frames = sound.frames if claimed is None else claimed
    return SoundHeader(kind, sound.samplerate, sound.channels, frames / sound.samplerate if frames < _ENDLESS else None)


def _by_sndfile(file: BinaryIO, kind: str, start: float, seconds: float) -> tuple[SoundHeader, Iterator[Samples]]:
    sound = _opened_by_sndfile(file)
    place = file.tell()
    header = _sndfile_header(kind, sound, file)
    file.seek(place)
    return header, _sndfile_blocks(sound, header, start, seconds)


def _sndfile_blocks(sound: soundfile.SoundFile, header: SoundHeader, start: float, seconds: float) -> Iterator[Samples]:
    first = round(start * header.sample_rate)
    left = round(seconds * header.sample_rate)
    with sound:
        if first >= sound.frames:
            return
        try:
            if sound.seekable():
                sound.seek(first)
            else:
                deque(_read_on(sound, first), maxlen=0)
            yield from _read_on(sound, left)
        except (soundfile.LibsndfileError, OSError):
            bad_sound("damaged", "damaged")


def _read_on(sound: soundfile.SoundFile, left: int) -> Iterator[Samples]:
    """The next ``left`` samples, or those up to the end, as blocks [n, C]."""
    at_once = max(1, _BLOCK // sound.channels)
    while left > 0 and len(block := sound.read(min(left, at_once), dtype="float32", always_2d=True)):
        yield block
        left -= len(block)


def _wav_frames(file: BinaryIO) -> int | None:
    """Frames that a WAV's header claims; libsndfile quietly reports those that the file can hold.

    None where the header does not know, as in a WAV that was written to a pipe.
    """
    width = 0
    for name, size in _wav_chunks(file):
        if name == b"fmt ":
            width = int.from_bytes(file.read(14)[12:], "little")
        elif name == b"data":
            return None if size in _UNKNOWN_LENGTHS or not width else size // width
    return None


def _wav_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Name and claimed size of each chunk of a WAV; the file is then at the chunk's content."""
    file.seek(0)
    if file.read(4) != b"RIFF":
        return
    place = 12
    for _ in range(_MOST_CHUNKS):
        file.seek(place)
        if len(chunk := file.read(8)) < 8:
            return
        size = int.from_bytes(chunk[4:], "little")
        yield chunk[:4], size
        place += 8 + size + size % 2


def _unfinished_size(file: BinaryIO) -> int | None:
    """Offset of the size of a WAV's samples if it is 0 because its writer could not go back to the header.

    The size of the whole then ends before the samples, or is unknown. Otherwise the WAV has no samples, and further
    chunks.
    """
    file.seek(4)
    whole = int.from_bytes(file.read(4), "little")
    for name, size in _wav_chunks(file):
        if name == b"data":
            start = file.tell()
            return start - 4 if size == 0 and (whole in _UNKNOWN_LENGTHS or whole + 8 <= start) else None
    return None


class _UnfinishedWav:
    """A WAV with 0xFFFFFFFF, "unknown", as the size of its samples: libsndfile reads those up to the file's end."""

    def __init__(self, file: BinaryIO, offset: int) -> None:
        self._file, self._size = file, range(offset, offset + 4)
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        start = self._file.tell()
        content = bytearray(self._file.read(count))
        for place in self._size:
            if start <= place < start + len(content):
                content[place - start] = 0xFF
        return bytes(content)


def _encoded(samples: Samples, sample_rate: int, container: str) -> bytes:
    # libsndfile multiplies floats by 32,767 and divides by 32,768: its way back is not exact.
    whole = np.clip(np.rint(samples * np.float32(32_768)), -32_768, 32_767).astype(np.int16)
    stream = BytesIO()
    try:
        soundfile.write(stream, whole.T, sample_rate, format=container, subtype="PCM_16")
    except soundfile.LibsndfileError as error:
        raise SampleError("failed_to_resize", "encode", "Sound encoding error") from error
    return stream.getvalue()
