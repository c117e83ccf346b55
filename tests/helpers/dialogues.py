"""Made-up dialogues in the file format of DailyDialog."""

import random

from textenv.tasks.dailydialog import Dialogue

GREETINGS = ["Hello , {name} .", "Good morning , {name} ! I have come for the {thing} ."]
INFORMS = ["I have seen the {thing} .", "It is a {kind} {thing} , {name} ."]
QUESTIONS = ["Have you seen the {thing} ?", "Is it a {kind} {thing} , {name} ?"]
DIRECTIVES = ["Please bring the {kind} {thing} .", "Let's take the {thing} , {name} ."]
COMMISSIVES = ["All right , I will take the {thing} .", "Sure , {name} , I will bring a {kind} {thing} ."]
TURNS = (INFORMS, QUESTIONS, DIRECTIVES, COMMISSIVES)
ANSWERS = {0: 1, 1: 0, 2: 3, 3: 2}  # the intent that usually answers each intent

TALK = [
    Dialogue(("hi", "who is there?", "me", "come in!", "thanks"), (0, 1, 0, 2, 3)),
    Dialogue(("yes", "no"), (0, 0)),
]


def made_up(n, seed=0):
    """Return `n` different dialogues of 3 to 7 turns."""
    random_ = random.Random(seed)
    dialogues = {}
    while len(dialogues) < n:
        words = {
            "name": random_.choice(["Ann", "Ben", "Mary", "Tom"]),
            "thing": random_.choice(["lamp", "ticket", "chair", "letter", "map"]),
            "kind": random_.choice(["red", "new", "cheap", "small"]),
        }
        turns, intents = [random_.choice(GREETINGS).format(**words)], [0]
        for _ in range(random_.randint(2, 6)):
            intents.append(ANSWERS[intents[-1]] if random_.random() < 0.7 else random_.randrange(4))
            turns.append(random_.choice(TURNS[intents[-1]]).format(**words))
        dialogues[Dialogue(tuple(turns), tuple(intents))] = None
    return list(dialogues)


def write_dialogues(folder, dialogues, split="validation"):
    """Write dialogues in the format of the data set's own files; return the folder."""
    folder.mkdir(exist_ok=True)
    lines = {
        "": [" ".join(f"{turn} __eou__" for turn in dialogue.turns) for dialogue in dialogues],
        "act_": [" ".join(str(intent + 1) for intent in dialogue.intents) + " " for dialogue in dialogues],
        "emotion_": ["0 " * len(dialogue.turns) for dialogue in dialogues],
    }
    for kind, rows in lines.items():
        (folder / f"dialogues_{kind}{split}.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder
