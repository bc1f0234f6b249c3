"""Everything the lowering rules ask of one unit, computed once per snapshot."""

from __future__ import annotations

from collections.abc import Mapping

import libcst as cst
from msgspec import Struct

from porter.facts.flow import AttentionSite, Linear
from porter.facts.geometry import Geometry, head_geometry
from porter.facts.modulation import modulations
from porter.facts.module_tree import ClassModules, module_tree
from porter.facts.projections import Merge, ProjectionGroup, linear_arguments, projection_groups
from porter.facts.sharding import Roles, infer_roles
from porter.model import Unit, Unknown


class TensorParallel(Struct, frozen=True):
    """Module trees, inferred roles, head geometry and projections to merge, of all classes of a unit. `gathered` holds
    the modulation linears of blocks."""

    modules: Mapping[str, ClassModules]
    roles: Roles
    geometry: Mapping[str, Geometry | Unknown]
    groups: Mapping[str, tuple[ProjectionGroup, ...]]
    gathered: frozenset[Linear]

    def attention(self, owner: str) -> tuple[AttentionSite, ...]:
        return tuple(s for s in self.roles.attention if s.owner == owner)

    def shards(self, owner: str) -> bool:
        """Whether any projection of the class is column-parallel."""
        return any((owner, p) in self.roles.column for p in self.modules[owner].sites)

    def merges(self) -> tuple[Merge, ...]:
        return tuple(g.merge for groups in self.groups.values() for g in groups)


_last: list[tuple[Unit, TensorParallel]] = []


def tensor_parallel(unit: Unit) -> TensorParallel:
    """The analysis of a unit. The last answer is kept, because the rules of a stratum ask about one snapshot."""
    if _last and _last[0][0] is unit:
        return _last[0][1]
    modules = module_tree(unit)
    roles = infer_roles(modules, unit.root)
    geometry: dict[str, Geometry | Unknown] = {}
    groups: dict[str, tuple[ProjectionGroup, ...]] = {}
    for name, tree in modules.items():
        widths = {
            linear_arguments(s.call)[1]
            for p in tree.sites
            if (name, p) in roles.column
            for s in tree.at(p)
            if s.is_linear
        }
        node = tree.definition.node
        assert isinstance(node, cst.ClassDef)
        geometry[name] = head_geometry(node, widths)
        groups[name] = projection_groups(tree, roles, geometry[name])
    result = TensorParallel(modules, roles, geometry, groups, modulations(modules, unit.root, roles))
    _last[:] = [(unit, result)]
    return result
