"""Clips per CPU second, from bytes to a batch: 12 frames of a video of 30 s, against reading it from the start.

    OMP_NUM_THREADS=1 python tests/benchmarks/video_clips.py

The videos are made up (drawn shapes over moving noise, 854 x 480, 30 frames a second) and stored as the refresh stores
them: H.264, a key frame every two seconds. "sequential" decodes the frames from the first to the last wanted one with
PyAV and keeps those that are shown at the wanted times; both decode in one thread, with the same conversion to RGB and
the same transform. The frames are compared in the first round. Rounds take turns; the median counts.
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence

import av
import cv2
import numpy as np
import torch

from pipeline.loaders.frames import ClipReader, FrameSampling, padded_clips
from pipeline.loaders.images import ImageTransform
from pipeline.shards.sample import Sample
from pipeline.shards.video_frames import Timeline
from pipeline.shards.video_pixels import shown_pixels
from pipeline.shards.video_writer import Mp4Writer

SECONDS, RATE, HEIGHT, WIDTH, FRAMES, SIDE = 30, 30, 480, 854, 12, 224
Read = Callable[[Sequence[bytes]], torch.Tensor]


def made_up(number: int) -> bytes:
    """A video: shapes on their ways over a texture that drifts."""
    random = np.random.default_rng(number)
    texture = cv2.GaussianBlur(random.integers(0, 256, (HEIGHT, 2 * WIDTH, 3), dtype=np.uint8), (0, 0), 2.0)
    shapes = [(random.uniform(0, 1, 4), random.integers(0, 256, 3).tolist()) for _ in range(6)]
    writer = Mp4Writer((WIDTH, HEIGHT), key_seconds=2.0, rate=RATE)
    for frame in range(SECONDS * RATE):
        left = frame * WIDTH // (SECONDS * RATE)
        image = texture[:, left : left + WIDTH].copy()
        for (x, y, across, down), colour in shapes:
            centre = (x + across * frame / 200) % 1 * WIDTH, (y + down * frame / 300) % 1 * HEIGHT
            cv2.circle(image, (int(centre[0]), int(centre[1])), 40, colour, -1, cv2.LINE_AA)
        shown = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
        writer.add(shown, frame / RATE, (frame + 1) / RATE)
    return writer.finish()


def ours(sampling: FrameSampling) -> Read:
    """The reader of training and evaluation."""
    reader = ClipReader(transform=ImageTransform(size=(SIDE, SIDE)), sampling=sampling)

    def read(bodies: Sequence[bytes]) -> torch.Tensor:
        return reader.collate([reader.read(Sample("a", {"mp4": body})) for body in bodies])["video"]

    return read


def sequential(sampling: FrameSampling) -> Read:
    """PyAV from the first frame on; the length is known."""
    transform = ImageTransform(size=(SIDE, SIDE))
    times = sampling.frame_times(Timeline(0.0, float(SECONDS), SECONDS * RATE))
    wanted = {int(time * RATE + 1e-3) for time in times}

    def clip(body: bytes) -> torch.Tensor:
        found = []
        with av.open(io.BytesIO(body)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    found.append(transform(shown_pixels(frame, (WIDTH, HEIGHT))))
                if len(found) == len(wanted):
                    break
        return torch.stack(found)

    def read(bodies: Sequence[bytes]) -> torch.Tensor:
        return padded_clips([clip(body) for body in bodies], sampling.frames)["video"]

    return read


def main() -> None:
    """Print one JSON line for each choice of frames."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    bodies = [made_up(number) for number in range(arguments.videos)]
    for name, sampling in {
        "uniform": FrameSampling(mode="uniform", frames=FRAMES, rate=1.0),
        "segments": FrameSampling(mode="segments", frames=FRAMES),
    }.items():
        readers = {"ours": ours(sampling), "sequential": sequential(sampling)}
        first, second = (read(bodies) for read in readers.values())
        assert torch.equal(first, second), "the frames differ"
        taken: dict[str, list[float]] = {reader: [] for reader in readers}
        for _ in range(arguments.rounds):
            for reader, read in readers.items():
                begin = time.process_time()
                read(bodies)
                taken[reader].append(time.process_time() - begin)
        rates = {reader: len(bodies) / statistics.median(times) for reader, times in taken.items()}
        ratios = [slow / fast for fast, slow in zip(taken["ours"], taken["sequential"], strict=True)]
        line = {
            "benchmark": "video_clips",
            "frames": name,
            "video_mb": round(statistics.mean(map(len, bodies)) / 1e6, 2),
            **{f"{reader}_clips_per_cpu_second": round(rate, 2) for reader, rate in rates.items()},
            "ratio": round(rates["ours"] / rates["sequential"], 2),
            "least_ratio": round(min(ratios), 2),
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main()
