"""Writes benchmarks/results/kernels.md: what every kernel takes of an SM, and how many blocks of it fit on one.

    python cuda_tests/kernel_table.py --folder build/kernels csrc/*/*.cu
"""

import argparse
from pathlib import Path

import sass

PAGE = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "kernels.md"
# What a block asks for at launch; the code knows nothing of it.
TENSOR = ["HMMA", "HGMMA", "LDSM", "LDGSTS", "UTMALDG"]
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32  # of an SM
SHARED = {"sm_80": 164 * 1024, "sm_90a": 228 * 1024}  # of an SM; every block takes 1 KiB more than it asks for
GPU = {"sm_80": "A100", "sm_90a": "H200"}


def blocks_on_sm(gpu: str, threads: int, registers: int, shared: int) -> int:
    warps = -(-threads // 32)
    of_a_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // of_a_warp // 4 * 4 // warps  # an SM has four parts
    by_shared = SHARED[gpu] // -(-(shared + 1024) // 128 * 128)
    return min(by_registers, by_shared, THREADS // (warps * 32), BLOCKS)
