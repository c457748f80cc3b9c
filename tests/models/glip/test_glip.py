"""The method: what it trains, detects and grounds, what it stores for that, and bad input."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import from_json, to_json
from pipeline.errors import SettingError
from pipeline.loaders.batches import LoaderConfig, training_batches
from pipeline.loaders.grounding import GroundingOptions
from pipeline.loaders.grounding_prompts import SpanTokenizer, clean_name, join_names
from pipeline.loaders.order import Order
from pipeline.models.glip import Config, Glip
from pipeline.models.glip.config import LARGE, SMALLEST
from pipeline.models.method import Method
from pipeline.shards.snapshot import Snapshot
from pipeline.training.checkpoint import Checkpoints, Meta, load_method
from pipeline.training.optimizer import AdamW, make_optimizer, rate_scales

CONFIG = replace(Glip.smallest(), least_score=0.0)
WORDS = ("star", "disc", "key", "leaf", "moon")


def built(seed: int = 0, **changes: Any) -> Glip:
    torch.manual_seed(seed)
    return Glip(replace(CONFIG, **changes)).eval()


def image(height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=random, dtype=torch.uint8)


def batch(boxes: list[list[list[float]]], phrases: list[list[tuple[int, ...]]], tokens: int = 8) -> dict[str, Tensor]:
    """One image for each list of boxes; ``phrases`` are the tokens of each box."""
    most = max(1, *map(len, boxes))
    found = torch.zeros(len(boxes), most, 4)
    maps = torch.zeros(len(boxes), most, tokens, dtype=torch.bool)
    for row, (some, named) in enumerate(zip(boxes, phrases, strict=True)):
        found[row, : len(some)] = torch.tensor(some).view(-1, 4)
        for number, one in enumerate(named):
            maps[row, number, list(one)] = True
    mask = torch.ones(len(boxes), tokens, dtype=torch.bool)
    mask[:, tokens - 2 :] = False
    return {
        "image": torch.stack([image(seed=number) for number in range(len(boxes))]),
        "tokens": torch.arange(2, tokens + 2).expand(len(boxes), -1).clone(),
        "token_mask": mask,
        "boxes": found,
        "positive_map": maps,
        "annotated": torch.ones(len(boxes), dtype=torch.bool),
        "left_out": torch.zeros(len(boxes), dtype=torch.int64),
    }


def gradients(method: Method, some: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, Tensor]]:
    method.zero_grad()
    losses = method.training_step(some)
    torch.stack(list(losses.values())).sum().backward()
    found = {name: value.grad for name, value in method.named_parameters() if value.grad is not None}
    return {name: float(loss.detach()) for name, loss in losses.items()}, found


def test_without_boxes_nothing_is_positive_and_nothing_is_nan() -> None:
    """All tokens of all anchors are negatives; the other losses are zero but reach every weight."""
    method = built()
    losses, found = gradients(method, batch([[], []], [[], []]))
    assert losses["box"] == 0 and losses["centerness"] == 0
    # At the beginning a token costs 7.5e-7 wherever it is: two images, 86 anchors, six tokens, divided by one.
    logits = 2 * 86 * 6 * 0.75 * 0.01**2 * -math.log(0.99)
    assert losses["alignment"] == pytest.approx(logits, rel=0.3)
    assert set(found) == {name for name, _ in method.named_parameters()}
    assert all(value.isfinite().all() for value in found.values())


def test_a_box_whose_phrase_has_no_token_is_background() -> None:
    """As it is without the box: nothing in the text names it."""
    method = built()
    box = [8.0, 8, 40, 40]
    assert gradients(method, batch([[box]], [[()]]))[0] == gradients(method, batch([[]], [[]]))[0]
    with_it = gradients(method, batch([[box, box]], [[(2,), ()]]))[0]
    assert with_it == gradients(method, batch([[box]], [[(2,)]]))[0]
    assert with_it["box"] > 0


def test_captions_without_annotated_objects_take_no_part() -> None:
    """Beside another image as alone, but for the number of rows; by themselves no loss at all, and no NaN."""
    method = built()
    box = [8.0, 8, 40, 40]
    both = batch([[box], []], [[(2,)], []])
    both["annotated"][1] = False
    alone = gradients(method, batch([[box]], [[(2,)]]))[0]
    assert gradients(method, both)[0] == pytest.approx(alone, rel=1e-4)
    both["annotated"][1] = True
    assert gradients(method, both)[0]["alignment"] > alone["alignment"] * (1 + 1e-5)
    none = batch([[]], [[]])
    none["annotated"][:] = False
    losses, found = gradients(method, none)
    assert set(losses.values()) == {0.0} and not any(value.any() for value in found.values())


def test_what_is_left_out_is_counted_between_logs() -> None:
    """Over all steps and processes since the last log; nothing before the first step."""
    method = built()
    assert method.measures() == {}
    some = batch([[[8.0, 8, 40, 40]], [], []], [[(2,)], [], []])
    some["left_out"] = torch.tensor([2, 0, 1])
    some["annotated"][1] = False
    for _ in range(2):
        gradients(method, some)
    method.gather = lambda counts: torch.cat([counts, counts * 3])  # the other process has three times as many
    assert method.measures() == {"boxes_left_out": 24.0, "captions_without_boxes": 8.0}
    gradients(method, some)
    assert method.measures() == {"boxes_left_out": 12.0, "captions_without_boxes": 4.0}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_hostile_boxes_reach_no_gradient(precision: str) -> None:
    """Boxes without area, of one pixel, and larger than the image."""
    method = built()
    boxes = [[5.0, 5, 5, 30], [3.0, 3, 4.5, 4.5], [-500.0, -500, 900, 900]]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        losses, found = gradients(method, batch([boxes, []], [[(1,), (2,), (3, 4)], []]))
    assert all(math.isfinite(loss) for loss in losses.values())
    assert all(value.isfinite().all() for value in found.values())


def test_the_losses_are_divided_by_the_global_numbers() -> None:
    """Two ranks with the same images give half of the sums each: as one rank with both."""
    method = built()
    one = batch([[[8.0, 8, 40, 40]]], [[(2, 3)]])
    alone = gradients(method, one)[0]
    method.gather = lambda counts: torch.cat([counts, counts * 3])  # the other rank has three times as much
    assert gradients(method, one)[0] == pytest.approx({name: loss / 2 for name, loss in alone.items()}, rel=1e-5)


@pytest.mark.slow
def test_training_on_one_image_locates_its_phrases() -> None:
    """Two boxes of one image with one word each: trained for 80 steps, both are found where they are."""
    method = built(seed=1).train()
    boxes = [[4.0, 4, 28, 28], [34.0, 30, 60, 62]]
    caption, spans = "red star and blue disc", [(0, 8), (13, 22)]
    tokenized = method.tokenizer(caption)
    some = batch([boxes], [[(), ()]], tokens=8)
    some["tokens"][0, : len(tokenized)] = torch.from_numpy(tokenized.ids)
    some["token_mask"] = (torch.arange(8) < len(tokenized))[None]
    for number, span in enumerate(spans):
        some["positive_map"][0, number, : len(tokenized)] = torch.from_numpy(tokenized.positive([span]))
    optimizer = make_optimizer(AdamW(learning_rate=3e-3, weight_decay=0.0), method)
    first = last = 0.0
    for _ in range(80):
        last = sum(gradients(method, some)[0].values())
        first = first or last
        optimizer.step()
    assert last < first / 2
    method.eval()
    (found,) = method.ground([image()], [caption], [spans])
    for number, box in enumerate(boxes):
        best = found.boxes[found.spans == number][0]
        low, high = torch.maximum(best[:2], torch.tensor(box[:2])), torch.minimum(best[2:], torch.tensor(box[2:]))
        area = [float((one[2:] - one[:2]).prod()) for one in (best, torch.tensor(box))]
        shared = float((high - low).clamp(min=0).prod())
        assert shared / (sum(area) - shared) > 0.5


def test_batches_of_any_sizes_are_grounded_as_single_images() -> None:
    """Captions of different lengths, spans of different number, images of five shapes; exactly as one by one."""
    method = built()
    images = [
        image(64, 64, 0),
        image(40, 80, 1),
        image(64, 64, 2),
        image(90, 30, 3),
        image(200, 123, 4),
        image(1, 64, 5),
    ]
    captions = ["a star", "two red discs and a key on the wall", "moon", "a long " * 20 + "leaf", "key", "x"]
    spans = [[(2, 6)], [(4, 13), (18, 23)], [(0, 4)], [(140, 144)], [], [(0, 1)]]
    together = method.ground(images, captions, spans)
    for number, one in enumerate(together):
        (alone,) = method.ground([images[number]], [captions[number]], [spans[number]])
        assert torch.equal(one.spans, alone.spans) and len(one) == len(alone)
        torch.testing.assert_close(one.boxes, alone.boxes, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(one.scores, alone.scores, rtol=1e-4, atol=1e-5)
        height, width = images[number].shape[1:]
        limits = torch.tensor([width, height, width, height])
        assert bool((one.boxes >= 0).all()) and bool((one.boxes <= limits).all())
        assert torch.equal(one.scores, one.scores.sort(descending=True).values)
    assert len(together[4]) == 0 and all(len(one) for one in together[:3])


@pytest.mark.parametrize(
    ("caption", "span"),
    [
        ("a star", (50, 60)),
        ("a star", (3, 3)),
        ("", (0, 0)),
        ("   ", (0, 2)),
        ("\x00\x07 \u200b", (0, 3)),
        ("word " * 400 + "star", (2000, 2004)),
    ],
    ids=["outside", "empty", "no caption", "blank", "control characters", "beyond the longest text"],
)
def test_spans_without_tokens_have_no_boxes(caption: str, span: tuple[int, int]) -> None:
    (found,) = built().ground([image()], [caption], [[span]])
    assert len(found) == 0 and found.boxes.shape == (0, 4)


def test_nothing_requested_gives_nothing() -> None:
    method = built()
    assert method.ground([], [], []) == [] and method.predict([], ["star"]) == []


@pytest.mark.parametrize("fusion", [True, False])
def test_prompts_are_chunks_and_what_they_share_is_computed_once(fusion: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five words in prompts of two: as the prompts one after another, with one pyramid and each text encoded once."""
    method = built(fusion=fusion, chunk_words=2, detections=10_000)
    images = [image(seed=1), image(30, 64, 2)]
    calls: dict[str, int] = {"image": 0, "text": 0, "tower": 0}
    for name in calls:
        module = getattr(method.model, name)
        forward = module.forward

        def counted(*inputs: Any, name: str = name, forward: Callable[..., Any] = forward) -> Any:
            calls[name] += 1
            return forward(*inputs)

        monkeypatch.setattr(module, "forward", counted)
    found = method.predict(images, WORDS)
    assert calls == {"image": 2, "text": 3, "tower": 6 if fusion else 2}, "two sizes, three prompts"
    method.predict(images, WORDS)
    assert calls["text"] == 3, "the same words are encoded once"
    apart = [method.predict(images, WORDS[first : first + 2]) for first in (0, 2, 4)]
    for number, one in enumerate(found):
        parts = [(part[number], first) for part, first in zip(apart, (0, 2, 4), strict=True)]
        scores = torch.cat([part.scores for part, _ in parts])
        labels = torch.cat([part.labels + first for part, first in parts])
        order = scores.argsort(descending=True, stable=True)
        torch.testing.assert_close(one.scores, scores[order], rtol=1e-4, atol=1e-6)
        assert torch.equal(one.labels.bincount(minlength=5), labels.bincount(minlength=5)) and len(one) == len(scores)


