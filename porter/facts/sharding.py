"""Tensor-parallel roles of linears, inferred from where their results go.

A forward is followed once with a *flow* in place of each tensor: which linears it comes from, whether attention lies
between, whether the head dimension has been split off. The projections that reach an attention call as query, key or
value are column-parallel; the linear that next reads its result is row-parallel. A linear whose result passes only
elementwise functions into another linear forms such a pair, too. Whatever meets a whole tensor on the way stays
replicated: a role is inferred only where every step between is known to act on each shard alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import libcst as cst

from porter.facts.module_tree import ClassModules, ModuleSite
from porter.source import tree
from porter.source.names import qualified

Linear = tuple[str, str]
"""(class, path) of a linear."""

ATTENTION_CALLS = {
    "diffusers.models.attention_dispatch.dispatch_attention_fn": "bshd",
    "torch.nn.functional.scaled_dot_product_attention": "bhsd",
}
_SPLITTING = frozenset({"unflatten", "view", "reshape"})
_SHAPE_ONLY = frozenset({"shape", "dtype", "device", "ndim", "size", "dim"})
_ELEMENTWISE_METHODS = frozenset(
    {"to", "type_as", "float", "contiguous", "chunk", "half", "bfloat16", "clone", "sigmoid"}
)
_ELEMENTWISE_CALLS = frozenset({"torch.nn.functional.gelu", "torch.nn.functional.silu", "torch.nn.functional.relu",
                                "torch.sigmoid", "torch.tanh", "torch.nn.functional.dropout", "torch.chunk"})  # fmt: skip
_ELEMENTWISE_MODULES = frozenset({"torch.nn.GELU", "torch.nn.SiLU", "torch.nn.ReLU", "torch.nn.Dropout", "torch.nn.Identity",
                                  "torch.nn.Mish", "torch.nn.Sigmoid", "torch.nn.Tanh",
                                  "diffusers.models.activations.get_activation"})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Flow:
    """What is known of one tensor: the linears and attention sites it comes from."""

    linears: frozenset[Linear] = frozenset()
    attention: frozenset[int] = frozenset()
    split: bool = False
    elementwise: bool = True
    mixed: bool = False
    parts: tuple[Flow, ...] = ()
    tainted: bool = False

    @property
    def whole(self) -> bool:
        """Nothing in it could be sharded."""
        return not self.linears and not self.attention


WHOLE = Flow()
PARAMETER = Flow(tainted=True)
"""A parameter of the class itself: its shape may count heads, so what it meets is not sharded."""
NOTHING = Flow(split=True)
"""`None`: a variable that holds no tensor on this path."""
Shape = Flow | tuple["Shape", ...]


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One attention call: query, key and value flows, where it stands, and its layout (`bshd` or `bhsd`)."""

    owner: str
    method: str
    call: cst.Call
    layout: str
    query: Flow
    key: Flow
    value: Flow


@dataclass(frozen=True, slots=True)
class Roles:
    """Inferred roles. `across` holds norms (class, path) applied to all heads at once; `packed` the flows that a
    row-parallel linear reads side by side."""

    column: frozenset[Linear]
    row: frozenset[Linear]
    across: frozenset[Linear]
    packed: Mapping[Linear, tuple[Flow, ...]]
    attention: tuple[AttentionSite, ...]
    reads: Mapping[Linear, tuple[cst.BaseExpression, ...]]
    whole: frozenset[Linear] = frozenset()
    chunks: Mapping[Linear, int] = field(default_factory=dict)


@dataclass
class _Analysis:
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


def infer_roles(classes: Mapping[str, ClassModules], root: str) -> Roles:
    """Roles over all classes of a unit; classes are in order of use, callees first.

    A flag that several classes test (`self.context_pre_only`) has one value in all of them, so the forwards are followed
    once for each value; a role must hold in every case.
    """
    flags = _shared_flags(classes)[:3]
    runs: list[_Analysis] = []
    for values in itertools.product((True, False), repeat=len(flags)):
        analysis = _Analysis(classes, dict(zip(flags, values, strict=True)))
        for name in classes:
            _Follower(analysis, name).run()
        _escape(analysis, analysis.summaries.get(root, WHOLE))
        runs.append(analysis)
    vetoed: set[int] = set()
    while True:
        decided = [_decide(a, vetoed) for a in runs]
        found = set().union(*(v for _, v in decided))
        if found == vetoed:
            return _merged([r for r, _ in decided])
        vetoed = found


