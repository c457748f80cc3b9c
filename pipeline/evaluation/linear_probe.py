"""Linear probing: the accuracy of a linear classifier on the features of an image tower, or of another medium's.

Two protocols, both on frozen features of the tower before its projection into the space shared with texts:

- ``clip``: Radford et al. 2021, arXiv 2103.00020, section 3.2 and appendix A.3. Logistic regression by L-BFGS with at
  most 1,000 iterations, on one view of each image. Validation images choose the penalty among 97 values from 1e-6 to
  1e6, eight per decade: first every sixteenth, then the interval around the best is halved until it is one step wide.
  The final fit uses training and validation images together. The fits use :class:`CentredCoordinates`, in which the
  problem is the same and L-BFGS needs less time.
- ``slip``: Mu et al. 2021, arXiv 2112.12750, section 4.2, which is MoCo v3's: 90 epochs of SGD with momentum 0.9 in
  batches of 1,024, no penalty, random resized crops that are mirrored half of the time, a cosine from 0.1 x 16 / 256
  (the released code scales by a sixteenth of the factor for this batch size). Features of ``views`` crops of each image
  are computed once and used in turn; the paper uses a new crop in every epoch, which equals ``views=90``.

To hold a run against: ImageNet with the ``slip`` protocol, ViT-B/16 after 25 epochs of YFCC15M, CLIP 66.5, SLIP 72.1.
With ``clip``, the paper's table 10 has ImageNet at 76.1 for ViT-B/32 and 80.2 for ViT-B/16.

Sets with official folds are cross-validated, as ESC-50 and UrbanSound8K: see :mod:`pipeline.evaluation.folds`.
"""

import hashlib
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config import require
from pipeline.errors import SettingError
from pipeline.evaluation.accuracy import FoldCounts, fold_order, label_ranks
from pipeline.evaluation.classes import IMAGENET, Labels, labelled_batches, read_classes
from pipeline.evaluation.data import CardData, Data, open_data
from pipeline.evaluation.encoder import inference
from pipeline.evaluation.media import AUTO, check_medium, encode_inputs, inputs_of, medium_of_set, medium_reader
from pipeline.evaluation.suite import name_and_data
from pipeline.evaluation.task import ACCURACY, FOLDS, Column, PreparedSet, Reading, Report
from pipeline.loaders.batches import Reader
from pipeline.loaders.images import ImageTransform, Pixels, crop_bits
from pipeline.loaders.order import RandomStream, permutation
from pipeline.loaders.readers import ImageReader, read_label
from pipeline.loaders.work_progress import WorkProgress
from pipeline.models.adapters.adapter import Shots
from pipeline.models.adapters.linear_probe import class_rows, regression
from pipeline.models.clip import Clip
from pipeline.models.towers.unprojected import unprojected
from pipeline.sources import open_source

logger = logging.getLogger(__name__)

