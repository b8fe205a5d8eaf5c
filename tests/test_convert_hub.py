"""Names to directories: local ones, a hub cache without a network, and downloads from a hub that this test serves."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import jaxmodels as jm
from jaxmodels.assets import TINY_PYTHON
from jaxmodels.convert.errors import CheckpointError
from jaxmodels.convert.hub import resolve

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path):
    """A hub cache as huggingface_hub lays it out: blobs, refs, snapshots of links."""
    repo = tmp_path / "hub/models--org--tiny"
    for folder in ("blobs", "refs", f"snapshots/{SHA}/inner"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs/main").write_text(SHA)
    for name in ("config.json", "model.safetensors", "inner/config.json"):
        blob = repo / "blobs" / hashlib.sha256(name.encode()).hexdigest()
        blob.write_text(name)
        (repo / f"snapshots/{SHA}" / name).symlink_to(os.path.relpath(blob, (repo / f"snapshots/{SHA}" / name).parent))
    return tmp_path / "hub"


def test_a_cached_model_needs_no_network(cache):
    found = resolve("org/tiny", cache_dir=cache)  # HF_HUB_OFFLINE is set for all tests
    assert found == cache / f"models--org--tiny/snapshots/{SHA}"
    assert (found / "config.json").read_text() == "config.json"
    assert resolve("org/tiny", cache_dir=cache, revision=SHA, local_files_only=True) == found
    assert resolve("org/tiny", cache_dir=cache, subfolder="inner") == found / "inner"
    with pytest.raises(CheckpointError, match=r"org/tiny: has no folder 'outer'; it has \['config.json'"):
        resolve("org/tiny", cache_dir=cache, subfolder="outer")


def test_what_is_not_cached_says_how_to_get_it(cache):
    with pytest.raises(CheckpointError, match=r"org/other: no such directory here.*HF_HUB_OFFLINE.*`hf download org/other`"):
        resolve("org/other", cache_dir=cache)
    with pytest.raises(CheckpointError, match=r"`hf download org/tiny --revision v2`"):
        resolve("org/tiny", cache_dir=cache, revision="v2", local_files_only=True)


def test_local_directories(tmp_path, monkeypatch):
    (tmp_path / "org/tiny/inner").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("org/tiny") == Path("org/tiny")
    assert resolve(tmp_path / "org", subfolder="tiny/inner") == tmp_path / "org/tiny/inner"
    assert resolve("~/org") == tmp_path / "org"
    for name in ("./nowhere", "/no/such/dir", "a/b/c", "../x", "no where"):
        with pytest.raises(CheckpointError, match=r"no such directory; expected one with config.json"):
            resolve(name)
    with pytest.raises(CheckpointError, match="a file, expected a directory"):
        resolve("file")
    with pytest.raises(CheckpointError, match="has no folder 'x'"):
        resolve("org", subfolder="x")


FILES = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja"),
    *("model.safetensors", "model.fp16.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors"),
    *("pytorch_model.bin", "modeling_tiny.py", "onnx/model.onnx", "inner/config.json", "inner/model.safetensors", "README.md"),
    *("consolidated.safetensors", "additional_chat_templates/tool.jinja", "model.safetensors.index.fp16.json"),
]


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a snapshot needs: revision, tree, files."""

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": SHA, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if "/secret" in path and self.headers.get("Authorization") != "Bearer good":
            self.answer(401, b"{}", X_Error_Code="RepoNotFound")
        elif "/gated" in path:
            self.answer(403, b"{}", X_Error_Code="GatedRepo")
        elif "/absent" in path:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        elif path.endswith("/revision/v9"):
            self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        elif "/revision/" in path:
            repo = "/".join(path.split("/")[3:5])
            self.answer(200, json.dumps({"id": repo, "sha": SHA, "siblings": [{"rfilename": name} for name in FILES]}).encode())
        elif "/tree/" in path:
            tree = [{"type": "file", "path": name, "size": len(name), "oid": hashlib.sha1(name.encode()).hexdigest()} for name in FILES]
            self.answer(200, json.dumps(tree).encode())
        else:
            name = path.partition(f"/resolve/{SHA}/")[2]
            self.answer(200, name.encode(), ETag=f'"{hashlib.sha1(name.encode()).hexdigest()}"', Accept_Ranges="bytes")

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


SCRIPT = """
import json, sys
from pathlib import Path
import jaxmodels as jm
from jaxmodels.assets import TINY_PYTHON
from jaxmodels.convert.errors import CheckpointError
from jaxmodels.convert.hub import resolve
for name, options in json.loads(sys.argv[1]):
    try:
        found = resolve(name, **options)
        print(json.dumps(sorted(str(p.relative_to(found)) for p in Path(found).rglob("*") if p.is_file())))
    except CheckpointError as error:
        print(json.dumps(str(error)))
assert "jax" not in sys.modules
"""


def online(endpoint, home, *calls):
    """huggingface_hub reads its environment when it is imported, so calls that go to a hub are made in a process of their own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), json.dumps(calls)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=120)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_only_what_a_model_needs_is_fetched(endpoint, tmp_path):
    text = ["additional_chat_templates/tool.jinja", "chat_template.jinja", "config.json", "generation_config.json", "merges.txt"]
    text += ["tokenizer.json", "tokenizer.model"]
    caches = [str(tmp_path / name) for name in "abcd"]
    calls = [
        ("org/one", {"cache_dir": caches[0]}),
        ("org/two", {"cache_dir": caches[1], "variant": "fp16"}),
        ("org/three", {"cache_dir": caches[2], "subfolder": "inner"}),
        ("org/four", {"cache_dir": caches[3], "weights": False}),
        ("org/secret", {"token": "good", "weights": False}),
    ]
    plain, fp16, inner, light, secret = online(endpoint, tmp_path, *calls)
    assert plain == sorted([*text, "model-00001-of-00002.safetensors", "model.safetensors", "model.safetensors.index.json"])
    assert fp16 == sorted([*text, "model.fp16.safetensors", "model.safetensors.index.fp16.json"])
    assert inner == ["config.json", "model.safetensors"]
    assert light == secret == sorted(text)


def test_what_the_hub_refuses(endpoint, tmp_path):
    calls = [("org/absent", {}), ("org/secret", {}), ("org/gated", {"token": "x"}), ("org/one", {"revision": "v9"})]
    absent, secret, gated, revision = online(endpoint, tmp_path, *calls)
    assert absent.startswith("org/absent: no such directory here and no such repository at http://127.0.0.1")
    assert "`hf auth login`, HF_TOKEN or token=" in secret
    assert "terms accepted" in gated
    assert "has no revision 'v9'" in revision


def test_no_network(tmp_path):
    (error,) = online("http://127.0.0.1:9", tmp_path, ("org/one", {}))
    assert "org/one: no such directory here" in error
    assert "http://127.0.0.1:9 cannot be reached" in error


def test_a_config_needs_no_weights(monkeypatch):
    asked = []
    monkeypatch.setattr("jaxmodels.convert.hub.resolve", lambda path, **options: asked.append((path, options)) or TINY_PYTHON)
    assert jm.AutoConfig.from_pretrained("org/one", revision="v1").model_type == "llama"
    assert asked == [("org/one", {"revision": "v1", "weights": False})]
