"""Tasks on sounds and on samples with several media, against brute force, definitions and a perfect model."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import DataError, SettingError
from pipeline.evaluation.media import PartsReader, encoded_media, medium_reader
from pipeline.evaluation.retrieval import retrieval
from pipeline.evaluation.showcase import model_figures, model_files
from pipeline.evaluation.suite import Evaluations, evaluate
from pipeline.evaluation.tagging import tagging_metrics
from pipeline.loaders.readers import CaptionsReader
from pipeline.loaders.samples import UnreadableSample
from pipeline.models.audioclip import Audioclip
from pipeline.models.clap import Clap
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Snapshot
from pipeline.shards.waveforms import read_waveform
from tests.evaluation.conftest import COLOURS, ColourModel
from tests.evaluation.sounds_and_colours import SoundAndColourModel, sample, sound

MakeSnapshot = Callable[..., Snapshot]
CLASSES = list(COLOURS)


@pytest.fixture
def model() -> SoundAndColourModel:
    return SoundAndColourModel()


@pytest.fixture
def classes_file(tmp_path: Any) -> str:
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    return str(tmp_path / "classes.txt")


def run(model: object, **sets: Any) -> dict[str, float]:
    return evaluate(model, Evaluations(**sets, evaluation_batch=4, evaluation_threads=2).prepare())


def test_a_model_says_what_it_encodes(model: SoundAndColourModel) -> None:
    assert encoded_media(model) == ("image", "audio", "text")
    assert encoded_media(ColourModel()) == ("image", "text")
    model.encodes = ("text", "audio")  # type: ignore[attr-defined]
    assert encoded_media(model) == ("audio", "text")

    class Unread(ColourModel):
        def encode_audio(self, audio: Tensor) -> Tensor:
            return audio

    with pytest.raises(SettingError, match="audio_reader"):
        medium_reader(Unread(), "audio")


def test_methods_with_sounds_are_evaluated_on_what_they_were_trained_for(
    make_snapshot: MakeSnapshot, classes_file: str
) -> None:
    tiny = Audioclip.smallest()
    tri_modal = Audioclip(tiny).eval()
    tags = Audioclip(replace(tiny, modalities=("audio",), class_names=tuple(CLASSES))).eval()
    assert encoded_media(tri_modal) == ("image", "audio", "text")
    assert encoded_media(Audioclip(replace(tiny, modalities=("audio", "text")))) == ("audio", "text")
    assert encoded_media(Clap(Clap.smallest())) == ("audio", "text")
    assert encoded_media(tags) == ("audio",)

    folder = make_snapshot([sample(colour, tags=[colour]) for colour in CLASSES]).folder
    found = run(tri_modal, retrieval=(folder,), zero_shot=(f"{folder},medium=audio",), classes=classes_file)
    assert {"retrieval/shards/a2i_r1", "retrieval/shards/i2t_r1", "zeroshot/shards/top1"} <= set(found)
    scores = run(tags, tagging=(f"it={folder},labels=tags",), tagging_classes=classes_file)
    reader = medium_reader(tags, "audio")
    with torch.no_grad():
        inputs = reader.collate([reader.read(Sample("s", {"flac": sound(colour)}), None) for colour in CLASSES])
        logits = tags.tag_audio(inputs["audio"])
    assert scores["tagging/it/map"] == pytest.approx(tagging_metrics(logits.numpy(), np.eye(3, dtype=bool))["map"])
    with pytest.raises(SettingError, match="checkpoint"):
        run(tags, zero_shot=(folder,), classes=classes_file)


# Zero-shot


def test_sounds_are_classified_by_their_names(
    model: SoundAndColourModel, make_snapshot: MakeSnapshot, classes_file: str
) -> None:
    """Where image and sound differ, the option decides which of them is classified."""
    rows = [sample(colour, heard=heard) for colour, heard in itertools.product(CLASSES, CLASSES)]
    folder = make_snapshot(rows).folder
    found = run(
        model,
        zero_shot=(f"auto={folder}", f"images={folder},medium=image", f"sounds={folder},medium=audio"),
        classes=classes_file,
    )
    assert found["zeroshot/auto/top1"] == found["zeroshot/images/top1"] == 1
    assert found["zeroshot/sounds/top1"] == pytest.approx(1 / 3)  # each colour was heard once with each label
    assert found["zeroshot/sounds/samples"] == 9


def test_data_of_sounds_alone_need_no_option(
    model: SoundAndColourModel, make_snapshot: MakeSnapshot, classes_file: str
) -> None:
    broken = {**sample("red", "a"), "flac": b"fLaC broken"}
    folder = make_snapshot([*[sample(colour, "a") for colour in CLASSES], broken]).folder
    found = run(model, zero_shot=(f"it={folder}",), classes=classes_file)
    assert found["zeroshot/it/top1"] == 1 and found["zeroshot/it/samples"] == 3


def test_the_mean_of_folds_weighs_folds_alike(
    model: SoundAndColourModel, make_snapshot: MakeSnapshot, classes_file: str
) -> None:
    """Fold 2 has one sample, which is wrong; fold 10 has four, of which one is wrong: 0.375, not 3 / 5."""
    rows = [sample(colour, "a", fold=10) for colour in ("red", "green", "blue")]
    rows += [sample("red", "a", heard="blue", fold=10), sample("green", "a", heard="red", fold=2)]
    folder = make_snapshot(rows).folder
    sets = (f"mean={folder},fold=fold", f"one={folder},fold=fold,folds=10", f"plain={folder}")
    found = run(model, zero_shot=sets, classes=classes_file)
    assert found["zeroshot/mean/top1"] == pytest.approx(0.375) and found["zeroshot/mean/folds"] == 2
    assert [name for name in found if name.startswith("zeroshot/mean/top1/")] == [
        "zeroshot/mean/top1/2",
        "zeroshot/mean/top1/10",
    ]
    assert found["zeroshot/one/top1"] == found["zeroshot/mean/top1/10"] == 0.75
    assert found["zeroshot/one/samples"] == 4 and found["zeroshot/plain/top1"] == 0.6
    with pytest.raises(DataError, match="folds 3; the samples have: 2, 10"):
        run(model, zero_shot=(f"none={folder},fold=fold,folds=3",), classes=classes_file)
    with pytest.raises(DataError, match="'nowhere'"):
        run(model, zero_shot=(f"none={folder},fold=nowhere",), classes=classes_file)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("medium=smell", "medium: got 'smell'"),
        ("medium=image", "the samples have: audio"),
        ("folds=1", "folds: got '1'.*fold=KEY"),
    ],
)
def test_wrong_media_and_folds_are_settings(
    model: SoundAndColourModel, make_snapshot: MakeSnapshot, classes_file: str, options: str, sentence: str
) -> None:
    folder = make_snapshot([sample("red", "at")]).folder
    with pytest.raises(SettingError, match=sentence):
        run(model, zero_shot=(f"it={folder},{options}",), classes=classes_file)


def test_a_model_of_images_does_not_hear(make_snapshot: MakeSnapshot, classes_file: str) -> None:
    folder = make_snapshot([sample("red", "at")]).folder
    with pytest.raises(SettingError, match="a medium of the model: image"):
        run(ColourModel(), zero_shot=(f"it={folder},medium=audio",), classes=classes_file)


# Retrieval


def ranks_by_loops(scores: Tensor, right: list[set[int]]) -> list[int]:
    """The place of the best right entry for each query, wrong ones before it at equal scores."""
    found = []
    for row, entries in zip(scores.tolist(), right, strict=True):
        order = sorted(range(len(row)), key=lambda entry: (-row[entry], entry in entries))
        found.append(next(place for place, entry in enumerate(order, 1) if entry in entries))
    return found


class Table:
    """A model whose features are given: an input is the number of its row."""

    def __init__(self, **tables: Tensor) -> None:
        self.tables = {name: torch.nn.functional.normalize(table, dim=-1) for name, table in tables.items()}

    def encode_image(self, rows: Tensor) -> Tensor:
        return self.tables["image"][rows]

    def encode_audio(self, rows: Tensor) -> Tensor:
        return self.tables["audio"][rows]

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.tables["text"][tokens[:, 0]]


def test_six_directions_are_those_of_loops() -> None:
    """30 samples that lack media in all ways, two captions for some, one caption shared by two samples."""
    random = torch.Generator().manual_seed(0)
    count = 30
    has = {
        "image": [n for n in range(count) if n % 5],
        "audio": [n for n in range(count) if n % 4],
        "text": [n for n in range(count) if n % 3],
    }
    captions = [(n, n) for n in has["text"]] + [(1, 30), (7, 31), (7, 32), (2, 4)]  # sample 2 shares caption 4
    model = Table(**{name: torch.randn(33, 8, generator=random) for name in has})
    batches = []
    for start in range(0, count, 7):
        inside = range(start, min(start + 7, count))
        batch: dict[str, Any] = {"samples": len(inside)}
        for name in ("image", "audio"):
            rows = [n for n in has[name] if n in inside]
            batch |= {name: torch.tensor(rows), f"{name}_rows": torch.tensor(rows) - start}
        here = [(owner, text) for owner, text in captions if owner in inside]
        batch["text"] = torch.tensor([[text] for _, text in here])
        batch["text_rows"] = torch.tensor([owner - start for owner, _ in here])
        batches.append(batch)
    found = retrieval(model, batches, media=("image", "audio", "text"))

    links = {name: {(n, n) for n in has[name]} for name in ("image", "audio")} | {"text": set(captions)}
    chances = []
    for one, other in itertools.permutations(links, 2):
        pairs = {(a, b) for owner, a in links[one] for other_owner, b in links[other] if owner == other_owner}
        queries, gallery = sorted({a for a, _ in pairs}), sorted({b for _, b in pairs})
        scores = model.tables[one][queries] @ model.tables[other][gallery].T
        right = [{gallery.index(b) for a, b in pairs if a == query} for query in queries]
        ranks = np.array(ranks_by_loops(scores, right))
        way = f"{one[0]}2{other[0]}"
        for depth in (1, 5, 10):
            assert found[f"{way}_r{depth}"] == pytest.approx((ranks <= depth).mean()), way
        assert found[f"{way}_median_rank"] == np.median(ranks)
        assert found[f"{way}_mean_rank"] == pytest.approx(ranks.mean())
        chances.append(len(pairs) / len(queries) / len(gallery))
    assert found["chance"] == pytest.approx(np.mean(chances)) and found["samples"] == count
    assert len(found) == 6 * 5 + 2


def test_a_perfect_model_finds_every_medium_by_every_other_one(
    model: SoundAndColourModel, make_snapshot: MakeSnapshot
) -> None:
    rows = [sample("red"), sample("green", "ia"), sample("blue", "at"), sample("green", "it"), sample("red", "a")]
    folder = make_snapshot(rows).folder
    sets = (f"all={folder}", f"heard={folder},media=text+audio", f"seen={folder},media=image+text")
    found = run(model, retrieval=sets)
    ways = {name.split("/")[2] for name in found if name.startswith("retrieval/all/") and name.endswith("_r1")}
    assert ways == {"i2a_r1", "a2i_r1", "i2t_r1", "t2i_r1", "a2t_r1", "t2a_r1"}
    assert all(found[f"retrieval/all/{way}"] == 1 for way in ways)
    assert found["retrieval/all/samples"] == 4  # the fifth has nothing to be compared with
    assert found["retrieval/heard/samples"] == 2 and "retrieval/heard/i2t_r1" not in found
    assert found["retrieval/seen/i2t_r1"] == 1 and found["retrieval/seen/chance"] == 1 / 2


def test_all_captions_of_a_sound_are_right(model: SoundAndColourModel, make_snapshot: MakeSnapshot) -> None:
    several = {"captions": ["a red one", "something red"]}
    rows = [sample("red", "at", **several), sample("green", "at"), sample("blue", "at")]
    found = run(model, retrieval=(f"it={make_snapshot(rows).folder}",))
    assert found["retrieval/it/a2t_r1"] == found["retrieval/it/t2a_r1"] == 1
    assert found["retrieval/it/chance"] == pytest.approx(4 / (3 * 4))


@pytest.mark.parametrize(
    ("media", "sentence"),
    [("audio", "two or more"), ("audio+smell", "two or more of image"), ("image+audio", "the samples have: audio")],
)
def test_wrong_media_to_compare_are_settings(
    model: SoundAndColourModel, make_snapshot: MakeSnapshot, media: str, sentence: str
) -> None:
    folder = make_snapshot([sample("red", "at")]).folder
    with pytest.raises(SettingError, match=sentence):
        run(model, retrieval=(f"it={folder},media={media}",))


def test_samples_keep_the_media_that_they_have() -> None:
    model = SoundAndColourModel()
    readers = {name: medium_reader(model, name) for name in ("image", "audio")}
    reader = PartsReader(readers=readers, captions=CaptionsReader(tokenizer=model.tokenizer))
    rows = [reader.read(Sample("s", sample(colour, media))) for colour, media in (("red", "ia"), ("green", "at"))]
    batch = reader.collate(rows)
    assert batch["image_rows"].tolist() == [0] and batch["audio_rows"].tolist() == [0, 1]
    assert batch["text_rows"].tolist() == [1] and batch["samples"] == 2 and batch["audio"].shape == (2, 1, 8000)
    with pytest.raises(UnreadableSample, match="s has audio of the compared media: s has no .txt"):
        reader.read(Sample("s", sample("red", "a")))


# Tagging


def average_precision(scores: list[float], truth: list[bool]) -> float:
    """The definition for distinct scores: the mean over right entries of the precision at their place."""
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    hits, total = 0, 0.0
    for place, entry in enumerate(order, 1):
        if truth[entry]:
            hits += 1
            total += hits / place
    return total / hits


def auc(scores: list[float], truth: list[bool]) -> float:
    """The part of pairs of a right and a wrong entry that are in order."""
    pairs = [(a, b) for a, right in zip(scores, truth, strict=True) if right for b in scores_of_wrong(scores, truth)]
    return sum(a > b for a, b in pairs) / len(pairs)


def scores_of_wrong(scores: list[float], truth: list[bool]) -> list[float]:
    return [score for score, right in zip(scores, truth, strict=True) if not right]


def test_mean_average_precision_is_that_of_its_definition() -> None:
    random = np.random.default_rng(0)
    scores, truth = random.normal(size=(40, 6)).astype(np.float32), random.random((40, 6)) < 0.2
    truth[:, 4] = False  # does not occur
    truth[:, 5] = True  # has no wrong entry
    found = tagging_metrics(scores, truth)
    used = [0, 1, 2, 3, 5]
    precisions = [average_precision(scores[:, n].tolist(), truth[:, n].tolist()) for n in used]
    assert found["map"] == pytest.approx(np.mean(precisions)) and found["classes"] == 5
    assert found["mauc"] == pytest.approx(np.mean([auc(scores[:, n].tolist(), truth[:, n].tolist()) for n in used[:4]]))
    assert tagging_metrics(np.zeros((40, 6), np.float32), truth)["map"] == pytest.approx(found["chance"])
    assert tagging_metrics(np.where(truth, np.nan, scores), truth)["map"] == pytest.approx(found["chance"])  # all last
    with pytest.raises(DataError, match="none of 40 samples"):
        tagging_metrics(scores, np.zeros_like(truth))


def test_sounds_with_several_classes(
    model: SoundAndColourModel, make_snapshot: MakeSnapshot, classes_file: str
) -> None:
    """Labels as lists, texts and numbers; the sound of the last one is another one's."""
    rows = [
        sample("red", "a", tags=["red"]),
        sample("green", "a", tags="Green; "),
        sample("blue", "a", tags=[2]),
        sample("red", "a", tags=[]),
        sample("green", "a", tags=["blue"]),
    ]
    found = run(model, tagging=(f"it={make_snapshot(rows).folder},labels=tags",), tagging_classes=classes_file)
    # Red: its sound and the fourth one tie, green: likewise the fifth; blue: right, then one of four that tie.
    assert found["tagging/it/map"] == pytest.approx((1 / 2 + 1 / 2 + (1 + 2 / 5) / 2) / 3)
    assert found["tagging/it/samples"] == 5 and found["tagging/it/classes"] == 3


