"""The commands of the documentation: every one is parsed by the program that it names, without running it.

A command with an option that does not exist fails here. With `-s`, each is printed with its exit code.
"""

import argparse
import configparser
import importlib
import importlib.util
import itertools
import re
import runpy
import sys
from argparse import ArgumentParser
from types import SimpleNamespace

import gymnasium
import pytest

from agents.cli import main as cli
from agents.cli.processes import TOGETHER
from agents.runs.folder import RunFolder
from agents.zoo import main as zoo
from tests.helpers import documented
from tests.helpers.command import ROOT

DEMO = "examples/configs/demo.yml"
ENGINES = {  # of each verb: the module, and its functions that do the work once the words are parsed
    "train": ("agents.report.training", "train"),
    "tune": ("agents.runs.tune", "tune"),
    "sft": ("agents.cli.stages", "tune_model"),
    "classifier": ("agents.cli.stages", "classify"),
    "reward-model": ("agents.cli.stages", "train_scorer"),
    "critic": ("agents.cli.critic", "train_critic"),
    "evaluate": ("agents.cli.trained_model", "evaluate_run"),
    "generate": ("agents.cli.trained_model", "generate_lines"),
    "chat": ("agents.cli.chat", "talk"),
    "rate": ("agents.cli.rate", "rate"),
    "show": ("agents.cli.show", "show"),
    "export": ("agents.cli.trained_model", "export_run"),
    "compare": ("agents.cli.compare", "compare"),
    "report": ("agents.cli.report", "report"),
    "doctor": ("agents.cli.doctor", "examine"),
    "tasks": ("agents.cli.catalogue", "catalogue"),
}
POSITIONAL = {"evaluate": "RUN", "generate": "RUN", "chat": "RUN", "show": "RUN", "export": "RUN DIR", "compare": "A B"}
POSITIONAL["report"] = "RUN"
POSITIONAL["critic"] = f"{DEMO} --out DIR"
STAGES = ("sft", "classifier", "reward-model")
SOURCES = ("--data", "--task", "--from-feedback")
VALUES = {  # for options that the documentation names without a value
    "--fresh": "{model_type: gpt2}",
    "--data": "FILE",
    "--to_hub": "you/model",
    "--max-restarts": "3",
}
STAND_INS = {
    "CONFIG.yml": DEMO,
    "[CONFIG.yml]": DEMO,
    "ranges.yml": DEMO,
    "runs/search/best.yml": DEMO,
    "N": "0",
    "VERB": "tasks",
}
IN_ANOTHER_ENVIRONMENT = ("benchmarks/trl_ppo.py",)
COMMANDS = {words: where for where, words in reversed(documented.commands())}


class Understood(Exception):
    """A script has parsed its words."""


@pytest.fixture
def exit_code(monkeypatch, pytestconfig):
    """Parse a command as its program does, with the work itself replaced; return the exit code or a complaint."""
    monkeypatch.chdir(ROOT)

    def code(words):
        program, *rest = (STAND_INS.get(word, word) for word in words)
        if rest[-1:] and rest[-1] in VALUES:
            rest.append(VALUES[rest[-1]])
        try:
            if program == "textenv":
                return textenv(rest, monkeypatch)
            if program == "pytest":
                return check_pytest(rest, pytestconfig)
            return {"python": python, "torchrun": torchrun, "accelerate": accelerate, "pip": pip}[program](
                rest, monkeypatch
            )
        except SystemExit as end:  # --help and argparse exit
            return 0 if end.code is None else end.code

    return code


def textenv(words, monkeypatch):
    """Parse the words of a verb, after adding required words that the documentation leaves out."""
    verb, *rest = words
    if verb not in cli.VERBS:
        return cli.main(words)
    if not rest and verb in (*POSITIONAL, *STAGES):
        return cli.main([verb, "--help"])
    if verb in POSITIONAL and rest[0].startswith("-"):
        rest = [*POSITIONAL[verb].split(), *rest]
    if verb in STAGES:
        has_config = not rest[0].startswith("-")
        rest += [] if "--out" in rest else ["--out", "DIR"]
        rest += [] if has_config or set(SOURCES) & set(rest) else ["--data", "FILE"]
    if verb == "doctor":  # which tells a run from a configuration by its being a folder
        rest = [str(ROOT) if word == "RUN" else word for word in rest]
    if "--key" in rest:  # a placeholder for any option
        del rest[rest.index("--key") : rest.index("--key") + 2]
    if "--processes" in rest:  # which would start them
        assert verb in TOGETHER and rest[rest.index("--processes") + 1].isdecimal()
        del rest[rest.index("--processes") : rest.index("--processes") + 2]
    called = []
    module, *engines = ENGINES[verb]
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "open", lambda path: SimpleNamespace(config=ROOT / DEMO))
        patch.setattr(cli, "check_folders", lambda words, config: None)  # FOLDER and RUN do not exist
        patch.setattr(cli, "check_model", lambda path: None)
        for engine in engines:
            patch.setattr(importlib.import_module(module), engine, lambda *args: called.append(verb) or 0)
        code = cli.main([verb, *rest])
    assert code or called == [verb], f"textenv {verb} calls something else than {ENGINES[verb]}"
    return code


