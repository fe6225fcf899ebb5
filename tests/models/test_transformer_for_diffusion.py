"""TransformerForDiffusion against a plain PyTorch construction of diffusion_policy's module."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.level2 import Level2Batch, level2_step
from minidiff_fast.models import TransformerForDiffusion
from minidiff_fast.nn import ConditionCache
from minidiff_fast.objectives import DenoisingLoss, DiffusionProcess

DA, OUT, HORIZON, TO, DC = 3, 5, 7, 4, 6
BASE = dict(input_dim=DA, output_dim=OUT, horizon=HORIZON, n_obs_steps=TO, n_layer=2, n_head=2, n_emb=24)
SHARED = {
    "plain": dict(cond_dim=DC),
    "causal": dict(cond_dim=DC, causal_attn=True),
}
UNSHARED = {
    "mixing": dict(cond_dim=DC, n_cond_layers=2),
    "mixing causal": dict(cond_dim=DC, n_cond_layers=2, causal_attn=True),
    "timestep memory": dict(cond_dim=0),
    "timestep memory causal": dict(cond_dim=0, causal_attn=True),
    "timestep memory mixing": dict(cond_dim=0, n_cond_layers=1),
    "encoder only": dict(cond_dim=0, time_as_cond=False),
    "encoder only causal": dict(cond_dim=0, time_as_cond=False, causal_attn=True),
}
EVERY = {**SHARED, **UNSHARED}
needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") in ("", "0"),
    reason="the kernels need TRITON_INTERPRET=1 on a CPU",
)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-6}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Oracle(nn.Module):
    """The peer's architecture written with torch's own transformer layers over N rows."""

    def __init__(self, cond_dim=0, causal_attn=False, time_as_cond=True, n_cond_layers=0, dropout=0.0):
        super().__init__()
        width, heads, depth = BASE["n_emb"], BASE["n_head"], BASE["n_layer"]
        keywords = dict(activation="gelu", batch_first=True, norm_first=True)

        def encoder(layers):
            layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, **keywords)
            return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

        tokens = HORIZON if time_as_cond else HORIZON + 1
        memory_tokens = 1 + (TO if cond_dim else 0)
        self.width, self.time_as_cond = width, time_as_cond
        self._dummy_variable = nn.Parameter(torch.zeros(0))
        self.input_emb = nn.Linear(DA, width)
        self.pos_emb = nn.Parameter(torch.randn(1, tokens, width))
        if cond_dim:
            self.cond_obs_emb = nn.Linear(cond_dim, width)
        if time_as_cond:
            self.cond_pos_emb = nn.Parameter(torch.randn(1, memory_tokens, width))
            mlp = [nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width)]
            self.encoder = encoder(n_cond_layers) if n_cond_layers else nn.Sequential(*mlp)
            layer = nn.TransformerDecoderLayer(width, heads, 4 * width, dropout, **keywords)
            self.decoder = nn.TransformerDecoder(layer, depth)
        else:
            self.encoder = encoder(depth)
        rows, columns = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
        mask = torch.zeros(tokens, tokens).masked_fill(columns > rows, -math.inf)
        self.register_buffer("mask", mask if causal_attn else None)
        columns = torch.arange(memory_tokens)[None]
        memory_mask = torch.zeros(tokens, memory_tokens).masked_fill(rows < columns - 1, -math.inf)
        self.register_buffer("memory_mask", memory_mask if causal_attn and cond_dim else None)
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, OUT)
        for parameter in self.parameters():
            if parameter.ndim > 1:  # larger than the peer's init, so that every part shows in the output
                nn.init.normal_(parameter, std=0.3)

    def embed_time(self, timestep):
        half = self.width // 2
        angle = timestep[:, None] * torch.exp(torch.arange(half) * (-math.log(10000) / (half - 1)))
        return torch.cat([angle.sin(), angle.cos()], -1)[:, None]

    def forward(self, sample, timestep, cond=None):
        timestep = torch.as_tensor(timestep).reshape(-1).expand(len(sample))
        x, time = self.input_emb(sample), self.embed_time(timestep)
        steps = sample.shape[1]
        if not self.time_as_cond:
            x = torch.cat([time, x], 1) + self.pos_emb[:, : steps + 1]
            return self.head(self.ln_f(self.encoder(x, mask=self.mask)[:, 1:]))
        memory = time if cond is None else torch.cat([time, self.cond_obs_emb(cond)], 1)
        memory = self.encoder(memory + self.cond_pos_emb[:, : memory.shape[1]])
        x = self.decoder(x + self.pos_emb[:, :steps], memory, tgt_mask=self.mask, memory_mask=self.memory_mask)
        return self.head(self.ln_f(x))


def make_pair(form: str, dtype=torch.float64, **options):
    torch.manual_seed(len(form))
    oracle = Oracle(**EVERY[form]).to(dtype).eval()
    ours = TransformerForDiffusion(**BASE, **EVERY[form], impl="reference", **options).to(dtype).eval()
    ours.load_state_dict(oracle.state_dict(), strict=True)
    return ours, oracle


def make_inputs(form: str, batch: int, samples: int, dtype=torch.float64):
    torch.manual_seed(17)
    sample = torch.randn(batch * samples, HORIZON, DA, dtype=dtype)
    timestep = torch.randint(0, 100, (batch * samples,))
    cond = torch.randn(batch, TO, DC, dtype=dtype) if EVERY[form].get("cond_dim") else None
    return sample, timestep, cond


def repeat(cond: Tensor, samples: int, layout: str) -> Tensor:
    return cond.repeat_interleave(samples, 0) if layout == "bk" else cond.repeat(samples, 1, 1)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0.0, atol=TOLERANCE[want.dtype])


# -------------------------------------------------------------------- drop-in


@pytest.mark.parametrize("form", EVERY)
def test_state_dict_loads_strictly_in_both_directions(form):
    ours, oracle = make_pair(form)
    oracle.load_state_dict(ours.state_dict(), strict=True)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in oracle.state_dict().items()}
    fresh = TransformerForDiffusion(**BASE, **EVERY[form]).state_dict()
    for name in ("mask", "memory_mask"):
        if name in fresh:
            assert torch.equal(fresh[name], oracle.state_dict()[name].float())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", EVERY)
def test_forward_equals_the_oracle(form, dtype):
    ours, oracle = make_pair(form, dtype)
    sample, timestep, cond = make_inputs(form, 5, 1, dtype)
    close(ours(sample, timestep, cond), oracle(sample, timestep, cond))


@pytest.mark.parametrize("timestep", [41, 41.0, torch.tensor(41), torch.tensor([41]), torch.tensor(3.25)])
@pytest.mark.parametrize("form", ["causal", "mixing", "encoder only"])
def test_one_timestep_holds_for_all_rows(form, timestep):
    ours, oracle = make_pair(form)
    sample, _, cond = make_inputs(form, 3, 1)
    close(ours(sample, timestep, cond), oracle(sample, timestep, cond))


def test_fewer_action_and_observation_tokens():
    ours, oracle = make_pair("plain")
    sample, timestep, cond = make_inputs("plain", 3, 1)
    close(ours(sample[:, :4], timestep, cond[:, :2]), oracle(sample[:, :4], timestep, cond[:, :2]))
    causal = make_pair("causal")[0]  # a causal prediction does not depend on what comes after it
    close(causal(sample[:, :4], timestep, cond), causal(sample, timestep, cond)[:, :4])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", ["bk", "kb"])
@pytest.mark.parametrize("form", SHARED)
def test_shared_conditions_equal_repeated_ones(form, layout, dtype):
    ours, oracle = make_pair(form, dtype, layout=layout)
    sample, timestep, cond = make_inputs(form, 3, 4, dtype)
    want = oracle(sample, timestep, repeat(cond, 4, layout))
    close(ours(sample, timestep, cond), want)
    other = repeat(cond, 4, "kb" if layout == "bk" else "bk")
    assert (oracle(sample, timestep, other) - want).abs().max() > 1e-2  # the conditions do differ


def test_as_many_conditions_as_action_tokens():
    """B = T makes [T, S] and [B, S] masks look alike."""
    ours, oracle = make_pair("causal")
    sample, timestep, cond = make_inputs("causal", HORIZON, 2)
    close(ours(sample, timestep, cond), oracle(sample, timestep, cond.repeat_interleave(2, 0)))


@pytest.mark.parametrize("layout", ["bk", "kb"])
@pytest.mark.parametrize("form", ["mixing", "mixing causal"])
def test_mixing_encoder_repeats_when_asked(form, layout):
    ours, oracle = make_pair(form, layout=layout, unshared="repeat")
    sample, timestep, cond = make_inputs(form, 3, 4)
    close(ours(sample, timestep, cond), oracle(sample, timestep, repeat(cond, 4, layout)))


@pytest.mark.parametrize("form", ["timestep memory causal", "encoder only causal"])
def test_without_conditions_any_k_is_exact(form):
    ours, oracle = make_pair(form)
    sample, timestep, _ = make_inputs(form, 3, 4)
    out = ours.denoise(ours.encode(), sample.unflatten(0, (3, 4)), timestep.unflatten(0, (3, 4)))
    close(out.flatten(0, 1), oracle(sample, timestep))


@pytest.mark.parametrize("layout", ["bk", "kb"])
@pytest.mark.parametrize("form", SHARED)
def test_gradients_equal_the_repeated_form(form, layout):
    ours, oracle = make_pair(form, layout=layout)
    sample, timestep, cond = make_inputs(form, 3, 4)
    weight = torch.randn(12, HORIZON, OUT, dtype=torch.float64)
    inputs = [[x.clone().requires_grad_() for x in (sample, cond)] for _ in range(2)]
    (ours(inputs[0][0], timestep, inputs[0][1]) * weight).sum().backward()
    (oracle(inputs[1][0], timestep, repeat(inputs[1][1], 4, layout)) * weight).sum().backward()
    for got, want in zip(*inputs, strict=True):
        close(got.grad, want.grad)
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert all(g is not None for g in gradients.values())
    for name, want in oracle.named_parameters():
        if name != "_dummy_variable":
            torch.testing.assert_close(gradients[name], want.grad, rtol=1e-9, atol=1e-10, msg=name)


# -------------------------------------------------------------------- encode once


@pytest.mark.parametrize("form", SHARED)
def test_forward_is_denoise_of_encode(form):
    ours, _ = make_pair(form)
    sample, timestep, cond = make_inputs(form, 3, 4)
    memory = ours.encode(cond)
    assert all(tensor.shape == (3, TO, 2, 12) for tensor in (*memory.keys, *memory.values))
    assert len(memory.keys) == len(memory.values) == 2 and memory.tokens == ()
    out = ours.denoise(memory, sample.unflatten(0, (3, 4)), timestep.unflatten(0, (3, 4)))
    assert torch.equal(out.flatten(0, 1), ours(sample, timestep, cond))


def test_memory_is_a_pytree_of_tensors_with_leading_dim_b():
    for form in EVERY:
        ours, _ = make_pair(form)
        leaves = torch.utils._pytree.tree_leaves(ours.encode(make_inputs(form, 3, 1)[2]))
        assert all(isinstance(leaf, Tensor) and leaf.shape[0] == 3 for leaf in leaves)


def saved_condition_bytes(samples: int, impl: str, repeated: bool = False) -> int:
    """Bytes of the distinct storages saved for backward that hold observation tokens (To = 11, prime)."""
    observed, cond_dim, width, heads, batch = 11, 13, 32, 2, 3
    channels = {cond_dim, width, 4 * width, width // heads}
    model = TransformerForDiffusion(
        DA, DA, HORIZON, observed, cond_dim, n_layer=1, n_head=heads, n_emb=width, impl=impl
    ).eval()  # without dropout and its masks
    cond = torch.randn(batch, observed, cond_dim, requires_grad=True)
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        tokens = any(size % observed == 0 for size in tensor.shape)
        if tokens and channels & set(tensor.shape):
            storages[tensor.untyped_storage().data_ptr()] = tensor  # kept alive: no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rows = cond.repeat_interleave(samples, 0) if repeated else cond
        model(torch.randn(batch * samples, 2, DA), 0, rows)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=needs_interpreter)])
def test_saved_bytes_of_the_condition_do_not_depend_on_k(impl):
    few, many = saved_condition_bytes(2, impl), saved_condition_bytes(5, impl)
    assert few == many > 0
    assert saved_condition_bytes(5, impl, repeated=True) > 4 * many  # the measure sees copies


@pytest.mark.parametrize(
    ("form", "backend"),
    [("causal", "aot_eager"), ("mixing causal", "eager"), ("encoder only causal", "eager")],
)
def test_compiles_without_graph_breaks(form, backend):
    ours, _ = make_pair(form, torch.float32, unshared="repeat")
    sample, timestep, cond = make_inputs(form, 3, 4, torch.float32)
    sample, timestep = sample.unflatten(0, (3, 4)), timestep.unflatten(0, (3, 4))
    memory = torch.compile(ours.encode, fullgraph=True, backend="eager")(cond)
    out = torch.compile(ours.denoise, fullgraph=True, backend=backend)(memory, sample, timestep)
    close(out, ours.denoise(ours.encode(cond), sample, timestep))


def test_autocast_runs_both_halves():
    ours, _ = make_pair("causal", torch.float32)
    sample, timestep, cond = make_inputs("causal", 3, 4, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(sample, timestep, cond)
    want = ours(sample, timestep, cond)
    assert (out.float() - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("form", ["causal", "mixing", "encoder only"])
def test_a_bfloat16_model_runs(form):
    ours, _ = make_pair(form, torch.float32)
    sample, timestep, cond = make_inputs(form, 3, 1, torch.float32)
    want = ours(sample, timestep, cond)
    half = cond if cond is None else cond.bfloat16()
    out = ours.bfloat16()(sample.bfloat16(), timestep, half)
    assert out.dtype == torch.bfloat16 and (out.float() - want).norm() < 0.1 * want.norm()


@needs_interpreter
def test_triton_equals_the_reference():
    ours, _ = make_pair("causal", torch.float32)
    sample, timestep, cond = make_inputs("causal", 2, 2, torch.float32)
    want = ours(sample, timestep, cond)
    ours.impl = "triton"
    close(ours(sample, timestep, cond), want)


# -------------------------------------------------------------------- training


def test_dropout_is_reproducible_and_differs_between_samples():
    model = TransformerForDiffusion(**BASE, cond_dim=DC, p_drop_attn=0.3, impl="reference").train()
    sample = torch.randn(1, HORIZON, DA).expand(6, -1, -1)
    cond = torch.randn(2, TO, DC)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(sample, 5, cond))
    assert torch.equal(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2])
    assert not torch.allclose(outs[0][0], outs[0][1])  # two samples of one condition
    model.eval()
    evaluated = model(sample, 5, cond)
    assert torch.equal(evaluated, model(sample, 5, cond))
    close(evaluated[0], evaluated[1])


@pytest.mark.parametrize("site", ["drop", "dropout", "dropout1", "dropout2", "dropout3", "self_attn", "multihead_attn"])
def test_each_dropout_acts_on_its_own(site):
    torch.manual_seed(0)
    sample, cond = torch.randn(2, HORIZON, DA), torch.randn(2, TO, DC)
    model = TransformerForDiffusion(**BASE, cond_dim=DC, p_drop_emb=0.0, p_drop_attn=0.0, impl="reference").train()
    model.load_state_dict(make_pair("plain", torch.float32)[1].state_dict())
    assert torch.equal(model(sample, 5, cond), model(sample, 5, cond))
    for name, module in model.named_modules():
        if name.split(".")[-1] == site:
            setattr(module, "p" if isinstance(module, nn.Dropout) else "dropout", 0.5)
    assert not torch.allclose(model(sample, 5, cond), model(sample, 5, cond))


def test_initial_weights():
    torch.manual_seed(0)
    model = TransformerForDiffusion(DA, OUT, 16, 8, 32, n_layer=2, n_head=2, n_emb=64)
    for name, parameter in model.named_parameters():
        if name == "_dummy_variable":
            assert parameter.shape == (0,)
        elif "norm" in name or name.startswith("ln_f"):
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert 0.017 < parameter.std() < 0.023, name
    assert not TransformerForDiffusion(**BASE).cond_pos_emb.any()


def test_optimizer_groups_cover_every_parameter_once():
    for form in EVERY:
        model = TransformerForDiffusion(**BASE, **EVERY[form])
        decay, keep = model.get_optim_groups(weight_decay=0.25)
        assert (decay["weight_decay"], keep["weight_decay"]) == (0.25, 0.0)
        ids = [id(p) for group in (decay, keep) for p in group["params"]]
        assert sorted(ids) == sorted(id(p) for p in model.parameters())
        assert all(p.ndim == 2 for p in decay["params"])
        assert all(p.ndim != 2 for p in keep["params"])
    optimizer = model.configure_optimizers(learning_rate=1e-3, weight_decay=0.1, betas=(0.8, 0.9))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (1e-3, (0.8, 0.9))


# -------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(horizon=0), "horizon must be an int >= 1, got 0"),
        (dict(n_layer=2.0), "n_layer must be an int >= 1, got 2.0"),
        (dict(cond_dim=-1), "cond_dim must be an int >= 0, got -1"),
        (dict(n_emb=25), "n_emb must be a multiple of n_head = 2, got 25"),
        (dict(n_emb=27, n_head=3), "n_emb must be even and >= 4, got 27"),
        (dict(n_emb=12, cond_dim=DC), "n_emb / n_head must be from 8 to 256, got 12 / 2 = 6"),
        (dict(p_drop_attn=1.0), "p_drop_attn must be in [0, 1), got 1.0"),
        (dict(layout="kn"), "layout must be 'bk' (row b*K + k) or 'kb' (row k*B + b), got 'kn'"),
        (dict(impl="cuda"), "impl must be None or one of auto, reference"),
        (dict(unshared="copy"), "unshared must be 'error' or 'repeat', got 'copy'"),
        (dict(obs_as_cond=True), "obs_as_cond=True needs cond_dim >= 1"),
        (dict(time_as_cond=False, cond_dim=DC), "cond_dim must be 0, got 6"),
        (dict(time_as_cond=False, n_cond_layers=1), "n_cond_layers must be 0, got 1"),
    ],
)
def test_constructor_errors(arguments, text):
    with pytest.raises(InvalidArgument) as error:
        TransformerForDiffusion(**{**BASE, **arguments})
    assert text in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(TypeError):
        TransformerForDiffusion(**BASE, n_embed=3)


def sized(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("sample", "timestep", "cond", "text"),
    [
        (sized(6, 7), 0, sized(6, 4, 6), "sample must be [N, T, Da] = [N, T, 3], got [6, 7]"),
        (sized(6, 7, 2), 0, sized(6, 4, 6), "sample must be [B, K, T, Da]"),
        (sized(6, 8, 3), 0, sized(6, 4, 6), "1 <= T <= horizon = 7, got T = 8"),
        (sized(6, 7, 3), 0, None, "cond must be [B, To, Dc] = [B, 1..4, 6], got None"),
        (sized(6, 7, 3), 0, sized(6, 5, 6), "cond must be [B, To, Dc] = [B, 1..4, 6], got [6, 5, 6]"),
        (sized(6, 7, 3), 0, sized(6, 4, 7), "cond must be [B, To, Dc] = [B, 1..4, 6], got [6, 4, 7]"),
        (sized(6, 7, 3), 0, sized(4, 4, 6), "got N = 6 rows for B = 4 conditions"),
        (sized(6, 7, 3), torch.zeros(3), sized(3, 4, 6), "timestep must be a scalar or [N] = [6], got [3]"),
        (sized(6, 7, 3), 0.5, sized(3, 4, 6), "must be whole (others go in a floating tensor), got 0.5"),
        (
            sized(6, 7, 3, dtype=torch.float64),
            0,
            sized(3, 4, 6),
            "sample must have the dtype of the parameters, torch.float32, got torch.float64",
        ),
        (
            sized(6, 7, 3),
            0,
            sized(3, 4, 6).half(),
            "cond must have the dtype of the parameters, torch.float32",
        ),
        (sized(6, 7, 3), 0, sized(3, 4, 6).to("meta"), "cond must be on the device of the parameters, cpu"),
    ],
)
def test_forward_errors(sample, timestep, cond, text):
    model = TransformerForDiffusion(**BASE, cond_dim=DC, impl="reference").eval()
    with pytest.raises(InvalidArgument) as error:
        model(sample, timestep, cond)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_models_that_cannot_share_say_why():
    ours, _ = make_pair("mixing")
    sample, timestep, cond = make_inputs("mixing", 3, 4)
    with pytest.raises(InvalidArgument, match=r"K = 4 samples cannot share.*repeated to N = B \* K rows"):
        ours(sample, timestep, cond)
    ours, _ = make_pair("timestep memory")
    with pytest.raises(InvalidArgument, match="cond must be None for a model with cond_dim = 0"):
        ours(sample, timestep, cond)


def test_denoise_refuses_foreign_memory():
    ours, _ = make_pair("plain")
    sample, timestep, cond = make_inputs("plain", 3, 4)
    sample, timestep = sample.unflatten(0, (3, 4)), timestep.unflatten(0, (3, 4))
    with pytest.raises(InvalidArgument, match="memory must hold B = 3 conditions, as sample, got 2"):
        ours.denoise(ours.encode(cond[:2]), sample, timestep)
    with pytest.raises(InvalidArgument, match=r"hold \(2, 2, 0\) keys, values, tokens, got \(0, 0, 1\)"):
        ours.denoise(make_pair("mixing")[0].encode(cond), sample, timestep)
    with pytest.raises(InvalidArgument, match=r"timestep must be \[B, K\] = \[3, 4\], got \[12\]"):
        ours.denoise(ours.encode(cond), sample, timestep.flatten())
    memory = ours.encode(cond)
    ragged = ConditionCache(memory.keys, memory.values, lengths=torch.tensor([4, 2, 1]))
    with pytest.raises(InvalidArgument, match=r"equally many tokens a condition, got ConditionCache\(.*with: lengths"):
        ours.denoise(ragged, sample, timestep)


@pytest.mark.parametrize("form", ["causal", "mixing"])
def test_chunks_gather_the_gradient_of_the_memory(form):
    """The Level-2 step over the model itself: any chunk gives the gradient of all samples at once."""
    objective = DenoisingLoss(DiffusionProcess(torch.linspace(0.99, 0.01, 10)))
    torch.manual_seed(0)
    cond, actions = torch.randn(3, TO, DC, dtype=torch.float64), torch.randn(3, HORIZON, DA, dtype=torch.float64)
    batch = Level2Batch.draw(cond, actions, 5, objective)
    gradients = []
    for chunk in (None, 2):
        torch.manual_seed(0)
        sizes = {**BASE, "output_dim": DA}
        model = TransformerForDiffusion(**sizes, **EVERY[form], impl="reference", unshared="repeat").double().eval()
        level2_step(model, objective, batch, chunk=chunk)
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-12)
