"""Text generation as an ordinary Gymnasium environment: no torch, a character tokenizer, a random agent.

    python examples/hello_env.py

Prints one episode token by token, then runs many in a vector env. Takes less than a second; the mean reward of
random letters is about 0.15 (5 vowels among 33 tokens).
"""

from __future__ import annotations

import argparse

import gymnasium as gym
import numpy as np

from textenv import CharTokenizer, Preds, Prompt, TextEnv, TextVectorEnv


class Vowels(TextEnv):
    """An env that rewards every vowel with 1."""

    def get_reward(self, prompt: Prompt, preds: Preds, done: bool) -> float:
        return float(preds.text[-1:] in set("aeiou"))


def one_episode() -> None:
    """Step through one episode and draw each observation."""
    env = Vowels(["hello ", "good day "], CharTokenizer(), max_new_tokens=8, render_mode="ansi")
    env.action_space.seed(0)
    observation, _ = env.reset(seed=0)
    print("observation:", observation, "(-2 ends the prompt, -1 is padding)")
    done = False
    while not done:
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        done = terminated or truncated
        print(f"{env.render()}   reward {reward}")
    print("info:", {key: str(value) for key, value in info.items()})


def many_episodes(n_steps: int) -> None:
    """Run many rows as arrays; each starts its next episode in the step that ends the last one."""
    env = gym.make("textenv/Text-v0", prompts=["a", "b"], tokenizer=CharTokenizer(), reward=vowel, max_new_tokens=16)
    envs = TextVectorEnv(env, num_envs=64)
    envs.action_space.seed(0)
    envs.reset(seed=0)
    rewards = [envs.step(envs.action_space.sample())[1] for _ in range(n_steps)]
    print(f"mean reward of {n_steps * 64} random tokens: {np.mean(rewards):.3f}")


def vowel(prompt: Prompt, preds: Preds, done: bool) -> float:
    """Return the reward of `Vowels`: a plain function can be a reward, too."""
    return float(preds.text[-1:] in set("aeiou"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="fewer steps, to see that everything runs")
    args = parser.parse_args()
    one_episode()
    many_episodes(10 if args.smoke else 200)


if __name__ == "__main__":
    main()
