"Data sets of bits: kills, several processes, the command line. BITVAE_TRIALS=2000 kills more."

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from children import Child, bitvae as run, command_line

from bitvae import BitVAE, load_image
from bitvae.images import bundled_photographs, save_image

from bitvae.token_dataset import index_shard, TokenDataset, verify_dataset

pytestmark = pytest.mark.slow

KILLS = 20 if int(os.environ.get("BITVAE_TRIALS", 1000)) > 1000 else 5
FORMS = {"tar": [], "safetensors": ["--form", "safetensors", "--latents"]}
OPTIONS = ["--size", "128", "--per-shard", "7", "--batch", "4"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "A hundred small pictures in two classes."
    folder = tmp_path_factory.mktemp("pictures")
    for n, file in enumerate(bundled_photographs()):
        x = load_image(file, 256)
        for i in range(12):
            (folder / f"class{n % 2}").mkdir(exist_ok=True)
            save_image(
                x[..., 10 * i : 10 * i + 140, 5 * i : 5 * i + 150], folder / f"class{n % 2}" / f"{n}-{i}.png"
            )
    return folder


@pytest.fixture(scope="module")
def wholes(pictures, tmp_path_factory):
    "What runs that nobody disturbs make of them, by form."
    folders = {form: tmp_path_factory.mktemp(form) for form in FORMS}
    for form, folder in folders.items():
        done = run("tokenize", "demo", "--images", pictures, "--folder", folder, *OPTIONS, *FORMS[form])
        assert done.returncode == 0 and "108 pictures in 16 shards" in done.stdout, done.stderr
    return folders


@pytest.fixture(scope="module")
def whole(wholes):
    return wholes["tar"]


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if not p.name.startswith(".")}


def shards(folder, form):
    return sorted(Path(folder).glob(f"shard-*.{form}"))


@pytest.mark.parametrize(("form", "kills"), [("tar", KILLS), ("safetensors", KILLS if KILLS > 5 else 2)])
def test_killed_anywhere_nothing_is_lost_or_doubled(pictures, wholes, tmp_path, form, kills):
    rng, arguments = (
        random.Random(0),
        ("tokenize", "demo", "--images", pictures, "--folder", tmp_path, *OPTIONS, *FORMS[form]),
    )
    killed = 0
    while killed < kills:
        there = len(shards(tmp_path, form))
        child = Child(command_line, *map(str, arguments))
        while child.process.is_alive() and len(list(tmp_path.glob("*shard-*"))) <= 2 * there:
            time.sleep(0.001)  # until it writes
        time.sleep(rng.random() * 0.15)
        killed += child.kill() == -signal.SIGKILL
        finished = (tmp_path / "manifest.json").exists()
        assert run("verify", tmp_path).returncode == (0 if finished else 1)
        if finished:  # once more, from nothing
            for file in tmp_path.iterdir():
                file.unlink()
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(wholes[form])
    keys = [key for shard in shards(tmp_path, form) for key in index_shard(shard)]
    assert keys == [f"{i:09d}" for i in range(108)] and verify_dataset(tmp_path)["count"] == 108
    print(f"{form}: killed {killed} times, {len(keys)} pictures, each once")


@pytest.mark.parametrize("form", FORMS)
def test_several_processes(pictures, wholes, tmp_path, form):
    done = run(
        "tokenize",
        "demo",
        "--images",
        pictures,
        "--folder",
        tmp_path,
        *OPTIONS,
        *FORMS[form],
        "--processes",
        "2",
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(wholes[form])


@pytest.mark.parametrize("form", FORMS)
def test_read_back(pictures, wholes, form):
    data, tok = TokenDataset(wholes[form]), BitVAE.from_pretrained("demo")
    files = sorted(pictures.rglob("*.png"))
    for i in (0, 53, 107):
        x = load_image(files[i], 128)
        assert data[i].bits == tok.encode(x) and data[i].label == int(files[i].parent.name[-1])
        if form == "safetensors":
            torch.testing.assert_close(data[i].z.float(), tok.encode_latent(x), atol=1e-3, rtol=1e-2)


def test_rows_are_read_without_this_package(pictures, wholes):
    code = f"""
import json
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file
file = {str(wholes["safetensors"] / "shard-000003.safetensors")!r}
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
    tokens = list(TokenDataset(wholes["safetensors"]))[21:28]
    assert (tokenizer, sizes, shape) == (
        BitVAE.from_pretrained("demo").fingerprint,
        [[140, 150]] * 7,
        [7, 6, 16, 16],
    )
    assert (keys, labels, ones) == (
        [t.key for t in tokens],
        [t.label for t in tokens],
        [sum(int(p.sum()) for p in t.bits) for t in tokens],
    )


def test_command_line(pictures, whole, tmp_path):
    done = run("verify", whole)
    assert done.returncode == 0 and "108 pictures in 16 shards, all whole" in done.stdout
    assert run("count", whole).stdout == "108\n"
    for arguments, message in (
        (("tokenize", "demo", "--images", pictures, "--folder", whole, "--size", "64"), "other size"),
        (
            (
                "tokenize",
                "demo",
                "--images",
                pictures,
                "--folder",
                tmp_path / "x",
                "--form",
                "safetensors",
                "--compress",
            ),
            "rows of one length",
        ),
        (("tokenize", "demo", "--images", tmp_path / "no", "--folder", tmp_path / "x"), "no such images"),
        (("verify", tmp_path), "not finished"),
    ):
        failed = run(*arguments)
        assert failed.returncode == 1 and message in failed.stderr and "Traceback" not in failed.stderr, (
            failed.stderr
        )
    shard = whole / "shard-000003.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"!")
    failed = run("verify", whole)
    assert failed.returncode == 1 and "shard-000003.tar is damaged" in failed.stderr
    shard.write_bytes(content)
    assert (
        json.loads((whole / "manifest.json").read_text())["tokenizer"]
        == BitVAE.from_pretrained("demo").fingerprint
    )
