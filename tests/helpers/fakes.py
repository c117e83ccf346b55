"""Stand-ins for the libraries of `textenv.adapters`, modelled on their sources, for where they are not installed.

Where a library is installed, the same tests play with the library itself and must get the same results.
"""

import math
import random
import re
import types
from dataclasses import dataclass, field

GAME = -1  # the sender of the game's own messages in TextArena


class ArenaState:
    """As textarena.core.State: each player's unread messages, the player to move, and rewards at the end."""

    def __init__(self, num_players, seed):
        if seed is not None:
            random.seed(seed)
        self.observations = {player: [] for player in range(num_players)}
        self.current_player_id, self.done, self.rewards = 0, False, None
        self.errors, self.made_invalid_move = 0, False

    def tell(self, message, to=None, sender=GAME):
        for player, messages in self.observations.items():
            if to in (None, player):
                messages.append((sender, message, "type"))

    def invalid(self, reward):
        """The first invalid move is forgiven, the second in a row ends the game with this reward."""
        player = self.current_player_id
        self.made_invalid_move = True
        if self.errors == 0:
            self.errors = 1
            self.tell(f"Player {player} attempted an invalid move.", to=player)
        else:
            others = {other: 1 for other in self.observations if other != player}
            self.rewards, self.done = {player: reward, **others}, True

    def step(self):
        if not self.made_invalid_move:
            self.errors = 0
            if not self.done:
                self.current_player_id = (self.current_player_id + 1) % len(self.observations)
        self.made_invalid_move = False
        return self.done, {}


class ArenaGame:
    """As textarena.Env."""

    def get_observation(self):
        player = self.state.current_player_id
        news, self.state.observations[player] = self.state.observations[player], []
        return player, news

    def close(self):
        return self.state.rewards, {player: {"reason": "over"} for player in self.state.observations}


class ArenaGuess(ArenaGame):
    def __init__(self, min_number=1, max_number=20, max_turns=10):
        self.low, self.high = min_number, max_number

    def reset(self, num_players, seed=None):
        self.state = ArenaState(num_players, seed)
        self.number, self.tried = random.randint(self.low, self.high), []
        self.state.tell(f"You have to guess the number between {self.low} and {self.high}.")

    def step(self, action):
        self.state.tell(action, sender=0)
        match = re.search(r"\[(\d+)\]", action)
        guess = int(match.group(1)) if match else None
        if guess is None or not self.low <= guess <= self.high or guess in self.tried:
            last = self.tried[-1] if self.tried else None
            self.state.invalid(0.0 if last is None else 1 - abs(last - self.number) / (self.high - self.low))
            return self.state.step()
        self.tried.append(guess)
        if guess == self.number:
            self.state.rewards, self.state.done = {0: 1}, True
        else:
            self.state.tell(f"The target number is {'lower' if guess > self.number else 'higher'}.")
        return self.state.step()


class ArenaTicTacToe(ArenaGame):
    LINES = ("012", "345", "678", "036", "147", "258", "048", "246")

    def reset(self, num_players, seed=None):
        self.state, self.board = ArenaState(num_players, seed), {}
        for player in range(num_players):
            self.state.tell(f"You are Player {player} in Tic Tac Toe.", to=player)
        self.show()

    def show(self):
        free = ", ".join(f"'[{cell}]'" for cell in range(9) if str(cell) not in self.board)
        self.state.tell(f"Current Board:\n\nAvailable Moves: {free}")

    def step(self, action):
        player = self.state.current_player_id
        self.state.tell(action, sender=player)
        match = re.search(r"\[\s*(\d+)\s*\]", action)
        if match is None or match.group(1) not in "012345678" or match.group(1) in self.board:
            self.state.invalid(-1)
        else:
            self.board[match.group(1)] = player
            mark = "OX"[player]
            self.state.tell(f"Player {player} placed their symbol ({mark}) in cell {match.group(1)}.")
            if any(all(self.board.get(cell) == player for cell in line) for line in self.LINES):
                self.state.rewards, self.state.done = {player: 1, 1 - player: -1}, True
            elif len(self.board) == 9:
                self.state.rewards, self.state.done = {0: 0, 1: 0}, True
        self.show()
        return self.state.step()


