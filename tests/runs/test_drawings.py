"""Optimised images: specs, plans, tasks that go on where they ended, films, and the report."""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.errors import DataError, ImagesFailed, SettingError
from pipeline.generation.guides import Guide
from pipeline.generation.loop import Optimization
from pipeline.loaders.images import image_at
from pipeline.models.class_vectors import untrained
from pipeline.models.towers.weights import digest_of
from pipeline.runs.drawing_evaluation import JudgedImage, JudgingTexts, evaluation_table, judged_parquet
from pipeline.runs.drawing_records import DrawingRecord
from pipeline.runs.drawing_report import SCORES, best_names, drawings_table, gallery, metric_name, scores_parquet
from pipeline.runs.drawing_sheet import CELL, GAP, LABEL, sheet, short_names
from pipeline.runs.drawing_subjects import read_subjects
from pipeline.runs.drawings import (
    DrawingResult,
    DrawingRunner,
    DrawingUnit,
    SubjectSource,
    parse_drawing_spec,
    plan_drawings,
    refuse_failed,
    run_drawings,
)
from pipeline.runs.films import Film
from pipeline.shards.storage import Folder
from pipeline.stages.shard_tasks import Workers
from pipeline.tracking.runs import NoTracker, Tracking
from tests.generation.toy_clip import ColourClip, colour_guide

