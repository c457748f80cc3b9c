"""How many samples of the drawn world one core makes: scene, caption, truth, image and JPEG.

    python tests/benchmarks/drawn_rendering.py

Prints one JSON line; ``ours`` is samples per second of CPU time, the median of five rounds. There is no peer: nothing
else draws this world. (The goal is 300 or more at 128 pixels.)
"""

import json
import os
import platform
import statistics
import time

# One core is what is measured: no threads of OpenCV's or BLAS's own.
os.environ["OMP_NUM_THREADS"] = "1"

import cv2

from pipeline.sources.drawn.source import Drawn
from pipeline.sources.source import Slice

SIZE, SAMPLES, ROUNDS = 128, 1000, 5


def round_rate(number: int) -> float:
    """Samples per CPU second of one round, each over other samples."""
    source = Drawn(samples=SAMPLES, first=number * SAMPLES, size=SIZE)
    began = time.process_time()
    count = sum(1 for _ in source.rows(Slice(count=SAMPLES, digest="", where={"start": source.first})))
    return count / (time.process_time() - began)


def main() -> None:
    """Warm up (patterns are made once a process), measure, print."""
    cv2.setNumThreads(1)
    round_rate(ROUNDS)
    rates = [round_rate(number) for number in range(ROUNDS)]
    line = {
        "name": "drawn_rendering",
        "ours": round(statistics.median(rates), 1),
        "peer": None,
        "ratio": None,
        "unit": "samples/s/core (CPU time)",
        "n": ROUNDS,
        "conditions": f"train split, {SIZE} px, {SAMPLES} samples a round, rates {min(rates):.0f}..{max(rates):.0f}, "
        f"{platform.machine()}, OpenCV {cv2.__version__}",
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
