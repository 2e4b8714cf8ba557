"""Peers of OctoMoE on NVIDIA GPUs, and what it takes to time them beside it.

    harness    CUDA graphs, interleaved rounds, medians with spread, SM clock, measured ceilings
    problems   layers and grouped GEMMs: random data, quantised forms, float64 references
    fetch      gets the peers' own packages from PyPI into a folder
    octomoe_peer, lmdeploy_peer, humming_peer, deepgemm_peer    one adapter each, Python packages
    library_peer    a shared library with the C interface of peer_abi.h: CUTLASS, and others
    hybrid_peer     the "INT8 hybrid MoE" reference project, from such a library

`bench/gpu_peers.py` is the command that runs them. Nothing of a peer's own code is in this folder.
"""


class PeerMissing(Exception):
    """A peer that cannot run here, and why."""
