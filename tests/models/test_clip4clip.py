"""CLIP4Clip's heads and losses against hand-made values, torch's and transformers' own computations, and the paper."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from pipeline.errors import SettingError
from pipeline.loaders.frames import ClipReader, FrameFeatureReader, FrameSampling
from pipeline.loaders.text import TextSettings
from pipeline.models.clip4clip import Clip4Clip, Config, PairHead, clip_features, score_loss
from pipeline.models.method import build_method
from pipeline.models.temporal import FrameLstm, FrameTransformer, first_text_layers, new_block, run_blocks
from pipeline.training.optimizer import AdamW, rate_scales

SMALLEST = Clip4Clip.smallest()
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()


def built(**settings: Any) -> Clip4Clip:
    torch.manual_seed(0)
    method = build_method(replace(SMALLEST, **settings))
    assert isinstance(method, Clip4Clip)
    return method


def batch_of(method: Clip4Clip) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    video = torch.randint(0, 256, (4, 3, 3, 64, 64), dtype=torch.uint8, generator=generator)
    video[~MASK] = 0
    return {"video": video, "video_mask": MASK, "text": method.tokenizer(["a b", "c", "d e f", "g"])}


def noisy(module: nn.Module) -> None:
    """Weights of which no two are alike, so that no mistake cancels."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


# Heads


def test_the_mean_of_frames_by_hand() -> None:
    """Unit frames are averaged as far as the mask shows them, and the mean is normalised."""
    frames = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [9.0, 9.0]], [[5.0, 0.0], [7.0, 7.0], [7.0, 7.0]]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    mean = torch.tensor([(0.6 + 0.0) / 2, (0.8 + 1.0) / 2])
    found = clip_features(frames, mask)
    torch.testing.assert_close(found, torch.stack([mean / mean.norm(), torch.tensor([1.0, 0.0])]))
    assert not clip_features(frames, torch.zeros(2, 3, dtype=torch.bool)).any()  # no frame, no NaN


def test_meanp_is_clip_on_the_frames() -> None:
    """The similarity of a clip is that of the mean of CLIP's own features of its frames."""
    method = built(head="meanP").eval()
    batch = batch_of(method)
    with torch.no_grad():
        alone = [method.encode_image(clip[shown]).mean(dim=0) for clip, shown in zip(batch["video"], MASK, strict=True)]
        expected = functional.normalize(torch.stack(alone), dim=-1)
        torch.testing.assert_close(method.encode_video(batch["video"], MASK), expected)
    assert method.head is None and method.encodes == ("image", "video", "text")


@pytest.mark.parametrize("head", ["seqTransf", "tightTransf"])
def test_padding_never_reaches_a_frame(head: str) -> None:
    """Other values behind the end of a clip, or more of them, change nothing."""
    blocks = [new_block(32, 2) for _ in range(2)]
    frames, positions = torch.randn(4, 3, 32), torch.randn(9, 32)
    other = frames.clone()
    other[~MASK] = 50.0
    if head == "seqTransf":
        module: nn.Module = FrameTransformer(blocks, positions)
        noisy(module)
        for changed in (other, functional.pad(other, (0, 0, 0, 2), value=3.0)):
            mask = functional.pad(MASK, (0, changed.shape[1] - 3))
            torch.testing.assert_close(module(changed, mask)[:, :3][MASK], module(frames, MASK)[MASK])
    else:
        pairs = PairHead(blocks, positions, 0.0)
        noisy(pairs)
        texts = torch.randn(5, 32)
        torch.testing.assert_close(pairs(texts, other, MASK, 100), pairs(texts, frames, MASK, 100))
        apart = torch.cat([pairs(texts, frames[n : n + 1], MASK[n : n + 1], 100) for n in range(4)], dim=1)
        torch.testing.assert_close(pairs(texts, frames, MASK, 100), apart)