HERE = Workers(processes_count=0)
TOY = "clipdraw:clips=[toy],strokes=5,side=32,views=2,loop.steps=12,loop.evaluate_every=3,loop.checkpoint_every=5"


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``toy`` guides and ``judge`` judges."""
    guides = {"toy": colour_guide(8), "judge": colour_guide(16)}
    monkeypatch.setattr("pipeline.runs.drawings.load_guide", lambda address, device: guides[address])
    yield


def runner(tmp_path: Path, *specs: str, **more: Any) -> DrawingRunner:
    every = [parse_drawing_spec(text) for text in specs or (TOY,)]
    subjects = {text: SubjectSource(text) for text in ("red", "blue|red:-1", "green")}
    return DrawingRunner(
        specs={spec.text: spec for spec in every},
        subjects=subjects,
        judge="judge",
        output=str(tmp_path / "out"),
        **more,
    )


def plan(made: DrawingRunner, seeds: tuple[int, ...] = (1, 2)) -> list[DrawingUnit]:
    return plan_drawings(list(made.specs.values()), list(made.subjects.values()), seeds)


def test_options_of_a_method_follow_its_name() -> None:
    spec = parse_drawing_spec("clipasso:strokes=8,layers=[a.b, c],loop.steps=7,width=2")
    assert (spec.config.strokes, spec.config.layers, spec.config.loop.steps) == (8, ("a.b", "c"), 7)
    assert spec.config.loop.patience == 2 and spec.config.width == 2
    assert parse_drawing_spec("clipdraw:rates.colours=0.5", steps=3).config.rates.colours == 0.5
    assert parse_drawing_spec("clipdraw", steps=3).config.loop.steps == 3


def test_the_name_of_a_method_has_the_steps_that_it_takes() -> None:
    for text, wanted in (
        ("clipdraw", "clipdraw:loop.steps=3"),
        ("clipdraw:loop.steps=7", "clipdraw:loop.steps=3"),
        ("clipdraw:clips=[a,b],loop.steps=7,side=32", "clipdraw:clips=[a,b],side=32,loop.steps=3"),
    ):
        spec = parse_drawing_spec(text, steps=3)
        assert spec.text == wanted and parse_drawing_spec(spec.text) == spec
        assert parse_drawing_spec(text).text == text


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("clipdrow", "did you mean clipdraw"),
        ("clipdraw:stroke=3", "did you mean strokes"),
        ("clipdraw:strokes", "each with =VALUE"),
        ("clipdraw:loop=3", "each with =VALUE"),
        ("clipdraw:nothing.steps=3", "each with =VALUE"),
        ("clipdraw:strokes.steps=3", "each with =VALUE"),
        ("clipdraw:clips=[a", "clips= and a value of YAML"),
        ("clipdraw:strokes=0", "strokes: got 0"),
        ("clipdraw:strokes=many", "strokes"),
    ],
)
def test_wrong_options_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        parse_drawing_spec(text)


def test_methods_get_the_subjects_that_they_read() -> None:
    specs = [parse_drawing_spec("clipdraw"), parse_drawing_spec("clipasso")]
    photo = SubjectSource("a.png", np.zeros((4, 4, 3), np.uint8))
    units = plan_drawings(specs, [SubjectSource("red"), photo], [1, 2])
    assert [(one.method, one.subject, one.seed) for one in units] == [
        *(("clipdraw", "red", seed) for seed in (1, 2)),
        *(("clipasso", "a.png", seed) for seed in (1, 2)),
    ]
    with pytest.raises(SettingError, match="images: nothing given, expected one or more, for clipasso"):
        plan_drawings(specs, [SubjectSource("red")], [1])
    texts = ("a b", "a-b", "a/b", "ä" * 500, "\u732b" * 500, "https://me:secret@host/x.png")
    names = {DrawingUnit(method=method, subject=text, seed=1).name for text in texts for method in ("m", "\u732b" * 90)}
    assert len(names) == 12 and all(len(name.encode()) < 120 and "/" not in name for name in names)
    assert not any("secret" in name for name in names)


def hopeless(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """The losses of these images are never finite from step 7 on."""
    start = DrawingRunner._start

    def poisoned(self: DrawingRunner, units: Any) -> Optimization:
        run = start(self, units)
        losses, bad = run.objective.losses, torch.tensor([unit.name in names for unit in units])

        def of_a_step(images: Tensor, random: Any) -> dict[str, Tensor]:
            found = losses(images, random)
            return {name: loss.masked_fill(bad & (run.progress.step >= 7), torch.nan) for name, loss in found.items()}

        monkeypatch.setattr(run.objective, "losses", of_a_step)
        return run

    monkeypatch.setattr(DrawingRunner, "_start", poisoned)


def test_a_hopeless_image_has_failed_and_the_others_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy, made = runner(tmp_path / "healthy"), runner(tmp_path)
    units = plan(made, (1,))
    wanted = run_drawings(healthy, units, HERE, together=3)
    bad = units[1].name
    hopeless(monkeypatch, bad)
    results = run_drawings(made, units, HERE, together=3)
    assert [one.status for one in results] == ["finished", "failed", "finished"]
    assert [one.retries for one in results] == [0, 5, 0]
    assert (results[1].steps, results[1].history) == (5, wanted[1].history[:1])
    for one, other in zip(results, wanted, strict=True):
        assert one.status == "failed" or one.history == other.history
    assert [file for file in results[1].files if "-step-" in file][-1] == f"{bad}-step-000005.png"
    monkeypatch.setattr(DrawingRunner, "_make", lambda *_: pytest.fail("again"))
    assert run_drawings(made, units, HERE, together=3) == results
    rows = pq.read_table(io.BytesIO(scores_parquet(results))).to_pylist()
    assert [row["status"] for row in rows] == [one.status for one in results]
    assert best_names(results) == {units[0].name, units[2].name}
    judge = np.mean([one.judge for one in results if one.status == "finished"])
    assert f"| 3 | {judge:.3f} |" in (line := drawings_table(results).splitlines()[2]) and line.endswith(" | 1 |")
    assert gallery(results, {}).count("failed: not finite after 5 steps") == 1
    with pytest.raises(ImagesFailed, match=rf"^1 of 3 images failed .*: {bad}$"):
        refuse_failed(results)
    refuse_failed(wanted)
    record = DrawingRecord(Tracking(), None, Folder(str(tmp_path / "out")), track=False)
    children = [NoTracker() for _ in results]
    for child, result in zip(children, results, strict=True):
        monkeypatch.setattr(record, "_child", lambda *_, child=child: child)
        record.add(result)
    assert [child.status for child in children] == ["FINISHED", "FAILED", "FINISHED"]


def test_reports_of_failed_images_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an evaluation before, they have no scores."""
    made = runner(tmp_path, TOY.replace("loop.evaluate_every=3", "loop.evaluate_every=9"))
    units = plan(made, (1,))
    hopeless(monkeypatch, *(unit.name for unit in units))
    results = run_drawings(made, units, HERE, together=3)
    assert all(one.status == "failed" and one.loss != one.loss and one.history == () for one in results)
    assert "| 3 | - | - |" in drawings_table(results) and best_names(results) == set()
    assert gallery(results, {}).count("<figure") == 3 and len(scores_parquet(results)) > 0
    assert sheet(results, Folder(str(tmp_path / "out")), {})


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "out/images").iterdir())}


