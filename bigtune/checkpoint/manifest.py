"""What a checkpoint or a merged model is made of: every file with its size and checksums, tensor by tensor.

    manifest.json    {"id": …, "files": {"layout.json": {"size": …, "checksum": …},
                      "rank-00000-of-00002.safetensors": {…, "tensors": {"0.master": …}}}, "disks": …, "checksum": …}

Every save has an id of its own, which rank files have in their metadata, so that files of two saves are told apart
without reading them.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from bigtune.checkpoint.folder import sync, to_json
from bigtune.errors import CheckpointError
from bigtune.tensorfile import BrokenFileError, Sums, read_header

FILE = "manifest.json"
VERSION = 1
ID = "save"
"""The key of a save's id in the metadata of its rank files."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of one folder by their paths in it.

    `disks` are the hosts that wrote, where they do not share a file system, and the files that each has; a file that
    none of them names is on all.
    """

    id: str
    files: Mapping[str, Sums]
    disks: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write manifest.json, on the disk."""
        tree = {"version": VERSION, **asdict(self)}
        (folder / FILE).write_text(to_json({**tree, "checksum": _own_checksum(tree)}), encoding="utf-8")
        sync(folder / FILE)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read manifest.json.

        Raises:
            CheckpointError: it is missing, broken, or of another version.
        """
        path = folder / FILE
        try:
            tree: dict[str, Any] = json.loads(path.read_bytes())
            checksum = tree.pop("checksum")
            if checksum != _own_checksum(tree):
                raise CheckpointError(f"{path}: is damaged, or was edited; its own checksum differs")
            if tree["version"] != VERSION:
                raise CheckpointError(f"{path}: version {tree['version']}; this bigtune reads version {VERSION}")
            return cls(tree["id"], {name: Sums(**sums) for name, sums in tree["files"].items()}, tree["disks"])
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder.absolute()}: no {FILE}; this is no whole checkpoint or merged model of bigtune"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: is damaged ({error!r})") from None

    @staticmethod
    def is_of_rank(name: str) -> bool:
        """Whether a file is one rank's, which not every host needs."""
        return name.startswith("rank-")


def _own_checksum(tree: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(tree, sort_keys=True).encode())


def missing_or_cut(folder: Path, manifest: Manifest, names: Collection[str] | None = None) -> dict[str, str]:
    """What can be seen without reading: files that are not there, not as long as they were, or of another save.

    Returns:
        What is wrong, in words, by file.
    """
    problems = {}
    for name in manifest.files if names is None else names:
        path, wanted = folder / name, manifest.files[name]
        try:
            size = path.stat().st_size
            if size != wanted.size:
                problems[name] = f"has {size:,} bytes of {wanted.size:,}"
            elif manifest.is_of_rank(name) and read_header(path)[1].get(ID) != manifest.id:
                problems[name] = "is of another save than the manifest"
        except FileNotFoundError:
            problems[name] = "is missing"
        except (OSError, BrokenFileError) as error:
            problems[name] = f"cannot be read ({error})"
    return problems