def test_blocks_equal_those_of_transformers() -> None:
    """Copied weights of transformers' CLIP layers give the same hidden states, with the same mask of keys."""
    shape = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    theirs = CLIPTextModel(CLIPTextConfig(**shape, vocab_size=10, hidden_act="quick_gelu")).eval()
    layers: Any = next(module for name, module in theirs.named_modules() if name.endswith("encoder.layers"))
    noisy(layers)
    ours = [new_block(32, 2) for _ in layers]
    for mine, layer in zip(ours, layers, strict=True):
        state = {name: value for name, value in layer.state_dict().items()}
        attention = [state[f"self_attn.{part}_proj.weight"] for part in "qkv"]
        biases = [state[f"self_attn.{part}_proj.bias"] for part in "qkv"]
        mine.attn = nn.MultiheadAttention(32, 2, batch_first=True)
        mine.load_state_dict(
            {
                "attn.in_proj_weight": torch.cat(attention),
                "attn.in_proj_bias": torch.cat(biases),
                "attn.out_proj.weight": state["self_attn.out_proj.weight"],
                "attn.out_proj.bias": state["self_attn.out_proj.bias"],
                "mlp.c_fc.weight": state["mlp.fc1.weight"],
                "mlp.c_fc.bias": state["mlp.fc1.bias"],
                "mlp.c_proj.weight": state["mlp.fc2.weight"],
                "mlp.c_proj.bias": state["mlp.fc2.bias"],
                **{f"ln_{n}.{part}": state[f"layer_norm{n}.{part}"] for n in (1, 2) for part in ("weight", "bias")},
            }
        )
    hidden = torch.randn(4, 3, 32)
    bias = torch.zeros(4, 1, 3, 3).masked_fill(~MASK[:, None, None], torch.finfo(torch.float32).min)
    expected = hidden
    for layer in layers:
        found = layer(expected, attention_mask=bias)
        expected = found[0] if isinstance(found, tuple) else found
    torch.testing.assert_close(run_blocks(ours, hidden, MASK)[MASK], expected[MASK])


def test_a_transformer_that_adds_nothing_is_the_residual() -> None:
    """With output projections of zero the blocks are the identity: x + (x + positions)."""
    module = FrameTransformer([new_block(32, 2) for _ in range(2)], torch.randn(77, 32))
    for block in module.resblocks:
        for layer in (block.attn.out_proj, block.mlp.c_proj):  # type: ignore[union-attr]
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    frames = torch.randn(4, 3, 32)
    torch.testing.assert_close(module(frames, MASK), 2 * frames + module.positions[:3])


def test_the_lstm_equals_one_over_packed_clips() -> None:
    """The authors pack clips by their length; a forward LSTM over padded clips gives the same for their frames."""
    module, frames = FrameLstm(32), torch.randn(4, 3, 32)
    packed = nn.utils.rnn.pack_padded_sequence(frames, MASK.sum(dim=1), batch_first=True, enforce_sorted=False)
    hidden = nn.utils.rnn.pad_packed_sequence(module.lstm(packed)[0], batch_first=True)[0]
    torch.testing.assert_close(module(frames, MASK)[MASK], (hidden + frames)[MASK])


def test_heads_start_as_the_text_towers_first_layers() -> None:
    method = built(head_layers=1)
    text = method.model.transformer.resblocks[0].state_dict()
    head = method.head
    assert isinstance(head, FrameTransformer)
    assert all(torch.equal(head.resblocks[0].state_dict()[name], value) for name, value in text.items())
    assert torch.equal(head.positions, method.model.positional_embedding) and head.positions.requires_grad
    assert all(parameter.requires_grad for parameter in head.parameters())
    blocks, table = first_text_layers(method.model, 32, 3, 90)  # more layers and positions than the tower has
    assert len(blocks) == 3 and table.shape == (90, 32)
    wider, table = first_text_layers(method.model, 48, 2, 5)  # another width: random
    assert [block.ln_1.weight.shape for block in wider] == [(48,), (48,)] and table.shape == (5, 48)  # type: ignore[union-attr]


# Loss


def test_the_loss_is_two_cross_entropies() -> None:
    method = built()
    batch = batch_of(method)
    video, text = method.encode_video(batch["video"], MASK), method.encode_text(batch["text"])
    scores = method.logit_scale.exp() * text @ video.T
    expected = (
        functional.cross_entropy(scores, torch.arange(4)) + functional.cross_entropy(scores.T, torch.arange(4))
    ) / 2
    torch.testing.assert_close(method.training_step(batch)["contrastive"], expected)
    torch.testing.assert_close(score_loss(scores), expected)


def test_tight_scores_have_texts_in_rows_and_no_scale() -> None:
    """[texts, clips] from the head alone: the loss does not depend on the scale, and tiles change nothing."""
    method = built(head="tightTransf", head_dropout=0.0)
    batch = batch_of(method)
    assert method.scores_pairs == ("video", "text") and method.encodes == ()
    assert not method.logit_scale.requires_grad
    head = method.tight
    assert head is not None
    noisy(head)
    texts, frames = torch.randn(5, 32), torch.randn(4, 3, 32)
    assert head(texts, frames, MASK, 1000).shape == (5, 4)
    clips = torch.cat([frames, MASK[..., None].float()], dim=-1)
    torch.testing.assert_close(method.pair_scores(clips, texts), head(texts, frames, MASK, 1000).T)
    losses, slopes = [], []
    for tile in (1, 3, 7, 1000):
        small = built(head="tightTransf", head_dropout=0.0, pair_tile=tile)
        small.load_state_dict(method.state_dict())
        loss = small.training_step(batch)["contrastive"]
        loss.backward()
        losses.append(loss.detach())
        slopes.append(torch.cat([one.grad.flatten() for one in small.parameters() if one.grad is not None]))
    for loss, slope in zip(losses, slopes, strict=True):
        torch.testing.assert_close(loss, losses[-1])
        torch.testing.assert_close(slope, slopes[-1], rtol=1e-4, atol=1e-6)


