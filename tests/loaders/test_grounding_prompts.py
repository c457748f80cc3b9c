"""Spans, tokens and prompts, against transformers' own mapping, brute force and examples by hand."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from transformers import BertTokenizerFast

from pipeline.dataset import load_card
from pipeline.errors import SettingError
from pipeline.loaders.grounding_prompts import (
    SPECIAL,
    ClassVocabulary,
    PromptOptions,
    SpanTokenizer,
    clean_name,
    join_names,
    mix_captions,
    name_chunks,
    small_vocabulary,
)
from pipeline.loaders.order import random_bits

WORDS = ("dog", "red", "bus", "squ", "##are", "cat", "##s", "a", "the", "on", "mat", "cafe", "lit")
CORPUS = (
    "a red bus and a red bus",
    "The dog's mat; DOG!",
    "a well-lit caf\u00e9 (the Cafe\u0301)",
    "\u6771\u4eac dog \U0001f415\u200d cat",
    "tab\tdog\x00cat\u200b bus\ufeff",
    "  squares  on the\u00a0mat ",
    "\ufb01re dog \u0130stanbul cat",
    "",
    "\u200b\x07",
)


@pytest.fixture(scope="module")
def tokenizer() -> SpanTokenizer:
    return SpanTokenizer.of_words(small_vocabulary(WORDS))


def transformers_tokenizer(folder: Path) -> BertTokenizerFast:
    (folder / "vocab.txt").write_text("\n".join(small_vocabulary(WORDS)), encoding="utf-8")
    return BertTokenizerFast(vocab=str(folder / "vocab.txt"))


def test_tokens_are_those_of_transformers(tokenizer: SpanTokenizer, tmp_path: Path) -> None:
    known = transformers_tokenizer(tmp_path)
    for text in CORPUS:
        expected = known(text, return_offsets_mapping=True)
        found = tokenizer(text)
        assert found.ids.tolist() == expected["input_ids"], text
        assert [tuple(pair) for pair in found.offsets.tolist()] == expected["offset_mapping"], text
    assert SpanTokenizer.load(str(tmp_path)).description == tokenizer.description
    assert pickle.loads(pickle.dumps(tokenizer))("dog squares").ids.tolist() == tokenizer("dog squares").ids.tolist()


def test_every_span_has_the_tokens_of_its_characters(tokenizer: SpanTokenizer, tmp_path: Path) -> None:
    """All spans of all texts of the corpus, against transformers' token of each single character."""
    known, spans = transformers_tokenizer(tmp_path), 0
    for text in CORPUS:
        encoded, found = known(text), tokenizer(text)
        own = [encoded.char_to_token(position) for position in range(len(text))]
        for start in range(len(text)):
            for end in range(start + 1, len(text) + 1):
                expected = np.zeros(len(found), bool)
                expected[[token for token in own[start:end] if token is not None]] = True
                assert np.array_equal(found.positive([(start, end)]), expected), (text, start, end)
                spans += 1
    assert spans > 1500


def test_repeated_words_differ_and_spans_are_joined(tokenizer: SpanTokenizer) -> None:
    found = tokenizer("a red bus and a red bus")
    second = found.positive([(16, 23)])
    assert np.flatnonzero(second).tolist() == np.flatnonzero(found.positive([(2, 9)]) | second).tolist()[2:]
    assert found.positive([(2, 9), (16, 23)]).sum() == 4
    assert not found.positive([]).any()


def test_a_phrase_behind_the_limit_has_no_tokens_even_if_it_begins_before(tokenizer: SpanTokenizer) -> None:
    text = "a dog on the mat"
    cut = tokenizer(text, 5)
    assert len(cut) == 5 and not cut.whole
    assert cut.positive([(2, 5)]).tolist() == [False, False, True, False, False]
    assert not cut.positive([(2, 12)]).any() and not cut.positive([(9, 16)]).any()
    assert tokenizer(text, 7).whole and not tokenizer(text, 6).whole


