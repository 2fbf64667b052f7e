"""Many runs of gfn_jax: sweeps on one machine, on Slurm or on pods. Run from a checkout."""
