"""Captions and tokens."""

import pickle
import random
import string

import open_clip
import pytest
import torch

from pipeline.errors import SettingError
from pipeline.loaders import text
from pipeline.loaders.samples import UnreadableSample
from pipeline.loaders.text import WordTokenizer, caption_field, cut_text, faster, read_caption
from pipeline.shards.sample import Sample

END = 49407


def test_cut_keeps_every_first_end_of_text() -> None:
    tokens = torch.tensor([[5, END, 0, 0, 0], [5, 6, 7, END, 0], [5, END, 6, END, 0]])
    assert torch.equal(cut_text(tokens, END), tokens[:, :4])
    assert torch.equal(cut_text(tokens[[0, 2]], END), tokens[[0, 2], :2])
    assert torch.equal(cut_text(tokens, None), tokens)


def test_a_row_without_an_end_keeps_the_width() -> None:
    tokens = torch.tensor([[5, END, 0], [5, 6, 7]])
    assert torch.equal(cut_text(tokens, END), tokens)


def test_cut_of_open_clips_tokens() -> None:
    tokens = open_clip.get_tokenizer("ViT-B-32")(["a cat", "", "a much longer caption, with 4 digits: 1234" * 9])
    assert cut_text(tokens, END).shape == (3, 77)
    assert cut_text(tokens[:2], END).tolist() == [[49406, 320, 2368, END], [49406, END, 0, 0]]


NASTY = [
    "",
    " \t\n ",
    "A  Photo\tof\na CAT's dog; isn't, they'll, I'M we'Ve!!",
    "R&amp;D &amp;amp; &lt;b&gt; &eacute; AT&T &nosuch; &#65;&#x42;",
    "caf\u00e9 na\u00efve \u00c9COLE \u0130stanbul \u039f\u0394\u039f\u03a3 \ufb01sh",
    "\uff21\uff22 \u6771\u4eac \U0001f408\u200d\u2b1b",
    "schÃ¶n â€œquotedâ€\u009d \u2018curly\u2019 \u201cquotes\u201d",
    "a\rb\r\nc\x0bd\x0ce\x00f\x1bg\x1b[31mred\x7f \x85 \u00a0nbsp \u2028line \u3000wide",
    "<start_of_text> cat<end_of_text>dog <END_OF_TEXT> < end_of_text >",
    "http://host/a_b-c.jpg?x=1%20y #tag @name 3.14e-10 1/2 IMG_0001.JPG ---===--- 'twas ''s 's's",
    "word " * 200,
    "x" * 500,
    "\ud800 lone".encode("utf-8", "surrogatepass").decode("utf-8", "replace"),
]


def test_the_faster_tokenizer_gives_open_clips_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand-made captions, random bytes as UTF-8, random ASCII; twice, so that words are cached and reused."""
    monkeypatch.setattr(text, "REMEMBERED_WORDS", 50)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    generator = random.Random(0)
    texts = NASTY + [generator.randbytes(generator.randrange(60)).decode("utf-8", "replace") for _ in range(150)]
    texts += ["".join(generator.choices(string.printable, k=generator.randrange(80))) for _ in range(300)]
    quick = faster(tokenizer)
    assert isinstance(quick, WordTokenizer)
    for _ in range(2):
        for start in range(0, len(texts), 40):
            part = texts[start : start + 40]
            assert torch.equal(quick(part), tokenizer(part))
    assert torch.equal(pickle.loads(pickle.dumps(quick))(NASTY), tokenizer(NASTY))


def test_the_faster_tokenizer_does_not_grow() -> None:
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    quick = WordTokenizer(tokenizer)
    before = len(tokenizer.cache)
    quick([f"word{number} thing" for number in range(500)] + ["y" * 300])
    assert len(tokenizer.cache) == before and "y" * 300 not in quick._words
    assert len(quick._tokenizer.cache) < 10


def test_other_tokenizers_stay_as_they_are() -> None:
    for other in (
        open_clip.tokenizer.SimpleTokenizer(clean="canonicalize"),
        open_clip.tokenizer.SimpleTokenizer(reduction_mask="simple"),
        open_clip.tokenizer.SimpleTokenizer(context_length=None),
        lambda texts: torch.zeros(len(texts), 3),
    ):
        assert faster(other) is other
    short = open_clip.tokenizer.SimpleTokenizer(context_length=5)
    assert torch.equal(faster(short)(["one two three four five", "a"]), short(["one two three four five", "a"]))


def test_captions_come_from_txt_or_json() -> None:
    sample = Sample("0", {"txt": "ein Bär".encode(), "json": b'{"title": "a bear", "stars": 3}'})
    assert read_caption(sample) == "ein Bär"
    assert read_caption(sample, "json:title") == "a bear"
    assert read_caption(Sample("0", {"txt": b"caf\xe9"})) == "caf�"
    assert (caption_field("txt"), caption_field("json:title")) == ("txt", "json")


@pytest.mark.parametrize(
    ("fields", "caption"),
    [({}, "txt"), ({"json": b"{}"}, "json:a"), ({"json": b'{"a": 3}'}, "json:a"), ({"json": b"[1]"}, "json:a")],
)
def test_missing_captions_are_unreadable_samples(fields: dict[str, bytes], caption: str) -> None:
    with pytest.raises(UnreadableSample):
        read_caption(Sample("0", fields), caption)


@pytest.mark.parametrize("caption", ["", "json", "json:", "jpg", "txt:a"])
def test_unknown_caption_settings_are_refused(caption: str) -> None:
    with pytest.raises(SettingError):
        caption_field(caption)
