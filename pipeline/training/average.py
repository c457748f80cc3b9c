"""Averages of checkpoints in weight space: one model with the inference cost of one.

- WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903, section 3): (1 - alpha) zero-shot + alpha fine-tuned, which keeps
  much of the zero-shot model's robustness and most of the gain of fine-tuning; use alpha = 0.5 by default.
- Model soups (Wortsman et al. 2022, arXiv 2203.05482, section 2): the mean of models fine-tuned from one start with
  different settings. Uniform averages all; greedy (recipe 1) tries them from best to worst, and keeps each that
  does not make the mean worse on held-out data.

All floating point tensors are averaged, in float64. Running statistics of batch normalisation are averaged too, which
is only an approximation; the logit scale is averaged in its logarithm. Integers (counters) are the first model's.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pipeline.config import require
from pipeline.errors import SettingError
from pipeline.models.method import Method
from pipeline.shards.storage import Folder, storage_errors
from pipeline.training.checkpoint import META, Content, Meta, checkpoint_folder, read_meta, text_files, write_content

logger = logging.getLogger(__name__)

RECORD = "average.json"
START = Meta(step=0, samples_seen=0, batch_size=1, lanes=1, seed=0, snapshot="")

Weights = Mapping[str, Tensor]
Load = Callable[[str], Method]
"""The method at an address, in evaluation mode."""
Judge = Callable[[Method], float]
"""A score of a method on held-out data; higher is better."""


@dataclass(frozen=True, kw_only=True)
class Average:
    """A method with averaged weights, and the share that each address has in it."""

    method: Method
    shares: Mapping[str, float]
    scores: Mapping[str, float]


def weighted(parts: Iterable[tuple[Weights, float]]) -> dict[str, Tensor]:
    """The sum of share times weights, in the first part's types; integers are the first part's."""
    first: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}
    for weights, share in parts:
        first = first or dict(weights)
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                total[name] = tensor.double() * share + total.get(name, 0)
    return {name: total[name].to(tensor.dtype) if name in total else tensor.clone() for name, tensor in first.items()}


def wise_ft(zero_shot: str, fine_tuned: str, alpha: float, load: Load) -> Average:
    """(1 - alpha) of the zero-shot model and alpha of the fine-tuned one; the method is the latter's.

    Raises:
        SettingError: models of different architectures, or an alpha outside 0 to 1.
    """
    require(0 <= alpha <= 1, "alpha", alpha, "0 (zero-shot) to 1 (fine-tuned)")
    return _mixed({zero_shot: 1 - alpha, fine_tuned: alpha}, fine_tuned, load)


def uniform_soup(members: Sequence[str], load: Load) -> Average:
    """The mean of all ``members``; raises as :func:`wise_ft`."""
    require(len(set(members)) == len(members), "checkpoints", list(members), "two or more, all of them different")
    return _mixed(dict.fromkeys(members, 1 / len(members)), members[-1], load)


def greedy_soup(members: Sequence[str], load: Load, judge: Judge, known: Mapping[str, float] | None = None) -> Average:
    """The mean of the members that do not lower ``judge``, tried from best to worst; raises as :func:`wise_ft`.

    The order is by ``known`` scores if all members have one, else by the judge's.
    """
    first = load(members[0])
    for member in members[1:]:  # before the first evaluation, which may take an hour
        check_alike(first, load(member), members[0], member)
    del first
    scores = dict(known or {})
    if set(scores) != set(members):
        scores = {member: judge(load(member)) for member in members}
    order = sorted(members, key=lambda member: -scores[member])
    method = load(order[0])
    kept, best = [order[0]], judge(method)
    mean = dict(method.state_dict())
    for member in order[1:]:
        other = load(member)
        share = 1 / (len(kept) + 1)
        candidate = weighted([(mean, 1 - share), (other.state_dict(), share)])
        other.load_state_dict(candidate)
        value = judge(other)
        logger.info("with %s %.4f, without %.4f: %s", member, value, best, "kept" if value >= best else "left out")
        if value >= best:
            kept, best, mean = [*kept, member], value, candidate
    method.load_state_dict(mean)
    return Average(method=method, shares=dict.fromkeys(kept, 1 / len(kept)), scores={**scores, "average": best})


def check_alike(first: Method, other: Method, address: str, other_address: str) -> None:
    """Raise ``SettingError`` unless two methods differ only in their weights' values."""
    same = (
        type(first) is type(other) and _architecture(first) == _architecture(other) and _shapes(first) == _shapes(other)
    )
    if not same:
        allowed = f"checkpoints of the architecture of {address}, the same images and the same kind of loss"
        raise SettingError("checkpoints", other_address, allowed)


def write_average(average: Average, folder: Folder, details: Mapping[str, Any]) -> None:
    """Write a checkpoint without optimiser state: for evaluation, export, and ``--pretrained``.

    ``average.json`` lists its members. ``meta.json`` is copied from the last member that has one.

    Raises:
        SettingError: the folder is one of the members.
        StorageError: it cannot be written.
    """
    places = {address: checkpoint_folder(address) for address in average.shares}
    taken = [place.uri for place in places.values() if place is not None]
    require(folder.uri not in taken, "output", folder.uri, "a folder that is none of the checkpoints")
    described, texts = text_files(average.method)
    metas = [meta for meta in (read_meta(place) for place in places.values() if place is not None) if meta is not None]
    meta = replace(metas[-1] if metas else START, evaluate=False, description=described)
    record = {**details, "shares": dict(average.shares), "scores": dict(average.scores)}
    weights = {name: tensor.detach().cpu().clone() for name, tensor in average.method.state_dict().items()}
    with storage_errors(folder.uri):
        folder.delete(META)
        folder.write_atomic(RECORD, json.dumps(record, indent=2).encode())
        write_content(folder, Content(meta=meta, weights=weights, texts=texts))


def write_start(method: Method, folder: Folder) -> None:
    """Write a checkpoint of a method before its first step, to average it with the trained one.

    Raises:
        StorageError: it cannot be written.
    """
    described, texts = text_files(method)
    meta = replace(START, description=described)
    weights = {name: tensor.detach().cpu().clone() for name, tensor in method.state_dict().items()}
    with storage_errors(folder.uri):
        write_content(folder, Content(meta=meta, weights=weights, texts=texts))


def _mixed(shares: Mapping[str, float], base: str, load: Load) -> Average:
    require(len(shares) >= 2, "checkpoints", list(shares), "two or more, all of them different")
    method = load(base)

    def parts() -> Iterable[tuple[Weights, float]]:
        for address, share in shares.items():
            other = load(address)
            check_alike(method, other, base, address)
            yield other.state_dict(), share

    method.load_state_dict(weighted(parts()))
    return Average(method=method, shares=shares, scores={})


def _shapes(method: Method) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in method.state_dict().items()}


def _architecture(method: Method) -> list[str]:
    """The text files without their names: one architecture may have several names."""
    return sorted(method.description().values())
