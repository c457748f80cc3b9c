"""ActionCLIP's loss against torch's divergence, its prompts of the video against hand-made values, and its readers."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import SettingError
from pipeline.loaders.batches import SamplePosition
from pipeline.loaders.clip_views import ClipViewsReader
from pipeline.loaders.frames import FrameSampling
from pipeline.loaders.readers import LabelReader
from pipeline.models.actionclip import (
    TEMPLATES,
    ActionClip,
    ActionTextReader,
    ClassTokenTransformer,
    FrameConvolution,
    joined,
    label_divergence,
    shifted,
)
from pipeline.models.method import build_method
from pipeline.shards.sample import Sample
from pipeline.training.optimizer import AdamW, rate_scales

SMALLEST = ActionClip.smallest()
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
HEADS = ("meanP", "Conv_1D", "LSTM", "Transf", "Transf_cls")


def built(**settings: Any) -> ActionClip:
    torch.manual_seed(0)
    method = build_method(replace(SMALLEST, **settings))
    assert isinstance(method, ActionClip)
    return method


def clips(count: int = 4) -> Tensor:
    return torch.randint(0, 256, (count, 3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# Loss


def by_torch(video: Tensor, text: Tensor, scale: Tensor, labels: Tensor, sharpness: float) -> Tensor:
    """The definition, with all logits and torch's divergence."""
    targets = (sharpness * (labels[:, None] == labels[None]).to(video)).softmax(dim=1)
    logits = scale * video @ text.T
    one, other = (
        functional.kl_div(some.log_softmax(dim=1), targets, reduction="batchmean") for some in (logits, logits.T)
    )
    return (one + other) / 2


@pytest.mark.parametrize("tile", [1024, 4])
@pytest.mark.parametrize("sharpness", [10.0, 1.0])
def test_the_loss_is_torchs_divergence(tile: int, sharpness: float) -> None:
    labels = torch.tensor([0.0, 1, 2, 0, 1, 0, 5, 5, 3])
    made = [functional.normalize(torch.randn(9, 6, dtype=torch.float64), dim=-1).requires_grad_() for _ in range(2)]
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    expected = by_torch(*made, scale, labels, sharpness)
    found = label_divergence(*made, scale, labels, sharpness, tile=tile)
    torch.testing.assert_close(found, expected)
    slopes = (torch.autograd.grad(loss, [*made, scale]) for loss in (found, expected))
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other)


def test_targets_of_the_specification() -> None:
    """128 rows: one positive has a probability of 0.9943, two have 0.4986 each; equal rows give what follows of it."""
    for positives, own in ((1, 0.9943), (2, 0.4986)):
        strength = math.exp(10)
        total = positives * strength + 128 - positives
        assert strength / total == pytest.approx(own, abs=1e-4)
    same = functional.normalize(torch.ones(128, 4), dim=-1)
    labels = torch.arange(128.0)
    share = math.exp(10) / (math.exp(10) + 127)
    entropy = -share * math.log(share) - (1 - share) * math.log((1 - share) / 127)
    found = label_divergence(same, same, torch.tensor(50.0), labels)
    assert float(found) == pytest.approx(math.log(128) - entropy, abs=1e-4)


def test_two_ranks_equal_one() -> None:
    """The labels of the other rank decide the targets: each rank's rows against the columns of both."""
    labels = torch.tensor([0.0, 1, 2, 0, 1, 3])
    video, text = (functional.normalize(torch.randn(6, 5), dim=-1) for _ in range(2))
    everything = torch.cat([video, text, labels[:, None]], dim=1)
    halves = []
    for rank in range(2):
        rows = slice(3 * rank, 3 * rank + 3)

        def gather(own: Tensor, rank: int = rank) -> Tensor:
            """What both ranks sent: all of it for the loss's last call, pairs of features for the contrastive loss."""
            whole = everything if own.ndim == 2 else torch.stack([video, text], dim=1)
            torch.testing.assert_close(own, whole[3 * rank : 3 * rank + 3])
            return whole

        halves.append(label_divergence(video[rows], text[rows], torch.tensor(4.0), labels[rows], gather=gather))
    whole = label_divergence(video, text, torch.tensor(4.0), labels)
    torch.testing.assert_close(sum(halves) / 2, whole)
    alone = [
        label_divergence(video[rows], text[rows], torch.tensor(4.0), labels[rows]) for rows in (slice(3), slice(3, 6))
    ]
    assert not torch.isclose(sum(alone) / 2, whole)  # not the mean of both ranks' own batches


