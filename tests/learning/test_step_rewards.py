"""Step rewards: sixteen steps of known credit are learned from few texts, and not if the scores come late (E11)."""

import numpy as np
import pytest
from sb3_contrib import MaskablePPO

from agents import RolloutStep, make_agent
from tests.helpers.training import tiny_config
from textenv import CharTokenizer, TextEnv
from textenv.rewards import StepReward

LETTERS = "abcdefgh"
TOKENIZER = CharTokenizer(LETTERS + ";")
STEPS, LANES, ROLLOUTS = 16, 16, 12
LATE = 4


def follows(prompt, steps):
    """Whether the last step is the letter after that of the step before, or after the prompt's."""
    before = steps[-2] if len(steps) > 1 else str(prompt)
    return float(steps[-1] == LETTERS[(LETTERS.index(before) + 1) % len(LETTERS)])


def late(prompt, steps):
    """The score of an earlier step, on a step that has nothing to do with it."""
    return follows(prompt, steps[:-LATE]) if len(steps) > LATE else 0.0


def letter_then_separator(prompt, preds):
    return TOKENIZER.encode(";" if len(preds) % 2 else LETTERS)


class Watch(RolloutStep):
    """Keeps which steps are right, and the advantages of their letters, of each rollout: (STEPS, LANES)."""

    key = "Watch"

    def __init__(self):
        super().__init__()
        self.right, self.advantages = [], []

    def __call__(self, buffer):
        view = buffer.view()
        ids = np.zeros(buffer.rewards.shape, dtype=int)  # (T, B)
        ids[view.steps, view.lanes] = np.asarray(view.actions)
        letters = ids[::2] - TOKENIZER.encode("a")[0]
        self.right.append(letters[1:] == (letters[:-1] + 1) % len(LETTERS))

    def _on_rollout_end(self):
        self.advantages.append(self.model.rollout_buffer.advantages.reshape(2 * STEPS, LANES)[::2][1:].copy())


def train(scorer, gamma, score_at="step", seed=0):
    env = TextEnv(
        list(LETTERS),
        TOKENIZER,
        reward=StepReward(scorer, separator=";", score_at=score_at),
        max_new_tokens=2 * STEPS,
        stop_ids=(),
        mask=letter_then_separator,
    )
    model = make_agent(
        env,
        tiny_config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=1, n_positions=2 * STEPS + 2, initializer_range=0.1),
        n_envs=LANES,
        algorithm=MaskablePPO,
        batch_size=STEPS * LANES,
        learning_rate=5e-3,
        ent_coef=0.05,
        gamma=gamma,
        gae_lambda=1.0,
        vf_coef=0.0,
        seed=seed,
        device="cpu",
    )
    watch = Watch()
    model.learn(ROLLOUTS * 2 * STEPS * LANES, callback=watch)
    credit = np.corrcoef(watch.advantages[0].ravel(), watch.right[0].ravel())[0, 1]
    return float(np.mean(watch.right[-3:])), credit


@pytest.mark.slow
def test_e11_steps_are_learned_from_their_own_scores_and_not_from_late_ones():
    """Of a text with random steps, the best advantage of a letter is its step's score less the mean.

    With gamma 0.5, letters two tokens apart and scores s, the advantage is s_k + s_{k+1} / 4 + ..., whose correlation
    with s_k is sqrt(15 / 16); with all scores at the end, it is sqrt(1 / 16).
    """
    learned, credit = train(follows, gamma=0.5)
    of_outcome, credit_of_outcome = train(follows, gamma=1.0, score_at="done")
    of_late, credit_of_late = train(late, gamma=0.5)
    assert credit == pytest.approx(0.97, abs=0.03)
    assert credit_of_outcome == pytest.approx(0.25, abs=0.15)
    assert abs(credit_of_late) < 0.2
    assert learned > 0.4
    assert of_outcome < 0.3
    assert of_late < 0.25
