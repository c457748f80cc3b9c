"""The vocabulary: size, disjoint names, long-tailed frequencies, and fair splits."""

import colorsys
import hashlib
import itertools

import numpy as np
import pytest

from pipeline.sources.drawn import words, world
from pipeline.sources.drawn.draws import PURPOSES, Draws
from pipeline.sources.drawn.outlines import coverage, outline_of
from pipeline.sources.drawn.scenes import sample_rgb


def test_the_world_is_as_large_as_promised() -> None:
    assert len(world.SHAPES) >= 24 and len(world.COLOURS) == 10 and len(world.TEXTURES) == 6
    assert len(world.STYLES) == 5 and len(world.SIZES) == 3 and len(world.GROUNDS) == 8
    assert all(noun.synonyms and noun.hypernym for noun in world.SHAPES)


def test_no_word_means_two_things() -> None:
    nouns = [name for noun in world.SHAPES for name in (noun.name, *noun.synonyms, *noun.variants)]
    colours = [name for colour in world.COLOURS for name in (colour.name, *colour.synonyms)]
    others = [text for word in (*world.TEXTURES, *world.SIZES) for text in word.words]
    hypernyms = {noun.hypernym for noun in world.SHAPES}
    every = [*nouns, *map(world.plural, nouns), *colours, *others, *hypernyms, *words.GENERIC]
    unchanged = {name for name in nouns if world.plural(name) == name}
    assert len(every) - len(unchanged) == len(set(every))


def test_chatter_names_nothing_of_the_world() -> None:
    nouns = {part for noun in world.SHAPES for name in (noun.name, *noun.synonyms) for part in name.split()}
    adjectives = {part for word in (*world.TEXTURES, *world.SIZES) for text in word.words for part in text.split()}
    colours = {part for colour in world.COLOURS for name in (colour.name, *colour.synonyms) for part in name.split()}
    chatter = {part for text in (*words.CLAUSES, *words.UNRELATED) for part in text.split()}
    assert not chatter & (nouns | adjectives | colours | set(words.GENERIC) | set(world.NUMBER_WORDS) - {"one"})


def test_colour_regions_do_not_overlap() -> None:
    """Checked on a fine grid of HSV, apart from the code that names colours."""

    def inside(colour: world.Colour, hue: float, saturation: float, value: float) -> bool:
        turned = hue - 360 if colour.hue[0] < 0 and hue > 180 else hue
        return (
            colour.hue[0] <= turned <= colour.hue[1]
            and colour.saturation[0] <= saturation <= colour.saturation[1]
            and colour.value[0] <= value <= colour.value[1]
        )

    steps = np.linspace(0, 1, 41)
    for hue, saturation, value in itertools.product(range(0, 360, 2), steps, steps):
        assert sum(inside(colour, hue, saturation, value) for colour in world.COLOURS) <= 1


@pytest.mark.parametrize("name", world.COLOUR_NAMES)
def test_sampled_colours_vary_and_keep_their_name(name: str) -> None:
    values = [sample_rgb(Draws(0, "test", index, "scene"), name) for index in range(300)]
    assert {world.name_colour(*value) for value in values} == {name}
    assert len(set(values)) > 30
    hue_saturation = np.array([colorsys.rgb_to_hsv(*(part / 255 for part in value))[1:] for value in values])
    assert hue_saturation.std(axis=0).max() > 0.01


def test_held_out_pairs_are_a_fifth_and_even() -> None:
    held_out = world.held_out_pairs()
    assert len(held_out) == 48 and len(world.seen_pairs()) == 192
    assert not set(held_out) & set(world.seen_pairs())
    shapes = [shape for shape, _ in held_out]
    colours = [colour for _, colour in held_out]
    assert {shapes.count(shape) for shape in world.SHAPE_NAMES} == {2}
    assert {colours.count(colour) for colour in world.COLOUR_NAMES} <= {4, 5}


def test_base_and_novel_and_rare_and_unseen() -> None:
    assert len(world.base_shapes()) == 18 and len(world.novel_shapes()) == 6
    assert set(world.base_shapes()) | set(world.novel_shapes()) == set(world.SHAPE_NAMES)
    frequencies = world.SHAPE_FREQUENCIES
    assert sum(frequencies.values()) == pytest.approx(1)
    assert max(frequencies[name] for name in world.RARE_SHAPES) == sorted(frequencies.values())[2]
    assert world.UNSEEN_STYLE not in world.seen_styles() and len(world.seen_styles()) == 4


def test_every_shape_has_an_outline_of_its_own() -> None:
    """Upright, no two shapes share more than 92 % of their pixels (intersection over union)."""
    names = [(noun.name, variant) for noun in world.SHAPES for variant in noun.variants[:1] or (None,)]
    masks = [coverage(outline_of(*name).placed(np.eye(2) * 50, (64, 64)), 128) >= 128 for name in names]
    for (one, first), (other, second) in itertools.combinations(zip(names, masks, strict=True), 2):
        overlap = (first & second).sum() / (first | second).sum()
        assert overlap < 0.92, (one, other)


@pytest.mark.parametrize(
    ("many", "one"), [("leaves", "leaf"), ("crosses", "cross"), ("boxes", "box"), ("fish", "fish")]
)
def test_plurals(many: str, one: str) -> None:
    assert world.plural(one) == many


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 as the paper writes it: ten rounds of two 64 x 64 bit multiplications."""
    mask = (1 << 64) - 1
    x, k = list(counter), list(key)
    for _ in range(10):
        high, low = divmod(x[0] * 0xD2E7470EE14C6C93, 1 << 64)
        other_high, other_low = divmod(x[2] * 0xCA5A826395121157, 1 << 64)
        x = [other_high ^ x[1] ^ k[0], other_low, high ^ x[3] ^ k[1], low]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return x


def test_streams_are_the_published_generator() -> None:
    key = [7, int.from_bytes(hashlib.sha256(b"train").digest()[:8], "big")]
    purpose = PURPOSES.index("words")
    # numpy counts up before each block of four; Draws takes a buffer of 160 numbers from its end.
    raw = [number for block in range(1, 41) for number in philox([block, 0, purpose, 12], key)]
    draws = Draws(7, "train", 12, "words")
    assert [draws.random() for _ in range(160)] == [(number >> 11) * 2.0**-53 for number in reversed(raw)]


def test_streams_differ_by_each_part_of_their_name() -> None:
    names = [(8, "train", 12, "words"), (7, "val", 12, "words"), (7, "train", 13, "words"), (7, "train", 12, "scene")]
    first = {Draws(*name).random() for name in [(7, "train", 12, "words"), *names]}
    assert len(first) == 5 and all(0 <= number < 1 for number in first)


def test_choices_follow_their_odds() -> None:
    draws = Draws(1, "train", 0, "scene")
    odds = world.cumulate([6, 3, 1])
    counts = np.bincount([draws.weighted(odds) for _ in range(20_000)], minlength=3) / 20_000
    np.testing.assert_allclose(counts, [0.6, 0.3, 0.1], atol=0.015)
    numbers = np.array([draws.normal() for _ in range(20_000)])
    assert abs(numbers.mean()) < 0.03 and abs(numbers.std() - 1) < 0.03
    assert sorted(draws.shuffled(range(9))) == list(range(9))
