"""The adaptation job as users type it: every protocol, its runs, going on after a stop, and what it refuses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.evaluation.models import load_model
from pipeline.evaluation.suite import Evaluations, evaluate
from tests.conftest import RayCluster, image
from tests.jobs.conftest import Type

QUICK = ["--output", "out", "--no-track"]
TWO = ["--methods", "zero_shot", "coop:epochs=1,context=2", "--shots", "1"]


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "out/trials").glob("*.json"))}


def top1(folder: Path) -> dict[str, dict[str, float]]:
    return {
        name: {measured: score["top1"] for measured, score in one["scores"].items()}
        for name, one in results(folder).items()
    }


def test_smoke_leaves_a_table_a_plot_and_runs(
    job: Type, tmp_path: Path, own_store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["smoke", "--output", "out", "--tracking-uri", own_store, "--experiment", "few"]
    assert job("adapt", *common) == 0
    shown = capsys.readouterr().out
    assert "| drawn_fine_grained | 0 shots | 1 shots | 2 shots |" in shown
    assert (tmp_path / "out/table.md").read_text() in shown
    assert len((tmp_path / "out/table.csv").read_text().splitlines()) == 6
    assert (tmp_path / "out/accuracy.png").read_bytes()[:4] == b"\x89PNG"
    client = MlflowClient(own_store)
    found = client.search_runs([client.get_experiment_by_name("few").experiment_id])
    (parent,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 5 and {run.info.status for run in found} == {"FINISHED"}
    files = {file.path for folder in (None, "figures") for file in client.list_artifacts(parent.info.run_id, folder)}
    assert {"table.md", "table.csv", "figures/accuracy.png", "config.json"} <= files
    (coop,) = [
        run for run in children if run.data.params["method"].startswith("coop") and run.data.params["shots"] == "2"
    ]
    assert coop.data.metrics["test/drawn_fine_grained/seen"] == 36
    assert [point.step for point in client.get_metric_history(coop.info.run_id, "train/loss")] == [1, 2]
    assert "words.tsv" in {file.path for file in client.list_artifacts(coop.info.run_id)}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/trials").iterdir()}
    assert job("adapt", *common) == 0  # all is there: no trial runs again, and no run is added
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out/trials").iterdir()} == before
    assert len(client.search_runs([parent.info.experiment_id])) == len(found)


def test_zero_shot_is_what_the_evaluation_says(job: Type, tmp_path: Path) -> None:
    assert job("adapt", "smoke", *QUICK, "--methods", "zero_shot") == 0
    prepared = Evaluations(zero_shot=("drawn_fine_grained",), evaluation_samples=None).prepare()
    (own,) = prepared.sets
    few = own.data.source.__class__(split="fine_grained", samples=36)  # type: ignore[union-attr]
    object.__setattr__(own.data, "source", few)
    expected = evaluate(load_model("clipmill-tiny:untrained", "cpu"), prepared)["zeroshot/drawn_fine_grained/top1"]
    (found,) = top1(tmp_path).values()
    assert found["drawn_fine_grained"] == pytest.approx(expected)


def test_a_job_goes_on_where_it_was_stopped(job: Type, tmp_path: Path) -> None:
    three = [*QUICK, "--methods", "zero_shot", "tip_adapter", "coop:epochs=1,context=2", "--shots", "1"]
    assert job("adapt", "smoke", *three) == 0
    whole = top1(tmp_path)
    files = sorted((tmp_path / "out/trials").iterdir())
    files[0].unlink()
    files[1].write_text(files[1].read_text()[:40])  # as a machine that loses power may leave it
    kept = {path: path.stat().st_mtime_ns for path in files[2:]}
    assert kept and job("adapt", "smoke", *three) == 0
    assert top1(tmp_path) == whole
    assert {path: path.stat().st_mtime_ns for path in files[2:]} == kept
    assert job("adapt", "smoke", *three, "--model", "clipmill-small:untrained") == 0  # nothing of it is of use
    assert all(path.stat().st_mtime_ns > time for path, time in kept.items())


@pytest.mark.slow
@pytest.mark.alone
def test_trials_on_a_cluster_are_those_in_this_process(job: Type, tmp_path: Path, ray_cluster: RayCluster) -> None:
    assert job("adapt", "smoke", *QUICK) == 0
    here = top1(tmp_path)
    (tmp_path / "out").rename(tmp_path / "serial")
    assert job("adapt", "smoke", *QUICK, "--processes-count", "2") == 0
    assert top1(tmp_path) == here


@pytest.mark.slow
@pytest.mark.alone
def test_workers_that_share_a_trials_classes_are_one_process(
    job: Type, tmp_path: Path, ray_cluster: RayCluster
) -> None:
    """Up to how the sums of gradients round."""
    one = [*QUICK, "--methods", "coop:epochs=2,context=2", "--shots", "2"]
    assert job("adapt", "smoke", *one) == 0
    (here,) = results(tmp_path).values()
    (tmp_path / "out").rename(tmp_path / "serial")
    assert job("adapt", "smoke", *one, "--workers-per-trial", "2") == 0
    (there,) = results(tmp_path).values()
    assert there["settings"] == here["settings"] and there["parameters"] == here["parameters"]
    for one_epoch, other in zip(there["history"], here["history"], strict=True):
        assert one_epoch["train/loss"] == pytest.approx(other["train/loss"], rel=1e-4)
    assert (tmp_path / "out/adapters/coop-epochs-2-context-2-drawn_fine_grained-2-shots-seed-1/config.json").exists()
    assert job("adapt", "smoke", *one, "--workers-per-trial", "2") == 0  # all is there
    assert results(tmp_path) == {"coop-epochs-2-context-2-drawn_fine_grained-2-shots-seed-1": there}


def test_base_to_new(job: Type, tmp_path: Path) -> None:
    assert job("adapt", "smoke", *QUICK, "--protocol", "base_to_new", *TWO) == 0
    for one in results(tmp_path).values():
        base, new, harmonic = (one["scores"][name] for name in ("base", "new", "harmonic"))
        assert (base["seen"], new["seen"]) == (20, 16)  # 5 and 4 of 9 classes, 4 images each
        both = base["top1"] + new["top1"]
        assert harmonic["top1"] == pytest.approx(2 * base["top1"] * new["top1"] / both if both else 0)
    assert "base | new | harmonic" in (tmp_path / "out/table.md").read_text()


@pytest.mark.parametrize(
    ("protocol", "data", "targets"),
    [
        ("cross", "drawn_fine_grained", ["drawn_colours", "drawn_novel"]),
        ("generalise", "drawn_shapes", ["drawn_unseen_style"]),
    ],
)
def test_other_data_sets_and_shifted_ones(
    protocol: str, data: str, targets: Sequence[str], job: Type, tmp_path: Path
) -> None:
    more = ["--protocol", protocol, "--data", data, "--targets", *targets]
    assert job("adapt", "smoke", *QUICK, *more, *TWO) == 0
    for one in results(tmp_path).values():
        assert list(one["scores"]) == [data, *targets]


def test_a_cache_keeps_its_classes_under_a_shift_and_has_none_elsewhere(
    job: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    tip = ["--methods", "tip_adapter", "--shots", "1"]
    shifted = ["--protocol", "generalise", "--data", "drawn_shapes", "--targets", "drawn_unseen_style"]
    assert job("adapt", "smoke", *QUICK, *shifted, *tip) == 0
    assert job("adapt", "smoke", *QUICK, "--protocol", "cross", "--targets", "drawn_colours", *tip) == 2
    assert "those of drawn_colours" in capsys.readouterr().err


def test_methods_that_read_pixels_need_no_features(job: Type, tmp_path: Path) -> None:
    assert job("adapt", "smoke", *QUICK, "--methods", "vpt:depth=2,length=2,epochs=1", "--shots", "1") == 0
    assert len(results(tmp_path)) == 1
    assert not list((tmp_path / "out/data").rglob("*views*"))


def own_images(folder: Path, spoil: int | None = None, names: Sequence[str] = ("cat", "dog", "emu", "fox")) -> None:
    """A data set of 4 classes in CoOp's form, with 4, 2 and 3 images of each, under a card of its own."""
    place = folder / "root/mine"
    place.mkdir(parents=True)
    split: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
    for number, (part, count) in enumerate((("train", 4), ("val", 2), ("test", 3))):
        for label, name in enumerate(names):
            for index in range(count):
                path = f"{part}{label}{index}.jpg"
                split[part].append([path, label, name])
                (place / path).write_bytes(image(label + 10 * index + 100 * number))
    if spoil is not None:
        (place / f"train{spoil}0.jpg").write_bytes(b"no image")
    (place / "split.json").write_text(json.dumps(split))
    source = {"kind": "split-file", "folder": "mine", "split": "split.json", "home": "a friend"}
    card = {
        "name": "mine",
        "title": "Mine",
        "source": source,
        "templates": ["a {}."],
        "few_shot": {"parts": {part: {"part": part} for part in split}},
    }
    (folder / "mine.yaml").write_text(json.dumps(card))


