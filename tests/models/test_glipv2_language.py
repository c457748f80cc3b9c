"""Captions and answers on GLIPv2's network: causality, beam search, questions, and a small overfit."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import SettingError
from pipeline.loaders.batches import SamplePosition
from pipeline.loaders.samples import UnreadableSample
from pipeline.models.glip.fusion import CrossFusion
from pipeline.models.glipv2 import Glipv2
from pipeline.models.glipv2_language import Config, Glipv2Language
from pipeline.shards.sample import Sample
from pipeline.training.checkpoint import Checkpoints, Meta, load_method
from pipeline.training.optimizer import AdamW, make_optimizer
from tests.grounded import jpeg

CAPTIONS = replace(Glipv2Language.smallest(), class_names=())
ANSWERS = replace(CAPTIONS, task="answers", answers=("red", "blue", "2"))


def built(config: Config = CAPTIONS, seed: int = 0, **changes: Any) -> Glipv2Language:
    torch.manual_seed(seed)
    return Glipv2Language(replace(config, **changes)).eval()


def image(height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=random, dtype=torch.uint8)


def views(method: Glipv2Language, *images: Tensor) -> Any:
    return method._views(method.model.image(method.normalised(torch.stack(images))))


def test_a_token_sees_the_image_and_earlier_tokens_only() -> None:
    """Another token later changes no logit before it, also through the pixels; another image changes all."""
    method = built()
    tokens = torch.tensor([[[2, 20, 30, 40, 50]]])
    other = tokens.clone()
    other[..., 3] = 60
    with torch.no_grad():
        one, changed = (method._next_tokens(views(method, image()), some) for some in (tokens, other))
        elsewhere = method._next_tokens(views(method, image(seed=1)), tokens)
    torch.testing.assert_close(one[:, :, :3], changed[:, :, :3], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(one[:, :, 3], changed[:, :, 3]) and not torch.allclose(one[:, :, 0], elsewhere[:, :, 0])


def test_several_texts_of_an_image_are_independent() -> None:
    method = built()
    tokens = torch.randint(5, 60, (2, 3, 4))
    seen = views(method, image(), image(seed=1))
    with torch.no_grad():
        together = method._next_tokens(seen, tokens)
        for text in range(3):
            alone = method._next_tokens(seen, tokens[:, text : text + 1])
            torch.testing.assert_close(together[:, text], alone[:, 0], rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_log_probability_of_each_next_token() -> None:
    method = built()
    (reader,) = method.readers(train=False)
    texts = ("a red star", "two blue discs on a wall")
    rows = [
        reader.read(Sample(str(n), {"jpg": jpeg(seed=n), "txt": text.encode()}), None) for n, text in enumerate(texts)
    ]
    batch = reader.collate(rows)
    total, count = 0.0, 0
    with torch.no_grad():
        for row, text in enumerate(texts):
            ids = torch.from_numpy(method.tokenizer(text).ids)
            seen = views(method, batch["image"][row])
            for place in range(1, len(ids)):
                logits = method._next_tokens(seen, ids[None, None, :place])[0, 0, -1]
                total, count = total - float(logits.log_softmax(0)[ids[place]]), count + 1
        found = float(method.training_step(batch)["caption"])
    assert found == pytest.approx(total / count, rel=1e-4)


def test_beam_search_finds_the_best_text_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all texts of up to three tokens, for a language of four tokens with random probabilities."""
    method = built(caption_tokens=4, beams=64)
    start, end = method.tokenizer.start, method.tokenizer.end
    alphabet = [20, 30, 40, end]
    random = torch.Generator().manual_seed(1)
    table: dict[tuple[int, ...], Tensor] = {}

    def logits(prefix: tuple[int, ...]) -> Tensor:
        if prefix not in table:
            table[prefix] = torch.full((method.tokenizer.vocab_size,), -1e9)
            table[prefix][alphabet] = torch.randn(4, generator=random) * 2
        return table[prefix]

    def next_tokens(_: Any, tokens: Tensor) -> Tensor:
        rows = [[logits(tuple(text)) for text in some] for some in tokens.tolist()]
        return torch.stack([torch.stack(some) for some in rows])[:, :, None]

    monkeypatch.setattr(method, "_next_tokens", next_tokens)
    (written,) = method._write([], 1).tolist()
    best, best_score = (), -torch.inf
    for length in range(1, 4):
        for words in itertools.product(alphabet, repeat=length):
            inner = words[:-1]
            if end in inner or (length < 3 and words[-1] != end):
                continue
            prefixes = [(start, *words[:n]) for n in range(length)]
            score = sum(float(logits(p).log_softmax(0)[w]) for p, w in zip(prefixes, words, strict=True)) / length
            if score > best_score:
                best, best_score = words, score
    kept = [token for token in written[1:] if token != method.tokenizer.pad]
    assert tuple(kept) == best
    greedy = built(caption_tokens=4, beams=1)
    monkeypatch.setattr(greedy, "_next_tokens", next_tokens)
    (written,) = greedy._write([], 1).tolist()
    assert written[1] == int(logits((start,)).argmax())


