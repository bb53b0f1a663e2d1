"""From disk records to codes u8 [.., weights] and scales, format by format; layouts are GGUF's."""

from __future__ import annotations

import numpy as np

from .format import Array


def low_high(qs: Array) -> Array:
    """Bytes [..., n] to nibbles [..., 2, n]: all low ones, then all high ones."""
    return np.stack([qs & 15, qs >> 4], axis=-2)


def pairs_of_bits(qs: Array) -> Array:
    """Bytes [..., n] to pairs of bits [..., 4, n], lowest first."""
    return qs[..., None, :] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3


def codes_4(r: Array) -> Array:
    return low_high(r["qs"])


def codes_q5(r: Array) -> Array:
    fifth = np.unpackbits(r["qh"], axis=-1, bitorder="little")
    return low_high(r["qs"]).reshape(fifth.shape) | fifth << 4


def codes_q8_0(r: Array) -> Array:
    return r["qs"] ^ np.uint8(0x80)  # i8 + 128


def codes_q2_k(r: Array) -> Array:
    return pairs_of_bits(r["qs"].reshape(*r.shape, 2, 32))


def codes_q3_k(r: Array) -> Array:
    third = r["qh"][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return codes_q2_k(r).reshape(third.shape) | third << 2


def codes_q4_k(r: Array) -> Array:
    return low_high(r["qs"].reshape(*r.shape, 4, 32))


def codes_q5_k(r: Array) -> Array:
    fifth = r["qh"][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return codes_q4_k(r).reshape(fifth.shape) | fifth << 4


def codes_q6_k(r: Array) -> Array:
    low = low_high(r["qs"].reshape(*r.shape, 2, 64)).reshape(*r.shape, 2, 4, 32)
    return low | pairs_of_bits(r["qh"].reshape(*r.shape, 2, 32)) << 4


def codes_iq4_xs(r: Array) -> Array:
    return low_high(r["qs"].reshape(*r.shape, 8, 16))


def codes_nvfp4(r: Array) -> Array:
    return low_high(r["qs"].reshape(*r.shape, 4, 8))


def scales_q3_k(r: Array) -> dict[str, Array]:
    """Sixteen scales of 6 bits less 32: four bits in the first eight bytes, the rest in the last four."""
    low = low_high(r["scales"][..., :8]).reshape(*r.shape, 16)
    high = pairs_of_bits(r["scales"][..., 8:]).reshape(low.shape)
    return {"d": r["d"], "sub_d": (low | high << 4).astype(np.int8) - np.int8(32)}


def scales_q4_k(r: Array) -> dict[str, Array]:
    """Twelve bytes to 8 scales and 8 mins of 6 bits: four whole ones each, the rest in two pieces."""
    low, mid, high = (r["scales"][..., i : i + 4] for i in (0, 4, 8))
    scales = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=-1)
    mins = np.concatenate([mid & 63, high >> 4 | mid >> 6 << 4], axis=-1)
    return {"d": r["d"], "m": r["m"], "sub_d": scales, "sub_m": mins}


def scales_iq4_xs(r: Array) -> dict[str, Array]:
    low = np.stack([r["low"] & 15, r["low"] >> 4], axis=-1).reshape(*r.shape, 8)
    high = (r["high"][..., None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3).astype(np.uint8)
    return {"d": r["d"], "sub_d": (low | high << 4).astype(np.int8) - np.int8(32)}
