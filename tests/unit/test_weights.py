"""Where weights come from: downloads that are whole or absent, the cache, and files of every kind."""

import hashlib
import pickle
import re
import subprocess
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from anomalib_aprilgan.clip import weights
from anomalib_aprilgan.clip.state_dict import read_state_dict
from anomalib_aprilgan.clip.weights import (
    ADAPTERS_URL_VARIABLE,
    AUTHORS_ADAPTERS,
    AuthorsAdapters,
    WeightsUnavailableError,
    authors_adapters,
    fetch,
    git_blob_id,
    is_offline,
    verify_sha256,
)
from anomalib_aprilgan.files import sha256

from ..loopback import Loopback

BODY = b"adapters" * 1000


class Mirror(Loopback):
    """A web server on the loopback interface that serves one body and counts requests."""

    def __init__(self) -> None:
        self.body, self.announced, self.status = BODY, len(BODY), 200
        self.headers: dict[str, str] = {}
        self.requests: list[str] = []
        self.silence = Event()  # the connection stays open until it is set
        self.silence.set()
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                mirror.requests.append(self.path)
                self.send_response(mirror.status)
                if mirror.announced is not None:
                    self.send_header("Content-Length", str(mirror.announced))
                for name, value in {"Connection": "close", **mirror.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(mirror.body)
                mirror.silence.wait(10)

            def log_message(self, *args: object) -> None:
                """Keep the test output clean."""

        super().__init__(Handler)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Mirror()
    monkeypatch.setenv(ADAPTERS_URL_VARIABLE, server.url + "/mirror/")
    yield server
    server.close()


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache, and ``BODY`` as the content that "visa" must have."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(weights, "user_cache_path", lambda name: folder / name)
    entry = AuthorsAdapters("visa_pretrained.pth", blob_id(BODY), "Visa")
    monkeypatch.setitem(AUTHORS_ADAPTERS, "visa", entry)
    return folder


class TestAuthorsAdapters:
    def test_fetched_once_and_then_cached(self, mirror: Mirror, cache: Path) -> None:
        first = authors_adapters("visa")
        assert first.read_bytes() == BODY
        assert mirror.requests == ["/mirror/visa_pretrained.pth"]
        assert authors_adapters("visa") == first
        assert len(mirror.requests) == 1
        assert files(cache) == ["anomalib_aprilgan/f13b8a6/visa_pretrained.pth"]

    def test_cached_file_serves_offline(self, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
        path = authors_adapters("visa")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        mirror.requests.clear()
        assert authors_adapters("visa") == path
        assert mirror.requests == []

    def test_damaged_cached_file_is_fetched_anew(self, mirror: Mirror) -> None:
        path = authors_adapters("visa")
        path.write_bytes(BODY[:-1])
        assert authors_adapters("visa").read_bytes() == BODY
        assert len(mirror.requests) == 2

    def test_wrong_content_is_refused_and_not_kept(self, mirror: Mirror, cache: Path) -> None:
        mirror.body = b"<html>log in first</html>"
        mirror.announced = len(mirror.body)
        with pytest.raises(
            ValueError, match=rf"git blob id [0-9a-f]{{40}} \(25 bytes\), expected {blob_id(BODY)}: it is not"
        ):
            authors_adapters("visa")
        assert files(cache) == []

    def test_truncated_body_is_refused_and_not_kept(self, mirror: Mirror, cache: Path) -> None:
        mirror.announced = len(BODY) + 500
        with pytest.raises(WeightsUnavailableError, match=r"the connection ended after 8000 of 8500 bytes"):
            authors_adapters("visa")
        assert files(cache) == []

    def test_chunked_body_that_breaks_off(self, mirror: Mirror, cache: Path) -> None:
        """As a proxy sends it: no length, and the last chunk never comes."""
        mirror.announced, mirror.headers = None, {"Transfer-Encoding": "chunked"}
        mirror.body = b"%x\r\n" % (len(BODY) + 1) + BODY
        with pytest.raises(WeightsUnavailableError, match=r"could not be fetched"):
            authors_adapters("visa")
        assert files(cache) == []

    @pytest.mark.usefixtures("mirror")
    def test_mirror_without_a_scheme(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(ADAPTERS_URL_VARIABLE, "mirror.example/adapters")  # the scheme is missing
        with pytest.raises((WeightsUnavailableError, ValueError), match=r"mirror\.example.*visa_pretrained\.pth"):
            authors_adapters("visa")
        assert files(cache) == []

    def test_damaged_cached_file_stays_where_nothing_better_comes(self, mirror: Mirror, cache: Path) -> None:
        path = authors_adapters("visa")
        path.write_bytes(b"damaged")
        mirror.status = 503
        with pytest.raises(WeightsUnavailableError, match="503"):
            authors_adapters("visa")
        assert files(cache) == ["anomalib_aprilgan/f13b8a6/visa_pretrained.pth"]

    def test_not_found_names_address_place_and_remedy(self, mirror: Mirror, cache: Path) -> None:
        mirror.status = 404
        with pytest.raises(WeightsUnavailableError) as caught:
            authors_adapters("visa")
        text = str(caught.value)
        assert f"{mirror.url}/mirror/visa_pretrained.pth could not be fetched" in text
        assert "404" in text
        assert f"put it at {cache / 'anomalib_aprilgan' / 'f13b8a6' / 'visa_pretrained.pth'}" in text
        assert "`adapters=/path/to/visa_pretrained.pth`" in text
        assert files(cache) == []

    @pytest.mark.usefixtures("mirror")
    def test_no_server(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(ADAPTERS_URL_VARIABLE, "http://127.0.0.1:9")
        with pytest.raises(FileNotFoundError, match=r"could not be fetched \(.*refused"):
            authors_adapters("visa")
        assert files(cache) == []

    @pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
    def test_offline_asks_nobody(self, mirror: Mirror, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
        monkeypatch.setenv(variable, "1")
        with pytest.raises(
            WeightsUnavailableError, match=r"visa_pretrained\.pth is missing or damaged and .* Fetch http"
        ):
            authors_adapters("visa")
        assert mirror.requests == []

    @pytest.mark.parametrize(
        ("value", "offline"), [("1", True), ("TRUE", True), ("yes", True), ("0", False), ("", False)]
    )
    def test_what_counts_as_offline(self, monkeypatch: pytest.MonkeyPatch, value: str, offline: bool) -> None:
        monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        assert is_offline() is offline

    def test_published_entries(self) -> None:
        assert {name: entry.trained_on for name, entry in AUTHORS_ADAPTERS.items()} == {
            "mvtec": "MVTecAD",
            "visa": "Visa",
        }
        assert all(len(entry.git_blob_id) == 40 for entry in AUTHORS_ADAPTERS.values())


class TestFetch:
    def test_server_that_announces_no_length(self, mirror: Mirror, tmp_path: Path) -> None:
        mirror.announced = None
        fetch(mirror.url, tmp_path / "deep" / "er" / "file", verify_sha256(hashlib.sha256(BODY).hexdigest()))
        assert (tmp_path / "deep" / "er" / "file").read_bytes() == BODY

    def test_a_refused_file_leaves_the_old_one(self, mirror: Mirror, tmp_path: Path) -> None:
        target = tmp_path / "file"
        target.write_bytes(b"old")
        with pytest.raises(ValueError, match=r"SHA-256 .*, expected 0000"):
            fetch(mirror.url, target, verify_sha256("0000"))
        assert target.read_bytes() == b"old"
        assert files(tmp_path) == ["file"]

    def test_verification_sees_the_whole_file_before_the_name_appears(self, mirror: Mirror, tmp_path: Path) -> None:
        target, seen = tmp_path / "file", []
        fetch(mirror.url, target, lambda part: seen.append((part.read_bytes() == BODY, target.exists())))
        assert seen == [(True, False)]

    def test_target_that_cannot_be_written(self, mirror: Mirror, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(OSError, match="file"):
            fetch(mirror.url, tmp_path / "file" / "below", lambda _: None)
        assert mirror.requests == []

    def test_server_that_falls_silent(self, mirror: Mirror, tmp_path: Path) -> None:
        """It sends half the body and keeps the connection open."""
        mirror.body, mirror.silence = BODY[:4000], Event()
        try:
            with pytest.raises(OSError, match="timed out"):
                fetch(mirror.url, tmp_path / "file", lambda _: None, timeout=0.2)
        finally:
            mirror.silence.set()
        assert files(tmp_path) == []

    def test_progress_is_shown(self, mirror: Mirror, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        fetch(mirror.url, tmp_path / "weights.pt", lambda _: None)
        assert re.search(r"weights\.pt .* 8\.0/8\.0 kB", capsys.readouterr().err)


class TestDigests:
    @pytest.mark.parametrize("content", [b"", b"hello\n", bytes(range(256)) * 9000])
    def test_git_blob_id_is_gits(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "file"
        path.write_bytes(content)
        theirs = subprocess.run(
            ["git", "hash-object", "--no-filters", path], capture_output=True, text=True, check=True
        )
        assert git_blob_id(path) == theirs.stdout.strip()
        assert sha256(path) == hashlib.sha256(content).hexdigest()

    def test_known_values(self, tmp_path: Path) -> None:
        path = tmp_path / "empty"
        path.touch()
        assert git_blob_id(path) == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
        assert sha256(path).startswith("e3b0c442")
        verify_sha256("e3b0c442")(path)
        verify_sha256("")(path)  # nothing is known of this file

    def test_wrong_digest(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"other")
        with pytest.raises(
            ValueError, match=r"has SHA-256 [0-9a-f]{8} \(5 bytes\), expected e3b0c442: it is not the published one"
        ):
            verify_sha256("e3b0c442")(path)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        for name in ("input_resolution", "context_length", "vocab_size"):
            self.register_buffer(name, torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.input_resolution


class Payload:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("executed"),)


TENSORS = {"layer.weight": torch.arange(6.0).reshape(3, 2), "layer.bias": torch.tensor([1.0, 2.0, 3.0])}
WRITERS: dict[str, Callable[[Path], object]] = {
    "plain.safetensors": lambda path: save_file(TENSORS, path),
    "plain.pt": lambda path: torch.save(TENSORS, path),
    "legacy.pth": lambda path: torch.save(TENSORS, path, _use_new_zipfile_serialization=False),
    "nested.pt": lambda path: torch.save({"state_dict": TENSORS, "epoch": 7}, path),
    "module.pt": lambda path: torch.save({f"module.{name}": value for name, value in TENSORS.items()}, path),
    "nested_module.ckpt": lambda path: torch.save({"state_dict": {f"module.{n}": v for n, v in TENSORS.items()}}, path),
    "module.safetensors": lambda path: save_file({f"module.{name}": value for name, value in TENSORS.items()}, path),
    "no_suffix": lambda path: torch.save(TENSORS, path),
}


class TestReadStateDict:
    @pytest.mark.parametrize("name", WRITERS)
    def test_every_layout(self, tmp_path: Path, name: str) -> None:
        WRITERS[name](tmp_path / name)
        read = read_state_dict(tmp_path / name, "pretrained")
        assert set(read) == set(TENSORS)
        assert all(torch.equal(read[key], value) for key, value in TENSORS.items())

    @pytest.mark.parametrize("how", ["script", "trace"])
    def test_torchscript_archive_without_its_constants(self, tmp_path: Path, how: str) -> None:
        module = Tiny()
        archive = torch.jit.script(module) if how == "script" else torch.jit.trace(module, torch.zeros(1, 2))
        archive.save(tmp_path / "archive.pt")
        read = read_state_dict(tmp_path / "archive.pt", "pretrained", torchscript=True)
        assert sorted(read) == ["layer.bias", "layer.weight"]
        assert torch.equal(read["layer.weight"], module.layer.weight)

    def test_other_key(self, tmp_path: Path) -> None:
        torch.save({"trainable_linearlayer": TENSORS}, tmp_path / "file.pth")
        assert set(read_state_dict(tmp_path / "file.pth", "adapters", "trainable_linearlayer")) == set(TENSORS)

    def test_names_of_which_some_only_begin_with_module_stay(self, tmp_path: Path) -> None:
        torch.save({"module.a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "file.pt")
        assert set(read_state_dict(tmp_path / "file.pt", "pretrained")) == {"module.a", "b"}

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"`pretrained`: no weight file .*absent\.pt\."):
            read_state_dict(tmp_path / "absent.pt", "pretrained")

    @pytest.mark.parametrize("name", ["plain.safetensors", "plain.pt", "legacy.pth"])
    @pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.95])
    def test_truncated(self, tmp_path: Path, name: str, kept: float) -> None:
        path = tmp_path / name
        WRITERS[name](path)
        path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
        size = path.stat().st_size
        with pytest.raises(ValueError, match=rf"`pretrained`: .* \({size} bytes\) cannot be read: is it complete, and"):
            read_state_dict(path, "pretrained")

    def test_truncated_archive(self, tmp_path: Path) -> None:
        path = tmp_path / "archive.pt"
        torch.jit.script(Tiny()).save(path)
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(ValueError, match="cannot be read: is it complete"):
            read_state_dict(path, "pretrained")

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".pth", ".png"])
    @pytest.mark.parametrize(
        "content", [b"", b"<html>404</html>", b"just some words\n" * 100, bytes(1000), b"PK\3\4zip?"]
    )
    def test_no_weights_at_all(self, tmp_path: Path, suffix: str, content: bytes) -> None:
        path = tmp_path / f"file{suffix}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"`adapters`: .*file.* cannot be read"):
            read_state_dict(path, "adapters")

    def test_a_pickle_with_other_objects_is_refused_and_not_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        torch.save({"weight": torch.zeros(1), "more": Payload()}, tmp_path / "torch.pt")
        (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload()))
        for name in ("torch.pt", "plain.pt"):
            with pytest.raises(ValueError, match=rf"{name}.*cannot be read"):
                read_state_dict(tmp_path / name, "pretrained")
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize(
        "content", [{}, [torch.zeros(1)], {"a": 1}, {"state_dict": {}}, {"state_dict": {"a": "b"}}, torch.zeros(3)]
    )
    def test_something_else_than_a_mapping_of_tensors(self, tmp_path: Path, content: object) -> None:
        torch.save(content, tmp_path / "file.pt")
        with pytest.raises(ValueError, match=r"file\.pt holds no plain mapping of names to tensors"):
            read_state_dict(tmp_path / "file.pt", "pretrained")

    def test_names_that_are_no_strings(self, tmp_path: Path) -> None:
        torch.save({0: torch.zeros(1)}, tmp_path / "file.pt")
        with pytest.raises(ValueError, match="holds no plain mapping of names to tensors"):
            read_state_dict(tmp_path / "file.pt", "pretrained")
