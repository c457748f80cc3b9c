"""Search against a loop over all samples; sidecars that are fresh and stale; hostile queries and captions."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.errors import DataError, SettingError
from pipeline.evaluation.data import open_data
from pipeline.evaluation.embedder import ModelEmbedder
from pipeline.evaluation.report import matches_table
from pipeline.evaluation.search import (
    SearchOptions,
    SearchResult,
    file_query,
    medium_to_search,
    query_features,
    scores_of,
    search,
    text_query,
    words_read,
)
from pipeline.evaluation.search_page import facts_of, search_page
from pipeline.evaluation.shown_media import sound_of, spectrogram
from pipeline.models.clip import Clip
from pipeline.models.videoclip import VideoClip
from pipeline.shards.sample import Sample
from pipeline.shards.selection import select
from pipeline.shards.snapshot import Snapshot, publish_shards, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.waveforms import Waveform, read_header, read_waveform
from pipeline.stages.annotate.embeddings import EmbedOptions, embed
from pipeline.stages.shard_tasks import Workers
from tests.conftest import publish_coloured
from tests.evaluation.conftest import COLOURS, ColourModel, image
from tests.evaluation.sounds_and_colours import SoundAndColourModel, sample, sound
from tests.sounds import encoded, tone

MakeSnapshot = Callable[..., Snapshot]
HERE = Workers(processes_count=0)


class Mixed(SoundAndColourModel):
    """Features with noise of their own for every input, so that scores differ."""

    def encode_audio(self, audio: Any) -> Any:
        return functional.normalize(super().encode_audio(audio) + audio[:, 0, 100:103] / 3, dim=-1)


def rows() -> list[dict[str, bytes]]:
    """Ten samples; the fourth has no sound, the sixth a broken one."""
    colours = [*COLOURS, "blue", "red", "green", *COLOURS, "red"]
    made = [sample(colour, caption=f"{colour} {number}") for number, colour in enumerate(colours)]
    for number, one in enumerate(made):
        one["flac"] = encoded(tone(16_000, 0.5, 300.0 + 40 * number), 16_000)
    del made[3]["flac"]
    made[5]["flac"] = b"fLaC nothing"
    return made


def find(place: str, query: Any, medium: str, top: int = 20, model: Any = None, **options: Any) -> SearchResult:
    embedder = ModelEmbedder(model or Mixed())
    data = open_data(place)
    medium = medium_to_search(medium, query, embedder, data)
    settings = SearchOptions(top=top, batch_size=3, threads=2, **options)
    return search(embedder, query_features(embedder, query), data, medium, settings)


def by_loop(made: Sequence[dict[str, bytes]], query: torch.Tensor) -> list[tuple[float, str]]:
    """Cosine and key of every sound, the best first."""
    model, reader = Mixed(), Mixed().audio_reader()
    found = []
    for number, fields in enumerate(made):
        if number not in (3, 5):
            batch = reader.collate([reader.read(Sample("s", fields))])
            found.append((float(model.encode_audio(batch["audio"])[0] @ query), f"{number:06d}"))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("top", [1, 4, 50])
def test_sounds_are_ranked_as_by_a_loop(make_snapshot: MakeSnapshot, tmp_path: Path, top: int) -> None:
    folder = make_snapshot(rows()).folder
    (tmp_path / "query.bin").write_bytes(image(COLOURS["green"]))  # the ending does not matter
    queries = {
        "text": (text_query(" green "), Mixed().encode_text(Mixed().tokenizer(["green"]))[0]),
        "image": (file_query(str(tmp_path / "query.bin")), torch.tensor([0.0, 1.0, 0.0])),
    }
    for query, features in queries.values():
        found = find(folder, query, "audio", top)
        expected = by_loop(rows(), features)[:top]
        assert [match.sample.key for match in found.matches] == [key for _, key in expected]
        assert [match.score for match in found.matches] == pytest.approx([score for score, _ in expected], abs=1e-6)
        assert (found.compared, found.without, found.stored) == (8, 2, 0)


def test_a_model_over_stored_features_searches_videos(tmp_path: Path) -> None:
    """VideoCLIP reads the sidecar of frames: ranks are those of a loop; its features cannot become a sidecar."""
    torch.manual_seed(0)
    folder = publish_coloured(tmp_path / "shards", (4, 3), regions=("teacher", 8)).folder
    model = VideoClip(VideoClip.smallest()).eval()
    embedder, data = ModelEmbedder(model), open_data(folder)
    query = text_query("a red star")
    assert medium_to_search("auto", query, embedder, data) == "video"
    found = search(embedder, query_features(embedder, query), data, "video", SearchOptions(top=5))
    assert found.compared == 7 and found.stored == 0
    reader = model.video_reader()
    samples = list(data.samples(None, reader.sidecars))
    batch = reader.collate([reader.read(one) for one in samples])
    with torch.no_grad():
        text = model.encode_text(model.tokenizer(["a red star"]))
        scores = (model.encode_video(batch["video"], batch["video_mask"]) @ text.T)[:, 0]
    best = scores.argsort(descending=True)[:5].tolist()
    assert [match.sample.key for match in found.matches] == [samples[number].key for number in best]
    np.testing.assert_allclose([match.score for match in found.matches], scores[best], atol=1e-5)
    with pytest.raises(SettingError, match="checkpoint: got 'frames', expected a model that reads no sidecars"):
        embed(read_snapshot(folder), lambda threads: embedder, EmbedOptions(), HERE)
    bare = publish_coloured(tmp_path / "bare", (2,), spoil={0: {"mp4": b"", "txt": b"a"}}).folder
    with pytest.raises(DataError, match=r"jobs/embed_dataset\.py frames"):
        search(embedder, query_features(embedder, query), open_data(bare), "video", SearchOptions())


def test_the_medium_is_the_one_that_the_query_is_not(make_snapshot: MakeSnapshot, tmp_path: Path) -> None:
    everything = open_data(make_snapshot(rows()).folder)
    heard = open_data(make_snapshot([sample("red", "at")], name="heard").folder)
    (tmp_path / "dog.jpg").write_bytes(sound("red"))  # a sound, whatever its name says
    (tmp_path / "seen").write_bytes(image(COLOURS["red"]))
    embedder, by_sound, by_image = (
        ModelEmbedder(Mixed()),
        file_query(str(tmp_path / "dog.jpg")),
        file_query(str(tmp_path / "seen")),
    )
    assert by_sound.medium == "audio" and by_image.medium == "image"
    chosen = [medium_to_search("auto", query, embedder, everything) for query in (text_query("a"), by_sound, by_image)]
    assert chosen == ["image", "image", "audio"]
    assert medium_to_search("auto", by_sound, embedder, heard) == "text"
    assert medium_to_search("audio", by_sound, embedder, heard) == "audio"
    with pytest.raises(SettingError, match="medium: got 'image', expected one that the samples have: audio, text"):
        medium_to_search("image", by_sound, embedder, heard)
    with pytest.raises(SettingError, match="medium: got 'smell'"):
        medium_to_search("smell", by_sound, embedder, heard)
    with pytest.raises(SettingError, match="a medium that the model encodes: image, moments, text"):
        medium_to_search("audio", by_image, ModelEmbedder(ColourModel()), everything)
    with pytest.raises(SettingError, match="a medium that the model encodes: image, text"):
        query_features(ModelEmbedder(ColourModel()), by_sound)


def test_captions_are_ranked_too(make_snapshot: MakeSnapshot, tmp_path: Path) -> None:
    (tmp_path / "query").write_bytes(sound("blue"))
    folder = make_snapshot([sample(colour, "t") for colour in COLOURS]).folder
    found = find(folder, file_query(str(tmp_path / "query")), "auto", model=SoundAndColourModel())
    assert found.medium == "text" and found.matches[0].sample.fields["txt"] == b"a blue one"


def test_a_card_is_searched_without_a_snapshot(colour_card: Callable[..., str]) -> None:
    found = find(colour_card(count=6), text_query("a blue image"), "auto", 2, ColourModel())
    assert found.compared == 6 and [match.sample.fields["txt"][:6] for match in found.matches] == [b"a blue"] * 2


def test_fresh_features_are_read_and_stale_ones_are_not(
    make_snapshot: MakeSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards 0 and 1 of 3 have a sidecar of this model; a model with other weights encodes all of them."""
    snapshot = make_snapshot(rows())
    folder, query = Folder(snapshot.folder), text_query("green")
    plain = find(snapshot.folder, query, "audio")
    embed(snapshot, lambda threads: ModelEmbedder(Mixed()), EmbedOptions(), HERE)
    folder.delete("00002.embeddings.parquet")
    encoded_keys: list[str] = []
    prepare = ModelEmbedder.prepare

    def spy(self: ModelEmbedder, one: Sample, medium: str) -> Any:
        encoded_keys.append(one.key)
        return prepare(self, one, medium)

    monkeypatch.setattr(ModelEmbedder, "prepare", spy)
    found = find(snapshot.folder, query, "audio")
    assert encoded_keys == ["query", "000008", "000009"] and found.stored == 8
    assert (found.compared, found.without) == (plain.compared, plain.without) == (8, 2)
    assert [one.sample.key for one in found.matches] == [one.sample.key for one in plain.matches]
    assert [one.score for one in found.matches] == pytest.approx([one.score for one in plain.matches], abs=2e-3)
    assert found.matches[0].sample.fields == plain.matches[0].sample.fields
    other = find(snapshot.folder, query, "audio", sidecar="elsewhere")
    assert other.stored == 0 and other.compared == 8

    class Renamed(Mixed):
        def audio_reader(self) -> Any:
            return type("Another", (type(super().audio_reader()),), {"__repr__": lambda _: "another reader"})()

    assert find(snapshot.folder, query, "audio", model=Renamed()).stored == 0


