"""Adapters on the Hugging Face hub, against a hub on the loopback interface that the hub's own client talks to."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.clip.hub import ADAPTERS_FILE, check_hub_source, find_adapters
from anomalib_aprilgan.clip.weights import WeightsUnavailableError
from anomalib_aprilgan.demo import built_in as shipped
from anomalib_aprilgan.files import sha256
from anomalib_aprilgan.provenance import Provenance, load_adapters
from anomalib_aprilgan.sharing import model_card

from ..loopback import Loopback

REPOSITORY = "factory/washers"


class Hub(Loopback):
    """Repositories with commits, and the part of the hub's interface that downloads and commits need."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}  # by commit, the newest last
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.give(with_body=False)

            def do_GET(self) -> None:
                self.give(with_body=True)

            def give(self, *, with_body: bool) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                match = re.fullmatch(r"/(\w+/\w+)/resolve/([^/]+)/(.+)", self.path)
                commits = hub.repositories.get(match[1]) if match else None
                if match is None or commits is None:
                    return self.answer(404, {"X-Error-Code": "RepoNotFound"})
                commit = list(commits)[-1] if match[2] == "main" else match[2]
                if commit not in commits:
                    return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
                content = commits[commit].get(match[3])
                if content is None:
                    return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                etag = f'"{hashlib.sha1(content, usedforsecurity=False).hexdigest()}"'
                return self.answer(200, {"X-Repo-Commit": commit, "ETag": etag}, content, with_body=with_body)

            def do_POST(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                hub.tokens.add(self.headers.get("Authorization"))
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/api/repos/create":
                    asked = json.loads(body)
                    name = f"{asked['organization']}/{asked['name']}"
                    known = name in hub.repositories
                    hub.repositories.setdefault(name, {})
                    return self.say(409 if known else 200, {"url": f"{hub.url}/{name}"})
                if self.path.endswith("/preupload/main"):
                    files = json.loads(body)["files"]
                    answer = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
                    return self.say(200, {"files": answer})
                match = re.fullmatch(r"/api/models/(\w+/\w+)/commit/main", self.path)
                if match is None:
                    return self.say(200, {"errors": [], "warnings": []})  # the check of a card
                lines = [json.loads(line) for line in body.splitlines()]
                files = {
                    line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines
                    if line["key"] == "file"
                }
                commit = hub.commit(match[1], files)
                url = f"{hub.url}/{match[1]}/commit/{commit}"
                return self.say(200, {"success": True, "commitUrl": url, "commitOid": commit})

            def say(self, status: int, content: object) -> None:
                self.answer(status, {"Content-Type": "application/json"}, json.dumps(content).encode())

            def answer(
                self, status: int, headers: dict[str, str], body: bytes = b"", *, with_body: bool = True
            ) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                """Keep the test output clean."""

        super().__init__(Handler)

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        """Put files into a new commit, and return its name."""
        commits = self.repositories.setdefault(repository, {})
        name = hashlib.sha1(repr((len(commits), files)).encode(), usedforsecurity=False).hexdigest()
        commits[name] = (commits[list(commits)[-1]] if commits else {}) | files
        return name


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Hub()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield server
    server.close()


def built_in(**arguments: object) -> AprilGAN:
    given = {
        "backbone": shipped.ARCHITECTURE,
        "pretrained": shipped.PRETRAINED,
        "image_size": shipped.IMAGE_SIZE,
        "stages": shipped.STAGES,
        "class_name": "nut",
    }
    return AprilGAN(**(given | arguments))


def other_adapters(tmp_path: Path) -> bytes:
    """Adapters for the built-in CLIP that differ from its own."""
    model = built_in()
    model.setup("predict")
    with torch.no_grad():
        model.model.adapters.fc[0].bias += 1.0
    return model.save_adapters(tmp_path / "other.safetensors").read_bytes()


@pytest.mark.parametrize(
    "wrong",
    [
        "hf://",
        "hf://washers",
        "hf://a/b/c",
        "hf://a/b@",
        "hf://a/../b",
        "hf://a b/c",
        "hf:///b",
        "hf://a/b@-x",
        "hf://a/b?x",
    ],
)
def test_what_is_no_repository_is_refused_at_once(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"`adapters` on the Hugging Face hub must be hf://owner/name"):
        built_in(adapters=wrong)


def test_names_and_revisions() -> None:
    assert check_hub_source("adapters", "hf://a-b/c.d_e") == ("a-b/c.d_e", None)
    assert check_hub_source("adapters", "hf://a/b@refs/pr/1") == ("a/b", "refs/pr/1")


class TestFindAdapters:
    def test_a_commit_is_pinned_and_needs_no_network_again(self, hub: Hub) -> None:
        first = hub.commit(REPOSITORY, {ADAPTERS_FILE: b"one"})
        found = find_adapters(f"hf://{REPOSITORY}")
        assert (found.path.read_bytes(), found.source) == (b"one", f"hf://{REPOSITORY}@{first}")
        hub.commit(REPOSITORY, {ADAPTERS_FILE: b"two"})
        hub.requests.clear()
        assert find_adapters(found.source) == found
        assert hub.requests == []
        assert find_adapters(f"hf://{REPOSITORY}").path.read_bytes() == b"two"

    @pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
    def test_offline_the_cache_serves_and_nothing_is_asked(
        self, hub: Hub, monkeypatch: pytest.MonkeyPatch, variable: str
    ) -> None:
        hub.commit(REPOSITORY, {ADAPTERS_FILE: b"one"})
        online = find_adapters(f"hf://{REPOSITORY}")
        hub.requests.clear()
        monkeypatch.setenv(variable, "1")
        assert find_adapters(f"hf://{REPOSITORY}") == online
        with pytest.raises(WeightsUnavailableError, match=r"not in the Hugging Face cache and HF_HUB_OFFLINE is set"):
            find_adapters("hf://factory/others")
        assert hub.requests == []

    @pytest.mark.slow  # the hub's client tries again for 20 seconds
    def test_no_hub_and_no_cache(self, hub: Hub) -> None:
        hub.close()
        with pytest.raises(
            WeightsUnavailableError, match=r"`adapters='hf://factory/washers'`.*the hub does not answer"
        ):
            find_adapters(f"hf://{REPOSITORY}")

    def test_what_is_not_there_is_named(self, hub: Hub) -> None:
        hub.commit(REPOSITORY, {"model.pt": b"pickle"})
        with pytest.raises(WeightsUnavailableError, match=r"adapters.safetensors of factory/washers.*has no such file"):
            find_adapters(f"hf://{REPOSITORY}")
        with pytest.raises(WeightsUnavailableError, match=r"at v9 could not be fetched: RevisionNotFoundError"):
            find_adapters(f"hf://{REPOSITORY}@v9")
        with pytest.raises(WeightsUnavailableError, match=r"factory/none could not be fetched.*adapters=/path/to/"):
            find_adapters("hf://factory/none")


class TestInAModel:
    def test_a_branch_that_moves_does_not_move_a_model(self, hub: Hub, tmp_path: Path) -> None:
        commit = hub.commit(REPOSITORY, {ADAPTERS_FILE: other_adapters(tmp_path)})
        model = built_in(adapters=f"hf://{REPOSITORY}")
        model.setup("predict")
        expected, given = load_adapters(tmp_path / "other.safetensors")
        assert all(torch.equal(value, expected[name]) for name, value in model.model.adapters.state_dict().items())
        assert model.made.provenance == replace(
            given, source=f"hf://{REPOSITORY}@{commit}", sha256=sha256(tmp_path / "other.safetensors")
        )
        hub.commit(REPOSITORY, {ADAPTERS_FILE: b"damaged"})
        hub.requests.clear()
        model.setup("predict")
        assert model.made.provenance.source == f"hf://{REPOSITORY}@{commit}"
        assert hub.requests == []

    def test_a_checkpoint_keeps_revision_digest_and_adapters(self, hub: Hub, tmp_path: Path) -> None:
        hub.commit(REPOSITORY, {ADAPTERS_FILE: other_adapters(tmp_path)})
        model = built_in(adapters=f"hf://{REPOSITORY}")
        images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
        score = model(images).pred_score
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
        trainer.strategy.connect(model)
        checkpoint = tmp_path / "model.ckpt"
        trainer.save_checkpoint(checkpoint)
        del hub.repositories[REPOSITORY]  # and the hub forgets them
        hub.requests.clear()
        loaded = AprilGAN.load_from_checkpoint(checkpoint)
        torch.testing.assert_close(loaded(images).pred_score, score, atol=1e-6, rtol=0)
        assert loaded.made.provenance == model.made.provenance
        assert loaded.made.provenance.sha256 == sha256(tmp_path / "other.safetensors")
        assert hub.requests == []

    def test_adapters_of_another_clip_are_refused(self, hub: Hub, tmp_path: Path) -> None:
        hub.commit(REPOSITORY, {ADAPTERS_FILE: other_adapters(tmp_path)})
        model = built_in(adapters=f"hf://{REPOSITORY}", stages=[3])
        with pytest.raises(ValueError, match=r"hf://factory/washers@\w{40} was trained for stages \(4,\)"):
            model.setup("predict")


class TestPush:
    def test_what_is_pushed_is_what_is_fetched(self, hub: Hub) -> None:
        model = built_in()
        model.setup("predict")
        source = model.push_adapters(REPOSITORY, {"image_AUROC": 0.88}, license_id="mit", token="hf_secret")  # noqa: S106
        other = built_in(adapters=source)
        other.setup("predict")
        ours, theirs = model.model.adapters.state_dict(), other.model.adapters.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
        assert other.made.provenance.trained_on == model.made.provenance.trained_on
        assert hub.tokens == {"Bearer hf_secret"}
        card = hub.repositories[REPOSITORY][source.rpartition("@")[2]]["README.md"].decode()
        header = yaml.safe_load(card.split("---")[1])
        assert (header["license"], header["library_name"]) == ("mit", "anomalib")
        assert "| image_AUROC | 0.8800 |" in card
        assert "| stages | 4 |" in card
        assert f"AprilGAN(backbone='ViT-drawn-96', stages=[4], image_size=96, adapters='hf://{REPOSITORY}')" in card
        again = model.push_adapters(REPOSITORY)  # into the repository that is there
        assert again != source
        assert len(hub.repositories[REPOSITORY]) == 2

    def test_untrained_adapters_stay_here(self, hub: Hub) -> None:
        for model in (built_in(), built_in(adapters=None)):
            with pytest.raises(ValueError, match=r"no trained adapters"):
                model.push_adapters(REPOSITORY)
        assert hub.requests == []

    @pytest.mark.parametrize("name", ["washers", "a/b@main", "a/b/c"])
    def test_other_names_are_refused(self, hub: Hub, name: str) -> None:
        model = built_in()
        model.setup("predict")
        with pytest.raises(ValueError, match=r"`repository` "):
            model.push_adapters(name)
        assert hub.requests == []

    def test_offline(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        model = built_in()
        model.setup("predict")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(ConnectionError, match=r"HF_HUB_OFFLINE is set"):
            model.push_adapters(REPOSITORY)
        assert hub.requests == []


def test_a_card_says_what_is_not_known() -> None:
    card = model_card("a/b", Provenance(trained_on={"Visa": [], "Folder": ["nut", "tile"]}), {}, None)
    assert "license" not in card.split("---")[1]
    assert "| licence | not stated |" in card
    assert "| trained on | Visa; Folder (nut, tile) |" in card
    assert "Measured" not in card
