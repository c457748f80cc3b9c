"""Steps with several updates: against the updates by hand, resumed, in two ranks, and with one of them skipped."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.loaders.batches import training_batches
from pipeline.models.vqgan import Vqgan
from pipeline.training.checkpoint import Checkpoints, load_method
from pipeline.training.loop import run_training, step_seed
from pipeline.training.optimizer import AdamW
from pipeline.training.run import Run, RunPlan, prepare
from tests.training.test_loop import start

MakeRun = Callable[..., Run]
CPU = torch.device("cpu")
CONFIG = replace(
    Vqgan.smallest(), image_size=16, resolution=16, attention_at=(4,), discriminator_layers=1, discriminator_start=2,
    restart_after=2,
)  # fmt: skip


@pytest.fixture
def plan(run: MakeRun) -> RunPlan:
    """AdamW divides gradients that are zero but for rounding by ``epsilon``.

    With CLIP's 1e-6 the order of a sum decides such steps: after four of them a loss in two ranks was 0.8 % off.
    """
    constant = AdamW(learning_rate=1e-3, exponential=1.0, epsilon=1e-3)
    return prepare(CONFIG, run(steps=6, warmup_steps=0, optimizer=constant, clip_grad_norm=0.5))[0]


def test_turns_follow_each_other(plan: RunPlan, remember: Any) -> None:
    """Two optimisers by hand, each with its own losses; the discriminator sees images by the new weights."""
    tracker = remember()
    run_training(plan, CPU, tracker)
    torch.manual_seed(plan.run.seed)
    method = Vqgan(CONFIG).to(memory_format=torch.channels_last).train()
    assert method.discriminator is not None
    decay = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-3, "fused": True}
    parts = {"autoencoder": method.model, "discriminator": method.discriminator}
    two = {}
    for name, part in parts.items():
        some = [one for one in part.parameters() if one.ndim >= 2]
        rest = [one for one in part.parameters() if one.ndim < 2]
        groups = [{"params": some, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}]
        two[name] = torch.optim.AdamW(groups, **decay)
    batches = training_batches(
        plan.snapshot, method.readers(train=True), plan.order(), steps=range(6), rank=0, world=1, config=plan.run.loader
    )
    for step, batch in enumerate(batches, start=1):
        del batch["replaced"]
        logged = tracker.history[step]
        # Restarts draw latents at random; the generator's state is a function of the step's number.
        torch.manual_seed(step_seed(plan.run.seed, step - 1, 0))
        for name, part in parts.items():
            losses = method.turn_losses(batch, name)
            for key, loss in losses.items():
                assert float(loss.detach()) == pytest.approx(logged[f"train/{key}"], rel=1e-4), (step, key)
            if losses:
                torch.stack(list(losses.values())).sum().backward()
                norm = torch.nn.utils.clip_grad_norm_(part.parameters(), 0.5)
                assert float(norm) == pytest.approx(logged[f"train/grad_norm/{name}"], rel=1e-3)
                two[name].step()
                two[name].zero_grad()
        method.after_step()
        assert ("train/discriminator_real" in logged) == (step > 2)
    saved = load_method(plan.run.output_folder).state_dict()
    for key, value in method.state_dict().items():
        torch.testing.assert_close(saved[key], value, rtol=1e-3, atol=1e-5)


def moved(plan: RunPlan, folder: Path) -> RunPlan:
    return replace(plan, run=replace(plan.run, output_folder=str(folder)))


def test_a_resumed_run_is_the_same_bit_for_bit(plan: RunPlan, remember: Any, tmp_path: Path) -> None:
    """Also with the discriminator's state, which begins in the middle, and with restarted codes."""
    plan = replace(plan, run=replace(plan.run, checkpoint_every_steps=3))
    whole, first, second = remember(), remember(stop_at=5), remember()
    run_training(plan, CPU, whole)
    again = moved(plan, tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        run_training(again, CPU, first)
    run_training(again, CPU, second)
    assert sorted(second.history) == [4, 5, 6]
    ends = [Checkpoints(one.run.output_folder).at(6) for one in (plan, again)]
    states = [load_method(one.uri).state_dict() for one in ends]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    optimizers = [torch.load(f"{one.path}/state.pt", weights_only=True)["optimizer"]["state"] for one in ends]
    assert optimizers[0].keys() == optimizers[1].keys()
    for number, values in optimizers[0].items():
        assert all(torch.equal(value, optimizers[1][number][key]) for key, value in values.items())


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"sharding": "full", "checkpoint_activations": True}])
def test_two_ranks_train_as_one(plan: RunPlan, remember: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Without restarts, whose random latents depend on the rank."""
    plan = replace(plan, method=replace(CONFIG, restart_after=None), run=replace(plan.run, steps=4), steps=4)
    whole, wide = remember(), moved(plan, tmp_path / "wide")
    run_training(plan, CPU, whole)
    wide = replace(wide, run=replace(wide.run, **changes))
    output = [rank.communicate(timeout=300) for rank in [start(wide, tmp_path, rank, 2) for rank in range(2)]]
    assert [errors for _, errors in output] == ["", ""]
    logged: Mapping[int, Mapping[str, float]] = dict(json.loads(line) for line in output[0][0].splitlines())
    for step in (1, 2, 3, 4):
        assert logged[step].keys() >= {name for name in whole.history[step] if name.startswith("train/")}
        for name, value in whole.history[step].items():
            if name.startswith("train/"):
                assert logged[step][name] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, name)


@pytest.mark.slow
def test_codes_restart_in_sharded_codebooks_as_in_copied_ones(plan: RunPlan, tmp_path: Path) -> None:
    """By what two ranks log: the same codes are chosen and restarted."""
    logged = []
    for sharding in ("none", "full"):
        folder = tmp_path / sharding
        folder.mkdir()
        wide = moved(replace(plan, run=replace(plan.run, sharding=sharding)), folder / "run")
        output = [rank.communicate(timeout=300) for rank in [start(wide, folder, rank, 2) for rank in range(2)]]
        assert [errors for _, errors in output] == ["", ""]
        logged.append(dict(json.loads(line) for line in output[0][0].splitlines()))
    for step, metrics in logged[0].items():
        for name in ("train/pixels", "train/codebook", "train/discriminator_real", "train/codebook_perplexity"):
            if name in metrics:
                assert logged[1][step][name] == pytest.approx(metrics[name], rel=1e-4), (step, name)


def test_a_skipped_turn_counts_as_one_step(plan: RunPlan, remember: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The discriminator's loss is no number at step 4: its weights stay, the autoencoder's do not."""
    sound = Vqgan.turn_losses
    seen: dict[int, dict[str, Tensor]] = {}

    def spoilt(self: Vqgan, batch: Mapping[str, Tensor], turn: str) -> dict[str, Tensor]:
        losses = sound(self, batch, turn)
        if turn == "discriminator":
            seen[self._steps] = {name: one.detach().clone() for name, one in self.named_parameters()}
            if self._steps == 3:
                return {name: loss * torch.nan for name, loss in losses.items()}
        return losses

    monkeypatch.setattr(Vqgan, "turn_losses", spoilt)
    tracker = remember()
    run_training(plan, CPU, tracker)
    assert [tracker.history[step]["train/skipped_steps"] for step in (3, 4, 5, 6)] == [0, 1, 1, 1]
    critic = [name for name in seen[3] if name.startswith("discriminator")]
    assert all(torch.equal(seen[3][name], seen[4][name]) for name in critic)
    assert not all(torch.equal(seen[4][name], seen[5][name]) for name in critic)
    assert not torch.equal(seen[3]["model.quant_conv.weight"], seen[4]["model.quant_conv.weight"])