def test_the_step_uses_the_labels_of_the_batch() -> None:
    method = built()
    batch = {
        "video": clips(),
        "video_mask": torch.ones(4, 3, dtype=torch.bool),
        "text": method.tokenizer(["a", "b", "c", "d"]),
    }
    batch["label"] = torch.tensor([0, 1, 0, 2])
    video, text = method.encode_video(batch["video"]), method.encode_text(batch["text"])
    expected = by_torch(video, text, method.logit_scale.exp(), batch["label"], 10.0)
    torch.testing.assert_close(method.training_step(batch)["divergence"], expected)


# Where frames meet


def test_shift_by_hand() -> None:
    """Two clips of three frames, a class token and one patch of eight channels that count."""
    tokens = torch.arange(6.0)[:, None, None] + torch.arange(2.0)[:, None] * 100 + torch.zeros(8)
    found = shifted(tokens, 3)
    assert torch.equal(found[:, 0], tokens[:, 0])  # class tokens stay
    assert found[:, 1, 0].tolist() == [101, 102, 0, 104, 105, 0]  # the next frame's
    assert found[:, 1, 1].tolist() == [0, 100, 101, 0, 103, 104]  # the one before
    assert torch.equal(found[:, 1, 2:], tokens[:, 1, 2:])


def test_joint_is_one_sequence_of_all_patches() -> None:
    tokens, time = torch.randn(6, 5, 16), torch.randn(4, 16)
    found = joined(tokens, time, 3)
    assert found.shape == (2, 1 + 3 * 4, 16)
    torch.testing.assert_close(found[1, 0], tokens[3, 0])
    torch.testing.assert_close(found[1, 1 + 2 * 4 + 3], tokens[5, 4] + time[2])
    method = built(network_prompt="joint", head="meanP").eval()
    with torch.no_grad():
        features = method.encode_video(clips())
        assert not torch.allclose(features, method.encode_video(clips().flip(1)), atol=1e-5)  # time is not symmetric
        nn.init.zeros_(method.time)  # type: ignore[arg-type]
        torch.testing.assert_close(method.encode_video(clips()), method.encode_video(clips()[:, [0, 2, 1]]))


def test_open_clips_names_stay() -> None:
    """What is added to the tower is not in it: the weights open in open_clip."""
    plain = set(built(head="meanP").model.state_dict())
    for settings in ({"network_prompt": "shift"}, {"network_prompt": "joint", "head": "meanP"}):
        method = built(**settings)
        assert set(method.model.state_dict()) == plain
        scales = rate_scales(AdamW(tower_rates={"head": 10.0}), method)
        raised = {name for name, scale in scales.items() if scale == 10}
        assert raised == {name for name, _ in method.named_parameters() if not name.startswith("model.")} != set()


def test_the_convolution_starts_as_a_shift() -> None:
    """A quarter of the channels from the frame before, a quarter from the next; nothing from behind the end."""
    module, frames = FrameConvolution(8), torch.randn(4, 3, 8)
    expected = []
    for clip, shown in zip(frames, MASK, strict=True):
        own = clip[shown]
        before, following = functional.pad(own, (0, 0, 1, 0))[:-1], functional.pad(own, (0, 0, 0, 1))[1:]
        moved = torch.cat([before[:, :2], own[:, 2:6], following[:, 6:]], dim=1)
        expected.append((own + moved).mean(dim=0))
    torch.testing.assert_close(module(frames, MASK), torch.stack(expected))
    with torch.no_grad():
        module.shift.weight.normal_()
    swapped = module(frames[..., torch.arange(8)], MASK)
    one = functional.conv1d(frames[:1].transpose(1, 2), module.shift.weight, padding=1, groups=8).transpose(1, 2)
    torch.testing.assert_close(swapped[0], (one[0] + frames[0]).mean(dim=0))  # time stays time


@pytest.mark.parametrize("head", HEADS)
def test_padding_never_reaches_a_clip(head: str) -> None:
    method = built(head=head, sampling=FrameSampling(mode="rate", frames=3)).eval()
    video, other = clips(), clips()
    other[~MASK] = 7
    with torch.no_grad():
        for parameter in () if method.head is None else method.head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        torch.testing.assert_close(method.encode_video(video, MASK), method.encode_video(other, MASK))


