"""Filters of videos: length, size and motion from columns or by decoding; near duplicates by a hash of frames."""

from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.codecs.options import MediaOptions
from pipeline.codecs.video import VideoOptions
from pipeline.errors import SettingError
from pipeline.shards.snapshot import Snapshot
from pipeline.shards.storage import Folder
from pipeline.sources.folder import ImageFolder
from pipeline.stages.filters import video
from pipeline.stages.filters.filter import Filter
from pipeline.stages.filters.run import filter_snapshot, read_reasons
from pipeline.stages.filters.video import COLUMNS, Video, video_values
from pipeline.stages.filters.video_duplicates import VideoDuplicates, video_hash
from pipeline.stages.filters.view import ShardView
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers
from tests.videos import encoded_video, numbered

HERE = Workers(processes_count=0)


def film(seed: int, count: int = 24, height: int = 96, width: int = 128) -> np.ndarray:
    """A smooth texture that moves, and changes into another one."""
    random = np.random.default_rng(seed)
    grounds = [cv2.resize(random.integers(0, 255, (4, 6, 3), np.uint8), (width * 2, height)) for _ in range(2)]
    mix = np.linspace(0, 1, count)
    frames = [
        (1 - part) * np.roll(grounds[0], 3 * at, 1)[:, :width] + part * np.roll(grounds[1], -2 * at, 1)[:, :width]
        for at, part in enumerate(mix)
    ]
    return np.stack(frames).astype(np.uint8)


def snapshot_of(tmp_path: Path, bodies: list[bytes]) -> Snapshot:
    """The videos, three to a shard."""
    (tmp_path / "set").mkdir()
    for number, body in enumerate(bodies):
        (tmp_path / "set" / f"{number:02d}.mp4").write_bytes(body)
    options = ShardOptions(
        media=MediaOptions(video=VideoOptions(video_size=0, video_keep_bytes=True)), number_sample_per_shard=3
    )
    source = ImageFolder(folder=str(tmp_path / "set"), media=("video",))
    return refresh(source, Folder(tmp_path / "out"), options, HERE)


def reasons(snapshot: Snapshot, *filters: Filter) -> list[str]:
    outcome = filter_snapshot(snapshot, filters, HERE)
    return [reason for _, table in read_reasons(outcome.snapshot) for reason in table["reason"].to_pylist()]


BODIES = [
    encoded_video(film(1)),
    encoded_video(film(2, 6)),
    encoded_video(film(3, 60)),
    encoded_video(cv2.resize(film(4)[0], (128, 96))[None].repeat(24, 0)),
    encoded_video(film(5, height=48, width=64)),
]
WANTED = ["", "video.short", "video.long", "video.still", "video.small"]


def test_videos_are_judged_by_their_columns(tmp_path: Path) -> None:
    assert reasons(snapshot_of(tmp_path, BODIES), Video(max_video_seconds=5.0)) == WANTED


def test_videos_without_columns_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = snapshot_of(tmp_path, BODIES)
    view = ShardView(Folder(snapshot.folder), snapshot.shards[0])
    stored, _ = video_values(view)
    monkeypatch.setattr(video, "COLUMNS", tuple(f"other_{name}" for name in COLUMNS))
    decoded, unreadable = video_values(view)
    for name in COLUMNS[:3]:
        np.testing.assert_allclose(decoded[f"other_{name}"], stored[name], atol=1e-3)
    np.testing.assert_allclose(decoded["other_video_motion"], stored["video_motion"], rtol=0.5)
    assert not unreadable.any()


def test_copies_have_nearly_the_same_hash() -> None:
    copies = [
        dict(options={"crf": "35"}),
        dict(kind="webm", codec="libvpx", options={"deadline": "realtime", "cpu-used": "8", "b": "400k"}),
        dict(kind="avi", codec="mpeg4"),
        dict(unit=Fraction(1, 25)),
    ]
    hashes = [[video_hash(encoded_video(film(seed)))] for seed in range(20)]
    for seed, found in enumerate(hashes[:6]):
        found += [video_hash(encoded_video(film(seed), **copy)) for copy in copies]
        small = np.stack([cv2.resize(frame, (96, 72), interpolation=cv2.INTER_AREA) for frame in film(seed)])
        found.append(video_hash(encoded_video(small)))
        assert max((found[0] ^ other).bit_count() for other in found) <= 6
    apart = [(one[0] ^ other[0]).bit_count() for at, one in enumerate(hashes) for other in hashes[:at]]
    assert min(apart) > 6 and np.mean(apart) > 20
    assert video_hash(b"no video") is None


def test_near_duplicates_are_dropped_behind_the_first(tmp_path: Path) -> None:
    bodies = [
        encoded_video(film(1)),
        encoded_video(film(2)),
        encoded_video(film(1), options={"crf": "33"}),
        encoded_video(film(3)),
        encoded_video(film(2), unit=Fraction(1, 20)),
    ]
    dropped = "video_duplicates.near_duplicate"
    assert reasons(snapshot_of(tmp_path, bodies), VideoDuplicates()) == ["", "", dropped, "", dropped]


def test_clips_of_one_file_are_no_exact_duplicates(tmp_path: Path) -> None:
    from pipeline.sources.clips import Clips

    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.mp4").write_bytes(encoded_video(numbered(40)))
    (tmp_path / "set" / "b.mp4").write_bytes(encoded_video(numbered(40)))
    source = Clips(folder=str(tmp_path / "set"), video=True, clip_seconds=2.0)
    snapshot = refresh(source, Folder(tmp_path / "out"), ShardOptions(), HERE)
    digests = ShardView(Folder(snapshot.folder), snapshot.shards[0]).digests()
    assert digests[0] != digests[1] and digests[:2] == digests[2:], "those of equal files are"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Video(min_video_seconds=-1),
        lambda: Video(max_video_seconds=0.5),
        lambda: Video(min_video_side=-1),
        lambda: Video(min_motion=2.0),
        lambda: VideoDuplicates(max_video_hamming=17),
    ],
)
def test_bad_settings_are_named(make) -> None:
    with pytest.raises(SettingError):
        make().check()
