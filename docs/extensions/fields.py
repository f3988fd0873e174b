"""Signatures of classes whose `__init__` is made from their fields, for the API reference.

mkdocstrings reads the source and runs nothing: it knows only the `__init__` that stands there, and
that of `dataclasses.dataclass`. Equinox modules and named tuples have theirs from their fields.
"""

import griffe

_SKIPPED = ("ClassVar", "AbstractVar", "AbstractClassVar")


class FieldSignatures(griffe.Extension):
    """Gives such a class an `__init__` with one parameter for each field."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        """Once everything is loaded, so that bases are known."""
        self._visit(pkg)

    def _visit(self, parent: griffe.Module) -> None:
        for member in parent.members.values():
            if member.is_alias:
                continue
            if member.is_module:
                self._visit(member)
            elif member.is_class and "__init__" not in member.members:
                self._give(member)

    def _give(self, cls: griffe.Class) -> None:
        fields = [
            field
            for field in cls.members.values()
            if field.is_attribute and field.annotation is not None and _is_field(field)
        ]
        if not fields:
            return
        this = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
        init = griffe.Function("__init__", parameters=griffe.Parameters(this), returns="None")
        for field in fields:
            init.parameters.add(
                griffe.Parameter(
                    field.name,
                    annotation=field.annotation,
                    kind=griffe.ParameterKind.positional_or_keyword,
                    default=_default(field.value),
                )
            )
        cls.set_member("__init__", init)


def _is_field(field: griffe.Attribute) -> bool:
    if "property" in field.labels or field.name.startswith("_"):
        return False
    if any(name in str(field.annotation) for name in _SKIPPED):
        return False
    return not any(str(argument) == "init=False" for argument in _arguments(field.value))


def _default(value: object) -> object:
    """The default in `eqx.field(default=…)`, or the value itself."""
    if not isinstance(value, griffe.ExprCall) or not str(value.function).endswith("field"):
        return value
    for argument in _arguments(value):
        if isinstance(argument, griffe.ExprKeyword) and argument.name == "default":
            return argument.value
    return None


def _arguments(value: object) -> list[object]:
    return list(value.arguments) if isinstance(value, griffe.ExprCall) else []
