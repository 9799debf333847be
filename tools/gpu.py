"""Check and time the package on one GPU, without network: correctness, speed, training, profile.

python3 tools/gpu.py --out FOLDER [--minutes 4] [--sections a,b,c] [--smoke]

Writes FOLDER/gpu.json after every section and FOLDER/gpu.txt, the summary table. A section that fails is
recorded, and the next one runs. `--smoke` runs all of it at tiny sizes on a CPU, in Triton's interpreter.
"""

import argparse
import copy
import hashlib
import importlib.util
import json
import os
import statistics
import sys
import time
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", required=True, help="folder of the results")
parser.add_argument("--minutes", type=float, default=4, help="time for all sections")
parser.add_argument("--budget", type=float, help="the same in seconds")
parser.add_argument("--sections", help="letters such as a,b,c; default: all")
parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU")
args = parser.parse_args()
if args.smoke:
    os.environ["TRITON_INTERPRET"] = "1"
if importlib.util.find_spec("constriction") is None:
    sys.modules["constriction"] = mock.MagicMock()  # of the range coder, which nothing here uses

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from bitvae.kernels import SWAPS, FoldedUpsample, optimize  # noqa: E402
from bitvae.losses import PatchDiscriminator, discriminator_loss, generator_loss  # noqa: E402
from bitvae.protocols import PROTOCOLS  # noqa: E402
from bitvae.quantizer import MultiScaleBSQ, latent_from_bits, quantize_residual  # noqa: E402
from bitvae.tokenizer import BitVAE, BitVAEConfig  # noqa: E402

STARTED = time.monotonic()
SECONDS = args.budget or 60 * args.minutes
DEVICE = torch.device("cpu" if args.smoke else "cuda")
PEAK = 989e12  # bf16 operations per second of an H100 without sparsity
OUT = Path(args.out)
RESULTS = {"rows": [], "errors": {}, "seconds": {}, "profile": {}}
if args.smoke:
    MODEL = BitVAEConfig(dim=32, channels=32, multipliers=(1, 1), res_blocks=1, stride=2)
    SIZE, BATCHES, LARGE, ROUNDS, TRAIN_BATCH, LATENTS = 4, (1,), 8, 1, 1, ((1, 2), (1, 4))
    MAPS = [(1, 32, 3, 3), (2, 48, 5, 3)]
else:
    MODEL = BitVAEConfig(dim=32)
    SIZE, BATCHES, LARGE, ROUNDS, TRAIN_BATCH = 256, (32, 64), 1024, 5, 32
    LATENTS = ((32, 16), (32, 32), (8, 64))
    MAPS = [(32, 128, 256, 256), (32, 512, 64, 64), (32, 512, 16, 16), (1, 128, 1024, 1024)]


def left() -> float: return SECONDS - (time.monotonic() - STARTED)


def say(*words): print(f"[{time.monotonic() - STARTED:6.1f} s]", *words, flush=True)


def row(section, what, **values):
    "Record and print one line of the summary."
    RESULTS["rows"].append({"section": section, "what": what} | values)
    say(section, what, "  ".join(f"{k} {number(v)}" for k, v in values.items()))


def number(v): return f"{v:.4g}" if isinstance(v, float) else str(v)


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def once(run) -> float:
    "Return the milliseconds of one call."
    if DEVICE.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def warm_up(name, run) -> dict:
    "Call once, and again for the peak memory; return seconds of the first call and GiB."
    start = time.perf_counter()
    run()
    synchronize()
    first = time.perf_counter() - start
    if DEVICE.type == "cpu":
        return {"first_s": first}
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    synchronize()
    return {"first_s": first, "peak_gib": (torch.cuda.max_memory_allocated() - before) / 2**30}


