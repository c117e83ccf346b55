"""The doctor's checks of settings: special tokens, vocabulary, lengths, templates, and the algorithm's arguments."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

from stable_baselines3 import A2C
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from textenv.env import TextEnv
from textenv.prompts.prompts import Prompt
from textenv.prompts.templates import apply_template
from textenv.text.tokenizer import Tokenizer, encode_prompt

from ..distributed.world import world
from ..rollout.buffer import SequenceRolloutBuffer
from ..rollout.minibatches import MIN_SEQUENCES
from .report import Finding
from .sample import Subject

MAX_PROMPTS = 200  # prompts that are examined: enough to see a mistake that all share, in milliseconds
FAR_ROWS = 1.5  # embedding rows per token of the tokenizer; padding to a round number (GPT-NeoX) stays far below
KEPT_DISCOUNT = 0.75  # the share of a score at the end that should reach the first token
SMALL_MODEL = 10_000_000  # trained weights; smaller models usually train with larger steps
LOWEST_RATE = 1e-8  # smaller steps hardly move float32 weights
USUAL_RATES = {  # by kind of weights: the highest learning rate without a warning, and the advice
    "pretrained": (1e-4, "1e-6 to 1e-5 is usual; 1e-4 for adapters."),
    "small": (5e-3, "3e-4 to 4e-3 is usual for so few weights."),
    "fresh": (1e-2, "1e-4 to 1e-3 is usual for fresh weights."),
}
WARPERS = (  # settings of transformers' GenerationConfig that change the sampling distribution
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "bad_words_ids"),
    *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "suppress_tokens"),
    *("begin_suppress_tokens", "sequence_bias", "guidance_scale", "min_length", "min_new_tokens"),
)
NEUTRAL = (None, 0, 0.0, 1, 1.0)  # the values with which these settings change nothing


def check_stop_tokens(subject: Subject) -> list[Finding]:
    """Compare the tokens that end an episode with the end tokens of tokenizer and model."""
    env, rules = subject.env, subject.env.rules
    n_tokens = len(env.tokenizer)
    measured = f"an episode ends at the ids {list(rules.stop_ids)}"
    outside = [token for token in rules.stop_ids if not 0 <= token < n_tokens]
    if outside:
        cause = f"The ids {outside} are outside the {n_tokens} tokens: they can never be written."
        return [Finding("stop tokens", "failed", measured, cause, "Give the env stop_ids of this tokenizer.")]
    if not rules.stop_ids and not rules.stop_strings:
        cause = "The tokenizer names no end token, so every episode runs to max_new_tokens."
        return [
            Finding("stop tokens", "warning", measured, cause, "Give the env stop_ids=[...] or stop_strings=[...].")
        ]
    of_model = _model_eos(subject)
    writable = {token for token in of_model if 0 <= token < n_tokens}
    ignored = sorted(writable - set(rules.stop_ids))
    if ignored:
        cause = f"The model ends its texts with {sorted(of_model)}, of which {ignored} do not end an episode."
        cure = f"Give the env stop_ids={sorted(writable | set(rules.stop_ids))}, or the model's own tokenizer."
        return [Finding("stop tokens", "warning", measured, cause, cure)]
    if of_model and not writable and rules.stop_ids:
        cause = (
            f"The model's own end, {sorted(of_model)}, is outside the {n_tokens} tokens: its export would never end."
        )
        cure = f"Give its config eos_token_id={rules.stop_ids[0]}, or the env and the model one tokenizer."
        return [Finding("stop tokens", "warning", measured, cause, cure)]
    closed = [
        prompt for prompt in env.prompts[:MAX_PROMPTS] if len(prompt.ids) > 1 and prompt.ids[-1] in rules.stop_ids
    ]
    if closed:
        cause = f"{len(closed)} prompts end with one of them, so the model has to continue a text that has ended."
        return [Finding("stop tokens", "warning", measured, cause, "Encode prompts without the end token.")]
    return [Finding("stop tokens", "ok", f"{measured}{_padding_remark(env)}")]


def _model_eos(subject: Subject) -> set[int]:
    """Return the end tokens that the model's config and generation config name."""
    model = subject.policy.backbone.model
    ids: set[int] = set()
    # transformers has None, a number or a list in each of the two.
    for value in (model.config.get_text_config().eos_token_id, model.generation_config.eos_token_id):
        ids.update([] if value is None else value if isinstance(value, list) else [value])
    return ids


