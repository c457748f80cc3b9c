"""Texts are encoded without the pads that no model sees, and with them where one does."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.evaluation.encoder import encode_tokens
from pipeline.evaluation.models import load_model

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
