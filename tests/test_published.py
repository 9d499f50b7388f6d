"""The paper's own tokens: fetched from a server of this machine that serves a file of the published format."""

from __future__ import annotations

import hashlib
import pickle
import threading
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import assert_refused

from ovam_core import InputError, Token, published
from ovam_core.cli import main
from ovam_core.data.voc import VOC_CLASSES
from ovam_core.io.token_files import MAX_BYTES

SD15 = SimpleNamespace(name="stable-diffusion-v1-5/stable-diffusion-v1-5")


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A pickled dict of 20 float32 arrays of 768 in an array of one object."""
    rng = np.random.default_rng(0)
    vectors = {name.replace(" ", "-"): rng.standard_normal(768).astype(np.float32) for name in published.NAMES}
    file = tmp_path_factory.mktemp("published") / "tokens.npy"
    with open(file, "wb") as opened:
        np.lib.format.write_array_header_1_0(opened, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(np.array(vectors, dtype=object), opened, protocol=4)
    return file.read_bytes(), vectors


@pytest.fixture
def server(content, monkeypatch):
    """What it serves by path, and what it was asked for."""
    asked: list[str] = []
    served = {"/good": content[0], "/wrong": content[0][:-1] + b"x", "/large": bytes(MAX_BYTES + (1 << 20))}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/good")
                self.end_headers()
                return
            data = served.get(self.path)
            self.send_response(404 if data is None else 200)
            self.end_headers()
            with suppress(BrokenPipeError, ConnectionResetError):  # who reads no more than is allowed hangs up
                self.wfile.write(data or b"no such file")

        def log_message(self, *_):
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(published, "SHA256", hashlib.sha256(content[0]).hexdigest())
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield SimpleNamespace(url=f"http://127.0.0.1:{found.server_port}", asked=asked)
    found.shutdown()
    found.server_close()
    thread.join()


def test_the_names_need_no_network():
    assert published.published_names(SD15) == list(VOC_CLASSES)
    assert published.published_names(SimpleNamespace(name="/models/stable-diffusion-v1-5/")) == list(VOC_CLASSES)
    for other in ("emoji-voc", "stabilityai/stable-diffusion-2-1", "unknown", ""):
        assert published.published_names(SimpleNamespace(name=other)) == []


@pytest.mark.parametrize("name", ["potted plant", "tv", "aeroplane"])
def test_a_token(server, content, tmp_path, name):
    token = published.published_token(SD15, name, cache=tmp_path, url=f"{server.url}/good")
    assert isinstance(token, Token)
    assert (token.names, token.model, token.branch, token.steps) == ((name,), SD15.name, "unconditional", 30)
    assert torch.equal(token.embedding, torch.from_numpy(content[1][name.replace(" ", "-")])[None])


def test_it_is_fetched_once_and_checked_at_each_reading(server, tmp_path):
    url, cache = f"{server.url}/good", tmp_path / "a" / "b"
    for name in ("cat", "dog", "cat"):
        published.published_token(SD15, name, cache=cache, url=url)
    assert server.asked == ["/good"]
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-3] + b"xyz")
    published.published_token(SD15, "cat", cache=cache, url=url)
    assert server.asked == ["/good", "/good"]
    file.write_bytes(b"")
    with pytest.raises(InputError, match="is there a network"):
        published.published_token(SD15, "cat", cache=cache, url=f"{server.url}/missing")


def test_a_file_that_has_moved(server, tmp_path):
    assert published.published_token(SD15, "cat", cache=tmp_path, url=f"{server.url}/moved").names == ("cat",)


@pytest.mark.parametrize(("path", "said"), [("wrong", "not the file"), ("large", "not the file"), ("none", "404")])
def test_what_is_not_the_file(server, tmp_path, path, said):
    with pytest.raises(InputError, match=said) as refused:
        published.published_token(SD15, "cat", cache=tmp_path, url=f"{server.url}/{path}")
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x", "file:///no/such/file", "nonsense", "http://[", "http://a b/"])
def test_without_a_network(tmp_path, url):
    with pytest.raises(InputError, match="is there a network"):
        published.published_token(SD15, "cat", cache=tmp_path, url=url)


def test_a_server_that_never_ends(server, tmp_path, monkeypatch):
    monkeypatch.setattr(published, "MAX_SECONDS", -1.0)
    with pytest.raises(InputError, match="it takes too long"):
        published.published_token(SD15, "cat", cache=tmp_path, url=f"{server.url}/good")


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    token = published.published_token(SD15, "cat", cache=tmp_path / "file", url=f"{server.url}/good")
    assert token.names == ("cat",)


def test_the_cache_is_the_users(server, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path))
    published.published_token(SD15, "cat", url=f"{server.url}/good")
    assert [x.name for x in tmp_path.rglob("*.npy")] == ["tokens_VOC.npy"]


@pytest.mark.parametrize(("model", "name"), [(SD15.name, "unicorn"), ("emoji-voc", "cat"), (SD15.name, "")])
def test_names_that_were_not_published(model, name):
    with pytest.raises(InputError, match="no published token"):
        published.published_token(SimpleNamespace(name=model), name)


def test_all_of_them_into_a_folder(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "cache"))
    url = published.fetch_voc_sd15.__kwdefaults__ | {"url": f"{server.url}/good"}
    monkeypatch.setattr(published.fetch_voc_sd15, "__kwdefaults__", url)
    assert main(["tokens", "fetch", "voc-sd15", "--out", str(tmp_path / "out")]) == 0
    listed = capsys.readouterr().out.split()
    assert len(listed) == 20
    token = Token.load(tmp_path / "out" / "potted-plant.safetensors")
    assert (token.branch, token.steps, token.classes) == ("unconditional", 30, ("potted plant",))

    own = replace(token, tau=0.5).save(tmp_path / "out" / "potted-plant.safetensors").read_bytes()
    (tmp_path / "out" / "cat.safetensors").unlink()
    assert main(["tokens", "fetch", "voc-sd15", "--out", str(tmp_path / "out")]) == 2
    assert_refused(capsys.readouterr().err.strip(), "There is a token")
    assert (tmp_path / "out" / "potted-plant.safetensors").read_bytes() == own
    assert not (tmp_path / "out" / "cat.safetensors").exists()
    (tmp_path / "out" / "potted-plant.safetensors").unlink()
    assert main(["tokens", "fetch", "voc-sd15", "--out", str(tmp_path / "out")]) == 0  # the others are the same ones
