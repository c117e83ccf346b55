"""The catalogue of causes: what is seen in a run that goes wrong, why, its cure, and where the claim comes from.

`TrainingWarnings` takes its words from here while a model trains, and `diagnose` after it; the table of
docs/doctor.md is made from it.
"""

from __future__ import annotations

from typing import NamedTuple


class Cause(NamedTuple):
    """An entry of the catalogue.

    Attributes:
        title: What went wrong, as one clause.
        seen: What a run shows.
        why: What leads to it, or what it leads to.
        cure: What to change.
        source: Where the claim comes from: a paper, an invariant of docs/invariants.md, or a page of the docs.
    """

    title: str
    seen: str
    why: str
    cure: str
    source: str


_REWARD = {
    "constant-reward": Cause(
        "all texts earn the same reward",
        "the spread of the rewards is 0 in nearly every rollout",
        "Nothing tells a good text from a bad one. Is the reward constant, does it compare to a text that is never "
        "written, or is the task solved?",
        "Print a few texts (SampleTable) with their rewards, and give partial credit.",
        "docs/invariants.md, C6 and D8: equal scores leave no advantage",
    ),
    "wrong-column": Cause(
        "the reward reads a column that does not hold what texts are compared with",
        "equal rewards, or a KeyError, from a reward that reads a column of the prompts' rows",
        "A column that is missing, empty, equal in all rows or a copy of the prompt cannot tell texts apart.",
        "Name the column with the answers: env.args.references_column, or `column` of the reward.",
        "docs/invariants.md, C7: a reward gets each prompt with its data row",
    ),
    "all-cut": Cause(
        "all texts are cut off before the reward can tell them apart",
        "every episode ends by length, and the rewards are equal",
        "The reward needs a finished text, such as an answer at its end, and max_new_tokens comes before it.",
        "Raise env.max_new_tokens, let shorter prompts or a shorter format ask for less, or reward unfinished texts.",
        "Yu et al., 2025 (DAPO), section 3.4; docs/invariants.md, C13",
    ),
    "no-group-signal": Cause(
        "the samples of a prompt nearly always earn the same",
        "groups/signal stays near 0, though rewards differ from prompt to prompt",
        "An advantage within groups is 0 where all samples of a prompt earn the same: prompts are too easy, too hard, "
        "or the reward depends on the prompt alone.",
        "Give partial credit, choose prompts of medium difficulty (order=PrioritySampling('spread')), raise "
        "samples_per_prompt, or use algorithm.min_groups.",
        "Yu et al., 2025 (DAPO), section 3.2; docs/invariants.md, D8",
    ),
    "reward-fails": Cause(
        "the reward fails for many texts",
        "episode/dropped or episode/failed is a sizeable share of the episodes, or the run ended with a RewardError",
        "Texts without a reward are left out, or get the penalty in its place, so that training follows failures.",
        "Mend the reward for the texts in log.txt: return a finite number for any text, the empty one too.",
        "docs/reliability.md",
    ),
    "reward-slow": Cause(
        "the reward takes most of the time",
        "time/reward_share is above one half",
        "Does it load something at every call, or wait for each row in turn?",
        "Score texts when they end (score_at='done') or a rollout's together ('rollout_end'), all rows in one call "
        "(BatchReward), servers side by side (HTTPJudge, AsyncFunction), and texts that come again once (Cached).",
        "docs/scaling.md",
    ),
}

