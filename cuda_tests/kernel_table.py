"""Writes benchmarks/results/kernels.md: the resources that every kernel uses, and how many of its blocks fit on an SM.

    python cuda_tests/kernel_table.py --folder build/kernels --launches FILE csrc/*/*.cu

FILE contains launch configurations, which nvcc does not know: tests on the emulator append them to the file that
SIMT_LAUNCHES names. The CMake target kernel_table runs these tests and then this script.
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
# Per SM. Every block uses 1 KiB of shared memory in addition to its own.
SHARED = {"sm_80": 164 * 1024, "sm_90a": 228 * 1024}
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32
SYMBOL = re.compile(r"^\s*\d+: (?P<value>[0-9a-f]+)\s+\S+ (?P<type>\w+) .* (?P<name>\S+)$")


@dataclass
class Launch:
    """The largest launch of a kernel."""

    threads: int = 0
    dynamic: int = 0  # bytes of dynamic shared memory


def read_launches(path: Path) -> dict[tuple[str, str], Launch]:
    """Returns {(stem of the file, kernel): its largest launch}."""
    largest = defaultdict(Launch)
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    for binary in {line[0] for line in lines}:
        kernels = _symbols(binary)
        for _, offset, threads, dynamic in (line for line in lines if line[0] == binary):
            for kernel in kernels.get(int(offset), []):
                launch = largest[kernel]
                launch.threads, launch.dynamic = max(launch.threads, int(threads)), max(launch.dynamic, int(dynamic))
    return largest


def _symbols(binary: str) -> dict[int, list[tuple[str, str]]]:
    """Returns {offset: [(stem of the file, function)]}. Local symbols follow the name of their file."""
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
    by_registers = REGISTERS // warp_registers // 4 * 4 // warps  # divided among the four sub-cores of an SM
    by_shared = SHARED[gpu] // (-(-(shared + 1024) // 128) * 128)
    return min(by_registers, by_shared, THREADS // (32 * warps), BLOCKS)


def page(compiled: dict[tuple[str, str], list[sass.Function]], launches: dict[tuple[str, str], Launch]) -> str:
    kernels = {
        (stem, f.name) for (stem, _), functions in compiled.items() for f in functions if f.entry and not f.empty
    }
    lines = [
        "# Kernels as compiled",
        "",
        f"{len(kernels)} kernels, compiled by nvcc {sass.compiler()} for {' and '.join(sass.GPUS)}. Registers, static",
        "shared memory and instructions (static counts, not executions) are read from the compiled code. Threads and",
        "dynamic shared memory are the largest values in launches by tests on the emulator. Blocks per SM are",
        "calculated from these. Nothing was measured on a GPU.",
        "",
        "    cmake --build build --target kernel_table",
    ]
    shared = "shared memory (bytes), static + dynamic"
    columns = ["kernel", "GPU", "threads", "registers per thread", shared, "blocks per SM", *COUNTED]
    for stem in sorted({stem for stem, _ in kernels}):
        lines += ["", f"## {stem}.cu", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        rows = [(f, gpu) for gpu in sass.GPUS for f in compiled.get((stem, gpu), []) if f.entry and not f.empty]
        lines += [_row(f, gpu, launches.get((stem, f.name))) for f, gpu in sorted(rows, key=lambda row: row[0].name)]
    return "\n".join(lines) + "\n"


def _row(f: sass.Function, gpu: str, launch: Launch | None) -> str:
    if launch is None:
        resources = [f"{f.threads or '?'}", f"{f.registers}", f"{f.shared} + ?", "?"]
    else:
        blocks = blocks_on_sm(gpu, launch.threads, f.registers, f.shared + launch.dynamic)
        resources = [f"{launch.threads}", f"{f.registers}", f"{f.shared:,} + {launch.dynamic:,}", f"{blocks}"]
    counts = [str(f.count(opcode) or "") for opcode in COUNTED]
    return f"| {' | '.join([f'`{f.name}`', CHIPS[gpu], *resources, *counts])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the cache folder of kernel_gate.py")
    parser.add_argument("--launches", type=Path, required=True)
    parser.add_argument("sources", type=Path, nargs="+")
    options = parser.parse_args()
    try:
        compiled = sass.examine(options.sources, options.folder)
        if sass.nvdisasm() is None:
            raise sass.ToolMissing("no nvdisasm (pip install nvidia-cuda-nvdisasm)")
    except sass.ToolMissing as missing:
        raise SystemExit(f"cannot write the table of kernels: {missing}") from None
    PAGE.write_text(page(compiled, read_launches(options.launches)))
    print(PAGE)


if __name__ == "__main__":
    main()