MINE = ["--data", "mine.yaml", "--root", "root"]


def test_images_of_ones_own_in_a_split_file(job: Type, tmp_path: Path) -> None:
    own_images(tmp_path)
    methods = ["--methods", "tip_adapter", "coop:epochs=1,context=2", "--shots", "2", "9"]  # a class has four
    assert job("adapt", "smoke", *QUICK, *MINE, *methods) == 0
    assert {one["scores"]["mine"]["seen"] for one in results(tmp_path).values()} == {12}
    kept = tmp_path / "out/adapters/tip_adapter-mine-9-shots-seed-1/config.json"
    assert json.loads(kept.read_text())["classes"] == ["cat", "dog", "emu", "fox"]


def test_an_image_that_cannot_be_read(job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_images(tmp_path, spoil=1)
    assert job("adapt", "smoke", *QUICK, *MINE, "--methods", "tip_adapter", "--shots", "9") == 1
    assert "not_a_picture" in capsys.readouterr().err


def test_an_image_that_is_missing(job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_images(tmp_path)
    (tmp_path / "root/mine/test00.jpg").unlink()
    assert job("adapt", "smoke", *QUICK, *MINE, "--methods", "zero_shot") == 1
    assert "11 of 12 images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--methods", "copo"], "method: got 'copo'"),
        (["--methods", "coop:speed=3"], "speed=3"),
        (["--methods", "coop", "coop"], "each once"),
        (["--data", "drawn_fin_grained"], "did you mean drawn_fine_grained?"),
        (["--data", "tuxpaint_stamps"], "few_shot"),
        (["--data", "imagenet_v2"], "a folder"),
        (["--shots", "0"], "--shots: got (0,)"),
        (["--samples", "0"], "--samples: got 0"),
        (["--targets", "drawn_colours"], "with cross and generalise alone"),
        (["--protocol", "cross"], "with cross and generalise alone"),
        (["--methods", "coop:context=77"], "context"),
        (["--methods", "maple:depth=9"], "depth"),
        (["--model", "nowhere"], "'nowhere'"),
        (["--model", "ViT-B-16:openai"], "ViT-B-16-quickgelu, since the weights openai were trained with it"),
        (["--gpus-per-trial", "0"], "--gpus-per-trial: got 0"),
        (["--workers-per-trial", "0"], "--workers-per-trial: got 0"),
        (["--protocol", "base_to_new", "--methods", "tip_adapter"], "classifies other classes"),
        (["--protocol", "base_to_new", "--methods", "coop:class_specific=true"], "classifies other classes"),
        (["--tracking-uri", "http://127.0.0.1:9", "--track"], "MLflow server that answers"),
    ],
)
def test_wrong_options_are_one_sentence(
    arguments: Sequence[str], sentence: str, job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("adapt", "smoke", *QUICK, *arguments) == 2
    out, error = capsys.readouterr()
    assert sentence in " ".join(error.replace("│", " ").split()) and "Traceback" not in error
    assert out == "" and not (tmp_path / "out/data").exists()


@pytest.mark.parametrize(
    ("names", "arguments", "sentence"),
    [
        (["cat", "cat", "emu", "fox"], [], "distinct names"),
        (["cat", "Cat", "emu", "fox"], [], "distinct names"),
        (["cat", " ", "emu", "fox"], [], "not empty"),
        (["cat"], [], "two class names or more"),
        (["cat", "dog", "emu"], ["--protocol", "base_to_new"], "4 classes or more"),
        (["cat", "dog", "emu", "word " * 90], [], "77"),
    ],
)
def test_class_names_that_do_not_work(
    names: Sequence[str],
    arguments: Sequence[str],
    sentence: str,
    job: Type,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own_images(tmp_path, names=names)
    assert job("adapt", "smoke", *QUICK, *MINE, *arguments, "--methods", "coop:epochs=1") == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out/data").exists()


def test_a_missing_split_file_says_where_it_comes_from(
    job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_images(tmp_path)
    (tmp_path / "root/mine/split.json").unlink()
    assert job("adapt", "smoke", *QUICK, *MINE) == 2
    assert "the published file split.json, which comes from a friend" in capsys.readouterr().err


def test_features_of_another_model_are_made_again(job: Type, tmp_path: Path) -> None:
    """A run's folder holds another checkpoint after more training, under the same name."""
    base = ["smoke", *QUICK, "--methods", "zero_shot"]
    assert job("adapt", *base, "--model", "clipmill-tiny:untrained") == 0
    (sidecar,) = (tmp_path / "out/data/drawn_fine_grained").glob("tested-*/*views*")
    other = sidecar.read_bytes()[:-200] + bytes(200)
    sidecar.write_bytes(other)
    (next((tmp_path / "out/trials").iterdir())).unlink()
    assert job("adapt", *base) == 0
    assert sidecar.read_bytes() != other
