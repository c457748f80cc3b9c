"""The count of a step's work, against a transformer's closed form and published figures, and the table of peaks."""

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.loaders.batches import LoaderConfig, training_batches
from pipeline.loaders.order import Order
from pipeline.models.class_vectors import clip_digest, open_teacher
from pipeline.models.clip import Clip, Config
from pipeline.models.method import Method, build_method, method_class, method_names
from pipeline.shards.snapshot import Snapshot
from pipeline.training import flops
from pipeline.training.flops import Work, peak_of, precision

CPU = torch.device("cpu")
DETECTORS = ("glipv2", "proposals", "vild")
"""What they compute depends on what they find, which shapes alone do not tell: not counted, with a warning."""


def batch(rows: int, length: int, side: int = 64) -> dict[str, Tensor]:
    image = torch.zeros(rows, 3, side, side, dtype=torch.uint8)
    return {"image": image, "text": torch.zeros(rows, length, dtype=torch.int64)}


def transformer(width: int, layers: int, tokens: int, projected: int) -> int:
    """Forward and backward: six times parameters times tokens, and the products of attention (PaLM, appendix B)."""
    parameters = layers * 12 * width**2
    return 6 * (parameters * tokens + width * projected) + layers * 12 * tokens**2 * width


@pytest.mark.parametrize("length", [77, 24, 5])
def test_a_transformers_closed_form(length: int) -> None:
    """clipmill-tiny: a ViT of width 64 on 4 x 4 patches of 16 px and a class token; a text tower of width 32."""
    counted = Work(Clip(Config(architecture="clipmill-tiny"))).of(batch(2, length))
    patches = 2 * 2 * 16 * (3 * 16 * 16) * 64  # the input of the first layer needs no gradient
    logits = 6 * 2 * 2 * 32  # a row against two captions and the reverse, each with two products for the gradient
    assert counted == 2 * (transformer(64, 2, 17, 32) + transformer(32, 2, length, 32) + patches + logits)