_TEXTS = {
    "never-stops": Cause(
        "the policy never ends a text",
        "nearly every episode ends by length, from the first rollout to the last",
        "The end token that the model learned is another one than the env's, nothing rewards an end, or the limit is "
        "below the length of its texts.",
        "Give the env the model's own stop_ids, raise max_new_tokens, or set shaping.missing_eos_penalty.",
        "Huang et al., 2024 (The N+ implementation details of RLHF with PPO), detail 4; docs/invariants.md, C9",
    ),
    "empty-texts": Cause(
        "texts are empty or blank",
        "most episodes are an end token and nothing else, or white space",
        "Does an empty text earn most, as under a penalty on length or on KL, or do prompts end like finished texts?",
        "Reward an empty text less, and encode prompts without the end token.",
        "Ouyang et al., 2022 (InstructGPT), appendix C; docs/invariants.md, B4",
    ),
    "longer-texts": Cause(
        "the reward is won by length",
        "reward and length rise together, most texts end by the limit at last, and few did at first",
        "A reward that grows with length is maximal at the limit, whatever the text says.",
        "Score per token or against a target length, set shaping.overlong_tokens, and look at reward at equal length.",
        "Singhal et al., 2023 (A Long Way to Go: Investigating Length Correlations in RLHF)",
    ),
    "repetition": Cause(
        "the reward is won by repeating",
        "the reward rises, and so does the share of a text's word pairs that it had before",
        "A reward that counts words or tokens is maximal where the best one is repeated.",
        "Count each word once, add the reward `repetition` to it (id: sum), or raise kl.coef.",
        "Holtzman et al., 2020 (The Curious Case of Neural Text Degeneration); Gao et al., 2023",
    ),
    "one-text": Cause(
        "the reward is won by one text for all prompts",
        "the reward rises, and different texts fall to an eighth of a rollout's or fewer",
        "A text that earns well everywhere is found, and nothing makes another one worth trying.",
        "Let the reward read the prompt, raise kl.coef or ent_coef, or reward distinct texts.",
        "Li et al., 2016 (distinct-n); Kirk et al., 2024 (Understanding the Effects of RLHF on Generalisation and "
        "Diversity)",
    ),
    "judge-gap": Cause(
        "the trained reward rises and the held-out judge falls",
        "eval/reward rises while eval/judge falls",
        "The policy has found what the trained reward overrates: reward hacking by its definition.",
        "Stop at the best judge (evaluation.best: judge, patience), raise kl.coef, or train a better reward.",
        "Gao et al., 2023 (Scaling Laws for Reward Model Overoptimization); Skalse et al., 2022",
    ),
    "unlike-start": Cause(
        "texts become ones that the start would hardly write",
        "the reward rises, and the perplexity of the texts under the reference with it, many times over",
        "The reward is won outside the language that the model knew.",
        "Raise kl.coef, or set kl.target to the divergence at which texts were still good.",
        "Gao et al., 2023; Stiennon et al., 2020 (Learning to summarize from human feedback)",
    ),
}

