"""The share of one micro-batch in the objective of ``training.fit``, under tensor parallelism against one process."""

from __future__ import annotations

import torch
from shared import batch, begin, difference, end, gradients, hidden_of, model_of, say
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from aajr_kernels.integrations.distributed import tensor_parallel
from aajr_kernels.method.batch import prepared
from aajr_kernels.training import Attack, ObjectiveConfig, Penalty, Policy
from aajr_kernels.training.counts import Counts
from aajr_kernels.training.objective import terms_of
from aajr_kernels.training.scheduled import ScheduledValues

rank, world, _ = begin()
config = ObjectiveConfig(attack=Attack(radius=0.5, steps=2), penalty=Penalty(weight=0.1, steps="worst"))


def run(model: nn.Module) -> float:
    """Attack, adversarial loss and penalty from one forward, backward."""
    x, labels = batch(2, torch.float32)
    one = prepared({"inputs_embeds": x, "labels": labels.clamp(min=0)}, torch.device("cpu"), True)
    policy = Policy(hidden_of(model), head=model.lm_head)
    generator = torch.Generator().manual_seed(0)
    scheduled, counts = ScheduledValues.at(config, 0), Counts.of([one], config)
    terms = terms_of(model, policy, one, config, scheduled, counts, generator)
    terms.total.backward()
    return float(terms.total.detach())


plain, model = (model_of("llama", torch.float32) for _ in range(2))
tensor_parallel(model, init_device_mesh("cpu", (world,)))
expected, actual = run(plain), run(model)
assert abs(actual - expected) <= 1e-6 * abs(expected)
say("objective llama", difference(gradients(model), gradients(plain)), torch.float32)
end()
