"""The codec of sounds: a segment is checked, resampled and stored as FLAC of 16 bits."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pipeline.codecs.codec import Codec, Encoded
from pipeline.config import require
from pipeline.shards.media import AUDIO
from pipeline.shards.segments import Segment
from pipeline.sources.source import Scalar

if TYPE_CHECKING:
    from pipeline.shards.sound_kinds import SoundHeader
    from pipeline.shards.waveforms import Waveform

MOST_SECONDS = 3_600.0
"""The longest --audio-seconds, and what readers decode at most."""
# libsndfile's readers of these are small, and what they decode is bounded by what is asked of them.
_IN_PLACE = (b"fLaC", b"RIFF")
_HIGHEST_RATE = 384_000
_COPIES = 16  # bytes per sample and channel at the highest rate: blocks, their average, the resampled segment, 16 bits
_ENDINGS = {kind: endings[0] for kind, endings in AUDIO.kinds.items()}


@dataclass(frozen=True, kw_only=True)
class AudioOptions:
    """Options of checking and encoding sounds."""

    audio_rate: int = 48_000
    """Samples per second of the stored sounds, 1,000 to 192,000; 0 keeps the rate of each sound."""
    audio_stereo: bool = False
    """Keep two channels; otherwise, and with any other number of channels, their average is stored."""
    audio_seconds: float = 30.0
    """Longest stored sound in seconds, at most 3,600; of a longer one a segment is stored."""
    audio_segment: Literal["start", "middle"] = "start"
    """Which segment of a longer sound is stored."""
    audio_min_seconds: float = 0.1
    """Shortest sound in seconds; shorter ones fail."""
    audio_max_seconds: float = math.inf
    """Longest sound in seconds before it is cut; longer ones fail."""
    audio_min_loudness: float = -90.0
    """Lowest level of the stored segment in dBFS (root of the mean square); softer ones fail. -120 keeps silence."""
    audio_max_clipped: float = 1.0
    """Largest fraction of samples at full scale, 0 to 1; sounds with more fail."""
    audio_keep_bytes: bool = False
    """Keep the original bytes of a sound that needs no change, with the ending of its own format; it is decoded once,
    to detect damage."""

    def __post_init__(self) -> None:
        rate = self.audio_rate
        require(rate == 0 or 1_000 <= rate <= 192_000, "audio_rate", rate, "0, or 1,000 to 192,000 samples per second")
        allowed = f"more than 0, at most {MOST_SECONDS:,.0f} seconds"
        require(0 < self.audio_seconds <= MOST_SECONDS, "audio_seconds", self.audio_seconds, allowed)
        require(self.audio_segment in ("start", "middle"), "audio_segment", self.audio_segment, "start or middle")
        shortest, longest = self.audio_min_seconds, self.audio_max_seconds
        require(0 <= shortest <= self.audio_seconds, "audio_min_seconds", shortest, "0 to audio_seconds")
        require(longest > 0, "audio_max_seconds", longest, "more than 0 seconds")
        require(self.audio_min_loudness <= 0, "audio_min_loudness", self.audio_min_loudness, "0 dBFS or less")
        require(0 <= self.audio_max_clipped <= 1, "audio_max_clipped", self.audio_max_clipped, "0 to 1")


class AudioCodec(Codec[AudioOptions, "Waveform"]):
    """See :class:`~pipeline.codecs.codec.Codec`. Levels are in dBFS and of the stored segment."""

    medium: ClassVar[str] = "audio"
    options: ClassVar[type] = AudioOptions
    limit: ClassVar[str] = "--audio-seconds"
    columns: ClassVar[Mapping[str, type]] = {
        "audio_seconds": float,
        "audio_rate": int,
        "audio_channels": int,
        "audio_original_seconds": float,
        "audio_original_rate": int,
        "audio_original_channels": int,
        "audio_loudness": float,
        "audio_peak": float,
        "audio_silent": float,
        "audio_clipped": float,
    }

    def encode(self, body: bytes, options: AudioOptions, segment: Segment | None = None) -> Encoded:
        """One field, ``flac``, or the original one with ``audio_keep_bytes``.

        Error classes: those of :func:`~pipeline.shards.waveforms.read_waveform`; too_short, too_long, silent, clipped.
        """
        from pipeline.shards.loudness import measure
        from pipeline.shards.sound_kinds import bad_sound
        from pipeline.shards.waveforms import encode_flac, read_header

        header = read_header(body)
        if header.seconds is not None and header.seconds > options.audio_max_seconds:
            bad_sound("too_long", "longer than --audio-max-seconds")
        sound = _segment(body, header, options, segment)
        if sound.seconds < options.audio_min_seconds:
            bad_sound("too_short", "shorter than --audio-min-seconds")
        loudness = measure(sound.samples, sound.sample_rate)
        if loudness.level < options.audio_min_loudness:
            bad_sound("silent", "softer than --audio-min-loudness")
        if sound.clipped > options.audio_max_clipped:
            bad_sound("clipped", "more samples at full scale than --audio-max-clipped")
        columns = {
            "audio_seconds": sound.seconds,
            "audio_rate": sound.sample_rate,
            "audio_channels": len(sound.samples),
            **_original(header, sound if segment is None and sound.seconds < options.audio_seconds else None),
            "audio_loudness": loudness.level,
            "audio_peak": loudness.peak,
            "audio_silent": loudness.silent,
            "audio_clipped": sound.clipped,
        }
        if options.audio_keep_bytes and segment is None and _is_unchanged(header, sound, options):
            return Encoded({_ENDINGS[header.kind]: body}, columns)
        return Encoded({"flac": encode_flac(sound.samples, sound.sample_rate)}, columns)

    def decode(self, body: bytes) -> "Waveform":
        """The first hour at most, float32 [1 or 2, T] with full scale from -1 to 1, at the sound's own rate."""
        from pipeline.shards.waveforms import read_waveform

        return read_waveform(body, seconds=MOST_SECONDS, stereo=True)

    def needs_care(self, body: bytes) -> bool:
        """All kinds but FLAC and WAV."""
        return not body.startswith(_IN_PLACE)

    def memory(self, options: AudioOptions) -> int:
        """The segment at the highest rate; 256 MiB for what FFmpeg's readers allocate for an index."""
        channels = 2 if options.audio_stereo else 1
        return round(_COPIES * channels * _HIGHEST_RATE * options.audio_seconds) + (256 << 20)

    def load(self) -> None:
        """libsndfile, soxr and FFmpeg."""
        import pipeline.shards.sound_streams  # noqa: F401

    def measured(self, body: bytes) -> Mapping[str, Scalar]:
        """What the header states, where it can be read without a process apart."""
        from pipeline.shards.waveforms import read_header

        with suppress(Exception):  # the sample boundary, as for decoding
            if not self.needs_care(body):
                return _original(read_header(body), None)
        return {}


