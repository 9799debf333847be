"""Agreement with the published system, on numbers it computed (tests/golden/README.md)."""

import pytest
import torch
from torch.nn import functional as F

from bitvae import Bits, BitVAE, BitVAEConfig
from bitvae.checkpoints import config_from_weights, internal_name, published_names, tokenizer_weights
from bitvae.kernels import optimize
from bitvae.losses import PatchDiscriminator, discriminator_loss, generator_loss
from bitvae.metrics import psnr, ssim
from bitvae.protocols import PROTOCOLS
from bitvae.quantizer import (
    MultiScaleBSQ,
    bit_entropies,
    bits_to_codes,
    latent_from_bits,
    quantize_residual,
    scale_loss,
    straight_through,
)
from bitvae.schedules import LISTED, generation_schedule, generation_size, scale_schedule
from bitvae.teacher_forcing import bits_from_tokens, next_input, teacher_forcing
from bitvae.tiling import tiled_forward

CASES = ("d16_dense", "d32_dynamic", "d24_original", "d64_dynamic_rect", "d32_same2", "d16_detach")


def close(a, b, rtol=1e-5):
    "Equal up to rtol of the largest value of b."
    torch.testing.assert_close(a, b, rtol=0, atol=rtol * float(b.abs().max()))


def same_bits(bits, reference, name):
    return all(torch.equal(plane, reference[f"{name}bits{k:02d}"].bool()) for k, plane in enumerate(bits))


# schedules


@pytest.mark.parametrize(
    "mode", ["dynamic", "dense", "original", "dense_f8", "half", "same1", "same2", "same3"]
)
def test_schedules(golden, mode):
    listed = golden("schedules.json")[mode]
    assert listed
    for size, scales in listed.items():
        h, w = map(int, size.split("x"))
        assert scale_schedule(h, w, mode) == tuple(map(tuple, scales)), (mode, size)


