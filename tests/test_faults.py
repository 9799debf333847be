"""Bad input raises an error that names the file or value and the remedy, and no data is lost."""

import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from children import ROOT, bitvae, call
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from bitvae import BitVAE, load_image, save_image
from bitvae.checkpoints import RELEASED, CheckpointError, fetch_released, published_names
from bitvae.data import CropPlan, DataError, DeviceCrops, RandomCrops, crop_loader
from bitvae.evaluation import protocol_rows, read_results
from bitvae.images import bundled_photographs, from_uint8, held_out_photographs
from bitvae.launch import Interrupted
from bitvae.recipes import recipe
from bitvae.run_dir import RunExistsError, newest_checkpoint, read_metrics
from bitvae.token_dataset import Item, prefetch
from bitvae.tokenizer import BitVAEConfig
from bitvae.training import TrainingDiverged, train

GOLDEN = Path(__file__).parent / "golden" / "autoencoder.safetensors"


# images


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 51, (51, 51, 51)),
        ("LA", (51, 255), (51, 51, 51)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (9, 9, 9, 0), (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("I;16", 51 * 257, (51, 51, 51)),
        ("F", 0.2, (51, 51, 51)),
    ],
)
def test_every_image_mode_becomes_rgb(tmp_path, mode, color, expected):
    file = tmp_path / ("x.tif" if mode in ("CMYK", "F") else "x.png")
    Image.new(mode, (8, 6), color).save(file)
    x = load_image(file)
    assert x.shape == (1, 3, 6, 8)
    np.testing.assert_allclose(x[0, :, 0, 0] * 127.5 + 127.5, expected, atol=1e-3)


