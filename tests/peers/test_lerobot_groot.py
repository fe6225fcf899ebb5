"""Level2GR00THead and Level2GR00T against lerobot's GR00TN17ActionHead and GrootPolicy, the real ones."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations.diffusers import apply_broadcast_attention
from minidiff_fast.integrations.lerobot import level2
from minidiff_fast.integrations.lerobot.groot import Level2GR00T, Level2GR00THead
from minidiff_fast.level2 import Level2Batch
from minidiff_fast.shapes import Layout, merge_samples

B, K, T, A, S, C, STATE = 3, 5, 6, 4, 7, 12, 3


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user's CPU runs: not Triton's interpreter, which is slow."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture
def head(lerobot: Callable[[str], Any]) -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        module = lerobot("policies.groot.groot_n1_7")
        transformer = {
            "positional_embeddings": None, "num_layers": 5, "num_attention_heads": 2, "attention_head_dim": 8,
            "norm_type": "ada_norm", "dropout": 0.0, "final_dropout": True, "output_dim": 10,
            "interleave_self_attention": True,
        }  # fmt: skip
        own = {"positional_embeddings": None, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": C // 2}
        sizes: dict[str, Any] = {"max_state_dim": STATE, "max_action_dim": A, "action_horizon": T, "hidden_size": 10}
        sizes |= {"backbone_embedding_dim": C, "input_embedding_dim": 16, "max_num_embodiments": 4, "max_seq_len": 20}
        sizes |= {"vl_self_attention_cfg": {**own, "dropout": 0.0}, "diffusion_model_cfg": transformer, **changes}
        torch.manual_seed(0)
        return module.GR00TN17ActionHead(module.GR00TN17Config(**sizes)).eval()

    return make


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    tokens = torch.arange(S)[None]
    return {
        "backbone_features": torch.randn(B, S, C),
        "backbone_attention_mask": tokens < torch.tensor([7, 5, 6])[:, None],
        "image_mask": (tokens < torch.tensor([2, 4, 3])[:, None]) & (tokens > 0),
        "state": torch.randn(B, 1, STATE),
        "embodiment_id": torch.tensor([2, 0, 2]),
        "action": torch.randn(B, T, A),
        "action_mask": (torch.rand(B, T, A) < 0.7).float(),
    }


@contextmanager
def drawing(noise: Tensor, times: Tensor) -> Iterator[None]:
    """torch draws these in place of its own; times as the head's sample_time gives them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_, **__: noise)
        patch.setattr(torch.distributions.Beta, "sample", lambda *_: 1 - times / 0.999)
        yield


def peer_loss(head: Any, values: dict[str, Tensor], drawn: Level2Batch, layout: Layout) -> Tensor:
    from transformers.feature_extraction_utils import BatchFeature

    rows = {
        name: merge_samples(x[:, None].expand(-1, drawn.samples, *x.shape[1:]), layout) for name, x in values.items()
    }
    with drawing(merge_samples(drawn.noise, layout), merge_samples(drawn.timesteps, layout)):
        loss: Tensor = head(BatchFeature(dict(rows)), BatchFeature(dict(rows)))["loss"]
    return loss


