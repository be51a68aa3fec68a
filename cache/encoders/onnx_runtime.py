"""ONNX Runtime in place of torch: the same network and weights, exported once in memory, on the CPU in float32."""

import importlib.util
import tempfile
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from threetowers.cache.encoders.weights_file import one_line
from threetowers.cache.format.dtypes import cosines

PACKAGES = ("onnxruntime", "onnxscript")  # what runs a graph, and what torch exports one with
# Between the two runtimes, in the first batch. Rounding alone leaves about 1 - 1e-7.
MIN_COSINE = 0.99999


def require_onnx_runtime() -> None:
    """Raise ValueError unless everything that `--runtime onnx` takes is installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--runtime onnx: {' and '.join(missing)} not found: pip install 'threetowers[onnx]', or use "
            "--runtime torch, which gives the same embeddings up to rounding"
        )


def onnx_runtime_version() -> str:
    """Return the version of ONNX Runtime."""
    return version("onnxruntime")


class OnnxNetwork:
    """A network that maps uint8 pixels (b, 3, H, W) to features (b, D) each, run by ONNX Runtime with torch's threads.

    Its first batch is computed by torch too, and compared.
    """

    def __init__(self, network: nn.Module, input_size: tuple[int, int], features: Sequence[str], name: str) -> None:
        """Export the network.

        Args:
            network: On the CPU, in evaluation mode.
            input_size: (height, width) in pixels.
            features: Names of what it gives.
            name: Of the network, for messages.

        Raises:
            ValueError: The network cannot be exported.
        """
        import onnxruntime

        self._network = network
        self._name = name
        self._features = tuple(features)
        self._compared = False
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors only: warnings tell of optimizations that were not made
        # Threads that wait for work would otherwise take the processor from those that decode.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        with tempfile.TemporaryDirectory(prefix="threetowers-onnx-") as folder:
            path = Path(folder) / "network.onnx"
            try:
                self._export(path, input_size)
                self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # each stage of the exporter, and the runtime, raise their own kinds
                raise ValueError(
                    f"{name} cannot be exported to ONNX: {one_line(error)}: use --runtime torch"
                ) from error

    def _export(self, path: Path, input_size: tuple[int, int]) -> None:
        """Write the network with its weights, for batches of any size."""
        example_23HW = torch.zeros(2, 3, *input_size, dtype=torch.uint8)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter, about its own parts
            program = torch.onnx.export(
                self._network,
                (example_23HW,),
                input_names=["pixels"],
                output_names=list(self._features),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            program.save(path, external_data=True)  # in one file a network of 2 GB would not fit

    def __call__(self, images_b3HW: Tensor) -> list[Tensor]:
        """Return the (b, D) float32 features of uint8 pixels.

        Raises:
            ValueError: In the first batch a row has a smaller cosine than MIN_COSINE with what torch computes.
        """
        found = self._session.run(list(self._features), {"pixels": np.ascontiguousarray(images_b3HW.numpy())})
        features = [torch.from_numpy(x_bD) for x_bD in found]
        if not self._compared:
            self._compare(images_b3HW, features)
            self._compared = True
        return features

    def _compare(self, images_b3HW: Tensor, found: Sequence[Tensor]) -> None:
        with torch.inference_mode():
            expected = self._network(images_b3HW)
        for feature, found_bD, expected_bD in zip(self._features, found, expected, strict=True):
            finite_b = expected_bD.isfinite().all(1)
            same_finite = torch.equal(finite_b, found_bD.isfinite().all(1))
            smallest = min(cosines(found_bD[finite_b].numpy(), expected_bD[finite_b].float().numpy()), default=1.0)
            if not same_finite or smallest < MIN_COSINE:
                value = f"{smallest:.7f}" if same_finite else "rows that are finite in one of them only"
                raise ValueError(
                    f"{self._name}: ONNX Runtime {onnx_runtime_version()} computes other {feature!r} features than "
                    f"torch: smallest cosine in the first batch: expected at least {MIN_COSINE}, found {value}: use "
                    "--runtime torch"
                )
