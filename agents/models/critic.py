"""Critics: estimates of the return of a prefix, from the policy's hidden states or from a model of their own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from textenv.huggingface.positions import n_positions
from textenv.huggingface.weights import from_pretrained, has_tokenizer
from textenv.rewards.reward_stats import RewardStats
from textenv.rewards.text_reader import ReadAs
from textenv.text.tokenizer import special_tokens_around

from .backbone import check_fits
from .layers import evaluate_in_checkpoints, fuse_activations, set_mode, trunk_of
from .pretrained import LMLike, PretrainedRewardModel, as_spec, build_model
from .probe import PROBE_LENGTH, causal_cure
from .prompt_layout import SharedPrompts
from .prompt_probe import Sharing, examine_sharing
from .shared_prompts import read_shared

PROBE_TOLERANCE = 1e-4  # float32 rounds by about 1e-6; attention to a later token changes a hidden state by far more


class CriticSpec(Protocol):
    """A small object that pickles and builds a critic; `policy_kwargs` hold it as `critic`."""

    def build(self, hidden_size: int) -> nn.Module:
        """Return a module that maps the policy's hidden states (N, hidden_size) to values (N,), or a `TrunkCritic`."""


@dataclass(frozen=True)
class SharedCritic:
    """A linear value head on the policy's trunk, initialised to zero: V = 0 at the start.

    Args:
        detach: Whether the value loss stops at the head, so that it does not train the trunk.

    Example:
        >>> import torch
        >>> from agents import SharedCritic
        >>> SharedCritic().build(hidden_size=8)(torch.ones(3, 8)).tolist()
        [0.0, 0.0, 0.0]
    """

    detach: bool = False

    def build(self, hidden_size: int) -> nn.Module:
        """Return the value head."""
        return ValueHead(hidden_size, self.detach)


class ValueHead(nn.Module):
    """A zero-initialised linear map from a hidden state to a value; see `SharedCritic`."""

    def __init__(self, hidden_size: int, detach: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.detach = detach

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the values (N,) of hidden states (N, H), float32."""
        hidden = hidden.detach() if self.detach else hidden
        # Under autocast the last norm of some models returns 16 bits; the head's weights are float32.
        return self.linear(hidden.to(self.linear.weight.dtype)).squeeze(-1).float()


class TrunkCritic(ValueHead):
    """A value head on a trunk of its own, which shares no weight with the policy.

    The trunk must be causal: a hidden state depends only on the tokens up to its own. A probe tests that.

    Args:
        trunk: The model without its head. In training mode too, its modules stay in evaluation mode, without noise.

    Raises:
        ValueError: If a hidden state depends on later tokens.
    """

    def __init__(self, trunk: PreTrainedModel) -> None:
        evaluate_in_checkpoints(trunk)
        fuse_activations(trunk)
        set_mode(trunk, training=trunk.training)
        hidden = check_causal(trunk)
        super().__init__(hidden.shape[-1])
        self.trunk = trunk
        is_recurrent = trunk._is_stateful  # it keeps a state, not keys and values
        readers = (lambda *whole: (self.read(*whole),), lambda shared: (self.read_shared(shared),))
        self._sharing = Sharing() if is_recurrent else examine_sharing(*readers, trunk)
        self.train()  # as every new module of PyTorch

    def train(self, mode: bool = True) -> TrunkCritic:
        super().train(mode)
        set_mode(self.trunk, mode)
        return self

    def check_fits(self, vocab_size: int, n_positions: int) -> None:
        """Raise ValueError if the trunk has fewer embedding rows or fewer positions than needed."""
        check_fits(self.trunk, vocab_size, n_positions)

    def read(self, ids: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """Return the trunk's hidden states (N, H) at the positions (rows, cols) of right-padded tokens (B, T)."""
        return _read(self.trunk, ids)[rows, cols]  # (N, H)

    @property
    def shares_prompts(self) -> bool:
        """Whether `read_shared` is exact now: in training, layers may be under activation checkpointing."""
        return self._sharing.now(self.trunk, self.training)

    @cached_property
    def most_columns(self) -> int | None:
        """The most columns that the trunk's positions allow; None where they set no limit."""
        return n_positions(self.trunk)

    def read_shared(self, shared: SharedPrompts) -> Tensor:
        """Return what `read` does for whole sequences, each distinct prompt of which is read once."""
        return read_shared(self._states, self.trunk, shared)[0]  # (N, H)

    def _states(self, **inputs: Any) -> tuple[Tensor]:
        return (self.trunk(**inputs).last_hidden_state,)  # (B, T, H)


@dataclass(frozen=True)
class SeparateCritic:
    """A critic that is a model of its own, with a zero-initialised value head: V = 0 at the start.

    The policy's trunk then follows the policy's gradient alone, at the cost of a second model in memory and in the
    update. With a `SequenceRolloutBuffer` the critic runs at the end of a rollout, in one forward per sequence; with
    Stable-Baselines3's own buffer it runs at every step, over the whole prefix.

    Args:
        lm: The model whose trunk the critic takes, as for `LMPolicy`: any causal model with the policy's tokenizer.

    Example:
        >>> from agents import SeparateCritic
        >>> from transformers import GPT2Config
        >>> spec = SeparateCritic(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=40))
        >>> policy_kwargs = dict(lm="./my-gpt2", critic=spec, critic_lr_scale=10.0)
    """

    lm: LMLike

    def __post_init__(self) -> None:
        object.__setattr__(self, "lm", as_spec(self.lm))  # the dataclass is frozen

    def build(self, hidden_size: int) -> nn.Module:
        """Return the trunk with its value head.

        Raises:
            ValueError: If the model is an encoder-decoder.
        """
        model = build_model(self.lm)
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"Expected a causal model as critic, got the encoder-decoder {type(model).__name__}: a critic reads "
                "prompt and completion as one text. Use SharedCritic, or SeparateCritic of a causal model."
            )
        return TrunkCritic(trunk_of(model))


