"""Following a forward with a flow in place of each tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import libcst as cst
from msgspec.structs import replace

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
    broadcast_axes,
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
                                "torch.sigmoid", "torch.relu", "torch.tanh",
"torch.nn.functional.dropout", "torch.chunk"})  # fmt: skip
_ELEMENTWISE_MODULES = frozenset({"torch.nn.GELU", "torch.nn.SiLU", "torch.nn.ReLU", "torch.nn.Dropout", "torch.nn.Identity",
                                  "torch.nn.Mish", "torch.nn.Sigmoid", "torch.nn.Tanh",
                                  "diffusers.models.activations.get_activation"})  # fmt: skip


@dataclass
class Analysis:
    classes: Mapping[str, ClassModules]
    assumed: Mapping[str, bool]
    blocks: Mapping[Linear, str] = field(default_factory=dict)
    sites: dict[int, AttentionSite] = field(default_factory=dict)
    consumers: dict[Linear, list[Flow]] = field(default_factory=dict)
    summaries: dict[str, Shape] = field(default_factory=dict)
    norms: dict[Linear, list[Flow]] = field(default_factory=dict)
    spoiled: set[Linear] = field(default_factory=set)
    escaped_attention: set[int] = field(default_factory=set)
    reads: dict[Linear, list[cst.BaseExpression]] = field(default_factory=dict)
    chunks: dict[Linear, frozenset[int]] = field(default_factory=dict)
    optional: dict[Linear, cst.If] = field(default_factory=dict)
    tables: dict[int, tuple[str, frozenset[Linear], cst.BaseExpression]] = field(default_factory=dict)


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
        self.halves: set[str] = set()
        init = tree.method(self.modules.definition.node, "__init__")
        self.parameters = {
            tree.self_attribute(a.targets[0].target)
            for a in (tree.find(init, cst.Assign) if init is not None else ())
            if any((tree.call_name(c) or "").endswith("Parameter") for c in tree.find(a.value, cst.Call))
        } - {None}

    def run(self) -> None:
        forward = tree.method(self.modules.definition.node, "forward")
        self.a.summaries[self.name] = WHOLE if forward is None else self.method(forward)

    def method(self, function: cst.FunctionDef, given: Mapping[str, Shape] | None = None) -> Shape:
        """What a function returns; parameters that are not given are whole."""
        env: dict[str, Shape] = dict(given or {})
        returned: list[Shape] = []
        self.block(tree.body(function), env, returned)
        return union(returned)

    def inline(self, function: cst.FunctionDef, node: cst.Call, values: list[Shape], env: dict[str, Shape]) -> Shape:
        """A call of a function defined in the forward."""
        names = [p.name.value for p in tree.parameters(function)]
        given = dict(env)
        given.update(dict.fromkeys(names, WHOLE))
        for position, (arg, value) in enumerate(zip(node.args, values, strict=True)):
            taken = names[position:] if arg.star else names[position : position + 1]
            given.update(dict.fromkeys([arg.keyword.value] if arg.keyword is not None else taken, value))
        result = self.method(function, given)
        passed = pass_through(values)
        return passed if as_flow(result).whole and not passed.whole else result

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
                        self.bind(target.target, _by_position(target.target, small.value, value, env), env)
                    self.note_half(small)
                elif isinstance(small, cst.AugAssign):
                    self.bind(small.target, self.arithmetic(small.target, small.value, env), env)
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
            if (optional := self.optional(stmt, env)) is not None:
                other[optional] = WHOLE
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

    def optional(self, stmt: cst.If, env: dict[str, Shape]) -> str | None:
        """`if self.proj is not None: x = self.proj(x)` over attention: without the projection, x is gathered."""
        projected = optional_projection(stmt)
        if projected is None or not as_flow(env.get(projected[1], WHOLE)).attention:
            return None
        if not any(s.is_linear for s in self.modules.at(projected[0])):
            return None
        self.a.optional[self.name, projected[0]] = stmt
        return projected[1]

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
        if not isinstance(small, cst.Assign) or not isinstance(small.value, cst.Call) or len(small.value.args) != 1:
            return False
        if not tree.same(small.value.func, stmt.target):
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
        if isinstance(node, cst.Call):
            return self.call(node, env)
        if isinstance(node, (cst.Tuple, cst.List)):
            return tuple(self.eval(e.value, env) for e in node.elements)
        if isinstance(node, cst.Subscript):
            value = self.eval(node.value, env)
            return self.slice(node, value) if isinstance(value, Flow) else union(list(value))
        if isinstance(node, cst.BinaryOperation):
            return self.arithmetic(node.left, node.right, env)
        if isinstance(node, cst.UnaryOperation):
            return self.eval(node.expression, env)
        if isinstance(node, cst.IfExp):
            return union([self.eval(node.body, env), self.eval(node.orelse, env)])
        if isinstance(node, (cst.Comparison, cst.BooleanOperation, cst.SimpleString, cst.Integer, cst.Float)):
            return WHOLE
        return union([self.eval(c, env) for c in tree.children(node) if isinstance(c, cst.BaseExpression)])

    def arithmetic(self, left: cst.BaseExpression, right: cst.BaseExpression, env: dict[str, Shape]) -> Flow:
        """Of two tensors. Attention that meets a whole tensor before a linear sums it is not sharded."""
        first, second = as_flow(self.eval(left, env)), as_flow(self.eval(right, env))
        axes = broadcast_axes(left if first.whole else right) if first.whole != second.whole else 0
        result = combine(first, second, _is_number(left) or _is_number(right), axes)
        if result.mixed:
            self.a.escaped_attention |= result.attention
            return self.spoil(result)
        return result

    def slice(self, node: cst.Subscript, value: Flow) -> Flow:
        """A part of a tensor; of the last dimension only halves are known, which are two outputs side by side."""
        last = node.slice[-1].slice
        cut = len(node.slice) == 2 and tree.code(node.slice[0].slice) == "..." and isinstance(last, cst.Slice)
        if not cut or value.split or value.whole:
            return value
        assert isinstance(last, cst.Slice)
        bounds = [tree.code(b) for b in (last.lower, last.upper) if b is not None]
        if len(bounds) == 1 and bounds[0] in self.halves and last.step is None:
            self.side_by_side(value, 2)
            return value
        return replace(value, tainted=True)

    def note_half(self, node: cst.Assign) -> None:
        """`half = x.shape[-1] // 2`."""
        target = node.targets[0].target
        if isinstance(target, cst.Name):
            self.halves.discard(target.value)
            halved = isinstance(node.value, cst.BinaryOperation) and isinstance(node.value.operator, cst.FloorDivide)
            if halved and tree.code(node.value).endswith(".shape[-1] // 2"):
                self.halves.add(target.value)

    def side_by_side(self, value: Flow, count: int) -> None:
        """The linears of the flow compute `count` outputs side by side, unless the model says more about them."""
        for linear in value.linears - set(self.a.blocks):
            self.a.chunks[linear] = self.a.chunks.get(linear, frozenset()) | {count}

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
        if name == "torch.split" and as_flow(values[0]).linears and as_flow(values[0]).linears <= set(self.a.blocks):
            return values[0]
        if name == "torch.chunk" and values:
            self.note_chunks(node.args[1:], as_flow(values[0]))
        function = self.local.get(node.func.value) if isinstance(node.func, cst.Name) else None
        if function is not None:
            return self.inline(function, node, values, env)
        if name == "map" and isinstance(node.args[0].value, cst.Name) and node.args[0].value.value in self.local:
            items = values[1] if isinstance(values[1], tuple) else (values[1],)
            mapped = self.local[node.args[0].value.value]
            one = node.with_changes(args=node.args[1:2])
            found = tuple(self.inline(mapped, one, [v], env) for v in items)
            return found if isinstance(values[1], tuple) else found[0]
        if isinstance(node.func, cst.Attribute):
            helper = tree.self_attribute(node.func)
            if helper is not None:
                method = tree.method(self.modules.definition.node, helper)
                if method is not None:
                    return pass_through(values)
            owner = as_flow(self.eval(node.func.value, env))
            if node.func.attr.value == "chunk":
                self.note_chunks(node.args, owner)
            elif node.func.attr.value == "reshape" and len(node.args) == 5 and not owner.split:
                self.note_stacked(node, owner)
            result = method_call(node, owner, [as_flow(v) for v in values])
            return result if isinstance(result, Flow) and result.elementwise else self.spoil(as_flow(result))
        result = pass_through(values)
        if name in _ELEMENTWISE_CALLS:
            return result
        if name == "torch.lerp" and len(values) == 3 and as_flow(values[2]).whole:
            return self.spoil(combine(as_flow(values[0]), as_flow(values[1])))
        if self.turns_all_heads(node, name, values):
            return self.spoil(as_flow(values[0]))
        if result.linears and not result.split and any(as_flow(v).whole for v in values):
            # A function of an unsplit projection and another tensor (rotary tables as wide as all heads, say).
            result = replace(result, tainted=True)
        return self.spoil(result)

    def turns_all_heads(self, node: cst.Call, name: str | None, values: list[Shape]) -> bool:
        """`apply_rotary_emb(query, tables)` on a projection that is not split into heads: the tables are as wide as all heads,
        and each rank needs its share of them."""
        if name is None or "rotary" not in name.rpartition(".")[2] or len(values) != 2:
            return False
        states, tables = as_flow(values[0]), as_flow(values[1])
        if states.split or not states.linears or not tables.whole or tables.tainted:
            return False
        self.a.tables[id(node)] = (self.name, states.linears, node.args[1].value)
        return True

    def note_chunks(self, args: Sequence[cst.Arg], owner: Flow) -> None:
        """`self.proj(x).chunk(n, dim=-1)`: the linear's output is n outputs side by side."""
        if owner.split or not args or not isinstance(args[0].value, cst.Integer):
            return
        dim = next((tree.code(a.value) for a in args[1:]), "0")
        if dim in ("-1", "2"):
            self.side_by_side(owner, int(args[0].value.value))

    def note_stacked(self, node: cst.Call, owner: Flow) -> None:
        """`self.proj(x).reshape(batch, length, n, heads, size)`: n outputs side by side, each of all heads."""
        count, heads = node.args[2].value, node.args[3].value
        if isinstance(count, cst.Integer) and not isinstance(heads, cst.Integer):
            self.side_by_side(owner, int(count.value))

    def is_norm(self, cls: str) -> bool:
        """Whether a class of the unit acts on its input alone: it holds neither linears nor other classes of the unit."""
        sites = [s for found in self.a.classes[cls].sites.values() for s in found]
        return not any(s.is_linear or s.cls in self.a.classes for s in sites)

    def elementwise(self, cls: str) -> cst.FunctionDef | None:
        """The forward of a class of the unit that holds no parameters and acts on each element of its input alone."""
        other = Follower(Analysis(self.a.classes, self.a.assumed, self.a.blocks), cls)
        forward = tree.method(other.modules.definition.node, "forward")
        if forward is None or other.parameters or len(tree.parameters(forward)) != 2:
            return None
        probe = Flow(linears=frozenset({("", "")}))
        result = other.method(forward, {tree.parameters(forward)[1].name.value: probe})
        fine = isinstance(result, Flow) and result.linears and result.elementwise and not result.mixed
        return forward if fine and not result.tainted and not other.a.spoiled else None  # type: ignore[union-attr]

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
        return Flow(attention=frozenset({id(node)}), split=True, heads_first=ATTENTION_CALLS[name] == "bhsd")

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
        if site.cls in self.a.summaries and not value.whole and (forward := self.elementwise(site.cls)) is not None:
            name = tree.parameters(forward)[1].name.value
            return Follower(self.a, site.cls).method(forward, {name: value})
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


