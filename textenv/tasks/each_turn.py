"""The reward of a whole conversation, as the mean of a reward for single replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from textenv.episodes.completion import Preds, Turn
from textenv.episodes.scores import DROPPED, Score, ScoreAt
from textenv.prompts.prompts import Prompt
from textenv.rewards.base import BatchReward, RewardLike, score_rows
from textenv.rewards.registry import read_reward
from textenv.text.tokenizer import Tokenizer


@dataclass
class EachTurn(BatchReward):
    """The mean of a reward over the replies of a recorded conversation, with 0 for replies that were not written.

    Each of the policy's turns is scored as an episode of its own. Its prompt is the conversation up to that turn, with
    the policy's earlier turns; its references and intent are those of the recorded reply at the same position.

    Args:
        reward: The reward of a finished reply. A plain function is called for finished replies only.
        tokenizer: The policy's tokenizer.
        separator: The text that ends a turn.

    Example:
        >>> from textenv import CharTokenizer
        >>> tokenizer = CharTokenizer()
        >>> exchanges = [{"other": "ok", "reply": "bye", "intent": 0}]
        >>> prompt = Prompt("hi ", row={"exchanges": exchanges}, references=["yes"])
        >>> preds = Preds(tokenizer, tokenizer.encode("bye"), closed=[Turn("no", "ok ")])
        >>> EachTurn(lambda prompt, preds, done: float(preds.text in prompt.references), tokenizer)(prompt, preds, True)
        0.5
    """

    reward: RewardLike
    tokenizer: Tokenizer = field(repr=False)
    separator: str = "\n"

    def __post_init__(self) -> None:
        self._reward = read_reward(self.reward)
        late = isinstance(self._reward, BatchReward) and self._reward.score_at == "rollout_end"
        self.score_at: ScoreAt = "rollout_end" if late else "done"
        self.may_drop = isinstance(self._reward, BatchReward) and self._reward.may_drop

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> list[Score]:
        """Return the mean of each row, in named parts where the reward has them; one dropped reply drops its row."""
        replies = [self._replies(*row) for row in zip(prompts, preds, strict=True)]
        flat = [reply for row in replies for reply in row]
        scored = iter(
            score_rows(self._reward, [prompt for prompt, _ in flat], [reply for _, reply in flat], [True] * len(flat))
        )
        scores: list[Score] = []
        for prompt, row in zip(prompts, replies, strict=True):
            # The divisor is the number of recorded replies, so that replies that were not written count as 0.
            n_recorded = 1 + len(prompt.row["exchanges"])
            parts: dict[str, float] = {}
            total = 0.0
            rewards = [next(scored) for _ in row]
            if any(reward.is_dropped for reward in rewards):
                scores.append(DROPPED)
                continue
            for reward in rewards:
                total += reward.value / n_recorded
                for name, value in reward.parts.items():
                    parts[name] = parts.get(name, 0.0) + value / n_recorded
            scores.append(parts or total)
        return scores

    def _replies(self, prompt: Prompt, preds: Preds) -> list[tuple[Prompt, Preds]]:
        """Return each turn of the policy as an episode of its own."""
        text, references, row = str(prompt), prompt.references, prompt.row
        episodes = []
        # An exchange follows each recorded turn but the last; the policy may have written fewer turns (strict=False).
        for turn, exchange in zip(preds.turns, [*prompt.row["exchanges"], None], strict=False):
            ids = self.tokenizer.encode(turn.text, add_special_tokens=False)
            written = [Turn(turn.text, None)]  # a closed turn, so that `preds.text` is this text, without decoding
            reply = Preds(self.tokenizer, ids, turn_length=0, closed=written, lane=preds.lane, group=preds.group)
            episodes.append((Prompt(text, row=row, references=references, number=prompt.number), reply))
            if exchange is not None:
                text += f"{turn.text}{self.separator}{exchange['other']}{self.separator}"
                references, row = [exchange["reply"]], {**row, "intent": exchange["intent"]}
        return episodes
