"""The short form of benchmarks/chaos: a run that is killed again and again equals one that nobody disturbed."""

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtune.checkpoint.folder import latest, rank_file
from bigtune.checkpoint.layout import MASTER
from bigtune.tensorfile import read_header

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "chaos" / "run.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("chaos", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_loses_nothing(tmp_path: Path) -> None:
    chaos, chance = load(), random.Random(1)
    chaos.prepare(tmp_path, steps=40)
    told, story = (chaos.Story(tmp_path / name, (2,)) for name in ("told", "story"))
    assert chaos.finish(told, 2) == 0
    for target in chaos.TARGETS:
        line = chaos.kill_once(story, 2, target, "while saving", chance)
        assert line["code"] != 0 and not line["orphans"] and line["problems"] == []
        assert line["from_step"] < line["latest"] < 40
    assert chaos.finish(story, 2) == 0
    found = chaos.compare(story, told)
    assert found == {"worlds": [2], "same_rows": True, "loss_apart": 0.0, "weights_apart": 0.0}

    # The mutations: another last bit of a weight, and another row.
    checkpoint = latest(story.folder / "checkpoints")
    assert checkpoint is not None
    place = read_header(rank_file(checkpoint, 1, 2))[0][f"0.{MASTER}"]
    with place.path.open("r+b") as file:
        file.seek(place.offset)
        value = np.nextafter(np.frombuffer(file.read(4), "<f4"), np.float32(1))
        file.seek(place.offset)
        file.write(value.tobytes())
    lines = (story.folder / "metrics.jsonl").read_text().splitlines()
    other = json.loads(lines[20])
    lines[20] = json.dumps({**other, "tokens": other["tokens"] + 1})
    (story.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = chaos.compare(story, told)
    assert not found["same_rows"] and found["weights_apart"] > 0
