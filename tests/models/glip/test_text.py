"""CLIP's text tower in GLIP and GLIPv2, against plain torch on the same weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

from pipeline.errors import SettingError
from pipeline.loaders.batches import SamplePosition
from pipeline.loaders.grounding import GroundingOptions
from pipeline.loaders.grounding_prompts import CLIP_MASK, SpanTokenizer
from pipeline.models.glip import Glip
from pipeline.models.glip.text import resized_positions
from pipeline.models.glipv2 import Glipv2
from pipeline.models.glipv2_language import Glipv2Language
from pipeline.training.checkpoint import Checkpoints, Meta, load_method
from pipeline.training.optimizer import AdamW, make_optimizer
from tests.grounded import grounded, obj

WIDTH, HEADS, POSITIONS = 32, 4, 12
OPTIONS = GroundingOptions(text_tokens=24)


def image() -> Tensor:
    return torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def make_tokenizer(folder: Path, mask: bool = True) -> CLIPTokenizerFast:
    """Letters, with and without the end of a word, and three merges of "star"."""
    letters = [chr(number) for number in range(97, 123)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "!</w>", ".</w>", ",</w>", "st", "ar</w>", "star</w>"]
    tokens = [*words, *([CLIP_MASK] if mask else []), "<|startoftext|>", "<|endoftext|>"]
    vocab = {"!": 0, **{token: number + 1 for number, token in enumerate(tokens)}}
    made = CLIPTokenizerFast(vocab=vocab, merges=[("s", "t"), ("a", "r</w>"), ("st", "ar</w>")])
    made.save_pretrained(folder)
    return made


def make_clip(folder: Path, mask: bool = True) -> CLIPTextModel:
    made = make_tokenizer(folder, mask)
    torch.manual_seed(4)
    config = CLIPTextConfig(
        vocab_size=len(made),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        bos_token_id=made.bos_token_id,
        eos_token_id=made.eos_token_id,
    )
    model = CLIPTextModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    make_clip(folder)
    return folder


def test_tokens_are_those_of_transformers(clip: Path) -> None:
    known, own = CLIPTokenizerFast.from_pretrained(clip), SpanTokenizer.load(str(clip))
    for text in ("a Star, two  stars.", "star!", " caf\u00e9 \x07 star", "", "\u200b", "<|endoftext|> star"):
        expected = known(text, return_offsets_mapping=True)
        found = own(text)
        assert found.ids.tolist() == expected["input_ids"], text
        assert [tuple(pair) for pair in found.offsets.tolist()][1:-1] == expected["offset_mapping"][1:-1], text
    found = own("two stars on a star")
    assert [found.positive([span]).sum() for span in ((4, 9), (15, 19))] == [4, 1]
    assert own.decode(found.ids.tolist()) == "two stars on a star"


def by_hand(model: CLIPTextModel, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Pre-norm blocks with torch's attention, without a causal mask, as GLIPv2's public code has them."""
    state = model.state_dict()
    hidden = state["embeddings.token_embedding.weight"][tokens] + positions[: tokens.shape[1]]
    for number in range(2):
        own = {
            name.split(f"layers.{number}.")[1]: value for name, value in state.items() if f"layers.{number}." in name
        }

        def normed(name: str, values: Tensor, own: dict[str, Tensor] = own) -> Tensor:
            return functional.layer_norm(values, (WIDTH,), own[f"{name}.weight"], own[f"{name}.bias"])

        attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        with torch.no_grad():
            for part in ("weight", "bias"):
                joined = torch.cat([own[f"self_attn.{name}_proj.{part}"] for name in "qkv"])
                getattr(attention, f"in_proj_{part}").copy_(joined)
                getattr(attention.out_proj, part).copy_(own[f"self_attn.out_proj.{part}"])
        inner = normed("layer_norm1", hidden)
        hidden = hidden + attention(inner, inner, inner, key_padding_mask=~mask, need_weights=False)[0]
        inner = functional.linear(normed("layer_norm2", hidden), own["mlp.fc1.weight"], own["mlp.fc1.bias"])
        inner = inner * torch.sigmoid(1.702 * inner)
        hidden = hidden + functional.linear(inner, own["mlp.fc2.weight"], own["mlp.fc2.bias"])
    return functional.layer_norm(hidden, (WIDTH,), state["final_layer_norm.weight"], state["final_layer_norm.bias"])


