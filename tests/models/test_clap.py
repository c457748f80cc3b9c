"""CLAP against transformers' own ClapModel: outputs of both towers, files in and out, and what training keeps."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoProcessor, ClapModel

from pipeline.errors import SettingError
from pipeline.evaluation.encoder import as_encoder
from pipeline.models.clap import Clap, Config
from pipeline.shards.storage import Folder
from pipeline.training.checkpoint import Checkpoints, Meta, load_method
from pipeline.training.export import export
from pipeline.training.optimizer import AdamW, make_optimizer

TEXTS = ["the sound of a dog", "rain"]


def build(**settings: Any) -> Clap:
    torch.manual_seed(0)
    return Clap(replace(Clap.smallest(), **settings)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers with made-up weights and statistics, and the files of its processor."""
    place, method = tmp_path_factory.mktemp("clap"), build()
    theirs = ClapModel(method.model.config).eval()
    with torch.no_grad():
        for one in theirs.parameters():
            one.add_(0.02 * torch.randn_like(one))
        theirs.logit_scale_a.fill_(2.3)
        theirs.logit_scale_t.fill_(3.1)
        norm = theirs.audio_model.audio_encoder.batch_norm
        norm.running_mean.normal_(-40, 3)
        norm.running_var.fill_(400)
    theirs.save_pretrained(place)
    for name, text in method.transformers_files().items():
        if name != "config.json":
            (place / name).write_text(text)
    return place


def sounds(seconds: float = 0.5) -> Tensor:
    return 0.1 * torch.randn(2, 1, round(48_000 * seconds), generator=torch.Generator().manual_seed(1))


def outputs(place: Path, audio: Tensor) -> Any:
    """What transformers' own processor and model give."""
    processor, model = AutoProcessor.from_pretrained(place), ClapModel.from_pretrained(place).eval()
    rows = [row.numpy() for row in audio[:, 0]]
    features = processor.feature_extractor(rows, sampling_rate=48_000, max_length=audio.shape[2], return_tensors="pt")
    tokens = processor.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(input_features=features["input_features"].float(), **tokens)


def test_a_folder_of_transformers_gives_the_same_features_and_logits(folder: Path) -> None:
    method = build(pretrained=str(folder))
    expected = outputs(folder, sounds())
    with torch.no_grad():
        audio, text = method.encode_audio(sounds()), method.encode_text(method.tokenizer(TEXTS))
    torch.testing.assert_close(audio, expected.audio_embeds, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(text, expected.text_embeds, rtol=1e-4, atol=1e-5)
    logits = method.model.logit_scale_a.exp() * audio @ text.T
    torch.testing.assert_close(logits, expected.logits_per_audio, rtol=1e-3, atol=1e-3)


def test_what_is_exported_loads_in_transformers(folder: Path, tmp_path: Path) -> None:
    method = build(pretrained=str(folder))
    export(method, Folder(str(tmp_path)), "hugging_face")
    first, second = outputs(folder, sounds()), outputs(tmp_path, sounds())
    for name in ("audio_embeds", "text_embeds", "logits_per_audio", "logits_per_text"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    settings = [json.loads((place / "preprocessor_config.json").read_text()) for place in (folder, tmp_path)]
    assert settings[0] == settings[1]
    again = build(pretrained=str(tmp_path))
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in method.state_dict().items())
    with pytest.raises(SettingError, match="format"):
        export(method, Folder(str(tmp_path / "other")), "open_clip")


def test_texts_may_be_cut_at_their_end(folder: Path) -> None:
    method = build(pretrained=str(folder))
    tokens = method.tokenizer(TEXTS)
    assert tokens.shape == (2, 77) and method.end_of_text == 2
    longest = int((tokens != 1).sum(dim=1).max())
    torch.testing.assert_close(method.encode_text(tokens[:, :longest]), method.encode_text(tokens))


def test_the_loss_is_the_sum_of_both_directions(folder: Path) -> None:
    """transformers' own loss has one direction twice."""
    method = build(pretrained=str(folder))
    tokens, own = method.tokenizer(TEXTS), torch.arange(2)
    losses = method.training_step({"audio": sounds(), "text": tokens})
    logits = outputs(folder, sounds()).logits_per_audio
    expected = functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)
    assert list(losses) == ["audio_text"]
    torch.testing.assert_close(losses["audio_text"], expected, rtol=1e-3, atol=1e-3)


def test_a_training_keeps_the_statistics_and_both_scales_together(folder: Path, tmp_path: Path) -> None:
    method = build(pretrained=str(folder)).train()
    norm = method.model.audio_model.audio_encoder.batch_norm
    before = norm.running_mean.clone(), norm.weight.clone()
    optimizer = make_optimizer(AdamW(learning_rate=1e-2), method)
    torch.stack(
        list(method.training_step({"audio": sounds(), "text": method.tokenizer(TEXTS)}).values())
    ).sum().backward()
    optimizer.step()
    method.after_step()
    assert torch.equal(norm.running_mean, before[0]) and not torch.equal(norm.weight, before[1])
    assert method.model.logit_scale_a.item() == method.model.logit_scale_t.item() != pytest.approx(2.3, abs=1e-4)
    meta = Meta(step=1, samples_seen=2, batch_size=2, lanes=1, seed=0, snapshot="x")
    saved = Checkpoints(str(tmp_path)).save(method, optimizer, meta).folder.uri
    loaded, further = load_method(saved), build(pretrained=saved)
    for one in (loaded, further):
        assert torch.equal(one.eval().encode_audio(sounds()), method.eval().encode_audio(sounds()))
        assert torch.equal(one.tokenizer(TEXTS), method.tokenizer(TEXTS))


def test_locked_towers(folder: Path) -> None:
    method = build(pretrained=str(folder), lock_text=True).train()
    names = {name for name, one in method.named_parameters() if one.requires_grad}
    assert names and all(name.startswith(("model.audio_", "model.logit_scale_a")) for name in names)
    assert not method.model.text_model.training and method.model.audio_projection.training
    towers = {layer.tower for layer in method.layers().values()}
    assert towers == {"audio", "text"}


def test_evaluations_of_images_refuse_it() -> None:
    with pytest.raises(SettingError, match="images"):
        as_encoder(build(), "clap")


@pytest.mark.parametrize("change", ["kind", "fusion", "weights", "config"])
def test_other_folders_are_refused(change: str, folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    if change == "kind":
        settings["model_type"] = "clip"
    if change == "fusion":
        settings["audio_config"]["enable_fusion"] = True
    if change == "config":
        settings["text_config"]["hidden_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(settings))
    if change == "weights":
        (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SettingError, match="pretrained"):
        config = replace(Clap.smallest(), pretrained=str(tmp_path))
        Clap.check(config)
        Clap(config)


def test_settings_out_of_range() -> None:
    for wrong in ({"audio_seconds": 11.0}, {"lock_text": True, "lock_audio": True}, {"max_logit_scale": 0.5}):
        with pytest.raises(SettingError, match=next(iter(wrong))):
            Config(**wrong)
