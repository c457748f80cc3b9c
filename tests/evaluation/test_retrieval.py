"""Retrieval against a 3 x 3 example by hand and a loop over all pairs, with ties and several captions."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import SettingError
from pipeline.evaluation.retrieval import match_ranks, retrieval, retrieval_metrics
from pipeline.models.clip import Clip


def test_three_by_three_by_hand() -> None:
    # Rows are images, columns captions: 0 finds its own first, 1 second, 2 third.
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.6, 0.3], [0.7, 0.4, 0.2]])
    own = torch.tensor([[0, 0], [1, 1], [2, 2]])
    assert match_ranks(scores, torch.eye(3), own).tolist() == [1, 2, 3]
    # As caption queries (columns): 0.9 is first of its column, 0.6 first, 0.2 second.
    assert match_ranks(torch.eye(3), scores, own).tolist() == [1, 1, 2]
    found = retrieval_metrics(scores, torch.eye(3), own)
    assert found["i2t_r1"] == pytest.approx(1 / 3) and found["t2i_r1"] == pytest.approx(2 / 3)
    assert found["i2t_r5"] == found["t2i_r10"] == 1
    assert found["i2t_median_rank"] == 2 and found["t2i_median_rank"] == 1
    assert found["chance"] == pytest.approx(1 / 3)


def brute_force(queries: Tensor, gallery: Tensor, pairs: Tensor) -> list[int]:
    """Sort the gallery for each query with the wrong ones first among equals; the place of the first right one."""
    ranks = []
    for query in range(len(queries)):
        right = {int(entry) for at, entry in pairs.tolist() if at == query}
        scores = [float((queries[query] * entry).sum()) for entry in gallery]
        order = sorted(range(len(gallery)), key=lambda entry: (-scores[entry], entry in right))
        ranks.append(next(place for place, entry in enumerate(order, 1) if entry in right))
    return ranks


@pytest.mark.parametrize("scores_at_once", [1, 40, 1 << 24])
@pytest.mark.parametrize("values", ["random", "ties"])
def test_tiles_agree_with_brute_force(values: str, scores_at_once: int) -> None:
    # Small whole numbers: their products are exact, so equal scores are equal whatever the order of additions.
    span = 100 if values == "random" else 2
    queries, gallery = torch.randint(-span, span, (30, 6)).float(), torch.randint(-span, span, (41, 6)).float()
    pairs = torch.cat([torch.stack([torch.arange(30), torch.arange(30)], 1), torch.randint(0, 30, (20, 2))])
    expected = brute_force(queries, gallery, pairs)
    assert match_ranks(queries, gallery, pairs, scores_at_once).tolist() == expected


def test_a_model_that_scores_all_alike_finds_nothing() -> None:
    same = torch.ones(20, 4)
    own = torch.arange(20).repeat(2, 1).T
    found = retrieval_metrics(same, same, own)
    assert found["i2t_r10"] == found["t2i_r10"] == 0
    assert found["i2t_median_rank"] == 20


def test_nan_finds_nothing() -> None:
    broken = torch.full((12, 4), float("nan"))
    own = torch.arange(12).repeat(2, 1).T
    assert retrieval_metrics(broken, torch.eye(12, 4), own)["i2t_r10"] == 0
    assert retrieval_metrics(torch.eye(12, 4), broken, own)["t2i_r10"] == 0


def test_random_features_are_at_chance() -> None:
    images, texts = torch.randn(400, 16), torch.randn(400, 16)
    found = retrieval_metrics(images, texts, torch.arange(400).repeat(2, 1).T)
    assert found["chance"] == 1 / 400
    assert found["i2t_r10"] == pytest.approx(10 / 400, abs=0.03)
    assert 150 < found["t2i_median_rank"] < 250


def batches_of(images: Tensor, tokens: Tensor, owners: list[int], size: int) -> list[dict[str, Tensor]]:
    result = []
    for start in range(0, len(images), size):
        inside = [place for place, owner in enumerate(owners) if start <= owner < start + size]
        result.append(
            {
                "image": images[start : start + size],
                "text": tokens[inside],
                "text_rows": torch.tensor([owners[place] - start for place in inside]),
            }
        )
    return result


def test_several_captions_with_a_real_model(clip: Clip) -> None:
    images = torch.randint(0, 256, (11, 3, 64, 64), dtype=torch.uint8)
    owners = sorted(list(range(11)) * 2 + [3, 3, 7])
    texts = [f"caption {number} about {'many ' * (number % 4)}things" for number in range(len(owners))]
    tokens = clip.tokenizer(texts)
    found = retrieval(clip, batches_of(images, tokens, owners, 4))
    with torch.no_grad():
        scores = (clip.eval().encode_image(images) @ clip.encode_text(tokens).T).numpy()
    belongs = np.array(owners)
    i2t = [1 + int((scores[i][belongs != i] >= scores[i][belongs == i].max()).sum()) for i in range(11)]
    t2i = [1 + int((np.delete(scores[:, j], owners[j]) >= scores[owners[j], j]).sum()) for j in range(len(owners))]
    for depth in (1, 5, 10):
        assert found[f"i2t_r{depth}"] == pytest.approx(np.mean(np.array(i2t) <= depth))
        assert found[f"t2i_r{depth}"] == pytest.approx(np.mean(np.array(t2i) <= depth))
    assert found["i2t_median_rank"] == np.median(i2t) and found["t2i_median_rank"] == np.median(t2i)
    assert found["chance"] == pytest.approx(1 / 11)


def test_images_that_share_a_caption_are_both_right(clip: Clip) -> None:
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    tokens = clip.tokenizer(["a disc", "a disc", "a star"])
    found = retrieval(clip, [{"image": images, "text": tokens}])
    with torch.no_grad():
        scores = clip.eval().encode_image(images) @ clip.encode_text(tokens[1:]).T
    best = scores.argmax(dim=0).tolist()
    assert found["t2i_r1"] == ((best[0] in (0, 1)) + (best[1] == 2)) / 2
    assert found["chance"] == pytest.approx(3 / 6)


def test_texts_of_different_width_are_put_together(clip: Clip) -> None:
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    tokens = clip.tokenizer(["a", "a b c d", "e", "f g"])
    whole = retrieval(clip, [{"image": images, "text": tokens}])
    cut = [{"image": images[:2], "text": tokens[:2, :8]}, {"image": images[2:], "text": tokens[2:, :5]}]
    assert retrieval(clip, cut) == whole


def test_nothing_to_evaluate_is_said(clip: Clip) -> None:
    with pytest.raises(SettingError, match="one sample or more"):
        retrieval(clip, [])