REPORT = Report("linear_probe", "linear probe", (*ACCURACY, FOLDS, Column("trained_on", "trained on", ",.0f")))
DECADES, WIDEST, FINEST = 6, 2.0, 1 / 8  # the penalty is searched in 10 ** (-6 ... 6)
Chosen = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The training of a linear classifier."""

    protocol: Literal["clip", "slip"] = "clip"
    """clip: L-BFGS with a penalty chosen on validation images; slip: SGD on random crops."""
    features: Literal["tower", "joint"] = "tower"
    """tower: features before the projection; joint: the unit features that are compared with texts."""
    held_out: float = 0.2
    """Part of each class, 0 to 1, held out if no images are given: to choose the penalty, and for the test."""
    iterations: int = 1000
    """Maximum number of L-BFGS iterations."""
    epochs: int = 90
    """Epochs of SGD."""
    learning_rate: float = 0.1 * 16 / 256
    """Initial learning rate of SGD; it falls to zero along a cosine."""
    momentum: float = 0.9
    """Momentum of SGD, 0 to less than 1."""
    batch: int = 1024
    """Images per step of SGD."""
    views: int = 8
    """Random crops per image for SGD."""
    seed: int = 0
    """Seed of crops, order, initial weights, and of the held-out images."""

    def __post_init__(self) -> None:
        require(0 < self.held_out < 1, "held_out", self.held_out, "more than 0, less than 1")
        for name in ("iterations", "epochs", "batch", "views"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "0 to less than 1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2**63 - 1")


@dataclass(frozen=True, kw_only=True)
class ProbeSets:
    """The images, as cards or folders of snapshots; every tuple except the first may be empty."""

    data: tuple[str, ...] = ()
    """Training sets; NAME=DATA gives a set a name. A few-shot card has its own test part."""
    test: tuple[str, ...] = ()
    """Test sets, one per training set; if empty, a part of each class of the data."""
    validation: tuple[str, ...] = ()
    """Validation sets that choose the penalty, one per training set; if empty, a part of each class of the rest."""
    classes: str = "auto"
    """Class names: auto (the card's, ImageNet's for a set named imagenet, else all labels of the data) or a file."""
    label: str = ""
    """Key of the class in the samples' json; empty for the card's; cls for webdataset's member .cls."""
    medium: str = AUTO
    """Medium to classify: auto (the first one that the model encodes and the data have), image, audio."""
    fold: str = ""
    """Key of the fold in the samples' json: each fold is tested once, by a classifier trained on the others."""
    train_samples: int | None = None
    """Training images of each set, at equal distances; none for all of them."""
    test_samples: int | None = None
    """Test images of each set; none for all of them."""
    encoding_batch: int = 64
    """Images per batch of the encoder."""
    encoding_precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the tower."""
    decoding_threads: int = 4
    """Image decoding threads."""

    def __post_init__(self) -> None:
        for name in ("test", "validation"):
            many = len(getattr(self, name))
            require(many in (0, len(self.data)), name, many, f"none, or one for each of the {len(self.data)} of data")
            require(not (many and self.fold), name, many, "none, with --fold: each fold is a test set")
        check_medium(self.medium)
        self.settings()

    def settings(self) -> Reading:
        """The reading and encoding settings, as the evaluations share them."""
        return Reading(
            evaluation_batch=self.encoding_batch,
            evaluation_precision=self.encoding_precision,
            evaluation_threads=self.decoding_threads,
        )

    def prepare(self) -> "tuple[PreparedProbe, ...]":
        """Read cards, manifests and class names.

        Raises:
            SettingError: an unknown set, or invalid class names.
            DataError: an invalid snapshot.
        """
        tests, validations = self.test or ("",) * len(self.data), self.validation or ("",) * len(self.data)
        together = zip(self.data, tests, validations, strict=True)
        prepared = tuple(self._prepared(*one) for one in together)
        names = [one.name for one in prepared]
        require(len(set(names)) == len(names), "data", names, "sets with different names")
        return prepared

    def _prepared(self, data: str, test: str, validation: str) -> "PreparedProbe":
        name, place = name_and_data(data)
        opened = open_data(place)
        pool, tested = (None, None) if test else (part_of(opened, "train"), part_of(opened, "test"))
        card = opened.card
        label = self.label or (card.label if card else "label")

        def of(what: Data, limit: int | None) -> PreparedSet:
            return PreparedSet(name, REPORT.prefix, what, limit, Labels(classes, (), label, self.medium, self.fold))

        classes = self._classes(opened, name, label)
        return PreparedProbe(
            name=name,
            train=of(pool or opened, self.train_samples),
            validation=of(open_data(validation), None) if validation else None,
            test=of(tested or open_data(test), self.test_samples) if test or tested else None,
            classes=classes,
        )

    def _classes(self, data: Data, name: str, label: str) -> tuple[str, ...]:
        if self.classes != "auto" or (data.card and data.card.classes) or name in IMAGENET:
            return read_classes(self.classes, data.card, name)
        return tuple(sorted({str(read_label(sample, label)) for sample in data.samples(None)}))


@dataclass(frozen=True)
class PreparedProbe:
    """A set with its data opened; ``None`` for parts that are held out of the training images."""

    name: str
    train: PreparedSet
    validation: PreparedSet | None
    test: PreparedSet | None
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Linear:
    """A linear classifier: ``weight`` float [C, D], ``bias`` float [C], and the choices of its training."""

    weight: Tensor
    bias: Tensor
    chosen: Chosen

    def logits(self, features: Tensor) -> Tensor:
        """float [N, D] to float [N, C], in the classifier's precision."""
        return features.to(self.weight) @ self.weight.T + self.bias


