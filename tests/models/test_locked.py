"""Locked towers, patch dropout and other sizes: against open_clip's own locking, its definitions and torch."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import SettingError
from pipeline.loaders.batches import LoaderConfig
from pipeline.models.clip import Clip, Config
from pipeline.models.slip import Slip
from pipeline.models.towers import openclip
from pipeline.models.towers.locked import lock
from pipeline.shards.snapshot import Snapshot
from pipeline.training.checkpoint import Checkpoints, Meta, load_method
from pipeline.training.launch import launch
from pipeline.training.loop import step_seed
from pipeline.training.optimizer import AdamW, make_optimizer
from pipeline.training.run import Run, prepare

RESNET = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of the tiny CLIP to begin with."""
    torch.manual_seed(0)
    return save(Clip(Clip.smallest()), tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny ResNet's architecture."""
    folder = tmp_path_factory.mktemp("resnet")
    (folder / "locked-resnet.json").write_text(json.dumps(RESNET))
    open_clip.add_model_config(folder)
    return "locked-resnet"


def save(method: Clip, folder: Path) -> str:
    meta = Meta(step=1, samples_seen=8, batch_size=8, lanes=1, seed=0, snapshot="0" * 64)
    return str(Checkpoints(str(folder)).save(method, make_optimizer(AdamW(), method), meta).folder.path)


def batch(method: Clip, rows: int = 4) -> dict[str, Tensor]:
    side = method.transforms(False).size[0]
    images = torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return {"image": images, "text": method.tokenizer([f"image {number}" for number in range(rows)])}


def learning(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def three_layers() -> nn.Module:
    vision = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)


@pytest.mark.parametrize("unlocked", [0, 2, 3])
def test_what_is_locked_is_what_open_clip_locks(unlocked: int) -> None:
    ours, peer = three_layers(), three_layers()
    lock(ours, "image", unlocked)
    peer.lock_image_tower(unlocked_groups=unlocked)
    assert learning(ours) == learning(peer)


def test_a_locked_text_tower_leaves_the_other_alone() -> None:
    ours = three_layers()
    lock(ours, "text", 2)
    kept = learning(ours)
    assert {name for name in kept if not name.startswith("visual.")} - {"logit_scale"} == {
        name
        for name, _ in ours.named_parameters()
        if name.startswith(("transformer.resblocks.2.", "ln_final.")) or name == "text_projection"
    }
    assert {name for name, _ in ours.visual.named_parameters(prefix="visual")} <= kept


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_locked_tower_is_the_same_to_the_bit_after_training(
    tower: str, start: str, make_snapshot: Callable[..., Snapshot], tmp_path: Path
) -> None:
    locked: dict[str, Any] = {f"lock_{tower}": True}
    config = replace(Clip.smallest(), pretrained=start, **locked)
    settings = Run(
        output_folder=str(tmp_path / "run"),
        data=make_snapshot((9, 9)).folder,
        batch_size=6,
        steps=3,
        warmup_steps=1,
        optimizer=AdamW(learning_rate=1e-2),
        loader=LoaderConfig(loader_workers=0),
    )
    launch(prepare(config, settings)[0])
    before, after = load_method(start).state_dict(), load_method(str(tmp_path / "run")).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    images = {name for name in before if name.startswith("model.visual.")}
    texts = {name for name in before if name not in images and name != "model.logit_scale"}
    assert not changed & (images if tower == "image" else texts)
    assert changed >= (texts - {"model.positional_embedding"} if tower == "image" else {"model.visual.proj"})


def test_no_gradient_is_computed_for_a_locked_tower(start: str) -> None:
    method = Clip(replace(Clip.smallest(), pretrained=start, lock_image=True))
    embeddings = method.embed(batch(method))
    assert not embeddings["image"].requires_grad and embeddings["text"].requires_grad
    torch.stack(list(method(batch(method)).values())).sum().backward()
    got = {name for name, parameter in method.named_parameters() if parameter.grad is not None}
    assert got == learning(method) and not any(name.startswith("model.visual.") for name in got)
    grouped = {id(value) for group in make_optimizer(AdamW(), method).param_groups for value in group["params"]}
    assert grouped == {id(parameter) for parameter in method.parameters() if parameter.requires_grad}


def test_distributed_data_parallel_misses_no_gradient(start: str, tmp_path: Path) -> None:
    """It would complain in the second step of parameters that had none in the first."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        method = Clip(replace(Clip.smallest(), pretrained=start, lock_image=True, lock_text=True, lock_text_unlocked=1))
        module = nn.parallel.DistributedDataParallel(method)
        for _ in range(2):
            torch.stack(list(module(batch(method)).values())).sum().backward()
    finally:
        torch.distributed.destroy_process_group()


def test_statistics_of_a_locked_batch_normalisation_stay(resnet: str, tmp_path: Path) -> None:
    weights = save(Clip(Config(architecture=resnet)), tmp_path)
    method = Clip(Config(architecture=resnet, pretrained=weights, lock_image=True)).train()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method(batch(method))
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert method.training and not method.model.visual.training
    part = Clip(Config(architecture=resnet, pretrained=weights, lock_image=True, lock_image_unlocked=1)).train()
    part(batch(part))
    same = [name for name, value in part.state_dict().items() if torch.equal(value, before[name])]
    assert "model.visual.bn1.running_mean" in same and part.model.visual.attnpool.training


def test_a_locked_tower_in_a_checkpoint_stays_locked(start: str, tmp_path: Path) -> None:
    method = Clip(replace(Clip.smallest(), pretrained=start, lock_image=True, lock_image_unlocked=1))
    again = load_method(save(method, tmp_path))
    assert learning(again) == learning(method) < {name for name, _ in method.named_parameters()}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"lock_image": True}, "lock_image"),
        ({"pretrained": "x", "lock_image_unlocked": 1}, "lock_image_unlocked"),
        ({"pretrained": "x", "lock_text": True, "lock_text_unlocked": -1}, "lock_text_unlocked"),
        ({"patch_dropout": 1.0}, "patch_dropout"),
        ({"context_length": 0}, "context_length"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingError, match=field):
        Config(**changes)


def test_more_layers_than_there_are_cannot_be_unlocked(start: str) -> None:
    with pytest.raises(SettingError, match="lock_image_unlocked: got 9"):
        Clip(replace(Clip.smallest(), pretrained=start, lock_image=True, lock_image_unlocked=9))


def test_patch_dropout_is_for_training_alone_and_follows_the_steps_seed(start: str) -> None:
    plain = Clip(replace(Clip.smallest(), pretrained=start)).eval()
    drops = Clip(replace(Clip.smallest(), pretrained=start, patch_dropout=0.5)).eval()
    images = batch(plain)["image"]
    torch.testing.assert_close(drops.encode_image(images), plain.encode_image(images))
    drops.train()

    def seen(step: int) -> Tensor:
        torch.manual_seed(step_seed(0, step, 0))
        return drops.encode_image(images)

    assert torch.equal(seen(3), seen(3)) and not torch.equal(seen(3), seen(4))
    lengths: list[int] = []
    drops.model.visual.transformer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    seen(0)
    patches = drops.model.visual.positional_embedding.shape[0] - 1
    assert lengths == [1 + patches // 2]


def test_patch_dropout_needs_patches(resnet: str) -> None:
    with pytest.raises(SettingError, match="patch_dropout: got 0.5.*no patches"):
        Clip.check(Config(architecture="RN50", patch_dropout=0.5))
    for architecture in (resnet, "clipmill-small"):  # timm's door swallows what a tower does not know
        with pytest.raises(SettingError, match="patch_dropout: got 0.5.*no patches"):
            Clip(Config(architecture=architecture, patch_dropout=0.5))


@pytest.mark.parametrize("side", [48, 96])
def test_positions_are_interpolated_for_another_image_size(side: int, start: str, tmp_path: Path) -> None:
    before = load_method(start)
    assert isinstance(before, Clip)
    method = Clip(replace(Clip.smallest(), pretrained=start, image_size=side))
    old, new = before.model.visual.positional_embedding, method.model.visual.positional_embedding
    grids = [int((len(table) - 1) ** 0.5) for table in (old, new)]
    grid = old[1:].T.reshape(1, -1, grids[0], grids[0])
    wanted = functional.interpolate(grid, size=(grids[1],) * 2, mode="bicubic", antialias=True)
    torch.testing.assert_close(new[1:], wanted[0].flatten(1).T)
    assert torch.equal(new[0], old[0]) and grids[0] != grids[1]
    assert method.transforms(True).size == method.transforms(False).size == (side, side)
    again = load_method(save(method, tmp_path))
    images = batch(method)["image"]
    assert images.shape[-1] == side
    torch.testing.assert_close(again.encode_image(images), method.eval().encode_image(images))  # type: ignore[operator]
    folder = Checkpoints(str(tmp_path)).latest()
    assert folder is not None
    peer = open_clip.create_model(f"local-dir:{folder.folder.path}").eval()
    inputs = (images.float() - method.mean) / method.std
    torch.testing.assert_close(peer.encode_image(inputs, normalize=True), method.encode_image(images))


def test_texts_may_be_longer(start: str, tmp_path: Path) -> None:
    """The positions are open_clip's linear interpolation, as torch's."""
    before = load_method(start)
    length = before.model.context_length
    method = Clip(replace(Clip.smallest(), pretrained=start, context_length=2 * length))  # type: ignore[operator]
    old, new = before.model.positional_embedding, method.model.positional_embedding
    wanted = functional.interpolate(old.T[None], size=2 * length, mode="linear", align_corners=False)[0].T  # type: ignore
    torch.testing.assert_close(new, wanted)
    tokens = method.tokenizer(["word " * 3 * length])
    assert tokens.shape == (1, 2 * length)  # type: ignore[operator]
    again = load_method(save(method, tmp_path))
    torch.testing.assert_close(again.encode_text(tokens), method.eval().encode_text(tokens))  # type: ignore[operator]
    assert again.tokenizer(["a"]).shape == tokens.shape


def test_slip_has_them_all(start: str) -> None:
    config = replace(Slip.smallest(), pretrained=start, lock_text=True, patch_dropout=0.25, image_size=48)
    method = Slip(config)
    assert {name.split(".")[0] for name in learning(method)} == {"model", "head"}
    assert all(name == "model.logit_scale" or name.startswith(("model.visual.", "head.")) for name in learning(method))


def test_open_clip_is_asked_for_nothing_it_has_not() -> None:
    model = openclip.create("clipmill-tiny", image_size=32, context_length=20, patch_dropout=0.5)
    assert model.context_length == 20 and model.visual.patch_dropout.prob == 0.5  # type: ignore[union-attr]