_UPDATES = {
    "entropy-collapse": Cause(
        "the entropy has collapsed",
        "the entropy is below a tenth of the first rollout's",
        "The policy writes the same again and again and explores no more. Is the learning rate too high, or the reward "
        "easy to game?",
        "Lower learning_rate or n_epochs, raise ent_coef, or add a KLPenalty.",
        "Cui et al., 2025 (The Entropy Mechanism of RL for Reasoning Language Models); Yu et al., 2025 (DAPO)",
    ),
    "kl-runaway": Cause(
        "the policy runs away from the reference",
        "the divergence grows to several nats a token, and the reward does not pay for it",
        "The penalty is too small for the reward's scale, steps are too large, or an entropy bonus outweighs both: the "
        "texts are lost.",
        "Raise kl.coef, set kl.target, or lower learning_rate or ent_coef.",
        "Ziegler et al., 2019 (Fine-Tuning Language Models from Human Preferences); docs/invariants.md, C4",
    ),
    "kl-negative": Cause(
        "the divergence from the reference is negative",
        "kl/token below 0 for five rollouts in a row",
        "A mean over the policy's samples cannot be, noise apart. Are tokens drawn from another distribution than they "
        "are scored under, or has the reference another temperature?",
        "Run agents.doctor.check.",
        "Schulman, 2020 (Approximating KL Divergence); docs/invariants.md, C3",
    ),
    "stale-reference": Cause(
        "the reference is not the model that training started from",
        "the divergence is far from 0 in the first rollout, before any update",
        "The penalty pulls towards another model: an older checkpoint, the one before fine-tuning, or a wrong name.",
        "Leave kl.reference out, which is the start, or name the model that model.name names.",
        "docs/invariants.md, C2: policy and reference the same, penalty 0",
    ),
    "rollout-update-mismatch": Cause(
        "rollout and update disagree about the probability of a token",
        "rollout/log_ratio above rounding before the first step of an update",
        "Is it dropout, a cache that is not exact, or weights that were changed inside the rollout?",
        "Run agents.doctor.check, which names the part.",
        "docs/invariants.md, A1",
    ),
    "critic-useless": Cause(
        "the critic says nothing about returns",
        "values never move, or explain nothing of the returns to the end while the reward does not rise",
        "Advantages are then the returns themselves, with all their noise, or worse.",
        "Raise vf_coef or critic_lr_scale, set value_norm: norm, fit it first (textenv critic), or do without: "
        "advantage: rloo.",
        "Andrychowicz et al., 2021 (What Matters in On-Policy RL); docs/losses.md",
    ),
    "critic-dominates": Cause(
        "the loss of the critic drowns that of the policy",
        "vf_coef times the value loss is hundreds of times the policy's, on shared layers",
        "Large returns make a value loss that grows with their square; the clipped gradient is then the critic's.",
        "Scale rewards to about -1 to 1 (shaping.scale), set value_norm: norm, lower vf_coef, or separate the critic.",
        "van Hasselt et al., 2016 (Learning values across many orders of magnitude); Andrychowicz et al., 2021",
    ),
    "many-epochs": Cause(
        "each rollout is trained on too often",
        "train/clip_fraction above a third, with many epochs",
        "After so many passes most ratios are outside the clip range: further ones only overfit the rollout.",
        "Lower n_epochs (1 to 4), or set algorithm.args.target_kl.",
        "Schulman et al., 2017 (PPO); Huang et al., 2022 (The 37 Implementation Details of PPO)",
    ),
    "rate-high": Cause(
        "the learning rate is too high",
        "train/approx_kl or clip_fraction is large in the first updates or in the median one",
        "Steps of this size undo each other: the model forgets its language before the reward can teach it.",
        "Divide learning_rate by 10, or set algorithm.args.target_kl.",
        "Huang et al., 2022; Engstrom et al., 2020 (Implementation Matters in Deep RL)",
    ),
    "rate-low": Cause(
        "the learning rate is too low",
        "train/approx_kl near 0, nothing clipped, and a reward that does not move though it differs from text to text",
        "The weights hardly move.",
        "Multiply learning_rate by 10 until train/approx_kl is about 0.003 to 0.03.",
        "Schulman et al., 2017 (PPO); Huang et al., 2022",
    ),
    "not-finite": Cause(
        "updates are NaN or infinite",
        "train/skipped_updates is above 0, or the run ended with exit code 3",
        "Rewards too large for the loss, 16 bits that overflow, or a learning rate far too high.",
        "Scale rewards, lower learning_rate, set max_grad_norm, or train in float32.",
        "docs/reliability.md",
    ),
}

_PROMPTS = {
    "template-missing": Cause(
        "the model's chat template is not applied",
        "prompts are plain text, and the tokenizer has a chat template",
        "The model was trained on chats, and plain text is unlike them: it goes on with the question, or never ends.",
        "Give prompts as lists of messages, [{'role': 'user', 'content': ...}], or set chat where the task has it.",
        "the README of the model; agents.doctor.check, chat template",
    ),
    "prompts-cut": Cause(
        "prompts are cut, and lose what they ask",
        "a sizeable share of the prompts is longer than max_prompt_tokens",
        "A question without its end, or its start, cannot be answered; texts earn what guessing earns.",
        "Raise env.args.max_prompt_tokens, drop long rows, or cut on the other side (truncation_side).",
        "docs/invariants.md, B8",
    ),
    "one-prompt": Cause(
        "one prompt dominates training",
        "most episodes, or most of the spread of the rewards, are those of one prompt",
        "The gradient is that prompt's: the others are forgotten, or their rewards too small to count.",
        "Scale rewards per prompt (an advantage within groups), remove duplicates, or use order: shuffle.",
        "Ahmadian et al., 2024 (Back to Basics); docs/losses.md",
    ),
}

_FILES = {
    "crashed": Cause(
        "the run ended with an error",
        "log.txt has a traceback, and results.json is missing",
        "Training stopped there; the figures go no further.",
        "Mend what the last line of the traceback names, and continue with textenv train --resume RUN.",
        "docs/reliability.md",
    ),
    "damaged-file": Cause(
        "a file of the run is damaged",
        "a line of metrics.jsonl or samples.jsonl, or a JSON file, that cannot be read",
        "A disk or another program has changed it: figures are missing.",
        "Restore the file, or remove the line that is named; textenv train --resume RUN needs the checkpoint only.",
        "docs/reliability.md",
    ),
}

CATALOGUE: dict[str, Cause] = {**_REWARD, **_TEXTS, **_UPDATES, **_PROMPTS, **_FILES}
