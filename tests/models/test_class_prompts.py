"""One rule from a class's name to its prompts, for every method and evaluation: "apple pie" for ``apple_pie``."""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.evaluation.zero_shot import classifier
from pipeline.models import class_vectors
from pipeline.models import classifier as fine_tuning
from pipeline.models.adapters.adapter import FrozenClip, adapter_class, adapter_names
from pipeline.models.towers.prompts import fill_template, readable_name
from pipeline.training.adapt_recipes import paper_config
from tests.training.few_shot import make_clip

STORED, READ = ("apple_pie", "hot__dog_"), ("apple pie", "hot dog")
TEMPLATES = ("a photo of {}, a type of food.",)


class Recorder:
    """A tokenizer that remembers the texts that it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.texts = tokenizer, list[str]()

    def __call__(self, texts: list[str]) -> Any:
        self.texts += texts
        return self._tokenizer(texts)

    def encode(self, text: str) -> Any:
        self.texts.append(text)
        return self._tokenizer.encode(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@pytest.fixture(scope="module", name="clip")
def clip_fixture(tmp_path_factory: pytest.TempPathFactory) -> FrozenClip:
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(name="recorder")
def recorder_fixture(clip: FrozenClip) -> Iterator[Recorder]:
    plain = clip.method.tokenizer
    clip.method.tokenizer = Recorder(plain)
    yield clip.method.tokenizer
    clip.method.tokenizer = plain


ROUTES: dict[str, Callable[[FrozenClip, tuple[str, ...]], object]] = {
    "evaluation": lambda clip, names: classifier(clip.method, names, TEMPLATES),
    "fine-tuning": lambda clip, names: fine_tuning.class_vectors(clip.method, names, TEMPLATES),
    "detection": lambda clip, names: class_vectors.class_vectors(clip.method, names, TEMPLATES),
    "few-shot": lambda clip, names: clip.class_vectors(names, TEMPLATES),
}


@pytest.mark.parametrize("route", ROUTES)
def test_prompts_have_blanks(clip: FrozenClip, recorder: Recorder, route: str) -> None:
    ROUTES[route](clip, STORED)
    assert {"a photo of apple pie, a type of food.", "a photo of hot dog, a type of food."} == set(recorder.texts)


@pytest.mark.parametrize("method", adapter_names())
def test_every_method_reads_a_stored_name_like_the_written_one(
    clip: FrozenClip, recorder: Recorder, method: str
) -> None:
    config = paper_config(method)
    config = replace(config, **{one.name: 2 for one in fields(config) if "depth" in one.name})
    assert clip.features > 0  # found by texts of its own, once
    recorder.texts.clear()
    adapter_class(method)(config, clip, STORED, TEMPLATES)
    stored = list(recorder.texts)
    recorder.texts.clear()
    adapter_class(method)(config, clip, READ, TEMPLATES)
    assert stored == recorder.texts and not any("_" in text for text in stored)


def test_class_vectors_are_those_of_the_written_names(clip: FrozenClip) -> None:
    for route in ROUTES.values():
        stored, read = route(clip, STORED), route(clip, READ)
        assert isinstance(stored, torch.Tensor) and isinstance(read, torch.Tensor)
        assert torch.equal(stored, read)


@pytest.mark.parametrize(
    ("name", "read"),
    [("apple_pie", "apple pie"), ("_A__b ", "A b"), ("Boeing 737-200", "Boeing 737-200"), ("a{}", "a{}")],
)
def test_names_by_hand(name: str, read: str) -> None:
    assert readable_name(name) == read
    assert fill_template("the {}.", name) == f"the {read}."


def test_no_prompt_is_written_past_the_rule() -> None:
    """Only the file with the rule, and ViLD's rules on top of it, replace ``{}`` by a name."""
    package = Path(__file__).resolve().parents[2] / "pipeline"
    found = [path for path in package.rglob("*.py") if '.replace("{}", ' in path.read_text()]
    assert sorted(str(path.relative_to(package)) for path in found) == [
        "models/class_vectors.py",
        "models/towers/prompts.py",
    ]
