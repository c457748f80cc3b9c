"""Evaluate a checkpoint and record the result in its training run, from any process.

The training ranks write a checkpoint and continue. A follower's Ray task or process calls :func:`evaluate_checkpoint`
with the checkpoint's address and gets the metrics. All arguments pickle.

    Follower(output_folder, CheckpointEvaluation(evaluations=evaluations, run=tracker.handle), record)
"""

from dataclasses import dataclass

from pipeline.evaluation.models import load_any
from pipeline.evaluation.showcase import model_figures, model_files
from pipeline.evaluation.suite import Evaluations, PreparedSuite, evaluate
from pipeline.tracking.records import charted
from pipeline.tracking.runs import RunHandle


def evaluate_checkpoint(
    checkpoint: str,
    evaluations: Evaluations,
    run: RunHandle | None,
    step: int,
    *,
    device: str = "auto",
    figures: bool = True,
    prepared: PreparedSuite | None = None,
) -> dict[str, float]:
    """The metrics of ``checkpoint``, also logged into ``run`` at ``step``.

    Args:
        checkpoint: an address of :func:`pipeline.evaluation.models.load_any`.
        evaluations: the sets.
        run: the MLflow run to write into, or none.
        step: the checkpoint's step.
        device: the model's device, ``cpu``, ``cuda`` or ``auto``.
        figures: also log the figures of the sets' tasks, and their files under ``predictions/``.
        prepared: ``evaluations.prepare()``, if the caller has it already.

    Raises:
        SettingError: an unknown set or checkpoint, or a model that does not support a set's task.
        DataError: damaged data.
    """
    ready = prepared or evaluations.prepare()
    model = load_any(checkpoint, device)
    metrics = evaluate(model, ready)
    if run is not None:
        tracker = run.open()
        tracker.log(charted(metrics), step)
        if figures:
            for name, figure in model_figures(model, ready, f"at step {step}").items():
                tracker.log_figure(name, figure)
            for name, content in model_files(model, ready).items():
                tracker.log_file(f"predictions/{name}", content)
        tracker.close()
    return metrics


@dataclass(frozen=True, kw_only=True)
class CheckpointEvaluation:
    """:func:`evaluate_checkpoint` with all arguments except the checkpoint and its step; it pickles."""

    evaluations: Evaluations
    run: RunHandle | None = None
    device: str = "auto"
    figures: bool = True

    def __call__(self, checkpoint: str, step: int) -> dict[str, float]:
        """The metrics of the checkpoint at an address, of a step."""
        return evaluate_checkpoint(
            checkpoint, self.evaluations, self.run, step, device=self.device, figures=self.figures
        )