def test_a_head_of_its_own_scores_its_classes(make_snapshot: MakeSnapshot, classes_file: str) -> None:
    class Head(SoundAndColourModel):
        classes = ("blue", "noise", "red", "green")

        def tag_audio(self, audio: Tensor) -> Tensor:
            features = self.encode_audio(audio)
            return torch.stack([features[:, 2], -features[:, 0], features[:, 0], features[:, 1]], dim=1)

        def encode_text(self, text: Tensor) -> Tensor:
            raise AssertionError("prompts are not used")

    folder = make_snapshot([sample(colour, "a", tags=[colour]) for colour in CLASSES]).folder
    settings = {"tagging": (f"it={folder},labels=tags",)}
    assert run(Head(), **settings, tagging_classes=classes_file)["tagging/it/map"] == 1
    Head.classes = ("blue", "noise", "red", "yellow")
    with pytest.raises(SettingError, match=r"\['green'\]"):
        run(Head(), **settings, tagging_classes=classes_file)


@pytest.mark.parametrize("tags", ["pink", ["red", "pink"], [3], [True], 1, None])
def test_unknown_tags_are_named(
    model: SoundAndColourModel, make_snapshot: MakeSnapshot, classes_file: str, tags: Any
) -> None:
    folder = make_snapshot([sample("red", "a", tags=tags)]).folder
    with pytest.raises(DataError, match="'tags'"):
        run(model, tagging=(f"it={folder},labels=tags",), tagging_classes=classes_file)


