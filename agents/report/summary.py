"""The summary of a run: five sentences in English and Chinese, and the table of its figures before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from textenv.metrics.bootstrap import Estimate

from ..evaluation.prompt_scores import PromptScores
from ..evaluation.seeds import SeedTable
from ..evaluation.tables import cell, finite
from .figures import EVALUATION, REST, REWARD, UPDATE, mean_of, rounded, time_shares, total_seconds
from .run_data import RunData

ENDED = ("episode/end_eos", "episode/end_stop", "episode/end_env")  # the ends of texts that were not cut off
ALGORITHMS = {"ppo": "PPO", "a2c": "A2C", "maskable_ppo": "MaskablePPO", "trpo": "TRPO"}
TRAINED = {  # by `model.train`: the part of the model that is trained
    "all": ("all weights", "全部权重"),
    "head": ("the head alone", "仅输出层"),
    "last_layers": ("the last layers", "最后几层"),
    "lora": ("LoRA adapters", "LoRA 适配器"),
}


class Sentence(NamedTuple):
    """A sentence in two languages."""

    en: str
    zh: str


class Change(NamedTuple):
    """A figure of the evaluations before and after training, each with its interval."""

    before: Estimate | None
    after: Estimate
    difference: Estimate | None


def changes(scores: Mapping[int, PromptScores]) -> dict[str, Change]:
    """Return the figures of a run's first and newest evaluation, with intervals over prompts (see `SeedTable`)."""
    if not scores:
        return {}
    first, last = scores[min(scores)], scores[max(scores)]
    table = SeedTable([last], [first] if len(scores) > 1 else [])
    return {name: Change(figure.before, figure.after, figure.difference) for name, figure in table.figures.items()}


def sentences(run: RunData, changed: Mapping[str, Change]) -> list[Sentence]:
    """Return what happened: the training, its outcome, the texts, the cost, and how it stands.

    Numbers that the run has not left are left out of their sentence; an interval is over the prompts of the evaluation.

    Args:
        run: The run.
        changed: Its `changes`.
    """
    return [_training(run), _outcome(run, changed.get("reward")), _texts(run), _cost(run), _standing(run)]


def named(config: Mapping[str, Any], key: str) -> str:
    """Return the name of a configuration's reward, task and the like, given with or without arguments."""
    return str(config.get(f"{key}.id") or config.get(key) or "")


def _training(run: RunData) -> Sentence:
    config, tokens = run.config, _tokens(run)
    model, task = str(config.get("model.name", "?")), named(config, "env") or "?"
    algorithm = str(config.get("algorithm.name", "?"))
    shown = ALGORITHMS.get(algorithm, algorithm)
    part, part_zh = TRAINED.get(str(config.get("model.train")), ("", ""))
    reward, prompts = named(config, "env.reward"), config.get("env.prompts")
    by, by_zh = (f", with the reward {reward}", f"，奖励为 {reward}") if reward else ("", "")
    on, on_zh = (f", on the prompts of {prompts}", f"，提示取自 {prompts}") if prompts else ("", "")
    n, seed = sum(row["tokens"] > 0 for row in run.rows), config.get("seed", "?")
    return Sentence(
        f"{shown} trained the model {model}{f' ({part})' if part else ''} on the task {task}{by}{on}: {tokens:,} "
        f"tokens in {n:,} iterations, seed {seed}.",
        f"用 {shown} 训练模型 {model}{f'（{part_zh}）' if part_zh else ''}，任务为 {task}{by_zh}{on_zh}："
        f"共 {tokens:,} 个词元、{n:,} 次迭代，随机种子 {seed}。",
    )


def _outcome(run: RunData, change: Change | None) -> Sentence:
    if change is not None and change.before is not None and change.difference is not None:
        difference, n = change.difference, len(next(iter(run.scores.values())).prompts)
        low, high = difference.low, difference.high
        before, after = cell(change.before.value), cell(change.after.value)
        if low is None or high is None:
            return Sentence(
                f"The reward of {n} evaluated prompts went from {before} to {after}.",
                f"在 {n} 个评估提示上，奖励从 {before} 变为 {after}。",
            )
        verdict, verdict_zh = _verdict(low, high)
        interval = f"{difference.value:+#.3g} [{low:+#.3g}, {high:+#.3g}]"
        return Sentence(
            f"The reward of {n} evaluated prompts went from {before} to {after}, by {interval} (95 % interval over "
            f"prompts): {verdict}.",
            f"在 {n} 个评估提示上，奖励从 {before} 变为 {after}，变化 {interval}（对提示的 95 % 区间）：{verdict_zh}。",
        )
    ends = _ends(run, "reward/task")
    if ends is None:
        return Sentence("It has not been evaluated twice yet.", "尚未完成两次评估。")
    return Sentence(
        f"It has not been evaluated twice; the reward of the training texts went from {ends[0]} to {ends[1]}.",
        f"尚未完成两次评估；训练文本的奖励从 {ends[0]} 变为 {ends[1]}。",
    )


