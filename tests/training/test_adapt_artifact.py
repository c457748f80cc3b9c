"""What is saved is what learned: back to the same bits, onto other classes where that can be, refused otherwise."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import DataError, SettingError
from pipeline.models.adapters import coop
from pipeline.models.adapters.adapter import FrozenClip, adapter_class
from pipeline.shards.storage import Folder
from pipeline.training.adapt import accuracy, adapt
from pipeline.training.adapt_artifact import load_adapted, read_record, save, words_table
from tests.training.few_shot import (  # noqa: F401
    LEARNERS,
    METHODS,
    NAMES,
    TEMPLATES,
    clip_fixture,
    run,
    sets_fixture,
    short,
)

OTHERS = ("cyan", "dark magenta", "light yellow", "black")
CARRIED = {"clip_adapter", "cocoop", "coop", "ivlp", "maple", "vpt", "zero_shot"}


@pytest.mark.parametrize("method", METHODS)
def test_there_and_back(method: str, clip: FrozenClip, sets: Any, tmp_path: Path) -> None:
    train, validation, test = sets
    adapted = run(clip, method, train, validation)
    save(adapted, Folder(tmp_path), {"data": "colours"})
    files = {"adapter.safetensors", "config.json"}
    assert {path.name for path in tmp_path.iterdir()} - {"words.tsv"} == files
    assert all(b"PK\x03\x04" not in path.read_bytes()[:4] for path in tmp_path.iterdir())  # no pickle in a zip
    back = load_adapted(Folder(tmp_path), clip)
    expected = adapted.adapter.state_dict()
    assert back.adapter.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in back.adapter.state_dict().items())
    assert back == replace(adapted, adapter=back.adapter) and not back.adapter.training
    assert read_record(Folder(tmp_path)).about == {"data": "colours"}
    one, other = accuracy(adapted.adapter, test), accuracy(back.adapter, test)
    assert torch.equal(one.right, other.right) and one.loss == other.loss
    small = sum(path.stat().st_size for path in tmp_path.iterdir())
    learned = sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    assert small < learned + 20_000


@pytest.mark.parametrize("method", METHODS)
def test_onto_other_classes(method: str, clip: FrozenClip, sets: Any, tmp_path: Path) -> None:
    train, validation, test = sets
    adapted = run(clip, method, train, validation)
    save(adapted, Folder(tmp_path))
    if method not in CARRIED:
        with pytest.raises(SettingError, match="classes: got .*, expected those that it was trained with"):
            load_adapted(Folder(tmp_path), clip, OTHERS)
        return
    carried = load_adapted(Folder(tmp_path), clip, OTHERS, ("a drawing of a {}.",)).adapter
    assert carried.classes == OTHERS and accuracy(carried, test).right.shape == (4,)
    expected = adapted.adapter.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in carried.state_dict().items())
    # As the one in memory, bound to the same names.
    adapted.adapter.bind(OTHERS, ("a drawing of a {}.",))
    assert accuracy(adapted.adapter, test).loss == accuracy(carried, test).loss


def test_a_class_specific_context_is_refused_elsewhere(clip: FrozenClip, sets: Any, tmp_path: Path) -> None:
    train, validation, _ = sets
    config = coop.Config(context=2, class_specific=True)
    adapted = adapt("coop", config, short("coop"), clip, NAMES, TEMPLATES, train, validation)
    save(adapted, Folder(tmp_path))
    with pytest.raises(SettingError, match="those that it was trained with"):
        load_adapted(Folder(tmp_path), clip, OTHERS)
    rows = [line.split("\t") for line in (tmp_path / "words.tsv").read_text().splitlines()]
    assert [row[:2] for row in rows[1:]] == [[name, number] for name in NAMES for number in ("1", "2")]


def test_the_words_nearest_to_a_context_are_its_own_before_it_learns(clip: FrozenClip) -> None:
    """The words "a photo of a" are nearest to themselves, at no distance; the next ones by brute force."""
    adapter = coop.CoOp(coop.Config(start="a photo of a"), clip, NAMES, ())
    rows = [line.split("\t") for line in words_table(adapter).splitlines()]
    assert rows[0] == ["class", "vector", "word_1", "distance_1", "word_2", "distance_2", "word_3", "distance_3"]
    assert [row[2] for row in rows[1:]] == ["a</w>", "photo</w>", "of</w>", "a</w>"]
    assert all(float(row[3]) < 1e-3 for row in rows[1:])
    table = clip.model.token_embedding.weight
    far = (table - adapter.context[1].detach()).norm(dim=1)
    second = int(far.argsort()[1])
    assert rows[2][4] == clip.method.tokenizer.decoder[second]
    assert float(rows[2][5]) == pytest.approx(float(far[second]), abs=1e-3)
    for method in ("clip_adapter", "tip_adapter", "zero_shot"):
        kind = adapter_class(method)
        assert words_table(kind(adapter_config(method), clip, NAMES, TEMPLATES)) == ""


def adapter_config(method: str) -> Any:
    from pipeline.training.adapt_recipes import paper_config

    return paper_config(method)


def test_which_methods_have_words(clip: FrozenClip, sets: Any, tmp_path: Path) -> None:
    for method in METHODS:
        save(run(clip, method, sets[0], sets[1]), Folder(tmp_path / method))
    named = {path.parent.name for path in tmp_path.glob("*/words.tsv")}
    assert named == {"coop", "cocoop", "maple", "ivlp"} <= set(LEARNERS)


def test_what_is_not_whole_is_refused(clip: FrozenClip, sets: Any, tmp_path: Path) -> None:
    folder, file = Folder(tmp_path), tmp_path / "config.json"
    with pytest.raises(DataError, match="holds no adapter"):
        load_adapted(folder, clip)
    save(run(clip, "coop", sets[0], sets[1]), folder)
    whole = json.loads(file.read_text())

    def refused(said: str, **changes: Any) -> None:
        file.write_text(json.dumps({**whole, **changes}))
        with pytest.raises((DataError, SettingError), match=said):
            load_adapted(folder, clip)

    refused("learned around the CLIP 0000", clip="0000")
    refused("does not describe an adapter", surprise=1)
    refused("version", version=99)
    refused("method: got 'evil'", method="evil")
    refused("context", config={**whole["config"], "context": 0})
    refused("do not fit this CoOp", config={**whole["config"], "context": 3})
    file.write_text("{")
    with pytest.raises(DataError, match="does not describe"):
        load_adapted(folder, clip)
    file.write_text(json.dumps(whole))
    tensors = tmp_path / "adapter.safetensors"
    assert list(load_file(tensors)) == ["context"]
    tensors.write_bytes(tensors.read_bytes()[:30])
    with pytest.raises(DataError, match="adapter.safetensors is damaged"):
        load_adapted(folder, clip)
    tensors.unlink()
    with pytest.raises(DataError, match="adapter.safetensors is missing"):
        load_adapted(folder, clip)


def test_a_save_that_broke_off_is_no_adapter(
    clip: FrozenClip, sets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over an older one: neither that one nor the half new one is loaded."""
    adapted = run(clip, "coop", sets[0], sets[1])
    save(adapted, Folder(tmp_path))
    real = Folder.write_atomic

    def fails(self: Folder, name: str, content: Any) -> None:
        if name == "words.tsv":
            raise KeyboardInterrupt
        real(self, name, content)

    monkeypatch.setattr(Folder, "write_atomic", fails)
    with pytest.raises(KeyboardInterrupt):
        save(adapted, Folder(tmp_path))
    with pytest.raises(DataError, match="holds no adapter"):
        load_adapted(Folder(tmp_path), clip)
