"""Teachers with made-up weights: scores by transformers' own functions, and the same boxes alone and in a batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
import transformers

from pipeline.errors import SettingError
from pipeline.evaluation import grounding_teachers
from pipeline.evaluation.grounding_teachers import GroundingDinoTeacher, LoadGroundingTeacher, Owlv2Teacher
from pipeline.loaders.grounding_prompts import SpanTokenizer
from pipeline.models.detections import GroundedBoxes
from pipeline.models.glip import Glip
from pipeline.stages.annotate.pseudo_box_maker import FoundBoxes, GroundingTeacher

CAPTIONS = ("a red dog and a cat.", "the dog", "cat cat cat on a red bus near the dog", "bus. dog")
SPANS = (((2, 9), (16, 19)), ((4, 7),), ((0, 3), (4, 7), (20, 27)), ((0, 3), (5, 8)))
SIDES = ((40, 60), (60, 40), (48, 48), (41, 62))
WORDS = ("a", "red", "dog", "and", "cat", "the", "on", "bus", "near")


def images() -> list[bytes]:
    made = []
    for seed, (height, width) in enumerate(SIDES):
        pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8)
        large = pixels.repeat(-(-height // pixels.shape[0]), 0).repeat(-(-width // pixels.shape[1]), 1)
        made.append(simplejpeg.encode_jpeg(np.ascontiguousarray(large[:height, :width]), quality=95))
    return made


@pytest.fixture(scope="module")
def grounding_dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Grounding DINO with the token numbers of bert-base-uncased, which transformers' code relies on."""
    folder = tmp_path_factory.mktemp("grounding-dino")
    words = [f"[unused{number}]" for number in range(1040)]
    for number, word in {
        0: "[PAD]",
        100: "[UNK]",
        101: "[CLS]",
        102: "[SEP]",
        103: "[MASK]",
        1012: ".",
        1029: "?",
    }.items():
        words[number] = word
    words[1030 : 1030 + len(WORDS)] = WORDS
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    size = {"shortest_edge": 96, "longest_edge": 160}
    processor = transformers.GroundingDinoProcessor(transformers.GroundingDinoImageProcessor(size=size), tokenizer)
    swin = transformers.SwinConfig(
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )
    text = transformers.BertConfig(
        vocab_size=1040, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config = transformers.GroundingDinoConfig(
        backbone_config=swin,
        text_config=text,
        d_model=32,
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_layers=2,
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        num_queries=12,
        max_text_len=24,
        fusion_droppath=0.0,
        fusion_dropout=0.0,
        layer_norm_eps=1e-5,
        disable_custom_kernels=True,
    )
    torch.manual_seed(0)
    model = transformers.GroundingDinoForObjectDetection(config)
    with torch.no_grad():  # a pretrained one tells tokens apart
        model.model.text_projection.weight.mul_(20)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def sorted_boxes(found: FoundBoxes) -> np.ndarray:
    rows = np.concatenate([found.spans[:, None], found.scores[:, None], found.boxes], axis=1)
    return rows[np.lexsort(rows.round(4).T)]


def alone_and_together(teacher: GroundingTeacher) -> list[FoundBoxes]:
    prepared = [teacher.prepare(content) for content in images()]
    together = teacher.ground(prepared, CAPTIONS, SPANS)
    for number, image in enumerate(prepared):
        (alone,) = teacher.ground([image], [CAPTIONS[number]], [SPANS[number]])
        assert len(alone.boxes) == len(together[number].boxes) > 0
        assert np.allclose(sorted_boxes(alone), sorted_boxes(together[number]), atol=2e-3)
    return together


def test_grounding_dino_gives_the_same_boxes_alone_and_in_a_batch(grounding_dino: Path) -> None:
    teacher = GroundingDinoTeacher(str(grounding_dino))
    together = alone_and_together(teacher)
    for one, spans in zip(together, SPANS, strict=True):
        assert set(one.spans.tolist()) == set(range(len(spans))) and one.cut == (False,) * len(spans)
    assert teacher.prepare(b"no image") is None


def test_scores_of_grounding_dino_are_means_over_the_tokens_of_a_span(grounding_dino: Path) -> None:
    """Against transformers' own processor and model, for one image and caption."""
    teacher = GroundingDinoTeacher(str(grounding_dino))
    image = teacher.prepare(images()[0])
    assert image is not None
    (found,) = teacher.ground([image], [CAPTIONS[0]], [SPANS[0]])
    processor: Any = transformers.AutoProcessor.from_pretrained(grounding_dino)
    model: Any = transformers.GroundingDinoForObjectDetection.from_pretrained(grounding_dino).eval()
    height, width = teacher.size(image)
    inputs = processor(
        images=image.pixels,
        text=CAPTIONS[0],
        return_tensors="pt",
        images_kwargs={"pad_size": {"height": height, "width": width}},
    )
    with torch.no_grad():
        made = model(**inputs)
    probability = made.logits[0].sigmoid()
    assert inputs["input_ids"][0].tolist()[1:4] == [1030, 1031, 1032]
    expected = torch.stack([probability[:, 2:4].mean(dim=1), probability[:, 6]], dim=1)
    for span in (0, 1):
        mine = np.sort(found.scores[found.spans == span])
        assert np.allclose(mine, np.sort(expected[:, span].double().numpy()), atol=1e-5)
    known = processor.image_processor.post_process_object_detection(made, threshold=0.0, target_sizes=[(40, 60)])[0]
    mine_boxes = found.boxes[found.spans == 1]
    assert np.allclose(np.sort(mine_boxes, axis=0), np.sort(known["boxes"].numpy(), axis=0), atol=1e-3)


def test_a_phrase_beyond_the_limit_of_grounding_dino_is_cut(grounding_dino: Path) -> None:
    teacher = GroundingDinoTeacher(str(grounding_dino))
    caption = "dog " * 30 + "cat"
    image = teacher.prepare(images()[0])
    assert image is not None
    found, _ = teacher.ground([image, image], [caption, "dog"], [((0, 3), (120, 123)), ((0, 3),)])
    assert found.cut == (False, True) and set(found.spans.tolist()) == {0}
    (alone,) = teacher.ground([image], [caption], [((0, 3), (120, 123))])
    assert np.allclose(sorted_boxes(alone), sorted_boxes(found), atol=2e-3)


@pytest.fixture(scope="module")
def owlv2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("owlv2")
    letters = [chr(number) for number in range(97, 123)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {"!": 0, **{token: number + 1 for number, token in enumerate(tokens)}}
    tokenizer = transformers.CLIPTokenizerFast(vocab=vocab, merges=[], pad_token="!", model_max_length=7)
    images_of = transformers.Owlv2ImageProcessor(size={"height": 48, "width": 48})
    text = {
        "vocab_size": len(vocab),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 7,
        "eos_token_id": len(vocab) - 1,
        "bos_token_id": len(vocab) - 2,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 48,
        "patch_size": 16,
    }
    torch.manual_seed(0)
    model = transformers.Owlv2ForObjectDetection(
        transformers.Owlv2Config(text_config=text, vision_config=vision, projection_dim=32)
    )
    model.save_pretrained(folder)
    transformers.Owlv2Processor(images_of, tokenizer).save_pretrained(folder)
    return folder


def test_owlv2_gives_the_same_boxes_alone_and_in_a_batch(owlv2: Path) -> None:
    teacher = Owlv2Teacher(str(owlv2))
    (first, *_) = alone_and_together(teacher)
    assert first.cut == (True, False)  # "red dog" needs eight tokens of seven, "cat" five


def test_scores_of_owlv2_are_those_of_transformers(owlv2: Path) -> None:
    teacher = Owlv2Teacher(str(owlv2))
    image = teacher.prepare(images()[0])
    assert image is not None
    (found,) = teacher.ground([image], ["a dog, cat"], [((2, 5), (7, 10))])
    processor: Any = transformers.AutoProcessor.from_pretrained(owlv2)
    model: Any = transformers.Owlv2ForObjectDetection.from_pretrained(owlv2).eval()
    inputs = processor(images=image.pixels, text=[["dog", "cat"]], return_tensors="pt")
    with torch.no_grad():
        made = model(**inputs)
    known = processor.image_processor.post_process_object_detection(made, threshold=0.0, target_sizes=[(40, 60)])[0]
    assert found.scores.max() == pytest.approx(known["scores"].max().item(), abs=1e-5)
    for span, scores in enumerate(made.logits[0].sigmoid().T):
        assert np.allclose(np.sort(found.scores[found.spans == span]), np.sort(scores.numpy()), atol=1e-5)
    first = found.boxes[found.spans == 0]
    assert np.allclose(np.sort(first, axis=0), np.sort(known["boxes"].numpy(), axis=0), atol=1e-3)


def test_unusable_teachers(grounding_dino: Path, owlv2: Path) -> None:
    for teacher in ("", "owlv2:/no/such/folder", f"owlv2:{grounding_dino}", f"grounding-dino:{owlv2}", "/no/run"):
        with pytest.raises(SettingError):
            LoadGroundingTeacher(teacher=teacher, device="cpu")(1)
    with pytest.raises(SettingError, match="grounds phrases"):
        LoadGroundingTeacher(teacher="clipmill-tiny:untrained", device="cpu")(1)
    assert LoadGroundingTeacher(teacher=f"owlv2:{owlv2}", device="cpu")(1).facts["teacher_name"] == str(owlv2)


def test_large_images_are_made_smaller_and_their_boxes_larger(owlv2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method's boxes are in the pixels that it gets, those of the teacher in the pixels of the stored image."""

    class Middle(torch.nn.Module):
        tokenizer, config = SpanTokenizer.load("drawn"), Glip.smallest()

        def ground(self, images: Any, captions: Any, spans: Any) -> list[GroundedBoxes]:
            sizes = [torch.tensor([one.shape[2], one.shape[1]] * 2) for one in images]
            boxes = [size * torch.tensor([[0.25, 0.25, 0.75, 0.75]]) for size in sizes]
            return [GroundedBoxes(box, torch.ones(1), torch.zeros(1, dtype=torch.int64)) for box in boxes]

    monkeypatch.setattr(grounding_teachers, "LARGEST", 30)
    teacher = grounding_teachers.CheckpointTeacher(Middle(), "middle")
    image = teacher.prepare(images()[0])
    assert image is not None and image.pixels.shape == (3, 20, 30) and teacher.shape(image) == (40, 60)
    (found,) = teacher.ground([image], ["star " * 300 + "star"], [[(0, 4), (1500, 1504)]])
    assert found.boxes.tolist() == [[15, 10, 45, 30]] and found.cut == (False, True)
