"""The script of `torchrun launched.py FOLDER`, which pickles the results of `local_engines` into the folder."""

import pickle
import sys
from pathlib import Path

from tests.agents.engines import engine_jobs
from tests.helpers.jobs import rank_and_size

if __name__ == "__main__":
    result = engine_jobs.local_engines()
    (Path(sys.argv[2]) / f"rank{rank_and_size()[0]}.pickle").write_bytes(pickle.dumps(result))