def gradients(model: nn.Module, loss: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
    found = dict(model.named_parameters()) | {f"input {i}": x for i, x in enumerate(inputs)}
    grads = torch.autograd.grad(loss, list(found.values()), allow_unused=True)
    return {name: g for name, g in zip(found, grads, strict=True) if g is not None}


def seeded(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn_by(adapter: Any, values: Any, k: int) -> Level2Batch:
    """Times in the middle of the steps, whose borders s (1 - u) and back might cross."""
    drawn = adapter.draw(values, k, generator=seeded())
    return replace(drawn, timesteps=((drawn.timesteps * 1000).floor() + 0.5) / 1000)


def our_loss(adapter: Any, drawn: Level2Batch) -> Tensor:
    return adapter.objective.per_sample(adapter, adapter.encode(drawn.obs), drawn).mean()


@pytest.mark.parametrize("kind", [{}, {"use_alternate_vl_dit": False, "add_pos_embed": False, "use_vlln": False}])
@pytest.mark.parametrize(("k", "layout"), [(1, "bk"), (K, "bk"), (K, "kb")])
def test_loss_and_gradients_are_the_peers(head: Any, kind: dict[str, Any], k: int, layout: Layout) -> None:
    peer, values = head(**kind), batch()
    tokens, state = values["backbone_features"].requires_grad_(), values["state"].requires_grad_()
    adapter = Level2GR00THead(copy.deepcopy(peer))
    drawn = drawn_by(adapter, values, k)
    wanted, loss = peer_loss(peer, values, drawn, layout), our_loss(adapter, drawn)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    expected = gradients(peer, wanted, tokens, state)
    assert len(expected) > 70
    torch.testing.assert_close(gradients(adapter.head, loss, tokens, state), expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("layout", ["bk", "kb"])
def test_transformer_takes_unrepeated_memory_in_both_layouts(head: Any, layout: Layout) -> None:
    peer, values = head().double().model, batch()
    converted = copy.deepcopy(peer)
    report = apply_broadcast_attention(converted, layout=layout)
    assert len(report.replaced) == 3 and len(report.left) == 2
    x, memory = torch.randn(B * K, 4, 16, dtype=torch.float64), values["backbone_features"].double()
    masks = {name: values[name] for name in ("image_mask", "backbone_attention_mask")}
    rows, *repeated = (
        merge_samples(tensor[:, None].expand(-1, K, *tensor.shape[1:]), layout) for tensor in (memory, *masks.values())
    )
    t = torch.arange(B * K)
    wanted = peer(x, rows, t, **dict(zip(masks, repeated, strict=True)))
    torch.testing.assert_close(converted(x, memory, t, **masks), wanted, rtol=1e-9, atol=1e-9)


def test_masked_tokens_are_not_seen(head: Any) -> None:
    adapter, values = Level2GR00THead(head(vl_self_attention_cfg=None)), batch()
    drawn = drawn_by(adapter, values, K)
    wanted = our_loss(adapter, drawn)
    changed = values["backbone_features"].clone()
    changed[~values["backbone_attention_mask"]] = 9.0
    torch.testing.assert_close(our_loss(adapter, replace(drawn, obs={**values, "backbone_features": changed})), wanted)


def test_times_are_distributed_as_the_peers(head: Any) -> None:
    peer = head()
    process = Level2GR00THead(peer).objective.process
    times = process.draw(torch.zeros(200, T, A), 256, seed=torch.tensor([3])).timesteps.flatten()
    torch.manual_seed(0)
    theirs = peer.sample_time(times.numel(), times.device, times.dtype)
    at = torch.linspace(0.05, 0.95, 7)
    torch.testing.assert_close(times.quantile(at), theirs.quantile(at), rtol=0, atol=0.01)


def test_chunked_steps_encode_once(head: Any) -> None:
    adapter, values = Level2GR00THead(head()), batch()
    wanted = gradients(adapter.head, adapter.loss(values, K, generator=seeded()))
    calls: list[str] = []
    for name in ("state_encoder", "vlln", "vl_self_attention"):
        getattr(adapter.head, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    adapter.step(values, K, chunk=2, generator=seeded())
    assert sorted(calls) == ["state_encoder", "vl_self_attention", "vlln"]
    found = {name: p.grad for name, p in adapter.head.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6)


def test_states_are_dropped_per_sample_in_training(head: Any) -> None:
    adapter, values = Level2GR00THead(head(state_dropout_prob=0.5)), batch()
    states: list[Tensor] = []
    adapter.head.model.register_forward_pre_hook(
        lambda _, __, kwargs: states.append(kwargs["hidden_states"][:, 0].detach()), with_kwargs=True
    )
    adapter.train()
    torch.manual_seed(0)
    assert adapter.loss(values, 64, generator=seeded()).isfinite()
    dropped = (states[0] == 0).all(-1).view(B, 64).float().mean(1)
    assert ((dropped > 0.25) & (dropped < 0.75)).all()
    adapter.eval()
    adapter.loss(values, 64)
    assert not (states[1] == 0).all(-1).any()


def test_frozen_modules_stay_in_eval_mode(head: Any) -> None:
    adapter, values = Level2GR00THead(head(tune_projector=False)), batch()
    adapter.train()
    adapter.loss(values, 2)
    assert not adapter.head.state_encoder.training and adapter.head.model.training


def test_the_head_still_acts_and_reverts(head: Any) -> None:
    from transformers.feature_extraction_utils import BatchFeature

    peer, values = head(), batch()
    inputs = {name: x for name, x in values.items() if not name.startswith("action")}

    def act() -> Tensor:
        torch.manual_seed(5)
        return peer.get_action(BatchFeature(dict(inputs)), BatchFeature(dict(inputs)))["action_pred"]

    before, processors = act(), [block.attn1.processor for block in peer.model.transformer_blocks]
    adapter = Level2GR00THead(peer)
    torch.testing.assert_close(act(), before, rtol=0, atol=1e-6)
    adapter.revert()
    assert [block.attn1.processor for block in peer.model.transformer_blocks] == processors
    torch.testing.assert_close(act(), before, rtol=0, atol=0)


def test_copies_and_checkpoints(head: Any) -> None:
    adapter, values = Level2GR00THead(head()), batch()
    wanted = adapter.loss(values, 2, generator=seeded())
    other = Level2GR00THead(head())
    nn.init.normal_(other.head.position_embedding.weight)
    other.load_state_dict(adapter.state_dict())
    assert {name.removeprefix("head.") for name in adapter.state_dict()} == set(head().state_dict())
    for same in (other, copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        torch.testing.assert_close(same.loss(values, 2, generator=seeded()), wanted, rtol=0, atol=0)


def test_denoise_compiles_in_one_graph(head: Any) -> None:
    adapter, values = Level2GR00THead(head()), batch()
    wanted = gradients(adapter.head, adapter.loss(values, K, generator=seeded()))
    compiled: Any = torch.compile(adapter, backend="eager", fullgraph=True)
    adapter.step(values, K, wrapped=compiled, generator=seeded())
    found = {name: p.grad for name, p in adapter.head.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6)


def test_bad_input(head: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"must be GR00TN17ActionHead as in lerobot 0\.6, with head\.config\.noi"):
        Level2GR00THead(nn.Linear(1, 1))
    with pytest.raises(InvalidArgument, match="one of them 1"):
        Level2GR00THead(head(noise_beta_beta=2.0))
    adapter, values = Level2GR00THead(head()), batch()
    with pytest.raises(InvalidArgument, match=r"action_mask must be \[B, T, A\] = \[3, 6, 4\], got \[3, 6\]"):
        adapter.loss({**values, "action_mask": values["action_mask"][..., 0]}, 2)
    with pytest.raises(InvalidArgument, match=r"state must be .* = \[B, 1, Ds\], got \[3, 2, 3\]"):
        adapter.loss({**values, "state": torch.randn(B, 2, STATE)}, 2)


# -------------------------------------------------------------------- the policy, on a stand-in for the backbone


class Backbone(nn.Module):
    """Token ids to what Qwen3Backbone returns."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, C)
        self.seen = 0

    def prepare_input(self, inputs: dict[str, Any]) -> Any:
        from transformers.feature_extraction_utils import BatchFeature

        return BatchFeature(data=inputs)

    def forward(self, inputs: Any) -> Any:
        from transformers.feature_extraction_utils import BatchFeature

        self.seen += 1
        features, ids = self.embedding(inputs["input_ids"]), inputs["input_ids"]
        masks = {"backbone_attention_mask": inputs["attention_mask"] == 1, "image_mask": ids < 10}
        return BatchFeature(data={"backbone_features": features, **masks})


@pytest.fixture
def policy(lerobot: Callable[[str], Any], head: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    module = lerobot("policies.groot.groot_n1_7")
    monkeypatch.setattr(
        module,
        "tree",
        SimpleNamespace(map_structure=lambda f, x: type(x)({k: pytree.tree_map(f, v) for k, v in x.items()})),
    )
    monkeypatch.setattr(module, "require_package", lambda *_, **__: None)

    def make(bf16: bool = False) -> Any:
        made, model = (
            object.__new__(kind) for kind in (lerobot("policies.groot.modeling_groot").GrootPolicy, module.GR00TN17)
        )
        nn.Module.__init__(made)
        nn.Module.__init__(model)
        model.action_head = head()
        model.config, model.backbone = model.action_head.config, Backbone()
        made.config, made._groot_model = SimpleNamespace(use_bf16=bf16), model
        return made.eval()

    return make


def observed() -> dict[str, Any]:
    values = batch()
    ids = torch.randint(0, 20, (B, S), generator=torch.Generator().manual_seed(4))
    kept = {name: values[name] for name in ("state", "embodiment_id", "action", "action_mask")}
    return {
        **kept,
        "input_ids": ids,
        "attention_mask": values["backbone_attention_mask"].long(),
        "task": ["a", "b", "c"],
    }


@pytest.mark.parametrize("k", [1, K])
def test_policy_loss_and_gradients_are_the_peers(policy: Any, k: int) -> None:
    peer, values = policy(), observed()
    reference = copy.deepcopy(peer)
    adapter = level2(peer)
    assert isinstance(adapter, Level2GR00T)
    rows = {name: x.repeat_interleave(k, 0) for name, x in values.items() if isinstance(x, Tensor)}
    drawn = adapter.draw(values, k, generator=seeded())
    with drawing(drawn.noise.flatten(0, 1), drawn.timesteps.flatten()):
        wanted = reference.forward(rows)[0]
    adapter.step(values, k, chunk=2, generator=seeded())
    assert peer._groot_model.backbone.seen == 1
    torch.testing.assert_close(our_loss(adapter, drawn), wanted, rtol=1e-5, atol=1e-6)
    found = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    assert "_groot_model.backbone.embedding.weight" in found
    torch.testing.assert_close(found, gradients(reference, wanted), rtol=1e-4, atol=5e-6)


def test_the_policys_mode_is_the_adapters(policy: Any, head: Any) -> None:
    for wrap, peer in ((level2, policy()), (Level2GR00THead, head())):
        assert not wrap(peer).training and wrap(peer.train()).training


def test_policy_runs_in_bfloat16(policy: Any) -> None:
    adapter, values = level2(policy(bf16=True)), observed()
    cache = adapter.encode(values)
    assert cache.state.dtype in (torch.bfloat16, torch.float32)
    wanted = level2(policy()).loss(values, K, generator=seeded())
    torch.testing.assert_close(adapter.loss(values, K, generator=seeded()), wanted, rtol=0.05, atol=0.01)
    with pytest.raises(InvalidArgument, match="batch must hold 'action'"):
        adapter.loss({name: x for name, x in values.items() if name != "action"}, 2)
