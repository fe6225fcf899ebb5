"""starVLA's flow-matching heads: Level2StarVLA against the head's own loss on repeated rows."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations.repeat import ClampedTimes
from minidiff_fast.integrations.starvla import Level2StarVLA
from minidiff_fast.objectives import BetaTimes
from minidiff_fast.shapes import merge_samples

pytest.importorskip("diffusers")
BENCH = Path(__file__).resolve().parents[2] / "bench"
B, S, T, A, C = 3, 9, 16, 7, 48


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference ops: tests/ops and tests/kernels compare the others to them (Triton's interpreter is slow)."""
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")


@pytest.fixture(scope="module")
def heads() -> Iterator[ModuleType]:
    """bench/repeated_heads.py: starVLA's heads, from their interface."""
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("repeated_heads")
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("repeated_heads", None)


def batch(layers: int = 0, state: bool = True, mask: bool = True) -> dict[str, Any]:
    tokens = [torch.randn(B, S, C, requires_grad=True) for _ in range(layers or 1)]
    made: dict[str, Any] = {"vl_embs": tokens if layers else tokens[0], "actions": torch.randn(B, T, A)}
    if state:
        made["state"] = torch.randn(B, 1, 8, requires_grad=True)
    if mask:
        made["encoder_attention_mask"] = torch.arange(S)[None] < torch.tensor([S, 4, 6])[:, None]
    return made


def repeated(x: Any, k: int) -> Any:
    if isinstance(x, list):
        return [repeated(layer, k) for layer in x]
    return None if x is None else x.repeat(k, *[1] * (x.dim() - 1))


def leaves(inputs: dict[str, Any], module: nn.Module) -> list[Tensor]:
    tokens = inputs["vl_embs"]
    found = [*(tokens if isinstance(tokens, list) else [tokens]), *module.parameters()]
    return [*found, inputs["state"]] if "state" in inputs else found


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize(
    ("layerwise", "state", "mask", "position"),
    [(False, True, True, True), (False, False, False, False), (True, True, True, True), (True, True, False, False)],
)
def test_loss_and_gradients_are_those_of_the_repeated_batch(
    heads: ModuleType, k: int, layerwise: bool, state: bool, mask: bool, position: bool
) -> None:
    head = (heads.LayerwiseFlowHead if layerwise else heads.FlowHead)(depth=4, add_pos_embed=position)
    peer = copy.deepcopy(head)
    adapter, inputs = Level2StarVLA(head), batch(4 if layerwise else 0, state, mask)
    assert [name for name, _, _ in adapter.report.replaced] == [f"transformer_blocks.{i}.attn1" for i in (0, 2)]
    drawn = adapter.draw(inputs, k, generator=torch.Generator().manual_seed(0))
    given = heads.Drawn(merge_samples(drawn.noise, "kb"), merge_samples(drawn.timesteps, "kb"))
    wanted = peer(
        repeated(inputs["vl_embs"], k), repeated(inputs["actions"], k), repeated(inputs.get("state"), k),
        repeated(inputs.get("encoder_attention_mask"), k), given,
    )  # fmt: skip
    got = adapter.objective.per_sample(adapter, adapter.encode(drawn.obs), drawn).mean()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(got, leaves(inputs, head), allow_unused=True)
    theirs = torch.autograd.grad(wanted, leaves(inputs, peer), allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_times_are_the_heads(heads: ModuleType) -> None:
    clamped = Level2StarVLA(heads.FlowHead()).process.time_quantile
    assert isinstance(clamped, ClampedTimes) and clamped(torch.ones(1)).item() == 0.0
    free = Level2StarVLA(heads.LayerwiseFlowHead()).process.time_quantile
    assert isinstance(free, BetaTimes) and free(torch.ones(1)).item() < 0.0


def test_the_head_goes_on_working_on_repeated_rows(heads: ModuleType) -> None:
    head, inputs = heads.FlowHead().eval(), batch()
    rows = [repeated(inputs[name], 4) for name in ("vl_embs", "actions", "state", "encoder_attention_mask")]
    given = heads.Drawn(torch.randn(4 * B, T, A), torch.rand(4 * B))
    wanted = head(*rows, given)
    weights = {name: value.clone() for name, value in head.state_dict().items()}
    Level2StarVLA(head)
    torch.testing.assert_close(head(*rows, given), wanted, rtol=1e-5, atol=1e-5)
    assert not head.training and all(torch.equal(value, weights[name]) for name, value in head.state_dict().items())


def test_chunks(heads: ModuleType) -> None:
    adapter, inputs = Level2StarVLA(heads.FlowHead()), batch()
    gradients = []
    for chunk in (None, 2):
        for leaf in leaves(inputs, adapter):
            leaf.grad = None
        adapter.step(inputs, 5, chunk=chunk, generator=torch.Generator().manual_seed(4), timesteps="stratified")
        gradients.append([leaf.grad for leaf in leaves(inputs, adapter)])
    for whole, chunked in zip(*gradients, strict=True):
        assert (whole is None) == (chunked is None)
        if whole is not None:
            torch.testing.assert_close(whole, chunked, rtol=1e-5, atol=1e-6)


def test_nothing_of_the_tokens_is_kept_per_sample(heads: ModuleType) -> None:
    s, k = 640, 6
    adapter, inputs = Level2StarVLA(heads.FlowHead()), batch(mask=False)
    inputs["vl_embs"] = torch.randn(B, s, C, requires_grad=True)
    sizes: list[int] = []

    def pack(saved: Tensor) -> Tensor:
        sizes.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        adapter.loss(inputs, k)
    assert B * s * C in sizes and not {B * k * s * C, B * k * s * 32} & set(sizes)  # tokens, or keys and values


def test_copies(heads: ModuleType) -> None:
    adapter, inputs = Level2StarVLA(heads.FlowHead()), batch()
    inputs = {name: value.detach() for name, value in inputs.items()}
    wanted = adapter.loss(inputs, 3, generator=torch.Generator().manual_seed(1))
    other = Level2StarVLA(heads.FlowHead())
    other.load_state_dict(adapter.state_dict())
    for copied in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter)), other):
        torch.testing.assert_close(copied.loss(inputs, 3, generator=torch.Generator().manual_seed(1)), wanted)


