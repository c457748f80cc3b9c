"""Captions and tokens."""

import open_clip
import pytest
import torch

from pipeline.errors import SettingError
from pipeline.loaders.samples import UnreadableSample
from pipeline.loaders.text import caption_field, cut_text, read_caption
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
