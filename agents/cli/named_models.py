"""The words of the command line that name a run or a model, and their checks. Importing this does not load torch."""

from __future__ import annotations

from pathlib import Path

from ..errors import CommandError


def with_source(words: list[str]) -> list[str]:
    """Return the words of `textenv critic`, which takes RUN, MODEL or CONFIG.yml first, with the option for that word.

    Raises:
        CommandError: If the first word is none of these, or there is no --out.

    Example:
        >>> with_source(["mine.yml", "--out", "fitted"])
        ['--config', 'mine.yml', '--out', 'fitted']
    """
    # Not from a file, whose `out` is the folder of the training's run.
    has_out = any(word.partition("=")[0] in ("--out", "-h", "--help", "--print_config") for word in words)
    if not words or not has_out:
        raise CommandError("Expected RUN, MODEL or CONFIG.yml, and --out DIR, for textenv critic.")
    if words[0].startswith("-"):
        return words
    first, *rest = words
    if first.endswith((".yml", ".yaml")):
        return ["--config", *words]
    refuse_zip(first)
    if (Path(first) / "run.json").is_file():
        return ["--config", str(Path(first) / "config.yml"), *rest]
    check_model(first)
    return ["--model.name", *words]


def check_model(path: str) -> None:
    """Refuse what is neither "demo" nor the folder, the GGUF file or the name of a model.

    Raises:
        CommandError: If it is not.
    """
    from textenv.huggingface.weights import check_name  # which loads gymnasium, and waits for a quick --help
    from textenv.text.named_tokenizer import DEMO

    if path == DEMO:
        return
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        files = sorted(Path(path).glob("*.gguf"))
        hint = f" but {files[0].name}: name the file, {files[0]}" if files else ""
        raise CommandError(
            f"Expected the folder of a run, with run.json, or of a model, with config.json, got {path}, with "
            f"neither{hint}."
        )
    try:
        check_name(path, f'the folder of a run or of a model, a GGUF file, the name of a model on the hub, or "{DEMO}"')
    except ValueError as error:
        raise CommandError(str(error)) from error


def refuse_zip(path: str) -> None:
    """Refuse a file that `model.save` of Stable-Baselines3 wrote.

    Raises:
        CommandError: If it is one.
    """
    if path.endswith(".zip"):
        raise CommandError(
            f"Expected the folder of a run or of a model, got the file {path}, which is SB3's and holds pickles: read "
            "it in Python, model = agents.load_sb3_zip(path, make_agent(...)), then agents.export(model, tokenizer, "
            "folder)."
        )
