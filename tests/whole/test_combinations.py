"""Combinations of options: a walk over all pairs trains and resumes; impossible pairs are refused with the reason."""

import math
import re
import warnings

import pytest
import torch
from sb3_contrib import TRPO, MaskablePPO
from stable_baselines3 import A2C, PPO
from transformers import GPT2ForSequenceClassification

from agents import (
    CISPO,
    GSPO,
    AdaptiveCoef,
    ClipHigher,
    CriticWarmup,
    DualClip,
    KLPenalty,
    LastLayers,
    LoRA,
    RewardModelCritic,
    RewardShaping,
    SampleGroups,
    SeparateCritic,
    SharedCritic,
    SoftGate,
    TrainingWarnings,
    load_checkpoint,
    make_agent,
    save_checkpoint,
)
from agents.doctor import examine as doctor
from agents.policies.rounding import tolerance
from tests.helpers.combinations import AXES, page_tables, refused_pairs, walk
from tests.helpers.command import ROOT
from tests.helpers.models import CheckRatio, tiny
from tests.helpers.seq2seq import tiny_seq2seq
from tests.helpers.training import same_weights, weights
from textenv import AllowedMask, CharTokenizer, JSONSchemaMask, RegexMask, TextEnv

TOKENIZER = CharTokenizer("ab0123456789")
PROMPTS = ["a", "b1", "ab2", "3"]
N_ENVS, N_STEPS = 8, 8
PLAIN = {axis: of_axis[0] for axis, of_axis in AXES.items()}
CELLS = walk()

ALGORITHMS = {"PPO": PPO, "A2C": A2C, "MaskablePPO": MaskablePPO, "TRPO": TRPO}
TRAINED = {"all": "all", "head": "head", "LastLayers": LastLayers(1), "LoRA": LoRA(r=2)}
SAMPLING = {
    "plain": {},
    "temperature, top_p": {"temperature": 0.8, "top_p": 0.9},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "top_p_lag (NLPO)": {"top_p": 0.9, "top_p_lag": 1},
}
MASKS = {
    "none": lambda: None,
    "AllowedMask": lambda: AllowedMask(TOKENIZER.encode("ab1")),
    "RegexMask": lambda: RegexMask("([ab]|[0-5])*"),
    "JSONSchemaMask": lambda: JSONSchemaMask({"type": "integer"}),
}
PENALTIES = {
    "none": lambda lm: [],
    "k1": lambda lm: [KLPenalty(0.1)],
    "k3, adaptive": lambda lm: [KLPenalty(AdaptiveCoef(0.1, 1.0, 100), estimator="k3", clip=5.0)],
    "exact": lambda lm: [KLPenalty(0.1, estimator="exact")],
    "another reference": lambda lm: [KLPenalty(0.1, reference=lm)],
    "exact in the loss": lambda lm: [KLPenalty(AdaptiveCoef(0.1, 1.0, 100), estimator="exact", where="loss")],
}
ADVANTAGES = {"gae, two lambdas": {"critic_lambda": 1.0, "lambda_alpha": 0.5}}
MEMORY = {"gradient_checkpointing": {"gradient_checkpointing": True}, "bfloat16": {"autocast": "bfloat16"}}
SURROGATES = {
    "none": None,
    **{cls.__name__: cls() for cls in (ClipHigher, DualClip, CISPO, GSPO, SoftGate)},
    "a function": lambda terms: terms.ratios.clamp(max=2.0),
}
BESIDE = {
    "CriticWarmup": lambda: CriticWarmup(1),
    "TrainingWarnings": TrainingWarnings,
    "dynamic sampling": lambda: SampleGroups(min_groups=3, max_rollouts=2),
}
SHAPING = {"clip": 2.0, "scale": True, "missing_eos_penalty": 0.5}


def earn(prompt, preds, done):
    """Return a reward for every token, which differs from text to text."""
    return 0.1 * float(preds[-1]) + (0.2 * len(preds) if done else 0.0)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward_model")
    torch.manual_seed(0)
    GPT2ForSequenceClassification(tiny(num_labels=1)).save_pretrained(folder)
    return str(folder)


