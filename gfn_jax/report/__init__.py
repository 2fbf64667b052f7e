"""The paper's tables and figures from finished runs: `python -m gfn_jax.report RUNS...`."""
