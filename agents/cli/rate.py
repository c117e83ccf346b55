"""The command `textenv rate`: a model's texts become questions, which people answer in a terminal or a browser."""

from __future__ import annotations

import getpass
import hashlib
import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers.utils import logging as transformers_logging

from textenv.checks.extras import check_extra
from textenv.env import TextEnv
from textenv.feedback.asked import questions_of
from textenv.feedback.records import MAX_COMPLETIONS, Kind, check_rater, check_scale
from textenv.feedback.store import FeedbackStore
from textenv.feedback.terminal import RatingTerminal
from textenv.prompts.prompts import PromptLike
from textenv.rewards.human import GROUP
from textenv.text.named_tokenizer import DEMO

from ..configuration.config import TrainConfig
from ..errors import CommandError, Exit, StorageError
from ..evaluation.generation import generate, no_reward
from ..policies.lm_policy import LMPolicy
from ..small_models.progress import progress
from .options import RATED_TOKENS, RateConfig, RateOptions
from .prompt_files import prompts_for
from .rate_training import train_by_hand
from .trained_model import Writer, open_writer, text_length

CHUNK = 16  # prompts per call of `generate`: an interrupt loses at most the texts of one chunk
DATABASE = "ratings.db"


def rate(config: TrainConfig | None, chosen: RateConfig, options: RateOptions) -> int:
    """Put a model's texts into the store of feedback, and ask people about them.

    Args:
        config: The configuration of the run `chosen.model`; None for a model.
        chosen: The model, the questions, the rater and the store.
        options: Whether to ask in the terminal, on a page, or while training.

    Returns:
        The exit code.

    Raises:
        CommandError: If options exclude each other.
        StorageError: If the store cannot be written to.
    """
    if options.web and (options.terminal or options.train):
        raise CommandError(f"Expected one of --web and {'--train' if options.train else '--terminal'}, got both.")
    if options.web:  # now, before a model writes texts that nobody could see
        for package in ("starlette", "uvicorn", "jinja2"):
            check_extra("feedback", package, "the rating page")
    rater = check_rater(getpass.getuser() if chosen.rater is None else chosen.rater)
    check_scale((chosen.low, chosen.high))
    if options.train and (chosen.model is None or chosen.out is None or chosen.kind not in (None, "score")):
        raise CommandError("Expected a model, --out DIR and no other --kind than score for textenv rate --train.")
    if chosen.model is None and chosen.db is None and not Path(DATABASE).is_file():
        raise CommandError(
            f"Expected a model to write what is rated, as textenv rate {DEMO}, or --db FILE with questions that wait, "
            f"got neither, and there is no {DATABASE} here."
        )
    db = chosen.db or (f"{chosen.out}/{DATABASE}" if options.train else DATABASE)
    chosen = replace(chosen, db=db)
    transformers_logging.disable_progress_bar()
    try:
        if options.train:
            return train_by_hand(config, chosen, options, rater)
        return _rate(config, chosen, options, rater)
    except sqlite3.Error as error:
        raise StorageError(f"Expected a store of feedback to write to, got {db}: {error}.") from error


def _rate(config: TrainConfig | None, chosen: RateConfig, options: RateOptions, rater: str) -> int:
    assert chosen.db is not None
    with FeedbackStore(chosen.db) as store:
        if chosen.model is not None:
            prompts, _ = prompts_for("rate", chosen.model, chosen.prompts, chosen.encoding), question_of(chosen)
            writer = open_writer(chosen.model, config, options, prompts)
            length = text_length(writer, prompts, chosen.max_new_tokens, RATED_TOKENS)
            n_new = ask(store, writer, prompts, replace(chosen, max_new_tokens=length))
            print(f"{n_new} new questions in {chosen.db}")
        if options.web:
            serve_page(store, chosen)
            return Exit.DONE
        if chosen.model is None:
            print(f"questions that wait in {chosen.db}, and new ones as they come; Ctrl-C or q ends")
        RatingTerminal(store, rater, chosen.kind).run(wait=chosen.model is None)
        counts = store.progress(rater, chosen.kind)
    print(f"{rater}: {counts.done} answered, {counts.skipped} skipped, {counts.left} left in {chosen.db}")
    if counts.done:
        print(f"next: textenv reward-model --from-feedback {chosen.db} --out DIR")
    return Exit.DONE


