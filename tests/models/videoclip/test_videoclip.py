"""VideoCLIP's towers against transformers, its loss against torch, and its encoders against plain products."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertModel

from pipeline.errors import SettingError
from pipeline.loaders.grounding_prompts import SpanTokenizer
from pipeline.models import videoclip
from pipeline.models.videoclip import VideoClip, text_to_video_loss, towers
from pipeline.training.checkpoint import Checkpoints, Meta
from pipeline.training.optimizer import AdamW, make_optimizer

SMALL = VideoClip.smallest()


def make(**changes: Any) -> VideoClip:
    torch.manual_seed(0)
    return VideoClip(replace(SMALL, **changes)).eval()


def random_batch(method: VideoClip, videos: int = 3) -> dict[str, Tensor]:
    pairs, frames = method.config.pairs, method.config.frames
    lengths = torch.randint(1, frames + 1, (videos, pairs))
    mask = torch.arange(frames) < lengths[..., None]
    video = torch.randn(videos, pairs, frames, 32) * mask[..., None]
    words = [f"circle {'red ' * int(number)}" for number in torch.randint(0, 9, (videos * pairs,))]
    return {"video": video, "video_mask": mask, "text": method.tokenizer(words).unflatten(0, (videos, pairs))}


def test_the_video_tower_is_a_bert_whose_mean_leaves_out_cls() -> None:
    """One clip of 5 frames: transformers' model on the 7 positions alone, without padding."""
    method = make()
    tower = method.model.video
    video = torch.randn(1, 32, 32)
    mask = torch.arange(32)[None] < 5
    words = tower.bert.embeddings.word_embeddings.weight
    inputs = torch.cat([words[0][None], tower.embedding(video[0, :5]), words[1][None]])[None]
    places = torch.tensor([[0, 1, 2, 3, 4, 5, 33]])
    found = tower.bert(inputs_embeds=inputs, position_ids=places).last_hidden_state
    torch.testing.assert_close(method._pooled_video(video, mask), found[:, 1:].mean(dim=1))


def test_the_text_tower_is_a_bert_whose_mean_leaves_out_cls_and_padding() -> None:
    method = make()
    text = method.tokenizer(["a red circle", "blue"])
    seen = text != method.words.pad
    found = method.model.text.bert(input_ids=text, attention_mask=seen.long()).last_hidden_state
    for row, states, there in zip(method._pooled_text(text), found, seen, strict=True):
        torch.testing.assert_close(row, states[1 : int(there.sum())].mean(dim=0))


def test_padding_changes_nothing() -> None:
    method = make()
    batch = random_batch(method)
    video, mask, text = (batch[key].flatten(0, 1) for key in method.batch_keys)
    changed = torch.where(mask[..., None], video, torch.randn_like(video))
    torch.testing.assert_close(method._pooled_video(changed, mask), method._pooled_video(video, mask))
    short = mask[:, :20] & (torch.arange(20) < 9)
    torch.testing.assert_close(
        method._pooled_video(video[:, :20], short), method._pooled_video(video[:, :9], short[:, :9])
    )
    cut = text[:, : int((text != method.words.pad).sum(dim=1).max())]
    torch.testing.assert_close(method._pooled_text(cut), method._pooled_text(text))


def test_the_loss_is_the_sum_of_both_cross_entropies_of_plain_products() -> None:
    method = make()
    batch = random_batch(method)
    found = method.embed(batch)
    products = found["video"].flatten(0, 1) @ found["text"].flatten(0, 1).T
    own = torch.arange(len(products))
    expected = functional.cross_entropy(products, own) + functional.cross_entropy(products.T, own)
    torch.testing.assert_close(method.training_step(batch)["contrastive"], expected)
    tiled = make(loss_tile=5)
    torch.testing.assert_close(tiled.training_step(batch)["contrastive"], expected)
    texts = make(objective="text_to_video", loss_tile=5)
    torch.testing.assert_close(texts.training_step(batch)["text_to_video"], functional.cross_entropy(products.T, own))
    cosines = make(normalise=True, logit_scale=20.0)
    unit = [functional.normalize(found[name].flatten(0, 1), dim=-1) for name in ("video", "text")]
    logits = 20 * unit[0] @ unit[1].T
    expected = functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)
    torch.testing.assert_close(cosines.training_step(batch)["contrastive"], expected)


