"""The contestants of the attention suite: ours, and what people write with stock PyTorch.

Every contestant turns one :class:`~cases.Inputs` into the output ``[B, K, T, H, D]`` and is differentiable in
q, k, v, own_k and own_v. ``prepare`` runs once per cell and outside the clock; it builds what a training loop
could build once (masks, block masks, compiled functions). Layout changes of the tensors are inside the clock.

Where a kernel wants another head dimension, zeros are appended and sliced off, which is exact.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import harness
import torch
import torch.nn.functional as F
from cases import AttentionCase, Inputs
from merge import merged_attention, segment_bias
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Run = Callable[[Inputs], Tensor]
Reason = str | None

OP = "broadcast_attention"
SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Peer:
    """One contestant, of any suite."""

    name: str
    family: str
    """What ``--peers`` may name to select it together with its siblings."""
    what: str
    """One line for the JSON."""
    supports: Callable[[Any, torch.device, torch.dtype], Reason]
    """None, or why it sits this cell out."""
    prepare: Callable[[Any, Any], Run]
    implementation: Callable[[torch.device, torch.dtype], str]
    """What the name resolves to on this device, for the table."""
    ours: bool = False


# ----------------------------------------------------------------------------------------------- masks, SDPA


def visible_keys(inputs: Inputs) -> Tensor | None:  # [B or 1, T or 1, S] bool
    """Which condition tokens a query sees, or None when it sees all."""
    visible = None
    if inputs.lengths is not None:
        keys = torch.arange(inputs.k.shape[1], device=inputs.k.device)
        visible = (keys < inputs.lengths[:, None])[:, None]
    if inputs.mask is not None:
        visible = inputs.mask[None] if visible is None else visible & inputs.mask
    return visible


def folded_visible_keys(inputs: Inputs) -> Tensor | None:  # [B or 1, 1, K*T or 1, S] bool
    """:func:`visible_keys` for queries whose K sits in the query axis."""
    visible = visible_keys(inputs)
    if visible is not None and visible.shape[1] > 1:
        visible = visible.repeat(1, inputs.q.shape[1], 1)
    return None if visible is None else visible[:, None]


def visible_own(inputs: Inputs) -> Tensor:  # [T, P] bool
    """Which of its own tokens a query sees."""
    assert inputs.own_k is not None
    shape = (inputs.q.shape[2], inputs.own_k.shape[2])
    visible = torch.ones(shape, dtype=torch.bool, device=inputs.q.device)
    return visible.tril() if inputs.own_causal else visible


def sdpa(
    q: Tensor,  # [N, H, Lq, D]
    k: Tensor,  # [N, Hkv, Lk, D]
    v: Tensor,  # [N, Hkv, Lk, D]
    visible: Tensor | None = None,  # broadcasts to [N, H, Lq, Lk], bool
    backend: str | None = None,
) -> Tensor:  # [N, H, Lq, D]
    """SDPA by one named backend, or by PyTorch's own choice; grouped heads as that backend takes them."""
    heads, kv_heads, width = q.shape[1], k.shape[1], q.shape[3]
    scale = width**-0.5
    # The efficient kernel has no grouped heads, and a mask on CUDA rules flash out.
    if heads != kv_heads and (backend == "efficient" or (backend is None and visible is not None)):
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    grouped = k.shape[1] != heads
    pad = -width % 8 if backend in ("efficient", "cudnn") else 0
    if pad:
        q, k, v = (F.pad(x, (0, pad)) for x in (q, k, v))
    if backend is None:
        out = F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=grouped)
    else:
        with sdpa_kernel(SDPA_BACKENDS[backend]):
            out = F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=grouped)
    return out[..., :width] if pad else out


def fold_queries(
    q: Tensor,  # [B, K, T, H, D]
) -> Tensor:  # [B, H, K*T, D], a view
    """K in the query axis."""
    return q.flatten(1, 2).transpose(1, 2)


def unfold_queries(
    out: Tensor,  # [B, H, K*T, D]
    q: Tensor,  # [B, K, T, H, D]
) -> Tensor:  # [B, K, T, H, D]
    """The inverse of :func:`fold_queries`."""
    return out.transpose(1, 2).unflatten(1, q.shape[1:3])


# ----------------------------------------------------------------------------------------- P = 0 contestants


