"""``smpo-train`` with FSDP over processes without GPUs: accelerate takes them for GPUs.

Takes the arguments of ``smpo-train``. At the end each process prints how many elements of the denoiser and of the
optimizer's moments it holds. ``$POWER_CUT`` ends the run after the checkpoint of that step.
"""

from __future__ import annotations

import os
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from smpo_trainer.cli import main
from smpo_trainer.model.fsdp import unsharded_class
from smpo_trainer.output.checkpoints import Checkpoints
from smpo_trainer.train_loop import TrainLoop
from tests.trainer.helpers import dying_after

train = TrainLoop.train


def train_and_print(self, *given):
    record = train(self, *given)
    trainer = self._trainer
    moments = [value for state in trainer._optimizer.state.values() for value in state.values() if value.ndim]
    tensors = [*trainer._policy.denoiser.parameters(), *moments]
    held = sum(t.to_local().numel() if isinstance(t, DTensor) else t.numel() for t in tensors)
    sys.stderr.write(f"holds {held} of {sum(t.numel() for t in tensors)}\n")
    units = [each for each in trainer._policy.denoiser.modules() if isinstance(each, FSDPModule)]
    sys.stderr.write(f"gathers {sorted({unsharded_class(each).__name__ for each in units})}\n")
    return record


TrainLoop.train = train_and_print
Checkpoints.save = dying_after(int(os.environ.get("POWER_CUT", "0")))
PartialState(cpu=True)._shared_state["distributed_type"] = DistributedType.MULTI_GPU
main()
