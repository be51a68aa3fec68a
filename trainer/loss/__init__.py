"""The loss of a run: a weighted sum of terms over the global batch.

terms.py     the sum, and how terms share collectives and leave samples out
rows.py      which samples, and which of their captions, a term takes
matching.py  terms without negatives: l2, cosine, smooth_l1
teachers.py  the teachers of a distill term at one step
"""

from threetowers.trainer.loss.terms import TermResult, total_loss

__all__ = ["TermResult", "total_loss"]
