"""Abstract interpretation of constructors and forwards.

The interpreter runs the model's code on abstract values (see `values`), as far as its structure: which classes are built
with which arguments, what is None, which tests have one outcome in every context. It executes nothing. What it cannot
follow is `Top`, and a test on `Top` keeps both branches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import libcst as cst

from porter.source import tree
from porter.source.names import qualified
from porter.specialise import operators
from porter.specialise.program import Record, Spec
from porter.specialise.values import (
    GIVEN,
    NONE,
    TOP,
    Bound,
    Const,
    Empty,
    Given,
    Instance,
    Items,
    ListOf,
    OneOf,
    Opaque,
    Ref,
    Top,
    Value,
    element,
    join,
    options,
    truth,
)

Env = dict[str, Value]
MAX_DEPTH = 24
CONSTRUCTING = "%init"
"""Present in the environment of a running constructor, where attributes are tracked along the flow of control."""


Bind = Callable[[list[str] | None], dict[str, Value] | None]
Build = Callable[[cst.Call, str, Bind, "Interpreter"], Value]


@dataclass
class Flow:
    """Result of a statement list: the environment after it (None if control never gets there) and returned values."""

    env: Env | None
    returned: list[Value]


class Interpreter:
    """Runs one program. `build` turns a constructor call into a value; it is the program driver's side of the work."""

    def __init__(self, record: Record, build: Build, outcomes: Mapping[str, bool] | None = None) -> None:
        self.outcomes = outcomes or {}
        self.record = record
        self.build = build
        self.depth = 0
        self.memo: dict[object, Value] = {}

    # -- functions ---------------------------------------------------------------------------------------------------
    def call_method(self, spec: Spec, name: str, arguments: dict[str, Value], outer: Env | None = None) -> Value:
        """Value of `instance.name(**arguments)`; parameters not given take their defaults.

        `outer` is the environment of the instance's constructor when the call is part of it: attributes set then belong to
        the construction.
        """
        function = spec.method(name)
        if function is None or self.depth > MAX_DEPTH:
            return TOP
        env: Env = {"self": Instance(spec)}
        for param in tree.own_parameters(function):
            label = param.name.value
            if label in arguments:
                env[label] = arguments[label]
            else:
                env[label] = self.eval(param.default, {}) if param.default is not None else GIVEN
        seen = spec.calls.setdefault(name, {})
        for label, value in env.items():
            if label != "self":
                seen[label] = join(seen[label], value) if label in seen else value
                env[label] = seen[label]
        if isinstance(function.params.star_kwarg, cst.Param):
            env[function.params.star_kwarg.name.value] = Empty()
        if isinstance(function.params.star_arg, cst.Param):
            env[function.params.star_arg.name.value] = Empty()
        key: str | None = None
        if outer is None and all(_hashable(v) for v in env.values()):
            given = sorted((k, repr(v)) for k, v in env.items() if k != "self")
            key = repr((id(spec), name, given, self._state(spec)))
        if key is not None and key in self.memo:
            return self.memo[key]
        if outer is not None:
            env |= {k: v for k, v in outer.items() if k.startswith(("self.", "unset:")) or k == CONSTRUCTING}
        self.depth += 1
        try:
            flow = self.block(tree.body(function), env)
        finally:
            self.depth -= 1
        if outer is not None:
            outer.update({k: v for k, v in (flow.env or {}).items() if k.startswith(("self.", "unset:"))})
        result = _joined(flow.returned, NONE if flow.env is not None else None)
        if key is not None:
            self.memo[key] = result
        return result

    def _state(self, spec: Spec) -> int:
        return len(spec.attributes)

    # -- statements --------------------------------------------------------------------------------------------------
    def block(self, stmts: list[cst.BaseStatement], env: Env) -> Flow:
        returned: list[Value] = []
        current: Env | None = dict(env)
        for stmt in stmts:
            if current is None:
                break
            flow = self.statement(stmt, current)
            returned += flow.returned
            current = flow.env
        return Flow(current, returned)

    def statement(self, stmt: cst.BaseStatement, env: Env) -> Flow:
        if isinstance(stmt, cst.SimpleStatementLine):
            for small in stmt.body:
                if isinstance(small, cst.Return):
                    return Flow(None, [NONE if small.value is None else self.eval(small.value, env)])
                if isinstance(small, cst.Raise):
                    return Flow(None, [])
                if isinstance(small, (cst.Continue, cst.Break)):
                    return Flow(env, [])
                self.small(small, env)
            return Flow(env, [])
        if isinstance(stmt, cst.If):
            return self._if(stmt, env)
        if isinstance(stmt, (cst.For, cst.While)):
            return self._loop(stmt, env)
        if isinstance(stmt, cst.With):
            for item in stmt.items:
                value = self.eval(item.item, env)
                if item.asname is not None:
                    self.assign(item.asname.name, value if value != TOP else GIVEN, env)
            return self.block(tree.body(stmt), env)
        if isinstance(stmt, cst.FunctionDef):
            env[stmt.name.value] = GIVEN
        if isinstance(stmt, cst.Try):
            before = dict(env)
            flow = self.block(tree.body(stmt), env)
            envs = [e for e in [flow.env, before] if e is not None]
            return Flow(_join_envs(envs), flow.returned)
        return Flow(env, [])

    def _if(self, stmt: cst.If, env: Env) -> Flow:
        outcome = self.test(stmt.test, env)
        self.record.see_truth(stmt.test, outcome)
        flows: list[Flow] = []
        if outcome is not False:
            flows.append(self.block(tree.body(stmt), self.narrowed(stmt.test, env, True)))
        if outcome is not True:
            other = self.narrowed(stmt.test, env, False)
            if isinstance(stmt.orelse, cst.If):
                flows.append(self._if(stmt.orelse, other))
            elif stmt.orelse is not None:
                flows.append(self.block(tree.body(stmt.orelse), other))
            else:
                flows.append(Flow(other, []))
        envs = [f.env for f in flows if f.env is not None]
        return Flow(_join_envs(envs) if envs else None, [v for f in flows for v in f.returned])

    def _loop(self, stmt: cst.For | cst.While, env: Env) -> Flow:
        returned: list[Value] = []
        current = dict(env)
        if isinstance(stmt, cst.For) and isinstance(known := self.eval(stmt.iter, current), Items):
            for item in known.items:  # few elements, each known: follow them one by one
                self.assign(stmt.target, item, current)
                flow = self.block(tree.body(stmt), current)
                returned += flow.returned
                current = flow.env if flow.env is not None else current
            return Flow(current, returned)
        for _ in range(3):
            inside = dict(current)
            if isinstance(stmt, cst.For):
                self.assign(stmt.target, self._iterated(stmt.iter, inside), inside)
            else:
                self.record.see_truth(stmt.test, self.test(stmt.test, inside))
            flow = self.block(tree.body(stmt), inside)
            returned += flow.returned
            merged = _join_envs([current, flow.env]) if flow.env is not None else current
            if merged == current:
                break
            current = merged
        return Flow(current, returned)

    def _iterated(self, iterable: cst.BaseExpression, env: Env) -> Value:
        """Value of the loop variable."""
        if isinstance(iterable, cst.Call) and isinstance(iterable.func, cst.Name):
            name = iterable.func.value
            args = [a.value for a in iterable.args if not a.star]
            if name == "enumerate":
                return Items((GIVEN, self._iterated(args[0], env)))
            if name == "zip":
                return Items(tuple(element(self.eval(a, env)) for a in args))
            if name == "reversed" and args:
                return element(self.eval(args[0], env))
            if name == "range":
                for a in args:
                    self.eval(a, env)
                return GIVEN
        return element(self.eval(iterable, env))

    def small(self, node: cst.BaseSmallStatement, env: Env) -> None:
        if isinstance(node, cst.Assign):
            value = self.eval(node.value, env)
            for target in node.targets:
                self.assign(target.target, value, env)
        elif isinstance(node, cst.AnnAssign) and node.value is not None:
            self.assign(node.target, self.eval(node.value, env), env)
        elif isinstance(node, cst.AugAssign):
            self.eval(node.value, env)
            self.assign(node.target, GIVEN, env)
        elif isinstance(node, cst.Expr):
            self.eval(node.value, env)
        elif isinstance(node, cst.Assert):
            self.eval(node.test, env)

    def assign(self, target: cst.BaseExpression, value: Value, env: Env) -> None:
        if isinstance(target, cst.Name):
            env[target.value] = value
        elif isinstance(target, (cst.Tuple, cst.List)):
            parts = value.items if isinstance(value, Items) and len(value.items) == len(target.elements) else None
            for position, item in enumerate(target.elements):
                part = parts[position] if parts else (GIVEN if isinstance(value, Given) else element(value))
                self.assign(item.value, part, env)
        elif isinstance(target, cst.Subscript):
            self._filled(target.value, env, ListOf(value))
        elif (name := tree.self_attribute(target)) is not None and isinstance(env.get("self"), Instance):
            spec = env["self"].spec  # type: ignore[union-attr]
            self._store(spec, name, value, env)
            for instance in _instances(value):
                instance.spec.slots.add((spec.qualified, name))

    def _store(self, spec: Spec, name: str, value: Value, env: Env) -> None:
        """Bind an attribute: in a constructor along the flow of control, elsewhere for good."""
        if CONSTRUCTING in env:
            env[f"self.{name}"] = value
        elif name in spec.attributes:
            spec.attributes[name] = join(spec.attributes[name], value)
        else:
            spec.attributes[name] = value

    def construct(self, spec: Spec) -> None:
        """Run a constructor with the joined arguments of its sites and keep the attributes it leaves."""
        function = spec.method("__init__")
        if function is None:
            return
        env: Env = {"self": Instance(spec), CONSTRUCTING: GIVEN}
        for param in tree.own_parameters(function):
            label = param.name.value
            if label not in spec.init:
                spec.init[label] = self.eval(param.default, {}) if param.default is not None else GIVEN
            env[label] = spec.init[label]
        if isinstance(function.params.star_kwarg, cst.Param):
            env[function.params.star_kwarg.name.value] = Empty()
        flow = self.block(tree.body(function), env)
        final = flow.env or env
        spec.unset = {name[11:] for name in final if name.startswith("unset:self.")}
        spec.attributes = {name[5:]: value for name, value in final.items() if name.startswith("self.")}

    # -- tests and narrowing -----------------------------------------------------------------------------------------
    def test(self, node: cst.BaseExpression, env: Env) -> bool | None:
        return truth(self.eval(node, env))

    def narrowed(self, node: cst.BaseExpression, env: Env, outcome: bool) -> Env:
        """`env` where `node` is known to be true or false."""
        env = dict(env)
        if isinstance(node, cst.UnaryOperation) and isinstance(node.operator, cst.Not):
            return self.narrowed(node.expression, env, not outcome)
        if isinstance(node, cst.BooleanOperation):
            both = isinstance(node.operator, cst.And) == outcome
            return self.narrowed(node.right, self.narrowed(node.left, env, outcome), outcome) if both else env
        if isinstance(node, cst.Name) and outcome and isinstance(env.get(node.value), Top):
            env[node.value] = GIVEN
        if isinstance(node, cst.Comparison) and len(node.comparisons) == 1 and isinstance(node.left, cst.Name):
            operator, right = node.comparisons[0].operator, self.eval(node.comparisons[0].comparator, env)
            positive = isinstance(operator, (cst.Is, cst.Equal)) == outcome
            if isinstance(operator, (cst.Is, cst.IsNot, cst.Equal, cst.NotEqual)) and isinstance(right, Const):
                if positive:
                    env[node.left.value] = right
                elif right == NONE and isinstance(env.get(node.left.value), Top):
                    env[node.left.value] = GIVEN
        return env

    # -- expressions -------------------------------------------------------------------------------------------------
    def eval(self, node: cst.BaseExpression, env: Env) -> Value:
        handler = _HANDLERS.get(type(node))
        return handler(self, node, env) if handler else GIVEN

    def _name(self, node: cst.Name, env: Env) -> Value:
        if node.value in env:
            value = env[node.value]
            self.record.see_value(node, value)
            return value
        if node.value in operators.LITERALS:
            return operators.LITERALS[node.value]
        name = qualified(node.value)
        if name is not None and name in self.outcomes:
            return Const(self.outcomes[name])
        return Ref(name.rstrip(".")) if name else Ref(node.value) if node.value in operators.BUILTIN_CALLS else TOP

    def _attribute(self, node: cst.Attribute, env: Env) -> Value:
        owner, name = self.eval(node.value, env), node.attr.value
        if isinstance(node.value, cst.Name) and node.value.value == "self" and f"self.{name}" in env:
            value = env[f"self.{name}"]
            self.record.see_value(node, value)
            return value
        if isinstance(owner, Instance):
            spec = owner.spec
            if name == "config" and "config" not in spec.attributes:
                return Bound(owner, "config")
            if name in spec.attributes:
                value = spec.attributes[name]
                self.record.see_value(node, value)
                return value
            constant = spec.class_attribute(name)
            if constant is not None:
                return self.eval(constant, {})
            if spec.method(name) is not None:
                return Bound(owner, name)
            return operators.inherited_attribute(spec, name)
        if isinstance(owner, Bound) and owner.name == "config" and isinstance(owner.owner, Instance):
            value = owner.owner.spec.init.get(name, TOP)
            self.record.see_value(node, value)
            return value
        if isinstance(owner, Ref):
            return Ref(f"{owner.name}.{name}")
        if isinstance(owner, (Top, Empty, Items, ListOf, Opaque, OneOf)):
            return Bound(owner, name) if not isinstance(owner, Top) else TOP
        return Bound(owner, name) if name in operators.TENSOR_METHODS_WITH_NONE else GIVEN

    def _call(self, node: cst.Call, env: Env) -> Value:
        func = self.eval(node.func, env)
        if isinstance(func, Ref):
            return self._call_global(node, func.name, env)
        if isinstance(func, Bound):
            return self._call_bound(node, func, env)
        if isinstance(func, Instance):
            return self._call_instance(node, func.spec, "forward", env)
        if isinstance(func, OneOf) and len(func.options) == 1 and isinstance(func.options[0], Instance):
            return self._call_instance(node, func.options[0].spec, "forward", env)
        if isinstance(func, OneOf):
            results = [self._call_instance(node, o.spec, "forward", env) if isinstance(o, Instance) else GIVEN
                       for o in func.options]  # fmt: skip
            self.record.calls.pop(id(node), None)
            self.record.choices[id(node)] = tuple(o.spec for o in func.options if isinstance(o, Instance))
            return _joined(results, None)
        self._arguments(node, None, env)
        if isinstance(func, Items):  # a Sequential calls its elements in turn
            for item in func.items:
                for option in options(item):
                    if isinstance(option, Instance):
                        self._call_in_turn(option.spec)
            return GIVEN
        if isinstance(func, Opaque):
            return GIVEN
        return GIVEN if isinstance(func, Given) else TOP

    def _call_in_turn(self, spec: Spec) -> None:
        function = spec.method("forward")
        if function is not None:
            first = [p.name.value for p in tree.own_parameters(function)[:1]]
            self.call_method(spec, "forward", dict.fromkeys(first, GIVEN))

    def _call_instance(self, node: cst.Call, spec: Spec, name: str, env: Env) -> Value:
        function = spec.method(name)
        if function is None:
            self._arguments(node, None, env)
            return TOP
        labels = [p.name.value for p in tree.own_parameters(function)]
        arguments = self._arguments(node, labels, env)
        hidden = any(a.star and not self.record.empty_stars.get(id(a), False) for a in node.args)
        spec.variadic = spec.variadic or hidden
        self.record.calls[id(node)] = (spec, name)
        if arguments is None:
            return TOP
        own = env.get("self")
        inside = CONSTRUCTING in env and isinstance(own, Instance) and own.spec is spec
        return self.call_method(spec, name, arguments, env if inside else None)

    def _call_bound(self, node: cst.Call, func: Bound, env: Env) -> Value:
        if isinstance(func.owner, Instance):
            return self._call_instance(node, func.owner.spec, func.name, env)
        args = [self.eval(a.value, env) for a in node.args]
        if isinstance(func.owner, (Items, ListOf, Empty)) and func.name in ("append", "extend", "insert") and args:
            self._extend(node, func, args[-1], env)
            return NONE
        if isinstance(func.owner, Empty) and func.name in ("update", "setdefault", "add"):
            self._filled(node.func, env)
            return TOP if func.name == "setdefault" else NONE
        if isinstance(func.owner, Empty) and func.name in ("get", "pop"):
            return args[1] if len(args) > 1 else NONE
        if isinstance(func.owner, Empty) and func.name in ("copy", "items", "keys", "values"):
            return Empty()
        known = not isinstance(func.owner, Top) and func.name not in operators.TENSOR_METHODS_WITH_NONE
        return GIVEN if known else TOP

    def _extend(self, node: cst.Call, func: Bound, value: Value, env: Env) -> None:
        """`self.layers.append(x)`: the attribute's value grows."""
        assert isinstance(node.func, cst.Attribute)
        target = node.func.value
        old = Items(()) if isinstance(func.owner, Empty) else func.owner
        if isinstance(func.owner, Empty):  # a list that was empty: in a loop, any number of elements
            old = ListOf(value)
        if isinstance(old, Items) and func.name == "append":
            new: Value = Items((*old.items, value))
        else:
            item = element(value) if func.name == "extend" else value
            new = ListOf(item if isinstance(old, Items) and not old.items else join(element(old), item))
        name = tree.self_attribute(target)
        if name is not None and isinstance(env.get("self"), Instance):
            spec = env["self"].spec  # type: ignore[union-attr]
            if CONSTRUCTING in env:
                env[f"self.{name}"] = new
            else:
                spec.attributes[name] = new
            for instance in _instances(value):
                instance.spec.slots.add((spec.qualified, name))
        elif isinstance(target, cst.Name):
            env[target.value] = new

    def _filled(self, target: cst.BaseExpression, env: Env, content: Value = GIVEN) -> None:
        """An empty dict or list got content; what a key leads to is not kept apart."""
        while isinstance(target, (cst.Attribute, cst.Subscript)) and tree.self_attribute(target) is None:
            target = target.value
        name = target.value if isinstance(target, cst.Name) else f"self.{tree.self_attribute(target)}"
        old = env.get(name)
        if isinstance(old, Empty):
            env[name] = content
        elif isinstance(old, ListOf) and isinstance(content, ListOf):
            env[name] = join(old, content)

    def _call_global(self, node: cst.Call, name: str, env: Env) -> Value:
        if name in ("hasattr", "getattr") and len(node.args) >= 2:
            return self._reflect(node, name, env)
        if name in operators.BUILTIN_CALLS:
            return operators.BUILTIN_CALLS[name](self, [self.eval(a.value, env) for a in node.args])
        if name in ("torch.nn.ModuleList", "torch.nn.ModuleDict"):
            value = self.eval(node.args[0].value, env) if node.args else Items(())
            return Items(()) if isinstance(value, Empty) else value
        if name == "torch.nn.Sequential":
            return Items(tuple(self.eval(a.value, env) for a in node.args if not a.star))
        if name.startswith(("torch.", "math.", "numpy.")):
            self._arguments(node, None, env)
            return operators.torch_call(name)
        return self.build(node, name, lambda labels: self._arguments(node, labels, env), self)

    def _arguments(self, node: cst.Call, labels: list[str] | None, env: Env) -> dict[str, Value] | None:
        """Evaluate every argument; bind them if `labels` are given. None if * or ** hide something."""
        bound: dict[str, Value] = {}
        hidden = False
        for position, arg in enumerate(node.args):
            value = self.eval(arg.value, env)
            self.record.see_value(arg.value, value)
            if arg.star:
                empty = isinstance(value, Empty) or value == NONE
                self.record.empty_stars[id(arg)] = empty and self.record.empty_stars.get(id(arg), True)
                hidden = hidden or not empty
            elif arg.keyword is not None:
                bound[arg.keyword.value] = value
            elif labels is not None and position < len(labels):
                bound[labels[position]] = value
            else:
                hidden = hidden or labels is not None
        if hidden and labels is not None:
            for label in labels:
                bound.setdefault(label, TOP)
        return bound

    def _reflect(self, node: cst.Call, name: str, env: Env) -> Value:
        owner = self.eval(node.args[0].value, env)
        label = self.eval(node.args[1].value, env)
        if isinstance(owner, Instance) and isinstance(label, Const):
            spec, text = owner.spec, str(label.value)
            present = (
                f"self.{text}" in env
                or text in spec.attributes
                or spec.class_attribute(text) is not None
                or spec.method(text) is not None
            )
            if f"unset:self.{text}" in env or text in spec.unset:
                return TOP
            if name == "hasattr":
                return Const(present) if present or not operators.may_be_set_elsewhere(text) else TOP
            if present:
                return env.get(f"self.{text}", spec.attributes.get(text, GIVEN))
            return self.eval(node.args[2].value, env) if len(node.args) > 2 else TOP
        if isinstance(owner, Ref) and name == "hasattr":
            return Const(True) if owner.name.startswith("torch") else TOP
        return TOP

    def _binary(self, node: cst.BinaryOperation, env: Env) -> Value:
        return operators.arithmetic(node.operator, self.eval(node.left, env), self.eval(node.right, env))

    def _boolean(self, node: cst.BooleanOperation, env: Env) -> Value:
        left = self.eval(node.left, env)
        known = truth(left)
        self.record.see_truth(node.left, known)
        is_and = isinstance(node.operator, cst.And)
        if known is not None and known != is_and:
            return left
        right = self.eval(node.right, self.narrowed(node.left, env, is_and))
        self.record.see_truth(node.right, truth(right))
        if known is not None:
            return right
        return right if is_and and truth(right) is False else Const(True) if not is_and and truth(right) is True \
            and isinstance(right, Const) else join(left, right)  # fmt: skip

    def _unary(self, node: cst.UnaryOperation, env: Env) -> Value:
        value = self.eval(node.expression, env)
        if isinstance(node.operator, cst.Not):
            known = truth(value)
            return GIVEN if known is None else Const(not known)
        if isinstance(node.operator, cst.Minus) and isinstance(value, Const) and isinstance(value.value, (int, float)):
            return Const(-value.value)
        return GIVEN

    def _comparison(self, node: cst.Comparison, env: Env) -> Value:
        left = self.eval(node.left, env)
        if len(node.comparisons) != 1:
            for each in node.comparisons:
                self.eval(each.comparator, env)
            return GIVEN
        right = self.eval(node.comparisons[0].comparator, env)
        return operators.compare(node.comparisons[0].operator, left, right)

    def _conditional(self, node: cst.IfExp, env: Env) -> Value:
        outcome = self.test(node.test, env)
        self.record.see_truth(node.test, outcome)
        values = []
        if outcome is not False:
            values.append(self.eval(node.body, self.narrowed(node.test, env, True)))
        if outcome is not True:
            values.append(self.eval(node.orelse, self.narrowed(node.test, env, False)))
        return _joined(values, None)

    def _sequence(self, node: cst.Tuple | cst.List, env: Env) -> Value:
        if not node.elements:
            return Empty() if isinstance(node, cst.List) else Items(())
        if any(isinstance(e, cst.StarredElement) for e in node.elements):
            return ListOf(_joined([element(self.eval(e.value, env)) for e in node.elements], None))
        return Items(tuple(self.eval(e.value, env) for e in node.elements))

    def _dict(self, node: cst.Dict, env: Env) -> Value:
        for item in node.elements:
            self.eval(item.value, env)
        return GIVEN if node.elements else Empty()

    def _comprehension(self, node: cst.ListComp | cst.GeneratorExp | cst.SetComp, env: Env) -> Value:
        inner = dict(env)
        loop: cst.CompFor | None = node.for_in
        while loop is not None:
            self.assign(loop.target, self._iterated(loop.iter, inner), inner)
            for condition in loop.ifs:
                self.eval(condition.test, inner)
            loop = loop.inner_for_in
        return ListOf(self.eval(node.elt, inner))

    def _subscript(self, node: cst.Subscript, env: Env) -> Value:
        owner = self.eval(node.value, env)
        for each in node.slice:
            if isinstance(each.slice, cst.Index):
                index = self.eval(each.slice.value, env)
                if isinstance(owner, Items) and isinstance(index, Const) and isinstance(index.value, int):
                    if -len(owner.items) <= index.value < len(owner.items):
                        return owner.items[index.value]
        if isinstance(owner, (Items, ListOf)):
            return element(owner) if isinstance(node.slice[0].slice, cst.Index) else owner
        return GIVEN if isinstance(owner, (Given, Bound)) else TOP

    def _walrus(self, node: cst.NamedExpr, env: Env) -> Value:
        value = self.eval(node.value, env)
        self.assign(node.target, value, env)
        return value

    def _number(self, node: cst.Integer | cst.Float | cst.SimpleString, env: Env) -> Value:
        return Const(tree.literal_value(node.value))


