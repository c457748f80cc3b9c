"""A refresh of FLAC and MP3 urls against a plain pool of ffmpeg processes that writes the same sounds.

    python tests/benchmarks/audio_shards.py --ffmpeg /usr/bin/ffmpeg

Both fetch the same urls of a server on the loopback interface and write tars of 48 kHz mono FLAC of 16 bits with json.
The pool is what a script would do: urllib, one ffmpeg for each sound, tarfile. They take turns; each turn is a process
of its own, whose CPU seconds, with those of its children, are counted. The server's are not. With ``--scaling`` the
refresh runs with one and with two Ray workers, by the clock: only on a machine with two idle cores. Prints JSON lines.
"""

import argparse
import functools
import http.server
import io
import json
import multiprocessing
import resource
import statistics
import subprocess
import tarfile
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile

from pipeline.codecs import codec_of
from pipeline.codecs.audio import AudioOptions
from pipeline.codecs.options import MediaOptions
from pipeline.shards.snapshot import read_snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.tar import iterate_tar
from pipeline.sources.urls import UrlTable
from pipeline.stages.crawl.download import DownloadOptions
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers

RATE, SOURCE_RATE = 48_000, 44_100
CONVERT = "-i pipe:0 -t 30 -ac 1 -ar 48000 -c:a flac -sample_fmt s16 -y"


def draw_sounds(folder: Path, count: int, seconds: float) -> list[str]:
    """Stereo sounds of 44.1 kHz, every other one FLAC and MP3: chords with noise."""
    names = []
    for number in range(count):
        random = np.random.default_rng(number)
        times = np.arange(round(seconds * SOURCE_RATE)) / SOURCE_RATE
        tones = sum(np.sin(2 * np.pi * hertz * times) for hertz in random.uniform(80, 4000, 6))
        wave = 0.1 * np.stack([tones, np.roll(tones, 200)], axis=1) + random.normal(0, 0.02, (len(times), 2))
        kind = "flac" if number % 2 else "mp3"
        names.append(f"{number:05d}.{kind}")
        soundfile.write(folder / names[-1], np.clip(wave, -1, 1), SOURCE_RATE, format=kind.upper())
    return names


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Says nothing."""


def serve_folder(folder: str, ports: "multiprocessing.Queue[int]") -> None:
    """The server's process: sends its port, then serves."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=folder))
    ports.put(server.server_port)
    server.serve_forever()


@contextmanager
def server_of(folder: Path) -> Iterator[str]:
    """The address of a server of ``folder``, in a process of its own."""
    ports: multiprocessing.Queue[int] = multiprocessing.Queue()
    process = multiprocessing.Process(target=serve_folder, args=(str(folder), ports), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ports.get(timeout=30)}"
    finally:
        process.terminate()


def by_refresh(urls: list[str], out: Path, processes: int = 0, rows_per_shard: int = 10_000) -> None:
    """Our shards, in this process or by Ray workers."""
    table = out.with_suffix(".csv")
    table.write_text("url\n" + "\n".join(urls) + "\n")
    options = ShardOptions(
        media=MediaOptions(audio=AudioOptions(audio_rate=RATE)),
        downloads=DownloadOptions(allow_hosts=("127.0.0.1",)),
        number_sample_per_shard=rows_per_shard,
    )
    source = UrlTable(url_list=str(table), url_col="audio=url")
    refresh(source, Folder(out), options, Workers(processes_count=processes))


