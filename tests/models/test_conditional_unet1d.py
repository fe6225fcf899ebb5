"""ConditionalUnet1D against a plain construction of diffusion_policy's module over N repeated rows."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from minidiff_fast import backend
from minidiff_fast.errors import InvalidArgument
from minidiff_fast.level2 import Level2Batch, level2_step
from minidiff_fast.models import ConditionalUnet1D, _unet_blocks, conditional_unet1d
from minidiff_fast.ops.broadcast_modulate import BACKENDS
from minidiff_fast.shapes import merge_samples

DA, G, DL, T, B = 3, 7, 5, 8, 2
# The definition of broadcast_modulate, as the interpreter of its kernels is slow; they have tests of their own.
BASE = dict(
    impl="reference", input_dim=DA, global_cond_dim=G, diffusion_step_embed_dim=12, down_dims=[8, 24, 16], n_groups=4
)


class FlatBlock(nn.Module):
    """conv, group norm, Mish."""

    def __init__(self, inputs, outputs, kernel, groups):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2), nn.GroupNorm(groups, outputs), nn.Mish()
        )

    def forward(self, x):
        return self.block(x)


class FlatResidual(nn.Module):
    def __init__(self, inputs, outputs, cond, kernel, groups, scale):
        super().__init__()
        self.blocks = nn.ModuleList(
            [FlatBlock(inputs, outputs, kernel, groups), FlatBlock(outputs, outputs, kernel, groups)]
        )
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(cond, outputs * (1 + scale)))
        self.residual_conv = nn.Identity() if inputs == outputs else nn.Conv1d(inputs, outputs, 1)
        self.scale, self.outputs = scale, outputs

    def forward(self, x, cond):
        hidden = self.blocks[0](x)
        film = self.cond_encoder(cond)[:, :, None]
        hidden = film[:, : self.outputs] * hidden + film[:, self.outputs :] if self.scale else hidden + film
        return self.blocks[1](hidden) + self.residual_conv(x)


class Resample(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x)


class Flat(nn.Module):
    """The peer: N rows of actions, timesteps and conditions."""

    def __init__(
        self, input_dim, local_cond_dim=None, global_cond_dim=None, diffusion_step_embed_dim=256,
        down_dims=(256, 512, 1024), kernel_size=3, n_groups=8, cond_predict_scale=False,
    ):  # fmt: skip
        super().__init__()
        self.width = width = diffusion_step_embed_dim
        rest = (width + (global_cond_dim or 0), kernel_size, n_groups, cond_predict_scale)
        dims = [input_dim, *down_dims]
        pairs = list(itertools.pairwise(dims))
        self.diffusion_step_encoder = nn.Sequential(
            nn.Identity(), nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width)
        )
        if local_cond_dim is not None:
            self.local_cond_encoder = nn.ModuleList([FlatResidual(local_cond_dim, dims[1], *rest) for _ in range(2)])
        self.mid_modules = nn.ModuleList([FlatResidual(dims[-1], dims[-1], *rest) for _ in range(2)])
        self.down_modules = nn.ModuleList()
        for level, (a, b) in enumerate(pairs, 1):
            down = nn.Identity() if level == len(pairs) else Resample(nn.Conv1d(b, b, 3, 2, 1))
            self.down_modules.append(nn.ModuleList([FlatResidual(a, b, *rest), FlatResidual(b, b, *rest), down]))
        self.up_modules = nn.ModuleList()
        for a, b in reversed(pairs[1:]):
            up = Resample(nn.ConvTranspose1d(a, a, 4, 2, 1))
            self.up_modules.append(nn.ModuleList([FlatResidual(2 * b, a, *rest), FlatResidual(a, a, *rest), up]))
        self.final_conv = nn.Sequential(FlatBlock(dims[1], dims[1], kernel_size, 8), nn.Conv1d(dims[1], input_dim, 1))

    def forward(self, sample, timestep, local_cond=None, global_cond=None):
        weight = self.final_conv[1].weight
        half = self.width // 2
        frequency = torch.exp(torch.arange(half).float() * (-math.log(10000) / (half - 1)))
        angle = timestep.to(torch.promote_types(timestep.dtype, torch.float32))[:, None] * frequency[None]
        cond = self.diffusion_step_encoder(torch.cat([angle.sin(), angle.cos()], -1).to(weight.dtype))
        if global_cond is not None:
            cond = torch.cat([cond, global_cond], -1)
        x, skips = sample.transpose(1, 2), []
        for i, (first, second, down) in enumerate(self.down_modules):
            x = first(x, cond)
            if i == 0 and local_cond is not None:
                x = x + self.local_cond_encoder[0](local_cond.transpose(1, 2), cond)
            x = second(x, cond)
            skips.append(x)
            x = down(x)
        for middle in self.mid_modules:
            x = middle(x, cond)
        for first, second, up in self.up_modules:
            x = torch.cat([x, skips.pop()], 1)
            x = up(second(first(x, cond), cond))
        return self.final_conv(x).transpose(1, 2)


def pair(dtype=torch.float64, seed=0, **options):
    """Ours and the flat module with one set of weights, norms and biases off their defaults."""
    torch.manual_seed(seed)
    settings = {**BASE, **options}
    ours = ConditionalUnet1D(**settings).to(dtype)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    for name in ("layout", "impl", "num_train_timesteps"):
        settings.pop(name, None)
    flat = Flat(**settings).to(dtype)
    flat.load_state_dict(ours.state_dict(), strict=True)
    return ours, flat


def repeated(x, k, layout):
    return x.repeat_interleave(k, 0) if layout == "bk" else x.repeat(k, *[1] * (x.ndim - 1))


def inputs(k, dtype=torch.float64):
    torch.manual_seed(1)
    return (
        torch.randn(B * k, T, DA, dtype=dtype, requires_grad=True),
        torch.randint(0, 10, (B * k,)),
        torch.randn(B, G, dtype=dtype, requires_grad=True),
    )


def gradients(out, *wanted):
    torch.manual_seed(2)
    return torch.autograd.grad(out, wanted, torch.randn(out.shape, dtype=out.dtype), allow_unused=True)


def same(ours, flat, mine, theirs, extra_mine=(), extra_theirs=()):
    """Outputs and every gradient."""
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
    names = [name for name, _ in ours.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in flat.named_parameters())
    theirs_by_name = dict(flat.named_parameters())
    left = gradients(mine, *extra_mine, *(p for _, p in ours.named_parameters()))
    right = gradients(theirs, *extra_theirs, *(theirs_by_name[name] for name in names))
    for name, a, b in zip([*["input"] * len(extra_mine), *names], left, right, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("layout", ["bk", "kb"])
@pytest.mark.parametrize("k", [1, 5])
def test_outputs_and_gradients(k, layout, scale):
    ours, flat = pair(cond_predict_scale=scale, layout=layout)
    sample, timestep, cond = inputs(k)
    mine = ours(sample, timestep, global_cond=cond)
    theirs = flat(sample, timestep, global_cond=repeated(cond, k, layout))
    same(ours, flat, mine, theirs, (sample, cond), (sample, cond))


@pytest.mark.parametrize("scale", [False, True])
def test_one_condition_per_row_and_any_number_of_levels(scale):
    for dims, kernel in (([8], 1), ([16, 8], 5), ([8, 8, 8, 8], 3)):
        ours, flat = pair(cond_predict_scale=scale, down_dims=dims, kernel_size=kernel)
        sample, timestep, _ = inputs(3)
        cond = torch.randn(3 * B, G, dtype=torch.float64)
        same(ours, flat, ours(sample, timestep, global_cond=cond), flat(sample, timestep, global_cond=cond))


@pytest.mark.parametrize("form", ["per sample", "per condition"])
@pytest.mark.parametrize("layout", ["bk", "kb"])
@pytest.mark.parametrize("scale", [False, True])
def test_local_condition(form, layout, scale):
    k = 3
    ours, flat = pair(local_cond_dim=DL, cond_predict_scale=scale, layout=layout)
    sample, timestep, cond = inputs(k)
    rows = B * k if form == "per sample" else B
    local = torch.randn(rows, T, DL, dtype=torch.float64, requires_grad=True)
    mine = ours(sample, timestep, local, cond)
    theirs = flat(sample, timestep, local if rows == B * k else repeated(local, k, layout), repeated(cond, k, layout))
    same(ours, flat, mine, theirs, (sample, cond, local), (sample, cond, local))
    same(ours, flat, ours(sample, timestep, None, cond), flat(sample, timestep, None, repeated(cond, k, layout)))


@pytest.mark.parametrize("form", ["none", "per sample", "per condition"])
def test_the_form_that_other_devices_run(monkeypatch, form):
    """Channels first, torch's own convolutions."""
    for module in (conditional_unet1d, _unet_blocks):
        monkeypatch.setattr(module, "channel_axis", lambda x: 2)
    monkeypatch.setattr(_unet_blocks, "token_conv1d", None)
    k = 3
    ours, flat = pair(local_cond_dim=DL, cond_predict_scale=True, layout="kb")
    sample, timestep, cond = inputs(k)
    local = None
    if form != "none":
        local = torch.randn(B * k if form == "per sample" else B, T, DL, dtype=torch.float64, requires_grad=True)
    flat_local = repeated(local, k, "kb") if form == "per condition" else local
    theirs = flat(sample, timestep, flat_local, repeated(cond, k, "kb"))
    own = (sample, cond) if local is None else (sample, cond, local)
    same(ours, flat, ours(sample, timestep, local, cond), theirs, own, own)


