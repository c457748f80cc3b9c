"""Prompts of grounding data: names or captions as one text, and which of its tokens name a box.

Li, Zhang, Zhang et al., 2021, "Grounded Language-Image Pre-training", arXiv 2112.03857, sections 3.1 and C.1. The names
of a detector's classes become the text "person. bicycle. car": all classes in the image, and sampled others. A caption
stays as it is; other captions may be added as negatives. A box is matched with all tokens of its phrase.

Spans are Unicode code points of a text, the end exclusive. Random choices are functions of random bits, which come from
:func:`~pipeline.loaders.order.random_bits`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pipeline.config import require
from pipeline.errors import SettingError, unreadable
from pipeline.loaders.order import uniform
from pipeline.shards.objects import plain_word

Span = tuple[int, int]
Bits = NDArray[np.uint64]

START, END, PAD, UNKNOWN, MASK = "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"
SPECIAL = (PAD, UNKNOWN, START, END, MASK)
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_MASK = "\u00f0\u0141\u0134\u0133</w>"
"""The token that GLIPv2's public code takes as CLIP's mask, which has none: an emoji."""
SEPARATOR = ". "
DRAWN = "drawn"
"""Name of the tokenizer with the words of the embedded world."""
DRAWN_QUESTIONS = "drawn-questions"
"""Name of the tokenizer that also knows the words of its questions."""
REMEMBERED_TEXTS = 65_536


@dataclass(frozen=True)
class TokenizedText:
    """``ids`` int64 [M], the start and the end included, and the ``offsets`` int64 [M, 2] of each token in the text,
    (0, 0) for the start and the end; ``whole`` is False where the text was cut."""

    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    whole: bool

    def __len__(self) -> int:
        return len(self.ids)

    def positive(self, spans: Iterable[Span]) -> NDArray[np.bool_]:
        """Bool [M]: the tokens that share a character with a span.

        A span that reaches beyond the end of a cut text has no tokens, so that no phrase is known by a part of it.
        """
        found = np.zeros(len(self.ids), np.bool_)
        last = int(self.offsets[:, 1].max(initial=0))
        for start, end in spans:
            if start < end and (self.whole or end <= last):
                found |= (self.offsets[:, 0] < end) & (self.offsets[:, 1] > start)
        return found


class SpanTokenizer:
    """BERT's or CLIP's tokenizer with the position of each token in the text; pickles as its description."""

    def __init__(self, description: str) -> None:
        """``description`` is the JSON text of a tokenizer of the library ``tokenizers``: a ``tokenizer.json``.

        Raises:
            SettingError: not such a text, or one without the special tokens of BERT or of CLIP.
        """
        self.description = description
        try:
            self._tokenizer = Tokenizer.from_str(description)
        except Exception as error:  # the library raises plain Exceptions
            raise SettingError("tokenizer", description[:80], f"a tokenizer.json ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        numbers = self._tokenizer.get_vocab(with_added_tokens=True)
        clip = CLIP_START in numbers and CLIP_END in numbers
        start, end, pad, mask = (CLIP_START, CLIP_END, CLIP_END, CLIP_MASK) if clip else (START, END, PAD, MASK)
        missing = [token for token in (start, end, pad) if token not in numbers]
        allowed = f"a tokenizer with {START}, {END} and {PAD}, or with {CLIP_START} and {CLIP_END}"
        require(not missing, "tokenizer", missing, allowed)
        self.start, self.end, self.pad, self.mask = numbers[start], numbers[end], numbers[pad], numbers.get(mask)
        self.vocab_size = max(numbers.values()) + 1
        self._remembered = lru_cache(REMEMBERED_TEXTS)(self._count)

    def __reduce__(self) -> tuple[type["SpanTokenizer"], tuple[str]]:
        return SpanTokenizer, (self.description,)

    @classmethod
    def of_words(cls, words: Sequence[str], lower: bool = True) -> "SpanTokenizer":
        """WordPiece with this vocabulary, ``##`` before pieces inside of a word, in the order of the token numbers."""
        encoder = {word: number for number, word in enumerate(words)}
        missing = [token for token in SPECIAL[:4] if token not in encoder]
        require(not missing, "tokenizer", missing, "a vocabulary with " + ", ".join(SPECIAL[:4]))
        made = Tokenizer(models.WordPiece(vocab=encoder, unk_token=UNKNOWN, max_input_chars_per_word=100))
        made.add_special_tokens([token for token in SPECIAL if token in encoder])
        made.normalizer = normalizers.BertNormalizer(lowercase=lower)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        made.post_processor = processors.BertProcessing((END, encoder[END]), (START, encoder[START]))
        return cls(made.to_str())

    @classmethod
    def load(cls, name: str) -> "SpanTokenizer":
        """The tokenizer ``name``: a folder or model id of transformers, a ``vocab.txt``, ``drawn`` or
        ``drawn-questions``.

        Raises:
            SettingError: no such tokenizer, or one without positions of tokens.
        """
        if name in (DRAWN, DRAWN_QUESTIONS):
            from pipeline.sources.drawn.questions import question_words
            from pipeline.sources.drawn.words import vocabulary

            more = question_words() if name == DRAWN_QUESTIONS else frozenset()
            return cls.of_words(small_vocabulary(vocabulary() | more))
        file = Path(name) if name.endswith(".txt") else Path(name) / "vocab.txt"
        if name.endswith(".txt") or (file.is_file() and not file.with_name("tokenizer.json").is_file()):
            try:
                return cls.of_words(file.read_text(encoding="utf-8").splitlines())
            except (OSError, UnicodeDecodeError) as error:
                raise unreadable("tokenizer", str(file), "a vocabulary, one piece per line", error) from error
        from transformers import AutoTokenizer

        allowed = "a folder or a model id of transformers with a fast tokenizer, a vocab.txt, or drawn"
        try:
            known: Any = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise SettingError("tokenizer", name, f"{allowed} ({str(error).splitlines()[0]})") from error
        require(getattr(known, "is_fast", False), "tokenizer", name, allowed)
        return cls(known.backend_tokenizer.to_str())

    def __call__(self, text: str, most: int = 256) -> TokenizedText:
        """The tokens of ``text``, at most ``most`` with start and end."""
        return self._cut(self._tokenizer.encode(text, add_special_tokens=False), most)

    def batch(self, texts: Sequence[str], most: int = 256) -> list[TokenizedText]:
        """Like calling it for every text, in parallel threads of the library."""
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [self._cut(one, most) for one in found]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        ending = getattr(self._tokenizer.model, "end_of_word_suffix", None)
        return text.replace(ending, " ").strip() if ending else text

    def count(self, text: str) -> int:
        """The number of pieces of ``text``, without start and end."""
        return self._remembered(text)

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _cut(self, found: Encoding, most: int) -> TokenizedText:
        kept = min(len(found.ids), most - 2)
        ids = np.array([self.start, *found.ids[:kept], self.end], np.int64)
        offsets = np.array([(0, 0), *found.offsets[:kept], (0, 0)], np.int64)
        return TokenizedText(ids, offsets, kept == len(found.ids))


