"""``hf-hub:`` addresses, against a server on loopback that answers as the hub does."""

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from pipeline.errors import SettingError
from pipeline.models.clip import Clip, Config
from pipeline.models.towers.teacher import Teacher
from pipeline.shards.storage import Folder
from pipeline.training.checkpoint import load_method
from pipeline.training.export import export

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**TOWER, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """Serves the folders ``ORG/REPO`` below ``root``; ``refusals`` gives a path below it a status of its own."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.root, self.refusals = root, dict[str, int]()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:  # noqa: N802
        self._answer(with_body=False)

    def do_GET(self) -> None:  # noqa: N802
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        found = re.fullmatch(r"/(\w+/\w+)/resolve/main/([\w.]+)", self.path)
        repository, name = found.groups() if found else ("", "")
        file = self.server.root / repository / name
        status = self.server.refusals.get(f"{repository}/{name}", 200 if file.is_file() else 404)
        body = file.read_bytes() if status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{name}-{len(body)}"')
        if status == 404:
            known = bool(found) and (self.server.root / repository).is_dir()
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub of huggingface_hub, with an empty cache; it reads its environment when it is imported."""
    server = Hub(tmp_path / "hub")
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def transformers_repository(hub: Hub) -> CLIPModel:
    vision = {**TOWER, "image_size": 32, "patch_size": 16}
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=24)).eval()
    model.save_pretrained(hub.root / "org" / "theirs")
    CLIPImageProcessor(image_mean=[0.5, 0.4, 0.3], resample=2).save_pretrained(hub.root / "org" / "theirs")
    return model


def test_a_repository_of_transformers_is_a_start_and_a_teacher(hub: Hub) -> None:
    model = transformers_repository(hub)
    method = Clip(Config(architecture="hf-hub:org/theirs")).eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model.get_image_features(images)
        expected = getattr(expected, "pooler_output", expected)
        assert (method.model.encode_image(images) - expected).abs().max() < 1e-5
    assert method.mean.flatten().tolist() == pytest.approx([127.5, 102.0, 76.5])
    assert torch.equal(Teacher("hf-hub:org/theirs").model.visual.proj, method.model.visual.proj)


def test_a_repository_of_open_clip_gives_back_what_was_exported(hub: Hub) -> None:
    torch.manual_seed(3)
    method = Clip(Config(architecture="clipmill-tiny"))
    folder = hub.root / "org" / "ours"
    export(method, Folder(folder), "open_clip")
    loaded = load_method("hf-hub:org/ours", "cpu")
    for name, tensor in method.model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name]), name  # type: ignore[union-attr]


def test_a_repository_without_its_weights_is_no_untrained_model(hub: Hub) -> None:
    export(Clip(Config(architecture="clipmill-tiny")), Folder(hub.root / "org" / "ours"), "open_clip")
    hub.refusals = {"org/ours/model.safetensors": 403}
    with pytest.raises(SettingError, match="a repository of the hub that can be read"):
        load_method("hf-hub:org/ours", "cpu")
    (hub.root / "org" / "ours" / "model.safetensors").unlink()
    hub.refusals = {}
    with pytest.raises(SettingError, match=r"a repository with open_clip_model\.safetensors"):
        load_method("hf-hub:org/ours", "cpu")


def test_a_repository_that_is_not_there_or_refuses_is_one_sentence(hub: Hub) -> None:
    transformers_repository(hub)
    for address, refusals in (
        ("hf-hub:org/nothing", {}),
        ("hf-hub:org/theirs", {"org/theirs/config.json": 403}),
        ("hf-hub:org/theirs", {"org/theirs/open_clip_config.json": 401}),
    ):
        hub.refusals = refusals
        with pytest.raises(SettingError, match="architecture: got 'hf-hub:org/") as error:
            Clip(Config(architecture=address))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "model.safetensors"])
def test_a_file_that_the_hub_fails_to_send_is_not_taken_for_one_that_is_not_there(hub: Hub, name: str) -> None:
    transformers_repository(hub)
    hub.refusals = {f"org/theirs/{name}": 403}
    with pytest.raises(SettingError, match="architecture: got 'hf-hub:org/theirs'"):
        Clip(Config(architecture="hf-hub:org/theirs"))


def test_offline_the_cache_is_enough(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers_repository(hub)
    online = Clip(Config(architecture="hf-hub:org/theirs"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    offline = Clip(Config(architecture="hf-hub:org/theirs"))
    assert torch.equal(online.model.visual.proj, offline.model.visual.proj)