class ArenaWrapper:
    """As textarena.Wrapper, and as the default one: keeps all messages, even through `reset`, and repeats them."""

    def __init__(self, env):
        self.env, self.full = env, {}

    def __getattr__(self, name):
        return getattr(self.env, name)

    def get_observation(self):
        player, news = self.env.get_observation()
        self.full[player] = [*self.full.get(player, []), *news]
        return player, "".join(f"\n[GAME] {text}" for _, text, _ in self.full[player])


def textarena():
    games = {"GuessTheNumber-v0": ArenaGuess, "TicTacToe-v0": ArenaTicTacToe}
    module = types.ModuleType("textarena")
    module.Wrapper = ArenaWrapper
    module.make = lambda env_id, **kwargs: ArenaWrapper(games[env_id](**kwargs))
    return {"textarena": module}


class GemGuess:
    """As gem.envs.game_env.guess_the_number, which seeds the global generators."""

    def __init__(self, min_number=1, max_number=10, max_turns=4):
        self.low, self.high, self.max_turns = min_number, max_number, max_turns
        self.reset()

    def reset(self, seed=None):
        if seed is not None:
            random.seed(seed)
        self.number, self.tried, self.n_turns = random.randint(self.low, self.high), set(), 0
        example = random.randint(self.low, self.high)
        text = f"You have to guess the number between {self.low} and {self.high}, for example, \\boxed{{{example}}}.\n"
        return text, {"suffix": "Enter your next guess."}

    def step(self, action):
        self.n_turns += 1
        found = re.findall(r"\\boxed{(\d+)}", action)
        guess, info, is_last = int(found[-1]) if found else 0, {"suffix": "Enter your next guess."}, False
        is_last = self.n_turns >= self.max_turns
        if not guess:
            return f"At turn {self.n_turns}, you did not provide a valid guess.", -0.1, True, is_last, info
        text = f"At turn {self.n_turns}, you guessed {guess}, which is outside the range specified."
        if self.low <= guess <= self.high:
            hint = "lower" if guess > self.number else "higher"
            text = f"At turn {self.n_turns}, you guessed {guess}, and the target number is {hint} than {guess}."
            if guess in self.tried:
                text = f"At turn {self.n_turns}, you guessed {guess}, which has been already guessed before."
            self.tried.add(guess)
            if guess == self.number:
                return "Congratulations!", 1.0, True, False, info
        if not is_last:
            return text, 0.0, False, False, info
        inside = self.low <= guess <= self.high
        reward = 1 - abs(guess - self.number) / (self.high - self.low) if inside else 0.0
        return "You have reached the maximum number of turns.", reward, True, True, info


def gem():
    module = types.ModuleType("gem")
    module.make = lambda env_id, **kwargs: {"game:GuessTheNumber-v0-easy": GemGuess}[env_id](**kwargs)
    return {"gem": module}


@dataclass
class VerifiersReward:
    score: float
    weight: float

    @property
    def value(self):
        return self.score * self.weight


@dataclass
class VerifiersTrace:
    """As verifiers.v1.Trace, with the fields that scoring uses."""

    task: object
    agent: object
    nodes: list
    rewards: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)

    @property
    def last_reply(self):
        return [node.message.content for node in self.nodes if node.sampled][-1].strip()

    @property
    def reward(self):
        return sum(reward.value for reward in self.rewards.values())


class VerifiersTask:
    """As verifiers.v1.Task: rewards are coroutines, found by an attribute that the decorator sets."""

    NEEDS_CONTAINER, config, key, hash = False, None, "key", "hash"

    def __init__(self, data):
        self.data = data

    def hooks(self, attr):
        return [getattr(self, name) for name in dir(type(self)) if hasattr(getattr(type(self), name), attr)]

    @classmethod
    def toolsets(cls, config):
        return []

    async def score(self, trace):
        for reward in self.hooks("reward"):
            wanted = {"task": self.data, "trace": trace}
            names = reward.__code__.co_varnames[1 : reward.__code__.co_argcount]
            score = await reward(**{name: wanted[name] for name in names})
            trace.rewards[reward.__name__] = VerifiersReward(score, reward._vf_weight)


class VerifiersData:
    def __init__(self, **fields):
        defaults = {"idx": None, "name": None, "prompt": None, "system_prompt": None, "image": None}
        vars(self).update({**defaults, **fields})

    @property
    def prompt_text(self):
        return self.prompt or ""


