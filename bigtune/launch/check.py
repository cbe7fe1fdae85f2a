"""What one host says of itself before a run starts on it: `python -m bigtune.launch.check QUESTION …`.

A run is told in BIGTUNE_RUN, as YAML. The last line that is printed is the answer, as JSON.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from bigtune.checkpoint.folder import latest_step
from bigtune.config import Run
from bigtune.errors import BigtuneError
from bigtune.launch.local import free_port, gpus
from bigtune.runfile import parse, resolve
from bigtune.train.rendezvous import interface_to

RUN = "BIGTUNE_RUN"
PACKAGES = ("torch", "deepspeed", "transformers")
OPEN_SECONDS = 20.0
"""How long the first host lets others find out under which of its addresses they reach it."""
DONE = b"."


def facts(run: Run, nonce: str) -> dict[str, Any]:
    """Everything that does not need other hosts. What is wrong stands under `problems`."""
    problems: list[str] = []
    model = _attempt(lambda: _sizes(run.model.path), problems)
    sources = _attempt(lambda: _sources(run), problems)
    output = _attempt(lambda: _leave_mark(run.output, nonce), problems)
    devices = gpus()
    return {
        "problems": problems,
        "versions": _versions(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": devices,
        "gpu_gib": _gpu_memory(len(devices)),
        "memory_gib": psutil.virtual_memory().available / 2**30,
        "free_gib": shutil.disk_usage(output).free / 2**30 if output else None,
        "model": model,
        "model_gib": (sum(model.values()) if model else 0) / 2**30,
        "sources": sources,
        "time": time.time(),
    }


def meet() -> dict[str, Any]:
    """Of the first host: free ports, and its addresses, each with its interface."""
    return {"ports": [free_port(), free_port()], "addresses": {name: interface_to(name) for name in _addresses()}}


def listen(port: int, others: int) -> dict[str, Any]:
    """On the first host: take connections until all others say that they are done."""
    until = time.monotonic() + OPEN_SECONDS
    with socket.create_server(("", port)) as server:
        while others and time.monotonic() < until:
            server.settimeout(max(0.01, until - time.monotonic()))
            with suppress(OSError):
                connection, _ = server.accept()
                connection.settimeout(2.0)
                with connection:
                    others -= connection.recv(1) == DONE
    return {}


def reach(port: int, *addresses: str) -> dict[str, Any]:
    """From another host: under which addresses the first one answers, by the interface that leads to it."""
    found: dict[str, str | None] = {}
    until = time.monotonic() + OPEN_SECONDS / 2  # it may not listen yet
    while not found and time.monotonic() < until:
        for address in addresses:
            with suppress(OSError), socket.create_connection((address, port), timeout=2.0):
                found[address] = interface_to(address)
        time.sleep(0.1)
    for address in list(found)[:1]:
        with suppress(OSError), socket.create_connection((address, port), timeout=2.0) as connection:
            connection.sendall(DONE)
    return {"reached": found}


def seen(run: Run, nonce: str) -> dict[str, Any]:
    """Whose marks are in the output folder, as this host sees it."""
    prefix = f".host-{nonce}-"
    return {"seen": sorted(path.name.removeprefix(prefix) for path in run.output.glob(prefix + "*"))}


def latest(run: Run) -> dict[str, Any]:
    """The step of the latest checkpoint."""
    return {"latest": latest_step(run.output / "checkpoints")}


def clear(run: Run, nonce: str) -> dict[str, Any]:
    """Remove this host's mark."""
    _mark(run.output, nonce).unlink(missing_ok=True)
    return {}


def _attempt(action: Callable[[], Any], problems: list[str]) -> Any:
    try:
        return action()
    except BigtuneError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{error.filename}: {error.strerror}")
    return None


def _sizes(folder: Path) -> dict[str, int]:
    """The files of a model, by name."""
    found = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    if "config.json" not in found:
        raise FileNotFoundError(2, "no model is here (it has no config.json)", str(folder))
    for name in ("config.json", *(name for name in found if name.endswith(".safetensors"))):
        with (folder / name).open("rb") as file:
            file.read(1)
    return found


def _sources(run: Run) -> dict[str, int]:
    """The size of each file of data."""
    from bigtune.data.sources import resolve_sources, stat_of

    files, _ = resolve_sources(run.data.sources)
    return {file.path: (stat_of(file) or [0])[0] for file in files}


def _gpu_memory(count: int) -> list[float]:
    """GiB that are free on each GPU: others may use them too."""
    if not count:
        return []
    import torch

    return [torch.cuda.mem_get_info(device)[0] / 2**30 for device in range(count)]


def _mark(output: Path, nonce: str) -> Path:
    return output / f".host-{nonce}-{os.environ['BIGTUNE_HOST']}"


def _leave_mark(output: Path, nonce: str) -> Path:
    (output / "logs").mkdir(parents=True, exist_ok=True)
    _mark(output, nonce).touch()
    return output


def _versions() -> dict[str, str]:
    """Of what must be the same everywhere; of bigtune its code, which a checkout changes without a version."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    found = {name: importlib.metadata.version(name) for name in (*PACKAGES, "bigtune")}
    found["bigtune"] += f" ({digest.hexdigest()[:8]})"
    return {"Python": sys.version.split()[0], **found}


def _addresses() -> list[str]:
    """Under which others may reach this host: as ssh did, by its name, and of its interfaces."""
    found = os.environ.get("SSH_CONNECTION", "").split()[2:3]
    with suppress(OSError):
        found.append(socket.gethostbyname(socket.gethostname()))
    for name, addresses in psutil.net_if_addrs().items():
        if name != "lo":
            found += [address.address for address in addresses if address.family == socket.AF_INET]
    return [address for address in dict.fromkeys(found) if not address.startswith("127.")]


OF_A_RUN: dict[str, Callable[..., dict[str, Any]]] = {"facts": facts, "seen": seen, "latest": latest, "clear": clear}


def main(what: str, *words: str) -> None:
    """Answer one question."""
    if what == "meet":
        answer = meet()
    elif what == "listen":
        answer = listen(int(words[0]), int(words[1]))
    elif what == "reach":
        answer = reach(int(words[0]), *words[1:])
    else:
        try:
            answer = OF_A_RUN[what](resolve(parse(os.environ[RUN], "run")), *words)
        except BigtuneError as error:
            answer = {"problems": [str(error)]}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