def test_training_forgets_encoded_words() -> None:
    method = built()
    before = method.predict([image()], WORDS)[0]
    method.train()
    with torch.no_grad():
        for parameter in method.model.text.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    method.eval()
    after = method.predict([image()], WORDS)[0]
    fresh = built()
    fresh.load_state_dict(method.state_dict())
    assert not torch.equal(after.scores, before.scores)
    assert torch.equal(after.scores, fresh.predict([image()], WORDS)[0].scores)


def test_words_are_cleaned_and_bad_ones_are_refused() -> None:
    method = built()
    one, other = (method.predict([image()], [word, "disc"])[0] for word in ("star", "Star_(shape); pentagram"))
    assert torch.equal(one.scores, other.scores) and torch.equal(one.labels, other.labels)
    for words in ([], ["star", " "], ["Star", "star"]):
        with pytest.raises(SettingError, match="words"):
            method.predict([image()], words)
    with pytest.raises(SettingError, match="words"):
        method.predict([image()], ["z" * 20 + " q" * 300])
    with pytest.raises(SettingError, match="base"):
        method.predict([image()], ["star"], base=["disc"])


def test_punctuation_in_a_word_moves_no_other_word() -> None:
    """Full stops, hyphens and marks of other words: each word's mean is over exactly the tokens that spell it."""
    method = built(chunk_words=3)
    names = ["st. bernard", "ice-cream", "c++", "star", "cup (for tea)", "d.i.y."]
    spelt = []
    for prompt in method._encoded_prompts(tuple(names)):
        text = join_names([clean_name(name) for name in names[prompt.first :][:3]]).text
        ids = torch.from_numpy(method.tokenizer(text).ids)
        for row in prompt.averaging[0]:
            tokens = row[: len(ids)] > 0
            assert float(row.sum()) == pytest.approx(1) and float(row.max()) == pytest.approx(1 / int(tokens.sum()))
            spelt.append(method.tokenizer.decode(ids[tokens].tolist()).replace(" ", ""))
    assert spelt == ["st.bernard", "ice-cream", "c++", "star", "cup", "d.i.y"]
    assert set(method.predict([image()], names)[0].labels.tolist()) == set(range(6))


