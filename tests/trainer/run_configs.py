"""Trains the given configs one after the other in this process, and prints which modules are in memory afterwards."""

import gc
import json
import sys

from torch import nn

from threetowers.trainer.config import load_config
from threetowers.trainer.engine import join_process_group, leave_process_group
from threetowers.trainer.train import Trainer

if __name__ == "__main__":
    for file in sys.argv[1:]:
        trainer = Trainer(load_config(file), join_process_group())
        trainer.train()
        kinds = {type(module).__module__ for module in gc.get_objects() if isinstance(module, nn.Module)}
        found = {"models": sorted(kinds), "encoder imported": "threetowers.cache.encoders.encoder" in sys.modules}
        if trainer.world.first:
            print(json.dumps(found), flush=True)
    leave_process_group()
