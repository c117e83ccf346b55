"""One use of each extra's feature, by the wheel in an environment that has this extra and no other.

`python .ci/extras.py EXTRA` uses the feature. With `--missing` the extra is not installed, and the error must say how
to install it. `--list` prints the extras that exist for this Python.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from urllib.request import urlopen

from textenv import CharTokenizer, Preds, Prompt, TextEnv

ROOT = Path(__file__).resolve().parent.parent
MISSING = 6  # the command's exit code for a missing package
TOKENIZER = CharTokenizer()
FEW = {"total_tokens": 512, "algorithm.n_envs": 16, "algorithm.n_steps": 16, "algorithm.batch_size": 256}


def textenv(*words: object) -> str:
    """Run the command in its own process, as the installed script does; return what it prints."""
    command = [sys.executable, "-m", "textenv_command", *map(str, words)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode == MISSING:
        raise ImportError(process.stderr)
    if process.returncode:
        raise RuntimeError(f"textenv {words[0]} ended with {process.returncode}:\n{process.stdout}{process.stderr}")
    return process.stdout


def train(folder: Path, loggers: str, **more: object) -> Path:
    """Train the demo for two rollouts, and return the folder of the run."""
    options = {**FEW, "evaluation.n_prompts": 8, "loggers": loggers, "out": folder / "run", **more}
    textenv("train", "--quiet", *[f"--{name}={value}" for name, value in options.items()])
    return folder / "run"


def score(reward, text: str, *references: str) -> float:
    """Return the reward of one text."""
    return float(reward(Prompt("a ", references=references), Preds(TOKENIZER, TOKENIZER.encode(text)), True))


def plot(folder: Path) -> None:
    run = train(folder, "[tensorboard, curves]")
    assert list((run / "tensorboard").glob("events*")) and (run / "curves.png").read_bytes()[1:4] == b"PNG"


def grammar(folder: Path) -> None:
    from textenv import RegexMask

    env = TextEnv(["a"], TOKENIZER, max_new_tokens=4, reward=lambda *of: 0.0, mask=RegexMask("[bc]+"))
    env.reset(seed=0)
    assert [TOKENIZER.decode([token]) for token in env.action_masks().nonzero()[0]] == ["b", "c"]


def sentiment(folder: Path) -> None:
    from textenv.rewards import make_reward

    vader = make_reward("vader")
    assert score(vader, "lovely film") > 0.5 > 0 > score(vader, "awful film")


def chinese(folder: Path) -> None:
    from textenv.rewards import SnowNLP

    reward = SnowNLP()
    assert reward.score_text("质量很好，满意") > 0.7 > 0.3 > reward.score_text("太差了，垃圾")


def lora(folder: Path) -> None:
    run = train(folder, "[]", **{"model.train": "lora", "model.lora_r": 2})
    assert not list((run / "model").glob("adapter*")) and (run / "model" / "model.safetensors").is_file()


def overlap(folder: Path) -> None:
    from textenv.rewards import make_reward

    for name in ("rouge", "bleu", "sacrebleu", "meteor"):
        reward = make_reward(name)
        assert score(reward, "the cat sat on the mat", "the cat sat on the mat") > 0.9, name
        assert score(reward, "dogs run", "the cat sat on the mat") < 0.1, name


def sft(folder: Path) -> None:
    texts = folder / "texts.txt"
    texts.write_text("the film was good .\nthe plot was thin .\n" * 20)
    fresh = "{model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, vocab_size: 300}"
    textenv("sft", "--data", texts, "--out", folder / "tuned", "--fresh", fresh, "--max_tokens", 16)
    assert (folder / "tuned" / "model.safetensors").is_file()


def gguf(folder: Path) -> None:
    from agents import Pretrained

    with suppress(ValueError):  # the missing package is named before the file is looked up
        Pretrained("none.gguf").build()
    helper = spec_from_file_location("tiny_gguf", ROOT / "tests" / "helpers" / "weights" / "tiny_gguf.py")
    helper.loader.exec_module(tiny := module_from_spec(helper))
    file, prompts = tiny.write_gguf(folder / "tiny.gguf"), folder / "prompts.txt"
    prompts.write_text("ab\n")
    assert textenv("generate", file, "--prompts", prompts, "--max_new_tokens", 2).count('"text"') == 1
    Pretrained(str(file)).build().save_pretrained(folder / "plain")


def hub(folder: Path) -> None:
    from textenv import read_dataset

    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert [row["text"] for row in read_dataset(folder, cache_dir=str(folder / "cache"))] == ["one", "two"]


def similarity(folder: Path) -> None:
    import numpy as np

    from agents import word_tokenizer
    from textenv.rewards.similarity import Similarity

    Similarity("none yet")  # the missing package is named before the model is looked up
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    words = word_tokenizer(["good", "film"]).backend_tokenizer
    model = SentenceTransformer(modules=[StaticEmbedding(words, embedding_weights=np.eye(4))], device="cpu")
    assert abs(score(Similarity(model), "film", "good film") - 0.5**0.5) < 1e-4


class Judge(BaseHTTPRequestHandler):
    """Scores a completion by its length."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = json.dumps({"score": len(asked["completion"])}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *words: object) -> None:
        pass


