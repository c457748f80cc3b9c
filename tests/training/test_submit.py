"""Evaluations in processes of their own."""

import os
from pathlib import Path

import pytest

from pipeline.training.submit import GIVES_WAY, EvaluationFailed, in_a_process

SUBMITTED = """
import os

def evaluate(uri, step):
    if step == 1:
        raise ValueError("no such file")
    if step == 2:
        os._exit(3)
    return {"zeroshot/colours/top1": step / 10, "niceness": os.nice(0)}
"""


def test_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ends of a process: a result, an exception, a sudden death."""
    (tmp_path / "submitted_here.py").write_text(SUBMITTED)
    monkeypatch.syspath_prepend(str(tmp_path))
    import submitted_here

    pending = [in_a_process(submitted_here.evaluate, "uri", step) for step in (1, 2, 3)]
    while not all(one.ready(0.5) for one in pending):
        pass
    with pytest.raises(EvaluationFailed, match="ValueError: no such file"):
        pending[0].result()
    with pytest.raises(EvaluationFailed, match="ended with code 3"):
        pending[1].result()
    metrics = pending[2].result()
    assert metrics["zeroshot/colours/top1"] == 0.3
    assert metrics["niceness"] == min(19, os.nice(0) + GIVES_WAY)  # the training comes first
    cancelled = in_a_process(submitted_here.evaluate, "uri", 5)
    cancelled.cancel()
