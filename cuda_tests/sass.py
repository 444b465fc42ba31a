"""Compiles .cu files and reads registers, memory, ptxas complaints and instructions of every kernel for every GPU.

One compilation per file and GPU yields a log of ptxas and a cubin, which nvdisasm disassembles (from a CUDA toolkit,
or pip install nvidia-cuda-nvdisasm). Results are cached in a folder as <file>.<gpu>.{cubin,sass,json} until an input
changes.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
HEADERS = HERE.parent / "csrc"
# Architectures and options as in CMakeLists.txt.
GPUS = {"sm_80": "compute_80", "sm_90a": "compute_90a"}
OPTIONS = ["-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", f"-I{HEADERS}", f"-I{HERE}"]
FORMAT = 1  # of the cached .json

# The log of ptxas -v: a paragraph per function, for kernels and the functions they call.
FUNCTION = re.compile(
    r"Function properties for (?P<name>\S+)\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for '\w+'")
USED = re.compile(r"Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?")
# wgmma serialised, or waited for although the source does not wait.
SLOWED = re.compile(r"\(C75\d\d\).*?'(?P<name>\w+)'")
COMPLAINT = re.compile(r"^.*\(C\d{4}\).*$", re.MULTILINE)

# nvdisasm
SECTION = re.compile(r"^\s*\.section\s+(?P<name>\S+?),")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z]\w*(?:\.\w+)*)")
WORD = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+\.word\s+0x(?P<value>[0-9a-f]{8})$")


@dataclass
class Function:
    """A kernel or a function that kernels call."""

    name: str  # demangled, without namespaces and parameters
    entry: bool
    stack: int = 0  # bytes
    spilled: int = 0
    complaints: list[str] = field(default_factory=list)
    registers: int = 0
    shared: int = 0  # static, bytes
    threads: int | None = None  # from the launch bounds
    instructions: dict[str, int] | None = None  # full opcode -> count; None without nvdisasm

    def count(self, pattern: str) -> int:
        """Counts an opcode such as "LDG", or "LDG.128": with these modifiers, possibly among others."""
        opcode, *modifiers = pattern.split(".")
        return sum(
            number
            for full, number in (self.instructions or {}).items()
            if full.split(".")[0] == opcode and not set(modifiers) - set(full.split(".")[1:])
        )

    @property
    def empty(self) -> bool:
        """Whether the body is empty on this GPU: it only returns or traps."""
        trivial = {"LDC", "MOV", "IMAD", "EXIT", "BRA", "NOP", "BPT"}  # the first three set up the stack pointer
        if self.instructions is None:
            return False
        real = {full: number for full, number in self.instructions.items() if full.split(".")[0] != "NOP"}
        return sum(real.values()) <= 4 and not {full.split(".")[0] for full in real} - trivial


class ToolMissing(Exception):
    """nvcc or nvdisasm is not installed."""


@cache
def nvcc() -> str:
    known = (os.environ.get("CUDACXX"), shutil.which("nvcc"), shutil.which("/usr/local/cuda/bin/nvcc"))
    found = next((path for path in known if path), None)
    if found is None:
        raise ToolMissing("no nvcc (CUDACXX, PATH, /usr/local/cuda/bin)")
    return found


@cache
def nvdisasm() -> str | None:
    beside_nvcc = Path(nvcc()).resolve().with_name("nvdisasm")
    from_pypi = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvdisasm")
    known = (shutil.which("nvdisasm"), *(shutil.which(path) for path in (beside_nvcc, *from_pypi)))
    return next((path for path in known if path), None)


@cache
def _version(tool: str | None) -> str:
    return "none" if tool is None else _run(tool, "--version")


def compiler() -> str:
    """The release and build of nvcc."""
    return re.search(r"release [\d.]+, (V[\d.]+)", _version(nvcc()))[1]


def _run(*command: object) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def _digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def examine(sources: list[Path], folder: Path) -> dict[tuple[str, str], list[Function]]:
    """Returns {(stem of the file, GPU): functions}, from the cache in `folder` or compiled in parallel.

    As in CMakeLists.txt, *_sm90.cu is compiled for sm_90a only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    largest_first = sorted(sources, key=lambda source: -source.stat().st_size)
    jobs = [(source, gpu) for source in largest_first for gpu in GPUS if _ships(source, gpu)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda job: _examine(*job, folder), jobs)
        return {(source.stem, gpu): functions for (source, gpu), functions in zip(jobs, results, strict=True)}