def _padding_remark(env: TextEnv) -> str:
    tokenizer = env.tokenizer
    if isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer.pad_token_id == tokenizer.eos_token_id:
        return "; pad is eos, which is fine: lengths decide, never ids"
    return ""


def check_opening(subject: Subject) -> list[Finding]:
    """Check that each prompt begins once with the tokens that the tokenizer puts in front of a text (BOS)."""
    env = subject.env
    # A chat is left out: its template writes the opening tokens.
    prompts = [prompt for prompt in env.prompts[:MAX_PROMPTS] if str(prompt) and prompt.messages is None]
    if not prompts:
        return [Finding("opening tokens", "skipped", "no prompt is plain text")]
    opening = encode_prompt(env.tokenizer, str(prompts[0]))[0]
    if not opening:
        return [Finding("opening tokens", "ok", "the tokenizer puts nothing in front of a text")]
    n = len(opening)
    bare = sum(prompt.ids[:n].tolist() != opening for prompt in prompts)
    double = sum(prompt.ids[: 2 * n].tolist() == opening * 2 for prompt in prompts)
    counts = f"of {len(prompts)} prompts {bare} lack it, {double} have it twice"
    measured = f"the tokenizer opens a text with {opening}; {counts}"
    if not bare and not double:
        return [Finding("opening tokens", "ok", measured)]
    cause = "Prompts given as token ids were encoded with other special tokens than the model was trained with."
    return [Finding("opening tokens", "warning", measured, cause, "Pass texts, or ids with the opening tokens once.")]


def check_generation_config(subject: Subject) -> list[Finding]:
    """Name the sampling settings of the checkpoint that training ignores (invariant A4)."""
    config = subject.policy.backbone.model.generation_config
    here = asdict(subject.policy.lm.sampling)
    of_checkpoint = {} if config is None else config.to_dict()
    wanted = {name: of_checkpoint.get(name) for name in WARPERS if of_checkpoint.get(name) not in NEUTRAL}
    ignored = {name: value for name, value in wanted.items() if here.get(name) != value}
    others = [f"{name} {value}" for name, value in here.items() if name != "temperature" and value not in NEUTRAL]
    measured = f"sampling at temperature {here['temperature']}, {', '.join(others) or 'nothing else'}"
    if not ignored:
        return [Finding("generation config", "ok", measured)]
    cause = f"The checkpoint's generation_config has {ignored}, which training ignores and an export leaves out."
    cure = "Set them to None in the generation_config of model.policy.backbone.model."
    if possible := ", ".join(f"{name}={value}" for name, value in ignored.items() if name in here):
        cure = f"Pass policy_kwargs=dict({possible}) to sample with these settings; s{cure[1:]}"
    return [Finding("generation config", "warning", measured, cause, cure)]