def _verdict(low: float, high: float) -> tuple[str, str]:
    if low > 0:
        return "a rise that chance in the choice of prompts does not explain", "这一上升不能用提示的偶然性解释"
    if high < 0:
        return "a fall that chance in the choice of prompts does not explain", "这一下降不能用提示的偶然性解释"
    return "no change that these prompts can show", "这些提示不足以显示变化"


def _texts(run: RunData) -> Sentence:
    en, zh = [], []
    if lengths := _ends(run, "episode/length"):
        en.append(f"texts went from {lengths[0]} to {lengths[1]} tokens")
        zh.append(f"文本长度从 {lengths[0]} 变为 {lengths[1]} 个词元")
    whole = [{"whole": sum(row.get(key) or 0.0 for key in ENDED)} for row in run.rows if "episode/end_eos" in row]
    if whole:
        before, after = (f"{100 * (mean_of(part, 'whole') or 0.0):.0f} %" for part in _first_and_last(whole))
        en.append(f"the share of those that ended by themselves from {before} to {after}")
        zh.append(f"自行结束的比例从 {before} 变为 {after}")
    if entropies := _ends(run, "train/entropy_loss", -1):
        en.append(f"the entropy of a token from {entropies[0]} to {entropies[1]} nats")
        zh.append(f"每个词元的熵从 {entropies[0]} 变为 {entropies[1]} 奈特")
    if divergences := _ends(run, "kl/sequence"):
        en.append(f"their divergence from the reference to {divergences[1]} nats a text")
        zh.append(f"与参考模型的散度变为每段文本 {divergences[1]} 奈特")
    if not en:
        return Sentence("Nothing is known of its texts yet.", "尚无文本信息。")
    said = " and ".join([", ".join(en[:-1]), en[-1]] if len(en) > 1 else en)
    return Sentence(f"{said[0].upper()}{said[1:]}.", f"{'，'.join(zh)}。")


def _cost(run: RunData) -> Sentence:
    seconds = total_seconds(run.rows)
    if seconds <= 0:
        return Sentence("What it cost was not recorded.", "没有耗时记录。")
    speed = f"{_tokens(run) / seconds:,.0f}"
    en = f"It took {duration(seconds)} at {speed} tokens a second"
    zh = f"用时 {duration(seconds)}，每秒 {speed} 个词元"
    shares = [time_shares(row, before) for row, before in zip(run.rows, [None, *run.rows], strict=False)]
    if means := {key: mean_of(shares, key) for key in (UPDATE, REST, REWARD, EVALUATION)} if any(shares) else {}:
        update, rest, reward, evaluation = (f"{100 * (share or 0.0):.0f} %" for share in means.values())
        en += f": {update} for updates, {reward} for the reward, {evaluation} for evaluations, {rest} for writing texts"
        zh += f"：更新 {update}，奖励 {reward}，评估 {evaluation}，生成文本 {rest}"
    return Sentence(f"{en}.", f"{zh}。")


def _standing(run: RunData) -> Sentence:
    tokens, total = _tokens(run), run.config.get("total_tokens")
    is_short = isinstance(total, int) and tokens < total
    share = f"{tokens:,} / {total:,}" if is_short else f"{tokens:,}"
    if not run.is_finished:
        en, zh = f"It is not finished: it stands at {share} tokens", f"尚未结束：已训练 {share} 个词元"
    elif is_short:
        en, zh = f"It stopped early, at {share} tokens", f"提前停止于 {share} 个词元"
    else:
        en, zh = "It is finished", "训练已完成"
    if run.best is not None:
        figure, value, at = run.best["figure"], cell(run.best["value"]), run.best["num_timesteps"]
        en += f"; the best model by {figure}, {value}, is that of {at:,} tokens"
        zh += f"；按 {figure} 最好的模型（{value}）在 {at:,} 个词元处"
    return Sentence(f"{en}.", f"{zh}。")


def duration(seconds: float) -> str:
    """Return a time in its two largest units.

    Example:
        >>> duration(28.4), duration(3_725)
        ('28 s', '1 h 2 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _tokens(run: RunData) -> int:
    return int(run.rows[-1]["tokens"]) if run.rows else 0


def _ends(run: RunData, key: str, sign: int = 1) -> tuple[str, str] | None:
    """Return a figure at the start and at the end, each the mean of a tenth of the iterations that have it."""
    rows = [row for row in run.rows if finite(row.get(key)) is not None]
    if not rows:
        return None
    first, last = (mean_of(part, key) for part in _first_and_last(rows))
    return cell(sign * (first or 0.0)), cell(sign * (last or 0.0))


def _first_and_last(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    n = max(1, len(rows) // 10)
    return rows[:n], rows[-n:]


def change_rows(changed: Mapping[str, Change]) -> list[dict[str, Any]]:
    """Return the figures before and after as plain rows: the name, and value, low and high of each estimate."""
    return [
        {"figure": name, **{key: plain_estimate(one) for key, one in change._asdict().items()}}
        for name, change in changed.items()
    ]


def plain_estimate(estimate: Estimate | None) -> list[float | None] | None:
    """Return value, low and high of an estimate, for JSON."""
    return None if estimate is None else [rounded(number) for number in estimate]
