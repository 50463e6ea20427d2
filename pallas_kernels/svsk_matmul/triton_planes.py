"""Decoding words in a Triton kernel: inline assembly on pairs of f16, and the same arithmetic in jnp for
interpret mode, where inline assembly has no rule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plgpu

MASKS = (0x000F, 0x00F0, 0x000F, 0x00F0)
SHIFTS = (0, 0, 8, 8)
UNITS = (2.0**-24, 2.0**-20, 2.0**-24, 2.0**-20)
"""What a code of 1 in plane j is as the bits of an f16: a subnormal."""
LINEAR_STEP = 2.0**-9


def _pair(value: float) -> str:
    bits = int(np.asarray(value, np.float16).view(np.uint16))
    return f"{bits * 0x10001:#010x}"


def _asm(body: str, arguments: list[jax.Array], dtype: jnp.dtype | type, pack: int) -> jax.Array:
    # A register of 32 bits holds several elements, or one f32.
    kind = "r" if pack > 1 else "f"
    outputs = max(1, pack * jnp.dtype(dtype).itemsize // 4)
    [out] = plgpu.elementwise_inline_asm(
        body,
        args=arguments,
        constraints=",".join([f"={kind}"] * outputs + [kind] * len(arguments)),
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(arguments[0].shape, dtype)],
    )
    return out


def _masked(plane: int) -> str:
    mask = MASKS[plane] * 0x10001
    if SHIFTS[plane]:
        return f".reg .b32 t; shr.u32 t, $1, 8; and.b32 $0, t, {mask:#x};"
    return f"and.b32 $0, $1, {mask:#x};"


def _bits(words: jax.Array, plane: int) -> jax.Array:
    shifted = lax.shift_right_logical(words, jnp.int16(SHIFTS[plane])) & jnp.int16(MASKS[plane])
    return lax.bitcast_convert_type(shifted, jnp.float16)


def _fma(a: jax.Array, b: jax.Array | float, c: jax.Array | float) -> jax.Array:
    """f16 fma: one rounding."""
    wide = a.astype(jnp.float32) * jnp.asarray(b, jnp.float32) + jnp.asarray(c, jnp.float32)
    return wide.astype(jnp.float16)


def code_plane(words: jax.Array, plane: int, *, asm: bool) -> jax.Array:
    """Codes of a plane as f16 subnormals, in units of UNITS[plane]."""
    if asm:
        return _asm("{" + _masked(plane) + "}", [words], jnp.float16, 2)
    return _bits(words, plane)


def linear_plane(words: jax.Array, plane: int, *, asm: bool) -> jax.Array:
    """LINEAR_STEP · (code - 8) of a plane, f16 and exact."""
    k, c = LINEAR_STEP / UNITS[plane], -8 * LINEAR_STEP
    if asm:
        body = _masked(plane) + f".reg .b32 k,c; mov.b32 k,{_pair(k)}; mov.b32 c,{_pair(c)};"
        return _asm("{" + body + "fma.rn.f16x2 $0,$0,k,c;}", [words], jnp.float16, 2)
    return _fma(_bits(words, plane), k, c)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codebook:
    """Constants of a companded codebook, f16, as large as the words that they decode."""

    rho: jax.Array
    shift: jax.Array
    steps: tuple[jax.Array, jax.Array]
    """What takes a code to STEP · code, for planes in units of 2⁻²⁴ and of 2⁻²⁰."""
    offset: jax.Array
    """-7.5 STEP."""

    @classmethod
    def of(cls, rho: jax.Array, shift: jax.Array, step: jax.Array, shape: tuple[int, int]) -> "Codebook":
        """From three of `TritonWeight.constants`."""

        def spread(value: jax.Array) -> jax.Array:
            return jnp.broadcast_to(value.astype(jnp.float16), shape)

        offset = step * jnp.float32(-7.5 * UNITS[0])
        steps = spread(step), spread(step * jnp.float32(UNITS[0] / UNITS[1]))
        return cls(rho=spread(rho), shift=spread(shift), steps=steps, offset=spread(offset))


def companded_plane(words: jax.Array, plane: int, codebook: Codebook, *, asm: bool) -> jax.Array:
    """u x + shift with x = STEP · (code - 7.5) and u = x² + rho, f16."""
    step = codebook.steps[plane % 2]
    if asm:
        body = _masked(plane) + ".reg .b32 x,u; fma.rn.f16x2 x,$0,$2,$3; fma.rn.f16x2 u,x,x,$4;"
        body += "fma.rn.f16x2 $0,u,x,$5;"
        constants = [step, codebook.offset, codebook.rho, codebook.shift]
        return _asm("{" + body + "}", [words, *constants], jnp.float16, 2)
    x = _fma(_bits(words, plane), step, codebook.offset)
    return _fma(_fma(x, x, codebook.rho), x, codebook.shift)


def byte_plane(words: jax.Array, half: int, *, asm: bool) -> jax.Array:
    """The low (0) or high (1) byte of each word, an unsigned integer, as f16 subnormals in units of 2⁻²⁴."""
    if asm:
        order = ("0x4240", "0x4341")[half]
        return _asm(f"prmt.b32 $0, $1, 0, {order};", [words], jnp.float16, 2)
    bits = lax.shift_right_logical(words, jnp.int16(8 * half)) & jnp.int16(0xFF)
    return lax.bitcast_convert_type(bits, jnp.float16)


def fma_f32(a: jax.Array, b: jax.Array, c: jax.Array, *, asm: bool) -> jax.Array:
    """a b + c in one instruction: XLA's Triton pipeline does not contract them."""
    if asm:
        return _asm("fma.rn.f32 $0, $1, $2, $3;", [a, b, c], jnp.float32, 1)
    return a * b + c


def small_to_f32(values: jax.Array) -> jax.Array:
    """int8 as f32, without the slow conversion instruction: in the low bits of 2²³ + 128."""
    bits = values.astype(jnp.int32) + jnp.int32(0x4B000080)
    return lax.bitcast_convert_type(bits, jnp.float32) - jnp.float32(2**23 + 128)


def small_to_f16(values: jax.Array, *, asm: bool) -> jax.Array:
    """int8 as f16, in the low bits of 1024 + 128; four to a register, where it is by inline assembly."""
    if asm:
        # Bytes that are not negative, each below the high byte of 1024, and from those pairs 1024 + 128.
        body = ".reg .b32 t,c; xor.b32 t,$2,0x80808080; mov.b32 c,0x64806480;"
        body += "prmt.b32 $0,t,0x64646464,0x4140; prmt.b32 $1,t,0x64646464,0x4342;"
        body += "sub.rn.f16x2 $0,$0,c; sub.rn.f16x2 $1,$1,c;"
        return _asm("{" + body + "}", [values], jnp.float16, 4)
    bits = values.astype(jnp.int16) + jnp.int16(0x6480)
    return lax.bitcast_convert_type(bits, jnp.float16) - jnp.float16(1024 + 128)
