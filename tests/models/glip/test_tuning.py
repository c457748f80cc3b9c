"""Tuning: which weights change, that the others and their dropout are still, and the table of prompt tuning."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import SettingError
from pipeline.loaders.batches import SamplePosition
from pipeline.loaders.grounding import GroundingData, GroundingOptions, GroundingReader
from pipeline.loaders.grounding_prompts import SpanTokenizer
from pipeline.models.glip import Config, Glip
from pipeline.models.glip.released import converted
from pipeline.models.glip.tuning import check_names
from pipeline.shards.objects import read_objects
from pipeline.training.checkpoint import Checkpoints, Meta, load_method
from pipeline.training.optimizer import AdamW, make_optimizer
from tests.grounded import grounded, obj
from tests.models.glip.test_glip import batch, image

FIXED = GroundingOptions(fixed_prompts=True)
CONFIG = replace(Glip.smallest(), least_score=0.0, grounding=FIXED)
NAMES = CONFIG.class_names


def built(seed: int = 0, **changes: Any) -> Glip:
    torch.manual_seed(seed)
    return Glip(replace(CONFIG, **changes))


def one_batch() -> dict[str, Tensor]:
    return batch([[[8.0, 8, 40, 40], [30.0, 20, 60, 60]], [[2.0, 2, 30, 50]]], [[(1,), (3,)], [(2,)]])


def step(method: Glip, rate: float = 1e-2) -> float:
    """A step of training; returns the loss before it."""
    optimizer = make_optimizer(AdamW(learning_rate=rate, text_rate=0.1), method)
    loss = torch.stack(list(method.train().training_step(one_batch()).values())).sum()
    loss.backward()
    optimizer.step()
    method.zero_grad()
    return float(loss.detach())


def changed(method: Glip) -> set[str]:
    before = {name: value.detach().clone() for name, value in method.named_parameters()}
    step(method)
    return {name.removeprefix("model.") for name, value in method.named_parameters() if (value != before[name]).any()}


def test_a_prompt_changes_nothing_but_its_table() -> None:
    assert changed(built(tuning="prompt")) == {"prompt"}


def test_linear_tuning_changes_the_last_layers() -> None:
    """The parts that the authors' linear probe leaves trainable: not the scales of the levels."""
    names = {"box", "centerness", "project"}
    layers = {f"head.{name}.{part}" for name in names for part in ("weight", "bias")}
    assert changed(built(tuning="linear")) == layers | {"head.token_bias", "head.prior_bias", "head.log_scale"}


def test_full_tuning_leaves_the_lowest_stages() -> None:
    """Two of them are what the authors' names call patch_embed and layers.0, with the downsampling at its end."""
    method = built(frozen_stages=2)
    theirs = {f"backbone.body.{name}.weight": torch.zeros(1) for name in ("layers.0.downsample.norm", "layers.0.x")}
    below = {name.rpartition(".")[0].removesuffix(".x") for name in converted(theirs)} | {"image.body.patch_embed"}
    everything = {name.removeprefix("model.") for name, _ in method.named_parameters()}
    still = {name for name in everything if name.startswith(tuple(f"{one}." for one in below))}
    assert below == {"image.body.layers_0", "image.body.layers_1.downsample.norm", "image.body.patch_embed"}
    reduction = {name for name in everything if name.startswith("image.body.layers_1.downsample.")}
    assert changed(method) == everything - still - reduction
    assert changed(built(frozen_stages=0)) == everything
    frozen = {name for name, value in built(frozen_stages=1).named_parameters() if not value.requires_grad}
    assert frozen == {name for name, _ in method.named_parameters() if ".patch_embed." in name}
    assert not any(value.requires_grad for value in built(frozen_stages=5).model.image.body.parameters())


@pytest.mark.parametrize("tuning", ["prompt", "linear"])
def test_frozen_modules_have_no_dropout(tuning: Any) -> None:
    """In training two passes are equal; full tuning with the same dropout is random."""
    noisy = {"fusion_dropout": 0.5, "text_dropout": 0.5, "drop_path": 0.5}
    for kind, same in ((tuning, True), ("full", False)):
        method = built(tuning=kind, **noisy).train()
        first, second = (float(method.training_step(one_batch())["alignment"].detach()) for _ in range(2))
        assert (first == pytest.approx(second, rel=1e-5)) is same
        assert method.training and method.eval().train().model.tower.fusions[0].training is not same


def test_the_table_is_added_to_the_text() -> None:
    plain, tuned = built().eval(), built(tuning="prompt").eval()
    caption, spans = "red star and blue disc", [(0, 8), (13, 22)]
    before = plain.ground([image()], [caption], [spans])[0]
    (after,) = tuned.ground([image()], [caption], [spans])
    for name in ("boxes", "scores"):  # zero at first; threads add in another order
        torch.testing.assert_close(getattr(before, name), getattr(after, name))
    table = tuned.model.prompt
    assert table is not None and table.shape == (256, 32)
    with torch.no_grad():
        table.normal_(generator=torch.Generator().manual_seed(1))
    tokens, mask = torch.randint(5, 40, (3, 16)), torch.ones(3, 16, dtype=torch.bool)
    difference = tuned.model.encode_text(tokens, mask).hidden - plain.model.encode_text(tokens, mask).hidden
    assert torch.allclose(difference, table[:16].expand(3, -1, -1), atol=1e-5)
    (moved,) = tuned.ground([image()], [caption], [spans])
    assert not torch.equal(before.scores[:5], moved.scores[:5])


