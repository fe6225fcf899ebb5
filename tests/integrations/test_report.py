from __future__ import annotations

import pytest

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations import ConversionReport, Left, Replaced


def test_it_reads_as_a_list_of_what_was_done_and_why_not() -> None:
    report = ConversionReport([Replaced("a", "Old", "New")], [Left("", "Model", "it is a test")])
    assert str(report).splitlines() == [
        "replaced 1, left 1",
        "  a: Old -> New",
        "  (the model): Model left as is, because it is a test",
    ]


def test_revert_runs_once() -> None:
    calls = []
    report = ConversionReport(undo=lambda: calls.append(1))
    assert not report.reverted
    report.revert()
    assert calls == [1] and report.reverted
    with pytest.raises(InvalidArgument, match="nothing"):
        report.revert()
    assert calls == [1]


def test_nothing_replaced_has_nothing_to_undo() -> None:
    with pytest.raises(InvalidArgument, match="nothing"):
        ConversionReport(left=[Left("", "Model", "it is a test")]).revert()


def test_a_refused_way_back_can_be_tried_again() -> None:
    blocked = [True]

    def undo() -> None:
        if blocked:
            raise InvalidArgument("not now")

    report = ConversionReport(undo=undo)
    with pytest.raises(InvalidArgument, match="not now"):
        report.revert()
    blocked.clear()
    report.revert()
    assert report.reverted