def test_local_condition_without_a_global_one():
    ours, flat = pair(local_cond_dim=DL, global_cond_dim=None)
    sample, timestep, _ = inputs(3)
    local = torch.randn(B, T, DL, dtype=torch.float64, requires_grad=True)
    same(
        ours, flat, ours(sample, timestep, local), flat(sample, timestep, repeated(local, 3, "bk")), (local,), (local,)
    )


def test_the_second_local_encoder_has_no_effect():
    ours, _ = pair(local_cond_dim=DL)
    sample, timestep, cond = inputs(1)
    ours(sample, timestep, torch.randn(B, T, DL, dtype=torch.float64), cond).sum().backward()
    dead = [p.grad for p in ours.local_cond_encoder[1].parameters()]
    assert dead and all(grad is None for grad in dead)
    assert all(p.grad is not None for p in ours.local_cond_encoder[0].parameters())


@pytest.mark.parametrize("scale", [False, True])
def test_without_a_global_condition(scale):
    ours, flat = pair(global_cond_dim=None, cond_predict_scale=scale)
    sample, timestep, _ = inputs(3)
    same(ours, flat, ours(sample, timestep), flat(sample, timestep), (sample,), (sample,))


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_the_table_of_timesteps_changes_nothing(scale, dtype):
    ours, flat = pair(cond_predict_scale=scale, num_train_timesteps=10)
    sample, timestep, cond = inputs(8)  # 16 samples, 10 timesteps
    seen = []
    ours.diffusion_step_encoder.register_forward_pre_hook(lambda _, args: seen.append(list(args[0].shape)))
    mine = ours(sample, timestep.to(dtype), global_cond=cond)
    assert seen == [[10, 12]]
    same(ours, flat, mine, flat(sample, timestep, global_cond=repeated(cond, 8, "bk")), (cond,), (cond,))