def build(cell, reward_model, **kwargs):
    """Build the agent of a cell, and its callbacks."""
    has_groups = cell["advantage"] in ("grpo", "rloo") or cell["beside"] == "dynamic sampling"
    env = TextEnv(
        PROMPTS,
        TOKENIZER,
        reward=earn,
        max_new_tokens=4,
        mask=MASKS[cell["mask"]](),
        score_at={"each token": "step", "shaped": "done", "late, shaped": "rollout_end"}[cell["score"]],
        samples_per_prompt=2 if has_groups else 1,
    )
    lm = tiny() if cell["model"] == "causal" else tiny_seq2seq()
    critics = {
        "shared": lambda: SharedCritic(),
        "detached": lambda: SharedCritic(detach=True),
        "SeparateCritic": lambda: SeparateCritic(tiny()),
        "RewardModelCritic": lambda: RewardModelCritic(reward_model),
    }
    buffer_kwargs = ADVANTAGES.get(cell["advantage"], {"advantage": cell["advantage"]})
    buffer_kwargs = {**buffer_kwargs, "aggregation": cell["aggregation"]}
    if cell["memory"] == "micro_batch_tokens":
        buffer_kwargs = {**buffer_kwargs, "micro_batch_tokens": 24}
    model = make_agent(
        env,
        lm,
        n_envs=N_ENVS,
        algorithm=ALGORITHMS[cell["algorithm"]],
        policy_kwargs={
            "critic": critics[cell["critic"]](),
            "train": TRAINED[cell["trained"]],
            "surrogate": SURROGATES[cell["surrogate"]],
            "value_norm": None if cell["value_norm"] == "none" else cell["value_norm"],
            **SAMPLING[cell["sampling"]],
            **MEMORY.get(cell["memory"], {}),
        },
        rollout_buffer_kwargs=buffer_kwargs,
        n_steps=N_STEPS,
        learning_rate=1e-2,
        seed=0,
        device="cpu",
        **kwargs,
    )
    callbacks = PENALTIES[cell["KLPenalty"]](lm)
    callbacks += [] if cell["score"] == "each token" else [RewardShaping(**SHAPING)]
    callbacks += [] if cell["beside"] not in BESIDE else [BESIDE[cell["beside"]]()]
    return model, callbacks


def train(model, callbacks, n_rollouts=1):
    """Train for some rollouts; return the largest log-ratio before each update."""
    check = CheckRatio()
    is_resumed = model.num_timesteps > 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "After .* log-ratio")  # other warnings are expected, as nothing is learnt here
        warnings.filterwarnings("ignore", "After ")
        warnings.filterwarnings("ignore", ".*sequences in .* minibatches are fewer")
        model.learn(n_rollouts * N_STEPS * N_ENVS, callback=[*callbacks, check], reset_num_timesteps=not is_resumed)
    return check.largest


def differences(cell):
    return ", ".join(f"{axis}: {option}" for axis, option in cell.items() if option != PLAIN[axis])


def try_cell(cell, reward_model, folder):
    model, callbacks = build(cell, reward_model)
    if cell["beside"] == "doctor":
        report = doctor.check(model)
        assert report.ok, str(report)
    before = weights(model)
    limit = tolerance(model.policy.lm) if cell["memory"] == "bfloat16" else 1e-4
    assert max(train(model, callbacks, 2)) < limit
    not_finite = ("train/explained_variance", "train/aggregation")  # which is a name
    logged = model.logger.name_to_value.items()
    losses = [value for name, value in logged if name.startswith("train/") and name not in not_finite]
    assert losses and all(map(math.isfinite, losses))
    assert all(bool(tensor.isfinite().all()) for tensor in weights(model).values())
    assert not same_weights(before, weights(model))

    save_checkpoint(model, folder)
    ratios = train(model, callbacks)
    resumed, again = build(cell, reward_model)  # built only now: TRPO draws from torch's global generator
    load_checkpoint(resumed, folder)
    assert train(resumed, again) == ratios
    assert same_weights(weights(resumed), weights(model))


@pytest.mark.parametrize(
    "number", [pytest.param(i, marks=[] if i % 16 == 0 else pytest.mark.slow) for i in range(len(CELLS))]
)
def test_what_combines_trains_and_resumes(number, reward_model, tmp_path):
    cell = CELLS[number]
    try:
        try_cell(cell, reward_model, tmp_path / "checkpoint")
    except Exception as error:
        raise AssertionError(f"{differences(cell)}: {error}") from error


@pytest.mark.parametrize(("one", "other", "words"), list(refused_pairs()))
def test_what_does_not_combine_is_refused(one, other, words, reward_model):
    cell = {**PLAIN, **dict([one, other])}
    with pytest.raises(ValueError, match=re.escape(words)):
        train(*build(cell, reward_model))


def test_an_encoder_decoder_is_no_critic():
    with pytest.raises(ValueError, match="Expected a causal model as critic, got the encoder-decoder T5"):
        SeparateCritic(tiny_seq2seq()).build(16)


def test_a_reference_is_of_the_policys_kind(reward_model):
    model, _ = build({**PLAIN, "model": "encoder-decoder"}, reward_model)
    with pytest.raises(ValueError, match="Expected an encoder-decoder as `reference`, as the policy is, got a causal"):
        train(model, [KLPenalty(0.1, reference=tiny())])


def test_the_page_has_the_same_table():
    page = ROOT / "docs/reference/combinations.md"
    assert page_tables() in page.read_text(encoding="utf-8")
