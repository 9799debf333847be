"The model is ordinary PyTorch: hooks, replaced layers, transforms, compile and export, plain and optimized."

import copy

import pytest
import torch
from torch import nn

from bitvae import BitVAE, BitVAEConfig
from bitvae.autoencoder import ResnetBlock
from bitvae.kernels import checkpoint_activations, optimize, unoptimize

CONFIG = BitVAEConfig(8, 32, (1, 2, 1), (1, 1, 2), res_blocks=1, stride=4)


@pytest.fixture(params=["plain", "optimized"])
def tok(request):
    torch.manual_seed(0)
    tok = BitVAE(CONFIG).eval()
    return optimize(tok) if request.param == "optimized" else tok


def halves(tok):
    "The two networks with inputs of theirs."
    torch.manual_seed(1)
    return [(tok.encoder, torch.randn(2, 3, 24, 16)), (tok.decoder, torch.randn(2, 8, 6, 4))]


def close(a, b, rtol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=rtol * float(b.abs().max()))


def fired(net, x, layers, grad):
    "The layers whose forward hooks are called."
    seen = set()
    hooks = [m.register_forward_hook(lambda m, *_: seen.add(m)) for m in layers]
    with torch.set_grad_enabled(grad):
        net(x)
    for hook in hooks:
        hook.remove()
    return seen


def test_hooks_of_every_layer_fire(tok):
    for net, x in halves(tok):
        leaves = [m for m in net.modules() if not list(m.children()) and not isinstance(m, nn.Identity)]
        for grad in (True, False):
            assert fired(net, x, leaves, grad) == set(leaves)


class LoRA(nn.Module):
    "A convolution plus a low-rank update."

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        self.down = nn.Conv2d(conv.in_channels, 2, 1)
        self.up = nn.Conv2d(2, conv.out_channels, 1)

    def forward(self, x): return self.conv(x) + self.up(self.down(x))


def test_a_replaced_layer_is_used(tok):
    for net, x in halves(tok):
        before = net(x)
        block = net.mid.block_1
        original = copy.deepcopy(block)
        block.conv1 = LoRA(block.conv1)
        y = net(x)
        assert not torch.allclose(y, before)
        y.sum().backward()
        assert block.conv1.up.weight.grad.abs().sum() > 0
        net.mid.block_1 = original
        assert torch.equal(net(x), before)
        net.mid.block_1.conv2 = nn.Conv2d(*original.conv2.weight.shape[1::-1], 3, padding=2, dilation=2)
        assert not torch.allclose(net(x), before)
        net.mid.block_1.norm1 = nn.Identity()
        assert net(x).shape == before.shape


def test_a_block_computes_what_it_shows(tok):
    for block in (m for m in tok.modules() if isinstance(m, ResnetBlock)):
        x = torch.randn(2, block.norm1.num_channels, 8, 8)
        h = block.conv2(block.act(block.norm2(block.conv1(block.act(block.norm1(x))))))
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                close(block(x.clone()), block.nin_shortcut(x) + h)


def test_transforms_and_double_backward(tok):
    for net, x in halves(tok):
        weights, buffers = dict(net.named_parameters()), dict(net.named_buffers())

        def loss(weights, net=net, x=x, buffers=buffers):
            return torch.func.functional_call(net, (weights, buffers), (x,)).square().mean()

        gradients = torch.func.grad(loss)(weights)
        net.zero_grad()
        net(x).square().mean().backward()
        for name, p in net.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-6)
        v = torch.randn_like(x)
        y, tangent = torch.func.jvp(net, (x,), (v,))
        eps = 1e-3
        close(tangent, (net(x + eps * v) - net(x - eps * v)) / (2 * eps), rtol=2e-2)
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(net(leaf).square().mean(), leaf, create_graph=True)
        (second,) = torch.autograd.grad((first * v).sum(), leaf)
        plus, minus = ((x + s * eps * v).requires_grad_() for s in (1, -1))
        slopes = [torch.autograd.grad(net(z).square().mean(), z)[0] for z in (plus, minus)]
        close(second, (slopes[0] - slopes[1]) / (2 * eps), rtol=5e-2)


