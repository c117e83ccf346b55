"""The arguments of `textenv train` with several seeds: the plan of each run. Importing this does not load torch."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..configuration.config import TrainConfig
from ..errors import CommandError
from ..runs.plan import Plan


def read_seeds(
    words: list[str],
    out: str | None,
    options: Namespace,
    parse: Callable[[list[str]], tuple[TrainConfig, Any, str]],
    read: Callable[[Path], TrainConfig],
) -> list[Plan]:
    """Return the run of each seed, new or to resume.

    The configuration of a seed is the one that the same words with --seed and --out instead of --seeds give: the seed
    in a configuration file is replaced.

    Args:
        words: The words after the verb.
        out: The folder of all seeds.
        options: The options among the words.
        parse: The function from words to a configuration, the options, and the configuration as YAML.
        read: The function from a run's config.yml to its configuration.

    Raises:
        CommandError: If seeds are given twice or as --seed too, --out is missing, --resume names a folder, or there are
            runs in --out and --resume is not given.
    """
    from ..runs.folder import SEED, RunFolder  # here, since it loads gymnasium, for a quick --help

    _check(words, options, out)
    folders = [RunFolder(Path(str(out)) / f"{SEED}{seed}") for seed in options.seeds]
    if options.resume is None and (
        made := [run.path for run in folders if run.about.is_file() and run.has_checkpoint()]
    ):
        names = ", ".join(path.name for path in made)
        raise CommandError(f"Expected a new folder, got {out} with {names}: add --resume to continue.")
    plans = []
    for seed, folder in zip(options.seeds, folders, strict=True):
        own, _, dumped = parse([*words, f"--seed={seed}", f"--out={folder.path}"])
        is_made = options.resume is not None and folder.about.is_file()
        run = RunFolder.open(folder.path) if is_made else None  # refuses a damaged run.json
        plans.append(Plan(own, dumped, run, None if run is None else read(run.config)))
    return plans


def _check(words: list[str], options: Namespace, out: str | None) -> None:
    seeds = options.seeds
    if any(word.partition("=")[0] == "--seed" for word in words):
        raise CommandError("Expected --seeds or --seed, got both.")
    if repeated := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        raise CommandError(f"Expected each seed once, got --seeds with {', '.join(map(str, repeated))} again.")
    if min(seeds) < 0:
        raise CommandError(f"Expected seeds of 0 or more, got {min(seeds)}.")
    if out is None:
        raise CommandError("Expected --out FOLDER with --seeds, for one folder for each seed.")
    if options.resume:
        raise CommandError(
            f"Expected --resume without a folder with --seeds, got {options.resume}: the seeds of --out are continued."
        )