def verifiers():
    def reward(function=None, weight=1.0):
        def mark(function):
            function.reward, function._vf_weight = True, weight
            return function

        return mark if function is None else mark(function)

    v1 = types.ModuleType("verifiers.v1")
    for name in ("SystemMessage", "UserMessage", "AssistantMessage", "MessageNode", "TraceTask", "AgentInfo"):
        setattr(v1, name, types.SimpleNamespace)
    v1.AgentConfig, v1.Trace, v1.Task, v1.TaskData = object, VerifiersTrace, VerifiersTask, VerifiersData
    v1.reward = reward
    package = types.ModuleType("verifiers")
    package.v1 = v1
    return {"verifiers": package, "verifiers.v1": v1}


@dataclass
class SumsConfig:
    min_terms: int = 2
    max_terms: int = 6
    min_digits: int = 1
    max_digits: int = 4
    allow_negation: bool = False
    seed: int | None = None
    size: int = 500

    def validate(self):
        assert self.min_terms > 0, "min_terms must be positive"
        assert self.max_terms >= self.min_terms, "max_terms must be >= min_terms"


class Sums:
    """As reasoning_gym.arithmetic.chain_sum, with its draws."""

    def __init__(self, config):
        self.config = config

    def __getitem__(self, number):
        rng = random.Random(self.config.seed + number)
        n_terms = rng.randint(self.config.min_terms, self.config.max_terms)
        n_digits = rng.randint(self.config.min_digits, self.config.max_digits)
        terms = [rng.randint(0 if n_digits == 1 else 10 ** (n_digits - 1), 10**n_digits - 1) for _ in range(n_terms)]
        signs = [rng.choice(["+", "-"]) for _ in terms[1:]]
        written = f"{terms[0]}" + "".join(f" {sign} {term}" for sign, term in zip(signs, terms[1:]))
        total = terms[0] + sum(term if sign == "+" else -term for sign, term in zip(signs, terms[1:]))
        question = f"State the final answer to the following arithmetic problem: {written} ="
        return {"question": question, "answer": str(total), "metadata": {"expression": written, "num_terms": n_terms}}

    def score_answer(self, answer, entry):
        right = entry["answer"]
        try:
            if float(answer.replace(",", "")) == float(right):
                return 1.0
        except ValueError:
            pass
        return len(right) / len(answer) if right in answer else 0.0


@dataclass
class RangeConfig:
    min_value: int = 2
    max_value: int = 1000
    seed: int | None = None
    size: int = 500

    def validate(self):
        assert self.min_value >= 2, "min_value must be >= 2"


class Factors:
    """As reasoning_gym.arithmetic.prime_factorization, whose scoring raises an error on words."""

    def __init__(self, config):
        self.config = config

    def __getitem__(self, number):
        value = random.Random(self.config.seed + number).randint(self.config.min_value, self.config.max_value)
        factors, rest = [], value
        while rest > 1:
            factors.append(next(factor for factor in range(2, rest + 1) if rest % factor == 0))
            rest //= factors[-1]
        question = f"Find the prime factorization of {value}."
        return {"question": question, "answer": " × ".join(map(str, factors)), "metadata": {"factors": factors}}

    def score_answer(self, answer, entry):
        given, right = (sorted(int(factor) for factor in text.split("×")) for text in (answer, entry["answer"]))
        return 1.0 if given == right else 0.5 if math.prod(given) == math.prod(right) else 0.01


class Colours(Factors):
    """As reasoning_gym.algorithmic.graph_color, which has no answer of its own."""

    def __getitem__(self, number):
        return {**super().__getitem__(number), "answer": None}

    def score_answer(self, answer, entry):
        return 0.0


def reasoning_gym():
    tasks = {"chain_sum": (Sums, SumsConfig), "prime_factorization": (Factors, RangeConfig)}
    tasks |= {"graph_color": (Colours, RangeConfig), "n_queens": (Factors, RangeConfig)}
    factory = types.ModuleType("reasoning_gym.factory")

    def create_dataset(name, **kwargs):
        dataset, config = tasks[name]
        config = config(**kwargs)
        config.validate()
        return dataset(config)

    factory.DATASETS, factory.create_dataset = tasks, create_dataset
    return {"reasoning_gym": types.ModuleType("reasoning_gym"), "reasoning_gym.factory": factory}