def _prepare_repeat(case: AttentionCase, inputs: Inputs) -> Run:
    visible = visible_keys(inputs)
    if visible is not None:
        if visible.shape[0] > 1:
            visible = visible.repeat_interleave(inputs.q.shape[1], dim=0)
        visible = visible[:, None]

    def run(inputs: Inputs) -> Tensor:
        q, K = inputs.q, inputs.q.shape[1]
        k, v = (x.repeat_interleave(K, dim=0).transpose(1, 2) for x in (inputs.k, inputs.v))
        out = sdpa(q.flatten(0, 1).transpose(1, 2), k, v, visible)
        return out.transpose(1, 2).unflatten(0, q.shape[:2])

    return run


def _prepare_expand(case: AttentionCase, inputs: Inputs) -> Run:
    visible = visible_keys(inputs)
    if visible is not None:
        visible = visible[:, None, None, None]  # [B or 1, K, Hkv, G, T or 1, S]
    group = case.H // case.Hkv

    def run(inputs: Inputs) -> Tensor:
        K = inputs.q.shape[1]
        q = inputs.q.unflatten(3, (case.Hkv, group)).permute(0, 1, 3, 4, 2, 5)

        def view(x: Tensor) -> Tensor:  # [B, S, Hkv, D] -> [B, K, Hkv, G, S, D] without a copy
            return x.transpose(1, 2)[:, None, :, None].expand(-1, K, -1, group, -1, -1)

        out = F.scaled_dot_product_attention(q, view(inputs.k), view(inputs.v), visible)
        return out.permute(0, 1, 4, 2, 3, 5).flatten(3, 4)

    return run


def _prepare_fold(backend: str | None, case: AttentionCase, inputs: Inputs) -> Run:
    visible = folded_visible_keys(inputs)

    def run(inputs: Inputs) -> Tensor:
        k, v = inputs.k.transpose(1, 2), inputs.v.transpose(1, 2)
        return unfold_queries(sdpa(fold_queries(inputs.q), k, v, visible, backend), inputs.q)

    return run


def _prepare_flash_attn(case: AttentionCase, inputs: Inputs) -> Run:
    from flash_attn import flash_attn_varlen_func

    B, K, T = inputs.q.shape[:3]
    S = inputs.k.shape[1]
    device = inputs.q.device
    lengths = torch.full((B,), S, device=device) if inputs.lengths is None else inputs.lengths
    starts_q = torch.arange(B + 1, device=device, dtype=torch.int32) * (K * T)
    starts_k = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    present = (torch.arange(S, device=device) < lengths[:, None]).flatten().nonzero()[:, 0]
    packed = inputs.lengths is not None

    def run(inputs: Inputs) -> Tensor:
        k, v = inputs.k.flatten(0, 1), inputs.v.flatten(0, 1)
        if packed:
            k, v = k.index_select(0, present), v.index_select(0, present)
        out = flash_attn_varlen_func(inputs.q.flatten(0, 2), k, v, starts_q, starts_k, K * T, S)
        return out.unflatten(0, (B, K, T))

    return run


# ----------------------------------------------------------------------------------------- P > 0 contestants


def _prepare_concat(case: AttentionCase, inputs: Inputs) -> Run:
    K, T = inputs.q.shape[1:3]
    shared, mask = visible_keys(inputs), None
    if shared is not None or inputs.own_causal:
        if shared is None:
            shared = torch.ones(1, 1, case.S, dtype=torch.bool, device=inputs.q.device)
        own = visible_own(inputs).expand(shared.shape[0], -1, -1)
        mask = torch.cat([shared.expand(-1, T, -1), own], dim=2)[:, None]
        mask = mask.repeat_interleave(K, dim=0) if mask.shape[0] > 1 else mask

    def run(inputs: Inputs) -> Tensor:
        q = inputs.q

        def join(condition: Tensor, own: Tensor | None) -> Tensor:
            assert own is not None
            repeated = condition.repeat_interleave(K, dim=0)
            return torch.cat([repeated, own.flatten(0, 1)], dim=1).transpose(1, 2)

        k, v = join(inputs.k, inputs.own_k), join(inputs.v, inputs.own_v)
        out = sdpa(q.flatten(0, 1).transpose(1, 2), k, v, mask)
        return out.transpose(1, 2).unflatten(0, q.shape[:2])

    return run


def _joined_keys(
    condition: Tensor,  # [B, S, Hkv, D]
    own: Tensor | None,  # [B, K, P, Hkv, D]
) -> Tensor:  # [B, Hkv, S + K*P, D]
    """Every key of a condition in one sequence: its own tokens and those of all its samples."""
    if own is None:
        return condition.transpose(1, 2)
    return torch.cat([condition, own.flatten(1, 2)], dim=1).transpose(1, 2)


