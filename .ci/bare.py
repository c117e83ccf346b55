"""Checks of the installed wheel without extras: imports of every module, help of every verb, training of the demo.

Run `python .ci/bare.py imports`, `help` or `train` outside the sources, in an environment with the package alone.
"""

import importlib
import json
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

BAR = 0.9  # the lowest evaluated reward of the demo after training: the mean of 40 texts, which vary with the processor


def imports() -> None:
    """Import every module; a module that needs an extra must name the extra in its error."""
    n_imported, needs_extra, broken = 0, [], []
    for package in ("textenv", "agents"):
        root = importlib.import_module(package)
        if "site-packages" not in str(root.__file__):
            sys.exit(f"Expected the installed {package}, got {root.__file__}.")
        for module in pkgutil.walk_packages(root.__path__, f"{package}.", onerror=broken.append):
            try:
                importlib.import_module(module.name)
                n_imported += 1
            except ImportError as error:
                (needs_extra if 'pip install "textenv[' in str(error) else broken).append(f"{module.name}: {error}")
    print(f"{n_imported} modules imported; not imported, as an extra is missing:", *needs_extra, sep="\n  ")
    if broken or n_imported < 100:
        sys.exit("\n".join(["Expected every other module to be imported, got:", *broken]))


def textenv(*words: str) -> str:
    """Run the installed command, and return what it prints."""
    command = [str(Path(sys.executable).with_name("textenv")), *words]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(f"{' '.join(words)} ended with {process.returncode}:\n{process.stdout}{process.stderr}")
    return process.stdout


def show_help() -> None:
    """Ask for the help of each verb that the overview lists."""
    from agents.cli.main import VERBS

    overview = textenv("--help")
    for verb in VERBS:
        if f"\n  {verb} " not in overview or "usage" not in textenv(verb, "--help").lower():
            sys.exit(f"Expected help of {verb}, got none.")
    print("help of", *VERBS)


def train() -> None:
    """Run all of `textenv train`, and compare the rewards before and after with their bars."""
    with tempfile.TemporaryDirectory() as folder:
        print(textenv("train", "--quiet", "--out", f"{folder}/run"))
        results = json.loads(Path(folder, "run", "results.json").read_text(encoding="utf-8"))
        if not Path(folder, "run", "report.html").is_file():  # its script and style are package data
            sys.exit("Expected the report of the run, got none.")
    before, after = (results[when]["figures"]["reward"] for when in ("before", "after"))
    print(f"evaluated reward: {before:.3f} before, {after:.3f} after")
    if not before < 0.8 < BAR <= after:
        sys.exit(f"Expected a reward of {BAR} or more after training, and less than 0.8 before.")


if __name__ == "__main__":
    {"imports": imports, "help": show_help, "train": train}[sys.argv[1]]()
