"""Is this machine fit for the work: a package of checks, one module per subject.

Enters: a folder, perhaps a number of GPUs. Leaves: findings, each with its cure. Nothing is
repaired and no setting is changed; no network is used.
"""
