#!/usr/bin/env python
"""Average the weights of checkpoints into a new one: WiSE-FT and model soups.

    python jobs/average_checkpoints.py wise-ft --checkpoints ViT-B/32:openai runs/tuned --alpha 0.5 --output runs/wise
    python jobs/average_checkpoints.py uniform --checkpoints runs/a runs/b runs/c --output runs/soup
    python jobs/average_checkpoints.py greedy --checkpoints runs/a runs/b runs/c --output runs/soup \
        --zero-shot imagenet=s3://bucket/held-out --metric zeroshot/imagenet/top1

For checkpoint addresses see jobs/evaluate.py. The greedy soup sorts the checkpoints by the metric in their
evaluation.json (or by a first evaluation), and keeps those that do not lower the average's metric on the given sets.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Literal, cast

import tyro

from pipeline.config import require, run_job, writable_folder
from pipeline.evaluation.encoder import Evaluable
from pipeline.evaluation.models import load_model
from pipeline.evaluation.suite import Evaluations, PreparedSuite, evaluate
from pipeline.models.method import Method
from pipeline.shards.storage import Folder
from pipeline.training.average import Average, greedy_soup, uniform_soup, wise_ft, write_average
from pipeline.training.checkpoint import stored_score

UNTRAINED = "clipmill-tiny:untrained"


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """The checkpoints, and how they are averaged."""

    checkpoints: tuple[str, ...]
    """Two or more; for WiSE-FT the zero-shot model, then the fine-tuned one. FOLDER:ema is a moving average."""
    output: str = ""
    """Folder of the new checkpoint: a path or a URI."""
    kind: Literal["wise_ft", "uniform", "greedy"] = "uniform"
    """wise_ft: weighted by alpha; uniform: the mean of all; greedy: the mean of those that improve the metric."""
    alpha: float = 0.5
    """Weight of the fine-tuned model in WiSE-FT, 0 to 1."""
    metric: str = ""
    """Metric of the greedy soup, such as zeroshot/imagenet/top1; higher is better."""
    evaluations: Evaluations = field(default_factory=Evaluations)
    """Held-out sets that have the metric."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the greedy soup's evaluations."""

    def __post_init__(self) -> None:
        count = len(self.checkpoints) if isinstance(self.checkpoints, tuple) else 2
        require(
            count == 2 or (count > 2 and self.kind != "wise_ft"), "checkpoints", count, "two for WiSE-FT, else more"
        )
        require(self.kind != "greedy" or bool(self.metric), "metric", self.metric, "a metric, for a greedy soup")


def _preset(kind: Literal["wise_ft", "uniform", "greedy"]) -> Averaging:
    return Averaging(checkpoints=tyro.MISSING, kind=kind, metric=tyro.MISSING if kind == "greedy" else "")


PRESETS = {
    "wise-ft": ("Interpolate between a zero-shot and a fine-tuned model.", _preset("wise_ft")),
    "uniform": ("The mean of all.", _preset("uniform")),
    "greedy": ("The mean of those that improve --metric on --zero-shot and --retrieval.", _preset("greedy")),
    "smoke": (
        "A greedy soup of untrained models, in a temporary folder unless --output names one.",
        Averaging(
            checkpoints=(UNTRAINED, UNTRAINED),
            kind="greedy",
            metric="zeroshot/drawn_shapes/top1",
            evaluations=Evaluations(zero_shot=("drawn_shapes",), evaluation_samples=32, evaluation_batch=32),
        ),
    ),
}


def main(run: Averaging) -> None:
    """Resolve folders and sets, then average."""
    temporary = not run.output and set(run.checkpoints) == {UNTRAINED}
    with TemporaryDirectory(prefix="clipmill-average-") if temporary else nullcontext(run.output) as output:
        folder = Folder(writable_folder("output", output))
        average = averaged(run)
        write_average(average, folder, {"kind": run.kind, "metric": run.metric})
        for address, share in average.shares.items():
            print(f"{share:6.3f}  {address}")
        for name, score in average.scores.items():
            print(f"{score:6.3f}  {run.metric} of {name}")
        print(f"checkpoint {folder.uri}")


def averaged(run: Averaging) -> Average:
    """The average of the configured kind."""
    if run.kind == "wise_ft":
        zero_shot, fine_tuned = run.checkpoints
        return wise_ft(zero_shot, fine_tuned, run.alpha, load)
    if run.kind == "uniform":
        return uniform_soup(run.checkpoints, load)
    sets = run.evaluations.sets()
    require(bool(sets), "zero_shot", (), "at least one set that has the metric: --zero-shot or --retrieval")
    prepared = run.evaluations.prepare()
    known = {address: stored_score(address, run.metric) for address in run.checkpoints}
    found = {address: value for address, value in known.items() if value is not None}
    return greedy_soup(run.checkpoints, load, lambda method: judged(run, prepared, method), found)


def judged(run: Averaging, prepared: PreparedSuite, method: Method) -> float:
    """The metric of a method on the job's sets."""
    device = method_device(run.device)
    metrics = evaluate(cast(Evaluable, method.to(device)), prepared)
    method.cpu()
    require(run.metric in metrics, "metric", run.metric, "one of " + ", ".join(sorted(metrics)))
    return metrics[run.metric]


def load(address: str) -> Method:
    """A model on the CPU, where weights are averaged."""
    return cast(Method, load_model(address, "cpu"))


def method_device(wanted: str) -> str:
    """``auto``: a GPU if available."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


if __name__ == "__main__":
    run_job(PRESETS, main)