def test_selections_are_honoured_and_repeats_count_once(make_snapshot: MakeSnapshot) -> None:
    snapshot = make_snapshot(rows())
    folder = Folder(snapshot.folder)
    embed(snapshot, lambda threads: ModelEmbedder(Mixed()), EmbedOptions(), HERE)
    latest = read_snapshot(snapshot.folder)
    some = (
        select(folder, latest.shards[0], np.array([0, 2, 2, 2])),
        select(folder, latest.shards[1], np.array([0, 3, 3])),
        replace(select(folder, latest.shards[2], np.array([1, 1])), sidecars={}),
    )
    publish_shards(folder, some, fields=latest.fields, card=None, options={}, rows=10, dropped={})
    folder.delete("00002.embeddings.parquet")
    found = find(snapshot.folder, text_query("green"), "audio")
    assert {match.sample.key for match in found.matches} == {"000000", "000002", "000004", "000007", "000009"}
    assert len(found.matches) == found.compared == 5 and found.stored == 4


def test_nothing_to_compare_is_said(make_snapshot: MakeSnapshot) -> None:
    folder = make_snapshot([{**sample("red", "at"), "flac": b"fLaC"}]).folder
    with pytest.raises(DataError, match="none of 1 samples has a readable audio"):
        find(folder, text_query("red"), "audio")