def test_captions_of_images_of_any_size_do_not_depend_on_the_others() -> None:
    method = built(caption_tokens=8)
    images = [image(), image(40, 80, 1), image(64, 64, 2)]
    assert method.describe(images) == [method.describe([one])[0] for one in images]
    assert method.describe([]) == []


def asked(*questions: dict[str, Any], seed: int = 0) -> Sample:
    record = {"width": 64, "height": 64, "objects": [], "questions": list(questions)}
    return Sample(str(seed), {"jpg": jpeg(seed=seed), "boxes.json": json.dumps(record).encode()})


def test_targets_are_vqas_accuracies() -> None:
    """Ten annotators: two of them for blue give 0.6, five for red 1; an answer that is not possible is left out."""
    method = built(ANSWERS)
    (reader,) = method.readers(train=True)
    answers = ["red"] * 5 + ["The blue"] * 2 + ["green"] * 2 + ["two"]
    row = reader.read(asked({"question": "which?", "answers": answers}), SamplePosition(0, 0))
    assert row["answers"].tolist() == pytest.approx([1.0, 0.6, 0.3])
    assert row["tokens"].ids.tolist() == method.tokenizer("which?").ids.tolist()
    batch = reader.collate([row])
    found = method.training_step(batch)["answer"]
    with torch.no_grad():
        text = method.model.encode_text(batch["tokens"], batch["token_mask"])
        logits = method._answer_logits(method.model.image(method.normalised(batch["image"])), text)
    expected = torch.nn.BCEWithLogitsLoss(reduction="sum")(logits[0], torch.tensor([1.0, 0.6, 0.3]))
    torch.testing.assert_close(found.detach(), expected)


def test_each_question_of_an_image_is_read_in_some_epoch() -> None:
    method = built(ANSWERS)
    (reader,) = method.readers(train=True)
    sample = asked({"question": "one?", "answer": "red"}, {"question": "two?", "answer": "blue"})
    found = {tuple(reader.read(sample, SamplePosition(epoch, 0))["answers"].tolist()) for epoch in range(20)}
    assert found == {(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)}
    for broken in (asked(), Sample("0", {"jpg": jpeg(), "boxes.json": b"[]"})):
        with pytest.raises(UnreadableSample):
            reader.read(broken, None)
    (captions,) = built().readers(train=True)
    with pytest.raises(UnreadableSample, match="empty"):
        captions.read(Sample("0", {"jpg": jpeg(), "txt": b" "}), None)


def test_questions_are_answered_in_batches_as_one_by_one() -> None:
    method = built(ANSWERS)
    images = [image(), image(40, 80, 1), image(64, 64, 2)]
    questions = [["which?", "how many red stars are there on the long wall?"], [], ["which?"]]
    found = method.answer(images, questions)
    assert [len(some) for some in found] == [2, 0, 1] and {a for some in found for a in some} <= set(ANSWERS.answers)
    for one, texts, answers in zip(images, questions, found, strict=True):
        assert [method.answer([one], [[text]])[0][0] for text in texts] == answers


