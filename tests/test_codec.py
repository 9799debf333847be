"Bits files: round trips, damage, other processes and the command line. BITVAE_TRIALS=100000 tries more."

import hashlib
import os
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from children import bitvae

from bitvae import Bits, BitVAE, load_image
from bitvae.bits import BitsError, Deferred
from bitvae.bitstream import BITS_VERSION, MAGIC, Flag, checksum_widths, encode_varints, read_header
from bitvae.entropy_coding import coder_for
from bitvae.images import held_out_photographs
from bitvae.schedules import scale_schedule

TRIALS = int(os.environ.get("BITVAE_TRIALS", 1000))
MODES = "dynamic dense original half dense_f8 same1 same2 same3 dynamic_x2 dense_x2 half_x2 same2_x2".split()
DEMO = BitVAE.from_pretrained("demo").fingerprint


def test_a_deferred_method_runs_once_below_an_override(monkeypatch):
    class Base:
        save = Deferred("module")

    class Counted(Base):
        def save(self):
            calls.append(self)
            return super().save()

    calls = []
    monkeypatch.setattr("bitvae.bits.import_module", lambda name: setattr(Base, "save", lambda self: name))
    assert (Counted().save(), len(calls)) == ("module", 1)


def random_bits(rng, max_count=3000):
    "Random bits of any mode, size, bits per token and batch, with all scales or some."
    while True:
        mode = MODES[rng.integers(len(MODES))]
        h, w = (int(2 ** rng.uniform(0, 6.1)) for _ in range(2))
        d, B = int(2 ** rng.uniform(0, 6.5)), int(2 ** rng.uniform(0, 4))
        h, w = (16, 16) if mode.startswith("half") else (h, w)
        h, w = (2 * h, 2 * w) if mode.endswith("_x2") else (h, w)
        schedule = scale_schedule(h, w, mode)
        if rng.random() < 0.2:
            schedule = tuple(size for size in schedule[:-1] if rng.random() < 0.5) + schedule[-1:]
        if B * d * sum(a * b for a, b in schedule) <= max_count:
            break
    fraction = rng.choice([0.5, 0.5, 0.9, 1.0])  # of ones
    held = rng.integers(1, len(schedule) + 1) if rng.random() < 0.3 else len(schedule)
    planes = [torch.from_numpy(rng.random((B, a, b, d)) < fraction) for a, b in schedule[:held]]
    size = (h * 8 - int(rng.integers(8)), w * 8 - int(rng.integers(8))) if rng.random() < 0.7 else None
    tokenizer = [None, DEMO, "00112233445566ff"][rng.integers(3)]
    return Bits(planes, schedule, image_size=size, tokenizer=tokenizer)


def with_checksum(header):
    "A header with its own checksum."
    return header + zlib.crc32(header).to_bytes(4, "little")


