"""CLIP against open_clip, and its loss against hand-made numbers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from PIL import Image
from torch import Tensor

from pipeline.errors import DataError, SettingError
from pipeline.models.clip import Clip, Config, contrastive_loss
from pipeline.models.method import decays
from pipeline.models.towers import openclip
from pipeline.models.towers.byte_pairs import byte_pair_tokenizer
from pipeline.training.checkpoint import Checkpoints, Meta, load_method
from pipeline.training.optimizer import AdamW, make_optimizer

TEXTS = ["a red square", "", "two very long captions " * 30, "Ünïcode 123, e = mc²"]


@pytest.fixture(scope="module")
def tiny() -> Clip:
    torch.manual_seed(0)
    return Clip(Clip.smallest()).eval()


def unit(*rows: list[float]) -> Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float64), dim=-1)


def test_loss_of_two_pairs_by_hand() -> None:
    """Orthogonal pairs: every row has logits (2, 0), so the loss is ln(1 + e^-2)."""
    features = unit([1, 0], [0, 1])
    loss = contrastive_loss(features, features, torch.tensor(2.0, dtype=torch.float64))
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-12)


def test_loss_that_is_not_symmetric_by_hand() -> None:
    """Both texts point at the first image: images see (3, 3) and (0, 0), texts see (3, 0) and (3, 0)."""
    images, texts = unit([1, 0], [0, 1]), unit([1, 0], [1, 0])
    image_to_text = math.log(2)
    text_to_image = (math.log(1 + math.exp(-3)) + math.log(1 + math.exp(3))) / 2
    loss = contrastive_loss(images, texts, torch.tensor(3.0, dtype=torch.float64))
    assert float(loss) == pytest.approx((image_to_text + text_to_image) / 2, rel=1e-12)


def test_loss_and_gradients_are_open_clips() -> None:
    torch.manual_seed(0)
    values = []
    for loss in (contrastive_loss, lambda images, texts, scale: ClipLoss()(images, texts, scale)):
        torch.manual_seed(1)
        images, texts = (torch.randn(16, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
        scale = torch.tensor(2.659, dtype=torch.float64, requires_grad=True)
        total = loss(
            torch.nn.functional.normalize(images, dim=-1), torch.nn.functional.normalize(texts, dim=-1), scale.exp()
        )
        total.backward()
        values.append((total.detach(), images.grad, texts.grad, scale.grad))
    for ours, theirs in zip(*values, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_features_are_open_clips(tiny: Clip) -> None:
    """Our uint8 door and open_clip's own preprocessing lead to the same features."""
    theirs = open_clip.create_model("clipmill-tiny").eval()
    theirs.load_state_dict(tiny.model.state_dict())
    settings = open_clip.transform.PreprocessCfg(**theirs.visual.preprocess_cfg)
    preprocess = open_clip.transform.image_transform_v2(settings, is_train=False)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    with torch.no_grad():
        expected = theirs.encode_image(preprocess(image)[None], normalize=True)
        ours = tiny.encode_image(tiny.transforms(train=False)(np.array(image))[None])
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        tokens = open_clip.get_tokenizer("clipmill-tiny")(TEXTS)
        torch.testing.assert_close(tiny.encode_text(tokens), theirs.encode_text(tokens, normalize=True))


def test_cut_text_gives_the_same_features_and_gradients(tiny: Clip) -> None:
    assert tiny.end_of_text == 49407
    tokens = tiny.tokenizer(["a red square", "", "a blue disc on a green field"])
    results = []
    for width in (77, 9):
        tiny.zero_grad()
        features = tiny.encode_text(tokens[:, :width])
        (features * torch.arange(32)).sum().backward()
        results.append([features, *(tiny.get_parameter(f"model.{name}").grad for name in ("ln_final.weight",))])
        results[-1].append(tiny.model.positional_embedding.grad[:9].clone())
    for whole, cut in zip(*results, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-5)


