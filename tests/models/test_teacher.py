"""Learning from a teacher CLIP: against open_clip's loss and towers, in parts, and over a resume.

In several ranks, with weights copied and divided: tests/training/test_sharding.py.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.loss import DistillClipLoss
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import SettingError
from pipeline.loaders.batches import LoaderConfig
from pipeline.models.clip import Clip, Config
from pipeline.models.method import method_class
from pipeline.models.slip import Slip
from pipeline.models.towers import openclip
from pipeline.models.towers.teacher import Teacher
from pipeline.shards.snapshot import Snapshot
from pipeline.training.checkpoint import Checkpoints, Meta, load_method, read_weights
from pipeline.training.flops import Work
from pipeline.training.gradient_cache import backward_in_parts
from pipeline.training.loop import run_training
from pipeline.training.optimizer import AdamW, make_optimizer
from pipeline.training.run import Run, RunPlan, prepare

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny CLIP with other weights, as a teacher's address."""
    torch.manual_seed(7)
    method = Clip(Clip.smallest())
    meta = Meta(step=1, samples_seen=8, batch_size=8, lanes=1, seed=0, snapshot="0" * 64)
    folder = str(tmp_path_factory.mktemp("teacher"))
    saved = Checkpoints(folder).save(method, make_optimizer(AdamW(), method), meta)
    return f"clipmill-tiny:{saved.folder.path}"


def student(config: Config) -> Clip:
    torch.manual_seed(0)
    method = method_class("clip")(config)
    assert isinstance(method, Clip)
    method.prepare_training()
    return method.train()


def batch(method: Clip, rows: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    side = method.transforms(False).size[0]
    images = torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=generator)
    tokens = method.tokenizer([f"a red circle, number {row}" for row in range(rows)])
    return {"image": images, "text": tokens[:, :12]}


