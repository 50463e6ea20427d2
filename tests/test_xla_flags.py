"""The sum that crashes jaxlib 0.10.2, in a process of its own."""

import os
import subprocess
import sys

from svsk_jax.xla_flags import take_library_products

CRASHING = """
import svsk_jax, jax, jax.numpy as jnp
def total(u, v, W):
    S = jnp.concatenate([jnp.zeros((512, 576)), jnp.matmul(u, v, precision=jax.lax.Precision.HIGHEST)])
    return jnp.sum((W - S) ** 2)
print(float(jax.jit(total)(jnp.ones((64, 2)), jnp.ones((2, 576)), jnp.ones((576, 576)))))
"""


def test_a_sum_over_a_restored_sidecar():
    ours = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run([sys.executable, "-c", CRASHING], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 576 * 576


def test_what_the_user_set_is_left_alone(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=here")
    take_library_products()
    take_library_products()
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=here --xla_gpu_enable_triton_gemm=false"
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    take_library_products()
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_enable_triton_gemm=true"
