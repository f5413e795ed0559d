"""``smpo-train`` cut up over processes without GPUs: accelerate is told that they have some, the rest is its own.

Arguments: those of ``smpo-train``. Each process says before it ends how many numbers of the denoiser and of the
optimizer's moments it holds, of how many. ``$POWER_CUT`` ends the run after the checkpoint of that step.
"""

from __future__ import annotations

import os
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from smpo_trainer.cli import main
from smpo_trainer.output.checkpoints import Checkpoints
from smpo_trainer.train_loop import TrainLoop
from tests.trainer.helpers import dying_after

train = TrainLoop.train


def train_and_tell(self, *given):
    record = train(self, *given)
    trainer = self._trainer
    moments = [each for state in trainer._optimizer.state.values() for each in state.values() if each.ndim]
    tensors = [*trainer._policy.denoiser.parameters(), *moments]
    held = sum(each.to_local().numel() if isinstance(each, DTensor) else each.numel() for each in tensors)
    sys.stderr.write(f"holds {held} of {sum(each.numel() for each in tensors)}\n")
    return record


TrainLoop.train = train_and_tell
Checkpoints.save = dying_after(int(os.environ.get("POWER_CUT", "0")))
PartialState(cpu=True)._shared_state["distributed_type"] = DistributedType.MULTI_GPU
main()