def gradients(method: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad for name, value in method.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_losses_and_gradients_are_open_clips(share: float, address: str) -> None:
    method = student(Config(architecture="clipmill-tiny", teacher=address, distillation=share))
    given = batch(method)
    losses = method.training_step(given)
    torch.stack(list(losses.values())).sum().backward()
    found = gradients(method)

    theirs = load_method(address.removeprefix("clipmill-tiny:")).train()  # by its own way, in the other mode
    method.zero_grad()
    with torch.no_grad():
        images, texts = theirs.encode_image(given["image"]), theirs.encode_text(given["text"])
    features = method.encode_image(given["image"]), method.encode_text(given["text"])
    scales = method.logit_scale.exp(), theirs.logit_scale.exp().detach()
    contrastive, distillation = DistillClipLoss()(*features, scales[0], images, texts, scales[1])
    ((1 - share) * contrastive + share * distillation).backward()
    assert float(losses["contrastive"].detach()) == pytest.approx((1 - share) * float(contrastive.detach()), rel=1e-5)
    expected = gradients(method)
    assert found.keys() == expected.keys() and not any(name.startswith("teacher") for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_who_is_its_own_teacher_has_nothing_to_learn(address: str) -> None:
    config = Config(architecture="clipmill-tiny", pretrained=address.partition(":")[2], teacher=address)
    losses = student(config).training_step(batch(student(config)))
    assert abs(float(losses["distillation"].detach())) < 1e-5 < float(losses["contrastive"].detach())


def test_parts_of_a_batch_give_the_gradient_of_the_whole_and_ask_the_teacher_once(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = student(Config(architecture="clipmill-tiny", teacher=address))
    given, asked = batch(method, 7), list[int]()
    torch.stack(list(method.training_step(given).values())).sum().backward()
    expected = gradients(method)
    method.zero_grad()
    ask = Teacher.forward

    def counted(self: Teacher, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(len(image))
        return ask(self, image, text)

    monkeypatch.setattr(Teacher, "forward", counted)
    backward_in_parts(method, given, 3, lambda: torch.autocast("cpu", enabled=False))
    assert asked == [3, 3, 1]
    for name, gradient in gradients(method).items():
        torch.testing.assert_close(gradient, expected.pop(name), rtol=1e-3, atol=1e-6, msg=name)
    assert not expected


def test_images_and_texts_are_made_fit(tmp_path: Path) -> None:
    """A teacher of larger images and longer texts, whose tower sees the padding."""
    torch.manual_seed(3)
    architecture = openclip.check_architecture("clipmill-tiny")
    architecture["vision_cfg"]["image_size"], architecture["text_cfg"]["context_length"] = 96, 20
    architecture["text_cfg"]["no_causal_mask"] = True
    model = open_clip.CLIP(**architecture)
    described = openclip.describe(Clip(Clip.smallest()).model, "clipmill-tiny")
    card = json.loads(described[openclip.MODEL_CARD])
    card["model_cfg"] = architecture
    card["preprocess_cfg"]["size"] = [96, 96]
    (tmp_path / openclip.MODEL_CARD).write_text(json.dumps(card))
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, tmp_path / openclip.WEIGHTS)
    teacher = Teacher(f"local-dir:{tmp_path}")
    given = batch(Clip(Clip.smallest()), 3)
    images, texts = teacher(given["image"], given["text"])
    larger = functional.interpolate(given["image"].float(), (96, 96), mode="bicubic", antialias=True).clamp(0, 255)
    mean, std = (torch.tensor(card["preprocess_cfg"][key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    expected = functional.normalize(model.eval().encode_image((larger / 255 - mean) / std), dim=1)
    torch.testing.assert_close(images, expected * model.logit_scale.exp(), rtol=1e-4, atol=1e-5)
    padded = torch.zeros(3, 20, dtype=torch.int64)
    padded[:, :12] = given["text"]
    torch.testing.assert_close(texts, functional.normalize(model.encode_text(padded), dim=1), rtol=1e-4, atol=1e-5)


@pytest.fixture
def plan(address: str, make_snapshot: Callable[..., Snapshot], tmp_path: Path) -> RunPlan:
    run = Run(
        output_folder=str(tmp_path / "run"), data=make_snapshot((14, 9, 17)).folder, batch_size=8, lanes=4, steps=5,
        warmup_steps=2, log_every_steps=1, checkpoint_every_steps=3, ema_decay=0.5,
        loader=LoaderConfig(loader_workers=0), optimizer=AdamW(learning_rate=1e-3),
    )  # fmt: skip
    return prepare(Config(architecture="clipmill-tiny", teacher=address), run)[0]


class Losses:
    """A tracker that keeps what was logged, and may stop the run."""

    def __init__(self, stop_at: int = 0) -> None:
        self.found: dict[int, dict[str, float]] = {}
        self.stop_at = stop_at

    def log(self, metrics: Any, step: int) -> None:
        self.found[step] = {name: value for name, value in metrics.items() if name.startswith("train/")}
        if step == self.stop_at:
            raise KeyboardInterrupt

    def log_file(self, name: str, content: bytes) -> None: ...

    def flush(self, seconds: float) -> None:
        """Nothing is queued."""

    def close(self) -> None: ...


def test_a_resume_is_exact_and_no_checkpoint_holds_the_teacher(
    plan: RunPlan, address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="pipeline")
    whole, first, rest = Losses(), Losses(stop_at=4), Losses()
    run_training(plan, CPU, whole)
    assert "million of teacher frozen" in caplog.text
    again = replace(plan, run=replace(plan.run, output_folder=str(tmp_path / "again")))
    with pytest.raises(KeyboardInterrupt):
        run_training(again, CPU, first)
    run_training(again, CPU, rest)
    assert sorted(rest.found) == [4, 5] and rest.found == {step: whole.found[step] for step in (4, 5)}
    assert all(loss["train/distillation"] > 0 for loss in whole.found.values())
    folder = Checkpoints(plan.run.output_folder).at(5)
    for ema in (False, True):
        assert not [name for name in read_weights(folder, ema=ema) if "teacher" in name]
    evaluated = load_method(plan.run.output_folder)
    assert isinstance(evaluated, Clip) and evaluated.teacher is None
    before = load_method(address.removeprefix("clipmill-tiny:")).state_dict()
    trained = evaluated.state_dict()
    assert not torch.equal(before["model.visual.proj"], trained["model.visual.proj"])


def test_a_teachers_work_is_counted_once(address: str) -> None:
    """Of the same towers: a third of forward and backward more, but for the logits."""
    plain, taught = (
        student(Config(architecture="clipmill-tiny")),
        student(Config(architecture="clipmill-tiny", teacher=address)),
    )
    counts = [Work(method).of(batch(method)) for method in (plain, taught)]
    assert counts[0] and counts[1]
    assert counts[1] / counts[0] == pytest.approx(4 / 3, rel=0.03)


def test_slip_learns_from_a_teacher_of_its_first_view(address: str) -> None:
    method = Slip(replace(Slip.smallest(), teacher=address))
    method.prepare_training()
    given = batch(method, 4)
    views = given["image"][:, None].repeat(1, 3, 1, 1, 1)
    views[:, 1:] = 255 - views[:, 1:]
    theirs = method.targets({"views": views, "text": given["text"]})
    assert method.teacher is not None
    expected = method.teacher(given["image"], given["text"])
    assert torch.equal(theirs["teacher_image"], expected[0]) and torch.equal(theirs["teacher_text"], expected[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "ViT-B-32"}, "teacher.*ARCHITECTURE:WEIGHTS"),
        ({"teacher": "ViT-B-32:"}, "teacher.*ARCHITECTURE:WEIGHTS"),
        ({"teacher": "ViT-B-33:openai"}, "architecture"),
        ({"teacher": "ViT-B-32:nonsense"}, "pretrained"),
        ({"teacher": "ViT-B-16-SigLIP:webli"}, "teacher.*tokenizer"),
        ({"teacher": "clipmill-tiny:{folder}", "context_length": 99}, "teacher.*99 tokens"),
    ],
)
def test_wrong_teachers_are_told_before_anything_is_built(changes: dict[str, Any], message: str, address: str) -> None:
    known = {key: value.format(folder=address.partition(":")[2]) if isinstance(value, str) else value
             for key, value in changes.items()}  # fmt: skip
    with pytest.raises(SettingError, match=message):
        Clip.check(Config(architecture="clipmill-tiny", **known))


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_the_share_is_a_share(share: float) -> None:
    with pytest.raises(SettingError, match="distillation"):
        Config(distillation=share)
