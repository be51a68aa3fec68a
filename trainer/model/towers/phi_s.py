"""PHI-S, the PCA-Hadamard isotropic standardization of features (Ranzinger et al. 2024, arXiv 2410.01680).

With the features' covariance U Λ Uᵀ and a Hadamard matrix H of entries ±1/√D, the map is x → (H Uᵀ / φ) (x - mean),
where φ² = tr Λ / D. Each entry of H has the same square, so each new feature has the same variance:
(H Λ Hᵀ)_ii = tr Λ / D = φ². Unlike a standardization of each feature, or a whitening, it is a rotation with one common
scale: distances and angles between centred features keep their proportions, and an error in any direction weighs as
much as before.
"""

import numpy as np
import numpy.typing as npt
from numpy.linalg import eigh

Float64Array = npt.NDArray[np.float64]


def phi_s(covariance_DD: Float64Array) -> tuple[Float64Array, float]:
    """Return the rotation H Uᵀ (D, D) and φ, the standard deviation of each rotated feature.

    An eigenvector has no sign of its own; here its largest entry is positive.

    Args:
        covariance_DD: Of the features.

    Raises:
        ValueError: There is no known Hadamard matrix of this size.
    """
    hadamard_DD = hadamard_matrix(len(covariance_DD)) / np.sqrt(len(covariance_DD))
    _, basis_DD = eigh(covariance_DD)  # in its columns
    largest_D = np.take_along_axis(basis_DD, np.abs(basis_DD).argmax(axis=0)[None], axis=0)[0]
    basis_DD = np.where(largest_D < 0, -basis_DD, basis_DD)
    variance = float(np.trace(covariance_DD)) / len(covariance_DD)
    return hadamard_DD @ basis_DD.T, float(np.sqrt(variance))


def hadamard_matrix(size: int) -> Float64Array:
    """Return a matrix (size, size) of entries ±1 whose rows are orthogonal.

    It is Sylvester's doubling of the largest matrix of Paley's first or second construction over the integers modulo a
    prime (Paley 1933), of which size is made: among them all powers of two, and 384, 768, 1152, 1280, 1408, 1536.

    Raises:
        ValueError: Size is none of these.
    """
    core = _core_size(size)
    if core is None:
        raise ValueError(f"no Hadamard matrix of size {size} is known here: it is no doubling of one of Paley's")
    if core == 1:
        found = np.ones((1, 1))
    elif _is_paley_1(core):
        found = _paley_1(core - 1)
    else:
        found = _paley_2(core // 2 - 1)
    while len(found) < size:
        found = np.kron(np.array([[1, 1], [1, -1]]), found)
    return found


def has_hadamard_matrix(size: int) -> bool:
    """Return whether `hadamard_matrix` has one of this size."""
    return _core_size(size) is not None


def _core_size(size: int) -> int | None:
    """Return the size of the matrix that is doubled to one of this size; None where there is none."""
    while size > 1 and not _is_paley_1(size) and not _is_paley_2(size):
        if size % 2:
            return None
        size //= 2
    return size


def _is_paley_1(size: int) -> bool:
    return size % 4 == 0 and _is_prime(size - 1)


def _is_paley_2(size: int) -> bool:
    return size % 8 == 4 and _is_prime(size // 2 - 1)


def _paley_1(prime: int) -> Float64Array:
    """Return the matrix of size prime + 1, for a prime of the form 4 n + 3: I + S with a skew-symmetric S."""
    skew = np.zeros((prime + 1, prime + 1))
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = _residues(prime)
    return skew + np.eye(prime + 1)


def _paley_2(prime: int) -> Float64Array:
    """Return the matrix of size 2 (prime + 1), for a prime of the form 4 n + 1, of a symmetric conference matrix."""
    conference = np.zeros((prime + 1, prime + 1))
    conference[0, 1:] = conference[1:, 0] = 1
    conference[1:, 1:] = _residues(prime)
    on, off = np.array([[1, -1], [-1, -1]]), np.array([[1, 1], [1, -1]])
    return np.kron(np.eye(prime + 1), on) + np.kron(conference, off)


def _residues(prime: int) -> Float64Array:
    """Return Jacobsthal's matrix (prime, prime): 1 where i - j is a square modulo the prime, else -1; 0 at i = j."""
    numbers = np.arange(prime)
    character = np.full(prime, -1.0)
    character[numbers**2 % prime] = 1
    character[0] = 0
    character_pp: Float64Array = character[(numbers[:, None] - numbers[None]) % prime]
    return character_pp


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