def test_the_loss_of_texts_has_the_gradients_of_the_plain_one() -> None:
    text, video = torch.randn(11, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    scale = torch.tensor(0.7, dtype=torch.float64)
    gradients = []
    for loss in (
        lambda t, v, s: text_to_video_loss(t, v, s, tile=3),
        lambda t, v, s: functional.cross_entropy(s * t @ v.T, torch.arange(11)),
    ):
        leaves = [one.clone().requires_grad_() for one in (text, video, scale)]
        value = loss(*leaves)
        gradients.append([value, *torch.autograd.grad(value, leaves)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_cosines_of_the_encoders_are_the_products() -> None:
    """Up to one factor for all pairs, so that ranks are the same; with norms of weights that are not 1."""
    method = make()
    with torch.no_grad():
        for tower in (method.model.video, method.model.text):
            norm = tower.bert.encoder.layer[-1].output.LayerNorm
            norm.weight.normal_(1, 0.5)
            norm.bias.normal_(0, 0.5)
        batch = random_batch(method, videos=5)
        found = {name: one.flatten(0, 1) for name, one in method.embed(batch).items()}
        video = method.encode_video(batch["video"].flatten(0, 1), batch["video_mask"].flatten(0, 1))
        text = method.encode_text(batch["text"].flatten(0, 1))
        limits = [towers.longest(one.bert) for one in (method.model.video, method.model.text)]
    assert all(torch.allclose(one.norm(dim=1), torch.ones(len(one))) for one in (video, text))
    assert all((found[name].norm(dim=1) <= limit).all() for name, limit in zip(("video", "text"), limits, strict=True))
    torch.testing.assert_close(video @ text.T * limits[0] * limits[1], found["video"] @ found["text"].T)
    torch.testing.assert_close(method.encode_video(batch["video"].flatten(0, 1)), video)  # zeros are padding


def test_moments_are_the_states_of_frames_and_windows_overlap() -> None:
    method = make()
    with torch.no_grad():
        short = torch.randn(2, 32, 32)
        mask = torch.ones(2, 32, dtype=torch.bool)
        states, _ = method.model.video(short, mask)
        limit = towers.longest(method.model.video.bert)
        torch.testing.assert_close(method.encode_moments(short, mask)[..., :-2] * limit, states[:, 1:-1])
        long, all_of_it = torch.randn(1, 40, 32), torch.ones(1, 40, dtype=torch.bool)
        found = method.encode_moments(long, all_of_it)
        first, last = (method.model.video(long[:, cut], all_of_it[:, cut])[0] for cut in (slice(32), slice(8, 40)))
        assert found.shape == (1, 40, 34)
        torch.testing.assert_close(found[0, :8, :-2] * limit, first[0, 1:9])
        torch.testing.assert_close(found[0, 36:, :-2] * limit, last[0, 29:33])
        torch.testing.assert_close(found[0, 20, :-2] * limit, (first[0, 21] + last[0, 13]) / 2)


def write_bert(folder: Path, layers: int = 3) -> BertModel:
    """A folder in transformers' layout with random weights."""
    words = SpanTokenizer.load("drawn")
    settings = BertConfig(
        vocab_size=words.vocab_size,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=80,
    )
    bert = BertModel(settings, add_pooling_layer=False)
    bert.save_pretrained(folder)
    from transformers import PreTrainedTokenizerFast

    (folder / "words.json").write_text(words.description)
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "words.json")).save_pretrained(folder)
    return bert


def test_both_towers_start_from_a_bert(tmp_path: Path) -> None:
    bert = write_bert(tmp_path)
    config = replace(SMALL, bert=str(tmp_path), video_layers=2)
    VideoClip.check(config)
    method = VideoClip(config).eval()
    known = bert.state_dict()
    assert all(torch.equal(value, known[name]) for name, value in method.model.text.bert.state_dict().items())
    video = method.model.video.bert.state_dict()
    words = "embeddings.word_embeddings.weight"
    assert torch.equal(video.pop(words), known[words][[method.words.start, method.words.end]])
    assert video and all(torch.equal(value, known[name]) for name, value in video.items())
    assert len(method.model.video.bert.encoder.layer) == 2
    random = VideoClip(replace(config, bert_weights=False))
    assert not torch.equal(random.model.text.bert.state_dict()[words], known[words])


def test_a_checkpoint_starts_the_fine_tuning(tmp_path: Path) -> None:
    method = make(learn_scale=True, logit_scale=2.0)
    meta = Meta(step=1, samples_seen=8, batch_size=8, lanes=1, seed=0, snapshot="")
    saved = Checkpoints(str(tmp_path)).save(method, make_optimizer(AdamW(), method), meta)
    config = replace(SMALL, pretrained=saved.folder.uri, objective="text_to_video", positives="whole", pairs=1)
    VideoClip.check(config)
    started = VideoClip(config)
    assert all(torch.equal(value, started.state_dict()[name]) for name, value in method.state_dict().items())
    with pytest.raises(SettingError, match="pretrained"):
        VideoClip(replace(config, video_layers=2))
    with pytest.raises(SettingError, match="pretrained"):
        VideoClip.check(replace(config, pretrained=str(tmp_path / "nothing")))


def test_features_of_another_width_are_refused_in_a_sentence() -> None:
    method = make()
    batch = {**random_batch(method), "video": torch.randn(3, 4, 32, 8)}
    for use in (method.training_step, lambda one: method.encode_video(one["video"][:, 0], one["video_mask"][:, 0])):
        with pytest.raises(SettingError, match="feature_width: got 32, expected 8"):
            use(batch)


def test_layers_rates_and_blocks() -> None:
    method = make(video_layers=2)
    found = method.layers()
    names = {name for name, _ in method.named_parameters()}
    assert names - set(found) == {"model.log_scale"}
    assert found["model.video.embedding.0.weight"] == ("video", 2)
    assert found["model.video.bert.encoder.layer.1.output.dense.weight"] == ("video", 0)
    assert found["model.text.bert.embeddings.word_embeddings.weight"] == ("text", 1)
    assert len(method.blocks()) == 3


def test_the_trained_scale_stays_in_its_limits() -> None:
    method = make(learn_scale=True, normalise=True, logit_scale=50.0)
    method.model.log_scale.data.fill_(9.0)
    method.after_step()
    assert method.measures()["logit_scale"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("video_layers", {"video_layers": 0}),
        ("dropout", {"dropout": 1.0}),
        ("logit_scale", {"logit_scale": 0.0}),
        ("logit_scale", {"learn_scale": True, "logit_scale": 0.5}),
        ("clip_frames", {"frames": 8}),
        ("small_bert", {"small_bert": (33, 1, 2)}),
        ("features", {"features": "a/b"}),
        ("candidates", {"candidates": 4}),
    ],
)
def test_bad_settings_are_refused(field: str, change: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=field):
        videoclip.Config(**change)


def test_a_bert_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_bert(tmp_path, layers=1)
    config = replace(SMALL, bert=str(tmp_path), video_layers=2)
    with pytest.raises(SettingError, match="video_layers"):
        VideoClip.check(config)
    with pytest.raises(SettingError, match="positions"):
        VideoClip.check(replace(config, text_tokens=100))
    with pytest.raises(SettingError, match="tokenizer|bert"):
        VideoClip.check(replace(config, bert=str(tmp_path / "nothing")))


def test_the_planner_sees_the_mean_over_the_pairs() -> None:
    method = make()
    batch = random_batch(method)
    planner = VideoClip.batch_planner(method.config)
    assert planner is not None and VideoClip.batch_planner(replace(SMALL, batches="random")) is None
    found = planner.features(method, batch)
    embedded = method.embed(batch)
    expected = torch.stack([(embedded["video"][:, one] + embedded["text"][:, one]) / 2 for one in range(4)]).mean(dim=0)
    torch.testing.assert_close(found, expected)