_HANDLERS: dict[type, Callable[..., Value]] = {
    cst.Name: Interpreter._name, cst.Attribute: Interpreter._attribute, cst.Call: Interpreter._call,
    cst.BinaryOperation: Interpreter._binary, cst.BooleanOperation: Interpreter._boolean,
    cst.UnaryOperation: Interpreter._unary, cst.Comparison: Interpreter._comparison, cst.IfExp: Interpreter._conditional,
    cst.Tuple: Interpreter._sequence, cst.List: Interpreter._sequence, cst.Dict: Interpreter._dict,
    cst.ListComp: Interpreter._comprehension, cst.GeneratorExp: Interpreter._comprehension,
    cst.SetComp: Interpreter._comprehension, cst.Subscript: Interpreter._subscript, cst.NamedExpr: Interpreter._walrus,
    cst.Integer: Interpreter._number, cst.Float: Interpreter._number, cst.SimpleString: Interpreter._number,
}  # fmt: skip


def _hashable(value: Value) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _instances(value: Value) -> list[Instance]:
    if isinstance(value, (Instance, OneOf)):
        return [o for o in options(value) if isinstance(o, Instance)]
    if isinstance(value, Items):
        return [i for v in value.items for i in _instances(v)]
    return _instances(value.item) if isinstance(value, ListOf) else []


def _joined(values: list[Value], default: Value | None) -> Value:
    every = [*values, *([default] if default is not None else [])]
    if not every:
        return TOP
    result = every[0]
    for each in every[1:]:
        result = join(result, each)
    return result


def _join_envs(envs: list[Env]) -> Env:
    """What is known after control comes together. Reading a name that one path leaves unbound is an error in the source,
    so only paths that bind it count; for attributes it is remembered that they may be unset (`hasattr` asks)."""
    result: Env = {}
    for name in dict.fromkeys(n for e in envs for n in e):
        values = [e[name] for e in envs if name in e]
        result[name] = _joined(values, None)
        if len(values) < len(envs) and name.startswith("self."):
            result[f"unset:{name}"] = TOP
    return result
