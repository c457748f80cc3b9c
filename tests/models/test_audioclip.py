"""AudioCLIP's losses against torch's cross-entropies, its stages, what is frozen, and samples that lack a modality.

Run as a script, this file is one rank of a process group: see ``test_two_ranks_with_missing_modalities_are_one``.
"""

import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import SettingError
from pipeline.loaders.audio import AudioReader
from pipeline.loaders.batches import SamplePosition
from pipeline.loaders.samples import UnreadableSample
from pipeline.models.audioclip import Audioclip, Config
from pipeline.models.audioclip.esresnext import EsResNextFbsp
from pipeline.models.audioclip.readers import TagReader
from pipeline.models.audioclip.towers import is_head
from pipeline.shards.sample import Sample
from pipeline.shards.waveforms import encode_flac
from pipeline.training import distributed
from pipeline.training.checkpoint import Checkpoints, Meta, load_method
from pipeline.training.optimizer import AdamW, Sgd, make_optimizer

ROWS = 6
PAIRS = (("audio", "image"), ("audio", "text"), ("image", "text"))


def smallest(**settings: Any) -> Config:
    return replace(Audioclip.smallest(), **settings)


def build(**settings: Any) -> Audioclip:
    torch.manual_seed(0)
    return Audioclip(smallest(**settings))


