"""A model learns to reply in everyday dialogues, rewarded by intent and METEOR: OpenRL's DailyDialog task.

    python examples/dailydialog.py --data FOLDER
    python examples/real_model.py runs/smollm2 && python examples/dailydialog.py --data FOLDER --model runs/smollm2

FOLDER holds dialogues_<split>.txt and dialogues_act_<split>.txt of DailyDialog (Li et al., 2017); the name of a data
set on the Hugging Face hub with its columns works as well. A tenth of the dialogues is held back for measuring.

1. A tokenizer and a small GPT-2 learn from the training dialogues, first as whole texts, then as prompts (the last
   turns) with the true reply, where only the reply is trained. This is the "supervised" model. With `--model` it is
   that pretrained model, tuned on some of the whole dialogues. They are plain text, one turn per line, and not the
   messages of a chat: a chat template would make each prompt twice as long, and both speakers are people.
2. Two classifiers learn to tell a turn's intent (inform, question, directive, commissive), each from the turns of its
   own half of the training dialogues. One is the reward. The other is the judge, which nothing is trained on: it
   gives the intent accuracy of the table.
3. PPO tunes the supervised model with intent match + METEOR as the reward, a small reward for keeping the length
   (METEOR rises with length), and a penalty on its divergence from the supervised model.
   Of a pretrained model it trains adapters, and samples four replies to each prompt, which is then read once for all.
   With `--turns 2` an episode goes on: the other speaker's next turn follows, and the model replies again.
4. Both models write two replies to each prompt of the held-back dialogues (a pretrained one to 356 of the 713),
   sampled with the same seed. The samples printed are those of the first five prompts.

Expect of the small model, in four minutes of one core (seeds 0 and 1, the 1,000 dialogues of the validation split):
METEOR rises from 0.042 and 0.041 to 0.066 and 0.064, intent accuracy from 0.37 and 0.36 to 0.40 and 0.39; the
perplexity falls from 120 and 117 to 80 and 84, and the length by 13 and 17 % in tokens. A model that has seen 900
dialogues for a minute or two does not write good English, before or after. examples/README.md has the figures of
SmolLM2, whose run is also `examples/configs/smollm2/dailydialog.yml` (without a judge of its own).

The perplexity is that of the generated texts under the supervised model. METEOR is called
`meteor_without_wordnet` where WordNet is not installed. Printed and kept in `--out`: the table with 95 % intervals,
before/after and paired differences (results.md, results.json), curves.png, and the models as Hugging Face folders.
After Ctrl-C the same command resumes: finished stages are found in `--out`.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from recipe import check_settings, read_data, stage, train
from rich.console import Console
from stable_baselines3.common.utils import LinearSchedule
from transformers import AutoModelForCausalLM, AutoTokenizer, DistilBertConfig, GPT2Config, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from agents import (
    Evaluation,
    KLPenalty,
    LoRA,
    bpe_tokenizer,
    evaluate,
    export,
    make_agent,
    sample_table,
    sft,
    train_classifier,
)
from textenv.metrics import METEOR, ROUGE, Broken, ChrF, Distinct, IntentAccuracy, Length, Perplexity, SacreBLEU
from textenv.rewards import Length as LengthReward
from textenv.rewards import WeightedSum
from textenv.tasks.dailydialog import (
    INTENTS,
    DailyDialog,
    Dialogue,
    dialogue_rows,
    intent_and_meteor,
    read_dialogues,
    split_dialogues,
)


class Size(NamedTuple):
    """The size of the models, and the length of their training."""

    vocab_size: int
    n_layers: int
    width: int
    dialogue_epochs: float
    reply_epochs: float
    classifier_epochs: float
    n_tokens: int  # of PPO
    n_prompts: int | None = None  # of the evaluation; None is all
    n_envs: int = 64
    history: int = 3  # turns of a prompt
    samples_per_prompt: int = 1
    n_positions: int = 256
    max_prompt_tokens: int = 80
    max_new_tokens: int = 32  # a turn
    meteor_weight: float = 4.0  # METEOR differs less from reply to reply than a match of intents, which is 0 or 1
    length_weight: float = 0.5


FULL = Size(1024, 2, 96, 3.0, 0.2, 4.0, 50_000)
SMOKE = Size(300, 1, 32, 1.0, 0.2, 1.0, 1_024, n_prompts=8, n_envs=16)
# Of a pretrained model the sizes above are the classifiers' alone.
PRETRAINED = {"n_envs": 32, "history": 2, "samples_per_prompt": 4, "max_prompt_tokens": 64}
PRETRAINED.update(meteor_weight=10.0, length_weight=3.0)
FULL_PRETRAINED = Size(0, 0, 192, 0.15, 0.0, 4.0, 16_384, n_prompts=356, **PRETRAINED)
SMOKE_PRETRAINED = Size(0, 0, 32, 0.02, 0.0, 1.0, 1_024, n_prompts=8, **PRETRAINED)
TUNING_RATE = 3e-3
LEARNING_RATE = 5e-4
ADAPTERS: dict[str, Any] = {
    "policy_kwargs": {"train": LoRA(r=8)},
    "n_steps": 32,
    "batch_size": 256,
    "learning_rate": 1e-3,
}
KL_COEF = 0.03


def texts_of(dialogues: Sequence[Dialogue]) -> list[str]:
    """Return whole dialogues, one turn per line."""
    return ["".join(f"{turn}\n" for turn in dialogue.turns) for dialogue in dialogues]


def tune_pretrained(
    name: str, dialogues: Sequence[Dialogue], held_back: Sequence[Dialogue], folder: Path, size: Size, seed: int
) -> dict[str, Any]:
    """Tune all weights of a pretrained model on a part of the whole dialogues; some held-back ones measure it."""
    tuned = sft.tune(
        name,
        texts_of(dialogues),
        folder,
        packing=True,
        held_out=texts_of(held_back[:30]),
        n_epochs=size.dialogue_epochs,
        batch_size=8,
        learning_rate=1e-4,
        max_tokens=128,
        seed=seed,
        resume=True,
        overwrite=True,
    )
    assert tuned.held_out_loss_before is not None and tuned.held_out_loss is not None
    return {
        "held_back_perplexity_of_start": math.exp(tuned.held_out_loss_before),
        "held_back_perplexity": math.exp(tuned.held_out_loss),
    }


def tune(
    dialogues: Sequence[Dialogue], held_back: Sequence[Dialogue], folder: Path, size: Size, seed: int
) -> dict[str, Any]:
    """Train a fresh GPT-2 on whole dialogues, one turn per line, and then on replies."""
    texts, tests = texts_of(dialogues), texts_of(held_back)
    pairs, test_pairs = (
        [(row["prompt"], f"{row['references'][0]}\n") for row in dialogue_rows(part, size.history)]
        for part in (dialogues, held_back)
    )
    tokenizer = bpe_tokenizer(texts, size.vocab_size)
    shape = dict(n_layer=size.n_layers, n_embd=size.width, n_head=size.width // 32)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=size.n_positions, bos_token_id=end, eos_token_id=end, **shape
    )
    whole = folder.with_name("dialogues")
    options: dict[str, Any] = {"tokenizer": tokenizer, "seed": seed, "resume": True, "overwrite": True, "batch_size": 8}
    epochs = {"n_epochs": size.dialogue_epochs, "learning_rate": TUNING_RATE}
    if not whole.is_dir():
        sft.tune(config, texts, whole, packing=True, held_out=tests, **epochs, **options)
    epochs = {"n_epochs": size.reply_epochs, "learning_rate": TUNING_RATE / 10}
    options["batch_size"] = 32
    tuned = sft.tune(str(whole), pairs, folder, max_tokens=128, held_out=test_pairs, **epochs, **options)
    assert tuned.held_out_loss_before is not None and tuned.held_out_loss is not None
    return {
        "held_back_reply_perplexity_of_dialogues": math.exp(tuned.held_out_loss_before),
        "held_back_reply_perplexity": math.exp(tuned.held_out_loss),
    }


def classify(
    dialogues: Sequence[Dialogue],
    held_back: Sequence[Dialogue],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    size: Size,
    seed: int,
) -> dict[str, Any]:
    """Train a classifier of intents, and measure it on the turns of held-back dialogues."""
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=size.n_positions,
        n_layers=1,
        dim=size.width // 2,
        hidden_dim=size.width,
        n_heads=2,
    )
    (texts, labels), held_out = (
        (
            [turn for dialogue in part for turn in dialogue.turns],
            [intent for dialogue in part for intent in dialogue.intents],
        )
        for part in (dialogues, held_back)
    )
    trained = train_classifier(
        config,
        tokenizer,
        texts,
        labels,
        folder,
        held_out=held_out,
        label_names=INTENTS,
        n_epochs=size.classifier_epochs,
        learning_rate=1e-3,
        seed=seed,
        resume=True,
        overwrite=True,
    )
    assert trained.held_out is not None
    return {"held_back_accuracy": trained.held_out.accuracy, "n_texts": trained.held_out.n_texts}


def reinforce(
    dialogues: Sequence[Dialogue], held_back: Sequence[Dialogue], out: Path, size: Size, args: argparse.Namespace
) -> Evaluation:
    """Tune the supervised model with PPO, and measure both on prompts of held-back dialogues."""
    supervised, seed = str(out / "supervised"), args.seed
    tokenizer = AutoTokenizer.from_pretrained(supervised)
    task = intent_and_meteor(out / "reward", weights={"intent": 1.0, "meteor": size.meteor_weight})
    options = {"history": size.history, "max_prompt_tokens": size.max_prompt_tokens, "score_at": "rollout_end"}
    test = DailyDialog(held_back, tokenizer, reward=task, max_new_tokens=size.max_new_tokens, **options)
    model_of_texts = AutoModelForCausalLM.from_pretrained(supervised, dtype="float32")
    metrics = [
        *(ROUGE(kind) for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")),
        *(METEOR(), SacreBLEU(), ChrF()),
        *(IntentAccuracy(out / "judge"), Perplexity(model_of_texts, tokenizer), Length(), Distinct((1, 2)), Broken()),
    ]
    n_prompts = size.n_prompts or len(test.prompts)
    prompts = test.prompts[:: max(1, len(test.prompts) // n_prompts)][:n_prompts]  # from all dialogues
    settings: dict[str, Any] = {"env": test, "n": 2, "seed": seed, "progress_bar": True}
    if not args.model:  # of a pretrained model the divergence over all words would take as long as the writing
        settings["reference"] = supervised
    before = evaluate(make_agent(test, supervised), prompts, tokenizer, metrics, **settings)
    # METEOR alone would make replies longer and longer, so that keeping their mean length earns a little.
    length = round(before.figures["length"].value)
    reward = WeightedSum(
        {"task": task, "length": LengthReward(max(length, 1), "tokens")}, {"length": size.length_weight}
    )
    limits = {"max_turns": args.turns, "max_new_tokens": args.turns * size.max_new_tokens}
    groups = {"samples_per_prompt": size.samples_per_prompt}
    env = DailyDialog(dialogues, tokenizer, reward=reward, seed=seed, **groups, **limits, **options)
    update = ADAPTERS if args.model else {"learning_rate": LinearSchedule(LEARNING_RATE, 0.0, 1.0)}
    model = make_agent(env, supervised, n_envs=size.n_envs, seed=seed, n_epochs=2, **update)
    train(model, size.n_tokens, out, "DailyDialog: PPO for intent match and METEOR", [KLPenalty(KL_COEF)])
    after = evaluate(model, prompts, tokenizer, metrics, before=before, **settings)
    export(model, tokenizer, out / "model", overwrite=True)
    after.save(out / "results")
    named = {"supervised": before, "supervised + PPO": after}
    # Two texts of a prompt follow each other: the first text of each of the first five prompts.
    Console().print(sample_table({name: list(result.generations[: 2 * 5 : 2]) for name, result in named.items()}))
    return after


def bars(result: Evaluation) -> str:
    """Return a line for each goal of the task: whether it is met, and by how much."""
    assert result.before is not None
    before, after, difference = result.before.figures, result.figures, result.differences
    meteor = next(name for name in after if name.startswith("meteor"))
    low = difference[meteor].low
    perplexity, length = (after[name].value / before[name].value for name in ("perplexity", "length"))
    lines = {
        f"{meteor} up, the interval of the difference above 0 (from {low:+.4f})": low is not None and low > 0,
        f"intent accuracy down by 0.02 at most ({difference['intent_accuracy'].value:+.4f})": (
            difference["intent_accuracy"].value >= -0.02
        ),
        f"perplexity at most 1.2 times ({perplexity:.2f})": perplexity <= 1.2,
        f"mean length within 20 % ({length - 1:+.0%})": abs(length - 1) <= 0.2,
    }
    return "\n".join(f"{'met' if is_met else 'NOT met'}: {goal}" for goal, is_met in lines.items())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder of the dialogues, or a data set's name on the hub")
    parser.add_argument("--model", help="a pretrained model's folder or name on the hub (default: a small fresh one)")
    parser.add_argument("--seed", type=int, default=0, help="the seed of split, weights, training and sampling")
    parser.add_argument("--out", type=Path, help="where the results go (default: runs/dailydialog_<seed>)")
    parser.add_argument("--turns", type=int, default=1, help="the most replies of an episode of PPO (default: 1)")
    parser.add_argument("--smoke", action="store_true", help="tiny models and a few steps, to see that everything runs")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    transformers_logging.disable_progress_bar()
    logging.getLogger("sacrebleu").setLevel(logging.ERROR)  # the data set has spaces before its full stops
    sizes = (SMOKE_PRETRAINED, FULL_PRETRAINED) if args.model else (SMOKE, FULL)
    start, size = time.perf_counter(), sizes[0] if args.smoke else sizes[1]
    out = args.out or Path(f"runs/dailydialog_{args.seed}")
    dialogues, held_back = split_dialogues(read_data(read_dialogues, args.data), seed=args.seed)
    check_settings(out, {name: getattr(args, name) for name in ("data", "model", "seed", "smoke", "turns")})
    run = partial(tune_pretrained, args.model) if args.model else tune
    stage(out / "supervised.json", run, dialogues, held_back, out / "supervised", size, args.seed)
    tokenizer = AutoTokenizer.from_pretrained(out / "supervised")
    halves = {"reward": dialogues[::2], "judge": dialogues[1::2]}
    for number, (name, half) in enumerate(halves.items()):
        seed = 2 * args.seed + number
        stage(out / f"{name}.json", classify, half, held_back, tokenizer, out / name, size, seed)
    result = reinforce(dialogues, held_back, out, size, args)
    print(result.to_markdown())
    print(bars(result))
    print(f"{time.perf_counter() - start:.0f} seconds; results.md, results.json, curves.png and model are in {out}")


if __name__ == "__main__":
    main()