def test_images_are_made_once_with_all_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = runner(tmp_path)
    done: list[DrawingResult] = []
    results = run_drawings(made, plan(made), HERE, together=4, done=done.append)
    assert results == done and len(results) == 6
    for result in results:
        assert [entry["step"] for entry in result.history] == [3, 6, 9, 12] and result.steps == 12
        assert result.loss == result.history[-1]["loss"] and result.judge == result.history[-1]["judge"]
        steps = [f"{result.unit.name}-step-{step:06d}.png" for step in (0, 3, 9, 12)]
        assert list(result.files) == [*(f"{result.unit.name}.{kind}" for kind in ("png", "svg", "gif")), *steps]
        with Image.open(tmp_path / "out/images" / f"{result.unit.name}.gif") as film:
            assert film.n_frames == 5 and film.size == (32, 32)
    assert not list((tmp_path / "out/checkpoints").iterdir())
    monkeypatch.setattr(DrawingRunner, "_make", lambda *_: pytest.fail("again"))
    assert run_drawings(made, plan(made), HERE, together=4) == results


def test_together_is_the_same_as_alone(tmp_path: Path) -> None:
    images = []
    for folder, together in ((tmp_path / "a", 1), (tmp_path / "b", 6)):
        made = runner(folder)
        run_drawings(made, plan(made), HERE, together=together)
        images.append(files_of(folder))
    assert images[0].keys() == images[1].keys()
    for name in images[0]:
        if name.endswith(".png"):
            one, other = (np.asarray(Image.open(io.BytesIO(some[name]))).astype(int) for some in images)
            assert abs(one - other).max() <= 1


@pytest.mark.parametrize("moment", [7, 12])
def test_an_interrupted_batch_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """In a step after a checkpoint, and while the finished images are written."""
    whole = runner(tmp_path / "whole")
    run_drawings(whole, plan(whole), HERE, together=6)
    made, steps = runner(tmp_path / "parts"), [0]
    step, write = Optimization.step, DrawingRunner._write

    def interrupted(self: Optimization) -> list[int]:
        steps[0] += 1
        if self.progress.step == moment:
            raise KeyboardInterrupt
        return step(self)

    def half_written(self: DrawingRunner, unit: DrawingUnit, number: int, *more: Any) -> None:
        if number == 3:
            raise KeyboardInterrupt
        write(self, unit, number, *more)

    with monkeypatch.context() as patch:
        patch.setattr(
            *((Optimization, "step", interrupted) if moment < 12 else (DrawingRunner, "_write", half_written))
        )
        with pytest.raises(KeyboardInterrupt):
            run_drawings(made, plan(made), HERE, together=6)
    with monkeypatch.context() as patch:
        patch.setattr(Optimization, "step", lambda self: steps.append(self.progress.step) or step(self))  # type: ignore[func-returns-value]
        run_drawings(made, plan(made), HERE, together=6)
    assert steps[1:] == (list(range(5, 12)) if moment < 12 else [])
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def test_other_settings_draw_again_and_other_seeds_only_add(tmp_path: Path) -> None:
    made = runner(tmp_path)
    first = run_drawings(made, plan(made, (1,)), HERE)
    more = run_drawings(made, plan(made, (1, 3)), HERE)
    assert [one.seconds for one in more if one.unit.seed == 1] == [one.seconds for one in first]
    changed = replace(made, film="none")
    assert changed.finished(plan(made)[0]) is None
    (result, *_) = run_drawings(changed, plan(made, (1,)), HERE)
    assert not any(file.endswith(".gif") for file in result.files)


