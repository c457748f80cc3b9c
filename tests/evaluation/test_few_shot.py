"""Shots as CoOp's code draws them, halves, harmonic means, and the tables that come of results."""

import csv
import io
import json
import math
import random
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import SettingError
from pipeline.evaluation.few_shot import DataSet, draw, halves, harmonic_mean, mean_and_deviation, read_data_set
from pipeline.runs.few_shot import Result, Trial, parse_spec, plan_trials
from pipeline.runs.few_shot_report import comma_separated, figure, table
from tests.conftest import image


def data_set(train: list[int], val: list[int] | None = None) -> DataSet:
    labels = {"train": tuple(train), "test": (0, 1)} | ({} if val is None else {"val": tuple(val)})
    names = tuple(f"class {number}" for number in range(max(train) + 1))
    return DataSet(name="x", classes=names, templates=("{}",), sources={}, labels=labels)


def reference(labels: list[int], shots: int) -> list[int]:
    """The sampling of the reference, written from its description on the global generator, seeded before."""
    tracker = defaultdict(list)
    for number, label in enumerate(labels):
        tracker[label].append(number)
    chosen = []
    for items in tracker.values():
        chosen.extend(random.sample(items, shots) if len(items) >= shots else items)
    return chosen


def test_the_generator_is_the_one_that_the_reference_seeds() -> None:
    """Numbers that were computed with CPython's random by hand: seed 1, 4 of 30, then 4 of 50."""
    drawn = draw(data_set([0] * 30, [0] * 50), shots=4, seed=1)
    assert [number for _, number in drawn.train] == [4, 18, 27, 25]
    assert [number for _, number in drawn.validation] == [48, 4, 16, 7]


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
def test_shots_are_those_of_the_reference(shots: int, seed: int) -> None:
    order = random.Random(99)
    train = [order.randrange(7) for _ in range(200)]
    val = [order.randrange(7) for _ in range(60)]
    drawn = draw(data_set(train, val), shots, seed)
    random.seed(seed)
    assert drawn.train == tuple(("train", number) for number in reference(train, shots))
    assert drawn.validation == tuple(("val", number) for number in reference(val, min(shots, 4)))
    assert draw(data_set(train, val), shots, seed) == drawn


def test_a_class_with_fewer_images_gives_all_of_them_once() -> None:
    drawn = draw(data_set([0, 1, 0, 0, 1, 0], [0, 1, 1]), shots=4, seed=1)
    numbers = [number for _, number in drawn.train]
    assert sorted(numbers) == [0, 1, 2, 3, 4, 5] and numbers[-2:] == [1, 4]  # the short class as it is listed
    assert [number for _, number in drawn.validation] == [0, 1, 2]


def test_without_validation_images_they_come_from_those_that_are_no_shots() -> None:
    train = [0, 1] * 10
    for seed in (1, 2, 3):
        drawn = draw(data_set(train), shots=8, seed=seed)
        assert not set(drawn.train) & set(drawn.validation)
        assert sorted(train[number] for _, number in drawn.validation) == [0, 0, 1, 1]
    with pytest.raises(SettingError, match="left for validation"):
        draw(data_set(train), shots=10, seed=1)


def test_the_whole_validation_split_as_in_tip_adapters_code() -> None:
    data = data_set([0, 1] * 10, [0, 1, 1, 0, 1])
    few, whole = draw(data, shots=2, seed=1), draw(data, shots=2, seed=1, validation="whole")
    assert whole.train == few.train and len(few.validation) == 4
    assert whole.validation == tuple(("val", number) for number in range(5))
    with pytest.raises(SettingError, match="few for x, which has no validation images"):
        draw(data_set([0, 1] * 10), shots=2, seed=1, validation="whole")


