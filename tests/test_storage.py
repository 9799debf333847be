"Object stores: sources, shards and tokenizers on a real S3 server, and one that fails."

import json
import os
import shutil
import signal
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from children import Child, bitvae as run, command_line
from torch.utils.data import DataLoader

from bitvae import BitVAE, load_image
from bitvae.images import bundled_photographs, save_image
from bitvae.storage import StorageError, list_objects, read_file, to_path
from bitvae.token_dataset import TokenDataset, collate_images, read_manifest, tokenize, verify_dataset

pytestmark = pytest.mark.slow
SECRET = "wJalrXUtnFEMIbPxRfiCYEXAMPLEKEY"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": SECRET}
OPTIONS = ["--size", "64", "--per-shard", "4", "--batch", "2"]


@pytest.fixture
def environment(tmp_path, monkeypatch):
    "Set credentials and a cache, and return a function that sets the endpoint."
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("BITVAE_CACHE", str(tmp_path / "cache"))

    def connect(endpoint):
        from s3fs import S3FileSystem

        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        S3FileSystem.clear_instance_cache()

    return connect


@pytest.fixture(scope="module")
def server():
    moto = pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
    server = moto.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(server, environment):
    "Return the path of an empty bucket."
    environment(server)
    path = to_path("s3://photographs")
    path.fs.invalidate_cache()
    if path.exists():
        path.fs.rm("photographs", recursive=True)
    path.fs.mkdir("photographs")
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    "Write nine small images in two classes, and one that is none."
    folder = tmp_path_factory.mktemp("images")
    for n, file in enumerate(bundled_photographs()):
        place = folder / ("class", "class-b")[n % 2]  # a text that begins with "class-b/" precedes "class/"
        place.mkdir(exist_ok=True)
        save_image(load_image(file, 80), place / f"{n}.png")
    (folder / "class-b" / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def reference(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    done = run("tokenize", "demo", "--images", images, "--folder", folder, *OPTIONS)
    assert done.returncode == 0, done.stderr
    return folder


def upload(folder, address):
    for file in Path(folder).rglob("*"):
        if file.is_file() and not file.name.startswith("."):
            (address / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())


def shards(folder):
    "Return the shards of a folder or address, by name."
    files = to_path(folder).iterdir()
    return {file.name: file.read_bytes() for file in files if file.name.endswith((".tar", ".safetensors"))}


def command(images, folder):
    return ["tokenize", "demo", "--images", str(images), "--folder", str(folder), *OPTIONS]


def test_shards_are_those_of_a_disk(bucket, images, reference):
    upload(images, bucket / "images")
    done = run(*command(bucket / "images", bucket / "shards"))
    assert done.returncode == 0 and "9 images in 3 shards" in done.stdout, done.stderr
    assert shards(bucket / "shards") == shards(reference)
    manifest = read_manifest(bucket / "shards")
    assert manifest["failed"] == 1 and manifest == verify_dataset(bucket / "shards")
    assert [t.label for t in TokenDataset(bucket / "shards")] == [t.label for t in TokenDataset(reference)]
    data = TokenDataset("s3://photographs/shards")
    shutil.rmtree(os.environ["BITVAE_CACHE"])
    assert data[0].label == 0
    loader = DataLoader(data, 3, num_workers=1, collate_fn=collate_images)  # in a fork of this process
    assert sum(len(labels) for _, labels in loader) == 9
    done = run("verify", bucket / "shards")
    assert done.returncode == 0 and "9 images in 3 shards" in done.stdout, done.stderr
    everything = [read_file(address) for address in list_objects("s3://photographs")]
    assert not any(value.encode() in content for value in CREDENTIALS.values() for content in everything)
    assert not any(value in done.stdout + done.stderr for value in CREDENTIALS.values())


def test_killed_jobs_resume(bucket, images, reference):
    words, killed = command(images, bucket / "shards"), 0
    for k in range(3):
        child = Child(command_line, *words)
        while child.process.is_alive() and len(list_objects("s3://photographs/shards")) <= 2 * k:
            time.sleep(0.02)
        killed += child.kill() == -signal.SIGKILL
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert shards(bucket / "shards") == shards(reference) and killed
    (bucket / "shards" / "shard-000001.tar").unlink()
    done = run(*words, "--processes", "2")
    assert done.returncode == 0 and shards(bucket / "shards") == shards(reference), done.stderr
    done = run(*words[:-1], "8", "--size", "32")
    assert done.returncode == 1 and "has shards with other size" in done.stderr


def test_tar_and_parquet_sources(bucket, images, tmp_path):
    import tarfile

    import pyarrow as pa
    from pyarrow import parquet

    files = sorted(images.rglob("*.png"))
    for n in range(2):
        with tarfile.open(tmp_path / f"{n}.tar", "w") as tar:
            for file in files[n::2]:
                tar.add(file, file.name)
        encoded = [{"bytes": file.read_bytes()} for file in files[n::2]]
        table = pa.table({"image": encoded, "label": [n] * len(encoded)})
        parquet.write_table(table, tmp_path / f"{n}.parquet")
    upload(tmp_path, bucket / "source")
    for kind in ("tar", "parquet"):
        pattern = f"s3://photographs/source/*.{kind}"
        manifest = tokenize(BitVAE.from_pretrained("demo"), pattern, bucket / kind, size=64)
        assert (manifest["count"], manifest["failed"], len(manifest["shards"])) == (9, 1, 2)
    assert [t.label for t in TokenDataset(bucket / "parquet")] == [0] * 5 + [1] * 4
    ours, theirs = TokenDataset(bucket / "tar"), TokenDataset(bucket / "parquet")
    assert all(a.bits == b.bits for a, b in zip(ours, theirs, strict=True))


def test_lists_name_objects_that_may_be_gone(bucket, images, tmp_path):
    upload(images, bucket / "images")
    (bucket / "list.txt").write_text("images/class/0.png 5\nimages/class/none.png 6\n")
    (tmp_path / "list.txt").write_text("s3://photographs/images/class/0.png 5\n")
    for source, failed in (("s3://photographs/list.txt", 1), (tmp_path / "list.txt", 0)):
        manifest = tokenize(BitVAE.from_pretrained("demo"), source, tmp_path / str(failed), size=64)
        assert (manifest["count"], manifest["failed"]) == (1, failed)
        assert TokenDataset(tmp_path / str(failed))[0].label == 5
    (reason,) = json.loads((tmp_path / "1" / "manifest.json").read_text())["shards"][0]["failed"].values()
    assert reason == "no such object: s3://photographs/images/class/none.png"


def test_training_from_a_store(bucket, images, tmp_path):
    upload(images, bucket / "images")
    settings = {"steps": 2, "size": 64, "batch": 2}
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    places = ["--images", bucket / "images", "--folder", tmp_path / "run"]
    done = run("train", "quick", *places, "--workers", 2, *words)
    assert done.returncode == 0, done.stdout + done.stderr


def test_tokenizers(bucket, tmp_path):
    tok = BitVAE.from_pretrained("demo")
    tok.save_pretrained(bucket / "tok")
    names = {file.name for file in (bucket / "tok").iterdir()}
    assert names == {"README.md", "coder.safetensors", "config.json", "model.safetensors"}
    again = BitVAE.from_pretrained("s3://photographs/tok")
    assert again.fingerprint == tok.fingerprint
    (bucket / "tok" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="s3://photographs/tok/model.safetensors is damaged"):
        BitVAE.from_pretrained("s3://photographs/tok")


def test_replaced_shards_are_noticed(bucket, reference):
    upload(reference, bucket / "shards")
    (bucket / "shards" / "shard-000001.tar").write_bytes(b"other")
    data = TokenDataset(bucket / "shards")
    data[0]
    with pytest.raises(StorageError, match="shard-000001.tar is damaged or was replaced"):
        data[4]


class Failing(BaseHTTPRequestHandler):
    "Fail in another way for each bucket."

    errors = {"refusing": (403, "AccessDenied", "Access Denied"),
              "elsewhere": (400, "AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong"),
              "nowhere": (404, "NoSuchBucket", "The specified bucket does not exist")}  # fmt: skip

    def answer(self):
        bucket = self.path.strip("/").partition("/")[0].partition("?")[0]
        if bucket == "broken":  # the connection ends in the middle of an object
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.send_header("ETag", '"0"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(b"half")
            self.close_connection = True
            return
        status, code, message = self.errors[bucket]
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    do_GET = do_HEAD = do_PUT = do_POST = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def failing(environment):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    Thread(target=server.serve_forever, daemon=True).start()
    environment(f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()


@pytest.mark.parametrize("name, reason", {
    "refusing": "no access to s3://refusing", "elsewhere": "cannot use s3://elsewhere",
    "nowhere": "no such bucket: s3://nowhere", "broken": "s3://broken"}.items())  # fmt: skip
def test_stores_that_fail_are_named(failing, images, tmp_path, name, reason):
    done = run(*command(images, f"s3://{name}/shards"))
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert reason in done.stderr or name == "broken"
    done = run(*command(f"s3://{name}/images/a.png", tmp_path / "shards"))
    assert done.returncode == 1 and (reason in done.stderr or name == "nowhere"), done.stderr
    assert not (tmp_path / "shards" / "manifest.json").exists()
    assert name == "nowhere" or not list(tmp_path.glob("shards/*.tar"))  # there only the image is missing
    assert not any(value in done.stderr for value in CREDENTIALS.values())


def test_no_server(environment, images, tmp_path):
    environment("http://127.0.0.1:9")
    done = run(*command(images, "s3://bucket/shards"))
    assert done.returncode == 1 and "cannot use s3://bucket/shards" in done.stderr
    assert "check the network" in done.stderr and "Traceback" not in done.stderr


def test_addresses_hold_no_passwords(images):
    done = run(*command(images, f"s3://AKID:{SECRET}@bucket/shards"))
    assert done.returncode == 1 and "may hold a password" in done.stderr and SECRET not in done.stderr