def test_names_are_cleaned_and_joined() -> None:
    assert clean_name("Hot_Dog_(food); frankfurter") == "hot dog"
    assert clean_name("(plain)") == "(plain)"
    prompt = join_names(["person", "hot dog", "car"])
    assert prompt.text == "person. hot dog. car"
    assert [prompt.text[start:end] for start, end in prompt.spans] == ["person", "hot dog", "car"]
    assert join_names([]).text == ""


def test_chunks_hold_every_name_once_and_fit(tokenizer: SpanTokenizer) -> None:
    names = [f"dog {number}" for number in range(100)]
    parts = name_chunks(names, tokenizer, 40, 64)
    assert [number for part, _ in parts for number in part] == list(range(100))
    assert all(tokenizer(prompt.text, 64).whole and len(part) <= 40 for part, prompt in parts)
    # Greedy: the first name of the next prompt would not have fitted.
    for (part, prompt), (after, _) in zip(parts, parts[1:], strict=False):
        longer = join_names([*(names[number] for number in part), names[after.start]])
        assert len(part) == 40 or not tokenizer(longer.text, 64).whole, prompt
    assert [len(part) for part, _ in name_chunks(["cat"] * 100, tokenizer, 40)] == [40, 40, 20]
    with pytest.raises(SettingError, match="words"):
        name_chunks(["cat", "\u200b"], tokenizer)


def test_the_names_of_coco_are_one_prompt() -> None:
    """80 names, 79 separators, and fewer tokens than the longest text; LVIS's 1,203 are 31 prompts of 40."""
    names = load_card("coco_object").classes
    words = {word for name in names for word in name.split()}
    tokenizer = SpanTokenizer.of_words(small_vocabulary(words))
    ((part, prompt),) = name_chunks(names, tokenizer, 80)
    assert len(part) == 80 and prompt.text.count(". ") == 79 and not prompt.text.endswith(".")
    tokens = len(tokenizer(prompt.text))
    assert tokens == sum(len(name.split()) for name in names) + 79 + 2 < 256
    assert len(name_chunks(["cat"] * 1203, tokenizer, 40)) == 31


def bits_of(number: int, count: int) -> np.ndarray:
    return random_bits(7, 20, 0, number, count)


def test_prompts_of_classes(tokenizer: SpanTokenizer) -> None:
    """All present classes, filled to 85 in half of the prompts, else a uniform number of others; in every order."""
    vocabulary = ClassVocabulary([f"cat {number}" for number in range(300)], tokenizer)
    options, sizes, orders = PromptOptions(text_tokens=512), [], set()
    for number in range(400):
        chosen = vocabulary.choose([5, 17], None, options, bits_of(number, 2 + 600))
        assert {5, 17} <= set(chosen) and len(set(chosen)) == len(chosen) <= 85
        sizes.append(len(chosen))
        orders.add((chosen.index(5) < chosen.index(17), chosen.index(5) < len(chosen) / 2))
    full = np.mean(np.array(sizes) == 85)
    others = np.array([size - 2 for size in sizes if size < 85])
    assert 0.42 < full < 0.6 and len(orders) == 4
    assert others.min() >= 1 and np.mean(others) == pytest.approx(42, abs=5)
    again = vocabulary.choose([5, 17], None, options, bits_of(3, 602))
    assert again == vocabulary.choose([5, 17], None, options, bits_of(3, 602))


def test_prompts_of_verified_classes_and_of_small_budgets(tokenizer: SpanTokenizer) -> None:
    vocabulary = ClassVocabulary(["dog", "cat", "bus", "squares", "mat"], tokenizer)
    options = PromptOptions(full_prompts=1.0)
    for number in range(20):
        assert set(vocabulary.choose([0], [2], options, bits_of(number, 12))) == {0, 2}
    assert vocabulary.choose([3], None, options, None) == [0, 1, 2, 3, 4]
    # Six pieces besides start and end: squ ##are ##s . dog, and no room for another.
    small = PromptOptions(text_tokens=8, full_prompts=1.0)
    seen = set()
    for number in range(50):
        chosen = vocabulary.choose([3, 0, 1], None, small, bits_of(number, 12))
        text = join_names([vocabulary.names[one] for one in chosen]).text
        assert tokenizer(text, 8).whole and chosen
        seen.add(frozenset(chosen))
    assert {frozenset({3, 0}), frozenset({3, 1})} <= seen  # a present class that does not fit is left out
    assert vocabulary.number("Dog.") == 0 and vocabulary.number("horse") is None


