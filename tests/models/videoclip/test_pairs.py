"""The reader of clip pairs, on samples made here and on broken ones."""

import io
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.loaders.batches import SamplePosition
from pipeline.loaders.frames import FrameFeatureReader, FrameSampling
from pipeline.loaders.grounding_prompts import SpanTokenizer, small_vocabulary
from pipeline.loaders.samples import UnreadableSample
from pipeline.loaders.timed_captions import read_timed_captions
from pipeline.models.videoclip.alignment import Overlap
from pipeline.models.videoclip.pairs import CaptionTokenizer, ClipPairReader, EveryFrameReader
from pipeline.shards.sample import Sample

WORDS = SpanTokenizer.of_words(small_vocabulary([f"word{number}" for number in range(50)]))


def sample(frames: int = 40, **described: Any) -> Sample:
    """A video whose frame t has the features (t, t, t), one a second."""
    content = io.BytesIO()
    np.save(content, np.repeat(np.arange(frames, dtype=np.float32)[:, None], 3, axis=1))
    text = json.dumps(described).encode()
    return Sample("0001", {"frames.npy": content.getvalue(), "json": text, "txt": b"word1 word2"})


def timed(count: int = 8) -> list[dict[str, Any]]:
    """Caption i is of the seconds 5 i to 5 i + 4 and says word i five times."""
    return [{"start": 5.0 * one, "end": 5.0 * one + 4, "text": f"word{one} " * 5} for one in range(count)]


def reader(frames: int = 32, **settings: Any) -> ClipPairReader:
    features = FrameFeatureReader(sampling=FrameSampling(frames=frames, rate=0), name="")
    return ClipPairReader(features=features, tokenizer=WORDS, **settings)


def test_pairs_meet_in_time() -> None:
    """What a text says and what its clip shows are known: word i is of the seconds 5 i to 5 i + 4."""
    read = reader(overlap=Overlap(budget=(8, 12), clip_frames=(3, 9)))
    rows = [read.read(sample(timed_captions=timed()), SamplePosition(epoch, 0)) for epoch in range(20)]
    batch = read.collate(rows)
    assert batch["video"].shape == (20, 16, 32, 3) and batch["video"].dtype == torch.float32
    assert batch["video_mask"].dtype == torch.bool and batch["text"].dtype == torch.int64
    for clips, masks, texts in zip(batch["video"], batch["video_mask"], batch["text"], strict=True):
        for clip, mask, text in zip(clips, masks, texts, strict=True):
            shown = clip[mask][:, 0].tolist()
            assert 3 <= len(shown) <= 9 and shown == list(range(int(shown[0]), int(shown[0]) + len(shown)))
            assert not clip[~mask].any()
            words = [int(word.removeprefix("word")) for word in WORDS.decode(text.tolist()).split()]
            assert text[0] == WORDS.start and WORDS.end in text
            assert words == sorted(words) and len(words) >= 8
            assert any(5 * words[0] <= second <= 5 * words[-1] + 4 for second in shown)
    assert torch.equal(read.collate(rows)["text"], batch["text"])
    assert len({str(row["tokens"]) for row in rows}) > 10  # epochs differ


def test_texts_are_cut_and_padded() -> None:
    read = reader(pairs=2, text_tokens=6)
    row = read.read(sample(timed_captions=timed()), SamplePosition(0, 1))
    assert [len(tokens) for tokens in row["tokens"]] == [8, 8]
    short = read.read(sample(timed_captions=[{"start": 0, "end": 1, "text": "word3"}]), SamplePosition(0, 1))
    text = read.collate([row, short])["text"]
    assert text.shape == (2, 2, 8) and text[1, 0].tolist()[3:] == [WORDS.pad] * 5


