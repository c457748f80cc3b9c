"""Sets by name: found, read and run; hostile labels, files and cards are named in one sentence."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from pipeline.dataset import load_card
from pipeline.errors import DataError, SettingError, SnapshotError
from pipeline.evaluation.classes import read_classes, read_templates
from pipeline.evaluation.suite import Evaluations, evaluate
from pipeline.shards.snapshot import Snapshot

MakeSnapshot = Callable[..., Snapshot]
MakeRow = Callable[..., dict[str, bytes]]
NAMES = ["red", "green", "blue"]


@pytest.fixture
def rows(row: MakeRow) -> list[dict[str, bytes]]:
    """Nine samples in three colours."""
    return [row(NAMES[number % 3], f"a {NAMES[number % 3]} image {'x' * number}") for number in range(9)]


def test_a_card_is_read_straight_from_its_source(colour_model: Any, colour_card: Callable[..., str]) -> None:
    card = colour_card()
    found = evaluate(colour_model, Evaluations(zero_shot=(card,), retrieval=(card,), evaluation_batch=4).prepare())
    assert found["zeroshot/colours/top1"] == found["zeroshot/colours/mean_per_class"] == 1
    assert found["zeroshot/colours/chance"] == pytest.approx(1 / 3)
    assert found["zeroshot/colours/samples"] == found["retrieval/colours/samples"] == 6
    assert found["retrieval/colours/i2t_r5"] == 1
    assert set(found) >= {f"retrieval/colours/{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}


def test_a_snapshot_gives_what_its_card_would(
    colour_model: Any, rows: list[dict[str, bytes]], colour_card: Callable[..., str], make_snapshot: MakeSnapshot
) -> None:
    snapshot = make_snapshot(rows, name="val")
    names = Path(snapshot.folder).parent / "names.txt"
    names.write_text("\n".join(NAMES))
    found = evaluate(colour_model, Evaluations(zero_shot=(snapshot.uri,), classes=str(names)).prepare())
    assert found["zeroshot/val/top1"] == 1 and found["zeroshot/val/samples"] == 9


def test_several_captions_come_from_the_json(row: MakeRow, colour_model: Any, make_snapshot: MakeSnapshot) -> None:
    rows = [row(name, captions=[f"a {name} one", f"the {name}", ""]) for name in NAMES]
    found = evaluate(colour_model, Evaluations(retrieval=(make_snapshot(rows).folder,)).prepare())
    assert found["retrieval/shards/i2t_r1"] == found["retrieval/shards/t2i_r1"] == 1
    assert found["retrieval/shards/chance"] == pytest.approx(1 / 3)


def test_captions_can_be_named(row: MakeRow, colour_model: Any, make_snapshot: MakeSnapshot) -> None:
    snapshot = make_snapshot(
        [
            row(name, f"a {other} one", title=f"a {name} one")
            for name, other in zip(NAMES, NAMES[1:] + NAMES[:1], strict=False)
        ]
    )
    for caption, right in (("json:title", 1.0), ("txt", 0.0)):
        found = evaluate(colour_model, Evaluations(retrieval=(snapshot.folder,), retrieval_caption=caption).prepare())
        assert found["retrieval/shards/i2t_r1"] == right
    with pytest.raises(SettingError, match="caption"):
        Evaluations(retrieval=(snapshot.folder,), retrieval_caption="title")


def test_class_numbers_are_labels_too(
    row: MakeRow, colour_model: Any, make_snapshot: MakeSnapshot, tmp_path: Path
) -> None:
    names = tmp_path / "names.json"
    names.write_text(json.dumps(NAMES))
    by_json = make_snapshot([row(name, label=place) for place, name in enumerate(NAMES)], name="a")
    by_member = [{**row(name), "cls": str(place).encode()} for place, name in enumerate(NAMES)]
    for snapshot, label in ((by_json, ""), (make_snapshot(by_member, name="b"), "cls")):
        found = evaluate(
            colour_model, Evaluations(zero_shot=(snapshot.folder,), classes=str(names), label=label).prepare()
        )
        assert set(found.values()) >= {1.0} and found[f"zeroshot/{Path(snapshot.folder).name}/top1"] == 1


def test_a_cap_takes_samples_from_everywhere(row: MakeRow, make_snapshot: MakeSnapshot, tmp_path: Path) -> None:
    snapshot = make_snapshot([row(name) for name in NAMES for _ in range(6)])  # sorted by class
    one = Evaluations(retrieval=(f"a={snapshot.uri}",), evaluation_samples=6).prepare().sets[0]
    assert [json.loads(sample.fields["json"])["label"] for sample in one.samples()] == sorted(
        NAMES * 2, key=NAMES.index
    )


def test_a_cap_holds_for_cards_too(colour_card: Callable[..., str]) -> None:
    for cap in (1, 7, 19, 20, 1000):
        one = Evaluations(retrieval=(f"a={colour_card(20)}",), evaluation_samples=cap).prepare().sets[0]
        keys = [sample.key for sample in one.samples()]
        assert len(keys) == len(set(keys)) == min(cap, 20)


def test_unreadable_images_are_left_out_and_counted(
    colour_model: Any,
    rows: list[dict[str, bytes]],
    make_snapshot: MakeSnapshot,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows[2]["png"] = b"<html>no image</html>"
    rows[5]["png"] = rows[5]["png"][:45]
    rows[7]["txt"] = b" \n"
    found = evaluate(colour_model, Evaluations(retrieval=(make_snapshot(rows).folder,)).prepare())
    assert found["retrieval/shards/samples"] == 6
    assert "3 of 9 samples are unreadable" in caplog.text


def test_a_set_without_a_readable_sample_is_an_error(
    row: MakeRow, colour_model: Any, make_snapshot: MakeSnapshot
) -> None:
    snapshot = make_snapshot([row("red", caption="") for _ in range(3)])
    with pytest.raises(DataError, match="none of 3 samples is readable.*no caption"):
        evaluate(colour_model, Evaluations(retrieval=(snapshot.folder,)).prepare())


def test_labels_that_are_no_classes_are_named(
    colour_model: Any, rows: list[dict[str, bytes]], make_snapshot: MakeSnapshot, tmp_path: Path
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("red\nblue\n")
    snapshot = make_snapshot(rows)
    with pytest.raises(DataError, match=r"shards: 'green' in the samples' 'label' is none of the 2 classes.*'blue'"):
        evaluate(colour_model, Evaluations(zero_shot=(snapshot.folder,), classes=str(names)).prepare())


def test_a_missing_label_lists_the_keys(
    colour_model: Any, rows: list[dict[str, bytes]], make_snapshot: MakeSnapshot, tmp_path: Path
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("red\nblue\n")
    snapshot = make_snapshot(rows)
    with pytest.raises(DataError, match="no class under 'colour' in its json; its keys: 'label'"):
        settings = Evaluations(zero_shot=(snapshot.folder,), classes=str(names), label="colour")
        evaluate(colour_model, settings.prepare())


def test_a_damaged_shard_is_an_error(
    colour_model: Any, rows: list[dict[str, bytes]], make_snapshot: MakeSnapshot
) -> None:
    snapshot = make_snapshot(rows)
    tar = Path(snapshot.folder) / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:1500])
    with pytest.raises(DataError, match="00001.tar"):
        evaluate(colour_model, Evaluations(retrieval=(snapshot.folder,)).prepare())


@pytest.mark.parametrize("data", ["drwan", "/nowhere", "s.yaml"])
def test_unknown_sets_are_refused(data: str) -> None:
    with pytest.raises((SettingError, SnapshotError), match=data):
        Evaluations(retrieval=(data,)).prepare()


@pytest.mark.parametrize(
    "source", [{"kind": "urls", "url_list": "list.csv"}, {"kind": "coco", "annotations": "a.json"}]
)
def test_a_card_of_urls_says_what_to_do(source: dict[str, str], colour_card: Callable[..., str]) -> None:
    card = colour_card(source=source)
    with pytest.raises(SettingError, match=r"jobs/refresh_dataset.py card colours --output-folder"):
        Evaluations(retrieval=(card,)).prepare()


def test_a_set_without_classes_is_refused(rows: list[dict[str, bytes]], make_snapshot: MakeSnapshot) -> None:
    snapshot = make_snapshot(rows)
    with pytest.raises(SettingError, match="no card with classes"):
        Evaluations(zero_shot=(snapshot.folder,)).prepare()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation_samples": 0}, "evaluation_samples"),
        ({"evaluation_batch": 0}, "evaluation_batch"),
        ({"evaluation_threads": 0}, "evaluation_threads"),
        ({"retrieval": ("a", "b/a")}, "different names"),
        ({"retrieval": ("a=",)}, "data"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Evaluations(**changes).prepare()


def test_names_of_sets() -> None:
    settings = Evaluations(
        zero_shot=("drawn_shapes", "inet=s3://b/x@00001-a", "s3://b/val@00001-a"), retrieval=("/a/b c/", "x.yaml")
    )
    assert [(one.name, one.data) for one in settings.sets()] == [
        ("drawn_shapes", "drawn_shapes"),
        ("inet", "s3://b/x@00001-a"),
        ("val", "s3://b/val@00001-a"),
        ("b-c", "/a/b c/"),
        ("x", "x.yaml"),
    ]


def test_imagenets_names_and_prompts_are_open_clips() -> None:
    assert read_classes("auto", None, "imagenet") == tuple(open_clip.IMAGENET_CLASSNAMES)
    assert read_classes("imagenet", None, "other") == tuple(open_clip.IMAGENET_CLASSNAMES)
    assert read_classes("drawn_solids", None, "other") == load_card("drawn_solids").classes
    filled = [template.replace("{}", "tench") for template in read_templates("auto", None, "imagenet")]
    assert filled == [template("tench") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert len(read_templates("imagenet-simple", None, "x")) == 7
    assert read_templates("auto", None, "x") == ("a photo of a {}.",)
    assert read_templates("none", None, "x") == ("{}",)


def test_class_numbers_reach_imagenets_last_class(row: MakeRow, make_snapshot: MakeSnapshot, clip: Any) -> None:
    """Two of its 1,000 names occur twice, so the names alone would not number it."""
    snapshot = make_snapshot([row("red", label=999), row("red", label=0)])
    settings = Evaluations(zero_shot=(f"imagenet={snapshot.folder}",), templates="none")
    found = evaluate(clip, settings.prepare())
    assert found["zeroshot/imagenet/chance"] == 1 / 1000 and found["zeroshot/imagenet/samples"] == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "no braces\n", "exactly one {}"),
        ("a.txt", "", "not empty"),
        ("a.json", '{"a": 1}', "list of texts"),
        ("a.yaml", "[", "well-formed"),
        ("missing.txt", None, "no such file"),
        ("a.txt", b"\xff\xfe{}", "imagenet"),
    ],
)
def test_bad_template_files_are_refused(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(SettingError, match=message):
        read_templates(str(path), None, "x")


def test_shared_classes_are_encoded_once(colour_model: Any, colour_card: Callable[..., str]) -> None:
    card = colour_card()
    model = colour_model
    calls = []
    encode = model.encode_text
    model.encode_text = lambda text: (calls.append(len(text)), encode(text))[1]  # type: ignore[method-assign]
    evaluate(model, Evaluations(zero_shot=(f"a={card}", f"b={card}")).prepare())
    assert calls == [6]  # three classes, two templates


def test_batch_size_and_threads_change_nothing(colour_card: Callable[..., str], clip: Any) -> None:
    card = colour_card(20)
    settings = Evaluations(zero_shot=(card,), retrieval=(card,), evaluation_batch=3, evaluation_threads=1)
    other = replace(settings, evaluation_batch=64, evaluation_threads=8)
    torch.testing.assert_close(
        evaluate(clip, settings.prepare()),
        evaluate(clip, other.prepare()),
    )


def test_a_list_of_class_names_has_texts_alone(tmp_path: Path) -> None:
    """YAML reads ``no`` as false and ``007`` as 7."""
    for name, content, found in (
        ("a.yaml", "- ant\n- no\n", "False"),
        ("b.yaml", "- 007\n", "7"),
        ("c.json", '["a", null]', "None"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(SettingError, match=f"a list of texts, with {found} in quotation marks if it is a name"):
            read_classes(str(tmp_path / name), None, "mine")


@pytest.mark.parametrize("content", [b"ant\nbee\nant \n", b'["ant", "bee", "ant"]'])
def test_class_names_are_there_once(tmp_path: Path, content: bytes) -> None:
    place = tmp_path / ("names.json" if content.startswith(b"[") else "names.txt")
    place.write_bytes(content)
    with pytest.raises(SettingError, match="twice there: ant$"):
        read_classes(str(place), None, "mine")
    place.write_bytes(b"\xef\xbb\xbf" + content.replace(b"ant \n", b"").replace(b', "ant"]', b"]"))
    assert read_classes(str(place), None, "mine") == ("ant", "bee")
