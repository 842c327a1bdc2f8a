"""The fault suite: real sweeps, disturbed on purpose, compared bit for bit with an undisturbed one.

Enters: an empty folder. Leaves: a row a fault (times injected, what the user sees, outcome, results
lost, results doubled), as bench records and as a table. What it injects is shared with the tests of
`tests/faults/`, which run a part of it. It mends nothing.

    python -m regmix_bench.faults --out FOLDER --json FILE
"""
