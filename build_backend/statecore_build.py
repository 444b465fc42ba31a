"""setuptools as the PEP 517 backend, with the target environment's torch visible under build isolation.

pip runs this with the interpreter of the environment that it installs into, but removes that environment's
site-packages from sys.path. The library must be compiled against the torch that it will run with, so this backend
appends them again; packages of the isolated environment still take precedence. With torch as a build requirement, pip
would instead download the newest torch and gigabytes of CUDA libraries, and compile against those.

setuptools is requested here rather than in pyproject.toml, so that a missing torch is reported before any download.
"""

import importlib
import importlib.util
import sys
import sysconfig

SETUPTOOLS = ["setuptools>=77"]


def _show_target_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        paths = dict.fromkeys(sysconfig.get_path(key) for key in ("purelib", "platlib"))
        sys.path += [path for path in paths if path not in sys.path]
        importlib.invalidate_caches()
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(
            "statecore is compiled against the PyTorch it will run with, and none is installed for "
            f"{sys.executable}.\nInstall it first (pip install torch), then run this again."
        )


def _requirements(config_settings=None):
    _show_target_torch()
    return SETUPTOOLS


get_requires_for_build_wheel = get_requires_for_build_editable = _requirements


def get_requires_for_build_sdist(config_settings=None):
    return SETUPTOOLS


def _hook(name: str):
    def run(*args, **kwargs):
        if name != "build_sdist":
            _show_target_torch()
        return getattr(importlib.import_module("setuptools.build_meta"), name)(*args, **kwargs)

    return run


build_wheel = _hook("build_wheel")
build_editable = _hook("build_editable")
build_sdist = _hook("build_sdist")
prepare_metadata_for_build_wheel = _hook("prepare_metadata_for_build_wheel")
prepare_metadata_for_build_editable = _hook("prepare_metadata_for_build_editable")
