"""Does a model come from the hub that was named, with the bytes it promised? A hub on loopback, a model made here."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tasks import hub, models
from tasks.contract import Architecture, ModelSource, TaskError
from tasks.hub import HubFile, check_file, local_path, wanted

NAME, SHA = "some/tiny", "a" * 40
TINY = Architecture(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = models.tiny_tokenizer()
    models.save(folder, models.from_architecture(TINY, tokenizer, seed=0), tokenizer)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling_tiny.py").write_text("raise SystemExit('code of others ran')")
    return folder


class Hub:
    """Speaks as much of Hugging Face and of ModelScope as is needed; keeps what it was asked and by whom."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked, self.tokens = folder, list[str](), set[str]()
        self.damaged: str | None = None
        self.extra: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                outer.answer(self, body=False)

            def do_GET(self) -> None:
                outer.answer(self, body=True)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def bytes_of(self, name: str) -> bytes:
        data = (self.folder / name).read_bytes()
        return bytes([data[0] ^ 1]) + data[1:] if name == self.damaged else data

    def answer(self, to: BaseHTTPRequestHandler, *, body: bool) -> None:
        url = urlsplit(to.path)
        self.asked.append(unquote(url.path))
        if NAME in self.asked[-1]:
            self.tokens.add(to.headers.get("Authorization") or "")
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        headers: dict[str, str] = {}
        if url.path.startswith(f"/api/models/{NAME}"):
            data = json.dumps(self.described()).encode()
        elif url.path == f"/api/v1/models/{NAME}/repo/files":
            data = json.dumps({"Code": 200, "Data": {"Files": self.listed()}}).encode()
        elif url.path == f"/api/v1/models/{NAME}/repo":
            data = self.bytes_of(query["FilePath"])
        elif url.path.startswith(f"/{NAME}/resolve/{SHA}/"):
            name = url.path.rpartition("/")[2]
            data = self.bytes_of(name)
            whole = (self.folder / name).read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(whole).hexdigest()}"', "X-Repo-Commit": SHA}
        else:
            to.send_error(404)
            return
        to.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            to.send_header(key, value)
        to.end_headers()
        if body:
            to.wfile.write(data)

    def described(self) -> dict[str, Any]:
        files = []
        for path in sorted(self.folder.iterdir()):
            data = path.read_bytes()
            item: dict[str, Any] = {"rfilename": path.name, "size": len(data)}
            item["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            if path.suffix in (".safetensors", ".bin"):
                item["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1}
            files.append(item)
        return {"id": NAME, "modelId": NAME, "sha": SHA, "siblings": files, "tags": [], "private": False}

    def listed(self) -> list[dict[str, Any]]:
        files = [
            {"Path": path.name, "Type": "blob", "Sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in sorted(self.folder.iterdir())
        ]
        return [*files, {"Path": "sub", "Type": "tree"}, *self.extra]


@pytest.fixture
def place(model: Path) -> Iterator[Hub]:
    served = Hub(model)
    yield served
    served.server.shutdown()
    served.server.server_close()


def load(tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Loads the model in a process of its own, since huggingface_hub reads its environment when it is imported."""
    script = (
        "import torch; from unittest.mock import Mock\n"
        "from tasks import models; from tasks.contract import ModelSource, TaskError\n"
        f"source = ModelSource(path={NAME!r})\n"
        "try: loaded = models.load(Mock(), source, dtype=torch.float32)\n"
        "except TaskError as error: raise SystemExit(f'{error.message} -> {error.hint}')\n"
        "print(sum(p.numel() for p in loaded.model.parameters()), len(loaded.tokenizer))\n"
    )
    return process(script, tmp_path, **env)


def process(script: str, tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    own = {"HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", script], env={**clean, **own, **env}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_a_model_comes_from_the_mirror_that_is_named_with_the_readers_token_and_no_pickle(
    place: Hub, tmp_path: Path
) -> None:
    done = load(tmp_path, HF_ENDPOINT=place.url, HF_TOKEN="hf_hush")
    assert done.returncode == 0, done.stderr
    params, words = (int(word) for word in done.stdout.split())
    assert params > 1000 and words > 256
    assert place.tokens == {"Bearer hf_hush"}
    assert "hf_hush" not in done.stdout + done.stderr
    fetched = {path.rpartition("/")[2] for path in place.asked if "/resolve/" in path}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= fetched
    assert not fetched & {"pytorch_model.bin", "modeling_tiny.py"}
    place.asked.clear()
    again = load(tmp_path, HF_HUB_OFFLINE="1")  # by its name, as what it was fetched as
    assert again.stdout == done.stdout and not place.asked


@pytest.mark.slow
@pytest.mark.parametrize("which", ["huggingface", "modelscope"])
def test_what_was_fetched_is_found_again_without_asking(place: Hub, tmp_path: Path, which: str) -> None:
    script = (
        "from tasks import hub; from tasks.contract import ModelSource\n"
        f"source = ModelSource(path={NAME!r})\n"
        "print(hub.fetched(source)); hub.local_path(source, weights=False); print(hub.fetched(source))\n"
        "print(hub.local_path(source)); print(hub.fetched(source))\n"
    )
    done = process(script, tmp_path, HF_ENDPOINT=place.url, KDCLOUD_HUB=which, MODELSCOPE_DOMAIN=place.url)
    before, without_weights, folder, after = done.stdout.split()
    assert before == without_weights == "None" and folder == after


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("which", ["huggingface", "modelscope"])
def test_bytes_that_are_not_what_the_hub_promised_are_never_loaded(
    place: Hub, tmp_path: Path, name: str, which: str
) -> None:
    place.damaged = name
    done = load(tmp_path, HF_ENDPOINT=place.url, KDCLOUD_HUB=which, MODELSCOPE_DOMAIN=place.url)
    assert done.returncode == 1
    assert f"{name} is not what the hub promises" in done.stderr


def test_a_cache_that_cannot_be_written_or_was_half_filled_is_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models--some--tiny" / "snapshots" / SHA
    folder.mkdir(parents=True)
    (tmp_path / "models--some--tiny" / "refs").write_text("a file where a folder is wanted")
    hub._remember(folder, "main")  # as where others keep it
    monkeypatch.setenv("KDCLOUD_HUB", "modelscope")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    half = tmp_path / "kdcloud" / "modelscope" / "some" / "tiny" / "master"
    half.mkdir(parents=True)
    (half / "config.json").write_text("{}")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (half / "model.safetensors.index.json").write_text(json.dumps(index))
    (half / "model-1.safetensors").touch()
    assert hub.fetched(ModelSource(path=NAME)) is None and hub.fetched(ModelSource(path="../x")) is None
    (half / "model-2.safetensors").touch()
    assert hub.fetched(ModelSource(path=NAME)) == half


@pytest.mark.slow
def test_modelscope_gives_the_same_model_and_hears_no_token(place: Hub, tmp_path: Path) -> None:
    env = {"KDCLOUD_HUB": "modelscope", "MODELSCOPE_DOMAIN": place.url, "HF_TOKEN": "hf_hush"}
    first = load(tmp_path, **env)
    assert first.returncode == 0, first.stderr
    assert place.tokens == {""}
    assert all(path.startswith("/api/v1/models/") for path in place.asked)
    place.asked.clear()
    assert load(tmp_path, **env).stdout == first.stdout
    assert set(place.asked) == {f"/api/v1/models/{NAME}/repo/files"}  # what is there and right is not fetched again
    kept = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert "model.safetensors" in kept and not kept & {"pytorch_model.bin", "modeling_tiny.py"}


@pytest.mark.slow
def test_a_model_that_is_not_there_is_one_sentence_with_the_ways_out(place: Hub, tmp_path: Path) -> None:
    script = "nothing/here"
    clean = load(tmp_path, HF_ENDPOINT=f"{place.url}/{script}", HF_TOKEN="hf_hush")
    assert clean.returncode == 1 and "Traceback" not in clean.stderr
    assert "KDCLOUD_HUB=modelscope" in clean.stderr and "hf_hush" not in clean.stderr


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_one_sentence_too(tmp_path: Path) -> None:
    alone = load(tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_DISABLE_TELEMETRY="1")  # nobody listens there
    assert alone.returncode == 1 and "Traceback" not in alone.stderr
    assert f"cannot fetch {NAME} from the hub" in alone.stderr and "HF_ENDPOINT to a mirror" in alone.stderr


@pytest.mark.parametrize("path", ["../evil.json", "/etc/evil.json", "a/../../evil.json"])
def test_a_hub_cannot_write_outside_of_its_folder(
    place: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    place.extra = [{"Path": path, "Type": "blob", "Sha256": "0" * 64}]
    monkeypatch.setenv("KDCLOUD_HUB", "modelscope")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", place.url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hub._from_modelscope.cache_clear()
    with pytest.raises(TaskError, match="is not a name on the hub"):
        local_path(ModelSource(path=NAME))
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize(
    ("path", "weights", "code", "is_wanted"),
    [
        ("model-00001-of-00002.safetensors", True, False, True),
        ("model.safetensors", False, False, False),
        ("tokenizer.json", False, False, True),
        ("chat_template.jinja", False, False, True),
        ("modeling_x.py", True, False, False),
        ("modeling_x.py", True, True, True),
        ("pytorch_model.bin", True, True, False),
        ("original/params.json", True, True, False),
        ("consolidated.safetensors", True, False, False),
    ],
)
def test_only_what_a_stage_needs_is_fetched(path: str, weights: bool, code: bool, is_wanted: bool) -> None:
    assert wanted(path, weights=weights, code=code) is is_wanted


def test_a_file_without_any_hash_is_refused_and_gits_own_hash_will_do(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b"hello\n")
    check_file(file, HubFile("config.json", None, "ce013625030ba8dba906f756967f9e9ca394464a"))  # git hash-object
    with pytest.raises(TaskError, match="gives no hash"):
        check_file(file, HubFile("config.json", None))


def test_a_folder_of_ones_own_and_an_offline_name_stay_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert local_path(ModelSource(path=str(tmp_path))) == str(tmp_path)
    assert local_path(ModelSource(path=NAME)) == NAME  # HF_HUB_OFFLINE, see conftest
    monkeypatch.setenv("KDCLOUD_HUB", "elsewhere")
    with pytest.raises(TaskError, match="KDCLOUD_HUB=elsewhere"):
        local_path(ModelSource(path=NAME))
