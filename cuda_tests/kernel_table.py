"""Writes benchmarks/results/kernels.md: what every kernel takes of an SM, and how many of its blocks fit on one.

    python cuda_tests/kernel_table.py --folder build/kernels --launches FILE csrc/*/*.cu

nvcc does not know what a launch asks for. FILE does: tests on the emulator write it where SIMT_LAUNCHES names it. The
target kernel_table runs them, and this.
"""

import argparse
import re
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import sass

PAGE = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "kernels.md"
COUNTED = ["HMMA", "HGMMA", "LDSM", "LDGSTS", "UTMALDG"]
CHIPS = {"sm_80": "A100", "sm_90a": "H200"}
SHARED = {"sm_80": 164 * 1024, "sm_90a": 228 * 1024}  # of an SM; each block takes 1 KiB beyond what it asks for
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32  # of an SM
SYMBOL = re.compile(r"^\s*\d+: (?P<value>[0-9a-f]+)\s+\S+ (?P<type>\w+) .* (?P<name>\S+)$")


@dataclass
class Launch:
    """The largest that was seen of a kernel."""

    threads: int = 0
    dynamic: int = 0  # bytes of shared memory


def launches(note: Path) -> dict[tuple[str, str], Launch]:
    """(stem of the file, kernel) -> how tests launched it."""
    seen = defaultdict(Launch)
    lines = [line.split("\t") for line in note.read_text().splitlines()]
    for binary in {line[0] for line in lines}:
        kernels = _symbols(binary)
        for _, offset, threads, dynamic in (line for line in lines if line[0] == binary):
            for kernel in kernels.get(int(offset), []):
                launch = seen[kernel]
                launch.threads, launch.dynamic = max(launch.threads, int(threads)), max(launch.dynamic, int(dynamic))
    return seen


def _symbols(binary: str) -> dict[int, list[tuple[str, str]]]:
    """Offset -> (stem of the file, function). Local symbols follow the name of the file that they come from."""
    table = subprocess.run(["readelf", "-sW", binary], capture_output=True, text=True, check=True).stdout
    at, names, stem = [], [], ""
    for match in filter(None, map(SYMBOL.match, table.splitlines())):
        if match["type"] == "FILE":
            stem = Path(match["name"]).stem
        elif match["type"] == "FUNC":
            at.append((int(match["value"], 16), stem))
            names.append(match["name"])
    functions = defaultdict(list)
    for (offset, stem), name in zip(at, sass.readable(names), strict=True):
        functions[offset].append((stem, name))
    return functions


def blocks_on_sm(gpu: str, threads: int, registers: int, shared: int) -> int:
    warps = -(-threads // 32)
    warp_registers = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // warp_registers // 4 * 4 // warps  # in each of an SM's four parts
    by_shared = SHARED[gpu] // (-(-(shared + 1024) // 128) * 128)
    return min(by_registers, by_shared, THREADS // (32 * warps), BLOCKS)


def page(compiled: dict[tuple[str, str], list[sass.Function]], seen: dict[tuple[str, str], Launch]) -> str:
    kernels = {
        (stem, f.name) for (stem, _), functions in compiled.items() for f in functions if f.entry and not f.empty
    }
    lines = [
        "# Kernels as compiled",
        "",
        f"{len(kernels)} kernels, compiled by nvcc {sass.compiler()} for {' and '.join(sass.GPUS)}. Registers, static",
        "shared memory and instructions (occurrences in the code, not executions) are read from what nvcc made.",
        "Threads and dynamic shared memory, in bytes, are the most that tests on the emulator asked for.",
        "Blocks an SM are calculated from these. None of it was measured on a GPU.",
        "",
        "    cmake --build build --target kernel_table",
    ]
    columns = ["kernel", "GPU", "threads", "registers", "static + dynamic", "blocks an SM", *COUNTED]
    for stem in sorted({stem for stem, _ in kernels}):
        lines += ["", f"## {stem}.cu", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        rows = [(f, gpu) for gpu in sass.GPUS for f in compiled.get((stem, gpu), []) if f.entry and not f.empty]
        lines += [_row(f, gpu, seen.get((stem, f.name))) for f, gpu in sorted(rows, key=lambda row: row[0].name)]
    return "\n".join(lines) + "\n"


def _row(f: sass.Function, gpu: str, launch: Launch | None) -> str:
    if launch is None:
        taken = [f"{f.threads or '?'}", f"{f.registers}", f"{f.shared} + ?", "?"]
    else:
        blocks = blocks_on_sm(gpu, launch.threads, f.registers, f.shared + launch.dynamic)
        taken = [f"{launch.threads}", f"{f.registers}", f"{f.shared:,} + {launch.dynamic:,}", f"{blocks}"]
    counts = [str(f.count(opcode) or "") for opcode in COUNTED]
    return f"| {' | '.join([f'`{f.name}`', CHIPS[gpu], *taken, *counts])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="that of kernel_gate.py")
    parser.add_argument("--launches", type=Path, required=True)
    parser.add_argument("sources", type=Path, nargs="+")
    options = parser.parse_args()
    try:
        compiled = sass.examine(options.sources, options.folder)
        if sass.nvdisasm() is None:
            raise sass.Missing("no nvdisasm (pip install nvidia-cuda-nvdisasm)")
    except sass.Missing as missing:
        raise SystemExit(f"the table of kernels cannot be made: {missing}") from None
    PAGE.write_text(page(compiled, launches(options.launches)))
    print(PAGE)


if __name__ == "__main__":
    main()