def compare(section, what, arms, images=0, flop=0, rounds=ROUNDS, base=None):
    "Time functions in interleaved rounds and record the median of each."
    facts, times = {}, {}
    for name, run in arms.items():
        try:
            facts[name] = warm_up(name, run)
            times[name] = []
        except Exception as e:  # noqa: BLE001 an arm that fails must not end the others
            record_error(f"{section} {what} {name}", e)
    for i in range(rounds):
        for name in list(times) if i % 2 else list(times)[::-1]:
            times[name].append(once(arms[name]))
    base = base or statistics.median(next(iter(times.values()), [1.0]))
    for name, ms in times.items():
        median = statistics.median(ms)
        values = {"ms": median, "speedup": base / median}
        if images:
            values["images_s"] = 1e3 * images / median
        if flop:
            values |= {"tflop_s": flop / median / 1e9, "share": flop / median * 1e3 / PEAK}
        row(section, f"{what}, {name}", **values, spread=(max(ms) - min(ms)) / median, **facts[name])
    return {name: statistics.median(ms) for name, ms in times.items()}


def record_error(where, e):
    RESULTS["errors"][where] = f"{type(e).__name__}: {e}"[:2000]
    say("FAILED", where, traceback.format_exc()[-1500:])


def fused(net): return optimize(net, SWAPS["cuda"])


def folded(net): return optimize(net, (FoldedUpsample,))


def channels_last(net): return net.to(memory_format=torch.channels_last)


def images(batch, size=SIZE, dtype=torch.float32):
    return torch.rand(batch, 3, size, size, device=DEVICE, dtype=dtype) * 2 - 1


def latents(batch, size=SIZE, dtype=torch.float32):
    side = size // MODEL.stride
    return torch.randn(batch, MODEL.dim, side, side, device=DEVICE, dtype=dtype) / MODEL.dim**0.5


def new_tokenizer():
    torch.manual_seed(0)
    return BitVAE(MODEL).to(DEVICE).eval()


def flop_per_image() -> dict[str, float]:
    "Count the operations of the plain networks for one image."
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        tok, side = BitVAE(MODEL), SIZE // MODEL.stride
        inputs = {"encode": torch.empty(1, 3, SIZE, SIZE), "decode": torch.empty(1, MODEL.dim, side, side)}
    flop = {}
    for name, net in (("encode", tok.encoder), ("decode", tok.decoder)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(inputs[name])
        flop[name] = counter.get_total_flops()
    return flop


# sections


def section_a():
    "Device facts and ceilings."
    row("a", "software", torch=torch.__version__, python=sys.version.split()[0], device=str(DEVICE))
    if DEVICE.type == "cuda":
        p = torch.cuda.get_device_properties(0)
        row("a", p.name, processors=p.multi_processor_count, gib=p.total_memory / 2**30,
            cudnn=torch.backends.cudnn.version())  # fmt: skip
    n = 1 << (12 if args.smoke else 30)
    a, b = (torch.empty(n, dtype=torch.uint8, device=DEVICE).random_() for _ in range(2))
    ms = statistics.median([once(lambda: a.copy_(b)) for _ in range(10)])
    RESULTS["copy_gb_s"] = 2 * n / ms / 1e6
    row("a", "copy", gb_s=RESULTS["copy_gb_s"])
    n = 64 if args.smoke else 8192
    a, b = torch.randn(2, n, n, device=DEVICE).bfloat16()
    ms = statistics.median([once(lambda: a @ b) for _ in range(20)])
    row("a", f"bf16 matmul {n}", tflop_s=2 * n**3 / ms / 1e9, share=2 * n**3 / ms * 1e3 / PEAK)
    flop = flop_per_image()
    row("a", "TFLOP per image", encode=flop["encode"] / 1e12, decode=flop["decode"] / 1e12)


def section_b():
    "Correctness of the operator."
    from bitvae.triton_norm import fused_group_norm

    shapes = [(2, 48, 3, 5), (1, 24, 1, 1)] if args.smoke else [
        (2, 128, 65, 63), (2, 256, 33, 31), (4, 512, 16, 16), (2, 48, 65, 9), (2, 24, 1, 1), (1, 160, 31, 5),
        (1, 1024, 7, 9), (1, 96, 513, 257), (2, 128, 256, 256)]  # fmt: skip
    torch.manual_seed(0)
    worst, limit = {}, 1e-6
    for shape in shapes:
        x = torch.randn(shape, device=DEVICE) / 2 + 3 * torch.randn(1, shape[1], 1, 1, device=DEVICE)
        w, b = torch.randn(2, shape[1], device=DEVICE)
        dy, groups = torch.randn(shape, device=DEVICE), 24 if shape[1] % 32 else 32

        def plain(x, w, b, groups=groups):
            u = x.unflatten(1, (groups, -1))
            var, mean = torch.var_mean(u, (2, 3, 4), correction=0, keepdim=True)
            u = ((u - mean) * (var + 1e-6).rsqrt()).flatten(1, 2)
            return F.silu(u * w[:, None, None] + b[:, None, None])

        results = []
        def ours(x, w, b, groups=groups): return fused_group_norm(x, w, b, groups)

        for f, dtype in ((ours, torch.float32), (plain, torch.float64)):
            leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
            y = f(*leaves)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))])
        for name, a, e in zip(("y", "dx", "dw", "db"), *results, strict=True):
            size = e.abs().max().clamp(min=1e-3)
            # of one value a group: eps**-0.5 * (w * g - mean(w * g)), which is the rounding of the mean
            if name == "dx" and shape[1] == groups and shape[2:] == (1, 1):
                size = 1e3 * (w[:, None, None] * dy).abs().max()
            error = ((a - e).abs().max() / size).nan_to_num(torch.inf).item()
            if error >= worst.get(name, (0,))[0]:
                worst[name] = error, shape
    row("b", "operator, float32 against float64", limit=limit, **{n: e for n, (e, _) in worst.items()})
    RESULTS["worst_shapes"] = {name: [error, list(shape)] for name, (error, shape) in worst.items()}
    for name, (error, shape) in worst.items():
        if error > limit:
            raise ArithmeticError(f"{name} of {shape} differs by {error:.1e} from float64, limit {limit:.0e}")