@dataclass(frozen=True)
class CentredCoordinates:
    """Coordinates of features, for a regression that has the same optimum in fewer and cheaper iterations.

    Features after a ReLU have means far from zero, which makes the problem badly conditioned. Subtracting them changes
    the bias only, which has no penalty. With fewer images than features, the optimal weights lie in the span of the
    centred images; in an orthonormal basis of it, the penalty is the same.
    """

    mean: Tensor
    """float64 [D]."""
    basis: Tensor | None
    """float64 [D, N] with orthonormal columns, if there are fewer images N than features D."""

    @classmethod
    def spanning(cls, shots: Shots) -> "CentredCoordinates":
        """Coordinates for all views of ``shots``."""
        features = shots.features.flatten(0, 1).double()
        mean = features.mean(dim=0)
        few = len(features) < len(mean)
        return cls(mean, torch.linalg.qr((features - mean).T).Q if few else None)

    def of(self, shots: Shots) -> Shots:
        """float [N, V, D] to float64 [N, V, R]; double precision, as in scikit-learn's L-BFGS of the paper."""
        centred = shots.features.double() - self.mean
        return Shots(centred if self.basis is None else centred @ self.basis, shots.labels)

    def back(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [C, R] and biases [C] for these coordinates, as weights [C, D] and biases [C] for features."""
        if self.basis is not None:
            weight = weight @ self.basis.T
        return weight, bias - weight @ self.mean


def part_of(data: Data, part: str) -> CardData | None:
    """The training images (``train``) or test images (``test``) of a card with such parts; else ``None``."""
    card = data.card
    if not isinstance(data, CardData) or card is None or card.few_shot is None or "train" not in card.few_shot.parts:
        return None
    return CardData(open_source({**card.source, **card.few_shot.parts[part]}), card)


def linear_probe(model: Any, sets: tuple[PreparedProbe, ...], settings: Reading, probe: Probe) -> Chosen:
    """Probe on all sets: ``{"linear_probe/<set>/top1": ..., ".../mean_per_class": ..., ".../log10_c": ...}``.

    Raises:
        SettingError: a tower with unknown features before the projection; data with fewer than two classes.
        DataError: no readable sample, a label outside of the classes.
    """
    metrics: Chosen = {}
    for one in sets:
        found = _probe_one(model, one, settings, probe)
        logger.info(
            "%s %s: %s", REPORT.prefix, one.name, ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        )
        metrics |= {f"{REPORT.prefix}/{one.name}/{name}": value for name, value in found.items()}
    return metrics


def _probe_one(model: Any, one: PreparedProbe, settings: Reading, probe: Probe) -> Chosen:
    def features(what: PreparedSet, views: int = 0) -> Shots:
        return embed(model, what, settings, probe, views)

    if one.train.ready.fold:
        return _cross_validate(model, one, settings, probe)
    train = features(one.train, probe.views if probe.protocol == "slip" else 0)
    if one.test is not None:
        test = features(one.test)
    else:
        train, test = split(train, probe.held_out, probe.seed)
    validation = features(one.validation) if one.validation is not None else None
    fitted = fit(train, validation, len(one.classes), probe)
    counts = FoldCounts(len(one.classes))
    counts.add(label_ranks(fitted.logits(test.first_view()), test.labels), test.labels)
    return {**counts.metrics(), "trained_on": float(len(train.labels)), **fitted.chosen}


def _cross_validate(model: Any, one: PreparedProbe, settings: Reading, probe: Probe) -> Chosen:
    """Train on all folds but one and test on that one, for each fold; features are computed once. Means over folds."""
    test, folds = embed_folds(model, one.train, settings, probe)
    train = embed(model, one.train, settings, probe, probe.views) if probe.protocol == "slip" else test
    names = sorted(set(folds), key=fold_order)
    require(len(names) >= 2, "fold", one.train.ready.fold, f"a key with two folds or more; {one.name} has {names}")
    counts, chosen = FoldCounts(len(one.classes)), []
    for name in names:
        inside = torch.tensor([fold == name for fold in folds])
        fitted = fit(_take(train, ~inside), None, len(one.classes), probe)
        held = _take(test, inside)
        counts.add(label_ranks(fitted.logits(held.first_view()), held.labels), held.labels, [name] * len(held.labels))
        chosen.append({"trained_on": float((~inside).sum()), **fitted.chosen})
        logger.info("linear probe %s: fold %s of %d, %d of %d", one.name, name, len(names), len(chosen), len(names))
    means = {name: sum(each[name] for each in chosen) / len(chosen) for name in chosen[0]}
    return {**counts.metrics(), **means}


def fit(train: Shots, validation: Shots | None, classes: int, probe: Probe) -> Linear:
    """A classifier by the probe's protocol.

    Raises:
        SettingError: images of a single class.
    """
    present = len(train.labels.unique())
    require(present >= 2, "data", present, "images of two classes or more, for a linear probe")
    if probe.protocol == "slip":
        return by_sgd(train, classes, probe)
    return by_regression(train, validation, classes, probe)


def by_regression(train: Shots, validation: Shots | None, classes: int, probe: Probe) -> Linear:
    """CLIP's protocol: choose C on ``validation``, or on a part of each class, then fit both together."""
    coordinates = CentredCoordinates.spanning(joined(train, validation))
    train, validation = coordinates.of(train), None if validation is None else coordinates.of(validation)
    part, held = (train, validation) if validation is not None else split(train, probe.held_out, probe.seed)
    fitted: dict[float, Any] = {}
    rounds = round(math.log2(WIDEST / FINEST))
    images = f"linear probe of {len(part.labels)} images"
    progress = WorkProgress(logger, images, "regressions at most", 7 + 2 * rounds)

    def score(logarithm: float) -> float:
        nearest = min(fitted, key=lambda other: abs(other - logarithm), default=None)
        start = None if nearest is None else fitted[nearest]
        fitted[logarithm] = _regressed(part, logarithm, probe, start)
        progress.advance()
        guesses = fitted[logarithm].predict(held.first_view().numpy())
        return float((torch.from_numpy(guesses) == held.labels).double().mean())

    logarithm = search(score)
    last = _regressed(
        joined(train, validation), logarithm, probe, None if validation is not None else fitted[logarithm]
    )
    weight, bias = coordinates.back(*class_rows(last, classes))
    return Linear(weight, bias, {"log10_c": logarithm, "iterations": float(last.n_iter_.max())})


def search(score: Callable[[float], float]) -> float:
    """The best of 97 values of log10 C; at ties the smallest, which has the strongest penalty.

    After the first round, each round tries the two neighbours of the best value, at half of the distance.
    """
    step = WIDEST
    scores = {step * place: score(step * place) for place in range(-3, 4)}
    while step > FINEST:
        step /= 2
        best = _best(scores)
        for side in (best - step, best + step):
            if abs(side) <= DECADES and side not in scores:
                scores[side] = score(side)
    return _best(scores)


def by_sgd(train: Shots, classes: int, probe: Probe) -> Linear:
    """SLIP's and MoCo v3's protocol: SGD over the views in turn."""
    features, labels = train.features, train.labels
    generator = torch.Generator().manual_seed(probe.seed)
    weight = (0.01 * torch.randn(classes, features.shape[2], generator=generator)).requires_grad_()
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=probe.learning_rate, momentum=probe.momentum)
    for epoch in range(probe.epochs):
        optimizer.param_groups[0]["lr"] = probe.learning_rate * (1 + math.cos(math.pi * epoch / probe.epochs)) / 2
        order = torch.from_numpy(permutation(probe.seed, RandomStream.PROBE_ORDER, epoch, 0, len(labels)))
        for rows in order.split(probe.batch):
            logits = features[rows, epoch % features.shape[1]].float() @ weight.T + bias
            optimizer.zero_grad()
            functional.cross_entropy(logits, labels[rows]).backward()
            optimizer.step()
    return Linear(weight.detach(), bias.detach(), {})