@pytest.mark.slow
def test_compile_without_graph_breaks(tok):
    block = tok.decoder.mid.block_1, torch.randn(2, 64, 3, 2)  # generated code takes long
    runs = [(*half, "aot_eager", grad) for half in halves(tok) for grad in (True, False)]
    for net, x, backend, grad in [*runs, (*block, "inductor", True)]:
        with torch.set_grad_enabled(grad):
            close(torch.compile(net, fullgraph=True, backend=backend)(x), net(x), rtol=1e-4)


@pytest.mark.slow
def test_export_with_dynamic_sizes(tok):
    for net, x in halves(tok):
        stride = 4 if net is tok.encoder else 1
        sizes = {0: torch.export.Dim("B", max=64)}
        for dim, name in ((2, "h"), (3, "w")):
            side = torch.export.Dim(name, min=2, max=64)
            sizes[dim] = stride * side if stride > 1 else side
        program = torch.export.export(net, (x,), dynamic_shapes=(sizes,))
        for shape in ((1, 8, 12), (3, 16, 20)):
            other = torch.randn(shape[0], x.shape[1], *(n * stride for n in shape[1:]))
            close(program.module()(other), net(other), rtol=1e-4)


def test_optimize_keeps_parameters_and_can_be_undone():
    plain = BitVAE(CONFIG).eval()
    parameters, state = list(plain.parameters()), {k: v.clone() for k, v in plain.state_dict().items()}
    classes = [type(m) for m in plain.modules()]
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    bits, y = plain.encode(x), plain.decode(plain.encode(x))
    fast = optimize(plain)
    assert fast is plain and fast.optimizations
    assert all(a is b for a, b in zip(fast.parameters(), parameters, strict=True))
    assert fast.encode(x) == bits
    close(fast.decode(bits), y, rtol=1e-4)
    assert list(fast.state_dict()) == list(state)
    assert all(torch.equal(fast.state_dict()[name], w) for name, w in state.items())
    assert [type(m) for m in unoptimize(fast).modules()] == classes


def test_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    tok = BitVAE(CONFIG)
    for prepare in (checkpoint_activations, lambda t: checkpoint_activations(optimize(t))):
        other = copy.deepcopy(tok)
        prepare(other)
        for (net, x), (same, _) in zip(halves(tok), halves(other), strict=True):
            net.zero_grad()
            net(x).square().mean().backward()
            same(x).square().mean().backward()
            for p, q in zip(net.parameters(), same.parameters(), strict=True):
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-6)


def test_halves_of_different_multipliers():
    for encoder, decoder in (((1, 2, 2, 2, 3), (1, 1, 2, 2, 3)), ((1, 1, 1), (2, 1, 1))):
        stride = 2 ** (len(encoder) - 1)
        config = BitVAEConfig(8, 32, encoder, decoder, res_blocks=1, stride=stride)
        tok = BitVAE(config).eval()
        x = torch.rand(1, 3, 2 * stride, stride) * 2 - 1
        assert tok.decode(tok.encode(x)).shape == x.shape


def test_an_edited_block_stays_in_effect(monkeypatch):
    "As when a reader edits `ResnetBlock.forward` in the notebook."
    from bitvae.tiling import tiled_forward

    def edited(self, x): return self.nin_shortcut(x) + 0.1 * self.conv2(self.conv1(x))

    monkeypatch.setattr(ResnetBlock, "forward", edited)
    plain = BitVAE(CONFIG).eval()
    fast = optimize(copy.deepcopy(plain))
    for (net, x), (same, _) in zip(halves(plain), halves(fast), strict=True):
        with torch.no_grad():
            close(same(x), net(x), rtol=1e-4)
        with pytest.raises(TypeError, match="whose forward was changed"):
            tiled_forward(same, x, 5)