def small_vocabulary(words: Iterable[str]) -> tuple[str, ...]:
    """A WordPiece vocabulary of ``words``, sorted; other words of ASCII are spelt by characters."""
    characters = [chr(number) for number in range(33, 127) if not chr(number).isupper()]
    inner = [f"##{character}" for character in characters if character.isalnum()]
    return (*SPECIAL, *characters, *inner, *sorted({word.lower() for word in words if len(word) > 1}))


@dataclass(frozen=True)
class Prompt:
    """A text, and the span of each name in it, in the order of the names."""

    text: str
    spans: tuple[Span, ...]


def join_names(names: Sequence[str]) -> Prompt:
    """``person. bicycle. car``"""
    spans, start = [], 0
    for name in names:
        spans.append((start, start + len(name)))
        start += len(name) + len(SEPARATOR)
    return Prompt(SEPARATOR.join(names), tuple(spans))


def clean_name(name: str) -> str:
    """``hot dog`` of ``Hot_Dog_(food); frankfurter``: the first name without underscores and parentheses."""
    plain = plain_word(name)
    return " ".join(re.sub(r"\([^()]*\)", " ", plain).split()) or plain


def name_chunks(
    names: Sequence[str], tokenizer: SpanTokenizer, most_names: int = 40, most_tokens: int = 256
) -> list[tuple[range, Prompt]]:
    """Prompts that together hold all ``names`` in order, with the numbers of the names in each.

    Each has at most ``most_names`` names and ``most_tokens`` tokens with start and end.

    Raises:
        SettingError: a name without tokens, or with more than a prompt holds.
    """
    cleaned = [clean_name(name) for name in names]
    budget, starts, used = most_tokens - 2, [0], 0
    for number, name in enumerate(cleaned):
        cost = tokenizer.count(name)
        require(0 < cost <= budget, "words", name, f"names of 1 to {budget} tokens")
        joined = used + cost + (tokenizer.count(SEPARATOR) if number > starts[-1] else 0)
        if number > starts[-1] and (joined > budget or number - starts[-1] >= most_names):
            starts.append(number)
            joined = cost
        used = joined
    parts = [range(first, last) for first, last in zip(starts, [*starts[1:], len(cleaned)], strict=True)]
    return [(part, join_names(cleaned[part.start : part.stop])) for part in parts if part]


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How prompts are made, with the paper's values."""

    text_tokens: int = 256
    """Maximum number of text tokens per image, with start and end; 8 to 512."""
    prompt_classes: int = 85
    """Maximum number of classes in a prompt; the classes in the image come first, sampled others fill it."""
    full_prompts: float = 0.5
    """Probability of a prompt with the maximum number of classes; else the number of sampled classes is uniform."""
    captions_alone: float = 0.4
    """Probability that a caption is used without captions of other images."""
    captions_filled: float = 0.3
    """Probability that a caption is mixed with the maximum number of others; else their number is uniform."""
    mixed_captions: int = 19
    """Maximum number of captions of other images that are added to a caption; 0 adds none."""
    fixed_prompts: bool = False
    """Use prompts without random choices in training: all classes in their order, as many as fit; captions alone."""

    def __post_init__(self) -> None:
        require(8 <= self.text_tokens <= 512, "text_tokens", self.text_tokens, "8 to 512")
        require(self.prompt_classes >= 1, "prompt_classes", self.prompt_classes, "1 or more")
        require(0 <= self.full_prompts <= 1, "full_prompts", self.full_prompts, "0 to 1")
        require(0 <= self.captions_alone <= 1, "captions_alone", self.captions_alone, "0 to 1")
        rest = 1 - self.captions_alone
        require(0 <= self.captions_filled <= rest + 1e-9, "captions_filled", self.captions_filled, f"0 to {rest:g}")
        require(0 <= self.mixed_captions <= 1000, "mixed_captions", self.mixed_captions, "0 to 1000")


