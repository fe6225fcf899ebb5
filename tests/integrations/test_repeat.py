"""Repeated diffusion steps: our rows, our pieces and CogACT's head against the materialised repeat."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations.repeat import ClampedTimes, Level2CogACT, RepeatedSteps
from minidiff_fast.objectives import BetaTimes, DiffusionProcess, FlowMatching
from minidiff_fast.shapes import merge_samples, split_samples

BENCH = Path(__file__).resolve().parents[2] / "bench"
B, T, A, C = 3, 16, 7, 48
LAYOUTS = ("bk", "kb")


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference ops: tests/ops and tests/kernels compare the others to them (Triton's interpreter is slow)."""
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")


@pytest.fixture(scope="module")
def heads() -> Iterator[ModuleType]:
    """bench/repeated_heads.py: CogACT's ActionModel and starVLA's head, from their interfaces."""
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("repeated_heads")
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("repeated_heads", None)


def repeated(x: Tensor, k: int, layout: str) -> Tensor:
    return x.repeat_interleave(k, 0) if layout == "bk" else x.repeat(k, *[1] * (x.dim() - 1))


def batch(tokens: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    features = torch.randn(B, tokens, C, dtype=dtype, requires_grad=True)
    return {"actions": torch.randn(B, T, A, dtype=dtype), "cognition_features": features}


def process() -> DiffusionProcess:
    return DiffusionProcess(torch.linspace(0.999, 0.001, 100), "epsilon")


# ------------------------------------------------------------------------------------------------------- the rows


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("flow", [False, True])
def test_rows_are_noised_repeats(layout: Any, flow: bool) -> None:
    chosen = FlowMatching(noise_at=0, timestep_scale=1.0) if flow else process()
    steps, actions = RepeatedSteps(chosen, 5, layout), torch.randn(B, T, A)
    rows = steps.draw(actions, generator=torch.Generator().manual_seed(0))
    x0 = repeated(actions, 5, layout)
    if flow:
        t = rows.t[:, None, None]
        noise = x0 - rows.target
        torch.testing.assert_close(rows.x, t * x0 + (1 - t) * noise)
    else:
        ab = chosen.alphas_cumprod[rows.t][:, None, None]
        torch.testing.assert_close(rows.x, ab.sqrt() * x0 + (1 - ab).sqrt() * rows.target)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stratified_and_antithetic_rows(layout: Any) -> None:
    steps = RepeatedSteps(process(), 4, layout, timesteps="stratified", noise="antithetic")
    rows = steps.draw(torch.randn(B, T, A))
    by_quarter = split_samples(rows.t, B, layout).sort(1).values // 25
    assert by_quarter.tolist() == [[0, 1, 2, 3]] * B
    eps = split_samples(rows.target, B, layout)
    torch.testing.assert_close(eps[:, 0::2], -eps[:, 1::2])


def test_target_of_sample_prediction_is_not_copied() -> None:
    actions = torch.randn(B, T, A)
    rows = RepeatedSteps(DiffusionProcess(torch.tensor([0.9, 0.5]), "sample"), 8).draw(actions)
    assert rows.samples.target.untyped_storage().nbytes() == actions.untyped_storage().nbytes()
    torch.testing.assert_close(rows.target, actions.repeat(8, 1, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
def test_loss_is_that_of_the_repeated_batch(layout: Any, masked: bool) -> None:
    steps = RepeatedSteps(process(), 5, layout)
    rows = steps.draw(torch.randn(B, T, A))
    prediction = torch.randn(B * 5, T, A, requires_grad=True)
    mask = torch.arange(T)[None] < torch.tensor([T, 3, 0])[:, None] if masked else None
    keep = torch.ones(B * 5, T, 1) if mask is None else repeated(mask, 5, layout)[..., None].float()
    wanted = ((prediction - rows.target).square() * keep).sum() / (keep.sum() * A)
    got = steps.loss(prediction, rows, mask=mask)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(loss, prediction)[0] for loss in (got, wanted)))


def test_nothing_counts() -> None:
    steps = RepeatedSteps(process(), 2)
    rows = steps.draw(torch.randn(B, T, A))
    assert steps.loss(rows.x, rows, mask=torch.zeros(B, T, dtype=torch.bool)).item() == 0.0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prepend_is_cat_of_the_repeat(layout: Any) -> None:
    steps = RepeatedSteps(process(), 5, layout)
    shared = torch.randn(B, 2, C, dtype=torch.float64, requires_grad=True)
    own = torch.randn(B * 5, T, C, dtype=torch.float64, requires_grad=True)
    got, wanted = steps.prepend(shared, own), torch.cat([repeated(shared, 5, layout), own], 1)
    assert torch.equal(got, wanted)
    seed = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad(got, (shared, own), seed), torch.autograd.grad(wanted, (shared, own), seed), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_condition_dropout_is_that_of_the_repeat(layout: Any, tokens: int) -> None:
    """Dropped before the linear layer on N rows, or after it on B rows: the same, with every gradient."""
    steps, linear = RepeatedSteps(process(), 5, layout), nn.Linear(C, 8).double()
    z = torch.randn(B, tokens, C, dtype=torch.float64, requires_grad=True)
    u = torch.randn(tokens, C, dtype=torch.float64, requires_grad=True)
    dropped = torch.rand(B * 5, generator=torch.Generator().manual_seed(1)) < 0.4
    assert dropped.any() and not dropped.all()
    wanted = linear(torch.where(dropped[:, None, None], u, repeated(z, 5, layout)))
    got = steps.condition_dropout(linear(z), linear(u), 0.4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    inputs, seed = (z, u, linear.weight, linear.bias), torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, seed), torch.autograd.grad(wanted, inputs, seed), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
def test_dropout_is_drawn_per_row(p: float) -> None:
    k, conditions = 400, 10
    steps = RepeatedSteps(process(), k)
    rows = steps.condition_dropout(torch.ones(conditions, 1, 1), torch.zeros(1, 1), p)
    by_condition = 1 - split_samples(rows, conditions, "kb").mean((1, 2, 3))
    # Five standard deviations of a mean over K; per condition and not per batch, so no condition is all or nothing.
    assert (by_condition - p).abs().max() <= 5 * (p * (1 - p) / k) ** 0.5


def test_the_wrong_layout_pairs_samples_with_other_conditions() -> None:
    shared, own = torch.randn(B, 1, C), torch.randn(B * 5, T, C)
    kb, bk = (RepeatedSteps(process(), 5, layout).prepend(shared, own) for layout in ("kb", "bk"))
    peer = torch.cat([shared.repeat(5, 1, 1), own], 1)
    assert torch.equal(kb, peer) and not torch.equal(bk, peer)


def test_bad_rows() -> None:
    steps = RepeatedSteps(process(), 4)
    rows = steps.draw(torch.randn(B, T, A))
    shared, own = torch.randn(B, 1, C), torch.randn(B * 4, T, C)
    with pytest.raises(InvalidArgument, match=r"own must have N = B \* K = 12 \* 4 = 48 rows, got 12.*not repeated"):
        steps.prepend(shared.repeat(4, 1, 1), own)
    with pytest.raises(InvalidArgument, match=r"N = B \* K = 3 \* 4 = 12 rows, got 11"):
        steps.prepend(shared, own[1:])
    with pytest.raises(InvalidArgument, match=r"shared must be \[B, S, C\] and own \[N, T, C\]"):
        steps.prepend(shared[..., 1:], own)
    with pytest.raises(InvalidArgument, match=r"unconditional must be \[S, D\] = \[1, 48\]"):
        steps.choose(torch.zeros(12, dtype=torch.bool), shared, torch.zeros(C))
    with pytest.raises(InvalidArgument, match=r"p must be in \[0, 1\], got 1.5"):
        steps.condition_dropout(shared, torch.zeros(1, C), 1.5)
    with pytest.raises(InvalidArgument, match=r"prediction must be \[N, T, A\] = \[12, 16, 7\]"):
        steps.loss(rows.x[1:], rows)
    with pytest.raises(InvalidArgument, match=r"mask must be \[B, T\] = \[3, 16\], got \[12, 16\]"):
        steps.loss(rows.x, rows, mask=torch.ones(12, T, dtype=torch.bool))
    with pytest.raises(InvalidArgument, match="rows are in layout 'kb', these steps in 'bk'"):
        replace(steps, layout="bk").loss(rows.x, rows)
    for wrong, message in (
        ({"k": 0}, "at least 1, got 0"),
        ({"layout": "nk"}, "layout must be"),
        ({"timesteps": "even"}, "timesteps must be one of"),
        ({"noise": "paired"}, "noise must be one of"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            replace(steps, **wrong)


def test_clamped_times_are_starvlas() -> None:
    u = torch.tensor([0.0, 0.3, 0.9995, 1.0])
    times = ClampedTimes(BetaTimes(1.5, start=1.0, stop=(0.999 - 1.0) / 0.999))
    torch.testing.assert_close(times(u**1.5), (0.999 - u.clamp(max=0.999)) / 0.999)


# --------------------------------------------------------------------------------------------------------- CogACT


def compared(adapter: Level2CogACT, model: Any, inputs: dict[str, Tensor], k: int, tolerance: float) -> None:
    """Loss and every gradient: ours, and the peer's own loss on the repeated batch with our noise and times."""
    torch.manual_seed(5)
    drawn = adapter.draw(inputs, k, generator=torch.Generator().manual_seed(2))
    noise, t = (merge_samples(tensor, "kb") for tensor in (drawn.noise, drawn.timesteps))
    x, z = inputs["actions"], inputs["cognition_features"]
    parameters = [z, *model.parameters()]
    torch.manual_seed(6)  # the dropout of the condition, drawn per row in the order of the rows
    wanted = model.loss(x.repeat(k, 1, 1), z.repeat(k, 1, 1), noise.to(x.dtype), t)
    torch.manual_seed(6)
    got = adapter.objective.per_sample(adapter, adapter.encode(drawn.obs), drawn).mean()
    torch.testing.assert_close(got.to(wanted.dtype), wanted, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(
        torch.autograd.grad(got, parameters, allow_unused=True),
        torch.autograd.grad(wanted, parameters, allow_unused=True),
        strict=True,
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tokens", [1, 6])
def test_cogact_is_its_repeated_loss(heads: ModuleType, k: int, training: bool, tokens: int) -> None:
    model = heads.ActionModel(dropout=0.3, tokens=tokens)
    adapter = Level2CogACT(model).train(training)
    compared(adapter, model, batch(tokens), k, 2e-5)


def test_cogact_network_in_float64(heads: ModuleType) -> None:
    model = heads.ActionModel(dropout=0.3).double()
    adapter, k = Level2CogACT(model), 5
    inputs = batch(dtype=torch.float64)
    x, t = torch.randn(B, k, T, A, dtype=torch.float64), torch.randint(0, 100, (B, k))
    z = inputs["cognition_features"]
    torch.manual_seed(3)
    wanted = model.net(merge_samples(x, "kb"), merge_samples(t, "kb"), z.repeat(k, 1, 1))
    torch.manual_seed(3)
    got = adapter.denoise(adapter.encode(inputs), x, t)
    torch.testing.assert_close(merge_samples(got, "kb"), wanted, rtol=1e-9, atol=1e-9)
    seed, parameters = torch.randn_like(wanted), [z, *model.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(merge_samples(got, "kb"), parameters, seed),
        torch.autograd.grad(wanted, parameters, seed),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_cogact_with_another_pairing_differs(heads: ModuleType) -> None:
    model = heads.ActionModel(dropout=0.0)
    adapter, k = Level2CogACT(model), 5
    inputs = batch()
    x, t = torch.randn(B, k, T, A), torch.randint(0, 100, (B, k))
    got = adapter.denoise(adapter.encode(inputs), x, t)
    z = inputs["cognition_features"]
    for layout in LAYOUTS:
        rows = model.net(merge_samples(x, layout), merge_samples(t, layout), repeated(z, k, layout))
        torch.testing.assert_close(split_samples(rows, B, layout), got, rtol=1e-5, atol=1e-5)
    mixed = model.net(merge_samples(x, "bk"), merge_samples(t, "bk"), repeated(z, k, "kb"))
    assert (split_samples(mixed, B, "bk") - got).abs().max() > 1e-2


def test_cogact_in_chunks(heads: ModuleType) -> None:
    adapter, inputs = Level2CogACT(heads.ActionModel(dropout=0.0)), batch()
    gradients = []
    for chunk in (None, 2):
        adapter.zero_grad()
        inputs["cognition_features"].grad = None
        adapter.step(inputs, 5, chunk=chunk, generator=torch.Generator().manual_seed(4))
        gradients.append([p.grad for p in (inputs["cognition_features"], *adapter.parameters())])
    for whole, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-5, atol=1e-6)


def test_cogact_saves_nothing_of_the_condition_per_sample(heads: ModuleType) -> None:
    width = 4096
    adapter, k = Level2CogACT(heads.ActionModel(token_size=width)).train(), 32
    inputs = {"actions": torch.randn(B, T, A), "cognition_features": torch.randn(B, 1, width, requires_grad=True)}
    rows: list[int] = []

    def pack(saved: Tensor) -> Tensor:
        if width in saved.shape:
            rows.append(saved.numel() // width)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        adapter.loss(inputs, k)
    assert 0 < max(rows) <= 32  # z, u, and the weight [32, 4096] of their projection


def test_sampling_needs_no_actions(heads: ModuleType) -> None:
    adapter = Level2CogACT(heads.ActionModel()).eval()
    cache = adapter.encode({"cognition_features": torch.randn(B, 1, C)})
    assert adapter.denoise(cache, torch.randn(B, 2, T, A), torch.zeros(B, 2, dtype=torch.long)).shape == (B, 2, T, A)


def test_copies(heads: ModuleType) -> None:
    model = heads.ActionModel()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    adapter, inputs = Level2CogACT(model), {name: x.detach() for name, x in batch().items()}
    assert adapter.net.training and all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    adapter.eval()
    wanted = adapter.loss(inputs, 3, generator=torch.Generator().manual_seed(1))
    other = Level2CogACT(heads.ActionModel()).eval()
    other.load_state_dict(adapter.state_dict())
    for copied in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter)), other):
        torch.testing.assert_close(copied.loss(inputs, 3, generator=torch.Generator().manual_seed(1)), wanted)


def test_autocast_and_compile(heads: ModuleType) -> None:
    adapter, inputs = Level2CogACT(heads.ActionModel(dropout=0.0)), {n: x.detach() for n, x in batch().items()}
    drawn = adapter.draw(inputs, 3, generator=torch.Generator().manual_seed(1))
    wanted = adapter.objective.per_sample(adapter, adapter.encode(drawn.obs), drawn)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = adapter.objective.per_sample(adapter, adapter.encode(drawn.obs), drawn)
    torch.testing.assert_close(lowered, wanted, rtol=0.1, atol=0.02)
    compiled = torch.compile(adapter.denoise, backend="eager", fullgraph=True)
    noised = drawn.noised_by(adapter.process)
    cache = adapter.encode(drawn.obs)
    torch.testing.assert_close(compiled(cache, noised.x, noised.t), adapter.denoise(cache, noised.x, noised.t))


def test_repeated_by_mistake(heads: ModuleType) -> None:
    adapter, inputs = Level2CogACT(heads.ActionModel()), batch()
    z = inputs["cognition_features"]
    with pytest.raises(
        InvalidArgument, match=r"cognition_features must be .*not repeated, = \[3, 1, 48\], got \[12, 1"
    ):
        adapter.loss({**inputs, "cognition_features": z.repeat(4, 1, 1)}, 4)
    with pytest.raises(InvalidArgument, match=r"actions must be \[B, T, A\] = \[B, 16, 7\], got \[3, 15, 7\]"):
        adapter.loss({**inputs, "actions": inputs["actions"][:, 1:]}, 4)


class Other(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + 1


def test_other_interfaces_are_refused(heads: ModuleType) -> None:
    def refused(match: str, **changes: Any) -> None:
        model = heads.ActionModel()
        for path, value in changes.items():
            *owners, last = path.split("__")
            owner: Any = model
            for name in owners:
                owner = getattr(owner, name)
            setattr(owner, last, value)
        modes = [m.training for m in model.modules()]
        with pytest.raises(InvalidArgument, match=match):
            Level2CogACT(model)
        assert modes == [m.training for m in model.modules()]
        assert not getattr(model, "net", model)._forward_pre_hooks

    with pytest.raises(InvalidArgument, match="expected Linear with net, diffusion, got Linear"):
        Level2CogACT(nn.Linear(2, 2))
    refused(r"expected ActionModel.net with x_embedder", net=nn.Identity())
    refused(r"ActionModel.diffusion with alphas_cumprod", diffusion=SimpleNamespace())
    refused("expected learn_sigma = False", net__learn_sigma=True)
    refused("expected past_action_window_size = 0", net__past_action_window_size=2)
    refused("expected 7 alphas_cumprod, got 100", diffusion__num_timesteps=7)
    refused(r"uncondition \[S, 48\], got \[1, 9\]", net__z_embedder__uncondition=nn.Parameter(torch.zeros(1, 9)))
    refused("noise with its alphas_cumprod", diffusion__q_sample=lambda x, t, noise: x + noise)

    class Widened(heads.InContextDiT):  # type: ignore[misc, name-defined]
        def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
            return super().forward(2 * x, t, z)

    class Masked(heads.InContextDiT):  # type: ignore[misc, name-defined]
        def forward(self, x: Tensor, t: Tensor, z: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x, t, z) * mask

    sizes = (A, 32, 2, 4, C, T, 0.1, 1)
    widened = Widened(*sizes)
    nn.init.zeros_(widened.final_layer.linear.weight)  # as CogACT does: every output is 0
    refused("computes something else", net=widened)
    refused(r"expected net.forward\(x, t, z\), got \(x, t, z, mask\)", net=Masked(*sizes))
    sharded = type("FullyShardedDataParallel", (Other,), {})
    refused("not sharded.*use RepeatedSteps", net__blocks=nn.ModuleList([sharded()]))
