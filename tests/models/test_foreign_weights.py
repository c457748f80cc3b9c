"""Weights of other programs: OpenAI's archives and state dicts, wrapped dictionaries, transformers' CLIPModel."""

import json
import logging
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import DataError, SettingError
from pipeline.models.clip import Clip, Config
from pipeline.models.towers import openclip
from pipeline.models.towers.teacher import Teacher
from pipeline.models.towers.torch_script import read_script_tensors
from pipeline.models.towers.weights import read_any_weights
from pipeline.shards.storage import Folder
from pipeline.training.checkpoint import Checkpoints, Meta, load_method
from pipeline.training.export import export
from pipeline.training.optimizer import AdamW, make_optimizer
from tests.conftest import ROOT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

TINY = "clipmill-tiny"
TEXTS = ["a red circle", "two blue discs on a table", ""]


class Holder(nn.Module):
    """Only names and tensors matter."""

    def __init__(self, state: dict[str, Tensor], **sizes: int) -> None:
        super().__init__()
        for name, tensor in state.items():
            place: Any = self
            *parts, last = name.split(".")
            for part in parts:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            place.register_buffer(last, tensor.clone())
        for name, size in sizes.items():
            self.register_buffer(name, torch.tensor(size))

    def forward(self, x: Tensor) -> Tensor:
        return x


OPENAI = {"input_resolution": 64, "context_length": 77, "vocab_size": 49408}


@pytest.fixture(scope="module", name="state")
def state_fixture() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return dict(open_clip.create_model(TINY).state_dict())