@pytest.mark.parametrize("text", ["", "  \n "])
def test_empty_queries_are_refused(text: str) -> None:
    with pytest.raises(SettingError, match="query: .*a text with a word"):
        text_query(text)


def test_broken_query_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="query_file"):
        file_query(str(tmp_path / "nothing.jpg"))
    (tmp_path / "page.jpg").write_text("<html>")
    with pytest.raises(SettingError, match="first bytes are of neither"):
        file_query(str(tmp_path / "page.jpg"))
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(SettingError, match="first bytes are of neither"):
        file_query(str(tmp_path / "empty"))
    for start in (sound("red")[:60], image((1, 2, 3))[:40]):
        (tmp_path / "cut").write_bytes(start)
        with pytest.raises(SettingError, match="cannot be decoded"):
            query_features(ModelEmbedder(Mixed()), file_query(str(tmp_path / "cut")))


def test_the_words_that_a_model_reads_are_counted(clip: Clip) -> None:
    words = [f"w{number}" for number in range(100)]
    read = words_read(clip.tokenizer, " ".join(words))
    assert read is not None and 5 < read < 76
    tokens = [clip.tokenizer([" ".join(words[:count])]) for count in (read - 1, read, 100)]
    assert not torch.equal(tokens[0], tokens[2]) and torch.equal(tokens[1], tokens[2])
    assert words_read(clip.tokenizer, "a red star") is None and words_read(clip.tokenizer, "star") is None


