"""Online evaluations of finished runs, in as many processes as the launch has; the first prints their metrics.

torchrun --nproc-per-node 2 tests/trainer/online_ranks.py FOLDER...
"""

import json
import sys

from threetowers.cache.processes.world import World
from threetowers.eval.online import RetrievalEvaluator
from threetowers.trainer.engine import join_process_group, leave_process_group
from threetowers.trainer.export.trained_model import load_model

if __name__ == "__main__":
    world: World = join_process_group()
    for folder in sys.argv[1:]:
        trained = load_model(folder)
        assert trained.config.evaluation is not None
        found = RetrievalEvaluator(trained.config, trained.config.evaluation)(trained.model, 1)
        if world.first:
            print(json.dumps(found))
    leave_process_group()
