"""The whole bridge in a deterministic simulation, on virtual time, from one seed.

`docs/testing.md` says how to run it and what is in which file. `python -m tests.sim --seed 7`.
"""
