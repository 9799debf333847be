"Bits files: round trips, damage, other processes, the command line. BITVAE_TRIALS=100000 tries more."

import hashlib
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from children import bitvae

from bitvae import BitVAE, Bits, load_image
from bitvae.bits import BitsError
from bitvae.bitstream import read_header
from bitvae.schedules import scale_schedule
from bitvae.entropy_coding import coder_for
from bitvae.images import held_out_photographs

TRIALS = int(os.environ.get("BITVAE_TRIALS", 1000))
MODES = (
    "dynamic",
    "dense",
    "original",
    "half",
    "dense_f8",
    "same1",
    "same2",
    "same3",
    "dynamic_x2",
    "dense_x2",
    "half_x2",
    "same2_x2",
)
DEMO = BitVAE.from_pretrained("demo").fingerprint


def random_bits(rng, most=3000):
    "Bits of any width, schedule and batch, all scales of it or some, up to so many in all."
    while True:
        mode, h, w, d, B = (
            MODES[rng.integers(len(MODES))],
            *(int(2 ** rng.uniform(0, 6.1)) for _ in range(2)),
            int(2 ** rng.uniform(0, 6.5)),
            int(2 ** rng.uniform(0, 4)),
        )
        h, w = (16, 16) if mode.startswith("half") else (h, w)
        h, w = (2 * h, 2 * w) if mode.endswith("_x2") else (h, w)
        schedule = scale_schedule(h, w, mode)
        if rng.random() < 0.2:
            schedule = tuple(size for size in schedule[:-1] if rng.random() < 0.5) + schedule[-1:]
        if B * d * sum(a * b for a, b in schedule) <= most:
            break
    share, held = (
        rng.choice([0.5, 0.5, 0.9, 1.0]),
        rng.integers(1, len(schedule) + 1) if rng.random() < 0.3 else len(schedule),
    )
    planes = [torch.from_numpy(rng.random((B, a, b, d)) < share) for a, b in schedule[:held]]
    size = (h * 8 - int(rng.integers(8)), w * 8 - int(rng.integers(8))) if rng.random() < 0.7 else None
    return Bits(
        planes, schedule, image_size=size, tokenizer=[None, DEMO, "00112233445566ff"][rng.integers(3)]
    )


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


