"""A run that is killed, at whatever point, goes on as if it had not been; and what is damaged is noticed."""

import multiprocessing
import os
import random
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from children import call, servers
from PIL import Image

from bitvae import BitVAE, load_image
from bitvae.losses import PatchDiscriminator
from bitvae.data import CropPlan, DataError
from bitvae.images import bundled_photographs
from bitvae.recipes import recipe
from bitvae.run_dir import CollapseWarning, deserialize_state, list_checkpoints, newest_checkpoint, read_checkpoint, read_metrics, RunExistsError
from bitvae.checkpoints import CheckpointError
from bitvae.training import init_discriminator, train

pytestmark = pytest.mark.slow

EVERYTHING = recipe(
    "smoke",
    steps=12,
    checkpoint_every=2,
    discriminator_start=2,
    ema=0.9,
    drop_rate=0.5,
    schedule="dense",
    accumulate=2,
    batch=1,
)
MANY = int(os.environ.get("BITVAE_TRIALS", 1000)) > 1000


def run(folder, config=EVERYTHING, slowly=0.0):
    "A run in a child: one thread, a small critic, and writing that takes its time where that is wanted."
    import bitvae.training

    torch.set_num_threads(1)
    sys.stderr = sys.stdout = open(os.devnull, "w")
    bitvae.losses.PatchDiscriminator = partial(PatchDiscriminator, 16)
    plain = os.fsync
    os.fsync = lambda descriptor: (time.sleep(slowly), plain(descriptor))
    train(config, "bundled", folder, validation=bundled_photographs()[0])


def begin(folder, **how):
    child = servers.Process(target=run, args=(folder,), kwargs=how)
    child.start()
    return child


def finished(folder, **how):
    child = begin(folder, **how)
    child.join(120)
    assert child.exitcode == 0
    return folder


def flat(value, name=""):
    "A nested state as names and plain values; tensors as their bytes."
    if isinstance(value, dict):
        return {n: v for k, x in value.items() for n, v in flat(x, f"{name}/{k}").items()}
    if isinstance(value, list):
        return {n: v for k, x in enumerate(value) for n, v in flat(x, f"{name}/{k}").items()}
    return {name: value.numpy().tobytes() if isinstance(value, torch.Tensor) else value}