def template_marker(tokenizer: Tokenizer) -> str | None:
    """Return the text that a tokenizer's chat template writes behind a message, or else before it; None without one."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or tokenizer.chat_template is None:
        return None
    before, _, after = apply_template(tokenizer, [{"role": "user", "content": "CONTENT"}], "a message").partition(
        "CONTENT"
    )
    return after.strip() or before.strip()


def lacks_template(tokenizer: Tokenizer, prompt: Prompt, marker: str) -> bool:
    """Return whether a prompt lacks the marker of the chat template."""
    # Decoded from the ids, since a prompt's own text may lack the special tokens.
    return marker not in tokenizer.decode(prompt.ids.tolist())


def check_chat_template(subject: Subject) -> list[Finding]:
    """Check that prompts are chats if the tokenizer has a chat template."""
    env = subject.env
    marker = template_marker(env.tokenizer)
    if marker is None:
        return [Finding("chat template", "ok", "the tokenizer has none")]
    prompts = env.prompts[:MAX_PROMPTS]
    plain = sum(lacks_template(env.tokenizer, prompt, marker) for prompt in prompts)
    measured = f"{plain} of {len(prompts)} prompts are plain text, without {marker!r}"
    if not plain:
        return [Finding("chat template", "ok", measured)]
    cause = "The tokenizer has a chat template: this model was trained on chats, and plain text is unlike them."
    cure = "Give prompts as lists of messages, [{'role': 'user', 'content': ...}], unless you want plain text."
    return [Finding("chat template", "warning", measured, cause, cure)]


def check_vocabulary(subject: Subject) -> list[Finding]:
    """Compare the sizes of tokenizer, action space and embedding."""
    backbone, n_tokens = subject.policy.backbone, len(subject.env.tokenizer)
    rows = cast("nn.Embedding", backbone.model.get_input_embeddings()).num_embeddings
    measured = f"{n_tokens} tokens, {rows} embedding rows"
    if n_tokens != backbone.vocab_size or rows < n_tokens:
        cause = f"The policy chooses among {backbone.vocab_size} tokens: it was built for another tokenizer."
        cure = "Use the model's own tokenizer, the same for env and policy."
        return [Finding("vocabulary", "failed", measured, cause, cure)]
    if rows > FAR_ROWS * n_tokens:
        cause = "The model has many more rows than the tokenizer has tokens: this is hardly the model's own tokenizer."
        return [Finding("vocabulary", "warning", measured, cause, "Load model and tokenizer from the same checkpoint.")]
    beyond = f"; the {rows - n_tokens} rows beyond are never sampled" if rows > n_tokens else ""
    return [Finding("vocabulary", "ok", f"{measured}{beyond}")]


def check_positions(subject: Subject) -> list[Finding]:
    """Check that prompt and completion fit the model's positions."""
    measured = f"up to {subject.env.max_prompt_tokens} tokens of prompt and {subject.env.rules.room} behind it"
    try:
        subject.policy.lm.backbone.check_length(subject.env.max_prompt_tokens, subject.env.rules.room)
    except ValueError as error:
        cure = "Lower max_prompt_tokens or max_new_tokens."
        return [Finding("positions", "failed", measured, str(error), cure)]
    return [Finding("positions", "ok", measured)]


def check_prompts(subject: Subject) -> list[Finding]:
    """Count the prompts that max_prompt_tokens has cut."""
    env = subject.env
    prompts = env.prompts[:MAX_PROMPTS]
    lengths = [len(prompt.ids) for prompt in env.prompts]
    measured = f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens"
    cut = 0
    for prompt in prompts:
        if len(prompt.ids) == env.max_prompt_tokens and str(prompt):
            whole = sum(map(len, encode_prompt(env.tokenizer, str(prompt))))
            if prompt.messages is not None:  # its template writes the special tokens itself
                whole = len(env.tokenizer.encode(str(prompt), add_special_tokens=False))
            cut += whole > len(prompt.ids)
    if not cut:
        return [Finding("prompts", "ok", measured)]
    cause = f"{cut} of {len(prompts)} were cut to max_prompt_tokens={env.max_prompt_tokens}."
    return [Finding("prompts", "warning", measured, cause, "Raise max_prompt_tokens, or drop the long ones.")]


def check_discount(subject: Subject) -> list[Finding]:
    """Check how much of a score at the end reaches the first token (invariant D7)."""
    if subject.model is None:
        return [Finding("discount", "skipped", "a policy without an algorithm")]
    gamma, n = subject.model.gamma, subject.env.rules.max_new_tokens
    measured = f"gamma {gamma}: {gamma**n:.1%} of a score after {n} tokens reaches the first"
    if gamma**n >= KEPT_DISCOUNT:
        return [Finding("discount", "ok", measured)]
    cause = "A score at the end of a long text hardly reaches its first tokens."
    return [Finding("discount", "warning", measured, cause, "Pass gamma=1.0.")]