def test_large_batches_and_pictures():
    rng = np.random.default_rng(1)
    for mode, h, w, d, B in (
        ("dense", 64, 64, 64, 1),
        ("dynamic", 64, 48, 32, 2),
        ("dynamic", 16, 16, 6, 300),
        ("dense", 16, 16, 200, 1),
    ):
        schedule = scale_schedule(h, w, mode)
        bits = Bits(
            [torch.from_numpy(rng.random((B, a, b, d)) < 0.5) for a, b in schedule],
            schedule,
            image_size=(16 * h, 16 * w),
            tokenizer=DEMO,
        )
        assert len(bits.to_bytes()) <= -(-bits.count * B // 8) + 64
        assert Bits.from_bytes(bits.to_bytes()) == bits
        if d < 64:
            assert Bits.from_bytes(bits.to_bytes(compress=True)) == bits


@pytest.fixture(scope="module")
def files():
    "Files of real bits, raw and compressed, and what they hold."
    tok = BitVAE.from_pretrained("demo")
    made = [
        tok.encode(load_image(f, size))
        for f, size in zip(held_out_photographs(), (64, 128, 96, 256, 64, 64), strict=True)
    ]
    even = BitVAE.from_pretrained("demo", "dense_x2").encode(load_image(held_out_photographs()[0], 128))
    made += [
        even,
        Bits(even.planes[1::2], even.schedule[1::2], even.latent_size, even.image_size, even.tokenizer),
    ]  # some scales, too
    return [(b.to_bytes(compress), b) for b in made for compress in (False, True)]


def damaged(rng, files):
    data, bits = files[rng.integers(len(files))]
    data, kind = bytearray(data), rng.integers(6)
    if kind in (0, 4):
        for _ in range(rng.integers(1, 8)):
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    if kind in (1, 4):
        del data[rng.integers(len(data)) :]
    if kind == 2:
        data[: rng.integers(1, 70)] = files[rng.integers(len(files))][0][
            : rng.integers(1, 70)
        ]  # swapped headers
    if kind == 3:
        data[6 : 6 + rng.integers(1, 30)] = bytes(
            rng.integers(128, 256, rng.integers(1, 30), np.uint8)
        )  # huge numbers
    if kind == 5:  # a header that fits its check sum
        end, other = read_header(bytes(data)).end, files[rng.integers(len(files))][0]
        data[:end] = other[: read_header(other).end]
    return bytes(data), bits


def test_damage_is_found_or_what_is_intact_comes_back(files):
    rng, kept, slowest = np.random.default_rng(2), 0, 0.0
    originals = {bytes(d) for d, _ in files}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(TRIALS * 4):
            data, bits = damaged(rng, files)
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
    assert kept > TRIALS / 50  # cut tails still show something
    print(
        f"{kept} of {TRIALS * 4} damaged files gave intact scales; the slowest took {1000 * slowest:.0f} ms"
    )


LIMITED = """
import resource, sys
from bitvae import Bits
from bitvae.bits import BitsError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: Bits.from_bytes(bytes.fromhex(sys.argv[1])); print("read")
except BitsError as e: print(e)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("claims", ["raw", "compressed"])
def test_huge_claims_take_no_memory(claims):
    import struct
    import zlib

    from bitvae.bitstream import BITS_VERSION, checksum_widths, COMPRESSED, encode_varints, MAGIC

    head = (
        MAGIC
        + bytes([BITS_VERSION, COMPRESSED if claims == "compressed" else 0])
        + encode_varints(64, 10**9, 0, 1000, 1000)
    )
    if claims == "compressed":
        head += struct.pack("<I", 0) + encode_varints(2**34)
    used = len(head)
    head += bytes(sum(checksum_widths(len(scale_schedule(1000, 1000)), used)))
    data = head + struct.pack("<I", zlib.crc32(head)) + bytes(50)
    run = subprocess.run([sys.executable, "-c", LIMITED, data.hex()], capture_output=True, text=True)
    said, grown = run.stdout.strip().splitlines()
    assert said != "read" and int(grown) < 50_000, run.stdout + run.stderr  # kB


def test_flags_that_contradict_are_refused():
    import struct
    import zlib

    from bitvae.bitstream import BITS_VERSION, checksum_widths, DOUBLED, encode_varints, EXPLICIT, MAGIC, SUBSET

    for flags, schedule, message in (
        (EXPLICIT, encode_varints(1, 4, 4), None),
        (EXPLICIT | DOUBLED, encode_varints(1, 4, 4), "describes no bits"),
        (EXPLICIT | SUBSET, encode_varints(1, 4, 4), "describes no bits"),
        (SUBSET, encode_varints(0, 4, 4) + b"\x20", None),
        (SUBSET, encode_varints(0, 4, 4) + b"\x00", "check sum"),
        (DOUBLED, encode_varints(0, 5, 4), "names no schedule"),
    ):
        head = MAGIC + bytes([BITS_VERSION, flags]) + encode_varints(1, 1) + schedule
        head += struct.pack("<I", zlib.crc32(bytes(2)))
        data = head + struct.pack("<I", zlib.crc32(head)) + bytes(2)
        assert checksum_widths(1, len(head) - 4) == [4]
        if message is None:
            assert Bits.from_bytes(data).schedule == ((4, 4),)
        else:
            with pytest.raises(BitsError, match=message):
                Bits.from_bytes(data)


def test_many_scales_take_no_time():
    import struct
    import zlib

    from bitvae.bitstream import BITS_VERSION, checksum_widths, COMPRESSED, encode_varints, EXPLICIT, MAGIC

    for scales, d in ((255, 512), (4000, 1), (64, 64)):
        head = (
            MAGIC
            + bytes([BITS_VERSION, COMPRESSED | EXPLICIT])
            + encode_varints(d, 1, scales, *[1, 1] * scales)
            + struct.pack("<I", 0)
            + encode_varints(4000)
        )
        head += bytes(sum(checksum_widths(scales, len(head))))
        start = time.perf_counter()
        with pytest.raises(BitsError):
            Bits.from_bytes(head + struct.pack("<I", zlib.crc32(head)) + bytes(4000))
        assert time.perf_counter() - start < 10, (scales, d)  # unbounded it would take minutes


def test_the_same_bytes_everywhere(tmp_path):
    "What one process writes another reads, and neither versions nor machines change a byte."
    rng = np.random.default_rng(7)
    schedule = scale_schedule(16, 16)
    coarse = rng.random((1, 16, 16, 6))
    bits = Bits(
        [torch.from_numpy((coarse[:, :h, :w] + 0.3 * rng.random((1, h, w, 6))) < 0.9) for h, w in schedule],
        schedule,
    )
    learning = bits.to_bytes(compress=True)
    assert read_header(learning).coder == 0
    assert hashlib.sha256(learning).hexdigest()[:16] == "b23bedcd51e03c4e"
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
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.stdout == hashlib.sha256(bits.to_bytes()).hexdigest()


def test_command_line(tmp_path):
    cat, bits, picture = held_out_photographs()[1], tmp_path / "cat.bits", tmp_path / "cat.png"
    run = bitvae("encode", cat, bits)
    assert run.returncode == 0 and "compressed to" in run.stdout, run.stderr
    assert bitvae("info", bits).stdout == run.stdout
    assert bitvae("decode", bits, picture, "--scales", 5).returncode == 0
    assert load_image(picture).shape == load_image(cat).shape
    other = BitVAE(BitVAE.from_pretrained("demo").config).save_pretrained(tmp_path / "other")
    run = bitvae("decode", bits, picture, "--tokenizer", other)
    assert (
        run.returncode == 1
        and DEMO in run.stderr
        and BitVAE.from_pretrained(other).fingerprint in run.stderr
        and "Traceback" not in run.stderr
    )
    assert bitvae("decode", bits, picture, "--tokenizer", other, "--force").returncode == 0
    run = bitvae("fit-coder", other, "--count", 8)
    assert run.returncode == 0, run.stderr
    assert "there already" in bitvae("fit-coder", other).stderr
    assert bitvae("encode", cat, bits, "--tokenizer", other, "--size", 64).returncode == 0
    assert f"{BitVAE.from_pretrained(other).fingerprint}" in bitvae("info", bits).stdout
    Path(bits).write_bytes(b"BVAE and more")
    run = bitvae("info", bits)
    assert run.returncode == 1 and "cat.bits" in run.stderr and "Traceback" not in run.stderr