def test_prompts_are_the_papers_the_cards_or_those_given(tmp_path: Path) -> None:
    """Tip-Adapter's code has seven for ImageNet; its variants have the same classes."""
    data = data_set([0, 1])
    imagenet = replace(data, name="imagenet_v2", templates=("a photo of a {}.",))
    seven = {"itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}."}
    seven |= {"a {} in a video game.", "art of the {}.", "a photo of the small {}."}
    for method in ("tip_adapter", "tip_adapter_f"):
        assert set(parse_spec(method).prompts(imagenet)) == seven
        assert parse_spec(method).prompts(data) == data.templates
    assert parse_spec("coop").prompts(imagenet) == ("a photo of a {}.",)
    assert set(parse_spec("zero_shot:templates=imagenet-simple").prompts(data)) == seven
    assert parse_spec("tip_adapter:templates=none").prompts(imagenet) == ("{}",)
    (tmp_path / "own.txt").write_text("one {}\ntwo {}\n")
    spec = parse_spec(f"clip_adapter:templates={tmp_path}/own.txt,ratio=0.5")
    assert spec.prompts(data) == ("one {}", "two {}") and spec.config == {"ratio": 0.5}


@pytest.mark.parametrize("setting", ["crop_scale=[0.5, 1.0]", "flip=0.0"])
@pytest.mark.parametrize("method", ["coop", "cocoop", "clip_adapter", "tip_adapter_f"])
def test_crops_of_methods_that_read_features_are_those_of_the_views(method: str, setting: str) -> None:
    flag = "--" + setting.partition("=")[0].replace("_", "-")
    with pytest.raises(SettingError, match=f"reads stored features: set {flag}"):
        parse_spec(f"{method}:{setting}").build("few_shot", 4, "x")


def test_crops_of_methods_that_read_images() -> None:
    recipe = parse_spec("maple:crop_scale=[0.5, 1.0],flip=0").build("few_shot", 4, "x")[1]
    assert recipe is not None and recipe.crops() == {"crop": "resized", "scale": (0.5, 1.0), "flip": 0}
    plain = parse_spec("vpt").build("few_shot", 4, "x")[1]
    assert plain is not None and plain.crops() == {"crop": "resized", "scale": (0.08, 1.0), "flip": 0.5}


def test_no_shots_and_nothing_to_learn_from() -> None:
    with pytest.raises(SettingError, match="shots: got 0"):
        draw(data_set([0, 1]), shots=0, seed=1)
    only = DataSet(name="v2", classes=("a", "b"), templates=("{}",), sources={}, labels={"test": (0, 1)})
    with pytest.raises(SettingError, match="for testing only"):
        draw(only, shots=1, seed=1)


def test_base_classes_are_the_first_half_rounded_up() -> None:
    for classes, base in ((4, 2), (5, 3), (101, 51), (102, 51)):
        assert (len(halves(classes).base), len(halves(classes).new)) == (base, classes - base)
        assert (*halves(classes).base, *halves(classes).new) == tuple(range(classes))
    for few in (0, 1, 2, 3):
        with pytest.raises(SettingError, match="4 classes or more"):
            halves(few)


def test_harmonic_means_are_those_of_the_papers() -> None:
    assert round(100 * harmonic_mean(0.8228, 0.7514), 2) == 78.55  # MaPLe, table 3: of the averages
    assert round(100 * harmonic_mean(0.8047, 0.7169), 2) == 75.83  # CoCoOp
    assert harmonic_mean(0.5, 0.25) == pytest.approx(statistics.harmonic_mean([0.5, 0.25]))
    assert harmonic_mean(0.0, 0.9) == 0.0 == harmonic_mean(0.9, 0.0)


def test_deviations_are_those_of_samples() -> None:
    mean, deviation = mean_and_deviation([0.1, 0.2, 0.6])
    assert (mean, deviation) == (pytest.approx(0.3), pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 2)))
    assert math.isnan(mean_and_deviation([0.4])[1])