def section_o():
    "Bits and reconstruction against the published numbers, float32 without TF32."
    from safetensors.torch import load_file

    folder = Path(__file__).parent.parent / "tests" / "golden"
    t = {k: v.to(DEVICE) for k, v in load_file(folder / "autoencoder.safetensors").items()}
    for name, change in (("plain", lambda net: net), ("ours", optimize if args.smoke else fused)):
        tok = change(BitVAE.from_pretrained(folder / "autoencoder.safetensors", mode="dense").to(DEVICE))
        with torch.no_grad():
            z, y, bits = tok.encoder(t["x"]), tok.decoder(t["zq"]), tok.encode(t["x"])
            scales = quantize_residual(t["h"], tok.quantizer.schedule(t["h"]))
            differ, largest = 0, 0.0
            for k, (plane, (v, *_)) in enumerate(zip(bits, scales, strict=True)):
                wrong = (plane != t[f"bits{k:02d}"].bool()).permute(0, 3, 1, 2)
                differ += int(wrong.sum())
                largest = max(largest, v[wrong].abs().max().item() if wrong.any() else 0.0)
        relative = [((a - e).abs().max() / e.abs().max()).item() for a, e in ((z, t["h"]), (y, t["recon"]))]
        row("o", f"golden, {name}", bits_differ=differ, largest_value=largest, latent=relative[0],
            reconstruction=relative[1])  # fmt: skip


