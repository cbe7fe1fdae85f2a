"""Can the demo's score come from anything but learning? `python benchmarks/shuffled_answers/run.py`

Tells the demo's story twice, once with honest answers and once with the training answers dealt out anew over
all training rows. The second must stay under 10% exact match on the same held-out rows; the exit code says so.
"""

import json
import sys
import tempfile
from pathlib import Path

from bigtune.demo.story import tell


def main() -> int:
    scores = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, shuffled in (("honest", False), ("shuffled", True)):
            base, tuned = tell(Path(folder) / name, shuffled_answers=shuffled)
            scores[name] = {
                "base_exact_match": base.overall.exact_match,
                "tuned_exact_match": tuned.overall.exact_match,
                "tuned_held_out_loss": tuned.overall.held_out_loss,
                "tuned_by_phrasing": {tag: score.exact_match for tag, score in tuned.by_tag.items()},
            }
    print(json.dumps(scores, indent=1))
    return 0 if scores["honest"]["tuned_exact_match"] > 0.7 and scores["shuffled"]["tuned_exact_match"] < 0.1 else 1


if __name__ == "__main__":
    sys.exit(main())