def _ships(source: Path, gpu: str) -> bool:
    return gpu == "sm_90a" or not source.stem.endswith("_sm90")


def _examine(source: Path, gpu: str, folder: Path) -> list[Function]:
    stem = folder / f"{source.stem}.{gpu}"
    cached, cubin, listing, dependencies = (Path(f"{stem}.{suffix}") for suffix in ("json", "cubin", "sass", "d"))
    gencode = f"-gencode=arch={GPUS[gpu]},code={gpu}"
    command = [nvcc(), *OPTIONS, "-Xptxas=-v", "-Werror=all-warnings", gencode, "-cubin"]
    made_by = [FORMAT, *command, _version(nvcc()), _version(nvdisasm())]
    if (functions := _from_cache(cached, made_by)) is not None:
        return functions
    log = _run(*command, "-MD", "-MF", dependencies, source.resolve(), "-o", cubin)
    named = _read_log(log)
    if nvdisasm() is not None:
        listing.write_text(_run(nvdisasm(), cubin))
        _read_listing(listing.read_text(), named)
    for function, name in zip(named.values(), readable(list(named)), strict=True):
        function.name = name
    record = {
        "made_by": made_by,
        "inputs": {path: _digest(path) for path in _own_dependencies(dependencies, source)},
        "functions": [vars(function) for function in named.values()],
    }
    cached.write_text(json.dumps(record, indent=1))
    return list(named.values())


def _from_cache(cached: Path, made_by: list) -> list[Function] | None:
    if not cached.exists():
        return None
    record = json.loads(cached.read_text())
    inputs = record["inputs"].items()
    if record["made_by"] != made_by or any(not Path(path).exists() or _digest(path) != was for path, was in inputs):
        return None
    return [Function(**function) for function in record["functions"]]


def _own_dependencies(dependencies: Path, source: Path) -> list[str]:
    """Files of this repository that the source includes; `made_by` covers those of the compiler by its version."""
    names = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return [path for path in names if any(Path(path).is_relative_to(at) for at in (HEADERS, source.resolve().parent))]


def _read_log(log: str) -> dict[str, Function]:
    entries = ENTRY.findall(log)
    functions = {}
    for match in FUNCTION.finditer(log):
        function = functions.setdefault(match["name"], Function(match["name"], match["name"] in entries))
        function.stack, function.spilled = int(match["stack"]), int(match["stores"]) + int(match["loads"])
        if function.entry:
            used = USED.search(log, match.end())
            function.registers, function.shared = int(used["registers"]), int(used["shared"] or 0)
    if set(entries) - functions.keys():
        raise SystemExit(f"cannot parse the log of ptxas:\n{log}")
    for line in COMPLAINT.findall(log):
        match = SLOWED.search(line)
        for name in {match["name"]} & functions.keys() if match else functions:
            functions[name].complaints.append(line.strip())
    return functions


def _read_listing(listing: str, functions: dict[str, Function]) -> None:
    counts: Counter[str] = Counter()
    info, threads = None, []
    for line in listing.splitlines():
        if match := SECTION.match(line):
            section = match["name"]
            counts = Counter()
            info = functions.get(section.removeprefix(".nv.info.")) if section.startswith(".nv.info.") else None
            if section.startswith(".text."):
                function = functions[section.removeprefix(".text.")]
                function.instructions = counts
        elif match := INSTRUCTION.match(line):
            counts[match["opcode"]] += 1
        elif "EIATTR_MAX_THREADS" in line or "EIATTR_REQNTID" in line:
            threads = []
        elif (match := WORD.match(line)) and info is not None and len(threads) < 3:
            threads.append(int(match["value"], 16))
            if len(threads) == 3:
                info.threads = threads[0] * threads[1] * threads[2]
    for function in functions.values():
        if function.entry and not function.instructions:
            raise SystemExit(f"cannot parse the listing of nvdisasm: no instructions of {function.name}")


def readable(names: list[str]) -> list[str]:
    if not names:
        return []
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [_short(name) for name in text.splitlines()]


def _short(name: str) -> str:
    """statecore::(anonymous namespace)::update<float, 32>(statecore::Params) -> update<float, 32>"""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "").replace("statecore::", "")
    depth = 0
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:at]
    return name
