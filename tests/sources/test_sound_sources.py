"""Sources of sounds and videos: tables in the published layouts, clips of long files, frames, what cannot be read."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
import soundfile

from pipeline.codecs import codec_of
from pipeline.codecs.audio import AudioOptions
from pipeline.codecs.options import MediaOptions
from pipeline.dataset import load_card
from pipeline.errors import DataError, SettingError
from pipeline.loaders.text import read_captions
from pipeline.shards.selection import read_samples
from pipeline.shards.storage import Folder
from pipeline.sources import open_source
from pipeline.sources.clips import Clips
from pipeline.sources.sound_table import SoundTable
from pipeline.sources.source import Row, Source
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers
from tests.sounds import encoded, tone, video

RATE = 8_000
RAMP = np.linspace(0, 1, 30 * RATE, endpoint=False).astype(np.float32)  # a value is a time: 30 s


def rows_of(source: Source, scratch: Path, at_once: int = 3) -> list[Row]:
    pieces = list(source.slices(at_once, Folder(scratch)))
    rows = [row for piece in pieces for row in source.rows(piece)]
    assert len(rows) == sum(piece.count for piece in pieces)
    return rows


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def card(name: str, folder: Path, **options: Any) -> SoundTable:
    source = open_source({**load_card(name).source, "folder": str(folder), **options})
    assert isinstance(source, SoundTable)
    return source


def sound_of(row: Row) -> np.ndarray:
    assert row.problem is None
    samples, rate = soundfile.read(io.BytesIO(row.body("audio") or b""), dtype="float32")
    assert rate == RATE
    return samples


def clip(number: int = 0) -> bytes:
    return encoded(tone(RATE, 0.5, 200 + 10 * number), RATE, "WAV")


@pytest.fixture(name="esc50")
def esc50_fixture(tmp_path: Path) -> Path:
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    names = [f"{fold}-1000{number}-A-{number}.wav" for fold in (1, 2) for number in (0, 14)]
    for name, fold, label in zip(names, (1, 1, 2, 2), ("dog", "chirping_birds") * 2, strict=True):
        lines.append(f"{name},{fold},0,{label},True,100032,A")
    sounds = {f"audio/{name}": clip(number) for number, name in enumerate(names)}
    return write(tmp_path / "ESC-50-master", {"meta/esc50.csv": "\n".join(lines) + "\n", **sounds})


def test_esc50(esc50: Path, tmp_path: Path) -> None:
    rows = rows_of(card("esc50", esc50), tmp_path)
    assert [(row.columns["label"], row.columns["fold"]) for row in rows] == [
        ("dog", 1),
        ("chirping_birds", 1),
        ("dog", 2),
        ("chirping_birds", 2),
    ]
    assert rows[1].body("audio") == clip(1) and set(load_card("esc50").classes) > {"dog", "chirping_birds"}
    assert [row.columns["fold"] for row in rows_of(card("esc50", esc50, folds=(2,)), tmp_path)] == [2, 2]
    with pytest.raises(SettingError, match="folds"):
        rows_of(card("esc50", esc50, folds=(7,)), tmp_path)


def test_the_cards_classes_are_complete() -> None:
    assert len(load_card("esc50").classes) == 50 and len(load_card("urbansound8k").classes) == 10


def test_urbansound8k(tmp_path: Path) -> None:
    table = (
        "slice_file_name,fsID,start,end,salience,fold,classID,class\n100032-3-0-0.wav,100032,0,0.317,1,5,3,dog_bark\n"
    )
    files = {"metadata/UrbanSound8K.csv": table, "audio/fold5/100032-3-0-0.wav": clip()}
    (row,) = rows_of(card("urbansound8k", write(tmp_path / "us8k", files)), tmp_path)
    assert row.columns == {"label": "dog_bark", "labels": ["dog_bark"], "fold": 5}
    assert row.body("audio") == clip()


def test_clothos_five_captions_reach_retrieval(tmp_path: Path) -> None:
    header = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5"
    table = f'{header}\nSanta Motor.wav,"A machine whines, and hisses",Two,Three,Four,Five\n'
    folder = write(tmp_path / "clotho", {"clotho_captions_evaluation.csv": table, "evaluation/Santa Motor.wav": clip()})
    snapshot = refresh(card("clotho", folder), Folder(tmp_path / "out"), ShardOptions(), Workers(processes_count=0))
    (sample,) = [one for shard in snapshot.shards for one in read_samples(Folder(tmp_path / "out"), shard)]
    assert set(sample.fields) == {"flac", "txt", "json"} and sample.fields["txt"] == b"A machine whines, and hisses"
    assert read_captions(sample) == ["A machine whines, and hisses", "Two", "Three", "Four", "Five"]
    table_of_shard = pq.read_table(tmp_path / "out" / f"{snapshot.shards[0].name}.parquet")
    assert table_of_shard["captions"].to_pylist() == [read_captions(sample)]


def test_audiocaps_rows_of_one_clip_are_joined(tmp_path: Path) -> None:
    lines = [
        "audiocap_id,youtube_id,start_time,caption",
        "1,--abc,30,A dog barks",
        "2,--abc,30,Barking",
        "3,x_y,0,Rain",
    ]
    files = {
        "dataset/test.csv": "\r\n".join(lines),
        "test/--abc.wav": encoded(RAMP, RATE, "WAV", "FLOAT"),
        "test/x_y.wav": clip(),
    }
    folder = write(tmp_path / "audiocaps", files)
    rows = rows_of(card("audiocaps", folder), tmp_path)
    assert [row.columns["captions"] for row in rows] == [["A dog barks", "Barking"], ["Rain"]]
    assert rows[0].caption == "A dog barks"
    whole = write(folder, {"dataset/test.csv": "audiocap_id,youtube_id,start_time,caption\n1,--abc,12,A dog barks\n"})
    (row,) = rows_of(card("audiocaps", whole, start="start_time"), tmp_path)
    samples = sound_of(row)
    assert len(samples) == 10 * RATE and samples[0] * 30 == pytest.approx(12, abs=0.01)
    assert (row.columns["start"], row.columns["end"], row.url) == (12, 22, "test/--abc.wav#t=12,22")


AUDIOSET = """# Segments csv created Sun Mar  5 10:54:25 2017
# num_ytids=3, num_segs=3, num_unique_labels=3, num_positive_labels=4
# YTID, start_seconds, end_seconds, positive_labels
--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_"
gone, 20.000, 30.000, "/m/068hy"
-late, 25.000, 28.500, "/m/09x0r"
"""
LABELS = 'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/068hy,"Male speech, man speaking"\n2,/m/07q6cd_,"Squeak"\n'


def audioset(folder: Path) -> Path:
    sounds = {f"eval/{name}.wav": encoded(RAMP, RATE, "WAV", "FLOAT") for name in ("--4gqARaEJE", "-late")}
    return write(folder, {"eval_segments.csv": AUDIOSET, "class_labels_indices.csv": LABELS, **sounds})


def test_audioset(tmp_path: Path) -> None:
    source = card("audioset", audioset(tmp_path / "audioset"), start="start_seconds", end="end_seconds")
    first, gone, late = rows_of(source, tmp_path)
    assert first.columns["labels"] == ["Male speech, man speaking", "Squeak"]
    assert first.caption == "the sounds of Male speech, man speaking and Squeak"
    assert gone.problem is not None and gone.problem.error_class == "unreadable"
    assert len(sound_of(late)) == 3.5 * RATE and sound_of(late)[0] * 30 == pytest.approx(25, abs=0.01)


def test_videos_give_frame_sound_and_text(tmp_path: Path) -> None:
    """The colour of the frame is that of the middle of the clip: frame n of 40 has n * 6 as red."""
    images = np.zeros((40, 64, 64, 3), np.uint8)
    images[..., 0] = np.arange(40)[:, None, None] * 6
    files = {
        "eval_segments.csv": "# a\nmoving, 1.0, 3.0, /m/09x0r\nsilent, 0.0, 2.0, /m/09x0r\nbroken, 0, 1, /m/09x0r\n",
        "class_labels_indices.csv": LABELS,
        "eval/moving.mp4": video(images, 10, tone(16_000, 4.0)),
        "eval/silent.mp4": video(images, 10, None),
        "eval/broken.mp4": b"\0\0\0\x18ftypisom" + bytes(1000),
    }
    options: dict[str, Any] = {
        "file": "eval/{YTID}.mp4",
        "start": "start_seconds",
        "end": "end_seconds",
        "frames": True,
    }
    source = card("audioset", write(tmp_path / "videos", files), **options)
    moving, silent, broken = rows_of(source, tmp_path)
    assert source.media == ("image", "audio") and [part.medium for part in silent.parts] == ["image"]
    frame = simplejpeg.decode_jpeg(moving.body("image") or b"")
    assert frame.shape == (64, 64, 3) and abs(float(frame[..., 0].mean()) - 120) < 8  # 2.0 s is frame 20
    samples, rate = soundfile.read(io.BytesIO(moving.body("audio") or b""))
    assert (len(samples), rate) == (32_000, 16_000) and np.abs(samples).max() > 0.4
    assert broken.problem is not None and broken.problem.error_class == "damaged"


def test_a_triple_snapshot_of_videos(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), np.uint8)
    folder = write(
        tmp_path / "films", {"street/a.mp4": video(images, 10, tone(16_000, 2.0)), "street/a.txt": "a street"}
    )
    options = ShardOptions(
        media=MediaOptions(image=codec_of("image").options(image_size=64), audio=AudioOptions(audio_rate=16_000))
    )
    source = Clips(folder=str(folder), clip_seconds=1.0, frames=True)
    snapshot = refresh(source, Folder(tmp_path / "out"), options, Workers(processes_count=0))
    samples = [one for shard in snapshot.shards for one in read_samples(Folder(tmp_path / "out"), shard)]
    assert [set(sample.fields) for sample in samples] == [{"jpg", "flac", "txt", "json"}] * 2
    assert {sample.fields["txt"] for sample in samples} == {b"a street"}


@pytest.mark.parametrize(
    ("options", "starts"),
    [
        ({}, [0, 10, 20]),
        ({"hop_seconds": 5.0}, [0, 5, 10, 15, 20]),
        ({"shortest": 6.0}, [0, 10]),
        ({"clip_seconds": 60.0}, [0]),
        ({"clip_seconds": 12.5}, [0, 12.5]),
    ],
)
def test_long_files_are_cut(tmp_path: Path, options: dict[str, float], starts: list[float]) -> None:
    write(tmp_path / "long", {"forest/day.flac": encoded(RAMP[: 25 * RATE], RATE)})
    rows = rows_of(Clips(folder=str(tmp_path / "long"), **options), tmp_path, 2)
    assert [row.columns["start"] for row in rows] == starts and {row.columns["label"] for row in rows} == {"forest"}
    for row in rows:
        samples, start, end = sound_of(row), row.columns["start"], row.columns["end"]
        assert isinstance(start, float) and isinstance(end, float)
        assert samples[0] * 30 == pytest.approx(start, abs=0.01) and len(samples) == round((end - start) * RATE)
        assert end == min(25, start + options.get("clip_seconds", 10.0))


def test_broken_files_are_rows_with_problems(tmp_path: Path) -> None:
    write(tmp_path / "mixed", {"a.flac": b"fLaC broken", "b.wav": clip(), "c.mp3": b"<html>", ".hidden/d.wav": clip()})
    rows = rows_of(Clips(folder=str(tmp_path / "mixed")), tmp_path)
    assert [row.problem.error_class if row.problem else "" for row in rows] == ["damaged", "", "not_a_sound"]


def test_a_path_may_not_leave_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "set", {"table.csv": "file_name\n../secret.wav\na.wav\n", "a.wav": clip()})
    write(tmp_path, {"secret.wav": clip()})
    rows = rows_of(SoundTable(folder=str(tmp_path / "set"), table="table.csv"), tmp_path)
    assert rows[0].problem is not None and not rows[0].parts and rows[1].problem is None


def test_digests_follow_files_and_options(tmp_path: Path, esc50: Path) -> None:
    def digests(**options: Any) -> list[str]:
        return [piece.digest for piece in card("esc50", esc50, **options).slices(2, Folder(tmp_path))]

    first = digests()
    assert digests() == first and len(set(first)) == 2
    (esc50 / "audio/1-10000-A-0.wav").write_bytes(clip(5) + b"more")
    assert digests()[0] != first[0] and digests()[1] == first[1]
    assert digests(label_caption="the sound of {}")[1] != first[1]


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("table", {"table": "no.csv"}),
        ("table", {"label": "class"}),
        ("file", {"file": "audio.wav"}),
        ("file", {"file": "elsewhere/{filename}"}),
        ("end", {"end": "fold"}),
        ("folds", {"fold": ""}),
        ("label_caption", {"label_caption": "no braces"}),
        ("label_names", {"label_names": "no.csv"}),
        ("segment_seconds", {"segment_seconds": 0.0}),
    ],
)
def test_bad_settings(esc50: Path, tmp_path: Path, field: str, options: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=field):
        rows_of(card("esc50", esc50, **{"folds": (1,), **options}), tmp_path)


def test_bad_settings_of_clips(tmp_path: Path) -> None:
    for field, value in (("clip_seconds", 0.0), ("hop_seconds", -1.0), ("shortest", 20.0), ("folder", "")):
        with pytest.raises(SettingError, match=field):
            Clips(**{"folder": str(tmp_path), field: value})  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="folder"):
        rows_of(Clips(folder=str(tmp_path / "none")), tmp_path)


def test_a_fold_that_is_no_number(tmp_path: Path) -> None:
    write(tmp_path / "set", {"t.csv": "file_name,fold\na.wav,one\n", "a.wav": clip()})
    with pytest.raises(DataError, match="'one' in the column fold"):
        rows_of(SoundTable(folder=str(tmp_path / "set"), table="t.csv", fold="fold"), tmp_path)
