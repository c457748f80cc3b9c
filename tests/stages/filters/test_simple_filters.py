"""Filters that judge a sample by itself, against cases made by hand and the papers' bounds."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import DataError, SettingError
from pipeline.shards.adopt import find_shards
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.tar import TarWriter
from pipeline.stages.filters.captions import clean_text
from pipeline.stages.filters.classifier import ClassifierFilter
from pipeline.stages.filters.filter import Filter, Step
from pipeline.stages.filters.language import Language, identify
from pipeline.stages.filters.length import Length
from pipeline.stages.filters.options import Filters
from pipeline.stages.filters.repetition import Repetition, is_repetitive
from pipeline.stages.filters.run import filter_snapshot, read_reasons
from pipeline.stages.filters.size import Size
from pipeline.stages.filters.text import Text
from pipeline.stages.filters.values import Values
from pipeline.stages.filters.view import ShardView
from pipeline.stages.shard_tasks import Workers

HERE = Workers(processes_count=0)


def reasons(snapshot: Snapshot, *filters: Filter) -> list[str]:
    """Each sample's reason, "" where it stays; always with a shard that loses nothing."""
    outcome = filter_snapshot(snapshot, filters, HERE)
    if outcome.snapshot.id == snapshot.id:
        return [""] * snapshot.samples
    return [reason for _, table in read_reasons(outcome.snapshot) for reason in table["reason"].to_pylist()]


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("plain", "plain"),
        ("  two\n\tlines  ", "two lines"),
        ("schÃ¶n", "schön"),  # UTF-8 read as Latin-1
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("ﬁve ＬＡＴＩＮ", "five LATIN"),
        ("\u200b", "\u200b"),
        ("a\x00b", "ab"),
        ("", ""),
    ],
)
def test_captions_are_mended(text, cleaned):
    assert clean_text(text) == cleaned


@pytest.mark.parametrize("table", [True, False])
def test_samples_are_chosen_by_the_values_of_a_column(table, make_data: Any):
    columns = {"fold": [1, 2, 3, 2, None, 1], "tags": [["a", "b"], ["b"], [], ["c"], None, ["a"]]}
    data = make_data(list("uvwxyz"), columns=columns, table=table)

    def kept(**options: Any) -> str:
        found = reasons(data, Values(**options))
        assert set(found) <= {"", "values.other_value"}
        return "".join(letter for letter, reason in zip("uvwxyz", found, strict=True) if not reason)

    assert kept(values_column="fold", values_keep=("1", "3")) == "uwz"
    assert kept(values_column="fold", values_drop=("2",)) == "uwyz"
    assert kept(values_column="tags", values_keep=("b", "c")) == "uvx"
    assert kept(values_column="tags", values_keep=("b", "a"), values_drop=("a",)) == "v"
    with pytest.raises(DataError, match="no_column"):
        kept(values_column="no_column", values_keep=("1",))
    for wrong in ({"values_column": "fold"}, {"values_keep": ("1",)}):
        with pytest.raises(SettingError, match="values_"):
            kept(**wrong)


def test_empty_captions_go(make_data: Any):
    assert reasons(make_data(["a", " \n", ""]), Text()) == ["", "text.no_text", "text.no_text"]


def test_length_has_datacomps_bounds(make_data: Any):
    captions = ["one two", "a b c", "a b cc", "three whole words", "w " * 9]
    found = reasons(make_data(captions), Length(max_words=8))
    assert found == ["length.few_words", "length.few_characters", "", "", "length.many_words"]


def test_language_tells_clear_sentences_apart(make_data: Any):
    captions = [
        "a photograph of a small dog running along the beach",
        "ein kleiner Hund läuft am Strand entlang und freut sich",
        "un petit chien court le long de la plage en été",
    ]
    assert [identify(text)[0] for text in captions] == ["en", "de", "fr"]
    assert reasons(make_data(captions), Language(languages=("en", "fr"))) == ["", "language.language", ""]