def _segment(body: bytes, header: "SoundHeader", options: AudioOptions, segment: Segment | None) -> "Waveform":
    from pipeline.shards.waveforms import read_waveform

    begin, end = segment or (0.0, math.inf)
    known = min(end, header.seconds or 0.0) if header.exact else 0.0
    spare = max(0.0, known - begin - options.audio_seconds)
    return read_waveform(
        body,
        start=begin + (spare / 2 if options.audio_segment == "middle" else 0.0),
        seconds=min(options.audio_seconds, end - begin),
        sample_rate=options.audio_rate or None,
        stereo=options.audio_stereo,
    )


def _original(header: "SoundHeader", whole: "Waveform | None") -> dict[str, Scalar]:
    return {
        "audio_original_seconds": header.seconds if whole is None else whole.seconds,
        "audio_original_rate": header.sample_rate,
        "audio_original_channels": header.channels,
    }


def _is_unchanged(header: "SoundHeader", sound: "Waveform", options: AudioOptions) -> bool:
    """Whether the body can be stored as it is: nothing was cut, resampled or averaged."""
    whole = sound.seconds < options.audio_seconds or header.seconds == sound.seconds
    same = (header.sample_rate, header.channels) == (sound.sample_rate, len(sound.samples))
    return whole and same and header.kind in _ENDINGS
