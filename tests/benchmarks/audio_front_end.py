"""Seconds of audio per CPU second: decode, resample to 48 kHz, average channels, log-mel of CLAP.

    OMP_NUM_THREADS=1 python tests/benchmarks/audio_front_end.py             # `pip install librosa` for its column

The same encoded clips of 10 s (FLAC, WAV, OGG, MP3; stereo, 44.1 kHz; made-up: tones in noise) for each reader, in
turns; the fastest round counts. "librosa" is ``librosa.load`` and ``librosa.feature.melspectrogram`` in decibels,
"transformers" soundfile, soxr and ``ClapFeatureExtractor``. All three give 1001 frames of 64 bands; the largest
difference between ours and the extractor's is in the line, too.
"""

import argparse
import importlib.util
import io
import json
import time
from collections.abc import Callable, Sequence

import numpy as np
import soundfile
import soxr
import torch
from transformers import ClapFeatureExtractor

from pipeline.loaders.audio import AudioTransform
from pipeline.models.towers.log_mel import LogMel, LogMelConfig

SECONDS, RATE = 10, 44_100
KINDS = {"flac": ("FLAC", "PCM_16"), "wav": ("WAV", "PCM_16"), "ogg": ("OGG", "VORBIS"), "mp3": ("MP3", None)}
Read = Callable[[Sequence[bytes]], np.ndarray]


def clips(kind: str, count: int) -> list[bytes]:
    """Encoded sounds, each of another pitch."""
    container, subtype = KINDS[kind]
    time_axis, random, found = np.arange(SECONDS * RATE) / RATE, np.random.default_rng(0), []
    for number in range(count):
        tone = 0.3 * np.sin(2 * np.pi * 110 * 1.1**number * time_axis)
        stream = io.BytesIO()
        samples = tone[:, None] + random.normal(0, 0.05, (len(tone), 2))
        soundfile.write(stream, samples.astype(np.float32), RATE, format=container, subtype=subtype)
        found.append(stream.getvalue())
    return found


def ours() -> Read:
    """The reader and the front end of training: float32 [B, 1001, 64]."""
    transform, front = AudioTransform(), LogMel(LogMelConfig(scale="slaney"))

    def read(bodies: Sequence[bytes]) -> np.ndarray:
        with torch.inference_mode():
            return front(torch.cat([transform.read(body) for body in bodies])).numpy()

    return read


def transformers() -> Read:
    """The extractor of CLAP on arrays from soundfile."""
    extractor = ClapFeatureExtractor(frequency_min=50, frequency_max=14_000, truncation="rand_trunc")

    def read(bodies: Sequence[bytes]) -> np.ndarray:
        waves = []
        for body in bodies:
            samples, rate = soundfile.read(io.BytesIO(body), dtype="float32")
            waves.append(soxr.resample(samples.mean(axis=1), rate, 48_000))
        return np.asarray(extractor(waves, sampling_rate=48_000, return_tensors="np")["input_features"])[:, 0]

    return read


def librosa() -> Read:
    """librosa's own functions, file by file."""
    import librosa as library

    def read(bodies: Sequence[bytes]) -> np.ndarray:
        found = []
        for body in bodies:
            wave, rate = library.load(io.BytesIO(body), sr=48_000)
            mel = library.feature.melspectrogram(
                y=wave, sr=rate, n_fft=1024, hop_length=480, n_mels=64, fmin=50, fmax=14_000
            )
            found.append(library.power_to_db(mel, amin=1e-10, top_db=None).T)
        return np.stack(found)

    return read


def main() -> None:
    """Print one JSON line for each format."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    readers = {"ours": ours(), "transformers": transformers()}
    if importlib.util.find_spec("librosa") is not None:
        readers["librosa"] = librosa()
    for kind in KINDS:
        bodies = clips(kind, options.clips)
        features = {name: read(bodies) for name, read in readers.items()}
        best = dict.fromkeys(readers, float("inf"))
        for _ in range(options.rounds):
            for name, read in readers.items():
                start = time.process_time()
                read(bodies)
                best[name] = min(best[name], time.process_time() - start)
        speed = {name: round(options.clips * SECONDS / seconds) for name, seconds in best.items()}
        ratios = {f"times_{name}": round(speed["ours"] / one, 2) for name, one in speed.items() if name != "ours"}
        apart = float(np.abs(features["ours"] - features["transformers"]).max())
        print(json.dumps({"kind": kind, **speed, **ratios, "largest_difference_db": round(apart, 3)}))


if __name__ == "__main__":
    main()
