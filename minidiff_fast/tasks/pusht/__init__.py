"""Push-T: push a T-shaped block onto its goal pose (Florence et al., 2021; Chi et al., 2023).

``env`` is the environment, ``expert`` a planner that solves it, ``demos`` makes demonstrations with the
expert, and ``demonstrations.npz`` is a set of them. Importing this package imports nothing.
"""