def embed(model: Any, one: PreparedSet, settings: Reading, probe: Probe, views: int = 0) -> Shots:
    """Features, float32 [N, V, D] on the CPU: of the evaluation view, or of ``views`` random crops of images.

    A crop is a pure function of (seed, view, image).

    Raises:
        SettingError: random crops of another medium, or features that :func:`tower_features` does not have.
    """
    return embed_folds(model, one, settings, probe, views)[0]


def embed_folds(
    model: Any, one: PreparedSet, settings: Reading, probe: Probe, views: int = 0
) -> tuple[Shots, list[str]]:
    """:func:`embed`, and the fold of each sample if the set has folds."""
    medium = medium_of_set(model, one, one.ready.medium)
    looks = [medium_reader(model, medium)]
    if views:
        require(medium == "image", "protocol", probe.protocol, f"clip, for {medium}: random crops are of images")
        still = model.transforms(train=False)
        looks = [ImageReader(transform=random_view(still, probe.seed, view)) for view in range(views)]
    read = [_one_look(model, one, settings, look, medium, probe.features) for look in looks]
    features = torch.stack([features for features, _, _ in read], dim=1)
    return Shots(features, read[0][1]), read[0][2]


def tower_features(
    model: Any, inputs: Tensor, kind: str = "tower", medium: str = "image", mask: Tensor | None = None
) -> Tensor:
    """The inputs of a medium (images: uint8 [B, 3, H, W]), and their mask, on the model's device to float [B, D].

    A method with ``M_features`` for a medium M gives those as the tower's own, float [B, D].

    Raises:
        SettingError: the tower's own features of a model with an unknown tower.
    """
    if kind == "joint":
        batch = {medium: inputs, **({} if mask is None else {f"{medium}_mask": mask})}
        return encode_inputs(model, medium, batch, inputs.device)
    own = getattr(model, f"{medium}_features", None)
    if own is not None:
        features: Tensor = own(inputs)
        return features
    if medium != "image" or not isinstance(model, Clip):
        raise SettingError(
            "features", kind, f"joint, for {type(model).__name__}, whose {medium} tower is not known here"
        )
    return unprojected(cast(Any, model.model).visual, (inputs.float() - model.mean) / model.std)