def test_palette_and_orientation(tmp_path):
    Image.new("RGB", (8, 6), (200, 100, 50)).quantize(4).save(tmp_path / "x.gif")
    np.testing.assert_allclose(
        load_image(tmp_path / "x.gif")[0, :, 0, 0] * 127.5 + 127.5, (200, 100, 50), atol=1
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by 90 degrees
    Image.new("RGB", (8, 6)).save(tmp_path / "x.jpg", exif=exif)
    assert load_image(tmp_path / "x.jpg").shape == (1, 3, 8, 6)


@pytest.mark.parametrize("length", [0, 10, 5000])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.slow
def test_a_truncated_image_stops_training_with_its_name(tmp_path, length, workers):
    (tmp_path / "cut.jpg").write_bytes(bundled_photographs()[0].read_bytes()[:length])
    with pytest.raises(DataError, match="^no image can be used, the last one: .*cut.jpg"):
        train(recipe("smoke", init_latent_norm=None), tmp_path, tmp_path / "run", workers=workers)


@pytest.mark.slow
def test_an_image_smaller_than_the_crop(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "tiny.png")
    with pytest.raises(DataError, match="tiny.png: an image of 40x20 is smaller than the crop of 32x32"):
        train(recipe("smoke"), tmp_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(recipe("smoke", upscale=True), tmp_path, tmp_path / "other")


def odd_orientation():
    "EXIF data with the orientation as text instead of a number."
    tag = struct.pack("<HHHI4sI", 1, 0x112, 2, 2, b"6", 0)
    return b"Exif\0\0II*\0\x08\0\0\0" + tag


def test_one_broken_file_of_six_is_named_and_stops_neither_training_nor_evaluation(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for n in range(4):
        save_image(load_image(bundled_photographs()[n], 64), images / f"{n}.png")
    Image.open(images / "0.png").save(images / "odd.jpg", exif=odd_orientation())
    (images / "broken.png").write_bytes(b"no image")
    run = bitvae("train", "smoke", "--images", images, "--folder", tmp_path / "run", "--set", "steps=6")
    assert run.returncode == 0, run.stderr
    (line,) = read_metrics(tmp_path / "run" / "broken.jsonl")
    assert line["name"] == str(images / "broken.png")
    run = bitvae("evaluate", "demo", "--images", images, "--resolutions", 32, "--folder", tmp_path)
    assert run.returncode == 0 and "1 of 6 images cannot be read and are left out: " in run.stdout, run.stderr
    results = read_results(tmp_path)
    assert results["images"] == ["0.png", "1.png", "2.png", "3.png", "odd.jpg"]
    assert list(results["unreadable"]) == [str(images / "broken.png")]
    assert len(protocol_rows(results)["1 scale"]["per_image"]["psnr"]) == 5


def load_with_small_files():
    "Load batches larger than any file of this process may be, so also than its shared memory."
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    signal.alarm(60)
    crops = list(crop_loader(bundled_photographs(), CropPlan(128, 4), range(3), workers=2))
    print([tuple(crop.x.shape) for crop in crops])


def test_loading_processes_need_no_shared_memory():
    run = call(load_with_small_files)
    assert run.returncode == 0 and run.stdout == f"{[(4, 3, 128, 128)] * 3}\n", run.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_gets_the_batches_of_the_cpu(workers):
    files, plan = bundled_photographs(), CropPlan(64, 4)
    options = ({}, {"workers": workers, "device": "cuda"})
    loaders = [crop_loader(files, plan, range(3), **o) for o in options]
    for expected, found in zip(*loaders, strict=True):
        assert found.x.is_cuda and torch.equal(found.x.cpu(), expected.x)


def test_pixels_are_divided_on_every_device():
    "CUDA multiplies by the reciprocal of a number, so that protocols that truncate lose other levels."
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(from_uint8(levels), levels / 127.5 - 1)
    nodes = make_fx(from_uint8)(levels).graph.nodes
    divisors = [node.args[1] for node in nodes if node.target is torch.ops.aten.div.Tensor]
    assert [type(divisor) for divisor in divisors] == [Node]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_ends_the_wait_for_images(tmp_path, monkeypatch, workers):
    crop, parent = RandomCrops.crop, os.getpid()

    def stuck(self, n, size):
        if n >= 4 and (workers == 0 or os.getpid() != parent):
            threading.Timer(2, os.kill, (parent, signal.SIGTERM)).start()
            time.sleep(60)
        return crop(self, n, size)

    monkeypatch.setattr(RandomCrops, "crop", stuck)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)  # to end the worker
    started = time.monotonic()
    with pytest.raises(Interrupted, match=r"SIGTERM after step \d of 6: its checkpoint is in"):
        train(recipe("smoke", steps=6), bundled_photographs()[:2], tmp_path, workers=workers)
    assert time.monotonic() - started < 30
    assert newest_checkpoint(tmp_path / "checkpoints")[1]["step"] <= 2


def decode_on_the_device():
    DeviceCrops([Path("x.png")], CropPlan(32, 1))


def decode_for_tokens():
    next(prefetch([Item("0", Path("x.png"), "")], 64, batch=1, workers=1))


@pytest.mark.parametrize("work", [decode_on_the_device, decode_for_tokens])
def test_a_signal_ends_the_wait_for_threads(monkeypatch, work):
    for reader in ("data.read_pixels", "token_dataset.open_image"):
        monkeypatch.setattr(f"bitvae.{reader}", lambda *_: time.sleep(20))
    started, previous = time.monotonic(), signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):  # also where a shell started the tests with SIGINT ignored
            work()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert time.monotonic() - started < 10


def load_with_few_open_files():
    "Start more processes than descriptors allow."
    free = 10 + len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, free))
    next(crop_loader(bundled_photographs(), CropPlan(32, 1), range(3), workers=4))


def test_processes_that_cannot_start_are_one_error():
    run = call(load_with_few_open_files)
    assert "cannot start 4 processes that load images" in run.stderr and "ignored" not in run.stderr


def test_variables_of_another_launcher_are_ignored(tmp_path):
    left = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    options = ("--images", bundled_photographs()[0], "--size", "32", "--folder", tmp_path / "tokens")
    run = bitvae("tokenize", "demo", *options, **left)
    assert run.returncode == 0 and "ignoring WORLD_SIZE=4 of another launcher" in run.stderr
    run = bitvae("train", "smoke", "--set", "steps=1", "--folder", tmp_path / "run", **left, PMI_SIZE="4")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (33, 31), (256, 255)])