def test_language_can_ask_for_certainty(make_data: Any):
    captions = ["a photograph of a small dog running along the beach", "zz top"]
    sure = [identify(text)[1] for text in captions]
    assert sure[0] > 0.9 > sure[1]
    found = reasons(
        make_data(captions), Language(languages=("en", identify("zz top")[0]), min_language_probability=0.9)
    )
    assert found == ["", "language.language_unsure"]


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("a red car on a street", False),
        ("a red car and a red house", False),  # twice is no repetition
        ("buy now buy now buy now", True),
        ("Buy now, buy Now, BUY now,", True),
        ("red red red red", True),
        ("the more the merrier the better", False),
        ("one two three four five six one two three four five six", True),
        ("", False),
        ("word", False),
    ],
)
def test_repetition(text, repeats):
    assert is_repetitive(text) is repeats


def test_gophers_share_counts_characters():
    # The 2-gram "aa bb" three times holds 12 characters; the share falls from above to below 20 % with the filling.
    filling = [f"w{number:03d}" for number in range(40)]
    assert is_repetitive(" ".join(["aa bb", *filling[:4], "aa bb", *filling[4:8], "aa bb", *filling[8:11]]))
    assert not is_repetitive(" ".join(["aa bb", *filling[:4], "aa bb", *filling[4:8], "aa bb", *filling[8:13]]))


def test_size_uses_what_was_downloaded(make_data: Any):
    columns = {
        "width": [64] * 5,
        "height": [64] * 5,
        "original_width": [200, 199, 600, 601, None],
        "original_height": [200, 500, 200, 200, None],
    }
    snapshot = make_data(["a"] * 5, columns=columns)
    assert reasons(snapshot, Size()) == ["", "size.small", "", "size.aspect", "size.small"]
    assert reasons(snapshot, Size(stored_size=True, min_side=64)) == [""] * 5


def test_size_of_a_shard_without_parquet_is_read_from_the_images(make_data: Any):
    images = [
        make_data.photograph(0, 200, 200),
        make_data.photograph(1, 100, 300),
        b"no image",
        make_data.photograph(2, 700, 210),
    ]
    found = reasons(make_data(["a"] * 4, images, table=False), Size())
    assert found == ["", "size.small", "size.small", "size.aspect"]


def test_a_view_reads_the_same_from_parquet_and_tar(make_data: Any, tmp_path):
    columns = {"number": [5, 6, 7], "width": [10, 11, 12], "height": [20, 21, 22]}
    captions = ["a", "ä &amp; b", "c"]
    views = []
    for table in (True, False):
        snapshot = make_data(captions, columns=columns, table=table, place=tmp_path / str(table))
        views.append(ShardView(Folder(snapshot.folder), snapshot.shards[0]))
    for view in views:
        assert view.captions() == ["a", "ä & b", "c"] and view.captions(cleaned=False) == captions
        assert view.sizes().tolist() == [[10, 20], [11, 21], [12, 22]]
        assert [int(value) for value in view.column("number")] == [5, 6, 7]
        some = view.narrowed(np.array([True, False, True]))
        assert some.captions() == ["a", "c"] and some.positions.tolist() == [0, 2]
        assert list(some.images()) == [make_data.photograph(0), make_data.photograph(2)]
        with pytest.raises(DataError, match="no column 'colour'; it has"):
            view.column("colour")
    assert views[0].keys() == views[1].keys() and views[0].digests() == views[1].digests()


def brightness(images: list[bytes]) -> list[float]:
    """A tiny classifier of images."""
    return [float(len(image)) for image in images]


def first_coordinate(embeddings: np.ndarray) -> np.ndarray:
    """A tiny classifier of embeddings."""
    assert embeddings.dtype == np.float32
    return embeddings[:, 0]


def two_for_one(embeddings: np.ndarray) -> np.ndarray:
    """A classifier that forgets its last layer."""
    return embeddings