def test_a_batch_is_counted_on_the_device_of_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches come from the loader in the CPU's memory. Without a GPU torch gives shapes there no backward pass."""
    work, seen = Work(Clip(Config(architecture="clipmill-tiny"))), []
    with work._mode:
        scale = work._shapes.model.logit_scale.detach().to("cuda")
    work._shapes.model = nn.ParameterDict({"logit_scale": nn.Parameter(scale)})

    def step(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen.extend(value.device.type for value in batch.values())
        raise RuntimeError

    monkeypatch.setattr(work._shapes, "training_step", step)
    assert work.of(batch(2, 9)) is None and seen == ["cuda", "cuda"]


def test_the_papers_model_has_the_published_work() -> None:
    """ViT-B/32: open_clip's docs/model_profile.csv has 14.78 GFLOPs forward; nearly three times that both ways."""
    counted = Work(Clip(Config())).of(batch(1, 77, side=224))
    assert counted is not None and counted / 1e9 == pytest.approx(3 * 14.78, rel=0.01)


def test_a_fourth_length_follows_from_three(monkeypatch: pytest.MonkeyPatch) -> None:
    method = Clip(Config(architecture="clipmill-tiny"))
    work = Work(method)
    for length in (30, 8, 9):
        work.of(batch(4, length))
    expected = Work(method).of(batch(16, 70))
    monkeypatch.setattr(flops, "count", None)
    assert work.of(batch(16, 70)) == pytest.approx(expected, rel=1e-9)
    assert work.of(batch(16, 8)) == 4 * work.of(batch(4, 8))  # type: ignore[operator]


class TwoLengths(Method):
    """Attention among frames, and a layer on letters."""

    batch_keys = ("frames", "letters")
    registered_as = "two_lengths"

    def __init__(self) -> None:
        super().__init__(None)
        self.heard, self.read = nn.Linear(4, 8), nn.Linear(4, 16)

    smallest = readers = None  # type: ignore[assignment]

    def lengths(self, batch: Mapping[str, Tensor]) -> Mapping[str, int]:
        return {"frames": batch["frames"].shape[1], "letters": batch["letters"].shape[1]}

    def training_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        heard = self.heard(batch["frames"])
        return {"loss": (heard @ heard.mT).sum() + self.read(batch["letters"]).sum()}


def two_lengths(frames: int, letters: int) -> dict[str, Tensor]:
    return {"frames": torch.zeros(4, frames, 4), "letters": torch.zeros(4, letters, 4)}


@pytest.mark.parametrize(
    ("counted", "asked"),
    [
        ([(300, 8), (100, 9), (250, 4), (120, 40), (310, 20), (90, 5)], (1000, 77)),
        ([(300, 8), (300, 9), (300, 4)], (300, 77)),  # one of them never changes
    ],
)
def test_the_work_of_any_lengths_follows_from_a_few(
    counted: list[tuple[int, int]], asked: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(TwoLengths())
    for lengths in counted:
        work.of(two_lengths(*lengths))
    expected = Work(TwoLengths()).of(two_lengths(*asked))
    monkeypatch.setattr(flops, "count", None)
    assert work.of(two_lengths(*asked)) == pytest.approx(expected, rel=1e-6)


def test_a_locked_tower_needs_no_backward_pass() -> None:
    method = Clip(Config(architecture="clipmill-tiny"))
    whole = Work(method).of(batch(2, 10))
    for parameter in method.model.visual.parameters():
        parameter.requires_grad_(False)
    locked = Work(method).of(batch(2, 10))
    patches = 2 * 16 * (3 * 16 * 16) * 64
    assert whole is not None and locked is not None
    assert whole - locked == 2 * (transformer(64, 2, 17, 32) * 2 // 3 + patches)


@pytest.mark.parametrize("name", method_names())
def test_every_method_is_counted_and_left_as_it_was(name: str, make_snapshot: Callable[..., Snapshot]) -> None:
    teacher = open_teacher("clipmill-tiny:untrained")
    width = teacher.encode_text(teacher.tokenizer(["a word"])).shape[1]
    snapshot = make_snapshot((12, 12), regions=(clip_digest(teacher), width))
    method: Method = build_method(method_class(name).smallest())
    before = {key: value.clone() for key, value in method.state_dict().items()}
    order = Order([shard.samples for shard in snapshot.shards], seed=0, batch_size=4, lanes=2)
    config = LoaderConfig(loader_workers=0)
    found = next(training_batches(snapshot, method.readers(train=True), order, steps=range(1), config=config))
    del found["replaced"]
    state = torch.get_rng_state()
    counted = Work(method).of(found)
    if name in DETECTORS:
        assert counted is None
    else:
        assert counted is not None and counted > 1e6
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in method.state_dict().items())
    assert all(parameter.grad is None for parameter in method.parameters())


def test_a_step_that_looks_into_its_tensors_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    method = Clip(Config(architecture="clipmill-tiny"))

    def looks(self: Clip, batch: Any) -> dict[str, Tensor]:
        return {"loss": self.logit_scale * float(batch["image"].sum())}

    method.training_step = MethodType(looks, method)  # type: ignore[method-assign]
    work = Work(method)
    assert work.of(batch(2, 5)) is None and work.of(batch(2, 6)) is None
    assert len([record for record in caplog.records if "not counted" in record.message]) == 1


@pytest.mark.parametrize(
    ("name", "bf16", "tf32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7),
        ("NVIDIA H100 PCIe", 756.0, 378.0),
        ("NVIDIA H100 NVL", 835.5, 417.5),
        ("NVIDIA H200", 989.4, 494.7),
        ("NVIDIA A100-SXM4-80GB", 312.0, 156.0),
        ("NVIDIA A100-PCIE-40GB", 312.0, 156.0),
        ("NVIDIA L40S", 362.0, 183.0),
        ("NVIDIA L4", 121.0, 60.0),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("Tesla T4", None, None),
        ("cpu", None, None),
    ],
)
def test_peaks_by_name(name: str, bf16: float | None, tf32: float | None) -> None:
    assert (peak_of(name, "bf16"), peak_of(name, "tf32")) == (bf16, tf32)


def test_precision_is_what_matrix_products_run_in() -> None:
    assert [precision(CPU, True), precision(CPU, False)] == ["bf16", "fp32"]
    gpu, before = torch.device("cuda"), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert precision(gpu, False) == "tf32"
        torch.set_float32_matmul_precision("highest")
        assert precision(gpu, False) == "fp32"
    finally:
        torch.set_float32_matmul_precision(before)