def python(words, monkeypatch):
    """Start a script or a module, and end it as soon as its words are parsed."""
    first, *rest = words
    if first == "-c":
        compile(rest[0], "-c", "exec")
        return 0
    if first == "-m":
        return module(*rest, monkeypatch=monkeypatch)
    path = ROOT / first
    if not path.is_file():
        return f"no file {first}"
    if first in IN_ANOTHER_ENVIRONMENT:
        return 0
    if not re.search(r"import argparse|from work import .*(arguments|run_script)", path.read_text()):
        return f"{first} takes no words" if rest else 0
    return parsed(lambda: runpy.run_path(str(path), run_name="__main__"), [first, *rest], monkeypatch)


def parsed(start, words, monkeypatch):
    """Call `start` with words on the command line, and end it in `parse_args`."""
    parse = ArgumentParser.parse_args

    def parse_and_end(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Understood

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", list(words))
        patch.syspath_prepend(str((ROOT / words[0]).parent))
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
        with pytest.raises(Understood):
            start()
    return 0


def module(name, *words, monkeypatch):
    """Check a module's words; all of them only where rl_zoo3, which parses them, is installed."""
    if name == "nltk.downloader":
        return 0
    if name.startswith("tests."):  # which would run for minutes
        if importlib.util.find_spec(name) is None:
            return f"no module {name}"
        return parsed(lambda: runpy.run_module(name, run_name="__main__"), [name, *words], monkeypatch) if words else 0
    options = dict(itertools.pairwise(words))
    if "--conf-file" in options and not (ROOT / options["--conf-file"]).is_file():
        return f"no file {options['--conf-file']}"
    if options.get("--algo", "ppo") not in (*zoo.ALGORITHMS, "ppo"):
        return f"no algorithm {options['--algo']}"
    gymnasium.spec(options.get("--env", "textenv/Demo-v0"))
    if importlib.util.find_spec("rl_zoo3") is None:
        return 0 if name == "agents.zoo" or name.startswith("rl_zoo3.") else f"no module {name}"
    return parsed(lambda: runpy.run_module(name, run_name="__main__"), [name, *words], monkeypatch)


def torchrun(words, monkeypatch):
    """Parse the words of torchrun, and those of the script if the script is in this repository."""
    from torch.distributed.run import get_args_parser

    return launched(get_args_parser(), words, monkeypatch)


def accelerate(words, monkeypatch):
    """Parse the words of `accelerate launch`, and those of the script as in `torchrun`."""
    from accelerate.commands.launch import launch_command_parser

    return launched(launch_command_parser(), words[1:], monkeypatch) if words[0] == "launch" else f"not {words[0]}"


def launched(parser, words, monkeypatch):
    has_script = any(word.endswith(".py") for word in words) or "agents.cli" in words
    args = parser.parse_args(words if has_script else [*words, "train.py"])
    script = args.training_script
    if args.module:
        return textenv(args.training_script_args, monkeypatch) if script == "agents.cli" else f"no module {script}"
    return 0 if script == "train.py" else python([script, *args.training_script_args], monkeypatch)


def pip(words, monkeypatch):
    """Check the names of extras and of files."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for word in words:
        for extra in re.findall(r"[\w-]+", (re.search(r"\[(.*)\]", word) or ["", ""])[1]):
            if extra not in setup["options.extras_require"]:
                return f"no extra {extra}"
        if word.endswith(".txt") and not (ROOT / word).is_file():
            return f"no file {word}"
    return 0


def check_pytest(words, config):
    """Parse with the options of all plugins, and check that markers, files and names of tests exist."""
    args = config._parser.parse(words)
    markers = {line.partition(":")[0].partition("(")[0].strip() for line in config.getini("markers")}
    unknown = set(re.findall(r"\w+", args.markexpr or "")) - {"and", "or", "not"} - markers
    if unknown:
        return f"no marker {', '.join(sorted(unknown))}"
    texts = []
    for path in args.file_or_dir:
        if not (ROOT / path).exists():
            return f"no file {path}"
        texts.append((ROOT / path).read_text())
    if args.keyword and not re.search(rf"def test_\w*{args.keyword}|{args.keyword}", "\n".join(texts)):
        return f"no test named {args.keyword}"
    return 0


@pytest.mark.filterwarnings("ignore")  # warnings of the libraries that the scripts import
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[:60])
def test_a_documented_command_is_understood(words, exit_code, capsys):
    code = exit_code(words)
    stderr = capsys.readouterr().err
    print(f"exit {code}  {COMMANDS[words]}: {' '.join(words)}")
    assert code == 0, f"{COMMANDS[words]}: {' '.join(words)}: {stderr or code}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page",
    [
        "```\ntextenv train --no_such_option 1\n```",
        "```bash\ntextenv train \\\n  --env.id text --env.no_such_option 1\n```",
        "goes on with `textenv trian`",
        "and `textenv reward-model --frish` makes one",
        "| `sft`, `classifier` | the stages before; `--no_such_option` goes on |",
        "| `generate RUN --no_such_option FILE`, `chat RUN` | lines |",
        "    python examples/quickstart.py --no-such-option",
        "`python examples/reviews.py --seed 0`",  # without its data
        "`python examples/nowhere.py`",
        "`python benchmarks/scale_on_paper.py --quick`",
        "`python -m agents.zoo --algo nothing`",
        "`python -m agents.zoo --algo token_ppo --conf-file examples/zoo/nowhere.yml`",
        pytest.param("`python -m agents.zoo --algo token_ppo --no-such-option`", marks=pytest.mark.library),
        "`pytest -m slwo`",
        "`pytest tests/nowhere.py`",
        "`pytest tests/test_house.py -k no_such_rule`",
        "`pytest --no-such-option`",
        "```\ntextenv tasks && torchrun --no_such_option 2 train.py\n```",
        "```\ntextenv tasks   # or, with GPUs: torchrun examples/quickstart.py --no-such-option\n```",
        "`accelerate launch --no_such_option 2 train.py`",
        '```\npip install "textenv[nothing]"\n```',
    ],
)
def test_a_command_that_does_not_exist_is_found(page, exit_code):
    if "agents.zoo --algo token_ppo --no" in page:
        pytest.importorskip("rl_zoo3")

    def code(words):
        try:
            return exit_code(words)
        except pytest.UsageError as error:
            return str(error)

    assert any(code(words) != 0 for words in documented.of_page(page))


def test_commands_are_read_as_they_are_typed():
    block = (
        "PYTHONPATH=. textenv train a.yml \\\n  --x '{id: a,\n  args: {}}' # why\nyes | textenv tasks > file\nit isn't"
    )
    page = f"textenv is no command\n```\n{block}\n```\nand `textenv\nsft --data X` but not `textenv/env.py`, `textenv`"
    typed = [("train", "a.yml", "--x", "{id: a,\n  args: {}}"), ("tasks",), ("sft", "--data", "X")]
    assert documented.of_page(page) == [("textenv", *words) for words in typed]
    code = '"""One.\n\n    python a.py [--b C]\n\nAnd `pytest -x`.\n"""\nx = 1  # of several: torchrun a.py\n'
    assert documented.of_code(code) == [("torchrun", "a.py"), ("python", "a.py", "--b", "C"), ("pytest", "-x")]
    settings = "# One.\n#\n#   textenv train \\\n#     x.yml    (goes on)\nkey: 1  # textenv tasks\n"
    assert documented.of_settings(settings) == [("textenv", "train", "x.yml")]


@pytest.fixture
def options(pytestconfig, capsys):
    """Return every option of every program that the documentation starts."""
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    for verb in cli.VERBS:
        with pytest.raises(SystemExit):
            cli.main([verb, "--help"])
    texts = [capsys.readouterr().out, launch_command_parser().format_help(), get_args_parser().format_help()]
    texts += [path.read_text() for folder in ("examples", "benchmarks") for path in (ROOT / folder).glob("*.py")]
    options = set(re.findall(r"--[a-z](?:[\w.-]*\w)?", "\n".join(texts)))
    return {name.replace("-", "_") for name in options | {"--key"}}  # the placeholder for any option


def test_an_option_that_is_named_alone_belongs_to_a_program(options):
    pages = {path: path.read_text() for pattern in documented.PAGES for path in ROOT.glob(pattern)}
    alone = re.compile(r"`(--[a-z][\w.-]*)[^`]*`")
    named = {name: path.name for path, text in pages.items() for name in alone.findall(text)}
    assert len(named) > 10
    assert [f"{page}: {name}" for name, page in named.items() if name.replace("-", "_") not in options] == []
    assert "__no_such_option" not in options
