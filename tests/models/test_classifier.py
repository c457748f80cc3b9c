"""Fine-tuning with a head: the zero-shot start against the evaluation's, mixing against its formula, what is locked."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import SettingError
from pipeline.evaluation.suite import Evaluations, evaluate
from pipeline.evaluation.zero_shot import classifier, own_head, zero_shot
from pipeline.loaders.batches import LoaderConfig
from pipeline.loaders.readers import LabelReader
from pipeline.loaders.samples import UnreadableSample
from pipeline.models.classifier import Classifier, Config
from pipeline.models.clip import Clip
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Snapshot
from pipeline.shards.storage import Folder
from pipeline.training.average import wise_ft, write_start
from pipeline.training.checkpoint import load_method
from pipeline.training.gradient_cache import backward_in_parts
from pipeline.training.launch import launch
from pipeline.training.optimizer import AdamW
from pipeline.training.run import Run, prepare

NAMES = ("red", "green", "blue", "yellow")


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("resnet")
    (folder / "fine-resnet.json").write_text(
        '{"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": null}, '
        '"text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}'
    )
    open_clip.add_model_config(folder)
    return "fine-resnet"


def build(**changes: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(replace(Classifier.smallest(), **changes))


def batch(method: Clip, rows: int = 6) -> dict[str, Tensor]:
    side = method.transforms(False).size[0]
    images = torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return {"image": images, "label": torch.arange(rows) % 4}


def test_it_starts_as_the_zero_shot_model() -> None:
    method = build(prompts=("a {} thing", "{}")).eval()
    vectors = classifier(method, NAMES, ("a {} thing", "{}"))
    images = batch(method)["image"]
    with torch.no_grad():
        wanted = method.logit_scale.exp() * method.encode_image(images) @ vectors.T
        torch.testing.assert_close(method.classify(images), wanted, rtol=1e-4, atol=1e-4)
    given = [batch(method)]
    head, nearest = own_head(method, given, NAMES), zero_shot(method, given, vectors)
    assert head == nearest


def test_the_loss_is_torchs_with_smoothed_labels() -> None:
    method = build(label_smoothing=0.2).eval()
    given = batch(method)
    wanted = functional.cross_entropy(method.classify(given["image"]), given["label"], label_smoothing=0.2)
    torch.testing.assert_close(method(given)["classification"], wanted)


@pytest.mark.parametrize("architecture", ["clipmill-tiny", "clipmill-small", "resnet"])
@pytest.mark.parametrize("features", ["joint", "tower"])
def test_all_that_learns_has_a_gradient_and_nothing_else(architecture: str, features: Any, resnet: str) -> None:
    name = resnet if architecture == "resnet" else architecture
    method = build(architecture=name, features=features, head="random").train()
    method(batch(method))["classification"].backward()
    learns = {key for key, parameter in method.named_parameters() if parameter.requires_grad}
    assert learns == {key for key, parameter in method.named_parameters() if parameter.grad is not None}
    assert all(key.startswith(("model.visual.", "head.")) for key in learns)
    projected = {key for key, _ in method.named_parameters() if key.startswith("model.visual.")} - learns
    assert bool(projected) == (features == "tower")


def test_a_zero_head_knows_nothing_yet() -> None:
    method = build(head="zero", features="tower").eval()
    assert method.classify(batch(method)["image"]).eq(0).all()
    assert method(batch(method))["classification"].item() == pytest.approx(torch.tensor(4.0).log().item())


def test_mixup_is_its_formula() -> None:
    """All that is random is taken from torch's generator: the share is one draw of a Beta."""
    method = build(mixup=0.8).train()
    given = batch(method)
    torch.manual_seed(7)
    loss = method(given)["classification"]
    torch.manual_seed(7)
    torch.multinomial(torch.ones(1), 1)  # which of the mixers, of one
    share = float(torch.distributions.Beta(torch.tensor([0.8]), torch.tensor([0.8])).sample())
    images = (given["image"].float() - method.mean) / method.std
    mixed = share * images + (1 - share) * images.roll(1, 0)
    logits = method._logits(mixed)
    parts = [functional.cross_entropy(logits, labels) for labels in (given["label"], given["label"].roll(1))]
    torch.testing.assert_close(loss, share * parts[0] + (1 - share) * parts[1])


