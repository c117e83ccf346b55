"""On-policy distillation: a student learns from a larger teacher, and not with the teacher switched off (E11)."""

import numpy as np
import pytest

from agents import KLPenalty, LoRA, RolloutStep, make_agent
from tests.helpers.training import tiny_config
from textenv import CharTokenizer, TextEnv
from textenv.rewards import Zero

LETTERS = CharTokenizer("abcdefg")


@pytest.mark.slow
@pytest.mark.parametrize("train", ["all", LoRA(r=8)], ids=["all", "lora"])
def test_a_student_learns_from_a_larger_teacher_and_without_it_does_not(train):
    """The divergence of each token falls to less than half, as the rollouts log it."""

    def divergences(coef):
        prompts = [first + second for first in "abcdefg" for second in "abcdefg"]
        env = TextEnv(prompts, LETTERS, reward=Zero(), max_new_tokens=8, samples_per_prompt=4)
        model = make_agent(
            env,
            tiny_config(vocab_size=len(LETTERS), n_embd=32, n_layer=1, initializer_range=0.1),
            n_envs=64,
            batch_size=128,
            n_epochs=1,
            learning_rate=3e-3 if train == "all" else 1e-2,
            gamma=0.0,
            vf_coef=0.0,
            policy_kwargs={"train": train},
            rollout_buffer_kwargs={"normalize_advantage": False},
            seed=0,
            device="cpu",
        )
        teacher = tiny_config(vocab_size=len(LETTERS), n_embd=48, n_layer=2, initializer_range=0.3)
        penalty, kept = KLPenalty(coef, reference=teacher), []

        class Keep(RolloutStep):
            key = "Keep"

            def __call__(self, buffer):
                kept.append(model.logger.name_to_value["kl/token"])

        model.learn(24 * model.n_steps * model.n_envs, callback=[penalty, Keep()])
        return kept[0], np.mean(kept[-3:])

    before, after = divergences(1.0)
    assert after < 0.5 * before
    before, after = divergences(0.0)
    assert after > 0.8 * before
