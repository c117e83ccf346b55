"""The installed wheel without extras: every module is imported, every verb has help, the demo is learnt.

`python .ci/bare.py imports`, or `help`, or `train`: outside the sources, in an environment that has the package alone.
"""

import importlib
import json
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

BAR = 0.95  # of the demo's evaluated reward


def imports() -> None:
    """Import every module; one that stands for an extra's feature has to name the extra."""
    done, late, broken = 0, [], []
    for package in ("textenv", "agents"):
        root = importlib.import_module(package)
        if "site-packages" not in str(root.__file__):
            sys.exit(f"Expected the installed {package}, got {root.__file__}.")
        for module in pkgutil.walk_packages(root.__path__, f"{package}.", onerror=broken.append):
            try:
                importlib.import_module(module.name)
                done += 1
            except ImportError as error:
                (late if 'pip install "textenv[' in str(error) else broken).append(f"{module.name}: {error}")
    print(f"{done} modules imported; for want of an extra, not:", *late, sep="\n  ")
    if broken or done < 100:
        sys.exit("\n".join(["Expected every other module to be imported, got:", *broken]))


def textenv(*words: str) -> str:
    """Run the installed script."""
    command = [str(Path(sys.executable).with_name("textenv")), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def show_help() -> None:
    """Ask for the help of each verb that the overview lists."""
    from agents.cli.main import VERBS

    overview = textenv("--help")
    for verb in VERBS:
        if f"\n  {verb} " not in overview or "usage" not in textenv(verb, "--help").lower():
            sys.exit(f"Expected help of {verb}, got none.")
    print("help of", *VERBS)


def train() -> None:
    """Run `textenv train` whole, and hold it to its bar."""
    with tempfile.TemporaryDirectory() as folder:
        print(textenv("train", "--quiet", "--out", f"{folder}/run"))
        results = json.loads(Path(folder, "run", "results.json").read_text(encoding="utf-8"))
    before, after = (results[when]["figures"]["reward"] for when in ("before", "after"))
    print(f"evaluated reward: {before:.3f} before, {after:.3f} after")
    if not before < 0.8 < BAR <= after:
        sys.exit(f"Expected a reward of {BAR} or more after training, and less than 0.8 before.")


if __name__ == "__main__":
    {"imports": imports, "help": show_help, "train": train}[sys.argv[1]]()
