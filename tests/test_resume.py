"""A run that is killed at any point resumes to identical weights, and damage is detected."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial

import pytest
import torch
from children import call, servers
from PIL import Image

from bitvae import BitVAE, load_image
from bitvae.checkpoints import CheckpointError
from bitvae.data import DataError
from bitvae.images import bundled_photographs
from bitvae.losses import PatchDiscriminator
from bitvae.recipes import recipe
from bitvae.run_dir import (
    CollapseWarning,
    RunExistsError,
    deserialize_state,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    read_metrics,
)
from bitvae.training import init_discriminator, train

pytestmark = pytest.mark.slow

EVERYTHING = recipe(
    "smoke",
    steps=12,
    checkpoint_every=2,
    discriminator_start=2,
    discriminator_channels=16,
    ema=0.9,
    drop_rate=0.5,
    train_mode="dense",
    accumulate=2,
    batch=1,
)
MANY = int(os.environ.get("BITVAE_TRIALS", 1000)) > 1000


def run(folder, config=EVERYTHING, delay=0.0):
    "Train in a child: one thread, no output, and a slow disk, a delay in seconds before each fsync."
    torch.set_num_threads(1)
    fsync = os.fsync
    os.fsync = lambda descriptor: (time.sleep(delay), fsync(descriptor))
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        train(config, "bundled", folder, validation=bundled_photographs()[0])


def start(folder, **options):
    child = servers.Process(target=run, args=(folder,), kwargs=options)
    child.start()
    return child


def finish(folder):
    child = start(folder)
    child.join(120)
    assert child.exitcode == 0
    return folder


def flat(value, name=""):
    "Flatten a nested state to names and plain values, tensors to their bytes."
    if isinstance(value, dict):
        return {n: v for k, x in value.items() for n, v in flat(x, f"{name}/{k}").items()}
    if isinstance(value, list):
        return {n: v for k, x in enumerate(value) for n, v in flat(x, f"{name}/{k}").items()}
    return {name: value.numpy().tobytes() if isinstance(value, torch.Tensor) else value}


def state(folder):
    "Return a finished run's tokenizer and last checkpoint: both networks, both optimizers, the average."
    content = newest_checkpoint(folder / "checkpoints")[1]
    files = content["files"]
    result = (folder / "tokenizer" / "model.safetensors").read_bytes()
    assert files["model.safetensors"] == result
    return {"step": content["step"], "result": result} | flat(deserialize_state(files["state.pt"]))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    "The state after a run without interruption."
    return state(finish(tmp_path_factory.mktemp("runs") / "uninterrupted"))


def kill_at(folder, child, steps, delay=0.0, writing=False):
    "Kill -9 after some steps and a delay, or while the next checkpoint is written; return whether one was."

    def incomplete():
        return list((folder / "checkpoints").glob(".*.step-*"))

    while child.is_alive():
        if len(read_metrics(folder / "metrics.jsonl")) >= steps and (incomplete() or not writing):
            break
        time.sleep(0.002)
    if not writing:
        time.sleep(delay)
    was_writing = bool(incomplete())
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    return was_writing


def test_a_run_killed_anywhere_resumes_to_the_same_state(tmp_path, expected):
    rng = random.Random(0)
    points = [(n, rng.randint(1, 10), rng.random() * 0.1) for n in range(20)]
    if not MANY:  # before the first checkpoint, after two, near the end; each also while one is written
        points = [(2 * n + i, steps, 0.03 * n) for n, steps in enumerate((1, 4, 10)) for i in range(2)]
    names = {"/vae/encoder.conv_in.weight", "/image_disc/main.0.weight", "/opt_image_disc/state/0/exp_avg"}
    assert expected["step"] == 12 and names <= set(expected)

    def try_one(point):
        n, steps, delay = point
        folder = tmp_path / str(n)
        writing = n % 2 == 1
        child = start(folder, delay=0.05 if writing else 0.0)
        was_writing = kill_at(folder, child, steps, delay, writing)
        assert child.exitcode == -signal.SIGKILL and not (folder / "tokenizer").exists(), n
        assert state(finish(folder)) == expected, n
        assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == list(range(12)), n
        assert not list((folder / "checkpoints").glob(".*"))
        return was_writing

    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(try_one, points)) >= len(points) // 4


def test_a_run_killed_after_five_steps_resumes_to_twelve(tmp_path, expected):
    kill_at(tmp_path, start(tmp_path), 5)
    assert state(finish(tmp_path)) == expected


def run_deterministically(folder):
    "Train in a process of its own, on the GPU if there is one."
    names = ("steps", "discriminator_start", "discriminator_channels", "train_mode", "ema")
    settings = {name: getattr(EVERYTHING, name) for name in names}
    settings |= {"precision": "bf16", "deterministic": True, "checkpoint_every": 6}
    sets = [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    line = [sys.executable, "-m", "bitvae.training", "smoke", "--folder", folder, *sets]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return state(folder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_deterministic_runs_are_equal_and_resume_exactly_on_a_gpu(tmp_path):
    first = run_deterministically(tmp_path / "a")
    assert run_deterministically(tmp_path / "b") == first
    *_, newest = list_checkpoints(tmp_path / "b" / "checkpoints")
    shutil.rmtree(newest)
    shutil.rmtree(tmp_path / "b" / "tokenizer")
    assert run_deterministically(tmp_path / "b") == first


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, expected, damage):
    kill_at(tmp_path, start(tmp_path), 7)
    *_, before, newest = list_checkpoints(tmp_path / "checkpoints")
    file = newest / "state.pt"
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{newest.name}.* is damaged"):
        read_checkpoint(newest)
    with pytest.warns(UserWarning, match=f"{newest.name}.* is damaged.*the checkpoint before it is used"):
        assert newest_checkpoint(tmp_path / "checkpoints")[0] == before
    assert state(finish(tmp_path)) == expected


def test_a_second_run_in_the_same_folder_is_rejected(tmp_path):
    config = replace(EVERYTHING, steps=500)
    child = start(tmp_path, config=config)
    while len(read_metrics(tmp_path / "metrics.jsonl")) < 1:
        time.sleep(0.01)
    with pytest.raises(RunExistsError, match="another process is training in"):
        train(config, "bundled", tmp_path)
    assert child.is_alive()
    child.kill()
    child.join()


def after_steps(steps, action):
    "Return an `on_step` that calls a function after so many steps, and then what the function returns."

    def on_step(t, losses):
        nonlocal steps, action
        steps -= 1
        if steps <= 0 and action:
            action = action()

    return on_step


def train_and_stop(steps, *arguments, **options):
    "Train and send SIGTERM after so many steps."
    on_step = after_steps(steps, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        train(*arguments, **options, on_step=on_step)


def test_batches_and_passes_may_change_on_resume(tmp_path):
    config = recipe("smoke", steps=6, checkpoint_every=3, batch=2)
    train_and_stop(3, config, "bundled", tmp_path)
    halved = replace(config, batch=1, accumulate=2, activation_checkpointing=True)
    train(replace(halved, checkpoint_every=1, keep_checkpoints=9), "bundled", tmp_path)
    assert [c.name[-1] for c in list_checkpoints(tmp_path / "checkpoints")] == ["3", "4", "5", "6"]
    with pytest.raises(RunExistsError, match=r"lr \(0.0015 there, 0.1 here\)"):
        train(replace(config, lr=0.1), "bundled", tmp_path)
    with pytest.raises(RunExistsError, match=r"crops per step \(\[2\] there, \[4\] here\)"):
        train(replace(config, batch=4), "bundled", tmp_path)


def test_a_lengthened_run_is_unfinished_until_its_last_step(tmp_path):
    config = recipe("smoke", steps=2, checkpoint_every=1)
    short = BitVAE.from_pretrained(train(config, "bundled", tmp_path)).fingerprint
    train_and_stop(2, replace(config, steps=6), "bundled", tmp_path)
    newest = newest_checkpoint(tmp_path / "checkpoints")[0]
    assert BitVAE.from_pretrained(tmp_path).fingerprint == BitVAE.from_pretrained(newest).fingerprint != short
    assert BitVAE.from_pretrained(tmp_path / "tokenizer-00000002").fingerprint == short
    with pytest.raises(RunExistsError, match=r"steps \(6 there, 9 here\)"):
        train(replace(config, steps=9), "bundled", tmp_path)
    shutil.copytree(newest, newest.with_suffix(".bak"))
    long = BitVAE.from_pretrained(train(replace(config, steps=6), "bundled", tmp_path)).fingerprint
    assert long in (tmp_path / "tokenizer" / "README.md").read_text()


# failures around a run

AVERAGED = recipe("smoke", steps=8, checkpoint_every=2, ema=0.9)


def train_with_limit(folder, limit):
    "Train with a limit on the size of files, in bytes."
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    train(AVERAGED, "bundled", folder)


def test_a_full_disk_keeps_earlier_checkpoints(tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    train_and_stop(3, AVERAGED, "bundled", tmp_path / "run")
    before = list_checkpoints(checkpoints)
    largest = max(f.stat().st_size for f in before[-1].iterdir())
    failed = call(train_with_limit, tmp_path / "run", largest // 2)
    assert failed.returncode == 1 and "OSError" in failed.stderr and "cannot write" in failed.stderr
    assert "free disk space and resume; earlier checkpoints are kept" in failed.stderr
    assert list_checkpoints(checkpoints) == before and read_checkpoint(before[-1])
    assert not list(checkpoints.glob(".*"))
    assert call(train_with_limit, tmp_path / "run", None).returncode == 0
    assert (tmp_path / "run" / "tokenizer").exists()


def noise_images(folder, count=40):
    folder.mkdir()
    for n in range(count):
        Image.effect_noise((64, 48), 50 + n).convert("RGB").save(folder / f"{n:03}.png")
    return folder


def test_a_missing_data_folder_stops_the_run(tmp_path):
    images = noise_images(tmp_path / "images")
    away = images.with_name("away")
    config = recipe("smoke", steps=4000, checkpoint_every=2)

    def remove():
        images.rename(away)

    started = time.monotonic()
    message = f"the folder {images} is gone or empty: bring it back and resume"
    with pytest.raises(DataError, match=message):
        train(config, images, tmp_path / "run", workers=1, on_step=after_steps(3, remove))
    assert time.monotonic() - started < 60
    assert newest_checkpoint(tmp_path / "run" / "checkpoints")[1]["step"] >= 2
    away.rename(images)
    train_and_stop(2, config, images, tmp_path / "run")


def test_a_loading_process_that_dies_stops_the_run(tmp_path):
    killed = []

    def kill_loaders():
        for child in multiprocessing.active_children() if list_checkpoints(tmp_path / "checkpoints") else ():
            child.kill()
            killed.append(child.pid)
        return kill_loaders

    started = time.monotonic()
    message = r"step \d+: a process that loads images died .*resume with fewer workers"
    config = recipe("smoke", steps=4000, checkpoint_every=1)
    with pytest.raises(DataError, match=message):
        train(config, "bundled", tmp_path, workers=1, on_step=after_steps(1, kill_loaders))
    assert killed and time.monotonic() - started < 60
    assert newest_checkpoint(tmp_path / "checkpoints")[1]["step"] >= 1


def test_unreadable_images_are_skipped_counted_and_logged(tmp_path):
    images = noise_images(tmp_path / "images", 120)
    (images / "007.png").write_bytes(b"no image")
    config = recipe("smoke", steps=70, checkpoint_every=70)
    with pytest.warns(UserWarning, match="skipped an unreadable image: .*007.png is not an image"):
        train(config, images, tmp_path / "run")
    (line,) = read_metrics(tmp_path / "run" / "broken.jsonl")
    assert line["name"].endswith("007.png") and "not an image" in line["reason"]
    (images / "008.png").write_bytes(b"no image")
    message = "2 of 120 images are unreadable, max_unreadable=0.01; the last one: .*00[78].png"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=message):
            train(config, images, tmp_path / "other")
        train(replace(config, max_unreadable=0.05), images, tmp_path / "other")  # resumes


def test_a_collapsed_scale_is_named(tmp_path):
    tok = BitVAE(recipe("smoke").model)
    torch.nn.init.zeros_(tok.encoder.conv_out.weight)
    source = str(tok.save_pretrained(tmp_path / "constant"))
    frozen = {"freeze": "encoder", "init_from": source, "init_latent_norm": None}
    message = r"step 100: scale 1x1 has collapsed, its bits were the same for every image for 100 steps"
    with pytest.warns(CollapseWarning, match=message):
        train(recipe("smoke", steps=104, checkpoint_every=104, **frozen), "bundled", tmp_path / "run")


# from one tokenizer to another


def test_finetuning_with_a_frozen_encoder_keeps_existing_bits_valid(tmp_path):
    train(recipe("smoke", steps=5), "bundled", tmp_path / "first")
    x = load_image(bundled_photographs()[0], 64)
    first = BitVAE.from_pretrained(tmp_path / "first")
    bits = first.encode(x)
    frozen = {"init_from": str(tmp_path / "first"), "freeze": "encoder", "perceptual": "none", "lr": 1e-3}
    config = recipe("finetune", size=32, batch=2, steps=5, checkpoint_every=5, **frozen)
    train(config, "bundled", tmp_path / "tuned")
    tuned = BitVAE.from_pretrained(tmp_path / "tuned")
    assert tuned.config == first.config and tuned.encode(x) == bits
    assert not torch.equal(tuned.decode(bits), first.decode(bits))


def test_stage_two_starts_from_stage_one_with_its_discriminator(tmp_path, capsys):
    small = {
        "channels": 32,
        "multipliers": (1, 1, 1, 1, 1),
        "res_blocks": 1,
        "perceptual": "none",
        "discriminator_channels": 16,
        "checkpoint_every": 2,
    }
    one = recipe("d16_stage1", size=32, batch=2, steps=3, discriminator_start=1, **small)
    train(one, "bundled", tmp_path / "one")
    assert set(init_discriminator(str(tmp_path / "one"))) == set(PatchDiscriminator(16).state_dict())
    sizes = {"size": (32, 64, 96), "batch": (4, 2, 1)}
    two = recipe("d16_stage2", init_from=str(tmp_path / "one"), steps=9, **sizes, **small)

    def recorded(train, *arguments):
        "Train with a perceptual distance that records the crops' sizes; return them and the output."
        seen = []

        def distance(x, y):
            if y.requires_grad:  # not in a validation
                seen.append((x.shape[-1],) * len(x))
            return (x - y).square().mean((1, 2, 3))

        capsys.readouterr()
        train(*arguments, perceptual=distance)
        return seen, capsys.readouterr().out

    first, output = recorded(partial(train_and_stop, 4), two, "bundled", tmp_path / "two")
    assert "discriminator: pretrained weights" in output
    assert len(first) == newest_checkpoint(tmp_path / "two" / "checkpoints")[1]["step"]
    (tmp_path / "one").rename(tmp_path / "away")  # a resumed run does not read stage one
    rest, output = recorded(train, two, "bundled", tmp_path / "two")
    assert f"resuming at step {len(first)} of 9" in output and "discriminator:" not in output
    (tmp_path / "away").rename(tmp_path / "one")
    assert first + rest == recorded(train, two, "bundled", tmp_path / "again")[0]
    assert {*first, *rest} <= {(32,) * 4, (64,) * 2, (96,)}
    assert len({*first, *rest}) > 1
    results = [tmp_path / name / "tokenizer" / "model.safetensors" for name in ("two", "again")]
    assert results[0].read_bytes() == results[1].read_bytes()
