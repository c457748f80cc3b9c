"""Videos by url, from a server with good and hostile ones: counts by reason, segments, renewal, verification."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.codecs import codec_of
from pipeline.shards.selection import read_samples
from pipeline.shards.snapshot import Snapshot, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.verify import Verification, folder_problems
from pipeline.stages.filters.view import ShardView
from tests.hostile_videos import HOSTILE, STORED
from tests.jobs.conftest import Type, job  # noqa: F401  (the fixture that runs jobs)
from tests.sounds import tone, video
from tests.videos import encoded_video, every_frame, numbered, numbers_of

WORDS = ("--processes-count", "0", "--allow-hosts", "127.0.0.1", "--compute-hash", "sha256")


def shown(body: bytes) -> list[int]:
    return numbers_of(np.stack([frame.to_ndarray(format="rgb24") for _, frame in every_frame(body)]))


def verified(snapshot: Snapshot) -> list[str]:
    check = Verification(
        snapshot=snapshot, decode={"video": codec_of("video").decode, "audio": codec_of("audio").decode}
    )
    found = [problem for shard in snapshot.shards for problem in check.problems(shard)]
    return found + list(folder_problems(Folder(snapshot.folder), snapshot))


def test_hostile_videos_are_counted_by_reason(tmp_path: Path, serve: Any, job: Type) -> None:  # noqa: F811
    bodies = {name.replace(" ", "-").replace(",", ""): (make(), reason) for name, (make, reason) in HOSTILE.items()}
    server = serve({name: body for name, (body, _) in bodies.items()})
    urls = [f"{server.url}/{name}" for name in bodies] + [f"{server.url}/gone"]
    (tmp_path / "list.csv").write_text("url,text\n" + "".join(f"{url},words\n" for url in urls))
    words = ("urls", "--url-list", "list.csv", "--url-col", "video=url", "--caption-col", "text")
    assert job("refresh_dataset", *words, "--output-folder", "out", *WORDS) == 0
    table = pq.read_table(tmp_path / "out" / "00000.parquet")
    found = dict(zip(bodies, table["error_class"].to_pylist(), strict=False))
    assert found == {name: None if reason == STORED else reason for name, (_, reason) in bodies.items()}
    counts = Counter(reason for _, reason in bodies.values() if reason != STORED)
    stats = json.loads((tmp_path / "out" / "00000_stats.json").read_text())
    assert stats["reasons"] == {**counts, "http_4xx": 1}
    snapshot = read_snapshot(str(tmp_path / "out"))
    assert snapshot.dropped == stats["reasons"] and verified(snapshot) == []


def test_clips_of_a_url_are_fetched_once(tmp_path: Path, serve: Any, job: Type) -> None:  # noqa: F811
    film = video(numbered(100), 10, tone(16_000, 10.0))
    server = serve({"film.mp4": film, "other.mp4": encoded_video(numbered(30, first=200))})
    rows = [("film", 1, 2.5, "one"), ("film", 4, 5, "two"), ("film", 50, 60, "late"), ("other", 0.5, "", "three")]
    lines = [f"{server.url}/{name}.mp4,{start},{end},{text}" for name, start, end, text in rows]
    (tmp_path / "list.csv").write_text("url,from,to,text\n" + "\n".join(lines))
    words = ["urls", "--url-list", "list.csv", "--url-col", "video=url", "--caption-col", "text"]
    words += ["--start-col", "from", "--end-col", "to", "--video-keep-sound", *WORDS]
    assert job("refresh_dataset", *words, "--output-folder", "out") == 0
    assert sorted(server.requests) == ["/film.mp4", "/other.mp4"]
    snapshot = read_snapshot(str(tmp_path / "out"))
    samples = list(read_samples(Folder(str(tmp_path / "out")), snapshot.shards[0]))
    assert [shown(sample.fields["mp4"]) for sample in samples] == [
        list(range(10, 25)),
        list(range(40, 50)),
        list(range(205, 230)),
    ]
    assert ["flac" in sample.fields for sample in samples] == [True, True, False]
    assert snapshot.dropped == {"segment": 1} and verified(snapshot) == []
    first = json.loads(samples[0].fields["json"])
    assert (first["start"], first["end"], first["url"]) == (1.0, 2.5, f"{server.url}/film.mp4#t=1,2.5")
    assert len({*ShardView(Folder(str(tmp_path / "out")), snapshot.shards[0]).digests()}) == 3
    # The same table again: nothing is new; one row more: only its file is fetched.
    server.requests.clear()
    lines.append(f"{server.url}/other.mp4,0,0.4,four")
    (tmp_path / "list.csv").write_text("url,from,to,text\n" + "\n".join(lines))
    assert job("refresh_dataset", *words, "--output-folder", "out", "--parent", "latest") == 0
    assert server.requests == ["/other.mp4"]
    assert read_snapshot(str(tmp_path / "out")).samples == 4
