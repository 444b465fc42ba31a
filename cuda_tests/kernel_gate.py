"""Fails where nvcc makes something else of the kernels than we think.

    python cuda_tests/kernel_gate.py --folder build/kernels csrc/*/*.cu

Compiles them for every GPU that is shipped. A kernel fails that spills registers or keeps a stack frame, that ptxas
complains about (C75xx: wgmma serialised or waited for), and whose instructions differ from what
expected_instructions.toml says; so does a kernel of which it says nothing. Exit code 77: skipped, all of it where
there is no nvcc, the instructions where there is no nvdisasm.
"""

import argparse
import json
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import sass

EXPECTED = Path(__file__).with_name("expected_instructions.toml")
TOO_MANY = 40  # instantiations of kernel templates: each axis multiplies everybody's build
# What an entry does not name must not be there: tensor cores, copies of tiles, and atomics, whose order would change
# results.
NAMED_OR_NONE = [
    "HMMA", "IMMA", "DMMA", "HGMMA", "QGMMA", "IGMMA", "LDSM", "STSM", "LDGSTS", "UTMALDG", "UTMASTG", "UBLKCP",
    "ATOM", "ATOMG", "ATOMS", "RED", "REDG", "UTMAREDG",
]  # fmt: skip
NEVER = ["LDL", "STL"]  # local memory


def within(count: int, wanted: int | str) -> bool:
    """wanted: 8, "8..", "..8" or "8..16", ends included."""
    low, dots, high = str(wanted).partition("..")
    return int(low or 0) <= count <= int(high or (10**9 if dots else low))


def wanted_of(entry: dict, gpu: str) -> dict[str, int | str]:
    """The entry's own ranges and, before them, those it gives for this GPU."""
    general = {what: wanted for what, wanted in entry.items() if not isinstance(wanted, dict)}
    wanted = general | entry.get(gpu, {})
    return dict.fromkeys(NEVER, 0) | {what: 0 for what in NAMED_OR_NONE if not _named(what, wanted)} | wanted


def _named(opcode: str, wanted: dict) -> bool:
    return any(what.split(".")[0] == opcode for what in wanted)


def waste(function: sass.Function) -> list[str]:
    """What is wrong with it whatever it is for."""
    wrong = [f"{function.stack} bytes of stack frame"] if function.stack else []
    wrong += [f"{function.spilled} bytes spilled"] if function.spilled else []
    return wrong + function.complaints


def found(function: sass.Function) -> str:
    """As it might stand in an entry."""
    counts = {what: function.count(what) for what in [*NAMED_OR_NONE, "LDG.128", "LDG.64", "STG.128", "STG.64"]}
    return f"{{ {', '.join(f'{json.dumps(what)} = {count}' for what, count in counts.items() if count)} }}"


def surprises(function: sass.Function, gpu: str, entries: dict[str, dict], used: set[str]) -> list[str]:
    """Where its instructions differ from the first entry whose pattern fits."""
    pattern = next((pattern for pattern in entries if fnmatchcase(function.name, pattern)), None)
    if pattern is None:
        return [f"no entry in expected_instructions.toml: say what you expect. It has {found(function)}"]
    used.add(pattern)
    return [
        f"{what} {function.count(what)} times instead of {wanted}"
        for what, wanted in wanted_of(entries[pattern], gpu).items()
        if not within(function.count(what), wanted)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for cubins and listings, kept from run to run")
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
    except sass.Missing as missing:
        print(f"skipped: {missing}")
        return 77
    expected = tomllib.loads(options.expected.read_text())
    disassembled = sass.nvdisasm() is not None

    failures, kernels, idle = [], set(), set()
    used: dict[str, set[str]] = {source.stem: set() for source in options.sources}
    for (stem, gpu), functions in sorted(compiled.items()):
        for function in functions:
            if function.empty:
                idle.add((stem, function.name))
                continue
            wrong = waste(function)
            if function.entry:
                kernels.add((stem, function.name))
                if disassembled:
                    wrong += surprises(function, gpu, expected.get(stem, {}), used[stem])
            failures += [f"{stem}: {function.name} for {gpu}: {what}" for what in wrong]
    if disassembled:
        for stem, patterns in used.items():
            for pattern in expected.get(stem, {}).keys() - patterns:
                failures.append(f'{stem}: "{pattern}" in expected_instructions.toml fits no kernel')
    failures += [f"{stem}: {name} does nothing on any GPU" for stem, name in sorted(idle - kernels)]
    shipped = {path.stem for path in sass.HEADERS.glob("*/*.cu")}
    instantiations = sum(stem in shipped and "<" in name for stem, name in kernels)
    if instantiations >= TOO_MANY:
        failures.append(f"{instantiations} instantiations of templates are shipped, and {TOO_MANY} are too many")

    print("\n".join(failures) if failures else "nothing spills, nothing is slowed down")
    print(f"{len(kernels)} kernels, nvcc {sass.compiler()}, {len(failures)} failures")
    if not disassembled:
        print("skipped: instructions, for there is no nvdisasm (pip install nvidia-cuda-nvdisasm)")
    return 1 if failures else 0 if disassembled else 77


if __name__ == "__main__":
    sys.exit(main())