def test_an_image_without_its_file_is_made_again(tmp_path: Path) -> None:
    made = runner(tmp_path)
    first = run_drawings(made, plan(made, (1,)), HERE)
    before = files_of(tmp_path)
    (tmp_path / "out/images" / f"{first[0].unit.name}.png").unlink()
    run_drawings(made, plan(made, (1,)), HERE)
    assert files_of(tmp_path) == before


def test_changed_models_and_files_draw_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the same addresses; what an image does not depend on changes nothing."""
    guides = {"toy": colour_guide(8), "judge": other_guide()}
    monkeypatch.setattr("pipeline.runs.drawings.load_guide", lambda address, device: guides[address])
    place, other = tmp_path / "sky.png", tmp_path / "start.png"
    for file in (place, other):
        Image.new("RGB", (9, 9), "blue").save(file)
    codes = f"vqgan_clip:codes=vqgan:untrained,clips=[toy],size=[16,16],views=1,start=image,start_image={other}"
    prompted = f"red|image={place}"
    made = replace(
        runner(tmp_path, TOY, f"{codes},loop.steps=2"), subjects={one: SubjectSource(one) for one in ("red", prompted)}
    )
    units = plan(made, (1,))

    def unfinished() -> list[tuple[str, str]]:
        now = made.with_contents(units, "cpu")
        return [(one.method.partition(":")[0], one.subject) for one in units if now.finished(one) is None]

    run_drawings(made.with_contents(units, "cpu"), units, HERE)
    every = [(one.method.partition(":")[0], one.subject) for one in units]
    assert unfinished() == [] and len(every) == 4
    digest = digest_of(guides["toy"].model)
    found = [made.with_contents(units, "cpu").finished(unit) for unit in units]
    assert [one.guides for one in found if one] == [{"toy": digest}] * 4
    for file in (tmp_path / "out/results").iterdir():  # as older versions wrote them
        stored = json.loads(file.read_text())
        assert stored.pop("guides") == {"toy": digest}
        file.write_text(json.dumps(stored))
    assert [made.with_contents(units, "cpu").finished(unit) for unit in units] == found
    assert [
        row["guides"] for row in pq.read_table(io.BytesIO(scores_parquet([one for one in found if one]))).to_pylist()
    ]
    Image.new("RGB", (9, 9), "green").save(place)
    assert unfinished() == [one for one in every if one[1] == prompted]
    Image.new("RGB", (9, 9), "blue").save(place)
    Image.new("RGB", (9, 9), "green").save(other)
    assert unfinished() == [one for one in every if one[0] == "vqgan_clip"]
    Image.new("RGB", (9, 9), "blue").save(other)
    guides["judge"] = other_guide(3)
    assert unfinished() == every
    guides["judge"] = colour_guide(16)
    with pytest.raises(SettingError, match="judge: got 'judge', expected another CLIP than toy, which has the same"):
        made.with_contents(units, "cpu")


def other_guide(factor: float = 2) -> Guide:
    model = ColourClip(16)
    model.weight.data *= factor
    return Guide(model, "other")


@pytest.mark.parametrize("damaged", [".pt", ".npz"])
def test_a_damaged_checkpoint_is_named(damaged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = runner(tmp_path)
    write = DrawingRunner._write
    monkeypatch.setattr(DrawingRunner, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_drawings(made, plan(made, (1,)), HERE, together=3)
    monkeypatch.setattr(DrawingRunner, "_write", write)
    (file,) = (tmp_path / "out/checkpoints").glob(f"*{damaged}")
    content = file.read_bytes()
    file.write_bytes(content[:50])
    with pytest.raises(DataError, match=r"checkpoints/\w+\.pt and \w+-film\.npz cannot be used .*delete them"):
        run_drawings(made, plan(made, (1,)), HERE, together=3)
    file.unlink()
    assert len(run_drawings(made, plan(made, (1,)), HERE, together=3)) == 3  # from the beginning


@pytest.mark.parametrize(("shown", "steps"), [(1, [6]), (2, [0, 6]), (3, [0, 3, 6]), (9, [0, 3, 6])])
def test_chosen_frames_have_the_last_one(shown: int, steps: list[int]) -> None:
    film = Film(9, shown)
    for step in (0, 3, 6):
        film.add(step, torch.full((2, 3, 4, 4), step / 255))
    assert [(step, int(frame[0, 0, 0])) for step, frame in film.chosen(1, 6)] == [(step, step) for step in steps]


def test_an_image_that_stops_in_a_batch_has_the_numbers_and_files_it_has_alone(tmp_path: Path) -> None:
    """The stop of its prompt is met at once, so that it does not change."""
    found = []
    for folder, texts in (("alone", ["red:1:9"]), ("together", ["blue", "red:1:9"])):
        made = runner(tmp_path / folder, TOY.replace("loop.steps=12", "loop.steps=18,loop.patience=2"), frames=3)
        made = replace(made, subjects={text: SubjectSource(text) for text in texts})
        *_, result = run_drawings(made, plan(made, (1,)), HERE, together=2)
        found.append(result)
    assert [(one.steps, one.history[-1]["step"]) for one in found] == [(9, 9)] * 2
    assert found[0].files == found[1].files and "-step-000009.png" in found[0].files[-1]
    assert [entry["step"] for entry in found[0].history] == [entry["step"] for entry in found[1].history]


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_a_film_has_as_many_frames_as_wanted(frames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a break at its first checkpoint."""
    made = runner(tmp_path, frames=frames)
    units, step = plan(made, (1,))[:1], Optimization.step
    with monkeypatch.context() as patch:
        patch.setattr(Optimization, "step", lambda self: step(self) if self.progress.step < 6 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_drawings(made, units, HERE)
    (result,) = run_drawings(made, units, HERE)
    with Image.open(tmp_path / "out/images" / f"{result.unit.name}.gif") as film:
        assert film.n_frames == frames


def test_a_film_ends_with_its_image() -> None:
    """After step 4 the others went on, and it did not change."""
    film = Film(9, 9)
    for step in (0, 3, 6, 9):
        film.add(step, torch.full((2, 3, 4, 4), min(step, 4) / 255))
    assert [(step, int(frame[0, 0, 0])) for step, frame in film.frames_of(0, 4)] == [(0, 0), (3, 3), (4, 4)]
    assert [step for step, _ in film.frames_of(1, 9)] == [0, 3, 6, 9]


def test_metrics_of_long_methods_have_names_that_mlflow_takes() -> None:
    names = [metric_name(f"clipdraw:clips=[{'x' * 300}],strokes={number}") for number in (1, 2)]
    assert len(set(names)) == 2 and all(len(f"drawing/{name}/r_precision") <= 250 for name in names)
    assert metric_name("clipdraw:strokes=4") == "clipdraw_strokes_4"


def test_a_film_as_mp4_has_all_frames(tmp_path: Path) -> None:
    made = runner(tmp_path, film="mp4", frames=3)
    (result, *_) = run_drawings(made, plan(made, (1,))[:1], HERE)
    with av.open(str(tmp_path / "out/images" / f"{result.unit.name}.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(frames) == 3 + 20 and frames[0].shape == (32, 32, 3)
    last = np.asarray(Image.open(tmp_path / "out/images" / f"{result.unit.name}.png")).astype(int)
    assert abs(frames[-1].astype(int) - last).mean() < 20


def test_a_damaged_film_of_a_checkpoint_is_an_error() -> None:
    film = Film(3, 3)
    film.add(0, torch.rand(1, 3, 9, 9))
    content = film.content()
    for damaged in (b"abc", content[:50], content[:-9], content[:100] + b"abc" * 9 + content[127:]):
        with pytest.raises(DataError, match="no film"):
            Film(3, 3).read(damaged, 5)


def some_results(tmp_path: Path) -> list[DrawingResult]:
    made = runner(tmp_path)
    return run_drawings(made, plan(made), HERE, together=6)


def test_scores_table_and_gallery_tell_of_all_images(tmp_path: Path) -> None:
    results = some_results(tmp_path)
    hostile = replace(results[0], unit=replace(results[0].unit, subject="<script>alert(1)</script>"))
    rows = pq.read_table(io.BytesIO(scores_parquet(results))).to_pylist()
    assert [row["name"] for row in rows] == [one.unit.name for one in results]
    assert [row["judge"] for row in rows] == [one.judge for one in results]
    for subject in ("red", "blue|red:-1", "green"):
        some = [row for row in rows if row["subject"] == subject]
        assert [row["best"] for row in some] == [row["loss"] == min(one["loss"] for one in some) for row in some]
    assert all((tmp_path / "out" / row[kind]).is_file() for row in rows for kind in ("png", "svg", "film"))
    assert len(best_names(results)) == 3
    table = drawings_table(results).splitlines()
    assert len(table) == 3 and f"| 6 | {np.mean([one.judge for one in results]):.3f} |" in table[2]
    page = gallery([hostile, *results[1:]], {"judge": "a&b"})
    assert "<script>" not in page and "a&amp;b" in page and page.count("<figure") == 6
    assert page.count("class=best") == 4  # the first has a subject of its own now


def test_secrets_in_options_and_subjects_are_in_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics, parameters, table, gallery and sheet of MLflow, and those of the evaluation."""
    made = runner(tmp_path)
    (result,) = run_drawings(made, plan(made)[:1], HERE)
    address = "https://me:hunter2@host/x.png?token=hunter2"
    spec = f"vqgan_clip:clips=[toy],start=image,start_image={address}"
    folder = Folder(str(tmp_path / "out"))
    unit = DrawingUnit(method=spec, subject=f"red|image={address}", seed=1)
    (tmp_path / "out/images" / f"{unit.name}.png").write_bytes(folder.read_bytes(f"images/{result.unit.name}.png"))
    hidden = [replace(result, unit=unit)]
    written: list[str] = []
    monkeypatch.setattr("pipeline.runs.drawing_sheet.wrapped", lambda text, *_: written.append(text) or text)
    record = DrawingRecord(Tracking(), None, folder, track=False)
    parent = NoTracker()
    monkeypatch.setattr(record, "_parent", parent)
    children: list[str] = []
    monkeypatch.setattr(record, "_child", lambda *some: children.append(repr(some)))
    record.add(hidden[0])
    table = record.conclude(hidden, {"judge": address}, {})
    judged = [
        JudgedImage(
            name=unit.name,
            method=spec,
            strokes=None,
            subject=unit.subject,
            seed=1,
            score=1.0,
            texts_before=0,
            texts=1,
            label=None,
            predicted=None,
            classes_before=None,
        )
    ]
    rows = pq.read_table(io.BytesIO(judged_parquet(judged))).to_pylist()
    reports = [table, folder.read_text("gallery.html"), folder.read_text("table.md"), repr(parent.history), *written]
    reports += [repr(children), repr(rows), evaluation_table(judged, JudgingTexts()), metric_name(spec)]
    assert len(written) == 2 and not any("hunter2" in text for text in reports)
    assert all("***" in text for text in (table, reports[1], written[0], *reports[-4:-1]))
    (row,) = pq.read_table(tmp_path / "out" / SCORES).to_pylist()
    assert row["method"] == spec  # what the evaluation reads


def test_the_sheet_has_the_best_image_of_each_method_and_subject(tmp_path: Path) -> None:
    """At its place, with sharp pixels and few colours; a photo stands above its column."""
    made = runner(tmp_path, TOY, TOY.replace("strokes=5", "strokes=2"))
    results = run_drawings(made, plan(made), HERE, together=6)
    photo = np.full((30, 20, 3), (10, 200, 30), np.uint8)
    page = Image.open(io.BytesIO(sheet(results, Folder(str(tmp_path / "out")), {"green": photo}))).convert("RGB")
    step = CELL + GAP
    assert page.size == (LABEL + 3 * step, 3 * step)
    best = best_names(results)
    for row, method in enumerate(made.specs, start=1):
        for column, subject in enumerate(made.subjects):
            (name,) = (
                one.unit.name
                for one in results
                if one.unit.name in best and (one.unit.method, one.unit.subject) == (method, subject)
            )
            with Image.open(tmp_path / "out/images" / f"{name}.png") as image:
                wanted = np.asarray(image).repeat(3, 0).repeat(3, 1).astype(int)
            left, top = LABEL + column * step, row * step
            found = np.asarray(page.crop((left, top, left + 96, top + 96))).astype(int)
            assert abs(found - wanted).mean() < 6
    above = np.asarray(page.crop((LABEL + 2 * step, GAP, LABEL + 2 * step + 60, GAP + 90))).astype(int)
    assert abs(above - (10, 200, 30)).max() < 10


def test_names_on_the_sheet_have_the_options_that_differ() -> None:
    texts = ["a:clip=x,strokes=4", "a:clip=x,strokes=8,start=random", "b:clip=y", "c"]
    assert short_names(texts) == ["a strokes=4", "a strokes=8 start=random", "b", "c"]


def test_prompts_come_from_files_and_masks_whiten_images(tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("\ufeffa cat\n\n a dog:2 \n", encoding="utf-8")
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[:, :3] = (10, 20, 30, 255)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    mask = np.zeros((4, 6), np.uint8)
    mask[2:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    found = read_subjects([str(tmp_path / "some.txt"), "red"], [str(tmp_path / "photo.png")], [])
    assert [one.text for one in found[:3]] == ["a cat", "a dog:2", "red"]
    square = found[3].pixels
    assert square is not None and square.shape == (6, 6, 3)
    assert (square[1:5, :3] == (10, 20, 30)).all() and (square[:, 3:] == 255).all() and (square[[0, 5]] == 255).all()
    (masked,) = read_subjects([], [str(tmp_path / "photo.png")], [str(tmp_path / "mask.png")])
    assert masked.pixels is not None
    assert (masked.pixels[:3] == 255).all() and (masked.pixels[3:5, :3] == (10, 20, 30)).all()
    assert masked.digest != found[3].digest
    for prompts, images, masks, sentence in (
        ([str(tmp_path / "none.txt")], [], [], "no such file"),
        (["red", "red"], [], [], "each prompt and image once"),
        ([" "], [], [], "a text"),
        (["red:0"], [], [], "a weight other than 0"),
        ([], [str(tmp_path / "photo.png")], ["a", "b"], "one for each of 1 images"),
    ):
        with pytest.raises(SettingError, match=sentence):
            read_subjects(prompts, images, masks)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(SettingError, match="a prompt in each line"):
        read_subjects([str(tmp_path / "empty.txt")], [], [])
    Image.fromarray(mask[:, :5]).save(tmp_path / "small.png")
    with pytest.raises(SettingError, match="the size of"):
        read_subjects([], [str(tmp_path / "photo.png")], [str(tmp_path / "small.png")])


@pytest.mark.parametrize("mode", ["CMYK", "I;16", "LA", "P", "1"])
@pytest.mark.parametrize("size", [(1, 1), (7, 1), (5, 9)])
def test_images_of_any_kind_and_size_are_squares_of_colours(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    """Black, with white beside it where the image is no square."""
    place = tmp_path / ("photo.tiff" if mode in ("CMYK", "I;16") else "photo.png")
    Image.new(mode, size, {"CMYK": (0, 0, 0, 255), "LA": (0, 255)}.get(mode, 0)).save(place)
    (found,) = read_subjects([], [str(place)], [])
    assert found.pixels is not None and found.pixels.shape == (max(size), max(size), 3)
    assert int((found.pixels < 60).all(axis=2).sum()) == size[0] * size[1]
    assert int((found.pixels == 255).all(axis=2).sum()) == max(size) ** 2 - size[0] * size[1]


def test_each_method_is_started_once_and_finished_images_are_not_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three subjects the last one is encoded by no CLIP, and still refused."""
    started: list[tuple[str, str]] = []
    start = DrawingRunner._start

    def counted(self: DrawingRunner, units: Any) -> Optimization:
        started.extend((unit.method, unit.subject) for unit in units)
        return start(self, units)

    monkeypatch.setattr(DrawingRunner, "_start", counted)
    made = runner(tmp_path, TOY, TOY.replace("strokes=5", "strokes=2"))
    units = plan(made)
    made.check(units, "cpu")
    assert started == [(method, "red") for method in made.specs]
    first = [unit for unit in units if unit.method == TOY]
    run_drawings(made, first, HERE, together=6)
    started.clear()
    made.check(units, "cpu")
    assert [method for method, _ in started] == list(made.specs)[1:]
    started.clear()
    made.check(first, "cpu")
    assert started == []
    place, read = str(tmp_path / "sky.png"), image_at
    Image.new("RGB", (9, 9), "blue").save(place)
    places: list[str] = []
    monkeypatch.setattr("pipeline.runs.drawing_checks.image_at", lambda one: places.append(one) or read(one))
    texts = ("green", f"red|image={place}", f"blue|image={place}:0.5")
    prompted = replace(made, subjects={text: SubjectSource(text) for text in texts})
    prompted.check(plan(prompted), "cpu")
    assert places == [place]
    bad = "red|green green green green:-1"
    more = replace(made, subjects={**made.subjects, bad: SubjectSource(bad)})
    with pytest.raises(SettingError, match=r"clipdraw:.*prompt: got 'green green green green', .*for colours"):
        more.check(plan(more), "cpu")


def test_everything_is_checked_before_anything_is_drawn(tmp_path: Path) -> None:
    made = runner(tmp_path)
    made = replace(made, subjects={"red red red red": SubjectSource("red red red red")})
    with pytest.raises(SettingError, match=r"clipdraw:.*prompt: got 'red red red red', expected at most 5 tokens"):
        made.check(plan(made), "cpu")
    assert not (tmp_path / "out").exists()


def test_the_image_that_cannot_be_sketched_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pixel, or one colour."""
    guide = Guide(untrained("clipmill-tiny"), "tiny")  # type: ignore[arg-type]
    monkeypatch.setattr("pipeline.runs.drawings.load_guide", lambda address, device: guide)
    made = runner(tmp_path, "clipasso:clip=a,saliency=a,layers=[transformer.resblocks.1],side=32,strokes=2")
    good = np.full((20, 20, 3), 255, np.uint8)
    good[5:12, 5:12] = 0
    subjects = [SubjectSource("good.png", good), SubjectSource("dot.png", np.zeros((1, 1, 3), np.uint8))]
    made = replace(made, subjects={one.text: one for one in subjects})
    with pytest.raises(SettingError, match=r"clipasso:.*: dot\.png: images: got 'an image without edges'"):
        made.check(plan(made, (1,)), "cpu")
    started: list[str] = []
    monkeypatch.setattr(DrawingRunner, "_start", lambda _, units: started.append(units[0].subject))
    with pytest.raises(SettingError, match=r"clipasso:.*: dot\.png: images: got 'an image without edges'"):
        made.check(plan(made, (1,)), "cpu")
    assert started == ["good.png"]


def test_a_damaged_result_is_made_again(tmp_path: Path) -> None:
    made = runner(tmp_path)
    (unit, *_) = plan(made, (1,))
    (first,) = run_drawings(made, [unit], HERE)
    file = tmp_path / "out/results" / f"{unit.name}.json"
    file.write_text(file.read_text()[:50])
    (again,) = run_drawings(made, [unit], HERE)
    assert again.history == first.history and json.loads(file.read_text())["loss"] == first.loss