def batch(rows: int = ROWS, **presence: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(1, 49_000, (rows, 8), generator=generator)
    texts[:, -1] = 49_407
    found = {
        "audio": 0.1 * torch.randn(rows, 1, 8000, generator=generator),
        "image": torch.randint(0, 256, (rows, 3, 64, 64), generator=generator, dtype=torch.uint8),
        "text": texts,
    }
    return found | {f"has_{name}": torch.tensor(values).float() for name, values in presence.items()}


def cross_entropies(x: Tensor, y: Tensor, scale: float) -> Tensor:
    own = torch.arange(len(x))
    return functional.cross_entropy(scale * x @ y.T, own) + functional.cross_entropy(scale * y @ x.T, own)


def features(method: Audioclip, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: getattr(method, f"encode_{name}")(values[name]) for name in ("audio", "image", "text")}


def test_three_modalities_are_the_mean_of_six_cross_entropies() -> None:
    method, values = build(), batch()
    found, scales = features(method, values), {"audio_image": 10.0, "audio_text": 10.0, "image_text": 1 / 0.07}
    losses = method.training_step(values)
    each = {f"{a}_{b}": cross_entropies(found[a], found[b], scales[f"{a}_{b}"]) for a, b in PAIRS}
    assert losses.keys() == each.keys()
    for name, value in each.items():
        torch.testing.assert_close(losses[name], value / 6)


def test_two_modalities_are_the_sum_of_two_and_weights_multiply() -> None:
    method, values = build(modalities=("audio", "text"), audio_text_weight=0.7), batch()
    found = features(method, values)
    losses = method.training_step(values)
    expected = 0.7 * cross_entropies(found["audio"], found["text"], 10.0)
    assert list(losses) == ["audio_text"]
    torch.testing.assert_close(losses["audio_text"], expected)
    # Two pairs of three modalities: a factor of 1/2.
    without = build(image_text_weight=0.0)
    found = features(without, values)
    losses = without.training_step(values)
    torch.testing.assert_close(losses["audio_image"], cross_entropies(found["audio"], found["image"], 10.0) / 2)
    assert set(losses) == {"audio_image", "audio_text"} and not without.logit_scale.requires_grad


@pytest.mark.parametrize(("start", "used"), [(-3.0, 1.0), (9.0, 100.0), (math.log(30), 30.0)])
def test_scales_are_clamped(start: float, used: float) -> None:
    method, values = build(), batch()
    with torch.no_grad():
        method.logit_scale_at.fill_(start)
    found = features(method, values)
    losses = method.training_step(values)
    torch.testing.assert_close(losses["audio_text"], cross_entropies(found["audio"], found["text"], used) / 6)
    method.after_step()
    assert method.logit_scale_at.exp().item() == pytest.approx(used)


def test_a_scale_at_its_limit_goes_on_learning() -> None:
    """The paper starts at the limit: a clamp of exp(s) that is a rounding error above it would stop the gradient."""
    method = build(audio_scale=100.0)
    torch.stack(list(method.training_step(batch()).values())).sum().backward()
    assert method.logit_scale_at.grad is not None and method.logit_scale_at.grad.abs() > 0


def test_rows_without_a_modality_are_masked() -> None:
    presence = {"audio": [1, 1, 0, 1, 0, 1], "image": [1, 0, 1, 1, 1, 0], "text": [0, 1, 1, 1, 0, 1]}
    method, values = build(), batch(**presence)
    found = features(method, values)
    losses = method.training_step(values)
    for a, b in PAIRS:
        rows = [row for row in range(ROWS) if presence[a][row] and presence[b][row]]
        scale = 1 / 0.07 if a == "image" else 10.0
        expected = cross_entropies(found[a][rows], found[b][rows], scale) / 6
        torch.testing.assert_close(losses[f"{a}_{b}"], expected)


def test_the_towers_do_not_read_rows_that_are_missing() -> None:
    method = build()
    read: dict[str, int] = {}
    method.audio.register_forward_pre_hook(lambda _, inputs: read.update(audio=len(inputs[0])))
    method.model.visual.register_forward_pre_hook(lambda _, inputs: read.update(image=len(inputs[0])))
    values = batch(audio=[1, 1, 0, 0, 0, 1], image=[0, 0, 1, 1, 1, 1], text=[1] * ROWS)
    method.training_step(values)
    assert read == {"audio": 3, "image": 4}
    values["audio"][2:5] = torch.nan
    losses = method.training_step(values)
    assert all(loss.isfinite() for loss in losses.values())


def test_a_batch_without_any_sound_gives_every_weight_a_gradient_of_zero() -> None:
    method = build()
    values = batch(audio=[0] * ROWS, image=[1] * ROWS, text=[1] * ROWS)
    losses = method.training_step(values)
    torch.stack(list(losses.values())).sum().backward()
    assert losses["audio_text"].item() == 0 == losses["audio_image"].item()
    for parameter in (*method.audio.parameters(), method.logit_scale_at, method.logit_scale_ai):
        assert parameter.grad is not None and not parameter.grad.any()
    assert method.audio.training


@pytest.mark.parametrize("tile", [1024, 2])
def test_equal_texts_are_positives_where_that_is_asked_for(tile: int) -> None:
    values = batch(text=[1, 1, 1, 1, 1, 0])
    values["text"][3] = values["text"][0]
    method = build(positives="same_text", loss_tile=tile)
    found = features(method, values)
    losses = method.training_step(values)

    def soft(x: Tensor, y: Tensor, rows: int) -> Tensor:
        targets = torch.eye(rows)
        targets[0, 3] = targets[3, 0] = targets[0, 0] = targets[3, 3] = 0.5
        logits = 10 * x[:rows] @ y[:rows].T
        return (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 6

    torch.testing.assert_close(losses["audio_text"], soft(found["audio"], found["text"], 5))
    torch.testing.assert_close(losses["audio_image"], soft(found["audio"], found["image"], 6))


def test_tiles_give_the_same_losses_and_gradients() -> None:
    values = batch(audio=[1, 1, 0, 1, 0, 1])
    results = []
    for tile in (1024, 2):
        method = build(loss_tile=tile)
        losses = method.training_step(values)
        torch.stack(list(losses.values())).sum().backward()
        results.append([*losses.values(), *(one.grad for one in method.parameters() if one.grad is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def trained(method: Audioclip) -> set[str]:
    return {name for name, one in method.named_parameters() if one.requires_grad}


def save(method: Audioclip, folder: Path) -> str:
    meta = Meta(step=1, samples_seen=6, batch_size=6, lanes=2, seed=0, snapshot="x")
    return Checkpoints(str(folder)).save(method, make_optimizer(AdamW(), method), meta).folder.uri


def steps(method: Audioclip, values: dict[str, Tensor], count: int = 2) -> None:
    optimizer = make_optimizer(Sgd(learning_rate=0.05, nesterov=True, weight_decay=5e-4), method)
    method.train()
    for _ in range(count):
        torch.stack(list(method.training_step(values).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step()


def test_the_papers_stages(tmp_path: Path) -> None:
    """Tags, then sounds against a frozen CLIP (nothing of it changes by a bit), then all; each from the one before."""
    start = save(build(), tmp_path / "start")
    stage = smallest(pretrained=start, lock_image=True, lock_text=True)
    first = Audioclip(replace(stage, modalities=("audio",), class_names=("dog", "rain", "saw")))
    assert trained(first) == {f"audio.{name}" for name, _ in first.audio.named_parameters()}
    tags = torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 1]] * 2)
    losses = first.training_step({"audio": batch()["audio"], "tags": tags})
    logits = first.tag_audio(batch()["audio"])
    signs = (1 - 2 * tags).flatten().tolist()
    by_hand = sum(math.log(1 + math.exp(sign * z)) for sign, z in zip(signs, logits.flatten().tolist(), strict=True))
    assert list(losses) == ["tags"] and losses["tags"].item() == pytest.approx(by_hand / ROWS, rel=1e-5)
    steps(first, {"audio": batch()["audio"], "tags": tags})
    second = Audioclip(replace(stage, pretrained=save(first, tmp_path / "first")))
    blocks = {name: one for name, one in first.audio.state_dict().items() if "head" not in name}
    assert all(torch.equal(second.audio.state_dict()[name], one) for name, one in blocks.items())
    assert second.audio.network.head.out_features == 32  # a new head
    before = {name: one.clone() for name, one in second.state_dict().items()}
    steps(second, batch())
    changed = {name for name, one in second.state_dict().items() if not torch.equal(one, before[name])}
    assert changed and all(name.startswith(("audio.", "logit_scale_a")) for name in changed)
    assert {"logit_scale_ai", "logit_scale_at"} <= changed and "model.logit_scale" not in changed
    third = Audioclip(smallest(pretrained=save(second, tmp_path / "second")))
    assert all(torch.equal(one, third.state_dict()[name]) for name, one in second.state_dict().items())
    before = {name: one.clone() for name, one in third.state_dict().items()}
    steps(third, batch())
    assert {name for name, one in third.state_dict().items() if not torch.equal(one, before[name])} == trained(third)
    assert trained(third) == {name for name, _ in third.named_parameters()}
    loaded = load_method(save(third, tmp_path / "third"))
    assert torch.equal(loaded.encode_audio(batch()["audio"]), third.eval().encode_audio(batch()["audio"]))


def test_unused_towers_and_scales_are_frozen() -> None:
    method = build(modalities=("audio", "text"))
    assert not any(name.startswith("model.visual") for name in trained(method))
    assert "logit_scale_ai" not in trained(method) and "model.logit_scale" not in trained(method)
    assert "model.text_projection" in trained(method) and "logit_scale_at" in trained(method)
    method = build(modalities=("audio", "image"))
    assert not any("transformer.resblocks" in name and "visual" not in name for name in trained(method))
    assert "model.text_projection" not in trained(method) and "model.positional_embedding" not in trained(method)


def test_learning_rates_know_the_audio_tower() -> None:
    method = build()
    groups = make_optimizer(AdamW(tower_rates={"audio": 0.1}), method).param_groups
    audio = {id(one) for one in method.audio.parameters()}
    for group in groups:
        assert {id(one) in audio for one in group["params"]} == {group["rate_scale"] == 0.1}
    with pytest.raises(SettingError, match="audio"):
        make_optimizer(AdamW(tower_rates={"sound": 0.1}), method)


@pytest.mark.slow
def test_the_papers_tower_in_a_step() -> None:
    """Loss of the tags and the penalty; the gradients of the wavelets have a largest entry of 1."""
    torch.manual_seed(0)
    config = smallest(modalities=("audio",), class_names=("a", "b"), audio_tower="esresnext-fbsp", audio_seconds=0.5)
    method = Audioclip(config)
    assert isinstance(method.audio, EsResNextFbsp)
    losses = method.training_step({"audio": 0.1 * torch.randn(2, 2, 22_050), "tags": torch.eye(2)})
    assert set(losses) == {"tags", "fbsp"} and losses["fbsp"].item() < 1e-10
    torch.stack(list(losses.values())).sum().backward()
    for parameter in method.audio.fbsp.parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) == pytest.approx(1, abs=1e-5)
    assert not any(one is method.audio.fbsp.m for one in method.parameter_groups()[0]["params"])  # those that decay


@pytest.mark.parametrize(
    "settings",
    [
        {"modalities": ("audio", "audio")},
        {"modalities": ("text",)},
        {"modalities": ()},
        {"audio_seconds": 0.0},
        {"audio_scale": 200.0},
        {"audio_text_weight": -1.0},
        {"loss": "sigmoid"},
        {"audio_rate": 12},
        {"class_names": ("a", "a")},
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(settings))):
        smallest(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"audio_tower": "resnet"},
        {"audio_tower": "timm:vit_base_patch16"},
        {"audio_seconds": 11.0, "audio_tower": "htsat-tiny"},
        {"audio_rate": 44_100},
        {"audio_pretrained": "imagenet"},
        {"audio_pretrained": "/nowhere/weights.pt"},
        {"class_names": (), "modalities": ("audio",)},
    ],
)
def test_settings_that_the_check_refuses(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(settings))):
        Audioclip.check(smallest(**settings))