def test_every_token_sees_all_others_at_interpolated_positions(clip: Path) -> None:
    """Twelve positions become 24, as bilinear interpolation of a map with one column; padding changes nothing."""
    model: Any = CLIPTextModel.from_pretrained(clip)
    method = Glip(replace(Glip.smallest(), text=str(clip), grounding=OPTIONS)).eval()
    known = model.state_dict()["embeddings.position_embedding.weight"]
    stretched = functional.interpolate(known.T[None, :, :, None], size=(24, 1), mode="bilinear")[0, :, :, 0].T
    tokens = torch.randint(1, 50, (2, 16))
    mask = torch.arange(16) < torch.tensor([[16], [5]])
    with torch.no_grad():
        found = method.model.encode_text(tokens, mask).hidden
        expected = by_hand(model, tokens, mask, stretched)
        shorter = method.model.encode_text(tokens[1:, :8], mask[1:, :8]).hidden
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shorter[0, :5], found[1, :5], rtol=1e-4, atol=1e-5)
    assert torch.equal(resized_positions(known, POSITIONS), known)
    assert len(method.model.tower.texts) == 2 and type(method.model.tower.texts[0]).__name__ == "CLIPEncoderLayer"


def save(method: Any, folder: Path) -> str:
    meta = Meta(step=1, samples_seen=8, batch_size=8, lanes=1, seed=0, snapshot="0" * 64)
    return Checkpoints(str(folder)).save(method, make_optimizer(AdamW(), method), meta).folder.uri


def test_glipv2_with_clip_trains_and_is_stored(clip: Path, tmp_path: Path) -> None:
    """All losses reach the tower; rates are by its layers; a checkpoint needs no folder of the CLIP."""
    config = replace(
        Glipv2.smallest(), text=str(clip), grounding=OPTIONS, class_names=("star", "disc"), masked_tokens=1.0
    )
    Glipv2.check(config)
    method = Glipv2(replace(config, least_score=0.0))
    (reader,) = method.readers(train=True)
    batch = reader.collate([reader.read(grounded([obj("star"), obj("disc", (30, 30, 20, 20))]), SamplePosition(0, 0))])
    assert method.tokenizer.mask in batch["tokens"] and int((batch["masked_tokens"] >= 0).sum()) == 5
    losses = method.train().training_step(batch)
    torch.stack(list(losses.values())).sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in method.model.text.parameters())
    depths = method.layers()
    assert depths["model.text.clip.embeddings.position_embedding.weight"].above == 2
    assert depths["model.text.clip.encoder.layers.1.mlp.fc1.weight"].above == 0
    assert "model.text.clip.final_layer_norm.weight" not in depths
    loaded: Any = load_method(save(method.eval(), tmp_path))
    caption, spans = "two stars, a disc", [(4, 9), (13, 17), (40, 50)]
    expected, found = (one.eval().ground([image()], [caption], [spans])[0] for one in (method, loaded))
    assert torch.equal(expected.boxes, found.boxes) and set(found.spans.tolist()) == {0, 1}


def test_captions_of_a_clip_end(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its padding is its end: a caption that has ended stays as it is beside one that goes on."""
    method = Glipv2Language(
        replace(Glipv2Language.smallest(), text=str(clip), grounding=OPTIONS, caption_tokens=8, beams=1)
    ).eval()
    own = method.tokenizer
    written = [own("a star").ids.tolist(), own("stars").ids.tolist()]

    def next_tokens(_: Any, tokens: Tensor) -> Tensor:
        place = tokens.shape[2]
        logits = torch.zeros(2, 1, 1, own.vocab_size)
        for row, text in enumerate(written):
            logits[row, ..., text[min(place, len(text) - 1)]] = 9.0
        return logits

    monkeypatch.setattr(method, "_next_tokens", next_tokens)
    assert [own.decode(row) for row in method._write([], 2).tolist()] == ["a star", "stars"]


def test_what_is_no_tower_is_refused(tmp_path: Path) -> None:
    make_clip(tmp_path / "clip", mask=False)
    with pytest.raises(SettingError, match="a tokenizer with"):
        Glipv2.check(replace(Glipv2.smallest(), text=str(tmp_path / "clip"), grounding=OPTIONS))
    Glip.check(replace(Glip.smallest(), text=str(tmp_path / "clip"), grounding=OPTIONS))
    (tmp_path / "other").mkdir()
    make_tokenizer(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(SettingError, match="a BERT or CLIP .*this is a gpt2 model"):
        Glip.check(replace(Glip.smallest(), text=str(tmp_path / "other")))
