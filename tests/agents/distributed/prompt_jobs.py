"""Jobs of processes that draw their prompts by priority from one table."""

import warnings

from agents import load_checkpoint, save_checkpoint
from tests.helpers.jobs import LETTERS, N_LANES, choose_by_row
from tests.helpers.training import numbers_of_draws, tiny_agent, tiny_env
from textenv import PrioritySampling

PROMPTS = [LETTERS[i] for i in range(12)]


def later_is_easier(prompt, preds, done):
    """Reward prompts by their number, and texts of a prompt a little differently."""
    return prompt.number + sum(preds.ids) / 100 if done else 0.0


def priority_agent(by, scripted=True, alpha=1.0):
    """Return an agent of 8 lanes whose prompts are drawn by priority, and a growing list of their numbers.

    Args:
        by: The source of the priority.
        scripted: Choose tokens by the row alone, and let each text fill a rollout.
        alpha: The exponent of the priority; with 0 staleness has no weight either.
    """
    if scripted:
        choose_by_row()
    kwargs = {"stop_ids": (), "max_new_tokens": 4} if scripted else {"max_new_tokens": 7}
    order = PrioritySampling(by, alpha=alpha, staleness=0.1 * alpha)
    env = tiny_env(later_is_easier, PROMPTS, score_at="rollout_end", order=order, **kwargs)
    buffer = {"complete_episodes": True, "normalize_advantage": True}
    model = tiny_agent(env, N_LANES, n_steps=4 if scripted else 8, rollout_buffer_kwargs=buffer)
    return model, numbers_of_draws(model)


def drawn_by_priority(n_rollouts, load, save, *args):
    """Load, train and save; return the numbers of this process's prompts, the state of its cursor and warnings."""
    model, numbers = priority_agent(*args)
    env = model.get_env()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if load is not None:
            load_checkpoint(model, load)
        model.learn(n_rollouts * N_LANES * model.n_steps, reset_num_timesteps=load is None)
    if save is not None:
        save_checkpoint(model, save)
    env.agree_on_prompts()
    said = [str(warning.message) for warning in caught if "checkpoint" in str(warning.message)]
    return numbers, env.lanes.dealer.cursor.state_dict(), said