def test_few_samples_and_fractional_timesteps_need_no_table():
    ours, flat = pair(num_train_timesteps=10)
    seen = []
    ours.diffusion_step_encoder.register_forward_pre_hook(lambda _, args: seen.append(list(args[0].shape)))
    sample, timestep, cond = inputs(2)
    ours(sample, timestep, global_cond=cond)
    sample, timestep, cond = inputs(8)
    fractional = timestep + 0.25
    mine = ours(sample, fractional, global_cond=cond)
    assert seen == [[B, 2, 12], [B, 8, 12]]
    same(ours, flat, mine, flat(sample, fractional, global_cond=repeated(cond, 8, "bk")))


def test_a_timestep_outside_the_table_is_refused():
    ours, _ = pair(num_train_timesteps=9)
    sample, timestep, cond = inputs(8)
    with pytest.raises(IndexError):
        ours(sample, torch.full_like(timestep, 9), global_cond=cond)


@pytest.mark.parametrize("timestep", [4, 4.0, torch.tensor(4), torch.tensor([4])])
def test_one_timestep_for_all_rows(timestep):
    ours, _ = pair()
    sample, _, cond = inputs(2)
    want = ours(sample, torch.full((2 * B,), 4), global_cond=cond)
    torch.testing.assert_close(ours(sample, timestep, global_cond=cond), want)