def _shared_flags(classes: Mapping[str, ClassModules]) -> list[str]:
    """Attributes tested for truth in the forwards of at least two classes."""
    seen: dict[str, set[str]] = {}
    for name, modules in classes.items():
        forward = tree.method(modules.definition.node, "forward")
        for test in tree.find(forward, cst.If) if forward is not None else ():
            flag = _flag(test.test)
            if flag is not None:
                seen.setdefault(flag[0], set()).add(name)
    return [flag for flag, owners in seen.items() if len(owners) > 1]


def _flag(test: cst.BaseExpression) -> tuple[str, bool] | None:
    """(attribute, value) for a test `self.x` or `not self.x`."""
    negated = isinstance(test, cst.UnaryOperation) and isinstance(test.operator, cst.Not)
    attribute = tree.self_attribute(test.expression if isinstance(test, cst.UnaryOperation) else test)
    return (attribute, not negated) if attribute is not None else None


def _merged(runs: list[Roles]) -> Roles:
    """Roles of all cases together. A linear read whole in one case is not row-parallel in any."""
    attention = tuple({id(s.call): s for r in runs for s in r.attention}.values())
    row = frozenset().union(*(r.row for r in runs)) - frozenset().union(*(r.whole for r in runs))
    reads: dict[Linear, tuple[cst.BaseExpression, ...]] = {}
    packed: dict[Linear, tuple[Flow, ...]] = {}
    for r in runs:
        reads.update(r.reads)
        packed.update(r.packed)
    return Roles(
        frozenset().union(*(r.column for r in runs)), row, frozenset().union(*(r.across for r in runs)),
        {k: v for k, v in packed.items() if k in row}, attention, reads,
        chunks={k: n for r in runs for k, n in r.chunks.items()},
    )  # fmt: skip


def _decide(a: _Analysis, excluded: set[int]) -> tuple[Roles, set[int]]:
    live = {s for s in a.sites if s not in a.escaped_attention} - excluded
    # Query, key and value come from known projections, and the result from a linear that sums, or nothing is sharded.
    live -= {s for s in live if not all(f.linears for f in (a.sites[s].query, a.sites[s].key, a.sites[s].value))}
    live &= {s for flows in a.consumers.values() for f in flows for part in (f, *f.parts) for s in part.attention}
    # One linear for query, key and value: its outputs must be known side by side, or a shard would mix them.
    live -= {s for s in live if any(x not in a.chunks for x in a.sites[s].query.linears & a.sites[s].key.linears)}
    live -= {s for s in live if any(f.tainted for f in (a.sites[s].query, a.sites[s].key, a.sites[s].value))}
    while vetoed := {s for flows in a.consumers.values() if not _shardable(flows, live, a)
                     for f in flows for s in f.attention & live}:  # fmt: skip
        live -= vetoed
    column = {x for s in live for f in (a.sites[s].query, a.sites[s].key, a.sites[s].value) for x in f.linears}
    fixed = frozenset(column)
    row: set[Linear] = set()
    packed: dict[Linear, tuple[Flow, ...]] = {}
    for linear, flows in a.consumers.items():
        sources = {x for f in flows for part in (f, *f.parts) for x in part.linears}
        # In a chain of linears every second one sums; its result is whole again.
        if linear in fixed or sources & row or not _shardable(flows, live, a):
            continue
        row.add(linear)
        parts = next((f.parts for f in flows if f.parts), ())
        if parts:
            packed[linear] = parts
        column |= {x for f in flows for x in f.linears} | {x for p in parts for x in p.linears}
    column -= row
    across = {norm for norm, flows in a.norms.items() if any(f.linears & column and not f.split for f in flows)}
    whole = frozenset(linear for linear in a.consumers if linear not in row)
    roles = Roles(
        frozenset(column), frozenset(row), frozenset(across), packed, tuple(a.sites.values()),
        {k: tuple(v) for k, v in a.reads.items()}, whole, dict(a.chunks),
    )  # fmt: skip
    return roles, set(a.sites) - live


def _shardable(flows: list[Flow], live: set[int], a: _Analysis) -> bool:
    """Whether a linear may read shards: every flow into it is sharded, and nothing whole was mixed in."""

    def sharded(flow: Flow) -> bool:
        if flow.tainted:
            return False
        if flow.parts:
            return all(sharded(p) for p in flow.parts)
        return (bool(flow.attention & live) and not flow.mixed) or _paired(flow, a)

    return bool(flows) and all(sharded(f) for f in flows)


