"""Tokenizers on the Hugging Face Hub: its real client against a small server on this machine."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard

from bitvae import BitVAE, BitVAEConfig, load_image
from bitvae.checkpoints import CheckpointError, model_card
from bitvae.entropy_coding import LOADED_CODERS, Coder, bundled_coder, coder_for
from bitvae.evaluation import evaluate, read_results
from bitvae.images import bundled_photographs
from bitvae.protocols import protocol

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "demo-tokenizer"
TOKEN = "hf_" + 34 * "x"
CONFIG = BitVAEConfig(dim=6, channels=32, multipliers=(1, 1, 1), res_blocks=1, stride=4)


class Hub(BaseHTTPRequestHandler):
    "The part of the Hub's interface that the client uses; repositories are branches of files by name."

    def reply(self, code=200, content=b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def files(self, repo, revision):
        "Return commit and files of a revision; reply with the Hub's error and return None without them."
        repos, gated = self.server.repos, self.server.gated
        if repo in gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(403, X_Error_Code="GatedRepo")
        if repo not in repos:
            return self.reply(401, X_Error_Code="RepoNotFound")
        for branch, files in repos[repo].items():
            commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
            if revision in (branch, commit):
                return commit, files
        return self.reply(404, X_Error_Code="RevisionNotFound")

    def do_GET(self):
        if found := re.fullmatch(r"/api/models/(\w+/\w+)/(revision|tree)/(\w+)(\?.*)?", self.path):
            if state := self.files(found[1], found[3]):
                commit, files = state
                tree = [{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in files.items()]
                self.reply(content={"id": found[1], "sha": commit} if found[2] == "revision" else tree)
        elif found := re.fullmatch(r"/(\w+/\w+)/resolve/(\w+)/([\w.]+)", self.path):
            if state := self.files(found[1], found[2]):
                commit, files = state
                if found[3] not in files:
                    return self.reply(404, X_Error_Code="EntryNotFound")
                self.server.served.append(found[3])
                etag = hashlib.sha1(files[found[3]]).hexdigest()
                self.reply(200, files[found[3]], ETag=f'"{etag}"', X_Repo_Commit=commit)
        else:
            self.reply(404)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "Invalid username or password."})
        repos = self.server.repos
        if self.path == "/api/validate-yaml":
            self.reply(content={"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            request = json.loads(body)
            repo = f"{request['organization']}/{request['name']}"
            repos.setdefault(repo, {"main": {}})
            self.reply(content={"url": repo})
        elif found := re.fullmatch(r"/api/models/(\w+/\w+)/branch/(\w+)", self.path):
            repos[found[1]].setdefault(found[2], dict(repos[found[1]]["main"]))
            self.reply()
        elif found := re.fullmatch(r"/api/models/(\w+/\w+)/preupload/(\w+)", self.path):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.reply(content={"files": modes})
        elif found := re.fullmatch(r"/api/models/(\w+/\w+)/commit/(\w+)", self.path):
            entries = [json.loads(line) for line in body.splitlines()]
            files = {e["value"]["path"]: e["value"]["content"] for e in entries if e["key"] == "file"}
            repos[found[1]][found[2]] |= {name: base64.b64decode(content) for name, content in files.items()}
            self.reply(content={"commitUrl": f"{found[1]}/commit/0", "commitOid": "0"})
        else:
            self.reply(404)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A running server, to which the client is directed, with an empty cache."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.gated, server.served = {}, set(), []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def tok():
    torch.manual_seed(0)
    return BitVAE(CONFIG).eval()


@pytest.fixture(scope="module")
def x():
    return load_image(bundled_photographs()[1], 64)


def test_round_trip(hub, tok, x):
    "The same bits, coder and fingerprint come back; a second load needs no file again, or no network."
    coder = Coder(bundled_coder().weights, tokenizer=tok.fingerprint)
    LOADED_CODERS[coder.id] = coder
    compressed = tok.encode(x).to_bytes(compress=True)
    assert tok.push_to_hub("user/small", token=TOKEN, license="mit") == "user/small/commit/0"
    assert set(hub.repos["user/small"]["main"]) == {
        "README.md", "coder.safetensors", "config.json", "model.safetensors"}
    LOADED_CODERS.pop(coder.id)
    again = BitVAE.from_pretrained("user/small")
    assert again.fingerprint == tok.fingerprint and again.encode(x) == tok.encode(x)
    assert coder_for(again.fingerprint, CONFIG.dim).id == coder.id
    assert again.encode(x).to_bytes(compress=True) == compressed
    assert "README.md" not in hub.served
    served = len(hub.served)
    assert BitVAE.from_pretrained("user/small", mode="dense").config.mode == "dense"
    assert len(hub.served) == served
    LOADED_CODERS.pop(coder.id)
    hub.shutdown()
    hub.server_close()
    assert BitVAE.from_pretrained("user/small").fingerprint == tok.fingerprint
    LOADED_CODERS.pop(coder.id)


def test_a_revision(hub, tok, x):
    "A branch is created if missing, and loads apart from main."
    torch.manual_seed(1)
    other = BitVAE(CONFIG).eval()
    tok.push_to_hub("user/small", token=TOKEN)
    other.push_to_hub("user/small", revision="wide", token=TOKEN)
    assert BitVAE.from_pretrained("user/small").fingerprint == tok.fingerprint
    assert BitVAE.from_pretrained("user/small", revision="wide").fingerprint == other.fingerprint
    message = "user/small .* no revision 'v9'; see http.*/user/small/commits"
    with pytest.raises(FileNotFoundError, match=message):
        BitVAE.from_pretrained("user/small", revision="v9")
    with pytest.raises(ValueError, match="revision 'v9' needs a repository on the Hub, got 'demo'"):
        BitVAE.from_pretrained("demo", revision="v9")


def test_local_names_are_tried_first(hub, tok, tmp_path):
    "A folder, the demo and a released file take no part of the network."
    torch.manual_seed(1)
    local = BitVAE(CONFIG).eval()
    tok.push_to_hub("user/small", token=TOKEN)
    local.save_pretrained(tmp_path / "user/small")
    hub.served.clear()
    assert BitVAE.from_pretrained("user/small").fingerprint == local.fingerprint
    assert BitVAE.from_pretrained("demo").config.dim == 6
    with pytest.raises(FileNotFoundError, match="no tokenizer 'user/small.pth': give a checkpoint file"):
        BitVAE.from_pretrained("user/small.pth")
    assert not hub.served


def test_a_card_on_the_hub_is_kept(hub, tok):
    "Until new results or metadata are given."
    tok.push_to_hub("user/small", token=TOKEN, training="9 steps of recipe smoke")
    files = hub.repos["user/small"]["main"]
    assert 'from_pretrained("user/small")' in files["README.md"].decode()
    assert "9 steps of recipe smoke" in files["README.md"].decode()
    files["README.md"] = b"my own text"
    tok.push_to_hub("user/small", token=TOKEN, training="9 steps of recipe smoke")
    assert files["README.md"] == b"my own text"
    results = evaluate(tok, bundled_photographs()[:2], protocol("clamped", size=32))
    tok.push_to_hub("user/small", token=TOKEN, results=results, license="mit", datasets=["user/photographs"])
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.library_name) == ("mit", "bitvae")
    assert card.data.datasets == ["user/photographs"] and card.data.metrics == ["psnr", "ssim"]
    psnr = card.data.eval_results[0]
    assert psnr.dataset_config == "clamped 32" and psnr.dataset_args["resize"] == "bicubic"
    last = [*results["protocols"]["clamped 32"]["rows"].values()][-1]
    assert psnr.metric_value == pytest.approx(last["psnr"], abs=1e-4)
    assert "clamped 32, 2 images" in card.text and "PSNR, dB" in card.text


def test_what_cannot_be_loaded(hub, tok):
    "Each error is one line that names the repository and the remedy."
    hub.repos["user/classifier"] = {"main": {"config.json": b'{"architectures": ["ResNet"]}',
                                             "model.safetensors": b"never read"}}
    hub.repos["user/weights"] = {"main": {"model.pth": b""}}
    hub.repos["user/half"] = {"main": {"config.json": b"{}"}}
    tok.push_to_hub("user/closed", token=TOKEN)
    hub.gated.add("user/closed")
    for name, error, message in (
        ("user/gone", FileNotFoundError, "no local file or folder 'user/gone', .* no such repository, or"),
        ("user/closed", PermissionError, "user/closed .* gated; request access at http.*/user/closed, then"),
        ("user/classifier", CheckpointError, "user/classifier .* unknown configuration keys architectures"),
        ("user/weights", CheckpointError, "user/weights .* it has no config.json"),
        ("user/half", CheckpointError, "user/half .* it has no model.safetensors"),
    ):
        with pytest.raises(error, match=message) as caught:
            BitVAE.from_pretrained(name)
        assert len(str(caught.value).splitlines()) == 1
    assert "model.safetensors" not in hub.served
    assert BitVAE.from_pretrained("user/closed", token=TOKEN).fingerprint == tok.fingerprint
    with pytest.raises(PermissionError, match="upload user/new .* not allowed; as a user .* HF_TOKEN"):
        tok.push_to_hub("user/new")
    for name in ("new", "user/a b", "user/a--b", "a/b/c"):  # before a request
        with pytest.raises(ValueError, match=r"named user/repo, got|upload user/a--b to the Hub: "):
            tok.push_to_hub(name, token=TOKEN)


def test_offline(hub, monkeypatch):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(ConnectionError, match="no local file or folder 'user/small', .* check the network"):
        BitVAE.from_pretrained("user/small")


def test_the_demo_card():
    "Its metadata is what `model_card` writes of its results; its text is its own."
    card = ModelCard.load(BENCHMARK / "README.md")
    demo, results = BitVAE.from_pretrained("demo"), read_results(BENCHMARK)
    assert card.data.to_dict() == model_card(demo, results, "demo", license="mit").data.to_dict()
    assert card.text.lstrip().startswith("# The tokenizer `demo`")
