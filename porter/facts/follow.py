"""Following a forward with a flow in place of each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import libcst as cst

from porter.facts.flow import (
    NOTHING,
    PARAMETER,
    SHAPE_ONLY,
    WHOLE,
    AttentionSite,
    Flow,
    Linear,
    Shape,
    as_flow,
    combine,
    concatenate,
    method_call,
    pass_through,
    union,
)
from porter.facts.module_tree import ClassModules, ModuleSite
from porter.source import tree
from porter.source.names import qualified

ATTENTION_CALLS = {
    "diffusers.models.attention_dispatch.dispatch_attention_fn": "bshd",
    "torch.nn.functional.scaled_dot_product_attention": "bhsd",
}
_ELEMENTWISE_CALLS = frozenset({"torch.nn.functional.gelu", "torch.nn.functional.silu", "torch.nn.functional.relu",
                                "torch.sigmoid", "torch.tanh", "torch.nn.functional.dropout", "torch.chunk"})  # fmt: skip
_ELEMENTWISE_MODULES = frozenset({"torch.nn.GELU", "torch.nn.SiLU", "torch.nn.ReLU", "torch.nn.Dropout", "torch.nn.Identity",
                                  "torch.nn.Mish", "torch.nn.Sigmoid", "torch.nn.Tanh",
                                  "diffusers.models.activations.get_activation"})  # fmt: skip


@dataclass
class Analysis:
    classes: Mapping[str, ClassModules]
    assumed: Mapping[str, bool]
    sites: dict[int, AttentionSite] = field(default_factory=dict)
    consumers: dict[Linear, list[Flow]] = field(default_factory=dict)
    summaries: dict[str, Shape] = field(default_factory=dict)
    norms: dict[Linear, list[Flow]] = field(default_factory=dict)
    spoiled: set[Linear] = field(default_factory=set)
    escaped_attention: set[int] = field(default_factory=set)
    reads: dict[Linear, list[cst.BaseExpression]] = field(default_factory=dict)
    chunks: dict[Linear, int] = field(default_factory=dict)


def escape(a: Analysis, value: Shape) -> None:
    if isinstance(value, tuple):
        for each in value:
            escape(a, each)
    else:
        a.spoiled |= value.linears
        a.escaped_attention |= value.attention


class Follower:
    """Follows one class's forward."""

    def __init__(self, analysis: Analysis, name: str) -> None:
        self.a = analysis
        self.name = name
        self.modules = analysis.classes[name]
        self.local: dict[str, cst.FunctionDef] = {}
        init = tree.method(self.modules.definition.node, "__init__")
        self.parameters = {
            tree.self_attribute(a.targets[0].target)
            for a in (tree.find(init, cst.Assign) if init is not None else ())
            if any((tree.call_name(c) or "").endswith("Parameter") for c in tree.find(a.value, cst.Call))
        } - {None}

    def run(self) -> None:
        forward = tree.method(self.modules.definition.node, "forward")
        self.a.summaries[self.name] = WHOLE if forward is None else self.method(forward)

    def method(self, function: cst.FunctionDef) -> Shape:
        env: dict[str, Shape] = {}
        returned: list[Shape] = []
        self.block(tree.body(function), env, returned)
        return union(returned)

    def block(self, stmts: list[cst.BaseStatement], env: dict[str, Shape], returned: list[Shape]) -> None:
        for stmt in stmts:
            self.statement(stmt, env, returned)

    def statement(self, stmt: cst.BaseStatement, env: dict[str, Shape], returned: list[Shape]) -> None:
        if isinstance(stmt, cst.SimpleStatementLine):
            for small in stmt.body:
                if isinstance(small, cst.Return):
                    returned.append(self.eval(small.value, env) if small.value is not None else WHOLE)
                elif isinstance(small, cst.Assign):
                    value = self.eval(small.value, env)
                    for target in small.targets:
                        self.bind(target.target, value, env)
                elif isinstance(small, cst.AugAssign):
                    value = combine(as_flow(self.eval(small.target, env)), as_flow(self.eval(small.value, env)))
                    self.bind(small.target, value, env)
                elif isinstance(small, cst.AnnAssign) and small.value is not None:
                    self.bind(small.target, self.eval(small.value, env), env)
                elif isinstance(small, cst.Expr):
                    self.eval(small.value, env)
        elif isinstance(stmt, cst.If) and (flag := flag_test(stmt.test)) and flag[0] in self.a.assumed:
            if self.a.assumed[flag[0]] == flag[1]:
                self.block(tree.body(stmt), env, returned)
            elif isinstance(stmt.orelse, cst.If):
                self.statement(stmt.orelse, env, returned)
            elif stmt.orelse is not None:
                self.block(tree.body(stmt.orelse), env, returned)
        elif isinstance(stmt, cst.If):
            other = dict(env)
            self.block(tree.body(stmt), env, returned)
            if isinstance(stmt.orelse, cst.If):
                self.statement(stmt.orelse, other, returned)
            elif stmt.orelse is not None:
                self.block(tree.body(stmt.orelse), other, returned)
            for name in set(env) | set(other):
                env[name] = union([e[name] for e in (env, other) if name in e])
        elif isinstance(stmt, (cst.For, cst.While, cst.With)):
            if isinstance(stmt, cst.For):
                chain = self.chain(stmt, env)
                if chain:
                    return
                self.bind(stmt.target, self.eval(stmt.iter, env), env)
            for _ in range(1 if isinstance(stmt, cst.With) else 2):
                self.block(tree.body(stmt), env, returned)
        elif isinstance(stmt, cst.FunctionDef):
            self.local[stmt.name.value] = stmt

    def chain(self, stmt: cst.For, env: dict[str, Shape]) -> bool:
        """`for module in self.net: x = module(x)`: the elements act one after the other."""
        attribute = tree.self_attribute(stmt.iter)
        if attribute is None or not isinstance(stmt.target, cst.Name):
            return False
        paths = self.modules.elements(attribute)
        if not paths or any(p.endswith("*") for p in paths):
            return False
        body = tree.body(stmt)
        small = body[0].body[0] if len(body) == 1 and isinstance(body[0], cst.SimpleStatementLine) else None
        if not isinstance(small, cst.Assign) or not isinstance(small.value, cst.Call):
            return False
        value = as_flow(self.eval(small.value.args[0].value, env))
        for path in paths:
            value = as_flow(self.apply(path, value, small.value.args[0].value))
        self.bind(small.targets[0].target, value, env)
        return True

    def bind(self, target: cst.BaseExpression, value: Shape, env: dict[str, Shape]) -> None:
        if isinstance(target, cst.Name):
            env[target.value] = value
        elif isinstance(target, (cst.Tuple, cst.List)):
            for position, item in enumerate(target.elements):
                parts = value if isinstance(value, tuple) and len(value) == len(target.elements) else None
                self.bind(item.value, parts[position] if parts is not None else as_flow(value), env)

    # -- expressions -------------------------------------------------------------------------------------------------
    def eval(self, node: cst.BaseExpression, env: dict[str, Shape]) -> Shape:
        if isinstance(node, cst.Name):
            return NOTHING if node.value == "None" else env.get(node.value, WHOLE)
        if isinstance(node, cst.Attribute):
            if tree.self_attribute(node) in self.parameters:
                return PARAMETER
            value = self.eval(node.value, env)
            return WHOLE if node.attr.value in SHAPE_ONLY else value
        if isinstance(node, (cst.Tuple, cst.List)):
            return tuple(self.eval(e.value, env) for e in node.elements)
        if isinstance(node, cst.Subscript):
            value = self.eval(node.value, env)
            return value if isinstance(value, Flow) else union(list(value))
        if isinstance(node, cst.BinaryOperation):
            result = combine(as_flow(self.eval(node.left, env)), as_flow(self.eval(node.right, env)),
                              _is_number(node.left) or _is_number(node.right))  # fmt: skip
            return self.spoil(result) if result.mixed else result
        if isinstance(node, cst.UnaryOperation):
            return self.eval(node.expression, env)
        if isinstance(node, cst.IfExp):
            return union([self.eval(node.body, env), self.eval(node.orelse, env)])
        if isinstance(node, cst.Call):
            return self.call(node, env)
        if isinstance(node, (cst.Comparison, cst.BooleanOperation, cst.SimpleString, cst.Integer, cst.Float)):
            return WHOLE
        return union([self.eval(c, env) for c in tree.children(node) if isinstance(c, cst.BaseExpression)])

    def call(self, node: cst.Call, env: dict[str, Shape]) -> Shape:
        """Value of a call: a module's, attention's, a concatenation's, or whatever its arguments are."""
        path = _module_path(node.func)
        if path is not None and (self.modules.at(path) or self.modules.elements(path)):
            values = [self.eval(a.value, env) for a in node.args]
            first = as_flow(values[0]) if values else WHOLE
            if not self.modules.at(path):  # a Sequential
                for each in self.modules.elements(path):
                    first = as_flow(self.apply(each, first, node.args[0].value))
                return first
            return self.apply(path, first, node.args[0].value if node.args else None)
        name = (qualified(node.func.value) or node.func.value) if isinstance(node.func, cst.Name) else None
        values = [self.eval(a.value, env) for a in node.args]
        if name in ATTENTION_CALLS:
            return self.attention(node, name, values)
        if name in ("torch.cat", "torch.concat"):
            return concatenate(node, values)
        if isinstance(node.func, cst.Attribute):
            helper = tree.self_attribute(node.func)
            if helper is not None:
                method = tree.method(self.modules.definition.node, helper)
                if method is not None:
                    return pass_through(values)
            owner = as_flow(self.eval(node.func.value, env))
            self.note_chunks(node, owner)
            result = method_call(node, owner, [as_flow(v) for v in values])
            return result if isinstance(result, Flow) and result.elementwise else self.spoil(as_flow(result))
        result = pass_through(values)
        if name in _ELEMENTWISE_CALLS:
            return result
        if result.linears and not result.split and any(as_flow(v).whole for v in values):
            # A function of an unsplit projection and another tensor (rotary tables as wide as all heads, say).
            result = replace(result, tainted=True)
        return self.spoil(result)

    def note_chunks(self, node: cst.Call, owner: Flow) -> None:
        """`self.proj(x).chunk(n, dim=-1)`: the linear's output is n outputs side by side."""
        assert isinstance(node.func, cst.Attribute)
        if (
            node.func.attr.value != "chunk"
            or owner.split
            or not node.args
            or not isinstance(node.args[0].value, cst.Integer)
        ):
            return
        dim = next((tree.code(a.value) for a in node.args[1:]), "0")
        if dim in ("-1", "2"):
            self.a.chunks.update(dict.fromkeys(owner.linears, int(node.args[0].value.value)))

    def is_norm(self, cls: str) -> bool:
        """Whether a class of the unit acts on its input alone: it holds neither linears nor other classes of the unit."""
        sites = [s for found in self.a.classes[cls].sites.values() for s in found]
        return not any(s.is_linear or s.cls in self.a.classes for s in sites)

    def spoil(self, flow: Flow) -> Flow:
        """Something other than an elementwise function acts on the tensor: no pair of linears may hang on it."""
        self.a.spoiled |= flow.linears
        return flow if flow.whole else replace(flow, elementwise=False, parts=())

    def attention(self, node: cst.Call, name: str, values: list[Shape]) -> Flow:
        labelled = dict(zip(("query", "key", "value"), values, strict=False))
        for arg, value in zip(node.args, values, strict=True):
            if arg.keyword is not None and arg.keyword.value in ("query", "key", "value"):
                labelled[arg.keyword.value] = value
        flows = [as_flow(labelled.get(k, WHOLE)) for k in ("query", "key", "value")]
        self.a.sites[id(node)] = AttentionSite(self.name, "forward", node, ATTENTION_CALLS[name], *flows)
        return Flow(attention=frozenset({id(node)}), split=True)

    def apply(self, path: str, value: Flow, argument: cst.BaseExpression | None) -> Shape:
        """Call of a module held by an attribute."""
        results: list[Shape] = []
        for site in self.modules.at(path):
            results.append(self._apply(site, path, value, argument))
        return union(results)

    def _apply(self, site: ModuleSite, path: str, value: Flow, argument: cst.BaseExpression | None) -> Shape:
        key = (self.name, path)
        if site.is_linear:
            if not any(value == seen for seen in self.a.consumers.setdefault(key, [])):
                self.a.consumers[key].append(value)
            if argument is not None:
                self.a.reads.setdefault(key, []).append(argument)
            return Flow(linears=frozenset({key}))
        if site.cls in self.a.summaries and (value.whole or not self.is_norm(site.cls)):
            if not value.whole:
                escape(self.a, value)
            return self.a.summaries[site.cls]
        if site.cls in self.a.summaries and not value.split:
            value = replace(value, tainted=True)  # a norm of the model's own, over all heads
        if site.cls in _ELEMENTWISE_MODULES:
            return value
        self.a.norms.setdefault(key, []).append(value)
        return self.spoil(value)


def _module_path(func: cst.BaseExpression) -> str | None:
    """`attn` for `self.attn`, `to_out.0` for `self.to_out[0]`."""
    if isinstance(func, cst.Subscript) and len(func.slice) == 1 and isinstance(func.slice[0].slice, cst.Index):
        owner = tree.self_attribute(func.value)
        index = func.slice[0].slice.value
        return f"{owner}.{index.value}" if owner and isinstance(index, cst.Integer) else None
    return tree.self_attribute(func)


def _is_number(node: cst.BaseExpression) -> bool:
    return isinstance(node, (cst.Integer, cst.Float)) or (tree.self_attribute(node) or "").endswith("scale")


def flag_test(test: cst.BaseExpression) -> tuple[str, bool] | None:
    """(attribute, value) for a test `self.x` or `not self.x`."""
    negated = isinstance(test, cst.UnaryOperation) and isinstance(test.operator, cst.Not)
    attribute = tree.self_attribute(test.expression if isinstance(test, cst.UnaryOperation) else test)
    return (attribute, not negated) if attribute is not None else None
