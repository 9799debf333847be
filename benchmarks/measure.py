"""Times as ratios, peak memory, machine and peers, for `nbs/experiments/benchmark.ipynb`."""

import json
import logging
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from statistics import median
from unittest.mock import patch

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from bitvae.bits import Bits
from bitvae.schedules import scale_schedule
from bitvae.tokenizer import BitVAEConfig

logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # nvcc without a GPU is no news


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int = 5,
) -> dict[str, list[float]]:  # seconds of each round, by name
    "Time functions interleaved, in a new random order each round, after one warm-up call of each."

    def once(f: Callable[[], object]) -> float:
        start = time.perf_counter()
        f()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for f in candidates.values():
        once(f)
    seconds, rng = {name: [] for name in candidates}, random.Random(0)
    for _ in range(rounds):
        for name in rng.sample(list(candidates), len(candidates)):
            seconds[name].append(once(candidates[name]))
    return seconds


def ratio(times: Mapping[str, Sequence[float]], of: str, to: str) -> float:
    "Return the median time of one candidate as a fraction of another's."
    return float(np.median(times[of]) / np.median(times[to]))


@contextmanager
def object_store(cache: str) -> Iterator[str]:  # address of an empty folder
    "Run an S3 server on this machine, or without `moto` use a store in memory; copies go into a folder."
    server, environment = None, {"BITVAE_CACHE": cache}
    if find_spec("moto") and find_spec("s3fs"):
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.WARNING)  # no line for each request
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        environment |= {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        environment["AWS_DEFAULT_REGION"] = "us-east-1"
    try:
        with patch.dict(os.environ, environment):
            if server:
                from s3fs import S3FileSystem

                S3FileSystem().mkdir("tokens")
            yield "s3://tokens" if server else "memory://tokens"
    finally:
        if server:
            server.stop()


WATCH = """
import json, threading, time, psutil, torch
def resident(): return psutil.Process().memory_info().rss
{imports}
libraries = resident()
{prepare}
seen, done, cuda = [resident()], threading.Event(), torch.cuda.is_available()
def watch():
    while not done.wait(0.002):
        seen.append(resident())
threading.Thread(target=watch, daemon=True).start()
if cuda:
    torch.cuda.reset_peak_memory_stats()  # cuDNN tried its algorithms before
before = torch.cuda.memory_allocated() if cuda else seen[0]
start = time.perf_counter()
{work}
if cuda:
    torch.cuda.synchronize()
seconds = time.perf_counter() - start
done.set()
peak = torch.cuda.max_memory_allocated() if cuda else max(seen)
print(json.dumps(dict(libraries=0 if cuda else libraries, before=before, peak=peak, seconds=seconds)))
"""


def peak_memory(
    imports: str,  # Python statements
    prepare: str,  # Python statements that make what is needed
    work: str,     # Python statements whose peak is measured
    runs: int = 3,
) -> dict[str, float]:  # medians of libraries, before and peak in bytes, and of seconds
    "Run Python in processes of its own and record their memory; raise `RuntimeError` if one fails."
    # glibc then returns freed memory at once, so that resident memory is memory in use
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    code, records = WATCH.format(imports=imports, prepare=prepare, work=work), []
    for _ in range(runs):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        if run.returncode:
            raise RuntimeError(f"the process failed with exit code {run.returncode}: {run.stderr[-2000:]}")
        records.append(json.loads(run.stdout.splitlines()[-1]))
    return {name: median(record[name] for record in records) for name in records[0]}


def machine() -> dict[str, object]:
    "Describe processor, GPU and package versions."
    processor = platform.processor() or platform.machine()
    with suppress(OSError), open("/proc/cpuinfo") as f:
        names = (line.partition(":")[2].strip() for line in f if line.startswith("model name"))
        processor = next(names, processor)
    facts = {
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": processor,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    for name in ("torch", "torchvision", "numpy", "pillow", "diffusers", "vector-quantize-pytorch"):
        with suppress(PackageNotFoundError):
            facts[name] = version(name)
    return facts


def quantize_plainly(z: Tensor, mode: str) -> Bits:
    "Quantize a latent (B, d, h, w) by the loop as the paper writes it."
    schedule, residual, planes = scale_schedule(*z.shape[-2:], mode), z, []
    for size in schedule:
        v = F.normalize(F.interpolate(residual, size=size, mode="area"), dim=1)
        planes.append(rearrange(v > 0, "B d h w -> B h w d"))
        codes = torch.where(v > 0, 1.0, -1.0) / z.shape[1] ** 0.5
        residual = residual - F.interpolate(v + (codes - v), size=z.shape[-2:], mode="bilinear")
    return Bits(planes, schedule)


def dequantize_plainly(bits: Bits) -> Tensor:
    "Sum the upsampled codes of all scales."
    codes = [torch.where(p, 1.0, -1.0) / bits.dim**0.5 for p in bits]
    codes = [rearrange(q, "B h w d -> B d h w").contiguous() for q in codes]
    return sum(F.interpolate(q, size=bits.latent_size, mode="bilinear") for q in codes)


def peer(package: str, name: str) -> type | None:
    "Import a class of a package that only the benchmark needs; print what is missing and return None."
    try:
        return getattr(import_module(package), name)
    except (ImportError, RuntimeError) as e:
        print(f"not measured: {package.replace('_', '-')}, which is not installed ({e})")
        return None


def diffusers_autoencoder(c: BitVAEConfig) -> nn.Module | None:
    "Return `AutoencoderKL` of `diffusers` with a tokenizer's channels, without attention."
    n, cls = len(c.encoder_multipliers), peer("diffusers", "AutoencoderKL")
    return cls and cls(
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        block_out_channels=tuple(c.channels * m for m in c.encoder_multipliers),
        layers_per_block=c.res_blocks,
        latent_channels=c.dim,
        norm_num_groups=32,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def residual_lfq(d: int, h: int, w: int) -> nn.Module | None:
    "Return the residual LFQ of `vector-quantize-pytorch`, with at most the bits of schedule `dynamic`."
    levels = sum(a * b for a, b in scale_schedule(h, w)) // (h * w)
    quantizer = peer("vector_quantize_pytorch", "GroupedResidualLFQ")
    groups = {"groups": d // 8, "num_quantizers": levels, "codebook_size": 256, "spherical": True}
    return quantizer and quantizer(dim=d, **groups).eval()
