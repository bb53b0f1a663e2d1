"""What an op is: a frozen class with operands, attributes, `infer` and `reference`.

Fields typed `Value` are operands, those typed `Value | None` too, but may be left out; the others are attributes.
`@op` registers the class under its snake_case name. `infer` gives the result type and is the verifier; `reference`
is the meaning, in plain torch float32; the `example:` of the docstring is parsed, inferred and evaluated by the tests.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, dataclass_transform

from .errors import Span, expect
from .types import Type, Value

OPS: dict[str, type[Op]] = {}
OPERANDS = ("Value", "Value | None")  # annotations of operands: needed, and not


@dataclass(frozen=True)
class Op:
    """One equation: `out = name(operands, attributes)`."""

    name: ClassVar[str]
    _operand_names: ClassVar[tuple[str, ...]]
    _attribute_names: ClassVar[tuple[str, ...]]
    out: Value
    at: Span | None = field(default=None, compare=False, repr=False, kw_only=True)

    def infer(self) -> Type:
        raise NotImplementedError(type(self).__name__)

    def reference(self, *operands: Any) -> Any:
        raise NotImplementedError(type(self).__name__)

    @classmethod
    def operand_names(cls) -> tuple[str, ...]:
        return cls._operand_names

    @classmethod
    def attribute_names(cls) -> tuple[str, ...]:
        return cls._attribute_names

    @classmethod
    def named(cls, operands: Sequence[Value]) -> dict[str, Value]:
        """Operands in order by name; CompileError if there are too few or too many."""
        names = cls.operand_names()
        needed = sum(f.type == OPERANDS[0] for f in _own_fields(cls))
        expect(
            needed <= len(operands) <= len(names),
            f"{cls.name}: expected {len(names)} operands ({', '.join(names)}), got {len(operands)}",
        )
        return dict(zip(names, operands, strict=False))

    @cached_property
    def operands(self) -> tuple[Value, ...]:
        found = (getattr(self, name) for name in self.operand_names())
        return tuple(value for value in found if value is not None)

    @property
    def attributes(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.attribute_names()}

    def with_operands(self, replace: dict[str, Value]) -> Op:
        """The same op with operands renamed: `replace` maps value names to values."""
        given = {n: getattr(self, n) for n in self.operand_names()}
        changed: dict[str, Any] = {n: replace[v.name] for n, v in given.items() if v is not None and v.name in replace}
        return dataclasses.replace(self, **changed) if changed else self

    def __str__(self) -> str:
        words = [v.name for v in self.operands]
        words += [f"{k}={v!r}" for k, v in self.attributes.items()]
        return f"{self.out} = {self.name}({', '.join(words)})"


def _own_fields(cls: type[Op]) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(cls) if f.name not in ("out", "at")]


@dataclass_transform(frozen_default=True)
def op(cls: type) -> type:
    """Make `cls` a frozen dataclass and register it under its snake_case name."""
    made: Any = dataclass(frozen=True)(cls)
    made.name = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
    fields = _own_fields(made)
    made._operand_names = tuple(f.name for f in fields if f.type in OPERANDS)
    made._attribute_names = tuple(f.name for f in fields if f.type not in OPERANDS)
    OPS[made.name] = made
    return made
