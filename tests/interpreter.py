"""Triton's interpreter in a process that also compiles, with its number formats put right.

Stock Triton decides when it is imported whether `@triton.jit` compiles or interprets. Here a generated module is
loaded with a decorator of our own, and Triton's library functions are replaced only while a kernel runs, so
compiled and interpreted tests share one process. `interpreter_grid.py` runs the programs of a grid.

Put right: bf16 arithmetic (stock works on the raw bits), rounding to bf16 (stock truncates), loop counters (stock
gives Python ints, compiled code has tensors), and the cost of a call (stock patches the language at every one).
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from onelaunch.codegen.triton.build import load_module

LIBRARY = (tl, tl.standard)  # modules with functions that were decorated with Triton's own `jit`
ELEMENTS = {torch.int32: tl.int32, torch.int64: tl.int64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
Handle = interpreter.TensorHandle


class Function(interpreter.InterpretedFunction):
    """A jit function that runs as Python; the language must be patched already."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)


def _jit(fn: Callable[..., Any] | None = None, **options: Any) -> Any:
    return Function(fn) if fn is not None else _jit


def load_interpreted(text: str) -> ModuleType:
    """A generated module whose functions run as Python and whose INTERPRET is true."""
    with mock.patch.object(triton, "jit", _jit), mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        module = load_module(text)
    module.range = _range
    return module


def _range(*bounds: Any) -> Iterator[tl.tensor]:
    """Loop counters as compiled code has them: int32 scalars."""
    for i in builtins.range(*map(int, map(_index, bounds))):
        yield interpreter.interpreter_semantic.to_tensor(i)


def _index(bound: Any) -> int:
    return bound.value if isinstance(bound, tl.constexpr) else bound.__index__()


def argument(value: torch.Tensor | int) -> tl.tensor:
    """A kernel argument: the pointer of a tensor, or an int32."""
    if isinstance(value, int):
        return tl.tensor(Handle(np.array([value], np.int32), tl.int32), tl.int32)
    kind = tl.pointer_type(ELEMENTS[value.dtype])
    return tl.tensor(Handle(np.array([value.data_ptr()], np.uint64), kind), kind)


@contextmanager
def interpreting(builder: Builder) -> Iterator[None]:
    """The language runs on `builder` until the end of the block."""
    scope = interpreter._LangPatchScope()
    scope.set_attr(interpreter.interpreter_semantic, "builder", builder)
    for module in LIBRARY:
        for name, member in list(vars(module).items()):
            if isinstance(member, JITFunction):
                scope.set_attr(module, name, _library_function(member))
    for owner in (tl, tl.core):
        interpreter._patch_builtin(owner, builder, scope)
        interpreter._patch_builtin(owner.tensor, builder, scope)
        interpreter._patch_lang_tensor(owner.tensor, scope)
        interpreter._patch_lang_core(owner, scope)
    interpreter._patch_builtin(tl.math, builder, scope)
    try:
        yield
    finally:
        scope.restore()


@cache
def _library_function(compiled: JITFunction[Any]) -> Function:
    """One object per function: Triton's reductions are recognised by the identity of what they combine with."""
    return Function(compiled.fn)


class Builder(interpreter.InterpreterBuilder):
    """Operations of the language on numpy arrays; memory operations are told to `memory` first."""

    def __init__(self, memory: Any) -> None:
        super().__init__()
        self.memory = memory
        self.options = interpreter.InterpreterOptions(sanitize_overflow=False)  # as compiled code; half the time

    # ---- programs and memory ----------------------------------------------------------------

    def create_get_program_id(self, axis: int) -> Handle:
        return Handle(np.array([self.memory.current if axis == 0 else 0], np.int32), tl.int32)

    def create_get_num_programs(self, axis: int) -> Handle:
        return Handle(np.array([self.memory.programs if axis == 0 else 1], np.int32), tl.int32)

    def create_masked_load(self, ptrs: Handle, mask: Handle, *rest: Any) -> Handle:
        self.memory.load(_addresses(ptrs, mask), _width(ptrs))
        return super().create_masked_load(ptrs, mask, *rest)

    def create_masked_store(self, ptrs: Handle, value: Handle, mask: Handle, *rest: Any) -> None:
        self.memory.store(_addresses(ptrs, mask), _width(ptrs))
        super().create_masked_store(ptrs, value, mask, *rest)

    def create_atomic_rmw(self, op: Any, ptr: Handle, val: Handle, mask: Handle, sem: Any, scope: Any) -> Handle:
        polls = op == interpreter._ir.ATOMIC_OP.ADD and not np.any(val.data)
        with self.memory.atomic(_addresses(ptr, mask), _width(ptr), sem.name.lower(), polls):
            return super().create_atomic_rmw(op, ptr, val, mask, sem, scope)

    # ---- bfloat16: through float32, rounded to nearest --------------------------------------

    def cast_impl(self, src: Handle, dst_type: Any) -> Handle:
        if src.dtype.scalar == tl.bfloat16:
            wide = Handle(_from_bf16(src.data), tl.float32)
            return wide if dst_type.scalar == tl.float32 else self.cast_impl(wide, dst_type)
        if dst_type.scalar == tl.bfloat16:
            return Handle(_to_bf16(src.data), tl.bfloat16)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: Handle, dst_type: Any, rounding_mode: Any) -> Handle:
        return self.cast_impl(src, dst_type)

    def binary_op(self, lhs: Handle, rhs: Handle, op: Any) -> Handle:
        if lhs.dtype.scalar != tl.bfloat16:
            return super().binary_op(lhs, rhs, op)
        found = op(_from_bf16(lhs.data), _from_bf16(rhs.data))
        return Handle(found, tl.int1) if found.dtype == bool else Handle(_to_bf16(found), tl.bfloat16)

    def unary_op(self, arg: Handle, op: Any) -> Handle:
        if arg.dtype.scalar != tl.bfloat16:
            return super().unary_op(arg, op)
        return Handle(_to_bf16(op(_from_bf16(arg.data))), tl.bfloat16)

    def create_dot(self, a: Handle, b: Handle, d: Handle, *rest: Any) -> Handle:
        product = np.matmul(_float32(a), _float32(b))
        return Handle((product + d.data).astype(d.data.dtype), d.dtype.scalar)


def _addresses(ptrs: Handle, mask: Handle | None) -> np.ndarray:
    """Byte addresses of the live lanes, flat."""
    if mask is None:
        return ptrs.data.reshape(-1)
    return ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)]


def _width(ptrs: Handle) -> int:
    return max(1, ptrs.get_element_ty().primitive_bitwidth // 8)


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


def _float32(x: Handle) -> np.ndarray:
    return _from_bf16(x.data) if x.dtype.scalar == tl.bfloat16 else x.data.astype(np.float32)