# Figures and files


def test_sounds_are_shown_and_played(
    model: SoundAndColourModel, make_snapshot: MakeSnapshot, classes_file: str
) -> None:
    rows = [sample("red", "at"), sample("green", "at", heard="blue"), sample("blue", "at", caption="<b>$x$ b/lue")]
    folder = make_snapshot(rows).folder
    prepared = Evaluations(zero_shot=(f"it={folder}",), retrieval=(f"it={folder}",), classes=classes_file).prepare()
    figures = model_figures(model, prepared, "at step 3")
    assert set(figures) == {"sounds/it", "similarity_audio/it", "examples_audio/it"}
    grid = figures["sounds/it"]
    texts = [axis.get_xlabel() for axis in grid.axes[:3]]
    assert [text.split(" (")[0] for text in texts] == ["red, found red", "green, found blue", "blue, found blue"]
    files = model_files(model, prepared)
    assert {name.rpartition("/")[0] for name in files} == {"zeroshot/it", "retrieval/it"} and len(files) == 6
    assert "retrieval/it/02_b_x_b_lue.flac" in files
    wrong = next(content for name, content in files.items() if "green_found_blue" in name)
    heard, stored = read_waveform(wrong, seconds=9), read_waveform(sound("blue"), seconds=9)
    np.testing.assert_array_equal(heard.samples, stored.samples)
    assert json.loads(rows[1]["json"])["label"] == "green"
