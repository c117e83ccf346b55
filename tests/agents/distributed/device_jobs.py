"""The job of the tests on several GPUs."""

import torch

from tests.helpers.jobs import scripted_updates


def updates_on_devices(shard):
    """Run `scripted_updates` on this process's GPU; return the weights and figures, and the backend of gradients."""
    weights, figures = scripted_updates(1, device="cuda", policy_kwargs={"value_norm": "norm", "shard": shard})
    group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    return weights, figures, group and group._get_backend(torch.device("cuda")).name()
