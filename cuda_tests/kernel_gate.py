"""Checks compiled CUDA kernels: no spills, no stack frames, no ptxas complaints, and the expected instructions.

    python cuda_tests/kernel_gate.py --folder build/kernels csrc/*/*.cu

Compiles the kernels for every GPU that is shipped. A kernel fails if it spills registers or has a stack frame, if ptxas
complains about it (C75xx: wgmma serialised or waited for), or if its instructions differ from those in
expected_instructions.toml; so does a kernel without an entry there. Exit code 77: skipped, entirely without nvcc, the
instructions without nvdisasm.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import sass

EXPECTED = Path(__file__).with_name("expected_instructions.toml")
MAX_INSTANTIATIONS = 40  # of shipped kernel templates: every template parameter multiplies the build time
# Forbidden unless an entry names them: tensor cores, tile copies, and atomics, whose order would change results.
ONLY_IF_NAMED = [
    "HMMA", "IMMA", "DMMA", "HGMMA", "QGMMA", "IGMMA", "LDSM", "STSM", "LDGSTS", "UTMALDG", "UTMASTG", "UBLKCP",
    "ATOM", "ATOMG", "ATOMS", "RED", "REDG", "UTMAREDG",
]  # fmt: skip
NEVER = ["LDL", "STL"]  # local memory


@dataclass
class Findings:
    failures: list[str] = field(default_factory=list)
    kernels: set[tuple[str, str]] = field(default_factory=set)  # (stem of the file, kernel) with code on some GPU
    empty: set[tuple[str, str]] = field(default_factory=set)  # without code on some GPU
    used_patterns: set[tuple[str, str]] = field(default_factory=set)  # (stem, pattern of an entry)


def within(count: int, expected: int | str) -> bool:
    """expected: 8, "8..", "..8" or "8..16", inclusive."""
    low, dots, high = str(expected).partition("..")
    return int(low or 0) <= count <= int(high or (10**9 if dots else low))


def expected_counts(entry: dict, gpu: str) -> dict[str, int | str]:
    """The counts of an entry, overridden by those for this GPU, with everything that must not occur."""
    general = {opcode: count for opcode, count in entry.items() if not isinstance(count, dict)}
    counts = general | entry.get(gpu, {})
    forbidden = {opcode: 0 for opcode in ONLY_IF_NAMED if not _named(opcode, counts)}
    return dict.fromkeys(NEVER, 0) | forbidden | counts


def _named(opcode: str, counts: dict) -> bool:
    return any(pattern.split(".")[0] == opcode for pattern in counts)


def waste(function: sass.Function) -> list[str]:
    """Whatever is wrong with any kernel."""
    wrong = [f"{function.stack} bytes of stack frame"] if function.stack else []
    wrong += [f"{function.spilled} bytes spilled"] if function.spilled else []
    return wrong + function.complaints


def actual_counts(function: sass.Function) -> str:
    """In the form of an entry."""
    opcodes = [*ONLY_IF_NAMED, "LDG.128", "LDG.64", "STG.128", "STG.64"]
    counts = {opcode: function.count(opcode) for opcode in opcodes}
    return f"{{ {', '.join(f'{json.dumps(opcode)} = {count}' for opcode, count in counts.items() if count)} }}"


def unexpected(function: sass.Function, stem: str, gpu: str, entries: dict[str, dict], found: Findings) -> list[str]:
    """How the instructions differ from the first entry that matches the kernel's name."""
    pattern = next((pattern for pattern in entries if fnmatchcase(function.name, pattern)), None)
    if pattern is None:
        return [f"no entry in expected_instructions.toml: add what you expect. It has {actual_counts(function)}"]
    found.used_patterns.add((stem, pattern))
    return [
        f"{opcode} {function.count(opcode)} times instead of {expected}"
        for opcode, expected in expected_counts(entries[pattern], gpu).items()
        if not within(function.count(opcode), expected)
    ]


def check_kernels(compiled: dict[tuple[str, str], list[sass.Function]], expected: dict, disassembled: bool) -> Findings:
    found = Findings()
    for (stem, gpu), functions in sorted(compiled.items()):
        for function in functions:
            if function.empty:
                found.empty.add((stem, function.name))
                continue
            wrong = waste(function)
            if function.entry:
                found.kernels.add((stem, function.name))
                if disassembled:
                    wrong += unexpected(function, stem, gpu, expected.get(stem, {}), found)
            found.failures += [f"{stem}: {function.name} for {gpu}: {what}" for what in wrong]
    return found


def check_completeness(stems: list[str], expected: dict, disassembled: bool, found: Findings) -> None:
    """Entries without a kernel, kernels without code, and too many instantiations."""
    if disassembled:
        for stem in stems:
            for pattern in expected.get(stem, {}):
                if (stem, pattern) not in found.used_patterns:
                    found.failures.append(f'{stem}: "{pattern}" in expected_instructions.toml fits no kernel')
    found.failures += [f"{stem}: {name} does nothing on any GPU" for stem, name in sorted(found.empty - found.kernels)]
    shipped = {path.stem for path in sass.HEADERS.glob("*/*.cu")}
    instantiations = sum(stem in shipped and "<" in name for stem, name in found.kernels)
    if instantiations >= MAX_INSTANTIATIONS:
        found.failures.append(
            f"{instantiations} instantiations of templates are shipped, the limit is {MAX_INSTANTIATIONS}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for cubins and listings, reused by later runs")
    parser.add_argument("--expected", type=Path, default=EXPECTED)
    parser.add_argument("sources", type=Path, nargs="+")
    options = parser.parse_args()
    try:
        import tomllib
    except ModuleNotFoundError:
        print("skipped: expected_instructions.toml needs Python >= 3.11")
        return 77
    try:
        compiled = sass.examine(options.sources, options.folder)
    except sass.ToolMissing as missing:
        print(f"skipped: {missing}")
        return 77
    expected = tomllib.loads(options.expected.read_text())
    disassembled = sass.nvdisasm() is not None
    found = check_kernels(compiled, expected, disassembled)
    check_completeness([source.stem for source in options.sources], expected, disassembled, found)

    print("\n".join(found.failures) if found.failures else "no spills, no stack frames, expected instructions")
    print(f"{len(found.kernels)} kernels, nvcc {sass.compiler()}, {len(found.failures)} failures")
    if not disassembled:
        print("skipped: instructions, for there is no nvdisasm (pip install nvidia-cuda-nvdisasm)")
    return 1 if found.failures else 0 if disassembled else 77


if __name__ == "__main__":
    sys.exit(main())
