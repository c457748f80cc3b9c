"""CIDEr-D and BLEU against figures of pycocoevalcap 1.2 (its Python scorers, without its tokenizer) and by hand."""

import math

import pytest

from pipeline.evaluation.caption_scores import bleu, caption_metrics, caption_words, cider

REFERENCES = [
    ["a red star above a blue disc", "the star is red and it is over a disc"],
    ["two green keys on a wall"],
    ["a man rides a horse on the beach", "a person riding a horse", "man on horse near the sea"],
    ["a dog"],
]
WRITTEN = [
    "a red star over a blue disc",
    "two keys on a green wall",
    "a man riding a horse on a beach",
    "a cat sits on a very long red sofa in the sun",
]


def words(texts: list[str]) -> list[list[str]]:
    return [caption_words(text) for text in texts]


def test_the_official_figures() -> None:
    found = cider(words(WRITTEN), [words(some) for some in REFERENCES])
    assert found == pytest.approx([3.09981168, 4.125, 2.38412241, 0.0], abs=1e-6)
    metrics = caption_metrics(WRITTEN, REFERENCES)
    assert metrics["cider"] == pytest.approx(2.4022335212, abs=1e-6)
    expected = [0.6363636363, 0.4913036844, 0.3641190038]
    assert [metrics[f"bleu{n}"] for n in (1, 2, 3)] == pytest.approx(expected, abs=1e-6)
    assert metrics["bleu4"] == 0, "no four words in a row are right"


def test_one_word_by_hand() -> None:
    """Two images with references "cat" and "dog": only single words exist, each with a weight of log 2."""
    found = cider([["cat"], ["cat", "cat"]], [[["cat"]], [["dog"]]])
    assert found == pytest.approx([10 / 4, 0.0])
    # Twice the word: the clipped product is log 2 squared, the lengths are 2 log 2 and log 2, one word too many.
    (twice, _) = cider([["cat", "cat"], ["x"]], [[["cat"]], [["dog"]]])
    assert twice == pytest.approx(10 / 4 * 0.5 * math.exp(-1 / 72))


def test_an_n_gram_of_every_image_counts_nothing() -> None:
    assert cider([["a"], ["a"]], [[["a"]], [["a"]]]) == [0.0, 0.0]


def test_equal_captions_are_ten_and_empty_ones_nothing() -> None:
    texts = ["a b c d e", "f g h i j"]
    assert cider(words(texts), [[one] for one in words(texts)]) == pytest.approx([10.0, 10.0])
    metrics = caption_metrics(["", ""], [[one] for one in texts])
    assert set(metrics.values()) == {0.0}


def test_the_brevity_penalty_takes_the_closest_reference() -> None:
    found = bleu([["a", "b"]], [[["a", "b", "c"], ["a", "b", "c", "d", "e", "f"]]])
    assert found["bleu1"] == pytest.approx(math.exp(1 - 3 / 2))


def test_words() -> None:
    assert caption_words("A dog's toy, 2 balls.") == ["a", "dog's", "toy", "2", "balls"]