def check_learning_rate(subject: Subject) -> list[Finding]:
    """Compare the learning rate at the start with the usual ones for that number of trained weights."""
    if subject.model is None:
        return [Finding("learning rate", "skipped", "a policy without an algorithm")]
    rate = float(subject.model.lr_schedule(1.0))  # SB3 schedules take the remaining progress, which starts at 1
    n_weights = sum(weight.numel() for weight in subject.policy.parameters() if weight.requires_grad)
    is_fresh = isinstance(subject.policy.lm_kwargs["lm"], PreTrainedConfig)
    highest, usual = USUAL_RATES["fresh" if is_fresh else "small" if n_weights < SMALL_MODEL else "pretrained"]
    measured = f"{rate:.1e} for {n_weights:,} trained weights"
    if LOWEST_RATE <= rate <= highest:
        return [Finding("learning rate", "ok", measured)]
    cause = "The weights will hardly move."
    if rate > highest:
        cause = "Steps of this size undo each other." if is_fresh else "The model forgets its language at so much."
    return [Finding("learning rate", "warning", measured, cause, usual)]


def check_batches(subject: Subject) -> list[Finding]:
    """Check that minibatches divide the rollout, and that each holds enough sequences."""
    if subject.model is None:
        return [Finding("batches", "skipped", "a policy without an algorithm")]
    model, options = subject.model, vars(subject.model)
    if not isinstance(model.rollout_buffer, SequenceRolloutBuffer):
        buffer = type(model.rollout_buffer).__name__
        cause = f"With a {buffer} the update has to read the whole prefix again for every token."
        cure = "Build with make_agent, or pass rollout_buffer_class=SequenceRolloutBuffer."
        return [Finding("batches", "warning", f"n_steps {model.n_steps}, {model.n_envs} envs", cause, cure)]
    processes = world()
    n_envs = model.n_envs * (1 if processes is None else processes.size)  # `batch_size` counts all processes, too
    size = model.n_steps * n_envs
    # SB3 `A2C.train` reads the whole rollout as one batch, and has no `batch_size`.
    batch_size = size if isinstance(model, A2C) else int(options.get("batch_size", size))
    # Rounded up: an episode takes at most `max_new_tokens` steps of its lane, and the rollout's end cuts the last one.
    sequences = n_envs * -(-model.n_steps // subject.env.rules.max_new_tokens)
    per_batch = sequences * batch_size / size
    measured = f"minibatches of {batch_size} of {size} tokens, at least {per_batch:.3g} sequences in each"
    if size % batch_size:
        cause = "The batch size does not divide the rollout, which the buffer refuses."
        return [Finding("batches", "failed", measured, cause, "Pass a divisor of n_steps * n_envs as batch_size.")]
    findings = []
    if per_batch < MIN_SEQUENCES:
        enough = [n for n in range(batch_size, size + 1) if size % n == 0 and sequences * n >= MIN_SEQUENCES * size]
        findings = [_few(measured, enough[0] if enough else None, isinstance(model, A2C))]
    findings += _normalised_twice(options, model.rollout_buffer, measured)
    if model.n_steps < subject.env.rules.max_new_tokens and not model.rollout_buffer.complete_episodes:
        cause = f"A rollout of {model.n_steps} steps ends inside episodes of up to {subject.env.rules.max_new_tokens}."
        longest = subject.env.rules.max_new_tokens
        cure = f"Pass n_steps={longest}, or rollout_buffer_kwargs=dict(complete_episodes=True)."
        findings.append(Finding("batches", "warning", measured, cause, cure))
    return findings or [Finding("batches", "ok", measured)]


def _few(measured: str, batch_size: int | None, is_whole: bool) -> Finding:
    cause = f"The advantages of fewer than {MIN_SEQUENCES} sequences are mostly noise."
    cure = "Raise n_envs." if is_whole else "Raise n_envs, and batch_size with it."
    if batch_size is not None:
        cure = f"Pass batch_size={batch_size} or more."
    return Finding("batches", "warning", measured, cause, cure)


def _normalised_twice(options: dict[str, Any], buffer: SequenceRolloutBuffer, measured: str) -> list[Finding]:
    if not (options.get("normalize_advantage") and buffer.normalize_advantage):
        return []
    cause = "Advantages are normalised over the rollout and again in each minibatch."
    return [Finding("batches", "warning", measured, cause, "Pass normalize_advantage=False to the algorithm.")]