def serve_page(store: FeedbackStore, chosen: RateConfig) -> None:
    """Serve the rating page until Ctrl-C."""
    from textenv.feedback.web import serve

    announce = partial(print, "the page of raters, until Ctrl-C:", flush=True)
    serve(store, kind=chosen.kind, host=chosen.host, port=chosen.port, token=chosen.token, announce=announce)


def ask(store: FeedbackStore, writer: Writer, prompts: Sequence[PromptLike], chosen: RateConfig) -> int:
    """Have the model write texts, and add them as questions that the store does not have yet; return their number.

    The questions of a chunk of prompts are in the store before the texts of the next chunk are written.

    Args:
        store: The store of feedback.
        writer: The model.
        prompts: The prompts.
        chosen: The kind of question, the number of texts, the scale and the sampling.
    """
    assert chosen.db is not None
    kind, n, size = question_of(chosen)
    scale = (chosen.low, chosen.high)
    # The name by which a later call finds these questions; other weights or settings have another fingerprint.
    run = f"{chosen.model} {fingerprint(writer.policy, kind, n, scale, chosen.max_new_tokens, chosen.seed)}"
    known = Counter(question.prompt for question in questions_of(chosen.db, run))
    n_new = 0
    for start in progress(range(0, len(prompts), CHUNK), description="completions", unit="chunk"):
        rows = prompts[start : start + CHUNK]
        # The env turns rows into prompts, as `generate` does.
        env = TextEnv(rows, writer.tokenizer, reward=no_reward, max_new_tokens=1)
        missing: list[PromptLike] = []
        for row, prompt in zip(rows, env.prompts, strict=True):
            n_known = min(known[str(prompt)], n // size)
            known[str(prompt)] -= n_known  # the file may have the same prompt again
            missing += [row] * (n - n_known * size)
        if not missing:
            continue
        written = generate(
            writer.policy,
            missing,
            writer.tokenizer,  # type: ignore[arg-type]
            max_new_tokens=chosen.max_new_tokens,
            seed=chosen.seed + start,  # otherwise equal prompts in two chunks would get equal texts
            **writer.options,
        )
        for first in range(0, len(written), size):
            question = written[first : first + size]
            texts = [generation.text for generation in question]
            prompt = question[0].prompt
            options = {"run": run, "raters": chosen.raters, "scale": scale, "messages": prompt.messages}
            store.add(str(prompt), texts, kind, models=chosen.model, **options)  # type: ignore[arg-type]
            n_new += 1
    return n_new


def question_of(chosen: RateConfig) -> tuple[Kind, int, int]:
    """Return the kind of question, the number of texts per prompt, and the number of texts per question.

    Raises:
        CommandError: If the texts of a prompt do not make whole questions.

    Example:
        >>> question_of(RateConfig(kind="compare", n=4))
        ('compare', 4, 2)
    """
    kind: Kind = chosen.kind or "score"
    n = GROUP[kind] if chosen.n is None else chosen.n
    size = n if kind == "rank" else GROUP[kind]
    if kind == "rank" and not 2 <= n <= MAX_COMPLETIONS:
        raise CommandError(f"Expected --n from 2 to {MAX_COMPLETIONS} to rank, got {n}.")
    if n < 1 or n % size:
        raise CommandError(f"Expected a positive {'even ' if size == 2 else ''}--n to {kind}, got {n}.")
    return kind, n, size


def fingerprint(policy: LMPolicy, *settings: object) -> str:
    """Return a short hash of a model's weights and of settings: 12 hexadecimal digits."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, weight in policy.backbone.model.state_dict().items():
        digest.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
