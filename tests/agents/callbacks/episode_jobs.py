"""Jobs in which callbacks see episodes that processes have ended in unequal numbers."""

import warnings

from agents import EpisodeMetrics, TrainingWarnings
from agents.callbacks import training_warnings
from agents.distributed.world import world
from tests.helpers.training import tiny_agent
from textenv import Prompt
from textenv.episodes.rules import EndReason


def info(prompt, text, reward, dropped=False, **parts):
    """Return the final info of an episode."""
    return {
        "prompt": Prompt(prompt),
        "text": text,
        "episode": {"r": reward, "l": len(text)},
        "reward_parts": parts,
        "end_reason": EndReason.EOS if len(text) < 4 else EndReason.LENGTH,
        "dropped": dropped,
        "scored": True,
    }


EPISODES = [  # the first process of two has one of them
    info("ab", "a a a a", 3.0, rule=1.0),
    info("cd", "b", 1.0, rule=2.0),
    info("cd", "b", 1.0, other=3.0),
    info("cd", " ", 3.0, rule=6.0),
    info("cd", "b", 9.0, dropped=True),
]


def own_share(infos, n_first):
    """Return what this process has of some episodes: all of them, the first `n_first`, or the others."""
    here = world()
    return infos if here is None else infos[:n_first] if here.rank == 0 else infos[n_first:]


def figures_of_episodes():
    """Return the figures that `EpisodeMetrics` logs in this process of `EPISODES`, without those of the clock."""
    callback = begun(EpisodeMetrics(), EPISODES, 1)
    callback._log_explained_variance = lambda: None  # nothing was rolled out
    callback._on_rollout_end()
    return {name: value for name, value in callback.logger.name_to_value.items() if not name.startswith("time/")}


def warnings_of_rewards(rewards, n_first):
    """Return the warnings of this process after a rollout whose episodes have some rewards."""
    training_warnings._largest_log_ratio = lambda *_: 0.0  # nothing was rolled out
    callback = begun(TrainingWarnings(), [info("ab", "a b", reward) for reward in rewards], n_first)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback._on_rollout_end()
    return [str(warning.message) for warning in caught]


def begun(callback, infos, n_first):
    """Return a callback of an agent that trains, after this process has ended its share of episodes."""
    callback.init_callback(tiny_agent())
    callback.model._setup_learn(64)  # makes the logger
    callback._on_training_start()
    callback._on_rollout_start()
    callback._episodes.infos = own_share(infos, n_first)
    return callback
