# %% [markdown]
# # Your own reward
#
# A reward is a Python function from a prompt and a completion to a number. This notebook writes one, tries it on texts
# typed by hand, checks it, and trains the built-in model on it: short reviews that say something kind. Nothing is
# downloaded, and it takes less than a minute on two cores of a CPU.

# %%
import numpy as np
from transformers import AutoTokenizer

from agents import Generation, KLPenalty, demo_model, generate, make_agent
from textenv import Preds, Prompt, TextEnv, check_text_env, demo

folder = demo_model(progress_bar=False)
tokenizer = AutoTokenizer.from_pretrained(folder)

# %% [markdown]
# ## Write it
#
# `prompt` is a text (with its row of the data set in `prompt.row`), `preds` the completion: `preds.text`, `preds.ids`
# and more. A reward of named parts is a dict: the sum is the reward, and the parts are logged one by one.


# %%
def kind_and_short(prompt: Prompt, preds: Preds, done: bool) -> dict[str, float]:
    n_words = len(preds.text.split())
    return {"kind": demo.score(prompt + preds.text), "short": min(0, 7 - n_words) / 10}


class Review(TextEnv):
    def get_reward(self, prompt: Prompt, preds: Preds, done: bool) -> dict[str, float]:
        return kind_and_short(prompt, preds, done)


env = Review(demo.prompts(), tokenizer, max_new_tokens=32, score_at="done")

# %% [markdown]
# ## Try it on a text of your own
#
# The environment needs no model: tokens that you choose are actions like any others.


# %%
def score(prompt: str, text: str) -> dict[str, float]:
    """Write a text token by token, and return the parts of its reward."""
    env.reset(options={"prompts": [prompt]})
    ids = tokenizer.encode(text, add_special_tokens=False)
    for token in [*ids, tokenizer.eos_token_id]:
        _, _, terminated, _, info = env.step(token)
        if terminated:  # by the end token, or by the limit of tokens
            return info["reward_parts"]
    raise AssertionError("the end token ends each text")


for text in (" great and i love it .", " awful and i hate it .", " great and i love it and everything works well ."):
    print(f"{'this phone is' + text:<65}{score('this phone is', text)}")

# %% [markdown]
# ## Check it
#
# `check_text_env` plays random texts, and raises if a reward is no finite number, differs in a second call, or depends
# on the texts beside it.

# %%
check_text_env(env)

# %% [markdown]
# ## Train on it

# %%
model = make_agent(env, str(folder), n_envs=64, seed=0, learning_rate=1.5e-3, batch_size=512, target_kl=0.05)


def parts_of(texts: list[Generation]) -> dict[str, float]:
    """Return the mean of each part of the reward."""
    scores = [score(str(text.prompt), text.text) for text in texts if text.text]
    return {name: float(np.mean([parts[name] for parts in scores])) for name in ("kind", "short")}


before = generate(model, demo.prompts(), tokenizer, seed=1)
model.learn(24_000, callback=KLPenalty(0.05))
after = generate(model, demo.prompts(), tokenizer, seed=1)
for name, texts in {"before": before, "after": after}.items():
    parts = parts_of(texts)
    print(f"{name:<8}kind {parts['kind']:.2f}   short {parts['short']:.2f}")
    print(f"        for example: {texts[0].prompt}{texts[0].text}")

# %% [markdown]
# Rewards of the library (`textenv.rewards`: classifiers, overlap with references, judges on servers, people) are used
# in the same place, and can be combined with yours: `TextEnv(..., reward=WeightedSum(...))`.