@torch.no_grad()
def section_p():
    "Bits and PSNR of the bundled tokenizer by precision, against float32 on the CPU."
    from bitvae.images import bundled_photographs, load_image

    cpu = BitVAE.from_pretrained("demo").float().eval()
    x = torch.cat([load_image(file, 32 if args.smoke else 256) for file in bundled_photographs()])
    reference, tok = cpu.encode(x), (optimize if args.smoke else fused)(copy.deepcopy(cpu).to(DEVICE))
    images, bits = x.to(DEVICE), reference.to(DEVICE)

    def decibels(y): return -10 * torch.log10((y.double() - images).square().mean() / 4).item()

    exact = decibels(cpu.decode(reference).to(DEVICE))
    for name in ("float32", "tf32", "bf16"):
        tok.precision = name
        encoded, decoded = tok.encode(images), tok.decode(bits)
        both = tok.decode(encoded)
        same = [(a == b).double().mean().item() for a, b in zip(encoded, bits, strict=True)]
        share = sum(s * m.numel() for s, m in zip(same, bits, strict=True)) / sum(m.numel() for m in bits)
        row("p", f"bundled tokenizer, {name}", same_bits=share, first_scale=same[0], last_scale=same[-1],
            decoder_db=exact - decibels(decoded), both_db=exact - decibels(both))  # fmt: skip
        RESULTS.setdefault("same_bits", {})[name] = same


@torch.no_grad()
def section_k():
    "The parts: norm, upsampling and convolution bias, as share of the copy bandwidth."
    for shape in MAPS:
        time_norm(shape)
    for batch, channels, side in [(1, 32, 4)] if args.smoke else [(32, 256, 128), (32, 512, 32)]:
        time_convolutions(batch, channels, side)


def time_norm(shape):
    from bitvae.triton_norm import fused_group_norm, group_norm_backward_op, group_norm_op

    x = torch.randn(shape, device=DEVICE).bfloat16().to(memory_format=torch.channels_last)
    dy, (w, b) = torch.randn_like(x), torch.randn(2, shape[1], device=DEVICE)
    groups = 24 if shape[1] % 32 else 32
    wb, bb = w.bfloat16(), b.bfloat16()
    _, mean, rstd = group_norm_op(x, w, b, groups, 1e-6, True)
    arms = {
        "plain": lambda: F.silu(F.group_norm(x, groups, wb, bb)),
        "ours": lambda: fused_group_norm(x, w, b, groups),
        "ours backward": lambda: group_norm_backward_op(dy, x, w, b, mean, rstd, groups, True),
        "copy": lambda: x.clone(),
    }
    for name, ms in compare("k", f"norm+SiLU {shape}", arms, rounds=9 if ROUNDS > 1 else 1).items():
        passes = {"plain": 3, "ours": 3, "ours backward": 5, "copy": 2}[name]
        row("k", f"    {name}: GB/s if {passes} passes", gb_s=passes * x.nbytes / ms / 1e6)


def time_convolutions(batch, channels, side):
    from bitvae.autoencoder import Upsample

    x = torch.randn(batch, channels, side, side, device=DEVICE).bfloat16()
    x = x.to(memory_format=torch.channels_last)
    plain = channels_last(Upsample(channels).to(DEVICE).bfloat16())
    folded = copy.deepcopy(plain)
    folded.__class__ = FoldedUpsample
    conv = channels_last(nn.Conv2d(channels, channels, 3, padding=1).to(DEVICE).bfloat16())
    flop = 2 * 9 * channels**2 * batch * side**2
    arms = {"plain": lambda: plain(x), "folded": lambda: folded(x)}
    compare("k", f"upsample {tuple(x.shape)}", arms, flop=4 * flop)
    arms = {"bias": lambda: conv(x), "no bias": lambda: F.conv2d(x, conv.weight, padding=1)}
    compare("k", f"conv3x3 {tuple(x.shape)}", arms, flop=flop)


