"""The training loop of small models, which reward models share: any number of steps."""

from tests.agents.supervised.test_reward_model import some_pairs, train


def test_any_number_of_steps(tmp_path):
    """With 10 steps or fewer, the schedule has no warm-up."""
    for n in (1, 10, 11):
        assert len(train(some_pairs(n), tmp_path / f"{n}", batch_size=1, n_epochs=1, held_out=()).losses) == n