def test_captions_are_mixed(tokenizer: SpanTokenizer) -> None:
    """The caption stays whole, also if another one is the same or contains it; all shares are the paper's."""
    others = ["a dog on a mat", "the red bus.", "a dog", *(f"the cat {number}" for number in range(50))]
    options, kinds, places = PromptOptions(text_tokens=512), [], []
    for number in range(400):
        text, start = mix_captions("a dog", others, tokenizer, options, bits_of(number, 3 + 38))
        assert text[start : start + 5] == "a dog" and tokenizer(text, 512).whole
        assert not start or text[start - 2 : start] == ". "
        assert text.count("a dog. ") + text.endswith("a dog") <= 1
        kinds.append(text.count("."))
        places.append(start > 0)
    alone = np.mean(np.array(kinds) == 0)
    assert 0.33 < alone < 0.47 and max(kinds) > 10 and 0.3 < np.mean(places) < 0.6
    short = PromptOptions(text_tokens=16)
    for number in range(50):
        text, _ = mix_captions("a dog on the red mat", others, tokenizer, short, bits_of(number, 41))
        assert tokenizer(text, 16).whole
    assert mix_captions("a dog", others, tokenizer, options, None) == ("a dog", 0)
    assert mix_captions("a dog", [], tokenizer, options, bits_of(0, 41)) == ("a dog", 0)


def test_the_drawn_world_has_words_of_its_own() -> None:
    tokenizer = SpanTokenizer.load("drawn")
    assert tokenizer.count("a red star to the left of a key") == 9
    assert tokenizer.count("stars") == 2 and tokenizer.count("zebra") == 5
    assert tokenizer.pad == 0 and tokenizer.mask == SPECIAL.index("[MASK]")


@pytest.mark.parametrize("name", ["/no/such/folder", "/no/such/vocab.txt"])
def test_unknown_tokenizers(name: str) -> None:
    with pytest.raises(SettingError, match="tokenizer"):
        SpanTokenizer.load(name)


def test_broken_tokenizers() -> None:
    with pytest.raises(SettingError, match=r"\[CLS\]"):
        SpanTokenizer.of_words(["a", "b"])
    with pytest.raises(SettingError, match="tokenizer.json"):
        SpanTokenizer("{}")


def test_class_names_with_punctuation_and_duplicates(tokenizer: SpanTokenizer) -> None:
    """Equal names are one class; a name's tokens spell it, whatever is in it; a name without tokens is in no prompt."""
    names = ["Dog", "dog", "t-shirt", "c++", "St. Bernard", "cup (for tea)", "\u200b", "it's"]
    vocabulary = ClassVocabulary(names, tokenizer)
    assert vocabulary.names == ("dog", "t-shirt", "c++", "st. bernard", "cup", "\u200b", "it's")
    assert vocabulary.number("DOG") == 0 and vocabulary.number("cup") == 4
    chosen = vocabulary.choose(list(range(7)), None, PromptOptions(), bits_of(0, 16))
    assert sorted(chosen) == [0, 1, 2, 3, 4, 6]
    prompt = join_names([vocabulary.names[number] for number in chosen])
    tokenized = tokenizer(prompt.text)
    for number, span in zip(chosen, prompt.spans, strict=True):
        kept = tokenized.offsets[tokenized.positive([span])]
        spelt = "".join(prompt.text[start:end] for start, end in kept.tolist())
        assert spelt == vocabulary.names[number].replace(" ", "")
