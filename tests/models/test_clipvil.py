"""CLIP-ViL: its transformer against transformers' VisualBERT, its losses, its grids and its answers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import SettingError, SidecarError
from pipeline.evaluation.grid_embedder import GridSize, LoadGridEmbedder
from pipeline.loaders.batches import LoaderConfig, training_batches
from pipeline.loaders.order import Order
from pipeline.models.clipvil import SMALLEST, ClipVil, Config, answer_loss, features_of
from pipeline.models.method import build_method
from pipeline.models.towers.single_stream import SingleStream, bert_settings
from pipeline.shards.snapshot import Snapshot
from pipeline.stages.annotate.embeddings import EmbedOptions
from pipeline.stages.annotate.grid_features import embed_grids
from pipeline.stages.shard_tasks import Workers
from pipeline.training.checkpoint import Checkpoints, Meta, load_method
from pipeline.training.optimizer import AdamW, AdamWWithSgd, make_optimizer
from tests.models.test_method_contract import make_data

ANSWERS = replace(SMALLEST, task="answers", most_cells=0)


def stream(width: int = 6, initial: float | None = None) -> SingleStream:
    torch.manual_seed(0)
    settings = bert_settings("", (32, 2, 4), 50, 0, 16, 0.0)
    settings.initializer_range = initial or settings.initializer_range
    return SingleStream(settings, width, 25).eval()


def inputs(width: int = 6) -> tuple[Tensor, ...]:
    tokens, mask = torch.randint(1, 50, (2, 8)), torch.ones(2, 8, dtype=torch.bool)
    cells = torch.tensor([[row, column] for row in range(2) for column in range(3)]).expand(2, -1, -1)
    cell_mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 5:], cell_mask[1, 4:] = False, False
    return tokens, mask, torch.randn(2, 6, width), cells, cell_mask


@torch.no_grad()
def test_the_transformer_is_visual_berts() -> None:
    """transformers' own model on the same weights: states of all tokens and cells, and the pooled one."""
    from transformers import VisualBertConfig, VisualBertModel

    ours, (tokens, mask, grid, cells, cell_mask) = stream(), inputs()
    settings = ours.bert.config
    theirs = VisualBertModel(
        VisualBertConfig(
            **{key: getattr(settings, key) for key in ("vocab_size", "hidden_size", "num_hidden_layers")},
            **{key: getattr(settings, key) for key in ("num_attention_heads", "intermediate_size")},
            max_position_embeddings=settings.max_position_embeddings,
            visual_embedding_dim=6,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).eval()
    missing = theirs.load_state_dict(ours.bert.state_dict(), strict=False)
    assert not missing.unexpected_keys and all("visual" in name for name in missing.missing_keys)
    parts: Any = theirs.embeddings
    parts.visual_projection.load_state_dict(ours.cell.state_dict())
    ours.norm.load_state_dict(parts.LayerNorm.state_dict())  # theirs share one
    # Theirs has one position for all cells, so each cell is compared in a grid of its own.
    for place in range(6):
        row, column = cells[0, place].tolist()
        parts.visual_position_embeddings.weight[0] = ours.row.weight[row]
        parts.visual_token_type_embeddings.weight[1] = ours.column.weight[column]
        one = slice(place, place + 1)
        found, pooled = ours(tokens, mask, grid[:, one], cells[:, one], cell_mask[:, one])
        wanted = theirs(
            input_ids=tokens,
            attention_mask=mask.long(),
            visual_embeds=grid[:, one],
            visual_attention_mask=cell_mask[:, one].long(),
        )
        seen = torch.cat([mask, cell_mask[:, one]], dim=1)
        torch.testing.assert_close(found[seen], wanted.last_hidden_state[seen], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pooled, wanted.pooler_output, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_small_transformer_starts_with_attention_that_tells_keys_apart() -> None:
    """BERT's standard deviation of 0.02 is for 768 features: with 32 a query sees the same in every key."""
    spreads = []
    for model in (stream(), stream(initial=0.02)):
        tokens, mask, grid, cells, cell_mask = inputs()
        seen = model.attention(tokens, torch.ones_like(mask), grid, cells, torch.ones_like(cell_mask))
        spreads.append(float((seen.std(dim=1) / seen.mean(dim=1)).mean()))
    assert spreads[0] > 0.1 > 0.02 > spreads[1]


@torch.no_grad()
def test_the_order_of_cells_does_not_matter_and_their_places_do() -> None:
    ours, (tokens, mask, grid, cells, cell_mask) = stream(), inputs()
    _, pooled = ours(tokens, mask, grid, cells, cell_mask)
    order = torch.tensor([4, 0, 3, 5, 2, 1])
    _, shuffled = ours(tokens, mask, grid[:, order], cells[:, order], cell_mask[:, order])
    torch.testing.assert_close(pooled, shuffled, rtol=1e-5, atol=1e-6)
    _, moved = ours(tokens, mask, grid, cells.flip(2), cell_mask)
    assert not torch.allclose(pooled, moved, rtol=0, atol=1e-5)
    _, padded = ours(tokens, mask, grid + 5 * ~cell_mask[..., None], cells, cell_mask)
    torch.testing.assert_close(pooled, padded, rtol=1e-5, atol=1e-6)


def test_cells_are_flattened_row_by_row() -> None:
    grid = torch.arange(2 * 3 * 4 * 5).float().view(2, 3, 4, 5)
    cells = torch.tensor([[[0, 0], [3, 1]], [[1, 4], [2, 2]]])
    found = features_of(grid, cells)
    for row in range(2):
        for place in range(2):
            y, x = cells[row, place].tolist()
            assert torch.equal(found[row, place], grid[row, :, y, x])


@torch.no_grad()
def test_attention_is_that_of_the_last_layer() -> None:
    ours, values = stream(), inputs()
    found = ours.attention(*values)
    ours.bert.set_attn_implementation("eager")
    seen: list[Tensor] = []
    hook = ours.bert.encoder.layer[-1].attention.self.register_forward_hook(lambda *args: seen.append(args[-1][1]))
    mask = torch.cat([values[1], values[4]], dim=1)
    additive = torch.zeros(2, 1, 14, 14).masked_fill(~mask[:, None, None, :], torch.finfo().min)
    ours.bert.encoder(ours.embed(values[0], values[2], values[3]), attention_mask=additive)
    hook.remove()
    torch.testing.assert_close(found, seen[0][:, :, 0, 8:].mean(dim=1), rtol=1e-4, atol=1e-5)
    assert not found[1, 4:].any() and bool((found.sum(dim=1) < 1).all())


def test_the_loss_is_the_mean_times_the_number_of_answers() -> None:
    logits, targets = torch.randn(4, 3129), torch.rand(4, 3129)
    wanted = functional.binary_cross_entropy_with_logits(logits, targets) * 3129
    torch.testing.assert_close(answer_loss(logits, targets, "soft"), wanted)
    by_hand = -(0.3 * torch.tensor(2.0).sigmoid().log() + 0.7 * torch.tensor(-2.0).sigmoid().log())
    by_hand = by_hand - torch.tensor(1.0).sigmoid().log()
    torch.testing.assert_close(answer_loss(torch.tensor([[2.0, -1.0]]), torch.tensor([[0.3, 0.0]]), "soft"), by_hand)
    single = answer_loss(logits, targets, "single")
    torch.testing.assert_close(single, functional.cross_entropy(logits, targets.argmax(dim=1)))


@pytest.fixture(scope="module")
def snapshot(make_snapshot: Callable[..., Snapshot]) -> Snapshot:
    made = make_data(make_snapshot)
    make = LoadGridEmbedder(checkpoint="clipmill-tiny:untrained", device="cpu", size=GridSize(image_size=(64, 64)))
    return embed_grids(made, make, EmbedOptions(name="grid", batch_size=8), Workers(processes_count=0))


def batch_of(method: ClipVil, snapshot: Snapshot, step: int = 0) -> dict[str, Tensor]:
    order = Order([shard.samples for shard in snapshot.shards], seed=0, batch_size=8, lanes=2)
    config, steps = LoaderConfig(loader_workers=0), range(step, step + 1)
    readers = method.readers(train=True)
    batch = next(training_batches(snapshot, readers, order, steps=steps, rank=0, world=1, config=config))
    return {name: value for name, value in batch.items() if name != "replaced"}


def made(config: Config) -> ClipVil:
    torch.manual_seed(0)
    method = build_method(config)
    assert isinstance(method, ClipVil)
    return method


def test_stored_grids_train_as_images_do(snapshot: Snapshot) -> None:
    frozen = replace(ANSWERS, frozen=True)
    images, stored = made(frozen), made(replace(frozen, grid="grid"))
    assert not any(value.requires_grad for value in stored.tower.parameters())
    losses = []
    for method in (images, stored):
        batch = batch_of(method, snapshot)
        assert ("grid" in batch) != ("image" in batch)
        (loss,) = method.training_step(batch).values()
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-3)
    for one, other in zip(images.model.parameters(), stored.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=2e-2, atol=2e-3)
    assert set(stored.sample_fields(stored.config)) == {"boxes.json"}


def test_a_frozen_tower_stays_as_it_is(snapshot: Snapshot) -> None:
    method = made(replace(ANSWERS, frozen=True)).train()
    assert (
        not method.tower.training
        and method.model.training
        and "image" not in {layer.tower for layer in method.layers().values()}
    )
    (loss,) = method.training_step(batch_of(method, snapshot)).values()
    loss.backward()
    assert all(value.grad is None for value in method.tower.parameters())


def test_grids_of_another_tower_are_refused(snapshot: Snapshot) -> None:
    method = made(replace(ANSWERS, frozen=True, grid="grid", image_size=(64, 96)))
    with pytest.raises(SidecarError, match="teacher"):
        batch_of(method, snapshot)


def test_grids_are_those_of_the_tower_that_a_pretraining_trained(
    make_snapshot: Callable[..., Snapshot], tmp_path: Path
) -> None:
    """Grids of the CLIP with which it began are refused; those of its own tower are what it computes itself."""
    first = made(SMALLEST)
    with torch.no_grad():
        for parameter in first.tower.parameters():
            parameter.mul_(1.1)
    data = make_data(make_snapshot)
    meta = Meta(step=1, samples_seen=8, batch_size=8, lanes=2, seed=0, snapshot=data.digest)
    trained = Checkpoints(str(tmp_path)).save(first, make_optimizer(AdamW(), first), meta).folder.uri
    for name, checkpoint in (("before", SMALLEST.tower), ("after", trained)):
        make = LoadGridEmbedder(checkpoint=checkpoint, device="cpu", size=GridSize(image_size=(64, 64)))
        data = embed_grids(data, make, EmbedOptions(name=name, batch_size=8), Workers(processes_count=0))
    start = replace(ANSWERS, start_from=trained, frozen=True)
    with pytest.raises(SidecarError, match="before.* teacher .*, not .*make it again with"):
        batch_of(made(replace(start, grid="before")), data)
    method = made(replace(start, grid="after"))
    stored, images = batch_of(method, data), batch_of(made(start), data)
    with torch.no_grad():
        computed = features_of(method.tower(images["image"]), images["cells"])
    assert torch.equal(stored["cells"], images["cells"])
    mask = images["cell_mask"]
    torch.testing.assert_close(stored["grid"].float()[mask], computed[mask], rtol=1e-3, atol=1e-3)


def test_each_sample_has_other_cells(snapshot: Snapshot) -> None:
    method = made(replace(ANSWERS, most_cells=5))
    batches = [batch_of(method, snapshot, step) for step in (0, 0, 1)]
    assert torch.equal(batches[0]["cells"], batches[1]["cells"])
    assert len({str(row.tolist()) for batch in batches[1:] for row in batch["cells"]}) > 12


def test_two_optimisers_divide_all_weights_between_them() -> None:
    method = made(ANSWERS)
    config = AdamWWithSgd(learning_rate=5e-5, sgd_learning_rate=1e-3)
    optimizer = make_optimizer(config, method)
    names = {id(value): name for name, value in method.named_parameters()}
    sgd = [names[id(v)] for group in optimizer.param_groups if group.get("sgd") for v in group["params"]]
    adam = [names[id(v)] for group in optimizer.param_groups if not group.get("sgd") for v in group["params"]]
    assert sorted(sgd + adam) == sorted(name for name, value in method.named_parameters() if value.requires_grad)
    assert set(sgd) == {name for name in names.values() if name.startswith("tower.")}
    with pytest.raises(SettingError, match="sgd_towers"):
        make_optimizer(config, made(replace(ANSWERS, frozen=True)))


def test_answers_and_where_it_looks(snapshot: Snapshot, tmp_path: Path) -> None:
    """The same after a checkpoint; probabilities are of single answers, or sum to one."""
    images = [torch.randint(0, 256, (3, 50, 90), dtype=torch.uint8), torch.zeros(3, 64, 64, dtype=torch.uint8)]
    asked = ["what colour is the star?", "how many stars are there?"]
    for loss in ("soft", "single"):
        method = made(replace(ANSWERS, loss=loss)).eval()
        found = method.answer_probabilities(images, asked)
        assert found.shape == (2, 4) and 0 <= float(found.min()) and float(found.max()) <= 1
        if loss == "single":
            torch.testing.assert_close(found.sum(dim=1), torch.ones(2))
        best = [method.config.answers[n] for n in found.argmax(dim=1).tolist()]
        assert method.answer(images, [[asked[0]], [asked[1], asked[1]]]) == [[best[0]], [best[1], best[1]]]
        assert method.answer(images, [[], []]) == [[], []]
        read: list[int] = []
        hook = method.tower.register_forward_hook(lambda _, given, __, read=read: read.append(len(given[0])))
        many = method.answer(images, [[asked[0]] * 80, asked])
        hook.remove()
        assert many[0] == [best[0]] * 80 and many[1][1] == best[1] and read == [2], "the tower reads an image once"
        seen = method.attention(images, asked)
        assert [one.weights.shape for one in seen] == [(3, 4), (4, 4)]
        meta = Meta(step=1, samples_seen=8, batch_size=8, lanes=2, seed=0, snapshot=snapshot.digest)
        saved = Checkpoints(str(tmp_path / loss)).save(method, make_optimizer(AdamW(), method), meta)
        loaded: Any = load_method(saved.folder.uri)
        assert torch.equal(loaded.answer_probabilities(images, asked), found)
        assert loaded.facts == method.facts


def test_pretraining_is_where_answers_begin(snapshot: Snapshot, tmp_path: Path) -> None:
    first = made(SMALLEST)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.01)
    meta = Meta(step=1, samples_seen=8, batch_size=8, lanes=2, seed=0, snapshot=snapshot.digest)
    trained = Checkpoints(str(tmp_path)).save(first, make_optimizer(AdamW(), first), meta).folder.uri
    second = made(replace(ANSWERS, start_from=trained, answers=("x", "y"), text_tokens=40))
    for part in ("model", "tower"):
        for name, value in getattr(first, part).state_dict().items():
            assert torch.equal(getattr(second, part).state_dict()[name], value), name
    with pytest.raises(SettingError, match="the same network"):
        made(replace(ANSWERS, start_from=trained, small_text=(64, 2, 2)))
    with pytest.raises(SettingError, match="start_from"):
        made(replace(ANSWERS, start_from=str(tmp_path / "nothing")))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"grid": "grid"}, "grid"),
        ({"questions": ""}, "questions"),
        ({"questions": "txt"}, "questions"),
        ({"text_tokens": 3}, "text_tokens"),
        ({"dropout": 1.0}, "dropout"),
        ({"small_text": (30, 2, 4)}, "small_text"),
        ({"most_cells": -1}, "most_cells"),
        ({"answers": ("red", "two", "2")}, "answers: got 'two'"),
        ({"answers": ("red", "the")}, "answers: got 'the'"),
    ],
)
def test_wrong_configs_are_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingError, match=field):
        replace(ANSWERS, **changes)


def test_what_a_config_needs_is_checked_before_anything_is_built() -> None:
    for changes, field in (({"answers": ()}, "answers"), ({"tower": "no-such:untrained"}, "architecture")):
        with pytest.raises(SettingError, match=field):
            ClipVil.check(replace(ANSWERS, **changes))
    with pytest.raises(SettingError, match="positions"):
        made(replace(ANSWERS, positions=3))
    ClipVil.check(replace(SMALLEST, questions="", answers=()))
