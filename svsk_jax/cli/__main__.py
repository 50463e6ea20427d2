"""`python -m svsk_jax.cli`."""

from svsk_jax.cli import main

main()