def test_encode_and_denoise_are_forward():
    ours, _ = pair()
    sample, timestep, cond = inputs(5)
    cache = ours.encode(cond)
    leaves, _ = pytree.tree_flatten(cache)
    assert leaves and all(isinstance(leaf, Tensor) and leaf.shape[0] == B for leaf in leaves)
    out = ours.denoise(cache, sample.unflatten(0, (B, 5)), timestep.view(B, 5))
    assert torch.equal(merge_samples(out), ours(sample, timestep, global_cond=cond))


WIDE = 4096
"""Channels of a condition that dwarf everything else about a sample."""


def saved(k: int) -> list[Tensor]:
    """What autograd keeps, one tensor per storage, parameters excluded."""
    torch.manual_seed(0)
    model = ConditionalUnet1D(**{**BASE, "global_cond_dim": WIDE})
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    cond = torch.randn(B, WIDE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(torch.randn(B * k, T, DA), torch.zeros(B * k, dtype=torch.long), global_cond=cond)
    del out
    return [tensor for address, tensor in kept.items() if address not in own]


def test_nothing_of_the_condition_is_kept_per_sample():
    count = {k: sum(t.untyped_storage().nbytes() for t in saved(k)) for k in (1, 2, 9)}
    per_sample = count[2] - count[1]
    assert count[9] - count[2] == pytest.approx(7 * per_sample, rel=1e-3)
    wide = [t for t in saved(9) if WIDE in t.shape or t.numel() >= 9 * WIDE]
    assert [list(t.shape) for t in wide] == [[B, WIDE]] * len(wide) and 1 <= len(wide) <= 2


KEYS = """
mid_modules.0.blocks.0.block.0.weight mid_modules.0.blocks.0.block.0.bias mid_modules.0.blocks.0.block.1.weight
mid_modules.0.blocks.0.block.1.bias mid_modules.0.blocks.1.block.0.weight mid_modules.0.blocks.1.block.0.bias
mid_modules.0.blocks.1.block.1.weight mid_modules.0.blocks.1.block.1.bias mid_modules.0.cond_encoder.1.weight
mid_modules.0.cond_encoder.1.bias mid_modules.1.blocks.0.block.0.weight mid_modules.1.blocks.0.block.0.bias
mid_modules.1.blocks.0.block.1.weight mid_modules.1.blocks.0.block.1.bias mid_modules.1.blocks.1.block.0.weight
mid_modules.1.blocks.1.block.0.bias mid_modules.1.blocks.1.block.1.weight mid_modules.1.blocks.1.block.1.bias
mid_modules.1.cond_encoder.1.weight mid_modules.1.cond_encoder.1.bias diffusion_step_encoder.1.weight
diffusion_step_encoder.1.bias diffusion_step_encoder.3.weight diffusion_step_encoder.3.bias
local_cond_encoder.0.blocks.0.block.0.weight local_cond_encoder.0.blocks.0.block.0.bias
local_cond_encoder.0.blocks.0.block.1.weight local_cond_encoder.0.blocks.0.block.1.bias
local_cond_encoder.0.blocks.1.block.0.weight local_cond_encoder.0.blocks.1.block.0.bias
local_cond_encoder.0.blocks.1.block.1.weight local_cond_encoder.0.blocks.1.block.1.bias
local_cond_encoder.0.cond_encoder.1.weight local_cond_encoder.0.cond_encoder.1.bias
local_cond_encoder.0.residual_conv.weight local_cond_encoder.0.residual_conv.bias
local_cond_encoder.1.blocks.0.block.0.weight local_cond_encoder.1.blocks.0.block.0.bias
local_cond_encoder.1.blocks.0.block.1.weight local_cond_encoder.1.blocks.0.block.1.bias
local_cond_encoder.1.blocks.1.block.0.weight local_cond_encoder.1.blocks.1.block.0.bias
local_cond_encoder.1.blocks.1.block.1.weight local_cond_encoder.1.blocks.1.block.1.bias
local_cond_encoder.1.cond_encoder.1.weight local_cond_encoder.1.cond_encoder.1.bias
local_cond_encoder.1.residual_conv.weight local_cond_encoder.1.residual_conv.bias
up_modules.0.0.blocks.0.block.0.weight up_modules.0.0.blocks.0.block.0.bias up_modules.0.0.blocks.0.block.1.weight
up_modules.0.0.blocks.0.block.1.bias up_modules.0.0.blocks.1.block.0.weight up_modules.0.0.blocks.1.block.0.bias
up_modules.0.0.blocks.1.block.1.weight up_modules.0.0.blocks.1.block.1.bias up_modules.0.0.cond_encoder.1.weight
up_modules.0.0.cond_encoder.1.bias up_modules.0.0.residual_conv.weight up_modules.0.0.residual_conv.bias
up_modules.0.1.blocks.0.block.0.weight up_modules.0.1.blocks.0.block.0.bias up_modules.0.1.blocks.0.block.1.weight
up_modules.0.1.blocks.0.block.1.bias up_modules.0.1.blocks.1.block.0.weight up_modules.0.1.blocks.1.block.0.bias
up_modules.0.1.blocks.1.block.1.weight up_modules.0.1.blocks.1.block.1.bias up_modules.0.1.cond_encoder.1.weight
up_modules.0.1.cond_encoder.1.bias up_modules.0.2.conv.weight up_modules.0.2.conv.bias
down_modules.0.0.blocks.0.block.0.weight down_modules.0.0.blocks.0.block.0.bias
down_modules.0.0.blocks.0.block.1.weight down_modules.0.0.blocks.0.block.1.bias
down_modules.0.0.blocks.1.block.0.weight down_modules.0.0.blocks.1.block.0.bias
down_modules.0.0.blocks.1.block.1.weight down_modules.0.0.blocks.1.block.1.bias
down_modules.0.0.cond_encoder.1.weight down_modules.0.0.cond_encoder.1.bias down_modules.0.0.residual_conv.weight
down_modules.0.0.residual_conv.bias down_modules.0.1.blocks.0.block.0.weight down_modules.0.1.blocks.0.block.0.bias
down_modules.0.1.blocks.0.block.1.weight down_modules.0.1.blocks.0.block.1.bias
down_modules.0.1.blocks.1.block.0.weight down_modules.0.1.blocks.1.block.0.bias
down_modules.0.1.blocks.1.block.1.weight down_modules.0.1.blocks.1.block.1.bias
down_modules.0.1.cond_encoder.1.weight down_modules.0.1.cond_encoder.1.bias down_modules.0.2.conv.weight
down_modules.0.2.conv.bias down_modules.1.0.blocks.0.block.0.weight down_modules.1.0.blocks.0.block.0.bias
down_modules.1.0.blocks.0.block.1.weight down_modules.1.0.blocks.0.block.1.bias
down_modules.1.0.blocks.1.block.0.weight down_modules.1.0.blocks.1.block.0.bias
down_modules.1.0.blocks.1.block.1.weight down_modules.1.0.blocks.1.block.1.bias
down_modules.1.0.cond_encoder.1.weight down_modules.1.0.cond_encoder.1.bias down_modules.1.0.residual_conv.weight
down_modules.1.0.residual_conv.bias down_modules.1.1.blocks.0.block.0.weight down_modules.1.1.blocks.0.block.0.bias
down_modules.1.1.blocks.0.block.1.weight down_modules.1.1.blocks.0.block.1.bias
down_modules.1.1.blocks.1.block.0.weight down_modules.1.1.blocks.1.block.0.bias
down_modules.1.1.blocks.1.block.1.weight down_modules.1.1.blocks.1.block.1.bias
down_modules.1.1.cond_encoder.1.weight down_modules.1.1.cond_encoder.1.bias final_conv.0.block.0.weight
final_conv.0.block.0.bias final_conv.0.block.1.weight final_conv.0.block.1.bias final_conv.1.weight final_conv.1.bias
"""


def test_state_dict_keys_in_order():
    model = ConditionalUnet1D(**{**BASE, "down_dims": [8, 16], "local_cond_dim": DL})
    assert list(model.state_dict()) == KEYS.split()


def test_strict_loading_both_ways_and_shapes():
    ours, flat = pair(local_cond_dim=DL, cond_predict_scale=True)
    ours.load_state_dict(flat.state_dict(), strict=True)
    flat.load_state_dict(ours.state_dict(), strict=True)
    shapes = {name: list(value.shape) for name, value in ours.state_dict().items()}
    assert shapes["up_modules.0.0.blocks.0.block.0.weight"] == [24, 32, 3]
    assert shapes["up_modules.1.2.conv.weight"] == [8, 8, 4]
    assert shapes["down_modules.1.0.cond_encoder.1.weight"] == [48, 19]
    assert shapes["diffusion_step_encoder.1.weight"] == [48, 12]


def test_level2_step_trains_it_in_chunks():
    class Policy(nn.Module):
        def __init__(self, unet):
            super().__init__()
            self.unet = unet

        def encode(self, obs):
            return self.unet.encode(obs)

        def denoise(self, cache, x, t):
            return self.unet.denoise(cache, x, t)

    class Objective:
        def per_sample(self, denoise, cache, batch):
            return (denoise(cache, batch.noise, batch.timesteps) - batch.noise).square().mean((2, 3))

    ours, _ = pair()
    policy = Policy(ours)
    wide = dict(dtype=torch.float64)
    batch = Level2Batch(
        torch.randn(B, G, **wide), torch.randn(B, T, DA, **wide), torch.randint(0, 10, (B, 5)), torch.randn(B, 5, T, DA, **wide)
    )  # fmt: skip
    results = []
    for chunk in (None, 2):
        ours.zero_grad()
        loss = level2_step(policy, Objective(), batch, chunk=chunk).loss
        results.append([loss, *(p.grad.clone() for p in ours.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)


def test_autocast_on_the_cpu():
    ours, _ = pair(torch.float32, cond_predict_scale=True)
    sample, timestep, cond = inputs(2, torch.float32)
    want = ours(sample, timestep, global_cond=cond)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ours(sample, timestep, global_cond=cond)
    got.float().sum().backward()
    assert (got.float() - want).abs().max() < 0.1 * want.abs().max()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_it_is_deterministic(impl):
    ours, _ = pair(torch.float32, impl=impl)
    why_not = backend.why_not(BACKENDS, impl, torch.device("cpu"), torch.float32)
    if why_not is not None:
        pytest.skip(why_not)
    sample, timestep, cond = inputs(5, torch.float32)
    runs = []
    for _ in range(2):
        out = ours(sample, timestep, global_cond=cond)
        runs.append([out, *gradients(out, cond, *ours.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def flat_vector(tensors):
    return torch.cat([t.detach().cpu().double().flatten() for t in tensors])


@pytest.mark.parametrize("scale", [False, True])
def test_kernels_keep_the_error_budget(scale):
    """Outputs, and the gradients of all parameters as one vector: some of them are zero but for rounding."""
    device, impl = ("cuda", "triton") if torch.cuda.is_available() else ("cpu", "native")
    why_not = backend.why_not(BACKENDS, impl, torch.device(device), torch.float32)
    if why_not is not None:
        pytest.skip(why_not)
    found = {}
    for name, dtype in (("exact", torch.float64), ("reference", torch.float32), (impl, torch.float32)):
        model, _ = pair(torch.float32, cond_predict_scale=scale, impl="reference" if name == "exact" else name)
        model = model.to(device, dtype)
        sample, timestep, cond = (t.detach().to(device) for t in inputs(3, torch.float32))
        cond = cond.to(dtype).requires_grad_()
        out = model(sample.to(dtype), timestep, global_cond=cond)
        torch.manual_seed(2)
        cotangent = torch.randn(out.shape).to(out)
        found[name] = (out, torch.autograd.grad(out, [cond, *model.parameters()], cotangent))
    eps = torch.finfo(torch.float32).eps
    for part in range(2):
        true, theirs, ours = (flat_vector(found[name][part]) for name in ("exact", "reference", impl))
        budget = (theirs - true).abs().max() + eps * true.abs().max()
        assert (ours - true).abs().max() <= 2 * budget


def test_optimizer_groups_hold_every_parameter_once():
    ours = ConditionalUnet1D(**BASE)
    groups = ours.get_optim_groups(0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in ours.parameters())
    assert all(p.ndim > 1 for p in groups[0]["params"]) and all(p.ndim == 1 for p in groups[1]["params"])


def run(**changes):
    options = dict(sample=torch.zeros(4, T, DA), timestep=torch.zeros(4), global_cond=torch.zeros(2, G))
    local = changes.pop("local_cond_dim", None)
    return ConditionalUnet1D(**BASE, local_cond_dim=local)(**{**options, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(sample=torch.zeros(4, 6, DA)), r"sample must have T a positive multiple of .* = 4, .* got T = 6"),
        (dict(sample=torch.zeros(4, T, 2)), r"sample must be \[N, T, Da\] = \[N, T, 3\], got \[4, 8, 2\]"),
        (dict(sample=torch.zeros(4, T, DA).double()), "sample must have the dtype of the parameters, torch.float32"),
        (dict(global_cond=torch.zeros(3, G)), "N = 4 rows for B = 3 conditions"),
        (dict(global_cond=None), r"global_cond must be \[B, G\] = \[B, 7\], got None"),
        (dict(global_cond=torch.zeros(2, 5)), r"global_cond must be \[B, G\] = \[B, 7\], got \[2, 5\]"),
        (dict(timestep=torch.zeros(3)), r"timestep must be a scalar or \[N\] = \[4\], got \[3\]"),
        (dict(timestep=torch.zeros(4).bool()), "timestep must be integer or floating, got torch.bool"),
        (dict(timestep=0.5), "must be whole"),
        (dict(local_cond=torch.zeros(4, T, DL)), "local_cond must be None for a model with local_cond_dim = None"),
        (dict(local_cond=torch.zeros(3, T, DL), local_cond_dim=DL), "local_cond must have B = 2 rows, .* or N = 4"),
        (dict(local_cond=torch.zeros(4, T, 2), local_cond_dim=DL), r"local_cond must be .* = \[2, 2, 8, 5\], got"),
        (dict(local_cond=torch.zeros(2, 4, DL), local_cond_dim=DL), "must have T = 8 tokens, as sample, got 4"),
    ],
)  # fmt: skip
def test_errors_of_a_call(changes, message):
    with pytest.raises(InvalidArgument, match=f"^ConditionalUnet1D: .*{message}"):
        run(**changes)


def test_errors_of_the_cache():
    model = ConditionalUnet1D(**BASE)
    cache, x, t = model.encode(torch.zeros(3, G)), torch.zeros(2, 2, T, DA), torch.zeros(2, 2)
    with pytest.raises(InvalidArgument, match="cache must hold B = 2 conditions, as sample, got 3"):
        model.denoise(cache, x, t)
    with pytest.raises(InvalidArgument, match="hold 12 modulations, got 3"):
        model.denoise(cache._replace(film=cache.film[:3]), x, t)
    with pytest.raises(InvalidArgument, match=r"timestep must be \[B, K\] = \[3, 2\], got \[2, 2\]"):
        model.denoise(cache, torch.zeros(3, 2, T, DA), t)


def test_unknown_keywords_raise():
    with pytest.raises(TypeError, match="local_condition"):
        run(local_condition=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(down_dims=[]), "down_dims must be one or more multiples of n_groups = 4"),
        (dict(down_dims=[8, 10]), r"down_dims .* multiples of n_groups = 4, got \[8, 10\]"),
        (dict(down_dims=[12, 16]), r"down_dims\[0\] must be a multiple of 8, .* got 12"),
        (dict(kernel_size=4), "kernel_size must be odd, so that blocks keep T, got 4"),
        (dict(diffusion_step_embed_dim=7), "diffusion_step_embed_dim must be even"),
        (dict(input_dim=0), "input_dim must be an int >= 1, got 0"),
        (dict(global_cond_dim=0), "global_cond_dim must be an int >= 1, got 0"),
        (dict(num_train_timesteps=0), "num_train_timesteps must be an int >= 1"),
        (dict(layout="nk"), "layout must be"),
        (dict(impl="cuda"), "impl must be None or one of"),
    ],
)
def test_errors_of_the_constructor(changes, message):
    with pytest.raises(InvalidArgument, match=f"ConditionalUnet1D: {message}"):
        ConditionalUnet1D(**{**BASE, **changes})
