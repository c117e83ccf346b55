"""The script of launchers, `torchrun launched.py JOB FOLDER ARGUMENT`: pickles the result of JOB into FOLDER."""

import pickle
import sys
from pathlib import Path

from tests.helpers import mistakes

if __name__ == "__main__":
    job, folder, argument = sys.argv[1:]
    result = getattr(mistakes, job)(argument, Path(folder) / "checkpoints")
    (Path(folder) / f"rank{mistakes.rank_and_size()[0]}.pickle").write_bytes(pickle.dumps(result))