def judge(folder: Path) -> None:
    from textenv.rewards import HTTPJudge

    with HTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert score(HTTPJudge(f"http://127.0.0.1:{server.server_port}"), "seven l") == 7.0
        server.shutdown()


def feedback(folder: Path) -> None:
    from textenv.feedback.agreement import agreement
    from textenv.feedback.store import FeedbackStore
    from textenv.feedback.web import serve

    with FeedbackStore(folder / "answers.db") as store:
        store.add("say it", ["one", "two"], kind="compare", raters=2)
        for rater in ("ann", "bob"):
            store.choose(store.next(rater), "a")
        agreement(store.answers())
        addresses: list[str] = []
        listens = threading.Event()

        def announce(address: str) -> None:
            addresses.append(address)
            listens.set()

        threading.Thread(target=partial(serve, store, announce=announce), daemon=True).start()
        assert listens.wait(60)
        assert b"<html" in urlopen(addresses[0]).read()
        assert urlopen(addresses[0] + "static/rate.js").status == 200


def wandb(folder: Path) -> None:
    run = train(folder, "[{id: wandb, args: {mode: offline}}]")
    assert list((run / "wandb").glob("offline-run*"))


def trackio(folder: Path) -> None:
    run = train(folder, "[trackio]")
    assert list((run / "trackio").iterdir())


def mlflow(folder: Path) -> None:
    run = train(folder, "[mlflow]")
    assert (run / "mlflow.db").is_file() and list((run / "mlflow").rglob("samples.json"))


def tune(folder: Path) -> None:
    options = {
        **FEW,
        "evaluation.n_prompts": 8,
        "loggers": "[]",
        "trials": 1,
        "tune.max_kl": 1e6,
        "out": folder / "run",
    }
    ranges = "--tune.ranges={kl.coef: {low: 0.0, high: 0.1}}"
    textenv("tune", "--quiet", ranges, *[f"--{name}={value}" for name, value in options.items()])
    assert (folder / "run" / "best.yml").is_file()


def zoo(folder: Path) -> None:
    words = "--algo token_ppo --env textenv/Demo-v0 --gym-packages textenv -n 128 -f logs -params n_envs:8 n_steps:8"
    command = [
        sys.executable,
        "-m",
        "agents.zoo",
        "train",
        "--conf-file",
        ROOT / "examples/zoo/token_ppo.yml",
        *words.split(),
    ]
    process = subprocess.run([*command, "n_minibatches:1"], cwd=folder, capture_output=True, text=True, check=False)
    if "pip install" in process.stderr:
        raise ImportError(process.stderr)
    assert process.returncode == 0, process.stdout + process.stderr
    assert (folder / "logs/token_ppo/textenv-Demo-v0_1/textenv-Demo-v0.zip").is_file()