def test_autocast(heads: ModuleType) -> None:
    adapter, inputs = Level2StarVLA(heads.FlowHead()), batch()
    wanted = adapter.loss(inputs, 3, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        lowered = adapter.loss(inputs, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(lowered, wanted, rtol=0.03, atol=0.03)


def test_compile(heads: ModuleType) -> None:
    adapter, inputs = Level2StarVLA(heads.FlowHead()), batch()
    drawn = adapter.draw(inputs, 3, generator=torch.Generator().manual_seed(1))
    noised, cache = drawn.noised_by(adapter.process), adapter.encode(inputs)
    assert noised is not None
    compiled = torch.compile(adapter.denoise, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(cache, noised.x, noised.t), adapter.denoise(cache, noised.x, noised.t))


def test_rows_are_checked(heads: ModuleType) -> None:
    adapter, inputs = Level2StarVLA(heads.FlowHead()), batch()
    for name in ("vl_embs", "state", "encoder_attention_mask"):
        with pytest.raises(
            InvalidArgument, match=rf"{name} must have a row per condition, B = 3, not repeated, got \[12"
        ):
            adapter.loss({**inputs, name: repeated(inputs[name], 4)}, 4)
    with pytest.raises(InvalidArgument, match=r"actions must be \[B, T, A\] = \[B, T, 7\]"):
        adapter.loss({**inputs, "actions": inputs["actions"][..., 1:]}, 4)
    layerwise = Level2StarVLA(heads.LayerwiseFlowHead(depth=4))
    with pytest.raises(InvalidArgument, match="list of 4 tensors, one per layer"):
        layerwise.loss(batch(3), 2)
    with pytest.raises(InvalidArgument, match=r"B = 3, not repeated, got \[6, 9, 48\]"):
        tokens = batch(4)
        tokens["vl_embs"][2] = repeated(tokens["vl_embs"][2], 2)
        layerwise.loss(tokens, 2)


def test_other_heads_are_refused_and_left_as_they_were(heads: ModuleType) -> None:
    def refused(match: str, head: Any) -> None:
        processors = [block.attn1.processor for block in head.model.transformer_blocks]
        modes = [module.training for module in head.modules()]
        with pytest.raises(InvalidArgument, match=match):
            Level2StarVLA(head)
        assert processors == [block.attn1.processor for block in head.model.transformer_blocks]
        assert modes == [module.training for module in head.modules()]

    with pytest.raises(InvalidArgument, match="expected model, action_encoder.*got Linear"):
        Level2StarVLA(nn.Linear(2, 2))

    class Doubled(heads.FlowHead):  # type: ignore[misc, name-defined]
        def forward(
            self, vl_embs: Any, actions: Tensor, state: Any = None, encoder_attention_mask: Any = None
        ) -> Tensor:
            return 2 * super().forward(vl_embs, actions, state, encoder_attention_mask)

    class Padded(heads.FlowHead):  # type: ignore[misc, name-defined]
        def forward(self, vl_embs: Any, actions: Tensor, state: Any = None, action_is_pad: Any = None) -> Tensor:
            return super().forward(vl_embs, actions, state)

    class Late(heads.FlowHead):  # type: ignore[misc, name-defined]
        def sample_time(self, batch_size: int, device: Any, dtype: Any) -> Tensor:
            return 1 - super().sample_time(batch_size, device, dtype)

    refused("Doubled's computes another loss", Doubled())
    refused(r"expected forward\(vl_embs, actions, state, encoder_attention_mask\)", Padded())
    refused("sample_time must give", Late())
    converted = heads.FlowHead()
    Level2StarVLA(converted)
    refused("has been converted before", converted)
    uneven = heads.FlowHead()
    uneven.beta_dist = torch.distributions.Beta(2.0, 3.0)
    refused("one of them 1", uneven)
    unread = heads.FlowHead()
    for block in unread.model.transformer_blocks:
        block.attn1.processor = SimpleNamespace(__call__=None)
    with pytest.raises(TypeError):  # the head's own forward fails: nothing is changed, nothing is hidden
        Level2StarVLA(unread)
