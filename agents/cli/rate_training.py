"""The loop of `textenv rate --train`: a person scores texts, the model learns from the scores and writes new ones."""

from __future__ import annotations

import json
import secrets
import signal
import statistics
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from textenv.checks.json_files import read_json
from textenv.env import TextEnv
from textenv.episodes.completion import Preds
from textenv.episodes.scores import DROPPED, RewardError, Score
from textenv.feedback.store import FeedbackStore
from textenv.feedback.terminal import RatingTerminal
from textenv.prompts.prompts import Prompt
from textenv.rewards.base import BatchReward
from textenv.rewards.human import HumanReward

from ..build import make_agent
from ..checkpoints.checkpoint import load_checkpoint, save_step
from ..checkpoints.hf_export import export
from ..checkpoints.manifest import newest_intact
from ..checkpoints.output_folders import check_output
from ..configuration.config import ModelConfig, TrainConfig
from ..errors import CommandError, Exit, Interrupted
from ..files import write_text
from ..runs.assemble import load_lm, load_tokenizer, trust_of
from ..steps.kl_penalty import KLPenalty
from .options import RATED_TOKENS, RateConfig, RateOptions
from .prompt_files import prompts_for
from .trained_model import Writer, make_policy, text_length

SAVE_EVERY = 10  # updates between two checkpoints; a resumed session repeats later updates, from stored answers
TARGET_KL = 0.03  # nats per token at which an update ends early, since it has few samples, by default one
SHOWN = 10  # scores in the means that are printed
# The settings that a session cannot change: the texts whose answers are stored depend on them.
FIXED = ("model", "prompts", "n", "low", "high", "max_new_tokens", "seed", "learning_rate", "kl")


class FirstEpisodes(BatchReward):
    """A reward that asks a person about the first episode of each lane in a rollout, and drops the other episodes.

    So each update has one sample per lane, however short the texts are. Rewards are in [-1, 1].

    Args:
        human: The reward that asks, on any scale.

    Attributes:
        scores: The person's scores on their own scale, one list per update, in the order of asking.
    """

    score_at = "rollout_end"
    may_drop = True

    def __init__(self, human: HumanReward) -> None:
        self.human = human
        self.scores: list[list[float]] = []

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> list[Score]:
        """Return a reward for the first row of each lane, and `DROPPED` for the others."""
        first_rows: dict[int, int] = {}  # by lane
        for row, completion in enumerate(preds):
            first_rows.setdefault(completion.lane, row)
        rows = list(first_rows.values())
        answers = self.human.score([prompts[row] for row in rows], [preds[row] for row in rows], [True] * len(rows))
        low, high = self.human.scale
        scores: list[Score] = [DROPPED] * len(prompts)
        for row, score in zip(rows, answers, strict=True):
            if isinstance(score, float):  # else the person has skipped the question
                scores[row] = 2 * (score - low) / (high - low) - 1  # from [low, high] to [-1, 1]
        self.scores.append([score for score in answers if isinstance(score, float)])
        return scores


def train_by_hand(config: TrainConfig | None, chosen: RateConfig, options: RateOptions, rater: str) -> int:
    """Ask and update until the person quits, then export the model. The same command continues the session.

    Args:
        config: The configuration of the run `chosen.model`; None for a model.
        chosen: The model, the prompts, the store and the settings of training.
        options: The permissions of the command line.
        rater: The person's name.

    Returns:
        The exit code.

    Raises:
        CommandError: If the run is not finished, or `--out` has a session with other settings.
        Interrupted: After Ctrl-C, once the model is exported.
    """
    assert chosen.model is not None and chosen.out is not None and chosen.db is not None
    out, trust = Path(chosen.out), trust_of(options)
    folder = chosen.model
    if config is not None:
        folder = f"{chosen.model}/model"
        if not Path(folder).is_dir():
            raise CommandError(f"Expected a finished run, got {chosen.model} without a model: resume it first.")
    session = claim(out, chosen)
    check_output(out / "model", "language model", overwrite=True)
    tokenizer = load_tokenizer(folder, trust)
    prompts = prompts_for("rate", chosen.model, chosen.prompts, chosen.encoding)
    trained = None if config is None else config.env.max_new_tokens
    writer = Writer(make_policy(folder, tokenizer, ModelConfig(), trust), tokenizer, trained_length=trained)
    length = text_length(writer, prompts, chosen.max_new_tokens, RATED_TOKENS)
    reward = FirstEpisodes(HumanReward(chosen.db, scale=(chosen.low, chosen.high)))
    env = TextEnv(
        prompts,
        tokenizer,
        reward=reward,
        max_new_tokens=length,
        seed=chosen.seed,
    )
    agent = make_trainee(env, load_lm(folder, trust), chosen)
    checkpoint, damage = newest_intact(out / "checkpoints")
    for line in damage:
        print(line)
    if checkpoint is not None:
        env_of_agent = agent.get_env()
        assert env_of_agent is not None
        # The first reset uses the env's seed. If `learn` made it, after loading, the prompts would start over.
        env_of_agent.reset()
        load_checkpoint(agent, checkpoint)
        print(f"continues from {checkpoint}")
    with FeedbackStore(chosen.db) as store:
        terminal = RatingTerminal(store, rater, "score")
        reward.human.attend = lambda items: _answer(terminal, items)
        is_interrupted = False
        try:
            learn(agent, reward, out, session, chosen.updates)
        except _HasQuit:
            print()
        except KeyboardInterrupt:
            print()
            is_interrupted = True
    export(agent, tokenizer, out / "model", overwrite=True)
    scores = [score for of_update in reward.scores for score in of_update]
    if scores:
        means = statistics.fmean(scores[:SHOWN]), statistics.fmean(scores[-SHOWN:])
        print("mean score of the first and of the last {}: {:.2f}, {:.2f}".format(min(SHOWN, len(scores)), *means))
    print(f"model: {out / 'model'}   answers: {chosen.db}")
    if is_interrupted:
        raise Interrupted("interrupted, and the model is written: the same command continues.", signal.SIGINT)
    return Exit.DONE


