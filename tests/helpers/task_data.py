"""Made-up data sets of all tasks, each in the file format of the real one."""

import json
import random

from tests.helpers.dialogues import made_up, write_dialogues
from textenv.tasks.reviews import FILES

MOODS = (["sad", "dull", "flat"], ["warm", "wise", "great"])
ZH_MOODS = ["很好，非常满意", "还可以吧", "不太好", "太差了，垃圾"]


def write_data(folder, n=60):
    """Write `n` rows for each task; return the folder of its data by the task's id."""
    rng = random.Random(0)
    folders = {task: folder / task for task in ("Reviews", "DailyDialog", "HH", "ZhReviews")}
    for task_folder in folders.values():
        task_folder.mkdir(parents=True)
    for name, moods in zip(FILES, MOODS):
        nouns = (rng.choice(["film", "plot", "cast"]) for _ in range(n))
        lines = [f"the {noun} is a {rng.choice(moods)} thing to see {i}" for i, noun in enumerate(nouns)]
        (folders["Reviews"] / name).write_text("\n".join(lines) + "\n")
    write_dialogues(folders["DailyDialog"], made_up(n))
    rows = []
    for number in range(n):
        prompt = f"\n\nHuman: question {number} about {rng.choice(['cats', 'dogs', 'tea'])}\n\nAssistant:"
        rows.append({"chosen": f"{prompt} kind words {number}", "rejected": f"{prompt} rude words and more"})
    (folders["HH"] / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    things = ["手机", "衣服", "酒店", "苹果", "电影"]
    lines = ["\t".join(f"{rng.choice(things)}{mood}{number}" for mood in ZH_MOODS) for number in range(n)]
    (folders["ZhReviews"] / "ranked.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folders
