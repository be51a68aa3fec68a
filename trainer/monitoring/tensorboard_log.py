"""A run's metrics as TensorBoard files in its folder."""

from pathlib import Path

from threetowers.trainer.monitoring.tracker import Metrics, Tracker, logged


class TensorboardLog(Tracker):
    """Scalars in `tensorboard/`; TensorBoard drops what an earlier launch logged after the step of the resume."""

    def __init__(self, folder: Path, resumed_at: int) -> None:
        """`folder`: of the run. `resumed_at`: steps that were taken before this launch."""
        from torch.utils.tensorboard import SummaryWriter

        purge = resumed_at + 1 if resumed_at else None
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, metrics: Metrics) -> None:
        """Add the scalars of one step."""
        for name, value in logged(metrics).items():
            self._board.add_scalar(name, value, metrics["step"])

    def flush(self) -> None:
        """Write what is left to the file."""
        self._board.flush()

    def close(self) -> None:
        """Write what is left and close the file."""
        self._board.close()
