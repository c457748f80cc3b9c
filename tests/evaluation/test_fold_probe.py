"""Linear probes by official folds: each fold is tested by a classifier of the others."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from pipeline.errors import SettingError
from pipeline.evaluation.linear_probe import Probe, ProbeSets, by_regression, linear_probe
from pipeline.models.adapters.adapter import Shots
from pipeline.shards.snapshot import Snapshot
from tests.evaluation.conftest import COLOURS, ColourModel
from tests.evaluation.sounds_and_colours import SoundAndColourModel, sample

MakeSnapshot = Callable[..., Snapshot]
JOINT = Probe(features="joint", iterations=50)


def folds(make_snapshot: MakeSnapshot) -> str:
    """Three folds of nine sounds; in fold 3 the labels red and green are exchanged."""
    swapped = {"red": "green", "green": "red", "blue": "blue"}
    rows = [
        sample(colour, "a", heard=swapped[colour] if fold == 3 else colour, fold=fold)
        for fold in (1, 2, 3)
        for colour in COLOURS
        for _ in range(3)
    ]
    return make_snapshot(rows).folder


def test_each_fold_is_tested_by_the_others(make_snapshot: MakeSnapshot) -> None:
    """Of the first two folds half of the training labels are right, so only blue is certain; the third is wrong."""
    sets = ProbeSets(data=(f"it={folds(make_snapshot)}",), fold="fold")
    found = linear_probe(SoundAndColourModel(), sets.prepare(), sets.settings(), JOINT)
    assert found["linear_probe/it/folds"] == 3 and found["linear_probe/it/samples"] == 27
    assert found["linear_probe/it/trained_on"] == 18
    assert found["linear_probe/it/top1/3"] == pytest.approx(1 / 3)  # trained on right labels only
    by_fold = [found[f"linear_probe/it/top1/{fold}"] for fold in (1, 2, 3)]
    assert found["linear_probe/it/top1"] == pytest.approx(np.mean(by_fold))
    assert min(by_fold[:2]) >= 1 / 3


def test_a_fold_is_the_probe_of_its_samples(make_snapshot: MakeSnapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scikit-learn, fitted on the other folds with the chosen penalty, gives the same accuracy."""
    rng = np.random.default_rng(0)
    labels, fold = np.arange(60) % 3, np.arange(60) // 20
    features = torch.tensor(rng.normal(size=(60, 1, 5)) + np.eye(3, 5)[labels][:, None], dtype=torch.float32)
    shots = Shots(features, torch.tensor(labels))
    monkeypatch.setattr(
        "pipeline.evaluation.linear_probe.embed_folds", lambda *_: (shots, [str(number) for number in fold])
    )
    sets = ProbeSets(data=(f"it={folds(make_snapshot)}",), fold="fold")
    found = linear_probe(SoundAndColourModel(), sets.prepare(), sets.settings(), Probe())
    scores = []
    for number in range(3):
        inside = fold == number
        train = Shots(features[~inside], shots.labels[~inside])
        penalty = 10 ** by_regression(train, None, 3, Probe()).chosen["log10_c"]
        points = features[:, 0].double().numpy()
        points = points - points[~inside].mean(axis=0)  # subtracting the mean changes the bias alone
        model = LogisticRegression(C=penalty, max_iter=1000).fit(points[~inside], labels[~inside])
        scores.append(model.score(points[inside], labels[inside]))
        assert found[f"linear_probe/it/top1/{number}"] == pytest.approx(scores[-1])
    assert found["linear_probe/it/top1"] == pytest.approx(np.mean(scores))


def test_wrong_folds_and_media_are_settings(make_snapshot: MakeSnapshot) -> None:
    folder = folds(make_snapshot)
    with pytest.raises(SettingError, match="test"):
        ProbeSets(data=(folder,), test=(folder,), fold="fold")
    with pytest.raises(SettingError, match="medium"):
        ProbeSets(data=(folder,), medium="smell")

    def probe(sets: ProbeSets, probe: Probe = JOINT, model: object = None) -> None:
        linear_probe(model or SoundAndColourModel(), sets.prepare(), sets.settings(), probe)

    one = make_snapshot([sample(colour, "a", fold=1) for colour in COLOURS], name="one").folder
    with pytest.raises(SettingError, match="two folds or more"):
        probe(ProbeSets(data=(f"it={one}",), fold="fold"))
    with pytest.raises(SettingError, match="random crops are of images"):
        probe(ProbeSets(data=(folder,), fold="fold"), Probe(protocol="slip", features="joint"))
    with pytest.raises(SettingError, match="whose audio tower is not known"):
        probe(ProbeSets(data=(folder,), fold="fold"), Probe())
    with pytest.raises(SettingError, match="the samples have: audio"):
        probe(ProbeSets(data=(folder,), medium="image"))
    with pytest.raises(SettingError, match="a medium of the model: image"):
        probe(ProbeSets(data=(folder,), medium="audio"), model=ColourModel())
