"""Retrieval and classification of videos against brute force, the authors' protocols by hand, and a perfect model."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import SettingError
from pipeline.evaluation.media import encode_inputs, encoded_media, medium_reader
from pipeline.evaluation.retrieval import Ranking, dual_softmax, match_ranks, retrieval_metrics
from pipeline.evaluation.suite import Evaluations, evaluate
from pipeline.evaluation.zero_shot import classifier, prompt_vectors, zero_shot
from pipeline.loaders.clip_views import ClipViewsReader, SideCrop
from pipeline.loaders.images import ImageTransform
from pipeline.models import clip, clip4clip
from pipeline.models.clip import Clip
from pipeline.models.clip4clip import Clip4Clip
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Snapshot
from tests.evaluation.conftest import COLOURS, ColourModel, image
from tests.evaluation.moving_colours import MovingColourModel, PairModel, sample, video

MakeSnapshot = Callable[..., Snapshot]
CLASSES = list(COLOURS)


@pytest.fixture
def classes_file(tmp_path: Any) -> str:
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    return str(tmp_path / "classes.txt")


def run(model: object, **sets: Any) -> dict[str, float]:
    return evaluate(model, Evaluations(**sets, evaluation_batch=4, evaluation_threads=2).prepare())


# Classification


def test_videos_are_named_by_the_mean_of_their_frames(make_snapshot: MakeSnapshot, classes_file: str) -> None:
    rows = [sample(colour) for colour in CLASSES] + [
        sample("red", "blue", "blue", "blue"),
        {**sample("red"), "mp4": b""},
    ]
    folder = make_snapshot(rows).folder
    assert encoded_media(MovingColourModel()) == ("video", "text")
    found = run(MovingColourModel(), zero_shot=(f"it={folder}",), classes=classes_file)
    assert found["zeroshot/it/top1"] == 0.75 and found["zeroshot/it/samples"] == 4  # the fourth is mostly blue


def test_views_of_a_video(make_snapshot: MakeSnapshot, classes_file: str) -> None:
    """Four clips of segments show every frame; three crops of a wide video show what the central one does not."""
    model, rows = MovingColourModel(), [sample("red"), sample("green")]
    reader = medium_reader(model, "video", clips=2, crops=1)
    assert isinstance(reader, ClipViewsReader)
    body = video("red", "green", "blue", "red")
    batch = reader.collate([reader.read(Sample("s", {"mp4": body}))])
    assert batch["video"].shape == (1, 2, 4, 3, 16, 16) and batch["video_mask"].all()
    seen = model.encode_image(batch["video"][0, 0])
    torch.testing.assert_close(seen.argmax(dim=1), torch.tensor([0, 1, 2, 0]))
    folder = make_snapshot(rows).folder
    settings = f"it={folder},clips=4,crops=3"
    assert run(model, zero_shot=(settings,), classes=classes_file)["zeroshot/it/top1"] == 1
    for wrong, sentence in (
        ("clips=0", "clips: got 0"),
        ("crops=2", "crops: got 2"),
        ("clips=1,crops=9", "crops: got 9"),
    ):
        with pytest.raises(SettingError, match=sentence):
            run(model, zero_shot=(f"it={folder},{wrong}",), classes=classes_file)
    images = make_snapshot([{"png": rows[0]["mp4"], "json": rows[0]["json"]}], name="images").folder
    with pytest.raises(SettingError, match="clips, crops.*1 for image"):
        run(ColourModel(), zero_shot=(f"it={images},clips=2",), classes=classes_file)


def test_side_crops_are_slices_of_the_resized_frame() -> None:
    """The middle one is the evaluation's own crop."""
    wide = np.random.default_rng(0).integers(0, 256, (20, 50, 3), np.uint8)
    plain = ImageTransform(size=(10, 10))
    whole = ImageTransform(size=(10, 25), fit="squash")(wide)
    cuts = [SideCrop(size=(10, 10), where=where)(wide) for where in (0.0, 0.5, 1.0)]
    assert torch.equal(cuts[0], whole[:, :, :10]) and torch.equal(cuts[2], whole[:, :, 15:])
    assert torch.equal(cuts[1], plain(wide))
    tall = wide.transpose(1, 0, 2)
    below = SideCrop(size=(10, 10), where=1.0)(tall).transpose(1, 2)
    assert int((below.int() - cuts[2].int()).abs().max()) <= 2  # the two passes of the resize round in another order


def test_prompts_are_joined_by_probabilities() -> None:
    """The mean over templates of the softmax of 100 x cosines: with loops, in the order templates x classes."""
    model, templates = ColourModel(), ("{}", "a very long prompt with the colour {}")
    vectors = prompt_vectors(model, CLASSES, templates)
    assert vectors.shape == (2, 3, 3)
    for number, template in enumerate(templates):
        torch.testing.assert_close(vectors[number], classifier(model, CLASSES, (template,)))
    features = functional.normalize(torch.rand(20, 3), dim=-1)
    labels = torch.randint(0, 3, (20,))
    by_hand = []
    for feature in features:
        shares = [(100 * vectors[number] @ feature).softmax(dim=0) for number in range(2)]
        by_hand.append(int((sum(shares) / 2).argmax()))

    class Given(MovingColourModel):
        def encode_video(self, video: Tensor, mask: Tensor | None = None) -> Tensor:
            return video

    found = zero_shot(Given(), [{"video": features, "label": labels}], vectors, medium="video")
    assert found["top1"] == pytest.approx(np.mean([one == label for one, label in zip(by_hand, labels, strict=True)]))