@pytest.fixture(scope="module", name="archive")
def archive_fixture(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As OpenAI publishes weights: half precision, scripted, with three more buffers."""
    path = tmp_path_factory.mktemp("openai") / "ViT-tiny.pt"
    halves = {name: tensor.half() for name, tensor in state.items()}
    torch.jit.script(Holder(halves, **OPENAI)).save(str(path))
    return path


def same(method: Clip, state: dict[str, Tensor], atol: float = 0.0) -> bool:
    own = method.model.state_dict()
    return own.keys() == state.keys() and all(torch.allclose(own[name], state[name], atol=atol) for name in own)


def test_an_archive_is_read_like_torchs_own_reader(archive: Path) -> None:
    theirs = torch.jit.load(str(archive)).state_dict()
    ours = read_script_tensors(archive)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)


def test_openais_archive_is_a_start_and_a_teacher(archive: Path, state: dict[str, Tensor]) -> None:
    method = Clip(Config(architecture=TINY, pretrained=str(archive)))
    assert same(method, state, atol=2e-3)
    assert torch.equal(Teacher(f"{TINY}:{archive}").model.text_projection, method.model.text_projection)


def test_code_of_an_archive_does_not_run(archive: Path, tmp_path: Path) -> None:
    """One whose code is broken is read alike, and one whose pickle calls a function is refused."""

    class Hostile:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return Path.touch, (str(tmp_path / "ran"),)  # type: ignore[return-value]

    for kind, content in (("code", b"no python at all ("), ("pickle", pickle.dumps({"weight": Hostile()}))):
        path = tmp_path / f"{kind}.pt"
        with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                changed = name.endswith(".py") if kind == "code" else name.endswith("/data.pkl")
                new.writestr(name, content if changed else old.read(name))
    assert read_script_tensors(tmp_path / "code.pt").keys() == read_script_tensors(archive).keys()
    with pytest.raises(DataError, match="cannot be read"):
        read_any_weights(tmp_path / "pickle.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("cut", [100, 5000])
def test_a_cut_archive_is_one_sentence(archive: Path, tmp_path: Path, cut: int) -> None:
    (tmp_path / "cut.pt").write_bytes(archive.read_bytes()[:-cut])
    with pytest.raises(DataError, match=r"cut\.pt"):
        read_any_weights(tmp_path / "cut.pt")


WRAPPED: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "openai state dict": lambda state: {**state, **{name: torch.tensor(size) for name, size in OPENAI.items()}},
    "open_clip's training": lambda state: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}},
    "in model": lambda state: {"model": state, "step": 3},
    "compiled": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "lightning": lambda state: {"model_state_dict": state, "optimizer_state_dict": {}},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_dictionaries(kind: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(WRAPPED[kind](state), tmp_path / "weights.pt")
    assert same(Clip(Config(architecture=TINY, pretrained=str(tmp_path / "weights.pt"))), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.extra.weight": torch.zeros(3)}, r"1 unknown \(visual\.extra\.weight\)"),
        ({"text_projection": torch.zeros(2, 2)}, r"1 of another shape \(text_projection 2x2"),
        ({"positional_embedding": torch.zeros(77, 3)}, r"1 of another shape \(positional_embedding 77x3"),
        ({"text_projection": None}, r"1 missing \(text_projection\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    change: dict[str, Tensor | None], message: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    changed = {name: tensor.clone() for name, tensor in {**state, **change}.items() if tensor is not None}
    save_file(changed, tmp_path / "changed.safetensors")
    with pytest.raises(SettingError, match=message):
        Clip(Config(architecture=TINY, pretrained=str(tmp_path / "changed.safetensors")))


@pytest.fixture(name="siblings")
def siblings_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny architecture with GELU and with QuickGELU, as open_clip has ViT-B-32."""
    config = json.loads((openclip.CONFIGS / f"{TINY}.json").read_text())
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    for name, quick in (("pair", False), ("pair-quickgelu", True)):
        (tmp_path / f"{name}.json").write_text(json.dumps({**config, "quick_gelu": quick}))
        open_clip.add_model_config(tmp_path / f"{name}.json")


@pytest.mark.usefixtures("siblings")
def test_the_activation_of_a_file_is_checked_where_it_is_known(
    archive: Path, state: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SettingError, match="pair-quickgelu, since the weights .* were trained with it"):
        Clip(Config(architecture="pair", pretrained=str(archive)))
    with caplog.at_level(logging.WARNING):
        Clip(Config(architecture="pair-quickgelu", pretrained=str(archive)))
    assert not caplog.records
    save_file(state, tmp_path / "plain.safetensors")
    with caplog.at_level(logging.WARNING):
        Clip(Config(architecture="pair", pretrained=str(tmp_path / "plain.safetensors")))
    assert "pair-quickgelu" in caplog.text and "plain.safetensors" in caplog.text
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    quick = openclip.check_architecture("pair-quickgelu")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": quick}))
    with pytest.raises(SettingError, match="pair-quickgelu, since"):
        Clip.check(Config(architecture="pair", pretrained=str(folder)))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert same(Clip(Config(architecture="pair-quickgelu", pretrained=str(folder))), state)
    assert not caplog.records


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("ViT-B/32:openai", ("ViT-B-32-quickgelu", "openai")),
        ("ViT-L/14@336px:openai", ("ViT-L-14-336-quickgelu", "openai")),
        ("ViT-B/32:laion2b_s34b_b79k", ("ViT-B-32", "laion2b_s34b_b79k")),
        ("ViT-B-32:openai", ("ViT-B-32", "openai")),
        ("s3://bucket/run", None),
        ("folder/run:1", None),
    ],
)
def test_addresses_as_people_write_them(address: str, found: tuple[str, str] | None) -> None:
    assert openclip.parse_address(address) == found


def test_every_tag_of_open_clip_has_an_architecture_that_takes_it() -> None:
    """``roberta-ViT-B-32`` has QuickGELU in its config alone, and no sibling: the config decides."""
    refused: dict[str, list[str]] = {}
    for architecture, tag in open_clip.list_pretrained():
        if not architecture.startswith("coca_"):
            try:
                openclip.check(architecture, tag)
            except SettingError as error:
                refused.setdefault(tag, []).append(str(error))
    openclip.check("roberta-ViT-B-32", "laion2b_s12b_b32k")
    for messages in refused.values():
        assert all("-quickgelu, since the weights" in message for message in messages)


# transformers


def clip_model(**changes: Any) -> Any:
    """A small ``CLIPModel`` with random weights in all places."""
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4}
    text |= {"max_position_embeddings": 24, **changes.pop("text", {})}
    vision |= {"image_size": 64, "patch_size": 16, **changes.pop("vision", {})}
    torch.manual_seed(3)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20, **changes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.ndim else nn.init.constant_(parameter, 3.0)
    return model


def saved(model: Any, folder: Path, **image: Any) -> Path:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3], **image}))
    return folder


MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gelu": {"text": {"hidden_act": "gelu"}, "vision": {"hidden_act": "gelu"}},
    "another norm": {"text": {"layer_norm_eps": 1e-3}, "vision": {"layer_norm_eps": 1e-4}},
    "early config": {"text": {"eos_token_id": 2}},
}


def assert_equal_features(method: Clip, model: Any) -> None:
    images, tokens = torch.randn(3, 3, 64, 64), method.tokenizer(TEXTS)
    # transformers fills up with the end of text, after which nothing counts.
    theirs = torch.where((tokens == 0) & (torch.arange(24) > 1), 49407, tokens)
    with torch.no_grad():
        found = model(pixel_values=images, input_ids=theirs)
        image, text = (
            method.model.encode_image(images, normalize=True),
            method.model.encode_text(tokens, normalize=True),
        )
    assert (found.image_embeds - image).abs().max() < 1e-5
    assert (found.text_embeds - text).abs().max() < 1e-5
    assert method.logit_scale.item() == pytest.approx(model.logit_scale.item())


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_of_transformers_gives_the_same_features(kind: str, tmp_path: Path) -> None:
    model = clip_model(**json.loads(json.dumps(MODELS[kind])))
    folder = saved(model, tmp_path / "model", resample=2)
    method = Clip(Config(architecture=f"local-dir:{folder}")).eval()
    assert_equal_features(method, model)
    assert method.transforms(train=False).interpolation == "bilinear"
    assert method.mean.flatten().tolist() == pytest.approx([127.5, 102.0, 76.5])


def test_a_pickled_file_and_older_names_load_alike(tmp_path: Path) -> None:
    model = clip_model()
    folder = saved(model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    old = {"text_model.embeddings.position_ids": torch.arange(24)[None], **model.state_dict()}
    torch.save(old, folder / "pytorch_model.bin")
    assert_equal_features(Clip(Config(architecture=f"local-dir:{folder}")).eval(), model)


def test_files_in_parts_load_alike(tmp_path: Path) -> None:
    model = clip_model()
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_equal_features(Clip(Config(architecture=f"local-dir:{tmp_path}")).eval(), model)


def test_it_is_a_teacher_and_its_student_goes_on_without_it(tmp_path: Path) -> None:
    model = clip_model()
    folder = saved(model, tmp_path / "model")
    teacher = Teacher(f"local-dir:{folder}")
    method = Clip(Config(architecture=f"local-dir:{folder}", teacher=f"local-dir:{folder}"))
    Clip.check(method.config)
    assert torch.equal(teacher.model.visual.proj, method.model.visual.proj)
    meta = Meta(step=1, samples_seen=8, batch_size=8, lanes=1, seed=0, snapshot="0" * 64)
    checkpoint = Checkpoints(str(tmp_path / "run")).save(method, make_optimizer(AdamW(), method), meta)
    shutil.rmtree(folder)
    again = load_method(checkpoint.folder.uri)
    assert isinstance(again, Clip)
    assert_equal_features(again, model)


def test_its_weights_start_an_architecture_by_name(tmp_path: Path) -> None:
    """``--architecture NAME --pretrained FOLDER``: the same names, and its activation is checked."""
    same_sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = {"embed_dim": 20, "quick_gelu": True, "vision_cfg": {"image_size": 64, "layers": 2, "width": 64}}
    config["text_cfg"] = {"context_length": 24, "width": 64, "heads": 1, "layers": 2, "vocab_size": 49408}
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/named-quickgelu.json").write_text(json.dumps(config))
    (tmp_path / "ours/named.json").write_text(json.dumps({**config, "quick_gelu": False}))
    open_clip.add_model_config(tmp_path / "ours")
    model = clip_model(text=same_sizes, vision=same_sizes)
    folder = saved(model, tmp_path / "model")
    assert_equal_features(Clip(Config(architecture="named-quickgelu", pretrained=str(folder))).eval(), model)
    with pytest.raises(SettingError, match="named-quickgelu, since the weights"):
        Clip(Config(architecture="named", pretrained=str(folder)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "siglip"}, "that of a siglip model"),
        ({"text_config": {"hidden_act": "gelu"}}, "different activations"),
        ({"text_config": {"vocab_size": 1000}}, "1000 tokens"),
        ({"vision_config": {"num_channels": 4}}, "4 colour channels"),
        ({"text_config": {"hidden_act": "silu"}, "vision_config": {"hidden_act": "silu"}}, "the activation silu"),
    ],
)
def test_what_open_clip_cannot_express_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **changes}))
    with pytest.raises(SettingError, match=message):
        openclip.check_architecture(f"local-dir:{tmp_path}")


