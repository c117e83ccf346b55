"""The words of the rating page, in English and Chinese."""

from __future__ import annotations

LANGUAGES = {"en": "English", "zh": "中文"}

_WORDS = {
    "title": ("Rate texts", "文本评价"),
    "rate": ("Rate", "评价"),
    "history": ("History", "记录"),
    "light": ("Light", "浅色"),
    "dark": ("Dark", "深色"),
    "your_name": ("Your name", "你的名字"),
    "name_why": ("It is stored with your answers.", "名字会与你的回答一起保存。"),
    "start": ("Start", "开始"),
    "leave": ("Not you?", "不是你？"),
    "prompt": ("Prompt", "提示"),
    "ask_score": ("How good is each text?", "每段文本有多好？"),
    "ask_score_one": ("How good is the text?", "这段文本有多好？"),
    "ask_compare": ("Which text is better?", "哪一段文本更好？"),
    "ask_rank": ("Put the texts in order, the best first.", "请从最好到最差排序。"),
    "better_a": ("A is better", "A 更好"),
    "better_b": ("B is better", "B 更好"),
    "tie": ("Equally good", "一样好"),
    "both_bad": ("Both bad", "都不好"),
    "your_order": ("Your order", "你的排序"),
    "drag": ("Tap a text or press its number; drag to change.", "点选文本或按其数字键；拖动可调整。"),
    "not_ranked": ("not ranked yet", "尚未排序"),
    "send": ("Send", "提交"),
    "skip": ("Skip", "跳过"),
    "undo": ("Undo", "撤销"),
    "saved": ("Saved. Thank you.", "已保存，谢谢。"),
    "skipped": ("Skipped.", "已跳过。"),
    "undone": ("Taken back.", "已撤销。"),
    "nothing_to_undo": ("There is nothing to undo.", "没有可撤销的内容。"),
    "not_saved": ("Not saved. Try again.", "未保存，请重试。"),
    "all_done": ("All done. Thank you!", "全部完成，谢谢！"),
    "waiting": ("New texts appear here by themselves.", "有新文本时会自动显示。"),
    "progress": ("{done} of {all}", "{done} / {all}"),
    "progress_skipped": ("{skipped} skipped", "跳过 {skipped}"),
    "shortcuts": ("Keys", "快捷键"),
    "keys_score": ("{digits} score", "{digits} 打分"),
    "keys_text": ("↑ ↓ text", "↑ ↓ 选择文本"),
    "keys_change": ("← → change", "← → 调整"),
    "keys_compare": ("A or ←, B or →, T equally good, X both bad", "A 或 ←，B 或 →，T 一样好，X 都不好"),
    "keys_rank": ("{digits} next best", "{digits} 选下一名"),
    "keys_back": ("Backspace last one back", "Backspace 撤回一名"),
    "keys_send": ("Enter send", "Enter 提交"),
    "keys_all": ("S skip, U undo", "S 跳过，U 撤销"),
    "comma": (", ", "，"),
    "rater": ("Rater", "评价者"),
    "me": ("Me", "我"),
    "everyone": ("Everyone", "所有人"),
    "kind": ("Kind", "类型"),
    "any": ("Any", "全部"),
    "score": ("Score", "打分"),
    "compare": ("Compare", "比较"),
    "rank": ("Rank", "排序"),
    "search": ("Search", "搜索"),
    "download": ("Download", "下载"),
    "pairs": ("Pairs", "成对"),
    "rankings": ("Rankings", "排序"),
    "scores": ("Scores", "分数"),
    "time": ("Time", "时间"),
    "answer": ("Answer", "回答"),
    "seconds": ("Took", "用时"),
    "more": ("More", "更多"),
    "no_answers": ("No answers yet.", "还没有回答。"),
    "agreement": ("Agreement of raters (Krippendorff's α)", "评价者一致性（Krippendorff α）"),
    "self_agreement": ("Alike the second time", "重复一致率"),
    "token_needed": ("This page needs the address that was printed when it started.", "请使用启动时显示的完整地址。"),
    "token_just": ("You have just opened it? Go on.", "刚刚打开了它？继续。"),
}


def words(language: str) -> dict[str, str]:
    """Return the page's words by name, in English if the language is unknown.

    Example:
        >>> words("zh")["undo"], words("en")["undo"]
        ('撤销', 'Undo')
    """
    column = list(LANGUAGES).index(language) if language in LANGUAGES else 0
    return {name: texts[column] for name, texts in _WORDS.items()}
