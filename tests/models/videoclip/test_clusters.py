"""Neighbours against a brute force; plans of batches."""

import numpy as np
import pytest
import torch

from pipeline.errors import SettingError
from pipeline.models.videoclip.clusters import RetrievedClusters, nearest


@pytest.mark.parametrize(("rows", "tile"), [(50, 7), (50, 64), (9, 4)])
def test_neighbours_are_those_of_a_brute_force(rows: int, tile: int) -> None:
    features = torch.randn(rows, 5) + 30  # far from the origin, where products cancel
    queries = torch.randperm(rows)[:8]
    found = nearest(features, queries, min(12, rows), tile)
    expected = torch.cdist(features[queries].double(), features.double()).argsort(dim=1)[:, : min(12, rows)]
    assert torch.equal(found, expected)
    assert torch.equal(found[:, 0], queries)


def test_a_copy_of_the_query_does_not_come_before_it() -> None:
    features = torch.zeros(6, 3)
    assert nearest(features, torch.tensor([4, 1]), 3)[:, 0].tolist() == [4, 1]


def groups(count: int, each: int) -> torch.Tensor:
    """Features of ``count`` tight groups far apart; sample i is in group i // each."""
    centres = 100 * torch.randn(count, 8)
    return (centres[:, None] + 0.01 * torch.randn(count, each, 8)).flatten(0, 1)


def test_clusters_are_groups_of_similar_videos() -> None:
    clusters = RetrievedClusters(size=4, candidates=6)
    plan = clusters.plan(groups(10, 6), 7, 8, seed=3, epoch=2)
    assert plan.shape == (7, 8) and plan.dtype == np.int64
    for cluster in plan.reshape(-1, 4):
        assert len(set(cluster.tolist())) == 4
        assert len(set((cluster // 6).tolist())) == 1
    # 14 of the 60 samples are queries, each at most once: their groups are spread.
    assert len(set((plan.reshape(-1, 4)[:, 0] // 6).tolist())) >= 6


def test_a_plan_is_a_function_of_its_arguments() -> None:
    features = groups(10, 6)
    clusters = RetrievedClusters(size=4, candidates=12)

    def plan(seed: int, epoch: int) -> list[object]:
        return clusters.plan(features, 5, 8, seed=seed, epoch=epoch).tolist()

    assert plan(0, 1) == plan(0, 1)
    assert plan(0, 1) != plan(0, 2) and plan(0, 1) != plan(1, 1)
    moved = features.roll(1, dims=0)
    assert clusters.plan(moved, 5, 8, seed=0, epoch=1).tolist() != plan(0, 1)


def test_every_candidate_may_be_read_the_query_too() -> None:
    """32 of 64 in the paper; here 2 of 4, in 300 epochs."""
    features = groups(1, 4)
    drawn = [RetrievedClusters(size=2, candidates=4).plan(features, 1, 2, seed=0, epoch=one)[0] for one in range(300)]
    counts = np.bincount(np.concatenate(drawn), minlength=4)
    assert abs(counts / 600 - 0.25).max() < 0.05


def test_small_data_are_read_more_than_once() -> None:
    plan = RetrievedClusters(size=2, candidates=9).plan(torch.randn(3, 4), 1, 8, seed=0, epoch=0)
    assert plan.shape == (1, 8) and set(plan.ravel().tolist()) <= {0, 1, 2}


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(SettingError, match="candidates"):
        RetrievedClusters(size=8, candidates=7)
    with pytest.raises(SettingError, match="batch_size"):
        RetrievedClusters(size=8, candidates=8).check(100, 20)
    with pytest.raises(SettingError, match="cluster"):
        RetrievedClusters(size=8, candidates=8).check(7, 8)