def test_gelu_towers_of_other_kinds(tmp_path: Path) -> None:
    """A ResNet with a custom text tower, which open_clip cannot cut, from a folder in open_clip's own layout."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        "custom_text": True,
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"size": 32}}))
    method = Clip(Config(architecture=f"local-dir:{tmp_path}")).eval()
    assert method.end_of_text is None
    tokens = method.tokenizer(["a cat", "a dog"])
    assert tokens.shape == (2, 16)
    features = method.encode_text(tokens)
    assert features.shape == (2, 16) and torch.allclose(features.norm(dim=-1), torch.ones(2))
    assert list(method.description()) == [f"{tmp_path.name}.json", "open_clip_config.json"]
    assert method.transforms(False).size == (32, 32)


def test_a_bag_of_words_start_is_the_closed_form() -> None:
    """A text's feature is the projection of its last word's place with the mean of the normalised words before it."""
    torch.manual_seed(0)
    method = Clip(Config(architecture="clipmill-small", text_start="bag_of_words")).eval()
    model, tokens = method.model, method.tokenizer(["a red square on a field"])
    length = int(tokens.argmax()) + 1
    words = torch.nn.functional.layer_norm(model.token_embedding(tokens[0, :length]), (64,))
    hidden = model.token_embedding(tokens[0, length - 1]) + words.mean(dim=0)
    expected = torch.nn.functional.layer_norm(hidden, (64,)) @ model.text_projection
    actual = method.encode_text(tokens[:, :length])[0]
    torch.testing.assert_close(actual, expected / expected.norm(), rtol=1e-4, atol=1e-5)
    method.encode_text(tokens).sum().backward()
    assert model.transformer.resblocks[0].attn.in_proj_bias.grad[:64].abs().max() > 0, "queries can leave zero"


def test_a_bag_of_words_start_needs_open_clips_text_tower() -> None:
    with pytest.raises(SettingError, match="text_start"):
        openclip.start_as_bag_of_words(torch.nn.Linear(2, 2))


def test_small_image_tower_is_built_by_open_clip_and_takes_other_sizes() -> None:
    model = open_clip.create_model("clipmill-small", force_image_size=96).eval()
    assert type(model.visual.trunk).__name__ == "ConvNet"
    assert model.encode_image(torch.zeros(2, 3, 96, 96)).shape == (2, 128)
    with pytest.raises(ValueError, match="no pretrained weights"):
        timm.create_model("clipmill_convnet", pretrained=True)


def test_scale_starts_and_stays_where_the_paper_says() -> None:
    method = Clip(Clip.smallest())
    assert method.measures()["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-6)
    for start, expected in ((9.0, 100.0), (-1.0, 1.0), (2.0, math.exp(2))):
        torch.nn.init.constant_(method.logit_scale, start)
        method.after_step()
        assert method.measures()["logit_scale"] == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def sigmoid() -> Clip:
    torch.manual_seed(0)
    return Clip(replace(Clip.smallest(), loss="sigmoid", loss_tile=3))


def test_the_sigmoid_loss_starts_as_its_paper_says_and_learns_a_bias(sigmoid: Clip) -> None:
    assert sigmoid.measures() == {"logit_scale": pytest.approx(10.0), "logit_bias": -10.0}
    assert not decays("model.logit_bias", sigmoid.model.logit_bias)
    tokens = sigmoid.tokenizer(["a red square", "a blue disc", "a cat", "a dog"])
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    loss = sigmoid({"image": images, "text": tokens})["contrastive"]
    features = sigmoid.encode_image(images), sigmoid.encode_text(tokens)
    expected = SigLipLoss()(*features, sigmoid.logit_scale.exp(), sigmoid.model.logit_bias)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert sigmoid.model.logit_bias.grad.abs() > 0 and sigmoid.logit_scale.grad.abs() > 0


def test_open_clip_opens_a_sigmoid_checkpoint_and_so_do_we(sigmoid: Clip, tmp_path: Path) -> None:
    torch.nn.init.constant_(sigmoid.model.logit_bias, -7.5)
    meta = Meta(step=1, samples_seen=8, batch_size=8, lanes=1, seed=0, snapshot="0" * 64)
    folder = Checkpoints(str(tmp_path)).save(sigmoid, make_optimizer(AdamW(), sigmoid), meta).folder.path
    assert open_clip.create_model(f"local-dir:{folder}").logit_bias.item() == -7.5
    assert load_method(folder).measures() == sigmoid.measures()
    again = Clip(Config(architecture="clipmill-tiny", pretrained=folder, loss="sigmoid"))
    assert again.measures()["logit_bias"] == -7.5 and again.model.logit_bias.requires_grad


def test_softmax_weights_go_on_with_a_sigmoid(exported: Path) -> None:
    """Their scale stays; the bias they have not starts as in the paper, not at open_clip's zero."""
    method = Clip(Config(architecture="clipmill-tiny", pretrained=str(exported), loss="sigmoid"))
    assert method.measures() == {"logit_scale": pytest.approx(1 / 0.07), "logit_bias": -10.0}


