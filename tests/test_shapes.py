"""Row layouts, the shared checks, and the runnable examples in the docstrings."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.shapes import check_same, check_shape, merge_samples, samples_per_condition, split_samples


@pytest.mark.parametrize(
    "module",
    ["shapes", "errors", "ops.philox", "ops.broadcast_attention", "objectives.imitation", "nn.normalizer"],
)
def test_docstring_examples(module):
    result = doctest.testmod(importlib.import_module(f"minidiff_fast.{module}"))
    assert result.attempted > 0 and result.failed == 0


def test_layouts_are_what_repeat_interleave_and_repeat_make():
    condition = torch.randn(3, 5)
    per_sample = condition[:, None].expand(3, 4, 5)
    assert torch.equal(merge_samples(per_sample, "bk"), condition.repeat_interleave(4, 0))
    assert torch.equal(merge_samples(per_sample, "kb"), condition.repeat(4, 1))


@pytest.mark.parametrize("layout", ["bk", "kb"])
def test_split_and_merge_are_inverse(layout):
    rows = torch.randn(12, 2, 3)
    assert torch.equal(merge_samples(split_samples(rows, 4, layout), layout), rows)
    assert split_samples(rows, 4, layout).data_ptr() == rows.data_ptr()


@pytest.mark.parametrize(("rows", "batch"), [(7, 2), (0, 2), (4, 0), (3, 4)])
def test_rows_that_are_no_multiple_of_the_batch(rows, batch):
    with pytest.raises(InvalidArgument, match=f"N = {rows} rows for B = {batch} conditions"):
        samples_per_condition("f", rows, batch)


def test_unknown_layout():
    with pytest.raises(InvalidArgument, match="layout must be 'bk'.*got 'nk'"):
        split_samples(torch.zeros(4), 2, "nk")  # type: ignore[arg-type]


def test_check_shape_counts_axes():
    with pytest.raises(InvalidArgument, match=r"f: x must be \[B, C\] = \[2, C\], got \[2\]"):
        check_shape("f", "x", torch.zeros(2), [2, "C"], "[B, C]", "y: [2]")


def test_check_same_names_dtype_and_device():
    one = torch.zeros(1)
    check_same("f", "x", one, y=None, z=one)
    with pytest.raises(InvalidArgument, match="f: y must have the dtype of x, torch.float32, got torch.int64"):
        check_same("f", "x", one, y=one.long())
    with pytest.raises(InvalidArgument, match="f: y must be on the device of x, cpu, got meta"):
        check_same("f", "x", one, y=one.to("meta"))