def by_ffmpeg(urls: list[str], out: Path, ffmpeg: str, threads: int = 4) -> None:
    """A script's shards: one ffmpeg for each sound."""
    out.mkdir()
    lock = threading.Lock()

    def convert(url: str) -> None:
        body = urllib.request.urlopen(url, timeout=30).read()
        key = Path(url).stem
        made = out / f"{key}.flac"  # a file, since a FLAC from a pipe does not state its length
        command = [ffmpeg, "-nostdin", "-loglevel", "error", "-threads", "1", *CONVERT.split(), str(made)]
        subprocess.run(command, input=body, check=True)
        sound = made.read_bytes()
        made.unlink()
        with lock:
            for name, content in ((f"{key}.flac", sound), (f"{key}.json", json.dumps({"url": url}).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    with tarfile.open(out / "00000.tar", "w") as tar, ThreadPoolExecutor(threads) as pool:
        list(pool.map(convert, urls))


def cpu_seconds(work: Callable[[], None]) -> float:
    """CPU seconds of ``work`` and its children, in a process of its own; imports are not counted."""
    answers: multiprocessing.Queue[float] = multiprocessing.Queue()
    process = multiprocessing.Process(target=_measured, args=(work, answers))
    process.start()
    found = answers.get(timeout=600)
    process.join()
    return found


def _measured(work: Callable[[], None], answers: "multiprocessing.Queue[float]") -> None:
    before = _used()
    work()
    answers.put(_used() - before)


def _used() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def sounds_of(tar: Path) -> dict[str, np.ndarray]:
    """The waveforms of a tar by the stem of their url."""
    with open(tar, "rb") as file:
        samples = list(iterate_tar(file))
    found = {}
    for sample in samples:
        sound = codec_of("audio").decode(sample.fields["flac"])
        assert sound.sample_rate == RATE and len(sound.samples) == 1
        found[Path(json.loads(sample.fields["json"])["url"]).stem] = sound.samples[0]
    return found


def same_sounds(ours: Path, theirs: Path) -> float:
    """The least signal-to-noise ratio in dB of one tar's sounds against the other's, over their common length."""
    mine, other = sounds_of(ours), sounds_of(theirs)
    assert mine.keys() == other.keys()
    worst = np.inf
    for key, wave in mine.items():
        assert abs(len(wave) - len(other[key])) <= RATE // 10, "an encoder's padding at most"
        length = min(len(wave), len(other[key]))
        error = wave[:length] - other[key][:length]
        worst = min(worst, 10 * np.log10(np.mean(wave[:length] ** 2) / np.mean(error**2)))
    return float(worst)


def per_cpu_second(urls: list[str], place: Path, ffmpeg: str, rounds: int, seconds: float) -> dict[str, object]:
    """The line of the comparison by CPU seconds."""
    ours, theirs = [], []
    for turn in range(rounds):
        mine, other = place / f"ours-{turn}", place / f"theirs-{turn}"
        ours.append(cpu_seconds(functools.partial(by_refresh, urls, mine)))
        theirs.append(cpu_seconds(functools.partial(by_ffmpeg, urls, other, ffmpeg)))
    assert read_snapshot(str(mine)).samples == len(urls)
    mean, peer = statistics.median(ours), statistics.median(theirs)
    return {
        "benchmark": "audio_shards",
        "ours": round(mean / len(urls) * 1000, 2),
        "peer": round(peer / len(urls) * 1000, 2),
        "ratio": round(peer / mean, 2),
        "unit": "CPU milliseconds per sound",
        "sounds": len(urls),
        "seconds": seconds,
        "rounds": rounds,
        "snr_db": round(same_sounds(mine / "00000.tar", other / "00000.tar"), 1),
    }


def scaling(urls: list[str], place: Path) -> dict[str, object]:
    """The line of two workers against one, by the clock."""
    taken = {}
    for workers in (1, 2):
        began = time.monotonic()
        by_refresh(urls, place / f"workers-{workers}", workers, max(1, len(urls) // 8))
        taken[workers] = time.monotonic() - began
    ratio = round(taken[1] / taken[2], 2)
    return {"benchmark": "audio_shards_two_workers", "ratio": ratio, "unit": "times as fast", "sounds": len(urls)}


def main() -> None:
    """Print the JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ffmpeg", default="ffmpeg", help="the program of the pool")
    parser.add_argument("--sounds", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a sound")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scaling", action="store_true", help="also two Ray workers against one, by the clock")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clipmill-") as scratch:
        place = Path(scratch)
        (place / "sounds").mkdir()
        names = draw_sounds(place / "sounds", options.sounds, options.seconds)
        with server_of(place / "sounds") as address:
            urls = [f"{address}/{name}" for name in names]
            print(json.dumps(per_cpu_second(urls, place, options.ffmpeg, options.rounds, options.seconds)))
            if options.scaling:
                print(json.dumps(scaling(urls, place)))


if __name__ == "__main__":
    main()