@pytest.mark.parametrize("prefix", ["", "audio."])
def test_weights_of_an_audio_tower_load_from_a_file(prefix: str, tmp_path: Path) -> None:
    """Under the tower's own names, as the authors publish theirs, or under the method's; a head of tags is left out."""
    torch.manual_seed(5)
    trained = Audioclip(smallest(modalities=("audio",), class_names=("dog", "bell")))
    state = {name.removeprefix("audio."): one for name, one in trained.state_dict().items() if name[:6] == "audio."}
    others = {"logit_scale": torch.zeros(())} if prefix else {}
    torch.save({**others, **{prefix + name: one for name, one in state.items()}}, tmp_path / "tower.pt")
    loaded = build(audio_pretrained=str(tmp_path / "tower.pt")).audio.state_dict()
    heads = {name for name in loaded if is_head(name)}
    assert heads and {name for name in loaded if not torch.equal(loaded[name], state[name])} == heads


def test_weights_of_another_tower_are_refused(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(3, 3), "conv.weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(SettingError, match="audio_pretrained.*missing"):
        Audioclip(smallest(audio_pretrained=str(tmp_path / "other.pt")))


def flac(seconds: float, rate: int = 16_000, channels: int = 1) -> bytes:
    sound = 0.2 * torch.randn(channels, int(seconds * rate), generator=torch.Generator().manual_seed(2))
    return encode_flac(sound.numpy(), rate)


def test_sounds_become_one_length_rate_and_number_of_channels() -> None:
    reader = Audioclip.smallest().sounds()
    rows = [
        reader.read(Sample("a", {"flac": flac(*of)}))
        for of in ((0.1, 16_000, 1), (0.5, 16_000, 2), (2.0, 44_100, 1), (0.3, 8_000, 2))
    ]
    assert reader.collate(rows)["audio"].shape == (4, 1, 8000)
    exact = reader.read(Sample("a", {"flac": flac(0.5)}))["audio"]
    generator = torch.Generator().manual_seed(2)
    expected = (0.2 * torch.randn(1, 8000, generator=generator) * 32768).round().clamp(-32768, 32767) / 32768
    torch.testing.assert_close(exact, expected)
    stereo = replace(reader, channels=2).read(Sample("a", {"wav": flac(0.5)}))["audio"]
    assert torch.equal(stereo, exact.expand(2, -1))


def test_without_augmentation_sounds_are_cut_and_repeated_as_clap_does() -> None:
    reader = smallest(augment_audio=False, audio_seconds=0.1).sounds(seed=1)
    assert isinstance(reader, AudioReader)
    short = 0.25 * torch.sin(torch.arange(700.0))[None]
    found = reader.read(Sample("a", {"flac": encode_flac(short.numpy(), 16_000)}), SamplePosition(0, 0))["audio"]
    torch.testing.assert_close(found, torch.cat([short, short, torch.zeros(1, 200)], dim=1), rtol=0, atol=1e-4)
    long = Sample("a", {"flac": flac(3.0)})
    parts = [reader.read(long, SamplePosition(0, number))["audio"] for number in range(2)]
    assert not torch.equal(*parts) and parts[0].shape == (1, 1600)


def test_training_sounds_are_a_function_of_their_position() -> None:
    reader = Audioclip.smallest().sounds(seed=3)
    sample = Sample("a", {"flac": flac(0.7)})
    first = reader.read(sample, SamplePosition(0, 5))["audio"]
    assert torch.equal(first, reader.read(sample, SamplePosition(0, 5))["audio"])
    assert not torch.equal(first, reader.read(sample, SamplePosition(1, 5))["audio"])
    assert torch.equal(reader.read(sample, None)["audio"], Audioclip.smallest().sounds().read(sample, None)["audio"])


@pytest.mark.parametrize("content", [b"", b"fLaC", b"\x00" * 100, flac(0.2)[:60]])
def test_damaged_sounds_are_unreadable(content: bytes) -> None:
    with pytest.raises(UnreadableSample):
        Audioclip.smallest().sounds().read(Sample("a", {"flac": content}))


def test_samples_may_lack_a_modality(coloured: Sample) -> None:
    method = build()
    (reader,) = method.readers(train=True)
    image, text, sound = ({name: one} for name, one in (*coloured.fields.items(), ("flac", flac(0.4))))
    at = SamplePosition(0, 0)
    parts = (image | text | sound, image | text, image | sound, text | sound)
    found = reader.collate([reader.read(Sample("a", fields), at) for fields in parts])
    assert found["has_audio"].tolist() == [1, 0, 1, 1] and found["has_image"].tolist() == [1, 1, 1, 0]
    assert found["has_text"].tolist() == [1, 1, 0, 1]
    assert found["audio"].shape == (4, 1, 8000) and found["image"].shape == (4, 3, 64, 64)
    assert set(method.training_step(found)) == {"audio_image", "audio_text", "image_text"}
    for fields in (image, image | {"txt": b""}):
        with pytest.raises(UnreadableSample, match="has image of audio, image, text"):
            reader.read(Sample("a", fields), at)
    with pytest.raises(UnreadableSample):  # there, but damaged
        reader.read(Sample("a", image | text | {"flac": b"fLaC"}), at)
    strict = build(missing="replace").readers(train=True)
    assert [name for one in strict for name in one.fields] == ["audio", "image", "txt"]


@pytest.fixture
def coloured() -> Sample:
    from tests.conftest import coloured_sample

    made = coloured_sample(0, 0, 0)
    return Sample(made.key, {name: made.fields[name] for name in ("jpg", "txt")})


def test_tags() -> None:
    reader = TagReader(classes=("Dog bark", "rain", "Saw"))
    rows = [
        reader.read(Sample("a", {"json": text})) for text in (b'{"labels": ["rain", "dog_bark"]}', b'{"labels": "Saw"}')
    ]
    assert reader.collate(rows)["tags"].tolist() == [[1, 1, 0], [0, 0, 1]]
    for text in (b'{"labels": ["cat"]}', b"{}", b"no json"):
        with pytest.raises(UnreadableSample):
            reader.read(Sample("a", {"json": text}))


PRESENCE = {"audio": [0, 0, 0, 1, 1, 1], "image": [1, 1, 0, 1, 0, 1], "text": [1, 1, 1, 0, 1, 1]}


def gradients(method: Audioclip, values: dict[str, Tensor]) -> dict[str, Tensor]:
    total = torch.stack(list(method.training_step(values).values())).sum()
    total.backward()
    distributed.average_gradients(method)
    return {"loss": total.detach()} | {
        name: one.grad for name, one in method.named_parameters() if one.grad is not None
    }


@pytest.mark.slow
@pytest.mark.parametrize("tile", [1024, 2])
def test_two_ranks_with_missing_modalities_are_one(tile: int, tmp_path: Path) -> None:
    """The first rank has no sound at all."""
    command = [sys.executable, __file__, str(tile), str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    first, second = (pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(2))
    alone = gradients(build(loss_tile=tile), batch(**PRESENCE))
    assert (first["loss"] + second["loss"]) / 2 == pytest.approx(alone["loss"].item(), rel=1e-5)
    for name in alone.keys() - {"loss"}:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], alone[name], rtol=1e-3, atol=2e-6)


def _rank(tile: int, folder: str, rank: int) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    method = build(loss_tile=tile)
    method.gather, method.exchange = distributed.gather, distributed.exchange("gather")
    own = slice(3 * rank, 3 * rank + 3)
    found = gradients(method, {name: values[own] for name, values in batch(**PRESENCE).items()})
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    _rank(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
