"""Can the demo's score come from anything but learning? `python benchmarks/shuffled_answers/run.py`

Tells the demo's story twice, once with honest answers and once with the training answers dealt out anew over
all training rows. The second must stay under 10% exact match on the same held-out rows; the exit code says so.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from bigtune.demo.story import tell
from bigtune.evaluate.report import Score


@click.command()
@click.option("--seed", default=0, show_default=True)
@click.option("--result", type=click.Path(path_type=Path), help="Write the scores here as well.")
def main(seed: int, result: Path | None) -> None:
    """Score both, print the scores as JSON, and fail where the claim does not hold."""
    scores: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, shuffled in (("honest", False), ("shuffled", True)):
            base, tuned = tell(Path(folder) / name, seed, shuffled)
            scores[name] = {
                "base_exact_match": _right(base.overall),
                "tuned_exact_match": _right(tuned.overall),
                "tuned_held_out_loss": tuned.overall.held_out_loss.mean,
                "tuned_by_phrasing": {tag: _right(score) for tag, score in tuned.by_tag.items()},
            }
    text = json.dumps(scores, indent=1) + "\n"
    click.echo(text, nl=False)
    if result:
        result.write_text(text, encoding="utf-8")
    holds = scores["honest"]["tuned_exact_match"] > 0.7 and scores["shuffled"]["tuned_exact_match"] < 0.1
    sys.exit(0 if holds else 1)


def _right(score: Score) -> float:
    return score.metrics["exact_match"].mean


if __name__ == "__main__":
    main()