def test_a_classifier_of_embeddings(make_data: Any):
    snapshot = make_data(["a"] * 5)
    rows = np.array([[1.0, 0], [0.6, 0.8], [-1, 0], [0, 1], [0.8, 0.6]])
    make_data.add_embeddings(snapshot, rows, skip={4})
    chosen = ClassifierFilter(classifier=f"{__name__}:first_coordinate", min_classifier_score=0.5)
    found = reasons(snapshot, chosen)
    assert found == ["", "", "classifier.classifier", "classifier.classifier", "classifier.no_embedding"]


def test_a_classifier_of_images(make_data: Any):
    sizes = [(96, 64), (400, 400)]
    images = [make_data.photograph(number, *size) for number, size in enumerate(sizes)]
    limit = (len(images[0]) + len(images[1])) / 2
    small = ClassifierFilter(classifier=f"{__name__}:brightness", classifier_input="images", max_classifier_score=limit)
    assert reasons(make_data(["a", "b"], images), small) == ["", "classifier.classifier"]


def test_a_classifier_that_gives_something_else_is_named(make_data: Any):
    snapshot = make_data(["a"] * 3)
    make_data.add_embeddings(snapshot, np.eye(3))
    wrong = ClassifierFilter(classifier=f"{__name__}:two_for_one", min_classifier_score=0.5)
    with pytest.raises(DataError, match="two_for_one gave scores of shape"):
        filter_snapshot(snapshot, [wrong], HERE)


@pytest.mark.parametrize(
    ("made", "field"),
    [
        (Length(min_words=-1), "min_words"),
        (Language(languages=("en", "xx")), "languages"),
        (Language(min_language_probability=2), "min_language_probability"),
        (Repetition(min_repeats=1), "min_repeats"),
        (Size(max_aspect=0.5), "max_aspect"),
        (ClassifierFilter(classifier="no.such:thing", min_classifier_score=0), "classifier"),
        (ClassifierFilter(classifier="math:pi", min_classifier_score=0), "classifier"),
        (ClassifierFilter(classifier="math:fsum"), "min_classifier_score"),
    ],
)
def test_bad_options_are_named(made, field, make_data: Any):
    with pytest.raises(SettingError, match=f"^{field}:"):
        filter_snapshot(make_data(["a"]), [made], HERE)


def test_unknown_steps_are_named():
    with pytest.raises(SettingError, match="steps: got 'sise'.*text, length"):
        Filters(steps=("sise",)).chosen()


def test_a_step_pickles(make_data: Any):
    snapshot = make_data(["a"])
    step = Step(Folder(snapshot.folder), snapshot.shards, Folder(snapshot.folder), None, HERE)
    assert pickle.loads(pickle.dumps(step)).shards == step.shards


def test_columns_of_plain_tars_are_the_union_of_all_samples(make_data: Any, tmp_path: Path) -> None:
    image = make_data.photograph(1)
    samples = [
        {"jpg": image},
        {"jpg": image, "txt": "\ufeffone".encode(), "json": b'{"width": "n/a", "score": 0.5, "tags": ["x"], "n": 1}'},
        {"jpg": image, "json": b'{"caption": ["two"], "score": 1, "sha256": "zz", "n": "x", "width": 7, "height": 8}'},
        {"jpg": image, "json": b"[" * 100_000},
    ]
    with open(tmp_path / "00000.tar", "wb") as file:
        writer = TarWriter(file)
        for number, fields in enumerate(samples):
            writer.write(Sample(str(number), fields))
        writer.close()
    adoption = find_shards(Folder(tmp_path))
    snapshot = adoption.publish([adoption.read_tar(0)], None, False)
    view = ShardView(Folder(tmp_path), snapshot.shards[0])
    assert view.captions(cleaned=False) == ["", "one", "two", ""]
    assert view.column("score") == [None, 0.5, 1.0, None] and view.column("n") == [None, "1", "x", None]
    assert view.column("tags") == [None, ["x"], None, None]
    assert view.sizes().tolist() == [[96, 64], [96, 64], [7, 8], [96, 64]]
    assert view.digests() == [hashlib.sha256(image).digest()] * 4