def test_a_checkpoint_detects_as_its_method(tmp_path: Any) -> None:
    """The tokenizer and the text tower's settings come from the checkpoint, not from the settings' name."""
    method = built()
    meta = Meta(step=1, samples_seen=8, batch_size=8, lanes=1, seed=0, snapshot="0" * 64)
    place = Checkpoints(str(tmp_path)).save(method, make_optimizer(AdamW(), method), meta).folder.uri
    loaded: Any = load_method(place)
    expected, found = (one.predict([image(70, 50)], WORDS)[0] for one in (method, loaded))
    assert torch.equal(expected.boxes, found.boxes) and torch.equal(expected.scores, found.scores)
    again = built(seed=5, start_from=place)
    assert torch.equal(again.predict([image(70, 50)], WORDS)[0].scores, expected.scores)
    with pytest.raises(SettingError, match="start_from.*another shape"):
        built(start_from=place, width=64, norm_groups=8)


def test_the_text_tower_is_transformers(tmp_path: Any) -> None:
    """A folder of a small BERT: its weights and its tokenizer; ``pretrained_text`` off takes its sizes alone."""
    from transformers import BertConfig, BertModel

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "star", "disc", ".", "##s"]
    torch.manual_seed(9)
    settings = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=300,
    )
    bert = BertModel(settings, add_pooling_layer=False).eval()
    bert.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    method = Glip(replace(CONFIG, text=str(tmp_path))).eval()
    tokenized = method.tokenizer("stars. disc")
    assert [words[number] for number in tokenized.ids] == ["[CLS]", "star", "##s", ".", "disc", "[SEP]"]
    tokens = torch.from_numpy(tokenized.ids)[None]
    with torch.no_grad():
        found = method.model.encode_text(tokens, torch.ones_like(tokens, dtype=torch.bool)).hidden
        expected = bert(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    fresh = Glip(replace(CONFIG, text=str(tmp_path), pretrained_text=False))
    mine, theirs = (one.model.text.bert.embeddings.word_embeddings.weight for one in (fresh, method))
    assert mine.shape == theirs.shape and not torch.equal(mine, theirs)
    with pytest.raises(SettingError, match="text_tokens"):
        Glip.check(replace(CONFIG, text=str(tmp_path), grounding=GroundingOptions(text_tokens=512)))


def test_towers_have_their_own_rates() -> None:
    """BERT learns at a tenth; what is new in the head does not."""
    method = built()
    scales = rate_scales(AdamW(text_rate=0.1, image_rate=0.5), method)
    assert scales["model.text.bert.encoder.layer.0.output.dense.weight"] == pytest.approx(0.1)
    assert scales["model.image.body.layers_1.blocks.0.mlp.fc1.weight"] == pytest.approx(0.5)
    free = [name for name, _ in method.named_parameters() if name not in scales]
    assert {name.split(".")[1] for name in free} == {"image", "tower", "head"}
    depths = method.layers()
    assert depths["model.image.body.patch_embed.proj.weight"].above == 4
    assert depths["model.image.body.layers_3.downsample.reduction.weight"].above == 0
    assert depths["model.text.bert.embeddings.LayerNorm.weight"].above == 1


def test_every_block_can_be_computed_again() -> None:
    """Less memory, the same gradients."""
    from pipeline.training.blocks import recompute_each

    some = batch([[[8.0, 8, 40, 40]], []], [[(2, 3)], []])
    plain = gradients(built(), some)
    method = built()
    assert len(method.blocks()) == 4 + 1 + 3 * 2
    recompute_each(method.blocks())
    losses, found = gradients(method, some)
    assert losses == pytest.approx(plain[0], rel=1e-5)
    for name, value in found.items():
        torch.testing.assert_close(value, plain[1][name], rtol=1e-4, atol=1e-6)


def test_batches_of_a_snapshot(make_snapshot: Callable[..., Snapshot]) -> None:
    """The reader's keys, and the work of a step, which depends on the length of the text."""
    snapshot = make_snapshot((8,), regions=("t", 4))
    method = Glip(Glip.smallest())
    order = Order([8], seed=0, batch_size=4, lanes=1)
    loader = LoaderConfig(loader_workers=0)
    found = next(training_batches(snapshot, method.readers(train=True), order, steps=range(1), config=loader))
    assert set(Glip.batch_keys) <= set(found)
    assert method.lengths(found) == {"text tokens": found["tokens"].shape[1]} and found["tokens"].shape[1] % 8 == 0
    assert all(loss.isfinite() for loss in method.training_step(found).values())


def test_the_work_of_a_step_is_counted_with_deformable_convolutions() -> None:
    """One block less has 130 positions (86 + 22 + 22) with 32 x 32 x 9 products less, forward and twice backward."""
    from torch.utils.flop_counter import FlopCounterMode

    some = batch([[[8.0, 8, 40, 40]], []], [[(2, 3)], []])
    counts = []
    for blocks in (1, 2):
        method = built(blocks=blocks, fusion=False).train()
        with FlopCounterMode(display=False) as counter:
            torch.stack(list(method.training_step(some).values())).sum().backward()
        counts.append(counter.get_total_flops())
    deformable = 2 * 2 * 130 * 32 * 32 * 9 * 3
    assert deformable < counts[1] - counts[0] < 2 * deformable, "and the offsets' convolution, which is smaller"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"image_size": 100}, "image_size"),
        ({"width": 30}, "width"),
        ({"fusion_width": 33}, "fusion_width"),
        ({"small_text": (30, 1, 4)}, "small_text"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"least_score": -0.1}, "least_score"),
        ({"detection_overlap": 0.0}, "detection_overlap"),
        ({"blocks": 0}, "blocks"),
        ({"anchor_scale": 0.0}, "anchor_scale"),
        ({"jitter_scale": (0.0, 1.0)}, "jitter_scale"),
    ],
)
def test_bad_settings(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingError, match=field):
        Config(**{**SMALLEST, **changes})


