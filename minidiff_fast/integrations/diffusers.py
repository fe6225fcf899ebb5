"""diffusers' ``Attention`` on conditions that are not repeated: an attention processor, and what puts it in place.

The memory of B conditions goes to a model beside N = B * K noised samples as it is, ``[B, S, C]``: its keys and values
are projected once per condition, and once per condition they stay, forward and backward.

>>> report = apply_broadcast_attention(model)                          # doctest: +SKIP
>>> model(samples, encoder_hidden_states=memory, timestep=t)           # [B * K, T, C], [B, S, C], [B * K]
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidiff_fast.backend import IMPLS
from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations._diffusers_attention import NAME, Heads, attend, normed, readable_mask
from minidiff_fast.integrations._diffusers_reasons import LIKE, Arithmetic, reshaped_around, summary, why_not
from minidiff_fast.integrations.report import ConversionReport, Left, Replaced
from minidiff_fast.shapes import Layout, check_layout, merge_samples, samples_per_condition, split_samples


class BroadcastAttnProcessor:
    r"""Processor for diffusers' ``Attention`` that takes the memory of B conditions for the rows of B * K samples.

    .. math::
        out_{bk} = W_o \, \mathrm{concat}_h \, \mathrm{softmax}(scale \cdot q_{bkh} k_{bh}^T + mask_b) v_{bh} + b_o,
        \quad q = W_q x_{bk},\; k = W_k m_b,\; v = W_v m_b

    What the modules of ``Attention`` do stays as it is and in its order: ``spatial_norm``, ``group_norm``,
    ``norm_cross``, ``norm_q`` and ``norm_k`` (per head, or across heads where they are that wide), ``to_out`` with its
    dropout, ``residual_connection``, ``rescale_output_factor``; weights are read from them at every call, LoRA layers
    included. With ``kv_heads`` query head h reads key head ``h // (heads / kv_heads)``. Logits and softmax are float32
    at least (what ``upcast_attention`` and ``upcast_softmax`` ask for), except under biases, where torch's attention
    decides.

    Where nothing is shared, each row attends for itself in torch's attention, as the peer does it: without
    ``encoder_hidden_states`` (self-attention), and at K = 1 unless ``impl`` names an implementation.

    Args:
        layout: "bk" (row b * K + k) or "kb" (row k * B + b) of ``hidden_states``.
        impl: implementation of ``broadcast_attention``; None chooses by device.
        like: the class name of the diffusers processor whose arithmetic is kept, one of ``AttnProcessor``,
            ``SlicedAttnProcessor`` (``attn.scale``, no norm of q and k), ``AttnProcessor2_0`` (1 / sqrt(D)),
            ``AttnAddedKVProcessor`` (as the first) and ``AttnAddedKVProcessor2_0``. Those with added keys and values
            take ``[N, C, ...]`` and always add the residual; the samples' own keys and values join the condition's
            in one softmax, unless ``only_cross_attention``. None reads it from the module: added projections where it
            has them, its ``scale``, its norms.

    Raises :class:`InvalidArgument` for an unknown layout, impl or like.

    Source: Mini-Diffuser (Hu et al., arXiv 2505.09430); the interface is that of diffusers.
    """

    def __init__(self, *, layout: Layout = "bk", impl: str | None = None, like: str | None = None) -> None:
        check_layout(NAME, layout)
        if impl is not None and impl not in IMPLS:
            raise InvalidArgument(f"{NAME}: impl must be one of {', '.join(IMPLS)}, got {impl!r}")
        if like is not None and like not in LIKE:
            raise InvalidArgument(f"{NAME}: like must be None or one of {', '.join(LIKE)}, got {like!r}")
        self.layout = layout
        self.impl = impl
        self.like = like
        self._kept: dict[int, _Kept] | None = None

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,  # [N, T, C] or [N, C, height, width]; [N, C, ...] with added keys and values
        encoder_hidden_states: Tensor | None = None,  # [B, S, Cm], N = B * K
        attention_mask: Tensor | None = None,  # [B, S], [B, 1 or T, S], [B, 1, 1 or T, S] or [B * heads, 1 or T, S]
        temb: Tensor | None = None,  # [N, ...], for spatial_norm
        scale: float | None = None,
        ip_adapter_masks: Any = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:  # as hidden_states
        """Attend.

        A boolean or integer mask says which tokens may be seen (not 0); a query that sees none gets 0 from attention
        (where nothing is shared: what torch gives). A floating-point mask is added to the logits, as diffusers makes it
        of a boolean one. There is one row per condition; ``[B * heads, ...]`` is what
        ``Attention.prepare_attention_mask`` makes. With added keys and values the mask is about the condition's tokens.
        Masks per head and biases run in torch's attention with the samples folded into its query axis; biases per
        query, or beside added keys, keep the weights for the backward pass.

        Memory of N rows (a model that repeats it, or K = 1) is each row's own.

        Raises:
            InvalidArgument: shapes that do not fit, N not a multiple of B, a mask per sample, a head dimension outside
                8 to 256, or one of ``scale`` (other than 1), ``ip_adapter_masks`` and ``image_rotary_emb``, which plain
                attention has not. (Names that are not in this signature ``Attention.forward`` drops with a warning,
                before they come here.)
        """
        _refuse_extras(scale, ip_adapter_masks, image_rotary_emb)
        peer: Any = attn
        arithmetic = self._arithmetic(peer)
        residual = hidden_states
        if peer.spatial_norm is not None and not arithmetic.added:
            hidden_states = peer.spatial_norm(hidden_states, temb)
        channels_first = arithmetic.added or hidden_states.dim() == 4
        if hidden_states.dim() < 3 or (hidden_states.dim() != 3 and not channels_first):
            raise InvalidArgument(
                f"{NAME}: hidden_states must be [N, T, C] or [N, C, height, width], got {list(hidden_states.shape)}"
            )
        x = hidden_states.flatten(2).transpose(1, 2) if channels_first else hidden_states  # [N, T, C]
        memory = encoder_hidden_states
        if memory is None and arithmetic.added:
            memory = x
        if peer.group_norm is not None:
            x = peer.group_norm(x.transpose(1, 2)).transpose(1, 2)
        memory = x if memory is None else memory
        samples = _samples(x, memory)

        k, v = self._shared(peer, memory, arithmetic, given=encoder_hidden_states is not None)
        heads = self._heads(peer, x, k, v, arithmetic)
        mask = attention_mask
        if mask is not None:
            mask = readable_mask(mask, memory.shape[0], samples, x.shape[1], memory.shape[1], peer.heads)
        out = attend(
            heads, mask, peer.norm_q if arithmetic.qk_norm else None,
            peer.scale if arithmetic.own_scale else heads.q.shape[-1] ** -0.5,
            self.impl, per_sample=encoder_hidden_states is None or (samples == 1 and self.impl is None),
        )  # fmt: skip
        out = peer.to_out[1](peer.to_out[0](merge_samples(out.flatten(-2), self.layout)))
        if channels_first:
            out = out.transpose(-1, -2).reshape(residual.shape)
        if arithmetic.added:
            return out + residual
        if peer.residual_connection:
            out = out + residual
        return out / peer.rescale_output_factor

    def _arithmetic(self, attn: Any) -> Arithmetic:
        if self.like is not None:
            return LIKE[self.like]
        added = attn.added_kv_proj_dim is not None
        return Arithmetic(added=added, own_scale=True, qk_norm=not added)

    def _shared(
        self, attn: Any, memory: Tensor, arithmetic: Arithmetic, given: bool
    ) -> tuple[Tensor, Tensor]:  # [B, S, Hkv, D] each
        """Keys and values of the memory, or those that :func:`cached_condition` keeps."""
        if self._kept is None or not given or torch.compiler.is_compiling() or not _plain(attn):
            return _projected(attn, memory, arithmetic, norm_memory=given)
        return _kept(self._kept, attn, memory, arithmetic)

    def _heads(self, attn: Any, x: Tensor, k: Tensor, v: Tensor, arithmetic: Arithmetic) -> Heads:
        """Queries ``[N, T, C]`` -> ``[B, K, T, H, D]``, and the samples' own keys and values where they have some."""
        batch = k.shape[0]
        q = split_samples(attn.to_q(x).unflatten(-1, (attn.heads, -1)), batch, self.layout)
        if not arithmetic.added or attn.only_cross_attention:
            return Heads(q, k, v)
        own_k, own_v = (
            split_samples(project(x).unflatten(-1, k.shape[2:]), batch, self.layout)
            for project in (attn.to_k, attn.to_v)
        )
        return Heads(q, k, v, own_k, own_v)

    def __getstate__(self) -> dict[str, Any]:
        """What is kept for a while belongs to the module that it was computed with."""
        return {**self.__dict__, "_kept": None}

    def __repr__(self) -> str:
        return f"{NAME}(layout={self.layout!r}, impl={self.impl!r}, like={self.like!r})"