def test_decoding_restores_any_image_size(size):
    tok = BitVAE(BitVAEConfig(dim=8, channels=48, multipliers=(1, 1, 1), res_blocks=0, stride=4))
    x = torch.rand(2, 3, *size) * 2 - 1
    assert tok.decode(tok.encode(x)).shape == x.shape
    assert tok.decode(tok.encode(x)[:1]).shape == x.shape


# checkpoints


@pytest.fixture(scope="module")
def weights():
    return {n.removeprefix("vae."): w for n, w in load_file(GOLDEN).items() if n.startswith("vae.")}


@pytest.fixture(scope="module")
def bits():
    return BitVAE.from_pretrained(GOLDEN).encode(load_image(bundled_photographs()[0], 64))


def without_levels(name):
    "Return a weight's name without the levels `conv` and `norm`, except for resampling convolutions."
    name = name.replace(".conv.conv.", ".@.").replace(".conv.", ".").replace(".norm.", ".")
    return name.replace(".@.", ".conv.")


@pytest.mark.parametrize(
    "layout", ["nested", "bare", "module", "nested module", "without levels", "safetensors", "extras"]
)
def test_published_layouts(tmp_path, weights, bits, layout):
    file, w = tmp_path / "x.pth", weights
    if layout == "without levels":
        w = {without_levels(n): t for n, t in w.items()}
    if "module" in layout:
        w = {f"module.{n}": t for n, t in w.items()}
    if layout == "extras":
        w = w | {"perceptual_model.net.slice1.0.weight": torch.ones(3), "quantize.lfq.mask": torch.ones(16)}
    if layout == "safetensors":
        save_file(w, file := tmp_path / "x.safetensors")
    elif "nested" in layout or layout == "extras":
        torch.save({"vae": w, "image_disc": {}, "opt_vae": {"state": {}}, "step": 7}, file)
    else:
        torch.save(w, file)
    tok = BitVAE.from_pretrained(file)
    sizes = {"dim": 16, "channels": 32, "multipliers": (1, 1, 1, 1, 2), "res_blocks": 1, "stride": 16}
    assert tok.config == BitVAEConfig(**sizes, mode="dynamic")
    assert tok.encode(load_image(bundled_photographs()[0], 64)) == bits


def test_missing_and_unexpected_names_are_listed(tmp_path, weights):
    w = {n: t for n, t in weights.items() if "encoder.mid" not in n}
    torch.save({"vae": w | {"encoder.attn.q.weight": torch.ones(2)}}, tmp_path / "x.pth")
    missing = r"missing: encoder\.mid\.block_1.* and 12 more; unexpected: encoder\.attn\.q\.weight"
    with pytest.raises(CheckpointError, match=r"x\.pth does not fit .*" + missing):
        BitVAE.from_pretrained(tmp_path / "x.pth")


def test_wrong_shapes_are_listed(tmp_path, weights):
    name = "encoder.mid.block_1.conv1.conv.weight"
    torch.save(weights | {name: torch.ones(64, 32, 3, 3)}, tmp_path / "x.pth")
    shapes = r"encoder\.mid\.block_1\.conv1\.weight has \(64, 32, 3, 3\) instead of \(64, 64, 3, 3\)"
    with pytest.raises(CheckpointError, match=f"of other shape: {shapes}"):
        BitVAE.from_pretrained(tmp_path / "x.pth")


def test_no_code_from_a_pickle(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"vae": Evil()}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps({"vae": Evil()}))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(CheckpointError, match=name):
            BitVAE.from_pretrained(tmp_path / name)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", RELEASED)
def test_released_names_without_network(tmp_path, monkeypatch, name):
    monkeypatch.setenv("BITVAE_WEIGHTS", str(tmp_path))

    def offline(repository, file):
        assert (repository, file) == ("FoundationVision/Infinity", f"{name}.pth")
        raise OSError("no network")

    remedy = f"fetch it from .*FoundationVision/Infinity.* put it at {tmp_path}/{name}.pth"
    with pytest.raises(ConnectionError, match=f"{name}.pth: {remedy}"):
        fetch_released(name, offline)


