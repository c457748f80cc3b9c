"""Sources of videos: lists in the published layouts, clips of long files, url tables with segments, whole refreshes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.sources.cut_clips as cut_clips
from pipeline.codecs import codec_of
from pipeline.codecs.options import MediaOptions
from pipeline.errors import SettingError, SnapshotError
from pipeline.shards.sample import Sample
from pipeline.shards.selection import read_samples
from pipeline.shards.storage import Folder
from pipeline.sources.clips import Clips
from pipeline.sources.source import Row, Source
from pipeline.sources.urls import UrlTable
from pipeline.sources.video_sets import VideoSets
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers
from tests.shards.test_video_cut import scene
from tests.videos import encoded_video, every_frame, numbered, numbers_of

HERE = Workers(processes_count=0)
FILM = encoded_video(numbered(100), options={"g": "20"})  # 10 s
SHORT = encoded_video(numbered(20))


def write(folder: Path, files: dict[str, bytes | str]) -> str:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder)


def rows_of(source: Source, tmp_path: Path, rows_per_shard: int = 100) -> list[Row]:
    found = []
    for piece in list(source.slices(rows_per_shard, Folder(str(tmp_path / "scratch")))):
        part = list(source.rows(piece))
        assert len(part) == piece.count
        found += part
    return found


def samples_of(source: Source, folder: Path, **options: Any) -> tuple[list[Sample], pa.Table]:
    media = MediaOptions(video=codec_of("video").options(**options))
    snapshot = refresh(source, Folder(str(folder)), ShardOptions(media=media), HERE)
    table = pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("0*.parquet"))])
    return list(read_samples(Folder(str(folder)), snapshot.shards[0])), table


def shown(sample: Sample) -> list[int]:
    frames = [frame.to_ndarray(format="rgb24") for _, frame in every_frame(sample.fields["mp4"])]
    return numbers_of(np.stack(frames))


def test_msrvtt(tmp_path: Path) -> None:
    data = {
        "videos": [
            {
                "category": 9,
                "url": "https://…",
                "video_id": "video0",
                "start time": 1,
                "end time": 9,
                "split": "train",
                "id": 0,
            },
            {
                "category": 3,
                "url": "https://…",
                "video_id": "video7",
                "start time": 1,
                "end time": 9,
                "split": "test",
                "id": 7,
            },
        ],
        "sentences": [
            {"caption": "a car is shown", "video_id": "video0", "sen_id": 0},
            {"caption": "someone cooks", "video_id": "video7", "sen_id": 1},
            {"caption": "in a car", "video_id": "video0", "sen_id": 2},
        ],
    }
    files: dict[str, bytes | str] = {
        "MSRVTT_data.json": json.dumps(data),
        "MSRVTT_train.9k.csv": "video_id\nvideo0\n",
        "MSRVTT_JSFUSION_test.csv": "key,vid_key,video_id,sentence\nret0,msr7,video7,a person cooks soup\n",
        "videos/all/video0.mp4": FILM,
        "videos/all/video7.webm": SHORT,
    }
    folder = write(tmp_path / "msrvtt", files)
    train = VideoSets(folder=folder, table="MSRVTT_data.json", layout="msrvtt", split_list="MSRVTT_train.9k.csv")
    [row] = rows_of(train, tmp_path)
    assert row.caption == "a car is shown"
    assert row.columns == {"video_name": "video0", "label": "9", "captions": ["a car is shown", "in a car"]}
    assert row.body("video") == FILM
    test = VideoSets(folder=folder, table="MSRVTT_data.json", layout="msrvtt", split_list="MSRVTT_JSFUSION_test.csv")
    [row] = rows_of(test, tmp_path)
    assert (row.caption, row.columns["captions"], row.url) == (
        "a person cooks soup",
        ["a person cooks soup"],
        "videos/all/video7.webm",
    )
    [row] = rows_of(VideoSets(folder=folder, table="MSRVTT_data.json", layout="msrvtt", split="test"), tmp_path)
    assert row.columns["captions"] == ["someone cooks"]


def test_kinetics(tmp_path: Path) -> None:
    table = (
        "label,youtube_id,time_start,time_end,split\n"
        '"baking cookies",JJWwLganiil,31,41,train\n'
        "air drumming,-0Q--oPF9rs,120,130,val\n"
    )
    folder = write(tmp_path / "k", {"train.csv": table, "baking cookies/JJWwLganiil_000031_000041.mp4": FILM})
    source = VideoSets(folder=folder, table="train.csv", layout="kinetics", label_caption="a video of {}")
    first, second = rows_of(source, tmp_path)
    assert (first.caption, first.columns["label"]) == ("a video of baking cookies", "baking cookies")
    assert first.body("video") == FILM and first.problem is None
    assert second.problem is not None and second.problem.error_class == "unreadable"
    assert len(rows_of(VideoSets(folder=folder, table="train.csv", layout="kinetics", split="train"), tmp_path)) == 1


def test_hmdb51_and_ucf101(tmp_path: Path) -> None:
    avi = encoded_video(numbered(20), kind="avi", codec="mpeg4")
    files: dict[str, bytes | str] = {
        "splits/brush_hair_test_split1.txt": "a b_nm.avi 1 \nc.avi 2 \nd.avi 0 \n",
        "splits/wave_test_split1.txt": "w.avi 1 \n",
        "splits/wave_test_split2.txt": "w.avi 2 \n",
        "brush_hair/a b_nm.avi": avi,
        "brush_hair/c.avi": avi,
        "wave/w.avi": avi,
    }
    folder = write(tmp_path / "hmdb", files)

    def names(**more: Any) -> list[tuple[str, Any]]:
        source = VideoSets(folder=folder, table="splits", layout="hmdb51", **more)
        return [(row.url, row.columns["label"]) for row in rows_of(source, tmp_path)]

    assert names(split="train") == [("brush_hair/a b_nm.avi", "brush hair"), ("wave/w.avi", "wave")]
    assert names(split="test") == [("brush_hair/c.avi", "brush hair")]
    assert names(split="test", split_number=2) == [("wave/w.avi", "wave")]
    files = {"ucf/trainlist01.txt": "Archery/v_Archery_g08_c01.avi 3\n", "Archery/v_Archery_g08_c01.avi": avi}
    source = VideoSets(folder=write(tmp_path / "u", files), table="ucf/trainlist01.txt", layout="ucf101")
    assert [row.columns["label"] for row in rows_of(source, tmp_path)] == ["Archery"]


YOUCOOK = {
    "database": {
        "GLd3aX16zBg": {
            "duration": 10.0,
            "subset": "validation",
            "recipe_type": "113",
            "video_url": "https://…",
            "annotations": [
                {"segment": [1, 3], "id": 0, "sentence": "spread margarine"},
                {"segment": [3, 4], "id": 1, "sentence": "cook bacon"},
                {"segment": [3, 4], "id": 2, "sentence": "fry bacon"},
                {"segment": [8, 7], "id": 3, "sentence": "never"},
                {"segment": [80, 90], "id": 4, "sentence": "after the end"},
            ],
        },
        "other": {"subset": "training", "annotations": []},
    }
}


def test_each_caption_of_youcook2_is_a_clip(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {"y.json": json.dumps(YOUCOOK), "raw_videos/GLd3aX16zBg.mp4": FILM}
    source = VideoSets(folder=write(tmp_path / "y", files), table="y.json", layout="youcook2", split="validation")
    samples, table = samples_of(source, tmp_path / "out")
    assert Counter(table["error_class"].to_pylist()) == {None: 3, "segment": 2}
    assert [sample.fields["txt"].decode() for sample in samples] == ["spread margarine", "cook bacon", "fry bacon"]
    assert [shown(sample) for sample in samples] == [list(range(10, 30)), list(range(30, 40)), list(range(30, 40))]
    plain = json.loads(samples[1].fields["json"])
    assert (plain["start"], plain["end"], plain["label"], plain["video_seconds"]) == (3, 4, "113", pytest.approx(1))
    assert len(set(table["sha256"].to_pylist()[:3])) == 2, "clips of one file are no duplicates of one another"


def test_timed_captions_are_in_seconds_of_the_stored_clip(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {"y.json": json.dumps(YOUCOOK), "raw_videos/GLd3aX16zBg.mp4": FILM}
    folder = write(tmp_path / "y", files)
    options: dict[str, Any] = {"folder": folder, "table": "y.json", "layout": "youcook2", "each": False}
    samples, table = samples_of(VideoSets(**options, clip_seconds=2.5), tmp_path / "clips")
    plain = [json.loads(sample.fields["json"]) for sample in samples]
    assert [(one["start"], one["end"]) for one in plain] == [(0, 2.5), (2.5, 5)]
    assert plain[0]["timed_captions"] == [{"start": 1.0, "end": 2.5, "text": "spread margarine"}]
    assert plain[1]["timed_captions"] == [
        {"start": 0.5, "end": 1.5, "text": "cook bacon"},
        {"start": 0.5, "end": 1.5, "text": "fry bacon"},
    ]
    assert Counter(table["error_class"].to_pylist()) == {None: 2, "segment": 1}
    samples, _ = samples_of(
        VideoSets(**options, clip_seconds=0, split="validation"),
        tmp_path / "whole",
        video_seconds=3,
        video_segment="middle",
    )
    [one] = [json.loads(sample.fields["json"]) for sample in samples]
    assert one["video_begin"] == pytest.approx(3.5)
    assert one["timed_captions"][0] == {"start": 0.0, "end": pytest.approx(0.5), "text": "cook bacon"}
    with pytest.raises(SnapshotError, match="captions 1, unreadable 1"):
        samples_of(VideoSets(**options, clip_seconds=0), tmp_path / "none", video_seconds=0.5)


def test_howto100m(tmp_path: Path) -> None:
    spoken = {"abc": {"start": [0.5, 4.0], "end": [3, 6.5], "text": ["so today", "we begin"]}}
    folder = write(tmp_path / "h", {"caption.json": json.dumps(spoken), "abc.webm": SHORT})
    source = VideoSets(folder=folder, table="caption.json", layout="howto100m", each=False, clip_seconds=60)
    [row] = rows_of(source, tmp_path)
    assert row.caption == "so today we begin" and row.columns["timed_captions"][1]["start"] == 4.0


def test_a_plain_table_with_times(tmp_path: Path) -> None:
    table = "clip,from,to,said,also\nfilm,2,3.5,two,zwei\nfilm,5,,five,\nfilm,x,,,\n"
    folder = write(tmp_path / "t", {"list.csv": table.replace("film,x,,,\n", ""), "v/film.mkv": FILM, "bad.csv": table})
    options: dict[str, Any] = {"folder": folder, "file": "v/{clip}.mp4", "captions": ("said", "also")}
    source = VideoSets(**options, table="list.csv", start="from", end="to")
    samples, _ = samples_of(source, tmp_path / "out")
    assert [shown(sample)[0] for sample in samples] == [20, 50]
    assert [len(shown(sample)) for sample in samples] == [15, 50]
    assert json.loads(samples[0].fields["json"])["captions"] == ["two", "zwei"]
    with pytest.raises(SettingError, match="another layout"):
        rows_of(VideoSets(**options, table="bad.csv", start="from", end="to"), tmp_path)


@pytest.mark.parametrize(
    "more, field",
    [
        ({"layout": "msrvtt", "captions": ("a",)}, "captions"),
        ({"file": "plain.mp4"}, "file"),
        ({"end": "to"}, "end"),
        ({"split": "train"}, "split"),
        ({"layout": "hmdb51", "split": "val"}, "split"),
        ({"layout": "hmdb51", "split_number": 4}, "split_number"),
        ({"label_caption": "none"}, "label_caption"),
        ({"clip_seconds": -1.0}, "clip_seconds"),
        ({"split_list": "a.csv"}, "split_list"),
        ({"table": ""}, "table"),
    ],
)
def test_bad_settings_are_named(more: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingError, match=f"^{field}: "):
        VideoSets(**{"folder": "f", "table": "t.csv", "file": "{name}", **more})


@pytest.mark.parametrize(
    "layout, text",
    [
        ("msrvtt", "[]"),
        ("kinetics", "a,b\n1,2\n"),
        ("ucf101", "x.avi 1\n"),
        ("youcook2", '{"a": 1}'),
        ("howto100m", "[1]"),
    ],
)
def test_lists_of_another_layout_are_refused(layout: Any, text: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "f", {"list": text, "a.mp4": SHORT})
    with pytest.raises(SettingError, match="^layout: list has another layout"):
        rows_of(VideoSets(folder=folder, table="list", layout=layout), tmp_path)


def test_clips_of_a_folder_are_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(
        tmp_path / "f", {"street/film.mp4": FILM, "street/film.txt": "numbers", "broken.mp4": b"\0\0\0\x20ftypisom"}
    )
    for whole in (cut_clips.WHOLE_BYTES, 100):  # given whole, and copied by packets
        monkeypatch.setattr(cut_clips, "WHOLE_BYTES", whole)
        source = Clips(folder=folder, video=True, clip_seconds=4.0)
        samples, table = samples_of(source, tmp_path / f"out{whole}")
        assert [shown(sample) for sample in samples] == [list(range(40)), list(range(40, 80)), list(range(80, 100))]
        assert {sample.fields["txt"].decode() for sample in samples} == {"numbers"}
        assert Counter(table["error_class"].to_pylist()) == {None: 3, "damaged": 1}


def test_clips_begin_at_changes_of_shots(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    images = np.concatenate([scene(random, count) for count in (20, 45, 15)])
    folder = write(tmp_path / "f", {"film.mp4": encoded_video(images)})
    source = Clips(folder=folder, video=True, cuts=True, clip_seconds=3.0, shortest=1.0)
    starts = [(row.columns["start"], row.columns["end"]) for row in rows_of(source, tmp_path)]
    np.testing.assert_allclose(starts, [(0, 2), (2, 5), (5, 6.5), (6.5, 8)], atol=1e-6)
    for more in ({"cuts": True}, {"video": True, "frames": True}, {"video": True, "cuts": True, "hop_seconds": 1.0}):
        with pytest.raises(SettingError):
            Clips(folder=folder, **more)


def test_url_tables_name_segments(tmp_path: Path) -> None:
    table = "url,said,from,to\nhttp://a/v.mp4,one,1.5,3\nhttp://a/v.mp4,two,4,\nhttp://a/v.mp4,bad,5,4\n,none,1,2\n"
    write(tmp_path, {"list.csv": table})
    options: dict[str, Any] = {"url_list": str(tmp_path / "list.csv"), "caption_col": "said", "start_col": "from"}
    rows = rows_of(UrlTable(**options, url_col="video=url", end_col="to"), tmp_path)
    assert [row.url for row in rows] == ["http://a/v.mp4#t=1.5,3", "http://a/v.mp4#t=4", "http://a/v.mp4", ""]
    assert rows[0].columns == {"start": 1.5, "end": 3.0} and rows[1].columns == {"start": 4.0, "end": None}
    assert [row.problem.error_class if row.problem else None for row in rows] == [None, None, "segment", None]
    with pytest.raises(SettingError, match="start_col"):
        UrlTable(**options)
    with pytest.raises(SettingError, match="start_col"):
        rows_of(UrlTable(**{**options, "start_col": "begin"}, url_col="video=url"), tmp_path)