def test_round_trips_are_exact():
    rng = np.random.default_rng(0)
    for _ in range(TRIALS):
        bits = random_bits(rng)
        raw, small = bits.to_bytes(), bits.to_bytes(compress=True)
        assert len(raw) <= -(-bits.count * bits.batch // 8) + 64, bits
        assert len(small) <= len(raw) + 16
        for data in (raw, small):
            back = Bits.from_bytes(data)
            assert back == bits and back.tokenizer == bits.tokenizer


def test_large_batches_and_images():
    rng = np.random.default_rng(1)
    for mode, h, w, d, B in (
        ("dense", 64, 64, 64, 1),
        ("dynamic", 64, 48, 32, 2),
        ("dynamic", 16, 16, 6, 300),
        ("dense", 16, 16, 200, 1),
    ):
        schedule = scale_schedule(h, w, mode)
        planes = [torch.from_numpy(rng.random((B, a, b, d)) < 0.5) for a, b in schedule]
        bits = Bits(planes, schedule, image_size=(16 * h, 16 * w), tokenizer=DEMO)
        assert len(bits.to_bytes()) <= -(-bits.count * B // 8) + 64
        assert Bits.from_bytes(bits.to_bytes()) == bits
        if d < 64:
            assert Bits.from_bytes(bits.to_bytes(compress=True)) == bits


@pytest.fixture(scope="module")
def files():
    "Files of real bits, raw and compressed, with the bits they hold."
    tok = BitVAE.from_pretrained("demo")
    sizes = (64, 128, 96, 256, 64, 64)
    made = [tok.encode(load_image(f, n)) for f, n in zip(held_out_photographs(), sizes, strict=True)]
    even = BitVAE.from_pretrained("demo", "dense_x2").encode(load_image(held_out_photographs()[0], 128))
    sizes = even.latent_size, even.image_size
    made += [even, Bits(even.planes[1::2], even.schedule[1::2], *sizes, even.tokenizer)]  # and dropped scales
    return [(b.to_bytes(compress), b) for b in made for compress in (False, True)]


def damaged(rng, files):
    "A file with flipped bits, a cut tail, another header or huge claims."
    data = bytearray(files[rng.integers(len(files))][0])
    kind = rng.integers(6)
    if kind in (0, 4):
        for _ in range(rng.integers(1, 8)):
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    if kind in (1, 4):
        del data[rng.integers(len(data)) :]
    if kind == 2:  # swapped starts
        other = files[rng.integers(len(files))][0]
        data[: rng.integers(1, 70)] = other[: rng.integers(1, 70)]
    if kind == 3:  # huge numbers
        data[6 : 6 + rng.integers(1, 30)] = bytes(rng.integers(128, 256, rng.integers(1, 30), np.uint8))
    if kind == 5:  # another header with a valid checksum
        other = files[rng.integers(len(files))][0]
        data[: read_header(bytes(data)).start] = other[: read_header(other).start]
    return bytes(data)


def test_damage_is_found_or_what_is_intact_comes_back(files):
    rng, kept, slowest = np.random.default_rng(2), 0, 0.0
    originals = {bytes(d) for d, _ in files}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(TRIALS * 4):
            data = damaged(rng, files)
            start = time.perf_counter()
            try:
                back = Bits.from_bytes(data)
            except BitsError:
                continue
            finally:
                slowest = max(slowest, time.perf_counter() - start)
            kept += data not in originals
            candidates = [b for _, b in files if len(back) <= len(b) and b.schedule == back.schedule]
            assert any(back == b[: len(back)] for b in candidates), (len(data), back)
    assert kept > TRIALS / 50  # truncated files still hold scales
    print(f"{kept} of {TRIALS * 4} damaged files gave intact scales, the slowest in {1000 * slowest:.0f} ms")


LIMITED = """
import resource, sys
from bitvae import Bits
from bitvae.bits import BitsError, Deferred
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    Bits.from_bytes(bytes.fromhex(sys.argv[1]))
    print("read")
except BitsError as e:
    print(e)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("claims", ["raw", "compressed"])
def test_huge_claims_take_no_memory(claims):
    flags = Flag.COMPRESSED if claims == "compressed" else 0
    head = MAGIC + bytes([BITS_VERSION, flags]) + encode_varints(64, 10**9, 0, 1000, 1000)
    if claims == "compressed":
        head += bytes(4) + encode_varints(2**34)
    head += bytes(sum(checksum_widths(len(scale_schedule(1000, 1000)), len(head))))
    data = with_checksum(head) + bytes(50)
    run = subprocess.run([sys.executable, "-c", LIMITED, data.hex()], capture_output=True, text=True)
    said, grown = run.stdout.strip().splitlines()
    assert said != "read" and int(grown) < 50_000, run.stdout + run.stderr  # kB


def test_flags_that_contradict_are_refused():
    for flags, schedule, message in (
        (Flag.EXPLICIT, encode_varints(1, 4, 4), None),
        (Flag.EXPLICIT | Flag.DOUBLED, encode_varints(1, 4, 4), "describes no bits"),
        (Flag.EXPLICIT | Flag.SUBSET, encode_varints(1, 4, 4), "describes no bits"),
        (Flag.SUBSET, encode_varints(0, 4, 4) + b"\x20", None),
        (Flag.SUBSET, encode_varints(0, 4, 4) + b"\x00", "checksum"),
        (Flag.DOUBLED, encode_varints(0, 5, 4), "names no schedule"),
    ):
        head = MAGIC + bytes([BITS_VERSION, flags]) + encode_varints(1, 1) + schedule
        assert checksum_widths(1, len(head)) == [4]
        data = with_checksum(head + zlib.crc32(bytes(2)).to_bytes(4, "little")) + bytes(2)
        if message is None:
            assert Bits.from_bytes(data).schedule == ((4, 4),)
        else:
            with pytest.raises(BitsError, match=message):
                Bits.from_bytes(data)


def test_many_scales_take_no_time():
    for scales, d in ((255, 512), (4000, 1), (64, 64)):
        head = MAGIC + bytes([BITS_VERSION, Flag.COMPRESSED | Flag.EXPLICIT])
        head += encode_varints(d, 1, scales, *[1, 1] * scales) + bytes(4) + encode_varints(4000)
        head += bytes(sum(checksum_widths(scales, len(head))))
        start = time.perf_counter()
        with pytest.raises(BitsError):
            Bits.from_bytes(with_checksum(head) + bytes(4000))
        assert time.perf_counter() - start < 10, (scales, d)  # unbounded it would take minutes


def test_the_same_bytes_everywhere(tmp_path):
    "Bytes are the same on every machine, and another process reads them."
    rng = np.random.default_rng(7)
    schedule = scale_schedule(16, 16)
    coarse = rng.random((1, 16, 16, 6))
    noisy = [coarse[:, :h, :w] + 0.3 * rng.random((1, h, w, 6)) for h, w in schedule]
    adaptive = Bits([torch.from_numpy(v < 0.9) for v in noisy], schedule).to_bytes(compress=True)
    assert read_header(adaptive).coder == 0
    assert hashlib.sha256(adaptive).hexdigest()[:16] == "b23bedcd51e03c4e"
    bits = BitVAE.from_pretrained("demo").encode(load_image(held_out_photographs()[1], 128))
    data = bits.to_bytes(compress=True)
    assert read_header(data).coder == coder_for(DEMO, 6).id
    file = tmp_path / "a.bits"
    file.write_bytes(data)
    code = f"""
import hashlib
from bitvae import Bits
print(hashlib.sha256(Bits.load({str(file)!r}).to_bytes()).hexdigest(), end="")
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert run.stdout == hashlib.sha256(bits.to_bytes()).hexdigest()


def test_command_line(tmp_path):
    cat, bits, image = held_out_photographs()[1], tmp_path / "cat.bits", tmp_path / "cat.png"
    run = bitvae("encode", cat, bits)
    assert run.returncode == 0 and "compressed to" in run.stdout, run.stderr
    assert bitvae("info", bits).stdout == run.stdout
    assert bitvae("decode", bits, image, "--scales", 5).returncode == 0
    assert load_image(image).shape == load_image(cat).shape
    other = BitVAE(BitVAE.from_pretrained("demo").config).save_pretrained(tmp_path / "other")
    run = bitvae("decode", bits, image, "--tokenizer", other)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert DEMO in run.stderr and BitVAE.from_pretrained(other).fingerprint in run.stderr
    assert bitvae("decode", bits, image, "--tokenizer", other, "--force").returncode == 0
    run = bitvae("fit-coder", other, "--count", 8)
    assert run.returncode == 0, run.stderr
    assert "there already" in bitvae("fit-coder", other).stderr
    assert bitvae("encode", cat, bits, "--tokenizer", other, "--size", 64).returncode == 0
    assert BitVAE.from_pretrained(other).fingerprint in bitvae("info", bits).stdout
    Path(bits).write_bytes(b"BVAE and more")
    run = bitvae("info", bits)
    assert run.returncode == 1 and "cat.bits" in run.stderr and "Traceback" not in run.stderr