def test_a_released_name_with_the_hub_offline(tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "BITVAE_WEIGHTS": str(tmp_path)}
    command = [sys.executable, "-m", "bitvae.cli", "evaluate", "infinity_vae_d16"]
    run = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    remedy = f"fetch it from FoundationVision/Infinity .* put it at {tmp_path}/infinity_vae_d16.pth"
    assert re.search(f"infinity_vae_d16.pth: {remedy}", run.stderr)


def test_a_released_file_in_the_weights_folder(tmp_path, monkeypatch, weights, bits):
    monkeypatch.setenv("BITVAE_WEIGHTS", str(tmp_path))
    torch.save({"vae": weights}, tmp_path / "infinity_vae_d16.pth")
    assert BitVAE.from_pretrained("infinity_vae_d16").encode(load_image(bundled_photographs()[0], 64)) == bits


def test_published_names_load_back(tmp_path, weights):
    tok = BitVAE.from_pretrained(GOLDEN)
    names = published_names(tok)
    assert {names[n] for n in tok.state_dict()} == set(weights) - {"quantizer.lfq.mask"}


# runs


@pytest.mark.slow
def test_same_seed_same_weights(tmp_path):
    def trained(name, seed):
        config = recipe("smoke", drop_rate=0.5, train_mode="dense", seed=seed, steps=4)
        return (train(config, "bundled", tmp_path / name) / "model.safetensors").read_bytes()

    assert trained("a", seed=3) == trained("b", seed=3) != trained("c", seed=4)


@pytest.mark.parametrize(("factor", "loss"), [(math.nan, "nan"), (1e25, "")])
@pytest.mark.slow
def test_divergence_keeps_the_last_good_checkpoint(tmp_path, factor, loss):
    config = recipe("smoke", steps=20, checkpoint_every=1)

    def break_weights(t, losses):
        if t.step == 6:
            for p in t.tok.parameters():
                p.data.mul_(factor)

    with pytest.raises(TrainingDiverged, match=f"step 6: validation loss {loss}.*step-00000005 is kept"):
        train(config, "bundled", tmp_path / "run", on_step=break_weights)
    kept, content = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert content["step"] == 5
    assert all(w.isfinite().all() for w in load_file(kept / "model.safetensors").values())
    tok = BitVAE.from_pretrained(tmp_path / "run")
    assert tok.decode(tok.encode(load_image(bundled_photographs()[0], 32))).isfinite().all()


@pytest.mark.slow
def test_infinite_loss_stops_at_once(tmp_path):
    calls = iter(range(100))

    def distance(x, y):
        loss = (x - y).square().mean((1, 2, 3))
        return loss * torch.inf if next(calls) == 7 else loss  # two calls are validations

    with pytest.raises(TrainingDiverged, match="step 6: perceptual inf, loss inf"):
        train(recipe("smoke", steps=20), "bundled", tmp_path / "run", perceptual=distance)
    assert newest_checkpoint(tmp_path / "run" / "checkpoints")[1]["step"] == 4
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 5


@pytest.mark.slow
def test_a_trained_tokenizer_is_never_overwritten(tmp_path):
    train(recipe("smoke", steps=2), "bundled", tmp_path)
    before = (tmp_path / "tokenizer" / "model.safetensors").read_bytes()
    for damage in (
        lambda: (tmp_path / "run.json").write_text("{"),
        lambda: (tmp_path / "run.json").unlink(),
        lambda: shutil.rmtree(tmp_path / "checkpoints"),
        lambda: (tmp_path / "metrics.jsonl").unlink(),
    ):
        damage()
        for resume in (False, True):
            with pytest.raises(RunExistsError, match="already holds a run"):
                train(recipe("smoke", steps=3, seed=9), "bundled", tmp_path, resume)
    assert (tmp_path / "tokenizer" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"hello world", b"\x80\x04K\x01.", b"PK\x03\x04" + bytes(300)]
)
@pytest.mark.parametrize("suffix", ["pth", "ckpt", "safetensors"])
def test_a_file_that_is_no_checkpoint(tmp_path, content, suffix):
    (tmp_path / f"x.{suffix}").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"x.{suffix}"):
        BitVAE.from_pretrained(tmp_path / f"x.{suffix}")


