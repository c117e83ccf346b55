"""The protocol `LanguageModel` is all that actor and critic need: a table of pairs works, without transformers."""

import torch
from torch import nn

from agents.models.backbone import Backbone
from agents.models.critic import ValueHead
from agents.models.interface import LanguageModel
from agents.models.pretrained import build_model
from agents.models.sampling import Sampling
from agents.models.sequences import SequenceBatch
from agents.policies.actor_critic import LMActorCritic
from tests.helpers.models import observe, tiny

N = 5
ROWS = [([1, 2, 3], [4]), ([2], []), ([3, 3], [1, 0, 2])]
LAST = torch.tensor([4, 2, 2])


class Pairs(nn.Module):
    """The next token depends on the last one alone, by a table."""

    is_encoder_decoder = False
    takes_cache = False
    vocab_size = N
    hidden_size = N

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(N, N, generator=torch.Generator().manual_seed(0)))

    @property
    def device(self):
        return self.table.device

    def check_length(self, n_tokens, n_written=0):
        """Accept any length."""

    def forward(self, ids, rows, cols):
        hidden, _ = self.read(ids, rows, cols)
        return hidden, self.logits(hidden)

    def read(self, ids, rows, cols):
        return nn.functional.one_hot(ids[rows, cols], N).float(), None

    def logits(self, hidden):
        return hidden @ self.table

    def new_cache(self):
        """Return no cache: every row is read in full."""


def make_lm():
    model: LanguageModel = Pairs()
    critic = ValueHead(model.hidden_size)
    nn.init.normal_(critic.linear.weight, generator=torch.Generator().manual_seed(1))
    return LMActorCritic(model, critic, Sampling(temperature=0.7))


def test_a_table_acts_as_it_is_written():
    lm = make_lm()
    with torch.no_grad():
        actions, values, log_probs, _ = lm.act(observe(ROWS), deterministic=True, cache=lm.rollout_cache)
    expected = (lm.backbone.table[LAST] / 0.7).log_softmax(dim=-1).detach()
    assert torch.equal(actions, expected.argmax(dim=-1))
    torch.testing.assert_close(log_probs, expected.max(dim=-1).values)
    torch.testing.assert_close(values, lm.critic.linear.weight[0, LAST].detach())
    torch.testing.assert_close(lm.values(observe(ROWS)).detach(), values)
    draws = torch.cat([lm.act(observe(ROWS), generator=torch.Generator().manual_seed(i))[0][:1] for i in range(1000)])
    assert (draws.bincount(minlength=N) / 1000 - expected[0].exp()).abs().max() < 0.05


def test_a_table_is_evaluated_and_learns():
    lm, actions = make_lm(), torch.tensor([0, 1, 2])
    batch = SequenceBatch.from_observations(observe(ROWS))
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.3)
    for _ in range(100):
        values, log_probs, entropies = lm.evaluate(batch, actions)
        optimizer.zero_grad()
        (values.pow(2).mean() - log_probs[0]).backward()
        optimizer.step()
    expected = (lm.backbone.table[LAST] / 0.7).log_softmax(dim=-1)
    torch.testing.assert_close(lm.distribution(batch).log_probabilities, expected)
    values, log_probs, entropies = lm.evaluate(batch, actions)
    torch.testing.assert_close(log_probs, expected[torch.arange(3), actions])
    torch.testing.assert_close(entropies, -(expected.exp() * expected).sum(dim=-1))
    assert log_probs[0] > -0.1 and values.abs().max() < 0.1


def test_the_backbone_has_every_member():
    backbone = Backbone(build_model(tiny()), vocab_size=N, n_positions=16)
    members = {name for name in vars(LanguageModel) if not name.startswith("_")} | set(LanguageModel.__annotations__)
    assert members >= {"read", "logits", "new_cache", "vocab_size"} and all(hasattr(backbone, name) for name in members)
