"""Videos found by their best frame, against a loop over all frames; contact sheets, playable clips, and the page."""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.errors import DataError, SettingError
from pipeline.evaluation.data import open_data
from pipeline.evaluation.embedder import ModelEmbedder
from pipeline.evaluation.figures import RIGHT, WRONG
from pipeline.evaluation.frame_embedder import FrameEmbedder, FrameRate
from pipeline.evaluation.moments import MOMENTS, MomentFinder
from pipeline.evaluation.report import matches_table
from pipeline.evaluation.search import (
    SearchOptions,
    SearchResult,
    as_encoded,
    file_query,
    medium_to_search,
    query_features,
    search,
    text_query,
)
from pipeline.evaluation.search_page import search_page
from pipeline.evaluation.showcase import model_figures, model_files
from pipeline.evaluation.shown_clips import clip_files, playable_clip
from pipeline.evaluation.shown_media import picture
from pipeline.evaluation.suite import Evaluations
from pipeline.loaders.frames import ClipReader, FrameSampling
from pipeline.loaders.images import ImageTransform
from pipeline.loaders.sample_figures import FRAMES, GAP, HEIGHT, clip_grid, frames_of, sample_figure
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.sample import Sample
from pipeline.shards.selection import select
from pipeline.shards.snapshot import Snapshot, publish_shards, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.video_frames import read_frames, read_timeline, read_video_header
from pipeline.stages.annotate.embeddings import EmbedOptions
from pipeline.stages.annotate.frame_features import embed_frames
from pipeline.stages.shard_tasks import Workers
from tests.evaluation.conftest import COLOURS, ColourModel, image
from tests.evaluation.sounds_and_colours import SoundAndColourModel, sound
from tests.videos import encoded_video, numbered, numbers_of

HERE = Workers(processes_count=0)
MakeSnapshot = Callable[..., Snapshot]


def video(*colours: str, each: int = 10, strength: float = 1.0) -> bytes:
    """A second of each colour, at ten frames a second, mixed with grey."""
    grey = np.array([120, 120, 120])
    shades = [strength * np.array(COLOURS[colour]) + (1 - strength) * grey for colour in colours]
    frames = np.stack([np.full((32, 48, 3), shade, np.uint8) for shade in shades for _ in range(each)])
    return encoded_video(frames, unit=Fraction(1, 10))


def clips() -> list[dict[str, bytes]]:
    """Six samples; the fourth has no video, the fifth a broken one."""
    videos: list[bytes | None] = [
        video("red", "green", "blue"),
        video("red", "red"),
        video("blue", "red", "green", strength=0.6),
        None,
        b"\0\0\0 ftypisom broken",
        video("green", "red", strength=0.8),
    ]
    return [{"txt": b"a clip"} | ({} if body is None else {"mp4": body}) for body in videos]


def finder(rate: float = 2.0, sidecar: str = "frames", model: Any = None) -> MomentFinder:
    frames = FrameEmbedder(model or ColourModel(), FrameRate(frames_per_second=rate))
    return MomentFinder(frames, sidecar, batch_size=5, threads=2)


def find(place: str, text: str = "green", top: int = 20, **options: Any) -> SearchResult:
    embedder, data, query = ModelEmbedder(ColourModel()), open_data(place), text_query(text)
    medium = medium_to_search("auto", query, embedder, data)
    assert medium == MOMENTS
    return search(embedder, query_features(embedder, query), data, medium, SearchOptions(top=top), finder(**options))


def by_loop(rows: Sequence[dict[str, bytes]], query: np.ndarray, rate: float) -> list[tuple[float, str, float]]:
    """Cosine, key and time of the best frame of every video, each frame decoded and encoded alone."""
    found = []
    for number, fields in enumerate(rows):
        if number in (3, 4):
            continue
        times = np.arange(int(np.ceil(read_timeline(fields["mp4"]).end * rate))) / rate
        scores = []
        for time in times:
            pixels = read_frames(fields["mp4"], [time]).pixels[0].astype(np.float64)
            mean = pixels.mean(axis=(0, 1))
            scores.append(float(mean / np.linalg.norm(mean) @ query))
        best = int(np.argmax(scores))
        found.append((scores[best], f"{number:06d}", times[best]))
    return sorted(found, key=lambda one: -one[0])