def _refuse_extras(scale: float | None, ip_adapter_masks: Any, image_rotary_emb: Any) -> None:
    given = {"scale": None if scale == 1.0 else scale}
    given |= {"ip_adapter_masks": ip_adapter_masks, "image_rotary_emb": image_rotary_emb}
    named = [name for name, value in given.items() if value is not None]
    if named:
        raise InvalidArgument(f"{NAME}: cross_attention_kwargs: plain attention has no {', '.join(named)}")


def _samples(x: Tensor, memory: Tensor) -> int:
    """K."""
    if memory.dim() != 3:
        raise InvalidArgument(f"{NAME}: encoder_hidden_states must be [B, S, C], got {list(memory.shape)}")
    return samples_per_condition(NAME, x.shape[0], memory.shape[0])


def _projected(attn: Any, memory: Tensor, arithmetic: Arithmetic, norm_memory: bool) -> tuple[Tensor, Tensor]:
    """``[B, S, C]`` -> keys (normed) and values, ``[B, S, Hkv, D]``."""
    if norm_memory and attn.norm_cross is not None:
        memory = attn.norm_encoder_hidden_states(memory)
    project_k, project_v = (attn.add_k_proj, attn.add_v_proj) if arithmetic.added else (attn.to_k, attn.to_v)
    heads = (-1, attn.inner_dim // attn.heads)
    k, v = project_k(memory).unflatten(-1, heads), project_v(memory).unflatten(-1, heads)
    return normed(k, attn.norm_k if arithmetic.qk_norm else None), v


# -------------------------------------------------------------------- keys and values kept over denoising steps


class _Kept(NamedTuple):
    """Keys and values of one module, and what they were computed from."""

    memory: Tensor
    """Held, so that nothing else can come to lie at its address."""
    origin: tuple[Any, ...]
    k: Tensor
    v: Tensor


def _kept(kept: dict[int, _Kept], attn: Any, memory: Tensor, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
    """The keys and values in ``kept``, if they are still those of this memory and these weights; else new ones."""
    if torch.is_grad_enabled():
        raise InvalidArgument("cached_condition: keys and values are kept without a graph: run under torch.no_grad()")
    if memory.is_inference():
        raise InvalidArgument(
            "cached_condition: encoder_hidden_states was made under torch.inference_mode(), where a change to it "
            "cannot be seen: make it under torch.no_grad()"
        )
    origin = _origin(attn, memory)
    found = kept.get(id(attn))
    if found is None or found.origin != origin:
        found = _Kept(memory, origin, *_projected(attn, memory, arithmetic, norm_memory=True))
        kept[id(attn)] = found
    return found.k, found.v


def _plain(attn: Any) -> bool:
    """Whether parameters alone decide what the projections do: LoRA layers have switches and scales beside them."""
    layers = [layer for layer in (attn.to_k, attn.to_v, attn.add_k_proj, attn.add_v_proj) if layer is not None]
    return all(isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward for layer in layers)


def _origin(attn: Any, memory: Tensor) -> tuple[Any, ...]:
    """Which memory and which weights: where they lie, and how often each was written to. No look at the values."""
    parts = (attn.to_k, attn.to_v, attn.add_k_proj, attn.add_v_proj, attn.norm_k, attn.norm_cross)
    weights = [p for part in parts if part is not None for p in part.parameters()]
    device = memory.device.type
    lowered = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    versions = tuple((p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in (memory, *weights))
    return (memory.shape, memory.stride(), lowered, versions)


@contextmanager
def cached_condition(model: nn.Module) -> Iterator[None]:
    """While open, every converted ``Attention`` in ``model`` projects a memory once and reuses its keys and values.

    For samplers, whose denoising steps read one condition many times::

        with torch.no_grad(), cached_condition(model):
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, encoder_hidden_states=memory, timestep=t), t, x).prev_sample

    The keys and values of a module are those of the last memory it saw. They are computed anew when it is given another
    tensor, or when the memory or a weight of theirs was written to in place (by anything that torch counts; writes
    through ``.data`` or from other libraries it does not). A view of the same tokens counts as the same memory. On
    leaving the context nothing is kept. Code under ``torch.compile``, and projections that are no plain ``nn.Linear``
    (LoRA has switches that cannot be seen), project at every call: there the context does nothing.

    Raises:
        InvalidArgument: ``model`` has no :class:`BroadcastAttnProcessor`; a context is open for it already; a call
            inside has gradients enabled, or memory that was made under ``torch.inference_mode()``.
    """
    found = {id(p): p for p in map(_processor_of, model.modules()) if isinstance(p, BroadcastAttnProcessor)}
    processors = list(found.values())
    if not processors:
        raise InvalidArgument(
            f"cached_condition: {type(model).__name__} has no {NAME}: apply_broadcast_attention first"
        )
    if any(processor._kept is not None for processor in processors):
        raise InvalidArgument(f"cached_condition: a context is open for {type(model).__name__} already")
    for processor in processors:
        processor._kept = {}
    try:
        yield
    finally:
        for processor in processors:
            processor._kept = None


# -------------------------------------------------------------------- conversion


def apply_broadcast_attention(model: nn.Module, *, layout: Layout = "bk", impl: str | None = None) -> ConversionReport:
    """Give every cross-attention ``Attention`` in ``model`` a :class:`BroadcastAttnProcessor`, in place.

    Afterwards the model takes ``encoder_hidden_states [B, S, C]`` (and masks of B rows) beside N = B * K rows of
    everything else. Weights are untouched; ``report.revert()`` puts the very processors back that were there.

    Cross-attention is what was built with a ``cross_attention_dim``. Whether such a module is really handed a memory is
    seen only in a call (the self-attention blocks of vla_jepa have one, too): called without, the processor computes
    self-attention. What was built without one is left; if it is handed a memory all the same, set the processor
    there by hand.

    Left as they are, with the reason in the report: self-attention; subclasses of ``Attention`` and the attention
    classes of single models (Flux, Wan, ...); processors other than diffusers' plain ones; fused projections; head
    dimensions outside 8 to 256; norms that fit neither a head nor all heads; everything inside a model that reshapes
    the memory to the rows of the samples (``caption_projection`` in PixArt and ``Transformer2DModel``).

    Args:
        model: any module; it may also be an ``Attention`` itself.
        layout: "bk" (row b * K + k) or "kb" (row k * B + b) of the samples. Classifier-free guidance that stacks two
            batches (``cat([x, x])`` beside ``cat([negative, positive])``) is 2 B conditions in layout "bk"; in "kb" its
            rows are in neither order, which cannot be seen: run the two halves apart.
        impl: implementation of ``broadcast_attention``; None chooses by device.

    Raises:
        InvalidArgument: nothing could be replaced (the message says why), or something is replaced already with another
            layout or impl; the model is as it was. A second call with the same arguments changes nothing and says so.
    """
    BroadcastAttnProcessor(layout=layout, impl=impl)  # its checks
    plan: list[tuple[str, Any]] = []
    left: list[Left] = []
    already = 0
    for name, module in model.named_modules():
        before = _processor_of(module)
        if before is None:
            continue
        if isinstance(before, BroadcastAttnProcessor):
            if (before.layout, before.impl) != (layout, impl):
                raise InvalidArgument(
                    f"apply_broadcast_attention: {name or 'the model'} has {before!r} already, asked for layout = "
                    f"{layout!r}, impl = {impl!r}: revert that conversion first"
                )
            already += 1
            left.append(Left(name, type(module).__name__, "it is replaced already"))
            continue
        reason = why_not(module, before) or reshaped_around(model, name)
        if reason is None:
            plan.append((name, module))
        else:
            left.append(Left(name, type(module).__name__, reason))
    if not plan and not already:
        raise InvalidArgument(
            f"apply_broadcast_attention: nothing in {type(model).__name__} could be replaced: {summary(left)}"
        )
    replaced = [Replaced(name, type(attn.processor).__name__, NAME) for name, attn in plan]
    undo = partial(_restore, [(attn, attn.processor) for _, attn in plan]) if plan else None
    for _, attn in plan:
        attn.set_processor(BroadcastAttnProcessor(layout=layout, impl=impl, like=type(attn.processor).__name__))
    return ConversionReport(replaced, left, undo=undo)


def _processor_of(module: nn.Module) -> Any:
    """The processor of an attention module that has one; None for every other module."""
    return getattr(module, "processor", None) if hasattr(type(module), "set_processor") else None


def _restore(processors: list[tuple[Any, Any]]) -> None:
    for attn, processor in processors:
        attn.set_processor(processor)