@pytest.mark.slow
def test_captions_and_answers_can_be_trained() -> None:
    """Two images of one colour each: which one it is decides the caption and the answer to the same question."""
    colours = (torch.tensor([220, 30, 30]), torch.tensor([30, 30, 220]))
    images = torch.stack([colour.to(torch.uint8)[:, None, None].expand(3, 64, 64) for colour in colours])
    writer, answerer = built(caption_tokens=8).train(), built(ANSWERS).train()
    texts = [writer.tokenizer(text) for text in ("a red star", "two blue discs")]
    tokens, mask = writer._padded(texts)
    question = writer.tokenizer("which?")
    asking, seen = writer._padded([question, question])
    batches: list[tuple[Glipv2Language, dict[str, Tensor]]] = [
        (writer, {"image": images, "tokens": tokens, "token_mask": mask}),
        (
            answerer,
            {"image": images, "tokens": asking, "token_mask": seen, "answers": torch.eye(3)[:2]},
        ),
    ]
    for method, batch in batches:
        optimizer = make_optimizer(AdamW(learning_rate=3e-3, weight_decay=0.0), method)
        for _ in range(60):
            optimizer.zero_grad()
            torch.stack(list(method.training_step(batch).values())).sum().backward()
            optimizer.step()
        method.eval()
    assert writer.describe(list(images)) == ["a red star", "two blue discs"]
    assert answerer.answer(list(images), [["which?"]] * 2) == [["red"], ["blue"]]


def test_weights_of_the_pre_training(tmp_path: Path) -> None:
    """The network and the head of masked words of a GLIPv2; a checkpoint answers as its method."""
    torch.manual_seed(3)
    first = Glipv2(replace(Glipv2.smallest(), class_names=("star",)))

    def save(method: Any, name: str) -> str:
        meta = Meta(step=1, samples_seen=8, batch_size=8, lanes=1, seed=0, snapshot="0" * 64)
        return Checkpoints(str(tmp_path / name)).save(method, make_optimizer(AdamW(), method), meta).folder.uri

    place = save(first, "v2")
    method = built(start_from=place)
    assert all(torch.equal(value, method.model.state_dict()[key]) for key, value in first.model.state_dict().items())
    assert torch.equal(method.language.transform.dense.weight, first.language.transform.dense.weight)  # type: ignore[union-attr]
    answering = built(ANSWERS, start_from=place)
    loaded: Any = load_method(save(answering, "answers"))
    questions = [["which?", "how many?"]]
    assert loaded.eval().answer([image()], questions) == answering.answer([image()], questions)


def test_what_is_not_used_is_not_trained() -> None:
    for config in (CAPTIONS, ANSWERS):
        method = built(config)
        frozen = {name for name, value in method.named_parameters() if not value.requires_grad}
        assert {name for name in frozen if name.startswith("model.head.")} == {
            name for name, _ in method.named_parameters() if name.startswith("model.head.")
        }
        first = any(name.startswith("model.tower.fusions.0.to_image") for name in frozen)
        assert first == (config.task == "captions"), "pixels do not read captions"


def test_every_block_can_be_computed_again() -> None:
    """Less memory, the same gradients; fusions of captions are not called as blocks."""
    from pipeline.training.blocks import recompute_each

    for config in (CAPTIONS, ANSWERS):
        found = []
        for again in (False, True):
            method = built(config)
            fusions = [block for block in method.blocks() if isinstance(block, CrossFusion)]
            assert len(fusions) == (0 if config.task == "captions" else 2)
            if again:
                recompute_each(method.blocks())
            tokens = torch.arange(2, 10)[None]
            batch = {"image": image()[None], "tokens": tokens, "token_mask": torch.ones_like(tokens, dtype=torch.bool)}
            (loss,) = method.training_step(batch | {"answers": torch.eye(3)[:1]}).values()
            loss.backward()
            found.append([value.grad for value in method.parameters() if value.grad is not None])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"fusion": False}, "fusion"), ({"caption_tokens": 2}, "caption_tokens"), ({"beams": 0}, "beams")],
)
def test_bad_settings(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingError, match=field):
        replace(CAPTIONS, **changes)
    with pytest.raises(SettingError, match="answers"):
        Glipv2Language.check(replace(ANSWERS, answers=()))
    with pytest.raises(SettingError, match="answers: got '2'"):
        replace(ANSWERS, answers=("2", "red", "two"))
    with pytest.raises(SettingError, match="questions"):
        replace(ANSWERS, questions="txt")
    for method, call in ((built(), "answer"), (built(ANSWERS), "describe")):
        with pytest.raises(SettingError, match="task"):
            getattr(method, call)(*([[image()], [["x"]]] if call == "answer" else [[image()]]))