def test_transf_that_adds_nothing_is_the_residual() -> None:
    """With output projections of zero: the mean of x + (x + positions)."""
    method = built()
    layer: Any = method.head.layer  # type: ignore[union-attr]
    for block in layer.resblocks:
        for part in (block.attn.out_proj, block.mlp.c_proj):
            nn.init.zeros_(part.weight)
    frames = torch.randn(2, 3, 32)
    found = method.head(frames, torch.ones(2, 3, dtype=torch.bool))  # type: ignore[misc]
    torch.testing.assert_close(found, (2 * frames + layer.positions[:3]).mean(dim=1))
    assert layer.positions.std().item() == pytest.approx(0.02, rel=0.1) and layer.resblocks[0].ln_1.eps == 1e-12
    assert layer.resblocks[0].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_the_class_token_equals_torchs_encoder() -> None:
    module, frames = ClassTokenTransformer(32, 2, 3).eval(), torch.randn(2, 3, 32)
    tokens = torch.cat([module.class_token.expand(2, -1, -1), frames], dim=1) + module.positions
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 8), 2, nn.LayerNorm(32), enable_nested_tensor=False)
    theirs.load_state_dict(module.encoder.state_dict())
    expected = theirs.eval()(tokens.transpose(0, 1))[0]
    torch.testing.assert_close(module(frames, torch.ones(2, 3, dtype=torch.bool)), expected)


# Texts, views, and the linear layer


def sample(label: Any) -> Sample:
    return Sample("s", {"json": json.dumps({"label": label}).encode()})


def test_training_draws_a_template_for_each_clip_and_epoch() -> None:
    label = LabelReader(classes=("brush_hair", "run"))
    method = built()
    reader = ActionTextReader(label=label, prompts=TEMPLATES, tokenizer=method.tokenizer, seed=3)
    texts = [reader.read(sample("brush_hair"), SamplePosition(epoch, 7))["text"] for epoch in range(200)]
    assert len(set(texts)) == len(set(TEMPLATES)) == 16
    assert {text.replace("brush hair", "{}") for text in texts} == set(TEMPLATES)
    assert texts == [reader.read(sample("brush_hair"), SamplePosition(epoch, 7))["text"] for epoch in range(200)]
    row = reader.read(sample("run"))
    assert row == {"label": 1, "text": "a photo of action run"}
    batch = reader.collate([row, reader.read(sample(0))])
    assert batch["label"].tolist() == [1, 0]
    assert torch.equal(batch["text"], method.tokenizer(["a photo of action run", "a photo of action brush hair"]))


def test_several_clips_and_crops() -> None:
    method = built().eval()
    reader = method.video_reader(clips=2, crops=3)
    assert isinstance(reader, ClipViewsReader) and [view.place for view in reader.views] == [0.25] * 3 + [0.75] * 3
    views = torch.stack([clips(), clips().flip(1)], dim=1)
    masks = torch.ones(4, 2, 3, dtype=torch.bool)
    with torch.no_grad():
        both = [method.encode_video(views[:, view], masks[:, view]) for view in range(2)]
        torch.testing.assert_close(method.encode_video(views, masks), functional.normalize(both[0] + both[1], dim=-1))


def test_a_linear_layer_replaces_texts() -> None:
    method = built(objective="linear")
    assert method.encodes == ("video",) and method.classes == SMALLEST.class_names and built().classes == ()
    assert [key for reader in method.readers(train=True) for key in (getattr(reader, "key", ""),)] == [
        "video",
        "colours",
        "label",
    ]
    batch = {"video": clips(), "video_mask": torch.ones(4, 3, dtype=torch.bool), "label": torch.tensor([0, 1, 2, 3])}
    loss = method.training_step(batch)["classification"]
    logits = method.classify_video(batch["video"])
    torch.testing.assert_close(loss, functional.cross_entropy(logits, batch["label"]))
    loss.backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (not _of_texts(name)), name


def _of_texts(name: str) -> bool:
    return name.startswith("model.") and not name.startswith("model.visual.")


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"class_names": ("a", "a")}, "class_names"),
        ({"prompts": ("no name",)}, "prompts"),
        ({"prompts": ()}, "prompts"),
        ({"head_layers": 0}, "head_layers"),
        ({"sharpness": 0.0}, "sharpness"),
        ({"network_prompt": "joint"}, "head"),
        ({"network_prompt": "shift", "sampling": FrameSampling(mode="uniform", frames=3)}, "mode"),
        ({"augment": "wild"}, "augment"),
        ({"loss": "sigmoid"}, "loss"),
    ],
)
def test_bad_settings(bad: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingError, match=f"^{field}: "):
        replace(SMALLEST, **bad)


def test_what_is_known_before_anything_is_built() -> None:
    with pytest.raises(SettingError, match="class_names: got"):
        ActionClip.check(replace(SMALLEST, class_names=("one",)))
    with pytest.raises(SettingError, match="network_prompt: got 'shift', expected none for clipmill-small"):
        ActionClip.check(replace(SMALLEST, architecture="clipmill-small", network_prompt="shift"))
