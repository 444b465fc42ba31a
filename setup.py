"""Builds statecore/_C.so with CMake; see CMakeLists.txt.

Environment: STATECORE_CUDA=AUTO|ON|OFF, STATECORE_CUDA_ARCHITECTURES="sm_80;sm_90a", MAX_JOBS.
"""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """The library does not depend on the Python ABI, so its file name has no ABI tag."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        torch = importlib.util.find_spec("torch")
        if torch is None:
            raise SystemExit("statecore is compiled against PyTorch: pip install torch first, then run this again.")
        if shutil.which("cmake") is None:
            raise SystemExit(
                "statecore is built with CMake >= 3.18: install it (pip install cmake), then run this again."
            )
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        options = {
            "TORCH_DIR": Path(torch.origin).parent,
            "CMAKE_INSTALL_PREFIX": output,
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "BUILD_TESTING": "OFF",
        }
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        settings = [f"-D{name}={value}" for name, value in options.items()]
        for name in ("STATECORE_CUDA", "STATECORE_CUDA_ARCHITECTURES"):
            # If unset, use the default rather than the value cached by an earlier build in this folder.
            settings.append(f"-D{name}={os.environ[name]}" if os.environ.get(name) else f"-U{name}")
        self._run("cmake", "-S", ROOT, "-B", build, *settings)
        self._run("cmake", "--build", build, "--parallel", jobs)
        self._run("cmake", "--install", build)

    @staticmethod
    def _run(*command: object) -> None:
        try:
            subprocess.run([str(part) for part in command], check=True)
        except subprocess.CalledProcessError as error:
            code = error.returncode
            raise SystemExit(f"statecore: building the C++ library failed, see above (exit code {code}).") from None


class PlatformWheel(bdist_wheel):
    """One wheel for all versions of Python 3: platform-specific, but independent of the Python ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("statecore._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