TINY_CONFIG = json.loads((ROOT / "pipeline/models/configs/clipmill-tiny.json").read_text())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("open_clip_config.json", "[]", "architecture: .* can be read"),
        ("open_clip_config.json", "[" * 100_000, "architecture: .* can be read"),
        ("open_clip_config.json", '{"model_cfg": 5}', "objects vision_cfg and text_cfg"),
        ("open_clip_config.json", '{"model_cfg": {"embed_dim": 3, "text_cfg": {}}}', "objects vision_cfg and text_cfg"),
        ("open_clip_config.json", json.dumps({"model_cfg": {**TINY_CONFIG, "embed_dim": "x"}}), "describes a CLIP"),
        (
            "open_clip_config.json",
            json.dumps({"model_cfg": {**TINY_CONFIG, "embed_dim": float("nan")}}),
            "describes a CLIP",
        ),
        ("open_clip_config.json", json.dumps({"model_cfg": {**TINY_CONFIG, "colour": 3}}), "describes a CLIP .*colour"),
        (
            "open_clip_config.json",
            json.dumps({"model_cfg": {**TINY_CONFIG, "vision_cfg": {**TINY_CONFIG["vision_cfg"], "patch_size": 0}}}),
            "describes a CLIP",
        ),
        (
            "open_clip_config.json",
            json.dumps({"model_cfg": TINY_CONFIG}),
            "weights that fit .*Missing.*positional_embedding",
        ),
        ("config.json", '{"model_type": "clip", "text_config": 5}', "architecture: .* can be read"),
        ("config.json", '{"model_type": "clip", "vision_config": {"num_attention_heads": 0}}', "can be read"),
    ],
)
def test_a_strangers_model_config_is_one_sentence(file: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(content)
    name = "open_clip_model.safetensors" if "open" in file else "model.safetensors"
    save_file({"a": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(SettingError, match=message):
        Clip(Config(architecture=f"local-dir:{tmp_path}"))


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(SettingError, match=r"a folder with model\.safetensors"):
        Clip(Config(architecture=f"local-dir:{tmp_path}"))


def test_addresses_in_docs_and_help_texts_load() -> None:
    """All ``ARCHITECTURE:TAG`` and ``--architecture A --pretrained TAG`` that a reader may copy."""
    root = Path(__file__).resolve().parents[2]
    tags = "|".join(sorted({tag for _, tag in open_clip.list_pretrained()}, key=len, reverse=True))
    found = set()
    for path in (root / "README.md", *root.glob("docs/*.md"), *root.glob("jobs/*.py"), *root.rglob("pipeline/**/*.py")):
        text = path.read_text()
        found |= set(re.findall(rf"((?:RN|ViT)[\w/@-]+):({tags})\b", text))
        found |= set(re.findall(rf"--architecture ([\w-]+) --pretrained ({tags})\b", text))
    assert len(found) > 4
    for architecture, tag in found:
        parsed = openclip.parse_address(f"{architecture}:{tag}")
        assert parsed is not None
        openclip.check(*parsed)


# Chinese-CLIP

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"红绿蓝色圆的一个。,!?'"]
PIECES += ["red", "circle", "##s", "two", "blue", "red"]  # the later number of a repeated one counts
PIECES += ["un", "##aff", "##able", "cafe", "1", "##2", "##3", "-", "##x", *"abcdefgh"]
CHINESE = [
    "一个红色的圆。",
    "two blue circles, 红色",
    "Unaffable CAFÉ!",
    "123 x-ray\tred\ncircle",
    "",
    "xyz 未知",
    "a" * 120,
    "red\u0000\ufffd\u200b circle 'two'",
    "一个红色的圆" * 20,
]


def chinese_model() -> Any:
    from transformers import ChineseCLIPConfig, ChineseCLIPModel

    text = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "max_position_embeddings": 64}
    vision = {"hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 64, "patch_size": 16}
    torch.manual_seed(4)
    config = ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    model = ChineseCLIPModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.ndim else nn.init.constant_(parameter, 3.0)
    return model


@pytest.fixture(scope="module", name="chinese")
def chinese_fixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("chinese")
    model = chinese_model()
    saved(model, folder)
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return model, folder


def assert_equal_chinese_features(method: Clip, model: Any) -> None:
    images, tokens = torch.randn(len(CHINESE), 3, 64, 64), method.tokenizer(CHINESE)
    with torch.no_grad():
        found = model(pixel_values=images, input_ids=tokens, attention_mask=(tokens != 0).long())
        image, text = (
            method.model.encode_image(images, normalize=True),
            method.model.encode_text(tokens, normalize=True),
        )
    assert (found.image_embeds - image).abs().max() < 1e-5
    assert (found.text_embeds - text).abs().max() < 1e-5


def test_a_folder_of_chinese_clip_gives_the_same_features(chinese: tuple[Any, Path], tmp_path: Path) -> None:
    """As a start, as a teacher, and as a student's checkpoint that is used without the folder."""
    model, folder = chinese
    moved = tmp_path / "chinese"
    shutil.copytree(folder, moved)
    config = Config(architecture=f"local-dir:{moved}", teacher=f"local-dir:{moved}")
    Clip.check(config)
    method = Clip(config).eval()
    assert method.tokenizer(CHINESE).shape == (len(CHINESE), 52)
    assert_equal_chinese_features(method, model)
    assert method.logit_scale.item() == pytest.approx(3.0)
    teacher = Teacher(f"local-dir:{moved}")
    images, tokens = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), method.tokenizer(CHINESE[:2])
    torch.testing.assert_close(teacher(images, tokens)[1], method.encode_text(tokens))
    meta = Meta(step=1, samples_seen=8, batch_size=8, lanes=1, seed=0, snapshot="0" * 64)
    checkpoint = Checkpoints(str(tmp_path / "run")).save(method, make_optimizer(AdamW(), method), meta)
    shutil.rmtree(moved)
    again = load_method(checkpoint.folder.uri)
    assert isinstance(again, Clip) and again.tokenizer.words == tuple(PIECES)
    assert_equal_chinese_features(again, model)
    with pytest.raises(SettingError, match="is used from its checkpoint"):
        export(again, Folder(str(tmp_path / "exported")), "open_clip")


def test_gradients_reach_all_of_chinese_clip(chinese: tuple[Any, Path]) -> None:
    method = Clip(Config(architecture=f"local-dir:{chinese[1]}")).train()
    batch = {"image": torch.randint(0, 256, (9, 3, 64, 64), dtype=torch.uint8), "text": method.tokenizer(CHINESE)}
    sum(method.training_step(batch).values()).backward()  # type: ignore[union-attr]
    assert all(parameter.grad is not None for parameter in method.parameters())
    assert {layer.tower for layer in method.layers().values()} == {"image", "text"}


def test_word_pieces_are_those_of_transformers(chinese: tuple[Any, Path], tmp_path: Path) -> None:
    from transformers import BertTokenizer

    theirs = BertTokenizer(vocab={piece: number for number, piece in enumerate(PIECES)})
    ours = openclip.tokenizer(f"local-dir:{chinese[1]}", 24)
    wanted = theirs(CHINESE, padding="max_length", truncation=True, max_length=24, return_tensors="pt")["input_ids"]
    assert ours(CHINESE).tolist() == wanted.tolist()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").unlink(missing_ok=True)
    shutil.copy(chinese[1] / "config.json", tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert openclip.tokenizer(f"local-dir:{tmp_path}", 24)(CHINESE).tolist() == wanted.tolist()


def test_chinese_clip_without_its_words_is_named(chinese: tuple[Any, Path], tmp_path: Path) -> None:
    shutil.copy(chinese[1] / "config.json", tmp_path)
    with pytest.raises(SettingError, match=r"a folder with vocab\.txt or tokenizer\.json"):
        openclip.check_architecture(f"local-dir:{tmp_path}")
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(SettingError, match=r"word pieces without \[UNK\]"):
        openclip.check_architecture(f"local-dir:{tmp_path}")