def _paired(flow: Flow, a: _Analysis) -> bool:
    """Whether a linear reads only elementwise functions of other linears that nobody else reads."""
    return bool(flow.linears) and flow.elementwise and not flow.mixed and not (flow.linears & a.spoiled)


def _escape(a: _Analysis, value: Shape) -> None:
    if isinstance(value, tuple):
        for each in value:
            _escape(a, each)
    else:
        a.spoiled |= value.linears
        a.escaped_attention |= value.attention


class _Follower:
    """Follows one class's forward."""

    def __init__(self, analysis: _Analysis, name: str) -> None:
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
        return _union_all(returned)

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
                    value = _combine(_flow(self.eval(small.target, env)), _flow(self.eval(small.value, env)))
                    self.bind(small.target, value, env)
                elif isinstance(small, cst.AnnAssign) and small.value is not None:
                    self.bind(small.target, self.eval(small.value, env), env)
                elif isinstance(small, cst.Expr):
                    self.eval(small.value, env)
        elif isinstance(stmt, cst.If) and (flag := _flag(stmt.test)) and flag[0] in self.a.assumed:
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
                env[name] = _union_all([e[name] for e in (env, other) if name in e])
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
        value = _flow(self.eval(small.value.args[0].value, env))
        for path in paths:
            value = _flow(self.apply(path, value, small.value.args[0].value))
        self.bind(small.targets[0].target, value, env)
        return True

    def bind(self, target: cst.BaseExpression, value: Shape, env: dict[str, Shape]) -> None:
        if isinstance(target, cst.Name):
            env[target.value] = value
        elif isinstance(target, (cst.Tuple, cst.List)):
            for position, item in enumerate(target.elements):
                parts = value if isinstance(value, tuple) and len(value) == len(target.elements) else None
                self.bind(item.value, parts[position] if parts is not None else _flow(value), env)

    # -- expressions -------------------------------------------------------------------------------------------------
    def eval(self, node: cst.BaseExpression, env: dict[str, Shape]) -> Shape:
        if isinstance(node, cst.Name):
            return NOTHING if node.value == "None" else env.get(node.value, WHOLE)
        if isinstance(node, cst.Attribute):
            if tree.self_attribute(node) in self.parameters:
                return PARAMETER
            value = self.eval(node.value, env)
            return WHOLE if node.attr.value in _SHAPE_ONLY else value
        if isinstance(node, (cst.Tuple, cst.List)):
            return tuple(self.eval(e.value, env) for e in node.elements)
        if isinstance(node, cst.Subscript):
            value = self.eval(node.value, env)
            return value if isinstance(value, Flow) else _union_all(list(value))
        if isinstance(node, cst.BinaryOperation):
            result = _combine(_flow(self.eval(node.left, env)), _flow(self.eval(node.right, env)),
                              _is_number(node.left) or _is_number(node.right))  # fmt: skip
            return self.spoil(result) if result.mixed else result
        if isinstance(node, cst.UnaryOperation):
            return self.eval(node.expression, env)
        if isinstance(node, cst.IfExp):
            return _union_all([self.eval(node.body, env), self.eval(node.orelse, env)])
        if isinstance(node, cst.Call):
            return self.call(node, env)
        if isinstance(node, (cst.Comparison, cst.BooleanOperation, cst.SimpleString, cst.Integer, cst.Float)):
            return WHOLE
        return _union_all([self.eval(c, env) for c in tree.children(node) if isinstance(c, cst.BaseExpression)])

    def call(self, node: cst.Call, env: dict[str, Shape]) -> Shape:
        """Value of a call: a module's, attention's, a concatenation's, or whatever its arguments are."""
        path = _module_path(node.func)
        if path is not None and (self.modules.at(path) or self.modules.elements(path)):
            values = [self.eval(a.value, env) for a in node.args]
            first = _flow(values[0]) if values else WHOLE
            if not self.modules.at(path):  # a Sequential
                for each in self.modules.elements(path):
                    first = _flow(self.apply(each, first, node.args[0].value))
                return first
            return self.apply(path, first, node.args[0].value if node.args else None)
        name = (qualified(node.func.value) or node.func.value) if isinstance(node.func, cst.Name) else None
        values = [self.eval(a.value, env) for a in node.args]
        if name in ATTENTION_CALLS:
            return self.attention(node, name, values)
        if name in ("torch.cat", "torch.concat"):
            return _concatenate(node, values)
        if isinstance(node.func, cst.Attribute):
            helper = tree.self_attribute(node.func)
            if helper is not None:
                method = tree.method(self.modules.definition.node, helper)
                if method is not None:
                    return _pass_through(values)
            owner = _flow(self.eval(node.func.value, env))
            self.note_chunks(node, owner)
            result = _method(node, owner, [_flow(v) for v in values])
            return result if isinstance(result, Flow) and result.elementwise else self.spoil(_flow(result))
        result = _pass_through(values)
        if name in _ELEMENTWISE_CALLS:
            return result
        if result.linears and not result.split and any(_flow(v).whole for v in values):
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
        flows = [_flow(labelled.get(k, WHOLE)) for k in ("query", "key", "value")]
        self.a.sites[id(node)] = AttentionSite(self.name, "forward", node, ATTENTION_CALLS[name], *flows)
        return Flow(attention=frozenset({id(node)}), split=True)

    def apply(self, path: str, value: Flow, argument: cst.BaseExpression | None) -> Shape:
        """Call of a module held by an attribute."""
        results: list[Shape] = []
        for site in self.modules.at(path):
            results.append(self._apply(site, path, value, argument))
        return _union_all(results)

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
                _escape(self.a, value)
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