def split(shots: Shots, share: float, seed: int) -> tuple[Shots, Shots]:
    """Two parts; ``share`` of each class, rounded down, is in the second.

    Raises:
        SettingError: no class has enough images to hold one out.
    """
    order = torch.from_numpy(permutation(seed, RandomStream.HELD_OUT, 0, 0, len(shots.labels)))
    labels = shots.labels[order]
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        places = (labels == label).nonzero().squeeze(1)
        held[places[: int(share * len(places))]] = True
    enough = bool(held.any())
    require(enough, "held_out", share, "a larger share, more images, or a validation or test set")
    return _take(shots, order[~held].sort().values), _take(shots, order[held].sort().values)


def joined(first: Shots, second: Shots | None) -> Shots:
    """The images of both."""
    if second is None:
        return first
    return Shots(torch.cat([first.features, second.features]), torch.cat([first.labels, second.labels]))


@dataclass(frozen=True, kw_only=True)
class RandomView(ImageTransform):
    """A random crop whose random bits are a hash of the image."""

    seed: int = 0
    view: int = 0

    def __call__(self, pixels: Pixels, random_bits: Any = None) -> Tensor:
        """uint8 [H, W, 3] to uint8 [3, height, width]."""
        digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
        return super().__call__(pixels, crop_bits(self.seed, self.view, int.from_bytes(digest[:8], "big")))


def random_view(still: ImageTransform, seed: int, view: int) -> RandomView:
    """SLIP's crop for linear probing: torchvision's defaults, mirrored half of the time."""
    settings = {field.name: getattr(still, field.name) for field in fields(ImageTransform)}
    return RandomView(**{**settings, "crop": "resized", "scale": (0.08, 1.0), "flip": 0.5}, seed=seed, view=view)


def _one_look(
    model: Any, one: PreparedSet, settings: Reading, look: Reader, medium: str, kind: str
) -> tuple[Tensor, Tensor, list[str]]:
    features, labels, folds = [], [], []
    for batch in labelled_batches(look, one, settings):
        with inference(model, settings.evaluation_precision) as device:
            inputs, *mask = inputs_of(batch, medium, device)
            features.append(tower_features(model, inputs, kind, medium, *mask).float().cpu())
        labels.append(batch["label"])
        folds += batch.get("fold", [])
    return torch.cat(features), torch.cat(labels), folds


def _regressed(shots: Shots, logarithm: float, probe: Probe, start: Any = None) -> Any:
    """A fitted regression, initialised with ``start``, another regression of the same classes."""
    from sklearn.exceptions import ConvergenceWarning

    inputs, targets = shots.features.flatten(0, 1), shots.labels.repeat_interleave(shots.features.shape[1])
    model = regression(10**logarithm, probe.iterations)
    if start is not None:
        model.set_params(warm_start=True)
        model.coef_, model.intercept_ = start.coef_, start.intercept_
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        return model.fit(inputs.numpy(), targets.numpy())


def _best(scores: dict[float, float]) -> float:
    return max(sorted(scores), key=lambda place: scores[place])


def _take(shots: Shots, places: Tensor) -> Shots:
    return Shots(shots.features[places], shots.labels[places])
