"""Push-T: push a T-shaped block onto its goal pose (Florence et al., 2021; Chi et al., 2023).

``env`` is the environment, ``expert`` a planner that solves it, ``demos`` makes demonstrations with the
expert, and ``demonstrations.npz`` is a set of them: 700 solved episodes that

    minidiff-fast demos pusht --episodes 500 --disturbed 200 --seed 0 --workers 2 --out demonstrations.npz

makes again, to the last bit on the same versions. ``task`` is the gymnasium environment to fine-tune in
(``register`` gives it its id), ``variants`` its starts and limits, ``rewards`` what it pays.
Importing this package imports nothing.
"""