@pytest.mark.parametrize("rate", [1.0, 4.0])
def test_videos_are_ranked_by_their_best_frame_as_by_a_loop(make_snapshot: MakeSnapshot, rate: float) -> None:
    query = ColourModel().encode_text(ColourModel().tokenizer(["green"]))[0].numpy()
    wanted = by_loop(clips(), query, rate)
    found = find(make_snapshot(clips()).folder, rate=rate)
    assert [match.sample.key for match in found.matches] == [key for _, key, _ in wanted]
    assert [match.score for match in found.matches] == pytest.approx([score for score, _, _ in wanted], abs=2e-3)
    assert [match.moment.seconds for match in found.matches] == pytest.approx([time for _, _, time in wanted])
    first = found.matches[0]
    assert (first.sample.key, first.moment.seconds, first.moment.length) == ("000000", 1.0, 3.0)
    assert first.moment.score == first.score == max(first.moment.scores) and len(first.moment.times) == 3 * rate
    assert (found.compared, found.without, found.stored) == (4, 2, 0)
    (best,) = find(make_snapshot(clips(), name="again").folder, top=1, rate=rate).matches
    assert best.sample.key == "000000"


def test_stored_features_are_used_whatever_their_rate(
    make_snapshot: MakeSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = make_snapshot(clips())
    plain = find(snapshot.folder)
    embed_frames(snapshot, lambda threads: finder(5.0).model, EmbedOptions(name="frames"), HERE)
    decoded: list[str] = []
    decode = FrameEmbedder.decode

    def spy(self: FrameEmbedder, sample: Sample, part: int) -> Any:
        decoded.append(sample.key)
        return decode(self, sample, part)

    monkeypatch.setattr(FrameEmbedder, "decode", spy)
    found = find(snapshot.folder)
    assert not decoded and found.stored == 6 and (found.compared, found.without) == (4, 2)
    assert [match.sample.key for match in found.matches] == [match.sample.key for match in plain.matches]
    assert found.matches[0].moment.seconds == 1.0 and len(found.matches[0].moment.times) == 15

    class Other(ColourModel):
        def transforms(self, train: bool) -> Any:
            return replace(super().transforms(train), size=(9, 9))

    assert find(snapshot.folder, model=Other()).stored == 0 and decoded
    assert find(snapshot.folder, sidecar="elsewhere").stored == 0


def test_selections_are_honoured(make_snapshot: MakeSnapshot) -> None:
    made = clips()
    snapshot = make_snapshot(made)
    folder = Folder(snapshot.folder)
    embed_frames(snapshot, lambda threads: finder().model, EmbedOptions(name="frames"), HERE)
    latest = read_snapshot(snapshot.folder)
    some = (
        select(folder, latest.shards[0], np.array([1, 2, 2])),
        replace(select(folder, latest.shards[1], np.array([1, 1])), sidecars={}),
    )
    publish_shards(folder, some, fields=latest.fields, card=None, options={}, rows=6, dropped={})
    folder.delete("00001.frames.parquet")
    found = find(snapshot.folder)
    assert [match.sample.key for match in found.matches] == ["000005", "000002", "000001"]
    assert found.compared == 3 and found.stored == 2
    assert found.matches[1].sample.fields["mp4"] == made[2]["mp4"]


def test_no_video_is_said(make_snapshot: MakeSnapshot) -> None:
    folder = make_snapshot([{"txt": b"a", "mp4": b"\0\0\0 ftypisom"}]).folder
    with pytest.raises(DataError, match="none of 1 samples has a readable video"):
        find(folder)


def test_media_of_a_search(make_snapshot: MakeSnapshot, tmp_path: Path) -> None:
    """Images come first; a file that may be a sound or a video is what the model encodes."""
    both = [{**fields, "png": image(COLOURS["red"])} for fields in clips()]
    embedder, data = ModelEmbedder(ColourModel()), open_data(make_snapshot(both).folder)
    query = text_query("red")
    assert medium_to_search("auto", query, embedder, data) == "image"
    assert medium_to_search("moments", query, embedder, data) == "moments"
    with pytest.raises(SettingError, match="medium that the model encodes: image, moments, text"):
        medium_to_search("video", query, embedder, data)
    (tmp_path / "clip").write_bytes(clips()[0]["mp4"])
    by_file = file_query(str(tmp_path / "clip"))
    assert as_encoded(by_file, ("image", "video", "text")).medium == "video"
    assert as_encoded(by_file, ("image", "audio", "text")).medium == "audio"
    with pytest.raises(SettingError, match="query_file: got .* a medium that the model encodes: image, text"):
        query_features(embedder, as_encoded(by_file, embedder.media))
    (tmp_path / "sound").write_bytes(sound("red"))
    heard = as_encoded(file_query(str(tmp_path / "sound")), ModelEmbedder(SoundAndColourModel()).media)
    assert heard.medium == "audio"


def test_frames_in_a_row_and_their_times() -> None:
    sample = Sample("a", {"mp4": encoded_video(numbered(80, 60, 100), unit=Fraction(1, 10))})
    frames = frames_of(sample)
    assert numbers_of(frames.pixels) == [5, 15, 25, 35, 45, 55, 65, 75]
    assert frames.times == pytest.approx([0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5])
    row = picture(sample, "video")
    assert row.shape == (3, HEIGHT, FRAMES * 160 + (FRAMES - 1) * GAP) and row.dtype == torch.uint8
    cells = torch.stack([row[:, :, place * 162 : place * 162 + 160] for place in range(FRAMES)])
    assert numbers_of(cells.permute(0, 2, 3, 1).numpy()) == [5, 15, 25, 35, 45, 55, 65, 75]
    for broken in (Sample("b", {}), Sample("c", {"mp4": b"\0\0\0 ftypisom"})):
        with pytest.raises(UnreadableSample):
            picture(broken, "video")


def test_a_sheet_has_a_row_for_every_clip() -> None:
    samples = [Sample("a", clips()[0]), Sample("b", {"mp4": b"broken"}), Sample("c", clips()[1])]
    figure = clip_grid(samples, ["red to $blue", "nothing", "red"], ["green", "red", "green"], "clips")
    axes = figure.get_axes()
    assert [axis.get_title(loc="left") for axis in axes] == ["red to $blue", "nothing (not readable)", "red"]
    labels = [label.get_text() for label in axes[0].get_xticklabels()]
    assert labels == [f"{time:.2f} s" for time in frames_of(samples[0]).times.tolist()] and len(labels) == FRAMES
    figure.canvas.draw()
    assert [axis._left_title.get_color() for axis in axes] == ["green", "red", "green"]
    shown = sample_figure([Sample(str(number), fields) for number, fields in enumerate(clips())], "a run's samples")
    assert len(shown.get_axes()) == 5, "all with a video, the broken one as an empty row"
    assert {axis.get_title(loc="left") for axis in shown.get_axes()} == {"a clip", "a clip (not readable)"}


def test_clips_to_play_are_h264_of_a_part() -> None:
    numbers = numbered(200, 48, 80)
    lossless = Sample(
        "a", {"avi": encoded_video(numbers, unit=Fraction(1, 10), kind="avi", codec="mjpeg", pixels="yuvj420p")}
    )
    whole = playable_clip(lossless, 60.0)
    assert read_video_header(whole).kind == "mp4" and read_timeline(whole).frames == 200
    part = playable_clip(lossless, 4.0, around=10.0)
    line = read_timeline(part)
    assert line.end == pytest.approx(4.0, abs=0.11)
    assert numbers_of(read_frames(part, [0.0, 2.0]).pixels) == [80, 100]
    start = playable_clip(lossless, 4.0, around=1.0)
    assert numbers_of(read_frames(start, [0.0, 1.0]).pixels) == [0, 10]
    files = clip_files([(lossless, "a dog / runs"), (Sample("b", {}), "none"), (Sample("c", clips()[0]), "")])
    assert list(files) == ["00_a_dog_runs.mp4", "02_c.mp4"] and all(b"ftyp" in body[:12] for body in files.values())


def test_the_page_plays_videos_from_the_best_moment(make_snapshot: MakeSnapshot) -> None:
    found = find(make_snapshot(clips()).folder)
    page = search_page(text_query("green"), found, {"data": "x"}, seconds=2.0)
    assert page.count("<video ") == 4 and page.count('class="moments"') == 4 and "by their best frame" in page
    assert "best moment at 1.00 of 3.00 seconds" in page and "<script" not in page
    # Two seconds of three, with the best moment, 1 s, in the middle.
    source = page.partition('src="data:video/mp4;base64,')[2]
    body, _, rest = source.partition("#t=")
    assert rest.startswith("1.000") and read_timeline(base64.b64decode(body)).end == pytest.approx(2.0, abs=0.11)
    green = read_frames(base64.b64decode(body), [1.0]).pixels[0].mean(axis=(0, 1))
    assert green.argmax() == 1 and green[1] > 200
    assert matches_table(found.matches).splitlines()[0].split() == ["caption", "cosine", "moment", "key"]
    assert "1.00 s" in matches_table(found.matches)


class ClipModel(ColourModel):
    """Encodes a video as the mean of its frames."""

    def video_reader(self) -> ClipReader:
        return ClipReader(transform=ImageTransform(size=(8, 8)), sampling=FrameSampling(frames=4, rate=2.0))

    def encode_video(self, video: torch.Tensor, video_mask: torch.Tensor | None = None) -> torch.Tensor:
        return functional.normalize(video.float().mean(dim=(1, 3, 4)), dim=-1)


def test_evaluations_show_clips_and_play_them(make_snapshot: MakeSnapshot, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")
    labels = {"red": ("red", "red"), "green": ("blue", "blue"), "blue": ("blue", "green", "blue")}
    rows = [
        {"mp4": video(*shown), "txt": f"a {label} clip".encode(), "json": json.dumps({"label": label}).encode()}
        for label, shown in labels.items()
    ]
    folder = make_snapshot(rows).folder
    classes = str(tmp_path / "classes.txt")
    prepared = Evaluations(zero_shot=(f"it={folder}",), retrieval=(f"it={folder}",), classes=classes).prepare()
    figures = model_figures(ClipModel(), prepared, "at step 3")
    assert set(figures) == {"clips/it", "similarity_video/it", "examples_video/it"}
    titles = [axis.get_title(loc="left").split(" (")[0] for axis in figures["clips/it"].axes]
    assert titles == ["red, found red", "green, found blue", "blue, found blue"]
    assert [axis._left_title.get_color() for axis in figures["clips/it"].axes] == [RIGHT, WRONG, RIGHT]
    scores = [axis.get_title(loc="left").split(" (")[1] for axis in figures["clips/it"].axes]
    paper = Evaluations(zero_shot=(f"it={folder},ensemble=probabilities",), classes=classes).prepare()
    shares = [axis.get_title(loc="left").split(" (")[1] for axis in model_figures(ClipModel(), paper)["clips/it"].axes]
    assert shares == ["1.00)"] * 3 != scores, "the scores that the metric is of"
    files = model_files(ClipModel(), prepared)
    assert {name.rpartition("/")[0] for name in files} == {"zeroshot/it", "retrieval/it"} and len(files) == 6
    wrong = next(content for name, content in files.items() if "green_found_blue" in name)
    assert (
        read_frames(wrong, [0.5]).pixels[0].mean(axis=(0, 1)).argmax() == 2
        and "retrieval/it/00_a_red_clip.mp4" in files
    )
