"""Averages in weight space: by hand, and by a judge whose answers are known."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from pipeline.errors import SettingError
from pipeline.models.clip import Clip, Config
from pipeline.models.method import Method
from pipeline.shards.storage import Folder
from pipeline.training.average import greedy_soup, uniform_soup, weighted, wise_ft, write_average
from pipeline.training.checkpoint import Checkpoints, Meta, load_method
from pipeline.training.optimizer import AdamW, make_optimizer


def filled(value: float, config: Config | None = None) -> Clip:
    """A model all of whose weights are ``value``."""
    method = Clip(config or Clip.smallest()).eval()
    for parameter in method.parameters():
        parameter.data.fill_(value)
    return method


def meta(step: int) -> Meta:
    return Meta(step=step, samples_seen=8 * step, batch_size=8, lanes=2, seed=0, snapshot="d" * 64)


@pytest.fixture
def folders(tmp_path: Path) -> Callable[..., list[str]]:
    """``folders(1.0, 2.0)``: runs with one checkpoint each, filled with these values."""

    def make(*values: float) -> list[str]:
        uris = []
        for number, value in enumerate(values):
            method = filled(value)
            Checkpoints(tmp_path / f"run-{number}").save(method, make_optimizer(AdamW(), method), meta(number + 1))
            uris.append(str(tmp_path / f"run-{number}"))
        return uris

    return make


def only_value(method: Method) -> float:
    values = {round(parameter.flatten()[0].item(), 5) for parameter in method.parameters()}
    assert len(values) == 1 and all((one == one.flatten()[0]).all() for one in method.parameters())
    return values.pop()


def test_sums_by_hand() -> None:
    first = {"a": torch.tensor([1.0, 2.0]), "half": torch.tensor(1.0, dtype=torch.float16), "count": torch.tensor(7)}
    second = {"a": torch.tensor([3.0, -2.0]), "half": torch.tensor(3.0, dtype=torch.float16), "count": torch.tensor(9)}
    mean = weighted([(first, 0.25), (second, 0.75)])
    assert mean["a"].tolist() == [2.5, -1.0] and mean["half"].item() == 2.5 and mean["half"].dtype == torch.float16
    assert mean["count"].item() == 7
    many = [({"a": torch.full((1,), 0.1)}, 1e-3)] * 1000
    assert weighted(many)["a"].item() == torch.tensor(0.1).item()  # in float32 the sum drifts


@pytest.mark.parametrize(("alpha", "value"), [(0.0, 1.0), (0.5, 3.0), (0.25, 2.0), (1.0, 5.0)])
def test_wise_ft_interpolates(alpha: float, value: float, folders: Callable[..., list[str]]) -> None:
    zero_shot, fine_tuned = folders(1.0, 5.0)
    assert only_value(wise_ft(zero_shot, fine_tuned, alpha, load_method).method) == value


def test_a_soup_is_a_checkpoint(folders: Callable[..., list[str]], tmp_path: Path) -> None:
    """The mean of three; it loads, starts other runs, opens in open_clip, and says what is in it."""
    members = folders(1.0, 2.0, 6.0)
    write_average(uniform_soup(members, load_method), Folder(tmp_path / "soup"), {"kind": "uniform"})
    loaded = load_method(str(tmp_path / "soup"))
    assert only_value(loaded) == 3.0
    assert only_value(Clip(replace(Clip.smallest(), pretrained=str(tmp_path / "soup")))) == 3.0
    model = open_clip.create_model(f"local-dir:{tmp_path / 'soup'}")
    assert model.logit_scale.item() == 3.0
    record = json.loads((tmp_path / "soup" / "average.json").read_text())
    assert record["kind"] == "uniform" and record["shares"] == dict.fromkeys(members, 1 / 3)
    plain = json.loads((tmp_path / "soup" / "meta.json").read_text())
    assert plain["step"] == 3 and not plain["evaluate"]
    assert not (tmp_path / "soup" / "state.pt").exists()


def test_the_greedy_soup_keeps_what_helps(folders: Callable[..., list[str]]) -> None:
    """The judge wants a mean of 3. Alone 4 is best (-1), then 1 (-2), 6 (-3), 10 (-7).

    (4 + 1) / 2 = 2.5 is better, (4 + 1 + 6) / 3 = 3.67 is worse and goes, (4 + 1 + 10) / 3 = 5 as well.
    """
    members = folders(10.0, 1.0, 6.0, 4.0)
    judged: list[float] = []

    def judge(method: Method) -> float:
        judged.append(only_value(method))
        return -abs(judged[-1] - 3)

    soup = greedy_soup(members, load_method, judge)
    assert list(soup.shares) == [members[3], members[1]] and set(soup.shares.values()) == {0.5}
    assert only_value(soup.method) == 2.5 and soup.scores["average"] == -0.5
    assert judged == [10.0, 1.0, 6.0, 4.0, 4.0, 2.5, pytest.approx(11 / 3, abs=1e-5), 5.0]
    judged.clear()
    known = {member: float(number) for number, member in enumerate(members)}  # another order: 4, 6, 1, 10
    soup = greedy_soup(members, load_method, judge, known)
    assert judged[:2] == [4.0, 5.0] and only_value(soup.method) == 2.5


def test_equals_stay(folders: Callable[..., list[str]]) -> None:
    """At least as good, says the recipe."""
    members = folders(1.0, 3.0)
    assert only_value(greedy_soup(members, load_method, lambda method: 0.0).method) == 2.0


def test_batch_normalisation_and_its_counter() -> None:
    from torch import nn

    norms = [nn.BatchNorm1d(2) for _ in range(2)]
    for number, norm in enumerate(norms):
        norm.running_mean.fill_(number)  # type: ignore[union-attr]
        norm.num_batches_tracked.fill_(number + 5)  # type: ignore[union-attr]
    mean = weighted([(norm.state_dict(), 0.5) for norm in norms])
    assert mean["running_mean"].tolist() == [0.5, 0.5] and mean["num_batches_tracked"].item() == 5


@pytest.mark.parametrize(
    "other",
    [
        {"image_size": 48},
        {"loss": "sigmoid"},
        {"architecture": "clipmill-small"},
    ],
)
def test_other_architectures_are_refused(other: dict[str, Any]) -> None:
    config = replace(Clip.smallest(), **other)
    methods = {"one": filled(1.0), "two": filled(2.0, config)}
    for average in (
        lambda: wise_ft("one", "two", 0.5, methods.__getitem__),
        lambda: uniform_soup(["one", "two"], methods.__getitem__),
        lambda: greedy_soup(["one", "two"], methods.__getitem__, lambda _: pytest.fail("evaluated before")),
    ):
        with pytest.raises(SettingError, match="checkpoints: got '(one|two)'.*the architecture of"):
            average()


def test_wrong_settings(folders: Callable[..., list[str]]) -> None:
    members = folders(1.0, 2.0)
    with pytest.raises(SettingError, match="alpha: got 1.5"):
        wise_ft(*members, 1.5, load_method)
    with pytest.raises(SettingError, match="all of them different"):
        uniform_soup([members[0], members[0]], load_method)
    with pytest.raises(SettingError, match="all of them different"):
        wise_ft(members[0], members[0], 0.5, load_method)
    soup = uniform_soup(members, load_method)
    with pytest.raises(SettingError, match="none of the checkpoints"):
        write_average(soup, Checkpoints(members[0]).at(1), {})
