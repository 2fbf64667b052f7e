"""Set-up of all tests: the CPU, and shape annotations that are checked wherever gfn_jax is called."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as everywhere in Python

# Before anything imports gfn_jax: from here on its annotations are checked, shapes included.
install_import_hook("gfn_jax", "conftest.checked")

from testing import QUICK_COMPILATION  # noqa: E402

os.environ.setdefault("XLA_FLAGS", QUICK_COMPILATION)  # read when JAX first looks for devices
