"""Follow a forward with abstract values: tokens that are divided between ranks, and tensors every rank has in full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import libcst as cst

from porter.facts.sequence import operations, shapes
from porter.facts.sequence.calls import (
    AttentionUse,
    Counted,
    Env,
    Findings,
    arithmetic,
    bound,
    count,
    same_tokens,
    unpacked,
    with_origin,
)
from porter.facts.sequence.classes import Classes
from porter.facts.sequence.conditions import refine, truth
from porter.facts.sequence.indexing import indexed, whole_indexed
from porter.facts.sequence.values import (
    ALL_TOKENS,
    NONE,
    OTHER,
    Conflict,
    Const,
    Either,
    Functions,
    Instance,
    Length,
    Many,
    Modules,
    Named,
    NotShardable,
    Partial,
    Tokens,
    Value,
    Whole,
    counted,
    flattened,
    has_tokens,
    joined,
    merged,
    of_all_tokens,
    opaque,
    whole,
)  # fmt: skip
from porter.source import tree
from porter.source.names import qualified

ATTENTION = "vllm_omni.diffusion.attention.layer.Attention"
METADATA = "vllm_omni.diffusion.attention.backends.abstract.AttentionMetadata"
MAX_DEPTH = 24

_OVER_HEADS = ("porter_template.rotary_of_this_rank", "vllm.distributed.tensor_model_parallel_all_gather")
"""Functions that take or join shares of the heads: tokens stay where they are."""


_CONSTANTS: dict[str, Value] = {"None": NONE, "True": Const(True), "False": Const(False)}
_EVALUATORS: dict[type, str] = {
    cst.Name: "name", cst.Integer: "literal", cst.Float: "literal", cst.SimpleString: "literal",
    cst.Attribute: "attribute", cst.Tuple: "sequence", cst.List: "sequence", cst.Dict: "dictionary",
    cst.Subscript: "subscript", cst.BinaryOperation: "binary", cst.UnaryOperation: "unary", cst.IfExp: "choice",
    cst.Call: "call", cst.ListComp: "comprehension", cst.GeneratorExp: "comprehension",
    cst.BooleanOperation: "boolean", cst.Comparison: "comparison",
}  # fmt: skip
"""Class of an expression -> the method of `Frame` that gives its value; any other expression has no value of interest."""


class Frame:
    """One call of one function."""

    def __init__(self, classes: Classes, findings: Findings, owner: str, origin: str = "", depth: int = 0) -> None:
        self.classes, self.findings, self.owner, self.origin, self.depth = classes, findings, owner, origin, depth
        self.returned: list[Value] = []
        self.functions: dict[str, cst.FunctionDef] = {}

    # -- statements --------------------------------------------------------------------------------------------------
    def block(self, stmts: list[cst.BaseStatement], env: Env) -> bool:
        """Follow statements; whether the end is reached."""
        return all(self.statement(stmt, env) for stmt in stmts)

    def statement(self, stmt: cst.BaseStatement, env: Env) -> bool:
        if isinstance(stmt, cst.SimpleStatementLine):
            return all(self.small(s, env) for s in stmt.body)
        if isinstance(stmt, cst.If):
            return self.branch(stmt, env)
        if isinstance(stmt, cst.For):
            for value in self.iterated(stmt.iter, env):
                self.bind(stmt.target, value, env)
                self.block(tree.body(stmt), env)
        elif isinstance(stmt, (cst.While, cst.With, cst.Try)):
            return self.block(tree.body(stmt), env)  # type: ignore[arg-type]
        elif isinstance(stmt, cst.FunctionDef):
            self.functions[stmt.name.value] = stmt
        return True

    def small(self, small: cst.BaseSmallStatement, env: Env) -> bool:
        try:
            return self._small(small, env)
        except NotShardable as problem:
            problem.where = problem.where or " ".join(tree.code(small).split())[:90]
            raise

    def _small(self, small: cst.BaseSmallStatement, env: Env) -> bool:
        kind = type(small)  # LibCST's classes are slow to ask with `isinstance`
        if kind is cst.Assign:
            value = self.eval(small.value, env)  # type: ignore[attr-defined]
            for target in small.targets:  # type: ignore[attr-defined]
                self.bind(target.target, value, env)
            return True
        if kind is cst.Expr:
            self.eval(small.value, env)  # type: ignore[attr-defined]
            return True
        if isinstance(small, cst.Return):
            self.returned.append(self.eval(small.value, env) if small.value is not None else NONE)
            return False
        if isinstance(small, (cst.Raise, cst.Continue, cst.Break)):
            return not isinstance(small, cst.Raise)
        if isinstance(small, cst.AnnAssign) and small.value is not None:
            self.bind(small.target, self.eval(small.value, env), env)
        elif isinstance(small, cst.AugAssign):
            value = operations.combine([self.eval(small.target, env), self.eval(small.value, env)], self.findings.met)
            self.bind(small.target, value, env)
        return True

    def branch(self, stmt: cst.If, env: Env) -> bool:
        known = truth(self, stmt.test, env)
        then, other = dict(env), dict(env)
        refine(stmt.test, then)
        reached = self.block(tree.body(stmt), then) if known is not False else None
        if known is True:
            reached_other = None
        elif isinstance(stmt.orelse, cst.If):
            reached_other = self.branch(stmt.orelse, other)
        else:
            reached_other = self.block(tree.body(stmt.orelse), other) if stmt.orelse is not None else True
        ends = [e for e, r in ((then, reached), (other, reached_other)) if r]
        if not ends:
            return False
        for name in {n for e in ends for n in e}:
            value: Value | None = None
            for each in ends:
                value = merged(value, each.get(name))
            env[name] = value if value is not None else OTHER
        return True

    def bind(self, target: cst.BaseExpression, value: Value, env: Env) -> None:
        if isinstance(target, cst.Name):
            env[target.value] = value.alone() if isinstance(value, Either) else value
        elif isinstance(target, (cst.Tuple, cst.List)):
            for item, each in zip(target.elements, unpacked(value, len(target.elements)), strict=True):
                self.bind(item.value, each, env)
        elif isinstance(target, cst.Subscript):
            if has_tokens(value) and not has_tokens(self.eval(target.value, env)):
                raise NotShardable("tokens are written into a tensor that every rank has in full")
            operations.combine([self.eval(target, env), value], self.findings.met)

    def iterated(self, node: cst.BaseExpression, env: Env) -> list[Value]:
        """Values of the loop variable, one after the other."""
        name = tree.call_name(node)
        built_in = isinstance(node, cst.Call) and name in ("enumerate", "zip", "reversed")
        given = [a.value for a in node.args if a.keyword is None] if built_in else []  # type: ignore[attr-defined]
        if given:
            columns = [self.iterated(g, env) for g in given]
            if name == "reversed":
                return columns[0][::-1]
            if name == "enumerate":
                counted = isinstance(self.eval(given[0], env), Many)
                return [Many((Const(i) if counted else OTHER, v)) for i, v in enumerate(columns[0])]
            longest = max(len(c) for c in columns)
            return [Many(tuple(c[min(i, len(c) - 1)] if c else OTHER for c in columns)) for i in range(longest)]
        value = self.eval(node, env)
        if isinstance(value, Modules):
            return list(value.chain) or [value.element, value.element]
        if isinstance(value, Many):
            return list(value.items[:16])
        if isinstance(value, Tokens):
            raise NotShardable("a loop goes over a tensor of tokens")
        return [opaque([value]) if isinstance(value, Whole) else OTHER] * 2

    # -- expressions -------------------------------------------------------------------------------------------------
    def eval(self, node: cst.BaseExpression, env: Env) -> Value:
        value = self._eval(node, env)
        if isinstance(value, Conflict):
            raise NotShardable(f"{tree.code(node)[:40]}: {value.reason}")
        return value

    def _eval(self, node: cst.BaseExpression, env: Env) -> Value:
        evaluate = _EVALUATORS.get(type(node))
        return getattr(self, evaluate)(node, env) if evaluate is not None else OTHER

    def name(self, node: cst.Name, env: Env) -> Value:
        return _CONSTANTS.get(node.value) or env.get(node.value) or self.globals(node.value)

    def literal(self, node: cst.Integer | cst.Float | cst.SimpleString, env: Env) -> Value:
        return Const(tree.literal_value(node.value))

    def sequence(self, node: cst.Tuple | cst.List, env: Env) -> Value:
        return Many(tuple(v for e in node.elements for v in self.spread(e, env)))

    def choice(self, node: cst.IfExp, env: Env) -> Value:
        known = truth(self, node.test, env)
        if known is not None:
            return self.eval(node.body if known else node.orelse, env)
        return merged(self._eval(node.body, env), self._eval(node.orelse, env))

    def boolean(self, node: cst.BooleanOperation, env: Env) -> Value:
        return merged(self._eval(node.left, env), self._eval(node.right, env))

    def comparison(self, node: cst.Comparison, env: Env) -> Value:
        values = [self.eval(n, env) for n in (node.left, *(c.comparator for c in node.comparisons))]
        self.compared_length(node, env)
        if any(isinstance(v, (Tokens, Whole)) for v in values) and not any(isinstance(v, Length) for v in values):
            return operations.combine(values, self.findings.met)
        return OTHER

    def compared_length(self, node: cst.Comparison, env: Env) -> None:
        """A number of tokens that is compared with another number: both are of all tokens."""
        nodes = [node.left, *(c.comparator for c in node.comparisons)]
        values = [self.eval(n, env) for n in nodes]
        lengths = [n for n, v in zip(nodes, values, strict=True) if isinstance(v, Length)]
        if len(nodes) == 2 and len(lengths) == 1 and not has_tokens(*(v for v in values if not isinstance(v, Length))):
            self.whole_lengths(lengths, env, next(v for v in values if not isinstance(v, Length)))

    def whole_lengths(self, nodes: Sequence[cst.BaseExpression], env: Env, beside: Value = OTHER) -> bool:
        """Whether numbers of tokens among expressions may be those of all ranks: then they are noted."""
        found = [
            n for each in nodes for n in ([e.value for e in each.elements] if isinstance(each, cst.Tuple) else [each])
        ]
        for node in found:
            value = self.eval(node, env)
            if isinstance(value, Length):
                if self.owner not in self.classes.unit or value.negative:
                    return False
                count(self.findings, Counted(self.owner, node, value.parts, beside))
        return True

    def globals(self, name: str) -> Value:
        """A global: a function, or a table of functions."""
        known = qualified(name)
        table = self.classes.table(known) if known is not None else None
        if known is None or table is None:
            return (
                Functions(((known, ()),)) if known is not None and self.classes.function(known) is not None else OTHER
            )
        options = [self.eval(e.value, {}) for e in table.elements if isinstance(e, cst.DictElement)]
        found = [o for v in options if isinstance(v, Functions) for o in v.options]
        return Functions(tuple(found)) if found else OTHER

    def dictionary(self, node: cst.Dict, env: Env) -> Value:
        items: dict[str, Value] = {}
        for element in node.elements:
            value = self.eval(element.value, env)
            if isinstance(element, cst.DictElement) and isinstance(element.key, cst.SimpleString):
                items[str(tree.literal_value(element.key.value))] = value
            elif isinstance(value, Named):
                items |= dict(value.items)
            elif has_tokens(value):
                raise NotShardable("tokens are kept in a dictionary whose keys are computed")
        return Named(tuple(items.items()))

    def spread(self, element: cst.BaseElement, env: Env) -> list[Value]:
        value = self.eval(element.value, env)
        if isinstance(element, cst.StarredElement):
            return list(value.items) if isinstance(value, Many) else [value]
        return [value]

    def attribute(self, node: cst.Attribute, env: Env) -> Value:
        owner, name = self.eval(node.value, env), node.attr.value
        if isinstance(owner, Instance):
            found = self.classes.attribute(owner, name)
            return with_origin(found, name) if self.depth == 0 and tree.self_attribute(node) else found
        if isinstance(owner, Tokens):
            if name in ("T", "mT"):
                raise NotShardable("tokens are transposed")
            if name == "shape":
                return shapes.shape(owner)
            return owner if name in ("real", "imag", "data") else Const(owner.rank) if name == "ndim" else OTHER
        if isinstance(owner, Whole) and name in ("real", "imag", "data"):
            return owner
        if isinstance(owner, Whole) and name == "shape" and owner.kind != "fixed":
            return whole("view", op="shape", base=(owner,))
        if isinstance(owner, Partial):
            return OTHER
        return OTHER

    def subscript(self, node: cst.Subscript, env: Env) -> Value:
        owner = self.eval(node.value, env)
        if isinstance(owner, Modules):
            index = self._index(node, env)
            at = shapes.number(index)
            return owner.chain[at] if owner.chain and at is not None and at < len(owner.chain) else owner.element
        if isinstance(owner, Many):
            return self.picked(owner, node, env)
        if isinstance(owner, Either):
            return self.apart(owner)
        if isinstance(owner, Named):
            return self.entry(owner, self._index(node, env))
        if isinstance(owner, Tokens):
            return indexed(owner, node, lambda each: self.eval(each, env))
        if isinstance(owner, Whole):
            bounds = [
                b for e in node.slice if isinstance(e.slice, cst.Slice) for b in (e.slice.lower, e.slice.upper) if b
            ]
            if owner.name == ALL_TOKENS and any(isinstance(self.eval(b, env), Length) for b in bounds):
                if self.whole_lengths(bounds, env):
                    return opaque([owner])
            return whole_indexed(owner, node, lambda each: self.eval(each, env))
        return owner

    @staticmethod
    def entry(owner: Named, key: Value) -> Value:
        """An entry of a dictionary."""
        if isinstance(key, Const):
            return owner.get(key.value)
        if has_tokens(owner):
            raise NotShardable("tokens are kept in a dictionary whose keys are computed")
        return opaque([owner])

    @staticmethod
    def apart(value: Either) -> Value:
        """What is left of options that are treated as one tensor."""
        if has_tokens(value):
            raise NotShardable("it is divided on one path and not on the other")
        return joined(flattened(value))

    def _index(self, node: cst.Subscript, env: Env) -> Value:
        only = node.slice[0].slice
        return self.eval(only.value, env) if len(node.slice) == 1 and isinstance(only, cst.Index) else OTHER

    def picked(self, owner: Many, node: cst.Subscript, env: Env) -> Value:
        only = node.slice[0].slice
        if isinstance(only, cst.Slice):
            low = shapes.number(self.eval(only.lower, env)) if only.lower is not None else None
            high = shapes.number(self.eval(only.upper, env)) if only.upper is not None else None
            return Many(owner.items[low:high])
        at = shapes.number(self._index(node, env))
        if at is not None and -len(owner.items) <= at < len(owner.items):
            return owner.items[at]
        value: Value | None = None
        for each in owner.items:
            value = merged(value, each)
        return value if value is not None else OTHER

    def unary(self, node: cst.UnaryOperation, env: Env) -> Value:
        value = self.eval(node.expression, env)
        if isinstance(node.operator, cst.Minus):
            if isinstance(value, Const) and isinstance(value.value, (int, float)):
                return Const(-value.value)
            if isinstance(value, Length):
                return Length(value.parts, not value.negative)
        return OTHER if isinstance(node.operator, cst.Not) else value

    def binary(self, node: cst.BinaryOperation, env: Env) -> Value:
        left, right = self.eval(node.left, env), self.eval(node.right, env)
        for length, node_, other in ((left, node.left, right), (right, node.right, left)):
            if isinstance(length, Length) and counted(other) is not None and self.whole_lengths([node_], env, other):
                return opaque([other])
        if isinstance(node.operator, (cst.Add, cst.Subtract)) and (
            isinstance(left, Length) or isinstance(right, Length)
        ):
            return shapes.lengths(left, right, 1 if isinstance(node.operator, cst.Add) else -1)
        if isinstance(left, Many) and isinstance(right, Many) and isinstance(node.operator, cst.Add):
            return Many((*left.items, *right.items))
        if isinstance(node.operator, cst.MatrixMultiply) and has_tokens(left, right):
            if isinstance(left, Tokens) and not has_tokens(right):
                return operations.method("matmul", left, [right], {}, self.findings.met)
            raise shapes.Paired("tokens are multiplied with tokens outside the attention layer")
        if counted(left) is not None or counted(right) is not None:
            if has_tokens(left, right):
                raise NotShardable("numbers of all and of this rank's tokens are mixed")
            return opaque([left, right])
        if isinstance(left, Const) and isinstance(right, Const):
            return arithmetic(node.operator, left.value, right.value)
        return operations.combine([left, right], self.findings.met)

    def comprehension(self, node: cst.ListComp | cst.GeneratorExp, env: Env) -> Value:
        inner = dict(env)
        values: list[Value] = []
        over = node.for_in.iter
        if (
            isinstance(over, cst.Call)
            and tree.call_name(over) in ("enumerate", "zip", "reversed", "range")
            and over.args
        ):
            over = over.args[0].value
        iterable = self.eval(over, env)
        for each in self.iterated(node.for_in.iter, env):
            self.bind(node.for_in.target, each, inner)
            values.append(self.eval(node.elt, inner))
        if isinstance(iterable, Many):
            return Many(tuple(values))
        value: Value | None = None
        for each in values:
            value = merged(value, each)
        if value is not None and has_tokens(value):
            raise NotShardable("a list of tokens of unknown length is made")
        return opaque([value]) if value is not None and isinstance(value, (Whole, Many)) else OTHER

    # -- calls -------------------------------------------------------------------------------------------------------
    def call(self, node: cst.Call, env: Env) -> Value:
        args, kwargs = self.arguments(node, env)
        name = (qualified(node.func.value) or node.func.value) if isinstance(node.func, cst.Name) else ""
        if isinstance(node.func, cst.Name) and node.func.value in self.functions:
            return self.run(self.functions[node.func.value], args, kwargs, self.owner, None, env)
        if name == "map" and len(args) == 2 and isinstance(args[1], Many) and isinstance(node.args[0].value, cst.Name):
            function = self.functions.get(node.args[0].value.value)
            if function is not None:
                return Many(tuple(self.run(function, [v], {}, self.owner, None, env) for v in args[1].items))
        known = env.get(node.func.value) if isinstance(node.func, cst.Name) else None
        if isinstance(known, Functions):
            return self.tabled(known, args, kwargs)
        if isinstance(node.func, cst.Name) and not isinstance(known, (Instance, Partial, Modules)):
            counts = name in operations.OF_ALL_TOKENS or (self.findings.pairs and name in operations.MADE)
            if counts and not any(isinstance(v, Tokens) for v in args):
                if self.whole_lengths([a.value for a in node.args], env):
                    return of_all_tokens(args)
            return self.named(name, args, kwargs)
        if isinstance(node.func, cst.Attribute):
            owner = self.eval(node.func.value, env)
            method = node.func.attr.value
            if isinstance(owner, Tokens):
                if method in ("to", "type_as"):
                    return owner
                return operations.method(method, owner, args, kwargs, self.findings.met)
            if isinstance(owner, Whole):
                if owner.name == ALL_TOKENS and any(isinstance(v, Length) for v in args):
                    if self.whole_lengths([a.value for a in node.args], env):
                        return of_all_tokens([owner])
                if any(isinstance(v, Tokens) for v in (*args, *kwargs.values())) and method in operations.ELEMENTWISE:
                    if method in ("to", "type_as", "expand_as"):
                        return owner
                    return operations.combine([owner, *args], self.findings.met)
                if method in ("new_ones", "new_zeros", "new_full", "new_empty"):
                    return operations.made(args)
                return operations.whole_method(method, owner, args, kwargs)
            if isinstance(owner, Many):
                return self.on_list(node, owner, method, args, env)
            if isinstance(owner, Named) and (method in ("get", "pop") or has_tokens(owner)):
                return self.entry(owner, args[0] if args and method in ("get", "pop") else OTHER)
            if isinstance(owner, Functions):
                return owner
            if isinstance(owner, Either):
                return owner if method in operations.ELEMENTWISE else self.apart(owner)
        target = self.eval(node.func, env)
        if isinstance(target, Modules):
            return self.chained(target, args, kwargs)
        if isinstance(target, Instance):
            return self.module(node, target, args, kwargs, env)
        if isinstance(target, Partial) and target.owner is not None:
            return self.methods(target, args, kwargs)
        if has_tokens(*args, *kwargs.values()):
            raise NotShardable(f"{tree.code(node.func)[:60]} is given tokens")
        return opaque([*args, *kwargs.values()])

    def arguments(self, node: cst.Call, env: Env) -> tuple[list[Value], dict[str, Value]]:
        args: list[Value] = []
        kwargs: dict[str, Value] = {}
        for arg in node.args:
            value = self._eval(arg.value, env)
            if arg.keyword is not None:
                kwargs[arg.keyword.value] = value
            elif arg.star == "*":
                args += value.items if isinstance(value, Many) else [value]
            elif arg.star == "":
                args.append(value)
            elif isinstance(value, Named):
                kwargs |= dict(value.items)
            elif has_tokens(value):
                raise NotShardable("tokens are among arguments that are not known by name")
            elif arg.star == "**" and value != NONE:
                kwargs["**"] = OTHER
        return args, kwargs

    def on_list(self, node: cst.Call, owner: Many, method: str, args: list[Value], env: Env) -> Value:
        if method == "append" and isinstance(node.func, cst.Attribute) and isinstance(node.func.value, cst.Name):
            if len(owner.items) < 64:
                env[node.func.value.value] = Many((*owner.items, *args))
            return NONE
        if method == "pop" and owner.items:
            value: Value | None = None
            for each in owner.items:
                value = merged(value, each)
            return value if value is not None else OTHER
        return OTHER

    def named(self, name: str, args: list[Value], kwargs: dict[str, Value]) -> Value:
        """A function or class by its name."""
        everything = [*args, *kwargs.values()]
        if name in ("tuple", "list", *_OVER_HEADS) and len(args) == 1:
            return args[0]
        if name == "len":
            return OTHER
        if name == "getattr" and len(args) >= 2 and isinstance(args[0], Instance) and isinstance(args[1], Const):
            return self.classes.attribute(args[0], str(args[1].value))
        if name in ("isinstance", "print", "range", "hasattr", "str", "callable", "getattr", "type"):
            return OTHER
        if name in ("int", "max", "min", "float", "sum") and not any(isinstance(v, Tokens) for v in everything):
            if name == "int" and len(args) == 1:
                return args[0]
            if has_tokens(*everything):
                raise NotShardable("the number of tokens is used in arithmetic")
            return OTHER
        if name == "functools.partial" and args and isinstance(args[0], Functions):
            more = tuple(kwargs.items())
            return Functions(tuple((n, (*k, *more)) for n, k in args[0].options))
        if name == METADATA:
            return kwargs.get("attn_mask", args[0] if args else NONE)
        function = self.classes.function(name)
        if function is not None:
            return self.run(function, args, kwargs, "", None, {})
        if has_tokens(*everything):
            return operations.function(name, args, kwargs, self.findings.met)
        if name.startswith(operations._FUNCTIONS):
            short = name.rpartition(".")[2]
            if short in ("cat", "concat", "stack") and args and isinstance(args[0], Many):
                dim = shapes.number(kwargs.get("dim", args[1] if len(args) > 1 else None))
                return joined(list(args[0].items)) if dim == -1 and short == "cat" else opaque(everything)
            if args and isinstance(args[0], (Whole, Many)):
                return operations.whole_method(short, args[0], args[1:], kwargs)
            return opaque(everything)
        return opaque(everything, name)

    def tabled(self, functions: Functions, args: list[Value], kwargs: dict[str, Value]) -> Value:
        """Call of a function out of a table: every one of them may be meant."""
        result: Value | None = None
        for name, bound_already in functions.options:
            function = self.classes.function(name)
            assert function is not None
            value = self.run(function, args, {**dict(bound_already), **kwargs}, "", None, {})
            result = value if result is None else merged(result, value)
        return result if result is not None else OTHER

    def chained(self, modules: Modules, args: list[Value], kwargs: dict[str, Value]) -> Value:
        """Call of a Sequential."""
        value = args[0] if args else OTHER
        for each in modules.chain or (modules.element,):
            value = self.module(None, each, [value], kwargs, {})
        return value

    def module(
        self, node: cst.Call | None, target: Instance, args: list[Value], kwargs: dict[str, Value], env: Env
    ) -> Value:
        """Call of a module: attention, a class that can be followed, or one that acts on the last axis."""
        if self.depth == 0 and len(target.classes) > 1 and has_tokens(*args, *kwargs.values()):
            target = self.without_mixing(node, target, args, kwargs, env)
        result: Value | None = None
        for cls in target.classes:
            if cls == ATTENTION:
                assert node is not None
                value = self.attend(node, args, kwargs)
            elif (forward := self.classes.method(cls, "forward")) is not None and not operations.pointwise(cls):
                receiver = Instance((cls,), target.origin or self.origin)
                value = self.run(forward, args, kwargs, cls, receiver, {})
            elif operations.pointwise(cls):
                value = operations.apply_pointwise(cls, args[0] if args else OTHER)
            elif has_tokens(*args, *kwargs.values()):
                raise NotShardable(f"{cls.rpartition('.')[2]} may mix tokens")
            else:
                value = opaque([*args, *kwargs.values()], cls)
            result = value if result is None else merged(result, value)
        return result if result is not None else OTHER

    def without_mixing(
        self, node: cst.Call | None, target: Instance, args: list[Value], kwargs: dict[str, Value], env: Env
    ) -> Instance:
        """Blocks of the root without those classes that mix tokens, as long as there are others."""
        kept = []
        problem: NotShardable | None = None
        for cls in target.classes:
            try:
                self.module(node, Instance((cls,), target.origin), args, kwargs, env)
                kept.append(cls)
            except NotShardable as found:
                problem = found
                self.findings.mixing.add((target.origin, cls))
        if not kept and problem is not None:
            raise problem
        return Instance(tuple(kept), target.origin)

    def methods(self, target: Partial, args: list[Value], kwargs: dict[str, Value]) -> Value:
        assert target.owner is not None
        function = self.classes.method(target.owner, target.name)
        if function is None:
            return opaque([*args, *kwargs.values()])
        return self.run(function, args, kwargs, target.owner, Instance((target.owner,), self.origin), {})

    def attend(self, node: cst.Call, args: list[Value], kwargs: dict[str, Value]) -> Value:
        labelled = {**dict(zip(("query", "key", "value", "attn_metadata"), args, strict=False)), **kwargs}
        query, key, value = (labelled.get(n, OTHER) for n in ("query", "key", "value"))
        for each in (query, key, value):
            if isinstance(each, Tokens) and (each.rank, each.axis) != (4, 1):
                raise NotShardable("the axis attention goes over is not the one of the tokens")
        if isinstance(key, Tokens) != isinstance(value, Tokens) or (key != value and isinstance(key, Tokens)):
            raise NotShardable("key and value hold different tokens")
        if isinstance(key, Tokens) and not isinstance(query, Tokens):
            raise NotShardable("queries that every rank has in full attend to tokens")
        use = AttentionUse(
            self.owner, self.origin, node, query.parts if isinstance(query, Tokens) else None,
            key.parts if isinstance(key, Tokens) else None, labelled.get("attn_metadata", NONE),
        )  # fmt: skip
        mask = use.mask
        if isinstance(mask, Tokens) and use.key is not None:
            same_tokens(mask, use.key)
        seen = self.findings.attention.setdefault(id(node), [])
        if use not in seen:
            seen.append(use)
        return query if isinstance(query, Tokens) else opaque([query, key, value])

    def run(
        self,
        function: cst.FunctionDef,
        args: list[Value],
        kwargs: Mapping[str, Value],
        owner: str,
        receiver: Instance | None,
        closure: Env,
    ) -> Value:
        """Call of a function whose source is known."""
        if self.depth >= MAX_DEPTH:
            return opaque([*args, *kwargs.values()])
        key = (
            id(function),
            owner or self.owner,
            receiver,
            self.origin,
            tuple(args),
            tuple(sorted(kwargs.items(), key=lambda k: k[0])),
        )
        if not closure and key in self.findings.calls:
            return self.findings.calls[key]
        origin = receiver.origin if receiver is not None else self.origin
        frame = Frame(self.classes, self.findings, owner or self.owner, origin, self.depth + 1)
        env = {**closure, **bound(function, args, kwargs, receiver, lambda n: self.eval(n, {}))}
        if frame.block(tree.body(function), env):
            frame.returned.append(NONE)
        value: Value | None = None
        for each in frame.returned:
            value = merged(value, each)
        result = value if value is not None else OTHER
        if not closure:
            self.findings.calls[key] = result
        return result
