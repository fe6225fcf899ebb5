"""lerobot's vla_jepa head on rows that are not repeated, in layout "kb", against its own loss on repeated rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations.diffusers import apply_broadcast_attention
from minidiff_fast.integrations.repeat import RepeatedSteps
from minidiff_fast.level2 import Level2Batch
from minidiff_fast.objectives import BetaTimes, DenoisingLoss, FlowMatching
from minidiff_fast.shapes import merge_samples

B, S, T, A, MEMORY, STATES = 3, 11, 7, 5, 24, 8
CONFIG = SimpleNamespace(
    action_model_type="DiT-test", action_num_heads=2, action_attention_head_dim=8, action_hidden_size=20,
    action_num_layers=4, action_dropout=0.1, action_dim=A, state_dim=STATES, chunk_size=T, num_inference_timesteps=4,
    num_embodied_action_tokens_per_instruction=6, num_action_tokens_per_timestep=2, action_num_timestep_buckets=1000,
    action_noise_beta_alpha=1.5, action_noise_beta_beta=1.0, action_noise_s=0.999,
)  # fmt: skip
PROCESS = FlowMatching(noise_at=0, time_quantile=BetaTimes(1.5, start=1.0, stop=-0.001 / 0.999))


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference ops: tests/ops and tests/kernels compare the others to them (Triton's interpreter is slow)."""
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")


def made(lerobot: Callable[[str], Any]) -> Any:
    return lerobot("policies.vla_jepa.action_head").VLAJEPAActionHead(CONFIG, cross_attention_dim=MEMORY)


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {
        "tokens": torch.randn(B, S, MEMORY, dtype=dtype, requires_grad=True),
        "state": torch.randn(B, STATES, dtype=dtype, requires_grad=True),
        "actions": torch.randn(B, T, A, dtype=dtype),
        "pad": torch.arange(T)[None] >= torch.tensor([T, 4, 2])[:, None],
    }


def level2_loss(head: Any, steps: RepeatedSteps, rows: Any, batch: dict[str, Tensor]) -> Tensor:
    """The head's forward on B conditions and the N rows of ``rows``."""
    t = rows.t.long()
    features = head.action_encoder(rows.x, t) + head.position_embedding.weight[: rows.x.shape[1]]
    future = head.future_tokens.weight.expand(len(batch["state"]), -1, -1)
    shared = torch.cat([head.state_encoder(batch["state"][:, None]), future], 1)
    out = head.model(hidden_states=steps.prepend(shared, features), encoder_hidden_states=batch["tokens"], timestep=t)
    return steps.loss(head.action_decoder(out[:, -rows.x.shape[1] :]), rows, mask=~batch["pad"])


def peer_loss(
    head: Any, monkeypatch: pytest.MonkeyPatch, drawn: Level2Batch, batch: dict[str, Tensor], k: int
) -> Tensor:
    """The head's own loss on repeated rows, given our noise and times."""
    noise, times = merge_samples(drawn.noise, "kb"), merge_samples(drawn.timesteps, "kb")
    with monkeypatch.context() as patched:
        patched.setattr(torch, "randn_like", lambda x: noise.to(x))
        patched.setattr(head, "sample_time", lambda n, device, dtype: times)
        return head(
            batch["tokens"].repeat(k, 1, 1), batch["actions"].repeat(k, 1, 1), batch["state"].repeat(k, 1),
            batch["pad"].repeat(k, 1),
        )  # fmt: skip


@pytest.mark.parametrize("k", [1, 5])
def test_vla_jepa_head_in_layout_kb(lerobot: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    """float64 but for the noised actions, which are float32: hence 2e-6."""
    head = made(lerobot).double().eval()
    batch, steps = inputs(), RepeatedSteps(PROCESS, k)
    drawn = Level2Batch.draw(
        None, batch["actions"], k, DenoisingLoss(PROCESS), generator=torch.Generator().manual_seed(0)
    )
    converted = copy.deepcopy(head)
    report = apply_broadcast_attention(converted.model, layout="kb")
    assert report.replaced
    parameters = [batch["tokens"], batch["state"]]
    wanted = peer_loss(head, monkeypatch, drawn, batch, k)
    got = level2_loss(converted, steps, steps.rows(drawn), batch)
    torch.testing.assert_close(got, wanted, rtol=2e-6, atol=2e-6)
    wanted_gradients = torch.autograd.grad(wanted, [*parameters, *head.parameters()], allow_unused=True)
    gradients = torch.autograd.grad(got, [*parameters, *converted.parameters()], allow_unused=True)
    names = ["tokens", "state", *(name for name, _ in head.named_parameters())]
    for name, ours, theirs in zip(names, gradients, wanted_gradients, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_other_layout_is_another_result(lerobot: Callable[[str], Any]) -> None:
    """Rows "kb" read through attention converted for "bk": samples meet other scenes, and the loss says so."""
    head, batch, k = made(lerobot).eval(), inputs(torch.float32), 5
    losses = {}
    for layout in ("kb", "bk"):
        converted = copy.deepcopy(head)
        apply_broadcast_attention(converted.model, layout=layout)
        steps = RepeatedSteps(PROCESS, k)
        rows = steps.draw(batch["actions"], generator=torch.Generator().manual_seed(0))
        losses[layout] = level2_loss(converted, steps, rows, batch).item()
    assert abs(losses["kb"] - losses["bk"]) > 1e-4


def test_dropout_stratified_times_and_bad_rows(lerobot: Callable[[str], Any]) -> None:
    head, batch = made(lerobot).train(), inputs(torch.float32)
    apply_broadcast_attention(head.model, layout="kb")
    steps = RepeatedSteps(PROCESS, 4, timesteps="stratified", noise="antithetic")
    level2_loss(head, steps, steps.draw(batch["actions"]), batch).backward()
    assert batch["tokens"].grad is not None and bool(batch["tokens"].grad.isfinite().all())
    assert all(p.grad is not None for p in head.state_encoder.parameters())
    with pytest.raises(InvalidArgument, match="N = 12 rows for B = 5 conditions"):
        rows, tokens = steps.draw(batch["actions"]), torch.randn(5, S, MEMORY)
        level2_loss(head, steps, rows, {**batch, "tokens": tokens})


def test_weights_are_the_peers(lerobot: Callable[[str], Any]) -> None:
    head: nn.Module = made(lerobot)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    report = apply_broadcast_attention(head, layout="kb")
    after = head.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())
    report.revert()