class ClassVocabulary:
    """The class names of a data set, cleaned, with the number of pieces of each."""

    def __init__(self, classes: Sequence[str], tokenizer: SpanTokenizer) -> None:
        """Of classes with an equal name the first one counts."""
        self.names = tuple(dict.fromkeys(clean_name(name) for name in classes))
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.names)

    def number(self, label: str) -> int | None:
        """The number of the class of ``label``; ``None`` where it is none of the classes."""
        return self._numbers.get(clean_name(label))

    @cached_property
    def costs(self) -> NDArray[np.int64]:
        """int64 [C]: the pieces of each name and of a separator; 0 for a name without pieces."""
        counts = np.array([self._tokenizer.count(name) for name in self.names], np.int64)
        return np.where(counts > 0, counts + self._tokenizer.count(SEPARATOR), 0)

    def choose(
        self, present: Sequence[int], allowed: Sequence[int] | None, options: PromptOptions, bits: Bits | None
    ) -> list[int]:
        """The numbers of the classes of a prompt, in its order.

        Classes in the image (``present``) come before sampled ones from ``allowed`` (all if ``None``), as long as
        tokens last; present ones that do not fit are left out. Without ``bits`` the order is that of the classes, and
        as many as possible are used. ``bits`` are 2 + 2 C integers.
        """
        count = len(self.names)
        ranks = np.arange(count) if bits is None else np.argsort(bits[2 : 2 + count], kind="stable")
        here = set(present)
        pool = here if allowed is None else here | set(allowed)
        first = [number for number in ranks.tolist() if number in here]
        others = [n for n in ranks.tolist() if n not in here and (allowed is None or n in pool)]
        most = min(max(options.prompt_classes - len(first), 0), len(others))
        chosen = self._fitting([*first, *others[: _number_of(most, options.full_prompts, bits)]], options)
        if bits is None:
            return sorted(chosen)
        shuffle = bits[2 + count : 2 + 2 * count]
        return sorted(chosen, key=lambda number: int(shuffle[number]))

    def _fitting(self, numbers: Sequence[int], options: PromptOptions) -> list[int]:
        # The last name has no separator, so one more piece is available.
        left, kept = options.text_tokens - 2 + self._tokenizer.count(SEPARATOR), []
        for number in numbers[: options.prompt_classes]:
            if 0 < self.costs[number] <= left:
                left -= int(self.costs[number])
                kept.append(number)
        return kept


def mix_captions(
    caption: str, others: Sequence[str], tokenizer: SpanTokenizer, options: PromptOptions, bits: Bits | None
) -> tuple[str, int]:
    """``caption`` among captions of other images in random order, and the code point at which it begins.

    ``caption`` stays whole; others are added as long as all fit. ``bits`` are 3 + 2 x ``mixed_captions`` integers;
    without them ``caption`` stays alone.
    """
    if bits is None or not others or not options.mixed_captions:
        return caption, 0
    kind = uniform(bits[0])
    if kind < options.captions_alone:
        return caption, 0
    full = kind < options.captions_alone + options.captions_filled
    count = options.mixed_captions if full else 1 + int(uniform(bits[1]) * options.mixed_captions)
    picks = [others[int(uniform(one) * len(others))] for one in bits[3 : 3 + count]]
    left, added = options.text_tokens - 2 - tokenizer.count(_sentence(caption)), []
    for text in dict.fromkeys(_sentence(pick) for pick in picks if pick.strip()):
        cost = tokenizer.count(text)
        if text != _sentence(caption) and cost <= left:
            left -= cost
            added.append(text)
    order = np.argsort(bits[3 + count : 3 + count + len(added)], kind="stable").tolist()
    place = int(uniform(bits[2]) * (len(added) + 1))
    before = [added[number] for number in order[:place]]
    after = [added[number] for number in order[place:]]
    start = sum(len(text) + 1 for text in before)
    return " ".join([*before, _sentence(caption) if after else caption, *after]), start


def _sentence(text: str) -> str:
    """The text with a full stop at its end; nothing before its end changes."""
    return text if text.endswith(".") else f"{text}."


def _number_of(most: int, full: float, bits: Bits | None) -> int:
    """``most`` with probability ``full``, else uniform from 1 to ``most``."""
    if bits is None or not most or uniform(bits[0]) < full:
        return most
    return 1 + int(uniform(bits[1]) * most)