def _flow(value: Shape) -> Flow:
    return value if isinstance(value, Flow) else _pass_through(list(value))  # type: ignore[return-value]


def _merge(left: Flow, right: Flow) -> Flow:
    """What a variable is after two paths came together; whole on one path and sharded on the other is mixed."""
    if left == NOTHING or right == NOTHING:
        return right if left == NOTHING else left
    if left.whole != right.whole:
        return replace(right if left.whole else left, mixed=True)
    return Flow(
        left.linears | right.linears, left.attention | right.attention, left.split or right.split,
        left.elementwise and right.elementwise, left.mixed or right.mixed,
        left.parts if left.parts == right.parts else (),
        left.tainted or right.tainted,
    )  # fmt: skip


def _union_all(values: list[Shape]) -> Shape:
    if not values:
        return WHOLE
    if all(isinstance(v, tuple) for v in values) and len({len(v) for v in values}) == 1:  # type: ignore[arg-type]
        columns = zip(*(v for v in values if isinstance(v, tuple)), strict=True)
        return tuple(_union_all(list(column)) for column in columns)
    result = _flow(values[0])
    for each in values[1:]:
        result = _merge(result, _flow(each))
    return result


def _pass_through(values: list[Shape]) -> Flow:
    result = WHOLE
    for each in values:
        flow = _flow(each)
        if flow.tainted and not result.whole:
            result = replace(result, tainted=True)
        result = flow if result.whole else result if flow.whole else _merge(result, flow)
    return result


def _combine(left: Flow, right: Flow, number: bool = False) -> Flow:
    """Arithmetic on two tensors; a shard with a whole tensor is mixed unless the whole one is a number."""
    if left.whole and right.whole:
        return PARAMETER if left.tainted or right.tainted else WHOLE
    both = not left.whole and not right.whole
    result = _merge(left, right) if both else right if left.whole else left
    result = replace(result, tainted=left.tainted or right.tainted)
    return replace(result, mixed=result.mixed or not (both or number), parts=())


def _method(node: cst.Call, owner: Flow, values: list[Flow]) -> Shape:
    assert isinstance(node.func, cst.Attribute)
    name = node.func.attr.value
    if name in _SHAPE_ONLY:
        return WHOLE
    result = owner if not owner.whole else _flow(tuple(values))
    if result.whole:
        return WHOLE
    if name in _SPLITTING:
        heads = name == "unflatten" or len(node.args) >= 4
        return replace(result, split=heads, elementwise=False, parts=())
    if name == "flatten":
        return replace(result, split=False, parts=())
    if name in _ELEMENTWISE_METHODS:
        return result
    return replace(result, elementwise=False, parts=())


def _concatenate(node: cst.Call, values: list[Shape]) -> Flow:
    """Concatenation; along the last dimension the parts are remembered side by side."""
    parts = values[0] if values and isinstance(values[0], tuple) else tuple(values[:1])
    flows = tuple(_flow(p) for p in parts)
    result = _pass_through(list(flows))
    dim = next((a.value for a in node.args[1:] if a.keyword is None or a.keyword.value == "dim"), None)
    last = dim is not None and tree.code(dim) in ("-1", "2") and not any(f.split for f in flows)
    if last and any(not f.whole for f in flows):
        mixed = any(f.whole for f in flows)
        return replace(result, parts=flows, mixed=result.mixed or mixed)
    return replace(result, parts=())