def test_scores_of_missing_features_are_not_numbers() -> None:
    rows = np.array([[0.6, 0.8], [np.nan, np.nan]], np.float16)
    np.testing.assert_allclose(scores_of(rows, np.array([1, 0], np.float32)), [0.6, np.nan], atol=1e-3)


class Page(HTMLParser):
    """The tags of a page, and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def sources(self, tag: str) -> list[str]:
        return [attributes["src"] or "" for name, attributes in self.tags if name == tag]


def test_the_page_plays_sounds_and_escapes_captions(make_snapshot: MakeSnapshot, tmp_path: Path) -> None:
    hostile = '</li><script>alert(1)</script> "onload=x \u202e\x00 ' + "long " * 200
    made = [
        sample("red", caption=hostile),
        sample("green", "a"),
        {**sample("blue"), "png": b"\x89PNG\r\n\x1a\n broken"},
    ]
    made[1]["flac"] = encoded(tone(16_000, 3.0, 880.0), 16_000)
    (tmp_path / "query").write_bytes(image(COLOURS["red"]))
    query = file_query(str(tmp_path / "query"))
    found = find(make_snapshot(made).folder, query, "audio", model=SoundAndColourModel())
    text = search_page(query, found, facts_of("s3://key:secret@bucket/<data>", "run", 7), seconds=1.0)
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "a", "form")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text and "\u202e" not in page.text and "\x00" not in page.text
    assert "secret" not in text and "the first 7 words" in page.text
    assert "image: not readable" in page.text and "no caption" in page.text
    sources = [*page.sources("img"), *page.sources("audio")]
    assert all(source.startswith("data:") for source in sources)
    assert len(page.sources("audio")) == 3 and len(page.sources("img")) == 1 + 3 + 1  # query, spectrograms, red's image
    assert re.search(r"default-src 'none'.*media-src data:", text)
    second = [match.sample.key for match in found.matches].index("000001")
    flac = _body(page.sources("audio")[second])
    played = read_waveform(flac, seconds=9)
    assert played.samples.shape == (1, 16_000) and read_header(flac).kind == "flac"  # one second of three
    np.testing.assert_array_equal(played.samples, read_waveform(made[1]["flac"], seconds=1).samples)
    table = matches_table(found.matches)
    assert len(table.splitlines()) == 4 and max(map(len, table.splitlines())) < 90


def _body(source: str) -> bytes:
    import base64

    return base64.b64decode(source.partition(",")[2])


def test_a_spectrogram_shows_the_pitch() -> None:
    """The brightest row is that of the tone on the mel scale, counted from below."""
    for rate, hertz in ((16_000, 440.0), (16_000, 5_000.0), (48_000, 1_000.0), (8_000, 100.0)):
        sounding = sound_of(Sample("s", {"wav": encoded(tone(rate, 1.0, hertz), rate, "WAV")}))
        drawn = spectrogram(sounding)
        assert drawn.dtype == torch.uint8 and drawn.shape[:2] == (3, 96) and 90 < drawn.shape[2] <= 102

        def mel(frequency: float) -> float:
            return 2595 * float(np.log10(1 + frequency / 700))

        row = 95 - int(drawn.sum(dim=0).float().mean(dim=1).argmax())
        assert abs(row + 1 - 97 * mel(hertz) / mel(rate / 2)) <= 1


@pytest.mark.parametrize(("rate", "count"), [(8_000, 1), (1_000, 900), (48_000, 48_000 * 30)])
def test_every_sound_has_a_spectrogram(rate: int, count: int) -> None:
    samples = np.zeros((1, count), np.float32)
    header = read_header(encoded(np.zeros(9, np.float32), rate, "WAV"))
    silent = spectrogram(Waveform(samples, rate, header, 0.0))
    assert silent.shape[2] <= 481 and bool((silent == silent[:, :1, :1]).all())
    samples[0, count // 2] = 0.5
    click = spectrogram(Waveform(samples, rate, header, 0.0))
    assert click.shape == silent.shape and click.float().std() > 0
