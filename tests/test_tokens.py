"Token data sets: killed and resumed, several processes, the command line. BITVAE_TRIALS=2000 kills more."

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from children import Child, bitvae as run, call, command_line

from bitvae import BitVAE, load_image
from bitvae.images import bundled_photographs, save_image
from bitvae.token_dataset import index_shard, TokenDataset, verify_dataset

pytestmark = pytest.mark.slow

MANY = int(os.environ.get("BITVAE_TRIALS", 1000)) > 1000
KILLS = {"tar": 20 if MANY else 5, "safetensors": 20 if MANY else 2}
FORMATS = {"tar": [], "safetensors": ["--format", "safetensors", "--latents"]}
OPTIONS = ["--size", "128", "--per-shard", "7", "--batch", "4"]


def arguments(images, folder, *options):
    return ["tokenize", "demo", "--images", images, "--folder", folder, *OPTIONS, *options]


def tokenize(*args):
    return run(*arguments(*args))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    "Write 108 small images in two classes."
    folder = tmp_path_factory.mktemp("images")
    for n, file in enumerate(bundled_photographs()):
        x = load_image(file, 256)
        for i in range(12):
            crop = x[..., 10 * i : 10 * i + 140, 5 * i : 5 * i + 150]
            (folder / f"class{n % 2}").mkdir(exist_ok=True)
            save_image(crop, folder / f"class{n % 2}" / f"{n}-{i}.png")
    return folder


@pytest.fixture(scope="module")
def references(images, tmp_path_factory):
    "Tokenize the images without interruption, in each format."
    folders = {shard_format: tmp_path_factory.mktemp(shard_format) for shard_format in FORMATS}
    for shard_format, folder in folders.items():
        done = tokenize(images, folder, *FORMATS[shard_format])
        assert done.returncode == 0 and "108 images in 16 shards" in done.stdout, done.stderr
    return folders


@pytest.fixture(scope="module")
def reference(references):
    return references["tar"]


def tokenize_with_small_files(*words):
    "Tokenize where no file may exceed 4 kB, as on a disk that is full."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return command_line(*map(str, words))


def test_a_full_disk_is_one_line(images, tmp_path):
    failed = call(tokenize_with_small_files, *arguments(images, tmp_path, *FORMATS["safetensors"]))
    assert failed.returncode == 1 and "File too large" in failed.stderr, failed.stderr
    assert "Traceback" not in failed.stderr
    assert not list(tmp_path.glob("shard-*"))


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if not p.name.startswith(".")}


def shards(folder, shard_format):
    return sorted(Path(folder).glob(f"shard-*.{shard_format}"))


@pytest.mark.parametrize("shard_format", FORMATS)
def test_killed_jobs_neither_lose_nor_repeat_images(images, references, tmp_path, shard_format):
    rng = random.Random(0)
    killed = 0
    command = [str(word) for word in arguments(images, tmp_path, *FORMATS[shard_format])]
    while killed < KILLS[shard_format]:
        there = len(shards(tmp_path, shard_format))
        child = Child(command_line, *command)
        while child.process.is_alive() and len(list(tmp_path.glob("*shard-*"))) <= 2 * there:
            time.sleep(0.001)  # until it writes a shard
        time.sleep(rng.random() * 0.15)
        killed += child.kill() == -signal.SIGKILL
        finished = (tmp_path / "manifest.json").exists()
        assert run("verify", tmp_path).returncode == (0 if finished else 1)
        if finished:  # start over
            for file in tmp_path.iterdir():
                file.unlink()
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(references[shard_format])
    keys = [key for shard in shards(tmp_path, shard_format) for key in index_shard(shard)]
    assert keys == [f"{i:09d}" for i in range(108)] and verify_dataset(tmp_path)["count"] == 108
    print(f"{shard_format}: killed {killed} times, {len(keys)} images, each once")


@pytest.mark.parametrize("shard_format", FORMATS)
def test_several_processes(images, references, tmp_path, shard_format):
    done = tokenize(images, tmp_path, *FORMATS[shard_format], "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(references[shard_format])


@pytest.mark.parametrize("shard_format", FORMATS)
def test_read_back(images, references, shard_format):
    data, tok = TokenDataset(references[shard_format]), BitVAE.from_pretrained("demo")
    files = sorted(images.rglob("*.png"))
    for i in (0, 53, 107):
        x = load_image(files[i], 128)
        assert data[i].bits == tok.encode(x) and data[i].label == int(files[i].parent.name[-1])
        if shard_format == "safetensors":
            torch.testing.assert_close(data[i].z.float(), tok.encode_latent(x), atol=1e-3, rtol=1e-2)


def test_rows_are_read_without_this_package(images, references):
    code = f"""
import json
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file
file = {str(references["safetensors"] / "shard-000003.safetensors")!r}
with safe_open(file, "np") as f: text = f.metadata()
tensors = load_file(file)
count = sum(h * w for h, w in json.loads(text["schedule"])) * int(text["dim"])
bits = np.unpackbits(tensors["bits"], axis=1)[:, :count]
keys, sizes = json.loads(text["keys"]), json.loads(text["sizes"])
labels, ones = tensors["labels"].tolist(), bits.sum(1).tolist()
print(json.dumps([text["tokenizer"], keys, sizes, labels, ones, tensors["latents"].shape]))
"""
    read = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    tokenizer, keys, sizes, labels, ones, shape = json.loads(read.stdout)
    tokens = list(TokenDataset(references["safetensors"]))[21:28]
    assert tokenizer == BitVAE.from_pretrained("demo").fingerprint
    assert (sizes, shape) == ([[140, 150]] * 7, [7, 6, 16, 16])
    assert keys == [t.key for t in tokens] and labels == [t.label for t in tokens]
    assert ones == [sum(int(p.sum()) for p in t.bits) for t in tokens]


def test_command_line(images, reference, tmp_path):
    done = run("verify", reference)
    assert done.returncode == 0 and "108 images in 16 shards, all complete" in done.stdout
    assert run("count", reference).stdout == "108\n"
    for command, message in (
        (("tokenize", "demo", "--images", images, "--folder", reference, "--size", "64"), "other size"),
        (arguments(images, tmp_path / "x", "--format", "safetensors", "--compress"), "rows of one length"),
        (("tokenize", "demo", "--images", tmp_path / "no", "--folder", tmp_path / "x"), "no such images"),
        (("verify", tmp_path), "not finished"),
    ):
        failed = run(*command)
        assert failed.returncode == 1 and message in failed.stderr, failed.stderr
        assert "Traceback" not in failed.stderr
    shard = reference / "shard-000003.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"!")
    failed = run("verify", reference)
    assert failed.returncode == 1 and "shard-000003.tar is damaged" in failed.stderr
    shard.write_bytes(content)
    manifest = json.loads((reference / "manifest.json").read_text())
    assert manifest["tokenizer"] == BitVAE.from_pretrained("demo").fingerprint
