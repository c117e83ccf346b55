"""The words of the report's page, in English and Chinese."""

from __future__ import annotations

from textenv.feedback.words import LANGUAGES

_WORDS = {
    "light": ("Light", "浅色"),
    "dark": ("Dark", "深色"),
    "happened": ("What happened", "发生了什么"),
    "curves": ("Curves", "曲线"),
    "samples": ("Samples over time", "样本的变化"),
    "tokens_view": ("Token view", "逐词元视图"),
    "credit": ("Credit against truth", "价值估计与真值"),
    "several": ("Several runs", "多次运行"),
    "settings": ("Configuration", "配置"),
    "findings": ("What may be wrong", "可能的问题"),
    "run": ("Run", "运行"),
    "made": ("Written {time} by textenv {version}", "由 textenv {version} 写于 {time}"),
    "live": ("The run goes on: this page loads again every {seconds} s", "运行中：本页每 {seconds} 秒重新载入"),
    "pause": ("Pause", "暂停"),
    "resume": ("Go on", "继续"),
    "figure": ("Figure", "指标"),
    "before": ("Before", "训练前"),
    "after": ("After", "训练后"),
    "difference": ("Difference", "差值"),
    "interval_note": ("95 % intervals over prompts, in brackets.", "方括号内为对提示的 95 % 区间。"),
    "tokens": ("tokens", "词元"),
    "tokens_trained": ("tokens trained on", "已训练词元"),
    "points_note": ("Each point is the mean of {n} iterations.", "每个点是 {n} 次迭代的平均。"),
    "curves_note": (
        "Dots are evaluations. Triangles at an edge are values far outside. Point at a panel, or tap it, for its "
        "numbers; a name below it hides or shows a curve.",
        "圆点为评估；边缘的三角形为超出范围的值。指向或点按图表可查看数值；点按下方名称可隐藏或显示曲线。",
    ),
    "bands_note": (
        "A line is the mean of a folder's runs, its band goes from the lowest to the highest of them. Panels with "
        "several figures are those of the run {name}, which the menu at the top chooses.",
        "线为同一文件夹各次运行的平均，色带从最低到最高。含多个指标的图属于运行 {name}，可在上方菜单中选择。",
    ),
    "no_curves": ("There are no figures yet.", "尚无指标。"),
    "reward": ("Reward", "奖励"),
    "training": ("training", "训练"),
    "evaluation": ("evaluation", "评估"),
    "judge": ("judge", "评判"),
    "parts": ("Parts of the reward", "奖励的组成"),
    "kl": ("KL from the reference, nats a text", "与参考模型的 KL，奈特/文本"),
    "kl_token": ("KL", "KL"),
    "entropy": ("Entropy, nats a token", "熵，奈特/词元"),
    "length": ("Length, tokens", "长度，词元"),
    "ends": ("How texts end", "文本如何结束"),
    "end_eos": ("end token", "结束词元"),
    "end_stop": ("stop string", "停止字符串"),
    "end_length": ("cut off", "被截断"),
    "end_env": ("environment", "环境"),
    "value_loss": ("Loss of the critic", "价值损失"),
    "explained": ("Explained variance of the critic", "价值的解释方差"),
    "all_tokens": ("all tokens", "全部词元"),
    "third_first": ("first third", "前三分之一"),
    "third_middle": ("middle third", "中三分之一"),
    "third_last": ("last third", "后三分之一"),
    "clipping": ("Clipped tokens, and KL of an update", "截断比例与更新的 KL"),
    "clip_fraction": ("clipped share", "截断比例"),
    "approx_kl": ("KL of the update", "更新的 KL"),
    "time": ("Shares of the time", "时间占比"),
    "time_update": ("update", "更新"),
    "time_reward": ("reward", "奖励"),
    "time_evaluation": ("evaluation", "评估"),
    "time_rest": ("writing texts", "生成文本"),
    "other": ("Another figure", "其他指标"),
    "show": ("Show", "显示"),
    "first_last": ("first and last table", "首尾两表"),
    "all_tables": ("all tables", "全部表"),
    "samples_note": (
        "The same prompts at every table. Words that the table to the left does not have are marked.",
        "每张表使用相同的提示。左侧表中没有的词以底色标出。",
    ),
    "tables_note": ("{shown} of {all} tables are shown.", "显示 {all} 张表中的 {shown} 张。"),
    "prompts_note": ("{shown} of {all} prompts are shown.", "显示 {all} 个提示中的 {shown} 个。"),
    "mark": ("Mark changes", "标出变化"),
    "no_samples": ("There are no samples yet.", "尚无样本。"),
    "prompt": ("Prompt", "提示"),
    "tokens_note": (
        "Episodes that were trained: those with the lowest and the highest score of a rollout, and some between. "
        "Point at a token, or tap it.",
        "参与训练的若干回合：一次采样中得分最低、最高及其间的几段。指向或点按词元可查看数值。",
    ),
    "episode_note": (
        "An episode that the run's newest policy has written for this page. Point at a token, or tap it.",
        "由该运行最新的策略为本页生成的一个回合。指向或点按词元可查看数值。",
    ),
    "colour_by": ("Colour by", "着色依据"),
    "after_tokens": ("Update after tokens", "更新于词元数"),
    "episode": ("Episode", "回合"),
    "token_number": ("token", "词元"),
    "not_trained": (
        "Not the policy's token of this rollout: another speaker's, or an earlier rollout's.",
        "不是本次采样中策略生成的词元：来自其他说话者或更早的采样。",
    ),
    "yes": ("yes", "是"),
    "no": ("no", "否"),
    "alternatives": ("Likeliest tokens", "最可能的词元"),
    "along": ("Along the text", "沿文本"),
    "of_reward": ("reward", "奖励"),
    "of_penalty": ("KL penalty, in reward", "KL 惩罚（奖励单位）"),
    "of_return": ("return", "回报"),
    "of_value": ("value", "价值"),
    "of_advantage": ("advantage", "优势"),
    "of_kl": ("KL of the token, nats", "词元的 KL，奈特"),
    "of_entropy": ("entropy, nats", "熵，奈特"),
    "of_ratio": ("ratio before clipping", "截断前的比率"),
    "of_clipped": ("clipped", "被截断"),
    "of_support": ("tokens that were allowed", "允许的词元数"),
    "of_log_prob": ("log-probability, nats", "对数概率，奈特"),
    "about_return": (
        "The critic's target: value plus advantage by the critic's lambda.",
        "价值的目标：价值加上按价值 λ 的优势。",
    ),
    "about_advantage": (
        "As the buffer has it, before any normalisation: blue tokens are made likelier, orange ones less likely.",
        "缓冲区中的值，未归一化：蓝色词元的概率被提高，橙色的被降低。",
    ),
    "about_kl": (
        "log π − log π_ref of the sampled token: its mean is the divergence, and single tokens may be negative.",
        "所采样词元的 log π − log π_ref：其均值为散度，单个词元可为负。",
    ),
    "about_ratio": (
        "The probability after the whole update, over that before.",
        "整个更新之后与之前的概率之比。",
    ),
    "about_clipped": (
        "Whether the loss has no gradient at that ratio, since it is clipped.",
        "在该比率处损失是否因截断而没有梯度。",
    ),
    "about_support": (
        "The number of tokens that masks, top-k, top-p and min-p left to sample from.",
        "掩码、top-k、top-p 与 min-p 之后可采样的词元数。",
    ),
    "credit_note": (
        "The value of each prefix: the mean of continuations sampled from it, with its interval, and the critic's.",
        "每个前缀的价值：由其续写采样所得的均值及区间，以及价值模型的估计。",
    ),
    "critic": ("critic", "价值模型"),
    "monte_carlo": ("Monte Carlo", "蒙特卡洛"),
    "tokens_before": ("tokens before", "之前的词元"),
    "seeds_of": ("Seeds of {name}", "{name} 的各种子"),
    "compared": ("{a} against {b}", "{a} 对比 {b}"),
    "iqm_before": ("IQM before", "训练前 IQM"),
    "iqm_after": ("IQM after", "训练后 IQM"),
    "seed": ("seed {name}", "种子 {name}"),
    "between": ("lowest to highest", "最低到最高"),
    "within": ("width of one interval", "单个区间的宽度"),
    "higher": ("higher", "更高者"),
    "not_shown": ("not shown", "未能显示"),
    "no_scores": (
        "No table: a run has no scores.json, which an evaluation writes.",
        "无表：有的运行没有评估写出的 scores.json。",
    ),
    "over_prompts": (
        "{prompts} prompts. Intervals of 95 % are over prompts alone, and say nothing about another seed.",
        "{prompts} 个提示。95 % 区间仅针对提示，不能说明其他种子。",
    ),
    "over_both": (
        "{seeds} seeds, {prompts} prompts. Intervals of 95 % are over seeds and prompts.",
        "{seeds} 个种子，{prompts} 个提示。95 % 区间针对种子与提示。",
    ),
    "few_seeds": (
        "{seeds} seeds are few: where seeds differ much more than prompts do, such an interval contains the true "
        "mean in {coverage} % of all cases.",
        "{seeds} 个种子太少：若种子间差异远大于提示间差异，这样的区间只在 {coverage} % 的情况下包含真实均值。",
    ),
    "differences": ("Differences of configuration", "配置差异"),
    "key": ("Key", "键"),
    "no_differences": ("The configurations are equal.", "配置相同。"),
    "all_keys": ("All {n} keys of config.yml", "config.yml 的全部 {n} 个键"),
    "search": ("Search", "搜索"),
}


def words() -> dict[str, dict[str, str]]:
    """Return the page's words by language and name.

    Example:
        >>> words()["zh"]["curves"], words()["en"]["curves"]
        ('曲线', 'Curves')
    """
    return {
        language: {name: texts[column] for name, texts in _WORDS.items()} for column, language in enumerate(LANGUAGES)
    }