def claim(out: Path, chosen: RateConfig) -> str:
    """Write a new session's settings into its folder, or check those of an earlier one; return the session's name.

    Raises:
        CommandError: If the folder has a session with other settings.
    """
    own = {name: vars(chosen)[name] for name in FIXED}
    file = out / "session.json"
    if not file.is_file():
        name = f"session {secrets.token_hex(4)}"
        write_text(file, json.dumps({"name": name, **own}, indent=1) + "\n")
        return name
    before = read_json(file, {"name": str})
    changed = [f"{name} {before.get(name)!r}" for name in FIXED if before.get(name) != own[name]]
    if changed:
        raise CommandError(f"Expected the settings of the session in {out}, got others ({', '.join(changed)} then).")
    return str(before["name"])


def make_trainee(env: TextEnv, lm: Any, chosen: RateConfig) -> OnPolicyAlgorithm:
    """Return PPO with a rollout of one whole episode per lane; advantages are too few to be normalised."""
    n, n_steps = chosen.n or 1, env.rules.max_new_tokens
    agent: OnPolicyAlgorithm = make_agent(
        env,
        lm,
        n_envs=n,
        learning_rate=chosen.learning_rate,
        n_steps=n_steps,
        batch_size=n * n_steps,  # the whole rollout is one minibatch
        target_kl=TARGET_KL,
        rollout_buffer_kwargs={"complete_episodes": True, "normalize_advantage": False},
        seed=chosen.seed,
    )
    if chosen.kl:
        KLPenalty(chosen.kl).attach(agent)
    return agent


def learn(agent: OnPolicyAlgorithm, reward: FirstEpisodes, out: Path, session: str, n_updates: int | None) -> None:
    """Make updates, each from new episodes, until there are `n_updates`, or until an interrupt.

    Args:
        agent: The algorithm.
        reward: The reward that asks.
        out: The folder of the session.
        session: The name of the session.
        n_updates: The number of updates, including those before a resumption; None for no end.
    """
    size = agent.n_steps * agent.n_envs
    update = agent.num_timesteps // size
    while n_updates is None or update < n_updates:
        update += 1
        # Under this name the same text of another update is a new question, and a resumed session finds its answers.
        reward.human.run = f"{session} update {update}"
        # SB3 `base_class._setup_learn` then resets the env, which drops the episodes that the old policy began.
        agent._last_obs = None
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*sequences in .* minibatches are fewer")
                agent.learn(size, reset_num_timesteps=False)
        except RewardError:
            if reward.scores and not reward.scores[-1]:
                continue  # the person skipped all texts, so that there is nothing to learn from
            raise
        recent = [score for of_update in reward.scores for score in of_update][-SHOWN:]
        print(f"update {update}: mean of the last {len(recent)} scores {statistics.fmean(recent):.2f}")
        if update % SAVE_EVERY == 0:
            save_step(agent, out / "checkpoints", keep=2)  # two, since one could be damaged


class _HasQuit(BaseException):
    """The person has quit. It is a BaseException, which the failure policy of a reward does not catch."""


def _answer(terminal: RatingTerminal, items: Collection[int]) -> None:
    """Ask the person these questions.

    Raises:
        _HasQuit: If the person quits.
    """
    if not terminal.run(items):
        raise _HasQuit
