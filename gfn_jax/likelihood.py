"""Maximum likelihood of whole texts: the loss and the optimiser that pretraining and full fine-tuning share."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import optax

from gfn_jax.models.architectures import ModelConfig
from gfn_jax.models.decoder import causal_mask, hidden_states, output_logits


def next_token_terms(
  model: ModelConfig, params: dict, tokens: Int[Array, "B N"], mask: Bool[Array, "B N"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Cross-entropy of each token given those before it, summed, and how many tokens it is a sum over.

      sum_{b, 1 <= n < N, mask[b, n]}  -log p(tokens[b, n] | tokens[b, :n])

  A row's first token is given, not predicted. Both terms are to be summed over whatever makes up a batch before one is
  divided by the other: a mean of means would weigh a token by how short the rows beside it are.

  Args:
    mask: True on a row's tokens, False on the padding behind them, which no token that counts attends to.

  Returns:
    (nats, tokens).
  """
  n = tokens.shape[1] - 1
  hidden, _ = hidden_states(
    model, params, None, tokens[:, :-1], jnp.broadcast_to(jnp.arange(n), (len(tokens), n)), causal_mask(n), unroll=True
  )
  nats = optax.softmax_cross_entropy_with_integer_labels(output_logits(model, params, hidden), tokens[:, 1:])
  predicted = mask[:, 1:]
  return jnp.where(predicted, nats, 0.0).sum(), predicted.sum().astype(jnp.float32)


def make_optimizer(
  learning_rate: float, warmup_steps: int, num_steps: int, weight_decay: float, clip_norm: float = 1.0
) -> optax.GradientTransformation:
  """AdamW whose rate rises linearly over `warmup_steps`, then falls along a cosine to a fiftieth of `learning_rate`.

  Args:
    num_steps: of the whole run, above `warmup_steps`.
    clip_norm: gradients are clipped to this global norm.
  """
  rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, num_steps, 0.02 * learning_rate)
  return optax.chain(optax.clip_by_global_norm(clip_norm), optax.adamw(rate, 0.9, 0.98, weight_decay=weight_decay))