def speed_arms(kind):
    "Return functions (batch, size) -> call, by arm; the plain contiguous one first."
    tok = new_tokenizer()
    source = images if kind == "encode" else latents

    def arm(change, cast):
        net = change(copy.deepcopy(tok.encoder if kind == "encode" else tok.decoder))
        if cast:
            net = net.bfloat16()

        def prepare(batch, size=SIZE):
            x = source(batch, size, torch.bfloat16 if cast else torch.float32)

            @torch.no_grad()
            def run():
                with torch.autocast(DEVICE.type, torch.bfloat16, enabled=not cast):
                    return net(x)

            return run

        return prepare

    def compiled(change): return lambda net: torch.compile(change(net), dynamic=False)

    arms = {
        "plain": lambda: arm(lambda net: net, True),
        "plain autocast": lambda: arm(lambda net: net, False),
        "channels-last": lambda: arm(channels_last, True),
        "ours": lambda: arm(fused, True),
        "ours autocast": lambda: arm(fused, False),
        "plain compiled": lambda: arm(compiled(channels_last), True),
        "folded compiled": lambda: arm(compiled(folded), True),
        "ours compiled": lambda: arm(compiled(fused), True),
    }
    return arms


def run_speed(section, kinds, names, batches, large):
    "Time encoder or decoder; `large`: seconds that must be left for a large image, None for none."
    flop = flop_per_image()
    for kind in kinds:
        made = {name: make() for name, make in speed_arms(kind).items() if name in names}
        for batch in batches:
            if left() < 15:
                return say("no time left for", kind, batch)
            chosen = {n: f(batch) for n, f in made.items() if batch == batches[0] or "autocast" not in n}
            times = compare(section, f"{kind} {SIZE} px x {batch}", chosen, batch, batch * flop[kind])
            RESULTS.setdefault("network_ms", {}).setdefault(f"{kind} {batch}", {}).update(times)
        if large and kind == "decode" and left() > large:
            chosen = {n: f(1, LARGE) for n, f in made.items() if "autocast" not in n}
            compare(section, f"decode {LARGE} px x 1", chosen, 1, flop[kind] * (LARGE / SIZE) ** 2)


def section_c():
    "Speed of the released size, eager."
    names = ("plain", "plain autocast", "channels-last", "ours", "ours autocast")
    run_speed("c", ("decode", "encode"), names, BATCHES, large=15)


def section_g():
    "Speed of the released size, compiled; eager arms again for the ratio."
    compiled = ("plain compiled", "folded compiled", "ours compiled")
    names = ("plain", "ours") if args.smoke else ("plain", "ours", *compiled)
    run_speed("g", ("decode",), names, BATCHES[-1:], large=60)
    if left() > 40:
        run_speed("g", ("encode",), names, BATCHES[-1:], large=None)


