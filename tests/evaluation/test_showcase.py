"""Figures from data and model, also where captions or images are missing."""

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from pipeline.errors import DataError
from pipeline.evaluation.showcase import model_figures, snapshot_figure
from pipeline.evaluation.suite import Evaluations
from pipeline.loaders.sample_figures import sample_figure
from pipeline.shards.snapshot import Snapshot

MakeRow = Callable[..., dict[str, bytes]]
MakeSnapshot = Callable[..., Snapshot]


def captions_of(figure: Any) -> list[str]:
    figure.savefig(io.BytesIO(), format="png")
    return [axis.get_xlabel() for axis in figure.axes if axis.images]


def test_samples_come_from_all_shards(row: MakeRow, make_snapshot: MakeSnapshot) -> None:
    snapshot = make_snapshot([row("red", f"number {place}") for place in range(40)])
    shown = captions_of(snapshot_figure(snapshot, count=4))
    assert shown == ["number 0", "number 10", "number 20", "number 30"]


def test_samples_without_a_caption_are_shown_too(row: MakeRow, make_snapshot: MakeSnapshot) -> None:
    rows = [{name: content for name, content in row("red").items() if name != "txt"}, row("blue", "a \U0001f535")]
    assert captions_of(snapshot_figure(make_snapshot(rows))) == ["(no caption)", "a \u25a1"]


def test_a_named_caption_is_shown(row: MakeRow, make_snapshot: MakeSnapshot) -> None:
    snapshot = make_snapshot([row("red", title="other")])
    assert captions_of(snapshot_figure(snapshot, partial(sample_figure, caption="json:title"))) == ["other"]


def test_images_that_cannot_be_read_are_an_error(row: MakeRow, make_snapshot: MakeSnapshot) -> None:
    snapshot = make_snapshot([{**row("red"), "png": b"no image"}])
    with pytest.raises(DataError, match="none of 1 samples is readable"):
        snapshot_figure(snapshot)


def test_every_retrieval_set_gets_two_figures(colour_card: Callable[..., str], colour_model: Any) -> None:
    card = colour_card(9)
    prepared = Evaluations(zero_shot=(card,), retrieval=(card, f"few={card}"), evaluation_samples=5).prepare()
    figures = model_figures(colour_model, prepared, "at step 3")
    names = {f"{kind}/{name}" for kind in ("similarity", "examples") for name in ("colours", "few")}
    assert set(figures) == names
    title = figures["examples/few"].get_suptitle()
    assert title == "few at step 3: retrieval among 5 held-out pairs"
