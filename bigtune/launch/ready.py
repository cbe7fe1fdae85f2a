"""What is done once a host before its workers start: `python -m bigtune.launch.ready first|other [OPTION…]`.

The first host checks the run as a whole, and holds its lock meanwhile; each builds DeepSpeed's operators and prepares
the documents, which others with the same folder then find. The last line is an answer as JSON.
"""

import json
import os
import sys
from contextlib import nullcontext

from bigtune import api
from bigtune.errors import BigtuneError
from bigtune.launch.check import RUN
from bigtune.process import USERS_ERROR
from bigtune.runfile import parse, resolve
from bigtune.train.lock import RunLock


def main(place: str, resume: str, new_data: str) -> None:
    """Get ready, or say in one line why not."""
    try:
        run = resolve(parse(os.environ[RUN], "run"))
        with RunLock(run.output) if place == "first" else nullcontext():
            fingerprint = api.make_ready(run, resume or None, new_data == "new")
        print(json.dumps({"documents": fingerprint}), flush=True)
    except BigtuneError as error:
        print(error, flush=True)
        sys.exit(USERS_ERROR)


if __name__ == "__main__":
    main(*sys.argv[1:])