class RewardModelCritic:
    """A critic that starts as a trained reward model: at first, the value of a whole text is its score.

    The score head becomes the value head (as in Ouyang et al., 2022, section C.4); trunk and head are then trained. In
    all else it is like `SeparateCritic`.

    A critic reads the policy's own tokens: those of the prompt and those that it has sampled so far. The reward model
    reads the same ones if both have the same tokenizer, the text is not cut, and the score is read at the text's own
    last token. A model that scores a text at a closing token behind it (EOS, "<|im_end|>") is refused, since that token
    is not there while the policy writes. Such a model has a tokenizer that adds the token, or `train_reward_model`
    trained it on texts that all ended with it. In two cases, which are not detected, the first values are no scores: a
    published model that its authors trained on whole chats, and a prompt that does not open as the texts of the
    training did (token ids of your own, which get no BOS, or a prompt cut to `max_prompt_tokens`).

    Args:
        name: A name on the hub or the path of a folder, which `AutoModelForSequenceClassification` loads with
            `num_labels=1`.
        normalise: Whether values are (score - mean) / standard deviation, with both from the folder's
            `reward_stats.json`: for a reward that is normalised in the same way.
        **kwargs: Other arguments of `from_pretrained`. `dtype` is float32 unless given.

    Raises:
        FileNotFoundError: When built with `normalise=True`, if the folder has no `reward_stats.json`.

    Example:
        >>> from agents import RewardModelCritic
        >>> policy_kwargs = dict(lm="./my-gpt2", critic=RewardModelCritic("./my-reward-model"))
    """

    def __init__(self, name: str, normalise: bool = False, **kwargs: Any) -> None:
        self.model = PretrainedRewardModel(name, **kwargs)
        self.normalise = normalise

    def build(self, hidden_size: int) -> nn.Module:
        """Return the reward model's trunk, with its score head as value head.

        Raises:
            ValueError: If values and the model's scores differ on a probe, or the model scores a text at a token that
                closes it.
        """
        model = self.model.build()
        self._refuse_closing_token(model)
        head = score_head(model)
        critic = TrunkCritic(trunk_of(model))
        with torch.no_grad():
            critic.linear.weight.copy_(head.weight)
            if head.bias is not None:
                critic.linear.bias.copy_(head.bias)
            # Any token but the pad token: transformers `modeling_layers.GenericForSequenceClassification.forward`
            # scores at the last token that is not padding.
            ids = torch.full((1, PROBE_LENGTH), int(model.config.get_text_config().pad_token_id == 0))  # (1, T)
            score, value = model.eval()(input_ids=ids).logits[0], critic(_read(critic.trunk, ids)[:, -1])
        if not torch.allclose(score, value, atol=PROBE_TOLERANCE):
            raise ValueError(
                f"Expected {type(model).__name__} to score a text by its last hidden state, got {float(score):.4g} "
                f"from it and {float(value):.4g} from its head there: use SeparateCritic."
            )
        # An unpickled spec has no name: the saved weights, which are loaded next, are normalised already.
        if self.normalise and self.model.name is not None:
            stats = RewardStats.load(self.model.name)
            with torch.no_grad():  # (w x + b - mean) / std, folded into w and b
                critic.linear.weight.div_(stats.std)
                critic.linear.bias.sub_(stats.mean).div_(stats.std)
        return critic

    def _refuse_closing_token(self, model: PreTrainedModel) -> None:
        name, read_as = self.model.name, ReadAs.of(model.config)
        if name is None or (read_as is not None and not read_as.closing):  # an unpickled spec was checked before
            return
        # A folder may have no tokenizer.
        tokenizer = from_pretrained(AutoTokenizer, name) if has_tokenizer(name) else None
        if read_as is not None:
            closing = list(read_as.closing)
        else:
            closing = [] if tokenizer is None else special_tokens_around(tokenizer, "a")[2]
        if closing:
            shown = closing if tokenizer is None else tokenizer.convert_ids_to_tokens(closing)
            raise ValueError(
                f"Expected a reward model that scores a text at the text's own last token, got {name!r}, which scores "
                f"it at the closing {shown} behind it, which a text that the policy is still writing does not have: "
                "train the reward model on texts without these tokens, or use SeparateCritic."
            )


