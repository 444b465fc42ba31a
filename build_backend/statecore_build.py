"""setuptools.build_meta with the target environment's torch visible under build isolation.

pip runs this with the interpreter of the environment it installs into, but with that environment's site-packages taken
off sys.path. The library must be compiled against the torch it will run with, so they are put back, at the end: what
the isolated environment provides still comes first. Naming torch in build-system.requires instead would download the
newest torch and gigabytes of CUDA libraries, and compile against those.
"""

import importlib
import importlib.util
import sys
import sysconfig

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403


def _show_target_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        sys.path += [
            p for p in dict.fromkeys(sysconfig.get_path(k) for k in ("purelib", "platlib")) if p not in sys.path
        ]
        importlib.invalidate_caches()
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(
            "statecore is compiled against the PyTorch it will run with, and none is installed for "
            f"{sys.executable}.\nInstall it first (pip install torch), then run this again."
        )


def get_requires_for_build_wheel(config_settings=None):
    _show_target_torch()  # the first hook that pip calls: no torch is said before anything is downloaded
    return _setuptools.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings=None):
    _show_target_torch()
    return _setuptools.get_requires_for_build_editable(config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _show_target_torch()
    return _setuptools.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _show_target_torch()
    return _setuptools.build_editable(wheel_directory, config_settings, metadata_directory)
