"""DeepSpeed's C++ operators: only those that a run needs, built once, before any worker waits for them.

The cache is keyed by the CPU, since they are compiled for the one at hand, and by the versions that they
are compiled against. torch guards a build by a lock file that a killed build leaves behind, and on which later
starts would wait; here a build is guarded by an advisory lock, which the system frees with its owner, what a
killed one left is removed, and workers load the finished library without asking torch.
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from bigtune.config import Optim

BUILDERS = {"cpu_adam": "CPUAdamBuilder"}


def needed_ops(preset: Mapping[str, Any], optim: Optim) -> list[str]:
    """The operators of a run: its own Adam is what DeepSpeed steps optimizer states in host memory with.

    Elsewhere torch's fused AdamW is as fast (25 ms against 24 for 37.5M parameters on one core), so that
    nothing has to be compiled.
    """
    offload = preset["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    return ["cpu_adam"] if offload and optim.name == "adamw" else []


def ensure_ops(ops: list[str], say: Callable[[str], None]) -> bool:
    """Build what is not in the cache yet.

    Returns:
        Whether all of `ops` can be loaded. Where one cannot be built, a line says why and what serves.
    """
    if not ops:
        return True
    folder = cache_folder()
    ready = [_ensure(op, folder, say) for op in ops]
    return all(ready)


def load_ops(ops: list[str]) -> None:
    """Give DeepSpeed the built operators, so that it neither compiles nor locks anything."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    for op in ops:
        path = cache_folder() / op / f"{op}.so"
        spec = importlib.util.spec_from_file_location(op, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no extension module")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        OpBuilder._loaded_ops[op] = module


def cache_folder() -> Path:
    """Where operators for this CPU and these versions lie."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    except OSError:
        cpu = [platform.processor()]
    facts = [*cpu, platform.machine(), sys.version, version("torch"), version("deepspeed")]
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "bigtune" / "ops" / key


def _ensure(op: str, folder: Path, say: Callable[[str], None]) -> bool:
    built, failed = folder / f"{op}.built", folder / f"{op}.failed"
    instead = "torch's fused AdamW serves instead"
    if built.exists():
        return True
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        say(f"ops: no C++ compiler to build DeepSpeed's {op} (apt-get install g++ python3-dev); {instead}")
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        say(f"ops: {folder} cannot be written ({error.strerror}); set XDG_CACHE_HOME; {instead}")
        return False
    with FileLock(folder / f"{op}.lock"):
        if built.exists():
            return True
        if failed.exists():
            say(f"ops: DeepSpeed's {op} could not be built before (see {failed}; remove it to try again); {instead}")
            return False
        shutil.rmtree(folder / op, ignore_errors=True)  # a build that was killed, its lock file with it
        say(f"ops: building DeepSpeed's {op}, once for this CPU and these versions (about a minute)")
        code = f"from deepspeed.ops.op_builder import {BUILDERS[op]} as builder; builder().load()"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # ninja lies beside Python
        environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder), "PATH": path}
        command = [sys.executable, "-c", code]
        build = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if build.returncode == 0:
            built.touch()  # not the library's own existence: a build may be killed while it links
            return True
        failed.write_text(build.stdout + build.stderr, encoding="utf-8")
        say(f"ops: DeepSpeed's {op} could not be built (see {failed}); {instead}")
        return False