def textarena(folder: Path) -> None:
    from textenv.adapters.textarena import TextArenaGame

    game = TextArenaGame("TicTacToe-v0", [lambda text: "[0]"], to_action="[{}]".format)
    opening, _ = game.reset(seed=0)
    assert "You are Player 0" in opening
    assert "in cell 4" in game.step("4")[0]


def gem(folder: Path) -> None:
    from textenv.adapters.gem import GemGame

    game = GemGame("game:GuessTheNumber-v0-easy")
    assert "number" in game.reset(seed=0)[0]
    assert not game.step("\\boxed{1}")[3]


def reasoning(folder: Path) -> None:
    from textenv.adapters.reasoning_gym import ReasoningGym

    sums, tokenizer = {"max_terms": 2, "max_digits": 1}, CharTokenizer("".join(map(chr, range(32, 127))) + "\n")
    env = ReasoningGym("chain_sum", tokenizer, config=sums, size=9, n_held_out=1)
    env.reset(options={"prompts": [env.prompts[3]]})
    [answer] = env.prompts[3].references
    assert sum(env.step(token)[1] for token in [*tokenizer.encode(answer), tokenizer.eos_token_id]) == 1.0


def openenv(folder: Path) -> None:
    from openenv.core.env_server.interfaces import Environment
    from openenv.core.env_server.types import Action, Observation, State

    class Step(Action):
        size: int

    class Place(Observation):
        at: int

    class Walk(Environment[Step, Place, State]):
        def reset(self, seed=None, episode_id=None, **kwargs):
            self.at = seed
            return Place(at=self.at)

        def step(self, action, timeout_s=None, **kwargs):
            self.at += action.size
            return Place(at=self.at, done=self.at == 5, reward=float(self.at == 5))

        @property
        def state(self):
            return State()

    from textenv.adapters.openenv import OpenEnvGame

    game = OpenEnvGame(Walk, to_action=lambda text: Step(size=int(text)), to_text=lambda seen: f"at {seen.at}")
    assert game.reset(seed=3)[0] == "at 3"
    assert game.step("2")[:3] == ("at 5", 1.0, True)


def verifiers(folder: Path) -> None:
    import verifiers.v1 as vf

    from textenv.adapters.verifiers import VerifiersGame

    class Data(vf.TaskData):
        answer: str

    class Copy(vf.Task[Data]):
        @vf.reward
        async def exact(self, task, trace):
            return float(trace.last_reply == task.answer)

    game = VerifiersGame([Copy(Data(prompt="say ab", answer="ab"))])
    assert game.reset(seed=0)[0] == "say ab"
    assert game.step("ab")[1:3] == (1.0, True) and (game.reset(seed=0), game.step("no"))[1][1] == 0.0


# The caller makes these games with the library itself, so that the caller's own import fails where it is missing.
CALLERS = {"openenv", "verifiers"}
EXTRAS = [
    plot,
    grammar,
    sentiment,
    chinese,
    lora,
    gguf,
    overlap,
    sft,
    hub,
    similarity,
    judge,
    feedback,
    wandb,
    trackio,
    mlflow,
    tune,
    zoo,
]
EXTRAS += [textarena, openenv, reasoning, verifiers, *([gem] if sys.version_info < (3, 12) else [])]


def main(words: list[str]) -> None:
    """Use the feature of an extra, or check the error where the extra is missing."""
    if words == ["--list"]:
        print(*(use.__name__ for use in EXTRAS))
        return
    *missing, name = words
    os.environ["OMP_NUM_THREADS"] = "1"
    feature = {use.__name__: use for use in EXTRAS}[name]
    cure = f"No module named '{name}'" if name in CALLERS else f'pip install "textenv[{name}]"'
    with tempfile.TemporaryDirectory() as folder:
        try:
            feature(Path(folder))
        except ImportError as error:
            if not missing:
                raise
            if cure not in str(error):
                sys.exit(f"Expected an error with {cure!r}, got {type(error).__name__}: {error}")
            print(str(error).strip().split("\n")[-1])
        else:
            if missing:
                sys.exit(f"Expected an error with {cure!r}, got none.")


if __name__ == "__main__":
    main(sys.argv[1:])
