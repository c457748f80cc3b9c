"""A refresh of MP4 and WebM urls against a plain pool of ffmpeg processes that writes videos of the same size.

    python tests/benchmarks/video_shards.py --ffmpeg /usr/bin/ffmpeg

Both fetch the same urls of a server on the loopback interface and write tars of H.264 with a shorter side of 360
pixels (libx264, preset veryfast) with json. The pool is what a script would do: urllib, one ffmpeg for each video,
tarfile. The rate factors, 27 and 23, give about the same bytes at about the same error, which the line states. They
take turns; each turn is a process of its own, whose CPU seconds, with those of its children, are counted. Those of the
server are not. Prints one JSON line.
"""

import argparse
import functools
import io
import json
import statistics
import subprocess
import tarfile
import tempfile
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from pipeline.codecs.options import MediaOptions
from pipeline.codecs.video import VideoOptions
from pipeline.shards.snapshot import read_snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.tar import iterate_tar
from pipeline.shards.video_frames import read_frames, read_timeline
from pipeline.sources.urls import UrlTable
from pipeline.stages.crawl.download import DownloadOptions
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers
from tests.benchmarks.audio_shards import cpu_seconds, server_of

WIDTH, HEIGHT, RATE, STORED = 1280, 720, 25, 360
QUALITY = 27
CONVERT = "-t 30 -an -vf scale=-2:360:flags=bicubic -c:v libx264 -preset veryfast -crf 23 -pix_fmt yuv420p"


def draw_videos(folder: Path, count: int, seconds: float) -> list[str]:
    """Videos of 720p, every other one MP4 (H.264) and WebM (VP9): a texture that moves, with discs and noise."""
    names = []
    for number in range(count):
        random = np.random.default_rng(number)
        octaves = (random.normal(0, 1, (9 * 2**at, 16 * 2**at, 3)) / 2**at for at in range(6))
        ground = sum(cv2.resize(one, (2 * WIDTH, 2 * HEIGHT), interpolation=cv2.INTER_CUBIC) for one in octaves)
        ground = (128 + 50 * ground).clip(0, 255).astype(np.uint8)
        name = f"{number:03d}." + ("webm" if number % 2 else "mp4")
        codec, options = ("libvpx-vp9", {"cpu-used": "8", "deadline": "realtime", "b": "3M", "threads": "1"})
        if name.endswith("mp4"):
            codec, options = "libx264", {"preset": "veryfast", "crf": "20", "threads": "1"}
        with av.open(str(folder / name), "w") as container:
            track = container.add_stream(codec, rate=RATE, options=options)
            track.width, track.height, track.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for at in range(round(seconds * RATE)):
                x, y = (3 * at) % WIDTH, at % HEIGHT
                image = np.ascontiguousarray(ground[y : y + HEIGHT, x : x + WIDTH])
                cv2.circle(image, (200 + 4 * at, 300 + int(100 * np.sin(at / 9))), 90, (200, 30, 60), -1)
                image = cv2.add(image, random.integers(0, 8, image.shape, np.uint8))
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = at, Fraction(1, RATE)
                container.mux(track.encode(frame))
            container.mux(track.encode(None))
        names.append(name)
    return names


def by_refresh(urls: list[str], out: Path) -> None:
    """Our shard, in this process."""
    table = out.with_suffix(".csv")
    table.write_text("url\n" + "\n".join(urls) + "\n")
    options = ShardOptions(
        media=MediaOptions(video=VideoOptions(video_size=STORED, video_key_seconds=10.0, video_quality=QUALITY)),
        downloads=DownloadOptions(allow_hosts=("127.0.0.1",)),
    )
    refresh(UrlTable(url_list=str(table), url_col="video=url"), Folder(out), options, Workers(processes_count=0))


def by_ffmpeg(urls: list[str], out: Path, ffmpeg: str, threads: int = 4) -> None:
    """A script's shard: one ffmpeg for each video."""
    out.mkdir()
    lock = threading.Lock()

    def convert(url: str) -> None:
        key = Path(url).stem
        source, made = out / Path(url).name, out / f"{key}.out.mp4"
        source.write_bytes(urllib.request.urlopen(url, timeout=30).read())
        command = [ffmpeg, "-nostdin", "-loglevel", "error", "-threads", "1", "-i", str(source), *CONVERT.split()]
        subprocess.run([*command, "-threads", "1", "-filter_threads", "1", "-y", str(made)], check=True)
        video = made.read_bytes()
        with lock:
            for name, content in ((f"{key}.mp4", video), (f"{key}.json", json.dumps({"url": url}).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    with tarfile.open(out / "00000.tar", "w") as tar, ThreadPoolExecutor(threads) as pool:
        list(pool.map(convert, urls))


def videos_of(tar: Path) -> dict[str, bytes]:
    """The videos of a tar by the name of their url."""
    with open(tar, "rb") as file:
        samples = list(iterate_tar(file))
    return {Path(json.loads(sample.fields["json"])["url"]).name: sample.fields["mp4"] for sample in samples}


def error_of(videos: dict[str, bytes], sources: Path) -> float:
    """The mean peak signal-to-noise ratio in dB of frames against the sources, scaled; checks counts and sizes."""
    ratios = []
    for name, body in videos.items():
        original = (sources / name).read_bytes()
        line = read_timeline(original)
        assert read_timeline(body).frames == line.frames
        times = np.linspace(0, line.end, 6)[:-1].tolist()
        wanted, found = read_frames(original, times, size=STORED).pixels, read_frames(body, times).pixels
        assert wanted.shape == found.shape
        ratios.append(10 * np.log10(255**2 / np.mean((wanted.astype(float) - found) ** 2)))
    return float(np.mean(ratios))


def main() -> None:
    """Print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ffmpeg", default="ffmpeg", help="the program of the pool")
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a video")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ours, theirs = [], []
    with tempfile.TemporaryDirectory(prefix="clipmill-") as scratch:
        place = Path(scratch)
        (place / "videos").mkdir()
        names = draw_videos(place / "videos", options.videos, options.seconds)
        with server_of(place / "videos") as address:
            urls = [f"{address}/{name}" for name in names]
            for turn in range(options.rounds):
                mine, other = place / f"ours-{turn}", place / f"theirs-{turn}"
                ours.append(cpu_seconds(functools.partial(by_refresh, urls, mine)))
                theirs.append(cpu_seconds(functools.partial(by_ffmpeg, urls, other, options.ffmpeg)))
        assert read_snapshot(str(mine)).samples == len(urls)
        made, peers = videos_of(mine / "00000.tar"), videos_of(other / "00000.tar")
        mean, peer = statistics.median(ours) / len(urls), statistics.median(theirs) / len(urls)
        line = {
            "benchmark": "video_shards",
            "ours": round(mean, 3),
            "peer": round(peer, 3),
            "ratio": round(peer / mean, 2),
            "unit": "CPU seconds per video",
            "videos": len(urls),
            "seconds": options.seconds,
            "rounds": options.rounds,
            "bytes": [sum(map(len, made.values())), sum(map(len, peers.values()))],
            "psnr_db": [round(error_of(one, place / "videos"), 2) for one in (made, peers)],
        }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