def test_without_times_a_caption_is_of_the_whole_video() -> None:
    read = reader(frames=10)
    row = read.read(sample(frames=19), SamplePosition(0, 0))
    assert len(row["clips"]) == 16 and row["clips"][0][:, 0].tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert WORDS.decode(row["tokens"][0]) == "word1 word2"
    several = read.read(sample(frames=3, captions=["word5", "word6"]), SamplePosition(0, 0))
    assert {WORDS.decode(tokens) for tokens in several["tokens"]} == {"word5", "word6"}
    whole = reader(positives="whole").read(sample(timed_captions=timed(), captions=["word7"]), SamplePosition(0, 0))
    assert {WORDS.decode(tokens) for tokens in whole["tokens"]} == {"word7"} and len(whole["clips"][0]) == 32


def test_evaluation_reads_the_same_pairs_each_time() -> None:
    read, one = reader(), sample(timed_captions=timed())
    first, again = read.read(one), pickle.loads(pickle.dumps(read)).read(one)
    assert first["tokens"] == again["tokens"] and torch.equal(torch.cat(first["clips"]), torch.cat(again["clips"]))


@pytest.mark.parametrize(
    "entry",
    [
        None,
        "word1",
        {"start": 1, "end": 2},
        {"start": 1, "end": 2, "text": "  "},
        {"start": 2, "end": 1, "text": "word1"},
        {"start": -1, "end": 1, "text": "word1"},
        {"start": float("nan"), "end": 1, "text": "word1"},
        {"start": 0, "end": float("inf"), "text": "word1"},
        {"start": 0, "end": 10**400, "text": "word1"},
        {"start": True, "end": 1, "text": "word1"},
        {"start": "0", "end": 1, "text": "word1"},
    ],
)
def test_bad_entries_are_left_out(entry: Any) -> None:
    good = {"start": 3, "end": 4, "text": "word2"}
    found = read_timed_captions(sample(timed_captions=[entry, good]))
    assert found == [(3.0, 4.0, "word2")]
    with pytest.raises(UnreadableSample, match="no valid entry"):
        reader().read(sample(timed_captions=[entry]))


@pytest.mark.parametrize("value", [7, "word", {"start": 0}, []])
def test_a_list_that_is_none_is_unreadable(value: Any) -> None:
    with pytest.raises(UnreadableSample):
        read_timed_captions(sample(timed_captions=value))


def test_captions_far_outside_of_the_video_are_still_pairs() -> None:
    late = [{"start": 1e9, "end": 2e9, "text": "word1"}]
    row = reader().read(sample(frames=4, timed_captions=late), SamplePosition(0, 0))
    assert all(clip[-1, 0] == 3 for clip in row["clips"])


def test_features_that_are_no_numbers_are_unreadable() -> None:
    broken = io.BytesIO()
    np.save(broken, np.array([[1.0, np.nan], [np.inf, 0.0]], np.float32))
    one = sample(timed_captions=timed())
    one.fields["frames.npy"] = broken.getvalue()
    with pytest.raises(UnreadableSample, match="not finite"):
        reader().read(one)


def test_every_frame_is_read_with_its_time() -> None:
    read = EveryFrameReader(features=FrameFeatureReader(name="", rate=2.0))
    batch = read.collate([read.read(sample(frames=50)), read.read(sample(frames=3))])
    assert batch["frames"].shape == (2, 50, 3) and batch["frames_mask"].sum(dim=1).tolist() == [50, 3]
    assert batch["frames_times"][0, :3].tolist() == [0.0, 0.5, 1.0] and not batch["frames_times"][1, 3:].any()


def test_the_tokenizer_pads_to_its_length() -> None:
    tokens = CaptionTokenizer(WORDS, 5)(["word1", "word2 " * 9])
    assert tokens.shape == (2, 5)
    assert tokens[0].tolist() == [WORDS.start, tokens[0, 1].item(), WORDS.end, WORDS.pad, WORDS.pad]
    assert tokens[1, 0] == WORDS.start and tokens[1, 4] == WORDS.end