@pytest.mark.parametrize("fusion", [True, False])
def test_a_prompt_learns(fusion: bool) -> None:
    method = built(tuning="prompt", fusion=fusion)
    optimizer = torch.optim.AdamW(method.parameter_groups()[0]["params"], lr=0.05)
    losses = []
    for _ in range(15):
        loss = torch.stack(list(method.train().training_step(one_batch()).values())).sum()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_words_of_a_tuned_prompt_keep_their_places(caplog: pytest.LogCaptureFixture) -> None:
    """The same boxes for each word in any order of the request; other words are warned about."""
    method = built(tuning="prompt").eval()
    assert method.model.prompt is not None
    with torch.no_grad():
        method.model.prompt.normal_(generator=torch.Generator().manual_seed(2))
    others = (NAMES[2], NAMES[0].upper(), NAMES[3], NAMES[1])
    (expected,), (found,) = method.predict([image()], NAMES), method.predict([image()], others)
    called = [NAMES[number] for number in expected.labels.tolist()]
    assert [others[number].lower() for number in found.labels.tolist()] == called
    assert torch.equal(expected.boxes, found.boxes) and torch.equal(expected.scores, found.scores)
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        method.predict([image()], NAMES[:2])
    assert "tuned for other words" in caplog.text


def test_fixed_prompts_are_those_of_detection() -> None:
    """In training and in evaluation: all classes in their order, wherever the sample is; captions stay alone."""
    tokenizer = SpanTokenizer.load("drawn")
    data = GroundingData(classes=(("Key", "red_star", "disc"),), samples=(9,), captions=("a key", "the disc"))
    objects = read_objects(grounded([obj("disc"), obj("Key")]))
    options = replace(FIXED, caption_share=1.0)
    for number in range(6):
        reader = GroundingReader(
            tokenizer=tokenizer, resize=CONFIG.resize(), options=options, data=data, seed=number, most=9
        )
        found = reader.prompt(objects, SamplePosition(epoch=number, number=number))
        assert found.text == "key. red star. disc" and found.spans == (((15, 19),), ((0, 3),))
        captioned = replace(objects, caption="a disc", open_labels=True)
        assert reader.prompt(captioned, SamplePosition(epoch=0, number=number)).text == "a disc"


def saved(method: Glip, folder: Path) -> str:
    meta = Meta(step=1, samples_seen=8, batch_size=8, lanes=1, seed=0, snapshot="0" * 64)
    return Checkpoints(str(folder)).save(method, make_optimizer(AdamW(), method), meta).folder.uri


def test_tuning_starts_from_a_trained_model_and_is_stored(tmp_path: Path) -> None:
    """All weights come from the run; the table begins at zero, and comes back with its checkpoint."""
    trained = built(seed=3).eval()
    place = saved(trained, tmp_path / "trained")
    tuned = built(seed=4, tuning="prompt", start_from=place)
    assert tuned.model.prompt is not None and not tuned.model.prompt.any()
    words = ("star", "disc")
    expected, found = (one.eval().predict([image()], words)[0].scores[:20] for one in (trained, tuned))
    assert torch.allclose(expected, found, atol=1e-6)
    step(tuned)
    after = saved(tuned, tmp_path / "tuned")
    loaded: Any = load_method(after)
    assert loaded.config.tuning == "prompt" and torch.equal(loaded.model.prompt, tuned.model.prompt)
    again = built(seed=5, tuning="prompt", start_from=after)
    assert torch.equal(again.model.prompt.detach(), tuned.model.prompt.detach())  # type: ignore[union-attr]
    with pytest.raises(SettingError, match=r"start_from.*1 unknown \(prompt\)"):
        built(start_from=after)


def test_only_what_fits_is_accepted() -> None:
    with pytest.raises(SettingError, match="fixed_prompts: got False, expected True with tuning prompt"):
        Config(tuning="prompt")
    with pytest.raises(SettingError, match="frozen_stages: got 6, expected 0 to 5"):
        Config(frozen_stages=6)
    with pytest.raises(SettingError, match="frozen_stages: got 2, expected 0 with tuning linear"):
        Config(tuning="linear", frozen_stages=2)
    tokenizer = SpanTokenizer.load("drawn")
    check_names(CONFIG, [f"{word} star" for word in ("red", "blue", "green")], tokenizer)
    many = [f"red star {number}" for number in range(41)]
    with pytest.raises(SettingError, match="classes that fit one prompt, at most 40 names"):
        check_names(CONFIG, many, tokenizer)
    with pytest.raises(SettingError, match=r"class_names: got 'cup_\(trophy\)', expected another name, since 'cup"):
        check_names(CONFIG, ["cup (for tea)", "star", "cup_(trophy)"], tokenizer)
    short = replace(CONFIG, grounding=replace(FIXED, text_tokens=16))
    with pytest.raises(SettingError, match="class_names: got '20 names'"):
        check_names(short, many[:20], tokenizer)
