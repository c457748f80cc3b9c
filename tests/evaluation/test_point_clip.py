"""Zero-shot classification of clouds by views, the search of view weights, and ensembles by files of scores."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from pipeline.codecs.point_views import FEW_SHOT, ZERO_SHOT, centred, project, view_images
from pipeline.errors import DataError, SettingError
from pipeline.evaluation.embedder import LoadEmbedder
from pipeline.evaluation.encoder import inference
from pipeline.evaluation.ensemble import joined, read_scores, scores_file, search_weight
from pipeline.evaluation.models import load_model
from pipeline.evaluation.point_clip import (
    CloudEmbedder,
    CloudViews,
    PointClip,
    read_weights,
    search_weights,
    view_scores,
)
from pipeline.evaluation.showcase import model_figures, model_files
from pipeline.evaluation.suite import Evaluations, evaluate
from pipeline.loaders.points import PointReader
from pipeline.loaders.samples import Samples
from pipeline.models.clip import Clip
from pipeline.shards.snapshot import Snapshot, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.sources.drawn.solids import SOLIDS
from pipeline.sources.drawn.source import Drawn
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers

TINY = "clipmill-tiny:untrained"
HERE = Workers(processes_count=0)


@pytest.fixture(scope="module")
def solids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Snapshot]:
    """Small snapshots of both parts."""
    folder = tmp_path_factory.mktemp("solids")
    return {
        split: refresh(
            Drawn(points=True, split=split, samples=32, cloud_points=256),
            Folder(folder / split),
            ShardOptions(),
            HERE,
            card="drawn_solids",
        )
        for split in ("solids", "solids_train")
    }


class Counter(nn.Module):
    """Images as the share of their pixels with points in four quarters; the texts are such shares, too."""

    def __init__(self, prompts: dict[str, list[float]]) -> None:
        super().__init__()
        self.prompts = prompts
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 7.0))
        self.register_buffer("std", torch.full((1, 3, 1, 1), 3.0))

    def transforms(self, train: bool) -> Any:
        return SimpleNamespace(size=(128, 128))

    def tokenizer(self, texts: list[str]) -> Tensor:
        return torch.tensor([self.prompts[text] for text in texts])

    def encode_text(self, text: Tensor) -> Tensor:
        return text

    def encode_image(self, image: Tensor) -> Tensor:
        inputs = (image - self.mean) / self.std
        assert torch.equal(inputs[:, 0], inputs[:, 2])
        filled = (inputs[:, 0] > 1e-3).float()
        return torch.stack([part.mean(dim=(1, 2)) for half in filled.chunk(2, 1) for part in half.chunk(2, 2)], dim=1)


def test_logits_are_the_weighted_sum_of_the_cosines_of_the_views() -> None:
    model = load_model(TINY, "cpu")
    assert isinstance(model, Clip)
    weights = (1.0, 0.5, 0.25, 1.0, 0.75, 0.25)
    seen = PointClip(model, CloudViews(), weights)
    points = centred(torch.randn(3, 200, 3, generator=torch.Generator().manual_seed(0)))
    texts = model.encode_text(model.tokenizer(["a cube", "a sphere", "a cone"]))
    found = seen.encode_points(points) @ texts.T
    size = model.transforms(train=False).size
    for cloud, row in zip(points, found, strict=True):
        total = torch.zeros(3)
        for view, weight in enumerate(weights):
            grid = min(128, *size)
            depth = project(cloud[None], CloudViews().views.__class__(angles=ZERO_SHOT.angles, distance=1.6, grid=grid))
            image = view_images(depth[:, view : view + 1], size)[:, 0]
            feature = model.model.encode_image(image)[0]  # no mean, no deviation
            total += weight * (feature / feature.norm()) @ texts.T
        torch.testing.assert_close(row, total / sum(weights), rtol=1e-4, atol=1e-5)


def test_images_of_both_kinds() -> None:
    cloud, mean, std = torch.zeros(1, 1, 3), torch.full((1, 3, 1, 1), 100.0), torch.full((1, 3, 1, 1), 50.0)
    depth = CloudViews().images(cloud, None, (128, 128), mean, std)
    assert depth.shape == (1, 6, 3, 128, 128)
    inputs = (depth - mean) / std
    assert float(inputs.max()) == pytest.approx(1.6, abs=1e-5) and float(inputs.min()) == pytest.approx(0, abs=1e-5)
    image = CloudViews(pixels="image").images(cloud, None, (128, 128), mean, std)
    assert float(image.max()) == pytest.approx(255 * 0.6) and not float(image.min())
    assert CloudViews(projection="few_shot").images(cloud, None, (224, 224), mean, std).shape == (1, 10, 3, 224, 224)
    small = CloudViews(projection="few_shot").images(cloud, None, (64, 64), mean, std)
    assert ((small - mean) / std)[0, 0, 0].gt(1).sum() == 1  # projected onto 64 pixels, not interpolated


def test_a_model_that_counts_points_classifies_as_by_hand(solids: dict[str, Snapshot], tmp_path: Path) -> None:
    """The class whose prompt is nearest to the mean over views of the shares, computed one cloud at a time."""
    names = [f"{name}" for name in ("sphere", "cube", "cylinder", "cone", "torus", "pyramid", "star prism")]
    names += [
        "cross prism",
        "hourglass",
        "capsule",
        "bowl",
        "table",
        "triangular prism",
        "octahedron",
        "vase",
        "stairs",
    ]
    random = torch.Generator().manual_seed(0)
    shares = torch.rand(16, 4, generator=random)
    model = Counter({name: row for name, row in zip(names, shares.tolist(), strict=True)})
    one = f"solids={solids['solids'].uri},medium=points,templates=none"
    prepared = Evaluations(zero_shot=(one,), evaluation_batch=5).prepare()
    metrics = evaluate(model, prepared)
    samples, right = Samples(solids["solids"]), 0
    texts = shares / shares.norm(dim=1, keepdim=True)
    for number in range(32):
        points = PointReader().read(samples[number])["points"]
        filled = (project(points[None], ZERO_SHOT)[0] > 1e-3).float()
        quarters = [filled[:, :64, :64], filled[:, :64, 64:], filled[:, 64:, :64], filled[:, 64:, 64:]]
        features = torch.stack([quarter.mean(dim=(1, 2)) for quarter in quarters], dim=1)
        cosines = (features / features.norm(dim=1, keepdim=True)) @ texts.T
        right += names[int(cosines.mean(dim=0).argmax())] == json.loads(samples[number].fields["json"])["label"]
    assert metrics["zeroshot/solids/top1"] == metrics["zeroshot/solids/equal_top1"] == right / 32
    assert metrics["zeroshot/solids/searched_samples"] == 0 and metrics["zeroshot/solids/samples"] == 32


def test_the_search_finds_the_only_view_that_knows(solids: dict[str, Snapshot]) -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 4
    scores = torch.randn(40, 3, 4, generator=random)
    scores[torch.arange(40), 1, labels] += 1.5
    weights, best = search_weights(scores, labels)
    by_hand = {
        grid: float((torch.einsum("nvc,v->nc", scores, torch.tensor(grid)).argmax(dim=1) == labels).float().mean())
        for grid in itertools.product((0.25, 0.5, 0.75, 1.0), repeat=3)
    }
    assert best == pytest.approx(max(by_hand.values())) == pytest.approx(by_hand[weights])
    assert weights == next(grid for grid, value in by_hand.items() if value == max(by_hand.values()))
    assert weights[1] > max(weights[0], weights[2])
    assert search_weights(torch.zeros(4, 3, 4), labels[:4])[0] == (0.25,) * 3  # equal weights where all are equal
    with pytest.raises(SettingError, match="search over at most 6 views"):
        search_weights(torch.zeros(2, 10, 4), labels[:2])


def test_results_say_that_weights_were_searched_and_on_what(solids: dict[str, Snapshot]) -> None:
    model = load_model(TINY, "cpu")
    train = solids["solids_train"].uri
    one = f"solids={solids['solids'].uri},medium=points,view_weights=search,search={train},search_samples=20"
    prepared = Evaluations(zero_shot=(one,)).prepare()
    metrics = evaluate(model, prepared)
    assert metrics["zeroshot/solids/searched_samples"] == 20
    files = model_files(model, prepared)
    (record,) = [json.loads(content) for name, content in files.items() if "view_weights" in name]
    assert record["searched"] and record["searched_on"] == train and record["searched_samples"] == 20
    assert len(record["view_weights"]) == 6 and set(record["view_weights"]) <= {0.25, 0.5, 0.75, 1.0}
    figures = model_figures(model, prepared)
    assert [name for name in figures if "clouds" in name]
    given = Evaluations(zero_shot=(f"solids={train},medium=points,view_weights=1+1+1+1+0+0",)).prepare()
    assert evaluate(model, given)["zeroshot/solids/searched_samples"] == 0
    (record,) = [json.loads(one) for name, one in model_files(model, given).items() if "view_weights" in name]
    assert record["view_weights"] == [1, 1, 1, 1, 0, 0] and not record["searched"] and record["searched_on"] == ""


def test_a_search_on_a_copy_of_the_evaluated_data_is_refused(solids: dict[str, Snapshot], tmp_path: Path) -> None:
    """A part of the same clouds, in other shards and under another name; and in the snapshot of an evaluated card."""
    part = Drawn(points=True, split="solids", samples=8, first=24, cloud_points=256)
    copy = refresh(part, Folder(tmp_path / "copy"), ShardOptions(), HERE, card=None).uri
    one = f"{solids['solids'].uri},medium=points,view_weights=search,search={copy}"
    with pytest.raises(DataError, match="the data of the search have clouds of the evaluated ones"):
        evaluate(load_model(TINY, "cpu"), Evaluations(zero_shot=(one,)).prepare())


def test_the_training_part_of_a_card_is_searched() -> None:
    one = "drawn_solids,medium=points,view_weights=search,search=train,search_samples=16,samples=16"
    (ready,) = Evaluations(zero_shot=(one,)).prepare().sets
    search = ready.ready.clouds.search
    assert search.name == "drawn_solids/train" and search.data.source.split == "solids_train"
    assert search.data.source != ready.data.source


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("medium=points,view_weights=search", "search: nothing given"),
        ("medium=points,search=drawn_solids", "search: got 'drawn_solids'"),
        ("medium=points,view_weights=search,search=drawn_solids", "other data than the evaluated ones"),
        ("medium=points,view_weights=1+1", "view_weights: got '1\\+1', expected equal, search, or 6 numbers"),
        ("medium=points,view_weights=0+0+0+0+0+0", "not all 0"),
        ("medium=points,view_weights=1+1+1+1+1+nan", "6 numbers"),
        ("medium=points,view_weights=search,search=x,projection=few_shot", "search over at most 6 views, not 10"),
        ("medium=points,projection=many", "projection"),
        ("medium=image,projection=few_shot", "projection: got 'few_shot', expected 'zero_shot' without medium=points"),
    ],
)
def test_settings_are_refused_before_a_model_is_loaded(options: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Evaluations(zero_shot=(f"drawn_solids,{options}",)).prepare()


def test_images_are_no_clouds_and_models_need_both_towers() -> None:
    model = load_model(TINY, "cpu")
    with pytest.raises(SettingError, match="medium: got 'points', expected data with points"):
        evaluate(model, Evaluations(zero_shot=("drawn_shapes,medium=points,samples=4",)).prepare())
    with pytest.raises(SettingError, match="to see point clouds"):
        PointClip(nn.Linear(2, 2), CloudViews())


def test_read_weights() -> None:
    assert read_weights("equal", 3) == (1.0, 1.0, 1.0) and read_weights("search", 6) is None
    assert read_weights("0.25+1+0", 3) == (0.25, 1.0, 0.0)


def test_stored_features_are_those_of_the_views(solids: dict[str, Snapshot]) -> None:
    load = LoadEmbedder(checkpoint=TINY, device="cpu", clouds=CloudViews(projection="few_shot"))
    embedder = load(1)
    assert isinstance(embedder, CloudEmbedder) and embedder.facts["views"] == FEW_SHOT.count
    samples = Samples(solids["solids"])
    rows = [embedder.prepare(samples[number], "points") for number in range(2)]
    features = embedder.encode("points", rows)
    model = load_model(TINY, "cpu")
    seen = PointClip(model, CloudViews(projection="few_shot"))
    batch = seen.points_reader().collate(rows)
    with torch.no_grad():
        views = seen.encode_views(batch["points"], batch["points_mask"])
    unit = features / np.linalg.norm(features, axis=2, keepdims=True)
    np.testing.assert_allclose(unit, views.numpy(), atol=1e-5)
    assert CloudEmbedder(model, CloudViews()).maker != embedder.maker


def test_bf16_is_for_the_tower_alone(solids: dict[str, Snapshot]) -> None:
    """Views are those of fp32, so features differ only by the rounding of the tower, and are float32."""
    model = load_model(TINY, "cpu")
    inputs: list[Tensor] = []
    model.model.visual.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    samples = Samples(solids["solids"])
    features = []
    for precision in ("fp32", "bf16"):
        embedder = CloudEmbedder(model, CloudViews(), precision)
        features.append(embedder.encode("points", [embedder.prepare(samples[number], "points") for number in range(2)]))
    assert len(inputs) == 2 and torch.equal(inputs[0].float(), inputs[1].float())
    assert features[1].dtype == np.float32 and not np.array_equal(*features)
    cosines = [(one / np.linalg.norm(one, axis=2, keepdims=True)) for one in features]
    assert (cosines[0] * cosines[1]).sum(axis=2).min() > 0.999
    seen = PointClip(model, CloudViews())
    with inference(seen, "bf16"):
        assert seen.encode_points(torch.rand(1, 9, 3)).dtype == torch.float32
    one = f"solids={solids['solids'].uri},medium=points,samples=8"
    prepared = Evaluations(zero_shot=(one,), evaluation_precision="bf16").prepare()
    assert evaluate(model, prepared)["zeroshot/solids/samples"] == 8


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_leaves_the_model_as_it_was(solids: dict[str, Snapshot], training: bool) -> None:
    """A model with batch normalisation, whose statistics would change in training mode."""

    class Normalised(Counter):
        def __init__(self) -> None:
            super().__init__({name: [1.0, 2.0, 3.0, 4.0] for name in SOLIDS})
            self.norm = nn.BatchNorm1d(4)

        def encode_image(self, image: Tensor) -> Tensor:
            normalised: Tensor = self.norm(super().encode_image(image))
            return normalised

    model = Normalised().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train = solids["solids_train"].uri
    one = f"solids={solids['solids'].uri},medium=points,templates=none,samples=4"
    searched = f"again={one.partition('=')[2]},view_weights=search,search={train},search_samples=4"
    prepared = Evaluations(zero_shot=(one, searched)).prepare()
    for _ in range(2):
        evaluate(model, prepared)
        assert model.training == model.norm.training == training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_scores_leave_the_callers_mode_alone(solids: dict[str, Snapshot]) -> None:
    seen = PointClip(load_model(TINY, "cpu"), CloudViews())
    batch = seen.points_reader().collate([seen.points_reader().read(Samples(solids["solids"])[0])])
    width = seen.encode_points(batch["points"]).shape[1]
    for scores, _ in view_scores(seen, [batch, batch], torch.eye(width)[:3], "bf16"):
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        assert scores.dtype == torch.float32 and not scores.requires_grad


# -- Ensembles

CLASSES = ("a", "b", "c")


def test_files_of_scores_are_read_by_key_and_class(tmp_path: Path) -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    (tmp_path / "x.parquet").write_bytes(scores_file(["k1", "k2"], CLASSES, values))
    scores = read_scores(str(tmp_path / "x.parquet"))
    assert scores.of(["k2", "k1"], ("c", "a")).tolist() == [[6, 4], [3, 1]]
    with pytest.raises(SettingError, match="it lacks d"):
        scores.of(["k1"], ("a", "d"))
    with pytest.raises(DataError, match="has no scores of 1 of 2 samples, such as k3"):
        scores.of(["k1", "k3"], CLASSES)


def broken(**changes: Any) -> pa.Table:
    columns = {"key": ["k1", "k2"], "scores": [[1.0, 2.0], [3.0, 4.0]], **changes}
    classes = columns.pop("classes", ["a", "b"])
    table = pa.table({name: value for name, value in columns.items() if value is not None})
    return table.replace_schema_metadata({b"classes": json.dumps(classes).encode()} if classes else {})


@pytest.mark.parametrize(
    "changes",
    [
        {"key": None},
        {"scores": None},
        {"classes": None},
        {"classes": ["a", "b", "c"]},
        {"classes": ["a", "a"]},
        {"classes": [1, 2]},
        {"classes": "ab"},
        {"scores": [[1.0, 2.0], [3.0]]},
        {"scores": [[1.0, 2.0], [3.0, float("nan")]]},
        {"scores": [["x", "y"], ["z", "w"]]},
        {"key": ["k1", "k1"]},
    ],
)
def test_broken_files_of_scores_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    pq.write_table(broken(**changes), tmp_path / "x.parquet")
    with pytest.raises(SettingError, match="^ensemble: "):
        read_scores(str(tmp_path / "x.parquet"))


def test_a_missing_file_of_scores_and_one_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("no parquet")
    for name in ("x.parquet", "y.parquet"):
        with pytest.raises(SettingError, match="^ensemble: "):
            read_scores(str(tmp_path / name))


def test_the_weight_of_an_ensemble_is_the_best_one() -> None:
    labels = torch.tensor([0, 1, 1])
    own = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
    other = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 3.0]])
    # Own is wrong of the third, other of the first: right of all from 3w > 1 - w on, as long as w < 2 (1 - w).
    weight = search_weight(own, other, labels)
    assert weight == 0.3 and (joined(own, other, weight).argmax(dim=1) == labels).all()
    assert search_weight(own, own, labels) == 0.0
    assert torch.equal(joined(own, other, 0.0), own) and torch.equal(joined(own, other, 1.0), other)


def test_the_snapshot_of_clouds_has_a_figure_and_is_whole(solids: dict[str, Snapshot]) -> None:
    from pipeline.loaders.sample_figures import sample_figure

    samples = Samples(read_snapshot(solids["solids"].uri))
    figure = sample_figure([samples[number] for number in range(3)], "three clouds")
    assert len(figure.axes) == 3 and figure.axes[0].get_title(loc="left")
