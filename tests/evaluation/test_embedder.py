"""The features are those of open_clip's own transform, tokenizer and towers; their maker depends on every weight."""

import io
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import pipeline.models.towers.openclip  # noqa: F401  # registers clipmill-tiny
from pipeline.evaluation.embedder import LoadEmbedder, ModelEmbedder
from pipeline.evaluation.models import load_model
from pipeline.models.clip import Clip
from pipeline.models.towers.weights import digest_of
from pipeline.shards.sample import Sample


def png(seed: int, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_features_are_open_clips(tmp_path: Path) -> None:
    """Against its own preprocessing in Pillow; one rounding of 8 bits apart."""
    method = load_model("clipmill-tiny:untrained", "cpu")
    assert isinstance(method, Clip)
    model, side = method.model.eval(), method.transforms(False).size[0]
    preprocess = open_clip.image_transform(side, is_train=False, mean=method.model.visual.image_mean)
    embedder = ModelEmbedder(method)
    images, texts = [png(seed, (side + 5 * seed, side)) for seed in range(3)], ["a cat", "two dogs", ""]
    samples = [Sample("s", {"png": image, "txt": text.encode()}) for image, text in zip(images, texts, strict=True)]
    prepared = [embedder.prepare(sample, "image") for sample in samples]
    assert embedder.media == ("image", "text") and all(one is not None for one in prepared)
    with torch.no_grad():
        inputs = torch.stack([preprocess(Image.open(io.BytesIO(image))) for image in images])
        image_features = model.encode_image(inputs, normalize=True).numpy()
        text_features = model.encode_text(method.tokenizer(texts), normalize=True).numpy()
    made = embedder.encode("image", prepared)
    assert (made * image_features).sum(axis=1).min() > 0.999
    np.testing.assert_allclose(
        embedder.encode("text", [embedder.prepare(sample, "text") for sample in samples]), text_features, atol=1e-5
    )
    assert embedder.prepare(Sample("s", {"png": b"no image"}), "image") is None
    assert embedder.prepare(Sample("s", {}), "text") is None


def test_the_maker_changes_with_any_weight_and_setting() -> None:
    method = load_model("clipmill-tiny:untrained", "cpu")
    assert isinstance(method, Clip)
    first = digest_of(method, "a")
    assert first == digest_of(method, "a") != digest_of(method, "b")
    assert ModelEmbedder(method).maker != ModelEmbedder(method, "bf16").maker
    with torch.no_grad():
        next(method.parameters()).view(-1)[0] += 1e-3
    assert digest_of(method, "a") != first


def test_loading_again_gives_the_same_maker() -> None:
    load = LoadEmbedder(checkpoint="clipmill-tiny:untrained", device="cpu")
    assert load(1).maker == load(1).maker


@pytest.mark.parametrize("checkpoint", ["nowhere", "ViT-B-32:no_such_tag"])
def test_a_wrong_checkpoint_is_a_setting_error(checkpoint: str) -> None:
    from pipeline.errors import SettingError

    with pytest.raises(SettingError):
        LoadEmbedder(checkpoint=checkpoint)(1)
