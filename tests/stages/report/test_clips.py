"""Videos in a report: their values by columns and by headers, and examples that play."""

import base64
import json
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import SettingError
from pipeline.loaders.images import decode
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Shard, Snapshot, publish_shards
from pipeline.shards.storage import Folder, file_digest
from pipeline.shards.tar import TarWriter
from pipeline.shards.video_frames import read_frames, read_timeline
from pipeline.stages.report.clips import clip_values, example_clip
from pipeline.stages.report.dataset_report import make_report, report_page
from pipeline.stages.report.dataset_statistics import ReportLimits, measure
from pipeline.stages.shard_tasks import Workers
from tests.videos import encoded_video, numbered, numbers_of

HERE = Workers(processes_count=0)
BODY = encoded_video(numbered(60, 90, 160), unit=Fraction(1, 10))
COLUMNS = {"video_seconds": 6.0, "video_width": 160, "video_height": 90, "video_rate": 10.0}


def test_values_are_those_of_the_codec_or_of_the_header() -> None:
    wanted = {"clip_seconds": 6.0, "clip_width": 160.0, "clip_height": 90.0, "clip_rate": 10.0}
    by_columns = clip_values(Sample("a", {"mp4": b"not read", "json": json.dumps(COLUMNS).encode()}))
    assert by_columns == wanted | {"clip_bytes": 8.0}
    for record in (b"{}", b"no json", b'{"video_seconds": "6"}'):
        assert clip_values(Sample("a", {"mp4": BODY, "json": record})) == pytest.approx(
            wanted | {"clip_bytes": float(len(BODY))}
        )
    assert clip_values(Sample("a", {"mp4": BODY}))["clip_rate"] == pytest.approx(10.0)  # type: ignore[index]
    assert clip_values(Sample("a", {})) == {} and clip_values(Sample("a", {"mp4": b"broken"})) is None


def test_an_example_is_the_start_and_its_middle_frame() -> None:
    clip = example_clip(BODY, 2.0)
    assert clip is not None
    mp4 = base64.b64decode(clip.mp4)
    assert read_timeline(mp4).end == pytest.approx(2.0, abs=0.01)
    assert numbers_of(read_frames(mp4, [0.0, 1.9]).pixels) == [0, 19]
    assert numbers_of(decode(base64.b64decode(clip.poster))[None]) == [10]
    assert example_clip(b"broken", 2.0) is None
    large = encoded_video(numbered(3, 400, 640))
    small = example_clip(large, 2.0)
    assert small is not None and read_frames(base64.b64decode(small.mp4), [0.0]).pixels.shape == (1, 160, 256, 3)


def publish(place: Path) -> Snapshot:
    bodies: list[bytes | None] = [BODY, BODY, b"broken", None, encoded_video(numbered(10, 32, 48))]
    with open(place / "00000.tar", "wb") as file:
        writer = TarWriter(file)
        for number, body in enumerate(bodies):
            fields = {"txt": b'a "clip" <b>'} | ({} if body is None else {"mp4": body})
            writer.write(Sample(f"{number:05d}", fields))
        writer.close()
    tar = place / "00000.tar"
    shard = Shard(name="00000", samples=5, bytes=tar.stat().st_size, sha256=file_digest(tar))
    return publish_shards(Folder(place), (shard,), fields=("mp4", "txt"), card=None, options={}, rows=5, dropped={})


class Videos(HTMLParser):
    """The videos of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[dict[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "video":
            self.found.append(dict(attrs))


def test_the_page_shows_clips(tmp_path: Path) -> None:
    snapshot = publish(tmp_path)
    options = ReportLimits(clip_seconds=0.5)
    statistics = measure(snapshot, options, HERE)
    assert statistics.unreadable == 1
    assert {name: found.count for name, found in statistics.histograms.items() if name.startswith("clip")} == {
        name: 3 for name in ("clip_bytes", "clip_height", "clip_rate", "clip_seconds", "clip_width")
    }
    assert max(copies.count for copies in statistics.images.values()) == 2, "equal videos are duplicates"
    page = report_page(make_report(snapshot, statistics, options))
    assert "1 of 4 videos (" in page and "images (" not in page
    shown = Videos(page).found
    # Three samples, and the duplicate once more.
    assert len(shown) == 4 and "Duration of videos" in page and "<b>" not in page and "videos</dt>" in page
    for one in shown:
        kind, _, content = (one["src"] or "").partition(";base64,")
        assert kind == "data:video/mp4" and read_timeline(base64.b64decode(content)).end == pytest.approx(0.5, abs=0.1)
        assert (one["poster"] or "").startswith("data:image/jpeg;base64,") and one["aria-label"] == 'a "clip" <b>'
    assert page == report_page(make_report(snapshot, measure(snapshot, options, HERE), options))
    without = ReportLimits(clip_seconds=0.0)
    assert not Videos(report_page(make_report(snapshot, measure(snapshot, without, HERE), without))).found


def test_bad_settings() -> None:
    with pytest.raises(SettingError, match="clip_seconds"):
        ReportLimits(clip_seconds=-1.0)
