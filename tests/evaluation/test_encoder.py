"""Texts are encoded without the pads that no model sees, and with them where one does."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.evaluation.encoder import encode_tokens, inference
from pipeline.evaluation.models import load_model
from pipeline.models.class_vectors import class_vectors

TEXTS = ["a cat", "a photo of the large brown dog that sleeps", ""]


def test_pads_are_cut_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = load_model("clipmill-tiny:untrained", "cpu")
    tokens = model.tokenizer(TEXTS)
    seen: list[tuple[int, ...]] = []
    whole = type(model).encode_text

    def spy(self: Any, text: Tensor) -> Tensor:
        seen.append(tuple(text.shape))
        return whole(self, text)

    monkeypatch.setattr(type(model), "encode_text", spy)
    with torch.no_grad():
        found = encode_tokens(model, tokens, torch.device("cpu"))
        expected = functional.normalize(model.model.encode_text(tokens), dim=-1)
    assert seen == [(3, 11)] and tokens.shape[1] > 11
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_model_that_sees_its_pads_gets_them() -> None:
    class Whole:
        tokenizer = None

        def encode_text(self, text: Tensor) -> Tensor:
            assert text.shape == (2, 9)
            return text.float()

    tokens = torch.ones(2, 9, dtype=torch.int64)
    found = encode_tokens(Whole(), tokens, torch.device("cpu"))  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.full((2, 9), 1 / 3))


class Wrapper:
    """Has a module and is none, as the patches of a CLIP."""

    def __init__(self, module: nn.Module) -> None:
        self.name, self.module = "wrapper", module


@pytest.mark.parametrize("wrap", [lambda module: module, Wrapper, lambda module: nn.Sequential(module).eval()])
def test_every_part_is_in_evaluation_mode_and_gets_its_own_mode_back(wrap: Any) -> None:
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model = wrap(module)
    module.train()[1][0].eval()
    before = [part.training for part in module.modules()]
    assert before == [True, True, True, False, True]
    with pytest.raises(KeyError), inference(model) as device:
        assert device.type == "cpu" and not torch.is_grad_enabled()
        assert not any(part.training for part in module.modules())
        raise KeyError
    assert [part.training for part in module.modules()] == before


def test_what_has_no_module_is_used_as_it_is() -> None:
    for model in (object(), "text", Wrapper(nn.Identity())):
        with inference(model) as device:
            assert device.type == "cpu"


def test_a_module_notices_that_training_begins_again() -> None:
    """As methods that drop cached vectors there."""

    class Cached(nn.Module):
        known = True

        def train(self, mode: bool = True) -> "Cached":
            self.known = self.known and not mode
            return super().train(mode)

    model = Cached().eval()
    with inference(model):
        pass
    assert model.known
    with inference(model.train()):
        model.known = True
    assert not model.known


def test_class_vectors_are_encoded_in_evaluation_mode() -> None:
    model: Any = load_model("clipmill-tiny:untrained", "cpu")
    expected = class_vectors(model, ("cat", "dog"), ("a {}",))
    model.model.transformer.resblocks[0].mlp.append(nn.Dropout(0.5))
    model.train()
    assert torch.equal(class_vectors(model, ("cat", "dog"), ("a {}",)), expected)
    assert model.model.transformer.resblocks[0].mlp[-1].training
