"""DiffusionMLP: one projection per condition equals repeating the condition, in both layouts."""

from __future__ import annotations

import pytest
import torch

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.models import DiffusionMLP

B, K, T, To, Dc = 3, 4, 6, 2, 5


def model(**options) -> DiffusionMLP:
    torch.manual_seed(0)
    return DiffusionMLP(2, 2, T, To, Dc, hidden_dim=16, n_blocks=2, **options).double()


def draws():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(B * K, T, 2, generator=generator, dtype=torch.float64),
        torch.randint(0, 100, (B * K,), generator=generator),
        torch.randn(B, To, Dc, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("layout", ["bk", "kb"])
def test_sharing_equals_repeating_forward_and_gradients(layout):
    x, t, cond = draws()
    repeated = cond.repeat_interleave(K, 0) if layout == "bk" else cond.repeat(K, 1, 1)
    shared, plain = model(layout=layout), model(layout=layout)
    out, expected = shared(x, t, cond), plain(x, t, repeated)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(shared.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_one_timestep_for_all_rows():
    x, _, cond = draws()
    net = model()
    torch.testing.assert_close(net(x, torch.tensor(7), cond), net(x, torch.full((B * K,), 7), cond))


def test_samples_depend_on_their_own_condition_only():
    x, t, cond = draws()
    net = model()
    other = cond.clone()
    other[1] += 1.0
    changed = (net(x, t, cond) != net(x, t, other)).flatten(1).any(1)
    assert changed.tolist() == [False] * K + [True] * K + [False] * K


def test_optimizer_groups_hold_every_parameter_once():
    groups = model().get_optim_groups(0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model().parameters()))
    assert all(p.dim() >= 2 for p in groups[0]["params"]) and groups[1]["weight_decay"] == 0.0


def test_bad_input():
    x, t, cond = draws()
    net = model()
    with pytest.raises(InvalidArgument, match=r"cond must be \[B, To, Dc\] = \[B, 2, 5\], got \[3, 2, 4\]"):
        net(x, t, cond[..., :4])
    with pytest.raises(InvalidArgument, match="N = 11 rows for B = 3 conditions"):
        net(x[:11], t[:11], cond)
    with pytest.raises(InvalidArgument, match=r"sample must be \[B, K, T, Da\] = \[3, K, 6, 2\], got \[3, 4, 5, 2\]"):
        net(x[:, :5], t, cond)
    with pytest.raises(InvalidArgument, match="hidden_dim must be at least 1, got 0"):
        DiffusionMLP(2, 2, T, To, Dc, hidden_dim=0)
    with pytest.raises(InvalidArgument, match="time_dim must be even and at least 4, got 5"):
        model(time_dim=5)
