"""What every drawing method keeps: bytes after a break or a killed task, images of a batch, a way out of NaN."""

import io
import logging
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.errors import SettingError
from pipeline.generation.loop import Optimization
from pipeline.runs.drawings import (
    DrawingRunner,
    DrawingUnit,
    SubjectSource,
    parse_drawing_spec,
    plan_drawings,
    run_drawings,
)
from pipeline.stages.shard_tasks import Workers

HERE = Workers(processes_count=0)
LOOP = "loop.steps=9,loop.evaluate_every=3,loop.checkpoint_every=4"
TINY = "clipmill-tiny:untrained"
METHODS = {
    "clipdraw": f"clipdraw:clips=[{TINY}],strokes=4,side=48,views=2,{LOOP}",
    "clipasso": f"clipasso:clip={TINY},saliency={TINY},layers=[transformer.resblocks.1],strokes=4,side=48,views=1,"
    f"loop.patience=0,{LOOP}",
    "vqgan_clip": f"vqgan_clip:codes=vqgan:untrained,clips=[{TINY}],size=[32,48],views=2,average=0.5,{LOOP}",
}


def photo(shift: int) -> SubjectSource:
    pixels = np.full((40, 40, 3), 255, np.uint8)
    pixels[10 + shift : 20, 5:30] = (200, 20, 20)
    return SubjectSource(f"photo-{shift}.png", pixels)


def runner(folder: Path, *methods: str, kind: type[DrawingRunner] = DrawingRunner) -> tuple[DrawingRunner, Any]:
    specs = [parse_drawing_spec(METHODS[name]) for name in methods]
    reads = {spec.build().reads for spec in specs}
    subjects = [SubjectSource("a red star"), SubjectSource("a disc:2|a house:-0.5")] if "text" in reads else []
    subjects += [photo(0), photo(4)] if "image" in reads else []
    made = kind(
        specs={spec.text: spec for spec in specs},
        subjects={one.text: one for one in subjects},
        judge="clipmill-small:untrained",
        output=str(folder),
        device="cpu",
    )
    return made, plan_drawings(specs, subjects, [1])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_batch_goes_on_to_the_same_bytes_and_alone_to_the_same_image(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, units = runner(tmp_path / "whole", method)
    run_drawings(whole, units, HERE, together=2)
    made, _ = runner(tmp_path / "parts", method)
    step, steps = Optimization.step, list[int]()

    def interrupted(self: Optimization) -> list[int]:
        if self.progress.step == 6 and not steps:
            steps.append(6)
            raise KeyboardInterrupt
        steps.append(self.progress.step)
        return step(self)

    monkeypatch.setattr(Optimization, "step", lambda self: interrupted(self) if self.progress.step == 6 else step(self))
    with pytest.raises(KeyboardInterrupt):
        run_drawings(made, units, HERE, together=2)
    monkeypatch.setattr(Optimization, "step", interrupted)
    run_drawings(made, units, HERE, together=2)
    assert steps == [6, 4, 5, 6, 7, 8]
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    alone, _ = runner(tmp_path / "alone", method)
    run_drawings(alone, units, HERE)
    # Where two codes are equally near, rounding decides; from there on codes of both images differ.
    compared = ("-step-000000.png", "-step-000003.png") if method == "vqgan_clip" else (".png",)
    for name, content in files_of(tmp_path / "alone").items():
        if name.endswith(compared):
            one, other = (
                np.asarray(Image.open(io.BytesIO(some))).astype(int)
                for some in (content, files_of(tmp_path / "whole")[name])
            )
            assert abs(one - other).max() <= 2, name


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_none_is_redone_with_half_the_rate(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the second image's sixth step; the first ends as it would have. Also if the second has no gradient in any
    step: both are rendered and encoded together."""
    healthy, units = runner(tmp_path / "healthy", method)
    plain = run_drawings(healthy, units, HERE, together=2)
    made, _ = runner(tmp_path / "broken", method)
    hopeless, _ = runner(tmp_path / "hopeless", method)
    start, broken = DrawingRunner._start, [False]

    def poisoned(self: DrawingRunner, units: Any) -> Optimization:
        run = start(self, units)
        losses = run.objective.losses

        def once(images: Tensor, random: Any) -> dict[str, Tensor]:
            if self is hopeless:
                return losses(images * torch.tensor([1.0, torch.nan])[:, None, None, None], random)
            found = losses(images, random)
            if run.progress.step == 5 and not broken[0]:
                broken[0] = True
                return {name: loss * torch.tensor([1.0, torch.nan]) for name, loss in found.items()}
            return found

        monkeypatch.setattr(run.objective, "losses", once)
        return run

    monkeypatch.setattr(DrawingRunner, "_start", poisoned)
    with caplog.at_level(logging.WARNING):
        results = run_drawings(made, units, HERE, together=2)
    assert f"the loss of {units[1].name} is not finite at step 5: it goes on from step 4 with" in caplog.text
    assert [one.retries for one in results] == [0, 1] and [one.steps for one in results] == [9, 9]
    assert results[0].history == plain[0].history and results[1].history != plain[1].history
    results = run_drawings(hopeless, units, HERE, together=2)
    assert [one.status for one in results] == ["finished", "failed"] and results[0].history == plain[0].history


@pytest.mark.parametrize("method", ["clipdraw", "vqgan_clip"])
@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        (" ", "prompt: .*a text"),
        ("a star:0", "prompt: .*a weight other than 0"),
        ("star " * 90, "prompt: .*at most 77 tokens"),
        ("a star|image=none.png", "image: .*no such file"),
    ],
    ids=("empty", "weight", "long", "image"),
)
def test_bad_prompts_are_refused_before_anything_is_drawn(
    method: str, prompt: str, sentence: str, tmp_path: Path
) -> None:
    made, _ = runner(tmp_path / "out", method)
    subject = SubjectSource(prompt)
    (spec,) = made.specs.values()
    made.subjects[prompt] = subject  # type: ignore[index]
    with pytest.raises(SettingError, match=rf"^{method}:.*: {sentence}"):
        made.check(plan_drawings([spec], [subject], [1]), "cpu")
    assert not (tmp_path / "out").exists()


class KilledOnce(DrawingRunner):
    """Kills its process once in a step of each method."""

    def _start(self, units: Any) -> Optimization:
        run, mark = super()._start(units), Path(self.output) / units[0].name
        step = run.step

        def killed() -> list[int]:
            if run.progress.step == 6 and not mark.exists():
                mark.parent.mkdir(exist_ok=True)
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return step()

        run.step = killed  # type: ignore[method-assign]
        return run


@pytest.mark.slow
@pytest.mark.alone
def test_killed_tasks_of_a_cluster_go_on_to_the_same_bytes(ray_cluster: Any, tmp_path: Path) -> None:
    whole, units = runner(tmp_path / "whole", *METHODS)
    run_drawings(whole, units, HERE, together=2)
    made, _ = runner(tmp_path / "killed", *METHODS, kind=KilledOnce)
    run_drawings(made, units, Workers(processes_count=2), together=2)
    first: list[DrawingUnit] = [next(one for one in units if one.method == text) for text in made.specs]
    assert all((tmp_path / "killed" / one.name).exists() for one in first)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
