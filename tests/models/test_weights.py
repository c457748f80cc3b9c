"""Files of weights as strangers write them: what is read, and the sentence where nothing is."""

import argparse
import collections
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import DataError, SettingError
from pipeline.models.clip import Clip, Config
from pipeline.models.towers import openclip
from pipeline.models.towers.weights import misfit, read_any_weights

STATE = {"visual.weight": torch.arange(6.0).view(2, 3), "logit_scale": torch.tensor(2.5)}


class Attack:
    """Writes a file when it is unpickled by pickle itself."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, ("unpickled", "w")


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(STATE["visual.weight"].clone())


class Whole(nn.Module):
    """A model that is pickled as a whole, with a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = Part()
        self.logit_scale = nn.Parameter(STATE["logit_scale"].clone())
        self.register_buffer("mask", torch.ones(3), persistent=False)


def with_prefix(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in STATE.items()}


CONTENTS: dict[str, Any] = {
    "plain": STATE,
    "ordered": collections.OrderedDict(STATE),
    "open_clip": {"epoch": 3, "name": "mine", "state_dict": with_prefix("module.")},
    "numpy numbers": {"state_dict": STATE, "best_acc1": np.float64(0.25), "rng": np.arange(3)},
    "namespace": {"epoch": 3, "state_dict": STATE, "args": argparse.Namespace(lr=1e-3, betas=(0.9, 0.98))},
    "in model": {"model": STATE, "step": 3},
    "lightning": {"model_state_dict": STATE, "optimizer_state_dict": {}, "path": Path("x")},
    "two models": {"state_dict": STATE, "state_dict_ema": {"other": torch.zeros(1)}},
    "optimizer": {"model": STATE, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}},
    "compiled and parallel": {"state_dict": with_prefix("module._orig_mod.")},
    "a key of its own": {"student": STATE, "epoch": 1},
    "whole model": Whole(),
    "whole model below a key": {"model": Whole(), "loss": nn.CrossEntropyLoss()},
    "a function that runs": {"state_dict": STATE, "hook": Attack()},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", CONTENTS)
def test_tensors_beside_anything_are_read_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, legacy: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(CONTENTS[name], tmp_path / "weights.pt", _use_new_zipfile_serialization=not legacy)
    if legacy and "whole" in name:  # it holds the model's source
        with pytest.raises(DataError, match="Only persistent_load of storage is allowed"):
            read_any_weights(tmp_path / "weights.pt")
        return
    found = read_any_weights(tmp_path / "weights.pt")
    assert found.keys() == STATE.keys() and all(torch.equal(found[key], STATE[key]) for key in STATE)
    assert not (tmp_path / "unpickled").exists()


def test_a_blocked_module_is_a_sentence(tmp_path: Path) -> None:
    class Removes:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return __import__("os").remove, (str(tmp_path / "kept"),)

    (tmp_path / "kept").touch()
    torch.save({"state_dict": STATE, "hook": Removes()}, tmp_path / "weights.pt")
    with pytest.raises(DataError, match="posix"):
        read_any_weights(tmp_path / "weights.pt")
    assert (tmp_path / "kept").exists()


def test_safetensors_are_known_by_their_bytes(tmp_path: Path) -> None:
    save_file(with_prefix("module."), tmp_path / "pytorch_model.bin")
    found = read_any_weights(tmp_path / "pytorch_model.bin")
    assert torch.equal(found["visual.weight"], STATE["visual.weight"])


def saved(content: Any, folder: Path) -> bytes:
    torch.save(content, folder / "made.pt")
    return (folder / "made.pt").read_bytes()


def safe(folder: Path) -> bytes:
    save_file({"weight": torch.zeros(100)}, folder / "made.safetensors")
    return (folder / "made.safetensors").read_bytes()