def test_damaged_checkpoints_load_or_raise_an_error_with_the_file(tmp_path, weights):
    rng = np.random.default_rng(0)
    torch.save({"vae": weights}, tmp_path / "intact.pth")
    intact = (tmp_path / "intact.pth").read_bytes()
    for n in range(40):
        bad = bytearray(intact[: len(intact) if n % 2 else int(rng.integers(len(intact)))])
        for at in rng.integers(min(len(bad), 3000), size=20):
            bad[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "bad.pth").write_bytes(bad)
        try:
            BitVAE.from_pretrained(tmp_path / "bad.pth")
        except CheckpointError as e:
            assert "bad.pth" in str(e)


# the command line and papermill


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "slow"), "unknown recipe 'slow': one of quick, smoke"),
        (("train", "smoke", "--set", "step=3"), "unknown override step: did you mean steps or "),
        (("train", "smoke", "--set", "steps=-3"), "steps must be at least 1, got -3"),
        (("train", "smoke", "--images", "nowhere"), "no such images: nowhere; give a folder"),
        (("evaluate", "nothing"), "no tokenizer 'nothing': give a checkpoint file"),
        (
            ("run", "nbs/experiments/train.ipynb", "x.ipynb", "--set", "recipes=quick"),
            "unknown parameter recipes: nbs/experiments/train.ipynb knows recipe, overrides",
        ),
    ],
)
def test_mistakes_on_the_command_line(monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    run = bitvae(*arguments)
    assert run.returncode == 1 and message in run.stderr and "Traceback" not in run.stderr
    assert not Path("x.ipynb").exists()


def test_image_lists_name_the_line(tmp_path):
    (tmp_path / "list.txt").write_text(f"{bundled_photographs()[0]} 768 1135\nnot there.jpg 3\n")
    run = bitvae("train", "smoke", "--images", tmp_path / "list.txt", "--folder", tmp_path / "run")
    assert run.returncode == 1 and "list.txt line 2" in run.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_train_and_evaluate_through_papermill(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)

    def notebook(name, output, **parameters):
        pairs = [a for k, v in parameters.items() for a in ("--set", f"{k}={v}")]
        return bitvae("run", f"nbs/experiments/{name}.ipynb", tmp_path / f"{output}.ipynb", *pairs)

    folder = tmp_path / "run"
    run = notebook("train", "train", recipe="smoke", folder=folder, overrides='{"steps": 5}')
    assert run.returncode == 0, run.stderr
    assert "step 5 of 5" in run.stdout + run.stderr  # progress reaches the terminal
    executed = json.loads((tmp_path / "train.ipynb").read_text())
    outputs = ["".join(o.get("text", "")) for c in executed["cells"] for o in c.get("outputs", [])]
    assert not any("\r" in text for text in outputs)  # no progress bars in the record
    tokenizer = folder / "tokenizer"
    few = {"images": json.dumps([str(file) for file in held_out_photographs()[:3]]), "pictures": 2}
    run = notebook("evaluate", "evaluate", tokenizer=tokenizer, folder=folder, resolutions="[64]", **few)
    assert run.returncode == 0, run.stderr
    rows = protocol_rows(read_results(folder))
    assert rows["mean colour"]["psnr"] > 10 and rows["1 scale"]["bits"] == 16
    images = {"progressive", "quality_psnr", "pairs", "extremes", "bits_dynamic_bicubic-64", "training"}
    assert images <= {f.stem for f in folder.glob("*.png")}
    again = notebook("train", "again", folder=folder, resume="false")
    assert again.returncode != 0 and "already holds a run" in again.stderr
