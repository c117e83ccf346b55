"""A `LanguageModel` whose blocks other processes hold: it reads, learns and decodes as the whole model does."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from sb3_contrib import TRPO
from stable_baselines3 import PPO

from agents import (
    EpisodeMetrics,
    KLPenalty,
    LoRA,
    SampleTable,
    SeparateCritic,
    evaluate,
    export,
    generate,
    load_checkpoint,
    save_checkpoint,
)
from agents.doctor import examine as doctor
from agents.models.critic import ValueHead
from agents.models.interface import LanguageModel
from agents.models.sampling import Sampling
from agents.models.sequences import SequenceBatch
from agents.policies.actor_critic import LMActorCritic
from agents.policies.lm_policy import ForeignBackendError
from tests.docs.test_examples import run
from tests.helpers.models import CheckRatio, few, observe
from tests.helpers.processes import train
from tests.helpers.remote import (
    KEY,
    N_POSITIONS,
    SessionCache,
    Whole,
    blocks_of_all,
    decode,
    listen,
    remote_chain,
    rows_of,
    served,
)
from tests.helpers.training import TOKENIZER, same_weights, tiny_agent, tiny_env, weights

TOLERANCE = 1e-5
LENGTHS = [5, 1, 9, 3, 3]


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    with served(tmp_path_factory.mktemp("remote")) as remote:
        yield remote


def actor_critic(lm):
    critic = ValueHead(lm.hidden_size)
    torch.nn.init.normal_(critic.linear.weight, generator=torch.Generator().manual_seed(1))
    return LMActorCritic(lm, critic, Sampling(temperature=0.7))


# Equal to the whole model in one process


@pytest.mark.parametrize("family", few(["bloom", "llama", "gpt2", "gpt_neox", "qwen2", "mistral"], 2))
def test_hidden_states_logits_and_gradients_are_those_of_the_whole_model(family, tmp_path):
    with served(tmp_path, family) as remote:
        lm = remote.build()
        twin = Whole(remote, lm)
        cols = torch.tensor(LENGTHS) - 1
        results = []
        for width in (max(LENGTHS), max(LENGTHS) + 7):  # with more padding, and other tokens in it
            ids = torch.where(torch.arange(width) < torch.tensor(LENGTHS)[:, None], rows_of(LENGTHS, 16)[:, :width], 3)
            for model in (lm, twin):
                hidden, logits = model(ids, torch.arange(len(ids)), cols)
                loss = logits.log_softmax(dim=-1)[:, 4].sum() + hidden.square().sum()
                gradients = torch.autograd.grad(loss, [model.virtual, model.head.weight])
                results.append([hidden, logits, *gradients])
        assert results[0][2].abs().max() > 0.1 and results[0][3].abs().max() > 0.1
        for result in results[1:]:
            for got, expected in zip(result, results[0], strict=True):
                scale = max(1.0, float(expected.detach().abs().max()))
                assert (got - expected).abs().max() < TOLERANCE * scale


def test_a_text_that_does_not_fit_a_message_with_its_gradient_is_refused_at_once(remote, monkeypatch):
    longest = N_POSITIONS + 3
    monkeypatch.setattr(remote_chain, "MAX_BYTES", remote_chain.HEADER_BYTES + 2 * 4 * longest * 16 - 1)
    with pytest.raises(ValueError, match=r"Expected a row to fit a message .* got \(1, 66, 16\) 2 times"):
        remote.build()
    assert remote.build(trains=False).longest == longest  # without training, no gradients are sent


@pytest.mark.parametrize("family", ["cohere", "gemma2"])
def test_a_model_with_another_kind_of_output_layer_is_refused(family, tmp_path):
    with served(tmp_path, family) as remote, pytest.raises(ValueError, match="to be its output layer's"):
        remote.build()


@pytest.mark.parametrize("bound", [None, 12])
def test_a_minibatch_is_scored_and_differentiated_as_in_one_process(bound, remote):
    """With a bound, `evaluate_in_memory` repeats the forward of each micro-batch in its backward."""
    lm = remote.build()
    results = []
    for model in (lm, Whole(remote, lm)):
        policy = actor_critic(model)
        batch = SequenceBatch.from_observations(observe([([1, 2, 3], [4, 5]), ([2], []), ([3, 3], [1, 0, 2])]))
        batch.micro_batch_tokens = bound
        values, log_probs, entropies = policy.evaluate(batch, torch.tensor([0, 1, 2]))
        (values.square().sum() + log_probs.sum() + entropies.sum()).backward()
        gradients = [model.virtual.grad, model.head.weight.grad, policy.critic.linear.weight.grad]
        results.append([values, log_probs, entropies, *gradients])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_rows_that_do_not_fit_a_message_go_in_parts(remote, monkeypatch):
    lm, ids = remote.build(), rows_of(LENGTHS, 9)
    rows_and_cols = torch.arange(len(ids)), torch.tensor(LENGTHS) - 1
    results, messages = [], []
    for size in (1 << 20, remote_chain.HEADER_BYTES + 2 * 2 * 4 * 12 * lm.hidden_size):  # two rows of two tensors
        monkeypatch.setattr(remote_chain, "MAX_BYTES", size)
        before = lm.chain.traffic["forward", "messages"]
        hidden = lm(ids, *rows_and_cols)[0]
        [gradient] = torch.autograd.grad(hidden.square().sum(), [lm.virtual])
        cache = lm.new_cache()
        with torch.no_grad():
            results.append([hidden, gradient, cache.read(ids, torch.full((5,), 4))[0]])
        messages.append(lm.chain.traffic["forward", "messages"] - before)
    assert messages == [4, 8]  # 2 servers; 4 rows a message without a gradient
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
    monkeypatch.setattr(remote_chain, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="Expected a row to fit a message of 100 bytes"):
        lm(ids, *rows_and_cols)


# Decoding in sessions


@pytest.mark.parametrize("seed", few(range(4), 1))
def test_sessions_decode_as_full_reads_do(seed, remote):
    lm = remote.build()
    assert decode(lm, seed, 12 if seed == 0 else 40) < 1e-4
    assert lm.chain.traffic["step", "messages"] > 0


def test_sessions_that_hold_too_much_are_read_anew(remote, monkeypatch):
    """The servers have room for all rows once, but not for the empty slots that refilled rows leave behind."""
    drops, drop = [], SessionCache.drop
    monkeypatch.setattr(SessionCache, "drop", lambda self: (drops.append(1), drop(self))[1])
    listeners = [listen(host, max_held=6 * (N_POSITIONS + 3)) for host in remote.hosts]
    lm = remote._replace(addresses=tuple(listener.address for listener in listeners)).build()
    assert decode(lm, 0, 12) < 1e-4
    assert len(drops) > 3
    monkeypatch.setattr(lm, "longest", 1 << 20)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"sessions of 1 to 396 tokens in all.* \(--max-held\)"):
        lm.new_cache().read(rows_of([2], 3), torch.tensor([2]))
    for listener in listeners:
        listener.close()


def test_an_interrupted_step_closes_the_connection_so_that_no_late_answer_is_taken_for_the_next(remote, monkeypatch):
    lm, ids = remote.build(), rows_of([4], 4)
    row_and_col = torch.tensor([0]), torch.tensor([3])
    asked, receive = [], type(lm.chain.servers[1].connection).recv_bytes

    def interrupted(self, *args):
        if self is lm.chain.servers[1].connection:
            asked.append(self)
            raise KeyboardInterrupt
        return receive(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(lm.chain.servers[1].connection), "recv_bytes", interrupted)
        lm(ids, *row_and_col)
    assert len(asked) == 1
    with pytest.raises(remote_chain.BlocksLostError, match=r"blocks 3 to 3 at .* are lost\. Start the server again"):
        lm(rows_of([4], 4, seed=1), *row_and_col)


def test_a_cache_that_trusts_lengths_fails_the_same_check(remote, monkeypatch):
    def trusting(self, ids, lengths):
        return torch.full_like(lengths, -1 if self.ids is None else 1)

    monkeypatch.setattr("agents.models.interface.RowCache.growth", trusting)
    assert decode(remote.build(), 0, 12) > 0.1


def test_each_decoded_token_is_sent_once_and_sessions_end(remote):
    lm, ids = remote.build(), rows_of([2] * 4, 8)
    cache = lm.new_cache()
    with torch.no_grad():
        cache.read(ids, torch.full((4,), 2))
        before = lm.chain.traffic["step", "bytes"]
        for length in (3, 4, 5):
            cache.read(ids, torch.full((4,), length))
            cache.read(ids, torch.full((4,), length))  # unchanged rows: no request is sent
        payload = 3 * 2 * 2 * 4 * lm.hidden_size * 4  # steps, servers, directions, rows
        assert payload < lm.chain.traffic["step", "bytes"] - before < payload + 12 * 400
        assert len({id(session) for session, _ in cache.slots.values()}) == 1
        cache.drop()
        assert len(lm.chain.ended) == 1
        cache.read(ids, torch.full((4,), 2))
        assert lm.chain.ended == [] and lm.chain.traffic["close", "messages"] == 4


def test_new_weights_are_noticed(remote):
    lm, ids = remote.build(), rows_of([2] * 4, 8)
    cache = lm.new_cache()
    with torch.no_grad():
        cache.read(ids, torch.full((4,), 2))
        lm.virtual.mul_(torch.tensor([1.0, -1.0]).repeat(8))
        hidden = cache.read(ids, torch.full((4,), 3))[0]
        torch.testing.assert_close(hidden, lm.read(ids, torch.arange(4), torch.full((4,), 2))[0], atol=1e-4, rtol=1e-4)


# As a policy


def agent(remote, n_envs=4, env=None, critic=None, policy_kwargs=None, **kwargs):
    chosen = {} if critic is None else {"critic": critic}
    return tiny_agent(env, n_envs, lm=remote.spec(**kwargs), policy_kwargs={**chosen, **(policy_kwargs or {})})


def test_a_remote_model_has_every_member_of_the_protocol(remote):
    lm = remote.build()
    members = {name for name in vars(LanguageModel) if not name.startswith("_")} | set(LanguageModel.__annotations__)
    assert "new_cache" in members and all(hasattr(lm, name) for name in members)


def test_ppo_trains_the_client_and_the_blocks_stay(remote):
    before, model = blocks_of_all(remote), agent(remote)
    start, check = weights(model), CheckRatio()
    model.learn(3 * 16, callback=[KLPenalty(0.1), EpisodeMetrics(), check, SampleTable(["ab"], TOKENIZER, every=16)])
    assert max(check.largest) < TOLERANCE  # the update begins at the sampled log-probabilities
    changed = {name for name, weight in weights(model).items() if not torch.equal(weight, start[name])}
    trained = {"lm.backbone.virtual", "lm.backbone.head.weight", "lm.critic.linear.weight", "lm.critic.linear.bias"}
    assert changed == trained
    assert all(torch.equal(*pair) for pair in zip(before, blocks_of_all(remote), strict=True))
    assert all(weight.grad is None for host in remote.hosts for weight in host.trunk.parameters())
    after = evaluate(model, ["ab", "c"], TOKENIZER, env=tiny_env(), n=3)
    assert len(generate(model, ["ab"], TOKENIZER, n=2, max_new_tokens=3)) == 2
    assert after.figures["length"].value >= 1


def test_a_remote_policy_is_saved_loaded_and_resumed(remote, tmp_path):
    model = agent(remote)
    model.learn(2 * 16, callback=KLPenalty(0.1))
    model.save(tmp_path / "model.zip")
    save_checkpoint(model, tmp_path / "checkpoint")
    assert KEY not in (tmp_path / "model.zip").read_bytes() + pickle.dumps(remote.spec())
    again = PPO.load(tmp_path / "model.zip", device="cpu")
    assert again.policy.lm.backbone.chain is not model.policy.lm.backbone.chain
    assert same_weights(weights(model), weights(again))
    resumed = agent(remote)
    load_checkpoint(resumed, tmp_path / "checkpoint")
    for agent_of_run in (model, resumed):
        agent_of_run.learn(16, reset_num_timesteps=False, callback=KLPenalty(0.1))
    assert same_weights(weights(model), weights(resumed))


def test_copies_have_their_own_weights_and_share_the_servers(remote):
    lm = remote.build()
    other = copy.deepcopy(lm)
    assert other.chain is lm.chain and other.virtual is not lm.virtual
    other.virtual.data.mul_(torch.tensor([1.0, -1.0]).repeat(8))  # not a shift, which the last norm would remove
    ids, row_and_col = rows_of([3], 3), (torch.tensor([0]), torch.tensor([2]))
    assert not torch.allclose(other(ids, *row_and_col)[0], lm(ids, *row_and_col)[0], atol=1e-2)
    model = agent(remote, policy_kwargs={"top_p": 0.9, "top_p_lag": 1})  # a lagged copy
    model.learn(2 * 16)
    assert model.policy.lm.lagged.backbone.chain is model.policy.lm.backbone.chain


def test_another_remote_model_may_be_the_reference(remote):
    model = agent(remote)
    penalty = KLPenalty(0.1, reference=remote.spec(virtual=(1, 2, 3, 4, 5)))
    model.learn(16, callback=penalty)
    assert not any(weight.requires_grad for weight in penalty.reference.parameters())
    assert len(penalty.reference.backbone.virtual) == 5


def test_the_doctor_examines_what_it_can(remote):
    status = {finding.name: finding.status for finding in doctor.check(agent(remote)).findings}
    assert {status[name] for name in ("ratio", "padding", "cache", "dropout", "weights", "positions")} == {"ok"}
    assert {status[name] for name in ("head", "vocabulary", "generation config")} == {"skipped"}
    assert "failed" not in status.values()


def test_features_that_need_the_whole_model_are_refused(remote, tmp_path):
    with pytest.raises(ForeignBackendError, match="Expected a model of transformers, got RemoteLM"):
        export(agent(remote), None, tmp_path)
    for options in ({"train": LoRA()}, {"train": "head"}, {"gradient_checkpointing": True}):
        with pytest.raises(ValueError, match="Expected neither `train` nor `gradient_checkpointing` with RemoteBlocks"):
            agent(remote, policy_kwargs=options)
    with pytest.raises(ValueError, match="Expected a model of transformers for FlatLMPolicy, got RemoteBlocks"):
        tiny_agent(lm=remote.spec(), algorithm=TRPO)
    with pytest.raises(TypeError, match=r"Expected `lm` to be a name, .* got RemoteBlocks"):
        agent(remote, critic=SeparateCritic(remote.spec()))
    with pytest.raises(ValueError, match="at least the 41 tokens"):
        remote.spec().build_backend(41, 10)


# Learning


def count_a(prompt, preds, done):
    return float(preds[-1] == 1)


@pytest.mark.slow
@pytest.mark.parametrize("trains", [True, False])
def test_ppo_learns_through_the_servers_and_not_with_frozen_weights(trains, remote):
    env = tiny_env(reward=count_a, max_new_tokens=4)
    model = tiny_agent(env, 16, lm=remote.spec(trains=trains), learning_rate=3e-2)
    before = evaluate(model, ["ab", "c"], TOKENIZER, env=env, n=20).figures["reward"].value
    model.learn(16 * 4 * 12)
    after = evaluate(model, ["ab", "c"], TOKENIZER, env=env, n=20).figures["reward"].value
    assert before < 0.7
    assert after > 2.0 if trains else abs(after - before) < 1e-6


@pytest.mark.slow
def test_several_processes_train_together(remote):
    first, second = train(2, "remote_rank", remote.folder, remote.addresses, remote.key_file)
    assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)
    start = agent(remote).policy.lm.backbone.virtual.detach().numpy()
    assert not np.allclose(first["lm.backbone.virtual"], start, atol=1e-4)


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    printed = run("examples/remote_backend.py", "--smoke", "--out", tmp_path)
    assert "| control | 0 |" in printed and "bytes a token" in printed
    figures = json.loads((tmp_path / "figures.json").read_text())
    trained, control = figures.values()
    assert trained["rewards"][0] == control["rewards"][0]
    assert control["rewards"][0] == control["rewards"][1]
    assert "backward" in trained["traffic"] and "backward" not in control["traffic"]
    assert (tmp_path / "trained" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "key").stat().st_mode & 0o077 == 0
