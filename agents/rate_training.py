"""The loop of `textenv rate --train`: a person scores a sample, the model learns from it and writes the next one."""

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

from textenv.completion import Preds
from textenv.env import TextEnv
from textenv.feedback.store import FeedbackStore
from textenv.feedback.terminal import RatingTerminal
from textenv.json_files import read_json
from textenv.prompts import Prompt
from textenv.rewarding import DROPPED, RewardError, Score
from textenv.rewards.base import BatchReward
from textenv.rewards.human import HumanReward

from .assemble import load_lm, load_tokenizer, trust_of
from .build import make_agent
from .checkpoint import load_checkpoint, save_step
from .config import ModelConfig, TrainConfig
from .exporting import export
from .files import write_text
from .kl import KLPenalty
from .manifest import newest_intact
from .output_folders import check_output
from .prompt_files import prompts_for
from .refusal import CommandError, Exit, Interrupted
from .verb_config import RATED_TOKENS, RateConfig, RateOptions
from .verbs import Writer, make_policy, text_length

SAVE_EVERY = 10  # updates; those since are made again from the answers in the store
TARGET_KL = 0.03  # nats a token, at which an update of so few samples ends
SHOWN = 10  # scores of a mean
FIXED = ("model", "prompts", "n", "low", "high", "max_new_tokens", "seed", "learning_rate", "kl")


class FirstEpisodes(BatchReward):
    """Has a person score the first episode of each lane in a rollout, from -1 to 1; the others are left out.

    So that an update is of as many samples as there are lanes, however short they are.

    Args:
        human: Who scores, on whatever scale.

    Attributes:
        scores: What the person gave, on their scale, in the order of asking; an update's together.
    """

    score_at = "rollout_end"
    may_drop = True

    def __init__(self, human: HumanReward) -> None:
        self.human = human
        self.scores: list[list[float]] = []

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> list[Score]:
        """Return the rewards of the rows."""
        first: dict[int, int] = {}
        for row, one in enumerate(preds):
            first.setdefault(one.lane, row)
        rows = list(first.values())
        given = self.human.score([prompts[row] for row in rows], [preds[row] for row in rows], [True] * len(rows))
        low, high = self.human.scale
        scores: list[Score] = [DROPPED] * len(prompts)
        for row, score in zip(rows, given, strict=True):
            if isinstance(score, float):
                scores[row] = 2 * (score - low) / (high - low) - 1
        self.scores.append([score for score in given if isinstance(score, float)])
        return scores


def train_by_hand(config: TrainConfig | None, chosen: RateConfig, options: RateOptions, rater: str) -> int:
    """Ask and update until the person quits; the model is exported then, and the same command goes on.

    Raises:
        CommandError: If the run is not finished, or `--out` has a session of other settings.
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
    tokenizer, prompts = load_tokenizer(folder, trust), prompts_for("rate", chosen.model, chosen.prompts)
    trained = None if config is None else config.env.max_new_tokens
    writer = Writer(make_policy(folder, tokenizer, ModelConfig(), trust), tokenizer, most=trained)
    most = text_length(writer, prompts, chosen.max_new_tokens, RATED_TOKENS)
    reward = FirstEpisodes(HumanReward(chosen.db, scale=(chosen.low, chosen.high)))
    env = TextEnv(
        prompts,
        tokenizer,
        reward=reward,
        max_new_tokens=most,
        seed=chosen.seed,
    )
    agent = make_trainee(env, load_lm(folder, trust), chosen)
    checkpoint, damage = newest_intact(out / "checkpoints")
    for line in damage:
        print(line)
    if checkpoint is not None:
        env_of_agent = agent.get_env()
        assert env_of_agent is not None
        env_of_agent.reset()  # uses up the seed, with which the prompts would begin anew at the next one
        load_checkpoint(agent, checkpoint)
        print(f"goes on from {checkpoint}")
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
    given = [score for scores in reward.scores for score in scores]
    if given:
        ends = (statistics.fmean(part) for part in (given[:SHOWN], given[-SHOWN:]))
        print("mean score of the first and of the last {}: {:.2f}, {:.2f}".format(min(SHOWN, len(given)), *ends))
    print(f"model: {out / 'model'}   answers: {chosen.db}")
    if is_interrupted:
        raise Interrupted("interrupted, and the model is written: the same command goes on.", signal.SIGINT)
    return Exit.DONE


def claim(out: Path, chosen: RateConfig) -> str:
    """Note what a session's model depends on, and return its name; refuse to go on with one of other settings."""
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
    """Return PPO whose rollout has room for one episode a lane, with nothing that would compare so few."""
    n, n_steps = chosen.n or 1, env.rules.max_new_tokens
    agent: OnPolicyAlgorithm = make_agent(
        env,
        lm,
        n_envs=n,
        learning_rate=chosen.learning_rate,
        n_steps=n_steps,
        batch_size=n * n_steps,
        target_kl=TARGET_KL,
        rollout_buffer_kwargs={"complete_episodes": True, "normalize_advantage": False},
        seed=chosen.seed,
    )
    if chosen.kl:
        KLPenalty(chosen.kl).attach(agent)
    return agent


def learn(agent: OnPolicyAlgorithm, reward: FirstEpisodes, out: Path, session: str, n_updates: int | None) -> None:
    """Update after update, each from new episodes, until there are so many, or somebody interrupts."""
    size = agent.n_steps * agent.n_envs
    update = agent.num_timesteps // size
    while n_updates is None or update < n_updates:
        update += 1
        # The same text in another update is another question; a session that goes on finds its own answered.
        reward.human.run = f"{session} update {update}"
        agent._last_obs = None  # new episodes in all lanes: what was begun before the update is not its own
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*sequences in .* minibatches are fewer")
                agent.learn(size, reset_num_timesteps=False)
        except RewardError:
            if reward.scores and not reward.scores[-1]:
                continue  # all samples were skipped: there is nothing to learn from
            raise
        recent = [score for scores in reward.scores for score in scores][-SHOWN:]
        print(f"update {update}: mean of the last {len(recent)} scores {statistics.fmean(recent):.2f}")
        if update % SAVE_EVERY == 0:
            save_step(agent, out / "checkpoints", keep=2)


class _HasQuit(BaseException):
    """The person has had enough; as Ctrl-C, it is no error of the reward that asks them."""


def _answer(terminal: RatingTerminal, items: Collection[int]) -> None:
    """Have the person answer.

    Raises:
        _HasQuit: If they quit.
    """
    if not terminal.run(items):
        raise _HasQuit
