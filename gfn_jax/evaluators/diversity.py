"""How different the samples of a prompt are (paper section 4.1, Fig. 3)."""

from jaxtyping import Float
import numpy as np


def mean_pairwise_cosine_distance(embeddings: Float[np.ndarray, "Q N D"]) -> Float[np.ndarray, "Q"]:
  """1 - cos(e_i, e_j), averaged over the N (N - 1) / 2 pairs i < j of each prompt's samples.

  The paper's sentence diversity is its mean over prompts. Equal samples count as pairs of distance 0.

  Args:
    embeddings: of N samples of each of Q prompts, of any length but 0.

  Returns:
    float64 [Q], from 0 to N / (N - 1).

  Raises:
    ValueError: fewer than two samples, which make no pair; or an embedding of length 0, which has no direction.
  """
  num_samples = embeddings.shape[1]
  if num_samples < 2:
    raise ValueError(f"embeddings hold {num_samples} samples of a prompt: a pair needs at least 2")
  embeddings = np.asarray(embeddings, np.float64)
  length = np.linalg.norm(embeddings, axis=-1, keepdims=True)
  if not length.all():
    raise ValueError("an embedding has length 0: its cosine with another is not defined")
  unit = embeddings / length
  first, second = np.triu_indices(num_samples, k=1)
  return (1.0 - np.einsum("qpd,qpd->qp", unit[:, first], unit[:, second])).mean(-1)