class RandomLPIPS(nn.Module):
    "The cost of LPIPS: a VGG-16 trunk with random weights, unit features at five depths."

    def __init__(self):
        super().__init__()
        width, self.slices = 3, nn.ModuleList()
        for i, (channels, depth) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
            layers = [nn.MaxPool2d(2, ceil_mode=True)] if i else []
            for _ in range(depth):
                layers += [nn.Conv2d(width, channels // (16 if args.smoke else 1), 3, padding=1), nn.ReLU()]
                width = layers[-2].out_channels
            self.slices.append(nn.Sequential(*layers))

    def forward(self, x, y):
        total = 0
        for part in self.slices:
            x, y = part(x), part(y)
            total = total + (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean((1, 2))
        return total


def training_arm(change, compile_model=False):
    "Return a call that trains one step: L1, LPIPS, quantizer, discriminator, bf16 autocast, fused AdamW."
    tok = change(new_tokenizer()).train()
    tok.quantizer.drop_rate = 0.0
    disc = channels_last(PatchDiscriminator(16 if args.smoke else 128).to(DEVICE))
    lpips = channels_last(RandomLPIPS().to(DEVICE)).requires_grad_(False)
    if compile_model:
        tok.encoder.compile()
        tok.decoder.compile()
    x = images(TRAIN_BATCH, 32 if args.smoke else SIZE)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-5, fused=True) for m in (tok, disc)]

    def update(module, optimizer, loss):
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step():
        disc.requires_grad_(False)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            y, z, q = tok(x)
            logits = disc(y).float()
            distance = lpips(x, y)
        loss, _ = generator_loss(x, y.float(), z.float(), q, logits, lambda *_: distance.float())
        update(tok, optimizers[0], loss)
        disc.requires_grad_(True)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            real, fake = disc(x), disc(y.detach())
        update(disc, optimizers[1], discriminator_loss(real.float(), fake.float())[0])

    step.tok = tok
    return step


def training_flop(step) -> float:
    "Count the operations of one training step of the plain model."
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def time_training(section, name, step):
    "Time one arm alone: several do not fit in memory."
    flop = RESULTS.get("training_flop") or 3 * TRAIN_BATCH * sum(flop_per_image().values())
    base = RESULTS.get("training_ms")
    times = compare(section, "training step", {name: step}, TRAIN_BATCH, flop, base=base)
    if name == "plain":
        RESULTS["training_ms"] = times.get(name)


def section_d():
    "Training step, eager."
    for name, change in (("plain", lambda t: t), ("channels-last", channels_last), ("ours", fused)):
        if left() > 15:
            step = training_arm(change)
            if name == "plain":
                try:
                    RESULTS["training_flop"] = training_flop(step)
                    per_image = RESULTS["training_flop"] / 1e12 / TRAIN_BATCH
                    row("d", "training step, TFLOP per image", plain=per_image)
                except Exception as e:  # noqa: BLE001 the estimate is used
                    record_error("d training_flop", e)
            time_training("d", name, step)
            del step
            free()


def section_h():
    "Training step, compiled."
    arms = {"plain compiled": channels_last, "folded compiled": folded, "ours compiled": fused}
    for name, change in arms.items():
        if left() < 40 and not args.smoke:
            say("no time left for", name)
        else:
            time_training("h", name, training_arm(change, not args.smoke))
            free()


def section_n():
    "Deterministic training: the operations that are not, whether two runs agree, and the time."
    from bitvae.training import use_deterministic

    for deterministic in (False, True):
        use_deterministic(deterministic)
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        digests, times = [], []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                torch.manual_seed(0)
                step = training_arm(fused)
                times += [once(step) for _ in range(4)][1:]
                weights = b"".join(p.detach().cpu().numpy().tobytes() for p in step.tok.parameters())
                digests.append(hashlib.sha256(weights).hexdigest()[:12])
                del step
                free()
        names = sorted({str(w.message).split(" does not")[0] for w in caught if "determin" in str(w.message)})
        facts = {"equal": digests[0] == digests[1], "digest": digests[0]}
        unstable = "; ".join(names) or "none"
        row("n", f"deterministic={deterministic}", ms=statistics.median(times), **facts, unstable=unstable)
    use_deterministic(False)


@contextmanager
def random_networks():
    "Yield LPIPS and FID's Inception with random weights: their cost, without files."
    import lpips
    from pytorch_fid import inception

    class Pooled(nn.Module):
        dim, takes_bytes = 2048, False

        def __init__(self):
            super().__init__()
            with mock.patch.object(inception, "load_state_dict_from_url"), mock.patch.object(
                nn.Module, "load_state_dict"
            ):
                self.net = inception.InceptionV3()

        def forward(self, y): return self.net((y + 1) / 2)[0].flatten(1)

    nets = {f"lpips_{n}": lpips.LPIPS(net=n, pretrained=False, pnet_rand=True, verbose=False)
            for n in ("alex", "vgg")}  # fmt: skip
    nets["pytorch-fid"] = Pooled()
    yield {name: net.to(DEVICE).eval().requires_grad_(False) for name, net in nets.items()}


def section_v():
    "Evaluation: 2,000 JPEG files of 500x375 pixels, all metrics of the published protocol."
    import tempfile
    from concurrent.futures import ThreadPoolExecutor

    from PIL import Image

    from bitvae.evaluation import evaluate
    from bitvae.images import bundled_photographs

    warnings.simplefilter("ignore")
    photographs = [Image.open(f).convert("RGB") for f in bundled_photographs()]
    few, some, many = (6, 12, 12) if args.smoke else (320, 960, 2000)
    protocol = replace(PROTOCOLS["published"], size=32) if args.smoke else PROTOCOLS["published"]
    metrics = ("psnr", "ssim", "lpips") + (() if args.smoke else ("ms_ssim", "fid"))
    with tempfile.TemporaryDirectory() as place, random_networks() as nets:
        def write(i):
            image = photographs[i % len(photographs)]
            left, top = (i * 37 % max(1, n - m) for n, m in zip(image.size, (500, 375), strict=True))
            image.crop((left, top, left + 500, top + 375)).save(f"{place}/{i:05}.jpg", quality=90)

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(write, range(many)))
        files = sorted(Path(place).iterdir())
        pixels = tuple(m for m in metrics if m != "fid")
        arms = [("bf16", metrics, many), ("bf16", ("psnr",), many), ("float32", pixels, some)]
        arms += [("bf16", ("psnr", m), some) for m in metrics[1:]]  # where the time goes
        for precision, chosen, total in arms:
            if left() < 30:
                return say("no time left for", precision, *chosen)
            tok = optimize(new_tokenizer()) if args.smoke else fused(new_tokenizer())
            tok.precision = precision
            options = {"batch": min(64, few), "workers": 0 if args.smoke else 14, "networks": nets}
            times = []
            for n, m in ((few, pixels), (few, chosen), (total, chosen)):
                start = time.monotonic()
                evaluate(tok, files[:n], protocol, m, prefixes=False, **options)
                times.append(time.monotonic() - start)
            done = n - few
            rate = done / (times[-1] - times[-2])
            row("v", f"evaluate, {precision}, {' '.join(chosen)}", images_s=rate, seconds=times[-1], images=n,
                minutes_for_50000=(times[-2] + (50_000 - few) / rate) / 60)  # fmt: skip