def _by_position(
    target: cst.BaseAssignTargetExpression, value: cst.BaseExpression, result: Shape, env: Mapping[str, Shape]
) -> Shape:
    """`query, key = f(query, key, ...)`: each result comes from the argument of its name."""
    if not isinstance(target, cst.Tuple) or not isinstance(value, cst.Call) or not isinstance(result, Flow):
        return result
    names = [tree.code(e.value) for e in target.elements]
    if not isinstance(value.func, cst.Name) or [tree.code(a.value) for a in value.args[: len(names)]] != names:
        return result
    sources = [as_flow(env.get(n, WHOLE)) for n in names]
    return tuple(replace(result, linears=s.linears, attention=s.attention) for s in sources)


def optional_projection(stmt: cst.If) -> tuple[str, str] | None:
    """(attribute, variable) of `if self.attribute is not None: variable = self.attribute(variable)`."""
    body = tree.body(stmt)
    small = body[0].body[0] if len(body) == 1 and isinstance(body[0], cst.SimpleStatementLine) else None
    if stmt.orelse is not None or not isinstance(small, cst.Assign) or not isinstance(small.value, cst.Call):
        return None
    attribute = tree.self_attribute(small.value.func)
    variable = tree.code(small.targets[0].target)
    if attribute is None or [tree.code(a.value) for a in small.value.args] != [variable]:
        return None
    tests = (f"self.{attribute} is not None", f'getattr(self, "{attribute}", None) is not None')
    return (attribute, variable) if tree.code(stmt.test) in tests else None


def declared_blocks(classes: Mapping[str, ClassModules], kind: str) -> dict[Linear, str]:
    """What a model says about the blocks of a linear: `self.proj._tp_packed_col_blocks = [...]`, as text. `kind` is
    `col` or `row`."""
    found: dict[Linear, str] = {}
    for name, modules in classes.items():
        init = tree.method(modules.definition.node, "__init__")
        for assign in tree.find(init, cst.Assign) if init is not None else ():
            target = assign.targets[0].target
            if isinstance(target, cst.Attribute) and target.attr.value == f"_tp_packed_{kind}_blocks":
                attribute = tree.self_attribute(target.value)
                if attribute is not None:
                    found[name, attribute] = tree.code(assign.value)
    return found


def flag_test(test: cst.BaseExpression) -> tuple[str, bool] | None:
    """(attribute, value) for a test `self.x` or `not self.x`."""
    negated = isinstance(test, cst.UnaryOperation) and isinstance(test.operator, cst.Not)
    attribute = tree.self_attribute(test.expression if isinstance(test, cst.UnaryOperation) else test)
    return (attribute, not negated) if attribute is not None else None