BROKEN: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "empty": (lambda _: b"", "an empty file"),
    "page": (
        lambda _: b"\n<!DOCTYPE html><html>Google Drive - Virus scan warning</html>",
        "a web page.*Google|DOCTYPE",
    ),
    "marked page": (lambda _: b"\xef\xbb\xbf<html>x", "a web page"),
    "lfs": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
    "text": (lambda _: b"Access denied", "text .'Access denied'"),
    "noise": (lambda _: bytes(range(256)) * 9, "damaged, or not of torch.save"),
    "cut": (lambda folder: saved(STATE, folder)[:700], "cut short, at 700 bytes"),
    "cut safetensors": (lambda folder: safe(folder)[:-50], "a safetensors file of [0-9]+ bytes, which should have"),
    "cut header": (lambda folder: safe(folder)[:20], "cut short, of 20 bytes"),
    "list": (lambda folder: saved([1, 2, 3], folder), "no named tensors, but a list"),
    "nothing": (lambda folder: saved({}, folder), "no named tensors, but a dict of nothing"),
    "numbers": (lambda folder: saved({"epoch": 3, "lr": 0.1}, folder), "no named tensors, but a dict of epoch, lr"),
    "one tensor": (lambda folder: saved(torch.zeros(3), folder), "no named tensors, but a Tensor"),
    "several": (lambda folder: saved({"teacher": STATE, "student": STATE}, folder), "below teacher, student: save"),
    "pickle": (lambda _: pickle.dumps({"a": 1}), "damaged, or not of torch.save"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_holds_no_weights_is_one_sentence(tmp_path: Path, kind: str) -> None:
    make, sentence = BROKEN[kind]
    (tmp_path / "weights.pt").write_bytes(make(tmp_path))
    with pytest.raises(DataError, match=sentence) as caught:
        read_any_weights(tmp_path / "weights.pt")
    assert "\n" not in str(caught.value) and "weights.pt" in str(caught.value)


def test_misfits_are_named() -> None:
    wanted = {"a": torch.zeros(2, 3), "b": torch.zeros(1), "c": torch.zeros(())}
    assert misfit(wanted, wanted) == ""
    found = {"a": torch.zeros(2, 4), "d": torch.zeros(1), "c": torch.zeros(())}
    problem = "3 tensors, 1 missing (b), 1 unknown (d), 1 of another shape (a 2x4 instead of 2x3)"
    assert misfit(wanted, found) == problem


@pytest.fixture(name="tiny", scope="module")
def tiny_fixture() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(openclip.create("clipmill-tiny").state_dict())


def test_a_clip_says_which_weights_do_not_fit(tiny: dict[str, Tensor], tmp_path: Path) -> None:
    narrow = {**tiny, "text_projection": tiny["text_projection"][:, :-1].contiguous(), "extra": torch.zeros(3)}
    narrow.pop("ln_final.bias")
    torch.save({"state_dict": narrow}, tmp_path / "narrow.pt")
    with pytest.raises(SettingError) as caught:
        openclip.create("clipmill-tiny", str(tmp_path / "narrow.pt"))
    wide = "x".join(map(str, tiny["text_projection"].shape))
    for part in (
        "ln_final.bias",
        "extra",
        f"text_projection {narrow['text_projection'].shape[0]}x",
        f"instead of {wide}",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_bias_of_the_sigmoid_loss_comes_with_its_weights(tiny: dict[str, Tensor], tmp_path: Path, loss: Any) -> None:
    save_file({**tiny, "logit_bias": torch.tensor([-7.5])}, tmp_path / "model.safetensors")
    method = Clip(Config(architecture="clipmill-tiny", pretrained=str(tmp_path), loss=loss))
    assert method.model.logit_bias.item() == -7.5 and method.model.logit_bias.requires_grad == (loss == "sigmoid")
    again = Clip.restored(method.config, method.description())  # as a checkpoint does
    assert again.state_dict().keys() == method.state_dict().keys()


def folder_with(tiny: dict[str, Tensor], folder: Path, card: bytes) -> str:
    folder.mkdir(exist_ok=True)
    save_file(tiny, folder / "model.safetensors")
    (folder / "open_clip_config.json").write_bytes(card)
    return str(folder)


@pytest.mark.parametrize(
    ("tower", "setting", "value"),
    [
        ("", "quick_gelu", True),
        ("vision_cfg", "pool_type", "avg"),
        ("text_cfg", "pool_type", "last"),
        ("text_cfg", "context_length", 40),
        ("text_cfg", "no_causal_mask", True),
        ("vision_cfg", "image_size", 96),
        ("text_cfg", "heads", 1),
    ],
)
def test_what_shapes_do_not_show_is_compared(
    tiny: dict[str, Tensor], tmp_path: Path, tower: str, setting: str, value: Any
) -> None:
    config = openclip.check_architecture("clipmill-tiny")
    (config[tower] if tower else config)[setting] = value
    place = folder_with(tiny, tmp_path, json.dumps({"model_cfg": config}).encode())
    with pytest.raises(SettingError, match=f"{setting} {json.dumps(value)} instead of"):
        openclip.check("clipmill-tiny", place)
    if setting in ("image_size", "context_length"):  # asked for: interpolated
        openclip.check("clipmill-tiny", place, **{setting: 64})


def test_settings_of_training_alone_may_differ(tiny: dict[str, Tensor], tmp_path: Path) -> None:
    config = openclip.check_architecture("clipmill-tiny")
    config["vision_cfg"]["patch_dropout"] = 0.5
    config["init_logit_bias"] = 0.0
    config["vision_cfg"].setdefault("mlp_ratio", 4.0)  # open_clip's default, written out
    openclip.check("clipmill-tiny", folder_with(tiny, tmp_path, json.dumps({"model_cfg": config}).encode()))


@pytest.mark.parametrize(
    "card", [b"", b'{"model_cfg": {"embed_dim": 3', b"[]", b'{"model_cfg": 3}', b"{}", b"\xff\xfe{"]
)
def test_a_cut_description_is_one_sentence(tiny: dict[str, Tensor], tmp_path: Path, card: bytes) -> None:
    with pytest.raises(DataError, match=r"open_clip_config\.json is no model's description"):
        openclip.check("clipmill-tiny", folder_with(tiny, tmp_path, card))


def test_a_cut_checkpoint_folder_is_one_sentence(tiny: dict[str, Tensor], tmp_path: Path) -> None:
    card = json.dumps({"model_cfg": openclip.check_architecture("clipmill-tiny")}).encode()
    place = folder_with(tiny, tmp_path, card)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    for architecture, pretrained in (("clipmill-tiny", place), (f"local-dir:{place}", None)):
        with pytest.raises((DataError, SettingError)):
            openclip.create(architecture, pretrained)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SettingError, match=r"checkpoint folder with model\.safetensors"):
        openclip.check("clipmill-tiny", place)


@pytest.mark.parametrize(
    ("architecture", "good", "bad"),
    [("RN50", 256, 223), ("RN50", 96, 255), ("ViT-B-32", 250, 31), ("clipmill-tiny", 96, 0)],
)
def test_image_sizes_are_known_before_a_model_is_built(architecture: str, good: int, bad: int) -> None:
    openclip.check(architecture, None, image_size=good)
    with pytest.raises(SettingError, match=f"image_size: got {bad}, .* such as [0-9]+( or [0-9]+)?$") as caught:
        openclip.check(architecture, None, image_size=bad)
    for size in map(int, re.findall("[0-9]+", caught.value.allowed.rpartition("such as")[2])):
        openclip.check(architecture, None, image_size=size)
        if architecture == "RN50":  # two halvings that round up and down, three that round down, against one division
            assert (size + 1) // 2 // 16 == size // 32