def free():
    "Release cached memory and compiled code: Dynamo compiles a function at most 8 times, then runs it eager."
    torch.compiler.reset()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


KINDS = {
    "norm": ("chunk_moments", "combine_moments", "normalize", "chunk_gradients", "combine_gradients",
             "input_gradient", "group_norm", "GroupNorm", "RowwiseMoments", "batch_norm", "bn_"),
    "copies": ("copy", "nchwTo", "nhwcTo", "Nhwc", "ranspose", "emcpy", "emset", "Cat", "fill"),
    "convolution": ("conv", "gemm", "xmma", "cutlass", "sm90", "sm80", "wgrad", "dgrad", "nvjet", "implicit",
                    "fprop", "cudnn"),
    "optimizer": ("multi_tensor", "adam", "Adam", "foreach"),
    "pooling": ("pool",),
    "reduction": ("reduce", "Reduce"),
    "elementwise": ("elementwise", "silu", "add", "mul", "leaky_relu", "upsample", "pad", "index"),
}  # fmt: skip


def profile(name, run, calls=2):
    "Record the share of each kind of kernel and of idle gaps."
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    run()
    synchronize()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE.type == "cuda")
    with profiler(activities=activities) as prof:
        for _ in range(calls):
            run()
        synchronize()
    device = getattr(torch.autograd.DeviceType, DEVICE.type.upper())
    events = [e for e in prof.events() if e.device_type == device]
    events = [e for e in events if not getattr(e, "is_user_annotation", False)]
    if not events:
        raise RuntimeError("the profiler recorded no kernel")
    kinds, kernels = {}, {}
    for e in events:
        us = e.time_range.elapsed_us() if DEVICE.type == "cuda" else e.self_cpu_time_total
        kind = next((k for k, words in KINDS.items() if any(w in e.name for w in words)), "other")
        kinds[kind] = kinds.get(kind, 0) + us
        count, total = kernels.get(e.name, (0, 0))
        kernels[e.name] = count + 1, total + us
    wall = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
    busy = sum(kinds.values())
    shares = {k: v / wall for k, v in sorted(kinds.items(), key=lambda item: -item[1])}
    row("e", f"profile, {name}", ms=wall / calls / 1e3, launches=len(events) // calls, **shares,
        idle=1 - busy / wall)  # fmt: skip
    top = sorted(kernels.items(), key=lambda item: -item[1][1])[:25]
    RESULTS["profile"][name] = [{"kernel": k[:160], "calls": n // calls, "ms": us / calls / 1e3}
                                for k, (n, us) in top]  # fmt: skip
    for kernel in RESULTS["profile"][name][:10]:
        print(f"    {kernel['ms']:8.3f} ms {kernel['calls']:5} x {kernel['kernel'][:110]}", flush=True)


def section_e():
    "Profiles of the optimized eager model."
    profile("decode", speed_arms("decode")["ours"]()(BATCHES[0]))
    profile("encode", speed_arms("encode")["ours"]()(BATCHES[0]))
    if left() > 20:
        profile("training step", training_arm(fused), calls=1)
    free()


@torch.no_grad()
def section_f():
    "The quantizer, encode and back, and its share of the tokenizer's time."
    quantizer = MultiScaleBSQ(MODEL.dim, "dynamic").to(DEVICE).eval()
    network = RESULTS.get("network_ms", {})
    per_image = sum(network.get(f"{kind} {BATCHES[0]}", {}).get("ours", 0.0) for kind in ("encode", "decode"))
    per_latent = per_image / BATCHES[0] / (SIZE // MODEL.stride) ** 2
    for batch, side in LATENTS:
        z = torch.randn(batch, MODEL.dim, side, side, device=DEVICE) / MODEL.dim**0.5
        bits = quantizer.encode(z)
        arms = {"encode": lambda z=z: quantizer.encode(z), "decode": lambda b=bits: latent_from_bits(b)}
        times = compare("f", f"quantizer {side}x{side} x {batch}", arms)
        total, nets = sum(times.values()), per_latent * batch * side**2
        if nets:
            row("f", f"    share of the tokenizer, {side}x{side}", share=total / (total + nets))


SECTIONS = {"a": section_a, "o": section_o, "b": section_b, "p": section_p, "k": section_k, "c": section_c,
            "f": section_f, "d": section_d, "e": section_e, "g": section_g, "h": section_h,
            "n": section_n, "v": section_v}  # fmt: skip


def summary() -> str:
    "Return all rows as a plain text table."
    lines = []
    for r in RESULTS["rows"]:
        values = "  ".join(f"{k} {number(v)}" for k, v in r.items() if k not in ("section", "what"))
        lines.append(f"{r['section']}  {r['what']:<46} {values}")
    lines += [f"FAILED {where}: {e.splitlines()[0][:150]}" for where, e in RESULTS["errors"].items()]
    return "\n".join([*lines, "seconds: " + "  ".join(f"{k} {v:.0f}" for k, v in RESULTS["seconds"].items())])


def save():
    (OUT / "gpu.json").write_text(json.dumps(RESULTS, indent=1))
    (OUT / "gpu.txt").write_text(summary() + "\n")


def main() -> int:
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: run on a machine with a GPU, or with --smoke", file=sys.stderr)
        return 1
    OUT.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    for letter in args.sections.split(",") if args.sections else SECTIONS:
        if left() < 10:
            say("no time left for section", letter)
            continue
        start = time.monotonic()
        say(f"section {letter}: {SECTIONS[letter].__doc__}")
        try:
            SECTIONS[letter]()
        except Exception as e:  # noqa: BLE001 the next section runs
            record_error(f"section {letter}", e)
        free()
        RESULTS["seconds"][letter] = time.monotonic() - start
        save()
    print("\n" + summary(), flush=True)
    return 1 if RESULTS["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
