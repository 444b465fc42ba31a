"""Compiles kernels for every GPU that is shipped and fails where one spills registers or keeps a stack frame.

    python cuda_tests/kernel_resources.py csrc/*/*.cu

Exit code 77: there is no nvcc here (CUDACXX, then PATH, then /usr/local/cuda/bin).
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
TARGETS = [("compute_80", "sm_80"), ("compute_90a", "sm_90a"), ("compute_80", "compute_80")]
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<target>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def find_nvcc() -> str | None:
    known = (os.environ.get("CUDACXX"), shutil.which("nvcc"), shutil.which("/usr/local/cuda/bin/nvcc"))
    return next((path for path in known if path), None)


def compiled(nvcc: str, source: str, virtual: str, code: str, folder: str) -> str:
    """What ptxas says of the kernels in `source`; of PTX it says nothing, which is assembled on the user's machine."""
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        "--expt-relaxed-constexpr",
        f"-I{SOURCES}",
        "-Xptxas=-v",
        "-Werror=all-warnings",
    ]
    command += [f"-gencode=arch={virtual},code={code}", "-c", source, "-o", f"{folder}/kernel.o"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{source} does not compile for {code}:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def main() -> int:
    nvcc = find_nvcc()
    if nvcc is None:
        print("skipped: no nvcc")
        return 77
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for source in sys.argv[1:]:
            for virtual, code in TARGETS:
                if source.endswith("_sm90.cu") and code != "sm_90a":
                    continue
                kernels = list(KERNEL.finditer(compiled(nvcc, source, virtual, code, folder)))
                if code.startswith("sm_") and not kernels:
                    raise SystemExit(f"nvcc's report on {source} for {code} is not understood")
                for kernel in kernels:
                    wasted = sum(int(kernel[what]) for what in ("stack", "stores", "loads"))
                    failures += wasted > 0
                    verdict = f"{wasted} BYTES SPILLED OR ON THE STACK" if wasted else "no spills"
                    print(f"{code:<10} {kernel['registers']:>4} registers, {verdict}: {kernel['name']}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