def test_two_ranks_with_pairs_equal_one() -> None:
    """Half of the texts and clips in each of two ranks: the mean of both gradients is that of the whole batch."""
    whole = built(head="tightTransf", head_dropout=0.0)
    batch = batch_of(whole)
    expected = whole.training_step(batch)["contrastive"]
    expected.backward()
    halves = [{name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()} for rank in range(2)]
    # One graph with both ranks' work stands for two processes: a gather joins what both computed.
    both = built(head="tightTransf", head_dropout=0.0)
    parts = [both.embed(half) for half in halves]
    clips, texts = (torch.cat([part[name] for part in parts]) for name in ("video", "text"))
    rows = torch.cat([both.pair_scores(clips, part["text"]).T for part in parts])
    loss = score_loss(rows)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert len(texts) == 4
    for (name, one), other in zip(both.named_parameters(), whole.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


# What is frozen, and rates


def test_the_papers_rule_freezes_embeddings_alone(tmp_path: Any) -> None:
    weights = tmp_path / "open_clip.pt"
    torch.save(built().model.state_dict(), weights)
    method = built(pretrained=str(weights), freeze_layers=0)
    frozen = {name.removeprefix("model.") for name, one in method.named_parameters() if not one.requires_grad}
    assert frozen == {
        "visual.conv1.weight",
        "visual.class_embedding",
        "visual.positional_embedding",
        "visual.ln_pre.weight",
        "visual.ln_pre.bias",
        "token_embedding.weight",
        "positional_embedding",
    }
    deeper = built(pretrained=str(weights), freeze_layers=1)
    more = {name for name, one in deeper.named_parameters() if not one.requires_grad}
    assert {name.split(".resblocks.")[1][0] for name in more if ".resblocks." in name} == {"0"}
    everything = built(pretrained=str(weights), freeze_layers=12)  # what is above the blocks is always trained
    trained = {name for name, one in everything.named_parameters() if one.requires_grad and name.startswith("model.")}
    assert trained == {
        "model.visual.proj",
        "model.visual.ln_post.weight",
        "model.visual.ln_post.bias",
        "model.ln_final.weight",
        "model.ln_final.bias",
        "model.text_projection",
        "model.logit_scale",
    }


def test_towers_learn_slower_than_the_head() -> None:
    method = built()
    scales = rate_scales(AdamW(learning_rate=1e-4, tower_rates={"image": 1e-3, "text": 1e-3}), method)
    for name, _ in method.named_parameters():
        assert scales.get(name, 1.0) == (1.0 if name.startswith("head.") else 1e-3), name
    with pytest.raises(SettingError, match="tower_rates"):
        rate_scales(AdamW(tower_rates={"head": 2.0}), built(head="meanP"))


# Patches over time


def test_patches_of_three_frames_are_a_convolution_over_time() -> None:
    """Against torch's own, with the three slices as one kernel; at the start they are CLIP's of each frame."""
    method, plain = built(head="meanP", linear_patch="3d").eval(), built(head="meanP").eval()
    batch = batch_of(method)
    with torch.no_grad():
        start = method.encode_video(batch["video"], MASK)
        torch.testing.assert_close(start, plain.encode_video(batch["video"], MASK))
    assert method.patches is not None
    noisy(method.patches)
    middle = method.model.visual.conv1
    kernel = torch.stack([method.patches.before.weight, middle.weight, method.patches.after.weight], dim=2)
    seen: list[Tensor] = []
    hook = middle.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output]))
    with torch.no_grad():
        method.encode_video(batch["video"], MASK)
        hook.remove()
        clips = seen[0].unflatten(0, (4, 3)).transpose(1, 2)  # B, 3, T, H, W
        expected = functional.conv3d(clips, kernel, stride=(1, *middle.stride), padding=(1, 0, 0))
        torch.testing.assert_close(seen[1].unflatten(0, (4, 3)), expected.transpose(1, 2), rtol=1e-4, atol=1e-4)
        moved = method.encode_video(batch["video"].flip(1)[:1], MASK[:1])
        assert not torch.allclose(moved, method.encode_video(batch["video"][:1], MASK[:1]), atol=1e-4), "order counts"
        other = batch["video"].clone()
        other[~MASK] = 200
        torch.testing.assert_close(method.encode_video(other, MASK), method.encode_video(batch["video"], MASK))
    assert method.encodes == ("video", "text")