def state(folder):
    "Return a finished run's tokenizer and last checkpoint: both networks, both optimizers, the average."
    path, content = newest_checkpoint(folder / "checkpoints")
    files, result = content["files"], (folder / "tokenizer" / "model.safetensors").read_bytes()
    assert files["model.safetensors"] == result
    return {"step": content["step"], "result": result} | flat(deserialize_state(files["state.pt"]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return state(finished(tmp_path_factory.mktemp("runs") / "whole"))


def kill_at(folder, child, steps, wait, writing):
    "Kill -9 after so many steps and a moment more, or as soon as a checkpoint after that is being written."

    def parts():
        return list((folder / "checkpoints").glob(".*.step-*"))

    while child.is_alive():
        if len(read_metrics(folder / "metrics.jsonl")) >= steps and (parts() or not writing):
            break
        time.sleep(0.002)
    if not writing:
        time.sleep(wait)
    was_writing = bool(parts())
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    return was_writing


def test_killed_anywhere_and_resumed_is_as_never_killed(tmp_path, whole):
    rng = random.Random(0)
    points = [(n, rng.randint(1, 10), rng.random() * 0.1) for n in range(20)]
    if not MANY:  # before the first checkpoint, after two, near the end; each also while one is written
        points = [(2 * n + i, steps, 0.03 * n) for n, steps in enumerate((1, 4, 10)) for i in range(2)]
    assert whole["step"] == 12 and {
        "/vae/encoder.conv_in.weight",
        "/image_disc/main.0.weight",
        "/opt_image_disc/state/0/exp_avg",
        "/averaged",
    } <= set(whole)

    def try_one(point):
        n, steps, wait = point
        folder, while_writing = tmp_path / str(n), n % 2 == 1
        child = begin(folder, slowly=0.05 if while_writing else 0.0)
        writing = kill_at(folder, child, steps, wait, while_writing)
        assert child.exitcode == -signal.SIGKILL and not (folder / "tokenizer").exists(), n
        assert state(finished(folder)) == whole, n
        assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == list(range(12)), n
        assert not list((folder / "checkpoints").glob(".*"))
        return writing

    with ThreadPoolExecutor(2) as pool:
        writing = list(pool.map(try_one, points))
    assert sum(writing) >= len(points) // 4


def test_five_steps_killed_and_resumed_to_twelve(tmp_path, whole):
    child = begin(tmp_path)
    kill_at(tmp_path, child, 5, 0.0, writing=False)
    assert state(finished(tmp_path)) == whole


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, whole, damage):
    child = begin(tmp_path)
    kill_at(tmp_path, child, 7, 0.0, writing=False)
    newest, before = list_checkpoints(tmp_path / "checkpoints")[-1], list_checkpoints(tmp_path / "checkpoints")[-2]
    file = newest / "state.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"{newest.name}.* is damaged"):
        read_checkpoint(newest)
    with pytest.warns(UserWarning, match=f"{newest.name}.* is damaged.*the checkpoint before it is used"):
        assert newest_checkpoint(tmp_path / "checkpoints")[0] == before
    assert state(finished(tmp_path)) == whole


def test_two_runs_at_once_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("bitvae.losses.PatchDiscriminator", partial(PatchDiscriminator, 16))
    child = begin(tmp_path, config=replace(EVERYTHING, steps=500))
    while len(read_metrics(tmp_path / "metrics.jsonl")) < 1:
        time.sleep(0.01)
    with pytest.raises(RunExistsError, match="another process is training in"):
        train(replace(EVERYTHING, steps=500), "bundled", tmp_path)
    assert child.is_alive()
    child.kill()
    child.join()


def test_how_work_is_shared_out_may_change(tmp_path):
    config = recipe("smoke", steps=6, checkpoint_every=3, batch=2)
    with pytest.raises(KeyboardInterrupt):
        stop_after(3, lambda: train(config, "bundled", tmp_path))
    train(
        replace(config, batch=1, accumulate=2, checkpoint_every=1, keep=9, activation_checkpointing=True),
        "bundled",
        tmp_path,
    )
    assert [c.name[-1] for c in list_checkpoints(tmp_path / "checkpoints")] == ["3", "4", "5", "6"]
    with pytest.raises(RunExistsError, match=r"lr \(0.0015 there, 0.1 here\)"):
        train(replace(config, lr=0.1), "bundled", tmp_path)
    with pytest.raises(RunExistsError, match=r"crops per step \(\[2\] there, \[4\] here\)"):
        train(replace(config, batch=4), "bundled", tmp_path)


def stop_after(steps, what):
    "SIGTERM when so many steps are logged."
    import bitvae.training

    plain = bitvae.run_dir.summarize_bits

    def counting(bits):
        nonlocal steps
        steps -= 1
        if steps == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(bits)

    bitvae.run_dir.summarize_bits = counting
    try:
        return what()
    finally:
        bitvae.run_dir.summarize_bits = plain


# what goes wrong around a run

AVERAGED = recipe("smoke", steps=8, checkpoint_every=2, ema=0.9)


def train_with_limit(folder, limit):
    "Train where no file may be larger than so many bytes."
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    train(AVERAGED, "bundled", folder)


def test_no_room_for_a_checkpoint(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        stop_after(3, lambda: train(AVERAGED, "bundled", tmp_path / "run"))
    before = list_checkpoints(tmp_path / "run" / "checkpoints")
    room = max(f.stat().st_size for f in before[-1].iterdir())
    full = call(train_with_limit, tmp_path / "run", room // 2)
    assert (
        full.returncode == 1
        and "OSError" in full.stderr
        and "cannot write" in full.stderr
        and "make room; earlier checkpoints are kept" in full.stderr
    )
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == before and read_checkpoint(before[-1])
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    assert (
        call(train_with_limit, tmp_path / "run", None).returncode == 0
        and (tmp_path / "run" / "tokenizer").exists()
    )


def many_photographs(folder, count=40):
    folder.mkdir()
    for n in range(count):
        Image.effect_noise((64, 48), 50 + n).convert("RGB").save(folder / f"{n:03}.png")
    return folder


def test_a_folder_that_vanishes(tmp_path):
    photographs, config = (
        many_photographs(tmp_path / "photographs"),
        recipe("smoke", steps=4000, checkpoint_every=2),
    )
    start = time.monotonic()
    with pytest.raises(DataError, match=f"the folder {photographs} is gone: bring it back and resume"):
        vanish_after(3, photographs, lambda: train(config, photographs, tmp_path / "run", workers=1))
    assert (
        time.monotonic() - start < 60 and newest_checkpoint(tmp_path / "run" / "checkpoints")[1]["step"] >= 2
    )
    photographs.with_name("away").rename(photographs)
    with pytest.raises(KeyboardInterrupt):
        stop_after(2, lambda: train(config, photographs, tmp_path / "run"))


def vanish_after(steps, folder, what):
    import bitvae.training

    plain = bitvae.run_dir.summarize_bits

    def counting(bits):
        nonlocal steps
        steps -= 1
        if steps == 0:
            folder.rename(folder.with_name("away"))
        return plain(bits)

    bitvae.run_dir.summarize_bits = counting
    try:
        return what()
    finally:
        bitvae.run_dir.summarize_bits = plain


def test_a_loading_process_that_dies(tmp_path):
    import bitvae.training

    plain, killed = bitvae.run_dir.summarize_bits, []

    def killing(bits):
        for child in multiprocessing.active_children() if list_checkpoints(tmp_path / "checkpoints") else ():
            child.kill()
            killed.append(child.pid)
        return plain(bits)

    bitvae.run_dir.summarize_bits, start = killing, time.monotonic()
    try:
        with pytest.raises(
            DataError, match=r"step \d+: a process that loads images died .*resume with fewer workers"
        ):
            train(recipe("smoke", steps=4000, checkpoint_every=1), "bundled", tmp_path, workers=1)
    finally:
        bitvae.run_dir.summarize_bits = plain
    assert (
        killed
        and time.monotonic() - start < 60
        and newest_checkpoint(tmp_path / "checkpoints")[1]["step"] >= 1
    )


def test_broken_pictures_are_passed_over_counted_and_logged(tmp_path):
    photographs = many_photographs(tmp_path / "photographs", 120)
    (photographs / "007.png").write_bytes(b"no picture")
    config = recipe("smoke", steps=70, checkpoint_every=70)
    with pytest.warns(UserWarning, match="passed over .*007.png is not an image"):
        train(config, photographs, tmp_path / "run")
    (line,) = read_metrics(tmp_path / "run" / "broken.jsonl")
    assert line["name"].endswith("007.png") and "not an image" in line["reason"]
    (photographs / "008.png").write_bytes(b"no picture")
    with (
        warnings.catch_warnings(),
        pytest.raises(
            DataError,
            match="2 of 120 pictures cannot be used, more than max_broken=0.01 allows, "
            "the last one: .*00[78].png",
        ),
    ):
        warnings.simplefilter("ignore")
        train(config, photographs, tmp_path / "other")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(
            replace(config, max_broken=0.05), photographs, tmp_path / "other"
        )  # what was refused goes on with a larger share


def test_a_collapsed_scale_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("bitvae.run_dir.CollapseWatch.__init__.__defaults__", (5,))
    config = recipe(
        "smoke",
        steps=12,
        checkpoint_every=12,
        freeze="encoder",
        start=str(constant_tokenizer(tmp_path / "constant")),
        start_norm=None,
    )
    with pytest.warns(
        CollapseWarning,
        match=r"step 5: scale 1x1 has collapsed, its bits were the same for every picture for 5 steps",
    ):
        train(config, "bundled", tmp_path / "run")


def constant_tokenizer(folder):
    tok = BitVAE(recipe("smoke").model)
    torch.nn.init.zeros_(tok.encoder.conv_out.weight)
    return tok.save_pretrained(folder)


# from one tokenizer to another


def test_finetune_with_a_frozen_encoder_keeps_existing_bits_valid(tmp_path):
    train(recipe("smoke", steps=5), "bundled", tmp_path / "first")
    x = load_image(bundled_photographs()[0], 64)
    first = BitVAE.from_pretrained(tmp_path / "first")
    bits = first.encode(x)
    config = recipe(
        "finetune",
        start=str(tmp_path / "first"),
        freeze="encoder",
        perceptual="none",
        size=32,
        batch=2,
        steps=5,
        checkpoint_every=5,
        lr=1e-3,
    )
    train(config, "bundled", tmp_path / "tuned")
    tuned = BitVAE.from_pretrained(tmp_path / "tuned")
    assert (
        tuned.config == first.config
        and tuned.encode(x) == bits
        and not torch.equal(tuned.decode(bits), first.decode(bits))
    )


def test_stage_two_starts_from_stage_one_with_its_critic(tmp_path, monkeypatch):
    monkeypatch.setattr("bitvae.losses.PatchDiscriminator", partial(PatchDiscriminator, 16))
    small = {
        "channels": 32,
        "multipliers": (1, 1, 1, 1, 1),
        "res_blocks": 1,
        "perceptual": "none",
        "checkpoint_every": 2,
    }
    train(
        recipe("d16_stage1", size=32, batch=2, steps=3, discriminator_start=1, **small),
        "bundled",
        tmp_path / "one",
    )
    two = recipe(
        "d16_stage2", start=str(tmp_path / "one"), size=(32, 64, 96), batch=(4, 2, 1), steps=9, **small
    )
    begun = []

    def noting(plain):
        return lambda *given: begun.append(plain(*given)) or begun[-1]

    monkeypatch.setattr(CropPlan, "of_pass", noting(CropPlan.of_pass))
    monkeypatch.setattr("bitvae.training.init_discriminator", noting(init_discriminator))
    with pytest.raises(KeyboardInterrupt):
        stop_after(4, lambda: train(two, "bundled", tmp_path / "two"))
    critic = begun[0]
    assert critic and set(critic) == set(PatchDiscriminator(16).state_dict())
    first = [[size for _, size in keys] for keys in begun[1:6]]
    begun.clear()
    train(two, "bundled", tmp_path / "two")  # goes on without looking at stage one
    rest = [[size for _, size in keys] for keys in begun]
    begun.clear()
    train(two, "bundled", tmp_path / "again")
    assert first + rest == [[size for _, size in keys] for keys in begun[1:]]
    assert {tuple(sizes) for sizes in first + rest} <= {(32,) * 4, (64,) * 2, (96,)} and len(
        {len(sizes) for sizes in first + rest}
    ) > 1
    assert (tmp_path / "two" / "tokenizer" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "tokenizer" / "model.safetensors"
    ).read_bytes()
