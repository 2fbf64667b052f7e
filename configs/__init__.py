"""Settings of runs: one file a task, each with `get_config(variant)`. Installed as gfn_jax.configs."""