def test_batches_are_mixed_in_training_alone_by_the_seed() -> None:
    method = build(mixup=0.8, cutmix=1.0).train()

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return float(method(batch(method))["classification"].detach())

    assert loss(1) == loss(1) != loss(2)
    method.eval()
    assert loss(1) == loss(2)


def test_parts_of_a_batch_give_its_gradient() -> None:
    whole, parts = build(), build()
    given = batch(whole, rows=7)
    whole(given)["classification"].backward()
    losses = backward_in_parts(parts, given, 3, nullcontext)
    torch.testing.assert_close(losses["classification"], whole(given)["classification"].detach())
    for (name, one), (_, other) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)


def test_training_moves_the_image_tower_alone_and_averages_with_its_start(
    make_snapshot: Callable[..., Snapshot], tmp_path: Path
) -> None:
    settings = Run(
        output_folder=str(tmp_path / "run"),
        data=make_snapshot((16, 16)).folder,
        batch_size=16,
        steps=12,
        warmup_steps=1,
        optimizer=AdamW(learning_rate=3e-3, weight_decay=0.0),
        loader=LoaderConfig(loader_workers=0),
    )
    torch.manual_seed(settings.seed)
    start = Classifier(Classifier.smallest())
    write_start(start, Folder(str(tmp_path / "run" / "start")))
    launch(prepare(Classifier.smallest(), settings)[0])
    tuned = load_method(str(tmp_path / "run"))
    assert isinstance(tuned, Classifier)
    before, after = start.state_dict(), tuned.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(("model.visual.", "head.")) for name in changed)
    middle = wise_ft(str(tmp_path / "run" / "start"), str(tmp_path / "run"), 0.25, load_method).method
    torch.testing.assert_close(
        middle.state_dict()["head.weight"], 0.75 * before["head.weight"] + 0.25 * after["head.weight"]
    )
    evaluated = Evaluations(classification=(settings.data,), classes=str(tmp_path / "names.txt"))
    (tmp_path / "names.txt").write_text("yellow\nblue\ngreen\nred\n")  # any order
    name = Path(settings.data).name
    accuracy = [evaluate(model, evaluated.prepare())[f"classification/{name}/top1"] for model in (start, tuned)]
    assert accuracy[1] == 1.0 > accuracy[0]


def test_a_model_without_a_head_and_classes_it_does_not_know_are_refused(
    make_snapshot: Callable[..., Snapshot],
) -> None:
    clip = Clip(Clip.smallest())
    prepared = Evaluations(classification=("drawn_shapes",), evaluation_samples=4).prepare()
    with pytest.raises(SettingError, match="jobs/finetune.py"):
        evaluate(clip, prepared)
    with pytest.raises(SettingError, match="'disc'.*those of the model's head"):
        evaluate(build(), prepared)


def test_the_labels_may_be_numbers() -> None:
    def read(label: str, classes: tuple[str, ...] = NAMES) -> int:
        record = b'{"label": %s}' % label.encode()
        return LabelReader(classes=classes).read(Sample("0", {"json": record}), None)["label"]

    assert read('"blue"') == read("2") == 2
    assert read("7", ("5", "7")) == read('"7"', ("5", "7")) == 1
    for wrong in ("4", "-1", "true", "null", '"pink"', "1.0"):
        with pytest.raises(UnreadableSample):
            read(wrong)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"features": "tower"}, "features"),
        ({"class_names": ("a", "a")}, "class_names"),
        ({"prompts": ()}, "prompts"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"mixup": -1.0}, "mixup"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingError, match=field):
        Config(**changes)


def test_classes_are_needed() -> None:
    with pytest.raises(SettingError, match="class_names"):
        Classifier.check(Config())