def test_the_models_own_prompts(make_snapshot: MakeSnapshot, classes_file: str) -> None:
    folder = make_snapshot([sample(colour) for colour in CLASSES]).folder
    settings = f"it={folder},templates=model,ensemble=probabilities"
    assert run(MovingColourModel(), zero_shot=(settings,), classes=classes_file)["zeroshot/it/top1"] == 1

    class Without(MovingColourModel):
        prompt_templates = ()  # type: ignore[assignment]

    with pytest.raises(SettingError, match="templates: got 'model'"):
        run(Without(), zero_shot=(settings,), classes=classes_file)


def test_a_head_for_videos(make_snapshot: MakeSnapshot, classes_file: str) -> None:
    class Head(MovingColourModel):
        classes = ("blue", "red", "green")

        def classify_video(self, video: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.encode_video(video, mask)[:, [2, 0, 1]]

    folder = make_snapshot([sample(colour) for colour in CLASSES]).folder
    sets = (f"it={folder}", f"more={folder},clips=3,crops=3")
    found = run(Head(), classification=sets, classes=classes_file)
    assert found["classification/it/top1"] == found["classification/more/top1"] == 1
    with pytest.raises(SettingError, match="no head"):
        run(MovingColourModel(), classification=(f"it={folder}",), classes=classes_file)


# Models of images


def test_a_model_of_images_reads_videos_by_their_frames(make_snapshot: MakeSnapshot, classes_file: str) -> None:
    """The mean of one frame a second: by the set's options, and by default where a set has no images."""
    rows = [sample("red", "red", "blue"), sample("green"), sample("blue", "blue", "red", caption="a blue one")]
    folder, images = make_snapshot(rows).folder, ColourModel()
    for setting in ("", ",medium=video", ",medium=video,crops=3"):
        found = run(images, zero_shot=(f"it={folder}{setting}",), classes=classes_file)
        assert found["zeroshot/it/top1"] == 1 and found["zeroshot/it/samples"] == 3
    for setting in ("", ",media=video+text"):
        found = run(images, retrieval=(f"it={folder}{setting}",))
        assert found["retrieval/it/t2v_r1"] == found["retrieval/it/v2t_r1"] == 1
    with pytest.raises(SettingError, match="clips: got 4.*uniform"):
        run(images, zero_shot=(f"it={folder},clips=4",), classes=classes_file)
    assert encoded_media(images) == ("image", "text"), "stored features and search keep their media"
    both = [{**row, "png": image(COLOURS["red"])} for row in rows]
    found = run(images, retrieval=(f"it={make_snapshot(both, name='both').folder}",))
    assert "retrieval/it/i2t_r1" in found and "retrieval/it/v2t_r1" not in found


def test_a_card_of_videos_is_read_by_a_model_of_images() -> None:
    found = run(ColourModel(), zero_shot=("drawn_motions,samples=4",))
    assert found["zeroshot/drawn_motions/samples"] == 4


def test_the_mean_of_frames_is_clip4clips_without_training() -> None:
    torch.manual_seed(0)
    config = clip4clip.Config(architecture="clipmill-tiny", pretrained=None, freeze_layers=None)
    method, plain = Clip4Clip(config).eval(), Clip(clip.Config(architecture="clipmill-tiny")).eval()
    plain.load_state_dict(method.state_dict())
    one = Sample("s", {"mp4": video("red", "green", "blue", "red", "red")})
    batches = [
        reader.collate([reader.read(one)]) for reader in (medium_reader(plain, "video"), medium_reader(method, "video"))
    ]
    assert torch.equal(batches[0]["video"], batches[1]["video"]) and batches[0]["video_mask"].sum() == 5
    with torch.no_grad():
        features = [
            encode_inputs(model, "video", batches[0], torch.device("cpu"))
            for model in (cast(Any, plain), cast(Any, method))
        ]
        frames = functional.normalize(plain.encode_image(batches[0]["video"][0, :5]), dim=-1)
    torch.testing.assert_close(features[0], features[1])
    torch.testing.assert_close(features[0][0], functional.normalize(frames.mean(dim=0), dim=-1))


# Retrieval


def test_videos_and_texts_find_one_another(make_snapshot: MakeSnapshot) -> None:
    rows = [sample(colour) for colour in CLASSES]
    rows.append(sample("red", "green", caption="no colour at all"))
    found = run(MovingColourModel(), retrieval=(f"it={make_snapshot(rows).folder}",))
    assert {"retrieval/it/t2v_r1", "retrieval/it/v2t_mean_rank"} <= set(found)
    assert found["retrieval/it/t2v_r1"] == 1 and found["retrieval/it/samples"] == 4


def several(count: int = 7, width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Features of videos, of one to three captions of each, and their pairs; small whole numbers, with ties."""
    captions = [1 + number % 3 for number in range(count)]
    owners = torch.tensor([number for number, some in enumerate(captions) for _ in range(some)])
    videos = torch.randint(-2, 3, (count, width)).float()
    texts = torch.randint(-2, 3, (len(owners), width)).float()
    return videos, texts, torch.stack([owners, torch.arange(len(owners))], dim=1)


def test_samples_are_ranked_by_their_best_caption() -> None:
    """CLIP4Clip's protocol: captions padded with -inf to one tensor, the best of each video, ranks among videos."""
    videos, texts, pairs = several()
    padded = torch.full((len(videos), 3, len(videos)), -torch.inf)  # owner, caption, video that is scored
    for owner in range(len(videos)):
        own = texts[pairs[pairs[:, 0] == owner, 1]]
        padded[owner, : len(own)] = own @ videos.T
    best = padded.amax(dim=1).T  # video, owner
    ranks = [
        1 + sum(float(score) >= float(row[own]) for n, score in enumerate(row) if n != own)
        for own, row in enumerate(best)
    ]
    of_texts = [
        1 + sum(float(score) >= float(row[owner]) for n, score in enumerate(row) if n != owner)
        for owner in range(len(videos))
        for row in padded[owner]
        if not row.isinf().any()
    ]
    found = retrieval_metrics(videos, texts, pairs, ("v", "t"), Ranking(by_sample=True))
    for name, expected in (("v2t", ranks), ("t2v", of_texts)):
        assert found[f"{name}_r1"] == pytest.approx(np.mean(np.array(expected) <= 1)), name
        assert found[f"{name}_r5"] == pytest.approx(np.mean(np.array(expected) <= 5)), name
        assert found[f"{name}_median_rank"] == np.median(expected)
        assert found[f"{name}_mean_rank"] == pytest.approx(np.mean(expected))
    plain = retrieval_metrics(videos, texts, pairs, ("v", "t"))
    assert plain["v2t_mean_rank"] > found["v2t_mean_rank"] and plain["t2v_mean_rank"] == found["t2v_mean_rank"]


@pytest.mark.parametrize("scores_at_once", [1, 20, 1 << 24])
def test_the_dual_softmax_is_the_product_of_both(scores_at_once: int) -> None:
    queries, gallery = (functional.normalize(torch.randn(rows, 6), dim=-1) for rows in (9, 13))
    pairs = torch.arange(9).repeat(2, 1).T
    logits = 20 * queries @ gallery.T
    product = logits.softmax(dim=0) * logits.softmax(dim=1)
    expected = [1 + int((row > row[own]).sum()) for own, row in enumerate(product)]
    scores = dual_softmax(lambda rows, entries: rows @ entries.T, queries, gallery, 20.0, scores_at_once)
    assert match_ranks(queries, gallery, pairs, scores_at_once, scores).tolist() == expected
    plain = match_ranks(queries, gallery, pairs).tolist()
    assert plain != expected  # what all queries want is worth less


def test_the_dual_softmax_spreads_a_gallery_that_all_want(make_snapshot: MakeSnapshot) -> None:
    """The first video is near to all texts: alone each text finds it, together they find their own."""
    videos, texts = torch.tensor([[0.9, 0.75, 0.75], [0.1, 0.7, 0.1], [0.1, 0.1, 0.7]]), torch.eye(3)
    pairs = torch.arange(3).repeat(2, 1).T
    plain = retrieval_metrics(videos, texts, pairs, ("v", "t"), scale=30.0)
    dual = retrieval_metrics(videos, texts, pairs, ("v", "t"), Ranking(dual_softmax=True), scale=30.0)
    assert plain["t2v_r1"] < dual["t2v_r1"] == 1
    folder = make_snapshot([sample(colour) for colour in CLASSES]).folder
    both = f"it={folder},by_sample=true,dual_softmax=true"
    assert run(MovingColourModel(), retrieval=(both,))["retrieval/it/v2t_r1"] == 1


def test_models_of_pairs_are_compared_pair_by_pair(make_snapshot: MakeSnapshot, classes_file: str) -> None:
    """The score of a pair is that of its best frame, so a text finds a video of which one second is of its colour."""
    rows = [sample("red", "green"), sample("blue"), sample("green", "green", "green", "blue", caption="a green one")]
    folder = make_snapshot(rows).folder
    assert run(PairModel(), retrieval=(f"it={folder}",))["retrieval/it/t2v_r1"] == pytest.approx(1 / 3)
    mean = run(MovingColourModel(), retrieval=(f"it={folder}",))
    assert mean["retrieval/it/t2v_r1"] == 1  # the mean of frames tells them apart
    with pytest.raises(SettingError, match="checkpoint"):
        run(PairModel(), zero_shot=(f"it={folder}",), classes=classes_file)
