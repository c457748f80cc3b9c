"""Two toy methods for tests, found as the real ones are: a signal of one dimension, without images or texts."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.loaders.batches import Batch, Reader, Row, SamplePosition
from pipeline.models.method import EmbeddingMethod
from pipeline.models.towers.layers import Layer
from pipeline.shards.sample import Sample


class SignalReader:
    """A signal and its mean, from one reading of ``npy``."""

    fields = ("npy",)

    def read(self, sample: Sample, at: SamplePosition | None) -> Row:
        signal = torch.from_numpy(np.load(io.BytesIO(sample.fields["npy"])))
        return {"signal": signal, "mean": signal.mean()}

    def collate(self, rows: list[Row]) -> Batch:
        return {key: torch.stack([row[key] for row in rows]) for key in ("signal", "mean")}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the toy is trained with."""

    width: int = 8
    trains: bool = True


class Signals(EmbeddingMethod):
    """Predicts the mean of a signal by a linear layer."""

    batch_keys: ClassVar[tuple[str, ...]] = ("signal", "mean")
    registered_as: ClassVar[str] = "signals"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.linear = nn.Linear(config.width, 1).requires_grad_(config.trains)

    @classmethod
    def smallest(cls) -> Config:
        return Config()

    @classmethod
    def sample_fields(cls, config: Config, settings: Any = None) -> Sequence[str]:
        return SignalReader.fields

    def readers(self, train: bool, *, seed: int = 0, settings: Any = None) -> Sequence[Reader]:
        return [SignalReader()]

    def embed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"predicted": self.linear(batch["signal"])[:, 0]}

    def targets(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"mean": batch["mean"]}

    def compare(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"squared": (embeddings["predicted"] - embeddings["mean"]).square().mean()}

    def layers(self) -> Mapping[str, Layer]:
        return {"linear.weight": Layer("signal", 0)}