def test_a_batch_larger_than_a_tile_has_the_same_loss(tiny: Clip) -> None:
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(7, 32), dim=1) for _ in range(2))
    tiles = Clip(replace(Clip.smallest(), loss_tile=3))
    values = [method.compare({"image": image, "text": text})["contrastive"].detach() for method in (tiny, tiles)]
    torch.testing.assert_close(values[0], values[1])


def test_weight_decay_leaves_out_what_open_clip_leaves_out(tiny: Clip) -> None:
    def exclude(name: str, parameter: Tensor) -> bool:  # open_clip_train/main.py
        return parameter.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name

    for name, parameter in tiny.model.named_parameters():
        assert decays(name, parameter) != exclude(name, parameter), name
    with_decay, without = tiny.parameter_groups()
    assert "weight_decay" not in with_decay and without["weight_decay"] == 0
    assert any(parameter is tiny.logit_scale for parameter in without["params"])


@pytest.fixture(scope="module")
def exported(tiny: Clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    meta = Meta(step=1, samples_seen=8, batch_size=8, lanes=1, seed=0, snapshot="0" * 64)
    return Path(Checkpoints(str(run)).save(tiny, make_optimizer(AdamW(), tiny), meta).folder.path)


def test_open_clip_opens_a_checkpoint(tiny: Clip, exported: Path) -> None:
    renamed = exported.parent.parent / "exported-tiny.json"  # a name that is stored only in this folder
    renamed.write_bytes((exported / "clipmill-tiny.json").read_bytes())
    open_clip.add_model_config(renamed)
    tokens = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    image = torch.rand(2, 3, 64, 64)
    for model in (
        open_clip.create_model("exported-tiny", pretrained=str(exported / "model.safetensors")),
        open_clip.create_model(f"local-dir:{exported}"),
    ):
        assert torch.equal(model.eval().encode_text(tokens), tiny.model.encode_text(tokens))
        assert torch.equal(model.encode_image(image), tiny.model.encode_image(image))
        assert json.dumps(model.visual.preprocess_cfg) == json.dumps(tiny.model.visual.preprocess_cfg)


def test_checkpoints_and_files_serve_as_pretrained_weights(tiny: Clip, exported: Path) -> None:
    torch.manual_seed(9)
    for pretrained in (str(exported), str(exported / "model.safetensors")):
        method = Clip(Config(architecture="clipmill-tiny", pretrained=pretrained))
        assert torch.equal(method.model.text_projection, tiny.model.text_projection)
    loaded = load_method(f"clipmill-tiny:{exported}/model.safetensors")
    assert torch.equal(loaded.model.text_projection, tiny.model.text_projection)


def test_an_architecture_travels_with_its_checkpoint(tmp_path: Path) -> None:
    config = json.loads((openclip.CONFIGS / "clipmill-tiny.json").read_text())
    config["embed_dim"] = 24
    (tmp_path / "private.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "private.json")
    method = Clip(Config(architecture="private", image_size=48))
    meta = Meta(step=1, samples_seen=8, batch_size=8, lanes=1, seed=0, snapshot="0" * 64)
    saved = Checkpoints(str(tmp_path / "run")).save(method, make_optimizer(AdamW(), method), meta)
    open_clip.factory._MODEL_CONFIGS.pop("private")
    (tmp_path / "private.json").unlink()
    loaded = load_method(saved.folder.uri)
    assert loaded.encode_text(method.tokenizer(["x"])).shape == (1, 24)
    assert loaded.transforms(False).size == (48, 48)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "ViT-B-33"}, "ViT-B-32"),
        ({"architecture": "coca_ViT-B-32"}, "without a caption decoder"),
        ({"architecture": "local-dir:/nowhere"}, "can be read"),
        ({"architecture": "clipmill-tiny", "pretrained": "laion400m_e32"}, "a tag of clipmill-tiny"),
        ({"architecture": "clipmill-tiny", "pretrained": "/no/file.safetensors"}, "a weights file"),
        ({"architecture": "ViT-B-32", "pretrained": "openai"}, "ViT-B-32-quickgelu, since the weights openai"),
        ({"architecture": "ViT-B-32-quickgelu", "pretrained": "laion2b_e16"}, "a tag of|ViT-B-32, since"),
    ],
)
def test_bad_architectures_and_weights_are_one_sentence(settings: dict[str, str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Clip(Config(**settings))


def test_weights_of_another_architecture_are_refused(exported: Path, tmp_path: Path) -> None:
    config = json.loads((openclip.CONFIGS / "clipmill-tiny.json").read_text())
    config["embed_dim"] = 8
    (tmp_path / "narrow.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "narrow.json")
    with pytest.raises(SettingError, match="weights that fit narrow"):
        Clip(Config(architecture="narrow", pretrained=str(exported)))


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": 0.0},
        {"max_logit_scale": 0.5},
        {"crop_scale": (0.0, 1.0)},
        {"flip": 1.5},
        {"loss_tile": 0},
        {"sigmoid_scale": 0.0},
    ],
)
def test_bad_settings(bad: dict[str, float]) -> None:
    with pytest.raises(SettingError):
        Config(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("uri", ["nowhere", "/no/such/folder", "s3://bucket", ""])
def test_a_checkpoint_that_is_none_is_refused(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if uri.startswith("s3"):
        uri = "memory://bucket"
    with pytest.raises(SettingError, match="ARCHITECTURE:WEIGHTS"):
        load_method(uri)


def test_a_damaged_checkpoint_is_named(tiny: Clip, tmp_path: Path) -> None:
    meta = Meta(step=1, samples_seen=8, batch_size=8, lanes=1, seed=0, snapshot="0" * 64)
    folder = Path(Checkpoints(str(tmp_path)).save(tiny, make_optimizer(AdamW(), tiny), meta).folder.path)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(DataError, match=r"model\.safetensors cannot be read"):
        load_method(str(folder))


@pytest.mark.parametrize("name", [name for name in open_clip.list_models() if "coca" not in name.lower()])
def test_the_shared_tokenizer_is_given_where_open_clip_gives_its_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kind of tokenizer and its options, by open_clip's choice; the vocabularies are not read."""
    made: list[tuple[str, dict[str, object]]] = []
    for kind in ("SimpleTokenizer", "HFTokenizer", "SigLipTokenizer"):
        monkeypatch.setattr(open_clip.factory, kind, lambda *_, _kind=kind, **options: made.append((_kind, options)))
    open_clip.get_tokenizer(name)
    (theirs,) = made
    ours = openclip.tokenizer(name)
    assert (ours is None) == (len(made) == 2)  # None is what the recorder above gives
    if ours is not None:
        assert theirs == ("SimpleTokenizer", {"context_length": ours.context_length})
        assert ours is openclip.tokenizer(name) is byte_pair_tokenizer(ours.context_length)
