"""Nouns and verbs by NLTK's averaged perceptron tagger, as in GroupViT's code; noun phrases from the same tags.

GroupViT (Xu et al., 2022, arXiv 2202.11094) draws its prompts from words tagged NN, NNS and NNP, and from all verbs,
also forms of "be" and "have". Words tagged NNPS are left out.

NLTK downloads no data by itself here: ``python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng``.
"""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from pipeline.errors import SettingError
from pipeline.stages.annotate.extractor import FIELD, PhraseExtractor, PhraseSpan
from pipeline.stages.annotate.noun_phrases import BREAK, VERBS, TaggedWord, spans_of

NOUNS = frozenset(("NN", "NNS", "NNP"))


class NltkExtractor:
    """Tags sentence by sentence, as ``nltk.word_tokenize`` and ``nltk.pos_tag`` do."""

    def __init__(self, sentences: Any, tokenizer: Any, tagger: Any) -> None:
        self._sentences, self._tokenizer, self._tagger = sentences, tokenizer, tagger
        self.version = f"nltk {version('nltk')}"

    def extract(self, captions: Sequence[str]) -> list[list[PhraseSpan]]:
        """The spans of each caption."""
        return [spans_of(self._words(caption), NOUNS, VERBS) for caption in captions]

    def _words(self, caption: str) -> list[TaggedWord]:
        spans = [
            (first + start, first + end)
            for first, last in self._sentences.span_tokenize(caption)
            for start, end in self._tokenizer.span_tokenize(caption[first:last])
        ]
        tagged = self._tagger.tag([caption[start:end] for start, end in spans])
        return [
            TaggedWord(start, end, tag if word[0].isalnum() or tag in ("POS", ",") else BREAK)
            for (start, end), (word, tag) in zip(spans, tagged, strict=True)
        ]


def load(option: str) -> PhraseExtractor:
    """The extractor.

    Raises:
        SettingError: NLTK's data are not installed, or an option is given.
    """
    if option:
        raise SettingError(FIELD, f"nltk:{option}", "nltk, which has no option")
    from nltk.tag import PerceptronTagger
    from nltk.tokenize import NLTKWordTokenizer, PunktTokenizer

    try:
        return NltkExtractor(PunktTokenizer("english"), NLTKWordTokenizer(), PerceptronTagger())
    except LookupError as error:
        command = "python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng"
        raise SettingError(FIELD, "nltk", f"{command}, or rules", "NLTK's data are not installed") from error