def test_patches_over_time_are_trained_whatever_is_frozen(tmp_path: Any) -> None:
    weights = tmp_path / "open_clip.pt"
    torch.save(built().model.state_dict(), weights)
    method = built(pretrained=str(weights), freeze_layers=1, linear_patch="3d").train()
    method.training_step(batch_of(method))["contrastive"].backward()
    for name in ("model.visual.conv1.weight", "patches.before.weight", "patches.after.weight"):
        assert method.get_parameter(name).grad.abs().sum() > 0, name  # type: ignore[union-attr]
    assert not method.model.visual.class_embedding.requires_grad
    again = Clip4Clip.restored(method.config, method.description())
    again.load_state_dict(method.state_dict())
    assert again.patches is not None
    scales = rate_scales(AdamW(learning_rate=1e-4, tower_rates={"image": 1e-3, "text": 1e-3}), method)
    assert scales["patches.after.weight"] == 1e-3
    with pytest.raises(SettingError, match="frames"):
        built(linear_patch="3d", sampling=FrameSampling(frames=1))
    with pytest.raises(SettingError, match="linear_patch: got '3d', expected 2d for RN50"):
        built(linear_patch="3d", architecture="RN50")


# Readers


def test_it_reads_videos_or_stored_features(tmp_path: Any) -> None:
    method = built()
    clips, text = method.readers(train=True, seed=5)
    assert isinstance(clips, ClipReader) and clips.seed == 5 and clips.sampling == SMALLEST.sampling
    assert list(Clip4Clip.sample_fields(SMALLEST)) == ["video", "txt"]
    weights = tmp_path / "open_clip.pt"
    torch.save(method.model.state_dict(), weights)
    stored = built(pretrained=str(weights), frame_features="frames", freeze_layers=0)
    features, _ = stored.readers(train=True)
    assert isinstance(features, FrameFeatureReader) and features.name == "frames"
    settings = TextSettings(caption="json:captions")
    assert list(Clip4Clip.sample_fields(stored.config, settings)) == ["json"]
    (wanted,) = Clip4Clip.sidecars(stored.config)
    assert (wanted.name, wanted.facts) == ("frames", {"width": stored.model.text_projection.shape[1]})
    assert not any(one.requires_grad for one in stored.model.visual.parameters())
    batch = batch_of(stored)
    with torch.no_grad():
        pixels = stored.training_step(batch)["contrastive"]
        batch["video"] = stored.encode_frames(batch["video"])
        torch.testing.assert_close(stored.training_step(batch)["contrastive"], pixels)


def test_views_are_averaged() -> None:
    method = built().eval()
    batch = batch_of(method)
    views = torch.stack([batch["video"], batch["video"].flip(1)], dim=1)
    masks = torch.stack([MASK, MASK.flip(1)], dim=1)
    with torch.no_grad():
        both = [method.encode_video(views[:, view], masks[:, view]) for view in range(2)]
        expected = functional.normalize(both[0] + both[1], dim=-1)
        torch.testing.assert_close(method.encode_video(views, masks), expected)
    with pytest.raises(SettingError, match="clips: got 2.*uniform"):
        method.video_reader(clips=2)


def test_texts_are_cut_at_their_own_length() -> None:
    """32 tokens with start and end, as in the authors' loader, by a tower of 77."""
    method = built()
    tokens = method.tokenizer(["word " * 100])
    assert tokens.shape == (1, 32) and tokens[0, -1] == method.end_of_text
    assert built(text_tokens=None).tokenizer(["a"]).shape == (1, 77)
    with pytest.raises(SettingError, match="text_tokens: got 78"):
        built(text_tokens=78)


@pytest.mark.parametrize(
    "bad",
    [
        {"head_layers": 0},
        {"head_dropout": 1.0},
        {"pair_tile": 0},
        {"text_tokens": 2},
        {"freeze_layers": -1},
        {"freeze_layers": 0, "pretrained": None},
        {"frame_features": "frames", "pretrained": None},
        {"loss": "sigmoid"},
        {"teacher": "ViT-B-32:openai"},
    ],
)
def test_bad_settings(bad: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(bad))):
        replace(SMALLEST, **bad)
    assert Config().head == "meanP" and Config().sampling == FrameSampling(frames=12, rate=1.0)