def score_head(model: PreTrainedModel) -> nn.Linear:
    """Return the linear layer that maps a reward model's hidden state to its score.

    Raises:
        ValueError: If the model has not exactly one linear layer of one output beside its trunk.
    """
    heads = [child for child in model.children() if isinstance(child, nn.Linear) and child.out_features == 1]
    if len(heads) != 1:
        raise ValueError(f"Expected one linear layer behind the trunk of {type(model).__name__}, got {len(heads)}.")
    return heads[0]


def _read(trunk: PreTrainedModel, ids: Tensor) -> Tensor:
    return trunk(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, H)


@torch.no_grad()
def check_causal(trunk: PreTrainedModel) -> Tensor:
    """Return the hidden states of a few tokens, (1, T, H); raise ValueError if they depend on later tokens."""
    ids = torch.zeros(1, PROBE_LENGTH, dtype=torch.long, device=trunk.device)  # (1, T)
    with_other_end = ids.clone()  # the last token is changed, and the states at the earlier ones are compared
    with_other_end[0, -1] = 1
    was_training = trunk.training
    trunk.eval()
    hidden, changed = _read(trunk, ids), _read(trunk, with_other_end)
    trunk.train(was_training)
    if not torch.allclose(hidden[0, :-1], changed[0, :-1], atol=PROBE_TOLERANCE):
        raise ValueError(
            f"Expected a causal model as critic, got {type(trunk).__name__}, in which hidden states depend on tokens "
            "that come later: values would depend on tokens that are yet to be sampled. Cure: "
            f"{causal_cure(trunk)}."
        )
    return hidden
