"""Triton operators against the plain model in float64: on a GPU, and in Triton's interpreter on a CPU."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton is not installed")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]
BF16 = 2**-8 if GPU else 2**-7  # Triton's interpreter truncates
SHAPES = [
    (2, 32, 5, 7),
    (2, 24, 1, 1),
    (1, 48, 9, 3),
    (2, 96, 33, 17),
    (3, 160, 3, 5),
    (1, 128, 40, 41),
    (1, 1024, 3, 3),
]
LARGE = [(3, 128, 255, 253), (2, 512, 64, 64), (1, 48, 1024, 1000), (1, 128, 1024, 1024), (5, 768, 17, 1)]
LARGE = [(b, c, h // 2, w // 2) for b, c, h, w in LARGE[:4]] + LARGE[4:] if INTERPRETED else LARGE


def kernels(test):
    "Mark a test that runs on a GPU and in Triton's interpreter."
    reason = "needs a CUDA device, or runs in a process with TRITON_INTERPRET=1"
    return pytest.mark.gpu(pytest.mark.skipif(not (GPU or INTERPRETED), reason=reason)(test))


@pytest.mark.slow
@pytest.mark.skipif(GPU or INTERPRETED, reason="the kernels run in this process")
def test_kernels_in_the_interpreter(request):
    "Run the tests of this file in a process with Triton's interpreter."
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.fixture(autouse=True)
def exact_float32():
    "Turn TF32 off."
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def tensors(shape, dtype=torch.float32):
    "Return a feature map with shifted channels, weight, bias and the gradient of the output."
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g) / 2 + 3 * torch.randn(1, shape[1], 1, 1, generator=g)
    w, b = torch.randn(2, shape[1], generator=g)
    dy = torch.randn(shape, generator=g)
    return [t.to(DEVICE) for t in (x.to(dtype), w, b, dy.to(dtype))]


def groups_of(channels): return 24 if channels % 32 else 32


def plain(x, w, b, groups, silu=True):
    "Return GroupNorm of (B, C, H, W), also for a single value per group, and SiLU."
    u = x.unflatten(1, (groups, -1))
    var, mean = torch.var_mean(u, (2, 3, 4), correction=0, keepdim=True)
    u = ((u - mean) * (var + 1e-6).rsqrt()).flatten(1, 2) * w[:, None, None] + b[:, None, None]
    return F.silu(u) if silu else u


def gradients(f, x, w, b, dy):
    "Return the output and the gradients of input, weight and bias."
    leaves = [t.detach().clone().requires_grad_() for t in (x, w, b)]
    y = f(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check(shape, silu=True, dtype=torch.float32, rtol=1e-6):
    from bitvae.triton_norm import fused_group_norm

    x, w, b, dy = tensors(shape, dtype)
    groups = groups_of(shape[1])
    ours = gradients(lambda *t: fused_group_norm(*t, groups, 1e-6, silu), x, w, b, dy)
    double = [t.double() for t in (x, w, b, dy)]
    exact = gradients(lambda *t: plain(*t, groups, silu), *double)
    assert ours[0].dtype == ours[1].dtype == dtype
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    single = shape[1] == groups and shape[2] * shape[3] == 1  # value per group, whose deviation is 0
    for name, a, e in zip(("output", "input", "weight", "bias"), ours, exact, strict=True):
        if single and name in ("input", "weight"):
            e = torch.zeros_like(e)
        error, size = (a.double() - e).abs().max().item(), max(e.abs().max().item(), 1e-3)
        # then dx = eps**-0.5 * (w * g - mean(w * g)): a fused multiply-add leaves the rounding of the mean
        if single and name == "input":
            size = 1e3 * (w[:, None, None] * dy).abs().max().item()
        assert error <= rtol * size, (name, error / size)


@kernels
@pytest.mark.parametrize(
    ("shape", "silu"), [*((s, True) for s in SHAPES), *((s, False) for s in SHAPES[1:4])], ids=str
)
def test_operator_equals_float64(shape, silu):
    check(shape, silu)


@kernels
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, BF16), (torch.float16, 2**-11)])
def test_operator_in_half_precision(dtype, rtol):
    check((2, 48, 9, 3), True, dtype, rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_large_feature_maps(shape, dtype):
    check(shape, True, dtype, 1e-6 if dtype == torch.float32 else BF16)


@kernels
def test_results_are_reproducible_and_independent_of_the_batch():
    from bitvae.triton_norm import fused_group_norm

    x, w, b, _ = tensors((3, 96, 20, 11))
    y = fused_group_norm(x, w, b, 32)
    assert torch.equal(y, fused_group_norm(x, w, b, 32))
    assert torch.equal(y[1:2], fused_group_norm(x[1:2], w, b, 32))


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_biases_are_added_with_the_next_operation(dtype):
    from bitvae.triton_norm import add_bias_op, fused_group_norm

    x, w, b, residual = tensors((2, 48, 9, 3), dtype)
    shift, rtol = 3 * torch.randn(48, device=DEVICE), 1e-6 if dtype == torch.float32 else BF16
    exact = x.double() + shift[:, None, None]
    norm = plain(exact, w.double(), b.double(), 24)
    for y, e in (
        (fused_group_norm(x, w, b, 24, shift=shift), norm),
        (add_bias_op(x, shift, residual), exact + residual),
    ):
        assert y.dtype == dtype and (y - e).abs().max() <= rtol * e.abs().max()
    torch.library.opcheck(add_bias_op, (x, shift, residual))


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 48, 9, 3), (2, 96, 33, 17)], ids=str)
def test_gradients_of_added_biases(shape, dtype):
    from bitvae.triton_norm import add_bias_op, fused_group_norm

    x, w, b, dy = tensors(shape, dtype)
    shift, groups = torch.randn(shape[1], device=DEVICE), groups_of(shape[1])
    rtol = 2e-6 if dtype == torch.float32 else BF16

    def norm(x, w, b, shift): return fused_group_norm(x, w, b, groups, shift=shift)
    def plain_norm(x, w, b, shift): return plain(x + shift[:, None, None], w, b, groups)
    def plain_add(x, shift, residual): return x + shift[:, None, None] + residual

    inputs = (x, w, b, shift)
    for ours, exact, leaves in ((norm, plain_norm, inputs), (add_bias_op, plain_add, (x, shift, dy))):
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        double = [t.detach().double().requires_grad_() for t in leaves]
        g = torch.autograd.grad(ours(*leaves), leaves, dy)
        e = torch.autograd.grad(exact(*double), double, dy.double())
        for i, (a, b_) in enumerate(zip(g, e, strict=True)):
            assert a.dtype == leaves[i].dtype
            size = (dy.double().square().sum((0, 2, 3)).sqrt().max() * 10 if a.ndim == 1 else b_.abs().max())
            assert (a - b_).abs().max() <= rtol * size, (i, ((a - b_).abs().max() / size).item())


@kernels
def test_operator_is_registered():
    from bitvae.triton_norm import fused_group_norm, group_norm_op

    x, w, b, _ = tensors((2, 12, 3, 5))
    x.requires_grad_()
    w.requires_grad_()
    torch.library.opcheck(group_norm_op, (x, w, b, 2, 1e-6, True))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert fused_group_norm(x.bfloat16(), w, b, 2).dtype == torch.bfloat16
    g, = torch.autograd.grad(fused_group_norm(x, w, b, 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        g.sum().backward()


def networks():
    "Return a small encoder and decoder, plain and optimized."
    from bitvae.autoencoder import Decoder, Encoder
    from bitvae.kernels import SWAPS, optimize

    torch.manual_seed(0)
    config = {"dim": 16, "channels": 32, "multipliers": (2,), "res_blocks": 1, "stride": 1}
    net = nn.Sequential(Encoder(**config), Decoder(**config)).to(DEVICE)
    for norm in (m for m in net.modules() if isinstance(m, nn.GroupNorm)):
        norm.num_groups = 8  # the interpreter runs a program per group
    return net, optimize(copy.deepcopy(net), SWAPS["cuda"]), torch.randn(1, 3, 4, 3, device=DEVICE)


@kernels
@pytest.mark.parametrize("checkpointed", [False, True])
def test_optimized_network_equals_the_plain_one(checkpointed):
    from bitvae.kernels import CheckpointedFusedBlock, FusedGroupNorm, FusedResnetBlock
    from bitvae.kernels import checkpoint_activations, unoptimize

    net, fast, x = networks()
    block, blocks, norms = FusedResnetBlock, 7, 16
    if checkpointed:
        net, fast, x = net[1], fast[1], torch.randn(1, 16, 4, 3, device=DEVICE)
        checkpoint_activations(fast)
        block, blocks, norms = CheckpointedFusedBlock, 4, 9
    kinds = [type(m) for m in fast.modules()]
    assert (kinds.count(block), kinds.count(FusedGroupNorm)) == (blocks, norms)
    exact = copy.deepcopy(net).double()
    exact(x.double()).square().mean().backward()
    y = fast(x)
    y.square().mean().backward()
    torch.testing.assert_close(y.double(), exact(x.double()), rtol=0, atol=1e-5)
    with torch.no_grad():  # biases are added later
        torch.testing.assert_close(fast(x).double(), exact(x.double()), rtol=0, atol=1e-5)
    for p, e in zip(fast.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double(), e.grad, rtol=1e-4, atol=1e-6)
    assert {type(m) for m in unoptimize(fast).modules()} == {type(m) for m in net.modules()}


@kernels
def test_edits_hooks_and_replaced_layers_take_effect(monkeypatch):
    from bitvae.autoencoder import ResnetBlock
    from bitvae.kernels import FusedResnetBlock

    net, fast, x = networks()
    block, plain_block = fast[0].down[0].block[0], net[0].down[0].block[0]
    h = torch.randn(1, 32, 4, 4, device=DEVICE)
    seen = []
    handles = [m.register_forward_hook(lambda m, i, y: seen.append(y)) for m in (block.norm1, block.act)]
    block(h)
    torch.testing.assert_close(seen[0], plain_block.norm1(h))
    torch.testing.assert_close(seen[1], plain_block.act(seen[0]))
    for handle in handles:
        handle.remove()
    for name, layer in (("norm1", nn.Identity()), ("act", nn.GELU())):
        setattr(block, name, layer)
        setattr(plain_block, name, layer)
        torch.testing.assert_close(block(h), plain_block(h), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(ResnetBlock, "forward", lambda self, x: self.conv1(self.norm1(self.act(x))))
    assert not any(type(m) is FusedResnetBlock for m in networks()[1].modules())


@kernels
def test_a_replaced_shortcut_broadcasts():
    from bitvae.autoencoder import ResnetBlock
    from bitvae.kernels import FusedGroupNorm, FusedResnetBlock, optimize

    block = ResnetBlock(48, 48).to(DEVICE)
    block.nin_shortcut = nn.AdaptiveAvgPool2d(1)
    fused = optimize(copy.deepcopy(block), (FusedGroupNorm, FusedResnetBlock))
    assert type(fused) is FusedResnetBlock
    x = tensors((2, 48, 5, 7))[0].requires_grad_()
    outputs = fused(x), block(x)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(y.sin().sum(), x)[0] for y in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@kernels
def test_transforms_of_an_optimized_network():
    from torch.func import grad, jvp

    _, fast, x = networks()

    def loss(x): return fast(x).square().mean()

    torch.testing.assert_close(jvp(loss, (x,), (x,))[1], (grad(loss)(x) * x).sum(), rtol=1e-3, atol=1e-5)


@kernels
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=gpu)])
def test_compiled_network_has_no_graph_break(backend):
    net, fast, _ = networks()
    plain, fast = net[1], fast[1]  # the decoder, which has every kind of layer
    x = torch.randn(1, 16, 4, 3, device=DEVICE)
    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    y, compiled_y = plain(x), compiled(x)
    torch.testing.assert_close(compiled_y, y, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), y, rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(y.square().mean(), list(plain.parameters()))
    ours = torch.autograd.grad(compiled_y.square().mean(), list(fast.parameters()))
    for a, e in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-6)
    assert "bitvae.group_norm" in str(torch.export.export(fast, (x,)).graph)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@torch.no_grad()
def test_golden_numbers_on_a_gpu(golden, request):
    "All bits, except those of values within rounding of zero, and the reconstruction."
    from bitvae import BitVAE
    from bitvae.kernels import optimize
    from bitvae.quantizer import quantize_residual

    t = {name: value.to(DEVICE) for name, value in golden("autoencoder.safetensors").items()}
    file = request.config.rootpath / "tests/golden/autoencoder.safetensors"
    tok = optimize(BitVAE.from_pretrained(file, mode="dense").to(DEVICE))
    z = tok.encoder(t["x"])
    assert (z - t["h"]).abs().max() <= 1e-5 * t["h"].abs().max()
    scales = quantize_residual(t["h"], tok.quantizer.schedule(t["h"]))
    for k, (plane, (v, *_)) in enumerate(zip(tok.encode(t["x"]), scales, strict=True)):
        differ = (plane != t[f"bits{k:02d}"].bool()).permute(0, 3, 1, 2)
        assert not differ.any() or v[differ].abs().max() < 1e-5, (k, int(differ.sum()))
    y = tok.decoder(t["zq"])
    assert (y - t["recon"]).abs().max() <= 1e-4 * t["recon"].abs().max()