@pytest.mark.parametrize(
    ("changes", "field"), [({"backbone": "resnet50"}, "backbone"), ({"text": "/nowhere"}, "text|tokenizer")]
)
def test_unknown_towers_are_refused_before_anything_is_built(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingError, match=field):
        Glip.check(Config(**{**SMALLEST, **changes}))


def test_presets_go_through_json() -> None:
    for config in (Config(), Config(**LARGE), Config(fusion=False), Glip.smallest()):
        assert from_json(Config, to_json(config)) == config


def test_the_drawn_tokenizer_knows_the_words_of_the_embedded_world() -> None:
    tokenizer = SpanTokenizer.load("drawn")
    assert tokenizer.count("star") == 1 and tokenizer.count("zzz") > 1


def test_bfloat16_detects_what_float32_does() -> None:
    """Logits, scores and boxes are float32; features differ by rounding."""
    from pipeline.evaluation.encoder import inference

    method = built(seed=3, least_score=0.0, detections=20)
    found = []
    for precision in ("fp32", "bf16"):
        with inference(method, precision):
            found.append(method.predict([image(64, 64)], WORDS)[0])
            assert found[-1].scores.dtype == found[-1].boxes.dtype == torch.float32
    torch.testing.assert_close(found[0].scores, found[1].scores, rtol=0.02, atol=1e-3)