def own_card(folder: Path, split: dict[str, list[list[object]]], **source: object) -> str:
    place = folder / "mine"
    place.mkdir(exist_ok=True)
    for rows in split.values():
        for path, *_ in rows:
            (place / str(path)).write_bytes(image(0))
    (place / "split.json").write_text(json.dumps(split))
    parts = {part: {"part": part} for part in split}
    options = {"kind": "split-file", "folder": "mine", "split": "split.json", **source}
    card = {"name": "mine", "title": "Mine", "source": options, "few_shot": {"parts": parts}}
    (folder / "mine.yaml").write_text(json.dumps(card))
    return str(folder / "mine.yaml")


def test_a_data_set_knows_its_classes_by_their_numbers(tmp_path: Path) -> None:
    split = {"train": [["a.jpg", 7, "dog"], ["b.jpg", 2, "cat"]], "test": [["c.jpg", 5, "emu"], ["d.jpg", 2, "cat"]]}
    data = read_data_set(own_card(tmp_path, split), root=str(tmp_path))
    assert data.classes == ("cat", "emu", "dog")
    assert data.labels == {"train": (2, 0), "test": (1, 0)}
    assert data.templates == ("a photo of a {}.",) and data.sources["train"]["folder"] == f"{tmp_path}/mine"


def test_classes_of_folders_are_those_of_all_parts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A class without training images is reported."""
    for path in ("learn/cat/a.jpg", "learn/ant/a.jpg", "check/bee/a.jpg", "check/cat/a.jpg"):
        (tmp_path / "mine" / path).parent.mkdir(parents=True)
        (tmp_path / "mine" / path).write_bytes(image(0))
    parts = {"train": {"pictures": "learn"}, "test": {"pictures": "check"}}
    options = {"kind": "split-file", "folder": "mine", "format": "folders"}
    card = {"name": "mine", "title": "Mine", "source": options, "few_shot": {"parts": parts}}
    (tmp_path / "mine.yaml").write_text(json.dumps(card))
    data = read_data_set(str(tmp_path / "mine.yaml"), root=str(tmp_path))
    assert data.classes == ("ant", "bee", "cat")
    assert data.labels == {"train": (0, 2), "test": (1, 2)}
    assert "no training images of 1 classes: bee" in caplog.text


def test_class_names_that_make_no_task(tmp_path: Path) -> None:
    one = {"train": [["a.jpg", 0, "dog"]], "test": [["b.jpg", 0, "dog"]]}
    with pytest.raises(SettingError, match="two class names or more"):
        read_data_set(own_card(tmp_path, one), root=str(tmp_path))
    doubled = {"train": [["a.jpg", 0, "crane"]], "test": [["b.jpg", 1, "crane"]]}
    with pytest.raises(SettingError, match="'crane', expected distinct names; `renames`"):
        read_data_set(own_card(tmp_path, doubled), root=str(tmp_path))
    with pytest.raises(SettingError, match="few_shot"):
        read_data_set("tuxpaint_stamps")
    with pytest.raises(SettingError, match="no_such_set"):
        read_data_set("no_such_set")


def test_drawn_sets_have_three_parts_and_as_many_images_as_asked_for() -> None:
    data = read_data_set("drawn_fine_grained", samples=18)
    assert {part: len(labels) for part, labels in data.labels.items()} == {"train": 18, "val": 18, "test": 18}
    assert data.labels["train"][:10] == (0, 1, 2, 3, 4, 5, 6, 7, 8, 0)
    assert data.classes[5] == "pentagon"


def test_methods_take_settings_by_name() -> None:
    spec = parse_spec("coop:class_specific=true,start=a photo of a,epochs=7,templates=none")
    config, recipe = spec.build("few_shot", 16, "x")
    assert recipe is not None
    assert (config.class_specific, config.start, config.context) == (True, "a photo of a", 16)
    assert (recipe.epochs, recipe.learning_rate, spec.templates) == (7, 0.002, ("{}",))
    assert parse_spec("tip_adapter").build("few_shot", 4, "x")[1] is None
    assert parse_spec("coop").build("base_to_new", 16, "x")[0].start == "a photo of a"
    for text, sentence in (
        ("copo", "one of"),
        ("coop:depth=3", "depth=3"),
        ("coop:epochs", "=VALUE"),
        ("tip_adapter:epochs=3", "epochs=3"),
    ):
        with pytest.raises(SettingError, match=sentence):
            parse_spec(text)
    for text in ("coop:epochs=many", "coop:context=0", "coop:learning_rate=-1"):
        with pytest.raises(SettingError):
            parse_spec(text).build("few_shot", 4, "x")


def test_zero_shot_is_one_trial() -> None:
    trials = plan_trials("few_shot", [parse_spec("zero_shot"), parse_spec("coop")], ["a", "b"], [1, 2], [1, 2, 3])
    assert len(trials) == 2 * (1 + 6) and len({trial.name for trial in trials}) == len(trials)
    assert [trial.shots for trial in trials if trial.method == "zero_shot"] == [0, 0]


def result(protocol: str, method: str, data: str, shots: int, seed: int, **top1: float) -> Result:
    trial = Trial(protocol=protocol, method=method, data=data, shots=shots, seed=seed)  # type: ignore[arg-type]
    scores = {name: {"top1": value} for name, value in (top1 or {data: 0.5}).items()}
    return Result(trial=trial, settings="", scores=scores, chosen={}, history=(), parameters=1, seconds=1.0)


def test_a_table_of_few_shot_runs_with_the_average_over_sets() -> None:
    results = [
        result("few_shot", "zero_shot", "a", 0, 1, a=0.4),
        result("few_shot", "zero_shot", "b", 0, 1, b=0.2),
        *(result("few_shot", "coop", "a", 4, seed, a=value) for seed, value in ((1, 0.5), (2, 0.7))),
        *(result("few_shot", "coop", "b", 4, seed, b=value) for seed, value in ((1, 0.3), (2, 0.3))),
    ]
    text = table(results)
    assert (
        "| a | 0 shots | 4 shots |" in text
        and "| coop |  | 60.0 ± 14.1 |" in text
        and "| coop |  | 30.0 ± 0.0 |" in text
    )
    average = text.split("| average |")[1]
    assert "| zero_shot | 30.0 |  |" in average
    assert "| coop |  | 45.0 ± 7.1 |" in average  # of 0.4 and 0.5, the seeds' averages
    rows = list(csv.DictReader(io.StringIO(comma_separated(results))))
    (row,) = [row for row in rows if (row["data"], row["method"]) == ("a", "coop")]
    assert (row["top1_mean"], row["top1_deviation"], row["seeds"]) == ("0.600000", "0.141421", "2")
    drawn = figure(results)
    assert [axis.get_title() for axis in drawn.axes if axis.get_title()] == ["a", "b", "average"]


def test_the_average_harmonic_mean_is_that_of_the_averages() -> None:
    results = [
        result("base_to_new", "coop", "a", 16, 1, base=0.9, new=0.1, harmonic=harmonic_mean(0.9, 0.1)),
        result("base_to_new", "coop", "b", 16, 1, base=0.7, new=0.5, harmonic=harmonic_mean(0.7, 0.5)),
    ]
    text = table(results)
    assert "| a | base | new | harmonic |" in text and "| coop | 90.0 | 10.0 | 18.0 |" in text
    assert "| coop | 80.0 | 30.0 | 43.6 |" in text  # 2 x 0.8 x 0.3 / 1.1, not the mean of 18.0 and 58.3
    assert figure(results).axes


def test_the_average_of_transfers_leaves_the_source_out() -> None:
    results = [result("cross", "coop", "a", 16, seed, a=0.9, b=0.2, c=0.4) for seed in (1, 2)]
    assert "| coop | 90.0 ± 0.0 | 20.0 ± 0.0 | 40.0 ± 0.0 | 30.0 ± 0.0 |" in table(results)
    assert figure(results).axes
