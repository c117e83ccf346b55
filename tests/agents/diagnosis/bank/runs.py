"""The runs of the bank by `textenv train`, their diagnosis, and the table of what was named."""

import json
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import yaml

from agents.cli import main as cli
from agents.diagnosis import diagnose
from agents.evaluation.tables import markdown

from .faults import FAULTS, HELD_OUT, healthy, reward
from .model import BAD, GOOD, PROMPTS, TEMPLATE, write_model

BASE = {
    "seed": 0,
    "device": "cpu",
    "total_tokens": 3840,
    "model.name": "@model",
    "env.id": "text",
    "env.prompts": "@prompts",
    "env.max_new_tokens": 10,
    **reward("Mood"),
    "algorithm.n_envs": 32,
    "algorithm.batch_size": 80,
    "algorithm.n_epochs": 2,
    "algorithm.learning_rate": 1e-3,
    "kl.coef": 0.05,
    "evaluation.every": 1280,
    "evaluation.n_prompts": 12,
    "evaluation.n": 2,
    "samples_every": 6,
    "checkpoint_every": 1000,
    "loggers": [],
}


class Bank:
    """The models and files of the bank in a folder, and the runs that are made of them.

    Args:
        folder: The folder, in which models that exist already are used again.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.places = {
            "@model": self._model("model"),
            "@other": self._model("other", n_steps=40, seed=1),
            "@chat": self._model("chat", template=TEMPLATE),
            "@prompts": self._file("prompts.txt", "".join(f"{prompt}\n" for prompt in PROMPTS)),
            "@duplicates": self._file("duplicates.txt", f"{PROMPTS[0]}\n" * 80 + "".join(f"{p}\n" for p in PROMPTS)),
            "@finished": self._file("finished.txt", "".join(f"{prompt} is good .\n" for prompt in PROMPTS)),
            "@rows": self._file("rows.jsonl", "".join(map(_row, enumerate(PROMPTS)))),
        }

    def _model(self, name, **options):
        folder = self.folder / name
        return str(folder) if (folder / "config.json").is_file() else write_model(folder, **options)

    def _file(self, name, text):
        (self.folder / name).write_text(text)
        return str(self.folder / name)

    def train(self, case, out):
        """Train a case into a folder, unless it is there; return the folder."""
        out = Path(out)
        if (out / "run.json").is_file():
            return out
        config = {}
        for key, value in {**BASE, **case.settings}.items():
            *groups, last = key.split(".")
            place = config
            for group in groups:
                place = place.setdefault(group, {})
            place[last] = self.places.get(value, value) if isinstance(value, str) else value
        out.parent.mkdir(parents=True, exist_ok=True)
        file = out.with_suffix(".yml")
        file.write_text(yaml.safe_dump(config))
        said = StringIO()
        with (case.inject or nullcontext)(), redirect_stdout(said), redirect_stderr(said):
            cli.main(["train", str(file), "--out", str(out), "--allow", "tests", "--quiet"])
        if not (out / "run.json").is_file():
            raise AssertionError(f"{case.name} left no run: {said.getvalue()}")
        return out

    def diagnosed(self, case, out):
        """Return the findings of a case."""
        return diagnose(self.train(case, out))


def _row(numbered):
    number, prompt = numbered
    words = [*GOOD, *BAD]
    return json.dumps({"prompt": prompt, "number": 100 + number, "answer": words[number % len(words)]}) + "\n"


def cases(held_out=False, quick=False):
    """Return all cases, those of the small budget, or the healthy ones that are held out."""
    chosen = healthy(held_out=True) if held_out else [*FAULTS, *healthy()]
    return [case for case in chosen if case.quick or not quick]


def place_of(folder, case):
    """Return the folder of a case's run."""
    return Path(folder) / "runs" / case.name.replace(" ", "_").replace(",", "")


def wrong(results):
    """Return the cases with a fault whose cause was not named first, and the healthy ones for which one was named.

    Args:
        results: Cases, each with the findings of its run.
    """
    firsts = [(case, found[0].id if found else None) for case, found in results]
    missed = [(case.name, case.cause, first) for case, first in firsts if case.cause and first != case.cause]
    alarms = [(case.name, first) for case, first in firsts if case.cause is None and first]
    return missed, alarms


def table(results):
    """Return what was found in runs of the bank as a sentence and a table in Markdown."""
    missed, alarms = wrong(results)
    faults = [case for case, _ in results if case.cause]
    held_out = [case.name for case, _ in results if case.name.startswith(HELD_OUT)]
    n_healthy = len(results) - len(faults) - len(held_out)
    later = sum(name in held_out for name, _ in alarms)
    text = (
        f"Of {len(faults)} faults {len(faults) - len(missed)} are named first. Of {n_healthy} healthy runs "
        f"{len(alarms) - later} raise an alarm, and of {len(held_out)} that were held out {later}."
    )
    rows = []
    for case, found in results:
        first, *others = [_code(finding.id) for finding in found] or ["nothing"]
        rows.append([case.name, _code(case.cause) if case.cause else "none", first, ", ".join(others)])
    return f"{text}\n\n{markdown(['run', 'fault', 'named first', 'named as well'], rows)}"


def _code(name):
    return f"`{name}`"