def _prepare_masked(backend: str | None, case: AttentionCase, inputs: Inputs) -> Run:
    K, T = inputs.q.shape[1:3]
    shared = folded_visible_keys(inputs)  # [B or 1, 1, K*T or 1, S]
    if shared is None:
        shared = torch.ones(1, 1, 1, case.S, dtype=torch.bool, device=inputs.q.device)
    same_sample = torch.eye(K, dtype=torch.bool, device=inputs.q.device)
    own = (same_sample[:, None, :, None] & visible_own(inputs)[None, :, None]).reshape(K * T, K * case.P)
    shared = shared.expand(-1, 1, K * T, -1)
    mask = torch.cat([shared, own.expand(shared.shape[0], 1, -1, -1)], dim=3)

    def run(inputs: Inputs) -> Tensor:
        k, v = _joined_keys(inputs.k, inputs.own_k), _joined_keys(inputs.v, inputs.own_v)
        return unfold_queries(sdpa(fold_queries(inputs.q), k, v, mask, backend), inputs.q)

    return run


def _prepare_merge(kernel: str, case: AttentionCase, inputs: Inputs) -> Run:
    bias = segment_bias(folded_visible_keys(inputs), case.H // case.Hkv, kernel, inputs.q.dtype)

    def run(inputs: Inputs) -> Tensor:
        assert inputs.own_k is not None and inputs.own_v is not None
        return merged_attention(
            inputs.q, inputs.k, inputs.v, inputs.own_k, inputs.own_v,
            bias=bias, own_causal=inputs.own_causal, kernel=kernel,
        )  # fmt: skip

    return run


def prepare_flex(case: AttentionCase, inputs: Inputs, *, compiled: bool = True) -> Run:
    """FlexAttention over the sequence of :func:`_joined_keys`; blocks that no row sees are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B, K, T = inputs.q.shape[:3]
    S, P, device = case.S, case.P, inputs.q.device
    lengths, mask, causal = inputs.lengths, inputs.mask, inputs.own_causal

    def mask_mod(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        shared = key < S
        if lengths is not None:
            shared = shared & (key < lengths[b])
        if mask is not None:
            shared = shared & mask[row % T, torch.clamp(key, max=S - 1)]
        if P == 0:
            return shared
        own = (key >= S) & (torch.div(key - S, P, rounding_mode="floor") == row // T)
        if causal:
            own = own & ((key - S) % P <= row % T)
        return shared | own

    block_mask = None
    if P or lengths is not None or mask is not None:
        conditions = None if lengths is None else B
        block_mask = create_block_mask(mask_mod, conditions, None, K * T, S + K * P, device=device)
    function: Callable[..., Any] = flex_attention
    if compiled:
        torch._dynamo.reset()  # every cell is a new static shape: stay clear of the recompile limit
        function = torch.compile(flex_attention, dynamic=False)
    pad = max(0, 16 - case.D)
    grouped = case.Hkv < case.H

    def run(inputs: Inputs) -> Tensor:
        k, v = _joined_keys(inputs.k, inputs.own_k), _joined_keys(inputs.v, inputs.own_v)
        q = fold_queries(inputs.q)
        if pad:
            q, k, v = (F.pad(x, (0, pad)) for x in (q, k, v))
        out = function(q, k, v, block_mask=block_mask, scale=case.D**-0.5, enable_gqa=grouped)
        return unfold_queries(out[..., : case.D], inputs.q)

    return run


# ------------------------------------------------------------------------------------------------------ ours


def resolved_implementation(impl: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation of attention that ``impl`` runs as."""
    return harness.resolved_implementation(OP, impl, device, dtype)


def why_not_ours(impl: str | None, case: AttentionCase, device: torch.device, dtype: torch.dtype) -> Reason:
    """See :func:`harness.why_not_ours`."""
    return harness.why_not_ours(OP, impl, device, dtype)


def _prepare_ours(impl: str | None, case: AttentionCase, inputs: Inputs) -> Run:
    from minidiff_fast.ops import broadcast_attention

    def run(inputs: Inputs) -> Tensor:
        out = broadcast_attention(
            inputs.q, inputs.k, inputs.v, inputs.own_k, inputs.own_v,
            lengths=inputs.lengths, mask=inputs.mask, own_causal=inputs.own_causal, impl=impl,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    return run


# ------------------------------------------------------------------------------------------------- the table


def _no_own(case: AttentionCase, device: torch.device, dtype: torch.dtype) -> Reason:
    return f"has no place for own tokens (P = {case.P})" if case.P else None


def _only_own(case: AttentionCase, device: torch.device, dtype: torch.dtype) -> Reason:
    return None if case.P else "differs from repeat and fold only with own tokens (P = 0 here)"


def _why_not_backend(backend: str, case: AttentionCase, device: torch.device, dtype: torch.dtype) -> Reason:
    if device.type != "cuda":
        return f"the {backend} backend is for CUDA"
    if backend in ("flash", "cudnn") and dtype not in (torch.float16, torch.bfloat16):
        return f"the {backend} backend takes float16 and bfloat16 only"
    if backend == "flash" and (case.min_length is not None or case.memory_mask):
        return "the flash backend takes no mask (this case has padded lengths or a memory mask)"
    return None


def _sdpa_peer(family: str, backend: str, what: str) -> Peer:
    rule, prepare = {
        "fold": (_no_own, _prepare_fold),
        "masked": (_only_own, _prepare_masked),
        "merge": (_only_own, _prepare_merge),
    }[family]

    def supports(case: AttentionCase, device: torch.device, dtype: torch.dtype) -> Reason:
        return rule(case, device, dtype) or _why_not_backend(backend, case, device, dtype)

    return Peer(f"{family}-{backend}", family, what, supports, partial(prepare, backend), lambda *_: f"sdpa {backend}")


def _why_not_flex(case: AttentionCase, device: torch.device, dtype: torch.dtype) -> Reason:
    return None if device.type == "cuda" else "FlexAttention has no backward on the CPU"


def _why_not_flash_attn(case: AttentionCase, device: torch.device, dtype: torch.dtype) -> Reason:
    if case.P or case.memory_mask:
        return "varlen flash-attn has neither own tokens nor a [T, S] mask"
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return "flash-attn runs on CUDA in float16 and bfloat16 only"
    return None if importlib.util.find_spec("flash_attn") else "flash_attn is not installed"


def _ours(impl: str | None) -> Peer:
    return Peer(
        name="ours" if impl is None else f"ours-{impl}",
        family="ours",
        what=f"minidiff_fast.ops.broadcast_attention(impl={impl or 'auto'!r})",
        supports=partial(why_not_ours, impl),
        prepare=partial(_prepare_ours, impl),
        implementation=partial(resolved_implementation, impl),
        ours=True,
    )


def _stock(name: str, what: str, rule: Callable[..., Reason], prepare: Callable[..., Run]) -> Peer:
    return Peer(name, name, what, rule, prepare, lambda *_: "sdpa")


def contestants(device: torch.device) -> list[Peer]:
    """Everyone who may run on this kind of device, ours first."""
    peers = [_ours(impl) for impl in (None, "native", "triton", "reference")]
    peers.append(_stock("repeat", "repeat_interleave + SDPA", _no_own, _prepare_repeat))
    peers.append(_stock("expand", "expanded 5-d views + SDPA", _no_own, _prepare_expand))
    peers.append(_stock("concat", "repeat the condition, concatenate own keys, SDPA + mask",
                        _only_own, _prepare_concat))  # fmt: skip
    if device.type == "cuda":
        for backend in SDPA_BACKENDS:
            peers.append(_sdpa_peer("fold", backend, f"K in the query axis + SDPA ({backend})"))
        for backend in ("flash", "efficient"):
            peers.append(_sdpa_peer("merge", backend, f"two {backend} calls joined by log-sum-exp"))
        for backend in ("efficient", "cudnn"):
            peers.append(_sdpa_peer("masked", backend, f"one sequence + dense mask + SDPA ({backend})"))
        peers.append(Peer("flash-attn", "flash-attn", "flash-attn 2, varlen, K in the query axis",
                          _why_not_flash_attn, _prepare_flash_attn, lambda *_: "flash-attn"))  # fmt: skip
    else:
        peers.append(_stock("fold", "K in the query axis + SDPA", _no_own,
                            partial(_prepare_fold, None)))  # fmt: skip
        peers.append(_stock("merge", "two SDPA calls joined by log-sum-exp", _only_own,
                            partial(_prepare_merge, "cpu")))  # fmt: skip
        peers.append(_stock("masked", "one sequence + dense mask + SDPA", _only_own,
                            partial(_prepare_masked, None)))  # fmt: skip
    peers.append(Peer("flex", "flex", "FlexAttention, block mask, compiled", _why_not_flex, prepare_flex,
                      lambda *_: "flex"))  # fmt: skip
    return peers