def test_resolutions(golden):
    for rows in golden("resolutions.json").values():
        for (H, W), scales in rows:
            assert scale_schedule(H // 16, W // 16) == tuple(map(tuple, scales))


def test_generation_schedules(golden):
    for ratio, ((small, scales), (medium, _), (large, scales_1m), _) in golden("resolutions.json").items():
        ratio = float(ratio)
        assert generation_schedule(ratio, "0.06M") == tuple(map(tuple, scales))
        assert generation_schedule(ratio, "0.60M") == tuple(map(tuple, scales_1m[:12]))
        assert generation_schedule(ratio, patch=2) == tuple((2 * h, 2 * w) for h, w in scales_1m)
        budgets = ("0.06M", "0.25M", "1M")
        assert [[*generation_size(ratio, b)] for b in budgets] == [small, medium, large]


def test_schedules_of_other_sizes():
    for mode in set(LISTED) - {"half"}:
        listed = {n: len(scale_schedule(n, n, mode)) for n in (16, 32, 64)}
        for n in range(16, 65):
            schedule = scale_schedule(n, n, mode)
            assert schedule[0] == (1, 1) and schedule[-1] == (n, n)
            assert listed[16] <= len(schedule) <= listed[64]
    for h, w in ((7, 300), (300, 7), (256, 256), (1, 1), (1, 2)):
        schedule = scale_schedule(h, w)
        assert schedule[0] == (1, 1) and schedule[-1] == (h, w)
        assert all(a <= c and b <= d for (a, b), (c, d) in zip(schedule, schedule[1:], strict=False))


# quantizer


@pytest.mark.parametrize("case", CASES)
def test_quantizer(golden, case):
    t, options = golden("quantizer.safetensors"), golden("quantizer.json")[case]
    quantizer = MultiScaleBSQ(
        options["dim"], options["mode"], drop_rate=0, detach_residual=options["detach_residual"]
    )
    z = t[f"{case}.z"].clone().requires_grad_()
    out = quantizer(z)
    assert len(out.bits) == options["scales"] and same_bits(out.bits, t, f"{case}.")
    close(out.z, t[f"{case}.zq"])
    close(latent_from_bits(out.bits), t[f"{case}.zq"])
    torch.testing.assert_close(out.losses, t[f"{case}.loss"], rtol=1e-5, atol=1e-8)
    ((out.z * t[f"{case}.g"]).sum() + 10 * out.losses.mean()).backward()
    close(z.grad, t[f"{case}.dz"], rtol=1e-3)

@pytest.mark.parametrize("case", ["square", "square_flips", "wide", "patchify"])
def test_teacher_forcing(golden, case):
    t, options = golden("teacher_forcing.safetensors"), golden("teacher_forcing.json")[case]
    z, schedule, patch = t[f"{case}.z"], options["schedule"], 1 + options["patchify"]
    flips = [t[f"{case}.flips{k:02d}"].bool() for k in range(options["flipped_scales"])]
    vs, planes, _ = zip(*quantize_residual(z, [tuple(size) for size in schedule]), strict=True)
    bits = Bits(planes, schedule)

    def edit(k, plane):
        return plane ^ flips[k] if k < len(flips) else plane

    targets, inputs = teacher_forcing(bits, edit if flips else None, z, patch)
    for k, target in enumerate(targets):
        assert torch.equal(target, t[f"{case}.targets{k:02d}"].bool()), k
    torch.testing.assert_close(torch.cat(inputs, 1), t[f"{case}.inputs"], rtol=0, atol=1e-5)
    edited = Bits([p for _, p, _ in quantize_residual(z, bits.schedule, edit=edit)], schedule)
    for k in range(1, len(schedule)):
        torch.testing.assert_close(next_input(edited[:k], patch), inputs[k - 1], rtol=0, atol=1e-5)
    assert bits_from_tokens(teacher_forcing(edited, patch=patch).targets, schedule, patch) == edited


def test_one_scale(golden):
    t = golden("quantizer.safetensors")
    v = F.normalize(t["bsq.x"], dim=1)
    close(straight_through(v), t["bsq.zq"])
    sample_entropy, batch_entropy = bit_entropies(v)
    parts = {
        "aux_loss": scale_loss(v),
        "commitment": F.mse_loss(v, bits_to_codes(v > 0)),
        "per_sample_entropy": sample_entropy,
        "batch_entropy": batch_entropy,
    }
    for name, part in parts.items():
        torch.testing.assert_close(part, t[f"bsq.{name}"].squeeze(), rtol=1e-5, atol=1e-8)


def test_dropped_scales(golden):
    t = golden("quantizer.safetensors")
    keep = t["drop.keep"].bool().tolist()
    out = MultiScaleBSQ(16, "dense", drop_rate=0.5)(t["drop.z"], keep)
    close(out.z, t["drop.zq"])
    assert len(out.bits) == len(out.losses) == sum(keep)
    torch.testing.assert_close(out.losses, t["drop.loss"], rtol=1e-5, atol=1e-8)


# networks


def load(variant):
    "The published small model, plain or optimized."
    tok = BitVAE.from_pretrained("tests/golden/autoencoder.safetensors", mode="dense")
    return optimize(tok) if variant == "optimized" else tok


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.mark.parametrize("variant", ["plain", "optimized"])
@torch.no_grad()
def test_autoencoder(golden, variant):
    tok = load(variant)
    t, options = golden("autoencoder.safetensors"), golden("autoencoder.json")["config"]
    assert tok.config == BitVAEConfig(
        options["codebook_dim"],
        options["base_ch"],
        tuple(options["encoder_ch_mult"]),
        tuple(options["decoder_ch_mult"]),
        options["num_res_blocks"],
        16,
        "dense",
    )
    z = tok.encoder(t["x"])
    close(z, t["h"])
    bits = tok.encode(t["x"])
    assert len(bits) == 16 and same_bits(bits, t, "")
    close(tok.quantizer(z).z, t["zq"])
    close(tok.decoder(tok.quantizer(z).z), t["recon"])
    close(tok.decode(bits), t["recon"].clamp(-1, 1), rtol=1e-4)
    close(tiled_forward(tok.encoder, t["x"], 8), t["h"])
    close(tiled_forward(tok.decoder, t["zq"], 8), t["recon"])


@torch.no_grad()
def test_discriminator(golden):
    t = golden("autoencoder.safetensors")
    discriminator = PatchDiscriminator(golden("autoencoder.json")["config"]["base_ch_disc"])
    discriminator.load_state_dict(
        {internal_name(n.removeprefix("image_disc.")): w for n, w in t.items() if n.startswith("image_disc.")}
    )
    close(discriminator(t["x"]), t["logits"])


@pytest.mark.parametrize("dim", [16, 24, 32, 64])
def test_names_and_shapes_of_released_checkpoints(golden, dim):
    published = golden("checkpoint_keys.json")[f"d{dim}"]
    with torch.device("meta"):
        tok = BitVAE(BitVAEConfig(dim=dim))
    names, state = published_names(tok), tok.state_dict()
    assert {names[n]: list(w.shape) for n, w in state.items()} == {
        n: s for n, s in published.items() if n != "quantizer.lfq.mask"
    }
    weights = tokenizer_weights({"vae": {n: torch.empty(s, device="meta") for n, s in published.items()}})
    assert config_from_weights(weights) == tok.config


def test_names_and_shapes_of_the_discriminator(golden):
    with torch.device("meta"):
        discriminator = PatchDiscriminator()
    names = published_names(discriminator)
    assert {names[n]: list(w.shape) for n, w in discriminator.state_dict().items()} == golden(
        "checkpoint_keys.json"
    )["image_disc"]


# training


@pytest.mark.parametrize("variant", ["plain", "optimized"])
@pytest.mark.parametrize("step", range(4))
def test_gradients_of_a_training_step(golden, step, variant):
    t, weights, record = (
        golden("training.safetensors"),
        golden("autoencoder.safetensors"),
        golden("training.json")["steps"][step],
    )
    tok = load(variant).train()
    tok.quantizer.drop_rate = 0.0
    discriminator = PatchDiscriminator(16)
    discriminator.load_state_dict(
        {
            internal_name(n.removeprefix("image_disc.")): w
            for n, w in weights.items()
            if n.startswith("image_disc.")
        }
    )
    x = (t["x_uint8"][step].float() / 127.5 - 1).repeat_interleave(4, -1).repeat_interleave(4, -2)
    on = record["discriminator_on"]

    y, z, q = tok(x)
    loss, parts = generator_loss(x, y, z, q, discriminator.requires_grad_(False)(y) if on else None)
    loss.backward()
    expected = record["losses"]
    pairs = {"pixels": "recon_loss", "quantizer": "commitment_loss", "latent": "all_commitment_loss"} | (
        {"adversarial": "g_image_loss"} if on else {}
    )
    for ours, theirs in pairs.items():
        assert parts[ours].item() == pytest.approx(expected[theirs], rel=1e-5, abs=1e-7), theirs
    check_gradients(
        tok,
        {k: v for k, v in t.items() if k.startswith(f"{step}.vae.")},
        f"{step}.vae.",
        record["grad_norms"],
        tight=not on,
    )

    loss, parts = discriminator_loss(discriminator.requires_grad_(True)(x), discriminator(y.detach()))
    for ours, theirs in {
        "hinge": "d_loss",
        "lecam": "lecam",
        "logits_real": "logits_real",
        "logits_fake": "logits_fake",
    }.items():
        assert parts[ours].item() == pytest.approx(expected[theirs], rel=1e-4, abs=1e-6), theirs
    if on:
        assert loss.item() == pytest.approx(expected["d_total"], rel=1e-5)
        loss.backward()
        check_gradients(
            discriminator,
            {k: v for k, v in t.items() if k.startswith(f"{step}.image_disc.")},
            f"{step}.image_disc.",
            record["disc_grad_norms"],
            tight=False,
        )


def check_gradients(model, whole, prefix, norms, tight):
    "A few gradients whole, and the norms of all that are more than noise."
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert whole
    for name, reference in whole.items():
        ours = gradients[internal_name(name.removeprefix(prefix))]
        if tight:
            close(ours, reference, rtol=1e-3)
        assert F.cosine_similarity(ours.flatten(), reference.flatten(), dim=0) > 0.999
    largest = max(norms.values())
    for name, norm in norms.items():
        if norm > 1e-3 * largest:
            assert gradients[internal_name(name)].norm().item() == pytest.approx(
                norm, rel=1e-3 if tight else 1e-2
            ), name


# metrics


@pytest.mark.parametrize("how", ["truncate", "round"])
def test_metrics(golden, how):
    t = golden("metrics.safetensors")
    rows = golden("metrics.json")
    for metric, function in {"psnr": psnr, "ssim": ssim}.items():
        ours = function(t["x"], t["y"], PROTOCOLS["open-magvit2" if how == "truncate" else "clamped"])
        assert ours.tolist() == pytest.approx([row[f"{metric}_{how}"] for row in rows], abs=1e-5)
